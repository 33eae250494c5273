"""adapters.py against official figures and sizes, and against formulas; what add, remove, fold and load promise."""
import copy
import itertools
import math
import re
import warnings

import pytest
import torch
from torch.nn.utils import parametrize
from torch.testing import assert_close

from adapters import (ACTIVATIONS, FOLDS, LEGAL, PLACEMENTS, Adapter, adapter_parameters, adapter_state, add_adapters,
                      add_lora, anova, base_hash, check_placement, enable, fold, incomplete_beta, load_adapters,
                      prediction_difference, rank_for, remove_adapters, set_scale, unfold)
from conftest import fill_by_recipe, golden_case
from unet import UNET_CONFIGS, ResBlock, TransformerBlock, UNet
from weights import load_checkpoint, save_checkpoint

TOLERANCE = dict(rtol=1e-4, atol=2e-5)
TINY = dict(in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
            attention_resolutions=(1, 2), num_heads=2, context_dim=24)
PAIRS = [tuple(placement.split("-")) for placement in PLACEMENTS]
# the official names of positions, activations and tensors
THEIRS = {"attn1i": "sa_in", "attn1o": "sa_out", "attn2i": "ca_in", "attn2c": "ca_c", "attn2o": "ca_out",
          "ffni": "ffn_in", "ffno": "ffn_out", "transo": "trans_out", "resi": "res_in", "reso": "res_out"}
METHODS = {"relu": "relu", "sig": "sigmoid", "silu": "silu", "ident": "identity"}
LINEAR = {"down": "adapter_inout.adp.0", "up": "adapter_inout.adp.2"}
CONV = {"before.0": "adapter.0", "down": "adapter.2", "up": "adapter.4"}


class Official:
    """A model whose tensors go by the official names, for fill_by_recipe."""

    def __init__(self, model, names):
        self.model = model
        self.names = {k: re.sub(r"(^|\.)adapter\.adapter\.(before\.0|down|up)", lambda m: m[1] + names[m[2]], k)
                      for k in model.state_dict()}

    def state_dict(self):
        return {self.names[k]: v for k, v in self.model.state_dict().items()}

    def load_state_dict(self, state, strict):
        self.model.load_state_dict({k: state[name] for k, name in self.names.items()}, strict=strict)


def filled(model, names, d=None):
    official = Official(model, names)
    if d is not None:
        assert sorted([k, list(v.shape)] for k, v in official.state_dict().items()) == sorted(d["params"])
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


def shake(unet, seed=0):
    """Adapters that do something: every tensor random."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(unet):
            p.copy_(0.3 * torch.randn(p.shape, generator=g))


# ----------------------------------------------------------------------------------------------------------------------
# official figures

def test_the_four_forms_match_official():
    d, g = golden_case("adapter_forms")
    block = TransformerBlock(d["config"]["dim"], 4, 5, 8)
    for theirs, ours in METHODS.items():
        adapter = Adapter(block, "sa_in", "sa_in", d["config"]["mid_dim"], ours, 1.0, "official")
        fill_by_recipe(OfficialForm(adapter))
        for scale in (1.0, -2.5):
            adapter.scale = scale
            assert_close(adapter("sa_in", g["in_x"]).detach(), g["in_x"] + scale * g[f"out_{theirs}"], **TOLERANCE)


class OfficialForm(Official):
    """The same for an Adapter without a block."""

    def __init__(self, adapter):
        self.model = adapter
        self.names = {k: k.replace("down", "adp.0").replace("up", "adp.2") for k in adapter.state_dict()}


def test_all_transformer_placements_match_official():
    d, g = golden_case("adapter_transformer_pairs")
    c = d["config"]
    pairs = [(THEIRS[din], THEIRS[dout]) for din, dout in c["pairs"]]
    assert sorted(pairs) == sorted(p for p in PAIRS if not p[0].startswith("res")) and len(pairs) == 17
    for (input, output), (din, dout) in zip(pairs, c["pairs"]):
        block = TransformerBlock(c["dim"], c["n_heads"], c["d_head"], c["context_dim"])
        add_adapters(block, input, output, c["mid_dim"], activation=METHODS[c["method"]], init="official")
        filled(block, LINEAR, None if input == "ca_c" else d)
        out = block(g["in_x"], g["in_context"]).detach()
        assert_close(out, g[f"out_{din}-{dout}"], **TOLERANCE, msg=lambda m: f"{input}-{output}: {m}")
        enable(block, False)
        off = block(g["in_x"], g["in_context"]).detach()
        assert_close(off, g["out_disabled"], **TOLERANCE)
        assert (off - out).abs().max() > 0.1


@pytest.mark.parametrize("case", ["resi_resi", "resi_reso", "reso_reso"])
def test_residual_placements_match_official(case):
    d, g = golden_case(f"adapter_resblock_{case}")
    c, a = d["config"], d["config"]["adp_config"]
    block = ResBlock(c["channels"], c["emb_channels"], c["out_channels"])
    add_adapters(block, THEIRS[a["din"]], THEIRS[a["dout"]], a["mid_dim"], activation=METHODS[a["method"]],
                 scale=a["scale"], init="official")
    assert_close(filled(block, CONV, d)(g["in_x"], g["in_emb"]).detach(), g["out_out"], **TOLERANCE)


@pytest.mark.parametrize("case", ["attn1i_transo", "attn2c_attn2c", "attn2o_ffni", "resi_reso"])
def test_whole_unets_match_official(case):
    d, g = golden_case(f"adapter_unet_{case}")
    kind, a = next((k, a) for k, a in d["config"]["adapter_config"].items())
    model = UNet(**TINY)
    assert all(d["config"][k] == (list(v) if isinstance(v, tuple) else v) for k, v in TINY.items())
    add_adapters(model, THEIRS[a["din"]], THEIRS[a["dout"]], a["mid_dim"], activation=METHODS[a["method"]],
                 scale=a["scale"], init="official")
    filled(model, LINEAR if kind == "transformer" else CONV, d)
    stages = {}
    for name in ("middle_block", "input_blocks.1"):
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: stages.update({name: o}))
    stages["out"] = model(g["in_x"], g["in_t"], g["in_context"])
    assert {f"out_{k}" for k in stages} == {k for k in g if k.startswith("out_")}
    for k, v in stages.items():
        assert_close(v.detach(), g[f"out_{k}"], **TOLERANCE, msg=lambda m: f"{k}: {m}")


@pytest.mark.parametrize("activation,ratio", [("relu", 0.24), ("sigmoid", 0.29), ("silu", 0.19), ("identity", 0.34)])
def test_official_start_disturbs_as_much_as_measured(activation, ratio):
    torch.manual_seed(0)
    block, x = TransformerBlock(320, 8, 40, 768), torch.randn(1, 400, 320)
    got = [((Adapter(block, "ca_out", "ca_out", 60, activation, 1.0, "official")("ca_out", x) - x).norm()
            / x.norm()).item() for _ in range(5)]
    assert sum(got) / 5 == pytest.approx(ratio, abs=0.02)                             # theirs is one draw


# ----------------------------------------------------------------------------------------------------------------------
# places and sizes

def test_the_twenty_placements_follow_from_the_order_of_the_tensors():
    time = list(TransformerBlock(32, 2, 16, 24).taps)                                   # in order of time: test_unet.py
    streams = ["sa_in", "ca_in", "ffn_in", "trans_out"]
    want = {(i, o) for i in time for o in streams if i != "ca_c" and time.index(o) >= time.index(i)}
    want |= {("ca_c", "ca_c"), ("res_in", "res_in"), ("res_in", "res_out"), ("res_out", "res_out")}
    assert set(PAIRS) == want and len(PLACEMENTS) == len(set(PLACEMENTS)) == 20
    assert len(LEGAL) == 10 and len({o for _, o in PAIRS}) == 7
    joins = {"sa_out": "ca_in", "ca_out": "ffn_in", "ffn_out": "trans_out"}
    for input, output in itertools.product(LEGAL, LEGAL):
        if (input, joins.get(output, output)) in want:
            assert check_placement(input, output) == (input, joins.get(output, output))
        else:
            with pytest.raises(ValueError, match="no adapter can go from .* Legal: sa_in-sa_in, .*res_out-res_out$"):
                check_placement(input, output)


@pytest.mark.parametrize("input,output,reason", [
    ("ffn_in", "sa_in", "sa_in comes before ffn_in"), ("ca_c", "ca_in", "ca_c is the words"),
    ("sa_in", "ca_c", "ca_c is the words"), ("res_in", "ffn_in", "one is in a ResBlock"),
    ("ca_out", "res_out", "one is in a ResBlock"), ("attn2o", "ffn_in", "'attn2o' is not one of the ten"),
    ("ca_out", "out", "'out' is not one of")])
def test_an_illegal_placement_is_refused_with_its_reason(input, output, reason):
    model = UNet(**TINY)
    with pytest.raises(ValueError, match=reason):
        add_adapters(model, input, output, rank=4)
    assert all(p.requires_grad for p in model.parameters())                             # untouched


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
    for input, output in placements:
        add_adapters(model, input, output, rank)
        assert count(adapter_parameters(model)) == params
        assert count(model.parameters()) == 859_520_964 + params
        assert sum(isinstance(m, Adapter) for m in model.modules()) == adapters
        remove_adapters(model)
    assert list(model.state_dict()) == names


def test_one_budget_for_all_placements():
    model = sd_v1()
    budget = round(0.0075 * 859_520_964)

    def size(input, output, **how):
        with torch.device("meta"):                                                      # only to be quick
            add_adapters(model, input, output, **how)
        parameters = count(adapter_parameters(model))
        remove_adapters(model)
        return parameters

    for input, output in PAIRS:
        rank = rank_for(model, input, output, budget)
        sizes = [size(input, output, rank=r) for r in (rank - 1, rank, rank + 1)]
        assert abs(sizes[1] - budget) == min(abs(s - budget) for s in sizes), (input, output, rank, sizes)
        assert size(input, output, budget=budget) == sizes[1]
    # by hand: r (2 * 12480 + 16) + 12480 for the sixteen widths
    assert rank_for(model, "ca_out", "ffn_in", budget) == round((budget - 12_480) / 24_976)
    with pytest.raises(ValueError, match="budget of 1,000 .* ca_out-ffn_in has 37,456 at rank 1"):
        add_adapters(model, "ca_out", "ffn_in", budget=1000)


# ----------------------------------------------------------------------------------------------------------------------
# what an adapter does to the model

@pytest.mark.parametrize("input,output", PAIRS)
def test_zero_start_off_and_removal_are_the_base_bit_for_bit_and_on_is_not(input, output):
    model = tiny()
    out, names = model(*inputs()), list(model.state_dict())
    for activation in ACTIVATIONS:
        add_adapters(model, input, output, 3, activation=activation, scale=4.0)
        assert torch.equal(model(*inputs()), out)
        shake(model)
        changed = model(*inputs())
        assert (changed - out).abs().max() > 1e-3
        enable(model, False)
        assert torch.equal(model(*inputs()), out)
        enable(model)
        assert torch.equal(model(*inputs()), changed)
        set_scale(model, 0)
        assert_close(model(*inputs()), out, **TOLERANCE)
        remove_adapters(model)
        assert torch.equal(model(*inputs()), out) and list(model.state_dict()) == names
        assert all(getattr(m, "adapter", None) is None for m in model.modules())


def test_several_adapters_stack_as_by_hand():
    """Two adapters in one block, against the block's equations written out."""
    torch.manual_seed(0)
    block, x, words = TransformerBlock(32, 4, 8, 20), torch.randn(2, 10, 32), torch.randn(2, 6, 20)
    add_adapters(block, "sa_in", "ffn_in", 3, activation="silu", scale=0.5, init="official", name="early")
    add_adapters(block, "ffn_in", "trans_out", 5, init="official", name="late")
    early, late = block.adapter["early"], block.adapter["late"]
    for on in (True, False):
        enable(block, on, "early")
        A = lambda h: 0.5 * early.up(torch.nn.functional.silu(early.down(h))) if on else 0 * h
        c = block.attn1(block.norm1(x), block.norm1(x)) + x
        f = block.attn2(block.norm2(c), words) + c + A(x)
        y = block.ff(block.norm3(f)) + f + late.up(torch.relu(late.down(f)))
        assert_close(block(x, words), y)
    assert len(adapter_parameters(block)) == 8 and len(adapter_parameters(block, "late")) == 4
    remove_adapters(block, "early")
    assert list(block.adapter) == ["late"]


def test_words_changed_in_one_block_do_not_leak_into_another():
    torch.manual_seed(0)
    model, seen = tiny(transformer_depth=2), {}
    blocks = [m for m in model.modules() if isinstance(m, TransformerBlock)]
    add_adapters(model, "ca_c", "ca_c", 3, init="official")
    for i, block in enumerate(blocks):
        block.attn2.to_k.register_forward_hook(lambda m, args, o, i=i: seen.update({i: args[0]}))
    x, t, context = inputs()
    model(x, t, context)
    assert len(seen) == len(blocks) == 14
    for i, block in enumerate(blocks):
        A = block.adapter["adapter"]
        assert_close(seen[i], context + A.up(torch.relu(A.down(context))))


def test_scale_is_a_factor_of_the_output_and_can_change():
    model = tiny()
    block = model.middle_block[0]
    h, emb = torch.randn(2, 64, 4, 4), torch.randn(2, 128)
    add_adapters(model, "res_out", "res_out", 2, activation="sigmoid", scale=1)
    shake(model)
    enable(model, False)
    base = block(h, emb)
    enable(model)
    unit = block(h, emb) - base
    for scale in (0, 0.5, 4, -1):
        set_scale(model, scale)
        assert_close(block(h, emb) - base, scale * unit, **TOLERANCE)


def test_it_compiles_to_one_graph_and_still_hears_scale_and_switch():
    torch.manual_seed(0)
    block, x, words = TransformerBlock(32, 4, 8, 20), torch.randn(2, 10, 32), torch.randn(2, 6, 20)
    add_adapters(block, "ca_out", "ffn_in", 2, init="official", name="near")
    add_adapters(block, "sa_in", "trans_out", 2, init="official", name="far")
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    for change in (lambda: None, lambda: set_scale(block, 0.3), lambda: enable(block, False, "near")):
        before = block(x, words)
        change()
        assert_close(compiled(x, words), block(x, words))
    assert (block(x, words) - before).abs().max() > 1e-3


def test_an_average_copy_has_adapters_of_its_own():
    model = tiny()
    add_adapters(model, "ca_out", "ffn_in", 2)
    twin, out = copy.deepcopy(model), model(*inputs())
    shake(twin)
    assert torch.equal(model(*inputs()), out) and (twin(*inputs()) - out).abs().max() > 1e-3


def test_adapters_follow_the_precision_and_the_groups_of_the_base():
    model = UNet(**UNET_CONFIGS["unet-tiny"]).bfloat16()
    add_adapters(model, "res_in", "res_out", 2)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.bfloat16}
    assert {m.before[0].num_groups for m in model.modules() if isinstance(m, Adapter)} == {8}


# ----------------------------------------------------------------------------------------------------------------------
# training

@pytest.mark.parametrize("input,output", [("ca_out", "ffn_in"), ("ca_c", "ca_c"), ("res_in", "res_out")])
def test_only_the_adapter_trains_and_every_parameter_is_stepped_once(input, output):
    torch.manual_seed(0)
    model, lr = tiny(), 1e-2
    before, target = {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(2, 4, 8, 8)
    add_adapters(model, input, output, 4)
    parameters = adapter_parameters(model)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("error")                                                  # torch warns of duplicates
        opt = torch.optim.AdamW(parameters, lr=lr, weight_decay=0)
    losses, first = [], [p.detach().clone() for p in parameters]
    for step in range(12):
        opt.zero_grad()
        loss = (model(*inputs()) - target).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
        if step == 0:       # Adam's first step has length lr; stepped twice it would be 2 lr
            moved = max((p - q).abs().max().item() for p, q in zip(parameters, first))
            assert moved == pytest.approx(lr, rel=1e-3)
            assert all(p.grad.abs().max() > 0 for key, p in model.named_parameters() if ".up." in key)
        if step == 1:
            assert all(p.grad.abs().max() > 0 for p in parameters)                      # nothing is starved
    assert losses[-1] < 0.97 * losses[0]
    for key, value in model.state_dict().items():
        assert ".adapter." in key or torch.equal(value, before[key]), key
    assert all(p.grad is None for key, p in model.named_parameters() if ".adapter." not in key)
    enable(model, False)
    base = tiny()
    assert torch.equal(model(*inputs()), base(*inputs()))


# ----------------------------------------------------------------------------------------------------------------------
# save and load

def test_save_and_load(tmp_path):
    model = tiny()
    add_adapters(model, "sa_out", "ffn_in", 3, activation="silu", scale=0.5)
    add_adapters(model, "res_in", "res_in", 2, name="other")
    shake(model)
    remove_adapters(model, "other")
    save_checkpoint(tmp_path / "adapter.pt", adapter_state(model))
    state = load_checkpoint(tmp_path / "adapter.pt")
    assert count(state["adapter"].values()) == count(adapter_parameters(model))
    assert (tmp_path / "adapter.pt").stat().st_size < 120_000                           # nothing of the base in it
    other = tiny()
    load_adapters(other, state, name="dog")
    assert torch.equal(other(*inputs()), model(*inputs()))
    assert adapter_state(other, "dog")["spec"] == state["spec"] == dict(
        input="sa_out", output="ffn_in", rank=3, activation="silu", scale=0.5)
    assert not any(p.requires_grad for k, p in other.named_parameters() if ".adapter." not in k)


def test_the_hash_knows_the_base_and_nothing_else():
    model = tiny()
    there = base_hash(model)
    add_adapters(model, "ca_out", "ffn_in", 2)
    shake(model)
    assert base_hash(model) == there == base_hash(tiny())
    export = tiny()
    export.load_state_dict({k: v.half() for k, v in export.state_dict().items()})       # as sample.py --export
    assert base_hash(export) == there == base_hash(copy.deepcopy(export).half())
    assert base_hash(tiny().to(memory_format=torch.channels_last)) == there
    for name in ("out.2.bias", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"):
        changed = tiny()
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[-1] += 0.01
        assert base_hash(changed) != there, name
    assert base_hash(torch.nn.ModuleDict({"unet": tiny()})) != there                    # names count


def test_loading_where_it_does_not_belong_is_refused_and_changes_nothing():
    model = tiny()
    add_adapters(model, "ca_out", "ffn_in", 3)
    state = adapter_state(model)
    wrong, wide, deep = tiny(), tiny(channel_mult=(1, 3)), tiny(transformer_depth=2)
    with torch.no_grad():
        wrong.out[2].bias[0] += 1
    key = "middle_block.1.transformer_blocks.0.down.weight"
    less = {**state, "adapter": {k: v for k, v in state["adapter"].items() if k != key}}
    cases = [(wrong, state, f"another base .{state['base'][:12]}, this one is {base_hash(wrong)[:12]}"),
             (wide, state, r"12 tensors differ: .*: file \(3, 64\), model \(3, 96\)"),
             (deep, state, r"28 tensors differ: .*blocks.1.down.bias: file has none, model \(3,\)"),
             (tiny(), less, f"1 tensors differ: {key}: file has none, model "),
             (tiny(), {"model": {}, "ema": {}}, "no 'spec' and no 'base' and no 'adapter'"),
             (tiny(), {**state, "spec": {**state["spec"], "output": "sa_in"}}, "sa_in comes before ca_out")]
    for target, bad, words in cases:
        names = list(target.state_dict())
        with pytest.raises(ValueError, match=words):
            load_adapters(target, bad)
        assert list(target.state_dict()) == names and all(p.requires_grad for p in target.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# fold

@pytest.mark.parametrize("placement", FOLDS)
def test_fold_is_the_same_function_and_unfold_gives_every_bit_back(placement):
    model = tiny().double()
    add_adapters(model, *placement.split("-"), 3, activation="identity", scale=0.7)
    shake(model)
    x, t, context = (v.double() if v.is_floating_point() else v for v in inputs())
    before, out = {k: v.clone() for k, v in model.state_dict().items()}, model(x, t, context)
    there = base_hash(model)
    fold(model)
    assert_close(model(x, t, context), out, rtol=1e-9, atol=1e-9)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert len(changed) == 2 * 7 and all(FOLDS[placement] in k for k in changed)
    set_aside = [b.adapter for b in model.modules() if isinstance(b, TransformerBlock)]
    for block in (m for m in model.modules() if isinstance(m, TransformerBlock)):
        block.adapter = None                                                            # it is all in the weights
    assert_close(model(x, t, context), out, rtol=1e-9, atol=1e-9)
    for block, stack in zip((m for m in model.modules() if isinstance(m, TransformerBlock)), set_aside):
        block.adapter = stack
    for action in (fold, base_hash, adapter_state, remove_adapters, enable, lambda m: set_scale(m, 1),
                   lambda m: add_adapters(m, "sa_in", "sa_in", 1, name="b")):
        with pytest.raises(ValueError, match="unfold"):
            action(model)
    unfold(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and base_hash(model) == there
    assert torch.equal(model(x, t, context), out)


def test_fold_is_refused_where_it_would_not_be_exact():
    model = UNet(**TINY)
    for input, output in PAIRS:
        for activation in ("identity", "relu"):
            if f"{input}-{output}" not in FOLDS or activation == "relu":
                add_adapters(model, input, output, 1, activation=activation)
                with pytest.raises(ValueError, match=f"{input}-{output} with {activation} cannot be folded"):
                    fold(model)
                remove_adapters(model)
    with pytest.raises(ValueError, match="no adapter at all"):
        fold(model)
    add_adapters(model, "ca_out", "ffn_in", 1, activation="identity")
    with pytest.raises(ValueError, match="nothing is folded"):
        unfold(model)
    enable(model, False)
    with pytest.raises(ValueError, match="switched on"):
        fold(model)
    enable(model)
    add_adapters(model, "ca_out", "ffn_in", 1, activation="identity", name="second")
    with pytest.raises(ValueError, match="one adapter"):
        fold(model)


# ----------------------------------------------------------------------------------------------------------------------
# LoRA

def test_lora_changes_only_what_reads_the_words_and_folds():
    model = tiny()
    out, names = model(*inputs()), dict(model.named_parameters())
    parameters = add_lora(model, rank=2, scale=0.5)
    blocks = [(k, m) for k, m in model.named_modules() if isinstance(m, TransformerBlock)]
    assert torch.equal(model(*inputs()), out) and len(parameters) == 4 * len(blocks)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    with torch.no_grad():
        for p in parameters:
            p.normal_(std=0.3)
    changed = model(*inputs())
    assert (changed - out).abs().max() > 1e-3
    other = tiny()
    for path, block in blocks:
        for name in ("to_k", "to_v"):
            update = getattr(block.attn2, name).parametrizations.weight[0]
            with torch.no_grad():
                other.get_submodule(path).attn2.get_submodule(name).weight += 0.5 * update.up @ update.down
    assert_close(model(*inputs()), other(*inputs()), **TOLERANCE)
    for _, block in blocks:
        for layer in (block.attn2.to_k, block.attn2.to_v):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert torch.equal(model(*inputs()), out) and dict(model.named_parameters()).keys() == names.keys()


def test_lora_of_a_budget():
    # 32 matrices (C, 768): r (2 * 12480 + 32 * 768)
    assert count(add_lora(sd_v1(), budget=6_400_000)) == round(6_400_000 / (2 * 12_480 + 32 * 768)) * 49_536
    for bad, words in ((dict(), "exactly one"), (dict(rank=1, budget=1), "exactly one"), (dict(budget=9), "too small")):
        with pytest.raises(ValueError, match=words):
            add_lora(UNet(**TINY), **bad)


# ----------------------------------------------------------------------------------------------------------------------
# the probe

def test_probe_is_the_root_mean_square_over_channels():
    xt, t = torch.zeros(2, 4, 3, 5), torch.zeros(2)
    answers = {"a": torch.full((2, 4, 3, 5), 1.0), "b": torch.ones(2, 4, 3, 5)}
    answers["b"][1, :, 2, 4] += torch.tensor([1.0, -1.0, 3.0, 5.0])
    got = prediction_difference(lambda x, t, context: answers[context], xt, t, "a", "b")
    want = torch.zeros(2, 3, 5)
    want[1, 2, 4] = 3.0                                                                 # sqrt((1 + 1 + 9 + 25) / 4)
    assert torch.equal(got, want)
    model, (x, t, context) = tiny(), inputs()
    maps = prediction_difference(model, x, t, context, context.flip(0))
    assert maps.shape == (2, 8, 8) and maps.min() > 0 and not maps.requires_grad
    assert prediction_difference(model, x, t, context, context).max() == 0


# ----------------------------------------------------------------------------------------------------------------------
# ANOVA

def test_anova_matches_the_reference():
    d, g = golden_case("adapter_anova")
    y, labels = g["out_y"], g["out_labels"]
    F, p = anova([y[labels == i].tolist() for i in range(4)])
    assert F == pytest.approx(g["out_F"].item(), rel=1e-12) and p == pytest.approx(g["out_p"].item(), rel=1e-10)


def upper_tail(F, d1, d2):
    return incomplete_beta(d2 / (d2 + d1 * F), d2 / 2, d1 / 2)


@pytest.mark.parametrize("d1,d2,five,one", [(9, 10, 3.02, 4.94), (6, 13, 2.92, 4.62), (3, 12, 3.49, 5.95),
                                            (3, 60, 2.76, 4.13)])
def test_thresholds_of_the_f_table(d1, d2, five, one):
    for F, p in ((five, 0.05), (one, 0.01)):
        assert upper_tail(F + 0.006, d1, d2) < p < upper_tail(F - 0.006, d1, d2)


def test_incomplete_beta_against_closed_forms_and_numeric_integration():
    for x in (1e-9, 0.03, 0.5, 0.77, 0.999):
        assert incomplete_beta(x, 3.5, 1) == pytest.approx(x ** 3.5, rel=1e-12)
        assert incomplete_beta(x, 1, 40) == pytest.approx(-math.expm1(40 * math.log1p(-x)), rel=1e-12)
        assert incomplete_beta(x, 0.5, 0.5) == pytest.approx(2 / math.pi * math.asin(math.sqrt(x)), rel=1e-12)
    for n, k in ((7, 3), (60, 20)):                 # a binomial tail: P(Bin(n, x) >= k) = I_x(k, n - k + 1)
        for x in (0.1, 0.37, 0.9):
            tail = math.fsum(math.comb(n, j) * x ** j * (1 - x) ** (n - j) for j in range(k, n + 1))
            assert incomplete_beta(x, k, n - k + 1) == pytest.approx(tail, rel=1e-11)
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    for a, b in ((2.5, 7.0), (5.0, 4.5), (150.0, 200.0)):
        density = ((a - 1) * u.log() + (b - 1) * (1 - u).log()
                   + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)).exp()
        for x in (0.2, 0.45, 0.6):
            assert incomplete_beta(x, a, b) == pytest.approx(density[u < x].sum().item() / 400_000, abs=1e-8)
    assert incomplete_beta(0, 2, 3) == 0 and incomplete_beta(1, 2, 3) == 1
    assert incomplete_beta(0.5, 1e5, 1e5) == pytest.approx(0.5, rel=1e-9)               # it ends for large arguments
    assert upper_tail(900, 2, 20) == pytest.approx(91 ** -10, rel=1e-10)                # d1 = 2: (1 + 2 F / d2)^(-d2/2)


def test_anova_has_the_right_meaning():
    y = [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]          # by hand: means 2, 4; MSB 6, MSE (2 + 8) / 4; F = t^2, t = 1.549
    F, p = anova(y)
    assert F == pytest.approx(2.4) and 0.19 < p < 0.20
    assert anova([[10 * v + 3 for v in g] for g in y]) == pytest.approx((F, p))
    assert anova([[1.0, 2.0], [1.0, 2.0]]) == (0.0, 1.0)
    assert anova([[1.0, 2.0, 3.0], [9.0]])[0] == pytest.approx(36.75 / 1.0)             # a level with a single run
    g = torch.Generator().manual_seed(0)            # without a difference p is uniform
    ps = [anova(torch.randn(4, 5, generator=g).tolist())[1] for _ in range(2000)]
    for level in (0.05, 0.5, 0.9):
        assert sum(p < level for p in ps) / 2000 == pytest.approx(level, abs=0.035)


@pytest.mark.parametrize("groups,words", [
    ([[0.1] * 3, [0.1] * 4], "the same"), ([[0.1] * 3, [0.7] * 3], "the same"), ([[1.0, 2.0]], r"sizes \[2\]"),
    ([], r"sizes \[\]"), ([[1.0, 2.0], []], r"sizes \[2, 0\]"), ([[1.0], [2.0]], "2 values in 2 groups"),
    ([[1.0, math.nan], [2.0, math.inf]], "2 of 4 values are not finite")])
def test_anova_refuses_what_has_no_f(groups, words):
    with pytest.raises(ValueError, match=words):
        anova(groups)


# ----------------------------------------------------------------------------------------------------------------------
# errors

@pytest.mark.parametrize("bad,words", [
    (dict(), "rank None, budget None: give exactly one"), (dict(rank=1, budget=9), "give exactly one"),
    (dict(rank=0), "rank 0"), (dict(rank=1.5), "rank 1.5"), (dict(rank=2, scale=math.nan), "scale nan"),
    (dict(rank=2, activation="gelu"), "'gelu' is not one of relu, sigmoid"), (dict(rank=2, init="one"), "'one' is not"),
    (dict(rank=2, name="a.b"), "'a.b' cannot name"), (dict(rank=2, name="keys"), "'keys' cannot name"),
    (dict(rank=2, name="training"), "cannot name"), (dict(rank=2, name="taken"), "'taken' already")])
def test_bad_arguments_are_told(bad, words):
    model = UNet(**TINY)
    add_adapters(model, "res_in", "res_in", 1, name="taken")
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=words):
        add_adapters(model, "ca_out", "ffn_in", **bad)
    assert list(model.state_dict()) == names


def test_what_is_not_there_is_told():
    model = UNet(**TINY)
    for action in (adapter_parameters, adapter_state, remove_adapters, enable, lambda m: set_scale(m, 1)):
        with pytest.raises(ValueError, match="there are: none"):
            action(model)
    add_adapters(model, "ca_out", "ffn_in", 1, name="dog")
    with pytest.raises(ValueError, match=r"no adapter 'cat' in this model; there are: \['dog'\]"):
        set_scale(model, 1, "cat")
    with pytest.raises(ValueError, match="scale inf"):
        set_scale(model, math.inf)
    with pytest.raises(ValueError, match="no block of this Linear has a tensor called ca_out"):
        add_adapters(torch.nn.Linear(2, 2), "ca_out", "ffn_in", 1)
