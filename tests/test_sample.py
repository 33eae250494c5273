"""sample.py end to end: what is drawn depends on the seed alone; known pixels stay; official files open."""
import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
import train
from conftest import fill_by_recipe
from diffusion import GaussianDiffusion
from dit import DiT, infer_config
from test_train import pictures  # noqa: F401  (the fixture)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pictures):  # noqa: F811
    """Checkpoints of tiny runs: latent flow, pixel Gaussian with learned sigma, unconditional; and the autoencoder."""
    root = tmp_path_factory.mktemp("runs")
    common = ["--data", f"folder:{pictures}", "--image-size", "8", "--batch-size", "8", "--sample-every", "0"]
    go = lambda name, *flags: train.main([*common, "--out", str(root / name), *flags])
    go("ae", "--model", "tiny-ae", "--factor", "2", "--latent-channels", "4", "--steps", "5")
    go("latent", "--model", "DiT-32x1/2", "--first-stage", str(root / "ae" / "ckpt.pt"), "--steps", "5")
    go("pixel", "--model", "DiT-32x1/2", "--recipe", "paper", "--lr", "1e-3", "--steps", "5")
    flat = root / "flat"
    flat.mkdir()
    for i, file in enumerate(pictures.rglob("*.png")):
        (flat / f"{i}.png").write_bytes(file.read_bytes())
    train.main([*common[2:], "--data", f"folder:{flat}", "--model", "DiT-32x1/2", "--out", str(root / "unconditional"),
                "--steps", "5"])
    return root


def draw(runs, name, *flags):
    out = runs / name / "drawn.png"
    sample.main(["--ckpt", str(runs / name / "ckpt.pt"), "--out", str(out), "--steps", "4", *flags])
    return out


@pytest.mark.parametrize("name", ["latent", "pixel", "unconditional"])
def test_the_same_seed_draws_the_same_bytes_in_any_batch(runs, name):
    a = draw(runs, name, "--n", "5", "--seed", "3").read_bytes()
    b = draw(runs, name, "--n", "5", "--seed", "3", "--batch-size", "2").read_bytes()
    c = draw(runs, name, "--n", "5", "--seed", "4").read_bytes()
    assert a == b != c


def test_grid_strip_film_and_names(runs):
    out = draw(runs, "pixel", "--class", "pear,0", "--n", "3", "--strip", "--gif")
    with Image.open(out.with_suffix(".gif")) as film, Image.open(out.with_name("drawn-strip.png")) as strip:
        assert film.n_frames >= 4 and strip.width > 3 * strip.height
    assert out.exists()


def test_interpolation_ends_are_noise_and_rows_move_smoothly(runs):
    noise = sample.interpolated_noise(16, (4, 4, 4), 0, "cpu")
    ends = [torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    for got, want in zip((noise[0], noise[7], noise[8], noise[15]), ends):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    norms = noise.flatten(1).norm(dim=1)
    assert norms.min() > 0.8 * norms.max()                               # on the circle, not across it
    assert draw(runs, "latent", "--interpolate").exists()


def test_npz_is_what_the_adm_evaluator_reads(runs):
    out = draw(runs, "pixel", "--npz", "11", "--batch-size", "4")
    with np.load(out.with_suffix(".npz")) as arrays:
        assert arrays["arr_0"].shape == (11, 8, 8, 3) and arrays["arr_0"].dtype == np.uint8
        assert arrays["labels"].tolist() == [i % 2 for i in range(11)]
    images, _, captions = sample.draw(runs / "pixel" / "ckpt.pt", n=11, steps=4, device="cpu")
    assert images.shape == (11, 3, 8, 8) and captions is None
    with np.load(out.with_suffix(".npz")) as arrays:
        assert np.array_equal(arrays["arr_0"], images.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("name", ["latent", "pixel"])
def test_inpainting_returns_known_pixels_untouched(runs, tmp_path, name):
    gen = torch.Generator().manual_seed(0)
    picture = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8, generator=gen)
    mask = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    mask[..., 2:6, 3:7] = 255
    data.save_grid(picture, tmp_path / "init.png", nrow=1, pad=0, scale=1)
    data.save_grid(mask, tmp_path / "mask.png", nrow=1, pad=0, scale=1)
    drawn = []
    grab = lambda images, path, **k: drawn.append(images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "save_grid", grab)
        draw(runs, name, "--n", "3", "--init", str(tmp_path / "init.png"), "--mask", str(tmp_path / "mask.png"))
        draw(runs, name, "--n", "3", "--init", str(tmp_path / "init.png"), "--strength", "0.3")
    painted = mask.bool().expand(3, 3, 8, 8)
    assert torch.equal(drawn[0][~painted], picture.expand(3, 3, 8, 8)[~painted])
    assert not torch.equal(drawn[0][painted], picture.expand(3, 3, 8, 8)[painted])
    assert not torch.equal(drawn[1][0], drawn[1][1])                     # every picture has its own noise


def test_guidance_one_is_the_conditional_run(runs):
    task, model = sample.load(runs / "pixel" / "ckpt.pt")
    fill_by_recipe(model, ["pos_embed"])
    y = torch.tensor([0, 1, 1])
    shown = []

    def model_once(x, t, cond):
        shown.append(len(x))
        return model(x, t, cond)
    for scale, label, forwards in ((1.0, y, 3), (0.0, torch.full_like(y, 2), 3), (3.0, None, 6)):
        shown.clear()
        gen = torch.Generator().manual_seed(0)
        got = task.sample(model_once, y, cfg_scale=scale, steps=3, generator=gen, sampler="ddim", clip=False)
        assert set(shown) == {forwards}
        if label is not None:
            gen = torch.Generator().manual_seed(0)
            want = task.process.sample(model, got.shape, label, sampler="ddim", steps=3, generator=gen)
            torch.testing.assert_close(got, want)


def test_an_official_file_is_built_from_its_tensors_alone(tmp_path, capsys):
    """A bare state_dict with official names and an official width; its latents are those of parts tested elsewhere."""
    sizes = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=384, depth=2, num_heads=6, num_classes=20)
    official = fill_by_recipe(DiT(**sizes), ["pos_embed"])
    path = tmp_path / "DiT-S-2-shrunk.pt"
    torch.save(official.state_dict(), path)
    assert infer_config(official.state_dict()) == dict(**sizes, learn_sigma=True)
    sample.main(["--ckpt", str(path), "--class", "7,3", "--steps", "5", "--seed", "9", "--cfg-scale", "4",
                 "--cfg-channels", "3", "--out", str(tmp_path / "x.png")])
    latents = torch.load(tmp_path / "x.pt", weights_only=True)["latents"]
    process, y, null = GaussianDiffusion(learn_sigma=True).respaced(5), torch.tensor([7, 3]), torch.tensor([20, 20])
    gens = [torch.Generator().manual_seed(s) for s in (9, 10)]
    noise = lambda: torch.stack([torch.randn(4, 8, 8, generator=g) for g in gens])
    x = noise()
    with torch.no_grad():
        for i in reversed(range(5)):
            t = process.timestep_map[torch.tensor([i, i])]
            c, u = official(x, t, y), official(x, t, null)
            out = torch.cat([u[:, :3] + 4 * (c[:, :3] - u[:, :3]), c[:, 3:]], 1)
            x = process.ddpm_step(out, x, torch.tensor([i, i]), noise())[0]
    torch.testing.assert_close(latents.float(), x, rtol=1e-4, atol=1e-4)
    assert "latents" in capsys.readouterr().out


@pytest.mark.parametrize("flags,words", [
    (["--class", "2"], "classes 0 to 1"), (["--class", "-1"], "classes 0 to 1"),
    (["--class", "aple"], "did you mean 'apple'"), (["--sampler", "plms"], "choose one of euler, heun"),
    (["--init", "nowhere.png"], "no picture at"), (["--mask", "m.png"], "--init"),
    (["--cfg-scal", "2"], "did you mean --cfg-scale"), (["--eta", "0.5"], "deterministic")])
def test_wrong_wishes_are_one_line(runs, capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        draw(runs, "latent", *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and words in lines[-1] and "Traceback" not in "".join(lines)


def test_an_autoencoder_does_not_draw(runs, capsys):
    with pytest.raises(SystemExit):
        draw(runs, "ae")
    assert "does not draw" in capsys.readouterr().err


def test_exported_checkpoints_are_small_and_draw_nearly_the_same(runs, tmp_path, capsys):
    whole, small = runs / "latent" / "ckpt.pt", tmp_path / "small.pt"
    sample.main(["--ckpt", str(whole), "--export", str(small), "--note", "five steps"])
    assert small.stat().st_size < 0.5 * whole.stat().st_size
    assert torch.load(small, weights_only=True)["note"] == "five steps"
    a, b = (sample.draw(path, n=4, steps=3, device="cpu")[0].int() for path in (whole, small))
    assert (a - b).abs().max() <= 2                                      # half precision, in grey levels
    train.main(["--data", f"folder:{runs / 'flat'}", "--image-size", "8", "--model", "DiT-32x1/2", "--steps", "1",
                "--batch-size", "4", "--init", str(runs / "unconditional" / "ckpt.pt"),
                "--out", str(tmp_path / "more")])
    with pytest.raises(SystemExit):
        sample.main(["--ckpt", str(small), "--weights", "model"])
    assert "--weights" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", str(tmp_path / "nothing")])
