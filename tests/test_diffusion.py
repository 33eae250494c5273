"""diffusion.py against official figures, closed forms, and a Gaussian of known score."""
import copy
import json
import math

import pytest
import torch
from torch.testing import assert_close

from conftest import GOLDEN, golden_case
from diffusion import (DEFAULTS, GaussianDiffusion, RectifiedFlow, check_options,
                       discretized_gaussian_log_likelihood, guided, normal_kl, randn,
                       respaced_steps, timestep_embedding)

TOLERANCE = dict(rtol=3e-4, atol=1e-5)      # of the golden files: see their README
OFFICIAL = {"linear1000": "linear", "cosine1000": "cosine"}
SCHEDULES = ("linear", "cosine", "scaled_linear")
SAMPLERS = [(GaussianDiffusion, s) for s in GaussianDiffusion.samplers]
SAMPLERS += [(RectifiedFlow, s) for s in RectifiedFlow.samplers]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------
# the official implementation's figures

def toy(variance="LEARNED_RANGE", theta=(1.0, 1.0)):
    """The closed-formula network of the golden files; it records the timesteps that it receives.
    FIXED_SMALL, the posterior's variance, is what a network says whose v is -1 everywhere."""
    def model(x, t, cond=None):
        model.saw.append(t.clone())
        u = (t.float() / 1000).view(-1, 1, 1, 1)
        eps = theta[0] * ((0.2 + 0.7 * u) * x + 0.1 * torch.sin(2 * x.flip(-1)))
        v = theta[1] * torch.tanh(0.5 * x.flip(1) + 2 * u - 1)
        v = v if variance == "LEARNED_RANGE" else torch.full_like(v, -1.0)
        return eps if variance == "FIXED_LARGE" else torch.cat([eps, v], 1)
    model.saw = []
    return model


def official(case, variance="LEARNED_RANGE", **options):
    """The process of a golden case, by the official name of its variance."""
    return GaussianDiffusion(schedule=OFFICIAL[case], learn_sigma=variance != "FIXED_LARGE",
                             **options)


@pytest.mark.parametrize("case", OFFICIAL)
def test_forward_process_matches_official(case):
    _, g = golden_case(f"diffusion_{case}")
    p, x0, t = official(case), g["in_x0"], g["in_t"]
    xt = p.q_sample(x0, t, g["in_noise"])
    assert_close(xt, g["q_sample"], **TOLERANCE)
    mean, logvar = p.q_posterior(x0, xt, t)
    assert_close(mean, g["q_post_mean"], **TOLERANCE)
    assert_close(logvar.expand_as(x0), g["q_post_logvar"], **TOLERANCE)
    var, later = logvar.exp().expand_as(x0), t > 0  # at t = 0 the variance is 0, its logarithm not
    assert_close(var[later], g["q_post_var"].expand_as(x0)[later], **TOLERANCE)


@pytest.mark.parametrize("case", OFFICIAL)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["LEARNED_RANGE", "FIXED_LARGE", "FIXED_SMALL"])
def test_p_mean_variance_matches_official(case, variance, clip):
    _, g = golden_case(f"diffusion_{case}")
    x, t, name = g["in_x"], g["in_t"], f"pmv_{variance}_clip{int(clip)}"
    model = toy(variance)
    mean, logvar, x0 = official(case, variance).p_mean_variance(model(x, t), x, t, clip)
    assert_close(mean, g[f"{name}_mean"], **TOLERANCE)
    assert_close(logvar, g[f"{name}_log_variance"], **TOLERANCE)
    assert_close(logvar.exp()[t > 0], g[f"{name}_variance"][t > 0], **TOLERANCE)
    assert_close(x0, g[f"{name}_pred_xstart"], **TOLERANCE)


@pytest.mark.parametrize("case", OFFICIAL)
@pytest.mark.parametrize("variance", ["LEARNED_RANGE", "FIXED_LARGE"])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
def test_losses_and_their_gradients_match_official(case, variance, mean):
    _, g = golden_case(f"diffusion_{case}")
    name, prediction = f"loss_{variance}_{mean}_MSE", {"EPSILON": "eps", "START_X": "x0"}[mean]
    p, theta = official(case, variance, prediction=prediction), torch.ones(2, requires_grad=True)
    model = toy(variance, theta)
    x0, t, eps = g["in_x0"], g["in_t"], g["in_noise"]
    for i in range(len(x0)):                        # the golden losses are those of single samples
        row = slice(i, i + 1)
        loss, terms = p.loss(model, x0[row], None, t=t[row], eps=eps[row])
        assert_close(loss.detach(), g[f"{name}_loss"][i], **TOLERANCE)
        assert set(terms) == ({"mse", "vb"} if variance == "LEARNED_RANGE" else {"mse"})
        for term, value in terms.items():
            assert_close(value, g[f"{name}_{term}"][i], **TOLERANCE)
    grad = torch.autograd.grad(p.loss(model, x0, None, t=t, eps=eps)[0], theta)[0]
    assert_close(grad, g[f"{name}_dtheta"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", OFFICIAL)
@pytest.mark.parametrize("variance", ["LEARNED_RANGE", "FIXED_SMALL"])
def test_the_bound_and_its_gradient_match_official(case, variance):
    _, g = golden_case(f"diffusion_{case}")
    p, theta = official(case, variance), torch.ones(2, requires_grad=True)
    x0, t, eps = g["in_x0"], g["in_t"], g["in_noise"]
    xt = p.q_sample(x0, t, eps)
    term = p.vb_term(toy(variance, theta)(xt, t), x0, xt, t)
    assert_close(term.detach(), g[f"loss_{variance}_EPSILON_KL_loss"], **TOLERANCE)
    grad = torch.autograd.grad(term.mean(), theta)[0]
    assert_close(grad, g[f"loss_{variance}_EPSILON_KL_dtheta"], rtol=1e-3, atol=1e-5)
    log_scale = -2.5 + 0.2 * eps.flip(-1)
    log_p = discretized_gaussian_log_likelihood(x0, x0 + 0.05 * eps, log_scale)
    assert_close(log_p, g["dgll"], rtol=1e-3, atol=1e-4)
    assert_close(normal_kl(x0, log_scale, eps, 0.5 * log_scale - 0.1), g["normal_kl"], **TOLERANCE)


@pytest.mark.parametrize("case", OFFICIAL)
def test_the_bound_in_the_loss_trains_the_variance_only(case):
    """Improved DDPM §3.1: no gradient of vb reaches the mean (theta[0])."""
    _, g = golden_case(f"diffusion_{case}")
    draws = {"t": g["in_t"], "eps": g["in_noise"]}
    gradient = {}
    for learned in (True, False):
        theta = torch.ones(2, requires_grad=True)
        p = GaussianDiffusion(schedule=OFFICIAL[case], learn_sigma=learned)
        model = toy("LEARNED_RANGE" if learned else "FIXED_LARGE", theta)
        loss, _ = p.loss(model, g["in_x0"], None, **draws)
        gradient[learned] = torch.autograd.grad(loss, theta)[0]
    assert_close(gradient[True][0], gradient[False][0])
    assert gradient[True][1] != 0


@pytest.mark.parametrize("steps", [25, 400, 1000])
def test_the_loss_of_a_chain_of_any_length_is_the_hybrid_of_the_paper(steps):
    """L_simple + 0.001 L_vlb, where L_vlb is the sum of its T terms: improved DDPM Eq. 16."""
    p, g, t = GaussianDiffusion(steps, learn_sigma=True), seeded(), torch.arange(steps)
    x0, eps = torch.rand(steps, 1, 2, 2, generator=g) * 2 - 1, torch.randn(1, 1, 2, 2, generator=g)
    eps = eps.expand_as(x0)
    loss, metrics = p.loss(toy(), x0, t=t, eps=eps)
    ab = torch.cumprod(1 - p.betas, 0).view(-1, 1, 1, 1)
    ab_last = torch.cat([torch.ones_like(ab[:1]), ab[:-1]])
    xt = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    pred, v = toy()(xt, t).chunk(2, 1)

    def posterior(x0):          # DDPM Eq. 7, in the form of a product of two Gaussians
        beta = 1 - ab / ab_last
        var = 1 / ((1 - beta) / beta + 1 / (1 - ab_last))
        return var * ((1 - beta).sqrt() / beta * xt + ab_last.sqrt() / (1 - ab_last) * x0), var
    (mean, var), (p_mean, _) = posterior(x0), posterior((xt - (1 - ab).sqrt() * pred) / ab.sqrt())
    low = torch.cat([var[1:2], var[1:]]).log()
    p_std = (low + (v + 1) / 2 * ((1 - ab / ab_last).log() - low)).exp().sqrt()
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean[1:], var[1:].sqrt()),
                                           normal(p_mean[1:], p_std[1:]))
    first = ((xt - (1 - ab).sqrt() * pred) / ab.sqrt())[:1]         # x0 itself is the mean at t = 0
    nll = -discretized_gaussian_log_likelihood(x0[:1], first, p_std[:1].log())
    bound = torch.cat([nll, kl]).mean((1, 2, 3)).sum() / math.log(2)
    simple = (pred - eps).square().mean()
    assert_close(metrics["vb"].double(), 0.001 * bound, rtol=1e-3, atol=0)
    assert_close(loss.double(), simple + 0.001 * bound, rtol=1e-3, atol=0)


def kept_by(respacing):
    """The steps of 1,000 that the official code keeps: "50" evenly, "ddim25" every 40th from 0."""
    count = int(respacing.removeprefix("ddim"))
    strided = list(range(0, 1000, 1000 // count))
    return strided if respacing.startswith("ddim") else respaced_steps(1000, count)


@pytest.mark.parametrize("case", OFFICIAL)
def test_respaced_process_matches_official(case):
    d, g = golden_case(f"diffusion_{case}")
    short = official(case).respaced(kept_by(d["config"]["loss_respacing"]))
    model = toy()
    for i, t in enumerate(torch.tensor(d["config"]["loss_respacing_t"])):
        row = slice(i, i + 1)
        loss, terms = short.loss(model, g["in_x0"][row], t=t[None], eps=g["in_noise"][row])
        assert_close(loss, g["respaced_MSE_loss"][i], **TOLERANCE)
        assert_close(terms["vb"], g["respaced_MSE_vb"][i], **TOLERANCE)
    assert torch.cat(model.saw).tolist() == d["respaced_model_saw_t"]
    kept = kept_by(d["config"]["chain_respacing"])
    chain = official(case, "FIXED_LARGE").respaced(kept)
    assert chain.timestep_map.tolist() == d["chain_timestep_map"]
    assert_close(chain.betas, g["spaced_betas"], rtol=1e-9, atol=0)
    assert_close(chain.alpha_bar, g["spaced_alphas_cumprod"], rtol=1e-9, atol=0)
    names = {"ab_prev": "alphas_cumprod_prev", "sqrt_ab": "sqrt_alphas_cumprod",
             "sqrt_1m_ab": "sqrt_one_minus_alphas_cumprod",
             "sqrt_recip_ab": "sqrt_recip_alphas_cumprod",
             "sqrt_recipm1_ab": "sqrt_recipm1_alphas_cumprod",
             "post_logvar": "posterior_log_variance_clipped",
             "post_mean_x0": "posterior_mean_coef1", "post_mean_xt": "posterior_mean_coef2"}
    for ours, theirs in names.items():
        assert_close(chain.tables[ours], g[f"spaced_{theirs}"], rtol=1e-9, atol=1e-15)
    later = chain.tables["post_logvar"].exp()[1:]
    assert_close(later, g["spaced_posterior_variance"][1:], rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", OFFICIAL)
def test_chains_match_official_step_by_step(case):
    d, g = golden_case(f"diffusion_{case}")
    kept, noise = kept_by(d["config"]["chain_respacing"]), g["in_chain_noise"]
    learned, fixed = official(case).respaced(kept), official(case, "FIXED_LARGE").respaced(kept)

    def walk(p, step, model):
        x, path = g["in_xT"], []
        for k, i in enumerate(reversed(range(p.steps))):
            t = torch.full((len(x),), i)
            x, _ = step(model(x, p.timestep_map[t]), x, t, noise[k])
            path.append(x)
        return torch.stack(path)
    tolerance = dict(rtol=1e-3, atol=1e-4)          # float32 rounding of ten steps, |x| up to 50
    for clip in (False, True):
        model = toy()
        path = walk(learned, lambda *x: learned.ddpm_step(*x, clip=clip), model)
        assert_close(path, g[f"p_chain_clip{int(clip)}"], **tolerance)
        assert [s[0].item() for s in model.saw] == d["chain_model_saw_t"]
    path = walk(fixed, lambda *x: fixed.ddpm_step(*x, clip=True), toy("FIXED_LARGE"))
    assert_close(path, g["p_chain_FIXED_LARGE_clip1"], **tolerance)
    names = [name for name in g if name.startswith("ddim_chain_eta")]
    assert len(names) == 3
    for name in names:
        eta = float(name.removeprefix("ddim_chain_eta"))
        path = walk(learned, lambda *x: learned.ddim_step(*x, eta=eta), toy())
        assert_close(path, g[name], **tolerance)


def test_schedules_match_official_in_float64():
    _, g = golden_case("diffusion_schedules")
    for theirs, ours in (("linear", "linear"), ("squaredcos_cap_v2", "cosine")):
        p, some = GaussianDiffusion(schedule=ours), g[f"{theirs}_1000_index"].long()
        assert p.betas.dtype == p.alpha_bar.dtype == torch.float64
        assert_close(p.betas[some], g[f"{theirs}_1000_betas"], rtol=1e-10, atol=0)
        names = {"ab": "alphas_cumprod", "ab_prev": "alphas_cumprod_prev",
                 "post_mean_x0": "posterior_mean_coef1", "post_mean_xt": "posterior_mean_coef2",
                 "sqrt_recipm1_ab": "sqrt_recipm1_alphas_cumprod",
                 "post_logvar": "posterior_log_variance_clipped"}
        for name, value in names.items():
            want = g[f"{theirs}_1000_{value}"]
            assert_close(p.tables[name][some], want, rtol=1e-10, atol=1e-16)


def test_respacing_lists_and_errors():
    d = json.loads((GOLDEN / "diffusion_timesteps.json").read_text())
    even = [row for row in d["respacing"] if str(row["respacing"]).isdecimal()]
    assert len(even) == 6
    for row in even:
        assert respaced_steps(row["T"], int(row["respacing"])) == row["steps"], row["respacing"]
    assert respaced_steps(7, 7) == list(range(7))
    for bad in ("", None, "250", 2.5, -3, 0, 1001, True, [1, 2]):
        with pytest.raises(ValueError, match="steps .*: give a whole number from 1 to 1000"):
            respaced_steps(1000, bad)


# --------------------------------------------------------------------------------------------------
# schedules and the forward process

@pytest.mark.parametrize("steps", [50, 1000])
@pytest.mark.parametrize("schedule,end", [("linear", (1e-6, 5e-5)), ("cosine", (1e-10, 1e-5)),
                                          ("scaled_linear", (0.004, 0.8))])
def test_schedules_are_monotone_and_end_where_they_promise(schedule, end, steps):
    p = GaussianDiffusion(steps=steps, schedule=schedule)
    assert (p.betas > 0).all() and (p.betas < 1).all() and (p.betas.diff() >= 0).all()
    assert (p.alpha_bar.diff() < 0).all() and p.alpha_bar[0] > 0.99
    assert end[0] < p.alpha_bar[-1] < end[1], p.alpha_bar[-1]
    assert p.timestep_map.tolist() == list(range(steps))


def test_schedules_have_the_published_ends():
    assert_close(GaussianDiffusion().betas[[0, -1]], torch.tensor([1e-4, 0.02]).double())
    assert math.isclose(GaussianDiffusion(100).betas[-1], 0.2)
    sd = GaussianDiffusion(schedule="scaled_linear").betas
    assert_close(sd[[0, -1]], torch.tensor([0.00085, 0.012]).double())
    assert_close(torch.cumprod(1 - sd, 0)[-1].item(), 0.00466, rtol=1e-3, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_posterior_is_bayes_rule(schedule):
    """q(x_{t-1} | xt, x0) by summing q(xt | x_{t-1}) q(x_{t-1} | x0) over a grid."""
    p, x0, xt = GaussianDiffusion(steps=30, schedule=schedule), 0.6, -0.3
    grid = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    for i in (1, 5, 17, 29):
        beta, before = p.betas[i], p.alpha_bar[i - 1]
        log_q = (-(xt - (1 - beta).sqrt() * grid) ** 2 / (2 * beta)
                 - (grid - before.sqrt() * x0) ** 2 / (2 * (1 - before)))
        weight = torch.softmax(log_q, 0)
        mean = (weight * grid).sum()
        logvar = (weight * (grid - mean) ** 2).sum().log()
        row = lambda v: torch.tensor([[v]])
        got = p.q_posterior(row(x0), row(xt), torch.tensor([i]))
        assert_close(got[0].item(), mean.item(), rtol=1e-5, atol=1e-6)
        assert_close(got[1].item(), logvar.item(), rtol=1e-5, atol=1e-5)


def test_a_flow_goes_from_the_picture_to_the_noise():
    x0, eps, t = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.0, 250.0, 1000.0])
    xt = RectifiedFlow().q_sample(x0, t, eps)
    assert torch.equal(xt[0], x0[0]) and torch.equal(xt[2], eps[2])
    assert_close(xt[1], 0.75 * x0[1] + 0.25 * eps[1])


@pytest.mark.parametrize("kind,sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_sampling_goes_down_to_zero_noise(kind, sampler, schedule, steps):
    process = kind() if kind is RectifiedFlow else kind(schedule=schedule)
    chain, path = process.path(sampler, steps)
    levels = [level for _, level in path]
    assert levels == sorted(set(levels), reverse=True) and levels[-1] == 0
    assert len(path) == steps + 1
    if kind is GaussianDiffusion:           # begins with noise, but not where x0 cannot be computed
        assert levels[0] == (0.996 if schedule == "cosine" else 1.0)
        assert_close(chain.alpha_bar, process.alpha_bar[chain.timestep_map], rtol=1e-9, atol=0)
        assert [t for t, _ in path] == list(range(steps - 1, -2, -1))
    else:
        assert_close(levels, [1 - k / steps for k in range(steps + 1)])
        assert [t for t, _ in path] == [1000 * u for u in levels]


# --------------------------------------------------------------------------------------------------
# training

def test_random_numbers_of_a_step():
    """A run is repeated bit for bit only while their order stays: first t, then eps."""
    shape, g = (4, 2, 3), seeded(5)
    t, eps = torch.randint(1000, (4,), generator=g), torch.randn(shape, generator=g)
    draws = GaussianDiffusion().draw(shape, seeded(5))
    assert torch.equal(draws["t"], t) and torch.equal(draws["eps"], eps) and len(draws) == 2
    g = seeded(5)
    u, eps = torch.rand(4, generator=g), torch.randn(shape, generator=g)
    draws = RectifiedFlow().draw(shape, seeded(5))
    assert torch.equal(draws["t"], 1000 * u) and torch.equal(draws["eps"], eps) and len(draws) == 2
    assert GaussianDiffusion(steps=30).draw((5000,), g)["t"].unique().tolist() == list(range(30))


def test_shift_multiplies_the_noise_to_signal_ratio():
    """Esser et al. 2024 derive the shift from it: u / (1 - u) is multiplied by it for every u."""
    even, shifted = (RectifiedFlow(s).draw((1000, 1), seeded()) for s in (1.0, 3.0))
    u, v = even["t"].double() / 1000, shifted["t"].double() / 1000
    assert_close(v / (1 - v), 3 * u / (1 - u), rtol=1e-3, atol=1e-4)
    assert torch.equal(even["eps"], shifted["eps"]) and 0.7 < v.median() < 0.8


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_true_target_has_no_loss(schedule, prediction):
    p, g = GaussianDiffusion(schedule=schedule, prediction=prediction), seeded()
    x0, eps = torch.randn(6, 2, generator=g), torch.randn(6, 2, generator=g)
    t = torch.tensor([0, 1, 10, 200, 700, 999])
    a, s = (x.sqrt().float()[:, None] for x in (p.alpha_bar[t], 1 - p.alpha_bar[t]))
    target = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[prediction]      # v: Salimans & Ho 2022

    def model(x, times, cond):
        assert_close(x, a * x0 + s * eps) and torch.equal(times, t) and cond == "condition"
        return target
    assert p.loss(model, x0, "condition", t=t, eps=eps)[0] < 1e-12
    middle = slice(2, 5)            # at the ends, one of eps and x0 can hardly be seen in xt
    x0_seen = p.to_x0(target[middle], (a * x0 + s * eps)[middle], t[middle])
    assert_close(x0_seen, x0[middle], rtol=1e-4, atol=1e-4)


def test_a_flow_learns_the_velocity():
    flow, g = RectifiedFlow(), seeded()
    x0 = torch.randn(20_000, 1, generator=g) * S + M
    draws = flow.draw(x0.shape, g)
    assert 0 <= draws["t"].min() and draws["t"].max() < 1000
    at = lambda f: flow.loss(f, x0, None, **draws)[0].item()
    assert at(lambda x, t, c: draws["eps"] - x0) == 0
    best = at(exact_velocity)               # the conditional mean is the best that a network can do
    assert best < at(lambda x, t, c: exact_velocity(x, t) + 0.1)
    assert best < at(lambda x, t, c: 0.9 * exact_velocity(x, t))


@pytest.mark.parametrize("process", [GaussianDiffusion(), GaussianDiffusion(learn_sigma=True),
                                     RectifiedFlow()], ids=["fixed", "learned", "flow"])
def test_masked_loss_is_a_true_mean(process):
    """Every term of the loss is the mean over the entries with mask 1, and reads no other."""
    g, learned = seeded(), getattr(process, "learn_sigma", False)
    x0, eps = torch.randn(3, 2, 4, 4, generator=g), torch.randn(3, 2, 4, 4, generator=g)
    mask, t = (torch.rand(3, 1, 4, 4, generator=g) > 0.4).float(), torch.tensor([0, 10, 500])
    model = lambda x, t, c: torch.cat([0.5 * x, 0.2 * x], 1) if learned else 0.5 * x
    loss, terms = process.loss(model, x0, None, mask, t=t, eps=eps)
    xt = process.q_sample(x0, t, eps)
    target = eps - x0 if process.__class__ is RectifiedFlow else eps
    squares = (target - 0.5 * xt) ** 2
    rows = [squares[i][mask[i].expand(2, 4, 4) == 1].mean() for i in range(3)]
    assert_close(terms["mse"], torch.stack(rows).mean())
    assert_close(loss, sum(terms.values()))
    hidden = torch.where(mask > 0, x0, x0 + 1), torch.where(mask > 0, eps, eps - 1)
    again, terms_again = process.loss(model, hidden[0], None, mask, t=t, eps=hidden[1])
    assert_close(again, loss)
    assert_close(terms_again, terms)
    whole, _ = process.loss(model, x0, None, torch.ones_like(mask), t=t, eps=eps)
    assert_close(whole, process.loss(model, x0, None, t=t, eps=eps)[0])
    assert (whole - loss).abs() > 1e-3


@pytest.mark.parametrize("process", [GaussianDiffusion(), GaussianDiffusion(learn_sigma=True),
                                     RectifiedFlow()], ids=["fixed", "learned", "flow"])
@pytest.mark.parametrize("t", [0, 400])
def test_a_row_whose_mask_is_all_0_adds_nothing(process, t):
    """Its mean is 0, not 0 / 0: the batch's loss is a third less than that of the other two."""
    draws = process.draw((3, 2, 4, 4), seeded()) | {"t": torch.full((3,), t)}
    x0, w = torch.randn(3, 2, 4, 4, generator=seeded(1)), torch.tensor(0.5, requires_grad=True)
    learned = getattr(process, "learn_sigma", False)
    model = lambda x, t, c: torch.cat([w * x, w * x], 1) if learned else w * x
    mask = torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    loss, terms = process.loss(model, x0, None, mask, **draws)
    two, _ = process.loss(model, x0[:2], None, **{k: v[:2] for k, v in draws.items()})
    assert_close(loss, two * 2 / 3)
    assert_close(sum(terms.values()), loss)
    assert torch.autograd.grad(loss, w)[0].isfinite()


@pytest.mark.parametrize("process", [GaussianDiffusion(), RectifiedFlow()])
def test_loss_needs_its_random_numbers_and_hands_out_plain_metrics(process):
    w = torch.ones((), requires_grad=True)
    x0 = torch.randn(3, 2, 4, generator=seeded())
    draws = process.draw(x0.shape, seeded())
    loss, metrics = process.loss(lambda x, t, c: w * x, x0, **draws)
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())
    assert loss.shape == () and torch.equal(metrics["mse"], loss.detach())
    with pytest.raises(TypeError):
        process.loss(lambda x, t, c: x, x0, t=draws["t"])


@pytest.mark.parametrize("process", [GaussianDiffusion(), RectifiedFlow()])
def test_the_network_of_a_loss_receives_xt_t_and_the_condition(process):
    x0, calls = torch.randn(SHAPE, generator=seeded()), []
    draws = process.draw(SHAPE, seeded(1))
    process.loss(lambda *inputs: (calls.append(inputs), x0)[1], x0, COND, **draws)
    xt = process.q_sample(x0, draws["t"], draws["eps"])
    assert len(calls) == 1 and all(map(torch.equal, calls[0], (xt, draws["t"], COND)))


# --------------------------------------------------------------------------------------------------
# x0 ~ N(M, S^2) in every coordinate: the best network, and where noise must end, have closed forms

M, S = 0.7, 0.4


def exact(process, prediction="eps", error=0.0):
    """The best network for x0 ~ N(M, S^2): E[x0 | xt], told as eps, v or x0."""
    def model(x, t, cond=None):
        ab = process.alpha_bar[t].float().view(-1, 1)
        x0 = M + S ** 2 * ab.sqrt() / (ab * S ** 2 + 1 - ab) * (x - ab.sqrt() * M)
        eps = (1 + error) * (x - ab.sqrt() * x0) / (1 - ab).sqrt()
        return {"x0": x0, "eps": eps, "v": ab.sqrt() * eps - (1 - ab).sqrt() * x0}[prediction]
    return model


def with_small_variance(network):
    """The network, and the posterior's variance: v = -1."""
    return lambda x, t, c: torch.cat([network(x, t), torch.full_like(x, -1.0)], 1)


def exact_velocity(x, t, cond=None):
    u = (t / 1000).view(-1, 1)
    x0 = M + S ** 2 * (1 - u) / ((1 - u) ** 2 * S ** 2 + u ** 2) * (x - (1 - u) * M)
    return (x - x0) / u.clamp(min=1e-6)


def ode_end(process, z):
    """Where the exact ODE takes z: (x - mean) / deviation of the Gaussian at its t stays."""
    ab = process.alpha_bar[process.path("ddim", 10)[0].timestep_map[-1]]
    return (M + S * (z - ab.sqrt() * M) / (ab * S ** 2 + 1 - ab).sqrt()).float()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_samplers_solve_the_ode_to_their_order(schedule, prediction):
    """Twice as many steps: DDIM's error is halved, DPM-Solver++'s divided by four."""
    p = GaussianDiffusion(schedule=schedule, prediction=prediction)
    z = torch.randn(512, 1, generator=seeded())

    even = copy.copy(p)                                                 # for dpm++ too: even in t
    even.path = lambda sampler, *given: p.path("ddim", *given)

    def error(sampler, steps, p=p):
        x = p.sample(exact(p, prediction), z.shape, steps=steps, sampler=sampler, noise=z)
        return (x - ode_end(p, z)).abs().mean().item()
    assert 1.8 < error("ddim", 50) / error("ddim", 100) < 2.2
    assert error("ddim", 200) < 0.01
    assert error("dpm++", 100, even) / error("dpm++", 200, even) > 3.4
    assert error("dpm++", 20) < 0.01                                    # in log-SNR
    for steps in (10, 15, 20):
        assert error("dpm++", steps) < 0.35 * error("ddim", steps), steps
    assert error("dpm++", 25) < 0.6 * error("dpm++", 25, even)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", [{"sampler": "ddpm"}, {"sampler": "ddim", "eta": 1.0}])
def test_random_samplers_reach_the_known_gaussian(schedule, options):
    """20,000 samples: the standard errors of mean and deviation are 0.003 and 0.002."""
    p = GaussianDiffusion(schedule=schedule, learn_sigma=True)
    model = with_small_variance(exact(p))
    x = p.sample(model, (20_000, 1), steps=1000, generator=seeded(), **options)
    assert abs(x.mean() - M) < 0.015 and abs(x.std() - S) < 0.01, (x.mean(), x.std())


@pytest.mark.parametrize("sampler,steps,tolerance", [("euler", 100, 0.012), ("heun", 25, 0.003)])
def test_flow_reaches_the_known_gaussian(sampler, steps, tolerance):
    z = torch.randn(512, 1, generator=seeded())

    def error(steps):
        x = RectifiedFlow().sample(exact_velocity, z.shape, sampler=sampler, steps=steps, noise=z)
        return (x - (M + S * z)).abs().mean().item()
    assert error(steps) < tolerance
    assert error(steps) / error(2 * steps) > (3.4 if sampler == "heun" else 1.8)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_flow_with_new_noise_reaches_the_known_gaussian(eta):
    """20,000 samples: the standard errors of mean and deviation are 0.003 and 0.002."""
    x = RectifiedFlow().sample(exact_velocity, (20_000, 1), steps=400, eta=eta, generator=seeded())
    assert abs(x.mean() - M) < 0.015 and abs(x.std() - S) < 0.01, (x.mean(), x.std())


@pytest.mark.parametrize("u, steps", [(0.8, 2), (0.5, 5000), (1.0, 2)])
def test_new_noise_of_a_flow_is_that_of_its_sde(u, steps):
    """For x0 = 0: x_u = r x_next + noise, r = (1 - u) / (1 - u_next), so cov(x_next, x_u) is r
    u_next^2. In small steps the new noise has the variance g^2 du, g^2 = 2 u / (1 - u).
    """
    def after_a_step(noise, eta):
        path = RectifiedFlow().trajectory(
            lambda x, t, y: x / (t / 1000).view(-1, 1), (10_000, 1), x_init=torch.zeros(10_000, 1),
            strength=u, noise=torch.full((10_000, 1), noise), steps=steps, eta=eta,
            generator=seeded())
        return next(path)[0].double()
    u_next = u * (1 - 1 / steps)
    for eta in (1.0, 0.5):
        new = after_a_step(0.0, eta)
        kept = (after_a_step(1.0, eta) - new).mean().item()                 # of eps = x_u / u
        if eta == 1:
            r = (1 - u) / (1 - u_next)
            assert u * kept == pytest.approx(r * u_next ** 2, rel=1e-3, abs=1e-6)
        assert new.std().item() == pytest.approx((u_next ** 2 - kept ** 2) ** 0.5, rel=0.03)
        if steps > 1000:
            assert new.var().item() == pytest.approx(eta ** 2 * 2 * (u - u_next), rel=0.06)


def test_a_flow_in_euler_steps_is_written_out():
    """25 steps with guidance 2, the default run: the same picture bit for bit."""
    model = lambda x, t, y: torch.tanh(x * (t.view(-1, 1) / 500) + y)
    cond, null, x = (torch.randn(6, 3, generator=seeded(i)) for i in range(3))
    got = RectifiedFlow().sample(model, x.shape, cond, null, cfg_scale=2.0, noise=x)
    us = [1.0 * (1 - k / 25) for k in range(26)]
    for u, u_next in zip(us, us[1:]):
        t = torch.full((12,), 1000 * u)
        with_y, without = model(torch.cat([x, x]), t, torch.cat([cond, null])).chunk(2)
        velocity = without + 2.0 * (with_y - without)
        x0 = x - u * velocity
        x = x + (u_next - u) * ((x - x0) / u)
    assert torch.equal(got, x)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "ddpm"])
def test_the_three_predictions_are_one_estimate(schedule, sampler):
    paths = []
    for kind in ("eps", "v", "x0"):
        p = GaussianDiffusion(schedule=schedule, prediction=kind)
        options = {"sampler": sampler, "steps": 10, "generator": seeded(1)}
        paths.append(p.sample(exact(p, kind), (64, 3), **options))
    assert_close(paths[0], paths[1], rtol=1e-3, atol=1e-3)
    assert_close(paths[0], paths[2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "ddpm"])
@pytest.mark.parametrize("error", [0.01, -0.01])
def test_a_small_error_of_the_network_stays_small(schedule, sampler, error):
    """An eps that is 1 % off: cosine's last steps would multiply it by up to 20,000 in x0."""
    p = GaussianDiffusion(schedule=schedule, learn_sigma=True)
    model = with_small_variance(exact(p, "eps", error))
    x = p.sample(model, (4000, 1), sampler=sampler, steps=50, generator=seeded())
    assert abs(x.mean() - M) < 0.05 and 0.8 * S < x.std() < 1.2 * S, (x.mean(), x.std())


def test_ddim_eta_one_on_every_step_is_ddpm():
    p = GaussianDiffusion(schedule="cosine", steps=60, learn_sigma=True)
    model = with_small_variance(exact(p))
    x, y = (p.sample(model, (16, 4), steps=60, generator=seeded(5), **options)
            for options in ({"sampler": "ddim", "eta": 1.0}, {"sampler": "ddpm"}))
    assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_the_learned_variance_has_the_fixed_one_as_its_upper_end():
    fixed, learned = GaussianDiffusion(), GaussianDiffusion(learn_sigma=True)
    network = exact(fixed)
    model = lambda x, t, c: torch.cat([network(x, t), torch.ones_like(x)], 1)
    assert fixed.default_sampler == "ddim" and learned.default_sampler == "ddpm"
    got = learned.sample(model, (8, 1), steps=20, generator=seeded())       # ddpm is the default
    want = fixed.sample(network, (8, 1), sampler="ddpm", steps=20, generator=seeded())
    assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", GaussianDiffusion.samplers)
@pytest.mark.parametrize("schedule,t", [("linear", 999), ("cosine", 995), ("scaled_linear", 999)])
def test_one_step_is_one_call_at_the_noisy_end(sampler, schedule, t):
    p, saw = GaussianDiffusion(schedule=schedule), []
    network = exact(p)

    def model(x, t, cond):
        saw.extend(t.tolist())
        return network(x, t)
    x = p.sample(model, (64, 1), sampler=sampler, steps=1, generator=seeded())
    assert saw == [t] * 64
    assert (x - M).abs().max() < 0.1            # from pure noise the best guess is the mean


@pytest.mark.parametrize("variance", [-1.0, 0.0, 1.0, 1.5])
def test_a_chain_of_one_step_gives_the_estimate_whatever_the_learned_variance(variance):
    noise = torch.randn(2, 3, 4, generator=seeded())
    model = lambda x, t, c: torch.cat([0.9 * x, torch.full_like(x, variance)], 1)
    process = GaussianDiffusion(learn_sigma=True)
    ab = process.alpha_bar[-1].item()
    x = process.sample(model, noise.shape, sampler="ddpm", steps=1, noise=noise)
    assert_close(x, noise * (1 - 0.9 * (1 - ab) ** 0.5) / ab ** 0.5, rtol=1e-4, atol=1e-4)


def test_default_steps():
    count = []
    for kind, sampler in SAMPLERS:
        calls = []
        model = lambda x, t, c: (calls.append(t), 0 * x)[1]
        kind().sample(model, (1, 1), sampler=sampler, generator=seeded())
        count.append(len(calls))
    assert count[:2] == [50, 250] and 45 <= count[2] <= 50      # dpm++: distinct steps only
    assert count[3:] == [25, 99]                                # heun: 2 forwards, 1 in the last


@pytest.mark.parametrize("process", [GaussianDiffusion(), RectifiedFlow()])
def test_trajectory_yields_states(process):
    model = exact(process) if isinstance(process, GaussianDiffusion) else exact_velocity
    states = list(process.trajectory(model, (5, 1), steps=12, generator=seeded()))
    assert len(states) == 12 and states[0][0].shape == states[0][1].shape == (5, 1)
    assert_close(states[-1][0], states[-1][1])                  # the last step ends on its x0
    assert torch.equal(states[-1][0], process.sample(model, (5, 1), steps=12, generator=seeded()))


# --------------------------------------------------------------------------------------------------
# options of the samplers

CHANNELS = torch.tensor([1.0, -0.5])[:, None]


def read_all(x, t, cond):
    """A network that reads x, t and the condition, differently in every channel."""
    by_row = lambda v: v.float().view(-1, 1, 1)
    return torch.sin(x * (1 + by_row(t) / 1000)) + CHANNELS * by_row(cond)


COND, NULL = torch.tensor([0.3, 1.0, -1.0]), torch.zeros(3)
SHAPE = (3, 2, 5)
KNOWN = 0.5 * torch.randn(SHAPE, generator=seeded(9))
# an option -> (two values that must give different pictures, other options that go with them)
VALUES = {"cfg_scale": (1.0, 2.0, {}),
          "cfg_channels": (None, 1, {"cfg_scale": 2.0}), "clip": (False, True, {}),
          "x_init": (KNOWN, -KNOWN, {"strength": 0.5}), "strength": (1.0, 0.5, {"x_init": KNOWN}),
          "mask": (None, torch.eye(3, 5)[:, None], {"x_init": KNOWN}), "eta": (0.0, 0.5, {}),
          "noise": (None, KNOWN, {}), "generator": (seeded(0), seeded(1), {})}


def sample(kind, sampler, model=read_all, **options):
    options = {"generator": seeded(), "steps": 8, **options}
    return kind().sample(model, SHAPE, COND, NULL, sampler=sampler, **options)


@pytest.mark.parametrize("kind,sampler", SAMPLERS)
def test_every_option_is_read(kind, sampler):
    assert set(kind.options) == set(kind.samplers) == set(kind.default_steps)
    assert kind.options[sampler] - {"device"} <= set(VALUES)
    for name in kind.options[sampler] - {"device"}:
        one, other, rest = VALUES[name]
        x, y = (sample(kind, sampler, **rest, **{name: value}) for value in (one, other))
        assert (x - y).abs().max() > 1e-3, f"{sampler} does not read {name}"
    model = lambda x, t, c: 0 * x
    x = kind().sample(model, SHAPE, sampler=sampler, steps=2, device="meta")
    assert x.device.type == "meta"
    default = {name: value for name, value in DEFAULTS.items() if name != "generator"}
    assert torch.equal(sample(kind, sampler, **default), sample(kind, sampler))


@pytest.mark.parametrize("kind,sampler", SAMPLERS)
def test_an_option_that_nobody_reads_is_refused(kind, sampler):
    for name in {"eta", "stride", "truncation", "guidance"} - kind.options[sampler]:
        with pytest.raises(ValueError) as error:
            sample(kind, sampler, **{name: 0.0})
        words = str(error.value)
        assert f"sampler '{sampler}' does not read {name}" in words
        assert ("use sampler ddim" in words) == (name == "eta" and kind is GaussianDiffusion)
    for bad in ("plms", "", "posterior"):
        with pytest.raises(ValueError, match=f"unknown sampler '{bad}'") as error:
            check_options(kind(), bad, {})
        assert all(name in str(error.value) for name in kind.samplers)


@pytest.mark.parametrize("kind,sampler", SAMPLERS)
@pytest.mark.parametrize("options,words", [
    ({"strength": 0, "x_init": KNOWN}, "strength 0"), ({"strength": 0.5}, "x_init"),
    ({"strength": 1.5, "x_init": KNOWN}, "strength 1.5"), ({"mask": KNOWN}, "x_init"),
    ({"strength": -0.1, "x_init": KNOWN}, "strength -0.1"),
    ({"strength": float("nan"), "x_init": KNOWN}, "strength nan"),
    ({"steps": 0}, "steps 0"), ({"steps": -2}, "steps -2"), ({"steps": 2.5}, "2.5"),
    ({"steps": 10 ** 12}, "steps 10000"), ({"cfg_channels": 99}, "cfg_channels 99"),
    ({"steps": "many"}, "many"), ({"eta": -0.1}, "eta"), ({"eta": 1.5}, "eta")])
def test_values_out_of_range_are_refused_in_one_line(kind, sampler, options, words):
    with pytest.raises(ValueError, match=words) as error:
        sample(kind, sampler, **options)
    assert "\n" not in str(error.value)


def recorded(model, calls):
    """`model`, noting (batch size, t, x) of every call."""
    def record(x, t, cond=None):
        calls.append((len(x), t[0].item(), x.clone()))
        return model(x, t, cond)
    return record


@pytest.mark.parametrize("kind,sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.3, 0.05, 0.9, 0.001])
def test_strength_is_the_noise_level_to_begin_at(kind, sampler, strength):
    calls, process, noise = [], kind(), torch.randn(SHAPE, generator=seeded(3))
    process.sample(recorded(read_all, calls), SHAPE, COND, sampler=sampler, x_init=KNOWN,
                   noise=noise, strength=strength)
    _, t, x = calls[0]
    if kind is GaussianDiffusion:
        assert t == round(1000 * strength) - 1
    else:
        assert math.isclose(t, 1000 * strength, rel_tol=1e-6)
    assert_close(x, process.q_sample(KNOWN, torch.full((3,), t), noise))
    assert [t for _, t, _ in calls] == sorted([t for _, t, _ in calls], reverse=True)


def test_strength_keeps_its_meaning_on_a_shorter_chain():
    calls, process = [], GaussianDiffusion().respaced(respaced_steps(1000, 100))
    process.sample(recorded(read_all, calls), SHAPE, COND, steps=20, x_init=KNOWN, strength=0.5)
    assert 480 <= calls[0][1] <= 499            # the noisiest of the 100 that is not above 0.5


def test_guidance_formula():
    model = lambda x, t, c: x * 0.1 + c
    cond, null = torch.full((4, 2), 0.3), torch.full((4, 2), -0.2)
    x, t = torch.randn(4, 2, generator=seeded()), torch.zeros(4, dtype=torch.int64)
    # Ho & Salimans 2022 Eq. 6 with w = s - 1
    assert_close(guided(model, cond, null, 3.0)(x, t), x * 0.1 + 3.0 * 0.3 - 2.0 * -0.2)
    assert torch.equal(guided(model, cond, null, 1.0)(x, t), model(x, t, cond))
    assert torch.equal(guided(model, cond, null, 0.0)(x, t), model(x, t, null))
    two_channels = guided(model, cond, null, 3.0, cfg_channels=1)(x, t)
    assert_close(two_channels[:, 0], x[:, 0] * 0.1 - 0.2 + 1.5)
    assert_close(two_channels[:, 1], x[:, 1] * 0.1 + 0.3)
    learned = lambda x, t, c: torch.cat([x * 0.1 + c, c], 1)            # two variance channels
    assert_close(guided(learned, cond, null, 3.0)(x, t)[:, 2:], cond)
    with pytest.raises(ValueError, match="label dropout"):
        guided(model, cond, None, 2.0)


@pytest.mark.parametrize("kind,sampler", SAMPLERS)
def test_guidance_scales_one_and_zero_are_plain_runs(kind, sampler):
    run = lambda cond, null, scale: kind().sample(read_all, SHAPE, cond, null, sampler=sampler,
                                                  steps=8, cfg_scale=scale, generator=seeded())
    assert torch.equal(run(COND, NULL, 1.0), run(COND, None, 1.0))
    assert torch.equal(run(COND, NULL, 0.0), run(NULL, None, 1.0))
    assert_close(run(COND, COND, 3.0), run(COND, None, 1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind,sampler", SAMPLERS)
def test_guidance_of_the_first_channels_leaves_the_others(kind, sampler):
    """Also with scale 0: there the first channels are those of the null condition."""
    channels = lambda x, t, c: x * torch.zeros(()) + c.view(-1, 1) * torch.tensor([1.0, 2.0])
    cond, null, t = torch.tensor([3.0]), torch.tensor([5.0]), torch.zeros(1)
    for scale, first in ((0.0, 5.0), (2.0, 1.0)):
        got = guided(channels, cond, null, scale, cfg_channels=1)(torch.ones(1, 2), t)
        assert got.tolist() == [[first, 6.0]]
    a, b = (sample(kind, sampler, cfg_scale=0.0, cfg_channels=k) for k in (1, None))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("kind,sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_keeps_the_known_pixels(kind, sampler, strength):
    calls, process, noise = [], kind(), torch.randn(SHAPE, generator=seeded(3))
    mask = (torch.rand(3, 1, 5, generator=seeded(4)) > 0.5).float()
    x = process.sample(recorded(read_all, calls), SHAPE, COND, sampler=sampler, x_init=KNOWN,
                       mask=mask, noise=noise, strength=strength, steps=6)
    known = (mask == 0).expand_as(x)
    assert torch.equal(x[known], KNOWN[known]) and (x[~known] - KNOWN[~known]).abs().min() > 1e-4
    calls = calls[::2] if sampler == "heun" else calls        # its second forward is between steps
    for _, t, xt in calls:                          # the network receives them with the noise of t
        want = process.q_sample(KNOWN, torch.full((3,), t), noise)
        assert_close(xt[known], want[known])


@pytest.mark.parametrize("kind,sampler", SAMPLERS)
def test_picture_i_does_not_depend_on_the_batch(kind, sampler):
    model, seeds = lambda x, t, c: 0.3 * x, lambda ids: [seeded(i) for i in ids]
    eight = kind().sample(model, (8, 2, 4), sampler=sampler, steps=5, generator=seeds(range(8)))
    one = kind().sample(model, (1, 2, 4), sampler=sampler, steps=5, generator=seeds([5]))
    assert torch.equal(eight[5], one[0]) and not torch.equal(eight[5], eight[4])
    with pytest.raises(ValueError, match="one per sample"):
        randn((3, 2), seeds(range(2)))


@pytest.mark.parametrize("dim", [2, 6])
def test_a_timestep_is_cosines_then_sines(dim):
    half, t = dim // 2, [0.0, 17.0, 999.5]
    angles = [[u * 10_000 ** (-k / half) for k in range(half)] for u in t]
    want = [[*map(math.cos, row), *map(math.sin, row)] for row in angles]
    # float32 angles below 1000 are off by at most 6e-5 or so
    assert_close(timestep_embedding(torch.tensor(t), dim), torch.tensor(want), rtol=0, atol=3e-4)


def test_wrong_names_are_named():
    for bad in (dict(schedule="exp"), dict(prediction="mu")):
        with pytest.raises(ValueError, match=next(iter(bad.values()))):
            GaussianDiffusion(**bad)
    with pytest.raises(ValueError, match="more than 20"):
        GaussianDiffusion(steps=10)
    with pytest.raises(ValueError, match="from 1 to 1000"):
        GaussianDiffusion().sample(read_all, SHAPE, COND, steps=1001)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_min_snr_weighs_errors_of_x0_by_the_snr_and_at_most_by_gamma(prediction):
    """Hang et al. 2023, Eq. 8: whatever is predicted, the error of the x0 that it stands for."""
    x0, eps, said = torch.randn(3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    t = torch.tensor([10, 300, 600, 900])                       # SNR above gamma, and below
    p = GaussianDiffusion(schedule="cosine", prediction=prediction, min_snr=5.0)
    ab = p.alpha_bar[t].view(4, 1, 1, 1)
    xt = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    guess = {"x0": said, "eps": (xt - (1 - ab).sqrt() * said) / ab.sqrt(),
             "v": ab.sqrt() * xt - (1 - ab).sqrt() * said}[prediction]
    snr = (ab / (1 - ab)).flatten()
    expected = (snr.clamp(max=5) * ((guess - x0) ** 2).mean((1, 2, 3))).mean()
    loss = p.loss(lambda x, t, y: said.float(), x0.float(), None, t=t, eps=eps.float())[0]
    assert_close(loss, expected.float(), rtol=1e-4, atol=1e-6)
    assert (snr > 5).any() and (snr < 5).any()
