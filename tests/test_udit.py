"""udit.py against official figures and the paper's counts; the ablations, the fold, what is read.

Most comparisons are in float64, so that a difference is a mistake and not a rounding error.
"""
import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import fill_by_recipe, golden_case
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from pretrained import infer_udit
from studies.spectra import features, frequency_response, low_share, radial_spectrum
from udit import (MLPS, UDIT_CONFIGS, Attention, RepMlp, UDiT, convolve, fold, merge_phases,
                  rope_table, rotate, split_phases)

TINY = dict(input_size=8, hidden_size=16, depth=(1, 1, 1, 1, 1), num_heads=2, num_classes=5)
VANILLA = dict(cosine=False, rope=False, mlp="basic")
EXACT = dict(rtol=0, atol=1e-10)            # float64, values of order 1
# The golden figures are float32. From the same formula in float64 they differ by their own rounding
# error, at most 4.0e-6 on every machine; the smallest known mistake (LayerNorm's eps) makes 3e-5.
# Float32 here is about as far from float64, a few times as far in another order of summation.
GOLDEN = {torch.float64: dict(rtol=0, atol=1e-5), torch.float32: dict(rtol=0, atol=2e-5)}


def build(d):
    """UDiT, or its attention, from a golden case's official arguments."""
    c = d["config"]
    tricks = dict(cosine=c["attn_type"] == "v2", rope=c["posemb_type"] == "rope2d",
                  shortcut=c["down_shortcut"], kernel_size=int(c["downsampler"][-1]),
                  num_heads=c["num_heads"], down_factor=c["down_factor"])
    if d["kind"] == "DownSample_Attn":
        return Attention(c["dim"], c["input_size"], downsample="tokens", **tricks)
    same = ("input_size", "in_channels", "hidden_size", "depth", "mlp_ratio", "num_classes",
            "class_dropout_prob", "learn_sigma")
    return UDiT(mlp=c["ffn_type"], **{k: c[k] for k in same}, **tricks)


def tiny(**arguments):
    """A small model with the recipe's weights (none is zero), in float64."""
    return fill_by_recipe(UDiT(**{**TINY, **arguments})).double()


def batch(count=2, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, side, side, dtype=torch.float64, generator=generator)
    return x, torch.tensor([3, 500, 999])[:count], torch.tensor([0, 4, 5])[:count]


def names_and_shapes(model):
    return [[name, list(tensor.shape)] for name, tensor in model.state_dict().items()]


# --------------------------------------------------------------------------------------------------
# official figures

def exact_conditions(model, t, y):
    """c1, c2, c3 with sinusoids in float64: cos and sin of t * 10000^(-i/128), i = 0..127."""
    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    waves, model = torch.cat([angles.cos(), angles.sin()], dim=1), copy.deepcopy(model).double()
    return [model.get_submodule(f"t_embedder_{i}").mlp(waves)
            + model.get_submodule(f"y_embedder_{i}")(y) for i in (1, 2, 3)]


def given_conditions(model, y, conditions):
    """The model, its timestep embedders made to return what gives these c1, c2, c3 (B, D)."""
    for i, c in enumerate(conditions, 1):
        rest = c - model.get_submodule(f"y_embedder_{i}")(y)
        model.get_submodule(f"t_embedder_{i}").register_forward_hook(
            lambda m, a, out, rest=rest: rest)
    return model


MODELS = ["udit_rep_in8", "udit_rep_in16", "udit_basic_in8", "udit_vanilla_in8"]


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_conditions_match_official(case):
    d, g = golden_case(case)
    model = build(d)
    assert names_and_shapes(model) == d["params"]               # official names, order and shapes
    fill_by_recipe(model)
    x, t, y = g["x"], g["t"], g["y"]
    # Float32 rounds the angle t * w, t up to 999, by up to 1.2e-4 if exp() misses w by its last
    # bit, and machines differ there. The recipe's rows have norm 1, so c is off by no more.
    angle = 999 * torch.finfo(torch.float32).eps
    for i, exact in enumerate(exact_conditions(model, t, y), 1):
        c = model.get_submodule(f"t_embedder_{i}")(t) + model.get_submodule(f"y_embedder_{i}")(y)
        for float32 in (c, g[f"c{i}"]):
            assert_close(float32.double(), exact, rtol=0, atol=angle)
    assert_close(model(x, t, y), g["out"], rtol=0, atol=8 * angle)      # the layers amplify it


@pytest.mark.parametrize("dtype", GOLDEN, ids=str)
@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_layers_match_official(case, dtype):
    d, g = golden_case(case)
    t, y, to = g["t"], g["y"], lambda u: u.to(dtype)
    model = fill_by_recipe(build(d)).to(dtype)
    model = given_conditions(model, y, [to(g[f"c{i}"]) for i in (1, 2, 3)])
    stages = {"x_embedder.proj": "h_x_embedder", **{name: f"h_{name}" for name in (
        "encoder_level_1", "down1_2", "encoder_level_2", "latent", "decoder_level_2",
        "decoder_level_1")}}
    seen = {}
    for name in stages:
        model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: seen.update({name: out.permute(0, 3, 1, 2)}))
    out = model(to(g["x"]), t, y)
    for name, key in stages.items():
        assert_close(seen[name], to(g[key]), **GOLDEN[dtype], msg=lambda m: f"{name}: {m}")
    folded = fold(model)(to(g["x"]), t, y)
    for ours, key in ((out, "out"), (out, "out_train_nodrop"), (folded, "out")):
        assert_close(ours, to(g[key]), **GOLDEN[dtype], msg=lambda m: f"{key}: {m}")
    # official guidance: only the first three channels; both errors grow, by s and by s - 1
    null = model(to(g["x"]), t, torch.full_like(y, model.num_classes))
    s = d["config_call"]["cfg_scale"]
    out[:, :3] = null[:, :3] + s * (out[:, :3] - null[:, :3])
    tolerance = dict(rtol=0, atol=(2 * s - 1) * GOLDEN[dtype]["atol"])
    assert_close(out, to(g["out_cfg"][:len(out)]), **tolerance)


@pytest.mark.parametrize("dtype", GOLDEN, ids=str)
@pytest.mark.parametrize("case", ["udit_attn_v2", "udit_attn_v1", "udit_attn_df1"])
@torch.no_grad()
def test_attention_matches_official(case, dtype):
    d, g = golden_case(case)
    attn = build(d)
    assert names_and_shapes(attn) == d["params"]
    fill_by_recipe(attn).to(dtype)
    if "logit_scale" in d["given"]:                             # one head beyond the clamp
        attn.logit_scale.copy_(torch.tensor(d["given"]["logit_scale"]).view(-1, 1, 1))
    g = {name: tensor.to(dtype) for name, tensor in g.items()}
    x, f = g["x"].permute(0, 2, 3, 1), d["config"]["down_factor"]           # (B, H, W, D)
    q, k, v = attn.queries_keys_values(x)
    logits = q @ k.mT * (1.0 if attn.logit_scale is not None else q.shape[-1] ** -0.5)
    mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).unflatten(0, (len(x), f * f))
    groups = lambda u: u.unflatten(0, (len(x), f * f))
    # float32 rounds a logit of 100 by 1e-5: as much again, times v (up to 4), in what follows
    atol = GOLDEN[dtype]["atol"] + 4 * logits.abs().max().item() * torch.finfo(torch.float32).eps
    for name, ours in (("groups", attn.downsampler(x)), ("attn_logits", groups(logits)),
                       ("attn_probs", groups(logits.softmax(-1))),
                       ("merged", merge_phases(mixed, f, x.shape[1]).permute(0, 3, 1, 2)),
                       ("out", attn(x).permute(0, 3, 1, 2))):
        assert_close(ours, g[name], rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


@torch.no_grad()
def test_rep_mlp_matches_official():
    d, g = golden_case("udit_repffn")
    mlp = RepMlp(16, 32)
    assert names_and_shapes(mlp) == d["params"]
    fill_by_recipe(mlp).double()
    g = {name: tensor.double() for name, tensor in g.items()}
    out = mlp(g["x"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert_close(out, g["out_train"], **GOLDEN[torch.float64])
    assert_close(out, g["out_eval"], **GOLDEN[torch.float64])
    short = {"project_in": "in", "dwconv": "dw", "project_out": "out"}
    for name, (weight, bias) in mlp.summed().items():
        for kind, ours in (("weight", weight), ("bias", bias)):
            want = g[f"folded_{short[name]}_{kind}"].view_as(ours)
            assert_close(ours, want, **GOLDEN[torch.float64], msg=lambda m: f"{name}.{kind}: {m}")


# --------------------------------------------------------------------------------------------------
# re-parameterisation

def branches(mlp, x):
    """RepMlp as the paper draws it: every layer and branch separately, x (B, H, W, D)."""
    x = F.gelu(mlp.project_in(x))
    return mlp.project_out(x + sum(conv(x) for conv in mlp.dwconv))


def test_summed_form_has_the_function_and_gradients_of_the_branches(monkeypatch):
    model, (x, t, y) = tiny(input_size=16), batch(3, 16)
    probe = torch.randn(3, 8, 16, 16, dtype=torch.float64)

    def run():
        model.zero_grad()
        out = model(x, t, y)
        (out * probe).sum().backward()
        return out.detach(), {name: p.grad for name, p in model.named_parameters()}
    ours, our_grads = run()
    monkeypatch.setattr(RepMlp, "forward", branches)
    want, want_grads = run()
    assert_close(ours, want, **EXACT)
    for name, grad in want_grads.items():
        assert grad.norm() > 1e-6 and (our_grads[name] - grad).norm() <= 1e-9 * grad.norm(), name


@torch.no_grad()
def test_fold_is_pure():
    model, (x, t, y) = tiny(), batch()
    before, out, draws = copy.deepcopy(model.state_dict()), model(x, t, y), torch.get_rng_state()
    folded = fold(model)
    assert torch.equal(torch.get_rng_state(), draws)            # nothing was drawn
    plain = UDiT(**TINY, mlp="dw").double()
    assert names_and_shapes(folded) == names_and_shapes(plain)  # can be trained and saved
    plain.load_state_dict(folded.state_dict())
    for name, model_ in {"folded": folded, "folded twice": fold(folded), "loaded": plain,
                         "train": copy.deepcopy(folded).train(),
                         "eval": copy.deepcopy(folded).eval()}.items():
        assert_close(model_(x, t, y), out, **EXACT, msg=lambda m: f"{name}: {m}")
    with torch.enable_grad():                                   # a step of the copy
        folded(x, t, y).square().mean().backward()
    for p in folded.parameters():
        p.sub_(p.grad)
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(model.eval()(x, t, y), out) and torch.equal(model.train()(x, t, y), out)


# --------------------------------------------------------------------------------------------------
# counts

def on_meta(**arguments):
    with torch.device("meta"):
        return UDiT(**arguments)


def count(model):
    return sum(p.numel() for p in model.parameters())


def macs(model, batch=1):
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        step = torch.zeros(batch, dtype=torch.int64)
        side = model.input_size
        model(torch.zeros(batch, model.in_channels, side, side), step, step)
    return counter.get_total_flops() // 2                       # one multiply-accumulate = 2 flops


@pytest.mark.parametrize("name,trained,folded,gmacs,branch_gmacs", [
    ("U-DiT-S", 58_896_568, 52_045_240, 6.0208, 7.1289),
    ("U-DiT-B", 231_251_304, 204_425_064, 22.1793, 26.5094),
    ("U-DiT-L", 916_335_304, 810_188_488, 84.9093, 102.0252)])
def test_counts_are_the_papers(name, trained, folded, gmacs, branch_gmacs, monkeypatch):
    model = on_meta(**UDIT_CONFIGS[name])
    one_kernel = fold(model)
    assert count(model) == trained and count(one_kernel) == folded
    assert round(macs(one_kernel) / 1e9, 4) == gmacs
    monkeypatch.setattr(RepMlp, "forward", branches)
    assert round(macs(model) / 1e9, 4) == branch_gmacs


def test_one_more_row_costs_what_it_costs_folded():
    model = on_meta(**TINY)             # the weights are summed once for the whole batch
    assert macs(model, 3) - macs(model, 2) == macs(fold(model))


def test_counts_of_the_parts_and_of_the_baselines():
    parts = {"x_embedder": 3552, "t_embedder_1": 33984, "t_embedder_2": 86400,
             "t_embedder_3": 246528, "y_embedder_1": 96096, "y_embedder_2": 192192,
             "y_embedder_3": 384384, "encoder_level_1": 634768, "down1_2": 41472,
             "encoder_level_2": 6122920, "down2_3": 165888, "latent": 38467648, "up3_2": 2654208,
             "reduce_chan_level2": 73920, "decoder_level_2": 6122920, "up2_1": 663552,
             "reduce_chan_level1": 37056, "decoder_level_1": 2449168, "output": 331968,
             "final_layer": 87944}
    assert {name: count(part) for name, part in on_meta().named_children()} == parts
    for name, params, gmacs in (("U-DiT-S", 51_465_992, 5.893), ("U-DiT-B", 203_266_568, 21.924)):
        vanilla = on_meta(**UDIT_CONFIGS[name], **VANILLA)
        assert count(vanilla) == params and round(macs(vanilla) / 1e9, 3) == gmacs
    assert round(macs(fold(on_meta(down_factor=1))) / 1e9, 3) == 8.248
    small = on_meta(input_size=16, num_classes=10, **UDIT_CONFIGS["udit-small"])
    assert round(count(small) / 1e6, 3) == 5.279 and round(macs(fold(small)) / 1e6) == 180


def test_attention_costs_what_the_formula_says():
    d, side = 16, 8
    for f, kind, pairs, kv in ((1, "tokens", 64, 64), (2, "tokens", 16, 64), (2, "kv", 16, 16)):
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            Attention(d, side, 2, f, kind, True, True, 0, False)(torch.zeros(1, side, side, d))
        n = side * side             # q and out for every token, k and v for kv of them; QK and AV
        want = 2 * d * d * n + 2 * d * d * kv + 2 * n * pairs * d
        assert counter.get_total_flops() // 2 == want, (f, kind)


# --------------------------------------------------------------------------------------------------
# attention by brute force

def test_phases_go_there_and_back():
    x = torch.arange(2 * 8 * 8 * 3).view(2, 8, 8, 3)
    for f in (1, 2, 4):
        groups, small = split_phases(x, f), 8 // f
        assert groups.shape == (2, f * f, small * small, 3)
        for p in range(f * f):
            for n in range(small * small):
                row, column = f * (n // small) + p // f, f * (n % small) + p % f
                assert torch.equal(groups[:, p, n], x[:, row, column])
        assert torch.equal(merge_phases(groups, f, 8), x)


def reach(**arguments):
    """Which pixels of the output change with pixel (2, 3) of the input of an attention over 8x8."""
    defaults = dict(dim=8, side=8, num_heads=2, kernel_size=0)
    attn = fill_by_recipe(Attention(**{**defaults, **arguments})).double()
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = x.clone()
    moved[0, 2, 3] += 1
    return (attn(moved) - attn(x)).abs().amax((0, 3)) > 1e-10               # (8, 8)


@torch.no_grad()
def test_which_tokens_a_token_reaches():
    phase, alone = torch.zeros(2, 8, 8, dtype=torch.bool)
    phase[0::2, 1::2] = alone[2, 3] = True          # (2, 3) is on even rows and odd columns
    assert torch.equal(reach(), phase)              # without a filter, only its own group
    assert reach(kernel_size=5).all() and reach(down_factor=1).all()
    assert torch.equal(reach(downsample="kv"), alone)       # a query, but not in the first group
    assert reach(downsample="kv", kernel_size=3).all()


@pytest.mark.parametrize("downsample,cosine,rope,shortcut", [
    ("tokens", True, True, True), ("tokens", False, True, False), ("tokens", True, False, True),
    ("kv", True, True, True), ("kv", False, False, False)])
@torch.no_grad()
def test_attention_by_brute_force(downsample, cosine, rope, shortcut):
    attn = fill_by_recipe(Attention(8, 4, 1, 2, downsample, cosine, rope, 3, shortcut)).double()
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = attn.downsampler.layer
    filtered = F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, padding=1, groups=8)
    filtered = (filtered.permute(0, 2, 3, 1) + (x if shortcut else 0))[0]   # (4, 4, 8)
    w, kv = 10000.0 ** (-torch.arange(2, dtype=torch.float64) / 2), downsample == "kv"

    def prepared(u, row, column):
        if rope:
            angles = torch.stack([column * w, row * w], 1).flatten()        # (4,)
            u = torch.view_as_complex(u.view(4, 2)) * torch.polar(torch.ones_like(angles), angles)
            u = torch.view_as_real(u).flatten()
        return u / u.norm() if cosine else u
    want = torch.zeros(4, 4, 8, dtype=torch.float64)
    for row in range(4):
        for column in range(4):
            # positions within the group; for "kv", those of the whole map
            start, step = ((0, 0), 1) if kv else ((row % 2, column % 2), 2)
            keys = [(i, j) for i in range(start[0], 4, 2) for j in range(start[1], 4, 2)]
            q = attn.to_qkv((x[0] if kv else filtered)[row, column])[:8]
            q = prepared(q, row // step, column // step)
            k = torch.stack([prepared(attn.to_qkv(filtered[i, j])[8:16], i // step, j // step)
                             for i, j in keys])
            v = torch.stack([attn.to_qkv(filtered[i, j])[16:] for i, j in keys])
            scale = attn.logit_scale.exp().item() if cosine else 8 ** -0.5
            want[row, column] = ((k @ q) * scale).softmax(0) @ v
    want = F.linear(want, attn.to_out.weight.flatten(1), attn.to_out.bias)
    assert_close(attn(x)[0], want, rtol=0, atol=1e-6)       # the rotary table is float32


@torch.no_grad()
def test_logit_scale_is_one_number_per_head_and_capped():
    attn = fill_by_recipe(Attention(16, 4, 2, kernel_size=0)).double()
    x = torch.randn(1, 4, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attn.logit_scale.copy_(torch.tensor([1.0, 9.0]).view(2, 1, 1))
    q, k, _ = attn.queries_keys_values(x)                                   # (4, h, N, d)
    assert_close(k.norm(dim=-1), torch.ones(4, 2, 4, dtype=torch.float64), rtol=0, atol=1e-6)
    for head, length in ((0, 2.718282), (1, 100.0)):
        assert_close(q[:, head].norm(dim=-1) / length, torch.ones(4, 4).double(), rtol=0, atol=1e-4)


def test_rotary_products_depend_on_the_distance_only():
    table, (q, k) = rope_table(torch.arange(6), 16), torch.randn(2, 16, dtype=torch.float64)
    turned = lambda u, row, column: rotate(u.expand(1, 36, 1, 16), table)[0, 6 * row + column, 0]
    at = lambda u, row, column: turned(u, row, column) / u.norm()
    assert_close(at(q, 1, 2) @ at(k, 3, 5), at(q, 2, 0) @ at(k, 4, 3), rtol=0, atol=1e-6)
    # channels 0 and 1 turn by the column, 2 and 3 by the row
    e = torch.eye(16, dtype=torch.float64)
    for channel, angle in ((0, 1.0), (2, 4.0)):
        want = e.new_tensor([math.cos(angle), math.sin(angle)])
        got = turned(e[channel], 4, 1)[channel:channel + 2]
        assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k,groups", [(1, 1), (3, 1), (1, 16), (3, 16), (5, 16), (7, 16)])
def test_convolution_on_maps_is_conv2d(k, groups):
    torch.manual_seed(0)
    x, bias = torch.randn(2, 6, 8, 16).double(), torch.randn(16).double()
    weight = torch.randn(16, 16 // groups, k, k).double()
    inputs, probe = [u.requires_grad_() for u in (x, weight, bias)], torch.randn_like(x)
    want = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=k // 2, groups=groups)
    want, ours = want.permute(0, 2, 3, 1), convolve(x, weight, bias)
    assert_close(ours, want)
    for one, other in zip(torch.autograd.grad(ours, inputs, probe),
                          torch.autograd.grad(want, inputs, probe)):
        assert_close(one, other)


# --------------------------------------------------------------------------------------------------
# the model: what it reads, what changes it, how it begins

CHANGES = [dict(down_factor=1), dict(downsample="kv"), dict(cosine=False), dict(rope=False),
           dict(mlp="basic"), dict(mlp="dw"), dict(kernel_size=3), dict(kernel_size=0),
           dict(shortcut=False), dict(num_heads=1), dict(mlp_ratio=3)]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@torch.no_grad()
def test_each_ablation_changes_the_function(change):
    x, t, y = batch(2, 16)
    base, changed = tiny(input_size=16), tiny(input_size=16, **change)
    if change.get("mlp") == "dw":           # else its weights have other names and other values
        for name in ("encoder_level_1.0.mlp1", "latent.0.mlp2"):
            changed.set_submodule(name, base.get_submodule(name))
    assert (base(x, t, y) - changed(x, t, y)).abs().max() > 1e-3


@pytest.mark.parametrize("arguments", [dict(), VANILLA, *({**VANILLA, **one} for one in (
    dict(cosine=True), dict(rope=True), dict(mlp="dw"), dict(mlp="rep"), dict(downsample="kv"),
    dict(down_factor=1, kernel_size=0), dict(kernel_size=3, shortcut=False)))], ids=str)
def test_every_ablation_reads_its_input_and_trains_every_weight(arguments):
    model, (x, t, y) = tiny(input_size=16, **arguments), batch(3, 16)
    out = model(x, t, y)
    with torch.no_grad():
        for other in (model(x + 0.1, t, y), model(x, t + 300, y), model(x, t, (y + 1) % 6)):
            assert ((other - out).abs().amax((1, 2, 3)) > 1e-3).all()
        for row in range(3):                # a row does not depend on the others
            one = slice(row, row + 1)
            assert_close(model(x[one], t[one], y[one]), out[one], **EXACT)
    (out * torch.randn_like(out)).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.norm() > 1e-7, name


@torch.no_grad()
def test_each_level_reads_its_own_t_and_y():
    model, (x, t, y) = tiny(), batch()
    out = model(x, t, y)
    for kind in ("t", "y"):
        for i in (1, 2, 3):
            changed = copy.deepcopy(model)
            for p in changed.get_submodule(f"{kind}_embedder_{i}").parameters():
                p.zero_()
            assert (changed(x, t, y) - out).abs().max() > 1e-3, (kind, i)


def test_begins_as_zero_and_every_block_as_the_identity():
    torch.manual_seed(0)
    model, (x, t, y) = UDiT(**TINY), batch()
    assert model(x.float(), t, y).abs().max() == 0
    h, c = torch.randn(2, 8, 8, 16), torch.randn(2, 16)
    assert torch.equal(model.encoder_level_1(h, c), h)
    assert not any(p.abs().max() for name, p in model.named_parameters() if name.endswith("bias"))
    state = UDiT(hidden_size=96, depth=(1,) * 5).state_dict()
    for name, spread in {"latent.0.attn1.to_qkv.weight": (2 / 1536) ** 0.5,
                         "y_embedder_2.embedding_table.weight": 0.02,
                         "t_embedder_3.mlp.0.weight": 0.02, "t_embedder_1.mlp.2.weight": 0.02,
                         "x_embedder.proj.weight": (2 / (96 + 36)) ** 0.5,
                         "latent.0.attn1.downsampler.layer.weight": (2 / (25 * 385)) ** 0.5,
                         "latent.0.mlp1.dwconv.1.weight": (2 / (9 * 769)) ** 0.5,
                         "output.weight": (2 / (9 * 384)) ** 0.5}.items():
        assert state[name].std().item() == pytest.approx(spread, rel=0.06), name
    assert_close(state["latent.0.attn1.logit_scale"], torch.full((4, 1, 1), 2.302585))


@torch.no_grad()
def test_the_three_mlps_begin_at_the_same_scale():
    spread = {}
    for mlp in MLPS:
        stds = []
        for seed in range(3):
            torch.manual_seed(seed)
            block = UDiT(**TINY, mlp=mlp).latent[0]
            x = torch.randn(4, 8, 8, 64)
            stds += [block.mlp1(x).std(), block.mlp2(x).std()]
        spread[mlp] = torch.stack(stds).mean().item()
    # a depth-wise kernel without the identity would make "dw" ten times smaller
    assert max(spread.values()) < 1.3 * min(spread.values()), spread


@pytest.mark.parametrize("mode", [True, False])
def test_a_fold_keeps_the_mode(mode):
    assert {m.training for m in fold(UDiT(**TINY).train(mode)).modules()} == {mode}


@pytest.mark.parametrize("mlp", ["dw", "rep"])
def test_a_depthwise_kernel_begins_as_the_identity(mlp):
    """1 at its centre; what Xavier adds is at most the sqrt(6 / (fan_in + fan_out)) of 1x1, 3x3
    and 5x5 kernels of 32 channels, fan_in = k^2 and fan_out = 32 k^2."""
    block = fold(UDiT(**TINY, mlp=mlp)).encoder_level_1[0]
    for kernel in (block.mlp1.dwconv.weight, block.mlp2.dwconv.weight):     # (32, 1, 5, 5)
        away = (kernel - F.pad(torch.ones(32, 1, 1, 1), (2, 2, 2, 2))).abs().max()
        assert away <= sum((6 / (33 * k ** 2)) ** 0.5 for k in (1, 3, 5))   # 0.66


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = UDiT(**{**TINY, "learn_sigma": False})
    x, t, y = torch.randn(4, 4, 8, 8), torch.randint(1000, (4,)), torch.arange(4)
    target, losses = torch.randn(4, 4, 8, 8), []
    opt = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(60):
        loss = (model(x, t, y) - target).square().mean()
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses[-1]


def test_labels_are_dropped_in_all_three_tables_and_guidance_needs_the_null_class():
    model, y = UDiT(**TINY), torch.arange(4)
    assert model.drop_labels(y, torch.tensor([0.05, 0.0999, 0.1001, 0.9])).tolist() == [5, 5, 2, 3]
    assert model.null_condition(2).tolist() == [5, 5] and model.can_guide
    without = UDiT(**TINY, class_dropout_prob=0.0)
    assert len(without.y_embedder_1.embedding_table.weight) == 5 and not without.can_guide
    assert not UDiT(**{**TINY, "num_classes": 0}).can_guide


def test_muons_share():
    share = {name for name, p in UDiT(**TINY).named_parameters()
             if p.dim() >= 2 and re.match(UDiT.matrices, name)}
    inside = {"latent.0.attn2.to_qkv.weight", "decoder_level_1.0.mlp1.project_in.1.weight",
              "encoder_level_1.0.adaLN_modulation1.1.weight", "down1_2.body.0.weight",
              "up2_1.body.0.weight", "reduce_chan_level1.weight", "output.weight"}
    assert inside <= share
    for word in ("dwconv", "downsampler", "logit_scale", "embedder", "final_layer"):
        assert not any(word in name for name in share), word


# --------------------------------------------------------------------------------------------------
# sizes and errors

@pytest.mark.parametrize("change", [
    dict(), dict(mlp="basic", cosine=False, rope=False, hidden_size=24, num_heads=1),
    dict(mlp="basic", cosine=False, rope=False, hidden_size=72, num_heads=3),   # 24 channels a head
    dict(mlp="dw", kernel_size=3, mlp_ratio=4, learn_sigma=False, in_channels=3),
    dict(kernel_size=0)])
def test_sizes_are_read_off_the_tensors(change):
    arguments = {**TINY, "depth": (1, 2, 3, 1, 2), **change}
    want = dict(in_channels=4, mlp_ratio=2, learn_sigma=True, cosine=True, rope=True, mlp="rep",
                kernel_size=5)
    want |= {k: v for k, v in arguments.items() if k != "input_size"}
    state = UDiT(**arguments).state_dict()
    assert infer_udit(state) == want
    UDiT(input_size=8, **infer_udit(state)).load_state_dict(state)
    for name in ("x_embedder.proj.weight", "y_embedder_1.embedding_table.weight"):
        with pytest.raises(ValueError, match=f"not the state_dict of a U-DiT.*{name}"):
            infer_udit({k: v for k, v in state.items() if k != name})


def test_a_picture_of_one_channel():
    x, t, y = batch()
    assert tiny(in_channels=1, learn_sigma=False)(x[:, :1], t, y).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("bad,words", [
    (dict(input_size=12), "12 is not divisible by 8"), (dict(down_factor=0), "down_factor 0"),
    (dict(num_heads=3), "width 16 / num_heads 3"), (dict(num_heads=8), "multiple of 4"),
    (dict(mlp="moe"), "'moe'.*basic, dw or rep"), (dict(downsample="q"), "'q'.*tokens or kv"),
    (dict(depth=(1, 1, 1)), r"\(1, 1, 1\).*five numbers"), (dict(kernel_size=4), "4.*odd"),
    (dict(num_classes=0, class_dropout_prob=0.0), "null class")], ids=str)
def test_arguments_that_do_not_fit(bad, words):
    with pytest.raises(ValueError, match=words):
        UDiT(**{**TINY, **bad})


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"x \(2, 4, 16, 16\) must have sides of input_size 8$"):
        tiny()(*batch(2, 16))


# --------------------------------------------------------------------------------------------------
# studies/spectra.py

def test_spectra_of_waves_and_of_noise():
    column = torch.arange(32)
    wave = lambda cycles: torch.cos(2 * torch.pi * cycles * column / 32).expand(1, 1, 32, 32)
    assert low_share(wave(3)) == pytest.approx(1, abs=1e-5)
    assert low_share(wave(12)) == pytest.approx(0, abs=1e-5)
    torch.manual_seed(0)
    noise = torch.randn(16, 8, 32, 32)
    assert low_share(noise) == pytest.approx((15 / 32) ** 2, rel=0.02)      # 15 of 32 per axis
    assert low_share(noise + 5) == pytest.approx(low_share(noise), rel=1e-3)
    assert_close(radial_spectrum(noise), torch.ones(17), rtol=0, atol=0.1)
    spectrum = radial_spectrum(wave(5))
    assert spectrum.argmax() == 5 and spectrum[5] > 0.99 * spectrum.sum()


def test_response_of_filters():
    delta, box = torch.zeros(3, 1, 5, 5), torch.full((3, 1, 5, 5), 1 / 25)
    delta[:, :, 2, 2] = 1
    assert_close(frequency_response(delta), torch.ones(32, 32))
    gain = frequency_response(box)
    assert gain[0, 0].item() == pytest.approx(1, abs=1e-5)
    assert gain[16, 16].item() == pytest.approx(1 / 25, abs=1e-5)


def test_features_are_those_of_the_forward():
    model, (x, t, y) = tiny(), batch()
    maps = features(model, x, t, y)
    assert {k: tuple(v.shape) for k, v in maps.items()} == {
        "skip": (2, 16, 8, 8), "latent": (2, 64, 2, 2), "backbone": (2, 16, 8, 8),
        "decoder": (2, 32, 8, 8)}
    assert not any(module._forward_hooks for module in model.modules())
