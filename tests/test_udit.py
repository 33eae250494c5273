"""udit.py against the official figures and the paper's counts; the summed form, the fold, and who sees whom."""
import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import data
import sample
import train
from conftest import fill_by_recipe, golden_case
from diffusion import GaussianDiffusion
from tasks import DiffusionTask, task_name
from udit import (UDIT_CONFIGS, Attention, RepMlp, UDiT, depthwise, features, fold, frequency_response, infer_config,
                  low_share, merge_phases, radial_spectrum, rope_table, rotate, split_phases)
from weights import write_safetensors

TOLERANCE = dict(rtol=0, atol=2e-5)         # tells every known mistake from rounding
TINY = dict(input_size=8, hidden_size=16, depth=(1, 1, 1, 1, 1), num_heads=2, num_classes=5)
VANILLA = dict(cosine=False, rope=False, mlp="basic")


def build(d):
    """UDiT, or its attention, from a golden case's official arguments."""
    c = d["config"]
    tricks = dict(cosine=c["attn_type"] == "v2", rope=c["posemb_type"] == "rope2d", shortcut=c["down_shortcut"],
                  kernel_size=int(c["downsampler"][-1]), num_heads=c["num_heads"], down_factor=c["down_factor"])
    if d["kind"] == "DownSample_Attn":
        return Attention(c["dim"], c["input_size"], downsample="tokens", **tricks)
    same = ("input_size", "in_channels", "hidden_size", "depth", "mlp_ratio", "num_classes", "class_dropout_prob",
            "learn_sigma")
    return UDiT(mlp=c["ffn_type"], **{k: c[k] for k in same}, **tricks)


def names_and_shapes(model):
    return [[name, list(tensor.shape)] for name, tensor in model.state_dict().items()]


def exact_conditions(model, t, y):
    """c1, c2, c3 with the sinusoids in float64: cos and sin of t * 10000^(-i/128), i = 0..127."""
    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    waves, double = torch.cat([angles.cos(), angles.sin()], dim=1), copy.deepcopy(model).double()
    return [double.get_submodule(f"t_embedder_{i}").mlp(waves) + double.get_submodule(f"y_embedder_{i}")(y)
            for i in (1, 2, 3)]


def given_conditions(model, y, conditions):
    """A copy of the model whose timestep embedders return what makes t + y these conditions, c1 to c3 (B, D)."""
    model = copy.deepcopy(model)
    for i, c in enumerate(conditions, 1):
        rest = c - model.get_submodule(f"y_embedder_{i}")(y)
        model.get_submodule(f"t_embedder_{i}").register_forward_hook(lambda m, a, out, rest=rest: rest)
    return model


@pytest.mark.parametrize("case", ["udit_rep_in8", "udit_rep_in16", "udit_basic_in8", "udit_vanilla_in8"])
@torch.no_grad()
def test_models_match_official(case):
    d, g = golden_case(case)
    model = build(d)
    assert names_and_shapes(model) == d["params"]                           # official names, order and shapes
    fill_by_recipe(model).eval()
    x, t, y = g["x"], g["t"], g["y"]
    # The angle t * w is rounded in float32, t up to 999: by up to 1.2e-4 when w is off by its last bit, and exp() may
    # differ there from one machine to the next. The recipe's rows have norm 1, so c is off by no more. (Seen: 1.5e-5.)
    angle = 999 * torch.finfo(torch.float32).eps
    golden = [g[f"c{i}"] for i in (1, 2, 3)]
    for i, (c, want) in enumerate(zip(exact_conditions(model, t, y), golden), 1):
        ours = model.get_submodule(f"t_embedder_{i}")(t) + model.get_submodule(f"y_embedder_{i}")(y)
        assert_close(ours.double(), c, rtol=0, atol=angle)
        assert_close(want.double(), c, rtol=0, atol=angle)
    assert_close(model(x, t, y), g["out"], rtol=0, atol=8 * angle)          # c's error, and what the layers make of it
    # From here on the conditions are the golden ones, so that only the rest of the arithmetic is compared. In float64
    # the difference is the rounding error of the golden figures themselves: 4.0e-6 at most, on every machine. Float32
    # here is as far from float64 (4.5e-6), or a few times as far in another order of summation.
    stages = {name: g["h_" + name] for name in ("x_embedder", "encoder_level_1", "down1_2", "encoder_level_2", "latent",
                                                "decoder_level_2", "decoder_level_1")}
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 2e-5)):
        ours = given_conditions(copy.deepcopy(model).to(dtype), y, [c.to(dtype) for c in golden])
        seen, close = {}, lambda a, b, name: assert_close(a.double(), b.double(), rtol=0, atol=tolerance,
                                                          msg=lambda m: f"{dtype}, {name}: {m}")
        for name in stages:
            ours.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        out = ours(x.to(dtype), t, y)
        close(out, g["out"], "out"), close(out, g["out_train_nodrop"], "out in training")
        for name, want in stages.items():
            close(seen[name] if name == "x_embedder" else seen[name].permute(0, 3, 1, 2), want, name)
        close(fold(ours)(x.to(dtype), t, y), g["out"], "folded")
        # official: cat([x, x]), three channels guided. The rounding errors of both predictions, times s and s - 1
        uncond, s = ours(x.to(dtype), t, torch.full_like(y, d["config"]["num_classes"])), d["config_call"]["cfg_scale"]
        out[:, :3] = uncond[:, :3] + s * (out[:, :3] - uncond[:, :3])
        assert_close(out.double(), g["out_cfg"][:len(x)].double(), rtol=0, atol=(2 * s - 1) * tolerance)


@pytest.mark.parametrize("case", ["udit_attn_v2", "udit_attn_v1", "udit_attn_df1"])
@torch.no_grad()
def test_attention_matches_official(case):
    d, g = golden_case(case)
    attn = build(d)
    assert names_and_shapes(attn) == d["params"]
    fill_by_recipe(attn)
    if "logit_scale" in d["given"]:                                         # one head beyond the clamp
        attn.logit_scale.copy_(torch.tensor(d["given"]["logit_scale"]).view(-1, 1, 1))
    x = g["x"].permute(0, 2, 3, 1)                                          # (B, H, W, D)
    B, f = len(x), d["config"]["down_factor"]
    q, k, v = attn.queries_keys_values(x)
    logits = q @ k.mT * (1.0 if attn.logit_scale is not None else q.shape[-1] ** -0.5)
    o = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).unflatten(0, (B, f * f))        # (B, groups, N, D)
    assert_close(attn.downsampler(x), g["groups"], **TOLERANCE)
    assert_close(logits.unflatten(0, (B, f * f)), g["attn_logits"], rtol=1e-5, atol=2e-5)
    assert_close(logits.softmax(-1).unflatten(0, (B, f * f)), g["attn_probs"], **TOLERANCE)
    assert_close(merge_phases(o, f, x.shape[1]).permute(0, 3, 1, 2), g["merged"], **TOLERANCE)
    assert_close(attn(x).permute(0, 3, 1, 2), g["out"], **TOLERANCE)


@torch.no_grad()
def test_rep_mlp_matches_official():
    d, g = golden_case("udit_repffn")
    mlp = RepMlp(16, 32)
    assert names_and_shapes(mlp) == d["params"]
    fill_by_recipe(mlp)
    assert_close(mlp(g["x"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2), g["out_train"], **TOLERANCE)
    for name, ours in mlp.summed().items():
        part, kind = name.split(".")
        golden = {"project_in": "in", "dwconv": "dw", "project_out": "out"}[part]
        assert_close(ours, g[f"folded_{golden}_{kind}"].view_as(ours), **TOLERANCE, msg=lambda m: f"{name}: {m}")


def branches(mlp, x):
    """RepMlp as the paper draws it: every layer and every branch on its own, x (B, H, W, D)."""
    h = F.gelu(mlp.project_in(x.permute(0, 3, 1, 2)))
    h = h + sum(conv(h) for conv in mlp.dwconv)
    return mlp.project_out(h).permute(0, 2, 3, 1)


def test_summed_form_has_the_function_and_gradients_of_the_branches(monkeypatch):
    torch.manual_seed(0)
    model = fill_by_recipe(UDiT(**{**TINY, "input_size": 16})).double()     # 1e-5 measures the formula, not rounding
    x, probe = torch.randn(3, 4, 16, 16).double(), torch.randn(3, 8, 16, 16).double()
    t, y = torch.tensor([3, 500, 999]), torch.tensor([0, 4, 5])

    def run():
        model.zero_grad()
        out = model(x, t, y)
        (out * probe).sum().backward()
        return out.detach(), {name: p.grad for name, p in model.named_parameters()}
    ours, our_grads = run()
    monkeypatch.setattr(RepMlp, "forward", branches)
    want, want_grads = run()
    assert_close(ours, want, rtol=1e-5, atol=1e-8)
    for name, grad in want_grads.items():
        assert grad.norm() > 1e-6 and (our_grads[name] - grad).norm() <= 1e-5 * grad.norm(), name


@torch.no_grad()
def test_fold_is_pure():
    torch.manual_seed(0)
    model = fill_by_recipe(UDiT(**TINY))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 5])
    before, out, draws = copy.deepcopy(model.state_dict()), model(x, t, y), torch.get_rng_state()
    folded = fold(model)
    twice = fold(folded)
    assert torch.equal(torch.get_rng_state(), draws)                        # nothing was drawn
    plain = UDiT(**TINY, mlp="dw")
    assert names_and_shapes(folded) == names_and_shapes(plain)              # a model that can be trained and saved
    plain.load_state_dict(folded.state_dict())
    for copied in (folded, twice, plain, folded.train(), folded.eval()):
        assert_close(copied(x, t, y), out, **TOLERANCE)
    with torch.enable_grad():                                               # training the copy leaves the model alone
        folded(x, t, y).square().mean().backward()
    assert all(p.grad is not None for p in folded.parameters())
    for p in folded.parameters():
        p.sub_(p.grad)
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(model.eval()(x, t, y), out) and torch.equal(model.train()(x, t, y), out)


# ----------------------------------------------------------------------------------------------------------------------
# counts

def on_meta(**arguments):
    with torch.device("meta"):
        return UDiT(**arguments)


def count(model):
    return sum(p.numel() for p in model.parameters())


def macs(model, batch=1):
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        step = torch.zeros(batch, dtype=torch.int64)
        model(torch.zeros(batch, model.in_channels, model.input_size, model.input_size), step, step)
    return counter.get_total_flops() // 2                                   # one multiply-accumulate = 2 flops


@pytest.mark.parametrize("name,trained,folded,gmacs,branch_gmacs", [
    ("U-DiT-S", 58_896_568, 52_045_240, 6.0208, 7.1289), ("U-DiT-B", 231_251_304, 204_425_064, 22.1793, 26.5094),
    ("U-DiT-L", 916_335_304, 810_188_488, 84.9093, 102.0252)])
def test_counts_are_the_papers(name, trained, folded, gmacs, branch_gmacs, monkeypatch):
    model = on_meta(**UDIT_CONFIGS[name])
    assert count(model) == trained and count(fold(model)) == folded
    assert round(macs(fold(model)) / 1e9, 4) == gmacs
    if name == "U-DiT-S":
        assert macs(model, 3) - macs(model, 2) == macs(fold(model))         # summed: one more costs what it does folded
    monkeypatch.setattr(RepMlp, "forward", branches)
    assert round(macs(model) / 1e9, 4) == branch_gmacs


def test_counts_of_the_parts_and_of_the_baselines():
    parts = {"x_embedder": 3552, "t_embedder_1": 33984, "t_embedder_2": 86400, "t_embedder_3": 246528,
             "y_embedder_1": 96096, "y_embedder_2": 192192, "y_embedder_3": 384384, "encoder_level_1": 634768,
             "down1_2": 41472, "encoder_level_2": 6122920, "down2_3": 165888, "latent": 38467648, "up3_2": 2654208,
             "reduce_chan_level2": 73920, "decoder_level_2": 6122920, "up2_1": 663552, "reduce_chan_level1": 37056,
             "decoder_level_1": 2449168, "output": 331968, "final_layer": 87944}
    model = on_meta()
    assert {name: count(part) for name, part in model.named_children()} == parts
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
        n = side * side                         # q and out for every token, k and v for kv of them; QK and AV
        assert counter.get_total_flops() // 2 == 2 * d * d * n + 2 * d * d * kv + 2 * n * pairs * d, (f, kind)


# ----------------------------------------------------------------------------------------------------------------------
# identities and brute force

def test_phases_go_there_and_back():
    x = torch.arange(2 * 8 * 8 * 3).view(2, 8, 8, 3)
    for f in (1, 2, 4):
        groups = split_phases(x, f)
        assert torch.equal(merge_phases(groups, f, 8), x)
        for p, n in ((0, 0), (f * f - 1, 3), (f - 1, 2)):
            row, column = f * (n // (8 // f)) + p // f, f * (n % (8 // f)) + p % f
            assert torch.equal(groups[:, p, n], x[:, row, column])


def reach(**arguments):
    """Which pixels of the output feel pixel (2, 3) of the input of an attention over 8x8."""
    torch.manual_seed(0)
    defaults = dict(dim=8, side=8, num_heads=2, down_factor=2, downsample="tokens", cosine=True, rope=True,
                    kernel_size=0, shortcut=True)
    attn = fill_by_recipe(Attention(**{**defaults, **arguments}))
    x = torch.randn(1, 8, 8, 8)
    moved = x.clone()
    moved[0, 2, 3] += 1
    return (attn(moved) - attn(x)).abs().amax((0, 3)) > 1e-7                # (8, 8)


@torch.no_grad()
def test_who_sees_whom():
    phase = torch.zeros(8, 8, dtype=torch.bool)
    phase[0::2, 1::2] = True                                                # (2, 3) is on even rows and odd columns
    assert torch.equal(reach(), phase)                                      # without a filter: its own phase alone
    assert reach(kernel_size=5).all() and reach(down_factor=1).all()
    alone = torch.zeros(8, 8, dtype=torch.bool)
    alone[2, 3] = True
    assert torch.equal(reach(downsample="kv"), alone)                       # it asks, but is not in the first group
    assert reach(downsample="kv", kernel_size=3).all()


@torch.no_grad()
def test_key_value_downsampling_by_brute_force():
    torch.manual_seed(0)
    attn = fill_by_recipe(Attention(8, 4, 1, 2, "kv", True, True, 3, True))
    x = torch.randn(1, 4, 4, 8)
    seen = (x + attn.downsampler.layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))[:, ::2, ::2]         # (1, 2, 2, 8)
    w = 10000.0 ** (-torch.arange(2) / 2)
    want = torch.zeros(4, 4, 8)

    def turned(u, row, column):
        angles = torch.stack([column * w, row * w], 1).flatten()                                        # (4,)
        pairs = torch.view_as_complex(u.view(4, 2)) * torch.polar(torch.ones(4), angles)
        return torch.view_as_real(pairs).flatten() / u.norm()
    for row in range(4):
        for column in range(4):
            q = turned(attn.to_qkv(x[0, row, column])[:8], row, column)
            keys = [(i, j) for i in range(2) for j in range(2)]
            k = torch.stack([turned(attn.to_qkv(seen[0, i, j])[8:16], 2 * i, 2 * j) for i, j in keys])
            v = torch.stack([attn.to_qkv(seen[0, i, j])[16:] for i, j in keys])
            want[row, column] = ((k @ q) * attn.logit_scale.exp().item()).softmax(0) @ v
    want = attn.to_out(want.permute(2, 0, 1)[None])
    assert_close(attn(x).permute(0, 3, 1, 2), want, **TOLERANCE)


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_depthwise_gradients_are_those_of_conv2d(k):
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 6, 8, 16).double(), torch.randn(16, 1, k, k).double(), torch.randn(16).double()
    inputs, probe = [u.requires_grad_() for u in (x, w, b)], torch.randn_like(x)
    want = F.conv2d(x.permute(0, 3, 1, 2), w, b, padding=k // 2, groups=16).permute(0, 2, 3, 1)
    ours = depthwise(x, w, b)
    assert_close(ours, want)
    for one, other in zip(torch.autograd.grad(ours, inputs, probe), torch.autograd.grad(want, inputs, probe)):
        assert_close(one, other)


def test_rotary_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    table, q, k = rope_table(torch.arange(6), 16), torch.randn(16), torch.randn(16)
    at = lambda u, row, column: rotate(u.expand(1, 36, 1, 16), table)[0, 6 * row + column, 0]
    assert_close(at(q, 1, 2) @ at(k, 3, 5), at(q, 2, 0) @ at(k, 4, 3))
    assert (at(q, 1, 2) @ at(k, 3, 5) - at(q, 1, 2) @ at(k, 5, 4)).abs() > 1e-3        # rows and columns are two things


def test_begins_as_zero_and_every_block_as_the_identity():
    torch.manual_seed(0)
    model = UDiT(**TINY)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 5])
    assert model(x, t, y).abs().max() == 0
    h, c = torch.randn(2, 8, 8, 16), torch.randn(2, 16)
    assert torch.equal(model.encoder_level_1(h, c), h)
    state = UDiT(hidden_size=96, depth=(1,) * 5).state_dict()
    for name, spread in {"latent.0.attn1.to_qkv.weight": (2 / 1536) ** 0.5, "y_embedder_2.embedding_table.weight": .02,
                         "t_embedder_3.mlp.0.weight": .02, "x_embedder.proj.weight": (2 / (96 + 36)) ** 0.5,
                         "latent.0.attn1.downsampler.layer.weight": (2 / (25 * 385)) ** 0.5,
                         "output.weight": (2 / (9 * 384)) ** 0.5}.items():
        assert state[name].std().item() == pytest.approx(spread, rel=0.06), name
    assert_close(state["latent.0.attn1.logit_scale"], torch.full((4, 1, 1), 2.302585))


@pytest.mark.parametrize("trick", [dict(), VANILLA, *({**VANILLA, **one} for one in (
    dict(cosine=True), dict(rope=True), dict(mlp="dw"), dict(mlp="rep"), dict(downsample="kv"),
    dict(down_factor=1, kernel_size=0), dict(kernel_size=3, shortcut=False)))], ids=str)
def test_every_ablation_reads_its_input_and_trains_every_weight(trick):
    torch.manual_seed(0)
    model = fill_by_recipe(UDiT(**{**TINY, "input_size": 16}, **trick))
    x, t, y = torch.randn(1, 4, 16, 16), torch.tensor([100]), torch.tensor([1])
    out = model(x, t, y)
    with torch.no_grad():
        for other in (model(x + 0.1, t, y), model(x, t + 300, y), model(x, t, y + 1)):
            assert (other - out).abs().max() > 1e-3
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 1e-7 for p in model.parameters())


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = UDiT(**{**TINY, "learn_sigma": False})
    x, t, y, target = torch.randn(4, 4, 8, 8), torch.randint(1000, (4,)), torch.arange(4), torch.randn(4, 4, 8, 8)
    opt, losses = torch.optim.AdamW(model.parameters(), lr=4e-3), []
    for _ in range(80):
        loss = (model(x, t, y) - target).square().mean()
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0], losses[-1]


def test_one_mask_for_all_three_tables():
    model, y = UDiT(**TINY), torch.arange(4)
    assert model.drop_labels(y, torch.tensor([0.05, 0.0999, 0.1001, 0.9])).tolist() == [5, 5, 2, 3]
    assert model.null_condition(2).tolist() == [5, 5]
    assert len(UDiT(**TINY, class_dropout_prob=0.0).y_embedder_1.embedding_table.weight) == 5


def test_muons_share():
    share = {name for name, p in UDiT(**TINY).named_parameters() if p.dim() >= 2 and re.match(UDiT.matrices, name)}
    assert "latent.0.attn2.to_qkv.weight" in share and "decoder_level_1.0.mlp1.project_in.1.weight" in share
    assert not any(word in name for name in share for word in ("dwconv", "downsampler", "logit_scale", "embedder",
                                                               "final_layer"))


# ----------------------------------------------------------------------------------------------------------------------
# spectra

def test_spectra_of_waves_and_of_noise():
    torch.manual_seed(0)
    column = torch.arange(32)
    wave = lambda cycles: torch.cos(2 * torch.pi * cycles * column / 32).expand(1, 1, 32, 32)
    assert low_share(wave(3)) == pytest.approx(1, abs=1e-5) and low_share(wave(12)) == pytest.approx(0, abs=1e-5)
    noise = torch.randn(16, 8, 32, 32)
    assert low_share(noise) == pytest.approx((15 / 32) ** 2, rel=0.02)      # 15 of 32 frequencies per axis
    assert low_share(noise + 5) == pytest.approx(low_share(noise), rel=1e-3)
    assert_close(radial_spectrum(noise), torch.ones(17), rtol=0, atol=0.1)
    spectrum = radial_spectrum(wave(5))
    assert spectrum.argmax() == 5 and spectrum[5] > 0.99 * spectrum.sum()


def test_response_of_filters():
    delta, box = torch.zeros(3, 1, 5, 5), torch.full((3, 1, 5, 5), 1 / 25)
    delta[:, :, 2, 2] = 1
    assert_close(frequency_response(delta), torch.ones(32, 32))
    gain = frequency_response(box)
    assert gain[0, 0].item() == pytest.approx(1, abs=1e-5) and gain[16, 16].item() == pytest.approx(1 / 25, abs=1e-5)
    model = UDiT(**TINY)                            # at the start the filter is nearly its shortcut
    assert (frequency_response(model.latent[0].attn1.downsampler.kernel()) - 1).abs().max() < 0.6


def test_features_are_those_of_the_forward():
    model = fill_by_recipe(UDiT(**TINY))
    maps = features(model, torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 5]))
    assert {k: tuple(v.shape) for k, v in maps.items()} == {
        "skip": (2, 16, 8, 8), "latent": (2, 64, 2, 2), "backbone": (2, 16, 8, 8), "decoder": (2, 32, 8, 8)}
    assert not any(module._forward_hooks for module in model.modules())


# ----------------------------------------------------------------------------------------------------------------------
# in the house

@pytest.mark.parametrize("change", [dict(), dict(mlp="basic", cosine=False, rope=False, hidden_size=24, num_heads=1),
                                    dict(mlp="dw", kernel_size=3, mlp_ratio=4, learn_sigma=False, in_channels=3)])
def test_sizes_are_read_off_the_tensors(change):
    arguments = {**TINY, "depth": (1, 2, 3, 1, 2), **change}
    inferred = infer_config(UDiT(**arguments).state_dict())
    assert inferred == {**dict(in_channels=4, mlp_ratio=2, learn_sigma=True, cosine=True, rope=True, mlp="rep",
                               kernel_size=5), **{k: v for k, v in arguments.items() if k != "input_size"}}
    with pytest.raises(ValueError, match="x_embedder.proj.weight"):
        infer_config({"blocks.0": torch.zeros(1)})


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@torch.no_grad()
def test_official_file_to_pixels(kind, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = fill_by_recipe(UDiT(hidden_size=16, depth=(1, 1, 1, 1, 1), num_heads=2, num_classes=12)).eval()
    path = tmp_path / f"U-DiT-shrunk.{kind}"
    if kind == "pt":                                # as the official training saves it
        torch.save({"model": {}, "ema": model.state_dict()}, path)
    else:
        write_safetensors(path, model.state_dict())
    drawn = []
    monkeypatch.setattr(sample.data, "save_latents", lambda path, x, y: drawn.append(x))
    sample.main(["--ckpt", str(path), "--class", "7", "--sampler", "ddim", "--steps", "3", "--seed", "3", "--device",
                 "cpu", "--out", str(tmp_path / "x.png")])
    x, process = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(3)), GaussianDiffusion().respaced(3)
    for i in reversed(range(3)):
        t = process.timestep_map[torch.tensor([i])]
        c, u = model(x, t, torch.tensor([7]))[:, :4], model(x, t, torch.tensor([12]))[:, :4]
        x = process.ddim_step(u + 1.5 * (c - u), x, torch.tensor([i]))[0]
    assert_close(drawn[0], x, rtol=1e-3, atol=1e-3)
    task, loaded = sample.load(path)
    assert task.shape == (4, 32, 32) and not any(isinstance(m, RepMlp) for m in loaded.modules())


def test_one_loop_trains_it_and_the_sampler_draws_from_it_folded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DiffusionTask, "preview", lambda *args: None)       # 40 pictures: not needed here
    config = train.Config(model="udit-tiny", steps=3, batch_size=4, first_stage="tiny", warmup=0, device="cpu",
                          out=str(tmp_path / "run"))
    path = train.run(config, data.load("shapes", 32, "train", count=64))
    assert "16.5 M MACs per picture" in capsys.readouterr().out
    sample.main(["--ckpt", str(path), "--n", "2", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").is_file()
    task, model = sample.load(path)
    trained = UDiT(8, num_classes=model.num_classes, learn_sigma=False, **UDIT_CONFIGS["udit-tiny"])
    trained.load_state_dict(torch.load(path, weights_only=True)["ema"])
    x, t, y = torch.randn(2, *task.shape), torch.tensor([3, 500]), torch.tensor([0, 1])
    assert count(model) < count(trained) and "latent.0.mlp1.dwconv.weight" in model.state_dict()
    assert_close(model(x, t, y), trained(x, t, y).detach(), **TOLERANCE)


def test_names_and_sizes_that_do_not_fit():
    assert task_name("U-DiT-S") == task_name("udit-small") == "udit"
    with pytest.raises(ValueError, match="Did you mean udit-tiny"):
        task_name("udit-tny")
    with pytest.raises(ValueError, match="divisible by 8, and --image-size 28"):
        train.prepare_run(train.Config(model="U-DiT-S", data="mnist", image_size=28, first_stage="none", device="cpu"))
    for bad, words in ((dict(input_size=12), "12 is not divisible by 8"), (dict(num_heads=3), "num_heads 3"),
                       (dict(num_heads=8), "multiples of 4"), (dict(mlp="moe"), "basic, dw, rep"),
                       (dict(downsample="q"), "tokens or kv"), (dict(depth=(1, 1, 1)), "five numbers"),
                       (dict(kernel_size=4), "must be odd"),
                       (dict(num_classes=0, class_dropout_prob=0.0), "null class")):
        with pytest.raises(ValueError, match=words):
            UDiT(**{**TINY, **bad})
    with pytest.raises(ValueError, match="x is 16x16, this model was made for input_size 8"):
        UDiT(**TINY)(torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
