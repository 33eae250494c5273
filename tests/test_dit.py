"""dit.py against the official figures, the paper's counts, and what adaLN-Zero promises at the start."""
import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from conftest import GOLDEN, fill_by_recipe, golden_case
from diffusion import guided, timestep_embedding
from dit import BLOCKS, DIT_CONFIGS, DiT, dit_config, sincos_positions

TOLERANCE = dict(rtol=1e-4, atol=1e-5)
TINY = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=2, num_classes=5)


@pytest.mark.parametrize("case", ["dit_p2_sigma", "dit_p4_nosigma"])
def test_forward_guidance_and_gradients_match_official(case):
    d, g = golden_case(case)
    model = DiT(**d["config"])
    own = [[k, list(v.shape)] for k, v in model.state_dict().items()]
    assert own == d["params"]                                               # official names, order and shapes
    assert sum(p.numel() for p in model.parameters()) == d["num_params"]
    fill_by_recipe(model, d["computed"]).eval()
    x, t, y = g["in_x"].requires_grad_(), g["in_t"], g["in_y"]
    null = torch.full_like(y, d["config"]["num_classes"])
    stages = {}
    model.x_embedder.register_forward_hook(lambda m, i, o: stages.update(tokens=o))
    model.blocks[0].register_forward_hook(lambda m, i, o: stages.update(block0=o))
    model.blocks[-1].register_forward_hook(lambda m, i, o: stages.update(block_last=o))
    model.final_layer.register_forward_hook(lambda m, i, o: stages.update(final_tokens=o))
    out = model(x, t, y)
    loss = (out * g["in_probe"]).sum() / out.numel()
    loss.backward()
    for k, v in {"out": out, "loss": loss, "grad_x": x.grad, "pos_embed": model.pos_embed, "t_emb": model.t_embedder(t),
                 "y_emb": model.y_embedder(y), "t_freq": timestep_embedding(t, 256), **stages}.items():
        assert_close(v.detach(), g[f"out_{k}"], **TOLERANCE, msg=lambda m: f"{k}: {m}")
    if "out_t_freq_frac" in g:
        assert_close(timestep_embedding(torch.tensor([0, 0.5, 999]), 256), g["out_t_freq_frac"], **TOLERANCE)
    params = dict(model.named_parameters())
    norms = [params[name].grad.double().norm() for name in d["grad_params"]]
    np.testing.assert_allclose(norms, g["out_grad_norms"], rtol=1e-3, atol=1e-7)
    with torch.no_grad():
        assert_close(model(x, t, null), g["out_out_null"], **TOLERANCE)
        half, C = len(x) // 2, model.in_channels
        forced = model.drop_labels(y, torch.where(torch.arange(len(y)) % 2 == 1, 0.0, 0.999))
        assert_close(model.y_embedder(forced), g["out_y_emb_forced"], **TOLERANCE)
        for k, v in g.items():
            if k.startswith("out_cfg_"):
                scale, channels = k.removeprefix("out_cfg_").split("_")
                # official scale 1.0 still runs both halves; ours skips the second: no change in the guided one
                ours = guided(model, y[:half], null[:half], float(scale), cfg_channels=3 if channels == "3ch" else None)
                assert_close(ours(x[:half], t[:half], 0.5), v[:half], **TOLERANCE, msg=lambda m: f"{k}: {m}")
                if C == 4:
                    assert_close(ours(x[:half], t[:half], 0.5)[:, C:], v[:half, C:], **TOLERANCE)


def build(name, **overrides):
    with torch.device("meta"):
        return DiT(**{**dit_config(name), **overrides})


def macs(model, size):
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        t, y = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        model(torch.zeros(1, model.in_channels, size, size), t, y)
    return counter.get_total_flops() // 2                                   # one multiply-accumulate = 2 flops


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
    ("in_context", 449_457_440, 119.35), ("cross_attention", 598_286_624, 137.60), ("adaln", 600_747_296, 118.55),
    ("adaln_zero", 675_129_632, 118.62)])
def test_the_four_blocks_have_the_papers_sizes(conditioning, params, gmacs):
    model = build("DiT-XL/2", conditioning=conditioning)
    assert sum(p.numel() for p in model.parameters()) == params
    assert round(macs(model, 32) / 1e9, 2) == gmacs


def test_more_counts():
    assert sum(p.numel() for p in build("DiT-S/2", num_classes=10).parameters()) == 32_583_200
    assert sum(p.numel() for p in build("DiT-XL/2", learn_sigma=False).parameters()) == 675_111_184
    big = build("DiT-XL/2", input_size=64)
    assert sum(p.numel() for p in big.parameters()) == 676_014_368 and round(macs(big, 64) / 1e9, 2) == 524.54
    tiny = build("DiT-96x4/1", input_size=8, in_channels=8)
    assert (tiny.x_embedder.proj.weight.shape[0], len(tiny.blocks), tiny.patch_size) == (96, 4, 1)


@pytest.mark.parametrize("conditioning", BLOCKS)
def test_starts_at_zero_and_learns_in_the_right_order(conditioning):
    torch.manual_seed(0)
    model = DiT(**TINY, conditioning=conditioning)
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0, 5, 500, 999]), torch.tensor([0, 1, 4, 5])
    assert model(x, t, y).abs().max() == 0                                  # the final layer starts at zero
    c, tokens = torch.randn(4, 32), torch.randn(4, 2, 32)
    h = torch.randn(4, 16, 32)
    identity = torch.equal(model.blocks[1](h, c, tokens), h)
    assert identity == (conditioning == "adaln_zero")                       # whatever the condition is
    opt, alive = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), []
    for _ in range(3):
        opt.zero_grad()
        (model(x, t, y) - torch.randn(4, 8, 8, 8)).square().mean().backward()
        alive.append({n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0})
        opt.step()
    assert alive[0] == {"final_layer.linear.weight", "final_layer.linear.bias"}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    if conditioning.startswith("adaln"):
        assert alive[2] == trainable
    else:
        assert alive[2] >= {n for n in trainable if "attn.qkv.weight" in n}
    if conditioning == "adaln_zero":
        assert not any("attn" in n or "mlp.fc" in n or "embedder.mlp" in n or "y_embedder" in n for n in alive[1])
        assert all(f"blocks.{i}.adaLN_modulation.1.weight" in alive[1] for i in range(3))


def test_initial_spread_is_the_official_one():
    torch.manual_seed(0)
    model = DiT(**dit_config("DiT-S/2"))
    for name, std in {"blocks.3.attn.qkv.weight": .0361, "blocks.3.attn.proj.weight": .0510,
                      "blocks.3.mlp.fc1.weight": .0323, "blocks.3.mlp.fc2.weight": .0323,
                      "x_embedder.proj.weight": .0701, "y_embedder.embedding_table.weight": .02,
                      "t_embedder.mlp.0.weight": .02, "t_embedder.mlp.2.weight": .02}.items():
        assert model.state_dict()[name].std().item() == pytest.approx(std, rel=0.03), name


def test_positions_first_half_is_the_column():
    table = sincos_positions(16, 4)
    assert_close(table[1, 0].item(), np.sin(1.0))                           # token 1 = row 0, column 1
    assert_close(table[4, 8].item(), np.sin(1.0))
    assert table[1, 8] == 0 and table[4, 0] == 0
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(18, 4)


def test_unpatchify_puts_every_patch_in_its_place():
    model = DiT(**{**TINY, "learn_sigma": False})
    tokens = torch.arange(2 * 16 * 16).float().view(2, 16, 16)
    picture = model.unpatchify(tokens)
    for (b, row, col, pr, pc, ch) in [(0, 0, 0, 0, 0, 0), (1, 2, 3, 1, 0, 2), (0, 3, 1, 0, 1, 3), (1, 3, 3, 1, 1, 3)]:
        assert picture[b, ch, row * 2 + pr, col * 2 + pc] == tokens[b, row * 4 + col, (pr * 2 + pc) * 4 + ch]


@pytest.mark.parametrize("conditioning", BLOCKS)
def test_every_condition_is_read(conditioning):
    torch.manual_seed(0)
    model = fill_by_recipe(DiT(**TINY, conditioning=conditioning), ["pos_embed"])
    x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([100]), torch.tensor([1])
    out = model(x, t, y)
    assert (model(x, t + 300, y) - out).abs().max() > 1e-3 and (model(x, t, y + 1) - out).abs().max() > 1e-3


def test_label_dropout_share():
    model = DiT(**TINY)
    y = torch.zeros(20_000, dtype=torch.int64)
    dropped = (model.drop_labels(y, torch.rand(20_000, generator=torch.Generator().manual_seed(0))) == 5).float().mean()
    assert abs(dropped - 0.1) < 0.01
    assert DiT(**TINY, class_dropout_prob=0.0).y_embedder.embedding_table.weight.shape[0] == 5


@pytest.mark.parametrize("conditioning", ["adaln_zero", "in_context"])
def test_overfits_one_batch(conditioning):
    torch.manual_seed(0)
    model = DiT(**{**TINY, "learn_sigma": False}, conditioning=conditioning)
    x, t, y, target = torch.randn(8, 4, 8, 8), torch.randint(1000, (8,)), torch.arange(8) % 5, torch.randn(8, 4, 8, 8)
    opt, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(300):
        loss = (model(x, t, y) - target).square().mean()
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0], losses[-1]


def test_sizes_that_do_not_fit_are_named():
    for bad, words in ((dict(input_size=9), "9 is not divisible by patch size 2"), (dict(num_heads=3), "num_heads 3"),
                       (dict(conditioning="film"), "choose one of"),
                       (dict(num_classes=0, class_dropout_prob=0.0), "null class"),
                       (dict(hidden_size=30, num_heads=2), "multiple of 4")):
        with pytest.raises(ValueError, match=words):
            DiT(**{**TINY, **bad})
    for name in ("DiT-S/3", "DiT-50x2/2", "dit", "DiT-96x0/1"):
        with pytest.raises(ValueError, match="choose one of"):
            dit_config(name)
