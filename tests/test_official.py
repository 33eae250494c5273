"""Official files end to end: shrunk, but of full structure; the pixels equal an independent composition of tested
parts."""
import pathlib

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
import sample
import tasks
import train
from conftest import fill_by_recipe
from dit import DiT
from text import CLIPTokenizer, TextEncoder
from unet import UNet
from vae import AutoencoderKL
from weights import write_safetensors

MERGES = pathlib.Path(__file__).parent / "tiny_merges.txt"
PROMPT, NEGATIVE = "a low wide tower", "the newest lowest"


@pytest.fixture(scope="module")
def parts():
    """U-Net, autoencoder (f = 2) and text encoder of Stable Diffusion's structure, weights by the golden recipe."""
    unet = fill_by_recipe(UNet(4, 4, 32, (1, 2), 1, (1, 2), num_heads=8, context_dim=64))
    vae = fill_by_recipe(AutoencoderKL(32, (1, 2), 1))
    text = fill_by_recipe(TextEncoder(CLIPTokenizer(MERGES).vocab_size, 77, hidden_size=64, depth=2, num_heads=1))
    return {"model.diffusion_model.": unet.eval(), "first_stage_model.": vae.eval(),
            "cond_stage_model.transformer.": text.eval()}


def compvis(parts):
    state = {prefix + k: v for prefix, part in parts.items() for k, v in part.state_dict().items()}
    return state | {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(()),
                    "first_stage_model.loss.logvar": torch.zeros(())}


def ddim(model, cond, null, scale, seeds, shape, steps=4):
    """DDIM on Stable Diffusion's schedule, written out: every step x0, then towards the next alpha_bar."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    kept = [0, 333, 666, 999]
    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    for i in reversed(range(steps)):
        t = torch.full((len(x),), kept[i])
        eps_c, eps_u = model(x, t, cond), model(x, t, null)
        eps = eps_u + scale * (eps_c - eps_u)
        ab, ab_prev = alpha_bar[kept[i]].item(), alpha_bar[kept[i - 1]].item() if i else 1.0
        x0 = (x - (1 - ab) ** 0.5 * eps) / ab ** 0.5
        x = ab_prev ** 0.5 * x0 + (1 - ab_prev) ** 0.5 * eps
    return x


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
@pytest.mark.parametrize("negative", ["", NEGATIVE])
@torch.no_grad()
def test_stable_diffusion_from_one_file(parts, tmp_path, monkeypatch, kind, negative):
    path = tmp_path / f"v1-5-shrunk.{kind}"
    if kind == "safetensors":
        write_safetensors(path, compvis(parts))
    else:
        torch.save({"state_dict": compvis(parts)}, path)
    drawn = []
    monkeypatch.setattr(sample, "save_grid", lambda images, path, captions=None, **k: drawn.append((images, captions)))
    sample.main(["--ckpt", str(path), "--prompt", PROMPT, "--negative", negative, "--n", "2", "--steps", "4",
                 "--seed", "5", "--cfg-scale", "3", "--image-size", "16", "--bpe", str(MERGES), "--device", "cpu",
                 "--out", str(tmp_path / "x.png")])
    unet, vae, text = parts.values()
    tokens = CLIPTokenizer(MERGES)
    cond, null = text(tokens([PROMPT] * 2)), text(tokens([negative] * 2))
    want = data.to_uint8(vae.decode(ddim(unet, cond, null, 3.0, (5, 6), (4, 8, 8))))
    images, captions = drawn[0]
    assert captions == [PROMPT] * 2 and images.shape == (2, 3, 16, 16)
    assert (images.int() - want.int()).abs().max() <= 1 and images.float().std() > 10       # one grey level of rounding


@torch.no_grad()
def test_dit_with_its_autoencoder(parts, tmp_path, monkeypatch):
    dit = fill_by_recipe(DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=384, depth=1, num_heads=6,
                             num_classes=12, learn_sigma=True), ["pos_embed"]).eval()
    torch.save(dit.state_dict(), tmp_path / "DiT-shrunk.pt")
    vae = parts["first_stage_model."]
    write_safetensors(tmp_path / "vae.safetensors", vae.state_dict())
    drawn = []
    monkeypatch.setattr(sample, "save_grid", lambda images, path, captions=None, **k: drawn.append(images))
    sample.main(["--ckpt", str(tmp_path / "DiT-shrunk.pt"), "--vae", str(tmp_path / "vae.safetensors"), "--class", "7",
                 "--sampler", "ddim", "--steps", "4", "--seed", "3", "--device", "cpu",
                 "--out", str(tmp_path / "x.png")])
    from diffusion import GaussianDiffusion
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    process = GaussianDiffusion().respaced(4)
    for i in reversed(range(4)):
        t = process.timestep_map[torch.tensor([i])]
        c, u = dit(x, t, torch.tensor([7]))[:, :4], dit(x, t, torch.tensor([12]))[:, :4]
        x = process.ddim_step(u + 4 * (c - u), x, torch.tensor([i]))[0]
    assert (drawn[0].int() - data.to_uint8(vae.decode(x)).int()).abs().max() <= 1 and drawn[0].shape == (1, 3, 16, 16)
    assert_close(drawn[0].float().std() > 10, torch.tensor(True))


@pytest.mark.parametrize("drop,words", [("first_stage_model.", "no vae"), ("cond_stage_model.transformer.", "no text"),
                                        ("model.diffusion_model.", "no model in it that draws")])
def test_a_file_without_a_part_says_which(parts, tmp_path, capsys, drop, words):
    path = tmp_path / "part.safetensors"
    write_safetensors(path, compvis({k: v for k, v in parts.items() if k != drop}))
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(path), "--prompt", "x", "--bpe", str(MERGES), "--out", str(tmp_path / "x.png")])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and words in err and len(err.strip().splitlines()) == 1


@pytest.fixture
def towers(tmp_path, monkeypatch):
    """Three pictures of a thing; the rare tokens are some that the tiny list of merges knows."""
    monkeypatch.setattr(tasks, "RARE", ("n", "lo", "ne"))
    (tmp_path / "towers").mkdir()
    for k, rgb in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200)]):
        Image.new("RGB", (20, 16), rgb).save(tmp_path / "towers" / f"{k}.png")
    return f"folder:{tmp_path / 'towers'}"


@pytest.mark.parametrize("prior", ["generated", "folder", "captions"])
def test_stable_diffusion_learns_a_thing_through_the_one_loop(parts, towers, tmp_path, monkeypatch, prior):
    """K/V and the word move, nothing else; the run resumes; the concept draws with the file that it was taught."""
    path, out, seen = tmp_path / "v1-5-shrunk.safetensors", tmp_path / "out", []
    write_safetensors(path, compvis(parts))
    mix = tasks.mix
    monkeypatch.setattr(tasks, "mix", lambda *given: seen.append(given) or mix(*given))
    flags = ["--init", str(path), "--concept", towers, "--category", "tower", "--image-size", "16", "--steps", "4",
             "--bpe", str(MERGES), "--save-every", "2", "--batch-size", "4", "--device", "cpu", "--lr", "1e-3"]
    if prior != "generated":
        flags += ["--prior", towers]
    if prior == "captions":
        near = ("photo of a tower", "photo of a tower", "lower lower lower lower lower newest newest widest")
        lines = [f'{{"file_name": "{k}.png", "text": "{text}"}}\n' for k, text in enumerate(near)]
        (tmp_path / "towers" / "metadata.jsonl").write_text("".join(lines))
    train.main([*flags, "--out", str(out)])
    things, (drawn, captions), count, factor, words, *_ = seen[0]
    assert count == 8 and factor == 2 and words == tasks.SIZE_WORDS
    assert len(things[0][0]) == 3 and (prior == "captions" or set(things[0][1]) == {"photo of a <new1> tower"})
    assert set(captions) == {"photo of a tower"}
    assert len(drawn) == {"generated": 200, "folder": 3, "captions": 2}[prior]      # of which two are near enough
    learned = torch.load(out / "concept.pt", weights_only=True)
    before = parts["model.diffusion_model."].state_dict()
    assert learned["concepts"] == ["<new1> tower"] and all(".attn2.to_" in name for name in learned["tensors"])
    assert all(not torch.equal(w, before[name]) for name, w in learned["tensors"].items())
    config = (out / "config.json").read_text()
    assert '"schedule": "scaled_linear"' in config and '"weight_decay": 0.01' in config
    if prior == "generated":
        first = torch.load(out / "ckpt.pt", weights_only=True)
        train.main(["--out", str(out), "--resume", "--steps", "6"])
        again = torch.load(out / "ckpt.pt", weights_only=True)
        assert again["step"] == 6 and not torch.equal(again["model"]["text.rows.0"], first["model"]["text.rows.0"])
    pictures = []
    monkeypatch.setattr(sample, "save_grid", lambda images, *a, **k: pictures.append(images))
    draw = ["--ckpt", str(path), "--bpe", str(MERGES), "--image-size", "16", "--steps", "3", "--device", "cpu",
            "--out", str(tmp_path / "x.png"), "--prompt"]
    sample.main([*draw, "photo of a <new1> tower", "--concept-weights", str(out / "concept.pt")])
    sample.main([*draw, "photo of a tower"])
    assert pictures[0].shape == (1, 3, 16, 16) and not torch.equal(*pictures)


def test_stable_diffusion_takes_an_adapter_through_the_one_loop(parts, towers, tmp_path, capsys):
    path, out = tmp_path / "v1-5-shrunk.ckpt", tmp_path / "out"
    torch.save({"state_dict": compvis(parts)}, path)
    flags = ["--init", str(path), "--adapter", "ca_out-ffn_in", "--rank", "4", "--data", towers, "--image-size", "16",
             "--bpe", str(MERGES), "--steps", "2", "--batch-size", "2", "--device", "cpu", "--out", str(out)]
    with pytest.raises(SystemExit):
        train.main(flags)
    assert "has none: give --data a folder with metadata.jsonl" in capsys.readouterr().err
    lines = [f'{{"file_name": "{k}.png", "text": "a low tower"}}\n' for k in range(3)]
    (tmp_path / "towers" / "metadata.jsonl").write_text("".join(lines))
    train.main(flags)
    task, model = sample.load(str(out / "adapter.pt"), o=sample.Options(base=str(path), bpe=str(MERGES), image_size=16))
    adapters = {name: p for name, p in model.named_parameters() if "adapter" in name}
    assert task.shape == (4, 8, 8) and adapters and any("up" in name and p.any() for name, p in adapters.items())


def test_the_merges_file_is_asked_for(parts, tmp_path, capsys):
    write_safetensors(tmp_path / "all.safetensors", compvis(parts))
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(tmp_path / "all.safetensors"), "--bpe", str(tmp_path / "none.gz"),
                     "--out", str(tmp_path / "x.png")])
    assert stopped.value.code == 2 and "bpe_simple_vocab_16e6" in capsys.readouterr().err
