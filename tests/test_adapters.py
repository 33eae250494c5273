"""adapters.py against official figures and sizes, and `adapters.py learn` on the shipped base.

What every placement reads and adds to is tested in test_registry_tables.py.
"""
import copy
import dataclasses
import itertools
import math
import pathlib
import random
import re
import shutil
import signal
import types

import pytest
import torch
from torch.testing import assert_close

import adapters
import data
import sample
import train
from adapters import (LEGAL, LORA, PLACEMENTS, Adapter, adapter_state, add_adapters, anova,
                      base_hash, check_placement, incomplete_beta, load_adapters, remove_adapters,
                      set_scale)
from checkpoint import load_checkpoint, save_checkpoint
from conftest import ROOT, assert_same, fill_by_recipe, golden_case
from custom_diffusion import detach_first_token
from models import base_task
from studies.adapter_sweep import prediction_difference
from tasks import DiffusionTask
from unet import UNET_CONFIGS, ResBlock, TransformerBlock, UNet

BASE = str(ROOT / "assets" / "unet-scenes.pt")
TOLERANCE = dict(rtol=1e-4, atol=2e-5)
TINY = dict(in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2),
            num_res_blocks=1, attention_resolutions=(1, 2), num_heads=2, context_dim=24)
PAIRS = [tuple(placement.split("-")) for placement in PLACEMENTS]
# the official names of positions, activations and tensors
THEIRS = {"attn1i": "sa_in", "attn1o": "sa_out", "attn2i": "ca_in", "attn2c": "ca_c",
          "attn2o": "ca_out", "ffni": "ffn_in", "ffno": "ffn_out", "transo": "trans_out",
          "resi": "res_in", "reso": "res_out"}
METHODS = {"relu": "relu", "sig": "sigmoid", "silu": "silu", "ident": "identity"}
LINEAR = {"down": "adapter_inout.adp.0", "up": "adapter_inout.adp.2"}
CONV = {"before.0": "adapter.0", "down": "adapter.2", "up": "adapter.4"}
FORM = {"down": "adp.0", "up": "adp.2"}


class Official:
    """A model whose tensors have the official names, for fill_by_recipe."""

    def __init__(self, model, names):
        self.model = model
        pattern = r"(^|\.)(?:adapter\.)?(before\.0|down|up)(?=\.)"
        self.names = {k: re.sub(pattern, lambda m: m[1] + names[m[2]], k)
                      for k in model.state_dict()}

    def state_dict(self):
        return {self.names[k]: v for k, v in self.model.state_dict().items()}

    def load_state_dict(self, state, strict):
        ours = {k: state[name] for k, name in self.names.items()}
        self.model.load_state_dict(ours, strict=strict)


def filled(model, names, d=None):
    official = Official(model, names)
    if d is not None:
        shapes = sorted([k, list(v.shape)] for k, v in official.state_dict().items())
        assert shapes == sorted(d["params"])
    fill_by_recipe(official)
    return model.eval()


def tiny(**overrides):
    return fill_by_recipe(UNet(**{**TINY, **overrides})).eval()


def inputs(batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 4, 8, 8, generator=g), torch.randint(1000, (batch,), generator=g),
            torch.randn(batch, 5, 24, generator=g))


def count(parameters):
    return sum(p.numel() for p in parameters)


def trained(unet):
    return [p for p in unet.parameters() if p.requires_grad]


def shake(unet, seed=0):
    """Make every tensor of the adapters random, so that they do something."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained(unet):
            p.copy_(0.3 * torch.randn(p.shape, generator=g))


# --------------------------------------------------------------------------------------------------
# official figures

def test_the_four_forms_match_official():
    d, g = golden_case("adapter_forms")
    block = TransformerBlock(d["config"]["dim"], 4, 5, 8)
    for theirs, ours in METHODS.items():
        adapter = Adapter(block, "sa_in", "sa_in", d["config"]["mid_dim"], ours, 1.0, "official")
        filled(adapter, FORM, d)
        for scale in (1.0, -2.5):
            adapter.scale = scale
            want = g["in_x"] + scale * g[f"out_{theirs}"]
            assert_close(adapter("sa_in", g["in_x"]).detach(), want, **TOLERANCE)


def test_all_transformer_placements_match_official():
    d, g = golden_case("adapter_transformer_pairs")
    c = d["config"]
    pairs = [(THEIRS[din], THEIRS[dout]) for din, dout in c["pairs"]]
    assert sorted(pairs) == sorted(p for p in PAIRS if not p[0].startswith("res"))
    for (read, add), (din, dout) in zip(pairs, c["pairs"]):
        block = TransformerBlock(c["dim"], c["n_heads"], c["d_head"], c["context_dim"])
        add_adapters(block, read, add, c["mid_dim"], activation=METHODS[c["method"]],
                     init="official")
        filled(block, LINEAR, None if read == "ca_c" else d)
        out = block(g["in_x"], g["in_context"]).detach()
        assert_close(out, g[f"out_{din}-{dout}"], **TOLERANCE,
                     msg=lambda m: f"{read}-{add}: {m}")
        set_scale(block, 0)
        off = block(g["in_x"], g["in_context"]).detach()
        assert_close(off, g["out_disabled"], **TOLERANCE)
        assert (off - out).abs().max() > 0.1


@pytest.mark.parametrize("case", ["resi_resi", "resi_reso", "reso_reso"])
def test_residual_placements_match_official(case):
    d, g = golden_case(f"adapter_resblock_{case}")
    c, a = d["config"], d["config"]["adp_config"]
    block = ResBlock(c["channels"], c["emb_channels"], c["out_channels"])
    add_adapters(block, THEIRS[a["din"]], THEIRS[a["dout"]], a["mid_dim"],
                 activation=METHODS[a["method"]], scale=a["scale"], init="official")
    out = filled(block, CONV, d)(g["in_x"], g["in_emb"]).detach()
    assert_close(out, g["out_out"], **TOLERANCE)


@pytest.mark.parametrize("case", ["attn1i_transo", "attn2c_attn2c", "attn2o_ffni", "resi_reso"])
def test_whole_unets_match_official(case):
    d, g = golden_case(f"adapter_unet_{case}")
    kind, a = next((k, a) for k, a in d["config"]["adapter_config"].items())
    model = UNet(**TINY)
    assert all(d["config"][k] == (list(v) if isinstance(v, tuple) else v) for k, v in TINY.items())
    add_adapters(model, THEIRS[a["din"]], THEIRS[a["dout"]], a["mid_dim"],
                 activation=METHODS[a["method"]], scale=a["scale"], init="official")
    filled(model, LINEAR if kind == "transformer" else CONV, d)
    stages = {}
    for name in ("middle_block", "input_blocks.1"):
        model.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: stages.update({name: o}))
    stages["out"] = model(g["in_x"], g["in_t"], g["in_context"])
    assert {f"out_{k}" for k in stages} == {k for k in g if k.startswith("out_")}
    for k, v in stages.items():
        assert_close(v.detach(), g[f"out_{k}"], **TOLERANCE, msg=lambda m: f"{k}: {m}")


# --------------------------------------------------------------------------------------------------
# places and sizes

def test_the_twenty_placements_follow_from_the_order_of_the_tensors():
    time = list(TransformerBlock(32, 2, 16, 24).taps)       # in order of time, see test_unet.py
    streams = ["sa_in", "ca_in", "ffn_in", "trans_out"]
    want = {(i, o) for i in time for o in streams
            if i != "ca_c" and time.index(o) >= time.index(i)}
    want |= {("ca_c", "ca_c"), ("res_in", "res_in"), ("res_in", "res_out"), ("res_out", "res_out")}
    assert set(PAIRS) == want and len(PLACEMENTS) == 20
    joins = {"sa_out": "ca_in", "ca_out": "ffn_in", "ffn_out": "trans_out"}
    for read, add in itertools.product(LEGAL, LEGAL):
        if (read, joins.get(add, add)) in want:
            assert check_placement(read, add) == (read, joins.get(add, add))
        else:
            with pytest.raises(ValueError, match=f"read {read} and add to {add}: .*Legal: sa_in-"):
                check_placement(read, add)


@pytest.mark.parametrize("read,add,reason", [
    ("ffn_in", "sa_in", "sa_in comes before ffn_in"), ("ca_c", "ca_in", "ca_c holds text states"),
    ("sa_in", "ca_c", "ca_c holds text states"), ("res_in", "ffn_in", "one is in a ResBlock"),
    ("attn2o", "ffn_in", "'attn2o' is not one of the ten"), ("ca_out", "out", "'out' is not one")])
def test_an_illegal_placement_is_refused_with_its_reason(read, add, reason):
    model = UNet(**TINY)
    with pytest.raises(ValueError, match=reason):
        add_adapters(model, read, add, rank=4)
    assert all(p.requires_grad for p in model.parameters())             # nothing has changed


def sd_v1():
    with torch.device("meta"):
        return UNet(**UNET_CONFIGS["SD-v1"])


@pytest.mark.parametrize("placements,rank,params,adapters", [
    ([p for p in PAIRS if p[0] not in ("ca_c", "res_in", "res_out")], 60, 1_511_040, 16),
    ([("ca_out", "ffn_in")], 120, 3_009_600, 16), ([("sa_in", "trans_out")], 256, 6_406_336, 16),
    ([("ca_c", "ca_c")], 60, 1_487_808, 16), ([("ca_c", "ca_c")], 256, 6_307_840, 16),
    ([("res_in", "res_in")], 6, 3_303_492, 22), ([("res_in", "res_out")], 7, 3_224_794, 22),
    ([("res_out", "res_out")], 9, 3_326_598, 22)])
def test_sizes_in_stable_diffusion(placements, rank, params, adapters):
    model = sd_v1()
    names = list(model.state_dict())
    for read, add in placements:
        add_adapters(model, read, add, rank)
        assert count(trained(model)) == params
        assert count(model.parameters()) == 859_520_964 + params
        assert sum(isinstance(m, Adapter) for m in model.modules()) == adapters
        remove_adapters(model)
    assert list(model.state_dict()) == names


def test_a_budget_gives_the_rank_whose_size_is_nearest():
    model, budget = sd_v1(), round(0.0075 * 859_520_964)

    def size(read, add, **how):
        with torch.device("meta"):                                      # quicker
            add_adapters(model, read, add, **how)
        rank = next(m.spec["rank"] for m in model.modules() if isinstance(m, Adapter))
        parameters = count(trained(model))
        remove_adapters(model)
        return rank, parameters

    for read, add in (("ca_out", "ffn_in"), ("ca_c", "ca_c"), ("res_in", "res_out")):
        rank, parameters = size(read, add, budget=budget)
        near = [abs(size(read, add, rank=r)[1] - budget) for r in (rank - 1, rank + 1)]
        assert abs(parameters - budget) <= min(near)
    # by hand: r (2 * 12480 + 16) + 12480 for the sixteen widths
    assert size("ca_out", "ffn_in", budget=budget)[0] == round((budget - 12_480) / 24_976)
    for rank, wanted in ((8.6, 9), (9.4, 9), (9.6, 10)):
        assert size("ca_out", "ffn_in", budget=round(rank * 24_976) + 12_480)[0] == wanted
    with pytest.raises(ValueError, match="budget of 1,000 .* rank 1 has 37,456"):
        add_adapters(model, "ca_out", "ffn_in", budget=1000)


# --------------------------------------------------------------------------------------------------
# what an adapter does to the model

@pytest.mark.parametrize("read,add,activation", [
    ("ca_out", "ffn_in", "relu"), ("ca_c", "ca_c", "sigmoid"), ("res_in", "res_out", "silu"),
    ("sa_in", "trans_out", "identity"), (*LORA, "identity")])
def test_zero_start_off_scale_0_and_removal_are_the_base_bit_for_bit(read, add, activation):
    model = tiny()
    out, names = model(*inputs()), list(model.state_dict())
    add_adapters(model, read, add, 3, activation=activation, scale=4.0)
    made = [m for m in model.modules() if isinstance(m, Adapter)]
    assert all(m.down.weight.any() and not m.up.weight.any() for m in made)
    assert torch.equal(model(*inputs()), out)
    shake(model)
    changed = model(*inputs())
    assert (changed - out).abs().max() > 1e-3
    set_scale(model, 0)
    assert torch.equal(model(*inputs()), out)
    set_scale(model, 4)
    assert torch.equal(model(*inputs()), changed)
    remove_adapters(model)
    assert torch.equal(model(*inputs()), out) and list(model.state_dict()) == names


def test_text_states_changed_in_one_block_do_not_reach_another():
    model, seen = tiny(), {}
    blocks = [m for m in model.modules() if isinstance(m, TransformerBlock)]
    add_adapters(model, "ca_c", "ca_c", 3, init="official")
    for i, block in enumerate(blocks):
        block.attn2.to_k.register_forward_hook(lambda m, args, o, i=i: seen.update({i: args[0]}))
    x, t, context = inputs()
    model(x, t, context)
    assert len(seen) == len(blocks) == 7
    for i, block in enumerate(blocks):
        A = block.adapter
        assert_close(seen[i], context + A.up(torch.relu(A.down(context))))


def test_scale_is_a_factor_of_the_output_and_can_change():
    model = tiny().double()
    block = model.middle_block[0]
    g = torch.Generator().manual_seed(0)
    h, emb = (torch.randn(*shape, generator=g).double() for shape in ((2, 64, 4, 4), (2, 128)))
    base = block(h, emb)
    add_adapters(model, "res_out", "res_out", 2, activation="sigmoid", scale=1)
    shake(model)
    unit = block(h, emb) - base
    for scale in (0, 0.5, 4, -1):
        set_scale(model, scale)
        assert_close(block(h, emb) - base, scale * unit)


@pytest.mark.parametrize("place", [("ca_out", "ffn_in"), LORA])
def test_it_compiles_to_one_graph_and_still_follows_its_scale(place):
    g = torch.Generator().manual_seed(0)
    block = fill_by_recipe(TransformerBlock(32, 4, 8, 20))
    x, context = torch.randn(2, 10, 32, generator=g), torch.randn(2, 6, 20, generator=g)
    add_adapters(block, *place, 2)
    shake(block)
    compiled, seen = torch.compile(block, backend="eager", fullgraph=True), []
    for scale in (1, 0.3, 0):
        set_scale(block, scale)
        seen.append(block(x, context))
        assert_close(compiled(x, context), seen[-1])
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(seen, 2))


def test_adapters_follow_the_precision_and_the_groups_of_the_base():
    model = UNet(**UNET_CONFIGS["unet-tiny"]).bfloat16()
    add_adapters(model, "res_in", "res_out", 2)
    assert {p.dtype for p in trained(model)} == {torch.bfloat16}
    assert {m.before[0].num_groups for m in model.modules() if isinstance(m, Adapter)} == {8}


def test_from_the_zero_start_every_parameter_learns_and_the_base_does_not():
    model, target = tiny(), torch.zeros(2, 4, 8, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    add_adapters(model, "ca_out", "ffn_in", 4)
    opt = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(6):
        opt.zero_grad()
        loss = (model(*inputs()) - target).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert all(p.grad.abs().max() > 0 for p in trained(model))
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert all(p.grad is None for k, p in model.named_parameters() if ".adapter." not in k)


# --------------------------------------------------------------------------------------------------
# save and load

def test_save_and_load(tmp_path):
    model = tiny()
    add_adapters(model, "sa_out", "ffn_in", 3, activation="silu", scale=0.5)
    shake(model)
    save_checkpoint(tmp_path / "adapter.pt", adapter_state(model))
    state = load_checkpoint(tmp_path / "adapter.pt")
    assert count(state["adapter"].values()) == count(trained(model))
    assert (tmp_path / "adapter.pt").stat().st_size < 120_000           # nothing of the base
    other = tiny()
    load_adapters(other, state)
    assert torch.equal(other(*inputs()), model(*inputs()))
    assert adapter_state(other)["spec"] == state["spec"] == dict(
        read="sa_out", add="ffn_in", rank=3, activation="silu", scale=0.5)
    assert not any(p.requires_grad for k, p in other.named_parameters() if ".adapter." not in k)


def test_the_hash_depends_on_the_base_and_on_nothing_else():
    model = tiny()
    there = base_hash(model)
    add_adapters(model, "ca_out", "ffn_in", 2)
    shake(model)
    assert base_hash(model) == there == base_hash(copy.deepcopy(tiny()).half())
    export = tiny()
    export.load_state_dict({k: v.half() for k, v in export.state_dict().items()})
    assert base_hash(export) == there == base_hash(tiny().to(memory_format=torch.channels_last))
    for name in ("out.2.bias", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"):
        changed = tiny()
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[-1] += 0.01
        assert base_hash(changed) != there, name
    assert base_hash(torch.nn.ModuleDict({"unet": tiny()})) != there    # names count


def test_loading_where_it_does_not_belong_is_refused_and_changes_nothing():
    model = tiny()
    add_adapters(model, "ca_out", "ffn_in", 3)
    state = adapter_state(model)
    wrong, wide = tiny(), tiny(channel_mult=(1, 3))
    with torch.no_grad():
        wrong.out[2].bias[0] += 1
    key = "middle_block.1.transformer_blocks.0.down.weight"
    less = {**state, "adapter": {k: v for k, v in state["adapter"].items() if k != key}}
    cases = [(wrong, state, "same shape with other weights"),
             (wide, state, r"12 tensors differ: .*: file \(3, 64\), model \(3, 96\)"),
             (tiny(), less, f"1 tensors differ: {key}: file has none, model "),
             (tiny(), {"model": {}, "ema": {}}, "nothing can be built by this adapter's file"),
             (tiny(), {**state, "spec": {**state["spec"], "add": "sa_in"}}, "before ca_out")]
    for target, bad, words in cases:
        names = list(target.state_dict())
        with pytest.raises(ValueError, match=words):
            load_adapters(target, bad)
        assert list(target.state_dict()) == names
        assert all(p.requires_grad for p in target.parameters())


@pytest.mark.parametrize("bad,words", [
    (dict(), "rank None, budget None: give exactly one"), (dict(rank=1, budget=9), "exactly one"),
    (dict(rank=0), "rank 0"), (dict(rank=1.5), "rank 1.5"), (dict(rank=2, scale=math.nan), "nan"),
    (dict(rank=2, activation="gelu"), "activation 'gelu': choose one of relu, sigmoid"),
    (dict(rank=2, init="one"), "unknown init 'one'")])
def test_bad_arguments_are_refused(bad, words):
    model = UNet(**TINY)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=words):
        add_adapters(model, "ca_out", "ffn_in", **bad)
    assert list(model.state_dict()) == names


def test_one_adapter_at_most_and_none_is_an_error_too():
    model = UNet(**TINY)
    for action in (adapter_state, remove_adapters, lambda m: set_scale(m, 1)):
        with pytest.raises(ValueError, match="no adapter in this model"):
            action(model)
    add_adapters(model, "ca_out", "ffn_in", 1)
    with pytest.raises(ValueError, match="remove_adapters first"):
        add_adapters(model, "res_in", "res_in", 1)
    with pytest.raises(ValueError, match="no block of this Linear has a ca_out"):
        add_adapters(torch.nn.Linear(2, 2), "ca_out", "ffn_in", 1)


# --------------------------------------------------------------------------------------------------
# LoRA, the probe, analysis of variance

def test_lora_changes_only_what_reads_the_text_states():
    """And that as W + scale * up @ down says; a copy of the model has an adapter of its own."""
    model = tiny()
    out, names = model(*inputs()), list(model.state_dict())
    add_adapters(model, *LORA, 2, activation="identity", scale=0.5)
    layers = [(k, m) for k, m in model.named_modules() if re.search(r"attn2\.to_[kv]$", k)]
    assert len(layers) == 14 and [m.adapter.down.bias for _, m in layers] == [None] * 14
    assert {id(p) for _, m in layers for p in m.adapter.parameters()} == {
        id(p) for p in model.parameters() if p.requires_grad}
    shake(model)
    other = tiny()
    with torch.no_grad():
        for path, layer in layers:
            a = layer.adapter
            other.get_submodule(path).weight += 0.5 * a.up.weight @ a.down.weight
    changed = model(*inputs())
    assert (changed - out).abs().max() > 1e-3
    assert_close(changed, other(*inputs()), **TOLERANCE)
    twin = copy.deepcopy(model)
    set_scale(twin, 0)
    assert torch.equal(twin(*inputs()), out) and torch.equal(model(*inputs()), changed)
    state = adapter_state(model)
    remove_adapters(model)
    assert torch.equal(model(*inputs()), out) and list(model.state_dict()) == names
    load_adapters(model, state)                                         # a second time
    assert torch.equal(model(*inputs()), changed)


def test_lora_learns_nothing_from_the_start_token():
    """It is the same in all captions: its keys and values have no gradient, LoRA's included."""
    model = tiny()
    detach_first_token(model)
    add_adapters(model, *LORA, 2)
    shake(model)
    x, t, context = inputs()
    context = context.clone()
    context[:, 1:] = 0                          # nothing but the start token to learn from
    model(x, t, context).square().sum().backward()
    downs = [m.adapter.down.weight.grad for m in model.modules()
             if isinstance(getattr(m, "adapter", None), Adapter)]
    assert len(downs) == 14 and all(g is None or not g.any() for g in downs)


def test_lora_of_a_budget():
    # 32 matrices (C, 768): r (2 * 12480 + 32 * 768)
    rank, model = round(6_400_000 / (2 * 12_480 + 32 * 768)), sd_v1()
    with torch.device("meta"):
        add_adapters(model, *LORA, budget=6_400_000, activation="identity")
    assert count(trained(model)) == rank * 49_536


def test_probe_is_the_root_mean_square_over_channels():
    xt, t = torch.zeros(2, 4, 3, 5), torch.zeros(2)
    answers = {"a": torch.full((2, 4, 3, 5), 1.0), "b": torch.ones(2, 4, 3, 5)}
    answers["b"][1, :, 2, 4] += torch.tensor([1.0, -1.0, 3.0, 5.0])
    got = prediction_difference(lambda x, t, context: answers[context], xt, t, "a", "b")
    want = torch.zeros(2, 3, 5)
    want[1, 2, 4] = 3.0                                                 # sqrt((1 + 1 + 9 + 25) / 4)
    assert torch.equal(got, want)


def test_anova_matches_the_reference():
    d, g = golden_case("adapter_anova")
    y, labels = g["out_y"], g["out_labels"]
    F, p = anova([y[labels == i].tolist() for i in range(4)])
    assert F == pytest.approx(g["out_F"].item(), rel=1e-12)
    assert p == pytest.approx(g["out_p"].item(), rel=1e-10)


@pytest.mark.parametrize("d1,d2,five,one", [(9, 10, 3.02, 4.94), (6, 13, 2.92, 4.62),
                                            (3, 12, 3.49, 5.95), (3, 60, 2.76, 4.13)])
def test_thresholds_of_the_f_table(d1, d2, five, one):
    tail = lambda F: incomplete_beta(d2 / (d2 + d1 * F), d2 / 2, d1 / 2)
    for F, p in ((five, 0.05), (one, 0.01)):
        assert tail(F + 0.006) < p < tail(F - 0.006)


def test_incomplete_beta_against_closed_forms():
    for x in (1e-9, 0.03, 0.5, 0.77, 0.999):
        assert incomplete_beta(x, 3.5, 1) == pytest.approx(x ** 3.5, rel=1e-12)
        assert incomplete_beta(x, 1, 40) == pytest.approx(-math.expm1(40 * math.log1p(-x)), 1e-12)
        arcsine = 2 / math.pi * math.asin(math.sqrt(x))
        assert incomplete_beta(x, 0.5, 0.5) == pytest.approx(arcsine, rel=1e-12)
    for n, k in ((7, 3), (60, 20)):     # a binomial tail: P(Bin(n, x) >= k) = I_x(k, n - k + 1)
        for x in (0.1, 0.37, 0.9):
            tail = math.fsum(math.comb(n, j) * x ** j * (1 - x) ** (n - j)
                             for j in range(k, n + 1))
            assert incomplete_beta(x, k, n - k + 1) == pytest.approx(tail, rel=1e-11)
    assert incomplete_beta(0, 2, 3) == 0 and incomplete_beta(1, 2, 3) == 1
    assert incomplete_beta(0.5, 250, 250) == pytest.approx(0.5, rel=1e-12)


def test_anova_by_hand_and_for_any_units():
    y = [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]  # means 2, 4; MSB 6, MSE (2 + 8) / 4; F = t^2, t = 1.549
    F, p = anova(y)
    assert F == pytest.approx(2.4) and 0.19 < p < 0.20
    assert anova([[10 * v + 3 for v in g] for g in y]) == pytest.approx((F, p))
    assert anova([[1.0, 2.0], [1.0, 2.0]]) == (0.0, 1.0)
    assert anova([[1.0, 2.0, 3.0], [9.0]])[0] == pytest.approx(36.75)   # a level with a single run


@pytest.mark.parametrize("groups,words", [
    ([[0.1] * 3, [0.7] * 3], "equal"), ([[1.0, 2.0]], r"sizes \[2\]"),
    ([[1.0, 2.0], []], r"sizes \[2, 0\]"), ([[1.0], [2.0]], r"sizes \[1, 1\]"),
    ([[1.0, math.nan], [2.0, math.inf]], "not finite")])
def test_anova_refuses_what_has_no_f(groups, words):
    with pytest.raises(ValueError, match=words):
        anova(groups)


# --------------------------------------------------------------------------------------------------
# adapters.py learn

@pytest.fixture(scope="module")
def learned(scenes, tmp_path_factory):
    """An output folder of three steps on 24 captioned pictures; no preview, which takes seconds."""
    out = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionTask, "preview", lambda *given: None)
        adapters.main(flags(scenes, out / "whole"))
    return out / "whole"


def flags(folder, out, *more):
    return ["learn", "--base", BASE, "--data", f"folder:{folder}", "--rank", "2", "--steps", "3",
            "--batch-size", "4", "--save-every", "1", "--device", "cpu", "--out", str(out), *more]


def test_a_stopped_run_goes_on_bit_for_bit(learned, scenes, tmp_path, monkeypatch):
    save = train.save

    def save_and_stop(path, config, task, step, s):         # as Ctrl-C does, after step 1
        save(path, config, task, step, s)
        if s == 1:
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(DiffusionTask, "preview", lambda *given: None)
    monkeypatch.setattr(train, "save", save_and_stop)
    with pytest.raises(SystemExit) as stopped:
        adapters.main(flags(scenes, tmp_path / "parts"))
    assert stopped.value.code == 130
    assert load_checkpoint(tmp_path / "parts" / "ckpt.pt")["step"] < 3
    adapters.main(["learn", "--out", str(tmp_path / "parts"), "--resume"])
    for name in ("ckpt.pt", "adapter.pt"):
        whole, parts = (load_checkpoint(out / name) for out in (learned, tmp_path / "parts"))
        for key in ("step", "model", "ema", "opt") if name == "ckpt.pt" else ("spec", "adapter"):
            assert_same(whole[key], parts[key], key)


def test_only_the_adapter_is_saved_and_everything_of_it_has_learned(learned):
    state = load_checkpoint(learned / "ckpt.pt")
    assert state["config"]["lr"] == 5e-3 and state["config"]["optimizer"] == "adamw"
    assert state["model"] and all(".adapter." in name for name in state["model"])
    assert all(w.any() for name, w in state["model"].items() if ".up." in name)
    adapter = load_checkpoint(learned / "adapter.pt")       # the averaged weights
    assert_same(sorted(map(tuple, (w.flatten().tolist() for w in adapter["adapter"].values()))),
                sorted(map(tuple, (w.flatten().tolist() for w in state["ema"].values()))))
    assert adapter["spec"] == dict(read="ca_out", add="ffn_in", rank=2, activation="relu",
                                   scale=1.0)


def test_a_base_with_other_weights_is_refused(learned, tmp_path):
    state = load_checkpoint(BASE)
    state["ema"]["denoiser.out.2.bias"] += 0.5
    save_checkpoint(tmp_path / "other.pt", state)
    with pytest.raises(ValueError, match="same shape with other weights"):
        sample.load(str(learned / "adapter.pt"),
                    options=sample.Options(base=str(tmp_path / "other.pt")))


@pytest.mark.parametrize("argv,words", [
    ([], "adapters.py learn"), (["lern"], "adapters.py learn"),
    (["learn", "--rank", "2", "--budget", "0.1"], "--rank is not read beside --budget"),
    (["learn", "--concept", "FOLDER"], "one --category for each"),
    (["learn", "--concept", "FOLDER", "--category", "circle", "ring"], "one --category for each"),
    (["learn", "--concept", "FOLDER", "--category", "circle", "--data", "scenes"], "--data is not"),
    (["learn", "--category", "circle"], "--category needs --concept"),
    (["learn", "--prior", "none"], "--prior needs --concept"),
    (["learn", "--no-augment"], "--augment needs --concept"),
    (["learn", "--data", "FOLDER"], "has no captions: give a folder with metadata"),
    (["learn", "--adapter", "ca_c-ffn_in"], "ca_c-ffn_in"), (["learn", "--rank", "0"], "--rank 0"),
    (["learn", "--base", "/nowhere.pt"], "no checkpoint at /nowhere.pt"),
    (["learn", "--base", str(ROOT / "assets" / "shapes.png")], "shapes.png")])
def test_wrong_input_gets_one_line(argv, words, pictures, tmp_path, capsys):
    argv = [f"folder:{pictures}" if word == "FOLDER" else word for word in argv]
    with pytest.raises(SystemExit) as stopped:
        adapters.main([*argv, *["--out", str(tmp_path / "x")][:2 * bool(argv)]])
    err = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and words in err and len(err.splitlines()) == 1


# --------------------------------------------------------------------------------------------------
# files made by hand, damaged files, what nobody reads

ONE = "middle_block.1.transformer_blocks.0.down.weight"
SPECS = [{"x": 1}, {"rank": KeyError}, {"scale": KeyError}, {"rank": "4"}, {"rank": 10 ** 12},
         {"rank": 0}, {"rank": -1}, {"rank": True}, {"rank": 2.0}, {"rank": None}, {"scale": "1"},
         {"scale": math.nan}, {"scale": None}, {"activation": [1]}, {"activation": "gelu"},
         {"read": 3}, {"read": []}, {"add": None}]
TENSORS = [lambda w: "x", lambda w: 3, lambda w: None, lambda w: w * math.nan, lambda w: w / 0,
           lambda w: w.int(), lambda w: w.to(torch.complex64), lambda w: w.to("meta"),
           lambda w: w.to_sparse(), lambda w: w[None]]


def test_an_adapter_made_by_hand_gets_one_line_and_changes_nothing():
    model = tiny()
    add_adapters(model, "ca_out", "ffn_in", 3)
    shake(model)
    good, target, named = adapter_state(model), tiny(), set(tiny().state_dict())
    bad = [{**good, "spec": {k: v for k, v in {**good["spec"], **spec}.items()
                             if v is not KeyError}} for spec in SPECS]
    bad += [{**good, "adapter": {**good["adapter"], ONE: make(good["adapter"][ONE])}}
            for make in TENSORS]
    bad += [{**good, "spec": spec} for spec in ([1], None, "abc", 3, {})]
    whole = {3: good["adapter"][ONE]}
    bad += [{**good, "adapter": tensors} for tensors in ([1], None, "abc", whole)]
    bad += [{**good, "base": base} for base in (3, None, "0")]
    for state in bad:
        with pytest.raises(ValueError, match="adapter|rank|scale|activation") as error:
            load_adapters(target, state)
        assert "\n" not in str(error.value) and set(target.state_dict()) == named
    load_adapters(target, good)
    assert torch.equal(target(*inputs()), model(*inputs()))


def test_a_damaged_adapter_is_refused_or_read_as_it_was(tmp_path):
    model, rng, refused = tiny(), random.Random(0), 0
    add_adapters(model, "ca_out", "ffn_in", 2)
    save_checkpoint(tmp_path / "adapter.pt", adapter_state(model))
    good, right = (tmp_path / "adapter.pt").read_bytes(), adapter_state(model)
    for number in range(10):
        body = bytearray(good)
        for place in rng.sample(range(len(good)), 2 if number % 2 else len(good) // 10):
            body[place] ^= 1 << rng.randrange(8)
        body = body[:rng.randrange(len(good))] if number % 5 == 0 else body
        (tmp_path / "x.pt").write_bytes(body)
        target = tiny()
        try:
            load_adapters(target, load_checkpoint(tmp_path / "x.pt"))
            assert_same(adapter_state(target), right)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 4


@pytest.mark.parametrize("flags, words", [
    (["--model", "unet-small"], "--model is not read"), (["--init", BASE], "--init is not read"),
    (["--recipe", "paper"], "--recipe is not read"),
    (["--image-size", "64"], "--image-size is not read"),
    (["--base", str(ROOT / "assets" / "vq-scenes.pt")], "has a ca_out: give a U-Net"),
    (["--save-latents", "x"], "--save-latents is not read"),
    (["--muon-lr", "0.1"], "--muon-lr is not read"),
    (["--bpe", "list.gz"], "--bpe is for Stable Diffusion"),
    (["--base", "RUN/ckpt.pt"], "does not sample by itself"),
    (["--base", "RUN/adapter.pt"], "does not sample by itself"),
    (["--data", "UNKNOWN"], "unknown word 'zebra'"),
    (["--word-lr", "1"], "--word-lr needs --concept"),
    (["--adapter", "ca_out"], "--adapter"), (["--rank", "1.5"], "--rank")])
def test_what_nobody_reads_or_cannot_be_is_refused_at_the_start(flags, words, learned, scenes,
                                                                tmp_path, capsys):
    shutil.copytree(scenes, tmp_path / "zebra")
    (tmp_path / "zebra" / "00.txt").write_text("a red zebra")
    flags = [word.replace("RUN", str(learned)).replace("UNKNOWN", f"folder:{tmp_path / 'zebra'}")
             for word in flags]
    with pytest.raises(SystemExit) as stopped:
        adapters.main(["learn", "--base", BASE, "--data", f"folder:{scenes}", *flags, "--steps",
                       "1", "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and words in err and err.startswith("error: ")
    assert len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_an_adapter_is_not_exported(learned, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(learned / "adapter.pt"), "--export", str(tmp_path / "x.pt")])
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "x.pt").exists()


def test_a_run_says_to_which_base_and_pictures_it_belongs(learned, scenes, tmp_path):
    """So that a run goes on with those alone; half precision of the base is the same base."""
    state, dataset = load_checkpoint(learned / "ckpt.pt"), data.load(f"folder:{scenes}")
    options, config = adapters.Options(base=BASE, rank=2), types.SimpleNamespace(out="")
    said = lambda base, data: adapters.AdapterTask(base, data, options, config).state()
    same = said(base_task(BASE), dataset)
    assert {k: state[k] for k in ("base", "data")} == {k: same[k] for k in ("base", "data")}
    other = base_task(BASE)
    with torch.no_grad():
        other.model.text.text_model.final_layer_norm.bias[0] += 1
    assert said(other, dataset)["base"] != same["base"]
    fewer = dataclasses.replace(dataset, captions=["a circle", *dataset.captions[1:]])
    assert said(base_task(BASE), fewer)["data"] != same["data"]
    dark = dataclasses.replace(dataset, images=dataset.images // 2)
    assert said(base_task(BASE), dark)["data"] != same["data"]


# --------------------------------------------------------------------------------------------------
# adapters.py learn --concept

def test_a_thing_learns_an_adapter_and_its_word_together(scenes, tmp_path, monkeypatch):
    """The word moves, is in the file, and is read; at scale 0 other captions are as the base's."""
    folder, rows = tmp_path / "thing", []
    folder.mkdir()
    for k in range(2):
        shutil.copy(sorted(pathlib.Path(scenes).glob("*.png"))[k], folder / f"{k}.png")
    monkeypatch.setattr(DiffusionTask, "preview", lambda *given: None)
    add = adapters.ThingTask.add_adapter
    monkeypatch.setattr(adapters.ThingTask, "add_adapter", lambda task: (
        rows.append(task.model.text.rows[0].detach().clone()), add(task))[1])
    adapters.main(["learn", "--base", BASE, "--concept", f"folder:{folder}", "--category", "circle",
                   "--prior", "none", "--adapter", "lora", "--budget", "0.0075", "--scale", "2",
                   "--steps", "3", "--batch-size", "4", "--lr", "0.05", "--device", "cpu", "--out",
                   str(tmp_path / "run")])
    file = load_checkpoint(tmp_path / "run" / "adapter.pt")
    assert file["concepts"] == ["<new1> circle"] and file["spec"] == dict(
        read="ca_c", add="ca_kv", rank=10, activation="identity", scale=2.0)
    assert count(file["adapter"].values()) == pytest.approx(0.0075 * 2_774_764, rel=0.05)
    assert (file["modifiers"]["<new1>"] - rows[0]).abs().max() > 1e-3
    assert all(w.any() for w in file["adapter"].values())
    learned = load_checkpoint(tmp_path / "run" / "ckpt.pt", "model")["model"]
    assert sorted({".adapter." in name or ".rows." in name for name in learned}) == [True]

    x, t = torch.ones(1, 12, 8, 8), torch.full((1,), 500.0)

    @torch.no_grad()
    def predicted(prompts, ckpt=str(tmp_path / "run" / "adapter.pt"), base=BASE, **options):
        task, model = sample.load(ckpt, options=sample.Options(base=base, **options))
        shown.append(task.info["examples"])
        return [model(x, t, ids[None]) for ids in task.tokenizer(prompts)]
    shown, two = [], ["a red circle", "a <new1> circle"]
    plain, = predicted(two[:1], BASE, None)
    (on, thing), (off, word) = predicted(two), predicted(two, scale=0.0)
    assert torch.equal(off, plain) and not torch.equal(on, plain)
    assert not torch.equal(thing, word) and shown[1] == ["a <new1> circle"]
    for change, words in (({"modifiers": {"<new1>": torch.zeros(3)}}, "<new1>: file"),
                          ({"modifiers": {"two words": torch.zeros(64)}}, "no single word"),
                          ({"modifiers": {"circle": torch.zeros(64)}}, "exists already")):
        save_checkpoint(tmp_path / "bad.pt", {**file, **change})
        with pytest.raises(ValueError, match=words):
            predicted(two, str(tmp_path / "bad.pt"))
    file["modifiers"]["<new1>"] += 1                                    # the file's row is read
    save_checkpoint(tmp_path / "other.pt", file)
    assert not torch.equal(predicted(two, str(tmp_path / "other.pt"))[1], thing)
    with pytest.raises(ValueError, match="--concept is not read: .* new words of its own"):
        predicted(two, concept="other.pt")


def test_a_thing_learns_at_any_placement_in_any_form(scenes, tmp_path):
    """What the flags say is what is built; the base, the U-Net's and the words', does not learn."""
    for flags, spec in ((["--adapter", "res_in-res_out", "--rank", "1", "--activation", "silu",
                          "--augment"], ("res_in", "res_out", 1, "silu")),
                        (["--scale", "0.5"], ("ca_out", "ffn_in", 16, "relu"))):
        options, config = adapters.read_flags(
            ["--base", BASE, "--concept", f"folder:{scenes}", "--category", "circle", "--prior",
             "none", "--word-lr", "0.5", "--device", "cpu", *flags])
        dataset = train.load_data(config)
        dataset = dataclasses.replace(dataset, captions=None)
        circles = (dataset.images[:2], ["a <new1> circle"] * 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapters.ThingTask, "photographs", lambda *given: circles)
            task = adapters.ThingTask(base_task(BASE), dataset, options, config)
        made = adapter_state(task.model)
        assert tuple(made["spec"].values())[:4] == spec
        assert made["spec"]["scale"] == (1.0 if len(flags) > 2 else 0.5)
        assert not any(w.any() for k, w in made["adapter"].items() if ".up." in k)
        learned = {k for k, p in task.model.named_parameters() if p.requires_grad}
        assert learned == {k for k in task.model.state_dict()
                           if ".adapter." in k or k == "text.rows.0"}
        assert task.frozen == set(task.model.state_dict()) - learned
        assert config.word_lr == 0.5 and config.lr == 5e-3 and bool(options.augment) == (
            "--augment" in flags)
