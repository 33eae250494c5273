"""VQ-Diffusion: a diffusion process on codes, which are masked and replaced instead of noised.

Papers: Vector Quantized Diffusion Model for Text-to-Image Synthesis (Gu et al. 2022); Improved
Vector Quantized Diffusion Models (Tang et al. 2022, arXiv 2205.16007), here "Improved".

The idea.  A VQ-VAE (vae.py) turns a picture into N tokens, each one of K codes. Codes have no
order, so noise cannot be added to them. Instead step t of the process changes every token:
  mask     with probability gamma_t it becomes [MASK], an extra state with index K, and stays so,
  replace  with probability K beta_t it becomes a random code,
  keep     with probability alpha_t it stays as it is.
A transformer reads all tokens and predicts p(x_0 | x_t) for each of them at once. Bayes' rule turns
that into a step back, p(x_s | x_t), for any s < t. A [MASK] marks an unknown token; random
replacements also force the network to re-check unmasked tokens.

    python train.py --model vq-tiny --data scenes     # a VQ-VAE, then text to image on its tokens

Differences from the official code (microsoft/VQ-Diffusion):
1. Schedule: the paper's, [MASK] up to 0.9. The released one, up to 0.99999, hardly ever replaces.
2. Posterior in probabilities, not logarithms, equal to float32 rounding. t is drawn uniformly.
3. Fast sampling is exact, from the end of the chain, not from [MASK] alone (the released way:
   studies/vq_chain.py). "fewer" and "purity" take any number of steps. Inpainting.
4. Code vectors start from the codebook; small models have relative positions too (VQTransformer).
5. The text encoder is small and learns too; there it is CLIP, frozen, with states of length 1."""
import math
from collections import namedtuple
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion import GaussianDiffusion, check_name, check_options, guided, rand
from dit import DiT
from text import TextEncoder, WordTokenizer
from udit import rope_table, rotate

# name -> (alpha_bar_1, alpha_bar_T, gamma_bar_1, gamma_bar_T): kept, masked after 1 and T steps
SCHEDULES = {"paper": (0.99999, 9e-6, 9e-6, 0.9), "released": (0.99999, 9e-6, 9e-6, 0.99999),
             "mask-only": (0.99999, 9e-6, 1e-5, 0.999991), "replace-only": (0.99999, 9e-6, 0, 0)}
# chances of "keep", "become one given code" and "become [MASK]": from step s to step t (Eq. 7),
# from the clean tokens to t, and from the clean tokens to s (Eq. 8); each (B, 1, 1)
Jump = namedtuple("Jump", "alpha beta gamma alpha_bar_t beta_bar_t gamma_bar_t "
                          "alpha_bar_s beta_bar_s gamma_bar_s")
# the options that every sampler reads, with defaults; meanings: MaskReplace.trajectory
SAMPLING = dict(cfg_scale=1.0, truncation=1.0, x_init=None, mask=None, strength=1.0, start=None,
                generator=None, device="cpu")


class MaskReplace:
    """The chain x_0 -> x_t on tokens 0..K-1 and [MASK] = K, its loss and samplers; no parameters.
    steps: T; t = 0..T-1 are the paper's 1..T, t = -1 is clean. num_codes: K. schedule: a name in
    SCHEDULES, or a tuple of four. aux_weight: lambda of Eq. 12; short runs want 1, because the
    bound weighs mostly the steps with few [MASK]s. Public: alpha_bar, beta_bar, gamma_bar (T+1,)
    float64, linear in t; the last is "clean": 1, 0, 0. Source: VQ-Diffusion §4.1, Eq. 7-9."""
    samplers, default_sampler = ("posterior", "fewer", "purity"), "posterior"
    default_steps = dict.fromkeys(samplers, 25)
    options = dict.fromkeys(samplers, frozenset(SAMPLING)) | {"purity": {*SAMPLING, "purity"}}
    sample = GaussianDiffusion.sample           # the last tokens of trajectory, all of them codes

    def __init__(self, steps=100, num_codes=256, schedule="paper", aux_weight=5e-4):
        if isinstance(schedule, str):
            check_name("schedule", schedule, SCHEDULES)
        self.steps, self.num_codes, self.aux_weight = steps, num_codes, aux_weight
        a_1, a_T, g_1, g_T = SCHEDULES.get(schedule, schedule)
        clean, way = torch.ones(1).double(), torch.arange(steps).double() / (steps - 1)  # (T,) 0..1
        self.alpha_bar = torch.cat([a_1 + (a_T - a_1) * way, clean])            # (T+1,)
        self.gamma_bar = torch.cat([g_1 + (g_T - g_1) * way, 0 * clean])        # (T+1,)
        self.beta_bar = self._per_code(1 - self.alpha_bar - self.gamma_bar)     # (T+1,)
        # the numbers of Jump for all t and s < t, (9, T, T+1); the last s is -1
        t, s = torch.arange(steps)[:, None], torch.arange(steps + 1)[None]
        t, s = torch.broadcast_tensors(t, torch.where(s < t, s, -1))            # 2x (T, T+1)
        bars = torch.stack([self.alpha_bar, self.beta_bar, self.gamma_bar])     # (3, T+1)
        self._jumps = torch.stack([*self.transition(t, s), *bars[:, t], *bars[:, s]]).float()

    def q_sample(self, x0, t, u):
        """x0 (B, N) after step t (B,), given uniforms u (B, N, 2) -> xt (B, N). Source: Eq. 8."""
        K, jump = self.num_codes, self._jump(t, t - 1, x0.device)
        mask, replace = jump.gamma_bar_t[..., 0], K * jump.beta_bar_t[..., 0]   # 2x (B, 1)
        code = (u[..., 1] * K).long()                                           # (B, N), below K
        xt = torch.where(u[..., 0] < mask + replace, code, x0)
        return torch.where(u[..., 0] < mask, K, xt)                             # (B, N)

    def posterior(self, p0, xt, t, s=None):
        """p(x_s | x_t) = sum over x_0 of q(x_s | x_t, x_0) p0(x_0), (B, N, K+1), for any s < t.
        p0 (B, N, K+1): the prediction, 0 at [MASK]. xt (B, N). t, s: (B,) or ints; None = t - 1.
        With r_k = p0_k / q(x_t | x_0 = k) and R, the sum of r_k over the codes k, Eq. 5 and 11 are
            p(x_s = k | x_t) = q(x_t | x_s = k) (alpha_bar_s r_k + beta_bar_s R)  for a code k,
            p(x_s = [MASK] | x_t) = gamma_bar_s R                                 if x_t is [MASK].
        Both q are equal for all codes k but x_t. Source: VQ-Diffusion Eq. 5, 11; §4.2 (jumps)."""
        jump = self._jump(t, t - 1 if s is None else s, xt.device)
        xt, masked = xt[..., None], xt[..., None] == self.num_codes             # 2x (B, N, 1)
        p_xt, others = p0.gather(-1, xt), p0.scatter(-1, xt, 0.0)               # others (B, N, K+1)
        p_others = others.sum(-1, keepdim=True)     # 1 - p_xt would round small probabilities away
        q_jump = torch.where(masked, jump.gamma, jump.beta)                     # q(x_t | x_s = k)
        q_all = torch.where(masked, jump.gamma_bar_t, jump.beta_bar_t)          # q(x_t | x_0 = k)
        inverse = torch.where(q_all > 0, 1 / q_all, 0.0)
        r_xt = p_xt / (jump.alpha_bar_t + jump.beta_bar_t)
        R = inverse * p_others + r_xt
        stay = (jump.alpha + jump.beta) * (jump.alpha_bar_s * r_xt + jump.beta_bar_s * R)
        stay = torch.where(q_all > 0, stay, p_xt + p_others)    # 0: no code is ever replaced
        at_xt = torch.where(masked, jump.gamma_bar_s * R, stay)
        slope, offset = q_jump * jump.alpha_bar_s * inverse, q_jump * jump.beta_bar_s * R
        out = torch.addcmul(offset, slope, others)                              # (B, N, K+1)
        out[..., -1] = 0        # if x_t is a code, x_s was not [MASK]; else the next line sets it
        return out.scatter_(-1, xt, at_xt)

    def draw(self, shape, generator=None, device="cpu"):
        """The random numbers of a step for tokens (B, N) = shape: {"t" (B,), "u" (B, N, 2)}."""
        return {"t": (rand(shape[:1], generator, device) * self.steps).long(),
                "u": rand((*shape, 2), generator, device)}

    def loss(self, model, x0, cond=None, *, t, u):
        """The bound + weight * cross-entropy of x_0, nats per token -> (scalar, {"vlb", "ce"}).
        Source: VQ-Diffusion Eq. 6, 12; the weight falling with t from 2 aux_weight: its code."""
        xt = self.q_sample(x0, t, u)
        p0 = self.guess(model(xt, t, cond))                                     # (B, N, K+1)
        kl, ce = self.kl(p0, x0, xt, t), -(p0.gather(-1, x0[..., None]) + 1e-30).log()[..., 0]
        # T times one of the bound's T terms
        loss = self.steps * (kl + self.aux_weight * (2 - t / self.steps)[:, None] * ce).mean()
        return loss, {"vlb": self.steps * kl.detach().mean(), "ce": ce.detach().mean()}

    def kl(self, p0, x0, xt, t):
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), (B, N) nats. Source: Eq. 6."""
        q = self.posterior(F.one_hot(x0, self.num_codes + 1).float(), xt, t)    # (B, N, K+1)
        log_p = (self.posterior(p0, xt, t) + 1e-30).log()                       # (B, N, K+1)
        return (torch.xlogy(q, q) - q * log_p).sum(-1)

    def guess(self, logits, truncation=1.0):
        """Logits (B, N, K) -> p(x_0 | x_t) over K+1 states, (B, N, K+1) float32, 0 at [MASK].
        truncation: keep of each token the most likely codes, as few as reach this sum; the others
        become 0, without rescaling. Source: VQ-Diffusion §4.2."""
        p = F.pad(logits.float(), (0, 1), value=-math.inf).softmax(-1)          # (B, N, K+1)
        if truncation >= 1:
            return p
        p, order = p.sort(-1, descending=True)
        keep = p.cumsum(-1) - p < truncation                # the sum of all more likely codes
        return torch.zeros_like(p).scatter(-1, order, p * keep)

    @torch.no_grad()
    def trajectory(self, model, shape, cond=None, uncond=None, sampler=None, steps=None, **options):
        """Yields (xt, likeliest x0) after each network call, both (B, N) = shape.
        sampler: "posterior", or "fewer" and "purity", which only fill in [MASK]s, equally many per
        call: "fewer" anywhere, "purity" mostly where the network is sure. steps: calls, at most T,
        for the latter two N; None: 25. cfg_scale: guidance of the logits, Improved's s + 1.
        truncation: see guess. x_init (B, N) with mask (B, N), 1 = paint here: inpainting; with
        strength < 1: start from x_init after that share of the chain. start (B, N): the first
        tokens. Source: VQ-Diffusion algorithm 2; Improved §3, Eq. 11."""
        sampler = sampler or self.default_sampler
        check_options(self, sampler, options)
        o = SimpleNamespace(**SAMPLING | {"purity": 1.0 if sampler == "purity" else None} | options)
        jumps = self._plan(sampler, steps, shape[1], o)
        denoise = guided(model, cond, uncond, o.cfg_scale)
        xt = self._begin(sampler, jumps, shape, o)                              # (B, N)
        masked = total = (xt == self.num_codes).sum(1)                          # (B,)
        gamma_bar = self.gamma_bar[:-1].float().to(o.device)                    # (T,)
        for call, (shown, t, s) in enumerate(jumps):
            seen = torch.full(shape[:1], shown, device=o.device)                # (B,)
            if sampler != "posterior":          # the step at which the chain has so many [MASK]s
                seen = (masked[:, None] / shape[1] - gamma_bar).abs().argmin(1)
            p0 = self.guess(denoise(xt, seen), o.truncation)               # (B, N, K+1)
            if sampler == "posterior":
                p = self.posterior(p0, xt, t, s)                                # (B, N, K+1)
                xt = race(p, rand(p.shape, o.generator, o.device))
                xt = xt if o.mask is None else torch.where(o.mask > 0.5, xt, o.x_init)
            else:                               # equally many [MASK]s per call become codes
                left = total * (len(jumps) - 1 - call) // len(jumps)            # (B,)
                xt, masked = self.reveal(p0, xt, masked - left, o.purity, o.generator), left
            yield xt, p0.argmax(-1)

    def reveal(self, p0, xt, count, purity=None, generator=None):
        """Replace count (B,) of the [MASK]s in xt (B, N) by codes from p0 (B, N, K+1). purity r:
        mostly where p0 is sure, from p0^(1 + r sure); None: anywhere. Source: Improved Eq. 9-11."""
        top = p0.amax(-1)                                                       # (B, N)
        sure = torch.ones_like(top) if purity is None else top / (top.amax(1, keepdim=True) + 1e-10)
        p = p0 ** (1 + (purity or 0.0) * sure[..., None])                       # (B, N, K+1)
        code = race(p, rand(p.shape, generator, p.device))                      # (B, N)
        # `count` places without replacement: the first of exponential times of rate `sure`
        time = -torch.log(rand(xt.shape, generator, xt.device)) / sure          # (B, N)
        rank = torch.where(xt == self.num_codes, time, math.inf).argsort(1).argsort(1)
        return torch.where((rank < count[:, None]) & (xt == self.num_codes), code, xt)

    def jumps(self, steps, first=None):
        """What each network call does, noisiest first: [(t of network, t of posterior, s), ...].
        steps: so many, evenly over the chain; first: none at t > first. Source: §4.2."""
        times = [round(self.steps * (1 - i / steps)) - 1 for i in range(steps)]
        times = [t for t in times if first is None or t <= first] or [first]
        return list(zip(times, times, [*times[1:], -1]))

    def _plan(self, sampler, steps, N, o):
        """The jumps of a run, one per network call; "fewer" and "purity" count them."""
        first = max(0, round(o.strength * self.steps) - 1)
        most = self.steps if sampler == "posterior" else N
        steps = min(self.default_steps[sampler], most) if steps is None else steps
        if not isinstance(steps, int) or not 1 <= steps <= most:
            raise ValueError(f"{sampler} takes 1 to {most} steps, not {steps!r}")
        if sampler != "posterior" and self.gamma_bar.max() == 0:
            raise ValueError(f"{sampler} fills in [MASK]s, this schedule has none: use posterior")
        return self.jumps(steps, first) if sampler == "posterior" else [(first, None, None)] * steps

    def _begin(self, sampler, jumps, shape, o):
        """Tokens (B, N) to start from: the chain's end (Eq. 9), or x_init at the first step."""
        if o.start is not None:
            return o.start
        u = rand((*shape, 2), o.generator, o.device)                            # (B, N, 2)
        rate = self.gamma_bar[self.steps - 1].item() if sampler == "posterior" else 1.0
        xt = torch.where(u[..., 0] < rate, self.num_codes, (u[..., 1] * self.num_codes).long())
        if o.strength < 1:
            xt = self.q_sample(o.x_init, torch.full(shape[:1], jumps[0][0], device=o.device), u)
            # what was replaced these two would never revise
            xt = xt if sampler == "posterior" else torch.where(xt == o.x_init, xt, self.num_codes)
        return xt if o.mask is None else torch.where(o.mask > 0.5, xt, o.x_init)

    def transition(self, t, s):
        """alpha, beta, gamma of the jump from s to t (indices), float64. Source: Eq. 7 and 8."""
        alpha = self.alpha_bar[t] / self.alpha_bar[s]
        gamma = 1 - (1 - self.gamma_bar[t]) / (1 - self.gamma_bar[s])
        return alpha, self._per_code(1 - alpha - gamma), gamma

    def _per_code(self, replaced):
        """Chance of any replacement -> of each code; below 1e-12 it is a rounding error, made 0."""
        assert replaced.min() > -1e-12, "alpha_bar must fall at least as fast as 1 - gamma_bar"
        return torch.where(replaced < 1e-12, 0.0, replaced) / self.num_codes

    def _jump(self, t, s, device):
        """The Jump from s to t, both (B,) or ints, with entries (B or 1, 1, 1)."""
        self._jumps = self._jumps.to(device)                        # copied by the first call only
        return Jump(*self._jumps[:, t, s].reshape(9, -1, 1, 1))


def race(p, u):
    """An index drawn from p (..., S), of any sum, with uniforms u. Source: VQ-Diffusion's code."""
    # -log(u) / p_k is exponential with rate p_k; the smallest is k with probability p_k / sum(p)
    return (p / -torch.log(u)).argmax(-1)


class AdaLayerNorm(nn.Module):
    """LayerNorm of x (B, N, D); scale and shift depend on an index (B,), a step or a class, below
    count: a table has a learned vector for each. Source: VQ-Diffusion §4.3 (AdaLN)."""

    def __init__(self, hidden_size, count):
        super().__init__()
        self.emb = nn.Embedding(count, hidden_size)
        self.linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.layernorm = nn.LayerNorm(hidden_size, elementwise_affine=False)

    def forward(self, x, index):
        scale, shift = self.linear(F.silu(self.emb(index)))[:, None].chunk(2, -1)  # 2x (B, 1, D)
        return self.layernorm(x) * (1 + scale) + shift


class Attention(nn.Module):
    """Tokens (B, N, D) attend to context (B, L, C) or to each other; grid, relative: as in
    VQTransformer. Source: Vaswani 2017 Eq. 1; Su et al. 2021 Eq. 16; Swin §3.2 (the bias)."""

    def __init__(self, hidden_size, num_heads, context_dim=None, grid=0, relative=False):
        super().__init__()
        self.num_heads, self.relative, C = num_heads, relative, context_dim or hidden_size
        self.key, self.value = nn.Linear(C, hidden_size), nn.Linear(C, hidden_size)
        self.query, self.proj = (nn.Linear(hidden_size, hidden_size) for _ in range(2))
        if relative:        # the fastest pair of channels turns by 90 degrees per cell
            place, side, d = torch.arange(grid), 2 * grid - 1, hidden_size // num_heads
            self.register_buffer("angles", rope_table(place * math.pi / 2, d, 16.0), False)
            # of key and query, (N, N): how many rows and columns apart, as one number
            row, column = (u - u[:, None] + grid - 1 for u in torch.cartesian_prod(place, place).T)
            self.register_buffer("offset", row * side + column, False)          # not in files
            self.bias = nn.Parameter(torch.zeros(num_heads, side ** 2))

    def forward(self, x, context=None):
        context, bias = x if context is None else context, None
        q, k, v = (u.unflatten(2, (self.num_heads, -1))                         # (B, N or L, h, d)
                   for u in (self.query(x), self.key(context), self.value(context)))
        if self.relative:
            q, k = (rotate(u.float(), self.angles).to(v.dtype) for u in (q, k))
            bias = self.bias[:, self.offset].to(v.dtype)                        # (h, N, N)
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))                        # (B, h, N or L, d)
        x = F.scaled_dot_product_attention(q, k, v, bias)                       # (B, h, N, d)
        return self.proj(x.transpose(1, 2).flatten(2))                          # (B, N, D)


class GELU2(nn.Module):
    """x sigmoid(1.702 x), a cheap GELU. Source: CLIP's code, as in VQ-Diffusion's."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ConvMlp(nn.Module):
    """Two 3x3 convolutions over the grid of tokens, (B, N, D). Source: VQ-Diffusion §5.1."""

    def __init__(self, hidden_size, mlp_hidden, grid):
        super().__init__()
        self.grid, self.act = grid, GELU2()
        self.conv1 = nn.Conv2d(hidden_size, mlp_hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(mlp_hidden, hidden_size, 3, padding=1)

    def forward(self, x):
        x = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))              # (B, D, g, g)
        return self.conv2(self.act(self.conv1(x))).flatten(2).transpose(1, 2)   # (B, N, D)


class Block(nn.Module):
    """Self-attention, cross-attention (text only), MLP, each after a norm, and added to x.
    norm_t depends on t, norm_y on the class if there is one. Source: VQ-Diffusion Figure 2."""

    def __init__(self, condition, attention, cross_attention, norm_t, norm_y, mlp):
        super().__init__()
        self.condition, self.ln1, self.ln2, self.mlp = condition, norm_t(), norm_y(), mlp()
        if condition == "text":
            self.attn1, self.attn2, self.ln1_1 = attention(), cross_attention(), norm_t()
        else:
            self.attn = attention()

    def forward(self, x, t, cond):
        if self.condition == "text":
            x = x + self.attn1(self.ln1(x, t))
            x = x + self.attn2(self.ln1_1(x, t), cond)
        else:
            x = x + self.attn(self.ln1(x, t))
        return x + self.mlp(self.ln2(x, cond) if self.condition == "class" else self.ln2(x))


class VQTransformer(nn.Module):
    """Predicts clean tokens: noisy ones (B, N), t (B,), condition -> logits (B, N, K).
    num_codes: K, so [MASK] = K; grid: N = grid^2; steps: T; condition: "text" (B, L, context_dim),
    "class" (B,), or "none", not read; class_dropout_prob: of classes, as in DiT; mlp: "fc", "conv";
    relative: rotary angles and a learned bias per head and offset in self-attention, beside the
    published tables; codebook: the VQ-VAE's, to start code vectors; table: side of the tables of
    places, of which the first N are read (default: grid). Source: VQ-Diffusion §4.3."""
    matrices = r"blocks\.\d+\.(attn\d?\.(?!bias)|mlp|ln\w*\.linear)"  # Muon's share (optim.py)

    def __init__(self, num_codes=256, grid=8, hidden_size=128, depth=4, num_heads=4, steps=100,
                 condition="text", context_dim=64, num_classes=0, class_dropout_prob=0.1, mlp="fc",
                 mlp_ratio=4, relative=False, codebook=None, table=None):
        super().__init__()
        check_name("condition", condition, ("text", "class", "none"))
        check_name("mlp", mlp, ("fc", "conv"))
        self.num_codes, self.grid, self.steps, self.condition = num_codes, grid, steps, condition
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        rows = {"emb": num_codes + 1, "height_emb": table or grid, "width_emb": table or grid}
        self.content_emb = nn.ModuleDict({k: nn.Embedding(n, hidden_size) for k, n in rows.items()})
        self.can_guide = condition == "class" and num_classes > 0 and class_dropout_prob > 0
        D, wide = hidden_size, int(mlp_ratio * hidden_size)
        labels = num_classes + (class_dropout_prob > 0)
        attention = lambda: Attention(D, num_heads, None, grid, relative)
        cross_attention = lambda: Attention(D, num_heads, context_dim)
        fc = lambda: nn.Sequential(nn.Linear(D, wide), GELU2(), nn.Linear(wide, D))
        conv = lambda: ConvMlp(D, wide, grid)
        norm_t = lambda: AdaLayerNorm(D, steps)
        norm_y = lambda: AdaLayerNorm(D, labels) if condition == "class" else nn.LayerNorm(D)
        self.blocks = nn.ModuleList(Block(condition, attention, cross_attention, norm_t, norm_y,
                                          conv if mlp == "conv" else fc) for _ in range(depth))
        self.to_logits = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, num_codes))
        self.initialize_weights(codebook)

    @torch.no_grad()
    def initialize_weights(self, codebook=None):
        """Every initial value of the model. Source: VQ-Diffusion's code; the second row is ours.
        | what                  | how                    | why                                  |
        | Linear layers, tables | normal(0, 0.02)        | as in GPT; AdaLN is near a norm      |
        | vectors of the codes  | codebook * normal      | what looks alike starts alike        |
        | biases; LayerNorms    | 0; scale 1             |                                      |
        | convolutions          | torch's default        | as published                         |"""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if codebook is not None:
            codes, table = codebook.embedding, self.content_emb.emb.weight[:-1]     # (K, C or D)
            unit = (codes - codes.mean(0)) / (codes.std(0) + 1e-6) / codes.shape[1] ** 0.5
            random = 0.02 * torch.randn(codes.shape[1], table.shape[1])                 # (C, D)
            table.copy_(torch.where(codebook.started, unit @ random, table))

    def forward(self, tokens, t, cond=None):
        code, row, column = self.content_emb.values()
        places = (row.weight[:, None] + column.weight).flatten(0, 1)[:tokens.shape[1]]  # (N, D)
        x = code(tokens) + places                                               # (B, N, D)
        for block in self.blocks:
            x = block(x, t, cond)
        return self.to_logits(x)                                                # (B, N, K)

    null_condition, drop_labels = DiT.null_condition, DiT.drop_labels       # exactly as in DiT


class LearnedNull(TextEncoder):
    """A text encoder whose states of the empty caption are parameters. Source: Improved §3.1."""
    end = WordTokenizer.END             # the tokenizer's id

    def initialize_weights(self):
        super().initialize_weights()
        self.null = nn.Parameter(torch.randn(self.max_length, self.hidden_size))        # (L, C)

    def forward(self, ids, modifiers=None):
        empty = (ids[:, 1] == self.end)[:, None, None]              # right after the start
        return torch.where(empty, self.null, super().forward(ids, modifiers))   # (B, L, C)


# name -> arguments of VQTransformer. The paper's: S (by its count), B (COCO, CUB-200), L (ITHQ)
PUBLISHED = dict(grid=32, num_heads=16, context_dim=512)
SMALL_GRID = dict(PUBLISHED, grid=16, hidden_size=512, mlp="conv", class_dropout_prob=0)
VQ_CONFIGS = {
    "vq-tiny": dict(hidden_size=128, depth=4, num_heads=4),
    "vq-small": dict(hidden_size=192, depth=6, num_heads=6),
    "VQ-S": dict(PUBLISHED, num_codes=2887, hidden_size=192, depth=18, mlp="conv", mlp_ratio=2),
    "VQ-B": dict(PUBLISHED, num_codes=2887, hidden_size=1024, depth=19),
    "VQ-L": dict(PUBLISHED, num_codes=4096, hidden_size=1408, depth=36),
    "VQ-ImageNet": dict(SMALL_GRID, num_codes=974, depth=24, condition="class", num_classes=1000),
    "VQ-FFHQ": dict(SMALL_GRID, num_codes=1024, depth=20, condition="none")}
