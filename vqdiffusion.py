"""VQ-Diffusion: pictures as a grid of codes, and a diffusion process on codes instead of numbers.

Paper: Vector Quantized Diffusion Model for Text-to-Image Synthesis (Gu et al. 2022, arXiv 2111.14822); samplers and
guidance: Improved Vector Quantized Diffusion Models (Tang et al. 2022, arXiv 2205.16007), "Improved" below.

The idea.  A VQ-VAE turns a picture into N tokens, each one of K codes. Codes have no order, so noise cannot be added to
them; instead every step of the forward process, token by token,
  masks       with probability gamma_t turns the token into [MASK], an extra state with index K, for good,
  replaces    with probability K beta_t puts a random code in its place,
  keeps       it otherwise (alpha_t).
A transformer looks at all tokens, masked, wrong and right, and guesses the clean ones, all at once. Bayes' rule turns
the guess p(x_0 | x_t) into the step back p(x_s | x_t), for any s < t: [MASK] says where to work, and because codes may
be wrong too, the network learns to doubt what it has written. Sampling needs 25 calls whatever N is; an autoregressive
model needs N.
The posterior, Eq. 5, looks forbidding as a product of (K+1) x (K+1) matrices, and is short in probabilities: all codes
get A * guess + B, except x_t itself, which gets a larger share: `MaskReplace.posterior`.

Contents: Codebook, VQVAE; MaskReplace (schedule, forward, posterior, loss, samplers); VQTransformer; VQ_CONFIGS.
Tokens are (B, N) int64, row by row; a model is model(tokens, t (B,), condition) -> logits (B, N, K).

    python train.py --model vq-tiny --data scenes     # a VQ-VAE first, then text to image on its tokens
    python -m studies.vq_speed                        # this loss against the official formulas

Differences from the official code (microsoft/VQ-Diffusion; names in the state_dict are the same, see official_state):
1. Schedule: the paper's, [MASK] up to 0.9. The released code goes to 0.99999, and in effect never replaces a code:
   schedule="released".
2. Posterior in probabilities instead of logarithms with a normalisation trick: the same numbers to float32 rounding.
3. The loss needs no posterior of x_0 in memory: that has only three distinct values per token. No float64.
4. Fast sampling uses the exact jump p(x_s | x_t). The official one pretends that x_t were x_{s+1}: stride="official".
5. Sampling starts from the chain's end, random codes among the [MASK]s, not from [MASK] alone.
6. Fewer-tokens and purity sampling for any number of steps and tokens, as in Improved §3.2; no hard-coded budgets.
7. Inpainting writes known tokens back after every step. The official sampler changes them.
8. True grid positions. The released ImageNet model adds up wrong rows of its position tables: position_grid=32.
9. VQ-VAE: mean squared error, no VGG loss, no discriminator; codes start by k-means and are restarted when unused;
   beta is used with averaged codes too.
"""
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from diffusion import guided
from vae import ResBlock

# ----------------------------------------------------------------------------------------------------------------------
# the tokeniser

class Codebook(nn.Module):
    """K vectors of D numbers that follow the encoder by running averages instead of gradients.

    decay: of the averages; eps: smooths the counts (Laplace); restart: a code whose average count falls below this is
    moved to a vector that the others serve badly; 0 = never. All state is in buffers: embedding (K, D), cluster_size
    (K,) and embedding_avg (K, D), the averaged count and sum of what each code was assigned.
    Source: van den Oord et al. 2017, appendix A.1; restarts and k-means are ours.
    """

    def __init__(self, num_codes, dim, decay=0.99, eps=1e-5, restart=0.0):
        super().__init__()
        self.num_codes, self.decay, self.eps, self.restart = num_codes, decay, eps, restart
        self.register_buffer("embedding", torch.randn(num_codes, dim))
        self.register_buffer("cluster_size", torch.ones(num_codes))
        self.register_buffer("embedding_avg", self.embedding.clone())

    def nearest(self, z):
        """Vectors z (n, D) -> ids (n,) of the nearest codes. Source: VQ-Diffusion Eq. 1."""
        return torch.cdist(z, self.embedding).argmin(1)                                     # (n, K) -> (n,)

    def tally(self, z, ids):
        """How many vectors z (n, D) each code got, (K,), and their sums, (K, D). Source: van den Oord et al. 2017."""
        counts = torch.zeros_like(self.cluster_size).index_add_(0, ids, torch.ones_like(z[:, 0]))
        return counts, torch.zeros_like(self.embedding_avg).index_add_(0, ids, z)

    def _badly_served(self, z, ids, empty):
        """(K, D): for each code that `empty` (K,) names another one of the vectors z farthest from their codes."""
        far = (z - self.embedding[ids]).square().sum(1).topk(min(self.num_codes, len(z))).indices
        return z[far[(empty.cumsum(0) - 1).clamp(0, len(far) - 1)]]

    @torch.no_grad()
    def update(self, z, ids):
        """Move the codes towards the vectors z (n, D) that were assigned to them by ids (n,).

        Source: van den Oord et al. 2017 Eq. 6-8; Laplace smoothing: its code.
        """
        counts, sums = self.tally(z, ids)
        if dist.is_initialized():                               # ranks see parts of one batch: add them up
            dist.all_reduce(counts), dist.all_reduce(sums)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embedding_avg.lerp_(sums, 1 - self.decay)
        if self.restart:
            dead = self.cluster_size < self.restart
            self.embedding_avg.copy_(torch.where(dead[:, None], self._badly_served(z, ids, dead), self.embedding_avg))
            self.cluster_size.masked_fill_(dead, 1.0)
        total = self.cluster_size.sum()
        smooth = (self.cluster_size + self.eps) / (total + self.num_codes * self.eps) * total           # (K,)
        self.embedding.copy_(self.embedding_avg / smooth[:, None])

    @torch.no_grad()
    def start(self, z, iterations=20, weight=10.0):
        """Put the codes at the k-means centres of vectors z (n, D), starting from K of them evenly spaced in z.

        weight: how many vectors per step each centre then counts for, so that it is not swept away at once. Raises
        ValueError for fewer vectors than codes. Source: Lloyd 1982.
        """
        if len(z) < self.num_codes:
            raise ValueError(f"{self.num_codes} codes cannot start from {len(z)} vectors: enlarge the batch")
        self.embedding.copy_(z[torch.linspace(0, len(z) - 1, self.num_codes).long()])
        for _ in range(iterations):
            ids = self.nearest(z)
            counts, sums = self.tally(z, ids)
            empty, centres = counts == 0, sums / counts.clamp(min=1)[:, None]
            self.embedding.copy_(torch.where(empty[:, None], self._badly_served(z, ids, empty), centres))
        self.cluster_size.fill_(weight)
        self.embedding_avg.copy_(self.embedding * weight)


class VQVAE(nn.Module):
    """Pictures (B, in_channels, S, S) in [-1, 1] <-> tokens (B, N), N = grid^2 = (S / factor)^2, ids below num_codes.

    dim: D of a code; width: channels inside; beta: of the commitment loss; warmup: so many training passes without
    quantisation, after which the codes start at the k-means centres of the batch, so that each has work to do; decay
    and restart: see Codebook. Trained with the mean squared error. On 32-pixel scenes, by Muon, 1600 steps of 32
    pictures give 30 dB, 1000 give 28.8; k-means on 4x4 patches of pixels, also with 256 codes, 25.8.
    Raises ValueError for sizes that do not fit. Source: VQ-Diffusion §3.1; the body is that of vae.py.
    """

    matrices = r"(en|de)coder\.\d+\.conv"       # Muon's share in train.py: the convolutions of the residual blocks

    def __init__(self, image_size=32, in_channels=3, num_codes=256, factor=4, dim=8, width=64, beta=0.25, warmup=50,
                 decay=0.95, restart=0.02):
        super().__init__()
        if image_size % factor:
            raise ValueError(f"image size {image_size} is not divisible by the VQ-VAE's factor {factor}")
        self.in_channels, self.image_size, self.factor = in_channels, image_size, factor
        self.grid = image_size // factor
        self.num_codes, self.beta, self.warmup = num_codes, beta, warmup
        cell = in_channels * factor * factor
        self.encoder = nn.Sequential(nn.PixelUnshuffle(factor), nn.Conv2d(cell, width, 1), ResBlock(width),
                                     nn.Conv2d(width, dim, 1))
        self.decoder = nn.Sequential(nn.Conv2d(dim, width, 3, padding=1), ResBlock(width), ResBlock(width),
                                     nn.Conv2d(width, cell, 1), nn.PixelShuffle(factor))
        self.codebook = Codebook(num_codes, dim, decay, restart=restart)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))      # training passes so far

    def quantise(self, z):
        """Encoder output z (B, D, h, w) -> (nearest codes like z, ids (B, N)). Source: VQ-Diffusion Eq. 1."""
        B, D, h, w = z.shape
        ids = self.codebook.nearest(z.permute(0, 2, 3, 1).reshape(-1, D))                   # (B*N,)
        z_q = self.codebook.embedding[ids].view(B, h, w, D).permute(0, 3, 1, 2)             # (B, D, h, w)
        return z_q, ids.view(B, h * w)

    @torch.no_grad()
    def encode(self, x):
        """Pictures (B, C, S, S) in [-1, 1] -> tokens (B, N) int64, row by row. Source: VQ-Diffusion Eq. 1."""
        if x.shape[1:] != (self.in_channels, self.image_size, self.image_size):
            raise ValueError(f"this VQ-VAE reads pictures of {self.in_channels} x {self.image_size} x "
                             f"{self.image_size}, not {' x '.join(map(str, x.shape[1:]))}")
        return self.quantise(self.encoder(x))[1]

    @torch.no_grad()
    def decode(self, ids):
        """Tokens (B, N) -> pictures (B, C, S, S), about [-1, 1]. Raises ValueError for a wrong number or range of ids.

        Source: VQ-Diffusion §3.1.
        """
        if ids.shape[1] != self.grid ** 2 or ids.max() >= self.num_codes:
            raise ValueError(f"this VQ-VAE decodes {self.grid ** 2} tokens below {self.num_codes} ([MASK] is none), "
                             f"not {ids.shape[1]} tokens up to {int(ids.max())}")
        z_q = self.codebook.embedding[ids].view(len(ids), self.grid, self.grid, -1)         # (B, g, g, D)
        return self.decoder(z_q.permute(0, 3, 1, 2))                                        # (B, C, S, S)

    def forward(self, x):
        """Training pass: x (B, C, S, S) -> (reconstruction like x, commitment loss, ids (B, N)).

        In train mode it also moves the codebook, which no gradient reaches. Source: VQ-Diffusion Eq. 2.
        """
        z = self.encoder(x).float()                                                         # (B, D, h, w)
        flat = z.detach().permute(0, 2, 3, 1).flatten(0, 2)                                 # (B*N, D)
        if self.training and self.passes == self.warmup:
            self.codebook.start(flat)
        z_q, ids = self.quantise(z)
        if self.training:
            if self.passes >= self.warmup:
                self.codebook.update(flat, ids.flatten())
            self.passes += 1
            if self.passes <= self.warmup:
                return self.decoder(z), z.new_zeros(()), ids
        commitment = self.beta * (z_q - z).square().mean()
        return self.decoder(z + (z_q - z).detach()), commitment, ids                        # straight-through

    def perplexity(self, ids):
        """How many codes are in use, weighing by frequency: exp of the entropy of ids, between 1 and K.

        Source: van den Oord et al. 2017.
        """
        p = torch.bincount(ids.flatten(), minlength=self.num_codes) / ids.numel()           # (K,)
        return torch.exp(-torch.xlogy(p, p).sum())


# ----------------------------------------------------------------------------------------------------------------------
# the mask-and-replace process

# name -> (alpha_bar_1, alpha_bar_T, gamma_bar_1, gamma_bar_T): the chance of being untouched, and masked, at either end
SCHEDULES = {"paper": (0.99999, 9e-6, 9e-6, 0.9), "released": (0.99999, 9e-6, 9e-6, 0.99999),
             "mask-only": (0.99999, 9e-6, 1e-5, 0.999991), "replace-only": (0.99999, 9e-6, 0.0, 0.0)}


def rand(shape, generator=None, device="cpu"):
    """Uniform numbers in [0, 1); a list of generators gives row i its own, as in diffusion.randn.

    Source: VQ-Diffusion algorithm 2.
    """
    if not isinstance(generator, (list, tuple)):
        return torch.rand(shape, generator=generator, device=device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}: give one per sample, or a single one")
    return torch.stack([torch.rand(shape[1:], generator=g, device=device) for g in generator])


def race(p, u):
    """Draw from unnormalised probabilities p (..., S) with uniforms u like p -> index (...).

    State k arrives after an exponential time of rate p_k, and the first one wins: the Gumbel trick without logarithms
    of p. Source: VQ-Diffusion's code (Gumbel-max).
    """
    return (p / -torch.log(u)).argmax(-1)


class MaskReplace:
    """The chain x_0 -> x_t on tokens 0..K-1 and [MASK] = K, its loss and its samplers. Holds no parameters.

    steps: T (t = 0..T-1 are the paper's 1..T; t = -1 is clean). num_codes: K. schedule: a name in SCHEDULES, or four
    end points (alpha_bar_1, alpha_bar_T, gamma_bar_1, gamma_bar_T); K beta_bar is what they leave over.
    aux_weight: lambda of the auxiliary loss, as published; train.py's runs are short, and take 1: the bound alone looks
    mostly at the last few [MASK]s, where it is long decided what goes where. adaptive_aux: twice that at t = 0, falling
    to once; mask_weight: of masked and of other tokens. importance: draw t more often where the loss has been large;
    its memory, loss_history and loss_count (T,), is the only state here, belongs in a checkpoint, and must be alike on
    all ranks.
    Public: alpha_bar, beta_bar, gamma_bar (T+1,) float64, whose last entry, index -1, is "clean": (1, 0, 0).
    Raises ValueError for an impossible schedule. Source: VQ-Diffusion §4.1, Eq. 7-9.
    """
    samplers = ("posterior", "fewer", "purity")

    def __init__(self, steps=100, num_codes=256, schedule="paper", aux_weight=5e-4, adaptive_aux=True,
                 mask_weight=(1.0, 1.0), importance=False):
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}, or four end points")
        if steps < 2 or num_codes < 2:
            raise ValueError(f"the chain needs at least 2 steps and 2 codes, not {steps} and {num_codes}")
        self.steps, self.num_codes, self.importance = steps, num_codes, importance
        self.aux_weight, self.adaptive_aux, self.mask_weight = aux_weight, adaptive_aux, mask_weight
        a_1, a_T, g_1, g_T = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
        walk = torch.arange(steps, dtype=torch.float64) / (steps - 1)                       # (T,) 0..1
        clean = torch.ones(1, dtype=torch.float64)
        self.alpha_bar = torch.cat([a_1 + (a_T - a_1) * walk, clean])                       # (T+1,)
        self.gamma_bar = torch.cat([g_1 + (g_T - g_1) * walk, 0 * clean])                   # (T+1,)
        self.beta_bar = self._share(1 - self.alpha_bar - self.gamma_bar)                    # (T+1,)
        t = torch.arange(steps)
        self.transition(t, t - 1)                                                           # raises if impossible
        self._on_device = {}
        self.loss_history, self.loss_count = torch.zeros(steps), torch.zeros(steps)

    def _share(self, leftover):
        """What is left for replacing, per code. Rounding of 1 - a - g is no replacing: below 1e-12 it is 0."""
        if leftover.min() < -1e-12:
            raise ValueError(f"impossible schedule: keeping and masking add up to {1 - leftover.min():.6g} > 1 at step "
                             f"{leftover.argmin()}; let alpha_bar fall at least as fast as 1 - gamma_bar")
        return torch.where(leftover < 1e-12, 0.0, leftover) / self.num_codes

    def transition(self, t, s):
        """alpha, beta, gamma of the jump from step s to a later step t (index tensors, -1 = clean), float64.

        Source: VQ-Diffusion Eq. 7, from Eq. 8's products: alpha = alpha_bar_t / alpha_bar_s, and so on.
        """
        alpha = self.alpha_bar[t] / self.alpha_bar[s]
        gamma = 1 - (1 - self.gamma_bar[t]) / (1 - self.gamma_bar[s])
        return alpha, self._share(1 - alpha - gamma), gamma

    def _constants(self, t, s, xt):
        """The nine numbers of a jump back from t to s, each (B, 1, 1) float32; t (B,) tensor and s None: one step."""
        if s is None and xt.device in self._on_device:          # once per device, so that no step copies from the host
            return self._on_device[xt.device][:, t].view(9, -1, 1, 1)
        now = torch.arange(self.steps) if s is None else torch.tensor([t])
        then = now - 1 if s is None else torch.tensor([s])
        tables = torch.stack([self.alpha_bar, self.beta_bar, self.gamma_bar])               # (3, T+1)
        rows = torch.cat([torch.stack(self.transition(now, then)), tables[:, now], tables[:, then]])
        rows = rows.float().to(xt.device)                                                   # (9, T) or (9, 1)
        if s is None:
            self._on_device[xt.device], rows = rows, rows[:, t]
        return rows.view(9, -1, 1, 1)

    # --- forward: from codes to [MASK]

    def marginal(self, p0, t):
        """q(x_t | x_0): p0 (B, N, K+1), a distribution of x_0, and t (B,) or -1 -> (B, N, K+1).

        Source: VQ-Diffusion Eq. 8.
        """
        a, b, g = (table[t].float().to(p0.device).view(-1, 1, 1) for table in
                   (self.alpha_bar, self.beta_bar, self.gamma_bar))
        codes, masked = p0.split([self.num_codes, 1], dim=-1)                               # (B, N, K), (B, N, 1)
        return torch.cat([a * codes + b * codes.sum(-1, keepdim=True), masked + g * (1 - masked)], dim=-1)

    def q_sample(self, x0, t, u):
        """Noise x0 (B, N) to step t (B,) with uniforms u (B, N, 2): which fate, and which code if replaced -> (B, N).

        Source: VQ-Diffusion Eq. 8.
        """
        b, g = self._constants(t, None, x0)[4:6, :, :, 0]                                   # 2x (B, 1)
        K = self.num_codes
        other = (u[..., 1] * K).long().clamp(max=K - 1)
        xt = torch.where(u[..., 0] < g + K * b, other, x0)
        return torch.where(u[..., 0] < g, K, xt)                                            # (B, N)

    # --- backward: from a guess at x_0 to the step before

    def guess(self, logits, truncation=1.0, top_k=None):
        """logits (B, N, K) -> p(x_0 | x_t) over K+1 states, (B, N, K+1) float32; nothing is ever guessed to be [MASK].

        truncation: keep per token the likeliest codes, up to the first that makes their sum reach this; top_k: keep so
        many. What is dropped becomes 0, the rest is not rescaled. Source: VQ-Diffusion §4.2 (truncation, r = 0.86).
        """
        p = F.pad(logits.float(), (0, 1), value=-math.inf).softmax(-1)                      # (B, N, K+1)
        if truncation >= 1 and top_k is None:
            return p
        p, order = p.sort(-1, descending=True)
        keep = p.cumsum(-1) - p < truncation if truncation < 1 else torch.ones_like(p, dtype=torch.bool)
        keep[..., top_k or p.shape[-1]:] = False
        return torch.zeros_like(p).scatter(-1, order, p * keep)

    def _parts(self, own, rest, xt, constants):
        """Posterior of x_s given a guess: every code k != x_t gets slope * p0_k + offset, x_t itself gets `stay`.

        own, rest (B, N, 1): the guess's probability of x_t, and of all other codes; xt (B, N, 1).
        With r_k = p0_k / q(x_t | x_0 = k) and R their sum, Bayes gives
        q(x_t | x_s = k) * (alpha_bar_s r_k + beta_bar_s R).
        """
        alpha, beta, gamma, a_t, b_t, g_t, a_s, b_s, g_s = constants
        masked = xt == self.num_codes
        step, reach = torch.where(masked, gamma, beta), torch.where(masked, g_t, b_t)       # k != x_t: s to t, 0 to t
        per = torch.where(reach > 0, 1 / reach, 0.0)            # 0/0: a token that no other code can turn into
        r_own = own / (a_t + b_t)
        stay = torch.where(masked, g_s * per * rest, (alpha + beta) * ((a_s + b_s) * r_own + b_s * per * rest))
        stay = torch.where(reach > 0, stay, own + rest)         # nothing is replaced: x_t was there all along
        return step * a_s * per, step * b_s * (per * rest + r_own), stay                    # 3x (B, N, 1)

    def posterior(self, p0, xt, t, s=None):
        """p(x_s | x_t) = sum_x0 q(x_s | x_t, x_0) p0(x_0), (B, N, K+1): p0 (B, N, K+1), xt (B, N), any s < t in O(K).

        t: (B,) tensor, and s = t - 1; or ints t and s, where s = -1 is the clean end, at which no [MASK] is left. If p0
        does not sum to 1, neither does the result. Source: VQ-Diffusion Eq. 5 and 11; §4.2 (fast inference).
        """
        xt, constants = xt[..., None], self._constants(t, s, xt)                            # (B, N, 1)
        others = p0.scatter(-1, xt, 0.0)                        # not sum - own: that would round away small chances
        slope, offset, stay = self._parts(p0.gather(-1, xt), others.sum(-1, keepdim=True), xt, constants)
        out = torch.addcmul(offset, slope, others)                                          # (B, N, K+1)
        out[..., -1] = 0
        return out.scatter_(-1, xt, stay)

    # --- the loss

    def draw(self, shape, generator=None, device="cpu"):
        """The random part of one training step for tokens of `shape` (B, N): {"t" (B,), "pt" (B,), "u" (B, N, 2)}.

        pt: the probability with which t was drawn. Source: VQ-Diffusion algorithm 1; Improved DDPM §3.3.
        """
        p = self.time_probabilities().to(device)
        t = torch.searchsorted(p.cumsum(0), rand(shape[:1], generator, device)).clamp(max=self.steps - 1)
        return {"t": t, "pt": p[t], "u": rand((*shape, 2), generator, device)}

    def time_probabilities(self):
        """p(t), (T,): uniform, or with importance ~ sqrt of the averaged squared loss, once each t was seen 11 times.

        Source: VQ-Diffusion's code; Improved DDPM Eq. 18.
        """
        s = (self.loss_history + 1e-10).sqrt() + 1e-4
        s = torch.cat([s[1:2], s[1:]])                          # t = 0 is a likelihood, not a KL: take t = 1's
        ready = self.importance & (self.loss_count > 10).all()
        return torch.where(ready, s / s.sum(), 1 / self.steps)

    def remember(self, t, base):
        """Update the memory of importance sampling with base losses (B,) at steps t (B,).

        Source: VQ-Diffusion's code.
        """
        self.loss_history, self.loss_count = self.loss_history.to(t.device), self.loss_count.to(t.device)
        self.loss_history[t] = 0.9 * self.loss_history[t] + 0.1 * base.square()
        self.loss_count.index_add_(0, t, torch.ones_like(base))

    def kl(self, p0, x0, xt, t):
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) per token, (B, N) nats; at t = 0 that is -log p(x_0 | x_1).

        p0 (B, N, K+1): the network's guess. q is known, with three values only: at x_t, at x_0, and elsewhere. So its
        K+1 numbers need not be in memory: sum_k q_k log p_k = elsewhere * (sum of all log p_k) + two corrections.
        Source: VQ-Diffusion Eq. 6.
        """
        logp = (self.posterior(p0, xt, t) + 1e-30).log()                                    # (B, N, K+1)
        x0, xt, xlogx = x0[..., None], xt[..., None], lambda q: torch.xlogy(q, q)
        same, is_code = (x0 == xt).float(), (xt < self.num_codes).float()                   # (B, N, 1)
        slope, elsewhere, at_xt = self._parts(same, 1 - same, xt, self._constants(t, None, xt))
        at_x0 = slope + elsewhere
        log_sum, log_xt, log_x0 = logp[..., :-1].sum(-1, keepdim=True), logp.gather(-1, xt), logp.gather(-1, x0)
        cross = elsewhere * (log_sum - is_code * log_xt) + at_xt * log_xt + (1 - same) * slope * log_x0
        own = (self.num_codes - is_code - 1 + same) * xlogx(elsewhere) + xlogx(at_xt) + (1 - same) * xlogx(at_x0)
        return (own - cross)[..., 0]

    def terms(self, logits, x0, xt, t):
        """(variational term, auxiliary term) of each sample, sums over tokens in nats, (B,) each.

        Source: VQ-Diffusion Eq. 6 and 12.
        """
        p0 = self.guess(logits)                                                             # (B, N, K+1)
        weight = torch.where(xt == self.num_codes, *self.mask_weight)
        weight = torch.where(t[:, None] == 0, 1.0, weight)                                  # (B, N)
        ce = -(p0.gather(-1, x0[..., None]) + 1e-30).log()[..., 0]                          # (B, N)
        return (weight * self.kl(p0, x0, xt, t)).sum(1), (weight * ce).sum(1)

    def loss(self, model, x0, cond=None, t=None, pt=None, u=None, generator=None):
        """The bound in nats per token, plus the auxiliary loss -> (scalar, {"vlb", "ce"}).

        x0 (B, N) clean tokens; t, pt, u as from draw (drawn here if t is None). With importance, updates its memory:
        the one thing that makes a call depend on earlier ones. Source: VQ-Diffusion Eq. 6 and 12.
        """
        if t is None:
            t, pt, u = self.draw(x0.shape, generator, x0.device).values()
        xt = self.q_sample(x0, t, u)
        base, aux = self.terms(model(xt, t, cond), x0, xt, t)
        add = 2 - t / self.steps if self.adaptive_aux else 1.0
        if self.importance:
            self.remember(t, base.detach())
        loss = ((base + add * self.aux_weight * aux) / pt).sum() / x0.numel()
        return loss, {"vlb": (base / pt).detach().sum() / x0.numel(), "ce": aux.detach().sum() / x0.numel()}

    # --- samplers

    def prior(self, shape, generator=None, device="cpu"):
        """Tokens at the noisy end, (B, N): [MASK] with probability gamma_bar_T, else any code.

        Source: VQ-Diffusion Eq. 9.
        """
        u, K, g = rand((*shape, 2), generator, device), self.num_codes, self.gamma_bar[self.steps - 1]
        masked = u[..., 0] * (g + K * self.beta_bar[self.steps - 1]) < g
        return torch.where(masked, K, (u[..., 1] * K).long().clamp(max=K - 1))

    def jumps(self, steps, stride="exact", first=None):
        """What happens at each network call, latest first: [(t shown to the network, t of the posterior, s), ...].

        steps: so many calls, evenly spaced over the whole chain; or the list of t itself. first: leave out calls at
        later steps. stride "exact": jump from each t to the next, from the last to -1, clean. "official": calls at
        every (T // steps)-th t and at 0; x_t is taken for x_{t - skip}, and goes back one step.
        Raises ValueError for a number of steps that the chain has not. Source: VQ-Diffusion §4.2 and its code.
        """
        T = self.steps
        if isinstance(steps, int) and not 1 <= steps <= T:
            raise ValueError(f"this chain has {T} steps: sample in 1 to {T} of them, not {steps}")
        if not isinstance(steps, int):
            times = list(steps)
        elif stride == "exact":
            times = [round(T * (1 - i / steps)) - 1 for i in range(steps)]
        else:
            times = sorted({0, *range(T - 1, -1, -(T // steps))}, reverse=True)
        times = [t for t in times if first is None or t <= first] or [first]
        if stride == "exact":
            return list(zip(times, times, [*times[1:], -1]))
        skip = times[0] - times[1] - 1 if len(times) > 1 else 0
        early = [t - skip if t > skip else t for t in times]
        return [(t, e, e - 1) for t, e in zip(times, early)]

    def reveal(self, p0, xt, count, sampler="purity", purity=1.0, generator=None):
        """Replace count (B,) of the [MASK]s in xt (B, N) by codes drawn from p0 (B, N, K+1) -> (B, N).

        "fewer": anywhere; "purity": rather where the network is sure, and there with a sharper distribution, raised to
        1 + purity * sureness. Tokens already there stay. Source: Improved §3.2, Eq. 9-11.
        """
        top = p0.amax(-1)                                                                   # (B, N)
        sure = top / (top.amax(1, keepdim=True) + 1e-10) if sampler == "purity" else torch.ones_like(top)
        power = 1 + purity * sure[..., None] if sampler == "purity" else 1.0
        drawn = race(p0 ** power, rand(p0.shape, generator, p0.device))
        place = torch.where(xt == self.num_codes, sure / -torch.log(rand(xt.shape, generator, xt.device)), -1.0)
        rank = place.argsort(1, descending=True).argsort(1)                                 # (B, N)
        return torch.where((rank < count[:, None]) & (xt == self.num_codes), drawn, xt)

    def _begin(self, shape, first, fewer, x_init, mask, strength, generator, device):
        """The tokens (B, N) that a walk begins with: the chain's end, or x_init as noisy as step `first`."""
        if strength < 1:
            t = torch.full(shape[:1], first, device=device)
            xt = self.q_sample(x_init, t, rand((*shape, 2), generator, device))
        elif fewer:                                             # one-way: a random code could never be taken back
            xt = torch.full(shape, self.num_codes, device=device)
        else:
            xt = self.prior(shape, generator, device)
        return xt if mask is None else torch.where(mask > 0.5, xt, x_init)

    @torch.no_grad()
    def trajectory(self, model, shape, cond=None, uncond=None, sampler="posterior", steps=25, cfg_scale=1.0,
                   truncation=1.0, top_k=None, stride="exact", purity=1.0, x_init=None, mask=None, strength=1.0,
                   start=None, generator=None, device="cpu"):
        """Walk from noise to codes, yielding (xt, likeliest x0), both (B, N), after every step; arguments: `sample`.

        Source: VQ-Diffusion algorithm 2; Improved algorithm 1.
        """
        self._check(sampler, steps, shape, stride, x_init, mask, strength)
        denoise, fewer = guided(model, cond, uncond, cfg_scale), sampler != "posterior"
        first = max(0, round(strength * self.steps) - 1)
        jumps = [(first, None, None)] * steps if fewer else self.jumps(steps, stride, first)
        xt = start
        if start is None:
            xt = self._begin(shape, jumps[0][0], fewer, x_init, mask, strength, generator, device)
        masked = total = (xt == self.num_codes).sum(1)                                      # (B,)
        gamma_bar = self.gamma_bar[:-1].float().to(device)                                  # (T,)
        for call, (seen, t, s) in enumerate(jumps):
            if fewer:                                           # the step at which the chain has so many [MASK]s
                at = (masked[:, None] / shape[1] - gamma_bar).abs().argmin(1)               # (B,)
            else:
                at = torch.full(shape[:1], seen, device=device)
            p0 = self.guess(denoise(xt, at, 1 - call / len(jumps)), truncation, top_k)      # (B, N, K+1)
            if fewer:
                left = total * (steps - 1 - call) // steps                                  # (B,)
                xt, masked = self.reveal(p0, xt, masked - left, sampler, purity, generator), left
            else:
                xt = race(self.posterior(p0, xt, t, s), rand(p0.shape, generator, device))
                xt = xt if mask is None else torch.where(mask > 0.5, xt, x_init)            # known tokens come back
            yield xt, p0.argmax(-1)

    def _check(self, sampler, steps, shape, stride, x_init, mask, strength):
        """Refuse arguments that clash, in one sentence."""
        if sampler not in self.samplers or stride not in ("exact", "official"):
            raise ValueError(f"unknown sampler {sampler!r} or stride {stride!r}: samplers are "
                             f"{', '.join(self.samplers)}; strides exact and official")
        if x_init is None and (mask is not None or strength < 1):
            raise ValueError("inpainting (mask) and image-to-image (strength < 1) need x_init, the known tokens")
        if not 0 < strength <= 1:
            raise ValueError(f"strength is how much to redraw, above 0 and at most 1, not {strength}")
        if sampler != "posterior" and self.gamma_bar.max() == 0:
            raise ValueError(f"sampler {sampler!r} fills in [MASK]s, and this schedule has none: use posterior")
        if sampler != "posterior" and not 1 <= steps <= shape[1]:
            raise ValueError(f"sampler {sampler!r} fills in {shape[1]} tokens: in 1 to {shape[1]} steps, not {steps}")

    def sample(self, model, shape, cond=None, uncond=None, **options):
        """Draw tokens -> (B, N) int64 = shape, all of them codes.

        sampler: "posterior"; or, one-way, each call filling in its share of the [MASK]s: "fewer" (anywhere) and
        "purity" (where the network is sure; purity = r of Improved Eq. 11, 0.5-2). steps: network calls, at most T, or
        N for the latter two. cfg_scale: guidance of the guess, g = u + s (c - u), 1 = none (Improved's s is one less).
        truncation and top_k: see guess. stride: "exact", or "official" (the released approximation). x_init (B, N) with
        mask (B, N), 1 = paint here: inpainting; x_init with strength in (0, 1): start from it, as noisy as that.
        start: tokens to begin with, instead of the chain's end. generator: one, or a list with one per sample; device.
        Raises ValueError for arguments that clash. Source: VQ-Diffusion algorithm 2; Improved §3.
        """
        for x, _ in self.trajectory(model, shape, cond, uncond, **options):
            pass
        return x


# ----------------------------------------------------------------------------------------------------------------------
# the network

class AdaLayerNorm(nn.Module):
    """LayerNorm whose scale and shift depend on an index: a step t or a class y.

    count: number of steps or classes; table: look the index up in a learned table, or else in a sinusoid of it.
    Source: VQ-Diffusion §4.3 (AdaLN).
    """

    def __init__(self, hidden_size, count, table=True):
        super().__init__()
        self.count = count
        self.emb = nn.Embedding(count, hidden_size) if table else None
        self.linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.layernorm = nn.LayerNorm(hidden_size, elementwise_affine=False)

    def sinusoid(self, t):
        """t (B,) -> (B, D), stretched to 0..4000: first all sines, then all cosines. Source: VQ-Diffusion's code."""
        half = self.linear.in_features // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
        args = (t / self.count * 4000)[:, None] * frequencies                               # (B, D/2)
        return torch.cat([args.sin(), args.cos()], dim=-1).to(self.linear.weight.dtype)

    def forward(self, x, index):
        emb = self.sinusoid(index) if self.emb is None else self.emb(index)                 # (B, D)
        scale, shift = self.linear(F.silu(emb))[:, None].chunk(2, dim=-1)                   # 2x (B, 1, D)
        return self.layernorm(x) * (1 + scale) + shift


class Attention(nn.Module):
    """Tokens x (B, N, D) read context (B, L, C), or each other -> (B, N, D). Source: Vaswani et al. 2017."""

    def __init__(self, hidden_size, num_heads, context_dim=None):
        super().__init__()
        self.num_heads = num_heads
        self.key, self.value = (nn.Linear(context_dim or hidden_size, hidden_size) for _ in range(2))
        self.query, self.proj = (nn.Linear(hidden_size, hidden_size) for _ in range(2))

    def forward(self, x, context=None):
        B, N, D = x.shape
        context = x if context is None else context
        heads = lambda y: y.view(B, -1, self.num_heads, D // self.num_heads).transpose(1, 2)
        q, k, v = heads(self.query(x)), heads(self.key(context)), heads(self.value(context))    # (B, h, N or L, d)
        x = F.scaled_dot_product_attention(q, k, v)                                         # (B, h, N, d)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))                                # (B, N, D)


class GELU2(nn.Module):
    """x sigmoid(1.702 x), a cheap GELU. Source: CLIP's code, taken over by VQ-Diffusion's."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ConvMlp(nn.Module):
    """The MLP as two 3x3 convolutions over the grid of tokens, (B, N, D) -> (B, N, D). Source: VQ-Diffusion §5.1."""

    def __init__(self, hidden_size, mlp_hidden, grid):
        super().__init__()
        self.grid, self.act = grid, GELU2()
        self.conv1 = nn.Conv2d(hidden_size, mlp_hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(mlp_hidden, hidden_size, 3, padding=1)

    def forward(self, x):
        x = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))                          # (B, D, g, g)
        return self.conv2(self.act(self.conv1(x))).flatten(2).transpose(1, 2)               # (B, N, D)


class Block(nn.Module):
    """Self-attention, then (text) cross-attention, then MLP; before each a norm that knows t, or (class) y.

    condition: "text", "class" or "none". Source: VQ-Diffusion §4.3, figure 2.
    """

    def __init__(self, hidden_size, num_heads, steps, condition, context_dim, num_labels, mlp, mlp_ratio, table, grid):
        super().__init__()
        self.condition, hidden = condition, int(mlp_ratio * hidden_size)
        self.ln1 = AdaLayerNorm(hidden_size, steps, table)
        self.ln2 = AdaLayerNorm(hidden_size, num_labels) if condition == "class" else nn.LayerNorm(hidden_size)
        if condition == "text":
            self.attn1 = Attention(hidden_size, num_heads)
            self.attn2 = Attention(hidden_size, num_heads, context_dim)
            self.ln1_1 = AdaLayerNorm(hidden_size, steps, table)
        else:
            self.attn = Attention(hidden_size, num_heads)
        self.mlp = ConvMlp(hidden_size, hidden, grid) if mlp == "conv" else nn.Sequential(
            nn.Linear(hidden_size, hidden), GELU2(), nn.Linear(hidden, hidden_size))

    def forward(self, x, t, cond):
        if self.condition == "text":
            x = x + self.attn1(self.ln1(x, t))
            x = x + self.attn2(self.ln1_1(x, t), cond)
        else:
            x = x + self.attn(self.ln1(x, t))
        return x + self.mlp(self.ln2(x, cond) if self.condition == "class" else self.ln2(x))


class TokenEmbed(nn.Module):
    """Tokens (B, N), [MASK] included -> (B, N, D): a code's vector, plus its row's, plus its column's.

    rows: side of the position tables; they are flattened row by row, and token l gets their l-th sum, which is its true
    place only if rows = grid. Source: VQ-Diffusion §4.3 (positions).
    """

    def __init__(self, num_codes, rows, hidden_size):
        super().__init__()
        self.emb = nn.Embedding(num_codes + 1, hidden_size)
        self.height_emb, self.width_emb = nn.Embedding(rows, hidden_size), nn.Embedding(rows, hidden_size)

    def forward(self, tokens):
        places = self.height_emb.weight[:, None] + self.width_emb.weight[None]              # (rows, rows, D)
        return self.emb(tokens) + places.flatten(0, 1)[:tokens.shape[1]]                    # (B, N, D)


class VQTransformer(nn.Module):
    """Guesses clean tokens from noisy ones: (B, N) with [MASK] = num_codes, t (B,), condition -> logits (B, N, K).

    num_codes: K; grid: N = grid^2; steps: T of the chain; condition: "text" (B, L, context_dim), "class" (B,) or "none"
    (it is ignored). num_classes; class_dropout_prob: how often training hides the condition, > 0 adds the null class
    num_classes; null_length: > 0 adds a learned text of so many vectors, which stands in for a hidden one ("learnable"
    guidance; otherwise the caller encodes an empty caption). mlp: "fc" or "conv"; time: "table" or "sinusoid";
    position_grid: side of the position tables, if not grid, as the released ImageNet model has it.
    Raises ValueError for sizes or names that do not fit. Source: VQ-Diffusion §4.3; Improved §3.1.
    """

    matrices = r"blocks\.\d+\.(attn\d?|mlp|ln\w*\.linear)"      # Muon's share in train.py; its tables stay with AdamW

    def __init__(self, num_codes=256, grid=8, hidden_size=128, depth=4, num_heads=4, steps=100, condition="text",
                 context_dim=64, num_classes=0, class_dropout_prob=0.1, null_length=0, mlp="fc", mlp_ratio=4,
                 time="table", position_grid=None):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not divisible by num_heads {num_heads}: change one of them")
        for value, legal in ((condition, ("text", "class", "none")), (mlp, ("fc", "conv")),
                             (time, ("table", "sinusoid"))):
            if value not in legal:
                raise ValueError(f"unknown {value!r}: choose one of {', '.join(legal)}")
        if (position_grid or grid) < grid:
            raise ValueError(f"position_grid {position_grid} is smaller than the grid of {grid} x {grid} tokens")
        self.num_codes, self.grid, self.steps, self.condition = num_codes, grid, steps, condition
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.content_emb = TokenEmbed(num_codes, position_grid or grid, hidden_size)
        labels = num_classes + (class_dropout_prob > 0)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, steps, condition, context_dim, labels, mlp, mlp_ratio,
                                          time == "table", grid) for _ in range(depth))
        self.to_logits = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, num_codes))
        if null_length:
            self.empty_text_embed = nn.Parameter(torch.empty(null_length, context_dim))
        self.initialize_weights()

    def initialize_weights(self):
        """Every initial value of the model, in one place. Source: VQ-Diffusion's code.

        | what                    | how                    | why                                             |
        | Linear layers, tables   | normal(0, 0.02)        | GPT's; time tables too: AdaLN starts near plain |
        | biases; LayerNorms      | 0; scale 1             |                                                 |
        | convolutions            | torch's default        | as published                                    |
        | learned empty text      | normal(0, 1)           | about the size of encoded text                  |
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if hasattr(self, "empty_text_embed"):
            nn.init.normal_(self.empty_text_embed)

    def null_condition(self, count, device="cpu"):
        """What guidance compares with: the null class (count,), or the learned empty text (count, L, context_dim).

        Raises ValueError for text without null_length: encode an empty caption instead. Source: Improved §3.1.
        """
        if self.condition != "text":
            return torch.full((count,), self.num_classes, device=device)
        if not hasattr(self, "empty_text_embed"):
            raise ValueError("this model has no learned empty text: encode an empty caption, or give it a null_length")
        return self.empty_text_embed.to(device).expand(count, -1, -1)

    def drop_labels(self, y, draws):
        """Hide conditions y (B, ...) where draws (B,), uniform in [0, 1), fall below class_dropout_prob.

        Source: Improved §3.1.
        """
        hide = (draws < self.class_dropout_prob).view(-1, *[1] * (y.dim() - 1))             # (B, 1, ...)
        return torch.where(hide, self.null_condition(len(y), y.device), y)

    def forward(self, tokens, t, cond=None):
        """tokens (B, N), t (B,) steps 0..T-1, condition -> logits of x_0 (B, N, K). Source: VQ-Diffusion figure 2."""
        x = self.content_emb(tokens)                                                        # (B, N, D)
        for block in self.blocks:
            x = block(x, t, cond)
        return self.to_logits(x)                                                            # (B, N, K)


def official_state(state, learnable=False):
    """The denoiser's part of a published file, under the names of VQTransformer, ready for load_state_dict.

    state: the whole file {"model", "ema", ...}, of which the average is taken, or one of its dicts. Left behind: the
    codec, CLIP, the schedule's buffers, and an unused triangular mask per block. learnable: also take the empty text,
    which every file has, but only those named "learnable" have trained; for a model with null_length=77.
    Raises ValueError if no tensor of the denoiser is there. Source: VQ-Diffusion's code.
    """
    state = state.get("ema") or state.get("model") or state
    names = {name: name.rsplit("transformer.", 1)[-1] for name in state}
    wanted = ("content_emb.", "blocks.", "to_logits.") + ("empty_text_embed",) * learnable
    kept = {new: state[old].float() for old, new in names.items()
            if new.startswith(wanted) and not new.endswith("attn2.mask")}
    if not kept:
        raise ValueError("no denoiser of VQ-Diffusion in there: no name contains content_emb., blocks. or to_logits.")
    return kept


# name -> arguments of VQTransformer. The paper's: S (by its count), B (COCO, CUB-200), L (ITHQ), and two without text
VQ_CONFIGS = {
    "vq-tiny": dict(hidden_size=128, depth=4, num_heads=4),
    "vq-small": dict(hidden_size=192, depth=6, num_heads=6),
    "VQ-S": dict(num_codes=2887, grid=32, hidden_size=192, depth=18, num_heads=16, context_dim=512, mlp="conv",
                 mlp_ratio=2),
    "VQ-B": dict(num_codes=2887, grid=32, hidden_size=1024, depth=19, num_heads=16, context_dim=512),
    "VQ-L": dict(num_codes=4096, grid=32, hidden_size=1408, depth=36, num_heads=16, context_dim=512),
    "VQ-ImageNet": dict(num_codes=974, grid=16, hidden_size=512, depth=24, num_heads=16, condition="class",
                        num_classes=1000, class_dropout_prob=0.0, mlp="conv", position_grid=32),
    "VQ-FFHQ": dict(num_codes=1024, grid=16, hidden_size=512, depth=20, num_heads=16, condition="none",
                    class_dropout_prob=0.0, mlp="conv")}
