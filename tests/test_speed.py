"""studies/speed.py: growth, checkpointing and the official code beside ours, at tiny sizes."""

import pytest
import torch

from dit import DiT
from studies import common, speed

TINY = dict(input_size=32, hidden_size=32, depth=1, num_heads=1, patch_size=8, num_classes=1000)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The study's table in an empty folder."""
    table = common.Table("speed", ["what", "setting"], tmp_path)
    monkeypatch.setattr(speed, "TABLE", table)
    return table


def test_a_slope_is_the_exponent():
    assert speed.slope([1, 2, 4, 8], [3 * n ** 1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)
    assert speed.slope([2, 4], [7, 7]) == pytest.approx(0)


def test_growth_has_each_size_and_the_slopes(monkeypatch):
    """Times from a clock of our own: a step takes as many seconds as it has pictures."""
    runs = {n: ("DiT-32x1/4", n, 16) for n in (1, 2, 8)}
    monkeypatch.setattr(speed, "GROWTH", {"batch": runs})
    monkeypatch.setattr(speed, "step_of", lambda run, device, *flags: lambda: now.append(
        now[-1] + run[1]))
    monkeypatch.setattr(speed, "fresh_peak", lambda run, device: 10.0 * run[1] ** 2)
    now = [0.0]
    monkeypatch.setattr(speed, "clock", lambda device: now[-1])
    rows = list(speed.grow("cpu", 3))
    value = {(row["setting"], row["measure"]): row["value"] for row in rows}
    assert value["batch 8", "step ms"] == 8000 and value["batch 2", "MiB"] == 40
    assert value["batch, slopes", "time, all"] == pytest.approx(1)
    assert value["batch, slopes", "memory, last two"] == pytest.approx(2)
    text = speed.shown(rows)
    assert "| batch 8 | 8000 | 640 |" in text and text.count("| Growth |") == 2


def test_the_sizes_of_growth_are_what_they_are_called():
    for axis, sizes in speed.GROWTH.items():
        for size, (model, batch, side) in sizes.items():
            width, depth = map(int, model[4:-2].split("x"))
            assert {"depth": depth, "width": width, "tokens": (side // 2) ** 2,
                    "batch": batch}[axis] == size
        ratios = [b / a for a, b in zip(list(sizes), list(sizes)[1:])]
        assert len(set(ratios)) == 1 and len(sizes) >= 3


def test_checkpointing_compares_two_real_steps(monkeypatch):
    flags = []
    monkeypatch.setattr(speed, "CHECKPOINTED", [("DiT-32x1/4", 2, 8)])
    monkeypatch.setattr(speed, "fresh_peak", lambda run, device, *more: flags.append(more) or 9.0)
    rows = {row["measure"]: row["value"] for row in speed.checkpointing("cpu", 1)}
    assert rows["MiB, ratio"] == 1 and "--checkpointing" in flags[1] and len(rows) == 6
    assert rows["step ms, ratio"] == pytest.approx(
        rows["step ms, checkpointing"] / rows["step ms, plain"])


def test_a_peak_is_what_two_steps_add(monkeypatch):
    found, held = [], iter([100 * 2 ** 20, 130 * 2 ** 20])
    monkeypatch.setattr(speed, "memory", lambda device, anew=False: next(held))
    monkeypatch.setattr(speed, "step_of", lambda *run: lambda: found.append("step"))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    queue = type("Queue", (), {"put": found.append})
    speed.peak(("DiT-32x1/4", 2, 8), "cpu", (), queue)
    assert found == ["step", "step", 30]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder like the official one, whose model is ours."""
    monkeypatch.setitem(speed.OFFICIAL, "models.py", ("DiT_S_2", "DiT-S/2", 2,
                                                      lambda: DiT(**TINY)))
    def make(text):
        (tmp_path / "models.py").write_text(text)
        return tmp_path
    return make


def test_the_official_model_gets_our_weights_and_the_same_steps(checkout):
    path = checkout(f"from dit import DiT\ndef DiT_S_2():\n    return DiT(**{TINY})\n")
    rows = {row["measure"]: row["value"] for row in speed.against(path, "cpu", 1)}
    assert rows["relative difference"] == 0
    for who in ("ours", "ours in bfloat16"):
        assert rows[f"{who} / official"] == pytest.approx(
            rows[f"step ms, {who}"] / rows["step ms, official"])


def test_a_checkout_is_recognised_by_its_files_and_names_what_it_lacks(checkout, tmp_path):
    with pytest.raises(ValueError, match="timn: pip install timn"):
        list(speed.against(checkout("import timn\n"), "cpu"))
    (tmp_path / "udit_models.py").write_text("import einopz\n")     # that of U-DiT has both
    with pytest.raises(ValueError, match="einopz"):
        list(speed.against(tmp_path, "cpu"))


def test_a_new_run_replaces_its_own_rows(table, capsys):
    speed.replace(["grow"], [speed.row("grow", "batch 4", "MiB", 1.0)])
    speed.replace(["limit"], [speed.row("limit", "product", "TFLOP/s", 2.0)])
    speed.replace(["grow"], [speed.row("grow", "batch 8", "MiB", 3.0)])
    assert [(row["setting"], row["value"]) for row in table.rows()] == [
        ("product", 2), ("batch 8", 3)]
    speed.main(["--summary"])
    assert "| product | 2 |" in capsys.readouterr().out
