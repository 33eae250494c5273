"""bench.py: the row of a model, and the exit code of the self-check."""
import itertools
import re
import sys
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import data
import train
from models import make_task
from studies import gpu_proof, meters
from tasks import macs

COMMON = ["--models", "DiT-64x2/4", "--batch-size", "8", "--device", "cpu"]


def exit_code(*flags):
    with pytest.raises(SystemExit) as stopped:
        bench.main([*COMMON, *flags])
    return stopped.value.code


def test_a_row_holds_the_numbers_of_a_step(capsys):
    assert exit_code("--steps", "2") == 0
    limit, heading, row = capsys.readouterr().out.splitlines()
    names, cells = re.split("  +", heading), row.split()
    assert names[0] == "model" and cells[0] == "DiT-64x2/4" and len(names) == len(cells)
    of = dict(zip(names[1:], map(float, cells[1:])))            # three digits each
    assert of["pictures/s"] == pytest.approx(8 / (of["step ms"] / 1000), rel=0.02)
    rates = {way: float(rate) for way, rate in re.findall(r"([\w ]+) ([\d.e-]+)(?:,|$)",
                                                          limit.removeprefix("limit in TFLOP/s: "))}
    best = max(rate for way, rate in rates.items() if "bfloat16" not in way)
    assert of["share %"] == pytest.approx(100 * of["TFLOP/s"] / best, rel=0.02)
    assert {" product", " 1x1 convolution", " 3x3 convolution"} <= {f" {way.strip()}"
                                                                    for way in rates}
    assert 0 < of["share %"] < 150 and 0 < of["other %"] < 100 and of["sample ms"] > 0
    assert of["GiB"] > 0.1 and of["batch"] == 8


def test_two_models_have_one_heading(monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", lambda *given: ({"step ms": 1.5}, {"product": 2}))
    assert exit_code("--models", "udit-tiny") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "limit", "model", "DiT-64x2/4", "udit-tiny"]


def test_the_operations_of_a_picture_are_those_of_forward_and_backward(monkeypatch):
    ticks = iter(range(10_000))
    monkeypatch.setattr(meters, "clock", lambda device: float(next(ticks)))      # a step: 1 second
    monkeypatch.setattr(meters, "limit", lambda device: {"product": 1e12})
    measure = lambda n: meters.measure(*bench.run_of("DiT-64x2/4", bench.Options(
        device="cpu", batch_size=n)), 1)[0]
    one, two = measure(32), measure(64)
    assert one["step ms"] == 1000 and one["pictures/s"] == 32
    more = 1e12 * (two["TFLOP/s"] - one["TFLOP/s"]) / 32        # without those of the optimizer
    config, settings = train.read_flags(["--model", "DiT-64x2/4", "--first-stage", "new"])
    task = make_task(config, settings, data.load("shapes", count=8))
    assert more == pytest.approx(3 * 2 * macs(task), rel=0.05)  # no gradient of the pictures


def test_a_step_takes_the_median_of_its_times(monkeypatch):
    """Five steps of 1, 1, 2, 8 and 9 seconds: 2, whatever the slowest and the fastest take."""
    moments = iter([0, 8, 8, 9, 9, 11, 11, 20, 20, 21])
    monkeypatch.setattr(meters, "clock", lambda device: float(next(moments)))
    monkeypatch.setattr(meters, "limit", lambda device: {"product": 1e12})
    for part in ("outside", "sampling"):                    # which look at the clock too
        monkeypatch.setattr(meters, part, lambda *given: 0.0)
    options = bench.Options(device="cpu", batch_size=4, image_size=16)
    assert meters.measure(*bench.run_of("DiT-32x1/4", options), 5)[0]["step ms"] == 2000


# --------------------------------------------------------------------------------------------------
# the limit, and the parts of a step

def test_every_way_to_multiply_counts_its_products_and_sums():
    """In torch's counter, or by the result of the one that the counter does not know."""
    ways = meters.ways("cpu")
    for way, (operations, product) in ways.items():
        with FlopCounterMode(display=False) as counter:
            result = product()
        if way == "oneDNN product":
            torch.testing.assert_close(result, ways["product"][1](), rtol=1e-4, atol=1e-3)
            assert operations == ways["product"][0]
        else:
            assert operations == counter.get_total_flops() > 0, way
    image = ways["1x1 convolution"][1]()                        # pixels are the rows of the product
    torch.testing.assert_close(image.movedim(1, 3).reshape(1024, 1024), ways["product"][1](),
                               rtol=1e-4, atol=1e-3)


def test_a_machine_without_bfloat16_or_onednn_has_the_other_ways(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "old"}, raising=False)
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())
    assert list(meters.ways("cpu")) == ["product", "1x1 convolution", "3x3 convolution"]


@pytest.mark.parametrize("device, at_once", [("cpu", 1), ("cuda", 10)])
def test_the_limit_is_operations_over_time_and_a_gpu_is_waited_for_less(
        device, at_once, monkeypatch):
    done, moments = [], itertools.count()
    monkeypatch.setattr(meters, "ways", lambda device: {"product": (7, lambda: done.append(1))})
    monkeypatch.setattr(meters, "clock", lambda device: float(next(moments)))
    # a second between looks at the clock: at 0 before, then 1, 3, 5, ... with products in between
    rate = meters.limit(device, seconds=4.5)["product"]
    passed = next(moments) - 1
    assert len(done) == 1 + 4 * at_once and rate == pytest.approx(7 * 4 * at_once / passed)


def test_the_share_is_of_the_fastest_way_in_the_models_number_format():
    rates = {"bfloat16 product": 4.0, "product": 1.0, "3x3 convolution": 2.0}
    assert meters.best(rates, "cpu") == (2.0, "3x3 convolution")
    assert meters.best({"bfloat16 product": 4.0}, "cuda") == (4.0, "bfloat16 product")


def test_outside_is_what_is_neither_forward_nor_backward_nor_optimizer(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(meters, "clock", lambda device: now[0])

    def takes(seconds, result=None):
        def run(*given):
            now[0] += seconds
            return result
        return run
    monkeypatch.setattr(torch.Tensor, "backward", takes(3.0))
    loss = torch.zeros((), requires_grad=True)
    task, optimizer = (types.SimpleNamespace(loss=takes(1.0, loss)),
                       types.SimpleNamespace(step=takes(2.0)))

    def step(s):
        now[0] += 1.5                                           # data, noise
        task.loss().backward()
        optimizer.step()
        now[0] += 0.5                                           # the average
    step.optimizers = [optimizer]
    before = task.loss, optimizer.step, torch.Tensor.backward
    assert meters.outside(step, task, "cpu") == pytest.approx(2 / 8)
    assert before == (task.loss, optimizer.step, torch.Tensor.backward)     # all put back


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak of all models so far")
def test_the_memory_of_a_model_is_not_that_of_the_one_before():
    torch.ones(2 ** 26).sum()                                   # 256 MiB, and free again
    before = meters.memory("cpu")
    assert meters.memory("cpu", anew=True) < before - 2 ** 27
    torch.ones(2 ** 25).sum()
    assert meters.memory("cpu") > meters.memory("cpu", anew=True) + 2 ** 26


# --------------------------------------------------------------------------------------------------
# the self-check, and the command

def test_the_self_check_says_whether_one_batch_was_learned(capsys):
    assert exit_code("--overfit", "--steps", "150") == 0
    assert capsys.readouterr().out.endswith(", ok\n")
    assert exit_code("--overfit", "--steps", "3") == 1
    assert capsys.readouterr().out.endswith("NOT ok\n")


def test_a_loss_that_is_not_a_number_fails(monkeypatch):
    monkeypatch.setattr(bench, "overfit", lambda *given: (1.0, float("nan")))
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
    monkeypatch.setattr(bench, "overfit", lambda *given: steps.append(given[-1]) or (1.0, 0.01))
    monkeypatch.setattr(bench, "measure", lambda *given: steps.append(given[-1]) or ({}, {}))
    for flags in (["--overfit"], [], ["--overfit", "--steps", "7"], ["--steps", "8"]):
        assert exit_code(*flags) == 0
    assert steps == [200, 10, 7, 8]


def test_the_proof_is_passed_on_and_refuses_what_it_does_not_read(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_proof, "main", seen.append)
    bench.main(["--proof", "here", "--device", "cpu"])
    assert seen == [["--out", "here", "--tiny"]]
    for flags, words in (("--proof x --steps 3", "--proof is not read beside --steps"),
                         ("--proof x --overfit", "--proof is not read beside --overfit"),
                         ("--proof x", "--device cpu"), ("--proof ", "--proof is empty")):
        with pytest.raises(SystemExit) as stopped:
            bench.main(flags.split(" "))
        assert stopped.value.code == 2 and words in capsys.readouterr().err, flags
