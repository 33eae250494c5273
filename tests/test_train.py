"""train.py: the loop resumes and splits exactly, survives bad numbers and kills; checkpoints are safe; Muon is Muon."""
import csv
import dataclasses
import math
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.testing import assert_close

import data
import sample
import tasks
import train
import weights
from train import Config, Muon, learning_rate, orthogonalise
from vae import AutoencoderKL
from weights import load_checkpoint, save_checkpoint

ROOT = pathlib.Path(__file__).parent.parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
TINY = ["--data", "folder:{pictures}", "--image-size", "8", "--model", "DiT-32x2/2", "--first-stage", "none",
        "--batch-size", "8", "--log-every", "1", "--sample-every", "0", "--save-every", "7"]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 2 x 12 noise pictures in two classes."""
    root, gen = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for name in ("apple", "pear"):
        (root / name).mkdir()
        for i in range(12):
            picture = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8, generator=gen)
            data.save_grid(picture, root / name / f"{i}.png", nrow=1, pad=0, scale=1)
    return root


def cli(out, pictures, *flags, script="train.py", prefix=(sys.executable,), **kwargs):
    flags = [f.format(pictures=pictures) for f in TINY] + ["--out", str(out), *flags]
    return subprocess.run([*prefix, str(ROOT / script), *flags], capture_output=True, text=True, env=ONE_THREAD,
                          timeout=240, **kwargs)


def in_process(out, pictures, *flags):
    train.main([f.format(pictures=pictures) for f in TINY] + ["--out", str(out), *flags])
    return load_checkpoint(out / "ckpt.pt")


def rows(out):
    """log.csv without the columns that tell time."""
    with open(out / "log.csv") as f:
        return [{k: v for k, v in r.items() if k not in ("images_per_s", "seconds")} for r in csv.DictReader(f)]


def assert_same(a, b, where=""):
    """Equal to the last bit, through dicts and lists."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}/{i}")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


# ----------------------------------------------------------------------------------------------------------------------
# exactness

@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--recipe", "paper", "--lr", "1e-3"]], ids=["muon-flow", "paper"])
def test_resume_in_a_new_process_is_bit_exact(tmp_path, pictures, flags):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    # a constant lr, so that a run of 20 steps is the first half of one of 40
    assert cli(whole, pictures, "--steps", "40", "--lr-decay", "constant", *flags).returncode == 0
    assert cli(halves, pictures, "--steps", "20", "--lr-decay", "constant", *flags).returncode == 0
    first = cli(halves, pictures, "--steps", "40", "--resume")          # the rest of the flags comes from config.json
    assert first.returncode == 0, first.stderr
    a, b = load_checkpoint(whole / "ckpt.pt"), load_checkpoint(halves / "ckpt.pt")
    for part in ("model", "ema", "opt", "step", "info"):
        assert_same(a[part], b[part], part)
    assert rows(whole) == rows(halves) and len(rows(whole)) == 40
    assert not torch.equal(a["model"]["final_layer.linear.weight"], a["ema"]["final_layer.linear.weight"])


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, pictures):
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli(one, pictures, "--steps", "12").returncode == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517")
    done = cli(two, pictures, "--steps", "12", prefix=torchrun)
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = load_checkpoint(one / "ckpt.pt"), load_checkpoint(two / "ckpt.pt")
    for part in ("model", "ema"):
        assert_close(a[part], b[part], rtol=1e-5, atol=1e-5)
    for name, rtol in (("loss", 1e-5), ("grad_norm", 1e-4)):
        column = lambda out: torch.tensor([float(r[name]) for r in rows(out)])
        assert_close(column(one), column(two), rtol=rtol, atol=1e-5)


def test_accumulation_changes_nothing(tmp_path, pictures):
    a = in_process(tmp_path / "a", pictures, "--steps", "6")
    b = in_process(tmp_path / "b", pictures, "--steps", "6", "--accum", "4")
    assert_close(a["model"], b["model"], rtol=1e-5, atol=1e-5)


def test_seeds_decide(tmp_path, pictures):
    runs = [in_process(tmp_path / str(i), pictures, "--steps", "4", "--seed", s) for i, s in enumerate("001")]
    assert_same(runs[0]["model"], runs[1]["model"])
    assert rows(tmp_path / "0") == rows(tmp_path / "1") != rows(tmp_path / "2")


def test_latents_of_a_first_stage_travel_in_the_checkpoint(tmp_path, pictures):
    train.main(["--model", "tiny-ae", "--data", f"folder:{pictures}", "--image-size", "8", "--steps", "3",
                "--batch-size", "4", "--out", str(tmp_path / "ae")])
    out = tmp_path / "dit"
    state = in_process(out, pictures, "--steps", "3", "--first-stage", str(tmp_path / "ae" / "ckpt.pt"),
                       "--model", "DiT-32x1/1")
    stage = tasks.load_first_stage(state, "x")
    x = data.to_float(data.load(f"folder:{pictures}", 8).images)
    z = stage.encode(x)
    assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    assert_close(z.std((0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)
    assert state["model"]["x_embedder.proj.weight"].shape[1] == 4 and stage.decode(z).shape == (24, 3, 8, 8)


@pytest.mark.parametrize("kind", ["tiny-ae", "kl-ae", "official"])
def test_latents_made_by_one_command_train_like_pictures(tmp_path, pictures, kind):
    """Autoencoder -> latents:FILE -> DiT -> pictures, for both kinds of first stage and an official file."""
    stage, common = str(tmp_path / "ae" / "ckpt.pt"), ["--image-size", "8", "--batch-size", "4", "--sample-every", "0"]
    if kind == "official":
        stage = str(tmp_path / "vae.safetensors")
        weights.write_safetensors(stage, AutoencoderKL(32, (1, 2, 2), 1).state_dict())
    else:
        train.main(["--model", kind, "--data", f"folder:{pictures}", *common, "--steps", "3", "--out",
                    str(tmp_path / "ae")])
    file = tmp_path / "latents.pt"
    train.main(["--data", f"folder:{pictures}", *common, "--first-stage", stage, "--save-latents", str(file)])
    saved = torch.load(file, weights_only=True)
    z, whole = saved["latents"].float(), data.load(f"folder:{pictures}", 8)
    assert z.shape == (len(whole), 4, 2, 2) and saved["class_names"] == ["apple", "pear"]
    if kind != "official":                                              # measured on these pictures: unit variance
        assert 0.8 < z.std() < 1.2
    train.main(["--model", "DiT-32x1/1", "--data", f"latents:{file}", *common, "--first-stage", stage, "--steps", "2",
                "--out", str(tmp_path / "dit")])
    images, labels, _ = sample.draw(tmp_path / "dit" / "ckpt.pt", n=4, steps=2, device="cpu")
    assert images.shape == (4, 3, 8, 8) and labels.tolist() == [0, 1, 0, 1]
    task, _ = sample.load(tmp_path / "dit" / "ckpt.pt")
    assert task.first_stage.standardised


def test_kl_autoencoder_learns(tmp_path):
    train.main(["--model", "kl-ae", "--batch-size", "8", "--steps", "25", "--log-every", "1", "--sample-every", "0",
                "--out", str(tmp_path / "kl")])
    psnr = [float(r["psnr"]) for r in rows(tmp_path / "kl")]
    assert psnr[-1] > psnr[0] + 3


# ----------------------------------------------------------------------------------------------------------------------
# bad numbers, signals, kills, full disks

class Poison(tasks.DiffusionTask):
    """A DiT whose loss is not finite at the steps in `at` (counted by draws)."""
    at = ()

    def draw(self, n, generator, device):
        self.step = getattr(self, "step", -1) + 1
        return super().draw(n, generator, device)

    def loss(self, net, batch):
        loss, metrics = super().loss(net, batch)
        return (loss * float("nan") if self.step in self.at else loss), metrics


def poisoned(tmp_path, pictures, at, steps, optimizer="muon"):
    config = train.prepare_run(Config(
        model="DiT-32x1/4", data=f"folder:{pictures}", image_size=8, first_stage="none", steps=steps, batch_size=4,
        optimizer=optimizer, device="cpu", out=str(tmp_path / f"p{steps}{optimizer}"), log_every=1, sample_every=0,
        save_every=5, lr_decay="constant"))
    dataset = data.load(config.data, 8)
    torch.manual_seed(0)
    info = tasks.describe(dataset, config)
    task = Poison(config, info, tasks.build_dit(config, info).model)
    task.at = at
    train.write_config(config)
    return config, train.train(config, dataset, task)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_non_finite_step_changes_nothing(tmp_path, pictures, capsys, optimizer):
    _, before = poisoned(tmp_path, pictures, (), 7, optimizer)
    _, after = poisoned(tmp_path, pictures, (7,), 8, optimizer)             # the eighth step is poisoned
    a, b = load_checkpoint(before), load_checkpoint(after)
    states = lambda opt: [{k: o["state"] if k == "state" else None for k in o} for o in opt]
    for part in ("model", "ema", "opt"):
        strip = states if part == "opt" else lambda x: x
        assert_same(strip(a[part]), strip(b[part]), part)
    assert "step 8" in capsys.readouterr().err


def test_ten_non_finite_steps_in_a_row_stop_with_the_last_good_checkpoint(tmp_path, pictures):
    with pytest.raises(ValueError, match="ten times in a row"):
        poisoned(tmp_path, pictures, range(6, 99), 50)
    state = load_checkpoint(tmp_path / "p50muon" / "ckpt.pt")
    assert state["step"] in (5, 10, 15) and all(v.isfinite().all() for v in state["model"].values())


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_at_the_next_step(tmp_path, pictures, signum):
    flags = [f.format(pictures=pictures) for f in TINY]
    run = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags, "--out", str(tmp_path / "run"),
                            "--steps", "100000", "--save-every", "50000"],
                           env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.csv"
    deadline = time.time() + 60
    while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 5):
        time.sleep(0.1)
    run.send_signal(signum)
    sent = time.time()
    assert run.wait(30) == 128 + signum and time.time() - sent < 10
    state = load_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert state["step"] == int(rows(tmp_path / "run")[-1]["step"]) > 5
    assert "--resume" in run.stderr.read()


@pytest.mark.slow
def test_a_checkpoint_survives_kills_while_it_is_written(tmp_path):
    script = ("import sys; sys.path.insert(0, sys.argv[1]); import torch, weights\n"
              "for i in range(10**6): weights.save_checkpoint(sys.argv[2], {'format': 1, 'i': i, "
              "'x': torch.full((500_000,), float(i))}); print(i, flush=True)")
    path = tmp_path / "ckpt.pt"
    for wait in (0.0, 0.013, 0.029, 0.05, 0.083):
        run = subprocess.Popen([sys.executable, "-c", script, str(ROOT), str(path)], stdout=subprocess.PIPE,
                               env=ONE_THREAD)
        for _ in range(3):
            run.stdout.readline()
        time.sleep(wait)
        run.kill()
        run.wait()
        state = load_checkpoint(path)
        assert (state["x"] == state["i"]).all()


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, {"format": 1, "x": torch.ones(3)})

    def half(state, f):
        f.write(b"x" * 100)
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(ValueError, match="No space left"):
        save_checkpoint(path, {"format": 1, "x": torch.zeros(3)})
    assert torch.equal(load_checkpoint(path)["x"], torch.ones(3)) and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_really_full_device_is_one_line(tmp_path):
    (tmp_path / "ckpt.pt.part").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="could not write"):
        save_checkpoint(tmp_path / "ckpt.pt", {"format": 1, "x": torch.zeros(100_000)})


# ----------------------------------------------------------------------------------------------------------------------
# loading

class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['EVIL_MARK']}",)


def test_damaged_and_malicious_files_are_refused(tmp_path, monkeypatch):
    good = tmp_path / "good.pt"
    save_checkpoint(good, {"format": 1, "x": torch.randn(10_000)})
    raw = good.read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 1                                 # one bit inside the tensor: torch.load would not notice
    for name, content, words in (("empty.pt", b"", "not readable"), ("cut.pt", raw[:len(raw) // 2], "not readable"),
                                 ("text.pt", b"hello", "not readable"), ("flipped.pt", bytes(flipped), "damaged")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            load_checkpoint(tmp_path / name)
    mark = tmp_path / "ran"
    monkeypatch.setenv("EVIL_MARK", str(mark))
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "evil.pkl"):
        with pytest.raises(ValueError):
            load_checkpoint(tmp_path / name)
    assert not mark.exists()
    with pytest.raises(ValueError, match="train first"):
        load_checkpoint(tmp_path / "ckpt.pt")


def test_namespace_checkpoints_get_a_sentence_and_prefixes_are_stripped(tmp_path):
    import argparse
    torch.save({"ema": {"w": torch.ones(2)}, "args": argparse.Namespace(a=1)}, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="torch.save"):
        load_checkpoint(tmp_path / "dit.pt")
    for wrap in (lambda d: d, lambda d: {"model": {"w": torch.zeros(2)}, "ema": d}, lambda d: {"state_dict": d}):
        torch.save(wrap({"module._orig_mod.w": torch.ones(2)}), tmp_path / "w.pt")
        assert torch.equal(load_checkpoint(tmp_path / "w.pt")["model"]["w"], torch.ones(2))


def test_weights_that_do_not_fit_are_listed():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"weight: file \(2, 4\), model \(2, 3\)"):
        weights.load_weights(model, {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, "f.pt")
    with pytest.raises(ValueError, match="extra: file"):
        weights.load_weights(model, {**model.state_dict(), "extra": torch.zeros(1)}, "f.pt")


# ----------------------------------------------------------------------------------------------------------------------
# the pieces of a step

def test_orthogonalise_against_svd():
    G = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(0))
    for M in (G, G.mT):
        U, _, Vh = torch.linalg.svd(M, full_matrices=False)
        out = orthogonalise(M)
        core = U.mT @ out @ Vh.mT                               # the same singular vectors, values pushed to about 1
        assert_close(core, torch.diag_embed(core.diagonal(dim1=1, dim2=2)), atol=1e-4, rtol=0)
        assert 0.6 < core.diagonal(dim1=1, dim2=2).min() and core.diagonal(dim1=1, dim2=2).max() < 1.3


def test_muon_follows_torchs_own():
    gen = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.randn(16, 8, generator=torch.Generator().manual_seed(i)))
                     for i in range(2)] for _ in range(2))
    a = Muon(ours, lr=0.02, momentum=0.95)
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.0, nesterov=True, adjust_lr_fn="original")
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(16, 8, generator=gen)
            q.grad = p.grad.clone()
        a.step(), b.step()
    for i, (p, q) in enumerate(zip(ours, theirs)):
        start = torch.randn(16, 8, generator=torch.Generator().manual_seed(i))
        assert ((p - start) - (q - start)).norm() < 0.02 * (q - start).norm()   # theirs rounds to bfloat16 on the way


def test_ema_is_the_weighted_mean_with_warm_up(tmp_path, pictures):
    model, ema, seen = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).requires_grad_(False), []
    ema.load_state_dict(model.state_dict())
    expected = model.weight.item()
    for step in range(30):
        with torch.no_grad():
            model.weight += 1
        decay = min(0.99, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.item()
        train.update_ema(ema, model, decay, torch.ones(()))
        seen.append(ema.weight.item())
    assert math.isclose(seen[-1], expected, rel_tol=1e-5)
    train.update_ema(ema, model, 0.5, torch.zeros(()))
    assert ema.weight.item() == seen[-1]


def test_learning_rate():
    config = Config(steps=100, warmup=10)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(55, config) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.55)))
    assert learning_rate(99, config) < 0.001
    assert learning_rate(99, dataclasses.replace(config, lr_decay="constant")) == 1


def test_a_failing_compiler_is_one_warning(monkeypatch, capsys):
    net = torch.nn.Linear(2, 2)

    def broken(x):
        raise RuntimeError("no compiler here")
    monkeypatch.setattr(net, "compile", lambda: setattr(net, "_compiled_call_impl", broken))
    train.compile_or_warn(net, lambda: net(torch.ones(1, 2)).sum())
    assert net(torch.ones(1, 2)).shape == (1, 2) and "going on without it" in capsys.readouterr().err


def test_overfit_and_bench_speak(tmp_path, pictures, capsys):
    with pytest.raises(SystemExit) as done:
        in_process(tmp_path / "x", pictures, "--overfit-batch", "--steps", "150", "--model", "DiT-64x2/4")
    assert done.value.code == 0 and "ok: loss" in capsys.readouterr().out
    train.main([f.format(pictures=pictures) for f in TINY] + ["--bench", "3", "--out", str(tmp_path / "x")])
    line = capsys.readouterr().out
    assert all(w in line for w in ("images/s", "TFLOP/s", "GEMM peak", "peak memory")) and not (tmp_path / "x").exists()


def test_paper_recipe_is_the_papers():
    flags = ["--recipe", "paper", "--first-stage", "none", "--out", "nowhere"]
    c = train.prepare_run(train.parse(Config, flags, "", train.presets))
    assert (c.optimizer, c.lr, c.schedule, c.prediction, c.learn_sigma) == ("adamw", 1e-4, "linear", "eps", True)
    assert (c.ema, c.weight_decay, c.grad_clip, c.lr_decay) == (0.9999, 0.0, 0.0, "constant")
    assert (c.warmup, c.class_dropout) == (0, 0.1)
    assert train.parse(Config, ["--recipe", "paper", "--lr", "3e-4"], "", train.presets).lr == 3e-4
