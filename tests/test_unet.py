"""unet.py against official figures and sizes, its initial weights, and the taps for adapters."""
import copy
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from conftest import fill_by_recipe, golden_case
from diffusion import timestep_embedding
from studies.attention import word_attention
from unet import (UNET_CONFIGS, CrossAttention, ResBlock, SpatialTransformer, Tapped,
                  TransformerBlock, UNet)

TOLERANCE = dict(rtol=1e-4, atol=2e-5)
TINY = dict(in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
            attention_resolutions=(1, 2), num_heads=2, context_dim=24)


class Recorder(nn.Module):
    """An adapter that changes nothing and remembers every tensor it is shown."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def forward(self, name, x):
        assert name not in self.seen
        self.seen[name] = x
        return x


class Edit(nn.Module):
    """An adapter that adds a constant at one place."""

    def __init__(self, place, amount=0.5):
        super().__init__()
        self.place, self.amount = place, amount

    def forward(self, name, x):
        return x + self.amount if name == self.place else x


def inputs(batch=2, size=8, channels=4, tokens=5, width=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, size, size, generator=g)
    t = torch.randint(1000, (batch,), generator=g)
    return x, t, torch.randn(batch, tokens, width, generator=g)


def official(model, d):
    """The model with the golden weights; its names, order and shapes must be the official ones."""
    assert [[k, list(v.shape)] for k, v in model.state_dict().items()] == d["params"]
    return fill_by_recipe(model).eval()


# ---- official figures ----------------------------------------------------------------------------

@pytest.mark.parametrize("case", ["unet_tiny", "unet_deep"])
def test_whole_model_matches_official(case):
    d, g = golden_case(case)
    # official arguments that are off, or 1, or never used
    foreign = ("image_size", "dropout", "use_spatial_transformer", "use_checkpoint", "legacy",
               "transformer_depth", "num_head_channels")
    sizes = {k: v for k, v in d["config"].items() if k not in foreign}
    heads, width = sizes.pop("num_heads"), d["config"]["num_head_channels"]
    model = official(UNet(**sizes, num_heads=max(heads, 1)), d)
    for attention in [m for m in model.modules() if isinstance(m, CrossAttention)]:
        # unet_deep has -1: as many heads of `width` channels as there are, on the same weights
        attention.num_heads = heads if heads > 0 else attention.to_q.out_features // width
    stages = {}
    for name, module in model.named_modules():
        if re.fullmatch(r"(time_embed|middle_block|(in|out)put_blocks\.\d+)", name):
            module.register_forward_hook(lambda m, i, o, name=name: stages.update({name: o}))
    stages["out"] = model(g["in_x"], g["in_t"], g["in_context"])
    compared = [k for k in g if k.startswith("out_")]
    assert len(compared) == (11 if case == "unet_tiny" else 6)
    for k in compared:
        ours = stages[k.removeprefix("out_")].detach()
        assert_close(ours, g[k], **TOLERANCE, msg=lambda m: f"{k}: {m}")


@pytest.mark.parametrize("case,build,second,out", [
    ("unet_resblock_same", ResBlock, "emb", "out"),
    ("unet_resblock_change", ResBlock, "emb", "out"),
    ("unet_cross_attention", CrossAttention, "context", "cross"),
    ("unet_spatial_transformer", SpatialTransformer, "context", "out")])
def test_parts_match_official(case, build, second, out):
    d, g = golden_case(case)
    ours = {"heads": "num_heads", "n_heads": "num_heads", "dim_head": "head_dim",
            "d_head": "head_dim", "in_channels": "channels"}
    arguments = {ours.get(k, k): v for k, v in d["config"].items() if k not in ("dropout", "depth")}
    part = official(build(**arguments), d)
    assert_close(part(g["in_x"], g[f"in_{second}"]).detach(), g[f"out_{out}"], **TOLERANCE)


def test_taps_of_the_transformer_block_are_the_papers_tensors():
    d, g = golden_case("unet_transformer_block")
    c = d["config"]
    block = official(TransformerBlock(c["dim"], c["n_heads"], c["d_head"], c["context_dim"]), d)
    plain = block(g["in_x"], g["in_context"])
    block.adapter = recorder = Recorder()
    assert torch.equal(block(g["in_x"], g["in_context"]), plain)
    assert list(recorder.seen) == list(block.taps)  # each once, in order of time
    assert {name: x.shape[-1] for name, x in recorder.seen.items()} == block.taps
    assert torch.equal(recorder.seen["sa_in"], g["in_x"])
    assert torch.equal(recorder.seen["ca_c"], g["in_context"])
    for name in ("SA_out", "CA_in", "CA_out", "FFN_in", "FFN_out", "Trans_out"):
        seen = recorder.seen[name.lower()].detach()
        assert_close(seen, g[f"out_{name}"], **TOLERANCE, msg=lambda m: f"{name}: {m}")


def test_timestep_embedding_is_the_official_one():
    d, g = golden_case("unet_sd_schedule")
    t, dim = torch.tensor(d["config"]["temb_t"]), d["config"]["temb_dim"]
    assert_close(timestep_embedding(t, dim), g["out_temb"], **TOLERANCE)


# ---- sizes ---------------------------------------------------------------------------------------

def build(name, **overrides):
    with torch.device("meta"):
        return UNet(**{**UNET_CONFIGS[name], **overrides})


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_stable_diffusion_has_its_size():
    model = build("SD-v1")
    assert count(model) == 859_520_964 and len(model.state_dict()) == 686
    with torch.device("meta"):
        assert str(UNet()) == str(model)  # the defaults are this model
    blocks = [m for m in model.modules() if isinstance(m, TransformerBlock)]
    assert len(blocks) == 16 and sum(isinstance(m, ResBlock) for m in model.modules()) == 22
    assert sum(block.taps["sa_in"] for block in blocks) == 12_480
    assert {block.taps["ca_c"] for block in blocks} == {768}
    assert count(model.time_embed) == 2_050_560 and count(model.out) == 12_164  # the released model
    for part, millions in (                                             # the released model
            ("input_blocks.1", 4.80), ("input_blocks.4", 15.75), ("input_blocks.7", 59.35),
            ("input_blocks.10", 31.14), ("middle_block", 97.04), ("output_blocks.0", 49.16),
            ("output_blocks.3", 83.93), ("output_blocks.6", 25.99), ("output_blocks.9", 6.95)):
        assert round(count(model.get_submodule(part)) / 1e6, 2) == millions, part
    for up in ("2.1", "5.2", "8.2"):
        assert model.get_submodule(f"output_blocks.{up}.conv").kernel_size == (3, 3)


@pytest.mark.parametrize("name,params,macs", [
    ("unet-tiny", 2_765_540, 73_539_584), ("unet-small", 4_192_900, 99_745_792)])
def test_small_sizes_are_as_told(name, params, macs):
    model = build(name)
    assert count(model) == params
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 8, 64))
    assert counter.get_total_flops() // 2 == macs  # one picture of 8x8x4, 8 words


@pytest.mark.parametrize("overrides,millions", [  # the released model
    (dict(model_channels=32), 1.69), (dict(), 6.60), (dict(num_res_blocks=2), 9.89),
    (dict(channel_mult=(1, 2, 4)), 16.30), (dict(model_channels=96), 14.74)])
def test_counts_of_the_fact_sheet(overrides, millions):
    sizes = dict(in_channels=3, out_channels=3, channel_mult=(1, 2, 2),
                 attention_resolutions=(2, 4))
    assert round(count(build("unet-small", **{**sizes, **overrides})) / 1e6, 2) == millions


def test_muon_gets_the_matrices_of_the_trunk():
    model = build("unet-tiny")
    chosen = {n for n, p in model.named_parameters() if p.dim() >= 2 and re.match(UNet.matrices, n)}
    rest = {n for n, p in model.named_parameters() if p.dim() >= 2} - chosen
    assert rest == {"time_embed.0.weight", "time_embed.2.weight", "input_blocks.0.0.weight",
                    "out.2.weight"}
    assert "middle_block.1.transformer_blocks.0.attn2.to_k.weight" in chosen


# ---- the start -----------------------------------------------------------------------------------

ZERO = r"(.*\.)?(out_layers\.3|proj_out)\.(weight|bias)|out\.2\.(weight|bias)"


def test_a_fresh_unet_answers_zero_and_exactly_these_tensors_are_zero():
    torch.manual_seed(0)
    model = UNet(**TINY)
    assert model(*inputs()).abs().max() == 0
    for name, p in model.named_parameters():
        norm_bias = re.search(r"norm\d?\.bias$|(in_layers|out_layers|^out)\.0\.bias$", name)
        assert (p.abs().max() == 0) == bool(norm_bias or re.fullmatch(ZERO, name)), name
    h, emb, context = torch.randn(2, 64, 4, 4), torch.randn(2, 128), torch.randn(2, 5, 24)
    assert torch.equal(model.middle_block(h, emb, context), h)  # all begin as the identity
    weight = model.middle_block[0].in_layers[2].weight
    assert weight.abs().max() <= (64 * 9) ** -0.5  # uniform: std = bound / sqrt(3)
    assert weight.std().item() == pytest.approx((64 * 9 * 3) ** -0.5, rel=0.03)
    fill_by_recipe(model).initialize_weights()
    assert model(*inputs()).abs().max() == 0  # it initialises everything


def test_gradients_reach_every_parameter_within_three_steps():
    torch.manual_seed(0)
    model = UNet(**{**TINY, "model_channels": 64})
    opt, alive = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        opt.zero_grad()
        (model(*inputs()) - torch.randn(2, 4, 8, 8)).square().mean().backward()
        alive.append({n for n, p in model.named_parameters() if p.grad.abs().max() > 0})
        opt.step()
    assert alive[0] == {"out.2.weight", "out.2.bias"}
    assert {n for n, _ in model.named_parameters() if re.fullmatch(ZERO, n)} <= alive[1]
    assert alive[2] == {n for n, _ in model.named_parameters()}


def test_overfits_eight_coarse_images():
    torch.manual_seed(0)
    model = UNet(**{**TINY, "in_channels": 3, "out_channels": 3})
    x0 = F.interpolate(2 * torch.rand(8, 3, 2, 2) - 1, scale_factor=4)  # (8, 3, 8, 8)
    context, alpha_bar = torch.randn(8, 2, 24), torch.linspace(0.9999, 0.01, 1000)
    opt, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(60):
        t, eps = torch.randint(1000, (8,)), torch.randn(8, 3, 8, 8)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        loss = (model(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, context) - eps).square().mean()
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(loss.item())
    last = sum(losses[-30:]) / 30       # predicting 0 gives 1.0; of three seeds 0.164 to 0.175
    assert last < 0.25, last


# ---- what is read, and where ---------------------------------------------------------------------

def test_every_condition_is_read_and_every_word_counts():
    model = fill_by_recipe(UNet(**{**TINY, "model_channels": 64}))
    x, t, context = inputs(batch=1)
    out = model(x, t, context)
    assert (model(x, (t + 300) % 1000, context) - out).abs().max() > 1e-3
    assert (model(x, t + 0.5, context) - out).abs().max() > 0
    for word in range(context.shape[1]):
        other = context.clone()
        other[:, word] += 1
        assert (model(x, t, other) - out).abs().max() > 1e-4, word
    shuffled = context[:, [3, 1, 0, 4, 2]]                              # words have no order here
    assert_close(model(x, t, shuffled), out, **TOLERANCE)


def test_one_word_makes_cross_attention_blind_to_the_picture():
    torch.manual_seed(0)
    attn = CrossAttention(32, 24, 4, 8)
    x, word, words = torch.randn(2, 9, 32), torch.randn(2, 1, 24), torch.randn(2, 2, 24)
    out = attn(x, word)
    assert_close(out, attn.to_out(attn.to_v(word)).expand(2, 9, 32))  # softmax over one key is 1
    assert_close(attn(x + 1, word), out)
    assert (attn(x + 1, words) - attn(x, words)).abs().max() > 1e-3


def test_groups_of_one_channel_forget_the_timestep():
    """GroupNorm with one channel per group removes a constant per channel (file docstring, 4)."""
    torch.manual_seed(0)
    x, emb = torch.randn(2, 64, 8, 8), torch.randn(2, 128)
    for width, forgets in ((32, True), (64, False)):
        block = ResBlock(64, 128, width)
        assert torch.allclose(block(x, emb), block(x, 2 * emb), atol=1e-5) == forgets


def test_a_picture_does_not_depend_on_its_batch_and_sizes_may_differ():
    model = fill_by_recipe(UNet(**TINY))
    x, t, context = inputs(batch=3)
    assert_close(model(x[1:2], t[1:2], context[1:2]), model(x, t, context)[1:2], **TOLERANCE)
    assert model(torch.randn(1, 4, 6, 10), t[:1], context[:1]).shape == (1, 4, 6, 10)


def test_gradients_reach_every_parameter_at_once_when_none_is_zero():
    model = fill_by_recipe(UNet(**{**TINY, "norm_groups": 8})).double()
    x, t, context = inputs()
    model(x.double(), t, context.double()).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 1e-6, name


def test_every_norm_has_the_groups_and_the_eps_that_are_told():
    model = UNet(**TINY, norm_groups=8)
    groups = {n: m for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)}
    assert len(groups) == 7 + 2 * 8 + 1                 # transformers, ResBlocks, the last layer
    for name, norm in groups.items():
        assert norm.num_groups == 8, name
        assert norm.eps == (1e-6 if name.endswith(".norm") else 1e-5), name
    assert model.out[0].num_channels == 32 and UNet(**TINY).out[0].num_groups == 32
    wide = UNet(**{**TINY, "channel_mult": (2, 2), "num_heads": 64})  # not of model_channels 32
    assert fill_by_recipe(wide)(*inputs()).shape == (2, 4, 8, 8)


def test_memory_format_changes_nothing():
    model = fill_by_recipe(UNet(**TINY))
    x, t, context = inputs()
    out = model(x, t, context)
    model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert_close(model(x, t, context), out, **TOLERANCE)


def test_it_compiles_to_one_graph_with_and_without_an_adapter():
    # one level: the middle block holds the only transformer
    model = fill_by_recipe(UNet(**{**TINY, "channel_mult": (1,), "attention_resolutions": ()}))
    for adapter in (None, Edit("ca_out")):
        model.middle_block[1].transformer_blocks[0].adapter = adapter
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_close(compiled(*inputs()), model(*inputs()), **TOLERANCE)


# ---- taps ----------------------------------------------------------------------------------------

def test_every_tap_can_be_edited_and_an_idle_adapter_costs_no_bit():
    model = fill_by_recipe(UNet(**TINY))
    out, names = model(*inputs()), list(model.state_dict())
    tapped = [m for m in model.modules() if isinstance(m, Tapped)]
    assert len(tapped) == 7 + 8  # transformer blocks, ResBlocks
    for block in tapped:
        block.adapter = Recorder()
    assert torch.equal(model(*inputs()), out) and list(model.state_dict()) == names
    assert all(list(block.adapter.seen) == list(block.taps) for block in tapped)
    for block in tapped:
        block.adapter = None
    for place in (*TransformerBlock(32, 2, 16, 24).taps, "res_in", "res_out"):
        block = model.middle_block[0]
        if not place.startswith("res"):
            block = model.middle_block[1].transformer_blocks[0]
        block.adapter = Edit(place)
        assert (model(*inputs()) - out).abs().max() > 1e-5, place
        block.adapter = None
    assert torch.equal(model(*inputs()), out)


@pytest.mark.parametrize("output,stream", [
    ("sa_out", "ca_in"), ("ca_out", "ffn_in"), ("ffn_out", "trans_out")])
def test_adding_to_an_output_is_adding_to_the_stream_behind_it(output, stream):
    torch.manual_seed(0)
    block, results = TransformerBlock(32, 4, 8, 20), []
    x, context = torch.randn(2, 10, 32), torch.randn(2, 6, 20)
    for place in (output, stream):
        block.adapter = Edit(place)
        results.append(block(x, context))
    assert_close(*results)


def test_taps_are_the_formulas_of_their_docstrings():
    torch.manual_seed(0)
    block = fill_by_recipe(TransformerBlock(32, 4, 8, 20)).double()
    x, context = torch.randn(2, 10, 32).double(), torch.randn(2, 6, 20).double()
    block.adapter = recorder = Recorder()
    out, s = block(x, context), recorder.seen
    h = block.norm1(x)
    for name, want in {
            "sa_in": x, "sa_out": block.attn1(h, h), "ca_in": s["sa_out"] + x, "ca_c": context,
            "ca_out": block.attn2(block.norm2(s["ca_in"]), context),
            "ffn_in": s["ca_out"] + s["ca_in"], "ffn_out": block.ff(block.norm3(s["ffn_in"])),
            "trans_out": s["ffn_out"] + s["ffn_in"]}.items():
        assert_close(s[name], want, rtol=1e-12, atol=1e-12, msg=lambda m: f"{name}: {m}")
    assert torch.equal(out, s["trans_out"])
    res, x, emb = fill_by_recipe(ResBlock(32, 16, 64)), torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    res.adapter = recorder = Recorder()
    assert torch.equal(res(x, emb), recorder.seen["res_out"])
    assert recorder.seen["res_in"] is x and res.taps == {"res_in": 32, "res_out": 64}


@pytest.mark.parametrize("place", ["sa_in", "ca_c"])
def test_an_edit_of_an_input_is_that_input_edited_for_this_block_alone(place):
    torch.manual_seed(0)
    block = fill_by_recipe(TransformerBlock(32, 4, 8, 20))
    x, context = torch.randn(2, 10, 32), torch.randn(2, 6, 20)
    want = block(x + 0.5, context) if place == "sa_in" else block(x, context + 0.5)
    block.adapter = Edit(place)
    assert_close(block(x, context), want, **TOLERANCE)


def test_an_adapter_is_a_part_of_the_model():
    model = UNet(**TINY)
    block = model.middle_block[1].transformer_blocks[0]
    block.adapter = Edit("ca_out")
    block.adapter.up = nn.Linear(2, 2)
    assert "middle_block.1.transformer_blocks.0.adapter.up.weight" in model.state_dict()
    twin = copy.deepcopy(model)  # as the EMA copy is made
    twin.middle_block[1].transformer_blocks[0].adapter.amount = 2.0
    assert block.adapter.amount == 0.5
    with pytest.raises(TypeError):
        model.middle_block[0].adapter = lambda name, x: x  # would not move, save, or copy


# ---- attention of each word ----------------------------------------------------------------------

def test_word_attention_weighs_the_values_as_the_layer_does():
    """One layer, its map 4 x 2: weights times values, mean over heads, is what the layer makes."""
    torch.manual_seed(0)
    model = UNet(**{**TINY, "attention_resolutions": ()})
    layer, made = model.middle_block[1].transformer_blocks[0].attn2, []
    with torch.no_grad():
        layer.to_q.weight.mul_(30)                                      # far from even weights
        layer.to_v.weight.copy_(layer.to_v.weight[:32].repeat(2, 1))    # both heads: equal values
    layer.to_out.register_forward_hook(lambda module, inputs, out: made.append(inputs[0]))
    x, t, context = inputs()
    x = x[..., :4]                                                      # (2, 4, 8, 4)
    maps = word_attention(model, x, t, context)
    assert maps.shape == (2, 5, 8, 4) and not maps.requires_grad
    assert maps.amax() > 0.5                                            # even: 0.2
    assert_close(maps.sum(1), torch.ones(2, 8, 4))
    mean = made[0].unflatten(2, (2, 32)).mean(2).mT.unflatten(2, (4, 2))        # (2, 32, 4, 2)
    mixed = torch.einsum("blhw,bld->bdhw", maps, layer.to_v(context)[..., :32])
    assert_close(mixed, F.interpolate(mean, (8, 4), mode="bilinear"), rtol=1e-4, atol=1e-5)


def test_word_attention_is_a_mean_over_layers_and_leaves_nothing_behind():
    torch.manual_seed(0)
    model, given = UNet(**TINY), inputs()           # new transformers add 0: no layer sees another
    layers = [m for name, m in model.named_modules() if name.endswith("attn2")]
    with torch.no_grad():
        kept = [layer.to_q.weight.mul_(30).clone() for layer in layers]
        whole, alone = word_attention(model, *given), []
        for one in layers:
            for layer, weight in zip(layers, kept):
                layer.to_q.weight.copy_(weight if layer is one else 0 * weight)         # even: 1/5
            alone.append(word_attention(model, *given) - 0.2)
    assert len(layers) == 7 and all(maps.abs().max() > 0.01 for maps in alone)
    assert_close(whole, 0.2 + sum(alone))
    with pytest.raises(ValueError, match="context has shape"):
        word_attention(model, *given[:2], given[2][0])
    assert not any(module._forward_hooks for module in model.modules())


# ---- errors --------------------------------------------------------------------------------------

def test_sizes_that_do_not_fit_are_named():
    for bad, words in (
            (dict(model_channels=48), "divisible by num_groups"),
            (dict(channel_mult=(1, 1.5)), "divisible by num_groups"),
            (dict(norm_groups=12), "divisible by num_groups"),
            (dict(num_heads=5), "32 channels are not a multiple of num_heads 5"),
            (dict(attention_resolutions=(8, 4)), r"\(8, 4\) must be .* factors out of \[1, 2\]")):
        with pytest.raises(ValueError, match=words):
            UNet(**{**TINY, **bad})
    model = UNet(**{**TINY, "channel_mult": (1, 1, 1)})
    x, t, context = inputs()
    with pytest.raises(ValueError, match=r"sides \(6, 8\) must be multiples of 4"):
        model(x[:, :, :6], t, context)
    with pytest.raises(ValueError, match=r"sides \(8, 6\) must be multiples of 4"):
        model(x[..., :6], t, context)
    with pytest.raises(ValueError, match=r"\(2, 5, 20\), expected \(batch, tokens, 24\)"):
        model(x, t, context[:, :, :20])
    with pytest.raises(ValueError, match=r"\(2, 24\), expected"):
        model(x, t, context[:, 0])
