"""train.py: runs resume and split exactly, and survive numbers that are not finite, and signals."""
import copy
import csv
import itertools
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.testing import assert_close

import bench
import data
import pretrained
import sample
import train
from checkpoint import load_checkpoint
from conftest import ONE_THREAD, ROOT, assert_same
from models import find_model, make_task, settings_class
from tasks import keep_rows
from train import Config, default_out, make_step
from vae import AutoencoderKL, first_stage_from

pytestmark = pytest.mark.usefixtures("short_previews")
LOOP = ["--image-size", "8", "--batch-size", "8", "--log-every", "1", "--sample-every", "0"]
DIT = ["--model", "DiT-32x2/2", *LOOP, "--first-stage", "none"]
VQVAE = ["--model", "vq-vae", *LOOP, "--codes", "16"]


def main(out, pictures, *flags):
    """Run train.py in this process -> its checkpoint."""
    train.main(["--data", f"folder:{pictures}", "--out", str(out), *flags])
    return load_checkpoint(out / "ckpt.pt")


def process(out, *flags, prefix=(sys.executable,)):
    """Run train.py in a new process."""
    done = subprocess.run([*prefix, str(ROOT / "train.py"), "--out", str(out), *flags],
                          capture_output=True, text=True, env=ONE_THREAD, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


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
    (DIT, 20, 40), ([*DIT, "--recipe", "paper", "--lr", "1e-3"], 20, 40), (VQVAE, 26, 54)],
    ids=["muon-flow", "paper", "vq-vae"])               # the codes of a VQ-VAE start at step 50
def test_resume_in_a_new_process_is_bit_exact(tmp_path, pictures, flags, half, steps):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    flags = [*flags, "--lr-decay", "constant"]          # so the first half does not know the second
    a = main(whole, pictures, *flags, "--steps", str(steps))
    main(halves, pictures, *flags, "--steps", str(half))
    process(halves, "--steps", str(steps), "--resume")  # all else comes from the checkpoint
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
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--master-port", "29517")
    process(tmp_path / "two", *flags, prefix=torchrun)
    b = load_checkpoint(tmp_path / "two" / "ckpt.pt")
    for part in ("model", "ema"):
        assert_close(a[part], b[part], rtol=1e-5, atol=1e-5)
    for name, rtol in (("loss", 1e-5), ("grad_norm", 1e-4)):
        column = lambda out: torch.tensor([float(r[name]) for r in rows(tmp_path / out)])
        assert_close(column("one"), column("two"), rtol=rtol, atol=1e-5)


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
    keep_rows(tmp_path / "log.csv", 3)
    assert (tmp_path / "log.csv").read_text().split() == good
    keep_rows(tmp_path / "log.csv", 2)
    assert (tmp_path / "log.csv").read_text().split() == good[:3]
    keep_rows(tmp_path / "log.csv", 0)
    assert (tmp_path / "log.csv").read_text() == ""


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
        pretrained.write_safetensors(stage, AutoencoderKL(32, (1, 2, 2), 1).state_dict())
    else:
        main(tmp_path / "ae", pictures, "--model", kind, *LOOP, "--steps", "3")
    train.main(["--data", f"folder:{pictures}", *LOOP, "--first-stage", stage, "--save-latents",
                str(file)])
    latents, whole = data.load(f"latents:{file}"), data.load(f"folder:{pictures}", 8)
    assert latents.images.shape == (24, 4, 2, 2) and latents.class_names == ["apple", "pear"]
    assert torch.equal(latents.labels, whole.labels)
    one_by_one = ["--model", "DiT-32x1/1", *LOOP, "--first-stage", stage, "--flip", "off",
                  "--steps", "2"]
    direct = main(tmp_path / "direct", pictures, *one_by_one)
    train.main([*one_by_one, "--data", f"latents:{file}", "--out", str(tmp_path / "dit")])
    state = load_checkpoint(tmp_path / "dit" / "ckpt.pt")
    assert_same(direct["first_stage"], state["first_stage"])
    z = first_stage_from(direct["first_stage"], "").encode(data.to_float(whole.images))
    assert_close(z, latents.images.float(), rtol=2 ** -10, atol=1e-6)       # saved in float16
    if kind == "tiny-ae":                                       # standardised on these pictures
        assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
        assert_close(z.std((0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)
    images, labels, _ = sample.draw(tmp_path / "dit" / "ckpt.pt", n=4, steps=2, device="cpu")
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


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_at_the_next_step(tmp_path, pictures, signum):
    out, flags = tmp_path / "run", ["--steps", "100000", "--save-every", "50000"]
    run = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *DIT, *flags, "--out", str(out),
                            "--data", f"folder:{pictures}"],
                           env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    log = lambda: (out / "log.csv").read_text().splitlines() if (out / "log.csv").exists() else []
    while time.time() < deadline and len(log()) <= 5:
        time.sleep(0.1)
    run.send_signal(signum)
    assert run.wait(60) == 128 + signum
    state = load_checkpoint(out / "ckpt.pt")
    assert state["step"] == int(rows(out)[-1]["step"]) > 4
    assert "--resume" in run.stderr.read()


# --------------------------------------------------------------------------------------------------
# the rest

def test_a_failing_compiler_is_one_warning(monkeypatch, capsys):
    net = torch.nn.Linear(2, 2)

    def broken(x):
        raise RuntimeError("no compiler here")
    monkeypatch.setattr(net, "compile", lambda: setattr(net, "_compiled_call_impl", broken))
    train.compile_or_warn(net, lambda: net(torch.ones(1, 2)).sum())
    assert net(torch.ones(1, 2)).shape == (1, 2)
    assert "going on without it" in capsys.readouterr().err


def test_bench_measures_and_checks(capsys):
    common = ["--models", "DiT-64x2/4", "--batch-size", "8", "--device", "cpu"]
    for flags, words in ((["--steps", "2"], "pictures/s"), (["--steps", "150", "--overfit"], "ok")):
        with pytest.raises(SystemExit) as done:
            bench.main([*common, *flags])
        printed = capsys.readouterr().out
        assert done.value.code == 0 and words in printed and "NOT ok" not in printed
    with pytest.raises(SystemExit) as done:
        bench.main([*common, "--steps", "1", "--overfit"])
    assert done.value.code == 1 and "NOT ok" in capsys.readouterr().out


def test_paper_recipe_is_the_papers():
    c, s = train.read_flags(["--recipe", "paper"])
    assert (c.optimizer, c.lr, s.schedule, s.prediction, s.learn_sigma) == (
        "adamw", 1e-4, "linear", "eps", True)
    assert (c.ema, c.weight_decay, c.grad_clip, c.lr_decay) == (0.9999, 0.0, 0.0, "constant")
    assert (c.warmup, s.class_dropout) == (0, 0.1)
    assert train.read_flags(["--recipe", "paper", "--lr", "3e-4"])[0].lr == 3e-4


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
    settings = settings_class("unet")(first_stage=init, latent_channels=6)
    task = make_task(Config(model="unet-tiny", init=init), settings, dataset)
    known = load_checkpoint(init)["info"]["vocabulary"]
    assert task.tokenizer.words == [*known["words"], "mauve", "teal"]
    assert task.tokenizer.reserved == known["reserved"] - 2
    assert task.info["vocabulary"] == task.tokenizer.state()
