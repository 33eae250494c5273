"""VQ-VAE and VQ-Diffusion through the one loop and the sampler: text, classes, nothing; stop, resume, draw, refuse."""
import pathlib

import pytest
import torch
from PIL import Image

import data
import sample
import train
from evaluate import prompt_accuracy
from tasks import load_first_stage
from weights import load_checkpoint

SHORT = ["--batch-size", "8", "--log-every", "1", "--sample-every", "0"]


@pytest.fixture(scope="module")
def tokeniser(tmp_path_factory):
    """A VQ-VAE of 32 codes after 60 steps: past its warm-up."""
    out = tmp_path_factory.mktemp("vqvae") / "run"
    train.main(["--model", "vq-vae", "--data", "scenes", "--codes", "32", "--steps", "60", *SHORT, "--out", str(out)])
    return str(out / "ckpt.pt")


@pytest.fixture(scope="module")
def texts(tokeniser, tmp_path_factory):
    out = tmp_path_factory.mktemp("vq") / "run"
    train.main(["--model", "vq-tiny", "--data", "scenes", "--first-stage", tokeniser, "--steps", "4", *SHORT, "--out",
                str(out)])
    return out


def test_the_checkpoint_carries_codes_and_grid(tokeniser, texts):
    first, carried = (load_first_stage(load_checkpoint(p), str(p)) for p in (tokeniser, texts / "ckpt.pt"))
    assert first.num_codes == carried.num_codes == 32 and carried.grid == 8
    x = data.to_float(data.load("scenes", count=20).images)
    assert torch.equal(first.encode(x), carried.encode(x)) and first.encode(x).shape == (20, 64)
    task, model = sample.load(str(texts / "ckpt.pt"))
    assert task.process.num_codes == 32 and model.transformer.to_logits[1].out_features == 32


@pytest.mark.parametrize("kind", ["vq-vae", "vq-tiny"])
def test_stopped_and_resumed_is_the_same_run(kind, tokeniser, texts, tmp_path, monkeypatch):
    more = ["--codes", "32"] if kind == "vq-vae" else ["--first-stage", tokeniser]
    steps = {"vq-vae": 54, "vq-tiny": 4}[kind]          # across the VQ-VAE's warm-up of 50 passes
    flags = ["--model", kind, "--data", "scenes", *more, "--steps", str(steps), *SHORT, "--save-every", str(steps - 2)]
    if kind == "vq-vae":
        train.main([*flags, "--out", str(tmp_path / "whole")])
    whole = load_checkpoint((tmp_path / "whole" if kind == "vq-vae" else texts) / "ckpt.pt")
    save = train.save_checkpoint

    def save_and_die(path, state):
        save(path, state)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    with pytest.raises(SystemExit):
        train.main([*flags, "--out", str(tmp_path / "parts")])
    monkeypatch.setattr(train, "save_checkpoint", save)
    train.main(["--out", str(tmp_path / "parts"), "--resume"])
    parts = load_checkpoint(tmp_path / "parts" / "ckpt.pt")
    for net in ("model", "ema"):
        assert all(torch.equal(w, parts[net][name]) for name, w in whole[net].items())


def test_everything_that_draws(texts, tmp_path):
    ckpt = str(texts / "ckpt.pt")
    Image.fromarray(data.load("scenes", count=1).images[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    mask[:16] = 255
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    drawn = {}
    for name, more in {"plain": [], "again": [], "cut": ["--truncation", "0.5"], "few": ["--sampler", "purity"],
                       "from": ["--init", str(tmp_path / "a.png"), "--strength", "0.3"],
                       "in": ["--init", str(tmp_path / "a.png"), "--mask", str(tmp_path / "mask.png")]}.items():
        out = tmp_path / f"{name}.png"
        sample.main(["--ckpt", ckpt, "--prompt", "a red circle", "--n", "2", "--steps", "5", *more, "--out", str(out)])
        drawn[name] = out.read_bytes()
    assert drawn["plain"] == drawn["again"] and len(set(drawn.values())) == 5
    task, model = sample.load(ckpt)
    y = task.tokenizer(["a red circle"] * 3)
    three, _, film = sample.draw_all(task, model, y, seed=0, keep_states=True, steps=5)
    one, _, _ = sample.draw_all(task, model, y[:1], seed=2, steps=5)
    assert torch.equal(three[2], one[0]) and len(film) == 5 and three.max() < 32           # and no [MASK]


def test_classes_and_nothing(tokeniser, tmp_path):
    for folder, count in (("classes/a", 3), ("classes/b", 3), ("flat", 4)):
        (tmp_path / folder).mkdir(parents=True)
        for k, image in enumerate(data.load("scenes", count=count).images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / folder / f"{k}.png")
    for folder, ask in (("classes", ["--class", "b"]), ("flat", ["--n", "2"])):
        out = str(tmp_path / f"run-{folder}")
        train.main(["--model", "vq-tiny", "--data", f"folder:{tmp_path / folder}", "--first-stage", tokeniser,
                    "--steps", "2", *SHORT, "--batch-size", "4", "--out", out])
        sample.main(["--ckpt", f"{out}/ckpt.pt", *ask, "--steps", "3", "--out", f"{out}/x.png"])
        assert (tmp_path / f"run-{folder}" / "x.png").stat().st_size > 100


def test_wrong_input_gets_one_line(texts, tokeniser, tmp_path, capsys):
    draw = ["--ckpt", str(texts / "ckpt.pt"), "--prompt", "a red circle"]
    for main, flags, words in (
            (sample.main, [*draw, "--eta", "1"], "not for codes"),
            (sample.main, [*draw, "--sampler", "ddim"], "posterior"),
            (sample.main, ["--ckpt", tokeniser], "autoencoder"),
            (train.main, ["--model", "vq-tiny", "--data", "scenes", "--first-stage", "none", "--out",
                          str(tmp_path / "x")], "VQ-VAE's tokens"),
            (train.main, ["--model", "vq-tinny", "--out", str(tmp_path / "x")], "vq-tiny"),
            (train.main, ["--model", "DiT-128x4/2", "--first-stage", tokeniser, "--out", str(tmp_path / "x")], "VQ")):
        with pytest.raises(SystemExit) as stop:
            main(flags)
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and words in err, err


def test_the_shipped_model_draws_what_one_asks():
    world = data.load("scenes", split="test", count=80)
    captions = [c for c in world.captions if "relation" not in data.parse_caption(c)][:32]
    task, model = sample.load(str(pathlib.Path(__file__).parent.parent / "assets" / "vq-scenes.pt"))
    _, pictures, _ = sample.draw_all(task, model, task.tokenizer(captions), steps=10)
    drawn = prompt_accuracy(pictures, captions)
    assert drawn["color"][0] >= 0.95 and drawn["shape"][0] >= 0.7           # 95 % of 300 with 25 calls
    again = task.to_pictures(task.encode(data.to_float(world.images)))
    assert prompt_accuracy(again, world.captions)["all"][0] >= 0.95
