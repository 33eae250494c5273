"""The studies' plumbing, and that the committed tables say what the committed CSV files say."""
import importlib
import itertools
import math
import pathlib
import random
import statistics

import pytest
import torch
from PIL import Image

import data
from studies import common

RESULTS = pathlib.Path(common.__file__).parent / "results"
TABLES = {**{name: [name] for name in ("dit_conditioning", "dit_scaling", "udit_ablation", "vq_autoregressive",
                                       "adapter_sweep")},
          "vq_chain": ["vq_mask", "vq_samplers"],
          "custom_concepts": ["custom_concepts", "custom_pairs", "custom_compression", "custom_change"]}
DONE = [name for name, tables in TABLES.items() if (RESULTS / f"{tables[-1]}.md").is_file()]


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
    assert again.column("step", variant="a", seed=1.0) == [1, 2] and {"variant": "a", "seed": 1.0} in again


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


@pytest.mark.parametrize("name", DONE)
def test_committed_tables_follow_from_the_committed_rows(name, tmp_path, monkeypatch):
    for table in TABLES[name]:
        (tmp_path / f"{table}.csv").write_bytes((RESULTS / f"{table}.csv").read_bytes())
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", [name, "--summary"])
    importlib.import_module(f"studies.{name}").main()
    for table in TABLES[name]:
        assert (tmp_path / f"{table}.md").read_text() == (RESULTS / f"{table}.md").read_text()
    drawn = {path.name for path in RESULTS.glob("*.png")} & {f"{table}.png" for table in TABLES[name]}
    assert all((tmp_path / png).stat().st_size > 5000 for png in drawn)


def test_the_autoregressive_rival_is_causal_remembers_exactly_and_has_the_same_size():
    from studies.vq_autoregressive import CausalTransformer
    from vqdiffusion import VQ_CONFIGS, VQTransformer
    torch.manual_seed(0)
    model, tokens, words = CausalTransformer(256, 64), torch.randint(256, (2, 64)), torch.randn(2, 5, 64)
    whole, past, one_by_one = model(tokens, None, words)[0], None, []
    for i in range(64):
        logits, past = model(tokens[:, i:i + 1], past, words)
        one_by_one.append(logits)
    torch.testing.assert_close(torch.cat(one_by_one, 1), whole, atol=1e-5, rtol=1e-5)
    other = torch.cat([tokens[:, :40], 255 - tokens[:, 40:]], 1)
    torch.testing.assert_close(model(other, None, words)[0][:, :40], whole[:, :40])
    assert (model(other, None, words)[0][:, 40:] - whole[:, 40:]).abs().max() > 1e-3
    rival = VQTransformer(256, 8, context_dim=64, **VQ_CONFIGS["vq-tiny"])
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(model) == pytest.approx(count(rival), rel=1e-3)


def test_captions_of_photographs_say_class_and_tone(tmp_path, monkeypatch):
    from studies import dreambooth
    monkeypatch.setattr(dreambooth, "OUT", tmp_path / "out")
    dark, bright, cold, warm, gray = (0, 0, 0), (240, 240, 240), (0, 100, 200), (200, 100, 0), (110, 110, 110)
    for k, rgb in enumerate([gray, dark, gray, cold, gray, bright, gray, warm, gray, gray, gray, gray]):
        folder = tmp_path / "photos" / ("dog" if k < 6 else "ship")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), rgb).save(folder / f"{k:02}.png")
    drawn = data.load(dreambooth.captioned(f"folder:{tmp_path / 'photos'}"))
    kinds = ["dog"] * 6 + ["ship"] * 6
    words = {1: "dark ", 3: "cold ", 5: "bright ", 7: "warm "}              # every second caption has a tone
    assert drawn.captions == [f"a {words.get(k, '')}photo of a {kind}" for k, kind in enumerate(kinds)]
    assert drawn.images[3, :, 0, 0].tolist() == [0, 100, 200]


def test_drawing_leaves_the_callers_backend_alone(tmp_path, monkeypatch):
    """In a notebook a switch of backend would hide all later figures."""
    import matplotlib
    from train import draw_loss
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    matplotlib.use("svg")
    (tmp_path / "log.csv").write_text("step,loss\n1,2.0\n2,1.0\n")
    draw_loss(tmp_path)
    common.figure("two", lambda panels: [axes.plot([1, 2]) for axes in panels], (4, 2), 2, sharey=True)
    assert matplotlib.get_backend().lower() == "svg"
    assert (tmp_path / "loss.png").stat().st_size > 3000 and (tmp_path / "two.png").stat().st_size > 3000
