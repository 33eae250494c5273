"""dit.py against official figures, the paper's counts, and plain formulas in float64."""
import json
import math
import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from conftest import GOLDEN, fill_by_recipe, golden_case
from diffusion import guided, timestep_embedding
from dit import BLOCKS, DIT_CONFIGS, DiT, joined, sincos_positions
from models import find_model

TOLERANCE = dict(rtol=1e-4, atol=1e-5)
TINY = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=2,
            num_classes=5)
VARIANTS = [(conditioning, qk_norm) for conditioning in BLOCKS for qk_norm in (False, True)]


@pytest.mark.parametrize("case", ["dit_p2_sigma", "dit_p4_nosigma"])
def test_forward_guidance_and_gradients_match_official(case):
    d, g = golden_case(case)
    model = DiT(**d["config"])
    # official names, order and shapes
    assert [[k, list(v.shape)] for k, v in model.state_dict().items()] == d["params"]
    assert sum(p.numel() for p in model.parameters()) == d["num_params"]
    fill_by_recipe(model, d["computed"]).eval()
    x, t, y = g["in_x"].requires_grad_(), g["in_t"], g["in_y"]
    null = model.null_condition(len(y))
    stages = {}
    model.x_embedder.proj.register_forward_hook(
        lambda m, i, o: stages.update(tokens=o.flatten(2).mT))
    model.blocks[0].register_forward_hook(lambda m, i, o: stages.update(block0=o))
    model.blocks[-1].register_forward_hook(lambda m, i, o: stages.update(block_last=o))
    model.final_layer.register_forward_hook(lambda m, i, o: stages.update(final_tokens=o))
    out = model(x, t, y)
    loss = (out * g["in_probe"]).sum() / out.numel()
    loss.backward()
    for k, v in {"out": out, "loss": loss, "grad_x": x.grad, "pos_embed": model.pos_embed,
                 "t_emb": model.t_embedder(t), "y_emb": model.y_embedder(y),
                 "t_freq": timestep_embedding(t, 256), **stages}.items():
        assert_close(v.detach(), g[f"out_{k}"], **TOLERANCE, msg=lambda m: f"{k}: {m}")
    if "out_t_freq_frac" in g:
        fractions = timestep_embedding(torch.tensor([0, 0.5, 999]), 256)
        assert_close(fractions, g["out_t_freq_frac"], **TOLERANCE)
    norms = [model.get_parameter(name).grad.double().norm() for name in d["grad_params"]]
    np.testing.assert_allclose(norms, g["out_grad_norms"], rtol=1e-3, atol=1e-7)
    with torch.no_grad():
        assert_close(model(x, t, null), g["out_out_null"], **TOLERANCE)
        half, C = len(x) // 2, model.in_channels
        forced = model.drop_labels(y, torch.where(torch.arange(len(y)) % 2 == 1, 0.0, 0.999))
        assert_close(model.y_embedder(forced), g["out_y_emb_forced"], **TOLERANCE)
        for k in (k for k in g if k.startswith("out_cfg_")):
            scale, channels = k.removeprefix("out_cfg_").split("_")
            # official scale 1.0 still runs both halves; ours skips the second: the same result
            ours = guided(model, y[:half], null[:half], float(scale),
                          cfg_channels=3 if channels == "3ch" else None)
            v, ours = g[k][:half], ours(x[:half], t[:half])
            assert_close(ours, v, **TOLERANCE, msg=lambda m: f"{k}: {m}")
            if C == 4:
                assert_close(ours[:, C:], v[:, C:], **TOLERANCE)


def build(name, **overrides):
    with torch.device("meta"):
        return DiT(**{**find_model(name)[1], **overrides})


def macs(model, size):
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        t, y = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        model(torch.zeros(1, model.in_channels, size, size), t, y)
    return counter.get_total_flops() // 2  # one multiply-accumulate = 2 flops


@pytest.mark.parametrize("name", DIT_CONFIGS)
def test_the_twelve_sizes_and_their_macs(name):
    want = json.loads((GOLDEN / "dit_configs.json").read_text())["outputs"][name]
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) == want["params_total"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == want["params_trainable"]
    assert len(model.state_dict()) == want["state_dict_keys"]
    assert macs(model, 32) == want["forward_macs"]


# DiT-XL/2, tables 1 and 4 of the paper
@pytest.mark.parametrize("conditioning,params,gmacs", [
    ("in_context", 449_457_440, 119.35), ("cross_attention", 598_286_624, 137.60),
    ("adaln", 600_747_296, 118.55), ("adaln_zero", 675_129_632, 118.62)])
def test_the_four_blocks_have_the_papers_sizes(conditioning, params, gmacs):
    model = build("DiT-XL/2", conditioning=conditioning)
    assert sum(p.numel() for p in model.parameters()) == params
    assert round(macs(model, 32) / 1e9, 2) == gmacs


def test_more_counts():
    assert sum(p.numel() for p in build("DiT-S/2", num_classes=10).parameters()) == 32_583_200
    assert sum(p.numel() for p in build("DiT-XL/2", learn_sigma=False).parameters()) == 675_111_184
    big = build("DiT-XL/2", input_size=64)
    assert sum(p.numel() for p in big.parameters()) == 676_014_368
    assert round(macs(big, 64) / 1e9, 2) == 524.54
    tiny = build("DiT-96x4/1", input_size=8, in_channels=8)
    assert (tiny.x_embedder.proj.weight.shape[0], len(tiny.blocks), tiny.patch_size) == (96, 4, 1)


@pytest.mark.parametrize("conditioning", BLOCKS)
def test_starts_at_zero_and_learns_in_the_right_order(conditioning):
    torch.manual_seed(0)
    model = DiT(**TINY, conditioning=conditioning)
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0, 5, 500, 999]), torch.tensor([0, 1, 4, 5])
    assert model(x, t, y).abs().max() == 0  # the final layer starts at zero
    c, tokens = torch.randn(4, 32), torch.randn(4, 2, 32)
    h = torch.randn(4, 16, 32)
    identity = torch.equal(model.blocks[1](h, c, tokens), h)
    assert identity == (conditioning == "adaln_zero")  # whatever the condition is
    opt, alive = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), []
    for _ in range(3):
        opt.zero_grad()
        (model(x, t, y) - torch.randn(4, 8, 8, 8)).square().mean().backward()
        alive.append({n for n, p in model.named_parameters()
                      if p.grad is not None and p.grad.abs().max() > 0})
        opt.step()
    assert alive[0] == {"final_layer.linear.weight", "final_layer.linear.bias"}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    if conditioning.startswith("adaln"):
        assert alive[2] == trainable
    else:
        assert alive[2] >= {n for n in trainable if "attn.qkv.weight" in n}
    if conditioning == "adaln_zero":
        assert not any(part in n for n in alive[1]
                       for part in ("attn", "mlp.fc", "embedder.mlp", "y_embedder"))
        assert all(f"blocks.{i}.adaLN_modulation.1.weight" in alive[1] for i in range(3))


def test_initial_spread_is_the_official_one():
    torch.manual_seed(0)
    model = DiT(**DIT_CONFIGS["DiT-S/2"])
    for name, std in {"blocks.3.attn.qkv.weight": .0361, "blocks.3.attn.proj.weight": .0510,
                      "blocks.3.mlp.fc1.weight": .0323, "blocks.3.mlp.fc2.weight": .0323,
                      "x_embedder.proj.weight": .0701, "y_embedder.embedding_table.weight": .02,
                      "t_embedder.mlp.0.weight": .02, "t_embedder.mlp.2.weight": .02}.items():
        assert model.state_dict()[name].std().item() == pytest.approx(std, rel=0.03), name


def test_positions_first_half_is_the_column():
    table = sincos_positions(16, 4)
    assert_close(table[1, 0].item(), np.sin(1.0))  # token 1 = row 0, column 1
    assert_close(table[4, 8].item(), np.sin(1.0))
    assert table[1, 8] == 0 and table[4, 0] == 0


def test_unpatchify_puts_every_patch_in_its_place():
    model = DiT(**{**TINY, "learn_sigma": False})
    tokens = torch.arange(2 * 16 * 16).float().view(2, 16, 16)
    picture = model.unpatchify(tokens)
    for (b, row, col, pr, pc, ch) in [(0, 0, 0, 0, 0, 0), (1, 2, 3, 1, 0, 2), (0, 3, 1, 0, 1, 3),
                                      (1, 3, 3, 1, 1, 3)]:
        value = tokens[b, row * 4 + col, (pr * 2 + pc) * 4 + ch]
        assert picture[b, ch, row * 2 + pr, col * 2 + pc] == value


# ---- every block, with and without qk_norm -------------------------------------------------------

class Plain:
    """The whole network as written in the papers, in float64, one head and one patch at a time.

    Takes every tensor that it uses out of `state`, so that what is left was read by nobody.
    """

    def __init__(self, state, conditioning, qk_norm, heads):
        self.state, self.conditioning = state, conditioning
        self.qk_norm, self.heads = qk_norm, heads
        self.adaptive = conditioning in ("adaln", "adaln_zero")

    def linear(self, name, u):
        return u @ self.state.pop(f"{name}.weight").T + self.state.pop(f"{name}.bias")

    def normed(self, u, kind, weight=1, bias=0):
        u = u - u.mean(-1, keepdim=True) if kind == "layer" else u
        return u / (u.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias

    def norm_layer(self, name, u):
        if self.adaptive:
            return self.normed(u, "layer")
        weight, bias = (self.state.pop(f"{name}.{s}") for s in ("weight", "bias"))
        return self.normed(u, "layer", weight, bias)

    def attend(self, name, q, k, v):
        if self.qk_norm:
            q_weight, k_weight = (self.state.pop(f"{name}.{s}_norm.weight") for s in "qk")
        out, d = torch.zeros_like(q), q.shape[2] // self.heads
        for head in range(self.heads):
            part = slice(head * d, (head + 1) * d)
            a, b = q[..., part], k[..., part]                           # (B, N, d), (B, L, d)
            if self.qk_norm:
                a, b = self.normed(a, "rms", q_weight), self.normed(b, "rms", k_weight)
            out[..., part] = (a @ b.mT / math.sqrt(d)).softmax(-1) @ v[..., part]
        return self.linear(f"{name}.proj", out)

    def mlp(self, name, u):
        u = self.linear(f"{name}.fc1", u)
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        return self.linear(f"{name}.fc2", u)

    def modulation(self, name, c, count):
        c = self.linear(f"{name}.adaLN_modulation.1", c / (1 + (-c).exp()))
        return c[:, None].chunk(count, -1)                              # each (B, 1, D)

    def block(self, name, h, c, tokens):
        shift1, scale1, gate1, shift2, scale2, gate2 = 0, 0, 1, 0, 0, 1
        if self.conditioning == "adaln":
            shift1, scale1, shift2, scale2 = self.modulation(name, c, 4)
        if self.conditioning == "adaln_zero":
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(name, c, 6)
        u = self.norm_layer(f"{name}.norm1", h) * (1 + scale1) + shift1
        qkv = self.linear(f"{name}.attn.qkv", u).chunk(3, -1)
        h = h + gate1 * self.attend(f"{name}.attn", *qkv)
        if self.conditioning == "cross_attention":
            name_cross = f"{name}.cross_attn"
            q = self.linear(f"{name_cross}.q", self.norm_layer(f"{name}.norm_cross", h))
            k, v = self.linear(f"{name_cross}.kv", tokens).chunk(2, -1)
            h = h + self.attend(name_cross, q, k, v)
        u = self.norm_layer(f"{name}.norm2", h) * (1 + scale2) + shift2
        return h + gate2 * self.mlp(f"{name}.mlp", u)

    def condition(self, t, y):
        t = self.linear("t_embedder.mlp.0", timestep_embedding(t, 256).double())
        t = self.linear("t_embedder.mlp.2", t / (1 + (-t).exp()))
        y = self.state.pop("y_embedder.embedding_table.weight")[y]
        return t + y, torch.stack([t, y], 1)

    def __call__(self, x, t, y, p, depth):
        kernel, bias = (self.state.pop(f"x_embedder.proj.{s}") for s in ("weight", "bias"))
        g = x.shape[2] // p
        places = [(slice(i * p, i * p + p), slice(j * p, j * p + p))
                  for i in range(g) for j in range(g)]
        h = torch.stack([x[:, :, rows, columns].flatten(1) @ kernel.flatten(1).T + bias
                         for rows, columns in places], 1) + self.state.pop("pos_embed")
        c, tokens = self.condition(t, y)
        if self.conditioning == "in_context":
            h = torch.cat([h, tokens], 1)
        for i in range(depth):
            h = self.block(f"blocks.{i}", h, c, tokens)
        h = self.norm_layer("final_layer.norm_final", h[:, :g * g])
        if self.adaptive:
            shift, scale = self.modulation("final_layer", c, 2)
            h = h * (1 + scale) + shift
        h = self.linear("final_layer.linear", h)                        # (B, N, p*p*C_out)
        out = x.new_zeros(len(x), h.shape[2] // p ** 2, g * p, g * p)
        for n, (rows, columns) in enumerate(places):
            out[:, :, rows, columns] = h[:, n].view(len(x), p, p, -1).movedim(3, 1)
        return out


def filled(conditioning, qk_norm):
    """A small float64 model with random weights, no two of its sizes equal, and inputs for it."""
    model = DiT(input_size=6, patch_size=2, in_channels=3, hidden_size=20, depth=2, num_heads=2,
                mlp_ratio=1.5, num_classes=5, conditioning=conditioning, qk_norm=qk_norm)
    model = fill_by_recipe(model, ["pos_embed"]).double()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 6, 6, generator=g, dtype=torch.float64)
    return model, x, torch.tensor([0.0, 17.5, 400.0, 999.0]), torch.tensor([3, 0, 5, 4])


@pytest.mark.parametrize("conditioning,qk_norm", VARIANTS)
def test_it_is_the_plain_formula(conditioning, qk_norm):
    model, x, t, y = filled(conditioning, qk_norm)
    state = dict(model.state_dict())
    assert state["blocks.1.mlp.fc1.weight"].shape == (30, 20)           # mlp_ratio 1.5
    want = Plain(state, conditioning, qk_norm, heads=2)(x, t, y, p=2, depth=2)
    assert not state, f"tensors that the formula does not have: {list(state)}"
    # both in float64: only the order of sums differs
    assert_close(model(x, t, y).detach(), want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("conditioning,qk_norm", VARIANTS)
def test_each_input_is_read_rows_stand_alone_and_gradients_arrive(conditioning, qk_norm):
    model, x, t, y = filled(conditioning, qk_norm)
    out = model(x, t, y)
    for other in (model(x.flip(0), t, y), model(x, t.flip(0), y), model(x, t, y.flip(0))):
        assert (other - out).abs().amax((1, 2, 3)).min() > 1e-3             # in every picture
    for i in range(len(x)):
        assert_close(model(x[i:i + 1], t[i:i + 1], y[i:i + 1]), out[i:i + 1], rtol=1e-9, atol=1e-11)
    out.square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name == "pos_embed"), name
        if name != "pos_embed":
            thirds = list(p.grad.chunk(3)) if "qkv" in name else [p.grad]         # of q, of k, of v
            if "qkv.bias" in name and not qk_norm:
                del thirds[1:2]  # softmax ignores k's bias
            assert all(grad.abs().max() > 1e-6 for grad in thirds), name


@pytest.mark.parametrize("conditioning", BLOCKS)
def test_qk_norm_adds_exactly_its_tensors(conditioning):
    default, qk = (set(DiT(**TINY, conditioning=conditioning, qk_norm=on).state_dict())
                   for on in (False, True))
    norms = {n for n in default if "norm" in n}
    per_block = {"in_context": 2, "cross_attention": 3}.get(conditioning)
    assert len(norms) == (0 if per_block is None else 2 * (3 * per_block + 1))  # weight and bias
    attentions = ["attn", "cross_attn"] if conditioning == "cross_attention" else ["attn"]
    assert qk - default == {f"blocks.{i}.{attn}.{which}_norm.weight" for i in range(3)
                            for attn in attentions for which in "qk"}
    model = DiT(**TINY, conditioning=conditioning, qk_norm=True)
    assert model.blocks[0].attn.q_norm.weight.shape == (16,)                # the width of one head
    fill_by_recipe(model).initialize_weights()                              # it sets every tensor
    assert all((p == n.endswith("weight")).all() for n, p in model.named_parameters()
               if "norm" in n)
    y = torch.ones(1, dtype=torch.int64)
    assert model(torch.ones(1, 4, 8, 8), torch.ones(1), y).abs().max() == 0


# ---- labels, training, errors --------------------------------------------------------------------

def test_who_can_guide_and_what_the_null_class_is():
    model = DiT(**TINY)
    assert model.can_guide and model.null_condition(3).tolist() == [5, 5, 5]
    assert not DiT(**TINY, class_dropout_prob=0.0).can_guide
    unconditional = DiT(**{**TINY, "num_classes": 0})
    assert not unconditional.can_guide and unconditional.null_condition(2).tolist() == [0, 0]
    y, draws = torch.tensor([1, 2, 3, 4]), torch.tensor([0.0, 0.0999, 0.1001, 0.9])
    assert model.drop_labels(y, draws).tolist() == [5, 5, 3, 4]


def test_muon_gets_the_matrices_of_the_blocks():
    model = DiT(**TINY, qk_norm=True)
    chosen = {n for n, p in model.named_parameters() if p.dim() > 1 and re.match(model.matrices, n)}
    assert chosen == {f"blocks.{i}.{name}.weight" for i in range(3) for name in (
        "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")}


def test_label_dropout_share():
    model = DiT(**TINY)
    y = torch.zeros(20_000, dtype=torch.int64)
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    dropped = (model.drop_labels(y, draws) == 5).float().mean()
    assert abs(dropped - 0.1) < 0.01  # 4.7 standard deviations
    assert DiT(**TINY, class_dropout_prob=0.0).y_embedder.embedding_table.weight.shape[0] == 5


@pytest.mark.parametrize("conditioning,qk_norm", [("adaln_zero", False), ("in_context", True)])
def test_overfits_one_batch(conditioning, qk_norm):
    torch.manual_seed(0)
    model = DiT(**{**TINY, "learn_sigma": False}, conditioning=conditioning, qk_norm=qk_norm)
    x, t, y = torch.randn(8, 4, 8, 8), torch.randint(1000, (8,)), torch.arange(8) % 5
    target = torch.randn(8, 4, 8, 8)
    opt, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(100):
        loss = (model(x, t, y) - target).square().mean()
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(target.square().mean().item())  # the first prediction is 0
    assert losses[-1] < 0.05 * losses[0], losses[-1]


def test_it_compiles_to_one_graph():
    model = fill_by_recipe(DiT(**TINY, qk_norm=True))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 5])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(x, t, y), model(x, t, y), **TOLERANCE)


def test_sizes_that_do_not_fit_are_named():
    for bad, words in ((dict(input_size=9), "input_size 9 a multiple of patch_size 2"),
                       (dict(num_heads=3), "num_heads 3"),
                       (dict(conditioning="film"), "'film': choose one of in_context, cross_att"),
                       (dict(num_classes=0, class_dropout_prob=0.0), "null class"),
                       (dict(hidden_size=30), "hidden_size 30 one of num_heads 2 and of 4")):
        with pytest.raises(ValueError, match=words):
            DiT(**{**TINY, **bad})
    t, y = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    for shape in ((1, 4, 4, 16), (1, 3, 8, 8), (1, 4, 16, 16)):  # the first has 16 tokens
        with pytest.raises(ValueError, match=r"expects pictures of shape \(4, 8, 8\), got \(\d"):
            DiT(**TINY)(torch.zeros(shape), t, y)


def test_of_a_caption_adaln_reads_the_time_alone_and_attention_reads_all():
    t, one, words = torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 5, 8)
    c, tokens = joined(t, one)                                  # a class
    assert torch.equal(c, t + one) and torch.equal(tokens, torch.stack([t, one], 1))
    c, tokens = joined(t, words)
    assert torch.equal(c, t) and torch.equal(tokens, torch.cat([t[:, None], words], 1))
