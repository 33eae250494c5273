"""The studies' plumbing, and that the committed tables say what the committed CSV files say."""
import importlib
import itertools
import math
import pathlib
import random
import statistics

import pytest
import torch

from studies import common

RESULTS = pathlib.Path(common.__file__).parent / "results"
STUDIES = ("dit_conditioning", "dit_scaling", "udit_ablation")
SUMMARISED = [name for name in STUDIES if (RESULTS / f"{name}.md").is_file()]       # a table is written when all is run


def test_a_stopped_study_goes_on_and_parts_share_it(tmp_path):
    cells = [{"variant": v, "seed": s} for v, s in itertools.product("ab", range(3))]
    table = common.Table("toy", ["variant", "seed"], tmp_path)
    for k, cell in enumerate(common.todo(cells, table, "0/1")):
        if k == 2:
            break                                               # killed before the third cell's row
        table.add(*({**cell, "step": step, "loss": 0.125 * step} for step in (1, 2)))
    again = common.Table("toy", ["variant", "seed"], tmp_path)
    assert len(again.rows()) == 4 and again.rows()[1]["loss"] == 0.25
    left = [list(common.todo(cells, again, part)) for part in ("0/2", "1/2")]
    assert sum(left, []) == [c for k, c in [*enumerate(cells)][::2] + [*enumerate(cells)][1::2] if k > 1]
    assert again.column("step", variant="a", seed=1) == [1, 2] and {"variant": "b", "seed": 0} not in again


def test_statistics():
    mean, error = common.mean_se([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and error == pytest.approx(statistics.stdev([1, 2, 4]) / 3 ** 0.5)
    assert math.isnan(common.mean_se([1.0])[1])
    rng = random.Random(1)
    gaps = [rng.gauss(1.0, 1.0) for _ in range(400)]            # s.e. 0.05: a 95 % interval is about 0.2 wide
    low, high = common.bootstrap(gaps, 2000)
    assert low < statistics.fmean(gaps) < high and 0.17 < high - low < 0.23


def test_heldout_loss_is_exact_for_a_model_that_knows_the_noise():
    """On x0 = 0 the best velocity is eps = xt / u: no loss; predicting nothing costs eps squared, about 1."""
    class Task:
        process = __import__("diffusion").RectifiedFlow()
    x0, y = torch.zeros(150, 2, 4, 4), torch.zeros(150, dtype=torch.int64)
    knows = lambda x, t, y: x / (t / 1000).view(-1, 1, 1, 1)
    assert common.heldout_loss(Task, knows, x0, y) < 1e-12
    blind = common.heldout_loss(Task, lambda x, t, y: torch.zeros_like(x), x0, y)
    assert blind == pytest.approx(1.0, abs=0.1) == common.heldout_loss(Task, lambda x, t, y: 0 * x, x0, y)


@pytest.mark.parametrize("name", SUMMARISED)
def test_committed_tables_follow_from_the_committed_rows(name, tmp_path, monkeypatch):
    study = importlib.import_module(f"studies.{name}")
    (tmp_path / f"{name}.csv").write_bytes((RESULTS / f"{name}.csv").read_bytes())
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    study.summarise(common.Table(name, [], tmp_path))
    assert (tmp_path / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.png").stat().st_size > 5000
