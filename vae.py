"""The first stage of latent diffusion: pictures to small latents and back, trained once and then frozen.

Paper: High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al. 2022), §3.1.

The idea.  A diffusion model spends its effort where it is told to look. Most bits of a picture are fine texture that a
small convolutional decoder can fill in; what is hard is the arrangement. So first train an autoencoder that shrinks
each side by f and keeps a few channels per cell, and run diffusion on its latents: f = 4 leaves 1/16 of the positions,
and a transformer with one token per cell sees the whole picture as 64 tokens instead of 1,024 pixels. On the shapes of
this repository that is the difference between blobs and pictures at an equal budget (README, results).

Contents: TinyAutoencoder, which trains in under a minute on a laptop; AutoencoderKL, into which the official weights of
Stable Diffusion's first stage load by name.

    python train.py --model tiny-ae --data shapes      # train one on its own; `python train.py` does so by itself

Differences from the paper: no perceptual or adversarial loss, no KL term (an L2 pull and latent noise instead, which
give the diffusion model a smooth and bounded space); patches are folded to channels rather than strided down. That is
enough for 32-pixel worlds, and too little for photographs at 256 pixels.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion import randn


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, C, H, W) -> same. Source: He et al. 2016, pre-activation."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class TinyAutoencoder(nn.Module):
    """Autoencoder (B, in_channels, H, W) in [-1, 1] <-> (B, latent_channels, H/factor, W/factor), about unit variance.

    factor: f of the paper, divides H and W; width: channels inside. Latents are standardised per channel by
    `standardise`, whose figures travel in the state_dict. Raises ValueError if the picture's sides are not divisible by
    factor. Source: LDM §3.1.
    """

    matrices = r"(en|de)coder\.\d+\.conv"       # Muon's share in train.py: the convolutions of the residual blocks

    def __init__(self, in_channels=3, latent_channels=8, factor=4, width=64):
        super().__init__()
        self.latent_channels, self.factor = latent_channels, factor
        cell = in_channels * factor * factor
        self.encoder = nn.Sequential(nn.PixelUnshuffle(factor), nn.Conv2d(cell, width, 1), ResBlock(width),
                                     nn.Conv2d(width, latent_channels, 1))
        self.decoder = nn.Sequential(nn.Conv2d(latent_channels, width, 3, padding=1), ResBlock(width), ResBlock(width),
                                     nn.Conv2d(width, cell, 1), nn.PixelShuffle(factor))
        self.register_buffer("mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("std", torch.ones(latent_channels, 1, 1))

    def encode(self, x, generator=None):
        """x (B, C, H, W) in [-1, 1] -> standardised latents (B, c, H/f, W/f); deterministic, so generator is not used.

        Source: LDM §3.1.
        """
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f"a picture of {x.shape[-2]}x{x.shape[-1]} is not divisible by the autoencoder's factor "
                             f"{self.factor}")
        return (self.encoder(x) - self.mean) / self.std                                     # (B, c, H/f, W/f)

    def decode(self, z):
        """Standardised latents (B, c, h, w) -> pictures (B, C, f*h, f*w), about [-1, 1]. Source: LDM §3.1."""
        return self.decoder(z * self.std + self.mean)                                       # (B, C, H, W)

    def forward(self, x, noise, noise_level=0.3):
        """Training pass: x (B, C, H, W) -> (reconstruction like x, latents (B, c, h, w) before standardising).

        noise: standard normal like the latents; noise_level: its share of their spread. A decoder used to such noise
        forgives the small errors that a diffusion model makes. Source: LDM §3.1, its KL regularisation simplified.
        """
        z = self.encoder(x)                                                                 # (B, c, h, w)
        return self.decoder(z + noise_level * z.detach().std() * noise), z

    @property
    def standardised(self):
        """Whether `standardise` has been called. Source: LDM §D (scale factor)."""
        return bool((self.std != 1).any())

    @torch.no_grad()
    def standardise(self, x):
        """Measure the latents of pictures x (B, C, H, W), so that encode gives zero mean and unit variance.

        Source: LDM §D (scale factor).
        """
        z = self.encoder(x)
        self.mean.copy_(z.mean((0, 2, 3))[:, None, None])                                   # (c, 1, 1)
        self.std.copy_(z.std((0, 2, 3))[:, None, None])


# ----------------------------------------------------------------------------------------------------------------------
# AutoencoderKL: the first stage of Stable Diffusion and of the published DiT, under its official names

class KLResnetBlock(nn.Module):
    """Twice GroupNorm, SiLU, conv; plus the input: (B, C_in, H, W) -> (B, C_out, H, W). Source: LDM, ResnetBlock."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class KLAttention(nn.Module):
    """One-head self-attention over all positions, (B, C, H, W) -> same. Source: LDM, AttnBlock."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).mT[:, None] for conv in (self.q, self.k, self.v))   # 3x (B, 1, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)  # (B, C, H, W)
        return x + self.proj_out(h)


class Resample(nn.Module):
    """Halve or double each side and convolve; halving pads right and bottom only. Source: LDM, Downsample/Upsample."""

    def __init__(self, channels, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1))
        return self.conv(x)  # (B, C, 2H, 2W) or (B, C, H/2, W/2)


def _mid(channels):
    return nn.ModuleDict({"block_1": KLResnetBlock(channels, channels), "attn_1": KLAttention(channels),
                          "block_2": KLResnetBlock(channels, channels)})


class KLEncoder(nn.Module):
    """Pictures (B, 3, H, W) -> (B, 2 * z_channels, H/f, W/f), f = 2^(levels - 1). Source: LDM, Encoder."""

    def __init__(self, channels=128, multipliers=(1, 2, 4, 4), res_blocks=2, in_channels=3, z_channels=4):
        super().__init__()
        widths = [channels * m for m in (1, *multipliers)]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(len(multipliers)):
            level = nn.Module()
            level.block = nn.ModuleList(KLResnetBlock(widths[i] if j == 0 else widths[i + 1], widths[i + 1])
                                        for j in range(res_blocks))
            if i < len(multipliers) - 1:
                level.downsample = Resample(widths[i + 1], up=False)
            self.down.append(level)
        self.mid = _mid(widths[-1])
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)  # (B, channels, H, W)
        for level in self.down:
            for block in level.block:
                h = block(h)
            h = level.downsample(h) if hasattr(level, "downsample") else h
        h = self.mid["block_2"](self.mid["attn_1"](self.mid["block_1"](h)))
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 2z, H/f, W/f)


class KLDecoder(nn.Module):
    """Latents (B, z_channels, h, w) -> pictures (B, 3, f*h, f*w). Source: LDM, Decoder.

    up.0 is the highest resolution and runs last.
    """

    def __init__(self, channels=128, multipliers=(1, 2, 4, 4), res_blocks=2, out_channels=3, z_channels=4):
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _mid(widths[-1])
        self.up, width = nn.ModuleList(), widths[-1]
        for i in reversed(range(len(widths))):
            level = nn.Module()
            level.block = nn.ModuleList(KLResnetBlock(width if j == 0 else widths[i], widths[i])
                                        for j in range(res_blocks + 1))
            if i > 0:
                level.upsample = Resample(widths[i], up=True)
            self.up.insert(0, level)
            width = widths[i]
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, z):
        h = self.conv_in(z)  # (B, C, h, w)
        h = self.mid["block_2"](self.mid["attn_1"](self.mid["block_1"](h)))
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            h = level.upsample(h) if hasattr(level, "upsample") else h
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 3, f*h, f*w)


class AutoencoderKL(nn.Module):
    """The autoencoder of Stable Diffusion: f = 8, four latent channels, 83,653,863 parameters at the default size.

    Arguments as in KLEncoder and KLDecoder; scale: latents are multiplied by it, so that they have about unit variance
    (0.18215 for the published weights). Raises ValueError for sides not divisible by f. Source: LDM §3.1, appendix G.
    """

    def __init__(self, channels=128, multipliers=(1, 2, 4, 4), res_blocks=2, in_channels=3, z_channels=4,
                 scale=0.18215):
        super().__init__()
        self.latent_channels, self.factor, self.scale = z_channels, 2 ** (len(multipliers) - 1), scale
        self.encoder = KLEncoder(channels, multipliers, res_blocks, in_channels, z_channels)
        self.decoder = KLDecoder(channels, multipliers, res_blocks, in_channels, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)

    matrices = r"(en|de)coder\.(down|mid|up)"       # Muon's share in train.py

    def forward(self, x, noise):
        """Training pass: x (B, C, H, W) -> (reconstruction like x, mean, log-variance, both (B, z, H/f, W/f)).

        noise: standard normal like the latents. Source: LDM §3.1.
        """
        mean, logvar = self.moments(x)
        z = mean + torch.exp(0.5 * logvar) * noise
        return self.decoder(self.post_quant_conv(z)), mean, logvar

    @property
    def standardised(self):
        """Whether the scale is known: the published one, or measured. Source: LDM §D (scale factor)."""
        return self.scale != 1

    @torch.no_grad()
    def standardise(self, x):
        """Measure the scale on pictures x (B, C, H, W), so that latents get unit variance. Source: LDM §D."""
        self.scale = 1 / torch.cat([self.moments(part)[0].flatten() for part in x.split(50)]).std().item()

    def moments(self, x):
        """Pictures (B, 3, H, W) -> mean, log-variance of latents, 2x (B, z, H/f, W/f), unscaled. Source: LDM §3.1."""
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f"a picture of {x.shape[-2]}x{x.shape[-1]} is not divisible by the autoencoder's factor "
                             f"{self.factor}")
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, x, generator=None):
        """Pictures -> scaled latents (B, z, H/f, W/f): a sample, or the mean without a generator. Source: LDM §3.1."""
        mean, logvar = self.moments(x)
        if generator is not None:
            mean = mean + torch.exp(0.5 * logvar) * randn(mean.shape, generator, mean.device)
        return self.scale * mean

    def decode(self, z):
        """Scaled latents (B, z, h, w) -> pictures (B, 3, f*h, f*w), about [-1, 1]. Source: LDM §3.1."""
        return self.decoder(self.post_quant_conv(z / self.scale))
