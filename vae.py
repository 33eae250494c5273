"""First stages: pictures to small latents and back, trained once and then frozen.

Papers: High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al. 2022), LDM;
Neural Discrete Representation Learning (van den Oord et al. 2017), VQ-VAE; VQ-Diffusion (2022).

The idea.  Most bits of a picture are fine texture, which a small convolutional decoder can fill in.
So first train an autoencoder that shrinks each side by f and keeps a few numbers per cell, then run
diffusion on these latents: with f = 4, a transformer with one token per cell sees a 32 x 32 picture
as 64 tokens instead of 1,024 pixels. A VQ-VAE replaces the numbers of each cell by the nearest of K
vectors, its codes: a picture becomes N tokens.

    python train.py --model tiny-ae --data shapes     # or vq-vae, kl-ae

Differences from the official code:
1. No perceptual and no adversarial loss: enough for 32-pixel worlds, too little for photographs.
2. TinyAutoencoder: latent noise and an L2 pull instead of the KL term; one scale per channel.
3. VQ-VAE: squared, not absolute errors; k-means starts the codes after a warm-up, unused codes
   are moved, and beta also weighs the commitment loss of averaged codes.
4. AutoencoderKL.encode returns the mean; the official code samples with the predicted variance."""
from collections import OrderedDict
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import load_weights
from diffusion import randn

LATENT_WEIGHT = 1e-4     # of the L2 pull (tiny-ae) and the KL term (kl-ae), per latent number; ours


class FirstStage(nn.Module):
    """What every first stage answers; pictures x are (B, C, H, W), float in [-1, 1].
    encode(x) -> latents z; decode(z) -> pictures; objective(x, draw()) -> (training loss, metrics),
    noisy: reads noise; standardise(x) measures the latents of x, and from then on (standardised)
    encode gives unit variance (LDM appendix G); check_batch(n): ValueError if steps of n pictures
    are too small; factor: f, a picture's side over its latents'; matrices: Muon's weights."""
    kind, noisy, standardised = "", True, True
    matrices = r"(en|de)coder\.\d+\.conv"               # the convolutions of the residual blocks
    standardise = check_batch = lambda self, given: None         # nothing to measure, or to check
    forward = lambda self, x, draws: self.objective(x, draws)   # DDP and torch.compile wrap forward

    def __init__(self, **sizes):
        super().__init__()
        self._sizes = tuple(sizes)
        vars(self).update(sizes)                        # each argument becomes an attribute

    @property
    def sizes(self):
        """The constructor's arguments with their present values, to build the stage again."""
        return {name: getattr(self, name) for name in self._sizes}

    def latent_shape(self, image_shape):
        """(C, H, W) -> shape (c, H/f, W/f) of the latents. Raises ValueError if it does not fit."""
        channels, height, width = image_shape
        if channels != self.in_channels or height % self.factor or width % self.factor:
            raise ValueError(f"this {self.kind} reads pictures with {self.in_channels} channels, "
                             f"sides divisible by {self.factor}, not {channels} x {height} x "
                             f"{width}: choose another --image-size or another first stage")
        return self.latent_channels, height // self.factor, width // self.factor

    def draw(self, n, image_shape, generator=None, device="cpu"):
        """Random numbers of a step of n pictures: {"noise": normal, (n, c, h, w)}, or {}."""
        shape = (n, *self.latent_shape(image_shape))
        return {"noise": randn(shape, generator, device)} if self.noisy else {}

    def shrink_mask(self, mask):
        """Mask (B, 1, H, W) -> that of the latents: a cell is painted if any of its pixels is."""
        return F.max_pool2d(mask, self.factor)                              # (B, 1, H/f, W/f)


def image_metrics(recon, x):
    """Mean squared error, and PSNR in dB for values in [-1, 1]; 0-dim tensors without gradient."""
    mse = (recon - x).detach().square().mean()
    return {"mse": mse, "psnr": 10 * torch.log10(4 / mse)}                  # 4 = (1 - (-1))^2


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): (B, C_in, H, W) -> (B, C_out, H, W).
    Source: He et al. 2016, pre-activation; LDM, ResnetBlock (32 groups, eps 1e-6)."""

    def __init__(self, in_channels, out_channels, groups=8, eps=1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


def small_networks(in_channels, latent_channels, factor, width):
    """Encoder (B, C, H, W) -> (B, c, H/f, W/f), and decoder back; width: channels inside."""
    cell = in_channels * factor * factor
    encoder = nn.Sequential(nn.PixelUnshuffle(factor), nn.Conv2d(cell, width, 1),
                            ResBlock(width, width), nn.Conv2d(width, latent_channels, 1))
    decoder = nn.Sequential(
        nn.Conv2d(latent_channels, width, 3, padding=1), ResBlock(width, width),
        ResBlock(width, width), nn.Conv2d(width, cell, 1), nn.PixelShuffle(factor))
    return encoder, decoder


class TinyAutoencoder(FirstStage):
    """Pictures (B, in_channels, H, W) <-> latents (B, latent_channels, H/factor, W/factor).
    width: channels inside; latent_noise: noise that the decoder learns to undo, as a share of the
    latents' standard deviation: it then corrects a diffusion model's errors. Source: LDM §3.1."""
    kind = "tiny-ae"

    def __init__(self, in_channels=3, latent_channels=8, factor=4, width=64, latent_noise=0.3):
        super().__init__(in_channels=in_channels, latent_channels=latent_channels, factor=factor,
                         width=width, latent_noise=latent_noise)
        self.encoder, self.decoder = small_networks(in_channels, latent_channels, factor, width)
        self.register_buffer("mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("std", torch.ones(latent_channels, 1, 1))

    def objective(self, x, draws):
        """Squared error of the pictures after noise on the latents, and a small pull towards 0."""
        z = self.encoder(x)                                                 # (B, c, h, w)
        recon = self.decoder(z + self.latent_noise * z.detach().std() * draws["noise"]).float()
        loss = (recon - x).square().mean() + LATENT_WEIGHT * z.float().square().mean()
        return loss, image_metrics(recon, x)

    def encode(self, x):
        self.latent_shape(x.shape[1:])
        return (self.encoder(x) - self.mean) / self.std

    def decode(self, z):
        return self.decoder(z * self.std + self.mean)

    standardised = property(lambda self: bool((self.std != 1).any()))

    @torch.no_grad()
    def standardise(self, x):                               # per latent channel
        z = torch.cat([self.encoder(some) for some in x.split(50)])         # (B, c, h, w)
        self.mean.copy_(z.mean((0, 2, 3))[:, None, None])                   # (c, 1, 1)
        self.std.copy_(z.std((0, 2, 3))[:, None, None])


class Codebook(nn.Module):
    """K vectors of D numbers that follow the encoder by running averages instead of gradients.
    decay: of the averages; eps: smooths the counts; restart: a code whose average count falls below
    this is moved to a vector that is far from its code, 0 = never; warmup: training steps before
    the codes start, by k-means. Buffers: embedding (K, D); cluster_size (K,) and embedding_avg
    (K, D), averaged count and sum of each code's vectors; started. Source: VQ-VAE appendix A.1."""

    def __init__(self, num_codes, dim, decay=0.99, eps=1e-5, restart=0.0, warmup=0):
        super().__init__()
        self.num_codes, self.decay, self.eps = num_codes, decay, eps
        self.restart, self.warmup = restart, warmup
        self.register_buffer("embedding", torch.randn(num_codes, dim))
        self.register_buffer("cluster_size", torch.ones(num_codes))
        self.register_buffer("embedding_avg", self.embedding.clone())
        self.register_buffer("started", torch.tensor(False))
        self._has_started = False       # True once `started` was read as True: no need to ask again

    def nearest(self, vectors):
        """Vectors (n, D) -> ids (n,) of the nearest codes. Source: VQ-Diffusion Eq. 1."""
        # by differences: a matrix product cancels, and a GPU may round it to 10 bits (TF32)
        return torch.cdist(vectors.detach(), self.embedding,                # (n, K)
                           compute_mode="donot_use_mm_for_euclid_dist").argmin(1)

    def count(self, ids):
        """How often each code occurs in ids (n,): (K,) float. Source: VQ-VAE Eq. 6."""
        return (0 * self.cluster_size).index_add_(0, ids, self.cluster_size.new_ones(len(ids)))

    @torch.no_grad()
    def update(self, vectors, keep, step):
        """Start the codes when `warmup` steps are done, then move them after each. vectors (n, D):
        the whole batch's; keep: 0-dim, 0 = the step was not finite. Source: VQ-VAE Eq. 6-8."""
        self._has_started = self._has_started or bool(self.started)
        if not self._has_started:
            if step + 1 >= self.warmup and keep:
                self.start(vectors)
            return
        counts, sums, far = self._assign(vectors)
        size = self.cluster_size.lerp(counts, 1 - self.decay)               # Eq. 6: N_k
        average = self.embedding_avg.lerp(sums, 1 - self.decay)             # Eq. 7: m_k
        unused = size < self.restart                                        # (K,)
        average, size = _replace(average, unused, far), size.masked_fill(unused, 1.0)
        n = size.sum()                                                      # Laplace smoothing:
        smooth = (size + self.eps) / (n + self.num_codes * self.eps) * n    # no N_k is 0
        code = average / smooth[:, None]                                    # Eq. 8: e_k = m_k / N_k
        for name, new in (("cluster_size", size), ("embedding_avg", average), ("embedding", code)):
            getattr(self, name).copy_(torch.where(keep.bool(), new, getattr(self, name)))

    def start(self, vectors):
        """Put the codes at k-means centres of vectors (n, D), at first K evenly spaced rows."""
        rows = torch.linspace(0, len(vectors) - 1, self.num_codes, device=vectors.device).long()
        self.embedding.copy_(vectors[rows])
        for _ in range(20):
            counts, sums, far = self._assign(vectors)
            centres = sums / counts.clamp(min=1)[:, None]                   # (K, D)
            self.embedding.copy_(_replace(centres, counts == 0, far))
        self.cluster_size.fill_(10.0)       # each centre counts for 10 vectors in the averages
        self.embedding_avg.copy_(self.embedding * 10.0)
        self.started.fill_(True)

    def _assign(self, vectors):
        """Count (K,) and sum (K, D) of each code's vectors; the K vectors farthest from codes."""
        ids = self.nearest(vectors)                                         # (n,)
        sums = torch.zeros_like(self.embedding).index_add_(0, ids, vectors)
        distance = (vectors - self.embedding[ids]).square().sum(1)          # (n,)
        far = distance.topk(min(self.num_codes, len(vectors))).indices      # the farthest first
        return self.count(ids), sums, vectors[far]


def _replace(codes, unused, far):
    """Put another row of far (m, D) in place of each row of codes (K, D) that unused (K,) names."""
    rank = (unused.cumsum(0) - 1).clamp(0, len(far) - 1)                    # 0 for the first unused
    return torch.where(unused[:, None], far[rank], codes)


class VQVAE(FirstStage):
    """Pictures (B, in_channels, S, S) <-> tokens (B, N), N = (S / factor)^2, ids below num_codes.
    dim: D of a code; width: channels inside; beta: weight of the commitment loss; decay, restart,
    warmup: see Codebook. Tokens are in the order of rows. Source: VQ-Diffusion §3.1, Eq. 1, 2."""
    kind, noisy = "vq-vae", False

    def __init__(self, image_size=32, in_channels=3, num_codes=256, factor=4, dim=8, width=64,
                 beta=0.25, warmup=50, decay=0.95, restart=0.02):
        super().__init__(image_size=image_size, in_channels=in_channels, num_codes=num_codes,
                         factor=factor, dim=dim, width=width, beta=beta, warmup=warmup,
                         decay=decay, restart=restart)
        self.latent_channels = dim
        self.grid = super().latent_shape((in_channels, image_size, image_size))[1]
        self.encoder, self.decoder = small_networks(in_channels, dim, factor, width)
        self.codebook = Codebook(num_codes, dim, decay, restart=restart, warmup=warmup)

    def objective(self, x, draws):
        """Squared error of the pictures; the commitment loss keeps the encoder near the codes.
        Until the codes have started, the decoder reads the encoder's output as it is. Metrics:
        codes in use; perplexity, exp of their entropy; vectors (n, D) for Codebook.update."""
        z, started = self.encoder(x).float(), self.codebook.started         # (B, D, h, w)
        vectors = z.detach().permute(0, 2, 3, 1).flatten(0, 2)              # (n, D), n = B*N
        ids = self.codebook.nearest(vectors).view(len(x), -1)               # (B, N)
        z_q = self.look_up(ids)                                             # (B, D, h, w)
        # straight-through: the decoder reads z_q, and its gradient reaches z unchanged
        recon = self.decoder(z + torch.where(started, z_q - z, 0.0).detach()).float()
        commitment = torch.where(started, (z_q - z).square().mean(), 0.0)
        loss = (recon - x).square().mean() + self.beta * commitment
        share = self.codebook.count(ids.flatten()) / ids.numel()            # (K,)
        return loss, {"psnr": image_metrics(recon, x)["psnr"], "codes": (share > 0).sum().float(),
                      "perplexity": torch.exp(-torch.xlogy(share, share).sum()), "vectors": vectors}

    def encode(self, x):
        self.latent_shape(x.shape[1:])
        z = self.encoder(x).float()                                         # (B, D, h, w)
        return self.codebook.nearest(z.permute(0, 2, 3, 1).flatten(0, 2)).view(len(x), -1)

    def look_up(self, ids):
        """Tokens (B, N) -> their codes (B, D, h, w); of [MASK], number K, the mean code: grey."""
        codes = torch.cat([self.codebook.embedding, self.codebook.embedding.mean(0, True)])
        return codes[ids].mT.unflatten(2, (self.grid, self.grid))

    def decode(self, ids):
        return self.decoder(self.look_up(ids))

    def check_batch(self, batch_size):
        if (vectors := batch_size * self.grid ** 2) < self.num_codes:
            raise ValueError(f"{self.num_codes} codes cannot start from the {vectors} vectors of "
                             "one step: give a larger --batch-size or fewer --codes")

    def latent_shape(self, image_shape):
        expected = (self.in_channels, self.image_size, self.image_size)
        if tuple(image_shape) != expected:
            raise ValueError(f"this VQ-VAE reads pictures (C, H, W) = {expected}, not "
                             f"{tuple(image_shape)}: give such, or train another --model vq-vae")
        return (self.grid ** 2,)

    def shrink_mask(self, mask):
        return super().shrink_mask(mask).flatten(1)                         # (B, N)


class AutoencoderKL(FirstStage):
    """The autoencoder of Stable Diffusion under its official names: f = 8, 83,653,863 parameters.
    multipliers: of `channels`, one per level, f = 2^(levels - 1); res_blocks: per level; scale: of
    the latents, 0.18215 as published, 1 = not measured yet. Source: LDM §3.1, appendix G."""
    kind, matrices = "kl-ae", r"(en|de)coder\.(down|mid|up)"

    def __init__(self, channels=128, multipliers=(1, 2, 4, 4), res_blocks=2, in_channels=3,
                 z_channels=4, scale=0.18215):
        super().__init__(channels=channels, multipliers=tuple(multipliers), res_blocks=res_blocks,
                         in_channels=in_channels, z_channels=z_channels, scale=scale)
        self.latent_channels, self.factor = z_channels, 2 ** (len(multipliers) - 1)
        self.encoder, self.decoder = kl_networks(channels, multipliers, res_blocks, in_channels,
                                                 z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)

    def objective(self, x, draws):
        """L1 of the pictures from sampled latents, and a little of the KL to a standard normal."""
        mean, logvar = (m.float() for m in self.moments(x))                 # 2x (B, z, h, w)
        z = mean + torch.exp(0.5 * logvar) * draws["noise"]
        recon = self.decoder(self.post_quant_conv(z)).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return (recon - x).abs().mean() + LATENT_WEIGHT * kl, image_metrics(recon, x)

    def moments(self, x):
        """Pictures -> mean, log-variance of the latents before scaling, 2x (B, z, h, w)."""
        self.latent_shape(x.shape[1:])
        h = self.encoder(x.to(self.quant_conv.weight.dtype))
        mean, logvar = self.quant_conv(h).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, x):
        return (self.scale * self.moments(x)[0]).to(x.dtype)

    def decode(self, z):
        unscaled = (z / self.scale).to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(unscaled)).to(z.dtype)

    standardised = property(lambda self: self.scale != 1)

    @torch.no_grad()
    def standardise(self, x):                               # one scale for all channels
        means = torch.cat([self.moments(some)[0].flatten() for some in x.split(50)])
        self.scale = 1 / means.std().item()


class VQGAN(VQVAE):
    """VQ-Diffusion's published tokenizer. Tokens are num_codes of `total` codes. dim: of a code;
    logits: the encoder scores all codes (Gumbel), and looks for no nearest; sizes: of kl_networks.
    Buffers: codes (total, dim); token (total,), of each code. Source: VQ-Diffusion §3.1; VQGAN."""
    kind, matrices = "vqgan", r"(?!)"                                       # matches no name

    def __init__(self, num_codes, total, dim, logits, image_size=256, **sizes):
        FirstStage.__init__(self, num_codes=num_codes, total=total, dim=dim, logits=logits,
                            image_size=image_size, **sizes)
        z, last = self.z_channels, self.channels * self.multipliers[-1]
        self.latent_channels, self.factor = dim, 2 ** (len(self.multipliers) - 1)
        self.grid = image_size // self.factor
        self.encoder, self.decoder = kl_networks(**sizes)
        self.encoder.conv_out = nn.Conv2d(last, z, 3, padding=1)            # a mean, no variance
        for levels, lowest in ((self.encoder.down, -1), (self.decoder.up, 0)):
            levels[lowest] = Attended(levels[lowest], last)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, dim, 1), nn.Conv2d(dim, z, 1)
        self.proj = nn.Conv2d(dim, total, 1) if logits else nn.Identity()
        self.register_buffer("codes", torch.zeros(total, dim))
        self.register_buffer("token", torch.zeros(total).long())

    def encode(self, x):
        self.latent_shape(x.shape[1:])
        z = self.proj(self.quant_conv(self.encoder(x))).flatten(2).mT       # (B, N, D or total)
        code = z.argmax(2) if self.logits else torch.cdist(
            z, self.codes, compute_mode="donot_use_mm_for_euclid_dist").argmin(2)
        return self.token[code]                                             # (B, N)

    def look_up(self, ids):
        """Tokens -> codes, as in VQVAE: for a token, the first code that is this token."""
        tokens = torch.arange(self.num_codes, device=ids.device)
        codes = self.codes[(self.token == tokens[:, None]).byte().argmax(1)]            # (K, D)
        return torch.cat([codes, codes.mean(0, True)])[ids].mT.unflatten(2, (self.grid, self.grid))

    def decode(self, ids):
        return self.decoder(self.post_quant_conv(self.look_up(ids)))


def _named(**layers):
    return nn.Sequential(OrderedDict(layers))           # runs in this order, under these names


def kl_networks(channels, multipliers, res_blocks, in_channels, z_channels):
    """Encoder (B, C, H, W) -> (B, 2 z, H/f, W/f), decoder (B, z, h, w) -> (B, C, f h, f w)."""
    widths = [channels * m for m in multipliers]
    last, conv = widths[-1], partial(nn.Conv2d, kernel_size=3, padding=1)
    norm, block = partial(nn.GroupNorm, 32, eps=1e-6), partial(ResBlock, groups=32, eps=1e-6)
    middle = lambda: _named(block_1=block(last, last), attn_1=KLAttention(last),
                            block_2=block(last, last))
    level = lambda *w: _named(block=nn.Sequential(*map(block, w, w[1:])))   # w[i] to w[i + 1]
    down = [level(a, *[b] * res_blocks) for a, b in zip([channels, *widths], widths)]
    up = [level(a, *[b] * (res_blocks + 1)) for a, b in zip([*widths[1:], last], widths)]
    for i, (w, above) in enumerate(zip(widths, widths[1:])):            # pad right and bottom only
        halve = _named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(w, w, 3, stride=2))
        down[i].add_module("downsample", halve)
        double = _named(repeat=nn.Upsample(scale_factor=2.0), conv=conv(above, above))
        up[i + 1].add_module("upsample", double)
    up = {str(i): up[i] for i in reversed(range(len(up)))}              # up.0, the largest, is last
    encoder = _named(conv_in=conv(in_channels, channels), down=nn.Sequential(*down), mid=middle(),
                     norm_out=norm(last), act=nn.SiLU(), conv_out=conv(last, 2 * z_channels))
    decoder = _named(conv_in=conv(z_channels, last), mid=middle(), up=_named(**up),
                     norm_out=norm(widths[0]), act=nn.SiLU(), conv_out=conv(widths[0], in_channels))
    return encoder, decoder


class Attended(nn.Sequential):
    """A level of kl_networks with self-attention after each of its blocks. Source: VQGAN's code."""

    def __init__(self, level, channels):
        super().__init__(OrderedDict(level.named_children()))
        self.attn = nn.Sequential(*(KLAttention(channels) for _ in level.block))

    def forward(self, x):
        for block, attention in zip(self.block, self.attn):
            x = attention(block(x))
        return self.upsample(x) if hasattr(self, "upsample") else x


class KLAttention(nn.Module):
    """One-head self-attention over all positions, (B, C, H, W) -> same. Source: LDM, AttnBlock."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)                                # q, k, v below: (B, 1, H*W, C)
        q, k, v = (conv(h).flatten(2).mT[:, None] for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)   # (B, C, H, W)
        return x + self.proj_out(h)


class Pixels(FirstStage):
    """No first stage: diffusion runs on the pictures themselves, and there is nothing to train."""
    kind, factor, noisy, matrices = "none", 1, False, r"(?!)"               # (?!) matches no name
    encode = decode = latent_shape = shrink_mask = lambda self, x: x


FIRST_STAGES = {stage.kind: stage for stage in (Pixels, TinyAutoencoder, AutoencoderKL, VQVAE)}


def first_stage_from(saved, path):
    """{"kind", "sizes", "model"} of a checkpoint -> frozen first stage; None -> pixels."""
    stage = FIRST_STAGES[saved["kind"]](**saved["sizes"]) if saved else Pixels()
    load_weights(stage, saved["model"] if saved else {}, path)
    return stage.eval().requires_grad_(False)
