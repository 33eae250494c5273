"""What holds for every data source, and for the flags, steps and runs of every family.

See test_registry.py.
"""
import functools
import gzip
import hashlib
import itertools
import re
import tarfile

import numpy as np
import pytest
import torch
from conftest import fill_by_recipe
from test_registry import (CAPTIONS, DATA, DENOISERS, PICTURES, noise, seeded, smallest,
                           task_of)

import data
import models
import tasks
import train
import vae
from models import FAMILIES, FLAGS
from train import Config, make_step


def loss_of(task, count, seed=1, **changed):
    """The loss of the first pictures, and its draws."""
    dataset, draws = task.prepare(DATA["captions"], "cpu"), task.draw(count, seeded(seed), "cpu")
    draws = {k: v for k, v in {**draws, **changed}.items() if k != "flip"}
    x, y = dataset.images[:count], dataset.labels[:count]
    return task.loss(task.model, x, y, torch.arange(count), **draws)[0], draws


@functools.lru_cache(8)
def evidence(family, *flags):
    """Everything that a flag of a model can change, as numbers."""
    task = task_of(family, flags)
    whole = [k for k, v in task.model.state_dict().items() if not v.is_floating_point()]
    fill_by_recipe(task.model, ["pos_embed", *whole])
    loss, draws = loss_of(task, 3)
    found = [loss, *draws.values(), *(torch.tensor(p.shape) for p in task.model.parameters())]
    stage = task.model
    if family in DENOISERS:
        y = task.tokenizer(CAPTIONS[:2]) if task.tokenizer else torch.arange(2)
        found.append(task.sample(task.model, y, steps=2, generator=seeded(2)))
        stage = task.first_stage
    return found + [torch.tensor([v for v in stage.sizes.values() if isinstance(v, (int, float))])]


def same(a, b):
    return a.shape == b.shape and torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("family, name", [
    (family, name) for family, row in FAMILIES.items() for name in row.flags
    # read earlier, see test_train.py; files, see test_text_to_image.py
    if name not in ("first_stage", "first_stage_steps", "text_encoder", "bpe")])
def test_every_value_of_a_flag_changes_the_task_or_is_refused(family, name):
    kind, field = FLAGS[name]
    floats = [1e-6 if name == "min_snr" else 0.7]               # a cap that all pictures reach
    values = field.metadata["choices"] or {bool: [not field.default], int: [1, 3]}.get(kind, floats)
    bases = [{}] + [{"schedule": "linear"}] * ("schedule" in FAMILIES[family].flags)
    told = {}
    for value, base in itertools.product(values, bases):
        if name in base or told.get(value) or value == field.default:
            continue
        try:
            plain = evidence(family, *base.items())
            changed = evidence(family, *base.items(), (name, value))
            told[value] = len(plain) != len(changed) or not all(map(same, plain, changed))
        except ValueError as error:
            assert re.search(f"{name}|{name.replace('_', '-')}|{value}", str(error)), error
    default = {"prediction": "eps"}.get(name)                   # its None says so
    assert told and all(changed or value == default for value, changed in told.items()), told


@pytest.mark.parametrize("family", FAMILIES)
def test_flags_of_other_families_are_refused_with_their_readers(family, tmp_path, capsys):
    for name in sorted(FLAGS.keys() - set(FAMILIES[family].flags)):
        with pytest.raises(SystemExit) as stop:
            train.main(["--model", smallest(family), f"--{name.replace('_', '-')}", "1"])
        said = capsys.readouterr().err
        readers = [f for f, row in FAMILIES.items() if name in row.flags]
        assert stop.value.code == 2 and readers and all(f in said for f in readers)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_draw_of_a_step_is_read_and_a_loss_is_pure(family):
    task = task_of(family)
    if family in DENOISERS:
        fill_by_recipe(task.model, ("pos_embed",))
    plain, draws = loss_of(task, 4)
    other = {**task.draw(4, seeded(2), "cpu"), "drop": torch.zeros(4)}          # all labels hidden
    before, rng = {k: v.clone() for k, v in task.model.state_dict().items()}, torch.get_rng_state()
    assert plain == loss_of(task, 4)[0] and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in task.model.state_dict().items())
    for name in draws:
        assert loss_of(task, 4, **{name: other[name]})[0] != plain, f"{name} is not read"


@pytest.mark.parametrize("family", DENOISERS)
def test_blocks_that_are_computed_again_give_the_same_weights(family, monkeypatch):
    """Each block's forward runs twice; bit-equal weights and averages, under the same names."""
    found, calls = [], []
    task = task_of(family)
    for kind in {type(block) for block in train.blocks_of(task.model)}:
        monkeypatch.setattr(kind, "forward", lambda block, *given, forward=kind.forward: (
            calls.append(block), forward(block, *given))[1])
    for again in (False, True):
        task = task_of(family)
        config = Config(model=smallest(family), device="cpu", batch_size=4, checkpointing=again)
        for _ in range(1 + again):              # twice on one model is not four times
            step = make_step(config, DATA["captions"], task)
        calls.clear()
        step(0)
        found.append((len(calls), task.model.state_dict(), step.ema.state_dict()))
    (once, *plain), (twice, *recomputed) = found
    assert 1.9 * once < twice <= 2 * once           # but blocks that need no gradient: once
    for a, b in zip(plain, recomputed):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_micro_batches_are_one_batch_and_a_batch_is_learned(family):
    """Gradients (the optimizers' first moments) and codebooks agree to float32 rounding."""
    found = []
    for accum in (2, 1):
        task = task_of(family)
        if hasattr(task.model, "codebook"):
            task.model.codebook.warmup = 0
        config = Config(model=smallest(family), device="cpu", accum=accum, batch_size=4, seed=3,
                        warmup=0, lr_decay="constant")
        step = make_step(config, DATA["captions"], task)
        metrics, norm, keep = step(0)
        moments = [m for o in step.optimizers for state in o.state.values()
                   for name, m in state.items() if name in ("exp_avg", "momentum")]
        seen = (keep, metrics["loss"], norm, *moments, *task.model.buffers())
        found.append([value.clone() for value in seen])
    # tiny-ae measures its noise by the latents' spread in a micro-batch, so there it differs
    tolerance = 1e-2 if family == "tiny-ae" else 1e-5
    for one, two in zip(*found, strict=True):
        one, two = one.double(), two.double()
        assert (one - two).abs().max() <= tolerance * max(one.abs().max(), 1e-3)
    assert [step(0)[0]["loss"] for _ in range(8)][-1] < 0.95 * metrics["loss"]  # the same draws


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """--data npz:FILE with 8 pictures of 8 x 8, labels and captions."""
    path = tmp_path_factory.mktemp("arrays") / "toy.npz"
    np.savez(path, arr_0=PICTURES[..., :8, :8].permute(0, 2, 3, 1).numpy(), labels=np.arange(8) % 3,
             captions=np.array(CAPTIONS))
    return f"npz:{path}"


def run(out, family, arrays, stage, steps, *more):
    given = [word for flag, value in (("codes", "8"), ("factor", "2"), ("first_stage", stage))
             if flag in FAMILIES[family].flags and (
                 flag == "first_stage" or "first_stage" not in FAMILIES[family].flags)
             for word in (f"--{flag.replace('_', '-')}", value)]
    train.main(["--model", smallest(family), "--data", arrays, "--image-size", "8",
                "--out", str(out), "--batch-size", "2", "--warmup", "0", "--lr-decay", "constant",
                "--device", "cpu", "--steps", str(steps), *given, *more])
    return torch.load(out / "ckpt.pt", weights_only=True)


def leaves(tree):
    if isinstance(tree, dict):
        return leaves([tree[k] for k in tree if k != "config"])
    return [leaf for t in tree for leaf in leaves(t)] if isinstance(tree, (list, tuple)) else [tree]


@pytest.mark.parametrize("family, more", [*((family, ()) for family in FAMILIES),
                                          ("udit", ("--captions",))])
def test_saved_loaded_and_resumed_is_bit_for_bit_one_run(family, more, arrays, tmp_path,
                                                         monkeypatch):
    monkeypatch.setattr(tasks.DiffusionTask, "preview", lambda *args: None)
    monkeypatch.setattr(train, "plot_loss", lambda *args: None)
    monkeypatch.setattr(tasks, "macs", lambda task: 0)
    monkeypatch.setitem(models.NEW_STAGES, "vq-vae", lambda s, info: vae.VQVAE(
        info["image_size"], info["channels"], s.codes, s.factor, warmup=1))
    stage = "none"
    if FAMILIES[family].axes == 1:
        run(tmp_path / "stage", "vq-vae", arrays, "", 2)
        stage = str(tmp_path / "stage" / "ckpt.pt")
    whole = run(tmp_path / "whole", family, arrays, stage, 4, *more)
    run(tmp_path / "parts", family, arrays, stage, 2, *more)
    parts = run(tmp_path / "parts", family, arrays, stage, 4, "--resume")
    assert whole["step"] == 4 and whole.keys() == parts.keys()
    for a, b in zip(leaves(whole), leaves(parts), strict=True):
        assert same(a, b)
    for weights in ("model", "ema") if family in DENOISERS else ():
        loaded = models.task_from(whole, "whole", weights).model.state_dict()
        assert all(torch.equal(v, loaded[k]) for k, v in whole[weights].items())
    assert not all(map(same, leaves(whole["model"]), leaves(whole["ema"])))


# --------------------------------------------------------------------------------------------------
# data: every kind gives back what was written

def as_folder(root):
    for i, picture in enumerate(PICTURES):
        (root / str(i % 3)).mkdir(exist_ok=True, parents=True)
        data.save_grid(picture[None], root / str(i % 3) / f"{9 - i}.png", nrow=1, pad=0, scale=1)
        (root / str(i % 3) / f"{9 - i}.txt").write_text(CAPTIONS[i])
    return f"folder:{root}", PICTURES, CAPTIONS


def as_npz(root):
    np.savez(root / "a.npz", arr_0=PICTURES.permute(0, 2, 3, 1).numpy(), labels=np.arange(8) % 3,
             captions=np.array(CAPTIONS))
    return f"npz:{root}/a.npz", PICTURES, CAPTIONS


def as_latents(root):
    z = noise(8, 5, 4, 4)
    data.save_latents(str(root / "z.npz"), z, torch.arange(8) % 3, CAPTIONS, ["0", "1", "2"])
    return f"latents:{root}/z.npz", z, CAPTIONS


def as_official(name):
    def write(root):
        files = data.OFFICIAL[name][1]
        (root / name).mkdir()
        grey = PICTURES[:, :1].repeat(1, 1, 2, 2)[..., :28, :28]
        colour = PICTURES.repeat(1, 1, 2, 2)
        labels = torch.arange(8, dtype=torch.uint8) % 3
        for file in files:
            body = bytes(16) + grey.numpy().tobytes() if "images" in file else (
                bytes(8) + labels.numpy().tobytes())
            if name == "cifar10":
                (root / "data_batch_1.bin").write_bytes(
                    torch.cat([labels[:, None], colour.flatten(1)], 1).numpy().tobytes())
                with tarfile.open(root / "x.tar", "w") as tar:
                    tar.add(root / "data_batch_1.bin", "cifar/data_batch_1.bin")
                body = (root / "x.tar").read_bytes()
            (root / name / file).write_bytes(gzip.compress(body))
            files[file] = hashlib.md5((root / name / file).read_bytes()).hexdigest()
        return name, colour if name == "cifar10" else grey, None
    return write


WRITERS = {"folder:PATH": as_folder, "npz:FILE": as_npz, "latents:FILE": as_latents,
           **{name: as_official(name) for name in data.OFFICIAL}}
DRAWN = ("shapes", "scenes")


def sources():
    with pytest.raises(ValueError) as error:
        data.load("no such data")
    return str(error.value).split("Known: ")[1].split(", ")


@pytest.mark.parametrize("source", sources())
def test_a_source_gives_back_what_was_written(source, tmp_path, monkeypatch):
    if source in DRAWN:
        return check_drawn(source)
    assert source in WRITERS, f"say in WRITERS how a file of {source} is written"
    for name, row in data.OFFICIAL.items():
        monkeypatch.setitem(data.OFFICIAL, name, (row[0], dict(row[1]), row[2]))
    name, pictures, captions = WRITERS[source](tmp_path)
    for count in (None, 5):
        found = data.load(name, pictures.shape[-1], data_dir=tmp_path, count=count, seed=4)
        assert found.images.dtype == pictures.dtype and len(found) == (count or 8)
        seen = []
        for i in range(len(found)):
            match = [k for k in range(8) if torch.equal(found.images[i], pictures[k])]
            assert len(match) == 1, "a picture has other pixels than were written"
            seen += match
            known = data.OFFICIAL[name][2] if name in data.OFFICIAL else "012"
            assert found.class_names[found.labels[i]] == known[match[0] % 3]
            assert captions is None or found.captions[i] == captions[match[0]]
        assert len(set(seen)) == len(seen)
        assert not (found.flip and captions)                    # captions may say left and right


def check_drawn(source):
    one, again, other, test = (
        data.load(source, 24, split, count=6, seed=seed)
        for split, seed in (("train", 1), ("train", 1), ("train", 2), ("test", 1)))
    assert one.images.shape == (6, 3, 24, 24) and one.images.dtype == torch.uint8
    assert torch.equal(one.images, again.images) and one.captions == again.captions
    assert not torch.equal(one.images, other.images) and not torch.equal(one.images, test.images)
    assert len(set(one.captions)) > 3 and one.images.float().std() > 10 and not one.flip
