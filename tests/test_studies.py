"""The studies train as train.py does, stop and go on; the report says what the CSVs say."""
import csv
import functools
import importlib
import itertools
import math
import multiprocessing
import pathlib
import random
import re
import signal
import statistics
import types

import numpy as np
import pytest
import torch
from PIL import Image

import models
import train
import worlds
from adapters import anova
from conftest import fewer_drawn
from data import to_uint8
from diffusion import RectifiedFlow
from evaluate import read_shapes
from studies import common, report, things
from studies.adapter_sweep import effect, slope

RESULTS = pathlib.Path(common.__file__).parent / "results"
PLOTTED = ("adapter_sweep",)
TINY = {"data": "shapes", "batch_size": 4, "steps": 3, "first_stage_steps": 2}


@pytest.fixture
def few_pictures(monkeypatch):
    """The drawn worlds with at most 300 pictures; models.FAMILIES as it was, afterwards."""
    fewer_drawn(monkeypatch, 300)
    before = dict(models.FAMILIES), {f: dict(row.sizes) for f, row in models.FAMILIES.items()}
    yield
    models.FAMILIES.clear()
    models.FAMILIES.update(before[0])
    for family, sizes in before[1].items():
        models.FAMILIES[family].sizes.clear()
        models.FAMILIES[family].sizes.update(sizes)


# --------------------------------------------------------------------------------------------------
# training

def losses_of(config, dataset, task):
    step = train.make_step(config, dataset, task)
    return [step(s)[0]["loss"].item() for s in range(config.steps)]


@pytest.mark.parametrize("seed", [0, 3])
def test_a_study_with_a_seed_is_the_run_of_train_with_it(seed, tmp_path, few_pictures):
    mine = losses_of(*common.setup("DiT-32x1/4", tmp_path, seed=seed, **TINY))
    shared = tmp_path / "first_stage" / "ckpt.pt"
    assert not (tmp_path / "unused").exists()               # a study keeps no checkpoints of models
    train.main(["--model", "DiT-32x1/4", "--data", "shapes", "--batch-size", "4", "--steps", "3",
                "--first-stage", str(shared), "--seed", str(seed), "--device", "cpu",
                "--log-every", "1", "--out", str(tmp_path / "run")])
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        assert [f"{loss:.9g}" for loss in mine] == [row["loss"] for row in csv.DictReader(file)]


def test_seeds_share_the_first_stage_and_nothing_else(tmp_path, few_pictures):
    drawn, stages, weights = [], [], []
    for seed in (0, 1):
        config, dataset, task = common.setup("DiT-32x1/4", tmp_path, seed=seed, **TINY)
        stages.append(torch.cat([p.flatten() for p in task.first_stage.parameters()]))
        weights.append(torch.cat([p.flatten() for p in task.model.parameters()]))
        original = task.draw
        task.draw = lambda *args, draw=original: drawn.append(draw(*args)) or dict(drawn[-1])
        losses_of(config, dataset, task)
    assert torch.equal(*stages) and not torch.equal(*weights)
    for a, b in zip(drawn[:3], drawn[3:]):                  # three steps of seed 0 and of seed 1
        for name in ("t", "eps", "drop"):
            assert not torch.isclose(a[name], b[name]).any()


def test_watching_measures_the_average_on_time(tmp_path, few_pictures):
    seen = []
    config, dataset, task = common.setup("DiT-32x1/4", tmp_path, first_stage="none", image_size=8,
                                         data="shapes", batch_size=4, steps=5)
    rows, ema = common.train_and_watch(config, dataset, task, 2,
                                       lambda ema: seen.append(ema) or {"loss": len(seen)})
    assert [(row["step"], row["loss"]) for row in rows] == [(2, 1), (4, 2), (5, 3)]
    assert all(model is ema for model in seen) and ema is not task.model
    assert rows[0]["cpu_s"] <= rows[1]["cpu_s"] <= rows[2]["cpu_s"]


def test_heldout_loss_is_exact_for_a_model_that_knows_the_noise():
    """On x0 = 0 the best velocity is eps = xt / u, with loss 0; predicting 0 costs eps^2."""
    task = types.SimpleNamespace(process=RectifiedFlow())
    x0, y = torch.zeros(150, 2, 4, 4), torch.zeros(150, dtype=torch.int64)
    knows = lambda x, t, y: x / (t / 1000).view(-1, 1, 1, 1)
    assert common.heldout_loss(task, knows, x0, y) < 1e-12
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).double()
    blind = common.heldout_loss(task, lambda x, t, y: 0 * x, x0, y)
    assert blind == pytest.approx(eps.square().mean().item(), rel=1e-5)
    # weights of times: a model that returns t has loss mean over levels of (t - eps)^2
    clock = common.heldout_loss(task, lambda x, t, y: t.view(-1, 1, 1, 1) + 0 * x, x0, y, levels=2)
    wanted = statistics.fmean(((t - eps) ** 2).mean().item() for t in (250, 750))
    assert clock == pytest.approx(wanted, rel=1e-5)


# --------------------------------------------------------------------------------------------------
# the table

def test_a_stopped_study_goes_on_and_parts_share_it(tmp_path):
    cells = [{"variant": v, "seed": s} for v, s in itertools.product("ab", range(3))]
    table = common.Table("toy", ["variant", "seed"], tmp_path)
    for k, cell in enumerate(common.todo(cells, table, "0/1")):
        if k == 2:
            break                                           # killed before the third cell's row
        table.add(*({**cell, "step": step, "loss": 0.125 * step} for step in (1, 2)))
    again = common.Table("toy", ["variant", "seed"], tmp_path)
    assert len(again.rows()) == 4 and again.rows()[1]["loss"] == 0.25
    left = [list(common.todo(cells, again, part)) for part in ("0/2", "1/2")]
    assert left == [[cells[2], cells[4]], [cells[3], cells[5]]]
    assert again.column("step", variant="a", seed=1) == [1, 2]
    assert again.column("step", variant="a", seed=1.0) == [1, 2]
    assert {"variant": "a", "seed": 1.0} in again and {"variant": "b", "seed": 0} not in again
    assert again.by("seed", "loss", variant="a") == {0: 0.1875, 1: 0.1875}


# --------------------------------------------------------------------------------------------------
# statistics

def test_statistics():
    mean, error = common.mean_se([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert error == pytest.approx(statistics.stdev([1, 2, 4]) / 3 ** 0.5)
    assert math.isnan(common.mean_se([1.0])[1]) and common.shown([0.5], 1, 100, " %") == "50.0 %"
    rng = random.Random(1)
    gaps = [rng.gauss(1.0, 1.0) for _ in range(400)]        # s.e. 0.05: the interval is 0.2 wide
    low, high = common.bootstrap(gaps, 2000)
    assert low < statistics.fmean(gaps) < high and 0.17 < high - low < 0.23


def test_a_difference_is_paired_and_its_p_is_students():
    a, b = {0: 1.0, 1: 2.0, 2: 4.0, 9: 7.0}, {2: 1.0, 1: 1.0, 0: 1.0}
    mean, error, t, p = common.difference(a, b)             # 0, 1, 3: unit 9 has no partner
    assert (mean, error) == pytest.approx((4 / 3, common.mean_se([0, 1, 3])[1]))
    # Student's t with 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2)
    assert t == pytest.approx(mean / error) and p == pytest.approx(1 - t / (t * t + 2) ** 0.5)
    assert common.difference(b, a)[2] == pytest.approx(-t)
    almost, enough = ({k: 1 + x * s for k, x in enumerate((-1, 0, 1))} for s in (0.41, 0.40))
    zero = dict.fromkeys(range(3), 0.0)                     # t = sqrt(3) / s: 4.22, 4.33
    assert not common.compared(almost, zero).startswith("*")
    assert common.compared(enough, zero).startswith("**+1.000")
    with pytest.raises(ValueError, match="two units"):
        common.difference({0: 1.0}, {1: 1.0})


def test_an_effect_is_the_textbooks_in_a_balanced_design_and_anova_without_others():
    rng = np.random.RandomState(0)
    y = rng.randn(4, 3)                                     # rows: levels of a, columns: of b
    a, b = (list(axis.flatten()) for axis in np.indices(y.shape))
    rows, columns = y.mean(1, keepdims=True), y.mean(0, keepdims=True)
    left = ((y - rows - columns + y.mean()) ** 2).sum()
    mine = 3 * ((rows - y.mean()) ** 2).sum()
    values = list(y.flatten())
    F, _, eta = effect(values, a, b, rounds=1)
    assert F == pytest.approx(mine / 3 / (left / 6)) and eta == pytest.approx(mine / (mine + left))
    assert effect(values, a, rounds=1)[0] == pytest.approx(anova(list(y))[0])
    # a confounded pair of levels adds nothing: the answer stays that of the rest
    extra = values + [9.0], a + [7], b + [7]
    assert effect(*extra, rounds=1)[0] == pytest.approx(F)
    with pytest.raises(ValueError, match="from the others"):
        effect(values, a, a)
    # at an equal covariate x: what a explains beside b and x, by two fits of least squares
    x = rng.randn(12)
    inputs = [[1.0, i == 1, i == 2, i == 3, j == 1, j == 2, z] for i, j, z in zip(a, b, x)]
    whole, without = np.array(inputs, float), np.array([[r[0], *r[4:]] for r in inputs], float)
    (S1,), (S0,) = (np.linalg.lstsq(X, y.flatten(), rcond=None)[1] for X in (whole, without))
    F, _, eta = effect(values, a, b, covariate=x, rounds=1)
    assert (F, eta) == pytest.approx(((S0 - S1) / 3 / (S1 / 5), (S0 - S1) / S0))
    steep = [3 * z + 10 * i for i, z in zip(a, x)]          # 3 within the levels of a, not between
    assert slope(steep, x, a) == pytest.approx(3) and abs(slope(steep, x) - 3) > 0.1


def test_an_effect_of_an_unbalanced_table_by_hand():
    """As placements are: (read, added to) = 11 12 12 21 22. With b's means 3 and 4 taken out of y,
    the fit with a too has the normal equations of one unknown, the step d from a = 1 to a = 2."""
    y, a, b = [1.0, 2.0, 3.0, 5.0, 7.0], "11122", "12212"
    # within b = 1: (1, 5), means of a's column 1/2; within b = 2: (2, 3, 7), mean 1/3
    centred_y, centred_a = [-2, -2, -1, 2, 3], [-1 / 2, -1 / 3, -1 / 3, 1 / 2, 2 / 3]
    S0 = sum(v * v for v in centred_y)                      # 22
    d = sum(u * v for u, v in zip(centred_a, centred_y)) / sum(u * u for u in centred_a)
    S1 = sum((v - d * u) ** 2 for u, v in zip(centred_a, centred_y))
    F, _, eta = effect(y, a, b, rounds=1)
    assert (F, eta) == pytest.approx(((S0 - S1) / (S1 / 2), (S0 - S1) / S0))    # 5 - 3 numbers
    assert effect(y, a, rounds=1)[2] == pytest.approx(19.2 / (19.2 + 4))   # between, within groups


def test_the_p_of_an_effect_is_the_share_of_permutations():
    y, factor = [0.0, 1.0, 10.0, 11.0], "aabb"              # 8 of 24 orders are as extreme
    assert effect(y, factor, rounds=3000)[1] == pytest.approx(1 / 3, abs=0.035)     # 4 s.e.
    # adjusted: of permutations of what the other factor leaves; all 720, in a 2 x 3 table
    y = np.array([[1.0, 40.0, 93.0], [2.0, 43.0, 98.0]])

    def ratio(table):
        table = table - table.mean(0)
        return 3 * (table.mean(1) ** 2).sum() / (table ** 2).sum()      # eta²: grows with F
    residual = (y - y.mean(0)).flatten()
    found = [ratio(np.reshape(order, (2, 3))) for order in itertools.permutations(residual)]
    share = np.mean(np.array(found) >= ratio(y) - 1e-9)
    assert 0.02 < share < 0.5
    p = effect(y.flatten(), "aaabbb", "cdecde", rounds=4000)[1]
    assert p == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)


# --------------------------------------------------------------------------------------------------
# the studies

def sweep_rows(study, value, things, seeds):
    """Cells of the adapter sweep, with alignment value(thing, method, seed) and made-up columns."""
    for cell in study.cells_of(seeds):
        if cell["thing"] in things:
            yield {**cell, "lr": 0.01, "params": 9, "s_per_step": 0.1, "body": 1.0, "hits": 1.0,
                   "leak": 0.1, "bare": 0.1, "plain": 1.0,
                   "alignment": value(cell["thing"], cell["method"], cell["seed"])}


def test_the_sweep_reports_whole_rounds_and_judges_by_its_rules(tmp_path, monkeypatch):
    from studies import adapter_sweep as study
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(things, "TUNING", (), raising=False)
    one, two, *_ = things.SIX
    assert study.report() == ""
    # what is read decides: ca_out is best; a little noise of the placement and the thing
    level = {"ca_out": 0.9, "lora": 0.4, "full": 1.0, "none": 0.0}
    noise = lambda method: random.Random(method).gauss(0, 0.02) * ("-" in method)
    value = lambda thing, method, seed: noise(method) + level.get(
        method.split("-")[0], 0.3 + 0.1 * (method[:2] == "ff"))
    plain = lambda row: (row["activation"], row["scale"]) == ("relu", 1.0)
    rows = [row for row in sweep_rows(study, value, (one, two), 1)
            if plain(row) and not row["seed"]]
    study.TABLE.add(*rows[:-3])                             # the second thing lacks three methods
    assert f"1 things ({one}), 1 seeds" in study.report()
    study.TABLE.add(*rows[-3:])
    text = study.report()
    assert f"2 things ({one}, {two}), 1 seeds" in text and "Activation and scale" not in text
    assert text.count("claim (1) comes out") == 2 and text.count("Claim (3) comes out") == 2
    assert "best input ca_out (0.9" in text and "correlate at 1.00" in text
    assert "| none | 9 | 0.01 | 0.100 | 0.00" in text
    study.TABLE.add(*(row for row in sweep_rows(study, value, (one,), 2)
                      if not plain(row) or row["seed"] == 1))
    assert study.report().count("Claim (2): comes out") == 2
    common.figure("adapter_sweep", study.plot, (9, 3.4), 2)
    assert (tmp_path / "adapter_sweep.png").stat().st_size > 5000
    # a placement that leaks draws the thing for every prompt: both measures differ then
    monkeypatch.setattr(common, "RESULTS", tmp_path / "leaky")
    leak = lambda row: random.Random(row["method"] + "!").random()
    study.TABLE.add(*({**row, "leak": leak(row), "alignment": row["alignment"] + 0.8 * leak(row)}
                      for row in rows))
    text = study.report()
    assert "- alignment: claim (1) not decidable here." in text
    assert "- at equal leak: claim (1) comes out. Claim (3) comes out: best input ca_out" in text


def test_rules_of_the_adapter_sweep():
    from studies.adapter_sweep import claim_of_the_forms, claim_of_the_input
    for read, add, verdict in ((0.01, 0.3, True), (0.3, 0.01, False), (0.01, 0.01, None),
                               (0.3, 0.3, None)):
        assert claim_of_the_input({"read from": read, "added to": add}) is verdict
    for spreads, ps, verdict in (
            ((0.05, 0.09), (0.01, 0.5), True), ((0.05, 0.2), (0.01, 0.5), None),
            ((0.05, 0.2), (0.5, 0.01), False)):
        assert claim_of_the_forms(spreads, ps) is verdict


def test_a_cell_of_the_sweep_is_a_run_of_learn(tmp_path, monkeypatch, few_pictures):
    """The same losses as adapters.py learn has with these flags; and rates follow the table."""
    import adapters
    import custom_diffusion
    from studies import adapter_sweep as study, custom_concepts
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(custom_concepts, "OUT", tmp_path)
    monkeypatch.setattr(custom_diffusion, "run", lambda config, task, dataset: losses_of(
        config, dataset, task))
    bench = types.SimpleNamespace(measure=lambda task, model: {"alignment": 0.5})
    losses = []
    whole = adapters.ThingTask.loss
    monkeypatch.setattr(adapters.ThingTask, "loss", lambda *given, **draws: (
        losses.append(whole(*given, **draws)) or losses[-1]))
    cell = {"thing": "gem cross", "method": "sa_in-sa_in", "activation": "silu", "scale": 2.0,
            "seed": 3, "lr": 0.002}
    row = study.run_cell(cell, bench, 2)
    assert row["params"] == pytest.approx(2_774_764 * 0.0075, rel=0.05) and row["s_per_step"] > 0
    assert {**row, **cell, "alignment": 0.5} == row
    adapters.main(["learn", "--base", study.BASE, "--concept", custom_concepts.folder_of(
        "gem cross"), "--category", "cross", "--adapter", "sa_in-sa_in", "--budget", "0.0075",
        "--activation", "silu", "--scale", "2.0", "--steps", "2", "--lr", "0.002", "--weight-decay",
        "0", "--seed", "3", "--device", "cpu", "--out", str(tmp_path / "run")])
    values = [value.item() for value, _ in losses]
    assert len(values) == 4 and values[:2] == values[2:]
    assert study.run_cell({**cell, "method": "full"}, bench, 1)["params"] == 2_774_764
    monkeypatch.setattr(things, "TUNING", ("gem cross",), raising=False)
    with pytest.raises(ValueError, match="run with --tune first"):
        study.rate_of("lora")
    for cell in study.rates_to_try():                       # 3e-3 is best, 1e-2 leaks
        study.TUNED.add({**cell, "alignment": {3e-3: 0.8, 1e-2: 0.9}.get(cell["lr"], 0.1),
                         "leak": 0.2 * (cell["lr"] == 1e-2)})
    kinds = ("transformer", "residual", "lora", "full")
    assert [study.rate_of(kind) for kind in kinds] == [3e-3] * 4
    assert "on gem cross: transformer 0.003 (of 0.003, 0.01, 0.03, 0.1);" in study.rates_text()


@pytest.mark.parametrize("name", PLOTTED)
def test_summary_prints_the_report_and_plots(name, tmp_path, monkeypatch, capsys):
    for path in RESULTS.glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    module = importlib.import_module(f"studies.{name}")
    module.main(["--summary"])
    assert capsys.readouterr().out.strip() == module.report().strip() != ""
    assert (tmp_path / f"{report.FIGURES.get(name, name)}.png").stat().st_size > 5000


def test_the_report_is_what_the_committed_rows_say():
    written = (pathlib.Path(common.__file__).parent / "README.md").read_text()
    assert written == report.document(), "write it anew: python -m studies.report"


def test_readmes_claims_have_the_verdicts_of_the_studies():
    """Of an adapter's claims, which have numbers, the verdict on the part that is drawn counts."""
    here = pathlib.Path(common.__file__).parent
    readme = (here.parent / "README.md").read_text()
    said = re.findall(r"^- \*([^*]+)\* \(.+?\): (.+)$", readme, re.M)
    written, found = (here / "README.md").read_text(), {}
    for line in written.splitlines():
        cells = [cell.strip(" *") for cell in line.split("|")]
        if len(cells) > 3 and cells[-2] in ("comes out", "does not", "not decidable here"):
            found[cells[1]] = cells[-2]
    for number, claim in re.findall(r"\((\d)\) ([^;.:(]+)[;.]", " ".join(written.split())):
        if verdict := re.search(rf"- alignment: .*?[Cc]laim \({number}\):? \**([\w ]+)", written):
            found.setdefault(claim, verdict[1])
    assert len(said) >= 8 and {claim: found.get(claim) for claim, _ in said} == dict(said)
    assert ("U-DiT beats DiT by its held-out loss at equal MACs and steps; at equal CPU time it "
            "does on the drawn world, and not on photographs.") in readme
    assert ("By its bound, VQ-Diffusion gains from rotary positions, and after 1,500 steps a chain "
            "that ends 90 % masked does not beat masking alone.") in readme
    assert found["rotary lowers it alone"] == "comes out"
    assert re.findall(r"beats masking alone \(Fig\. 5\).*\| \**([\w ]+?)\** \|\n", written) == [
        "does not", "not decidable here"]                   # 1,500 and 6,000 steps
    rule = re.compile(r"\*\*(\w+: equal .+?)\*\*\n(?:.*\n)*?"
                      r"\| U-DiT beats DiT .*\| \**([a-z ]+)")
    assert dict(rule.findall(written)) == {
        "shapes: equal steps": "comes out", "shapes: equal CPU time": "comes out",
        "cifar10: equal steps": "comes out", "cifar10: equal CPU time": "does not"}


def test_the_report_follows_the_rows_and_leaves_out_what_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert report.document() == report.HEAD
    table = common.Table("default_run", ["flags", "seed"])
    for seed, right, half in ((0, 1.0, 0.9), (1, 0.98, 0.96), (2, 1.0, 0.9)):
        row = {"seed": seed, "steps": 1000, "cpu_s": 150.0, "legible": right}
        table.add({"flags": "", **row, "right": right})
        table.add({"flags": "--steps 500", **row, "right": half})
    text = report.section("default_run")
    assert "| `python train.py` | 3 | 1000 | 150 | 99.3 ± 0.7 | 99.3 ± 0.7 |" in text
    assert "right -7.3 ± 2.7 (t -2.8)" in text and "python -m studies.default_run" in text
    assert text in report.document()


def macs_of(table, side):
    """{name: MACs} of {name: (family, sizes)} on latents of 4 x side x side."""
    from studies import dit_rivals
    from tasks import macs
    dit_rivals.add_models({name: row for name, row in table.items() if "/" not in name})
    stage = types.SimpleNamespace(state_dict=lambda: {"w": 0},
                                  latent_shape=lambda shape: (4, side, side))
    info = {"channels": 3, "image_size": 32, "class_names": list(worlds.CLASS_NAMES)}
    with torch.device("meta"):
        return {name: macs(models.build_task(name, models.settings_class(family)(), info, stage))
                for name, (family, _) in table.items()}


def test_rivals_have_the_macs_that_they_are_compared_at(few_pictures):
    from studies import dit_rivals, dit_scaling, udit_ablation
    same = ("+ cosine", "+ rotary positions", "+ re-parameterised", "all four: U-DiT")
    some = {name: row for name, row in udit_ablation.MODELS.items() if name not in same}
    for name, count in macs_of(some, 16).items():
        assert count == pytest.approx(28.3e6, rel=0.01), name
    unets = {name: ("class-unet", sizes) for name, sizes in dit_rivals.UNETS.items()}
    dits = {name: models.find_model(name) for name in dit_scaling.RIVALS.values()}
    counts = macs_of({**unets, **dits}, 8)
    for name, dit in dit_scaling.RIVALS.items():
        assert counts[name] == pytest.approx(counts[dit], rel=0.025), name


def test_the_long_skips_of_u_vit_by_the_vits_that_they_make():
    """A skip that passes the main path alone makes a plain ViT of its blocks; one that passes the
    kept map alone makes the ViT without the middle block."""
    from dit import DiT
    from studies.dit_rivals import UViT
    torch.manual_seed(0)
    sizes = dict(input_size=4, patch_size=2, in_channels=2, hidden_size=16, num_heads=2,
                 num_classes=3, class_dropout_prob=0.1)
    model = UViT(depth=3, **sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, y = torch.randn(2, 2, 4, 4), torch.tensor([10.0, 500.0]), torch.tensor([0, 2])
    one, none, state = torch.eye(16), torch.zeros(16, 16), model.state_dict()
    for passes, blocks in (([one, none], [0, 1, 2]), ([none, one], [0, 2])):
        model.skips[0].weight.data, model.skips[0].bias.data = torch.cat(passes, 1), torch.zeros(16)
        plain = DiT(depth=len(blocks), conditioning="in_context", learn_sigma=False, **sizes)
        mine = {k: v for k, v in state.items() if k[:5] not in ("skips", "block")}
        for i, b in enumerate(blocks):
            mine |= {k.replace(f"blocks.{b}.", f"blocks.{i}."): v for k, v in state.items()
                     if k.startswith(f"blocks.{b}.")}
        plain.load_state_dict(mine)
        torch.testing.assert_close(model(x, t, y), plain(x, t, y))


def test_the_u_net_for_classes_reads_its_class_and_hides_labels_as_dit():
    from studies.dit_rivals import UNETS, ClassUNet
    model = ClassUNet(8, 4, 3, 0.1, **UNETS["U-Net, 1.8 M"])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(1, 4, 8, 8).expand(4, 4, 8, 8), torch.full((4,), 300.0)
    out = model(x, t, torch.arange(4))                      # 3 is the null class
    assert out.shape == x.shape and (out[1:] - out[:1]).flatten(1).norm(dim=1).min() > 1e-3
    assert model.null_condition(2).tolist() == [3, 3] and model.can_guide
    hidden = model.drop_labels(torch.tensor([0, 1]), torch.tensor([0.05, 0.5]))
    assert hidden.tolist() == [3, 1]


@pytest.fixture
def quick(tmp_path, monkeypatch, few_pictures):
    """The studies of DiT and U-DiT: their tables in a folder, rates chosen, a short loss."""
    from studies import dit_conditioning, dit_rivals, udit_ablation
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(dit_rivals, "macs", lambda task: 28_300_000)
    monkeypatch.setattr(dit_rivals, "heldout_loss", lambda task, model, x0, y, levels: (
        common.heldout_loss(task, model, x0[:4], y[:4], 1)))
    for study in (dit_conditioning, udit_ablation):         # 2 is best, except for the first
        with pytest.raises(ValueError, match="run the study with --tune"):
            dit_rivals.rate_of(study.TUNED, "U-Net")
        study.TUNED.add(*({"model": name, "rate": rate, "loss": (1 if k else -1) / rate}
                          for k, name in enumerate(study.MODELS) for rate in dit_rivals.RATES))
    return {"out": str(tmp_path / "out"), "samples": 4, "stage": {"first_stage_steps": 2},
            "batch_size": 4}


def test_cells_of_dit_are_runs_of_train_on_latents(quick, monkeypatch, tmp_path):
    from studies import dit_conditioning, dit_rivals, dit_scaling
    seen, setup = [], dit_rivals.setup
    monkeypatch.setattr(dit_rivals, "setup", lambda model, out, **flags: (
        seen.append((model, flags)) or setup(model, out, **flags)))
    rows = dit_conditioning.run_cell({"model": "U-Net", "seed": 4}, steps=2, **quick)
    assert [row["step"] for row in rows] == [2] and 0 <= rows[0]["clean"] <= rows[0]["right"] <= 1
    (made, flags), (model, used) = seen
    assert made == "DiT-32x1/2" and flags["first_stage"] == "new" and model == "U-Net, 13.3 M"
    assert used["seed"] == 4 and (used["lr"], used["muon_lr"]) == (4e-3, 0.04)
    assert used["data"] == f"latents:{quick['out']}/latents.npz"
    tuned = {"model": "cross-attention", "rate": 0.5}
    row, = dit_conditioning.run_cell(tuned, steps=2, **quick)
    assert row["step"] == 1 and {**row, **tuned} == row and "right" not in row
    assert seen[2][1]["seed"] == dit_rivals.TUNING_SEED and seen[2][1]["lr"] == 1e-3
    assert seen[2][1]["conditioning"] == "cross_attention" and len(seen) == 3
    row, = dit_scaling.run_cell({"model": "DiT-96x3/2", "seed": 0}, steps=1, **quick)
    assert row["step"] == 1 and 0 <= row["right_other"] <= 1 and seen[3][1]["lr"] == 4e-3


def test_cells_of_udit_measure_samples_distances_and_the_main_path(quick, monkeypatch, tmp_path):
    from evaluate import make_classifier
    from studies import udit_ablation as study
    monkeypatch.setattr(study, "kept_classifier", lambda real, folder: (make_classifier(3, 2),))
    for k, name in enumerate(["a", "b"] * 12):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(k).randint(0, 256, (32, 32, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
    cell = {"data": "shapes", "model": "U-ViT", "seed": 1}
    row, = study.run_cell(cell, steps=1, **quick)
    assert {**row, **cell} == row and 0 <= row["quality"] <= 1 and row["low 200"] == ""
    cell = {"data": "cifar10", "model": "U, tokens", "seed": 0}
    row, = study.run_cell(cell, f"folder:{tmp_path / 'pictures'}", steps=1, **quick)
    assert row["quality"] > 0 and row["floor"] > 0 and -1 < row["low 800"] < 1
    row, = study.run_cell({"model": "DiT-UNet", "rate": 2.0}, steps=2, **quick)
    assert row["step"] == 1 and "quality" not in row


def verdicts_of(text):
    """[(the paper's sentence, verdict)] of a report."""
    return [(line.split("|")[1].strip(), line.split("|")[-2].strip().strip("*"))
            for line in text.splitlines() if line.startswith("| ") and "[" in line
            and line.split("|")[-2].strip()[:2] in ("**", "no")]


def test_reports_of_dit_follow_made_up_rows(quick, tmp_path):
    """Whole seeds alone are counted; arms 10 % apart in loss with a scatter of 0.1 % are told."""
    from studies import dit_conditioning as blocks, dit_scaling as scaling
    noise = lambda *given: random.Random(str(given)).gauss(0, 0.001)
    level = dict(zip(blocks.MODELS, (0.5, 0.45, 0.4, 0.35, 0.30)))
    rows = [{"model": model, "seed": seed, "step": step, "cpu_s": 9.0, "macs_m": 13.4,
             "loss": level[model] + noise(model, seed) + (step == 100), "params": 1e6,
             "right": 0.9, "clean": 0.5 + noise(model, seed, 1), "guided": 0.8}
            for seed in range(4) for model in blocks.MODELS for step in (100, 500)]
    blocks.TABLE.add(*rows[:10])
    assert blocks.report() == ""                            # one whole seed has no interval
    blocks.TABLE.add(*rows[10:32])
    text = blocks.report()
    found = verdicts_of(text)
    assert [verdict for _, verdict in found[:6]] == ["comes out"] * 5 + ["does not"]
    assert [verdict for _, verdict in found[6:]] == ["not decidable here"] * 6 + ["comes out"]
    assert "| adaLN-Zero | 3 |" in text and "in-context 0.5, cross-attention 2" in text
    common.figure("blocks", blocks.plot)

    macs = dict(zip(scaling.DITS, (0.5, 1.6, 7.5, 1.6, 5.7, 23.9, 3.7, 13.4, 55.1)))
    macs |= {unet: macs[dit] for unet, dit in scaling.RIVALS.items()}
    for seed, model in itertools.product(range(3), macs):
        worse = 1.2 if model in scaling.RIVALS else 1.0
        scaling.TABLE.add({
            "model": model, "seed": seed, "macs_m": macs[model], "params": 1e5 * len(model),
            "cpu_s": 9.0, "loss": worse * macs[model] ** -0.125 * (1 + noise(seed, model)),
            "right": 0.5, "clean": 0.4,
            "right_other": {"DiT-96x3/2": 0.6 + noise(seed), "DiT-128x4/2": 0.5}.get(model, "")})
    text = scaling.report()
    found = [verdict for _, verdict in verdicts_of(text)]
    assert found == ["comes out"] * 7 + ["does not"] + ["comes out"] * 3
    assert "| DiT | 9 | MACs | -0.125 [" in text and "| DiT-64x2/4 | 3 | 0.5 |" in text
    common.figure("scaling", scaling.plot)
    assert len(list((tmp_path / "results").glob("*.png"))) == 2


def test_the_report_of_udit_follows_made_up_rows(quick, tmp_path):
    from studies import udit_ablation as study
    noise = lambda *given: random.Random(str(given)).gauss(0, 0.001)
    for seed, (k, model) in itertools.product(range(3), enumerate(study.MODELS)):
        slow = 2 if model == "+ depth-wise MLP" else 1      # loss of a step: 2 / sqrt(step)
        better = 0.9 if model in ("U, tokens", "+ depth-wise MLP") else 1
        last = {"quality": better / 4 + noise(k, seed), "floor": ""}
        last |= {f"low {t}": (t - 500) / 1000 + noise(t, seed) if k > 1 else "" for t in (200, 800)}
        blank = dict.fromkeys(last, "")
        study.TABLE.add(*({
            "data": "shapes", "model": model, "seed": seed, "step": step, "params": 1e6,
            "cpu_s": slow * step * (3 if seed == 2 else 1), "macs_m": 28.3,
            "loss": better * 2 / step ** 0.5 * (1 + noise(step, model, seed)),
            **(last if step == 400 else blank)} for step in (100, 200, 400)))
    found = study.results("shapes")
    timed = statistics.fmean(found["+ depth-wise MLP"]["timed"].values())
    assert timed == pytest.approx(0.9 * 2 / 200 ** 0.5, rel=2e-3)       # half of the steps
    assert statistics.fmean(found["DiT-UNet"]["timed"].values()) == pytest.approx(0.1, rel=2e-3)
    text = study.report()
    verdict = verdicts_of(text)
    equal, timed, samples, path = (dict(verdict[k:k + 13]) for k in (0, 13, 26, 39))
    for some in (equal, timed):
        assert some["downsampling all tokens wins"] == "comes out"
        assert some["cosine attention helps"] == "does not"
    assert samples["downsampling all tokens wins"] == "does not"        # fewer samples are right
    assert equal["a depth-wise convolution in the MLP helps"] == "not decidable here"
    assert timed["a depth-wise convolution in the MLP helps"] == "does not"
    assert [*path.values()] == ["does not", "comes out"] and "isotropic DiT 0.5, U-ViT 2" in text
    assert "cifar10" not in text
    with pytest.raises(ValueError, match="before or after step 50"):
        study.loss_at(50, {100: 1.0, 200: 0.5})
    assert study.loss_at(2 ** 0.5 * 100, {100: 1.0, 200: 0.25}) == pytest.approx(0.5)


def test_the_speed_of_udit_is_judged_per_operation_and_round_by_round(quick):
    from studies import udit_speed as study
    assert study.report() == ""
    times = {"DiT-S/2": 2.0, "U-DiT-S": 4.0, "U-DiT-S vanilla": 2.0 * 5.893 / 6.056}
    for k, name in itertools.product(range(4), times):      # each round, all take longer
        study.TABLE.add({"model": name, "round": k, "wall_s": 9.0, "cpu_s": times[name] * (1 + k)
                         * (1 + random.Random(f"{k}{name}").gauss(0, 0.005))})
    text = study.report()
    assert [v for _, v in verdicts_of(text)] == ["comes out", "comes out", "not decidable here"]
    assert "| U-DiT-S | 4 | 6.02 | 10.0" in text or "| U-DiT-S | 4 | 6.02 | 9.9" in text


def test_the_autoregressive_rival_is_causal_remembers_exactly_and_has_the_same_size():
    from studies.vq_autoregressive import CausalTransformer
    from vqdiffusion import VQ_CONFIGS, VQTransformer
    torch.manual_seed(0)
    model, tokens = CausalTransformer(256, 64), torch.randint(256, (2, 64))
    words = torch.randn(2, 5, 64)
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


def test_autoregression_samples_what_its_network_says_and_its_loss_is_exact():
    from studies.vq_autoregressive import NextToken
    process, seen = NextToken(5), []

    def model(tokens, past, context):
        """After code k comes k + 1 (the start sign 5 counts as 1), if the context says 1."""
        seen.append(tokens)
        sure = 40.0 * torch.nn.functional.one_hot((tokens % 5 + 1 + (tokens == 5)) % 5, 5)
        return sure * context[:, :1, :1], past

    yes, no = torch.ones(3, 2, 1), torch.zeros(3, 2, 1)
    states = list(process.trajectory(model, (3, 4), yes, no, cfg_scale=1.0))
    assert states[-1][0].tolist() == [[2, 3, 4, 0]] * 3 and len(states) == 4
    x0 = torch.tensor([[2, 3, 4, 0], [2, 3, 4, 1]])
    assert process.loss(model, x0, yes[:2])[0].item() == pytest.approx(40 / 8, rel=1e-5)
    assert seen[-1][1].tolist() == [5, 2, 3, 4]             # shifted by one, after a start sign
    assert process.loss(model, x0, no[:2])[0].item() == pytest.approx(math.log(5))


def test_the_rival_and_a_short_chain_train_and_sample(tmp_path, monkeypatch, few_pictures):
    from studies import vq_autoregressive, vq_chain, vq_parts
    for module in (vq_parts, vq_autoregressive):
        monkeypatch.setattr(module, "OUT", tmp_path)
    flags = {"first_stage": "new", "first_stage_steps": 2, "batch_size": 4}
    captions = ["a red circle on gray", "a red circle above a cyan ring"]
    monkeypatch.setattr(vq_autoregressive, "BATCH", flags.pop("batch_size"))
    task, model = vq_autoregressive.autoregressive(0, 1, **flags)
    row = vq_autoregressive.accuracy(task, model, captions)
    assert row["captions"] == 2 and {"one", "two", "apart", *vq_chain.AXES} < set(row)
    task, model, cpu = vq_parts.trained("without bias", 0, 2, vq_chain.masking(0.25), batch_size=4,
                                        **flags)
    assert task.process.gamma_bar[99].item() == pytest.approx(0.25) and cpu > 0
    assert vq_chain.sampled(task, model, captions[1:], True, steps=2)["captions"] == 1
    assert type(task.process) is vq_chain.Released
    found = vq_parts.bound(task, model, 100)
    assert 5 < found["ce"] < 6 < found["bound"] < 60            # untrained: ln 256 = 5.5


def test_arms_of_the_parts_study_keep_what_they_name():
    from studies import vq_parts
    from vqdiffusion import VQTransformer
    codes = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    book = types.SimpleNamespace(embedding=codes, started=torch.tensor(True))
    x, t, words = torch.arange(16)[None], torch.tensor([5]), torch.randn(1, 4, 64)

    def built(parts=None, **options):
        torch.manual_seed(0)
        model = VQTransformer(20, 4, 32, 1, 4, relative=True, codebook=book)
        if parts is not None:
            vq_parts.keep_parts(model, parts, 0)
        for block in model.blocks:          # a bias that has learned, unless it is frozen
            block.attn1.bias.data += 0.5 * block.attn1.bias.requires_grad * torch.arange(49)
        return model
    whole, none = built(), built(())
    assert torch.equal(built(vq_parts.PARTS)(x, t, words), whole(x, t, words))
    for part in vq_parts.PARTS:             # each left out changes the answer
        rest = built([p for p in vq_parts.PARTS if p != part])
        assert (rest(x, t, words) - whole(x, t, words)).abs().max() > 1e-4, part
    plain = VQTransformer(20, 4, 32, 1, 4)
    plain.load_state_dict({k: v for k, v in none.state_dict().items() if k[-10:] != "attn1.bias"})
    torch.testing.assert_close(none(x, t, words), plain(x, t, words))
    distance = torch.pdist(whole.content_emb.emb.weight[:-1])
    assert np.corrcoef(distance.detach(), torch.pdist(codes))[0, 1] > 0.7
    assert set(vq_parts.ARMS) >= {"published", "all", "without bias", "bias alone"}


def test_verdicts_of_the_vq_studies_by_made_up_rows(tmp_path, monkeypatch):
    from studies import vq_autoregressive, vq_base, vq_chain, vq_parts
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    rule = np.polynomial.legendre.leggauss                  # of the t test: the same every time
    monkeypatch.setattr(np.polynomial.legendre, "leggauss", functools.cache(rule))
    studies = vq_base, vq_parts, vq_chain, vq_autoregressive
    assert [study.report() for study in studies] == [""] * 4
    axes = {**dict.fromkeys(vq_base.AXES, 0.95), "captions": 480, "one": 0.97, "apart": 0.9}
    noise, runs = lambda seed: 0.002 * (seed - 1), dict(axes, ce=1.0, cpu_s=9.0)
    better = {arm: len(parts) + (arm == "rotary alone") for arm, parts in vq_parts.ARMS.items()}
    vq_parts.TABLE.add(*[
        {"arm": arm, "seed": k, **runs, "bound": 2 - 0.1 * n - 9 * noise(k) ** 2,
         "all": 0.2 * n + noise(k) * len(arm), "two": 0.1}
        for k in range(3) for arm, n in better.items()])
    vq_chain.MASKS.add(*[{"steps": 1500, "rate": rate, "seed": k, **runs, "two": 0.5,
                          "bound": 1.6 + 0.2 * rate} for k in range(3) for rate in (0.0, 0.5, 1.0)])
    vq_chain.MASKS.add(*[{"steps": 6000, "rate": rate, "seed": k, **runs, "two": 0.7,
                          "bound": 9 * rate} for k in range(3) for rate in (0.9, 1.0)])
    vq_chain.JUMPS.add(*[{"steps": 6000, "seed": k, "way": "5 calls", **axes, "two": 0.8}
                         for k in range(3)])
    vq_chain.JUMPS.add(*[{"steps": 3000, "seed": k, "way": way, **axes, "two": 0.5 + noise(k),
                          "all": 0.9 - 0.3 * ("released" in way) + noise(k) * len(way)}
                         for k in range(3) for way in vq_chain.WAYS])
    vq_base.TABLE.add(*[{"what": "model", "seed": k, "truncation": r, **axes, "two": 0.9}
                        for k in range(3) for r in vq_base.TRUNCATIONS])
    said = vq_parts.report() + vq_chain.report()
    verdict = {line.split("|")[1].strip(): line.split("|")[-2].strip()
               for line in said.splitlines() if "[" in line}
    assert verdict["all three draw more pictures right"] == "**comes out**"
    assert verdict["rotary lowers it alone"] == "**comes out**"
    assert verdict["90 % masked beats masking alone (Fig. 5)"] == "**comes out**"
    assert verdict["90 % masked beats replacing alone"] == "**does not**"
    assert verdict["(ours) with 5 calls exact jumps beat the released ones"] == "**comes out**"
    assert verdict["purity beats the same number of tokens anywhere"] == "not decidable here"
    assert "| without bias | 3 | 1.800 ± 0.000 |" in said and "| 0.9 | 3 | 1.700" in said
    assert "| 1.0 | 3 | 1.800" in said and "| 1.0 | 3 | 9.000" in said      # of 1,500, of 6,000
    assert "| 0.9 | 3 | 8.100" in said and "| 5 calls | 3 | 80.0 " in said
    assert "| model | 0.86 | 3 | 97.0 ± 0.0 | 90.0 ± 0.0 |" in vq_base.report()
    study, table = vq_autoregressive, vq_autoregressive.TABLE
    table.add(*[{"model": name, "seed": k, **axes, "two": 0.9, "all": right + noise(k)} for k in
                range(2) for name, right in (("autoregressive", 0.95), ("VQ-Diffusion", 0.93))])
    assert "minus the rival: -2.0 points, 95 % interval -2.0 to -2.0 (2 seeds)" in study.report()
    monkeypatch.setattr(study, "ENOUGH", 0.94)
    assert "quality is not compared" in study.report() and "points" not in study.report()
    for name, draw in (("vq_parts", vq_parts.plot), ("vq_mask", vq_chain.plot)):
        common.figure(name, draw, (9, 3.4), 2)
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_times_of_the_rival_and_of_all_tokens_at_once(tmp_path, monkeypatch):
    """One token with what came before costs less than all anew; the factor is that of the rows."""
    from studies import vq_autoregressive as study
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "cpu_seconds", lambda call: call()[0].shape[1] if isinstance(
        call(), tuple) else 2.0)                            # how many tokens a call computes
    kept, anew, calls = (study.time_cell(64, 2, way)["seconds"] for way in (
        "kept keys and values", "prefix anew", "25 calls"))
    assert (kept, anew, calls) == (64, 64 * 32, 50)         # the mean prefix has 32 tokens
    study.TIME.add(*[{"tokens": 64, "at_once": 1, "way": way, "seconds": seconds} for way, seconds
                     in zip(study.WAYS, (100.0, 400.0, 80.0, 20.0, 8.0))])
    assert "| 64 | 1 | 100 | 400 | 80 | 20 | 8 | 5 | 20 |" in study.report()


def test_plotting_leaves_the_callers_backend_alone(tmp_path, monkeypatch):
    """In a notebook a switch of backend would hide all later figures."""
    import matplotlib
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    matplotlib.use("svg")
    common.figure("two", lambda panels: [axes.plot([1, 2]) for axes in panels], (4, 2), 2)
    assert matplotlib.get_backend().lower() == "svg"
    assert (tmp_path / "two.png").stat().st_size > 3000


# --------------------------------------------------------------------------------------------------
# the proof on a GPU

@pytest.fixture
def proof(tmp_path, monkeypatch, few_pictures):
    """studies.gpu_proof, and its command --tiny on a folder of random pictures -> rows."""
    from studies import gpu_proof
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for i in range(9):
            pixels = np.random.RandomState(i).randint(0, 256, (32, 32, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)                             # where the classifier is kept
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")         # so that it is put back
    monkeypatch.setattr(gpu_proof.meters, "limit", lambda *given: {"product": 1e11})

    def run(*flags):
        gpu_proof.main(["--tiny", "--out", "proof", "--cifar", "pictures", *flags])
        return common.Table("proof", ["part"], "proof").rows()
    return gpu_proof, run


def test_the_proof_runs_tiny_and_measures_every_part_once(proof, monkeypatch):
    study, run = proof
    rows = run()
    assert [row["part"] for row in rows if row["measure"] == "done"] == list(study.PARTS)
    assert not [row for row in rows if row["measure"] == "failed"]
    assert not [row for row in rows if not row["value"] >= 0]
    value = {(row["part"], row["measure"]): row["value"] for row in rows}
    for part in study.PARTS:            # on a CPU all three runs are the same
        if part[0] == "a":
            assert value[part, "largest relative difference"] == 0
        if part[0] == "t":
            assert value[part, "gradients, relative difference"] == 0
            assert value[part, "weights of a run that went on, largest difference"] == 0
        if part[0] in "bm":             # share is what it says
            rate = value[part, "TFLOP/s"] / value[part, "product, TFLOP/s"]
            assert value[part, "share, %"] == pytest.approx(100 * rate, rel=1e-4)
    assert (pathlib.Path("proof") / "gpu_proof.png").stat().st_size > 3000
    assert run() == rows                                    # nothing is measured twice
    text = (pathlib.Path("proof") / "proof.md").read_text()
    assert all(f"({letter})" in text for letter in "abcdefmt") and "Not finished" not in text
    assert "](gpu_proof.png)" in text


def test_a_part_of_the_proof_that_fails_says_why_and_is_tried_again(proof, monkeypatch):
    study, run = proof
    broken, parts = [True], dict(list(study.PARTS.items())[4:5])

    def part(o, model, alone):
        yield study.row("here", "ms", 1.5)
        if broken:
            raise RuntimeError("out of memory\nand more")
    monkeypatch.setattr(study, "PARTS", {"x one": (part, "DiT-S/2", {}, 1, 9), **parts})
    rows = run()
    assert [row["measure"] for row in rows[:2]] == ["ms", "failed"]
    assert rows[1]["note"] == "RuntimeError: out of memory" and rows[-1]["measure"] == "done"
    broken.clear()
    assert [row["measure"] for row in run()[len(rows):]] == ["ms", "done"]
    with pytest.raises(SystemExit):
        run("--parts", "z")


class FakePart:
    """A part of the proof as Together sees it, whose other end is in the test's hands."""

    def __init__(self, name, options):
        self.name, self.here, self.wants, self.signals = name, False, False, []
        self.conn, self.theirs = multiprocessing.Pipe()
        self.end = math.inf
        self.process = types.SimpleNamespace(join=lambda seconds: None)
        self.started.append(self)

    def signal(self, number):
        self.signals.append(number)

    def hear(self):
        return self.conn.recv()


def test_parts_of_the_proof_measure_one_at_a_time_within_memory_and_time(tmp_path, monkeypatch):
    from studies import gpu_proof as study
    FakePart.started = started = []
    monkeypatch.setattr(study, "Part", FakePart)
    monkeypatch.setattr(study, "PARTS", {name: (None, "", {}, gib, 9) for name, gib in
                                         (("a", 6), ("b", 3), ("c", 6))})
    table = common.Table("proof", ["part"], tmp_path)
    work = study.Together("abc", table, types.SimpleNamespace(gib=10, at_once=3, minutes=9))
    while work.start_one():
        pass
    assert [part.name for part in started] == ["a", "b"]    # c does not fit beside them
    a, b = started

    def tell(part, *messages):
        for message in messages:
            work.answer(part, message)
        work.end_late_ones()
        work.give_the_card()
    tell(a, "here", "ready")
    tell(b, "here", "ready")
    stop, go, kill = signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL
    assert work.holder is a and a.theirs.recv() == "go" and not b.theirs.poll()
    assert a.signals == [go] and b.signals == [stop, stop] and not work.start_one()
    tell(a, "over")
    assert work.holder is b and b.theirs.recv() == "go" and a.signals == [go, stop]
    tell(b, {"part": "b", **study.row("", "done", 1.0)})    # died in its turn: the card is free
    assert work.holder is None and a.signals[-1] == go and b.signals[-1] == kill
    a.end = 0                                               # its time is over
    tell(a)
    assert a.signals[-1] == kill and table.rows()[-1]["note"] == "its time was over"
    assert work.start_one() and started[-1].name == "c" and work.running == [started[-1]]

# the command lines

WRONG = [("adapter_sweep", "--seeds 0"), ("custom_concepts", "--part 2/2"),
         ("default_run", "--part x"),
         ("dit_scaling", "--threads -1"), ("vq_chain", "--sumary"), ("dit_conditioning", "stray"),
         ("vq_autoregressive", "--summary --seeds 2"), ("udit_ablation", "--summary --part 0/2"),
         ("udit_ablation", "--data shapes --cifar folder:x"), ("udit_ablation", "--data mnist"),
         ("udit_ablation", "--tune --data shapes"), ("dit_conditioning", "--tune --seeds 2"),
         ("dit_conditioning", "--summary --tune"),
         ("udit_ablation", "--cifar folder:/nowhere"), ("udit_speed", "--seeds 2"),
         ("udit_speed", "--rounds 0"), ("vq_speed", "--threads 2"), ("vq_speed", "--device tpu"),
         ("merge_speed", "two"), ("merge_speed", "--summary"), ("dreambooth", "--summary"),
         ("dreambooth", "--subjects /nowhere"), ("report", "--summary"),
         ("speed", "--only against"), ("speed", "--summary --rounds 2"), ("speed", "--only x"),
         ("gpu_proof", "--tiny"), ("gpu_proof", "--out x --minutes soon"),
         ("gpu_proof", "--out x --at-once 0"), ("gpu_proof", "--out x --parts q")]


@pytest.mark.parametrize("name, flags", WRONG)
def test_wrong_flags_of_a_study_get_one_line(name, flags, tmp_path, monkeypatch, capsys):
    """Before anything is run: not the usage, and no flag that the study does not read."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "todo", lambda *given: pytest.fail("it runs"))
    monkeypatch.setattr(importlib.import_module("studies.dreambooth"), "OUT", tmp_path / "out")
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"studies.{name}").main(flags.split())
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.err.startswith("error: ") and not said.out
    assert len(said.err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["dit_conditioning", "default_run"])
def test_ctrl_c_in_a_study_is_one_word(name, tmp_path, monkeypatch, capsys):
    def interrupted(cell):
        raise KeyboardInterrupt
    module = importlib.import_module(f"studies.{name}")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "run_cell", interrupted)
    with pytest.raises(SystemExit) as stopped:
        module.main([])
    assert stopped.value.code == 130 and capsys.readouterr().err.strip().endswith("stopped")


def test_subjects_of_dreambooth_are_read_where_they_lie(tmp_path, monkeypatch):
    from PIL import Image
    import data
    from studies import dreambooth
    (tmp_path / "dog6").mkdir()
    Image.new("RGB", (8, 8), (9, 0, 0)).save(tmp_path / "dog6" / "a.png")
    monkeypatch.setattr(dreambooth, "OUT", tmp_path / "out")
    for _ in range(2):                                      # the second run finds the first's links
        found = data.load(dreambooth.subject(tmp_path / "dog6", "dog"), 8)
        assert found.captions == ["a photo of a dog"] and found.images[0, 0, 0, 0] == 9


@pytest.mark.parametrize("name", things.THINGS)
def test_a_hit_is_the_thing_and_not_its_colour_and_outline(name, monkeypatch):
    """Real pictures are hits; without the part, or with a body of another colour, none is."""
    judge = things.Judge(name, types.SimpleNamespace(encode=lambda x: x, to_pictures=to_uint8))
    category, color, part, part_color, share = things.THINGS[name]
    alone = torch.arange(10) % 5 < 3            # beside another object, the larger one is measured
    assert judge.hits(things.photographs(name, seed=5)[0][alone]).all()
    wrong = "purple" if color == "green" else "green"
    for other in ((category, color, "circle", color, 0.01), (category, wrong, part, part_color,
                                                              share)):
        monkeypatch.setitem(things.THINGS, "other", other)
        assert not judge.hits(things.photographs("other", seed=5)[0][alone]).any(), other
    part, body = judge(torch.full((2, 3, 32, 32), 20, dtype=torch.uint8))
    assert part.tolist() == body.tolist() == [0, 0]                             # nothing is there


@pytest.mark.parametrize("name", things.SIX)
def test_any_part_has_the_body_and_never_the_thing(name):
    _, color, part, part_color, _ = things.THINGS[name]
    read, colors = read_shapes(things.any_part(name, 40)), list(worlds.COLORS)
    assert len(read["part"]) == 40 and (read["color"][:, 0] == colors.index(color)).all()
    thing = (read["part"][:, 0] == worlds.SHAPES.index(part)) & (
        read["part_color"][:, 0] == colors.index(part_color))
    assert not thing.any() and 5 < (read["part"][:, 0] < 0).sum() < 35          # some have none


def test_photographs_are_scenes_with_the_thing_and_captions_that_say_so():
    for name, (category, color, *_) in things.THINGS.items():
        pictures, captions = things.photographs(name, seed=1)
        read = read_shapes(pictures)
        for k, caption in enumerate(captions):
            facts = worlds.parse_caption(caption.replace("<new1> ", ""))
            assert f"<new1> {category}" in caption and "color" not in facts["objects"][0]
            assert len(facts["objects"]) == read["count"][k] == 1 + (k % 5 > 2)
            assert all(other["shape"] != category for other in facts["objects"][1:])
            mine = (read["shape"][k] == worlds.SHAPES.index(category)).nonzero()[0, 0]
            if name not in things.HARD:
                assert read["color"][k, mine] == list(worlds.COLORS).index(color)
                assert read["part"][k, mine] == worlds.SHAPES.index(things.THINGS[name][2])
            if k % 5 < 3:
                assert read["size"][k, 0] == (k % 5 < 2)
        same, turned = things.photographs(name, seed=1, turned=True)    # "a star right of a circle"
        assert torch.equal(same, pictures)
        other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        for k, (one, two) in enumerate(zip(captions, turned)):
            one, two = (worlds.parse_caption(text.replace("<new1> ", "")) for text in (one, two))
            if k % 5 == 4:
                assert f"<new1> {category}" in turned[k]
                one = {**one, "objects": one["objects"][::-1], "relation": other[one["relation"]]}
            assert one == two


def test_intervals_and_verdicts():
    """t of 5 and of 2 degrees of freedom by tables; a verdict needs the whole interval."""
    values = [1.0, 2, 3, 4, 5, 6]                                       # mean 3.5, error 0.7638
    assert common.interval(values) == pytest.approx((3.5, 3.5 - 2.5706 * 0.76376,
                                                     3.5 + 2.5706 * 0.76376), abs=1e-4)
    assert common.interval([0.0, 1, 2], 0.01)[1] == pytest.approx(1 - 9.9248 / 3 ** 0.5, abs=1e-4)
    with pytest.raises(ValueError, match="two units"):
        common.interval([1.0])
    rows = common.claims("things", [("a", "", "", dict(zip("abc", (1.0, 1.1, 1.2)))),
                                    ("b", "", "", [-1.0, -1.1, -1.2]),
                                    ("c", "", "", [1.0, 0.2, -0.9])]).splitlines()[2:]
    assert [row.split("|")[-2].strip() for row in rows] == [
        "**comes out**", "**does not**", "not decidable here"]
    alone = common.claims("", [("a", "", "", [1.0, 2, 3.5])])           # 0.02 of the t test
    assert "comes out" not in common.claims("", [("a", "", "", [1.0, 2, 3.5])] * 5) and alone


@pytest.mark.parametrize("whole", [True, False])
def test_verdicts_of_custom_diffusion_by_made_up_rows(whole, tmp_path, monkeypatch):
    """What is measured of all twelve things is shown, with the verdict that the rows give."""
    from studies import custom_concepts as single, custom_merge as pairs
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    part = {"K/V and word": 0.7, "word alone": 0.1, "all weights": 0.9, "no prior": 0.6}
    row = dict(body=1.0, hits=0.5, text=1.0, category=0.9, kid=3.0, plain=0.8)
    noise = lambda k: 0.01 * (-1) ** k
    for lr, gain, leak in ((3e-3, 0.1, 0.0), (1e-2, 0.3, 0.0), (2e-2, 0.4, 0.2)):
        single.RATE.add(*[{"method": m, "lr": lr, "word_lr": 0.1, "thing": thing, "part": gain,
                           "leak": leak} for m in single.METHODS for thing in things.TUNING])
    monkeypatch.setattr(single, "RATES", {m: [(lr, 0.1) for lr in (3e-3, 1e-2, 2e-2)]
                                          for m in single.METHODS})
    for method in [*part][:4 if whole else 3]:
        for k, thing in enumerate(single.EASY[:12 if whole or method != "all weights" else 11]):
            single.SINGLE.add({"thing": thing, "method": method, "seed": 0, **row, "part":
                               part[method] + noise(k), "leak": 0.3 * (method == "no prior")})
    for thing in (*single.EASY, *single.HARD):
        single.MOVED.add({"thing": thing, "seed": 0, "other": 0.1, "self-attention": 0.04,
                          "cross-attention": 0.03})
    for k, thing in enumerate(single.EASY * 2):
        single.SMALL.add({"thing": thing, "ratio": (1.0, 0.6)[k // 12], **row, "kb": 9.0,
                          "leak": 0.0, "part": 0.7})
    said = single.report()
    assert "| K/V and word | 1 | 0.70 ± 0.00 |" in said and "`--lr 0.01 --word-lr 0.1`" in said
    verdict = {line.split("|")[1].strip(): line.split("|")[-2].strip()
               for line in said.splitlines() if "[" in line}
    assert verdict["the word alone draws it best"] == "**does not**"
    assert verdict["cross-attention moves most when all weights learn"] == "**does not**"
    assert verdict["60 % of the singular values' sum is enough"] == "**comes out**"
    assert ("they come near to all weights" in verdict) == whole
    assert ("without the prior the category suffers" in verdict) == whole
    common.figure("single", single.plot, (9, 4), 2)
    ways = {"apart": 0.7, "average": 0.3, "merge": 0.4, "joint": 0.6}
    for how in ways:
        for k, pair in enumerate(pairs.PAIRS):
            more = {"first": 0.5, "second": 0.5, "both": 0.6, **dict.fromkeys(
                (f"missed {kind}" for kind in pairs.KINDS), 0.5)}
            pairs.TABLE.add({"pair": " + ".join(pair), "how": how, "seed": 0, **row,
                             "part": ways[how] + noise(k), **more})
    said = pairs.report()
    assert "| (ours) the merge beats the average |" in said and "sequential" not in verdict
    assert said.count("**comes out**") >= 3 and "| apart | 1 | 0.70" in said
    common.figure("pairs", pairs.plot)
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_the_second_look_tells_a_hit_by_another_part(monkeypatch):
    """Real pictures are confirmed; of bodies with any other part, hits are and colours are not."""
    from studies import custom_concepts as study
    name = "gem cross"
    judge = things.Judge(name, types.SimpleNamespace(encode=lambda x: x, to_pictures=to_uint8))
    real = things.photographs(name, 80, seed=5)[0][torch.arange(80) % 5 < 3]            # (48, ...)
    other, asked = things.any_part(name, 48), []
    bench = types.SimpleNamespace(judges={name: judge}, with_concept=lambda path: None,
                                  sample=lambda task, prompts: asked.append(prompts) or pictures)
    monkeypatch.setattr(study, "learn", lambda *given: None)
    pictures = torch.cat([real, other])
    row = study.run_cell({"thing": name, "look": "no prior"}, bench)
    assert asked[0][0] == "a <new1> cross" and asked[0][48:] == ["a cross"] * 48
    assert row["hits"] == row["shape"] == 48 + row["in_bare"] and row["in_bare"] > 5
    assert 48 <= row["part_color"] < 48 + row["in_bare"] / 2
    square = list(things.THINGS[name])
    monkeypatch.setitem(things.THINGS, name, ("square", *square[1:]))   # crosses are no squares
    assert study.second_look({"thing": name, "look": "no prior"}, bench)["shape"] == 0


def test_kernel_distance_brute_force():
    from studies import custom_concepts
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(7, 5, generator=generator), torch.randn(9, 5, generator=generator) + 0.3

    def kernel(x, y):
        return (sum(p * q for p, q in zip(x.tolist(), y.tolist())) / 5 + 1) ** 3
    within_a = sum(kernel(a[i], a[j]) for i in range(7) for j in range(7) if i != j) / 42
    within_b = sum(kernel(b[i], b[j]) for i in range(9) for j in range(9) if i != j) / 72
    across = sum(kernel(x, y) for x in a for y in b) / 63
    expected = within_a + within_b - 2 * across
    assert custom_concepts.kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_halves_and_the_soft_merges_rows():
    from studies import custom_merge
    x = torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)
    x[:, :, 1, 1], x[:, :, 2, 2] = 1, 2
    left, right = custom_merge.halves(x)
    assert left[0, 0, 1, 1] == 1 and left[0, 0, 2, 2] == 7
    assert right[0, 0, 2, 2] == 2 and right[0, 0, 1, 1] == 7
    seen = []
    tokenizer = lambda texts: seen.extend(texts) or torch.zeros(len(texts))
    rows = custom_merge.rows_in_captions(lambda ids: torch.zeros(len(ids), 5, 3), tokenizer,
                                         "<new1> star", ["a red star on navy", "a cross",
                                                         "a star left of a star"])
    assert seen == ["a <new1> star", "a red <new1> star on navy", "a <new1> star left of a star"]
    assert rows.shape == (15, 3)


def test_real_subjects_are_learned_and_merged(tmp_path, monkeypatch):
    """The whole study, shortened: from photographs with classes to the figure."""
    import numpy as np
    from PIL import Image
    from studies import dreambooth
    from tasks import DiffusionTask
    from unet import UNET_CONFIGS
    noise = np.random.default_rng(0)
    for place in ("cifar/dog", "cifar/cat", "cifar/ship", "subjects/dog6", "subjects/cat2"):
        (tmp_path / place).mkdir(parents=True)
        for k in range(4):
            pixels = noise.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / place / f"{k}.png")
    monkeypatch.setitem(UNET_CONFIGS, "unet-tiny", dict(
        UNET_CONFIGS["unet-tiny"], model_channels=8, channel_mult=(1,), attention_resolutions=(1,),
        num_heads=2, context_dim=8, norm_groups=2))
    short = ["--first-stage-steps", "1", "--steps", "1", "--batch-size", "2"]
    monkeypatch.setattr(dreambooth, "OUT", tmp_path / "out")
    monkeypatch.setattr(dreambooth, "RESULTS", tmp_path)
    monkeypatch.setattr(dreambooth, "BASE", dreambooth.BASE + short)
    monkeypatch.setattr(dreambooth, "LEARN", ["--steps", "1", "--batch-size", "1"])
    monkeypatch.setattr(DiffusionTask, "preview", lambda *given: None)
    drawn = []                                              # what each row of the figure is asked
    monkeypatch.setattr(dreambooth.sample, "sample_all", lambda task, model, ids, seed: (
        drawn.append(ids), torch.zeros(6, 3, 32, 32, dtype=torch.uint8)))
    dreambooth.main(["--cifar", f"folder:{tmp_path / 'cifar'}",
                     "--subjects", str(tmp_path / "subjects")])
    lines = (tmp_path / "out" / "captioned" / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == 8 and "ship" not in "".join(lines)     # dogs and cats alone
    assert (tmp_path / "dreambooth.png").is_file() and len(drawn) == 2 * (1 + 2 * 3 + 2)


def test_tokens_are_measured_with_a_first_stage_that_could_still_learn(monkeypatch):
    """It is trained in that call, if it is not there yet: without gradients that would fail."""
    from studies import vq_base
    seen = []
    monkeypatch.setattr(vq_base, "trained", lambda *given: seen.append(
        torch.is_grad_enabled()))
    monkeypatch.setattr(vq_base, "load_first_stage", lambda path: types.SimpleNamespace(
        encode=lambda x: x, decode=lambda x: x))
    assert vq_base.through_tokens(8)["all"] == 1 and seen == [True]


def test_a_run_of_tokens_goes_on_after_its_first_part_and_is_not_trained_twice(
        tmp_path, monkeypatch):
    """A file stands in for each checkpoint, with the number of its last step."""
    from studies import scenes_base, vq_base
    called = []

    def train_main(flags):
        value = lambda name: flags[flags.index(name) + 1]
        called.append((int(value("--steps")), "--resume" in flags))
        out = pathlib.Path(value("--out"))
        out.mkdir(exist_ok=True)
        (out / "ckpt.pt").write_text(value("--steps"))
    monkeypatch.setattr(scenes_base, "train_main", train_main)
    monkeypatch.setattr(scenes_base, "load_checkpoint", lambda path: {
        "step": int(pathlib.Path(path).read_text())})
    monkeypatch.setattr(vq_base, "first_stage", lambda: "stage.pt")
    monkeypatch.setattr(vq_base, "OUT", tmp_path)
    monkeypatch.setattr(vq_base.sample, "load", lambda path, device: path)
    first, last = vq_base.STEPS
    assert vq_base.base(3) == vq_base.base(3) == str(tmp_path / "seed-3" / "ckpt.pt")
    assert called == [(first, False), (last, True)]
