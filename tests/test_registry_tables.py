"""What holds for every process, schedule, sampler, option, first stage, tap, placement and part.

See test_registry.py.
"""
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import fill_by_recipe
from test_registry import (CAPTIONS, PICTURES, alternatives, changes, label, noise, per_row, seeded,
                           task_of)
from torch.testing import assert_close

import adapters
import custom_diffusion
import data
import unet
import vae
from diffusion import GaussianDiffusion, RectifiedFlow
from optim import make_optimizers
from text import TextConditional, TextEncoder, WordTokenizer
from train import Config
from vqdiffusion import SCHEDULES, MaskReplace


# --------------------------------------------------------------------------------------------------
# processes

def all_processes():
    """Every process, with up to two arguments changed."""
    made = []
    for cls in (GaussianDiffusion, RectifiedFlow):
        for changed in changes(alternatives(cls, cls, numbers=True), 2):
            made.append(cls(**changed))
            made[-1].changed = changed
    return made


PROCESSES = all_processes()


def pytest_generate_tests(metafunc):
    if "process" in metafunc.fixturenames:
        metafunc.parametrize("process", PROCESSES, ids=lambda p: label(type(p).__name__, p.changed))
    if "sampled" in metafunc.fixturenames:
        rows = [(p, s) for p in PROCESSES if len(p.changed) < 2 for s in p.samplers
                if not p.changed.keys() & {"min_snr", "logit_normal"}]      # of training
        metafunc.parametrize("sampled", rows, ids=lambda r: label(r[0].changed, r[1]))


# what a network may predict, of x0 and eps in xt = a x0 + b eps
TARGETS = {"eps": lambda x0, eps, a, b: eps, "x0": lambda x0, eps, a, b: x0,
           "v": lambda x0, eps, a, b: a * eps - b * x0,
           "velocity": lambda x0, eps, a, b: eps - x0}
name_of = lambda process: getattr(process, "prediction", "velocity")


def signal_and_noise(process, t):
    """a and b (B, 1, 1, 1) float64 of xt = a x0 + b eps at the t that the network reads."""
    flow = isinstance(process, RectifiedFlow)
    a = 1 - t.double() / 1000 if flow else process.alpha_bar[t].sqrt()
    b = t.double() / 1000 if flow else (1 - process.alpha_bar[t]).sqrt()
    return a.view(-1, 1, 1, 1), b.view(-1, 1, 1, 1)


def answer(process, x0, eps, a, b):
    out = TARGETS[name_of(process)](x0, eps, a, b)
    # v = -1 is the posterior's variance
    return (torch.cat([out, -torch.ones_like(out)], 1) if getattr(process, "learn_sigma", 0)
            else out).float()


def expected_weight(process, snr):
    """What an argument called "snr" (min-SNR, Hang et al. 2023 Eq. 8) makes of the loss; else 1."""
    if "snr" not in str(process.changed):
        return torch.ones_like(snr)
    gamma = next((v for v in process.changed.values() if type(v) is float), 5.0)
    error = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}      # over that of x0
    return snr.clamp(max=gamma) / error[name_of(process)]


def test_loss_of_a_right_network_is_0_and_of_a_silent_one_is_known(process):
    x0, n = 0.5 * noise(6, 2, 4, 4).double(), 6
    draws = process.draw(x0.shape, seeded(1))
    draws["t"] = torch.tensor([30, 200, 400, 600, 900, 990]).to(draws["t"].dtype)
    eps = draws["eps"].double()
    a, b = signal_and_noise(process, draws["t"])
    asked = []

    def right(xt, t, cond):
        assert_close(xt.double(), a * x0 + b * eps, rtol=1e-6, atol=1e-6)
        assert torch.equal(t, draws["t"]) and cond is condition
        asked.append(1)
        return answer(process, x0, eps, a, b)
    condition = torch.arange(6)
    loss, metrics = process.loss(right, x0.float(), condition, **draws)
    assert asked == [1] and loss.abs() < 1e-6 and all(v.abs() < 1e-6 for v in metrics.values())
    target = TARGETS[name_of(process)](x0, eps, a, b)
    silent = lambda xt, t, cond: 0 * right(xt, t, cond)
    weight = expected_weight(process, (a / b).square().flatten()).view(n, 1, 1, 1)
    loss, metrics = process.loss(silent, x0.float(), condition, **draws)
    expected, mse = weight * target ** 2, loss - metrics.get("vb", 0)
    assert_close(mse.double(), expected.mean(), rtol=1e-5, atol=0)
    half = (torch.arange(4) < 2).float().expand(n, 1, 4, 4)
    loss, metrics = process.loss(silent, x0.float(), condition, mask=half, **draws)
    mse = loss - metrics.get("vb", 0)
    assert_close(mse.double(), expected[..., :2].mean(), rtol=1e-5, atol=0)


def test_every_draw_of_a_process_obeys_the_generator_and_is_read(process):
    x0, channels = noise(4, 2, 4, 4), 4 if getattr(process, "learn_sigma", False) else 2
    network = lambda xt, t, c: torch.cat([xt, 0 * xt], 1)[:, :channels]
    torch.manual_seed(0)
    draws, again, other = (process.draw(x0.shape, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), torch.rand(3, generator=seeded(0)))       # no other numbers
    loss = process.loss(network, x0, **draws)[0]
    for name in draws:
        assert torch.equal(draws[name], again[name]) and len(draws[name]) == 4
        assert process.loss(network, x0, **{**draws, name: other[name]})[0] != loss, name
    assert len(process.draw((500, 1), seeded(1))["t"].unique()) > 300       # each row its own


def test_times_of_training_follow_their_law(process):
    t = process.draw((20_000, 1), seeded(3))["t"].double()
    if isinstance(process, RectifiedFlow):
        assert 0 <= t.min() and t.max() < 1000
        # a shift s adds log(s) to the logit (SD3 Eq. 23); logit-normal: SD3 Eq. 19, mean 0, std 1
        z = torch.logit(t / 1000) - math.log(process.shift)
        p = torch.special.ndtr(z) if "logit" in str(process.changed) else z.sigmoid()
    else:
        p = (t + 0.5) / process.steps
        assert t.min() < 2 and t.max() == process.steps - 1
    counts = torch.histc(p, 20, 0, 1)                                   # should be 1,000 each
    assert ((counts - 1000) ** 2 / 1000).sum() < 65                     # chi-square, 19: p = 1e-6


@pytest.mark.parametrize("changed", changes([p for p in alternatives(
    GaussianDiffusion, GaussianDiffusion) if p[0] == "schedule"], 1), ids=label)
def test_a_noise_schedule_goes_from_picture_to_noise(changed):
    process = GaussianDiffusion(**changed)
    ab = process.alpha_bar
    assert ab.dtype == torch.float64 and (ab.diff() < 0).all() and (process.betas > 0).all()
    assert ab[0] > 0.99 and ab[-1] < 0.01 and 0.02 < ab[500] < 0.8
    log_snr = torch.logit(ab)
    assert (log_snr.diff()[:-2].abs() < 1.5).all()                      # no step skips much
    assert_close(torch.cumprod(1 - process.betas, 0), ab)


def gaussian_network(process, std):
    """The best network for pictures whose numbers are independent, N(condition, std^2)."""
    def network(xt, t, cond):
        a, b = signal_and_noise(process, t)
        mean, xt = cond.double().view(-1, 1, 1, 1), xt.double()
        x0 = mean + a * std ** 2 / (a ** 2 * std ** 2 + b ** 2) * (xt - a * mean)
        return answer(process, x0, (xt - a * x0) / b, a, b)
    return network


def test_samplers_recover_a_gaussian_and_guidance_extrapolates(sampled):
    """The predictions are linear in the mean, so guidance s gives the mean u + s (c - u)."""
    process, sampler = sampled
    n, std, steps = 20_000, 0.5, 1000 if sampler == "ddpm" else 200
    ones = torch.ones(n // 20)
    for scale, mean in ((1.0, 0.3), (1.5, 0.6)):
        x = process.sample(gaussian_network(process, std), (n // 20, 2, 5, 2), 0.3 * ones,
                           -0.3 * ones, sampler=sampler, steps=steps, cfg_scale=scale,
                           generator=seeded(5))
        # 4.5 standard errors, the first-order samplers' share of about 1 / steps, and that sampling
        # starts from N(0, 1), without the a x0 that is left in the last step
        left = process.alpha_bar[-1].sqrt() if hasattr(process, "alpha_bar") else 0.0
        assert abs(x.mean() - mean) < 4.5 * std / n ** 0.5 + 0.01 + left * std * mean
        assert abs(x.std() - std) < 4.5 * std / (2 * n) ** 0.5 + 0.01
        if sampler == "ddpm":
            break


VALUES = {"cfg_scale": 2.0, "cfg_channels": 1, "strength": 0.5,
          "clip": True, "eta": 0.7, "truncation": 0.6, "stride": "official",
          "purity": 3.0}
NEEDS = {"cfg_channels": {"cfg_scale": 2.0}}


@pytest.mark.parametrize("make", [GaussianDiffusion, RectifiedFlow, lambda: MaskReplace(20, 6)],
                         ids=["gaussian", "flow", "tokens"])
def test_every_option_of_a_sampler_changes_the_result_and_others_are_refused(make):
    process = make()
    tokens = isinstance(process, MaskReplace)
    shape = (4, 16) if tokens else (4, 2, 4, 4)
    logits = noise(17, 16, 6)
    network = (lambda x, t, c: logits[c.long()] * (1 + (x == 6)[..., None]) if tokens
               else 0.5 * x + 0.3 * c.view(-1, 1, 1, 1))
    cond, uncond = torch.arange(4), torch.arange(4) + 8
    known = torch.arange(64).view(4, 16) % 6 if tokens else 0.3 * noise(*shape, seed=3)
    half = torch.arange(16).view(4, 4) // 8
    mask = half.flatten().expand(4, 16) if tokens else half.expand(4, 1, 4, 4)
    more = {**VALUES, "x_init": known, "mask": mask, "noise": noise(*shape, seed=4),
            "start": torch.full(shape, 6)}
    every = frozenset().union(*process.options.values())
    assert set(process.options) == set(process.samplers) == set(process.default_steps)
    for sampler in process.samplers:
        def sample(**options):
            return process.sample(network, shape, cond, uncond, sampler=sampler, steps=6,
                                  **{"generator": seeded(7), **options})
        plain = sample()
        assert torch.equal(plain, sample())
        for name in every - {"device"}:
            value = seeded(8) if name == "generator" else more.get(name)
            assert value is not None, f"add a value of {name} to VALUES"
            options = {**NEEDS.get(name, {}), name: value}
            if name in ("mask", "strength", "x_init"):
                options |= {"x_init": known, **({"mask": mask} if name == "x_init" else {})}
            if name not in process.options[sampler]:
                with pytest.raises(ValueError, match=name):
                    sample(**options)
            else:
                base = sample(**NEEDS[name]) if name in NEEDS else plain
                assert not torch.equal(sample(**options), base), (sampler, name)
        outside = (mask == 0).expand(shape)
        assert torch.equal(sample(x_init=known, mask=mask)[outside], known[outside])
        with pytest.raises(ValueError, match="nothing"):
            sample(nothing=1)


# --------------------------------------------------------------------------------------------------
# tokens

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_mask_schedule_is_a_chain(schedule):
    """Its steps multiply to its marginals, its posterior is Bayes' rule, its end is near noise."""
    K, T = 3, 7
    p = MaskReplace(T, K, schedule)
    assert (p.alpha_bar[:T].diff() < 0).all() and (p.gamma_bar[:T].diff() >= 0).all()
    assert p.alpha_bar[0] > 0.99 and p.alpha_bar[T - 1] < 0.01 and p.gamma_bar[0] < 0.01
    assert (p.beta_bar >= 0).all() and (p.alpha_bar + K * p.beta_bar + p.gamma_bar).allclose(
        torch.ones(1).double())
    assert "mask-only" not in schedule or p.beta_bar.max() == 0
    assert "replace-only" not in schedule or p.gamma_bar.max() == 0
    eye, chain = torch.eye(K + 1).double(), torch.eye(K + 1).double()
    for t in range(T):
        alpha, beta, gamma = p.transition(torch.tensor([t]), torch.tensor([t - 1]))
        step = alpha * eye + beta * torch.ones(K + 1, K + 1).double()   # [j, i] = q(j | i), Eq. 7
        step[K], step[:, K] = gamma, eye[K]
        assert (step >= 0).all() and step.sum(0).allclose(torch.ones(1).double())
        before, chain = chain, step @ chain
        # what is drawn has these frequencies: evenly spread uniforms, all tokens of code 1
        u = torch.cartesian_prod((torch.arange(400) + 0.5) / 400, (torch.arange(30) + 0.5) / 30)
        xt = p.q_sample(torch.ones(1, len(u)).long(), torch.tensor([t]), u[None])
        found = torch.bincount(xt[0], minlength=K + 1) / len(u)
        assert_close(found.double(), chain[:, 1], atol=1 / 200, rtol=0)
        marginal = p.alpha_bar[t] * eye + p.beta_bar[t]                     # Eq. 8
        marginal[K] = p.gamma_bar[t]
        assert_close(marginal[:, :K], chain[:, :K], atol=1e-12, rtol=0)
        # Bayes: q(xs | xt, x0) = q(xt | xs) q(xs | x0) / q(xt | x0)
        for x0 in range(K):
            seen = torch.arange(K + 1)[chain[:, x0] > 1e-6]             # xt that can be seen
            bayes = step[seen] * before[:, x0]
            given = eye[x0].float().expand(1, len(seen), -1)
            assert_close(p.posterior(given, seen[None], torch.tensor([t]))[0].double(),
                         bayes / bayes.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampler", MaskReplace.samplers)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_samplers_recover_independent_tokens(schedule, sampler):
    pi = torch.tensor([0.5, 0.3, 0.15, 0.05])
    p = MaskReplace(50, 4, schedule)

    def network(xt, t, cond):                                           # p(x0 | xt), by Bayes' rule
        ab, bb, gb = (bar[t].float() for bar in (p.alpha_bar, p.beta_bar, p.gamma_bar))
        likely = ab[:, None, None] * torch.eye(4) + bb[:, None, None]   # q(xt | x0), (B, xt, x0)
        likely = torch.cat([likely, gb.view(-1, 1, 1).expand(-1, 1, 4).clamp(min=1e-9)], 1)
        return (likely[torch.arange(len(xt))[:, None], xt] * pi).clamp(min=1e-20).log()
    options = {"purity": 0.0} if sampler == "purity" else {}
    sample = lambda: p.sample(network, (400, 25), sampler=sampler, steps=25, generator=seeded(1),
                              **options)
    if sampler != "posterior" and p.gamma_bar.max() == 0:
        with pytest.raises(ValueError, match="MASK"):
            sample()
        return
    found = torch.bincount(sample().flatten(), minlength=4) / 10_000
    assert ((found - pi).abs() < 4.5 * (pi * (1 - pi) / 10_000).sqrt()).all()


def test_every_draw_of_tokens_is_read_and_a_right_network_costs_only_what_is_unknown():
    p = MaskReplace(20, 5, aux_weight=0.0)
    x0 = torch.arange(160).view(4, 40) % 5
    draws, other = (p.draw(x0.shape, seeded(seed)) for seed in (1, 2))
    sure = lambda xt, t, c: 60.0 * F.one_hot(x0, 5)
    vague = lambda xt, t, c: noise(4, 40, 5) + (xt % 5)[..., None] * 0.1
    assert p.loss(sure, x0, **draws)[0].abs() < 1e-4
    assert p.loss(vague, x0, **draws)[0] > 0.1
    for name in draws:
        assert p.loss(vague, x0, **{**draws, name: other[name]})[0] != p.loss(vague, x0, **draws)[0]
    t = p.draw((20_000, 1), seeded(1))["t"]
    assert ((torch.bincount(t, minlength=20) - 1000) ** 2 / 1000.0).sum() < 65      # chi-square, 19


# --------------------------------------------------------------------------------------------------
# first stages

@pytest.mark.parametrize("kind", vae.FIRST_STAGES)
def test_first_stage(kind):
    if kind == "none":
        stage = vae.Pixels()
        assert torch.equal(stage.decode(stage.encode(PICTURES)), PICTURES)
        return
    task = task_of(kind, {"factor": 4, "codes": 8} if kind == "vq-vae" else {})
    stage, x = task.model.eval(), data.to_float(PICTURES)
    assert vae.FIRST_STAGES[kind] is type(stage) and stage.kind == kind
    with torch.no_grad():
        stage.standardise(x)
        z = stage.encode(x)
        assert z.shape[1:] == stage.latent_shape(x.shape[1:]) and stage.standardised
        again = type(stage)(**stage.sizes)
        again.load_state_dict(stage.state_dict())
        assert torch.equal(again.encode(x), z) and torch.equal(again.decode(z), stage.decode(z))
        assert not z.is_floating_point() or abs(z.std() - 1) < 0.05
        picture = stage.decode(z)
        assert picture.shape == x.shape and picture.isfinite().all()
        alone = torch.cat([stage.decode(stage.encode(x[i:i + 1])) for i in range(8)])
        assert_close(alone, picture, rtol=1e-4, atol=1e-5)
        # one cell of the latents is one square of the picture
        mask = torch.zeros(1, 1, 16, 16)
        mask[..., 0, 15] = 1
        cells = stage.shrink_mask(mask).view(16 // stage.factor, -1)
        assert cells[0, -1] == 1 and cells.sum() == 1
    loss, _ = task.loss(stage, PICTURES, None, None, **task.draw(8, seeded(0), "cpu"))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in stage.named_parameters()
               if p.requires_grad and not n.endswith("attn_1.k.bias"))


# --------------------------------------------------------------------------------------------------
# taps, placements, parts

def small_unet():
    net = unet.UNet(4, 4, 16, (1, 2), 1, (1, 2), num_heads=2, context_dim=12, norm_groups=4)
    return fill_by_recipe(net), (noise(2, 4, 8, 8), torch.tensor([3, 70]), noise(2, 5, 12, seed=1))


@pytest.fixture
def tapped(monkeypatch):
    """tapped[block][tap] = (tensor in, tensor out) of the last forward, in order of the calls."""
    log, real = {}, unet.Tapped.tap

    def spy(self, name, x):
        out = real(self, name, x)
        assert name not in log.setdefault(self, {}), f"{name} is tapped twice"
        log[self][name] = (x.detach(), out.detach())
        return out
    monkeypatch.setattr(unet.Tapped, "tap", spy)
    return log


def test_taps_are_different_tensors_of_their_widths_in_the_order_of_the_placements(tapped):
    net, arguments = small_unet()
    with torch.no_grad():
        net(*arguments)
    assert len(tapped) == sum(isinstance(m, unet.Tapped) for m in net.modules()) > 5
    for block, taps in tapped.items():
        values = {name: value for name, (value, _) in taps.items()}
        assert values.keys() == block.taps.keys()
        for name, width in block.taps.items():
            assert values[name].shape[1 if name.startswith("res") else -1] == width
        for a, b in itertools.combinations(values, 2):
            assert not torch.equal(values[a], values[b]), f"{a} and {b} are one tensor"
        order = list(values)
        for read, adds in adapters.LEGAL.items():
            for add in adds if read in values else ():
                assert order.index(read) <= order.index(add), f"{add} comes before {read}"


@pytest.mark.parametrize("placement", adapters.PLACEMENTS)
def test_an_adapter_reads_and_adds_where_its_placement_says(placement, tapped):
    read, add = placement.split("-")
    net, arguments = small_unet()
    with torch.no_grad():
        plain = net(*arguments)
        before = {block: dict(taps) for block, taps in tapped.items()}
        tapped.clear()
        adapters.add_adapters(net, read, add, rank=3, init="official", scale=0.7)
    out = net(*arguments)
    placed = [block for block in tapped if block.adapter is not None]
    assert placed == [block for block in tapped if read in block.taps]
    assert torch.equal(tapped[placed[0]][read][0], before[placed[0]][read][0])  # nothing before it
    for block, taps in tapped.items():
        for name, (x, changed) in taps.items():
            if block in placed and name == add:
                a = block.adapter
                assert_close(changed, x + 0.7 * a.up(a.act(a.down(a.before(taps[read][0])))))
                assert not torch.equal(x, changed)
            else:
                assert torch.equal(x, changed), f"{name} is changed as well"
    assert (per_row(out, plain) > 1e-6).all()
    (out * noise(*out.shape, seed=5)).sum().backward()
    learned = {n for n, p in net.named_parameters() if p.requires_grad}
    assert learned == {n for n, p in net.named_parameters() if ".adapter." in n}
    assert all(p.grad is not None and p.grad.any() for p in net.parameters() if p.requires_grad)
    tapped.clear()
    with torch.no_grad():
        adapters.set_scale(net, 0.0)
        assert torch.equal(net(*arguments), plain)


def said_by(part, model):
    """The tensors of a model that a part's name says: letters q, k, v of the cross-attention."""
    attention = [m.attn2 for m in model.modules() if isinstance(m, unet.TransformerBlock)]
    if part in ("all", "none"):
        return list(model.denoiser.parameters()) if part == "all" else []
    if part == "crossattn":
        return [p for m in attention for p in m.parameters()]
    letters = re.sub("only|alues?|eys?|ueries|uery|and|[_ -]", "", part.lower())
    assert set(letters) <= set("qkv"), f"say here which tensors the part {part!r} is"
    return [getattr(m, f"to_{letter}").weight for m in attention for letter in letters]


@pytest.mark.parametrize("part", custom_diffusion.PARTS)
def test_a_part_trains_exactly_what_it_names(part):
    net, (x, t, _) = small_unet()
    tokenizer = WordTokenizer.from_captions(CAPTIONS)
    text = fill_by_recipe(TextEncoder(tokenizer.vocab_size, tokenizer.max_length, 12, num_heads=2))
    model = TextConditional(net, text, tokenizer([""])[0], 0.1)
    expected = {id(p) for p in said_by(part, model)}
    trained = custom_diffusion.personalise(model, tokenizer, {"<new1>": "red"}, part)
    rows = {id(p) for p in model.text.rows}
    assert {id(p) for p in trained.values()} == expected | rows and len(rows) == 1
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizers = make_optimizers(Config(device="cpu", optimizer="adamw", lr=1e-2), model)
    y = tokenizer(["a <new1> w here", "a <new1> x here"])
    (model(x, t, y) - noise(2, 4, 8, 8, seed=9)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    moved = {id(p) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == expected | rows
