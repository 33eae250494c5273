"""diffusion.py against the official implementation's figures, closed forms, and a world whose exact score is known."""
import json
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from conftest import GOLDEN, golden_case
from diffusion import (GaussianDiffusion, LossSecondMoment, RectifiedFlow, discretized_gaussian_log_likelihood, guided,
                       make_betas, normal_kl, randn, respaced_steps)

TOLERANCE = dict(rtol=3e-4, atol=1e-5)
SCHEDULES = {"linear1000": "linear", "cosine1000": "cosine"}


def toy(learn_sigma=True, theta=(1.0, 1.0)):
    """The closed-formula network of the golden files; remembers the timesteps it was shown."""
    def model(x, t, cond=None):
        model.saw.append(t.clone())
        u = (t.float() / 1000).view(-1, 1, 1, 1)
        eps = theta[0] * ((0.2 + 0.7 * u) * x + 0.1 * torch.sin(2 * x.flip(-1)))
        v = theta[1] * torch.tanh(0.5 * x.flip(1) + 2 * u - 1)
        return torch.cat([eps, v], 1) if learn_sigma else eps
    model.saw = []
    return model


@pytest.mark.parametrize("case", SCHEDULES)
def test_forward_process_matches_official(case):
    _, g = golden_case(f"diffusion_{case}")
    p, x0, t, eps = GaussianDiffusion(schedule=SCHEDULES[case]), g["in_x0"], g["in_t"], g["in_noise"]
    xt = p.q_sample(x0, t, eps)
    assert_close(xt, g["q_sample"], **TOLERANCE)
    mean, var, logvar = p.q_posterior(x0, xt, t)
    assert_close(mean, g["q_post_mean"], **TOLERANCE)
    assert_close(var.expand_as(x0), g["q_post_var"], **TOLERANCE)
    assert_close(logvar.expand_as(x0), g["q_post_logvar"], **TOLERANCE)


@pytest.mark.parametrize("case", SCHEDULES)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["LEARNED_RANGE", "FIXED_LARGE", "FIXED_SMALL"])
def test_p_mean_variance_matches_official(case, variance, clip):
    _, g = golden_case(f"diffusion_{case}")
    learned = variance == "LEARNED_RANGE"
    p = GaussianDiffusion(schedule=SCHEDULES[case], learn_sigma=learned,
                          variance="fixed_large" if learned else variance.lower())
    out = p.p_mean_variance(toy(learned)(g["in_x"], g["in_t"]), g["in_x"], g["in_t"], clip)
    for ours, theirs in (("mean", "mean"), ("var", "variance"), ("logvar", "log_variance"), ("x0", "pred_xstart")):
        assert_close(out[ours], g[f"pmv_{variance}_clip{int(clip)}_{theirs}"], **TOLERANCE)


@pytest.mark.parametrize("case", SCHEDULES)
def test_losses_and_their_gradients_match_official(case):
    _, g = golden_case(f"diffusion_{case}")
    names = {k[5:-5] for k in g if k.startswith("loss_") and k.endswith("_loss")}
    assert len(names) == 8
    for name in names:
        variance, mean, objective = next(
            (v, m, name.removeprefix(f"{v}_{m}_")) for v in ("LEARNED_RANGE", "FIXED_LARGE", "FIXED_SMALL")
            for m in ("EPSILON", "START_X") if name.startswith(f"{v}_{m}_"))
        learned = variance == "LEARNED_RANGE"
        p = GaussianDiffusion(schedule=SCHEDULES[case], prediction={"EPSILON": "eps", "START_X": "x0"}[mean],
                              learn_sigma=learned, variance="fixed_large" if learned else variance.lower())
        theta = torch.ones(2, requires_grad=True)
        terms = p.losses(toy(learned, theta), g["in_x0"], None, g["in_t"], g["in_noise"], objective=objective.lower())
        for k, v in terms.items():
            assert_close(v.detach(), g[f"loss_{name}_{k}"], **TOLERANCE)
        grad = torch.autograd.grad(terms["loss"].mean(), theta)[0]
        assert_close(grad, g[f"loss_{name}_dtheta"], rtol=1e-3, atol=1e-5)
    theta = torch.ones(2, requires_grad=True)       # the bound trains the variance alone: nothing reaches the mean
    p = GaussianDiffusion(schedule=SCHEDULES[case], learn_sigma=True)
    vb = p.losses(toy(True, theta), g["in_x0"], None, g["in_t"], g["in_noise"])["vb"].mean()
    grad = torch.autograd.grad(vb, theta)[0]
    assert grad[0] == 0 and grad[1] != 0


@pytest.mark.parametrize("case", SCHEDULES)
def test_likelihood_pieces_match_official(case):
    d, g = golden_case(f"diffusion_{case}")
    x0, noise, t = g["in_x0"], g["in_noise"], g["in_t"]
    log_scales = -2.5 + 0.2 * noise.flip(-1)
    log_likelihood = discretized_gaussian_log_likelihood(x0, x0 + 0.05 * noise, log_scales)
    assert_close(log_likelihood, g["dgll"], rtol=1e-3, atol=1e-4)
    assert_close(normal_kl(x0, log_scales, noise, 0.5 * log_scales - 0.1), g["normal_kl"], **TOLERANCE)
    p = GaussianDiffusion(schedule=SCHEDULES[case], learn_sigma=True)
    xt = p.q_sample(x0, t, noise)
    assert_close(p.vb_term(toy()(xt, t), x0, xt, t, clip=True), g["vb_clip1_output"], **TOLERANCE)
    bpd = p.respaced(d["config"]["chain_respacing"]).bits_per_dim(toy(), x0, clip=True, noise=g["in_chain_noise"])
    for ours, theirs in (("total", "total_bpd"), ("prior", "prior_bpd"), ("vb", "vb"), ("x0_mse", "xstart_mse"),
                         ("eps_mse", "mse")):
        assert_close(bpd[ours], g[f"bpd_{theirs}"], **TOLERANCE)


@pytest.mark.parametrize("case", SCHEDULES)
def test_respaced_process_matches_official(case):
    d, g = golden_case(f"diffusion_{case}")
    short = GaussianDiffusion(schedule=SCHEDULES[case], learn_sigma=True).respaced(d["config"]["loss_respacing"])
    t = torch.tensor(d["config"]["loss_respacing_t"])
    for objective in ("MSE", "RESCALED_MSE"):
        model = toy()
        for k, v in short.losses(model, g["in_x0"], None, t, g["in_noise"], objective=objective.lower()).items():
            assert_close(v, g[f"respaced_{objective}_{k}"], **TOLERANCE)
        assert model.saw[0].tolist() == d["respaced_model_saw_t"]
    chain = GaussianDiffusion(schedule=SCHEDULES[case]).respaced(d["config"]["chain_respacing"])
    assert chain.timestep_map.tolist() == d["chain_timestep_map"]
    assert_close(chain.betas, g["spaced_betas"], rtol=1e-9, atol=0)
    assert_close(chain.alpha_bar, g["spaced_alphas_cumprod"], rtol=1e-9, atol=0)
    tables = {"sqrt_recip_ab": "sqrt_recip_alphas_cumprod", "sqrt_recipm1_ab": "sqrt_recipm1_alphas_cumprod",
              "post_var": "posterior_variance", "post_logvar": "posterior_log_variance_clipped",
              "post_mean_x0": "posterior_mean_coef1", "post_mean_xt": "posterior_mean_coef2"}
    for ours, theirs in tables.items():
        assert_close(chain._float64[ours], g[f"spaced_{theirs}"], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("case", SCHEDULES)
def test_chains_match_official_step_by_step(case):
    d, g = golden_case(f"diffusion_{case}")
    spec, noise, xT = d["config"]["chain_respacing"], g["in_chain_noise"], g["in_xT"]
    learned = GaussianDiffusion(schedule=SCHEDULES[case], learn_sigma=True).respaced(spec)
    fixed = GaussianDiffusion(schedule=SCHEDULES[case]).respaced(spec)

    def walk(p, step, model):
        x, path = xT, []
        for k, i in enumerate(reversed(range(p.steps))):
            t = torch.full((len(x),), i)
            x, _ = step(p, model(x, p.timestep_map[t]), x, t, noise[k])
            path.append(x)
        return torch.stack(path)
    chain_tolerance = dict(rtol=1e-3, atol=1e-4)                # float32 rounding over ten steps, |x| up to a few dozen
    for clip in (False, True):
        model = toy()
        path = walk(learned, lambda p, out, x, t, z: p.ddpm_step(out, x, t, z, clip), model)
        assert_close(path, g[f"p_chain_clip{int(clip)}"], **chain_tolerance)
        assert [s[0].item() for s in model.saw] == d["chain_model_saw_t"]
    path = walk(fixed, lambda p, out, x, t, z: p.ddpm_step(out, x, t, z, True), toy(False))
    assert_close(path, g["p_chain_FIXED_LARGE_clip1"], **chain_tolerance)
    etas = [float(k.removeprefix("ddim_chain_eta")) for k in g if k.startswith("ddim_chain_eta")]
    assert len(etas) == 3
    for eta in etas:
        path = walk(learned, lambda p, out, x, t, z: p.ddim_step(out, x, t, z, eta), toy())
        assert_close(path, g[f"ddim_chain_eta{eta}"], **chain_tolerance)
    x, path = g["in_x0"], []
    for i in range(learned.steps):
        t = torch.full((len(x),), i)
        x, _ = learned.ddim_reverse_step(toy()(x, learned.timestep_map[t]), x, t)
        path.append(x)
    assert_close(torch.stack(path), g["ddim_reverse_chain"], **chain_tolerance)
    assert_close(GaussianDiffusion(schedule=SCHEDULES[case], learn_sigma=True).invert(toy(), g["in_x0"], steps=spec),
                 g["ddim_reverse_chain"][-1], **chain_tolerance)


@pytest.mark.parametrize("case", SCHEDULES)
def test_classifier_guidance_matches_official(case):
    d, g = golden_case(f"diffusion_{case}")
    p = GaussianDiffusion(schedule=SCHEDULES[case], learn_sigma=True).respaced(d["config"]["chain_respacing"])
    t, x, z = torch.full((5,), 2), g["in_xT"], g["in_chain_noise"][0]
    saw = []

    def cond_fn(x, t):
        saw.append(t)
        return -0.3 * x * (1 + t.float() / 1000).view(-1, 1, 1, 1)
    out = toy()(x, p.timestep_map[t])
    assert_close(p.ddpm_step(out, x, t, z, cond_fn=cond_fn)[0], g["cond_p_sample"], **TOLERANCE)
    assert saw[0].tolist() == d["cond_seen_t"]
    assert_close(p.ddim_step(out, x, t, z, d["config"]["eta"], cond_fn=cond_fn)[0], g["cond_ddim_sample"], **TOLERANCE)


def test_schedules_match_official_in_float64():
    _, g = golden_case("diffusion_schedules")
    for name, ours in (("linear", "linear"), ("squaredcos_cap_v2", "cosine")):
        p, at = GaussianDiffusion(schedule=ours), g[f"{name}_1000_index"].long()
        assert p.betas.dtype == p.alpha_bar.dtype == torch.float64
        assert_close(p.betas[at], g[f"{name}_1000_betas"], rtol=1e-10, atol=0)
        for k, v in {"alphas_cumprod": p.alpha_bar, "alphas_cumprod_prev": p.alpha_bar_prev,
                     "alphas_cumprod_next": p.alpha_bar_next, "posterior_variance": p.posterior_variance,
                     "posterior_mean_coef1": p._float64["post_mean_x0"],
                     "posterior_mean_coef2": p._float64["post_mean_xt"],
                     "sqrt_recipm1_alphas_cumprod": p._float64["sqrt_recipm1_ab"],
                     "posterior_log_variance_clipped": p._float64["post_logvar"]}.items():
            assert_close(v[at], g[f"{name}_1000_{k}"], rtol=1e-10, atol=1e-16)
    sd = make_betas("scaled_linear", 1000)
    assert_close(sd[[0, 999]], torch.tensor([0.00085, 0.012], dtype=torch.float64))
    # Stable Diffusion's known last value
    assert_close(torch.cumprod(1 - sd, 0)[-1].item(), 0.00466, rtol=1e-3, atol=0)


def test_respacing_lists_and_errors():
    d = json.loads((GOLDEN / "diffusion_timesteps.json").read_text())
    for row in d["respacing"]:
        assert respaced_steps(row["T"], row["respacing"]) == row["steps"], row["respacing"]
    for row in d["errors"]:
        with pytest.raises(ValueError):
            respaced_steps(row["T"], row["respacing"])
    assert respaced_steps(7, "") == list(range(7)) and respaced_steps(1000, 250) == respaced_steps(1000, "250")


def test_second_moment_sampler_matches_official():
    d = json.loads((GOLDEN / "diffusion_timesteps.json").read_text())
    sampler = LossSecondMoment(6)
    for (t, losses), want in zip(d["second_moment"]["updates"], d["second_moment"]["weights_after_each"]):
        sampler.update(torch.tensor(t), torch.tensor(losses, dtype=torch.float64))
        np.testing.assert_allclose(sampler.weights(), want, rtol=1e-6)
    t, w = sampler.draw(200_000, torch.Generator().manual_seed(0))                  # weights undo the uneven drawing
    share = torch.bincount(t, minlength=6) / len(t)
    assert_close(share.double(), sampler.weights() / sampler.weights().sum(), rtol=0.05, atol=0)
    assert abs(w.mean() - 1) < 0.01


# ----------------------------------------------------------------------------------------------------------------------
# a world whose exact score is known: x0 ~ N(m, s^2) per coordinate, so E[eps | xt] has a closed form

M, S = 0.7, 0.4


def exact(process, kind):
    """The exact network for x0 ~ N(M, S^2): E[x0 | xt], told as eps, v or x0."""
    def model(x, t, cond=None):
        ab = process.alpha_bar[t].float().view(-1, 1)
        x0 = M + S ** 2 * ab.sqrt() / (ab * S ** 2 + 1 - ab) * (x - ab.sqrt() * M)
        eps = (x - ab.sqrt() * x0) / (1 - ab).sqrt()
        return {"x0": x0, "eps": eps, "v": ab.sqrt() * eps - (1 - ab).sqrt() * x0}[kind]
    return model


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("sampler,steps,options,mean_tol,std_tol", [
    ("ddpm", 1000, {}, 0.01, 0.01), ("ddim", 100, {}, 0.01, 0.02), ("ddim", 100, {"eta": 1.0}, 0.01, 0.06),
    ("dpm++", 20, {}, 0.01, 0.02), ("ddim", 20, {}, 0.01, 0.08)])
def test_samplers_reach_the_known_gaussian(schedule, sampler, steps, options, mean_tol, std_tol):
    p = GaussianDiffusion(schedule=schedule, variance="fixed_small")
    gen = torch.Generator().manual_seed(0)
    x = p.sample(exact(p, "eps"), (40_000, 1), sampler=sampler, steps=steps, generator=gen, **options)
    assert abs(x.mean() - M) < mean_tol and abs(x.std() - S) < std_tol, (x.mean(), x.std())


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "ddpm"])
def test_the_three_predictions_are_one_guess(sampler):
    paths = []
    for kind in ("eps", "v", "x0"):
        p = GaussianDiffusion(schedule="cosine", prediction=kind)
        gen = torch.Generator().manual_seed(1)
        paths.append(p.sample(exact(p, kind), (64, 3), sampler=sampler, steps=10, generator=gen))
    assert_close(paths[0], paths[1], rtol=1e-3, atol=1e-3)
    assert_close(paths[0], paths[2], rtol=1e-3, atol=1e-3)


def test_v_prediction_loss_targets_the_velocity_of_the_noise():
    p, gen = GaussianDiffusion(prediction="v"), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(6, 2, generator=gen), torch.randn(6, 2, generator=gen)
    t = torch.tensor([0, 1, 10, 200, 700, 999])
    a, s = p.alpha_bar[t].sqrt().float()[:, None], (1 - p.alpha_bar[t]).sqrt().float()[:, None]
    seen = p.losses(lambda x, t, c: a * eps - s * x0, x0, None, t, eps)["mse"]
    assert_close(seen, torch.zeros(6), atol=1e-10, rtol=0)


def test_ddim_eta_one_on_every_step_is_ddpm():
    p = GaussianDiffusion(schedule="cosine", steps=60, variance="fixed_small")
    draw = lambda **o: p.sample(exact(p, "eps"), (16, 4), steps="", generator=torch.Generator().manual_seed(5), **o)
    assert_close(draw(sampler="ddim", eta=1.0), draw(sampler="ddpm"), rtol=1e-4, atol=1e-4)


def test_dpm_solver_is_second_order():
    """Halving the step divides the error to the exact ODE solution by about four, DDIM's by about two."""
    p = GaussianDiffusion(schedule="cosine")
    z = torch.randn(512, 1, generator=torch.Generator().manual_seed(0))
    truth = M + S * z                                       # the ODE maps one Gaussian onto the other, monotonically

    def error(sampler, steps):
        return (p.sample(exact(p, "eps"), z.shape, steps=steps, sampler=sampler, noise=z) - truth).abs().mean().item()
    assert 1.6 < error("ddim", 25) / error("ddim", 50) < 2.6
    # even in t, as a string; even in log-SNR, as a number
    assert error("dpm++", "100") / error("dpm++", "200") > 3.4
    assert error("dpm++", 25) < 0.35 * error("ddim", 25) and error("dpm++", 25) < 0.3 * error("dpm++", "25")


def test_ddim_inversion_returns_to_the_picture():
    p = GaussianDiffusion(schedule="cosine")
    x0 = torch.randn(32, 2, generator=torch.Generator().manual_seed(0)) * S + M
    noise = p.invert(exact(p, "eps"), x0, steps=200)
    assert abs(noise.std() - 1) < 0.25 and abs(noise.mean()) < 0.3
    assert (p.sample(exact(p, "eps"), x0.shape, steps=200, noise=noise) - x0).abs().max() < 0.03


def test_guidance_ends():
    p = GaussianDiffusion()
    model = lambda x, t, c: x * 0.1 + c
    cond, null = torch.full((4, 2), 0.3), torch.full((4, 2), -0.2)
    draw = lambda c, u, s, **o: p.sample(model, (4, 2), c, u, cfg_scale=s, steps=10,
                                         generator=torch.Generator().manual_seed(3), **o)
    assert torch.equal(draw(cond, null, 1.0), draw(cond, None, 1.0))
    assert torch.equal(draw(cond, null, 0.0), draw(null, None, 1.0))
    x, t = torch.randn(4, 2), torch.zeros(4, dtype=torch.int64)
    # eps_u + s (eps_c - eps_u)
    assert_close(guided(model, cond, null, 3.0)(x, t, 0.5), x * 0.1 + null + 3.0 * (cond - null))
    one_channel = guided(model, cond, null, 3.0, cfg_channels=1)(x, t, 0.5)
    assert_close(one_channel[:, 1], x[:, 1] * 0.1 + 0.3)
    assert_close(one_channel[:, 0], x[:, 0] * 0.1 - 0.2 + 1.5)
    off = guided(model, cond, null, 3.0, cfg_interval=(0.2, 0.4))
    assert_close(off(x, t, 0.5), model(x, t, cond))
    assert_close(off(x, t, 0.3), x * 0.1 + null + 3.0 * (cond - null))
    assert_close(draw(cond, null, 4.0, cfg_interval=(2.0, 3.0)), draw(cond, None, 1.0))
    with pytest.raises(ValueError, match="label dropout"):
        guided(model, cond, None, 2.0)


def test_shift_keeps_the_signal_to_noise_ratio_apart():
    """Esser et al. 2024 derive the shift from the noise ratio: u / (1-u) is multiplied by it, whatever u was."""
    even, shifted = (RectifiedFlow(s).draw((1000, 1), torch.Generator().manual_seed(0)) for s in (1.0, 3.0))
    u, v = even["t"].double() / 1000, shifted["t"].double() / 1000
    assert_close(v / (1 - v), 3 * u / (1 - u), rtol=1e-3, atol=1e-4)
    assert torch.equal(even["eps"], shifted["eps"]) and 0.7 < v.median() < 0.8


@pytest.mark.parametrize("process", [GaussianDiffusion(schedule="cosine"), RectifiedFlow()])
def test_inpainting_keeps_known_pixels_and_image_to_image_starts_there(process):
    gen = torch.Generator().manual_seed(0)
    x_init, mask = torch.randn(3, 2, 4, 4, generator=gen), (torch.rand(3, 1, 4, 4, generator=gen) > 0.5).float()
    model = lambda x, t, c: 0.1 * x
    out = process.sample(model, x_init.shape, x_init=x_init, mask=mask, steps=6, generator=gen)
    known = mask.expand_as(out) == 0
    assert torch.equal(out[known], x_init[known]) and not torch.equal(out[~known], x_init[~known])
    still = lambda x, t, c: torch.zeros_like(x)
    full, little = (process.sample(still, x_init.shape, x_init=x_init, strength=s, steps=20, generator=gen)
                    for s in (1.0, 0.1))
    assert (little - x_init).abs().mean() < 0.5 * (full - x_init).abs().mean()
    with pytest.raises(ValueError, match="x_init"):
        process.sample(model, x_init.shape, mask=mask)
    with pytest.raises(ValueError, match="choose one of"):
        process.sample(model, x_init.shape, sampler="plms")


@pytest.mark.parametrize("process,sampler", [(GaussianDiffusion(), "ddpm"), (GaussianDiffusion(), "ddim"),
                                             (RectifiedFlow(), "euler")])
def test_picture_i_does_not_depend_on_the_batch(process, sampler):
    model = lambda x, t, c: 0.3 * x
    seeds = lambda ids: [torch.Generator().manual_seed(i) for i in ids]
    eight = process.sample(model, (8, 2, 4), sampler=sampler, steps=5, generator=seeds(range(8)))
    one = process.sample(model, (1, 2, 4), sampler=sampler, steps=5, generator=seeds([5]))
    assert torch.equal(eight[5], one[0]) and not torch.equal(eight[5], eight[4])
    with pytest.raises(ValueError, match="one per sample"):
        randn((3, 2), seeds(range(2)))


def test_trajectory_hands_out_states():
    p = GaussianDiffusion()
    states = list(p.trajectory(exact(p, "eps"), (5, 1), steps=12, generator=torch.Generator().manual_seed(0)))
    assert len(states) == 12 and states[0][0].shape == (5, 1)
    assert_close(states[-1][0], states[-1][1])                                  # the last step lands on its x0 guess


def test_masked_loss_is_a_true_mean():
    p, gen = GaussianDiffusion(), torch.Generator().manual_seed(0)
    x0, t = torch.randn(3, 2, 4, 4, generator=gen), torch.tensor([0, 10, 500])
    eps = torch.randn(3, 2, 4, 4, generator=gen)
    mask = (torch.rand(3, 1, 4, 4, generator=gen) > 0.4).float()
    got = p.losses(lambda x, t, c: 0.5 * x, x0, None, t, eps, mask)["mse"]
    wanted = [((eps[i] - 0.5 * p.q_sample(x0, t, eps)[i]) ** 2)[mask[i].expand(2, 4, 4) == 1].mean() for i in range(3)]
    assert_close(got, torch.stack(wanted))


# ----------------------------------------------------------------------------------------------------------------------
# rectified flow

def exact_velocity(x, t, cond=None):
    u = (t / 1000).view(-1, 1)
    x0 = M + S ** 2 * (1 - u) / ((1 - u) ** 2 * S ** 2 + u ** 2) * (x - (1 - u) * M)
    return (x - x0) / u.clamp(min=1e-6)


@pytest.mark.parametrize("sampler,steps,tol", [("euler", 100, 0.015), ("heun", 25, 0.01)])
def test_flow_reaches_the_known_gaussian(sampler, steps, tol):
    gen = torch.Generator().manual_seed(0)
    x = RectifiedFlow().sample(exact_velocity, (40_000, 1), sampler=sampler, steps=steps, generator=gen)
    assert abs(x.mean() - M) < 0.01 and abs(x.std() - S) < tol


def test_flow_loss_is_zero_at_the_true_velocity_and_minimal_at_the_conditional_mean():
    flow, gen = RectifiedFlow(), torch.Generator().manual_seed(0)
    x0 = torch.randn(20_000, 1, generator=gen) * S + M
    draws = flow.draw(x0.shape, gen)
    assert 0 <= draws["t"].min() and draws["t"].max() <= 1000
    at = lambda f: flow.loss(f, x0, None, draws["t"], draws["eps"])[0].item()
    assert at(lambda x, t, c: draws["eps"] - x0) == 0
    best = at(exact_velocity)
    assert best < at(lambda x, t, c: exact_velocity(x, t) + 0.1)
    assert best < at(lambda x, t, c: 0.9 * exact_velocity(x, t))


def test_wrong_names_are_named():
    for bad in (dict(schedule="exp"), dict(prediction="mu"), dict(variance="learned"), dict(steps=10)):
        with pytest.raises(ValueError):
            GaussianDiffusion(**bad)
    for steps in ("ddim25", 0, 2.5):
        with pytest.raises(ValueError, match="positive number of steps"):
            RectifiedFlow().sample(exact_velocity, (2, 1), steps=steps)
    with pytest.raises(ValueError, match="cannot read 'many'"):
        respaced_steps(1000, "many")
    with pytest.raises(ValueError, match="deterministic"):
        RectifiedFlow().sample(exact_velocity, (2, 1), eta=0.5)
    with pytest.raises(ValueError, match="objective"):
        zeros = torch.zeros(1, 2, 2, 2)
        GaussianDiffusion().losses(toy(False), zeros, None, torch.tensor([3]), zeros, objective="l1")
    assert math.isclose(make_betas("linear", 100)[-1], 0.2)
