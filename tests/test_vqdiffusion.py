"""vqdiffusion.py against the official figures, (K+1) x (K+1) matrices, and a world small enough to sum over."""
import itertools
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import vqdiffusion
from conftest import fill_by_recipe, golden_case
from vqdiffusion import (SCHEDULES, VQ_CONFIGS, VQVAE, Codebook, MaskReplace, VQTransformer, official_state, race, rand)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def chain_of(config, **options):
    s = config["schedule"]
    return MaskReplace(config["T"], config["K"], (s["att_1"], s["att_T"], s["ctt_1"], s["ctt_T"]), **options)


def toy_model(g, T):
    """The goldens' denoiser by formula: logits of a token depend on itself, its place and t."""
    return lambda x, t, cond=None: g["E"][x] + g["P"] + (t.float() / T)[:, None, None] * g["c"]


def probabilities(log_p):
    """Official layout (B, K+1, L) of log-probabilities -> ours, (B, L, K+1)."""
    return log_p.transpose(-1, -2).exp()


def one_hot(x, states):
    return torch.nn.functional.one_hot(x, states).float()


# ----------------------------------------------------------------------------------------------------------------------
# the chain: schedule, forward, posterior

def test_schedule_matches_official():
    d, g = golden_case("vqd_schedule")
    for name, c in d["config"].items():
        chain = MaskReplace(c["T"], c["N"], (c["att_1"], c["att_T"], c["ctt_1"], c["ctt_T"]))
        t = torch.arange(c["T"])
        for key, ours in {**dict(zip(("alpha", "beta", "gamma"), chain.transition(t, t - 1))), "alpha_bar":
                          chain.alpha_bar, "beta_bar": chain.beta_bar, "gamma_bar": chain.gamma_bar}.items():
            assert_close(ours, g[f"{name}/{key}"], rtol=1e-9, atol=1e-12, msg=lambda m: f"{name} {key}: {m}")
    named = {"t100_k2886": "released", "t100_k2886_m09": "paper"}
    for case, schedule in named.items():
        assert_close(MaskReplace(100, 2886, schedule).gamma_bar, g[f"{case}/gamma_bar"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["vqd_q_released", "vqd_q_m09"])
def test_forward_and_posterior_match_official(case):
    d, g = golden_case(case)
    chain, x0, xt, t, K = chain_of(d["config"]), g["x0"], g["xt"], g["t"], d["config"]["K"]
    hard, soft = one_hot(x0, K + 1), chain.guess(g["soft_logits"].transpose(1, 2))
    close = dict(rtol=0, atol=1e-5)
    assert_close(soft, probabilities(g["log_x0_soft"]), **close)
    assert_close(chain.marginal(hard, t), probabilities(g["q_pred"]), **close)
    assert_close(chain.marginal(hard, t - 1), probabilities(g["q_pred_prev"]), **close)
    assert_close(chain.marginal(soft, t), probabilities(g["q_pred_soft"]), **close)
    for p0, key in ((hard, "q_post"), (soft, "q_post_soft")):
        ours = chain.posterior(p0, xt, t)
        assert_close(ours, probabilities(g[key]), **close)
        assert_close(ours.double(), g[f"exact_{key}"].transpose(1, 2), rtol=0, atol=2e-6)
    alpha, beta, _ = (v.float()[:, None, None] for v in chain.transition(t, t - 1))
    one = alpha * one_hot(xt, K + 1) + beta                                 # of a code as a function of x_{t-1}
    codes = (xt < K)[..., None].expand(-1, -1, K)
    assert_close(one[..., :K][codes], probabilities(g["q_one"])[..., :K][codes], **close)


def matrices(chain, pairs):
    """{(t, s): the (K+1, K+1) matrix of the jump s -> t}, columns = from; multiplied up from single steps."""
    K, step = chain.num_codes, {}
    alpha, beta, gamma = chain.transition(torch.arange(chain.steps), torch.arange(chain.steps) - 1)
    for t in range(chain.steps):
        Q = torch.zeros(K + 1, K + 1, dtype=torch.float64)
        Q[:K, :K] = beta[t] + alpha[t] * torch.eye(K, dtype=torch.float64)
        Q[K, :K], Q[K, K] = gamma[t], 1.0
        assert_close(Q.sum(0), torch.ones(K + 1, dtype=torch.float64), rtol=0, atol=1e-12)
        step[t] = Q
    product = lambda t, s: torch.linalg.multi_dot([step[i] for i in range(t, s, -1)]) if t - s > 1 else step[t]
    return {(t, s): product(t, s) if t > s else torch.eye(K + 1, dtype=torch.float64) for t, s in pairs}


@pytest.mark.parametrize("schedule", [*SCHEDULES, (0.99, 0.01, 0.001, 0.5)])
def test_posterior_of_any_jump_is_exact_bayes(schedule):
    """All x_t, all x_0 and a soft guess, jumps of 1 to T steps: Q(s->t)[x_t, k] Q(0->s)[k, x_0] / Q(0->t)[x_t, x_0].

    In the schedules that cannot replace, or cannot mask, the x_t that cannot occur are left out.
    """
    chain, K = MaskReplace(12, 5, schedule), 5
    jumps = [(t, s) for t in (0, 1, 5, 11) for s in range(-1, t)]
    Q = matrices(chain, jumps + [(t, -1) for t in range(-1, 12)])
    soft = torch.softmax(2 * torch.randn(K, dtype=torch.float64, generator=seeded(0)), 0)
    guesses = torch.cat([torch.eye(K, dtype=torch.float64), soft[None]])                    # (6, K)
    for t, s in jumps:
        for xt in range(K + 1):
            reach = Q[t, -1][xt, :K]                                                        # (K,) q(x_t | x_0)
            possible = (reach > 0) if schedule != "mask-only" or xt == K else torch.arange(K) == xt
            for p0 in guesses[(guesses * ~possible).sum(1) == 0]:
                r = torch.where(possible, p0 / reach, 0.0)
                want = Q[t, s][xt] * (Q[s, -1][:, :K] @ r)                                  # (K+1,) over x_s
                ours = chain.posterior(torch.cat([p0, torch.zeros(1)]).float()[None, None], torch.tensor([[xt]]), t, s)
                assert_close(ours[0, 0].double(), want, rtol=0, atol=2e-6, msg=lambda m: f"{t}->{s}, x_t {xt}: {m}")
                assert ours.sum().item() == pytest.approx(1, abs=3e-6)
    one = chain.posterior(torch.cat([soft, torch.zeros(1)]).float().expand(3, 1, -1), torch.full((3, 1), 2),
                          torch.tensor([0, 5, 11]))
    for row, t in zip(one, (0, 5, 11)):                                                     # steps by tensor = by int
        assert_close(row[0], chain.posterior(torch.cat([soft, torch.zeros(1)]).float()[None, None],
                                             torch.tensor([[2]]), t, t - 1)[0, 0])


def test_marginals_are_products_of_matrices():
    chain = MaskReplace(30, 7)
    Q = matrices(chain, [(t, -1) for t in range(30)])
    for t in (0, 3, 29):
        ours = chain.marginal(torch.eye(8)[None, :7], torch.tensor([t]))[0]
        assert_close(ours.double(), Q[t, -1].T[:7], rtol=0, atol=1e-6)
    assert_close(chain.alpha_bar[29], Q[29, -1][0, 0] - Q[29, -1][1, 0])


def test_no_rounding_away_of_small_chances():
    """A guess that is sure up to 1e-9 of an unlikely token: the little rest decides, as it does in exact Bayes."""
    chain = MaskReplace(100, 16, "released")
    p0 = torch.full((17,), 1e-9)
    p0[3], p0[16] = 1, 0
    b = chain.alpha_bar.tolist(), chain.beta_bar.tolist()
    r_own, r_rest = 1 / (b[0][60] + b[1][60]), 15 * 1e-9 / b[1][60]
    alpha, beta, _ = (v.item() for v in chain.transition(torch.tensor(60), torch.tensor(59)))
    want = (alpha + beta) * ((b[0][59] + b[1][59]) * r_own + b[1][59] * r_rest)
    ours = chain.posterior(p0[None, None], torch.tensor([[3]]), 60, 59)[0, 0, 3].item()
    assert ours == pytest.approx(want, rel=1e-5)


def test_noised_tokens_have_the_marginal_distribution():
    chain, n = MaskReplace(100, 5), 40_000
    t, x0 = torch.tensor([70]), torch.full((1, n), 2)
    xt = chain.q_sample(x0, t, rand((1, n, 2), seeded(0)))
    share = torch.bincount(xt.flatten(), minlength=6) / n
    assert_close(share, chain.marginal(one_hot(x0[:, :1], 6), t)[0, 0], rtol=0, atol=0.01)
    end = torch.bincount(chain.prior((1, n), seeded(1)).flatten(), minlength=6) / n
    assert_close(end[5].item(), 0.9, rtol=0, atol=0.01) and assert_close(end[:5], torch.full((5,), 0.02), atol=0.005)
    assert (MaskReplace(100, 5, "replace-only").prior((1, n), seeded(1)) < 5).all()


# ----------------------------------------------------------------------------------------------------------------------
# the loss

@pytest.mark.parametrize("case", ["vqd_loss_released", "vqd_loss_m09"])
def test_loss_matches_official(case, monkeypatch):
    d, g = golden_case(case)
    c, K = d["config"], d["config"]["K"]
    chain = chain_of(c, aux_weight=c["auxiliary_loss_weight"], adaptive_aux=c["adaptive_auxiliary_loss"],
                     mask_weight=c["mask_weight"], importance=True)
    x0, xt, t, pt = g["x0"], g["xt"], g["t"], g["pt"]
    model, table = toy_model(g, c["T"]), g["E"].requires_grad_()
    p0 = chain.guess(model(xt, t))
    assert_close(p0, probabilities(g["log_x0_recon"]), rtol=0, atol=1e-5)
    assert_close(chain.posterior(p0, xt, t), probabilities(g["log_model"]), rtol=0, atol=1e-5)
    assert_close(chain.posterior(one_hot(x0, K + 1), xt, t), probabilities(g["log_true"]), rtol=0, atol=1e-5)
    base, aux = chain.terms(model(xt, t), x0, xt, t)
    assert_close(base, g["base"], rtol=1e-4, atol=1e-6)
    assert_close(aux, g["aux"], rtol=1e-4, atol=1e-6)
    chain.loss_history, chain.loss_count = g["Lt_history_in"].clone(), torch.full((c["T"],), 20.0)
    assert_close(chain.time_probabilities(), g["pt_all"], rtol=1e-5, atol=0)
    monkeypatch.setattr(chain, "q_sample", lambda *_: xt)                   # the golden gives x_t instead of its draws
    loss, metrics = chain.loss(model, x0, None, t, pt, None)
    assert_close(loss, g["loss"], rtol=1e-4, atol=0)
    assert metrics["vlb"].item() == pytest.approx((g["base"] / pt).sum().item() / x0.numel(), rel=1e-4)
    loss.backward()
    assert_close(table.grad, g["grad_E"], rtol=1e-3, atol=1e-3 * g["grad_E"].abs().max().item())
    assert_close(chain.loss_history, g["Lt_history_out"], rtol=1e-4, atol=1e-6)
    assert_close(chain.loss_count, g["Lt_count_out"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_kl_in_closed_form_is_the_sum_over_all_states(schedule):
    chain, K, N = MaskReplace(20, 6, schedule), 6, 400
    x0 = torch.randint(K, (8, N), generator=seeded(0))
    t = torch.tensor([0, 1, 2, 5, 10, 15, 18, 19])
    xt = chain.q_sample(x0, t, rand((8, N, 2), seeded(1)))
    logits = 2 * torch.randn(8, N, K, dtype=torch.float64, generator=seeded(2))
    p = chain.posterior(chain.guess(logits), xt, t).double()
    q = chain.posterior(one_hot(x0, K + 1), xt, t).double()
    want = (torch.xlogy(q, q) - torch.where(q > 0, q * p.clamp(min=1e-300).log(), 0.0)).sum(-1)
    ours = chain.kl(chain.guess(logits), x0, xt, t)
    assert_close(ours.double(), want, rtol=1e-4, atol=3e-6)
    assert ours.isfinite().all()
    logits = logits.float().requires_grad_()                                # 0/0 must not reach the gradients either
    sum(term.sum() for term in chain.terms(logits, x0, xt, t)).backward()
    assert logits.grad.isfinite().all()


def test_importance_sampling_of_t_is_unbiased_and_follows_the_loss():
    chain = MaskReplace(10, 4, importance=True)
    assert_close(chain.time_probabilities(), torch.full((10,), 0.1))        # nothing seen yet
    for _ in range(11):
        chain.remember(torch.arange(10), torch.arange(1.0, 11.0))
    p = chain.time_probabilities()
    assert_close(p.sum().item(), 1.0) and assert_close((p[9] / p[1]).item(), 5.0, rtol=1e-3, atol=0)
    draws = chain.draw((20_000, 1), seeded(0))
    assert_close(torch.bincount(draws["t"], minlength=10) / 20_000, p, rtol=0, atol=0.01)
    assert_close((1 / draws["pt"]).mean().item(), 10.0, rtol=0.02, atol=0)  # weights 1/pt sum over all t


def test_loss_is_a_pure_function_of_its_draws():
    chain, x0 = MaskReplace(10, 8), torch.randint(8, (4, 9), generator=seeded(0))
    model = lambda x, t, cond: one_hot(x, 9)[..., :8] * 3
    draws = chain.draw((4, 9), seeded(1))
    assert {k: tuple(v.shape) for k, v in draws.items()} == {"t": (4,), "pt": (4,), "u": (4, 9, 2)}
    first, second = (chain.loss(model, x0, None, **draws)[0] for _ in range(2))
    halves = [chain.loss(model, x0[i:i + 2], None, **{k: v[i:i + 2] for k, v in draws.items()})[0] for i in (0, 2)]
    assert first == second
    assert_close(sum(halves) / 2, first)                                    # a batch over two devices
    assert_close(chain.loss(model, x0, generator=seeded(1))[0], first)      # draws by itself if none are given


# ----------------------------------------------------------------------------------------------------------------------
# the samplers

def test_guess_truncation_and_guidance_match_official():
    d, g = golden_case("vqd_x0_post")
    chain = MaskReplace(10, d["config"]["K"])
    logits, uncond = g["logits"].transpose(1, 2), g["logits_uncond"].transpose(1, 2)
    close = dict(rtol=1e-4, atol=1e-6)
    assert_close(chain.guess(logits), probabilities(g["log_p"]), **close)
    for r in (0.86, 0.5, 1.0):
        assert_close(chain.guess(logits, truncation=r), probabilities(g[f"top_r_{r}"]), **close)
    assert_close(chain.guess(logits, top_k=3), probabilities(g["top_k_3"]), **close)
    model = lambda x, t, cond: cond
    for s in (3, 5):
        guided = vqdiffusion.guided(model, logits, uncond, float(s))(torch.zeros(3, 8), torch.zeros(3), 1.0)
        assert_close(chain.guess(guided), probabilities(g[f"cfg_{s}"]), **close)
        assert_close(chain.guess(guided, 0.86), probabilities(g[f"cfg_{s}_top_r_0.86"]), **close)
    tiny = chain.guess(logits, truncation=1e-6)
    assert torch.equal(tiny > 0, one_hot(logits.argmax(-1), 13) > 0)        # r -> 0 keeps the best code only


@pytest.mark.parametrize("case", ["vqd_sample_released", "vqd_sample_m09"])
def test_steps_back_and_whole_chains_match_official(case, monkeypatch):
    d, g = golden_case(case)
    c, xt = d["config"], g["xt"]
    chain, model, (B, N) = chain_of(c), toy_model(g, c["T"]), xt.shape
    at = lambda t: torch.full((B,), t)
    for i, t in enumerate(g["p_pred_t"].tolist()):
        p0 = chain.guess(model(xt, at(t)))
        assert_close(p0, probabilities(g["p_pred_x0"][i]), rtol=0, atol=1e-5)
        assert_close(chain.posterior(p0, xt, at(t)), probabilities(g["p_pred"][i]), rtol=0, atol=1e-5)
    for skip in c["skips"]:
        times = g[f"fast{skip}/t_list"].tolist()
        official, exact = chain.jumps(times, "official"), chain.jumps(times)
        for i, k in enumerate(g[f"fast{skip}/sel"].tolist()):
            p0 = chain.guess(model(xt, at(times[k])))
            p = chain.posterior(p0, xt, *official[k][1:])
            assert_close(p, probabilities(g[f"fast{skip}/official"][i]), rtol=0, atol=1e-5)
            p = chain.posterior(p0, xt, *exact[k][1:])
            assert_close(p.double(), g[f"fast{skip}/exact"][i].transpose(1, 2), rtol=0, atol=1e-5)
    fast = g[f"fast{c['skips'][0]}/t_list"].tolist()
    for name, options in {"chain": dict(steps=c["T"]), "chaintrunc": dict(steps=c["T"], truncation=c["truncation"]),
                          "chainfast": dict(steps=fast, stride="official")}.items():
        blocks = iter(g[f"{name}/u"].transpose(2, 3))
        monkeypatch.setattr(vqdiffusion, "rand", lambda shape, *_: next(blocks))
        walk = chain.trajectory(model, (B, N), start=torch.full((B, N), c["K"]), **options)
        for i, (tokens, _) in enumerate(walk):
            assert torch.equal(tokens, g[f"{name}/tokens"][i]), f"{name}, call {i}"
        assert i + 1 == len(g[f"{name}/tokens"])


def test_official_times_are_those_of_the_official_sampler():
    chain = MaskReplace(100, 8)
    assert [j[0] for j in chain.jumps(25, "official")] == [*range(99, 2, -4), 0]            # 26 calls
    assert [j[0] for j in chain.jumps(50, "official")] == [*range(99, 0, -2), 0]
    assert chain.jumps(100) == [(t, t, t - 1) for t in range(99, -1, -1)] == chain.jumps(100, "official")
    assert chain.jumps(4) == [(99, 99, 74), (74, 74, 49), (49, 49, 24), (24, 24, -1)]
    for steps in (1, 3, 7, 33, 99):
        jumps = chain.jumps(steps)
        assert len(jumps) == steps and jumps[0][0] == 99 and jumps[-1][2] == -1
        assert all(t > s for _, t, s in jumps)


def test_purity_matches_official(monkeypatch):
    d, g = golden_case("vqd_purity")
    c = d["config"]
    chain, model, xt, t = MaskReplace(c["T"], c["K"]), toy_model(g, c["T"]), g["xt"], torch.full((c["B"],), c["t"])
    monkeypatch.setattr(vqdiffusion, "rand", lambda shape, *_: torch.full(shape, 0.5))      # the likeliest always wins
    for weight in c["weights"]:
        tokens = xt
        for call, count in enumerate((3, 4)):       # of 7 at most 3 at a time; official: one left over comes along
            p0 = chain.guess(model(tokens, t))
            if call == 0:
                top = p0.amax(-1)
                sharp = p0 ** (1 + weight * (top / top.amax(1, keepdim=True)))[..., None]
                assert_close(top / top.amax(1, keepdim=True), g["purity"], rtol=1e-5, atol=0)
                sharp = sharp / sharp.sum(-1, keepdim=True)
                assert_close(sharp, probabilities(g[f"sharp_{weight}"]), rtol=0, atol=1e-5)
            tokens = chain.reveal(p0, tokens, torch.full((c["B"],), count), "purity", float(weight))
            assert torch.equal(tokens, g[f"step_tokens_{weight}"][call])
            assert torch.equal((tokens != xt).sum(1), g[f"step_count_{weight}"][call])


@pytest.mark.parametrize("T", [10, 25, 50, 100])
def test_share_of_tokens_per_call_is_the_official_budget(T):
    """1,024 tokens in T calls: where the official budgets are hard-coded, ours are within two tokens of them."""
    _, g = golden_case("vqd_purity")
    chain, counts = MaskReplace(T, 4, "released"), [1024]
    logits = lambda x, t, cond: torch.zeros(1, 1024, 4)
    for tokens, _ in chain.trajectory(logits, (1, 1024), sampler="fewer", steps=T, generator=seeded(0)):
        counts.append((tokens == 4).sum().item())
    ours = -np.diff(counts)[::-1]
    assert counts[-1] == 0 and np.abs(ours[1:-1] - g[f"n_sample_T{T}"].numpy()[1:-1]).max() <= 2


TOY_K, TOY_L = 3, 6


def toy_world():
    """729 strings of 6 tokens with a random, far from independent distribution: (states (729, 6), probability (729,)).

    Neighbours like to be equal, and the ends to differ: what the tokens do together matters, not each alone.
    """
    states = torch.tensor(list(itertools.product(range(TOY_K), repeat=TOY_L)))
    score = 1.5 * torch.randn(len(states), generator=seeded(5), dtype=torch.float64)
    score += 2.0 * (states[:, 1:] == states[:, :-1]).sum(1) - 3.0 * (states[:, 0] == states[:, -1])
    return states, score.softmax(0)


def exact_denoiser(chain):
    """p(x_0 | x_t) by Bayes over all strings, as logits (B, L, K): a table of the 4^6 strings x_t for every t."""
    states, prior = toy_world()
    noisy = torch.tensor(list(itertools.product(range(TOY_K + 1), repeat=TOY_L)))           # (4096, L)
    place = (TOY_K + 1) ** torch.arange(TOY_L - 1, -1, -1)
    hits, clean, tables = one_hot(noisy, TOY_K + 1).flatten(1), one_hot(states, TOY_K).flatten(1), {}

    def model(xt, t, cond=None):
        if t[0].item() not in tables:
            q = chain.marginal(one_hot(states, TOY_K + 1), t[:1])                           # (729, L, K+1)
            weight = (hits @ q.clamp(min=1e-30).log().flatten(1).T + prior.float().log()).softmax(1)    # (4096, 729)
            tables[t[0].item()] = (weight @ clean).log().view(-1, TOY_L, TOY_K)             # (4096, L, K)
        return tables[t[0].item()][(xt * place).sum(1)]
    return model


def total_variation(chain, model, steps, n=20_000, **options):
    """Half the absolute difference between what is drawn and the truth; 0.024 if n strings are drawn from the truth."""
    states, prior = toy_world()
    tokens = chain.sample(model, (n, TOY_L), steps=steps, generator=seeded(0), **options)
    assert tokens.max() < TOY_K                                             # no [MASK] survives
    index = (tokens * TOY_K ** torch.arange(TOY_L - 1, -1, -1)).sum(1)
    return 0.5 * (torch.bincount(index, minlength=len(states)) / n - prior).abs().sum().item()


@pytest.mark.parametrize("schedule", ["released", "paper"])
def test_toy_with_the_exact_denoiser(schedule):
    """With a perfect network what is left is the sampler's own error. Noise floor 0.024; independent tokens: 0.7."""
    chain = MaskReplace(100, TOY_K, schedule)
    model = exact_denoiser(chain)
    tv = {(steps, stride): total_variation(chain, model, steps, stride=stride)
          for steps, stride in ((100, "exact"), (25, "exact"), (25, "official"), (10, "exact"), (10, "official"))}
    states, prior = toy_world()
    alone = torch.stack([one_hot(states, TOY_K)[:, i].double().T @ prior for i in range(TOY_L)])    # (L, K)
    assert 0.5 * (alone[range(TOY_L), states].prod(1) - prior).abs().sum() > 0.3            # the world is no easy one
    assert tv[100, "exact"] < 0.05, tv
    assert tv[25, "official"] - tv[25, "exact"] > 0.04, tv
    assert tv[10, "official"] - tv[10, "exact"] > 0.25, tv


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", [dict(), dict(steps=1), dict(steps=7, stride="official"), dict(top_k=2),
                                     dict(truncation=0.3), dict(sampler="fewer", steps=5),
                                     dict(sampler="purity", steps=15)])
def test_no_mask_survives_and_images_do_not_see_the_batch(schedule, options):
    chain = MaskReplace(20, 4, schedule)
    model = lambda x, t, cond: one_hot(x.roll(1, 1), 5)[..., :4] + t[:, None, None] / 20
    options = {"steps": 12, **options}
    if schedule == "replace-only" and "sampler" in options:
        with pytest.raises(ValueError, match="use posterior"):
            chain.sample(model, (2, 15), **options)
        return
    together = chain.sample(model, (3, 15), generator=[seeded(i) for i in range(3)], **options)
    alone = chain.sample(model, (1, 15), generator=[seeded(2)], **options)
    assert together.max() < 4 and torch.equal(together[2:], alone)


@pytest.mark.parametrize("sampler", MaskReplace.samplers)
def test_inpainting_keeps_what_is_known(sampler):
    chain, x = MaskReplace(50, 9), torch.randint(9, (3, 16), generator=seeded(0))
    mask = (torch.rand(3, 16, generator=seeded(1)) < torch.tensor([[0.2], [0.5], [0.9]])).float()
    model, seen = lambda x, t, cond: torch.randn(3, 16, 9, generator=seeded(3)), []
    for tokens, guess in chain.trajectory(model, (3, 16), x_init=x, mask=mask, sampler=sampler, steps=8,
                                          generator=seeded(2)):
        assert torch.equal(tokens[mask == 0], x[mask == 0])
        seen.append((tokens == 9).sum(1))
    assert (seen[-1] == 0).all() and not torch.equal(tokens, x)


def test_image_to_image_changes_more_with_more_strength():
    chain, x = MaskReplace(100, 9), torch.randint(9, (4, 400), generator=seeded(0))
    model = lambda x, t, cond: 20 * one_hot(x, 10)[..., :9]                 # believes in codes, else knows nothing
    redraw = lambda s: chain.sample(model, x.shape, x_init=x, strength=s, steps=100, generator=seeded(1))
    kept = [(redraw(s) == x).float().mean().item() for s in (0.1, 0.5, 0.9)]
    for share, strength in zip(kept, (0.1, 0.5, 0.9)):                      # and one lost token in nine comes back
        assert abs(share - (1 - strength + strength / 9)) < 0.03, kept
    fewer = chain.sample(model, x.shape, x_init=x, strength=0.5, sampler="fewer", steps=10, generator=seeded(1))
    assert 0.4 < (fewer == x).float().mean() < 0.7


def test_guidance_of_one_is_none_and_calls_once():
    chain, calls = MaskReplace(10, 4), []
    def model(x, t, cond):
        calls.append(len(x))
        return cond[:, None, None] * one_hot(x, 5)[..., :4]
    plain = chain.sample(model, (2, 6), torch.ones(2), generator=seeded(0), steps=5)
    assert calls == [2] * 5
    same = chain.sample(model, (2, 6), torch.ones(2), torch.ones(2), cfg_scale=3.0, generator=seeded(0), steps=5)
    assert torch.equal(plain, same) and calls[5:] == [4] * 5


def test_race_draws_in_proportion():
    p = torch.tensor([0.0, 1.0, 2.0, 5.0])
    share = torch.bincount(race(p.expand(40_000, 4), rand((40_000, 4), seeded(0))), minlength=4) / 40_000
    assert_close(share, p / 8, rtol=0, atol=0.01)


# ----------------------------------------------------------------------------------------------------------------------
# the network

@pytest.mark.parametrize("case", ["vqd_tr_text_fc", "vqd_tr_text_conv", "vqd_tr_class", "vqd_tr_uncond"])
def test_transformer_matches_official(case):
    d, g = golden_case(case)
    c = d["config"]
    kind = {"text": "text", "class": "class", "uncond": "none"}[c["kind"]]
    model = VQTransformer(
        c["K"], c["spatial"][0], c["n_embd"], c["n_layer"], c["n_head"], c["diffusion_step"], kind,
        context_dim=c.get("condition_dim", 8), num_classes=c.get("class_number", 0), class_dropout_prob=0.0,
        mlp=c["mlp_type"].removesuffix("_mlp"), mlp_ratio=c["mlp_hidden_times"],
        time="sinusoid" if c["timestep_type"].endswith("_abs") else "table")
    official = {name: shape for name, shape in d["params"] if not name.endswith("attn2.mask")}
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == official            # names and shapes
    fill_by_recipe(model).eval()
    stages, block = {}, model.blocks[0]
    layers = {"content_emb": model.content_emb, "b0_out": block, **{f"b0_{n}": m for n, m in block.named_children()}}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, i, o, name=name: stages.update({name: o}))
    with torch.no_grad():
        logits = model(g["x"], g["t"], g.get("cond"))
    assert_close(logits.transpose(1, 2), g["logits"], rtol=1e-4, atol=1e-5)
    for name in [k for k in g if k == "content_emb" or k.startswith("b0_")]:
        assert_close(stages[name], g[name], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")


def count(name, **overrides):
    with torch.device("meta"):
        model = VQTransformer(**{**VQ_CONFIGS[name], **overrides})
    return sum(p.numel() for p in model.parameters())


def test_sizes_are_the_papers():
    assert count("VQ-S") == 35_936_647 and count("VQ-S", num_codes=2886) == 35_936_262      # 34M = 34.27 * 2^20
    assert count("VQ-B") == 388_780_871                                                     # 370M = 370.77 * 2^20
    assert count("VQ-L") == 1_359_274_624                                                   # 1.27B = 1.266 * 2^30
    assert count("VQ-ImageNet") == 518_025_678
    assert count("VQ-FFHQ") == 411_169_280
    assert 1e6 < count("vq-tiny", condition="none") < count("vq-tiny") < 2e6


def test_published_files_load():
    model = fill_by_recipe(VQTransformer(16, 4, 32, 2, 4, context_dim=24, null_length=5))
    mine = model.state_dict()
    inner = {f"transformer.{k}": v for k, v in mine.items() if k != "empty_text_embed"}
    rest = {"log_at": torch.zeros(100), "Lt_count": torch.zeros(100), "empty_text_embed": mine["empty_text_embed"],
            "transformer.blocks.0.attn2.mask": torch.ones(1, 1, 16, 16),
            "condition_emb.transformer.resblocks.0.attn.proj.weight": torch.zeros(3), "condition_emb.x": torch.ones(2)}
    ema = {**inner, **rest, "empty_text_embed": rest["empty_text_embed"].double()}
    whole = {"model": {f"transformer.{k}": 0 * v for k, v in ema.items()} | {"content_codec.dec": torch.ones(1)},
             "ema": ema, "last_epoch": 3}
    for state in (whole, whole["ema"], {"model": {f"transformer.{k}": v for k, v in ema.items()}}):
        loaded = VQTransformer(16, 4, 32, 2, 4, context_dim=24, null_length=5)
        loaded.load_state_dict(official_state(state, learnable=True), strict=True)
        assert all(torch.equal(v, mine[k]) for k, v in loaded.state_dict().items())
        VQTransformer(16, 4, 32, 2, 4, context_dim=24).load_state_dict(official_state(state), strict=True)
    with pytest.raises(ValueError, match="no denoiser"):
        official_state({"model": {"conv.weight": torch.zeros(1)}})


def test_positions_are_those_of_the_grid_unless_asked_otherwise():
    model = fill_by_recipe(VQTransformer(8, 4, 16, 1, 4, condition="none"))
    x, e = torch.zeros(1, 16, dtype=torch.int64), model.content_emb
    rows, columns = e.height_emb.weight, e.width_emb.weight
    assert_close(e(x)[0, 6], e.emb.weight[0] + rows[1] + columns[2])                        # token 6 = row 1, column 2
    e = fill_by_recipe(VQTransformer(8, 4, 16, 1, 4, condition="none", position_grid=8)).content_emb
    assert_close(e(x)[0, 11], e.emb.weight[0] + e.height_emb.weight[1] + e.width_emb.weight[3])     # 11 // 8, 11 % 8


def test_every_condition_is_read_and_can_be_hidden():
    x, t = torch.randint(17, (4, 16), generator=seeded(0)), torch.tensor([0, 30, 60, 99])
    hide = torch.tensor([0.0, 0.5, 0.05, 0.9])
    text = fill_by_recipe(VQTransformer(16, 4, 32, 2, 4, context_dim=24, null_length=5))
    words = torch.randn(4, 5, 24, generator=seeded(1))
    hidden = text.drop_labels(words, hide)
    assert torch.equal(hidden[0], text.empty_text_embed) and torch.equal(hidden[1], words[1])
    assert torch.equal(hidden[2], text.empty_text_embed) and text.null_condition(3).shape == (3, 5, 24)
    labels = fill_by_recipe(VQTransformer(16, 4, 32, 2, 4, condition="class", num_classes=7))
    y = torch.tensor([0, 1, 2, 6])
    assert labels.drop_labels(y, hide).tolist() == [7, 1, 7, 6] and labels.null_condition(2).tolist() == [7, 7]
    for model, cond, other in ((text, words, words.flip(0)), (labels, y, y.flip(0))):
        out = model(x, t, cond)
        assert (model(x, t, other) - out).abs().amax((1, 2)).min() > 1e-3                   # the condition
        assert (model(x, t.flip(0), cond) - out).abs().amax((1, 2)).min() > 1e-3            # the time
        assert (model(x.flip(1), t, cond) - out).abs().amax((1, 2)).min() > 1e-3            # the tokens
    with pytest.raises(ValueError, match="null_length"):
        VQTransformer().null_condition(1)


def test_muon_gets_the_matrices_of_the_blocks():
    import re
    model = VQTransformer(16, 4, 32, 1, 4, context_dim=24)
    chosen = {n for n, p in model.named_parameters() if p.dim() >= 2 and re.match(model.matrices, n)}
    attn = {f"blocks.0.attn{i}.{n}.weight" for i in (1, 2) for n in ("key", "query", "value", "proj")}
    assert chosen == attn | {"blocks.0.mlp.0.weight", "blocks.0.mlp.2.weight", "blocks.0.ln1.linear.weight",
                             "blocks.0.ln1_1.linear.weight"}


@pytest.mark.parametrize("seed", range(3))
def test_transformer_overfits_and_samples_what_it_learned(seed):
    """Six classes, each a fixed string of 16 tokens of 8 codes: a class determines all of its tokens.

    The learning rate falls to zero and aux_weight is 1, so the result does not depend on the last batches. With 12
    seeds and ATEN_CPU_CAPABILITY=default, avx2 and unset, at least 0.982 of the tokens are right and vlb is 0.02 at
    most; the limits below are five times as far from the ideal.
    """
    torch.manual_seed(seed)
    data, steps = torch.randint(8, (6, 16)), 250
    chain, model = MaskReplace(20, 8, aux_weight=1.0), VQTransformer(8, 4, 48, 2, 4, 20, "class", num_classes=6)
    opt, generator, y = torch.optim.AdamW(model.parameters()), seeded(seed), torch.arange(18) % 6
    for step in range(steps):
        opt.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        labels = model.drop_labels(y, rand((18,), generator))
        loss, _ = chain.loss(model, data[y], labels, **chain.draw((18, 16), generator))
        opt.zero_grad(), loss.backward(), opt.step()
    y = torch.arange(600) % 6
    with torch.no_grad():
        metrics = chain.loss(model, data[y], y, **chain.draw((600, 16), seeded(seed)))[1]
    assert metrics["vlb"] < 0.1                                             # untrained: ln 8 = 2.1
    for options in (dict(steps=20), dict(steps=5, cfg_scale=2.0), dict(sampler="purity", steps=6)):
        out = chain.sample(model, (60, 16), y[:60], model.null_condition(60), generator=seeded(1), **options)
        assert (out == data[y[:60]]).float().mean() > 0.9, options


# ----------------------------------------------------------------------------------------------------------------------
# the tokeniser

def test_codebook_matches_official():
    d, g = golden_case("vqd_quantizer")
    c = d["config"]
    book = Codebook(c["K"], c["D"], c["decay"], c["eps"])
    book.load_state_dict({k: g[k] for k in ("embedding", "cluster_size", "embedding_avg")})
    vae = VQVAE(image_size=16, num_codes=c["K"], dim=c["D"])
    vae.codebook = book
    for step in range(3):
        z = g[f"z{step}"].requires_grad_()
        z_q, ids = vae.quantise(z)
        assert torch.equal(ids.view(2, 4, 4), g[f"idx{step}"])
        assert_close(z_q, g[f"zq{step}"], rtol=1e-5, atol=1e-6)
        loss = (z_q - z).square().mean()
        assert_close(loss, g[f"loss{step}"], rtol=1e-5, atol=1e-6)
        assert_close(torch.autograd.grad(loss, z)[0], g[f"grad_loss{step}"], rtol=1e-5, atol=1e-6)
        book.update(z.detach().permute(0, 2, 3, 1).flatten(0, 2), ids.flatten())
        for key in ("cluster_size", "embedding_avg", "embedding"):
            assert_close(getattr(book, key), g[f"{key}{step}"], rtol=1e-5, atol=1e-5, msg=lambda m: f"{key}{step}: {m}")


def test_commitment_and_straight_through():
    torch.manual_seed(0)
    vae = VQVAE(image_size=8, num_codes=5, dim=4, width=16, warmup=0, beta=0.25).eval()
    x = torch.randn(2, 3, 8, 8)
    grads = {}
    vae.encoder.register_forward_hook(lambda m, i, o: (o.retain_grad(), grads.update(z=o)) and None)
    vae.decoder.register_forward_pre_hook(lambda m, i: (i[0].retain_grad(), grads.update(z_q=i[0])) and None)
    recon, commitment, ids = vae(x)
    (recon - x).abs().mean().backward(retain_graph=True)
    assert_close(grads["z"].grad, grads["z_q"].grad)                        # the decoder's gradient, untouched
    codes = vae.codebook.embedding[ids].view(2, 2, 2, 4).permute(0, 3, 1, 2)
    assert_close(grads["z_q"].detach(), codes, rtol=0, atol=1e-5)           # though it has read codes
    assert_close(commitment, 0.25 * (grads["z"] - codes).square().mean())
    grads["z"].grad = None
    commitment.backward()
    assert_close(grads["z"].grad, 0.25 * 2 * (grads["z"] - codes).detach() / codes.numel())
    assert not any("codebook" in name for name, _ in vae.named_parameters())


def test_kmeans_finds_clusters_and_dead_codes_come_back():
    centres = 10 * torch.eye(6)
    z = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(300, 6, generator=seeded(0))
    book = Codebook(6, 6)
    book.start(z[torch.randperm(300, generator=seeded(1))])
    assert torch.cdist(centres, book.embedding).min(1).values.max() < 0.1
    dead = Codebook(6, 6, restart=0.5)
    dead.start(z)
    dead.embedding[2], dead.cluster_size[2] = 1e3, 0.1                      # one code far off and forgotten
    lost = dead.embedding.clone()
    dead.update(z, dead.nearest(z))
    # it sits on a vector of the batch; by differences: ||a||^2 + ||b||^2 - 2ab would lose what is measured to rounding
    nearest = torch.cdist(dead.embedding[2:3], z, compute_mode="donot_use_mm_for_euclid_dist").min()
    assert nearest < 1e-3
    assert torch.cdist(dead.embedding[2:3], lost[[0, 1, 3, 4, 5]]).min() > 1   # that the others served badly
    with pytest.raises(ValueError, match="enlarge the batch"):
        book.start(z[:5])


def test_vqvae_round_trip_and_warm_up():
    torch.manual_seed(0)
    vae, x = VQVAE(image_size=16, num_codes=12, width=16, warmup=2), torch.rand(8, 3, 16, 16) * 2 - 1
    first = vae.codebook.embedding.clone()
    for step in range(2):
        recon, commitment, _ = vae(x)
        assert_close(recon, vae.decoder(vae.encoder(x))) and commitment == 0                # not quantised yet
    assert torch.equal(vae.codebook.embedding, first)
    recon, commitment, ids = vae(x)
    assert not torch.equal(vae.codebook.embedding, first) and commitment > 0                # k-means, then codes
    vae.eval()
    before = vae.codebook.embedding.clone()
    recon, _, ids = vae(x)
    assert torch.equal(vae.codebook.embedding, before)                      # only training moves the codes
    assert torch.equal(vae.encode(x), ids) and ids.shape == (8, vae.grid ** 2) and ids.max() < 12
    assert_close(vae.decode(ids), recon, rtol=1e-4, atol=1e-5)
    copy = VQVAE(image_size=16, num_codes=12, width=16, warmup=2)
    copy.load_state_dict(vae.state_dict())
    assert copy.passes == 3 and torch.equal(copy.encode(x), ids)
    uniform = torch.arange(12).repeat(5)
    assert vae.perplexity(uniform).item() == pytest.approx(12, rel=1e-4)
    assert vae.perplexity(torch.zeros(9, dtype=torch.int64)).item() == pytest.approx(1)


def test_bfloat16_autocast_trains_both():
    """As on a GPU: networks in bfloat16, codebook and chain in float32."""
    torch.manual_seed(0)
    vae, model = VQVAE(image_size=16, num_codes=12, width=16, warmup=1), VQTransformer(12, 4)
    chain = MaskReplace(10, 12)
    x = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            recon, commitment, ids = vae(x)
            ((recon - x).square().mean() + commitment).backward()
        loss, _ = chain.loss(model, ids, torch.randn(8, 5, 64), generator=seeded(0))
    loss.backward()
    assert loss.dtype == vae.codebook.embedding.dtype == torch.float32
    exact = torch.cdist(vae.encoder(x).permute(0, 2, 3, 1).flatten(0, 2), vae.codebook.embedding).argmin(1)
    assert (exact.view(8, 16) == vae.encode(x)).all()
    assert all(p.grad.isfinite().all() for p in [*vae.parameters(), *model.parameters()])


# ----------------------------------------------------------------------------------------------------------------------
# wrong input

def test_wrong_input_is_named():
    chain, x = MaskReplace(10, 4), torch.zeros(1, 4, dtype=torch.int64)
    model = lambda x, t, cond: torch.zeros(1, 4, 4)
    for bad, words in ((dict(steps=11), "1 to 10 of them, not 11"), (dict(sampler="ddim"), "unknown sampler 'ddim'"),
                       (dict(mask=x), "need x_init"), (dict(strength=0.5), "need x_init"),
                       (dict(x_init=x, strength=0.0), "above 0"),
                       (dict(sampler="fewer", steps=5), "1 to 4 steps, not 5"),
                       (dict(cfg_scale=2.0), "unconditional"), (dict(generator=[seeded(0)] * 2), "2 generators")):
        with pytest.raises(ValueError, match=words):
            chain.sample(model, (1, 4), **{"steps": 5, **bad})
    for bad, words in ((dict(schedule="cosine"), "choose one of"), (dict(steps=1), "at least 2 steps"),
                       (dict(schedule=(0.9, 0.1, 0.2, 0.5)), "add up to 1.1"),
                       (dict(schedule=(0.5, 0.5, 0.1, 0.4)), "impossible schedule")):
        with pytest.raises(ValueError, match=words):
            MaskReplace(**bad)
    for bad, words in ((dict(num_heads=3), "num_heads 3"), (dict(condition="image"), "choose one of text"),
                       (dict(mlp="moe"), "fc, conv"), (dict(position_grid=4), "smaller than the grid")):
        with pytest.raises(ValueError, match=words):
            VQTransformer(**bad)
    vae = VQVAE(image_size=8, width=16)
    for call, words in ((lambda: VQVAE(image_size=30), "30 is not divisible"),
                        (lambda: vae.encode(torch.zeros(1, 3, 16, 16)), "not 3 x 16 x 16"),
                        (lambda: vae.decode(torch.full((1, 4), 256)), "MASK"),
                        (lambda: vae.decode(x[:, :3]), "3 tokens")):
        with pytest.raises(ValueError, match=words):
            call()
