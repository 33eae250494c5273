"""Official files from end to end: shrunk, but of full structure. The pictures equal an independent
composition of parts that are tested elsewhere."""
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

import adapters
import custom_diffusion
import data
import sample
from checkpoint import load_checkpoint, save_checkpoint
from conftest import by_recipe, fill_by_recipe, golden_case, write_safetensors
from diffusion import GaussianDiffusion, respaced_steps
from dit import DiT
from pretrained import infer_dit
from tasks import DiffusionTask
from text import CLIPTokenizer, TextEncoder
from udit import RepMlp, UDiT
from unet import UNet
from vae import AutoencoderKL

MERGES = pathlib.Path(__file__).parent / "tiny_merges.txt"
PROMPT, NEGATIVE = "a low wide tower", "the newest lowest"


@pytest.fixture(scope="module")
def parts():
    """U-Net, autoencoder (factor 2) and text encoder of Stable Diffusion's structure."""
    unet = fill_by_recipe(UNet(4, 4, 32, (1, 2), 1, (1, 2), num_heads=8, context_dim=64))
    vae = fill_by_recipe(AutoencoderKL(32, (1, 2), 1))
    text = fill_by_recipe(TextEncoder(CLIPTokenizer(MERGES).vocab_size, 77, hidden_size=64,
                                      depth=2, num_heads=1))
    return {"model.diffusion_model.": unet.eval(), "first_stage_model.": vae.eval(),
            "cond_stage_model.transformer.": text.eval()}


def compvis(parts):
    state = {prefix + k: v for prefix, part in parts.items() for k, v in part.state_dict().items()}
    return state | {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(()),
                    "first_stage_model.loss.logvar": torch.zeros(())}


@pytest.fixture
def grids(monkeypatch):
    """What sample.py writes: a list of (pictures, captions)."""
    seen = []
    monkeypatch.setattr(sample, "save_grid", lambda images, path, captions=None, **k: seen.append(
        (images, captions)))
    return seen


def ddim(model, cond, null, scale, seeds, shape):
    """Four steps of DDIM on Stable Diffusion's schedule, written out."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    kept = [0, 333, 666, 999]
    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s))
                     for s in seeds])
    for i in reversed(range(4)):
        t = torch.full((len(x),), kept[i])
        eps_c, eps_u = model(x, t, cond), model(x, t, null)
        eps = eps_u + scale * (eps_c - eps_u)
        ab, ab_prev = alpha_bar[kept[i]].item(), alpha_bar[kept[i - 1]].item() if i else 1.0
        x0 = (x - (1 - ab) ** 0.5 * eps) / ab ** 0.5
        x = ab_prev ** 0.5 * x0 + (1 - ab_prev) ** 0.5 * eps
    return x


@pytest.mark.parametrize("kind,negative", [("safetensors", NEGATIVE), ("ckpt", "")])
@torch.no_grad()
def test_stable_diffusion_from_one_file(parts, tmp_path, grids, kind, negative):
    path = tmp_path / f"v1-5-shrunk.{kind}"
    if kind == "safetensors":
        write_safetensors(path, compvis(parts))
    else:
        torch.save({"state_dict": compvis(parts)}, path)
    flags = ["--negative", negative] if negative else []
    sample.main(["--ckpt", str(path), "--prompt", PROMPT, "--n", "1", "--steps", "4", "--seed", "5",
                 "--cfg-scale", "3", "--image-size", "64", "--bpe", str(MERGES), "--device", "cpu",
                 "--out", str(tmp_path / "x.png"), *flags])
    unet, vae, text = parts.values()
    tokens = CLIPTokenizer(MERGES)
    cond, null = text(tokens([PROMPT])), text(tokens([negative]))
    want = data.to_uint8(vae.decode(ddim(unet, cond, null, 3.0, (5,), (4, 32, 32))))
    images, captions = grids[0]
    assert captions == [PROMPT] and images.shape == (1, 3, 64, 64)
    assert (images.int() - want.int()).abs().max() <= 1 and images.float().std() > 10


def test_stable_diffusion_as_a_folder(parts, tmp_path):
    """In diffusers 0.42, whose StableDiffusionPipeline loads such a folder as it is, eight guided
    steps differ by 8e-7 of the norm. Here it is read again, with its own list of merges."""
    path, out, t = tmp_path / "v1-5.safetensors", tmp_path / "folder", torch.tensor([3, 900])
    write_safetensors(path, compvis(parts))
    sample.main(["--ckpt", str(path), "--bpe", str(MERGES), "--export", str(out), "--diffusers"])
    loaded = [sample.load(str(ckpt), options=sample.Options(bpe=str(bpe))) for ckpt, bpe in (
        (path, MERGES), (out, out / "tokenizer/merges.txt"))]
    x, y = torch.randn(2, 4, 32, 32), [task.tokenizer([PROMPT, NEGATIVE]) for task, _ in loaded]
    assert torch.equal(*y) and torch.equal(*(model(x, t, y[0]) for _, model in loaded))
    assert torch.equal(*(task.first_stage.decode(x[:1]) for task, _ in loaded))
    assert [task.settings.schedule for task, _ in loaded] == ["scaled_linear"] * 2
    assert loaded[1][0].process.spacing == ("trailing", 1, True)


def shrunk_dit(**sizes):
    return fill_by_recipe(DiT(**{**dict(input_size=8, patch_size=2, in_channels=4, hidden_size=384,
                                        depth=1, num_heads=6, num_classes=12, learn_sigma=True),
                                 **sizes}), ["pos_embed"]).eval()


def chain(model, y, null, seeds, scale, channels, sampler, steps, shape):
    """Guidance by hand, and the step of a sampler, which test_diffusion.py tests."""
    process = GaussianDiffusion(learn_sigma=True).respaced(respaced_steps(1000, steps))
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    noise = lambda: torch.stack([torch.randn(shape, generator=g) for g in generators])
    x, y, null = noise(), torch.tensor(y), torch.full((len(y),), null)
    for i in reversed(range(steps)):
        t, at = process.timestep_map[torch.tensor([i] * len(y))], torch.tensor([i] * len(y))
        c, u = model(x, t, y), model(x, t, null)
        k = channels or 4
        out = torch.cat([u[:, :k] + scale * (c[:, :k] - u[:, :k]), c[:, k:]], 1)
        x = (process.ddpm_step(out, x, at, noise()) if sampler == "ddpm" else
             process.ddim_step(out, x, at))[0]
    return x


def assert_near(got, want):
    """Equal to 1e-4 of the largest: the first step multiplies rounding errors by 157."""
    assert (torch.from_numpy(got).float() - want).abs().max() < 1e-4 * want.abs().max()


@torch.no_grad()
def test_dit_with_its_autoencoder(parts, tmp_path, grids):
    dit, vae = shrunk_dit(), parts["first_stage_model."]
    torch.save(dit.state_dict(), tmp_path / "DiT-shrunk.pt")
    write_safetensors(tmp_path / "vae.safetensors", vae.state_dict())
    sample.main(["--ckpt", str(tmp_path / "DiT-shrunk.pt"), "--class", "7", "--steps", "4",
                 "--vae", str(tmp_path / "vae.safetensors"), "--sampler", "ddim", "--seed", "3",
                 "--device", "cpu", "--out", str(tmp_path / "x.png")])
    x = chain(dit, [7], 12, [3], 4.0, None, "ddim", 4, (4, 8, 8))       # guidance of their demo
    images = grids[0][0]
    assert images.shape == (1, 3, 16, 16) and images.float().std() > 10
    assert (images.int() - data.to_uint8(vae.decode(x)).int()).abs().max() <= 1


def test_an_autoencoder_of_ours_keeps_its_scale(parts, tmp_path):
    """Also in a checkpoint of train.py, where it was measured, not published."""
    vae = parts["first_stage_model."]
    vae = AutoencoderKL(**{**vae.sizes, "scale": 3.7})
    save_checkpoint(tmp_path / "ae.pt", {"task": "kl-ae", "sizes": vae.sizes,
                                         "ema": vae.state_dict(), "config": {}, "info": {}})
    torch.save(shrunk_dit().state_dict(), tmp_path / "DiT-shrunk.pt")
    options = sample.Options(vae=str(tmp_path / "ae.pt"))
    task = sample.load(str(tmp_path / "DiT-shrunk.pt"), "cpu", options)[0]
    assert task.first_stage.scale == 3.7


@torch.no_grad()
def test_dit_alone_gives_latents_and_guides_three_channels_if_asked(tmp_path, capsys):
    dit = shrunk_dit(depth=2, num_classes=20)
    path = tmp_path / "DiT-S-2-shrunk.pt"
    torch.save(dit.state_dict(), path)
    assert infer_dit(dit.state_dict())["num_heads"] == 6        # of the paper's table, by width
    sample.main(["--ckpt", str(path), "--class", "7,3", "--steps", "5", "--seed", "9",
                 "--cfg-scale", "4", "--cfg-channels", "3", "--device", "cpu",
                 "--out", str(tmp_path / "x.png")])
    x = chain(dit, [7, 3], 20, [9, 10], 4.0, 3, "ddpm", 5, (4, 8, 8))
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["labels"].tolist() == [7, 3]
        assert_near(arrays["latents"], x)
    assert "the latents themselves" in capsys.readouterr().out
    for flags, words in ((["--npz", "2"], "--npz needs an autoencoder: add --vae"),
                         (["--init", "x.png"], "--init needs an autoencoder: add --vae"),
                         (["--dtype", "bfloat16"], "--dtype is not for")):      # which is its own
        with pytest.raises(SystemExit):
            sample.main(["--ckpt", str(path), *flags, "--device", "cpu",
                         "--out", str(tmp_path / "y.png")])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@torch.no_grad()
def test_udit_is_folded_and_guided_as_published(kind, tmp_path):
    model = fill_by_recipe(UDiT(hidden_size=16, depth=(1, 1, 1, 1, 1), num_heads=2,
                                num_classes=12)).eval()
    path = tmp_path / f"U-DiT-shrunk.{kind}"
    if kind == "pt":                                # as the official training saves it
        torch.save({"model": {}, "ema": model.state_dict()}, path)
    else:
        write_safetensors(path, model.state_dict())
    sample.main(["--ckpt", str(path), "--class", "7", "--sampler", "ddim", "--steps", "3", "--seed",
                 "3", "--device", "cpu", "--out", str(tmp_path / "x.png")])
    x = chain(model, [7], 12, [3], 1.5, None, "ddim", 3, (4, 32, 32))
    with np.load(tmp_path / "x.npz") as arrays:
        assert_near(arrays["latents"], x)
    task, loaded = sample.load(path)
    assert task.shape == (4, 32, 32)
    assert not any(isinstance(m, RepMlp) for m in loaded.modules())


# --------------------------------------------------------------------------------------------------
# Stable Diffusion learns

@pytest.fixture
def towers(tmp_path, monkeypatch):
    """Three captioned pictures of a thing; rare tokens that the tiny list of merges has."""
    monkeypatch.setattr(custom_diffusion, "RARE", ("n", "lo", "ne"))
    monkeypatch.setattr(DiffusionTask, "preview", lambda *given: None)
    folder = tmp_path / "towers"
    folder.mkdir()
    for k, rgb in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200)]):
        Image.new("RGB", (20, 16), rgb).save(folder / f"{k}.png")
    lines = [f'{{"file_name": "{k}.png", "text": "photo of a tower"}}\n' for k in range(3)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    return f"folder:{folder}"


def test_stable_diffusion_learns_a_concept(parts, towers, tmp_path, capsys):
    path, out = tmp_path / "v1-5-shrunk.safetensors", tmp_path / "out"
    write_safetensors(path, compvis(parts))
    custom_diffusion.main([
        "learn", "--base", str(path), "--concept", towers, "--category", "tower", "--prior", towers,
        "--image-size", "16", "--steps", "2", "--bpe", str(MERGES), "--batch-size", "4", "--device",
        "cpu", "--lr", "1e-3", "--out", str(out)])
    learned = torch.load(out / "concept.pt", weights_only=True)
    before = parts["model.diffusion_model."].state_dict()
    assert learned["concepts"] == ["<new1> tower"] and len(learned["tensors"]) == 2 * 7
    assert all(".attn2.to_" in name for name in learned["tensors"])
    assert all(not torch.equal(w, before[name]) for name, w in learned["tensors"].items())
    config = load_checkpoint(out / "ckpt.pt")["config"]
    assert config["weight_decay"] == 0.01 and config["lr_decay"] == "constant"
    sample.main(["--ckpt", str(path), "--bpe", str(MERGES), "--image-size", "64", "--steps", "1",
                 "--device", "cpu", "--out", str(tmp_path / "x.png"), "--prompt",
                 "photo of a <new1> tower", "--concept", str(out / "concept.pt")])
    assert "new words: <new1> tower" in capsys.readouterr().out and (tmp_path / "x.png").is_file()


def test_stable_diffusion_takes_an_adapter(parts, towers, tmp_path):
    path, out = tmp_path / "v1-5-shrunk.ckpt", tmp_path / "out"
    torch.save({"state_dict": compvis(parts)}, path)
    adapters.main(["learn", "--base", str(path), "--data", towers, "--image-size", "16", "--rank",
                   "4", "--bpe", str(MERGES), "--steps", "2", "--batch-size", "2", "--device",
                   "cpu", "--out", str(out)])
    task, model = sample.load(str(out / "adapter.pt"), options=sample.Options(
        base=str(path), bpe=str(MERGES), image_size=16))
    up = [p for name, p in model.named_parameters() if ".adapter.up.weight" in name]
    assert task.shape == (4, 8, 8) and len(up) == 7 and all(p.any() for p in up)
    assert load_checkpoint(out / "ckpt.pt")["config"]["lr"] == 1e-4     # the paper's


# --------------------------------------------------------------------------------------------------
# what is refused

@pytest.mark.parametrize("drop,words", [
    ("first_stage_model.", "no vae"), ("cond_stage_model.transformer.", "no text"),
    ("model.diffusion_model.", "no unet")])
def test_a_file_without_a_part_says_which(parts, tmp_path, capsys, drop, words):
    path = tmp_path / "part.safetensors"
    write_safetensors(path, compvis({k: v for k, v in parts.items() if k != drop}))
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(path), "--prompt", "x", "--bpe", str(MERGES), "--out",
                     str(tmp_path / "x.png")])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and words in err and len(err.strip().splitlines()) == 1


def test_the_list_of_merges_is_asked_for(parts, tmp_path, capsys):
    write_safetensors(tmp_path / "all.safetensors", compvis(parts))
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(tmp_path / "all.safetensors"), "--bpe",
                     str(tmp_path / "none.gz"), "--out", str(tmp_path / "x.png")])
    assert stopped.value.code == 2 and "bpe_simple_vocab_16e6" in capsys.readouterr().err


def test_a_picture_for_a_model_of_bare_latents_is_refused(tmp_path, capsys):
    torch.save(shrunk_dit().state_dict(), tmp_path / "DiT.pt")
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(tmp_path / "DiT.pt"), "--init", str(tmp_path / "p.png"),
                     "--out", str(tmp_path / "x.png")])
    assert stopped.value.code == 2 and "--vae" in capsys.readouterr().err


def test_a_list_of_merges_that_is_too_short_is_refused(parts, tmp_path, capsys):
    """Its ids would be those of other words."""
    write_safetensors(tmp_path / "all.safetensors", compvis(parts))
    (tmp_path / "short.txt").write_text("".join(MERGES.read_text().splitlines(True)[:-1]))
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(tmp_path / "all.safetensors"), "--prompt", "x", "--bpe",
                     str(tmp_path / "short.txt"), "--out", str(tmp_path / "x.png")])
    err = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "561 tokens" in err and len(err.splitlines()) == 1


def test_a_vae_file_without_an_autoencoder_is_refused(parts, tmp_path, capsys):
    torch.save(shrunk_dit().state_dict(), tmp_path / "DiT.pt")
    write_safetensors(tmp_path / "u.safetensors", compvis({
        k: v for k, v in parts.items() if k == "model.diffusion_model."}))
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(tmp_path / "DiT.pt"), "--vae", str(tmp_path / "u.safetensors"),
                     "--out", str(tmp_path / "x.png")])
    err = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "AutoencoderKL" in err and len(err.splitlines()) == 1


# ---- VQ-Diffusion: checkpoints as its solver saves them, and what its own code computes from them
VQ_KINDS = {"coco": 11, "ithq": 12, "imagenet": 13, "ffhq": 14}         # and how many tokens


def vq_file(kind, folder, without=""):
    """The golden case's file, and beside it the list of codes if there is one -> (path, case)."""
    said, a = golden_case(f"vqd_file_{kind}")

    def state(part, before, where):
        return {name: (torch.zeros(shape) if before + name in said["computed"] else by_recipe(
                    where + (before + name).replace("enc.quantize", "dec.quantize"), shape)
                ).to(getattr(torch, dtype)) for name, (shape, dtype) in said[part].items()
                if not (without and name.startswith(without))}
    averaged = {} if without else {"ema": state("ema", "transformer.", "ema.")}
    torch.save({"last_epoch": 3, "last_iter": 7, "model": state("model", "", ""), **averaged,
                "optimizer_and_scheduler": {"none": {"optimizer": {"module": {"state": {}}}}}},
               folder / f"{kind}.pth")
    if "codes" in a:
        torch.save(a["codes"], folder / f"taming_vqvae_{VQ_KINDS[kind]}.pt")
    return folder / f"{kind}.pth", a


@torch.no_grad()
@pytest.mark.parametrize("kind", VQ_KINDS)
def test_published_vq_diffusion_computes_what_its_own_code_does(kind, tmp_path):
    path, a = vq_file(kind, tmp_path)
    options = sample.Options(bpe=str(MERGES)) if "in_ids" in a else None
    task, model = sample.load(str(path), "cpu", options)
    near = {"rtol": 0, "atol": 1e-5}
    cond = a.get("in_y", torch.zeros(2).long())
    if "in_ids" in a:
        cond = model.text(a["in_ids"])
        learned = {"ithq": by_recipe("ema.transformer.empty_text_embed", (77, 64))}
        torch.testing.assert_close(cond[0, ::11], a["out_states"][0], **near)
        torch.testing.assert_close(cond[1], learned.get(kind, cond[1]), **near)     # no caption
        torch.testing.assert_close(cond[1, ::11], learned[kind][::11] if kind in learned else
                                   a["out_states"][1], **near)
        ids = task.tokenizer(["a cat", ""])
        assert ids[1].tolist() == [560, 561] + [0] * 75
        assert ids[0, :6].min() > 0 and ids[0, 6:].max() == 0
    logits = model(a["in_x"], a["in_t"], cond)[:, ::37]                         # (2, n, K)
    torch.testing.assert_close(logits, a["out_logits"], rtol=0, atol=2e-5)
    decoded = 127.5 * (task.first_stage.decode(a["in_tokens"]).clamp(-1, 1) + 1)
    torch.testing.assert_close(decoded[..., 5::17, 3::17], a["out_decoded"], rtol=0, atol=0.02)
    picture = a["in_picture"].repeat_interleave(16, 2).repeat_interleave(16, 3) / 127.5 - 1
    tokens = task.first_stage.encode(picture)
    assert tokens.dtype == torch.int64 and (tokens != a["out_encoded"]).float().mean() < 0.005
    assert task.process.gamma_bar[99].item() == pytest.approx(0.99999)
    assert model.can_guide == (kind != "ffhq")
    assert getattr(model, "num_classes", 0) == (1000 if kind == "imagenet" else 0)


def test_published_vq_diffusion_draws_and_refuses(tmp_path, grids, capsys):
    path, _ = vq_file("coco", tmp_path)
    run = lambda *more: sample.main(["--ckpt", str(path), "--bpe", str(MERGES), "--steps", "1",
                                     "--out", str(tmp_path / "x.png"), *more])
    run("--prompt", "a low tower", "--cfg-scale", "3", "--truncation", "0.86")
    (images, captions), = grids
    assert images.shape == (1, 3, 256, 256) and captions == ["a low tower"]
    for flags, words in ((["--image-size", "128"], "--image-size is not for"),
                         (["--vae", str(path)], "--vae is not for")):
        with pytest.raises(SystemExit):
            run(*flags)
        assert words in capsys.readouterr().err
    (tmp_path / "taming_vqvae_11.pt").unlink()
    with pytest.raises(SystemExit):
        run()
    said = capsys.readouterr().err
    assert f"uses 11 of 20 codes: fetch the file {tmp_path / 'taming_vqvae_11.pt'} from" in said
    path, _ = vq_file("coco", tmp_path, without="content_codec.")
    with pytest.raises(SystemExit):
        run()
    assert "is VQ-Diffusion, with no vqgan: give the full file" in capsys.readouterr().err
