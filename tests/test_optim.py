"""optim.py: Muon and its matrix iteration against float64, who gets which weights, one update."""
import copy
import math

import pytest
import torch
from torch.testing import assert_close

import data
from cli import parse
from models import PRESETS, find_model, make_task, settings_class
from optim import (Muon, average_of, learning_rate, load_moments, make_optimizers, orthogonalise,
                   update, update_ema)
from train import Config


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --------------------------------------------------------------------------------------------------
# Muon

def singular_values_pushed(G, steps=5):
    """The iteration on the singular values alone: s -> 3.4445 s - 4.775 s^3 + 2.0315 s^5."""
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    s = s / (s.square().sum(-1, keepdim=True).sqrt() + 1e-7)        # by the Frobenius norm
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    return U @ torch.diag_embed(s) @ Vh


@pytest.mark.parametrize("rows,cols", [(20, 12), (12, 20), (8, 8)])
def test_orthogonalise_is_a_polynomial_of_the_singular_values(rows, cols):
    G = seeded(3, rows, cols, dtype=torch.float64) * torch.tensor([1e-3, 1, 50]).view(3, 1, 1)
    assert_close(orthogonalise(G), singular_values_pushed(G), rtol=1e-9, atol=1e-9)
    # five steps multiply a rounding error (6e-8) by at most 3.4445^5 = 485
    assert_close(orthogonalise(G.float()).double(), singular_values_pushed(G), rtol=0, atol=1e-4)
    s = torch.linalg.svdvals(orthogonalise(seeded(3, 20, 12)))
    assert 0.6 < s.min() and s.max() < 1.3                          # "about 1": Jordan et al. 2024


def reference_muon(w, grads, lr, beta, decay):
    """Muon on one weight in float64, after the description in Jordan et al. 2024."""
    w, momentum = w.double(), torch.zeros_like(w, dtype=torch.float64)
    for g in grads:
        momentum = beta * momentum + (1 - beta) * g.double()
        nesterov = (1 - beta) * g.double() + beta * momentum
        matrix = singular_values_pushed(nesterov.reshape(len(w), -1))
        scale = math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))
        w = w - lr * (scale * matrix.view_as(w) + decay * w)
    return w


def test_muon_equals_the_formula_for_matrices_and_convolutions():
    shapes = [(16, 8), (16, 8), (8, 16), (6, 4, 3, 3), (40, 2, 3, 3)]
    params = [torch.nn.Parameter(seeded(*shape, seed=i)) for i, shape in enumerate(shapes)]
    grads = [[seeded(*shape, seed=10 * i + k + 7) for k in range(4)]
             for i, shape in enumerate(shapes)]
    expected = [reference_muon(p.detach(), g, 0.02, 0.95, 0.1) for p, g in zip(params, grads)]
    muon = Muon(params, lr=0.02, weight_decay=0.1)
    for k in range(4):
        for p, g in zip(params, grads):
            p.grad = g[k].clone()
        muon.step()
    for p, wanted in zip(params, expected):
        assert_close(p.double(), wanted, rtol=0, atol=1e-5)         # 4 steps of 0.02 x 1e-4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs a torch with its own Muon")
def test_muon_follows_torchs_own():
    ours, theirs = ([torch.nn.Parameter(seeded(16, 8, seed=i)) for i in range(2)] for _ in "ab")
    a = Muon(ours, lr=0.02)
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.0, nesterov=True,
                         adjust_lr_fn="original")
    for k in range(5):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = seeded(16, 8, seed=100 + 2 * k + i)
            q.grad = p.grad.clone()
        a.step(), b.step()
    for i, (p, q) in enumerate(zip(ours, theirs)):
        moved = (q - seeded(16, 8, seed=i)).norm()
        assert (p - q).norm() < 0.02 * moved                        # theirs rounds to bfloat16


# --------------------------------------------------------------------------------------------------
# which optimizer trains what

MODELS = ["DiT-32x2/2", "udit-tiny", "unet-tiny", "vq-tiny", "tiny-ae", "kl-ae", "vq-vae"]


@pytest.fixture(scope="module")
def world():
    return data.load("scenes", count=8)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_in_exactly_one_group(name, world):
    config, settings = parse(["--model", name], "", Config, settings_class(find_model(name)[0]),
                             presets=lambda given: PRESETS.get(name, {}))
    if hasattr(settings, "first_stage"):
        settings.first_stage = "new" if name[0] in "uv" else "none"
    model = make_task(config, settings, world).model
    frozen = next(model.parameters()).requires_grad_(False)         # as adapters.py does
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = make_optimizers(config, model)
    of = lambda optimizer: [names[id(p)] for g in optimizer.param_groups for p in g["params"]]
    assert sorted(of(adamw) + of(muon)) == sorted(set(names.values()) - {names[id(frozen)]})
    params = dict(model.named_parameters())
    assert all(params[name].dim() >= 2 for name in of(muon))
    words = ("embed", "final_layer", "null", "time_embed", "conv_in", "conv_out", "to_logits")
    assert not [name for name in of(muon) if any(word in name for word in words)]
    size = lambda optimizer: sum(params[name].numel() for name in of(optimizer))
    assert size(muon) > size(adamw) / 2                             # it trains the blocks
    assert {g["lr"] for g in adamw.param_groups} == {config.lr}
    assert {g["lr"] for g in muon.param_groups} == {config.muon_lr}
    config.optimizer = "adamw"
    only, = make_optimizers(config, model)
    assert sorted(of(only)) == sorted(of(adamw) + of(muon))


def test_new_words_have_a_rate_of_their_own():
    model = torch.nn.ModuleDict({"rows": torch.nn.ModuleDict({"x": torch.nn.Linear(2, 2)})})
    model = torch.nn.ModuleDict({"text": model, "other": torch.nn.Linear(2, 2)})
    model.matrices, config = r"(?!)", Config(lr=0.1, weight_decay=0.3)
    config.word_lr = 0.7
    adamw, = make_optimizers(config, model)
    assert [(len(g["params"]), g["lr"]) for g in adamw.param_groups] == [(2, 0.1), (2, 0.7)]
    assert all(g["weight_decay"] == 0.3 for g in adamw.param_groups)


# --------------------------------------------------------------------------------------------------
# one update

def test_learning_rate():
    config = Config(steps=100, warmup=10)
    assert learning_rate(0, config) == pytest.approx(0.1)
    cosine = lambda s: 0.5 * (1 + math.cos(math.pi * s / 100))
    assert learning_rate(4, config) == pytest.approx(0.5 * cosine(4))
    assert learning_rate(55, config) == pytest.approx(cosine(55))
    assert learning_rate(99, config) < 0.001
    constant = Config(steps=100, warmup=0, lr_decay="constant")
    assert learning_rate(0, constant) == learning_rate(99, constant) == 1


def test_the_average_shares_what_does_not_learn():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Dropout())
    model[0].requires_grad_(False)
    ema = average_of(model)
    assert ema[0].weight is model[0].weight and ema[1].weight is not model[1].weight
    assert torch.equal(ema[1].weight, model[1].weight)
    assert not ema.training and model.training and not ema[1].weight.requires_grad


def test_update_ema_copies_buffers_and_skips_a_bad_step():
    model = torch.nn.BatchNorm1d(2)
    ema = average_of(model)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([3.0, 5.0]))
        model.running_mean.fill_(7)
    update_ema(ema, model, 0.5, torch.zeros(()))
    assert ema.weight.tolist() == [1, 1]
    update_ema(ema, model, 0.75, torch.ones(()))
    assert ema.weight.tolist() == [1.5, 2] and ema.running_mean.tolist() == [7, 7]


class Descent(torch.optim.Optimizer):
    """w -= lr * g: unlike AdamW and Muon it shows the length of the gradient."""

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * p.grad


@pytest.mark.parametrize("clip,step", [(1.0, 0), (0.0, 3), (100.0, 20)])
def test_update_is_rate_times_clipped_gradient_then_average(clip, step):
    model = torch.nn.Linear(2, 1, bias=False)
    ema, before = average_of(model), copy.deepcopy(model)
    descent = Descent(model.parameters(), dict(lr=0.5))
    config = Config(steps=100, warmup=4, lr_decay="constant", grad_clip=clip, ema=0.6)
    model.weight.grad = torch.tensor([[3.0, 4.0]])                          # norm 5
    norm, keep = update(config, model, ema, [descent], step)
    assert norm.item() == pytest.approx(5) and keep.item() == 1 and model.weight.grad is None
    rate = 0.5 * min(1, (step + 1) / 4)
    moved = rate * torch.tensor([[3.0, 4.0]]) * (1 / 5 if clip == 1 else 1)
    assert_close(before.weight - model.weight, moved, rtol=1e-5, atol=1e-6)
    share = 1 - min(0.6, (1 + step) / (10 + step))                          # of the new weights
    assert_close(before.weight - ema.weight, share * moved, rtol=1e-5, atol=1e-6)


def test_an_optimizer_that_is_not_fused_skips_a_bad_step_too():
    """On mps AdamW is not, and then found_inf must be None."""
    model = torch.nn.Linear(2, 1, bias=False)
    ema, adamw = average_of(model), torch.optim.AdamW(model.parameters(), fused=False)
    for gradient, moves in ((3.0, True), (math.nan, False), (3.0, True)):
        before = model.weight.clone()
        model.weight.grad = torch.full((1, 2), gradient)
        assert update(Config(steps=9), model, ema, [adamw], 0)[1] == moves
        assert bool((model.weight != before).all()) == moves and model.weight.isfinite().all()


def test_muon_must_leave_something_to_adamw():
    model = torch.nn.Linear(3, 3, bias=False)
    model.matrices = "weight"
    with pytest.raises(ValueError, match="leaves nothing to adamw here"):
        make_optimizers(Config(), model)
    adamw, = make_optimizers(Config(optimizer="adamw"), model)
    assert adamw.defaults["betas"] == (0.9, 0.999)                          # DiT §4: as published


# --------------------------------------------------------------------------------------------------
# moments of a checkpoint

def remembering(rate, steps=2):
    """[AdamW, Muon] of a small model, after so many steps."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3), torch.nn.Linear(3, 4))
    model.matrices = r"\d\.weight"
    optimizers = make_optimizers(Config(lr=rate, muon_lr=rate, weight_decay=rate), model)
    for step in range(steps):
        for i, p in enumerate(model.parameters()):
            p.grad = seeded(*p.shape, seed=10 * step + i)
        for optimizer in optimizers:
            optimizer.step()
    return optimizers


def test_moments_come_back_and_rates_stay():
    for old, new in zip(remembering(0.1), remembering(0.3, steps=0)):
        saved = copy.deepcopy(old.state_dict())
        load_moments(new, saved)
        assert all(g["lr"] == g["weight_decay"] == 0.3 for g in new.param_groups)
        state = new.state_dict()["state"]
        assert state.keys() == old.state_dict()["state"].keys() and state
        for i, held in old.state_dict()["state"].items():
            assert all(torch.equal(value, state[i][name]) for name, value in held.items())


@pytest.mark.parametrize("which,name", [(0, "exp_avg"), (0, "exp_avg_sq"), (0, "step"),
                                        (1, "momentum")])
def test_moments_of_other_weights_are_refused(which, name):
    for wrong in (None, torch.zeros(7), torch.zeros(2, 4, 4), torch.zeros(1, 4, 3)):
        optimizer = remembering(0.1)[which]
        saved = copy.deepcopy(optimizer.state_dict())
        if wrong is None:
            del saved["state"][0][name]
        else:
            saved["state"][0][name] = wrong
        before = copy.deepcopy(optimizer.state_dict()["state"])
        with pytest.raises(ValueError, match="weight 0 is not .*--init"):
            load_moments(optimizer, saved)
        for held, kept in zip(before.values(), optimizer.state_dict()["state"].values()):
            assert all(torch.equal(value, kept[key]) for key, value in held.items())
