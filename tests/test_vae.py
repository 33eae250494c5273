"""vae.py: the tiny autoencoder learns and standardises; AutoencoderKL is the official one."""
import pytest
import torch
from torch.testing import assert_close

import data
import evaluate
from conftest import fill_by_recipe, golden_case
from vae import AutoencoderKL, TinyAutoencoder


def test_tiny_autoencoder_shapes_and_standardised_latents():
    torch.manual_seed(0)
    vae, x = TinyAutoencoder(3, latent_channels=5, factor=4), torch.rand(20, 3, 32, 16) * 2 - 1
    assert vae.encode(x).shape == (20, 5, 8, 4) and vae.decode(vae.encode(x)).shape == x.shape
    before = vae.decode(vae.encode(x))
    vae.standardise(x)
    z = vae.encode(x)
    assert_close(z.mean((0, 2, 3)), torch.zeros(5), atol=1e-4, rtol=0)
    assert_close(z.std((0, 2, 3)), torch.ones(5), atol=1e-4, rtol=0)
    assert_close(vae.decode(z), before, atol=1e-4, rtol=1e-4)           # a change of units, not of pictures
    again = TinyAutoencoder(3, latent_channels=5, factor=4)
    again.load_state_dict(vae.state_dict())
    assert torch.equal(again.encode(x), z)                              # the units travel with the weights
    with pytest.raises(ValueError, match="30x32 is not divisible by the autoencoder's factor 4"):
        vae.encode(torch.zeros(1, 3, 30, 32))


def test_training_pass_adds_the_stated_noise():
    torch.manual_seed(0)
    vae, x, noise = TinyAutoencoder(), torch.rand(6, 3, 16, 16), torch.randn(6, 8, 4, 4)
    recon, z = vae(x, noise, noise_level=0.5)
    assert_close(z, vae.encoder(x))
    assert_close(recon, vae.decoder(z + 0.5 * z.std() * noise))


@pytest.mark.slow
def test_tiny_autoencoder_learns_readable_shapes():
    """A fifth of the default first stage: the exact reader reads what comes out."""
    torch.manual_seed(0)
    train, test = data.load("shapes", count=6400), data.load("shapes", split="test", count=200)
    vae = TinyAutoencoder(3, 4, 4)
    opt = torch.optim.AdamW(vae.parameters(), lr=4e-3)
    for step in range(100):
        x = data.to_float(train.images[step * 64:(step + 1) * 64])
        recon, _ = vae(x, torch.randn(64, 4, 8, 8), 0.1)
        loss = (recon - x).square().mean()
        opt.zero_grad(), loss.backward(), opt.step()
    with torch.no_grad():
        x = data.to_float(test.images)
        recon = vae.decode(vae.encode(x))
    psnr = 10 * torch.log10(4 / (recon - x).square().mean())
    assert psnr > 19, psnr
    assert evaluate.class_accuracy(data.to_uint8(recon), test.labels)["color"] > 0.9


def test_kl_decoder_matches_official():
    d, g = golden_case("unet_vae_decoder")
    c = d["config"]
    vae = fill_by_recipe(AutoencoderKL(c["ch"], tuple(c["ch_mult"]), c["num_res_blocks"]))
    names = [k for k in vae.state_dict() if k.startswith(("decoder.", "post_quant_conv."))]
    assert [[k, list(vae.state_dict()[k].shape)] for k in names] == d["params"]
    stages = {}
    vae.post_quant_conv.register_forward_hook(lambda m, i, o: stages.update(post_quant=o))
    vae.decoder.mid["block_2"].register_forward_hook(lambda m, i, o: stages.update(mid=o))
    with torch.no_grad():
        stages["out"] = vae.decode(g["in_z"])
    for k, v in stages.items():
        assert_close(v, g[f"out_{k}"], rtol=1e-4, atol=1e-4)


def test_kl_sizes():
    with torch.device("meta"):
        vae = AutoencoderKL()
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert (count(vae), count(vae.encoder), count(vae.decoder)) == (83_653_863, 34_163_592, 49_490_179)


def test_kl_encoder_samples_and_pads_like_the_official_one():
    torch.manual_seed(0)
    vae = fill_by_recipe(AutoencoderKL(32, (1, 2), 1))
    x = torch.randn(2, 3, 8, 8)
    mean, logvar = vae.moments(x)
    assert mean.shape == logvar.shape == (2, 4, 4, 4) and logvar.max() <= 20 and logvar.min() >= -30
    assert_close(vae.encode(x), 0.18215 * mean)                         # without a generator: the mean
    draw = vae.encode(x, torch.Generator().manual_seed(1))
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    assert_close(draw, 0.18215 * (mean + (0.5 * logvar).exp() * eps))
    # halving pads right and bottom only: output (0, 0) sees input rows 0..2
    conv = vae.encoder.down[0].downsample
    impulse = torch.zeros(1, 32, 6, 6)
    impulse[..., 0, 0] = 1
    response = conv(impulse) - conv(torch.zeros_like(impulse))
    assert response[..., 0, 0].abs().max() > 0 and response[..., 1:, :].abs().max() == 0
    assert_close(response[0, :, 0, 0], conv.conv.weight[:, :, 0, 0].sum(1))
    with pytest.raises(ValueError, match="factor 2"):
        vae.encode(torch.zeros(1, 3, 7, 8))
