"""The Gaussian diffusion process: how pictures become noise, and how a network brings them back.

Papers: DDPM (Ho et al. 2020), improved DDPM (Nichol & Dhariwal 2021), DDIM (Song et al. 2020), DPM-Solver++ (Lu et
al. 2022), classifier-free guidance (Ho & Salimans 2022), rectified flow (Liu et al. 2022).

The idea.  Take a clean picture x0 and mix in Gaussian noise eps, a little more at every step t:

    xt = sqrt(alpha_bar[t]) * x0 + sqrt(1 - alpha_bar[t]) * eps            (q_sample)

Ask a network to look at (xt, t) and say which eps was added. That is the whole training: a regression.
To draw a new picture start from pure noise, and at every step let the network guess eps, work out the x0 that it
implies, and move to the slightly less noisy picture between here and that x0. How far and how noisily to move is the
sampler: DDPM (random), DDIM (straight), DPM-Solver++ (straight, with a memory of the last step). A guess may be
stated as eps, as x0, or as v = sqrt(ab) eps - sqrt(1-ab) x0: given xt, each of the three gives the other two.

Contents: schedules, respacing, GaussianDiffusion (q, posterior, predictions, losses, bits per dim, samplers),
RectifiedFlow (the same interface on straight lines), guidance, timestep_embedding, LossSecondMoment
(importance-sampled t). A model is any callable model(xt, t, cond) -> (B, C or 2C, ...); this file holds no network
and knows nothing of images.

    process = GaussianDiffusion(steps=1000, schedule="linear", prediction="eps", learn_sigma=True)
    loss, metrics = process.loss(model, x0, cond)                                 # train
    x = process.sample(model, x0.shape, cond, null, sampler="ddim", steps=50, cfg_scale=4.0)

    python train.py --schedule cosine --prediction v                              # the same from the command line

Differences from the official code (facebookresearch/DiT, diffusion/):
1. t is 0-based there and here: t = 0 means one step of noise. The papers count from 1.
2. Guidance acts on every eps channel; DiT guides channels 0-2 only (its author: unintended). cfg_channels=3 brings
   that back.
3. One class and one function per idea instead of enums for mean type, variance type and loss type.
4. sqrt, log and friends are taken in float64 and rounded to float32 once, on the device, not copied there at every
   step.
"""
import copy
import math

import torch


# ----------------------------------------------------------------------------------------------------------------------
# small shared pieces

def timestep_embedding(t, dim, max_period=10000):
    """Sinusoidal embedding of a (possibly fractional) timestep: cosines first, then sines.

    t: (N,) any real dtype -> (N, dim) float32; an odd dim ends in a zero column.
    Source: Vaswani et al. 2017 §3.5, as in ADM/DiT.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    args = t.float()[:, None] * freqs                                                       # (N, half)
    emb = torch.cat([torch.cos(args), torch.sin(args)], dim=1)                              # (N, 2*half)
    return torch.nn.functional.pad(emb, (0, dim % 2))                                       # (N, dim)


def randn(shape, generator=None, device="cpu"):
    """Standard normal noise of `shape`.

    A list of generators gives row i its own: then picture i does not depend on the batch.
    generator: None, one torch.Generator, or a list of shape[0] of them. Raises ValueError if the list has another
    length.
    """
    if not isinstance(generator, (list, tuple)):
        return torch.randn(shape, generator=generator, device=device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}: give one per sample, or a single one")
    return torch.stack([torch.randn(shape[1:], generator=g, device=device) for g in generator])


def guided(model, cond, uncond=None, cfg_scale=1.0, cfg_interval=(0.0, 1.0), cfg_channels=None):
    """Classifier-free guidance: eps = eps_u + s * (eps_c - eps_u), as a callable f(xt, t, noise_level).

    cond, uncond: conditioning tensors (B, ...). s = 1 is the conditional run, s = 0 the unconditional one, each at the
    cost of one forward. cfg_interval: guide only while the noise level (0 = clean, 1 = pure noise) lies inside it.
    cfg_channels: guide the first so many channels only (None = all of xt's); variance channels always stay those of the
    conditional half. Raises ValueError when guidance is asked for without `uncond`.
    Source: Ho & Salimans 2022 eq. 6; interval: Kynkaanniemi et al. 2024.
    """
    if cfg_scale != 1.0 and uncond is None:
        raise ValueError(f"cfg_scale {cfg_scale} needs an unconditional input: train with label dropout, or use "
                         "cfg_scale 1")

    def denoise(xt, t, level):
        if cfg_scale == 1.0 or not cfg_interval[0] <= level <= cfg_interval[1]:
            return model(xt, t, cond)
        if cfg_scale == 0.0:
            return model(xt, t, uncond)
        out = model(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([cond, uncond]))      # (2B, C', ...)
        out_c, out_u = out.chunk(2)                                                         # 2x (B, C', ...)
        k = xt.shape[1] if cfg_channels is None else cfg_channels
        return torch.cat([out_u[:, :k] + cfg_scale * (out_c[:, :k] - out_u[:, :k]), out_c[:, k:]], dim=1)
    return denoise


def _mean(x, mask=None):
    """Mean over all but the batch axis; with a mask (broadcastable, 1 = counts) the true mean over valid entries."""
    if mask is None:
        return x.flatten(1).mean(1)                                                         # (B,)
    mask = mask.expand_as(x).flatten(1)
    return (x.flatten(1) * mask).sum(1) / mask.sum(1).clamp(min=1)                          # (B,)


def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)) in nats, elementwise. Source: improved DDPM eq. 3."""
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def discretized_gaussian_log_likelihood(x, mean, log_scale):
    """Log-probability (nats, elementwise) of 8-bit pixels x in [-1, 1] under N(mean, exp(log_scale)^2).

    A bin is 2/255 wide; those at the two ends reach to infinity. Phi is the tanh approximation, as in the official
    code. Source: DDPM eq. 13.
    """
    cdf = lambda z: 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z ** 3)))
    inv_std = torch.exp(-log_scale)
    upper, lower = cdf((x - mean + 1 / 255) * inv_std), cdf((x - mean - 1 / 255) * inv_std)
    prob = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return torch.log(prob.clamp(min=1e-12))


# ----------------------------------------------------------------------------------------------------------------------
# schedules and respacing

def make_betas(schedule, steps):
    """Noise added per step: (steps,) float64 in (0, 1].

    "linear": 1e-4 .. 2e-2 at 1000 steps, scaled by 1000/steps otherwise. "cosine": alpha_bar = cos^2, beta at most
    0.999. "scaled_linear": linear in sqrt(beta), 0.00085 .. 0.012 (Stable Diffusion).
    Raises ValueError for an unknown name, or when the scaled end point leaves (0, 1).
    Source: DDPM §4; improved DDPM eq. 17; LDM.
    """
    if schedule == "linear":
        betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    elif schedule == "cosine":
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    elif schedule == "scaled_linear":
        betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, steps, dtype=torch.float64) ** 2
    else:
        raise ValueError(f"unknown schedule {schedule!r}: choose linear, cosine or scaled_linear")
    if not (betas.min() > 0 and betas.max() < 1):
        raise ValueError(f"{schedule} with {steps} steps gives beta up to {betas.max():.3g}, outside (0, 1): use more "
                         "than 20 steps")
    return betas


def respaced_steps(num_steps, respacing):
    """Which of num_steps timesteps a shorter chain visits, ascending list of ints.

    respacing: "" or None = all; "250" or 250 = that many, evenly, both ends included; "10,15,20" or a list = so many
    from each of equal sections; "ddim25" = every n-th from 0, DDIM's way (misses the last step).
    Raises ValueError if no such sequence exists. Source: improved DDPM §4; DDIM §4.2; rounding as in the official code.
    """
    if respacing in ("", None):
        return list(range(num_steps))
    try:
        ddim = int(respacing[4:]) if isinstance(respacing, str) and respacing.startswith("ddim") else None
        counts = [respacing] if isinstance(respacing, int) else respacing
        counts = [int(n) for n in counts.split(",")] if isinstance(counts, str) and ddim is None else list(counts)
    except ValueError:
        raise ValueError(f"cannot read {respacing!r} as steps: give a number, 10,15,20, or ddim25") from None
    if ddim is not None:
        for stride in range(1, num_steps):
            if len(range(0, num_steps, stride)) == ddim:
                return list(range(0, num_steps, stride))
        raise ValueError(f"no whole stride visits exactly {ddim} of {num_steps} steps: ask for {ddim} without 'ddim'")
    kept, start = set(), 0
    for i, count in enumerate(counts):
        size = num_steps // len(counts) + (i < num_steps % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"cannot take {count} of a section of {size} steps ({num_steps} steps in {len(counts)} "
                             "sections)")
        stride, at = ((size - 1) / (count - 1) if count > 1 else 1), 0.0
        for _ in range(count):              # summed, not multiplied, and rounded half to even like the published chains
            kept.add(start + round(at))
            at += stride
        start += size
    return sorted(kept)


# ----------------------------------------------------------------------------------------------------------------------
# the process

class GaussianDiffusion:
    """The chain x0 -> xt -> noise with all its constants, losses and samplers. Holds no parameters, fits any device.

    steps: T. schedule: see make_betas. prediction: what the network outputs, "eps", "v" or "x0". learn_sigma: it also
    outputs v in about [-1, 1] per pixel, which interpolates log-variance between its two bounds (improved DDPM eq. 15);
    without it variance is "fixed_large" (beta) or "fixed_small" (the posterior's).
    Public: .betas .alpha_bar (T,) float64; .timestep_map (T,) the t that the network sees (differs after `respaced`).
    Raises ValueError for an unknown name. Source: DDPM §2-3, improved DDPM §3.
    """
    samplers = ("ddim", "ddpm", "dpm++")

    def __init__(self, steps=1000, schedule="linear", prediction="eps", learn_sigma=False, variance="fixed_large"):
        for value, legal in ((prediction, ("eps", "v", "x0")), (variance, ("fixed_large", "fixed_small"))):
            if value not in legal:
                raise ValueError(f"unknown {value!r}: choose one of {', '.join(legal)}")
        self.prediction, self.learn_sigma, self.variance, self.original_steps = prediction, learn_sigma, variance, steps
        self._set_betas(make_betas(schedule, steps), torch.arange(steps))

    def _set_betas(self, betas, timestep_map):
        self.betas, self.timestep_map, self.steps = betas, timestep_map, len(betas)
        one = torch.ones(1, dtype=torch.float64)
        self.alpha_bar = ab = torch.cumprod(1 - betas, 0)
        self.alpha_bar_prev = ab_prev = torch.cat([one, ab[:-1]])                       # sampling ends on exactly 1
        self.alpha_bar_next = torch.cat([ab[1:], 0 * one])
        self.posterior_variance = post = betas * (1 - ab_prev) / (1 - ab)               # DDPM eq. 7; 0 at t = 0
        post_clipped = torch.cat([post[1:2], post[1:]]) if len(post) > 1 else betas     # log(0) at t = 0: take t = 1's
        variances = {"fixed_large": torch.cat([post_clipped[:1], betas[1:]]), "fixed_small": post}
        self._float64 = {
            "ab": ab, "ab_prev": ab_prev, "ab_next": self.alpha_bar_next,
            "sqrt_ab": ab.sqrt(), "sqrt_1m_ab": (1 - ab).sqrt(), "log_1m_ab": (1 - ab).log(),
            "sqrt_recip_ab": (1 / ab).sqrt(), "sqrt_recipm1_ab": (1 / ab - 1).sqrt(),
            "post_mean_x0": betas * ab_prev.sqrt() / (1 - ab),
            "post_mean_xt": (1 - ab_prev) * (1 - betas).sqrt() / (1 - ab),
            "post_var": post, "post_logvar": post_clipped.log(), "log_beta": betas.log(),
            "var": variances[self.variance],
            "logvar": (variances["fixed_large"] if self.variance == "fixed_large" else post_clipped).log(),
            "t": timestep_map}
        self._on_device = {}

    def _at(self, name, t, x):
        """Entries t of a table, float32 (timesteps stay whole), shaped to broadcast over x."""
        if x.device not in self._on_device:      # once per device, so that no step copies anything from the host
            rounded = {k: v.float() if v.is_floating_point() else v for k, v in self._float64.items()}
            self._on_device[x.device] = {k: v.to(x.device) for k, v in rounded.items()}
        values = self._on_device[x.device][name][t]                                         # (B,)
        return values if name == "t" else values.view(-1, *[1] * (x.dim() - 1))             # (B, 1, ..., 1)

    def respaced(self, respacing):
        """The same process on fewer steps (a new object): beta' = 1 - alpha_bar[t] / alpha_bar[last kept t].

        respacing: see respaced_steps; or "logsnr20": about 20 steps, evenly apart in log-SNR, which DPM-Solver++ wants
        (on the exact Gaussian of the tests its error at 20 steps is 9-18 times smaller than on even t). The network
        still sees the original timesteps. Source: improved DDPM §4; Lu et al. 2022 §5.
        """
        if str(respacing).startswith("logsnr"):
            log_snr = (self.alpha_bar / (1 - self.alpha_bar)).log()
            targets = torch.linspace(log_snr[0], log_snr[-1], int(respacing[6:]), dtype=torch.float64)
            kept = sorted(set((log_snr - targets[:, None]).abs().argmin(dim=1).tolist()))   # nearest steps, each once
        else:
            kept = respaced_steps(self.steps, respacing)
        ab = self.alpha_bar[kept]
        short = copy.copy(self)
        short._set_betas(1 - ab / torch.cat([torch.ones(1, dtype=torch.float64), ab[:-1]]), self.timestep_map[kept])
        return short

    # --- forward: from pictures to noise

    def draw(self, shape, generator=None, device="cpu"):
        """The random part of one training step for `shape` = (B, ...): {"t": (B,) int64 uniform, "eps": noise}.

        Source: DDPM alg. 1.
        """
        return {"t": torch.randint(self.steps, shape[:1], generator=generator, device=device),
                "eps": randn(shape, generator, device)}

    def q_sample(self, x0, t, eps):
        """xt ~ q(xt | x0) for t (B,), noise eps like x0. Source: DDPM eq. 4."""
        return self._at("sqrt_ab", t, x0) * x0 + self._at("sqrt_1m_ab", t, x0) * eps

    def q_posterior(self, x0, xt, t):
        """q(x_{t-1} | xt, x0) -> (mean like x0, variance, clipped log-variance; both broadcastable).

        Source: DDPM eq. 6-7.
        """
        mean = self._at("post_mean_x0", t, x0) * x0 + self._at("post_mean_xt", t, x0) * xt
        return mean, self._at("post_var", t, x0), self._at("post_logvar", t, x0)

    # --- predictions: eps, x0 and v are three names for one guess, given xt

    def to_x0(self, pred, xt, t):
        """The x0 implied by the network's prediction. Source: DDPM eq. 15; v: Salimans & Ho 2022 app. D."""
        if self.prediction == "x0":
            return pred
        if self.prediction == "v":
            return self._at("sqrt_ab", t, xt) * xt - self._at("sqrt_1m_ab", t, xt) * pred
        return self._at("sqrt_recip_ab", t, xt) * xt - self._at("sqrt_recipm1_ab", t, xt) * pred

    def to_eps(self, x0, xt, t):
        """The noise that leads from x0 to xt. Source: DDPM eq. 4 solved for eps."""
        return (self._at("sqrt_recip_ab", t, xt) * xt - x0) / self._at("sqrt_recipm1_ab", t, xt)

    def p_mean_variance(self, out, xt, t, clip=False):
        """One reverse step from the network's raw output `out` at xt, t (indices of THIS process).

        clip: clamp the implied x0 to [-1, 1] (pixels: yes, latents: no). Returns {"mean", "var", "logvar", "x0"} like
        xt.
        Source: DDPM eq. 11; learned range: improved DDPM eq. 15 (v is not clamped).
        """
        if self.learn_sigma:
            out, v = out.chunk(2, dim=1)                                                    # 2x (B, C, ...)
            frac = (v + 1) / 2
            logvar = frac * self._at("log_beta", t, xt) + (1 - frac) * self._at("post_logvar", t, xt)
            var = logvar.exp()
        else:
            var, logvar = (self._at(k, t, xt).expand_as(xt) for k in ("var", "logvar"))
        x0 = self.to_x0(out, xt, t)
        x0 = x0.clamp(-1, 1) if clip else x0
        return {"mean": self.q_posterior(x0, xt, t)[0], "var": var, "logvar": logvar, "x0": x0}

    # --- losses

    def vb_term(self, out, x0, xt, t, clip=False):
        """One term of the variational bound in bits per dimension, (B,): the reverse step's KL, or at t = 0 the NLL.

        Source: DDPM eq. 5; improved DDPM eq. 4-7.
        """
        mean, _, logvar = self.q_posterior(x0, xt, t)
        p = self.p_mean_variance(out, xt, t, clip)
        kl = _mean(normal_kl(mean, logvar, p["mean"], p["logvar"])) / math.log(2)
        nll = -_mean(discretized_gaussian_log_likelihood(x0, p["mean"], 0.5 * p["logvar"])) / math.log(2)
        return torch.where(t == 0, nll, kl)

    def losses(self, model, x0, cond, t, eps, mask=None, objective="mse"):
        """Per-sample training losses {"loss", "mse", "vb"}, each (B,).

        objective "mse": |prediction - target|^2, plus the bound's term if learn_sigma. There the mean is detached, so
        the bound teaches the variance alone (improved DDPM §3.1); at 1000 steps its weight is L_simple + 0.001 L_vlb
        (sum over t). "rescaled_mse" keeps that weight on a shorter process; "kl" is the bound alone; "rescaled_kl"
        times T estimates the whole sum. mask: broadcastable to x0, 1 = counts (a true mean).
        Source: improved DDPM eq. 16.
        """
        if objective not in ("mse", "rescaled_mse", "kl", "rescaled_kl"):
            raise ValueError(f"unknown objective {objective!r}: choose mse, rescaled_mse, kl or rescaled_kl")
        xt = self.q_sample(x0, t, eps)
        out = model(xt, self._at("t", t, x0), cond).float()
        if objective.endswith("kl"):
            return {"loss": self.vb_term(out, x0, xt, t) * (self.steps if objective == "rescaled_kl" else 1)}
        pred = out[:, :x0.shape[1]]
        if self.prediction == "v":
            target = self._at("sqrt_ab", t, x0) * eps - self._at("sqrt_1m_ab", t, x0) * x0
        else:
            target = eps if self.prediction == "eps" else x0
        terms = {"mse": _mean((target - pred) ** 2, mask)}
        if self.learn_sigma:
            frozen = torch.cat([pred.detach(), out[:, x0.shape[1]:]], dim=1)                # (B, 2C, ...)
            scale = self.steps / self.original_steps if objective == "rescaled_mse" else 1.0
            terms["vb"] = self.vb_term(frozen, x0, xt, t) * scale
        return {"loss": sum(terms.values()), **terms}

    def loss(self, model, x0, cond=None, t=None, eps=None, mask=None, generator=None):
        """Mean training loss of a batch -> (scalar, {name: detached scalar}). t and eps are drawn when not given.

        x0 (B, C, ...); cond anything that model takes; t (B,) int64; eps like x0. Source: DDPM alg. 1.
        """
        draws = self.draw(x0.shape, generator, x0.device) if t is None or eps is None else {}
        t, eps = draws.get("t") if t is None else t, draws.get("eps") if eps is None else eps
        terms = self.losses(model, x0, cond, t, eps, mask)
        return terms["loss"].mean(), {k: v.mean().detach() for k, v in terms.items() if k != "loss"}

    @torch.no_grad()
    def bits_per_dim(self, model, x0, cond=None, clip=True, noise=None, generator=None):
        """Variational bound on -log p(x0) in bits per dimension, over the whole chain (T forwards).

        noise: optional (T, B, ...), the draw used at t = T-1, T-2, ..., 0. Returns {"total", "prior"} (B,) and {"vb",
        "x0_mse", "eps_mse"} (B, T), column 0 = t = T-1. Source: improved DDPM eq. 4-7.
        """
        rows = {"vb": [], "x0_mse": [], "eps_mse": []}
        for k, i in enumerate(reversed(range(self.steps))):
            t = torch.full(x0.shape[:1], i, device=x0.device)
            eps = noise[k] if noise is not None else randn(x0.shape, generator, x0.device)
            xt = self.q_sample(x0, t, eps)
            out = model(xt, self._at("t", t, x0), cond)
            x0_pred = self.p_mean_variance(out, xt, t, clip)["x0"]
            rows["vb"].append(self.vb_term(out, x0, xt, t, clip))
            rows["x0_mse"].append(_mean((x0_pred - x0) ** 2))
            rows["eps_mse"].append(_mean((self.to_eps(x0_pred, xt, t) - eps) ** 2))
        last = torch.full(x0.shape[:1], self.steps - 1, device=x0.device)
        mean, logvar = self._at("sqrt_ab", last, x0) * x0, self._at("log_1m_ab", last, x0)
        prior = _mean(normal_kl(mean, logvar, torch.zeros_like(x0), torch.zeros_like(logvar))) / math.log(2)
        rows = {k: torch.stack(v, dim=1) for k, v in rows.items()}                          # (B, T)
        return {"total": rows["vb"].sum(1) + prior, "prior": prior, **rows}

    # --- backward: from noise to pictures

    def ddpm_step(self, out, xt, t, z, clip=False, cond_fn=None):
        """x_{t-1} = mean + sqrt(var) z, without noise at t = 0 -> (x_{t-1}, x0).

        cond_fn(xt, t) shifts the mean by var * gradient.
        Source: DDPM alg. 2; classifier guidance: Dhariwal & Nichol 2021 alg. 1.
        """
        p = self.p_mean_variance(out, xt, t, clip)
        mean = p["mean"] if cond_fn is None else p["mean"] + p["var"] * cond_fn(xt, self._at("t", t, xt))
        noisy = (t != 0).view(-1, *[1] * (xt.dim() - 1))
        return mean + noisy * torch.exp(0.5 * p["logvar"]) * z, p["x0"]

    def ddim_step(self, out, xt, t, z=None, eta=0.0, clip=False, cond_fn=None):
        """DDIM: towards x0 along the direction of eps; eta = 0 deterministic, eta = 1 DDPM's noise -> (x_{t-1}, x0).

        cond_fn: eps -= sqrt(1 - alpha_bar) * gradient.
        Source: DDIM eq. 12 and 16; guidance: Dhariwal & Nichol 2021 alg. 2.
        """
        x0 = self.p_mean_variance(out, xt, t, clip)["x0"]
        eps = self.to_eps(x0, xt, t)
        if cond_fn is not None:
            eps = eps - self._at("sqrt_1m_ab", t, xt) * cond_fn(xt, self._at("t", t, xt))
            x0 = self._at("sqrt_recip_ab", t, xt) * xt - self._at("sqrt_recipm1_ab", t, xt) * eps
        ab, ab_prev = self._at("ab", t, xt), self._at("ab_prev", t, xt)
        sigma = eta * ((1 - ab_prev) / (1 - ab)).sqrt() * (1 - ab / ab_prev).sqrt()
        x_prev = ab_prev.sqrt() * x0 + (1 - ab_prev - sigma ** 2).clamp(min=0).sqrt() * eps
        return (x_prev + sigma * z if eta > 0 else x_prev), x0                              # sigma is 0 at t = 0

    def ddim_reverse_step(self, out, xt, t, clip=False):
        """One DDIM step (eta = 0) towards noise: x_{t+1}; from the last t to pure eps -> (x_{t+1}, x0).

        Source: DDIM §4.3.
        """
        x0 = self.p_mean_variance(out, xt, t, clip)["x0"]
        ab_next = self._at("ab_next", t, xt)
        return ab_next.sqrt() * x0 + (1 - ab_next).sqrt() * self.to_eps(x0, xt, t), x0

    def dpmpp_step(self, out, xt, t, x0_last, clip=False):
        """DPM-Solver++(2M): exponential integrator in log-SNR, with x0 extrapolated from two guesses -> (x_{t-1}, x0).

        x0_last: the guess at t + 1, or None on the first step (then, and on the last, first order = DDIM).
        Source: Lu et al. 2022 alg. 2.
        """
        x0 = self.p_mean_variance(out, xt, t, clip)["x0"]
        if x0_last is None:
            return self.ddim_step(out, xt, t, clip=clip)
        ab, ab_prev, t_last = self._at("ab", t, xt), self._at("ab_prev", t, xt), (t + 1).clamp(max=self.steps - 1)
        lam = lambda ab: 0.5 * (ab / (1 - ab)).log()                                    # half log-SNR
        h, h_last = lam(ab_prev) - lam(ab), lam(ab) - lam(self._at("ab", t_last, xt))   # h is infinite at t = 0,
        data = x0 + 0.5 * (h / h_last) * (x0 - x0_last)
        data = torch.where(ab_prev < 1, data, x0)                                       # where plain x0 is the answer
        return ((1 - ab_prev) / (1 - ab)).sqrt() * xt - ab_prev.sqrt() * torch.expm1(-h) * data, x0

    @torch.no_grad()
    def trajectory(self, model, shape, cond=None, uncond=None, sampler="ddim", steps=50, cfg_scale=1.0,
                   cfg_interval=(0.0, 1.0), cfg_channels=None, eta=0.0, x_init=None, mask=None, strength=1.0,
                   clip=False, noise=None, generator=None, device="cpu"):
        """Walk from noise to a picture, yielding (xt, x0 guess) after every step; arguments as in `sample`.

        Source: DDIM, DDPM alg. 2.
        """
        if sampler not in self.samplers:
            raise ValueError(f"unknown sampler {sampler!r} for a Gaussian process: choose one of "
                             f"{', '.join(self.samplers)}")
        if mask is not None and x_init is None:
            raise ValueError("inpainting needs x_init, the picture whose pixels are known, beside the mask")
        if sampler == "dpm++" and isinstance(steps, int):
            steps = f"logsnr{steps}"
        chain, denoise = self.respaced(steps), guided(model, cond, uncond, cfg_scale, cfg_interval, cfg_channels)
        first = chain.steps - 1 if x_init is None else max(0, round(strength * chain.steps) - 1)
        xt = start = randn(shape, generator, device) if noise is None else noise
        if x_init is not None and strength < 1:
            xt = chain.q_sample(x_init, torch.full(shape[:1], first, device=device), start)
        x0_last = None
        for i in range(first, -1, -1):
            t = torch.full(shape[:1], i, device=device)
            # the mask is 1 where to paint: elsewhere the known picture, as noisy as this step is, overrules the chain
            xt = xt if mask is None else torch.where(mask > 0.5, xt, chain.q_sample(x_init, t, start))
            out = denoise(xt, chain._at("t", t, xt), (i + 1) / chain.steps).float()
            if sampler == "dpm++":
                xt, x0_last = chain.dpmpp_step(out, xt, t, x0_last, clip)
                x0 = x0_last
            elif sampler == "ddpm":
                xt, x0 = chain.ddpm_step(out, xt, t, randn(shape, generator, device), clip)
            else:
                xt, x0 = chain.ddim_step(out, xt, t, randn(shape, generator, device) if eta > 0 else None, eta, clip)
            if mask is not None and i == 0:
                xt = torch.where(mask > 0.5, xt, x_init)                            # known pixels come back untouched
            yield xt, x0

    def sample(self, model, shape, cond=None, uncond=None, **options):
        """Draw pictures -> (B, C, ...) = shape.

        sampler "ddim" (with eta), "ddpm" or "dpm++"; steps: an int, or a respacing as a string; cfg_scale,
        cfg_interval, cfg_channels: see guided; x_init (like shape) with mask (1 = paint here): inpainting; x_init with
        strength in (0, 1]: image-to-image from that noise level; clip: clamp x0 guesses to [-1, 1]; noise: start here;
        generator: one, or a list with one per sample; device.
        Raises ValueError for an unknown sampler or a mask without x_init.
        Source: DDPM alg. 2, DDIM eq. 12, DPM-Solver++ alg. 2.
        """
        for x, _ in self.trajectory(model, shape, cond, uncond, **options):
            pass
        return x

    @torch.no_grad()
    def invert(self, model, x0, cond=None, steps=50, clip=False):
        """The noise from which DDIM (eta = 0, same steps) would draw x0, approximately.

        Source: DDIM §4.3 (the ODE run backwards).
        """
        chain = self.respaced(steps)
        for i in range(chain.steps):
            t = torch.full(x0.shape[:1], i, device=x0.device)
            x0, _ = chain.ddim_reverse_step(model(x0, chain._at("t", t, x0), cond).float(), x0, t, clip)
        return x0


class RectifiedFlow:
    """Diffusion on straight lines: x_u = (1-u) x0 + u eps; the network predicts the constant velocity eps - x0.

    Same interface as GaussianDiffusion; u in (0, 1) is continuous and the network sees t = 1000 u, so that its timestep
    embedding needs no change. Samplers: "euler" (it equals DDIM on this schedule) and "heun" (second order, two
    forwards per step). shift >= 1 trains more at high noise, where it is decided what goes where; 1 = evenly.
    Source: Liu et al. 2022 eq. 1; Lipman et al. 2022.
    """
    samplers = ("euler", "heun")

    def __init__(self, shift=1.0):
        self.shift = shift

    def draw(self, shape, generator=None, device="cpu"):
        """The random part of one training step: {"t": (B,) in [0, 1000), uniform before the shift, "eps": noise}.

        Source: Liu et al. 2022 alg. 1; the shift: Esser et al. 2024 (Stable Diffusion 3) eq. 23.
        """
        u = torch.rand(shape[:1], generator=generator, device=device)                       # (B,)
        return {"t": 1000 * self.shift * u / (1 + (self.shift - 1) * u), "eps": randn(shape, generator, device)}

    def q_sample(self, x0, t, eps):
        """The point at time t (B,) in [0, 1000] on the line from x0 to eps. Source: Liu et al. 2022 eq. 1."""
        u = (t / 1000).view(-1, *[1] * (x0.dim() - 1))                                      # (B, 1, ..., 1)
        return (1 - u) * x0 + u * eps

    def loss(self, model, x0, cond=None, t=None, eps=None, mask=None, generator=None):
        """Mean squared error of the velocity -> (scalar, {"mse"}). Arguments as in GaussianDiffusion.loss.

        Source: Liu et al. 2022 eq. 1.
        """
        draws = self.draw(x0.shape, generator, x0.device) if t is None or eps is None else {}
        t, eps = draws.get("t") if t is None else t, draws.get("eps") if eps is None else eps
        mse = _mean((model(self.q_sample(x0, t, eps), t, cond).float() - (eps - x0)) ** 2, mask).mean()
        return mse, {"mse": mse.detach()}

    @torch.no_grad()
    def trajectory(self, model, shape, cond=None, uncond=None, sampler="euler", steps=25, cfg_scale=1.0,
                   cfg_interval=(0.0, 1.0), cfg_channels=None, eta=0.0, x_init=None, mask=None, strength=1.0,
                   clip=False, noise=None, generator=None, device="cpu"):
        """Integrate dx/du = velocity from u = 1 (noise) to u = 0, yielding (xt, x0 guess).

        Arguments as in GaussianDiffusion.sample. Source: Liu et al. 2022 eq. 1.
        """
        if sampler not in self.samplers:
            raise ValueError(f"unknown sampler {sampler!r} for a flow: choose one of {', '.join(self.samplers)}")
        if eta:
            raise ValueError("eta adds noise on the way; a flow is deterministic: leave it 0")
        if mask is not None and x_init is None:
            raise ValueError("inpainting needs x_init, the picture whose pixels are known, beside the mask")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"a flow takes a positive number of steps, not {steps!r}")
        denoise = guided(model, cond, uncond, cfg_scale, cfg_interval, cfg_channels)
        at = lambda u: torch.full(shape[:1], 1000 * u, device=device)
        xt = start = randn(shape, generator, device) if noise is None else noise
        top = 1.0 if x_init is None else strength
        us = [top * (1 - k / steps) for k in range(steps + 1)]
        xt = start if x_init is None else self.q_sample(x_init, at(top), start)
        for u, u_next in zip(us[:-1], us[1:]):
            velocity = denoise(xt, at(u), u).float()
            x0 = xt - u * velocity
            x0 = x0.clamp(-1, 1) if clip else x0
            velocity = (xt - x0) / u
            if sampler == "heun" and u_next > 0:        # average the slopes at both ends of the step
                velocity = (velocity + denoise(xt + (u_next - u) * velocity, at(u_next), u_next).float()) / 2
            xt = xt + (u_next - u) * velocity
            if mask is not None:
                xt = torch.where(mask > 0.5, xt, self.q_sample(x_init, at(u_next), start) if u_next > 0 else x_init)
            yield xt, x0

    sample = GaussianDiffusion.sample


class LossSecondMoment:
    """Draw t more often where the loss has been large: p(t) ~ sqrt(mean of the last 10 squared losses), 0.1 % uniform.

    Weights stay uniform until every t has its 10 losses. draw(n, generator) -> (t (n,), weight (n,)) with weight =
    1/(T p(t)), so the weighted loss stays unbiased; update(t, losses) after each step.
    Source: improved DDPM §3.3 eq. 18.
    """

    def __init__(self, steps, history=10, uniform_prob=0.001):
        self.losses = torch.zeros(steps, history, dtype=torch.float64)                      # (T, history)
        self.counts = torch.zeros(steps, dtype=torch.int64)                                 # (T,)
        self.uniform_prob = uniform_prob

    def weights(self):
        """Unnormalised probability of each t, (T,) float64. Source: improved DDPM eq. 18."""
        if (self.counts < self.losses.shape[1]).any():
            return torch.ones(len(self.losses), dtype=torch.float64)
        w = (self.losses ** 2).mean(1).sqrt()
        return w / w.sum() * (1 - self.uniform_prob) + self.uniform_prob / len(w)

    def draw(self, n, generator=None):
        """n timesteps and their loss weights, (n,) each. Source: improved DDPM eq. 18."""
        p = self.weights()
        p = p / p.sum()
        t = torch.multinomial(p, n, replacement=True, generator=generator)
        return t, 1 / (len(p) * p[t])

    def update(self, t, losses):
        """Remember losses (n,) at timesteps t (n,). Source: improved DDPM §3.3."""
        for i, loss in zip(t.tolist(), losses.tolist()):
            if self.counts[i] == self.losses.shape[1]:
                self.losses[i] = self.losses[i].roll(-1)
                self.losses[i, -1] = loss
            else:
                self.losses[i, self.counts[i]] = loss
                self.counts[i] += 1
