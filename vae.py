"""The first stage of latent diffusion: pictures to small latents and back, trained once and then frozen.

Paper: High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al. 2022), §3.1.

The idea.  A diffusion model spends its effort where it is told to look. Most bits of a picture are fine texture that a small
convolutional decoder can fill in; what is hard is the arrangement. So first train an autoencoder that shrinks each side by
f and keeps a few channels per cell, and run diffusion on its latents: f = 4 leaves 1/16 of the positions, and a transformer
with one token per cell sees the whole picture as 64 tokens instead of 1,024 pixels. On the shapes of this repository that
is the difference between blobs and pictures at an equal budget (README, results).

Contents: TinyAutoencoder, which trains in under a minute on a laptop.

    python train.py --model tiny-ae --data shapes      # train one on its own; `python train.py` does so by itself

Differences from the paper: no perceptual or adversarial loss, no KL term (an L2 pull and latent noise instead, which give
the diffusion model a smooth and bounded space); patches are folded to channels rather than strided down. That is enough for
32-pixel worlds, and too little for photographs at 256 pixels.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, C, H, W) -> same. Source: He et al. 2016, pre-activation."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class TinyAutoencoder(nn.Module):
    """Autoencoder (B, in_channels, H, W) in [-1, 1] <-> (B, latent_channels, H/factor, W/factor) with about unit variance.

    factor: f of the paper, divides H and W; width: channels inside. Latents are standardised per channel by `standardise`, whose
    figures travel in the state_dict. Raises ValueError if the picture's sides are not divisible by factor. Source: LDM §3.1.
    """

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
        """x (B, C, H, W) in [-1, 1] -> standardised latents (B, c, H/f, W/f); deterministic, so generator is not used. Source: LDM §3.1."""
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f"a picture of {x.shape[-2]}x{x.shape[-1]} is not divisible by the autoencoder's factor {self.factor}")
        return (self.encoder(x) - self.mean) / self.std                                     # (B, c, H/f, W/f)

    def decode(self, z):
        """Standardised latents (B, c, h, w) -> pictures (B, C, f*h, f*w), about [-1, 1]. Source: LDM §3.1."""
        return self.decoder(z * self.std + self.mean)                                       # (B, C, H, W)

    def forward(self, x, noise, noise_level=0.3):
        """Training pass: x (B, C, H, W) -> (reconstruction like x, latents (B, c, h, w) before standardising).

        noise: standard normal like the latents; noise_level: its share of their spread. A decoder used to such noise forgives the
        small errors that a diffusion model makes. Source: LDM §3.1, its KL regularisation simplified.
        """
        z = self.encoder(x)                                                                 # (B, c, h, w)
        return self.decoder(z + noise_level * z.detach().std() * noise), z

    @torch.no_grad()
    def standardise(self, x):
        """Measure the latents of pictures x (B, C, H, W), so that encode gives zero mean and unit variance. Source: LDM §D (scale factor)."""
        z = self.encoder(x)
        self.mean.copy_(z.mean((0, 2, 3))[:, None, None])                                   # (c, 1, 1)
        self.std.copy_(z.std((0, 2, 3))[:, None, None])
