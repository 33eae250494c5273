"""sample.py: seeds, classes, known pixels, files, refusals. Official files are in
test_official.py, prompts in test_text_to_image.py, tokens in test_tokens.py.
"""
import dataclasses
import json
import os
import pathlib
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
import evaluate
import sample
import train
from adapters import adapter_state, add_adapters
from checkpoint import load_checkpoint, save_checkpoint
from conftest import ROOT, fill_by_recipe
from custom_diffusion import keys_and_values, save_concept
from dit import DiT
from models import task_from
from diffusion import seeds as sample_seeds
from pretrained import build, read_official, read_weights
from tasks import DiffusionTask
from udit import RepMlp, UDiT, fold
from vae import AutoencoderKL

BASE = str(ROOT / "assets" / "unet-scenes.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pictures):
    """Runs of one step, whose averaged weights then become random, so that every input matters."""
    root = tmp_path_factory.mktemp("runs")
    common = ["--image-size", "8", "--batch-size", "8", "--steps", "1", "--device", "cpu"]
    flat = root / "flat"
    flat.mkdir()
    for i, file in enumerate(pictures.rglob("*.png")):
        (flat / f"{i}.png").write_bytes(file.read_bytes())

    def go(name, *flags, folder=pictures):
        out = root / name
        train.main([*common, "--data", f"folder:{folder}", "--out", str(out), *flags])
        path = out / "ckpt.pt"
        state = load_checkpoint(path)
        if "sizes" not in state:
            model = fill_by_recipe(task_from(state, path).model, ["pos_embed"])
            save_checkpoint(path, {**state, "ema": model.state_dict()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionTask, "preview", lambda *given: None)
        go("ae", "--model", "tiny-ae", "--factor", "2", "--latent-channels", "4")
        go("latent", "--model", "DiT-32x1/2", "--first-stage", str(root / "ae" / "ckpt.pt"))
        go("pixel", "--model", "DiT-32x1/2", "--recipe", "paper", "--first-stage", "none")
        go("unconditional", "--model", "DiT-32x1/2", folder=flat)
        go("udit", "--model", "udit-tiny", "--first-stage", "none")
    return root


def drawn(runs, name, *flags):
    """(pictures, names, path) as the command of sample.py writes them; 3 steps."""
    seen, out = [], runs / name / "drawn.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "save_grid", lambda x, path, captions=None, **k: seen.append(
            (x, captions, path)))
        sample.main(["--ckpt", str(runs / name / "ckpt.pt"), "--out", str(out), "--device", "cpu",
                     "--steps", "3", *flags])
    return seen[0]


def opened(runs, name):
    return sample.load(str(runs / name / "ckpt.pt"))


# --------------------------------------------------------------------------------------------------
# what is sampled

@pytest.mark.parametrize("name,options", [
    ("latent", {}), ("pixel", {}), ("pixel", {"sampler": "ddim", "eta": 1.0}),
    ("unconditional", {})])
def test_picture_i_has_its_own_seed_in_any_batch(runs, name, options):
    task, model = opened(runs, name)
    y = torch.tensor([1, 0, 1, 1, 0]) % max(1, model.num_classes)
    whole = sample.sample_all(task, model, y, 3, steps=3, **options)[0]
    parts = sample.sample_all(task, model, y, 3, batch_size=2, steps=3, **options)[0]
    alone = sample.sample_all(task, model, y[3:4], 6, steps=3, **options)[0]
    for got in (parts, torch.cat([whole[:3], alone, whole[4:]])):
        assert_close(got, whole, rtol=0, atol=1e-2)             # rounding depends on the batch
    differences = (whole[:, None] - whole[None]).flatten(2).abs().amax(-1) + torch.eye(5)
    assert differences.min() > 0.1


def test_classes_are_those_that_are_asked(runs):
    task, model = opened(runs, "pixel")
    images, names, _ = drawn(runs, "pixel", "--class", "pear,0", "--n", "3")
    assert names == ["pear", "apple", "pear"]
    want = sample.sample_all(task, model, torch.tensor([1, 0, 1]), steps=3)[1]
    assert torch.equal(images, want)
    assert drawn(runs, "pixel")[1] == ["apple", "pear"]         # nothing asked: one of each class
    assert sample.choose_classes("1, 1", ["1", "x"], 2) == [0, 0]       # a name before a number


def test_guidance_is_the_runs_unless_it_is_given(runs):
    def images(*flags):
        return drawn(runs, "latent", "--n", "2", *flags)[0]
    default, same, none = images(), images("--cfg-scale", "2"), images("--cfg-scale", "1")
    assert torch.equal(default, same) and not torch.equal(default, none)
    assert not torch.equal(images("--cfg-channels", "1"), default)


def test_a_udit_is_sampled_folded_and_is_the_same_function(runs):
    task, model = opened(runs, "udit")
    path = str(runs / "udit" / "ckpt.pt")
    trained = task_from(load_checkpoint(path), path).model.eval().double()
    assert any(isinstance(m, RepMlp) for m in trained.modules())
    assert not any(isinstance(m, RepMlp) for m in model.modules())
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, *task.shape, generator=g, dtype=torch.float64)
    t, y = torch.tensor([3, 500]), torch.tensor([0, 1])
    with torch.no_grad():
        assert_close(fold(trained)(x, t, y), trained(x, t, y), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(w, model.state_dict()[k].double()) for k, w in
               trained.state_dict().items() if k in model.state_dict())
    assert drawn(runs, "udit")[0].shape == (2, 3, 8, 8)


# --------------------------------------------------------------------------------------------------
# pictures to start from

@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """(picture, mask as (1, 1, 8, 8) bool, their files)."""
    folder, gen = tmp_path_factory.mktemp("known"), torch.Generator().manual_seed(0)
    picture = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8, generator=gen)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 2:6, 3:7] = True
    white = 255 * mask.expand(1, 3, 8, 8).to(torch.uint8)
    for name, x in (("init", picture), ("mask", white)):
        data.save_grid(x, folder / f"{name}.png", nrow=1, pad=0, scale=1)
    return picture, mask, str(folder / "init.png"), str(folder / "mask.png")


@pytest.mark.parametrize("name", ["latent", "pixel"])
def test_inpainting_keeps_the_black_part_and_paints_the_white(runs, known, name):
    picture, mask, init, white = known
    images = drawn(runs, name, "--n", "3", "--init", init, "--mask", white)[0]
    given, mask = picture.expand(3, 3, 8, 8), mask.expand(3, 3, 8, 8)
    assert torch.equal(images[~mask], given[~mask])
    changed = (images != given) & mask
    assert all(changed[i].sum() > 0.5 * mask[i].sum() for i in range(3))
    assert not torch.equal(images[0], images[1])


def test_a_mask_is_white_above_middle_grey(runs, known, tmp_path):
    picture, _, init, _ = known
    grey = torch.full((1, 3, 8, 8), 120, dtype=torch.uint8)
    grey[..., 4:] = 136
    data.save_grid(grey, tmp_path / "grey.png", nrow=1, pad=0, scale=1)
    images = drawn(runs, "pixel", "--n", "1", "--init", init, "--mask", str(tmp_path / "grey.png"))
    changed = (images[0] != picture).any(1)[0]                                      # (8, 8)
    assert not changed[:, :4].any() and changed[:, 4:].float().mean() > 0.5


@pytest.mark.parametrize("name", ["latent", "pixel"])
def test_image_to_image_begins_at_the_noise_level_asked(runs, known, name):
    task, model = opened(runs, name)
    picture, _, init, _ = known
    x_init = task.encode(data.to_float(picture)).expand(2, -1, -1, -1)
    for flags, strength in (((), 0.6), (("--strength", "0.3"), 0.3)):
        want = sample.sample_all(task, model, torch.tensor([0, 1]), steps=3, strength=strength,
                                 per_picture={"x_init": x_init})[1]
        assert torch.equal(drawn(runs, name, "--init", init, *flags)[0], want)


def test_a_mask_paints_where_it_is_white_not_where_it_is_transparent(runs, known, tmp_path):
    picture, mask, init, _ = known
    clear = np.full((8, 8, 4), 255, np.uint8)               # white everywhere,
    clear[..., 3] = 255 * mask[0, 0].numpy()                # but seen in the mask alone
    Image.fromarray(clear).save(tmp_path / "clear.png")
    images = drawn(runs, "pixel", "--init", init, "--mask", str(tmp_path / "clear.png"))[0]
    assert torch.equal((images != picture).any(1).any(0), mask[0, 0])


@pytest.mark.parametrize("size,color,words", [
    ((16, 8), "white", "of the shape of --init"), ((8, 16), "white", "of the shape of --init"),
    ((8, 8), "black", "white where"), ((8, 8), "#777777", "white where")])
def test_masks_that_fit_no_picture_are_refused(
        runs, known, tmp_path, capsys, monkeypatch, size, color, words):
    Image.new("RGB", size, color).save(tmp_path / "m.png")
    monkeypatch.setattr(sample, "sample_all", lambda *args, **how: pytest.fail("sampled"))
    assert words in refuse(capsys, runs, "latent", "--init", known[2], "--mask",
                           str(tmp_path / "m.png"))


def test_masks_may_have_another_size_of_the_same_shape(runs, known, tmp_path):
    picture, mask, init, white = known
    Image.open(white).resize((80, 80), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    same, large = (drawn(runs, "pixel", "--init", init, "--mask", path)[0]
                   for path in (white, str(tmp_path / "large.png")))
    assert torch.equal(same, large)


def test_a_known_picture_is_encoded_once_for_all_samples(runs, known, monkeypatch):
    seen, encode = [], DiffusionTask.encode
    monkeypatch.setattr(DiffusionTask, "encode", lambda self, x: seen.append(len(x)) or encode(
        self, x))
    drawn(runs, "latent", "--init", known[2], "--mask", known[3], "--n", "5")
    assert seen == [1]


# --------------------------------------------------------------------------------------------------
# files

def tree(folder):
    """{path: bytes} of all files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_files_replace_only_those_of_the_same_command(runs, tmp_path, capsys, monkeypatch):
    ckpt, out = str(runs / "latent" / "ckpt.pt"), str(tmp_path / "x.png")
    go = lambda *flags: sample.main(["--ckpt", ckpt, "--steps", "1", "--n", "1", *flags])
    for _ in range(2):                                      # a second time: it made them itself
        go("--out", out, "--strip", "--gif")
    before = tree(tmp_path)
    go("--out", out, "--strip", "--gif", "--seed", "3")
    assert before.keys() == tree(tmp_path).keys() == {"x.png", "x-strip.png", "x.gif"}
    assert all(before[name] != now for name, now in tree(tmp_path).items())
    for _ in range(2):
        sample.main(["--ckpt", ckpt, "--steps", "1", "--npz", "2", "--out", out])
        sample.main(["--ckpt", ckpt, "--export", str(tmp_path / "small.pt")])
    picture = np.zeros((8, 8, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    Image.fromarray(picture).save(tmp_path / "b.gif")
    Image.fromarray(picture).save(tmp_path / "c-strip.png")
    np.savez(tmp_path / "d.npz", arr_0=picture[None])
    save_checkpoint(tmp_path / "e.pt", {"tensors": {}, "base": "", "concepts": []})
    (tmp_path / "run.pt").write_bytes((runs / "latent" / "ckpt.pt").read_bytes())
    (tmp_path / "folder.png").mkdir()
    before = tree(tmp_path)
    monkeypatch.setattr(sample, "load", lambda *args: pytest.fail("the checkpoint was read"))
    monkeypatch.setattr(sample, "export", lambda *args: pytest.fail("the checkpoint was read"))
    for name, *flags in (["photo.png"], ["b.png", "--gif"], ["c.png", "--strip"], ["folder.png"],
                         ["d.png", "--npz", "3"], ["small.pt/x.png"], ["x" * 250 + ".png"]):
        assert "error: " in refuse(capsys, runs, "latent", *flags, "--out", str(tmp_path / name))
    for name in ("e.pt", "run.pt", "photo.png", "x.png", "/dev/full", str(tmp_path)):
        with pytest.raises(SystemExit) as stopped:
            sample.main(["--ckpt", ckpt, "--export", str(tmp_path / name)])
        assert stopped.value.code == 2 and "not made by this command" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_refused_commands_leave_no_folder(runs, tmp_path, capsys):
    refuse(capsys, runs, "latent", "--class", "nobody", "--out", str(tmp_path / "a/b/x.png"))
    assert not list(tmp_path.iterdir())
    sample.main(["--ckpt", str(runs / "latent" / "ckpt.pt"), "--steps", "1", "--out",
                 str(tmp_path / "a" / "b" / "x.png")])
    assert [*tree(tmp_path)] == ["a/b/x.png"]


@pytest.mark.parametrize("stop,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_while_sampling_is_one_line_and_leaves_nothing(
        runs, tmp_path, capsys, monkeypatch, stop, code):
    batches, run = [], DiffusionTask.sample

    def sample_and_stop(self, model, y, **options):
        batches.append(len(y))
        if len(batches) == 2:
            os.kill(os.getpid(), stop)
        return run(self, model, y, **options)
    monkeypatch.setattr(DiffusionTask, "sample", sample_and_stop)
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(runs / "latent" / "ckpt.pt"), "--steps", "2", "--n", "300",
                     "--batch-size", "32", "--out", str(tmp_path / "x.png")])
    assert stopped.value.code == code and batches == [32, 32]
    assert capsys.readouterr().err.splitlines()[-1] == "stopped" and not list(tmp_path.iterdir())


def test_too_little_memory_is_one_line(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DiffusionTask, "sample", lambda *args, **how: torch.empty(10 ** 15))
    words = refuse(capsys, runs, "latent", "--out", str(tmp_path / "x.png"))
    assert "not enough memory for 4000000000000000 bytes: " in words
    assert not list(tmp_path.iterdir())


def test_grid_strip_and_film(runs):
    out = runs / "pixel" / "x.png"
    sample.main(["--ckpt", str(runs / "pixel" / "ckpt.pt"), "--n", "2", "--steps", "3", "--strip",
                 "--gif", "--out", str(out), "--device", "cpu"])
    with Image.open(out.with_suffix(".gif")) as film:
        assert film.n_frames >= 3
    with Image.open(out.with_name("x-strip.png")) as strip:
        assert strip.width > 10 * 64 and strip.height > 4 * 64  # ten moments, two pairs of pictures
    assert out.is_file()


@pytest.mark.parametrize("steps", [10, 28, 4])
def test_a_strip_goes_from_the_first_step_to_the_last_in_even_steps(tmp_path, steps):
    """Step s of the film is a picture of grey 5 s; ten of them, the nearest to even ninths."""
    film = [(f"step {s}", torch.full((1, 3, 8, 8), 5 * s, dtype=torch.uint8)) for s in range(steps)]
    sample.write({"strip": tmp_path / "x-strip.png"}, film[-1][1], None, None, None, film)
    strip = np.array(Image.open(tmp_path / "x-strip.png"))[:, :, 0]
    tiles = strip[8, 10::66]            # in ten tiles of 64 pixels, 2 between them
    assert tiles.tolist() == [5 * int(k * (steps - 1) / 9 + 0.5) for k in range(10)]
    words = [strip[66:, 2 + 66 * k:66 + 66 * k] for k in range(10)]     # the step, written below
    assert not np.array_equal(words[0], words[-1]) and words[0].min() < 128


def test_a_film_shows_what_the_network_read_above_its_guess(runs):
    """x_t is noise at first, the sample at the end; guidance, with its two copies, is no matter."""
    task, model = opened(runs, "pixel")
    read, guesses, y = [], [], torch.tensor([0, 1, 0])
    how = dict(steps=4, cfg_scale=3.0, sampler="ddim")
    with model.register_forward_pre_hook(lambda net, given: read.append(given[0][:3])):
        x, pictures, film = sample.sample_all(task, model, y, film=True, **how)
    task.sample(model, y, generator=sample_seeds(0, 3), callback=guesses.append, **how)
    noise = [said.split()[-1] for said, _ in film]
    assert film[2][0] == "step 02 noise 0.33" and noise == ["1.00", "0.67", "0.33", "0.00", "0.00"]
    for (_, both), xt, x0 in zip(film, read, guesses):
        assert torch.equal(both, torch.cat([task.to_pictures(xt), task.to_pictures(x0)], 2))
    assert torch.equal(film[-1][1], torch.cat([pictures, pictures], 2))
    assert not model._forward_pre_hooks                         # nothing stays behind


def test_npz_is_what_the_adm_evaluator_reads(runs):
    task, model = opened(runs, "pixel")
    sample.main(["--ckpt", str(runs / "pixel" / "ckpt.pt"), "--npz", "5", "--batch-size", "2",
                 "--class", "pear,apple", "--steps", "3", "--device", "cpu", "--out",
                 str(runs / "pixel" / "many.png")])
    with np.load(runs / "pixel" / "many.npz") as arrays:
        images, labels, names = arrays["arr_0"], arrays["labels"], arrays["class_names"]
    assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [1, 0, 1, 0, 1] and labels.dtype == np.int64
    assert names.tolist() == ["apple", "pear"]
    many = SimpleNamespace(tokenizer=None, info={"class_names": []}, model=SimpleNamespace(
        num_classes=1000))                                          # all classes, not the first 8
    for options in (sample.Options(npz=1001), sample.Options(n=1001)):
        assert sample.conditions(options, many)[0].tolist() == [*range(1000), 0]
    sample.write({"npz": runs / "t.npz"}, torch.zeros(2, 3, 8, 8).byte(), None, torch.zeros(2, 5),
                 ["a b", "글"], [])
    assert data.read_arrays(runs / "t.npz", "npz")[1:] == (None, ["a b", "글"], [])
    want = sample.sample_all(task, model, torch.from_numpy(labels), steps=3)[1]     # labels fit
    assert abs(images.astype(int) - want.permute(0, 2, 3, 1).numpy()).max() <= 1
    assert not (runs / "pixel" / "many.png").exists()


def test_samples_to_score_are_of_the_classes_in_turn(runs):
    (task, model), how = opened(runs, "pixel"), dict(steps=3, device="cpu")
    images, labels, captions = evaluate.sampled(runs / "pixel" / "ckpt.pt", n=3, **how)
    assert labels.tolist() == [0, 1, 0] and captions is None
    assert torch.equal(images, sample.sample_all(task, model, labels, steps=3)[1])
    assert evaluate.sampled(runs / "unconditional" / "ckpt.pt", n=1, **how)[1] is None


def test_files_go_beside_a_run_and_else_to_out(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = lambda **options: [*map(str, sample.targets(sample.Options(**options)).values())]
    assert where(ckpt=str(runs / "ae" / "ckpt.pt")) == [str(runs / "ae" / "samples.png")]
    assert where(ckpt=BASE) == ["out/unet-scenes.png"]
    assert where(ckpt=BASE, out="a/b.png", strip=True, gif=True) == [
        "a/b.png", "a/b-strip.png", "a/b.gif"]
    assert where(ckpt=BASE, out="a/b.png", npz=5) == ["a/b.npz"]
    assert not list(tmp_path.iterdir())                 # nothing is made before all is checked


def test_exported_checkpoints_are_small_and_sample_nearly_the_same(
        runs, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DiffusionTask, "preview", lambda *given: None)
    whole, small = runs / "latent" / "ckpt.pt", tmp_path / "small.pt"
    sample.main(["--ckpt", str(whole), "--export", str(small), "--note", "one step"])
    assert small.stat().st_size < 0.5 * whole.stat().st_size
    state = load_checkpoint(small)
    assert state["note"] == "one step" and not {"model", "opt"} & state.keys()
    y = torch.tensor([0, 1])
    task, model = sample.load(str(small))
    noise = torch.randn(2, *task.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([100, 900])
    got, want = (net(noise, t, y) for net in (model, opened(runs, "latent")[1]))
    assert (got - want).abs().max() < 0.02 * want.abs().max()           # float16 has 11 bits
    train.main(["--data", f"folder:{pictures}", "--image-size", "8", "--model", "DiT-32x1/2",
                "--steps", "1", "--batch-size", "4", "--init", str(small), "--lr", "1e-9",
                "--muon-lr", "1e-9", "--out", str(tmp_path / "more")])
    more = load_checkpoint(tmp_path / "more" / "ckpt.pt")["ema"]
    assert_close({k: w for k, w in more.items()}, {k: w.float() for k, w in state["ema"].items()})
    for flags, words in ((["--weights", "model"], "leave out --weights"),
                         (["--export", str(tmp_path / "x.pt")], "is no run's checkpoint: say")):
        with pytest.raises(SystemExit):
            sample.main(["--ckpt", str(small), *flags])
        assert words in capsys.readouterr().err


def test_what_half_precision_cannot_hold_stays_as_it_is():
    """Such as the count of a code that many cells have; else it would be infinite."""
    small = sample.halved({"a": torch.tensor([98304.0]), "b": {"c": torch.tensor([3.0])}, "d": "x"})
    assert small["a"].item() == 98304 and small["b"]["c"].dtype == torch.float16


def test_class_names_that_are_no_text_are_refused(runs, tmp_path, capsys):
    state = load_checkpoint(runs / "pixel" / "ckpt.pt")
    save_checkpoint(tmp_path / "x.pt", {**state, "info": {
        **state["info"], "class_names": [torch.zeros(1), "b"]}})
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(tmp_path / "x.pt"), "--out", str(tmp_path / "x.png")])
    assert stopped.value.code == 2 and "x.pt" in capsys.readouterr().err


@pytest.mark.parametrize("name, Model", [("pixel", DiT), ("udit", UDiT)])
def test_an_official_file_draws_the_same(runs, tmp_path, capsys, name, Model):
    """Its names are those of the official code (test_dit.py, test_udit.py), and the config says
    what its class is to be made with. In the official code, with its own sampler and guidance,
    pictures differ by 2e-7 (DiT) and 6e-7 (U-DiT) of their norm."""
    ckpt, path = tmp_path / "ckpt.pt", tmp_path / "x.safetensors"
    state = load_checkpoint(runs / name / "ckpt.pt")
    save_checkpoint(ckpt, {**state, "settings": {**state["settings"], "schedule": "linear"}})
    sample.main(["--ckpt", str(ckpt), "--export", str(path), "--official", "--note", "mine"])
    raw = path.read_bytes()
    about = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert about["note"] == "mine" and "MIT" in about["licence"] and about["command"].startswith(
        f"python sample.py --ckpt {ckpt} --export ")
    config = json.loads(about["config"])
    for key in ("conditioning", "qk_norm", "schedule", "prediction"):
        config.pop(key)                                     # not of the official class
    again = Model(**config).eval()
    again.load_state_dict(read_weights(path))
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 1])
    model = task_from(state, ckpt).model.eval()
    assert torch.equal(model(x, t, y), again(x, t, y))
    if name == "pixel":                                     # a U-DiT's file shows no size
        assert torch.equal(model(x, t, y), sample.load(str(path))[1](x, t, y))
    with pytest.raises(SystemExit):
        sample.main(["--ckpt", str(ckpt), "--export", str(path), "--official", "--weights", "ema"])
    assert "--weights is not read beside --export" in capsys.readouterr().err


@pytest.mark.parametrize("name, words", [
    ("latent", "has schedule flow, and the official code linear"), ("ae", "does not sample"),
    (BASE, "is no DiT or U-DiT of classes: leave --official out")])
def test_what_the_official_code_does_not_have_is_refused(runs, tmp_path, capsys, name, words):
    path = name if name.endswith(".pt") else str(runs / name / "ckpt.pt")
    with pytest.raises(SystemExit):
        sample.main(["--ckpt", path, "--export", str(tmp_path / "x"), "--official"])
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_for_diffusers(tmp_path, capsys):
    """Tables of names are in test_pretrained.py. Loaded by diffusers 0.42 and transformers 5.24,
    text states are equal, and the U-Net's output differs by at most 8e-7 of its norm, pictures and
    latents of a kl-ae by 6e-7."""
    out, kl = tmp_path / "folder", tmp_path / "kl.pt"
    sample.main(["--ckpt", BASE, "--export", str(out), "--diffusers", "--note", "mine"])
    assert {*tree(out)} == {
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "text_encoder/config.json",
        "text_encoder/model.safetensors", "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    assert capsys.readouterr().out.startswith("left out: the tiny-ae, ")
    raw = (out / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    about = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert about["note"] == "mine" and "MIT" in about["licence"] and about["command"].startswith(
        f"python sample.py --ckpt {BASE} --export ") and json.loads(about["config"]) == {
        "cfg_scale": 3.0}
    task, model = sample.load(BASE)
    x, y = torch.randn(2, *task.shape), task.tokenizer(task.info["examples"][:2])
    unet, text = (build(*read_official(out / name)[1:2], None, read_official(out / name)[2])[part]
                  for name, part in (("unet", "unet"), ("text_encoder", "text")))
    t = torch.tensor([3, 900])
    assert torch.equal(unet(x, t, text(y)), model(x, t, y))
    vae, state = fill_by_recipe(AutoencoderKL(32, (1, 2, 2), 1, 3, task.shape[0], 0.5)), (
        load_checkpoint(BASE))                              # an autoencoder that diffusers has
    state["first_stage"] = {"kind": "kl-ae", "sizes": vae.sizes, "model": vae.state_dict()}
    save_checkpoint(kl, state)
    sample.main(["--ckpt", str(kl), "--export", str(tmp_path / "kl"), "--diffusers"])
    assert {*tree(tmp_path / "kl")} == {*tree(out), "vae/config.json",
                                        "vae/diffusion_pytorch_model.safetensors"}
    assert "left out" not in capsys.readouterr().out
    _, parts, said = read_official(tmp_path / "kl/vae")
    assert torch.equal(build(parts, None, said)["vae"].decode(x[:1]), vae.decode(x[:1]))
    add_adapters(model, "ca_out", "ffn_in", rank=1)
    save_checkpoint(tmp_path / "adapter.pt", adapter_state(model))
    before = tree(tmp_path)
    for path, new, words in ((BASE, "folder", "exists and was not made by"),        # there already
                             (str(ROOT / "assets/vq-scenes.pt"), "x", "is for U-Nets that read"),
                             (str(tmp_path / "adapter.pt"), "x", "without an adapter")):
        base = ["--base", BASE] if path.endswith("adapter.pt") else []
        with pytest.raises(SystemExit):
            sample.main(["--ckpt", path, *base, "--export", str(tmp_path / new), "--diffusers"])
        assert words in capsys.readouterr().err and tree(tmp_path) == before


@pytest.mark.parametrize("name, words", [("latent", "say --official"), ("ae", "does not sample")])
def test_what_diffusers_does_not_have_is_refused(runs, tmp_path, capsys, name, words):
    with pytest.raises(SystemExit):
        sample.main(["--ckpt", str(runs / name / "ckpt.pt"), "--export", str(tmp_path / "x"),
                     "--diffusers"])
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_was_learned_goes_out_as_others_read_it(tmp_path, capsys):
    """A concept as delta.ckpt of the official code. An adapter with its spec."""
    task, model = sample.load(BASE)
    unet = {name: w.clone() for name, w in model.denoiser.state_dict().items()}
    W = {name: w + 0.1 for name, w in keys_and_values(unet).items()}
    concept, row = str(tmp_path / "concept.pt"), torch.randn(2, 64)
    save_concept(concept, W, {"<new1>": row[0], "<new2>": row[1]}, ["<new1> circle", "<new2> star"],
                 unet)
    go = lambda path, out: sample.main([
        "--ckpt", str(path), "--base", BASE, "--export", str(tmp_path / out), "--official"])
    go(concept, "delta.ckpt")
    assert sample.add_concept(str(tmp_path / "delta.ckpt"), sample.load(BASE)[0])   # read here too
    delta = torch.load(tmp_path / "delta.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(delta.pop("embed"), row) and delta.keys() == {
        f"model.diffusion_model.{name}" for name in W}
    again, rows = read_official(tmp_path / "delta.ckpt")[1]["concept"]
    assert_close(again, W, rtol=0, atol=0)
    assert torch.equal(torch.stack([rows["<new1>"], rows["<new2>"]]), row)
    save_concept(concept, {**W, "out.0.bias": unet["out.0.bias"]}, {}, [], unet)
    go(concept, "no-word.ckpt")
    with pytest.raises(SystemExit):                         # its name would lie
        go(concept, "x.safetensors")
    assert "give a name that ends in .ckpt" in capsys.readouterr().err
    add_adapters(model, "ca_out", "ffn_in", rank=1)
    state = {**adapter_state(model), "modifiers": {"<new1>": row[0]}}      # learned with a word
    save_checkpoint(tmp_path / "adapter.pt", state)
    go(tmp_path / "adapter.pt", "adapter.safetensors")
    raw = (tmp_path / "adapter.safetensors").read_bytes()
    about = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert json.loads(about["config"]) == {**state["spec"], "base": state["base"]}
    assert_close(read_weights(tmp_path / "adapter.safetensors"),
                 {**state["adapter"], **state["modifiers"]}, rtol=0, atol=0)


@pytest.mark.parametrize("part", [r"attn2\.to_[kv]", r"attn2\."])
def test_a_concept_goes_out_as_diffusers_reads_it(tmp_path, capsys, part):
    """The files of its train_custom_diffusion.py. Loaded by diffusers 0.42's load_attn_procs, the
    outputs of unet-scenes with a concept of either kind differ from ours by 8e-7 of their norm."""
    unet = {name: w.clone() for name, w in sample.load(BASE)[1].denoiser.state_dict().items()}
    W = {name: w + 0.1 for name, w in unet.items() if re.search(part, name)}
    concept, row, folder = str(tmp_path / "concept.pt"), torch.randn(64), tmp_path / "there"
    save_concept(concept, W, {"<new1>": row}, ["<new1> circle"], unet)
    go = lambda out, *more: sample.main(["--ckpt", concept, "--export", str(tmp_path / out),
                                         "--diffusers", *more])
    go("there", "--base", BASE)
    assert {file.name for file in folder.iterdir()} == {"pytorch_custom_diffusion_weights.bin",
                                                        "<new1>.bin"}
    assert torch.equal(torch.load(folder / "<new1>.bin", weights_only=True)["<new1>"], row)
    new = torch.load(folder / "pytorch_custom_diffusion_weights.bin", weights_only=True)
    block = "up_blocks.0.attentions.0.transformer_blocks.0.attn"
    assert new[f"{block}1.processor"] == {}                 # every attention layer has an entry
    layers = {re.sub(r"(processor).*", r"\1", name) for name in new}
    assert len(layers) == sum("to_q" in name for name in unet) and f"{block}2.processor" in layers
    assert f"{block}2.processor.to_k_custom_diffusion.weight" in new
    assert (f"{block}2.processor.to_out_custom_diffusion.0.bias" in new) == (part == r"attn2\.")
    again, rows = read_official(folder)[1]["concept"]
    assert_close(again, W, rtol=0, atol=0)
    assert torch.equal(rows["<new1>"], row)
    for flags, words in (((), "say --official, --base BASE"), (("--base", BASE, "--vae", "x"),
                                                               "--vae is not read beside")):
        with pytest.raises(SystemExit):
            go("new", *flags)
        assert words in capsys.readouterr().err
    save_concept(concept, unet, {"<new1>": row}, ["<new1> circle"], unet)
    with pytest.raises(SystemExit):
        go("new", "--base", BASE)
    assert "changes more than diffusers can load" in capsys.readouterr().err


@pytest.mark.parametrize("read, add", [("ca_out", "ffn_in"), ("res_in", "res_out")])
def test_an_adapter_of_unet_finetune_beside_its_base(tmp_path, capsys, read, add):
    """Files as its code saves them, see test_pretrained.py: --base, and --scale as for ours."""
    task, model = sample.load(BASE)
    x, t, y = torch.randn(2, *task.shape), torch.tensor([3, 900]), task.tokenizer(["a circle"] * 2)
    before = model(x, t, y)
    add_adapters(model, read, add, rank=2, activation="silu", scale=2.0, init="official")
    layers = {"down": "adapter_inout.adp.0", "up": "adapter_inout.adp.2"} if add == "ffn_in" else {
        "before.0": "adapter.0", "down": "adapter.2", "up": "adapter.4"}
    files = {}
    for name, w in adapter_state(model)["adapter"].items():
        ours = next(layer for layer in layers if f".{layer}." in name)
        block, kind = name.removeprefix("denoiser.").split(f".{ours}.")
        stem, _, layer = layers[ours].partition(".")
        files.setdefault(f"{block}.{stem}.pt", {})[f"{layer}.{kind}"] = w
    for file, tensors in files.items():
        torch.save(tensors, tmp_path / file)
    theirs = {"ca_out": "attn2o", "ffn_in": "ffni", "res_in": "resi", "res_out": "reso"}
    (tmp_path / "x.yaml").write_text(f"adapter_config:\n  din: {theirs[read]}\n  dout: "
                                     f"{theirs[add]}\n  mid_dim: 2\n  method: silu\n  scale: 2.0")
    options = [sample.Options(base=BASE), sample.Options(base=BASE, scale=0.0)]
    got, plain = (sample.load(str(tmp_path), options=o)[1](x, t, y) for o in options)
    assert torch.equal(got, model(x, t, y)) and not torch.equal(got, before)
    assert torch.equal(plain, before)
    for flags, words in (([str(tmp_path)], "is an adapter: give the --base"),
                         ([str(tmp_path / file)], "one file is one block: give --ckpt the folder")):
        with pytest.raises(SystemExit):
            sample.main(["--ckpt", *flags, "--out", str(tmp_path / "x.png")])
        assert words in capsys.readouterr().err


def test_a_concept_brings_its_word_and_its_matrices(tmp_path, capsys, monkeypatch):
    task, model = sample.load(BASE)
    unet = model.denoiser.state_dict()
    name = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    row = model.text.text_model.embeddings.token_embedding.weight[4] + 0.5
    W = {name: unet[name] + 0.1}
    save_concept(tmp_path / "concept.pt", W, {"<new1>": row}, ["<new1> circle"], unet)
    seen = []
    monkeypatch.setattr(DiffusionTask, "sample", lambda self, model, y, **options: (
        seen.append((model, y)) or torch.zeros(len(y), *self.shape)))
    flags = ["--ckpt", BASE, "--prompt", "a <new1> circle", "--out", str(tmp_path / "x.png")]
    sample.main([*flags, "--concept", str(tmp_path / "concept.pt")])
    model, y = seen[0]
    assert torch.equal(model.denoiser.state_dict()[name], W[name])
    assert "new words: <new1> circle" in capsys.readouterr().out
    assert len(set(y[0].tolist())) == 6                 # padding, start, end and three words
    with pytest.raises(SystemExit):                     # without it the word is unknown
        sample.main(flags)
    assert "<new1>" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sample.main(["--ckpt", str(tmp_path / "concept.pt"), "--out", str(tmp_path / "x.png")])
    assert "is a concept: say --ckpt BASE --concept" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# what is refused

def refuse(capsys, runs, name, *flags):
    """The one line that a refused command prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        drawn(runs, name, *flags)
    said = [line for line in capsys.readouterr().err.splitlines() if "batch" not in line]
    assert stopped.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said
    return said[0]


# a value for each option, and another option that it needs
GIVEN = {"ckpt": None, "classes": "1", "prompt": "a large red circle", "n": "3", "cfg_scale": "4",
         "negative": "a small red circle", "cfg_channels": "1",
         "sampler": None, "steps": "3", "truncation": "0.2", "eta": "0.9", "seed": "7",
         "base": BASE, "scale": "0.5", "concept": BASE, "weights": "model", "vae": BASE, "bpe": "x",
         "image_size": "64", "dtype": "bfloat16", "out": None, "export": "e.pt", "note": "x",
         "official": True, "diffusers": True,
         "strip": True, "gif": True, "npz": "2", "init": "init.png",
         "mask": "mask.png", "strength": "0.4"}
SAME = {"batch_size": "1", "device": "cpu"}                 # these change nothing but the speed
ALSO = {"mask": ["--init", "init.png"], "strength": ["--init", "init.png"]}


@pytest.mark.parametrize("kind", ["flow", "gaussian", "unguided", "text", "tokens"])
def test_every_option_changes_the_files_or_is_refused(runs, known, tmp_path, monkeypatch, kind):
    assert {f.name for f in dataclasses.fields(sample.Options)} == {*GIVEN, *SAME}
    ckpt = {"flow": str(runs / "latent" / "ckpt.pt"), "gaussian": str(runs / "pixel" / "ckpt.pt"),
            "unguided": str(runs / "unconditional" / "ckpt.pt"), "text": BASE,
            "tokens": str(ROOT / "assets" / "vq-scenes.pt")}[kind]
    task, model = sample.load(ckpt)                         # read once: a load is most of the time
    load = sample.load
    monkeypatch.setattr(sample, "load", lambda path, device, options: (
        load(path, device, options) if any(getattr(options, name) is not None for name in (
            "base", "scale", "weights", "vae", "bpe", "image_size", "dtype")) else (task, model)))
    other = "ddpm" if kind == "gaussian" else task.process.samplers[1]
    first = ["--sampler", "ddim"] if kind == "gaussian" else []

    def files(*flags):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        monkeypatch.chdir(folder)
        for name, path in zip(("init.png", "mask.png"), known[2:]):
            (folder / name).write_bytes(pathlib.Path(path).read_bytes())
        try:
            sample.main(["--ckpt", ckpt, "--out", "x.png", "--steps", "2", *first, "--n", "2",
                         *flags] if "--export" not in flags else ["--ckpt", ckpt, *flags])
        except SystemExit as stopped:
            return stopped.code
        return tree(folder)
    plain, refused = files(), set()
    for name, value in {**GIVEN, "sampler": other}.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "npz":
            assert files(flag, value) == 2                  # beside --n
        elif value is not None and name not in ("note", "export"):
            got = files(*ALSO.get(name, ()), flag, *[value] * (value is not True))
            before = files(*ALSO[name]) if name in ALSO else plain
            refused |= {name} if got == 2 else set()
            assert got == 2 or isinstance(got, dict) and got != before, name
    always = {"base", "scale", "vae", "bpe", "image_size", "concept", "official",
              "diffusers"}
    none, words = {"cfg_scale", "cfg_channels"}, {"prompt", "negative"}
    expected = {
        "flow": {"truncation", *words}, "gaussian": {"truncation", *words},
        "unguided": {"truncation", "classes", *words, *none},
        "text": {"truncation", "classes", "weights"},
        "tokens": {"eta", "classes", "weights", "cfg_channels"}}
    assert refused == always | expected[kind]
    for name, value in SAME.items():
        assert files(f"--{name.replace('_', '-')}", value) == plain


@pytest.mark.parametrize("flags", [[f"--{name.replace('_', '-')}", *[value] * (value is not True)]
                                   for name, value in {**GIVEN, **SAME, "sampler": "ddim",
                                                       "out": "x.png"}.items()
                                   if value and name not in ("export", "note", "official",
                                                          "diffusers")],
                         ids=lambda x: x[0])
def test_an_export_reads_nothing_else(runs, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(runs / "latent" / "ckpt.pt"), "--export", str(tmp_path / "e.pt"),
                     *flags])
    assert stopped.value.code == 2 and not list(tmp_path.iterdir())
    words = capsys.readouterr().err
    assert flags[0] in words and ("beside --export" in words or "needs --init" in words)


@pytest.mark.parametrize("name,flags,words", [
    ("latent", ["--class", "2"], "there are 2, numbered"), ("latent", ["--class", "-1"], "are 2"),
    ("latent", ["--class", "aple"], "did you mean 'apple'"),
    ("unconditional", ["--class", "0"], "there are 0"),
    ("latent", ["--prompt", "x"], "say --class, not --prompt"),
    ("latent", ["--negative", "x"], "say --class, not --prompt"),
    ("latent", ["--sampler", "plms"], "unknown sampler 'plms': choose"),
    ("latent", ["--sampler", "heun", "--eta", "0.5"], "or use sampler euler"),
    ("latent", ["--truncation", "0.9"], "does not read truncation"),
    ("pixel", ["--sampler", "ddpm", "--eta", "0.5"], "leave it out, or use sampler ddim"),
    ("latent", ["--steps", "ddim25"], "invalid int value: 'ddim25'"),
    ("unconditional", ["--cfg-scale", "3"], "nothing to guide by"),
    ("latent", ["--note", "x"], "--export"),
    ("latent", ["--cfg-scale", "1", "--cfg-channels", "1"], "is read with guidance alone"),
    ("latent", ["--cfg-channels", "5"], "there are 4 channels"),
    ("latent", ["--steps", "0"], "steps 0"), ("latent", ["--steps", "²"], "int value: '²'"),
    ("latent", ["--steps", "99999999999"], "1 to 10,000"), ("latent", ["--class", "²"], "are 2"),
    ("latent", ["--n", "10000000"], "--n 10000000: give"), ("latent", ["--out="], "--out is empty"),
    ("latent", ["--strength", "0", "--init", "x"], "--strength 0.0: give"),
    ("latent", ["--strength", "1.5", "--init", "x"], "--strength 1.5: give"),
    ("latent", ["--strength", "nan", "--init", "x"], "--strength nan: give"),
    ("latent", ["--npz", "3", "--n", "3"], "--n is not read beside --npz"),
    ("latent", ["--npz", "3", "--gif"], "--gif is not read beside --npz"),
    ("latent", ["--mask", "m.png"], "--mask needs --init"),
    ("latent", ["--strength", "0.5"], "--strength needs --init"),
    ("latent", ["--init", "a", "--mask", "b", "--strength", "0.5"], "not read beside --mask"),
    ("latent", ["--init", "nowhere.png"], "cannot read image nowhere.png"),
    ("latent", ["--concept", "c.pt"], "needs a text-to-image --ckpt"),
    ("latent", ["--ckpt", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    ("latent", ["--dtype", "float15"], "--dtype"), ("latent", ["--cfg-scal", "2"], "--cfg-scale"),
    ("ae", [], "does not sample by itself"),
    # before the checkpoint is read, and so before anything is sampled
    ("latent", ["--ckpt", "nowhere.pt", "--out", "x"], "--out x: give a picture's name"),
    ("latent", ["--ckpt", "nowhere.pt", "--out", "x.npz"], "--out x.npz: give a picture's name")])
def test_what_cannot_be_is_one_line(runs, capsys, name, flags, words):
    with pytest.raises(SystemExit) as stopped:
        drawn(runs, name, *flags)
    err = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and words in err[-1] and "Traceback" not in "".join(err)
