"""The Gaussian diffusion process: how pictures become noise, and how a network brings them back.

Papers: DDPM (Ho et al. 2020), improved DDPM (Nichol & Dhariwal 2021), DDIM (Song et al. 2020),
DPM-Solver++ (Lu et al. 2022), guidance (Ho & Salimans 2022), rectified flow (Liu et al. 2022).
The idea. Take a clean picture x0 and mix in Gaussian noise eps, a little more at every step t:

    xt = sqrt(alpha_bar[t]) * x0 + sqrt(1 - alpha_bar[t]) * eps            (q_sample)

Training is a regression: a network learns to predict eps from (xt, t). To sample, start from pure
noise. At every step the network predicts eps, which gives an estimate of x0; then move from xt to a
slightly less noisy picture that agrees with this estimate. A sampler says how: DDPM adds new noise,
DDIM adds none, DPM-Solver++ also uses the estimate of the step before. The network may predict x0
or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 instead: with xt, each of the three gives the
other two. A model is any callable model(xt, t, cond) -> (B, C or 2C, ...).

    process = GaussianDiffusion(schedule="linear", prediction="eps")
    loss, metrics = process.loss(model, x0, cond, **process.draw(x0.shape))
    x = process.sample(model, x0.shape, cond, null, sampler="ddim", steps=50, cfg_scale=4.0)
    python train.py --schedule cosine --prediction v

Differences from the official code (facebookresearch/DiT, diffusion/): guidance acts on all channels
(cfg_channels=3: on three, as there); sampling begins at a log-SNR of at least MIN_LOG_SNR; a single
step is taken at the last t, not at the first; vb counts T / 1000, as in its "rescaled" variant."""
import copy
import itertools
import math
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

# Sampling begins at the last t whose log-SNR, log(alpha_bar / (1 - alpha_bar)), is not below this.
# Only "cosine" goes lower, to -19.8, where an error of eps counts 20,000-fold in x0 = (xt -
# sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar): it begins at t = 995, where the factor is 160.
MIN_LOG_SNR = -10.2
# the options that all samplers of this file read, with their defaults; `sample` explains them
DEFAULTS = dict(cfg_scale=1.0, cfg_channels=None, x_init=None, mask=None, strength=1.0, noise=None,
                clip=False, generator=None, device="cpu")


class GaussianDiffusion:
    """The chain x0 -> xt -> noise with its loss and its samplers. steps: T; t counts from 0 (the
    papers: from 1). schedule: a name of SCHEDULES. prediction: what the network outputs, "eps", "v"
    or "x0". learn_sigma: C more channels interpolate the log-variance between the posterior's and
    beta's; without them it is beta's. spacing: see respaced_steps; and whether sampling ends at x0,
    or as noisy as t = 0. min_snr: cap of a picture's weight, min-SNR's gamma; None: 1 for all.
    Public: betas, alpha_bar (T,) float64; timestep_map (T,): the network's t. Source: DDPM §2-3."""
    samplers = ("ddim", "ddpm", "dpm++")
    default_steps = {"ddim": 50, "ddpm": 250, "dpm++": 50}
    options = dict.fromkeys(samplers, frozenset(DEFAULTS)) | {"ddim": {*DEFAULTS, "eta"}}

    def __init__(self, steps=1000, schedule="linear", prediction="eps", learn_sigma=False,
                 spacing=("linspace", 0, True), min_snr=None):
        check_name("prediction", prediction, ("eps", "v", "x0"))
        self.prediction, self.learn_sigma, self.spacing = prediction, learn_sigma, spacing
        self.min_snr, self.original_steps = min_snr, steps      # both stay when it is respaced
        self.default_sampler = "ddpm" if learn_sigma else "ddim"
        check_name("schedule", schedule, SCHEDULES)
        betas = SCHEDULES[schedule](steps)
        if not (betas.min() > 0 and betas.max() < 1):
            raise ValueError(f"a {schedule} beta reaches 1 in {steps} steps: take more than 20")
        self._set_tables(betas, torch.arange(steps))

    def q_sample(self, x0, t, eps):
        """xt ~ q(xt | x0) for t (B,), with noise eps like x0. Source: DDPM Eq. 4."""
        return self._at("sqrt_ab", t, x0) * x0 + self._at("sqrt_1m_ab", t, x0) * eps

    def draw(self, shape, generator=None, device="cpu"):
        """Random numbers of a training step: {"t" (B,) int64, "eps"}. Source: DDPM Alg. 1."""
        return {"t": torch.randint(self.steps, shape[:1], generator=generator, device=device),
                "eps": randn(shape, generator, device)}

    def loss(self, model, x0, cond=None, mask=None, *, t, eps):
        """Training loss of a batch x0 (B, C, ...) -> (scalar, {"mse", "vb" if learn_sigma}).
        vb: T / 1000 of the bound's term, for the variance alone: mse + vb = L_simple + 0.001 L_vlb,
        as L_vlb sums T terms. mask: 1 = this counts. Source: DDPM Eq. 14, improved DDPM Eq. 16."""
        xt = self.q_sample(x0, t, eps)
        out = model(xt, self._at("t", t, x0), cond).float()
        pred = out[:, :x0.shape[1]]                                                 # (B, C, ...)
        v = self._at("sqrt_ab", t, x0) * eps - self._at("sqrt_1m_ab", t, x0) * x0
        target = {"eps": eps, "x0": x0, "v": v}[self.prediction]
        terms = {"mse": _mean((target - pred) ** 2, mask)}                          # (B,)
        if self.min_snr:        # errors of x0 weigh min(SNR, gamma); Hang et al. 2023, Eq. 8
            snr = self._at("sqrt_recipm1_ab", t, t) ** -2           # ab / (1 - ab), (B,)
            error = {"eps": snr, "x0": 1.0, "v": snr + 1}[self.prediction]  # over that of x0
            terms["mse"] = snr.clamp(max=self.min_snr) / error * terms["mse"]       # (B,)
        if self.learn_sigma:
            frozen = torch.cat([pred.detach(), out[:, x0.shape[1]:]], dim=1)        # (B, 2C, ...)
            terms["vb"] = self.original_steps / 1000 * self.vb_term(frozen, x0, xt, t, mask)  # (B,)
        metrics = {name: values.mean().detach() for name, values in terms.items()}
        return sum(terms.values()).mean(), metrics

    def vb_term(self, out, x0, xt, t, mask=None):
        """One term (B,) of the variational bound, in bits per dimension. Source: DDPM Eq. 5."""
        p_mean, p_logvar, _ = self.p_mean_variance(out, xt, t)
        kl = normal_kl(*self.q_posterior(x0, xt, t), p_mean, p_logvar)
        nll = -discretized_gaussian_log_likelihood(x0, p_mean, 0.5 * p_logvar)
        return torch.where(t == 0, _mean(nll, mask), _mean(kl, mask)) / math.log(2)

    def q_posterior(self, x0, xt, t):
        """q(x_{t-1} | xt, x0) -> (mean like x0, log-variance). Source: DDPM Eq. 7."""
        mean = self._at("post_mean_x0", t, x0) * x0 + self._at("post_mean_xt", t, x0) * xt
        return mean, self._at("post_logvar", t, x0)

    def to_x0(self, pred, xt, t):
        """The x0 that the prediction implies. Source: DDPM Eq. 15; v: Salimans & Ho 2022 App. D."""
        if self.prediction == "x0":
            return pred
        if self.prediction == "v":
            return self._at("sqrt_ab", t, xt) * xt - self._at("sqrt_1m_ab", t, xt) * pred
        return self._at("sqrt_recip_ab", t, xt) * xt - self._at("sqrt_recipm1_ab", t, xt) * pred

    def p_mean_variance(self, out, xt, t, clip=False):
        """out -> (mean, log-variance, x0), like xt. Source: DDPM Eq. 11; improved DDPM Eq. 15."""
        logvar = self._at("fixed_logvar", t, xt).expand_as(xt)
        if self.learn_sigma:
            out, v = out.chunk(2, dim=1)                                            # 2x (B, C, ...)
            frac = (v + 1) / 2                      # v = 1: beta; v = -1: the posterior's variance
            low, high = self._at("post_logvar", t, xt), self._at("log_beta", t, xt)
            logvar = frac * high + (1 - frac) * low
        x0 = self.to_x0(out, xt, t)
        x0 = x0.clamp(-1, 1) if clip else x0
        return self.q_posterior(x0, xt, t)[0], logvar, x0

    def ddpm_step(self, out, xt, t, z, clip=False):
        """mean + sigma z, without noise at t = 0 -> (x_{t-1}, x0). Source: DDPM Alg. 2."""
        mean, logvar, x0 = self.p_mean_variance(out, xt, t, clip)
        noisy = (t != 0).view(-1, *[1] * (xt.dim() - 1))                            # (B, 1, ..., 1)
        return mean + noisy * torch.exp(0.5 * logvar) * z, x0

    def ddim_step(self, out, xt, t, z=None, eta=0.0, clip=False):
        """x0 noised to t - 1; eta = 1: as random as DDPM -> (x_{t-1}, x0). Source: DDIM Eq. 12."""
        x0 = self.p_mean_variance(out, xt, t, clip)[2]
        eps = (self._at("sqrt_recip_ab", t, xt) * xt - x0) / self._at("sqrt_recipm1_ab", t, xt)
        ab, ab_prev = self._at("ab", t, xt), self._at("ab_prev", t, xt)
        sigma = eta * ((1 - ab_prev) / (1 - ab)).sqrt() * (1 - ab / ab_prev).sqrt()  # 0 at t = 0
        x_prev = ab_prev.sqrt() * x0 + (1 - ab_prev - sigma ** 2).clamp(min=0).sqrt() * eps
        return (x_prev + sigma * z if eta > 0 else x_prev), x0

    def dpmpp_step(self, out, xt, t, x0_last, clip=False):
        """DPM-Solver++(2M): extrapolates x0 from that at t + 1. Source: Lu et al. 2022 Alg. 2."""
        if x0_last is None:             # the first step, like the last, is of first order: DDIM
            return self.ddim_step(out, xt, t, clip=clip)
        x0 = self.p_mean_variance(out, xt, t, clip)[2]
        ab, ab_prev = self._at("ab", t, xt), self._at("ab_prev", t, xt)
        ab_last = self._at("ab", (t + 1).clamp(max=self.steps - 1), xt)
        lam = lambda ab: 0.5 * (ab / (1 - ab)).log()                                # half log-SNR
        h, h_last = lam(ab_prev) - lam(ab), lam(ab) - lam(ab_last)
        data = x0 + 0.5 * (h / h_last) * (x0 - x0_last)
        data = torch.where(ab_prev < 1, data, x0)                           # h is infinite at t = 0
        return ((1 - ab_prev) / (1 - ab)).sqrt() * xt - ab_prev.sqrt() * torch.expm1(-h) * data, x0

    def step(self, denoise, xt, t, levels, x0_last, opt):
        """One model call and one step of opt.sampler -> (x_{t-1}, x0). Source: DDPM Alg. 2."""
        out = denoise(xt, self._at("t", t, xt)).float()
        if opt.sampler == "dpm++":
            return self.dpmpp_step(out, xt, t, x0_last, opt.clip)
        z = randn(xt.shape, opt.generator, opt.device) if opt.sampler == "ddpm" or opt.eta else None
        if opt.sampler == "ddpm":
            return self.ddpm_step(out, xt, t, z, opt.clip)
        return self.ddim_step(out, xt, t, z, opt.eta, opt.clip)

    @torch.no_grad()
    def trajectory(self, model, shape, cond=None, uncond=None, sampler=None, steps=None, **options):
        """As `sample`, but yields (xt, x0 estimate) after every step. Source: DDPM Alg. 2."""
        sampler = self.default_sampler if sampler is None else sampler
        check_options(self, sampler, options)
        opt = SimpleNamespace(sampler=sampler, **{**DEFAULTS, "eta": 0.0, **options})
        steps = self.default_steps[sampler] if steps is None else steps
        process, path = self.path(sampler, steps, opt.strength)
        denoise, x0 = guided(model, cond, uncond, opt.cfg_scale, opt.cfg_channels), None
        batch = lambda t: torch.full(shape[:1], t, device=opt.device)               # (B,)
        noise = randn(shape, opt.generator, opt.device) if opt.noise is None else opt.noise
        xt = noise if opt.strength == 1 else process.q_sample(opt.x_init, batch(path[0][0]), noise)
        for (t, level), (_, level_next) in zip(path, path[1:]):
            if opt.mask is not None:              # outside the mask: the known picture, noised to t
                xt = torch.where(opt.mask > 0.5, xt, process.q_sample(opt.x_init, batch(t), noise))
            xt, x0 = process.step(denoise, xt, batch(t), (level, level_next), x0, opt)
            if opt.mask is not None and level_next == 0:
                xt = torch.where(opt.mask > 0.5, xt, opt.x_init)
            yield xt, x0

    def sample(self, model, shape, cond=None, uncond=None, sampler=None, steps=None, **options):
        """Sample pictures -> (B, C, ...) = `shape`. None: the process's default.
        steps: how many, for a Gaussian chain evenly in t ("dpm++": in log-SNR). cfg_*: see guided.
        x_init with mask (1 = paint here): inpainting; with strength < 1: begin with x_init at this
        noise level, (t + 1) / T or u; a Gaussian chain then takes fewer steps. clip: clamp x0 to
        [-1, 1] (pixels, not latents). noise: begin here. dpm++ takes no t twice: 49 calls, not 50.
        Source: DDPM Alg. 2; inpainting: Lugmayr et al. 2022 Eq. 8; strength: SDEdit Alg. 1."""
        for x, _ in self.trajectory(model, shape, cond, uncond, sampler, steps, **options):
            pass
        return x

    def respaced(self, kept):
        """The process on the steps `kept` alone, an ascending list. Source: improved DDPM §4."""
        ab, short = self.alpha_bar[kept], copy.copy(self)
        short._set_tables(1 - ab / F.pad(ab[:-1], (1, 0), value=1.0), self.timestep_map[kept])
        return short

    def path(self, sampler, steps, strength=1.0):
        """-> (respaced process, [(t, level), ..., (-1, 0)]). Source: Lu et al. 2022 §5 (dpm++)."""
        *spacing, to_x0 = self.spacing
        kept = respaced_steps(self.steps, steps, *spacing)
        log_snr = torch.logit(self.alpha_bar)                                       # (T,)
        if sampler == "dpm++":
            end = log_snr[-1].clamp(min=MIN_LOG_SNR)
            targets = torch.linspace(log_snr[0], end, steps, dtype=torch.float64)   # (steps,)
            kept = (log_snr - targets[:, None]).abs().argmin(dim=1).tolist()        # the nearest t
        kept = kept if len(kept) > 1 else [self.steps - 1]      # a single step begins with noise
        below = self.timestep_map < round(strength * self.original_steps)           # (T,)
        # the noisiest allowed t; a chain that ends as noisy as t = 0 has at least one more
        last = max(0 if to_x0 else 1, (below & (log_snr >= MIN_LOG_SNR)).sum().item() - 1)
        chain = self.respaced(sorted({min(t, last) for t in (kept if to_x0 else [0, *kept])}))
        levels = [(t + 1) / self.original_steps for t in chain.timestep_map.tolist()]
        calls = [*reversed(list(enumerate(levels)))]
        return chain, [*calls, (-1, 0.0)] if to_x0 else [*calls[:-1], (0, 0.0)]

    def _set_tables(self, betas, timestep_map):
        self.betas, self.timestep_map, self.steps = betas, timestep_map, len(betas)
        self.alpha_bar = ab = torch.cumprod(1 - betas, 0)
        ab_prev = F.pad(ab[:-1], (1, 0), value=1.0)
        post_var = betas * (1 - ab_prev) / (1 - ab)                     # DDPM Eq. 7; 0 at t = 0
        # its logarithm is infinite at t = 0: use that of t = 1
        post_logvar = (torch.cat([post_var[1:2], post_var[1:]]) if len(betas) > 1 else betas).log()
        self.tables = {                                                 # float64; read through _at
            "ab": ab, "ab_prev": ab_prev, "sqrt_ab": ab.sqrt(), "sqrt_1m_ab": (1 - ab).sqrt(),
            "sqrt_recip_ab": (1 / ab).sqrt(), "sqrt_recipm1_ab": (1 / ab - 1).sqrt(),
            "post_mean_x0": betas * ab_prev.sqrt() / (1 - ab), "post_logvar": post_logvar,
            "post_mean_xt": (1 - ab_prev) * (1 - betas).sqrt() / (1 - ab), "t": timestep_map,
            "log_beta": betas.log(), "fixed_logvar": torch.cat([post_logvar[:1], betas[1:].log()])}
        self._on_device = {}

    def _at(self, name, t, x):
        """Entries t (B,) of a table in float32, (B, 1, ..., 1) like x; of "t" (B,) int64."""
        if x.device not in self._on_device:     # copied once per device, not at every step
            self._on_device[x.device] = {k: v.float().to(x.device) for k, v in self.tables.items()}
        values = self._on_device[x.device][name][t]                                 # (B,)
        return values.long() if name == "t" else values.view(-1, *[1] * (x.dim() - 1))


class RectifiedFlow:
    """Diffusion on straight lines: x_u = (1 - u) x0 + u eps; the network predicts eps - x0.
    u in [0, 1) is continuous; the network receives t = 1000 u. Samplers: "euler" (here equal to
    DDIM, with eta > 0 an SDE) and "heun" (second order; two forwards per step, one in the last).
    logit_normal: trains at u = sigmoid(N(0, 1)), more in the middle, not evenly; shift > 1: more at
    high noise. Source: Liu et al. 2022 Eq. 1; Stable Diffusion 3 Eq. 19 (logit-normal), 23."""
    samplers, default_sampler = ("euler", "heun"), "euler"
    default_steps = {"euler": 25, "heun": 50}
    options = {"euler": {*DEFAULTS, "eta"}, "heun": frozenset(DEFAULTS)}
    trajectory, sample = GaussianDiffusion.trajectory, GaussianDiffusion.sample

    def __init__(self, shift=1.0, logit_normal=False):
        self.shift, self.logit_normal = shift, logit_normal

    def q_sample(self, x0, t, eps):
        """The point at t (B,) in [0, 1000] on the line from x0 to eps. Source: Liu et al. Eq. 1."""
        u = (t / 1000).view(-1, *[1] * (x0.dim() - 1))                              # (B, 1, ..., 1)
        return (1 - u) * x0 + u * eps

    def draw(self, shape, generator=None, device="cpu"):
        """Random numbers of a training step: {"t" (B,), "eps"}. Source: Liu et al. 2022 Alg. 1."""
        u = rand(shape[:1], generator, device) if not self.logit_normal else (
            randn(shape[:1], generator, device).sigmoid())                          # (B,)
        return {"t": 1000 * self.shift * u / (1 + (self.shift - 1) * u),
                "eps": randn(shape, generator, device)}

    def loss(self, model, x0, cond=None, mask=None, *, t, eps):
        """Mean squared error of the velocity; as in GaussianDiffusion. Source: Liu et al. Eq. 1."""
        velocity = model(self.q_sample(x0, t, eps), t, cond).float()
        mse = _mean((velocity - (eps - x0)) ** 2, mask).mean()
        return mse, {"mse": mse.detach()}

    def step(self, denoise, xt, t, levels, x0_last, opt):
        """dx/du = velocity, from u to u_next -> (x at u_next, x0). eta > 0: some noise is new; for
        eta = 1, in small steps, that is the reverse of the SDE dx = -x / (1 - u) du + g dw, g^2 =
        2 u / (1 - u), whose x_u is like the flow's: of mean (1 - u) x0 and variance u^2.
        Source: Liu et al. Eq. 1; DDIM Eq. 12; SDE: Song et al. 2021 (2011.13456) Eq. 6."""
        u, u_next = levels
        x0 = xt - u * denoise(xt, t).float()
        x0 = x0.clamp(-1, 1) if opt.clip else x0
        velocity = (xt - x0) / u
        if opt.eta > 0 and u_next > 0:
            # eta = 1: as uncertain as x at u_next is in the SDE, given xt and x0
            share = (1 - u) * u_next / (u * (1 - u_next))
            sigma = opt.eta * u_next * (1 - share ** 2) ** 0.5
            z, eps = randn(xt.shape, opt.generator, opt.device), x0 + velocity
            return (1 - u_next) * x0 + (u_next ** 2 - sigma ** 2) ** 0.5 * eps + sigma * z, x0
        if opt.sampler == "heun" and u_next > 0:        # the average of the slopes at both ends
            t_next = torch.full_like(t, 1000 * u_next)
            velocity = (velocity + denoise(xt + (u_next - u) * velocity, t_next).float()) / 2
        return xt + (u_next - u) * velocity, x0

    def path(self, sampler, steps, strength=1.0):
        """Even steps from u = strength to 0 -> (self, [(t, u), ..., (0, 0)]). Source: Liu et al."""
        if not isinstance(steps, int) or not 1 <= steps <= 10_000:
            raise ValueError(f"steps {steps!r}: a flow takes a whole number, from 1 to 10,000")
        us = [strength * (1 - k / steps) for k in range(steps + 1)]
        return self, [(1000 * u, u) for u in us]


def guided(model, cond, uncond=None, cfg_scale=1.0, cfg_channels=None):
    """Classifier-free guidance, eps = eps_u + s (eps_c - eps_u), as a callable f(xt, t).
    s = cfg_scale: 1 = cond (B, ...) alone, 0 = uncond alone. cfg_channels: guide only the first so
    many channels of xt; variance channels are those of cond. Source: Ho & Salimans 2022 Eq. 6."""
    if cfg_scale != 1.0 and uncond is None:
        raise ValueError("cfg_scale needs an unconditional input: 1, or train with label dropout")
    def denoise(xt, t):
        k = cfg_channels or xt.shape[1]
        if k > xt.shape[1]:
            raise ValueError(f"cfg_channels {k}: there are {xt.shape[1]} channels to guide")
        if cfg_scale == 1.0:
            return model(xt, t, cond)
        if cfg_scale == 0.0 and cfg_channels is None:
            return model(xt, t, uncond)
        out = model(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([cond, uncond]))
        out_c, out_u = out.chunk(2)                                             # 2x (B, C', ...)
        mixed = out_u[:, :k] + cfg_scale * (out_c[:, :k] - out_u[:, :k])
        return torch.cat([mixed, out_c[:, k:]], dim=1)
    return denoise


def check_options(process, sampler, options):
    """Raise ValueError for a wrong sampler, or options {name: value} not read or out of range."""
    check_name("sampler", sampler, process.samplers)
    for name in sorted(set(options) - process.options[sampler]):
        others = [f", or use sampler {s}" for s in process.samplers if name in process.options[s]]
        raise ValueError(f"sampler {sampler!r} does not read {name}: leave it out{''.join(others)}")
    if not 0 <= options.get("eta", 0.0) <= 1:
        raise ValueError(f"eta {options['eta']}: give a number from 0 to 1")
    strength, x_init = options.get("strength", 1.0), options.get("x_init")
    for name in ("strength", "truncation"):
        if not 0 < options.get(name, 1.0) <= 1:
            raise ValueError(f"{name} {options[name]}: give a number above 0, and at most 1")
    if x_init is None and (options.get("mask") is not None or strength < 1):
        raise ValueError("mask and strength need x_init, the known picture: give it as well")


def check_name(what, name, legal):
    """Raise ValueError unless `name` is one of the `legal` names of a `what`."""
    if name not in legal:
        raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(legal)}")


def cosine_betas(steps):
    """alpha_bar falls like cos^2; beta is at most 0.999. Source: improved DDPM Eq. 17."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


SCHEDULES = {   # name -> function(steps) -> betas (steps,) float64. Source: DDPM §4; LDM's code
    "linear": lambda steps: torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64),
    "scaled_linear": lambda steps: torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, steps,
                                                  dtype=torch.float64) ** 2,
    "cosine": cosine_betas}


def respaced_steps(num_steps, count, spacing="linspace", offset=0):
    """Which of num_steps timesteps a chain of `count` visits: ascending list of ints. spacing:
    evenly, both ends included; "leading": every n-th from `offset`; "trailing": every n-th, back
    from the last. Source: improved DDPM §4; diffusers' schedulers."""
    if type(count) is not int or not 1 <= count <= num_steps:
        raise ValueError(f"steps {count!r}: give a whole number from 1 to {num_steps}")
    if spacing == "linspace":   # summed, not multiplied, and rounded half to even, as published
        strides = [(num_steps - 1) / max(1, count - 1)] * (count - 1)
        return [round(x) for x in itertools.accumulate(strides, initial=0.0)]
    steps = (k * (num_steps // count) + offset for k in range(count)) if spacing == "leading" else (
        round((k + 1) * num_steps / count) - 1 for k in range(count))
    return sorted({min(t, num_steps - 1) for t in steps})


def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) in nats. Source: improved DDPM Eq. 6."""
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2)
                  + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def discretized_gaussian_log_likelihood(x, mean, log_scale):
    """Nats of 8-bit pixels x in [-1, 1] under N(mean, exp(log_scale)^2). Source: DDPM Eq. 13."""
    # the normal's distribution function, by tanh as in the official code; a bin is 2/255 wide
    cdf = lambda z: 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z ** 3)))
    inv_std = torch.exp(-log_scale)
    upper, lower = cdf((x - mean + 1 / 255) * inv_std), cdf((x - mean - 1 / 255) * inv_std)
    prob = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return torch.log(prob.clamp(min=1e-12))


def _mean(x, mask=None):
    """Mean over all axes but the first, (B,); mask: broadcastable to x, only its ones count."""
    if mask is None:
        return x.flatten(1).mean(1)
    mask = mask.expand_as(x).flatten(1)
    return (x.flatten(1) * mask).sum(1) / mask.sum(1).clamp(min=1)


def timestep_embedding(t, dim, max_period=10000):
    """t (B,) -> cosines, then sines, (B, dim) float32, dim even. Source: Vaswani 2017 §3.5; DiT."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    args = t.float()[:, None] * torch.exp(-math.log(max_period) * steps / half)     # (B, half)
    return torch.cat([torch.cos(args), torch.sin(args)], dim=1)                     # (B, dim)


def random_rows(draw, shape, generator=None, device="cpu"):
    """draw(shape), of torch.randn or torch.rand; a list of generators gives each row its own."""
    if not isinstance(generator, (list, tuple)):
        return draw(shape, generator=generator, device=device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} samples: give one per sample")
    return torch.stack([draw(shape[1:], generator=g, device=device) for g in generator])


randn, rand = partial(random_rows, torch.randn), partial(random_rows, torch.rand)


def seeds(first, count, device="cpu"):
    """One generator for each of `count` samples, seeded first, first + 1, ..."""
    return [torch.Generator(device).manual_seed(first + i) for i in range(count)]
