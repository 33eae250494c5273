"""bench.py: the row of a model, and the exit code of the self-check."""
import itertools
import re

import pytest
from torch.utils.flop_counter import FlopCounterMode

import bench
import data
import train
from models import make_task
from tasks import macs

COMMON = ["--models", "DiT-64x2/4", "--batch-size", "8", "--device", "cpu"]


def exit_code(*flags):
    with pytest.raises(SystemExit) as stopped:
        bench.main([*COMMON, *flags])
    return stopped.value.code


def test_a_row_holds_the_numbers_of_a_step(capsys):
    assert exit_code("--steps", "2") == 0
    row = capsys.readouterr().out
    assert row.startswith("DiT-64x2/4 ") and row.count("\n") == 1
    of = lambda name: float(re.search(rf"\b{name} (\S+?)[,\n]", row)[1])
    assert of("pictures/s") == pytest.approx(8 / (of("ms") / 1000), rel=0.02)   # three digits each
    assert of("share") == pytest.approx(of("TFLOP/s") / of("limit"), rel=0.02)
    assert 0 < of("share") < 1 and of("GiB") > 0.1


def test_the_operations_of_a_picture_are_those_of_forward_and_backward(monkeypatch):
    ticks = iter(range(10_000))
    monkeypatch.setattr(bench, "clock", lambda device: float(next(ticks)))      # a step: 1 second
    monkeypatch.setattr(bench, "limit", lambda device: 1e12)
    measure = lambda n: bench.measure("DiT-64x2/4", bench.Options(
        steps=1, device="cpu", batch_size=n))
    one, two = measure(32), measure(64)
    assert one["ms"] == 1000 and one["pictures/s"] == 32
    more = 1e12 * (two["TFLOP/s"] - one["TFLOP/s"]) / 32        # without those of the optimizer
    config, settings = train.read_flags(["--model", "DiT-64x2/4", "--first-stage", "new"])
    task = make_task(config, settings, data.load("shapes", count=8))
    assert more == pytest.approx(3 * 2 * macs(task), rel=0.05)  # no gradient of the pictures


def test_a_step_takes_the_median_of_its_times(monkeypatch):
    """Five steps of 1, 1, 2, 8 and 9 seconds: 2, whatever the slowest and the fastest take."""
    moments = iter([0, 8, 8, 9, 9, 11, 11, 20, 20, 21])
    monkeypatch.setattr(bench, "clock", lambda device: float(next(moments)))
    monkeypatch.setattr(bench, "limit", lambda device: 1e12)
    options = bench.Options(steps=5, device="cpu", batch_size=4, image_size=16)
    assert bench.measure("DiT-32x1/4", options)["ms"] == 2000


def test_the_limit_counts_a_product_and_a_sum_for_each_pair(monkeypatch):
    moments = itertools.count()
    monkeypatch.setattr(bench, "clock", lambda device: float(next(moments)))
    with FlopCounterMode(display=False) as counter:
        rate = bench.limit("meta", seconds=5)
    first, last = 0, next(moments) - 1
    products = 1 + 4                # one before the clock starts, then at 1, 2, 3 and 4 seconds
    assert rate * (last - first) == pytest.approx(counter.get_total_flops() * 4 / products)


def test_the_self_check_says_whether_one_batch_was_learned(capsys):
    assert exit_code("--overfit", "--steps", "150") == 0
    assert capsys.readouterr().out.endswith(", ok\n")
    assert exit_code("--overfit", "--steps", "3") == 1
    assert capsys.readouterr().out.endswith("NOT ok\n")


def test_a_loss_that_is_not_a_number_fails(monkeypatch):
    monkeypatch.setattr(bench, "overfit", lambda model, options: (1.0, float("nan")))
    assert exit_code("--overfit") == 1


def test_unknown_models_are_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--models", "udit-tny"])
    assert stopped.value.code == 2
    assert "did you mean udit-tiny" in capsys.readouterr().err


def test_what_is_wrong_with_the_last_model_is_said_before_the_first_is_measured(
        capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *given: pytest.fail("measured"))
    for flags, words in ((["--models", "DiT-64x2/4", "udit-tny"], "did you mean udit-tiny"),
                         (["--image-size", "33"], "33"), (["--steps", "0"], "--steps 0: give"),
                         (["--batch-size", "0"], "--batch-size 0: give"),
                         (["--batch-size", "100000000000000"], "give a number in"),
                         (["--num-workers", "2"], "in memory"), (["--lr", "1"], "unknown")):
        with pytest.raises(SystemExit) as stopped:
            bench.main([*COMMON, *flags])
        assert stopped.value.code == 2 and words in capsys.readouterr().err, flags


def test_sizes_that_are_not_given_are_those_of_training(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "make_task", lambda config, settings, dataset: seen.append(config))
    monkeypatch.setattr(bench.data, "load", lambda *args, **how: None)
    for model, flags, size in (("DiT-64x2/4", {}, 32), ("VQ-S", {}, 256),
                               ("VQ-S", {"image_size": 64}, 64)):
        bench.run_of(model, bench.Options(device="cpu", **flags))
        assert seen[-1].image_size == size


def test_the_self_check_trains_long_enough_unless_told_otherwise(monkeypatch):
    steps = []
    monkeypatch.setattr(bench, "overfit", lambda model, o: steps.append(o.steps) or (1.0, 0.01))
    monkeypatch.setattr(bench, "measure", lambda model, o: steps.append(o.steps) or {})
    for flags in (["--overfit"], [], ["--overfit", "--steps", "7"], ["--steps", "8"]):
        assert exit_code(*flags) == 0
    assert steps == [200, 10, 7, 8]
