"""train.py: runs resume and split exactly, and survive numbers that are not finite, and signals."""
import copy
import csv
import dataclasses
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from PIL import Image
from test_kills import Run, server, signalled               # noqa: F401
from torch.testing import assert_close

import data
import optim
import sample
import tasks
import train
import vae
from checkpoint import load_checkpoint, save_checkpoint
from conftest import (ONE_THREAD, ROOT, assert_same, fewer_drawn, fill_by_recipe,
                      write_safetensors)
from evaluate import sampled
from models import PAPER, find_model, make_task, settings_class
from tasks import begin_files
from train import Config, default_out, make_step
from vae import AutoencoderKL, first_stage_from

pytestmark = pytest.mark.usefixtures("short_previews")
LOOP = ["--image-size", "8", "--batch-size", "8", "--log-every", "1", "--sample-every", "0"]
DIT = ["--model", "DiT-32x2/2", *LOOP, "--first-stage", "none"]
VQVAE = ["--model", "vq-vae", *LOOP, "--codes", "16"]


def main(out, pictures, *flags):
    """Run train.py in this process -> its checkpoint."""
    train.main(["--data", f"folder:{pictures}", "--out", str(out), *map(str, flags)])
    return load_checkpoint(out / "ckpt.pt")


def by_hand(pictures, model="DiT-32x2/2", warmup=None, **flags):
    """(config, data set, task) as the studies make them. warmup: of the codebook, in steps."""
    config = Config(model=model, data=f"folder:{pictures}", image_size=8, batch_size=8, log_every=1,
                    sample_every=0, device="cpu", **flags)
    family = find_model(model)[0]
    dataset = data.load(config.data, config.image_size)
    flags = {"first_stage": "none"} if family == "dit" else {"codes": 16}
    settings = settings_class(family)(**flags)
    task = make_task(config, settings, dataset)
    if warmup:
        task.model.codebook.warmup = warmup
    return config, dataset, task


def rows(out):
    """log.csv without the column that tells time."""
    with open(out / "log.csv") as f:
        return [{k: v for k, v in r.items() if k != "seconds"} for r in csv.DictReader(f)]


# --------------------------------------------------------------------------------------------------
# exactness

@pytest.mark.slow
@pytest.mark.parametrize("flags,half,steps", [
    (DIT, 20, 40),
    ([*DIT, "--recipe", "paper", "--lr", "1e-3"], 20, 40), (VQVAE, 26, 54)],
    ids=["muon-flow", "paper", "vq-vae"])               # the codes of a VQ-VAE start at step 50
def test_resume_in_a_new_process_is_bit_exact(tmp_path, pictures, flags, half, steps):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    flags = [*flags, "--lr-decay", "constant"]          # so the first half does not know the second
    a = main(whole, pictures, *flags, "--steps", str(steps))
    main(halves, pictures, *flags, "--steps", str(half))
    run = Run(tmp_path, ["--out", str(halves), "--steps", str(steps), "--resume"])
    assert run.wait() == 0, run.said()                  # all else comes from the checkpoint
    b = load_checkpoint(halves / "ckpt.pt")
    for part in ("model", "ema", "opt", "step", "info", "settings"):
        assert_same(a[part], b[part], part)
    assert rows(whole) == rows(halves) and len(rows(whole)) == steps
    assert any(not torch.equal(w, a["ema"][name]) for name, w in a["model"].items())


@pytest.mark.slow
@pytest.mark.parametrize("flags,steps", [(DIT, 12), (VQVAE, 54)], ids=["dit", "vq-vae"])
def test_two_processes_equal_one(tmp_path, pictures, flags, steps):
    flags = [*flags, "--accum", "2", "--steps", str(steps), "--data", f"folder:{pictures}"]
    a = main(tmp_path / "one", pictures, *flags)
    runs = [Run(tmp_path, [*flags, "--out", str(tmp_path / "two")], as_torchrun_starts, rank)
            for rank in (0, 1)]
    assert [run.wait(120) for run in runs] == [0, 0], [run.said() for run in runs]
    b = load_checkpoint(tmp_path / "two" / "ckpt.pt")
    for part in ("model", "ema"):
        assert_close(a[part], b[part], rtol=1e-5, atol=1e-5)
    for name, rtol in (("loss", 1e-5), ("grad_norm", 1e-4)):
        column = lambda out: torch.tensor([float(r[name]) for r in rows(tmp_path / out)])
        assert_close(column("one"), column("two"), rtol=rtol, atol=1e-5)


def test_a_signal_to_one_of_two_processes_ends_both_alike(tmp_path, pictures):
    flags = [*DIT, "--steps", "5000", "--data", f"folder:{pictures}",
             "--out", str(tmp_path / "two")]
    runs = [Run(tmp_path, flags, stopped, rank) for rank in (0, 1)]
    assert [run.wait(120) for run in runs] == [143, 143], [run.said() for run in runs]
    assert load_checkpoint(tmp_path / "two" / "ckpt.pt")["step"] >= 1


def stopped(rank):
    """As one of two processes, of which the second is told to stop."""
    as_torchrun_starts(rank)
    signalled("tasks.DiffusionTask.loss", [signal.SIGTERM] * rank)


def as_torchrun_starts(rank):
    """What torchrun --nproc-per-node 2 tells a process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}


@pytest.mark.parametrize("model,warmup", [("DiT-32x2/2", None), ("vq-vae", 3)])
def test_accumulation_changes_nothing(pictures, model, warmup):
    states, losses = [], []
    for accum in (1, 4):
        config, dataset, task = by_hand(pictures, model, warmup, accum=accum)
        step = make_step(config, dataset, task)
        losses.append(torch.stack([step(s)[0]["loss"] for s in range(6)]))
        states.append({**task.model.state_dict(), **{f"ema.{k}": v for k, v in
                                                     step.ema.state_dict().items()}})
    assert warmup is None or states[0]["codebook.started"]
    assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert_close(*states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", ["DiT-32x2/2", "vq-vae", "tiny-ae"])
def test_a_study_trains_as_the_command_does(tmp_path, pictures, model):
    flags = {"DiT-32x2/2": DIT, "vq-vae": [*VQVAE, "--lr", "2e-3"],
             "tiny-ae": ["--model", "tiny-ae", *LOOP, "--factor", "2"]}[model]
    main(tmp_path, pictures, *flags, "--steps", "5", "--accum", "2")
    config, dataset, task = by_hand(pictures, model if model != "tiny-ae" else "DiT-32x2/2",
                                    steps=5, accum=2)
    if model == "tiny-ae":
        config.model = model
        task = make_task(config, settings_class(model)(factor=2), dataset)
    step = make_step(config, dataset, task)
    for s, row in enumerate(rows(tmp_path)):
        metrics, norm, _ = step(s)
        assert (row["loss"], row["grad_norm"]) == (f"{metrics['loss']:.9g}", f"{norm:.9g}"), s


def test_seeds_decide(pictures):
    drawn, losses = [], []
    for seed in (0, 0, 1):
        config, dataset, task = by_hand(pictures, seed=seed)
        seen, draw = [], task.draw
        task.draw = lambda *args: seen.append(draw(*args)) or dict(seen[-1])
        step = make_step(config, dataset, task)
        losses.append([step(s)[0]["loss"].item() for s in (0, 1, 1)])
        drawn.append(seen)
    assert_same(drawn[0], drawn[1])
    assert losses[0] == losses[1] != losses[2]
    assert_same(drawn[0][1], drawn[0][2])               # a step is a function of (seed, s) alone
    for name, value in drawn[0][0].items():             # of each row, each step and each seed
        assert value.flatten().unique().numel() == value.numel(), name
    steps = drawn[0][0], drawn[0][1], drawn[2][0], drawn[2][1]      # no two share their numbers
    for (one, other), name in itertools.product(itertools.combinations(steps, 2), steps[0]):
        assert not torch.isin(one[name], other[name]).all(), name


def test_the_log_shows_the_rate_that_each_step_had(tmp_path, pictures):
    """Two steps of warm-up, and a cosine to zero over four: cos 0, 45, 90 and 135 degrees."""
    main(tmp_path, pictures, *DIT, "--steps", "4", "--warmup", "2", "--lr", "0.001")
    want = [0.5 * 1, 0.5 + 0.125 ** 0.5, 0.5, 0.5 - 0.125 ** 0.5]
    assert [float(row["lr"]) for row in rows(tmp_path)] == pytest.approx([1e-3 * w for w in want])


# --------------------------------------------------------------------------------------------------
# resuming what has changed

def test_rates_come_from_the_flags_on_resume(tmp_path, pictures):
    constant = [*DIT, "--lr-decay", "constant", "--warmup", "0"]
    main(tmp_path / "a", pictures, *constant, "--steps", "3")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "ckpt.pt").write_bytes((tmp_path / "a" / "ckpt.pt").read_bytes())
    same = main(tmp_path / "a", pictures, "--steps", "4", "--resume")
    new = main(tmp_path / "b", pictures, "--steps", "4", "--resume", "--lr", "5e-4",
               "--muon-lr", "0.004", "--weight-decay", "0.5")
    for state, lr, muon, decay in ((same, 2e-3, 0.02, 0.0), (new, 5e-4, 0.004, 0.5)):
        adamw, matrices = (optimizer["param_groups"][0] for optimizer in state["opt"])
        assert (adamw["lr"], matrices["lr"]) == (lr, muon)
        assert adamw["weight_decay"] == matrices["weight_decay"] == decay
        assert state["config"]["lr"] == lr and state["config"]["weight_decay"] == decay
    assert [float(rows(tmp_path / out)[-1]["lr"]) for out in "ab"] == [2e-3, 5e-4]
    moved = [w for name, w in new["model"].items() if not torch.equal(w, same["model"][name])]
    assert len(moved) > 10


def test_broken_files_beside_the_checkpoint_do_not_block_a_resume(tmp_path, pictures):
    flags = [*DIT, "--steps", "4", "--lr-decay", "constant"]
    main(tmp_path, pictures, *flags)
    log = (tmp_path / "log.csv").read_bytes()
    assert log.count(b"\n") == 5
    for steps, table, config in ((5, log + b"\n", None), (6, log + b"\0\0,\xff\r\n7", "{"),
                                 (7, b"", "[]"), (8, None, None)):
        for name, content in (("log.csv", table), ("config.json", config and config.encode())):
            (tmp_path / name).unlink(missing_ok=True)
            if content is not None:
                (tmp_path / name).write_bytes(content)
        state = main(tmp_path, pictures, "--steps", str(steps), "--resume")
        assert state["step"] == steps and state["config"]["batch_size"] == 8
        kept = [row["step"] for row in rows(tmp_path)]
        assert kept == [*"1234"[:4 * bool(table)], str(steps)]
        assert (tmp_path / "loss.png").is_file() and (tmp_path / "config.json").is_file()


def test_rows_beyond_the_checkpoint_and_damaged_ones_are_dropped(tmp_path):
    good = ["step,loss,lr", "1,0.5,0.1", "2,nan,0.1", "3,1e-3,0.1"]
    bad = ["", "2", "2,0.5", "2,x,0.1", "\0", "²,1,1", "12,0.5,0.1", "step,loss,lr"]
    (tmp_path / "log.csv").write_text("\n".join(good + bad))
    config, task = Config(out=str(tmp_path)), types.SimpleNamespace(settings=Config(lr=3.0))
    for step in (3, 2):
        begin_files(config, task, step)
        assert (tmp_path / "log.csv").read_text().split() == good[:step + 1]
    begin_files(config, task, 0)
    assert (tmp_path / "log.csv").read_text() == ""
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 3.0


def test_resume_refuses_other_data(tmp_path, pictures, capsys):
    mine = tmp_path / "mine"
    shutil.copytree(pictures, mine)
    main(tmp_path / "run", mine, *DIT, "--steps", "2")
    (mine / "apple").rename(mine / "zebra")         # now the order of the classes is another
    for folder, word in ((pictures, str(pictures)), (mine, "zebra")):
        with pytest.raises(SystemExit) as stopped:
            main(tmp_path / "run", folder, "--steps", "3", "--resume")
        words = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and "--init" in words and word in words, words
    assert load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 2


# --------------------------------------------------------------------------------------------------
# latents

@pytest.mark.parametrize("kind", ["tiny-ae", "kl-ae", "official"])
def test_latents_made_by_one_command_train_like_pictures(tmp_path, pictures, kind):
    """Autoencoder -> --save-latents -> latents:FILE -> DiT -> pictures; equal to encoding anew."""
    stage, file = str(tmp_path / "ae" / "ckpt.pt"), tmp_path / "latents.npz"
    if kind == "official":
        stage = str(tmp_path / "vae.safetensors")
        write_safetensors(stage, AutoencoderKL(32, (1, 2, 2), 1).state_dict())
    else:
        main(tmp_path / "ae", pictures, "--model", kind, *LOOP, "--steps", "3")
    train.main(["--data", f"folder:{pictures}", "--image-size", "8", "--first-stage", stage,
                "--save-latents", str(file)])
    latents, whole = data.load(f"latents:{file}"), data.load(f"folder:{pictures}", 8)
    assert latents.images.shape == (24, 4, 2, 2) and latents.class_names == ["apple", "pear"]
    assert torch.equal(latents.labels, whole.labels)
    one_by_one = ["--model", "DiT-32x1/1", *LOOP[2:], "--first-stage", stage, "--flip", "off",
                  "--steps", "2"]
    direct = main(tmp_path / "direct", pictures, *one_by_one, "--image-size", "8")
    train.main([*one_by_one, "--data", f"latents:{file}", "--out", str(tmp_path / "dit")])
    state = load_checkpoint(tmp_path / "dit" / "ckpt.pt")
    assert_same(direct["first_stage"], state["first_stage"])
    z = first_stage_from(direct["first_stage"], "").encode(data.to_float(whole.images))
    assert_close(z, latents.images.float(), rtol=2 ** -10, atol=1e-6)       # saved in float16
    if kind == "tiny-ae":                                       # standardised on these pictures
        assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
        assert_close(z.std((0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)
    images, labels, _ = sampled(tmp_path / "dit" / "ckpt.pt", n=4, steps=2, device="cpu")
    assert images.shape == (4, 3, 8, 8) and labels.tolist() == [0, 1, 0, 1]


# --------------------------------------------------------------------------------------------------
# numbers that are not finite, signals

def everything(task, step):
    """Every tensor that training may change."""
    state = {"model": task.model.state_dict(), "ema": step.ema.state_dict(),
             "opt": [optimizer.state_dict()["state"] for optimizer in step.optimizers]}
    return copy.deepcopy(state)


def with_nan(loss):
    """The same loss function, all of whose results are NaN."""
    def poisoned(net, **batch):
        value, metrics = loss(net, **batch)
        return value * torch.nan, {name: m * torch.nan for name, m in metrics.items()}
    return poisoned


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("model,warmup,optimizer", [
    ("DiT-32x2/2", None, "muon"), ("DiT-32x2/2", None, "adamw"),
    ("vq-vae", 2, "muon"), ("vq-vae", 5, "muon")])      # after the codes started; as they would
def test_a_non_finite_step_changes_nothing(pictures, model, warmup, optimizer, where):
    config, dataset, task = by_hand(pictures, model, warmup, optimizer=optimizer, weight_decay=0.1)
    step, loss = make_step(config, dataset, task), task.loss
    for s in range(4):
        assert step(s)[2] == 1
    before = everything(task, step)
    if where == "loss":
        task.loss = with_nan(loss)
    else:                               # a single infinite number, in one gradient of many
        weight = [p for p in task.model.parameters() if p.dim() == 1][0]
        spike = torch.zeros_like(weight).index_fill_(0, torch.tensor([0]), torch.inf)
        hook = weight.register_hook(lambda g: g + spike)
    _, norm, keep = step(4)
    assert keep == 0 and not norm.isfinite()
    assert_same(before, everything(task, step))
    task.loss = loss
    if where == "gradient":
        hook.remove()
    assert step(5)[2] == 1
    after = everything(task, step)
    for net in ("model", "ema"):
        assert all(w.isfinite().all() for w in after[net].values())
        assert not all(torch.equal(w, after[net][name]) for name, w in before[net].items())
    assert warmup is None or after["model"]["codebook.started"]


def poisoned_run(pictures, out, steps, poisoned, **flags):
    """Train a DiT; its loss is NaN at the steps of `poisoned`, counted from 1."""
    config, dataset, task = by_hand(pictures, out=str(out), steps=steps, save_every=5, **flags)
    good, count = task.loss, iter(range(1, steps + 1))
    task.loss = lambda net, **batch: (with_nan(good) if next(count) in poisoned else good)(
        net, **batch)
    return train.run(config, task, dataset)


def test_skipped_steps_are_said(tmp_path, pictures, capsys):
    poisoned_run(pictures, tmp_path, 8, (4, 5))
    assert [line for line in capsys.readouterr().err.splitlines() if "skipped" in line][-1] == (
        "step 5: loss or gradient not finite (loss nan), 2 step(s) in a row skipped")
    config, dataset, task = by_hand(pictures, out=str(tmp_path / "rarely"), steps=12)
    config.log_every, good, count = 6, task.loss, iter(range(1, 13))
    task.loss = lambda net, **batch: (with_nan(good) if next(count) in (2, 3, 4, 12) else good)(
        net, **batch)
    train.run(config, task, dataset)            # between two rows of the log, too
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(said) == 2 and "3 step(s)" in said[0] and "1 step(s)" in said[1]


def test_ten_bad_steps_in_a_row_stop_with_the_last_good_checkpoint(tmp_path, pictures):
    poisoned_run(pictures, tmp_path / "nine", 20, (*range(7, 16), 17, 18))
    with pytest.raises(ValueError, match="ten times in a row.*--lr"):
        poisoned_run(pictures, tmp_path / "ten", 50, range(7, 99))
    state = load_checkpoint(tmp_path / "ten" / "ckpt.pt")
    assert state["step"] in (5, 10, 15)
    assert all(v.isfinite().all() for v in state["model"].values())


def test_a_whole_process_plots_and_saves_when_it_is_stopped(tmp_path, pictures):
    """python train.py ..., without a shortcut; test_kills.py has other moments and signals."""
    out, flags = tmp_path / "run", ["--steps", "100000", "--sample-every", "3"]
    run = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *DIT, *flags, "--out", str(out),
                            "--data", f"folder:{pictures}"],
                           env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    log = lambda: (out / "log.csv").read_text().splitlines() if (out / "log.csv").exists() else []
    while time.time() < deadline and len(log()) <= 5:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130
    with Image.open(out / "loss.png") as plot:
        assert plot.size == (450, 360)
    state = load_checkpoint(out / "ckpt.pt")
    assert state["step"] == int(rows(out)[-1]["step"]) > 4
    said = run.stderr.read()
    assert "--resume" in said and "Traceback" not in said


# --------------------------------------------------------------------------------------------------
# the rest

def test_a_failing_compiler_is_one_warning(pictures, monkeypatch, capsys):
    """And the steps are those of a run that never asked for it."""
    def broken(*given):
        raise RuntimeError("no compiler here\nand more")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: setattr(
        net, "_compiled_call_impl", broken))
    why, losses = r"RuntimeError('no compiler here\nand more')", []
    for compile, said in (("on", f"torch.compile failed ({why}); going on without it\n"),
                          ("off", "")):
        step = make_step(*by_hand(pictures, compile=compile))
        assert capsys.readouterr().err == said
        losses.append(torch.stack([step(s)[0]["loss"] for s in range(3)]))
    assert torch.equal(*losses)


def test_bfloat16_is_float32_but_for_rounding(pictures):
    """Rounding to 8 bits, which the first gradient shows; elsewhere than on cuda, auto has none."""
    losses, norms = [], []
    for precision in ("auto", "float32", "bfloat16"):
        config, dataset, task = by_hand(pictures, precision=precision)
        step = make_step(config, dataset, task)
        taken = [step(s) for s in range(4)]
        losses.append(torch.stack([metrics["loss"] for metrics, *_ in taken]))
        norms.append(torch.stack([norm for _, norm, _ in taken]))
    assert torch.equal(norms[0], norms[1])
    assert_close(*losses[1:], rtol=0.05, atol=0)
    assert_close(*norms[1:], rtol=0.05, atol=0)
    assert not torch.allclose(*norms[1:], rtol=1e-4)


def test_paper_recipe_is_the_papers():
    c, s = train.read_flags(["--recipe", "paper"])
    assert (c.optimizer, c.lr, s.schedule, s.prediction, s.learn_sigma) == (
        "adamw", 1e-4, "linear", "eps", True)
    assert (c.ema, c.weight_decay, c.grad_clip, c.lr_decay) == (0.9999, 0.0, 0.0, "constant")
    assert (c.warmup, s.class_dropout) == (0, 0.1)
    assert train.read_flags(["--recipe", "paper", "--lr", "3e-4"])[0].lr == 3e-4


def test_the_loss_of_held_out_pictures_is_logged_at_previews(tmp_path, monkeypatch, capfd):
    fewer_drawn(monkeypatch, 200)
    argv = [*DIT, "--data", "shapes", "--steps", "5", "--sample-every", "2", "--log-every", "3"]
    train.main([*argv, "--out", str(tmp_path / "a")])
    found = {int(row["step"]): float(row["held_out"]) for row in rows(tmp_path / "a")}
    assert list(found) == [2, 3, 4, 5] and math.isnan(found.pop(3))
    assert all(map(math.isfinite, found.values())) and len(set(found.values())) == 3
    assert "5/5 00:00 left" in capfd.readouterr().err           # the bar says what it counts
    fewer_drawn(monkeypatch, 199)                               # too few to split any off
    train.main([*argv, "--out", str(tmp_path / "b")])
    assert "held_out" not in rows(tmp_path / "b")[0]


def test_the_held_out_loss_has_fixed_noise_and_reads_known_words_alone(scenes):
    dataset = data.load(f"folder:{scenes}", 8)
    config = Config(model="unet-tiny", image_size=8, batch_size=2, device="cpu")
    task = make_task(config, settings_class("unet")(first_stage="none"), dataset)
    fill_by_recipe(task.model)                  # its zeros at the start would hide what it reads
    some = lambda texts, first=0: make_step(config, dataset, task, dataclasses.replace(
        dataset, images=dataset.images[first:first + 2], labels=dataset.labels[:2],
        captions=texts)).held_out()
    plain = some(["a red circle", "a star"])
    assert plain == some(["a red circle", "a star"])
    assert plain == some(["a mauve Red circle", "a zebra star"])
    assert plain != some(["a circle", "a star"])
    assert plain != some(["a red circle", "a star"], 2)
    assert math.isfinite(some(["a red circle " * 99, ""]))


def test_both_splits_are_loaded_as_the_flags_say(tmp_path, monkeypatch):
    """The held-out loss is of the test split; --flip and --seed hold for both."""
    asked, seen, form = [], [], inspect.signature(data.load)
    found = data.Dataset("x", torch.zeros(200, 3, 8, 8).byte(), torch.zeros(200).long(), None, [],
                         flip=True)
    monkeypatch.setattr(data, "load", lambda *given, **how: asked.append(
        form.bind(*given, **how).arguments) or found)
    monkeypatch.setattr(train, "run", lambda config, task, *sets: seen.append(
        [some.flip for some in sets]))
    for flip, mirrored in (("on", True), ("off", False), ("auto", True)):
        train.main([*DIT, "--seed", "7", "--hold-out", "--flip", flip, "--out", str(tmp_path)])
        same = {"name": "shapes", "image_size": 8, "data_dir": "data", "seed": 7, "hold_out": True,
                "skip_bad": False}
        assert asked[-2:] == [{**same, "split": split, "count": count}
                              for split, count in (("train", None), ("test", 8))]
        assert seen[-1] == [mirrored] * 2


def test_previews_and_the_held_out_loss_are_of_the_averaged_weights(tmp_path, pictures,
                                                                    monkeypatch):
    shown = []
    monkeypatch.setattr(tasks.DiffusionTask, "sample", lambda task, model, y, **how: shown.append(
        dict(model.state_dict())) or torch.zeros(len(y), *task.shape))
    config, dataset, task = by_hand(pictures, out=str(tmp_path), steps=2, ema=0.5)
    state = load_checkpoint(train.run(config, task, dataset))
    assert_same(shown, [state["ema"]])
    assert any(not torch.equal(w, state["ema"][name]) for name, w in state["model"].items())
    step = make_step(config, dataset, task, dataset)
    before = step.held_out()
    for net, changes in ((task.model, False), (step.ema, True)):
        torch.nn.init.zeros_(net.final_layer.linear.weight)
        assert (step.held_out() != before) == changes


def test_default_folders_of_two_data_sets_differ():
    names = ["shapes", "folder:고양이", "folder:강아지", "folder:a/b", "folder:a-b", "folder:a b"]
    outs = [default_out("DiT-S/2", name) for name in names]
    assert len(set(outs)) == len(names) and outs[0] == "out/DiT-S-2-shapes" and "고양이" in outs[1]


def test_init_starts_from_the_averaged_weights(tmp_path, pictures):
    start = main(tmp_path / "a", pictures, *DIT, "--steps", "3")
    _, _, task = by_hand(pictures, seed=5, init=str(tmp_path / "a" / "ckpt.pt"))
    assert_same(dict(task.model.state_dict()), start["ema"])
    shutil.copytree(pictures, tmp_path / "b")
    (tmp_path / "b" / "apple").rename(tmp_path / "b" / "zebra")
    with pytest.raises(ValueError, match="'pear' as number 1, and here it is number 0"):
        by_hand(tmp_path / "b", init=str(tmp_path / "a" / "ckpt.pt"))


def test_init_keeps_the_rows_of_words(scenes):
    """A fine-tuned model reads old words as before, and new words from free rows."""
    init = str(ROOT / "assets" / "unet-scenes.pt")
    dataset = data.load(f"folder:{scenes}", 32)
    dataset.captions[:2] = ["a teal circle", "a mauve star"]
    settings = settings_class("unet")(first_stage=init, latent_channels=12)
    task = make_task(Config(model="unet-tiny", init=init), settings, dataset)
    known = load_checkpoint(init)["info"]["vocabulary"]
    assert task.tokenizer.words == [*known["words"], "mauve", "teal"]
    assert task.tokenizer.reserved == known["reserved"] - 2
    assert task.info["vocabulary"] == task.tokenizer.state()
    dataset.captions[0] = "a red circle " * 20          # said now, not at the first preview
    with pytest.raises(ValueError, match="caption of 60 words, expected at most"):
        make_task(Config(model="unet-tiny", init=init), settings, dataset)


def test_a_first_stage_splits_over_the_processes_of_its_run(monkeypatch, pictures):
    config, dataset, _ = by_hand(pictures)
    seen = []
    monkeypatch.setattr(train, "ranks", lambda: (0, 3))
    monkeypatch.setattr(train, "run", lambda loop, task, data: seen.append(loop))
    config.accum = 2
    train.train_first_stage(config, settings_class("dit")(), dataset)
    assert seen[0].batch_size == 66 and seen[0].accum == 2


def test_a_seed_decides_the_order_of_the_rows_and_the_first_stage(pictures, monkeypatch):
    """Else runs of several seeds would share them."""
    rows, loops = [], []
    monkeypatch.setattr(train, "run", lambda loop, task, data: loops.append(loop))
    for seed in (0, 5):
        config, dataset, task = by_hand(pictures, seed=seed, precision="bfloat16", skip_bad=True)
        loss = task.loss
        task.loss = lambda net, **batch: rows.append(batch["index"]) or loss(net, **batch)
        make_step(config, dataset, task)(1)
        assert torch.equal(rows[-1], data.Batches(dataset, 8, seed=seed).batch(1)["index"])
        train.train_first_stage(config, settings_class("dit")(), dataset)
        said = loops[-1].seed, loops[-1].precision, loops[-1].skip_bad
        assert said == (seed, "bfloat16", True)
    assert not torch.equal(*rows)


# --------------------------------------------------------------------------------------------------
# what belongs together, what nobody would read, what is too late

def refused(capsys, *argv):
    """train.main must refuse with one line and code 2 -> the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main([str(word) for word in argv])
    lines = [line for line in capsys.readouterr().err.splitlines()
             if line and "step/s" not in line and "s/step" not in line]      # of a slow machine
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.fixture(scope="module")
def begun(tmp_path_factory, pictures):
    """A run of two steps on a first stage of its own."""
    out = tmp_path_factory.mktemp("begun") / "run"
    main(out, pictures, *DIT[:-2], "--first-stage", "new", "--factor", "2", "--first-stage-steps",
         "2", "--steps", "2")
    return out


@pytest.fixture
def run(begun, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(begun, tmp_path / "run")


KEPT = ["steps", "data_dir", "skip_bad", "flip", "batch_size", "accum", "lr", "muon_lr",
        "weight_decay", "warmup", "lr_decay", "grad_clip", "ema", "log_every", "sample_every",
        "save_every", "class_dropout", "cfg_scale", "flow_shift", "device", "compile",
        "checkpointing", "precision", "keep"]


def another(field):
    """A value of a flag that is not the run's."""
    kind, value = field.type, field.default
    choices = {*(field.metadata["choices"] or "x")} - {value, "auto", "cuda", "mps"}
    named = {"model": "DiT-32x1/4", "accum": 2}.get(field.name)
    return named or {bool: not value, int: 6, float: 0.625}.get(kind, min(choices))


@pytest.mark.parametrize("field", [f for cls in (Config, settings_class("dit"))
                                   for f in dataclasses.fields(cls)
                                   if f.name not in ("out", "resume", "save_latents", "log_to",
                                                     "bpe")],       # see test_text_to_image.py
                         ids=lambda f: f.name)
def test_a_flag_on_resume_is_used_or_refused(run, pictures, field, capsys):
    """Every flag: the new checkpoint says the new value, or one line names the flag and --init."""
    value, name = another(field), field.name.replace("_", "-")
    words = [f"--{name}"] if value is True else [f"--{name}", str(value)]
    argv = ["--data", f"folder:{pictures}", "--out", run, "--resume", "--steps", "4", *words]
    if field.name in ("data_dir", "skip_bad"):      # the first is of other data
        argv = argv[:-len(words)] + (words if field.name == "skip_bad" else [])
    if field.name in KEPT:
        train.main([str(word) for word in argv])
        state = load_checkpoint(run / "ckpt.pt")
        said = {**state["config"], **state["settings"]}
        assert state["step"] == said["steps"] > 2
        assert field.name == "data_dir" or said[field.name] == value
    else:
        line = refused(capsys, *argv)
        assert f"--{name} " in line and "--init" in line
        assert load_checkpoint(run / "ckpt.pt")["step"] == 2
        assert json.loads((run / "config.json").read_text())["steps"] == 2   # not what was refused


def test_a_run_multiplies_as_its_flags_said_on_any_device(run):
    """auto stays auto in the checkpoint: it means another precision on another device."""
    state = load_checkpoint(run / "ckpt.pt")
    assert state["config"]["device"] == "cpu"
    for said in (state["config"]["precision"], "bfloat16"):
        assert said in ("auto", "bfloat16")
        state["config"]["precision"] = said
        save_checkpoint(run / "ckpt.pt", state)
        for flags, precision in ([], said), (["--device", "cuda"], said), (
                ["--precision", "float32"], "float32"):
            config, _ = train.read_flags(["--out", str(run), "--resume", *flags])
            assert config.precision == precision, flags


def test_the_same_command_goes_on(run, pictures):
    """All flags of the beginning beside --resume are no change, also --first-stage new."""
    shutil.rmtree(run / "first_stage")                  # it travels in the checkpoint
    state = main(run, pictures, *DIT[:-2], "--first-stage", "new", "--factor", "2",
                 "--first-stage-steps", "2", "--steps", "4", "--resume")
    assert state["step"] == 4 and not (run / "first_stage").exists()


def test_a_run_does_not_go_back(run, pictures, capsys):
    line = refused(capsys, "--data", f"folder:{pictures}", "--out", run, "--resume", "--steps", "1")
    assert "at step 2" in line and "--steps 1" in line


@pytest.mark.parametrize("change,word", [
    ("classes", "kiwi"), ("names", "kiwi"), ("data", "other"), ("stage", "first stage"),
    ("size", "--image-size 4")])
def test_what_does_not_belong_to_a_run(run, pictures, tmp_path, capsys, change, word):
    mine, argv = tmp_path / "other", ["--out", run, "--resume", "--steps", "4"]
    shutil.copytree(pictures, mine)
    state = load_checkpoint(run / "ckpt.pt")
    if change == "data":
        assert word in refused(capsys, *argv, "--data", f"folder:{mine}")
        return
    state["info"]["name"] = state["config"]["data"] = f"folder:{mine}"
    save_checkpoint(run / "ckpt.pt", state)
    argv += ["--data", f"folder:{mine}"]
    if change == "classes":
        shutil.copytree(mine / "pear", mine / "kiwi")
    elif change == "names":
        (mine / "pear").rename(mine / "kiwi")
    elif change == "size":
        argv += ["--image-size", "4"]
    else:
        stage = tmp_path / "stage" / "ckpt.pt"
        main(stage.parent, pictures, "--model", "tiny-ae", *LOOP, "--factor", "2", "--steps", "3")
        assert "first stage" in refused(
            capsys, *DIT[:-2], "--data", f"folder:{mine}", "--init", run / "ckpt.pt",
            "--first-stage", stage, "--out", tmp_path / "new")
        argv += ["--first-stage", str(stage)]
        word = f"--first-stage {stage}"
    before = (run / "config.json").read_text()
    assert word in refused(capsys, *argv)
    assert (run / "config.json").read_text() == before


def test_words_of_captions_belong_to_a_run(tmp_path, scenes, capsys):
    mine, out = tmp_path / "mine", tmp_path / "run"
    shutil.copytree(scenes, mine)
    argv = ["--model", "unet-tiny", "--data", f"folder:{mine}", "--image-size", "8", "--out", out,
            "--batch-size", "2", "--first-stage-steps", "1", "--factor", "1", "--sample-every", "0"]
    train.main([str(word) for word in argv] + ["--steps", "1"])
    for path in sorted(mine.glob("*.txt"))[:3]:
        path.write_text(path.read_text().replace("a ", "mauve ", 1))
    assert "mauve" in refused(capsys, *argv, "--steps", "2", "--resume")


def test_a_first_stage_of_something_else_is_not_taken(run, pictures, tmp_path, capsys):
    """In OUT/first_stage, when the run itself was stopped before its first checkpoint."""
    for path in ("ckpt.pt", "loss.png"):
        (run / path).unlink()
    shutil.rmtree(run / "samples")
    shutil.copytree(pictures, tmp_path / "other")
    argv = [*DIT[:-2], "--first-stage", "new", "--factor", "2", "--steps", "2", "--out", run,
            "--resume"]
    mine = ["--data", f"folder:{pictures}"]
    assert str(tmp_path / "other") in refused(capsys, *argv, "--data", f"folder:{tmp_path}/other",
                                              "--first-stage-steps", "2")
    assert "--factor 4" in refused(capsys, *argv, *mine, "--model", "DiT-32x1/1", "--factor", "4")
    assert "--latent-channels 5" in refused(capsys, *argv, *mine, "--latent-channels", "5")
    assert "--steps 1" in refused(capsys, *argv, *mine, "--first-stage-steps", "1")
    assert not (run / "ckpt.pt").exists()
    main(run, pictures, *argv, "--first-stage-steps", "2")


def test_init_hands_on_what_the_weights_need(tmp_path, pictures):
    """The model, its schedule and its first stage, unless the flags say otherwise."""
    flags = [*DIT, "--schedule", "cosine", "--prediction", "v", "--steps", "2"]
    main(tmp_path / "a", pictures, *flags)
    init = ["--init", str(tmp_path / "a" / "ckpt.pt")]
    state = main(tmp_path / "b", pictures, *LOOP, *init, "--steps", "1")
    assert state["config"]["model"] == "DiT-32x2/2"
    assert (state["settings"]["schedule"], state["settings"]["prediction"]) == ("cosine", "v")
    config, settings = train.read_flags([*init, "--schedule", "flow"])
    assert (settings.schedule, settings.prediction) == ("flow", None)


def test_the_papers_recipe_wins_over_what_suits_a_model():
    assert train.read_flags(["--model", "vq-vae", "--recipe", "paper"])[0].lr == PAPER["lr"]


@pytest.mark.parametrize("argv,words", [
    (["--muon-lr", "0.1", "--optimizer", "adamw"], "--optimizer muon"),
    (["--muon-lr", "0.1", "--recipe", "paper"], "--optimizer muon"),
    (["--first-stage-steps", "5", "--first-stage", "none"], "--first-stage new"),
    (["--latent-channels", "5", "--first-stage", "none"], "--first-stage new"),
    (["--latent-noise", "0", "--first-stage", "FILE"], "--first-stage new"),
    (["--factor", "2", "--first-stage", "FILE"], "--first-stage new"),
    (["--model", "vq-tiny", "--codes", "9", "--first-stage", "FILE"], "--first-stage new"),
    (["--schedule", "linear", "--flow-shift", "2"], "--schedule flow"),
    (["--log-to", "tensorboard"], "pip install tensorboard"),
    (["--data", "mnist", "--skip-bad"], "folder:PATH"), (["--data-dir", "x"], "mnist"),
    (["--data", "latents:x", "--image-size", "8"], "pictures"),
    (["--data", "latents:x", "--flip", "on"], "pictures"),
    (["--class-dropout", "0", "--cfg-scale", "3"], "--class-dropout"),
    (["--data", "mnist", "--hold-out"], "shapes and scenes"),
    (["--save-latents", "x.npz"], "--first-stage FILE"),
    (["--save-latents", "x.npz", "--first-stage", "FILE", "--steps", "3"], "training"),
    (["--save-latents", "x.npz", "--first-stage", "FILE", "--data", "mnist", "--seed", "3"],
     "training"),
    (["--save-latents", "x.npz", "--first-stage", "FILE", "--lr", "3"], "training"),
    (["--save-latents", "x.npz", "--first-stage", "FILE", "--resume"], "training")])
def test_a_flag_that_nothing_reads_is_refused(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)     # no tensorboard
    line = refused(capsys, *argv)
    assert words in line and argv[0] in " ".join(argv) and not list(tmp_path.iterdir())


def test_a_preset_is_not_a_given_flag():
    """What a model's preset says may go unread; only flags that were given are refused."""
    _, settings = train.read_flags(["--model", "unet-tiny", "--data", "latents:x"])
    assert settings.first_stage == "none" and settings.latent_channels == 12
    assert train.read_flags(["--recipe", "paper"])[0].optimizer == "adamw"
    assert train.read_flags(["--no-skip-bad", "--data", "mnist"])[0].skip_bad is False


def test_unread_captions_are_said(tmp_path, scenes, pictures, capsys):
    flags = ["--model", "DiT-32x1/4", *LOOP, "--first-stage", "none", "--steps", "1"]
    main(tmp_path / "a", scenes, *flags, "--no-captions")
    assert "24 captions (not read by this model)" in capsys.readouterr().out
    for out, data in ("b", pictures), ("c", scenes):        # no classes: captions are read
        main(tmp_path / out, data, *flags)
        assert "not read" not in capsys.readouterr().out


@pytest.mark.parametrize("argv,words", [
    (["--out", "file"], "file"), (["--out", "file/x"], "file"), (["--out", "/dev/full/x"], "full"),
    (["--out", "x" * 300], "too long"), (["--out", "/proc/none/x"], "/proc"),
    (["--save-latents", "file/x.npz", "--first-stage", "FILE"], "file"),
    (["--save-latents", "file", "--first-stage", "FILE"], "file"),
    (["--save-latents", ".", "--first-stage", "FILE"], ""),
    (["--save-latents", "x" * 300, "--first-stage", "FILE"], "too long"),
    (["--init", "FILE", "--model", "DiT-64x2/2"], "tensors differ"),
    (["--init", "file"], "damaged"), (["--first-stage", "file"], "damaged")])
def test_what_cannot_be_written_or_read_is_said_at_once(tmp_path, monkeypatch, pictures, begun,
                                                        capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    kind = "first_stage/ckpt.pt" if "--save-latents" in argv else "ckpt.pt"
    argv = [str(begun / kind) if word == "FILE" else word for word in argv]
    if "--save-latents" not in argv:
        argv += [*LOOP, "--data", f"folder:{pictures}"]
        argv += ["--first-stage", "none"] * ("--init" not in argv and "--first-stage" not in argv)
    assert words in refused(capsys, *argv)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_latents_that_the_model_cannot_halve_are_said_before_the_first_stage(tmp_path, scenes,
                                                                             capsys):
    line = refused(capsys, "--model", "unet-tiny", "--image-size", "28", "--data",
                   f"folder:{scenes}", "--out", tmp_path / "run")
    assert "sides (7, 7)" in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config.json", "log.csv"])
def test_a_folder_in_place_of_a_file_is_left_alone(run, pictures, name, capsys):
    (run / name).unlink()
    (run / name).mkdir()
    (run / name / "mine").write_text("x")
    assert name in refused(capsys, "--data", f"folder:{pictures}", "--out", run, "--steps", "3",
                           "--resume")
    assert (run / name / "mine").read_text() == "x"
    assert load_checkpoint(run / "ckpt.pt")["step"] == 2


@pytest.mark.parametrize("left", [
    ["lock", "config.json", "log.csv"], ["first_stage/config.json", "first_stage/lock"],
    ["lock", "ckpt.pt.part", "samples/000002.png", "loss.png"], ["samples/mine.txt"]])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, pictures, capsys, left,
                                                               resume):
    for name in left:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("")
    argv = [*DIT, "--steps", "1", *resume]
    if left == ["samples/mine.txt"]:
        assert "mine.txt" in refused(capsys, *argv, "--data", f"folder:{pictures}", "--out",
                                     tmp_path / "run")
    else:
        assert main(tmp_path / "run", pictures, *argv)["step"] == 1


@pytest.mark.parametrize("which,writer", [
    ("row", "add_row"), ("preview", "save_grid"), ("config", "written_whole"),
    ("save", "save_checkpoint")])
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(run, pictures, monkeypatch, capsys, which,
                                                          writer):
    before = (run / "ckpt.pt").read_bytes()
    full = lambda *args, **more: os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    monkeypatch.setattr(train if which == "row" else tasks, writer, full)
    line = refused(capsys, "--data", f"folder:{pictures}", "--out", run, "--resume", "--steps", "4",
                   "--sample-every", "3")
    assert "No space left" in line
    state = load_checkpoint(run / "ckpt.pt")
    assert which == "preview" and state["step"] == 3 or (run / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("model", ["DiT-32x1/2", "tiny-ae", "vq-vae"])
def test_a_batch_beyond_the_memory_is_refused_at_once(model, pictures, tmp_path, capsys):
    """Else the system ends the process without a word, when its pages are used one by one."""
    line = refused(capsys, "--model", model, "--data", f"folder:{pictures}", "--image-size", "8",
                   "--batch-size", "1000000000", "--out", tmp_path / "run")
    assert "not enough memory for" in line and "fewer" in line and not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_never_saved(run, pictures, capsys, monkeypatch):
    """They come from a finite gradient and a huge rate, so no step is skipped before."""
    monkeypatch.setattr(optim, "learning_rate", lambda step, config: 1e60)
    before = (run / "ckpt.pt").read_bytes()
    line = refused(capsys, "--data", f"folder:{pictures}", "--out", run, "--resume", "--steps", "4",
                   "--save-every", "1")
    assert "not finite" in line and "intact" in line and "--lr" in line
    assert (run / "ckpt.pt").read_bytes() == before


def test_a_preview_samples_no_more_pictures_at_once_than_a_step(tmp_path, pictures, monkeypatch):
    """And gives the same picture as all at once."""
    sizes, sample_ = [], tasks.DiffusionTask.sample

    def spy(task, model, y, **more):
        sizes.append(len(y))
        return sample_(task, model, y, **more)
    monkeypatch.setattr(tasks.DiffusionTask, "examples", lambda task: (torch.arange(7) % 2, None))
    monkeypatch.setattr(tasks.DiffusionTask, "sample", spy)
    for out, accum in (("a", 1), ("b", 4)):
        main(tmp_path / out, pictures, *DIT, "--steps", "1", "--accum", str(accum))
    assert sizes == [7, 2, 2, 2, 1]
    one, two = (data.read_image(tmp_path / out / "samples" / "000001.png", 64) for out in "ab")
    assert (one.int() - two.int()).abs().max() <= 1
    encoded, encode = [], vae.TinyAutoencoder.encode
    monkeypatch.setattr(vae.TinyAutoencoder, "encode", lambda stage, x: encoded.append(
        len(x)) or encode(stage, x))
    main(tmp_path / "c", pictures, "--model", "tiny-ae", *LOOP, "--factor", "2", "--steps", "1")
    assert max(encoded) == 8 and sum(encoded) == 24


def test_the_log_says_both_rates(tmp_path, pictures):
    main(tmp_path / "a", pictures, *DIT, "--steps", "2", "--warmup", "4", "--lr-decay", "constant",
         "--lr", "1e-3", "--muon-lr", "0.01")
    assert [(r["lr"], r["muon_lr"]) for r in rows(tmp_path / "a")] == [
        ("0.00025", "0.0025"), ("0.0005", "0.005")]
    main(tmp_path / "b", pictures, *DIT, "--steps", "1", "--optimizer", "adamw")
    assert "muon_lr" not in rows(tmp_path / "b")[0]


def test_the_last_checkpoints_are_kept_and_the_rows_go_to_tensorboard(tmp_path, pictures,
                                                                      monkeypatch):
    found, out = [], tmp_path / "run"
    board = types.SimpleNamespace(add_scalar=lambda *row: found.append(row))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(
        SummaryWriter=lambda folder, purge_step: found.append((folder, purge_step)) or board))
    flags = [*DIT, "--save-every", "1", "--keep", "2", "--log-to", "tensorboard"]
    main(out, pictures, *flags, "--steps", "3")
    assert sorted(file.name for file in out.glob("*.pt")) == [
        "ckpt-000002.pt", "ckpt-000003.pt", "ckpt.pt"]
    last = main(out, pictures, "--steps", "4", "--resume")
    assert sorted(file.name for file in out.glob("ckpt-*")) == ["ckpt-000003.pt", "ckpt-000004.pt"]
    assert load_checkpoint(out / "ckpt-000003.pt")["step"] == 3
    assert_same(load_checkpoint(out / "ckpt-000004.pt"), last)
    assert [row for row in found if len(row) == 2] == [(out, 1), (out, 4)]
    said = [(row[2], f"{row[1]:.9g}") for row in found if row[0] == "loss"]
    assert said == [(int(row["step"]), row["loss"]) for row in rows(out)]


def test_a_kept_checkpoint_finds_its_first_stage_in_the_one_beside(tmp_path, pictures, capsys):
    """No kept file holds it; all commands read them as whole ones, and none takes another's."""
    out, other = tmp_path / "run", tmp_path / "other"
    flags = [*DIT[:-2], "--first-stage", "new", "--factor", "2", "--first-stage-steps", "2"]
    last = main(out, pictures, *flags, "--save-every", "1", "--keep", "2", "--steps", "2")
    kept = torch.load(out / "ckpt-000002.pt", weights_only=True)
    assert "first_stage" not in kept and "first_stage_hash" in kept
    assert_same(load_checkpoint(out / "ckpt-000002.pt"), last)
    draw = lambda name, *more: sample.main(["--ckpt", str(out / name), "--n", "2", "--steps", "2",
                                            "--device", "cpu", "--out", str(out / "x.png"), *more])
    drawn = []
    for name in ("ckpt.pt", "ckpt-000002.pt"):
        draw(name)
        drawn.append((out / "x.png").read_bytes())
    assert drawn[0] == drawn[1]
    sample.main(["--ckpt", str(out / "ckpt-000001.pt"), "--export", str(tmp_path / "small.pt")])
    assert_same(load_checkpoint(tmp_path / "small.pt")["first_stage"].keys(),
                last["first_stage"].keys())             # an export is whole, wherever it lies
    main(other, pictures, *flags, "--steps", "1", "--seed", "1")
    shutil.copy(out / "ckpt-000001.pt", other)
    shutil.copy(out / "ckpt-000001.pt", tmp_path / "ckpt-000001.pt")
    shutil.copy(out / "ckpt-000001.pt", out / "ckpt.pt")            # whole ones are not made so
    for path in (other / "ckpt-000001.pt", tmp_path / "ckpt-000001.pt", out / "ckpt.pt"):
        with pytest.raises(SystemExit):
            draw(path)
        said = capsys.readouterr().err.strip().split("\n")[-1]
        assert said == (f"error: {path} needs the first stage in {path.with_name('ckpt.pt')}: "
                        "none or another is there")
    torch.save({"first_stage": {"model": [1]}}, out / "ckpt.pt")
    with pytest.raises(ValueError, match="nothing can be built by .*ckpt.pt"):
        load_checkpoint(out / "ckpt-000001.pt")


def test_a_compile_probe_counts_nothing(pictures, monkeypatch):
    """--compile on calls the loss once more, before the first step."""
    states = []
    for how in ("off", "on"):
        config, dataset, task = by_hand(pictures, "vq-vae", 1, compile=how)
        monkeypatch.setattr(task.model, "compile", lambda: None)
        step = make_step(config, dataset, task)
        start = copy.deepcopy(dict(task.model.state_dict()))
        states.append((start, *(step(s)[0]["loss"] for s in range(3)), everything(task, step)))
    assert_same(states[0], states[1])


# --------------------------------------------------------------------------------------------------
# files that somebody wrote or damaged

WRONG = [None, "x", "", -1, 0, 10 ** 9, 2 ** 70, 1.5, float("nan"), True, [], {}, [1], ["a"],
         {"a": 1}, {1: 2}, (1, 2), b"x", torch.zeros(2)]


def places(tree, path=()):
    """The paths of some values inside a checkpoint."""
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(branches)[:32]:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def changed(tree, path, value):
    """A copy in which one value is another; ... deletes it."""
    tree = copy.copy(tree)
    if len(path) > 1:
        tree[path[0]] = changed(tree[path[0]], path[1:], value)
    elif value is ...:
        del tree[path[0]]
    else:
        tree[path[0]] = value
    return tree


@pytest.mark.parametrize("kind", ["init", "resume", "first-stage"])
def test_a_hand_made_checkpoint_is_read_or_refused_in_one_line(begun, tmp_path, pictures, kind,
                                                               capsys, monkeypatch):
    """Any value of any type anywhere in it, or missing: exit code 0 or 2, never a traceback."""
    monkeypatch.setattr(tasks.DiffusionTask, "preview", lambda *args: None)
    monkeypatch.setattr(train, "plot_loss", lambda *args: None)
    good = load_checkpoint(begun / ("first_stage/ckpt.pt" if kind == "first-stage" else "ckpt.pt"))
    chosen, spots, codes = random.Random(0), list(places(good)), []
    for trial in range(25):
        out = tmp_path / str(trial)
        file = out / "ckpt.pt" if kind == "resume" else tmp_path / "bad.pt"
        file.parent.mkdir(exist_ok=True)
        bad = changed(good, chosen.choice(spots), chosen.choice([*WRONG, ...]))
        torch.save(bad, file)
        argv = ["--resume"] if kind == "resume" else [f"--{kind}", file, "--model", "DiT-32x2/2",
                                                      *LOOP]
        capsys.readouterr()
        try:
            main(out, pictures, *argv, "--steps", "3" if kind == "resume" else "1")
            codes.append(0)
        except SystemExit as stopped:
            lines = [line for line in capsys.readouterr().err.splitlines()
                     if line and "step/s" not in line and "s/step" not in line]
            assert stopped.code == 2 and len(lines) == 1 and "error: " in lines[0], lines
            codes.append(2)
    assert 2 < codes.count(2)


@pytest.mark.parametrize("path,value,word", [
    (("step",), "x", "step"), (("info", "image_size"), 0, "image size"), (("info",), ..., "info"),
    (("info", "image_size"), 10 ** 9, "image size"),
    (("info", "class_names"), "ab", "class names"),
    (("opt",), ..., "opt"), (("opt", 1), ..., "lacks an optimizer"), (("ema",), {}, "does not fit"),
    (("settings", "colour"), 3, ""), (("settings", "class_dropout"), "x", "class_dropout"),
    (("config", "lr"), "fast", "lr"), (("config", "accum"), None, "accum"),
    (("first_stage", "sizes", "width"), "x", "ckpt.pt"), (("first_stage", "kind"), "vae", "vae"),
    (("opt", 0, "state", 0, "exp_avg"), torch.zeros(3), "weight 0"),
    (("opt", 0, "state", 0, "exp_avg"), ..., "weight 0"),
    (("opt", 1, "state", 0, "momentum"), torch.zeros(1, 1), "weight 0"),
    (("opt", 0, "state"), {999: {}}, "ckpt.pt")])
def test_what_is_wrong_in_a_checkpoint_is_named(run, pictures, capsys, path, value, word):
    state = load_checkpoint(run / "ckpt.pt")
    assert {"exp_avg", "exp_avg_sq", "step"} == state["opt"][0]["state"][0].keys()
    save_checkpoint(run / "ckpt.pt", changed(state, path, value))
    argv = ["--data", f"folder:{pictures}", "--out", run, "--resume", "--steps", "3"]
    if path == ("settings", "colour"):
        train.main([*map(str, argv)])               # a flag of another version is not used
    else:
        assert word in refused(capsys, *argv)
