"""VQ-VAE and VQ-Diffusion through the loop and the sampler: text, classes, nothing; refusals."""
import pytest
import torch
from PIL import Image

import data
import sample
import train
from checkpoint import load_checkpoint
from conftest import ROOT
from evaluate import prompt_accuracy
from vae import first_stage_from
from worlds import parse_caption, plan_world

SHORT = ["--batch-size", "8", "--log-every", "1", "--sample-every", "0"]


@pytest.fixture(scope="module")
def tokeniser(tmp_path_factory, scenes, short_previews):
    """A VQ-VAE of 32 codes after 54 steps: its codes have started."""
    out = tmp_path_factory.mktemp("vqvae") / "run"
    train.main(["--model", "vq-vae", "--data", f"folder:{scenes}", "--codes", "32", "--steps", "54",
                *SHORT, "--out", str(out)])
    return str(out / "ckpt.pt")


@pytest.fixture(scope="module")
def texts(tokeniser, scenes, tmp_path_factory):
    """A VQ-Diffusion model of captions after four steps, with every part that a flag adds."""
    out = tmp_path_factory.mktemp("vq") / "run"
    train.main(["--model", "vq-tiny", "--data", f"folder:{scenes}", "--first-stage", tokeniser,
                "--learned-null", "--steps", "4", *SHORT, "--out", str(out)])
    return str(out / "ckpt.pt")


def test_the_checkpoint_carries_codes_and_grid(tokeniser, texts, scenes):
    alone, state = load_checkpoint(tokeniser), load_checkpoint(texts)
    first = first_stage_from({"kind": "vq-vae", "sizes": alone["sizes"], "model": alone["ema"]}, "")
    carried = first_stage_from(state["first_stage"], texts)
    assert first.num_codes == carried.num_codes == 32 and carried.grid == 8
    x = data.to_float(data.load(f"folder:{scenes}").images)
    assert torch.equal(first.encode(x), carried.encode(x)) and first.encode(x).shape == (24, 64)
    assert {"text.null", "denoiser.blocks.3.attn1.bias"} <= state["ema"].keys()
    codes = state["ema"]["denoiser.content_emb.emb.weight"][:-1]
    alike = torch.stack([torch.pdist(carried.codebook.embedding), torch.pdist(codes)])
    assert torch.corrcoef(alike)[0, 1] > 0.5                            # codes started alike
    task, model = sample.load(texts)
    assert task.process.num_codes == 32 and model.denoiser.to_logits[1].out_features == 32


def test_everything_that_samples(texts, tmp_path):
    Image.fromarray(data.load("scenes", count=1).images[0].permute(1, 2, 0).numpy()).save(
        tmp_path / "a.png")
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    mask[:16] = 255
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    init, sampled = ["--init", str(tmp_path / "a.png")], {}
    prompt = load_checkpoint(texts)["info"]["examples"][0]
    for name, more in {"plain": [], "again": [], "cut": ["--truncation", "0.5"],
                       "few": ["--sampler", "purity"], "from": [*init, "--strength", "0.3"],
                       "in": [*init, "--mask", str(tmp_path / "mask.png")]}.items():
        out = tmp_path / f"{name}.png"
        sample.main(["--ckpt", texts, "--prompt", prompt, "--n", "2", "--steps", "5", *more,
                     "--out", str(out)])
        sampled[name] = out.read_bytes()
    assert sampled["plain"] == sampled["again"] and len(set(sampled.values())) == 5
    task, model = sample.load(texts)
    y = task.tokenizer([prompt] * 3)
    three, pictures, film = sample.sample_all(task, model, y, seed=0, film=True, steps=5)
    one, _, _ = sample.sample_all(task, model, y[:1], seed=2, steps=5)
    assert torch.equal(three[2], one[0]) and len(film) == 6               # and the end
    assert all(x.shape == (3, 3, 2 * pictures.shape[2], pictures.shape[3]) for _, x in film)
    assert torch.equal(film[-1][1], pictures.repeat(1, 1, 2, 1))            # x_t above the guess
    top, _ = film[0][1].float().chunk(2, 2)                 # almost all [MASK]: hardly a picture
    assert top.std() < 0.5 * pictures.float().std()
    assert three.max() < 32                                                 # and no [MASK]


@pytest.mark.parametrize("folder,ask", [("classes", ["--class", "b"]), ("flat", ["--n", "2"])])
def test_classes_and_nothing(tokeniser, tmp_path, folder, ask):
    images = data.load("scenes", count=6).images
    for k, image in enumerate(images):
        inside = f"classes/{'ab'[k % 2]}" if folder == "classes" else "flat"
        data.save_grid(image[None], tmp_path / inside / f"{k}.png", pad=0, scale=1)
    out = tmp_path / "run"
    train.main(["--model", "vq-tiny", "--data", f"folder:{tmp_path / folder}", "--first-stage",
                tokeniser, "--steps", "2", *SHORT, "--batch-size", "4", "--out", str(out)])
    task, model = sample.load(str(out / "ckpt.pt"))
    assert model.num_classes == (2 if folder == "classes" else 0)
    assert model.can_guide == (folder == "classes")
    sample.main(["--ckpt", f"{out}/ckpt.pt", *ask, "--steps", "3", "--out", f"{out}/x.png"])
    assert (out / "x.png").stat().st_size > 100


def test_wrong_input_gets_one_line(texts, tokeniser, scenes, tmp_path, capsys):
    prompt = load_checkpoint(texts)["info"]["examples"][0]
    ask = ["--ckpt", texts, "--prompt", prompt, "--out", str(tmp_path / "x.png")]
    on = ["--data", f"folder:{scenes}", "--out", str(tmp_path / "x")]
    for main, flags, words in (
            (sample.main, [*ask, "--eta", "1"], "eta"),
            (sample.main, [*ask, "--sampler", "ddim"], "posterior"),
            (sample.main, [*ask, "--sampler", "purity", "--steps", "ddim25"], "ddim25"),
            (sample.main, ["--ckpt", tokeniser], "does not sample by itself"),
            (train.main, [*on, "--model", "vq-tiny", "--first-stage", "none"], "tokens"),
            (train.main, [*on, "--first-stage", tokeniser], "numbers, from a tiny-ae"),
            (train.main, [*on, "--model", "vq-tiny", "--first-stage", tokeniser,
                          "--image-size", "64"], "(3, 32, 32)")):
        with pytest.raises(SystemExit) as stop:
            main(flags)
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and words in err, err


def test_the_shipped_model_draws_what_one_asks():
    # Captions that say all: one object each, in the world that the model was trained on.
    world, plan = data.load("scenes", split="test"), plan_world("scenes", "test")
    said = [(c, parse_caption(c)) for c in world.captions]
    captions = [c for c, facts in said if {*facts["objects"][0]} >= {"color", "size", "place"}
                and "background" in facts][:32]
    task, model = sample.load(str(ROOT / "assets" / "vq-scenes.pt"))
    _, pictures, _ = sample.sample_all(task, model, task.tokenizer(captions), steps=10)
    right = prompt_accuracy(pictures, captions)
    assert right["color"][0] >= 0.9 and right["shape"][0] >= 0.75       # 94 % of shapes, 25 steps
    rows = (plan["part"] < 0).all(1).nonzero()[:80, 0]
    again = task.to_pictures(task.encode(data.to_float(world.images[rows])))
    assert prompt_accuracy(again, [world.captions[i] for i in rows])["all"][0] >= 0.95
