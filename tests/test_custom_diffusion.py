"""custom_diffusion.py: official figures, brute force, promises of merge, file and word."""
import copy
import random
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import custom_diffusion as cd
import data
from checkpoint import save_checkpoint
from conftest import ROOT, fill_by_recipe, golden_case
from diffusion import GaussianDiffusion, RectifiedFlow
from studies import custom_merge
from studies.custom_concepts import weight_change
from text import TextConditional, TextEncoder, WordTokenizer
from unet import UNET_CONFIGS, CrossAttention, UNet

WORDS = ["a", "blue", "cat", "dog", "green", "of", "photo", "pot", "rarely", "red", "sky", "tree",
         "wooden"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def filled(names_and_shapes, prefix=""):
    """{name: tensor} by the golden recipe, whose seed is prefix + name."""
    holder = type("Holder", (), {})()
    holder.state = {prefix + name: torch.empty(*shape) for name, shape in names_and_shapes}
    holder.state_dict, holder.load_state_dict = lambda: holder.state, lambda state, strict: None
    fill_by_recipe(holder)
    return {name: holder.state[prefix + name] for name, _ in names_and_shapes}


def tiny(seed=0):
    """A text-to-image model, all weights N(0, 0.04), and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = WordTokenizer(WORDS, reserved=4, max_length=10)
    sizes = dict(model_channels=32, channel_mult=(1, 2), context_dim=24)
    unet = UNet(**{**UNET_CONFIGS["unet-tiny"], **sizes, "in_channels": 3, "out_channels": 3})
    text = TextEncoder(tokenizer.vocab_size, tokenizer.max_length, hidden_size=24)
    model = TextConditional(unet, text, tokenizer([""])[0], 0.1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model, tokenizer


# --------------------------------------------------------------------------------------------------
# what is trained

@pytest.mark.parametrize("kind", ["plain", "custom"])
def test_the_start_token_is_detached_as_officially(kind):
    d, g = golden_case("cd_attn_detach")
    c = d["config"]
    attention = CrossAttention(c["query_dim"], c["context_dim"], c["heads"], c["dim_head"])
    block = nn.ModuleDict({"attn2": fill_by_recipe(attention)})
    handles = cd.detach_first_token(block) if kind == "custom" else []
    x, context = g["x"].requires_grad_(), g["context"].requires_grad_()
    out = attention(x, context)
    assert_close(out.detach(), g[f"out_{kind}"], rtol=1e-5, atol=1e-6)
    names = [name for name, _ in attention.named_parameters()] + ["x", "context"]
    wanted = [*attention.parameters(), x, context]
    grads = dict(zip(names, torch.autograd.grad((out * g["r"]).sum(), wanted)))
    for name, grad in grads.items():
        assert_close(grad, g[f"grad_{kind}:{name}"], rtol=1e-5, atol=1e-5, msg=f"{kind} {name}")
    assert len(handles) == (2 if kind == "custom" else 0)
    assert grads["context"][:, 0].any() == (kind == "plain")


def test_sizes_at_stable_diffusions_shape(tmp_path):
    with torch.device("meta"):
        unet = UNet(**UNET_CONFIGS["SD-v1"])
    for part, count in {"kv": 19_169_280, "crossattn": 43_962_560, "none": 0,
                        "all": 859_520_964}.items():
        assert sum(p.numel() for name, p in unet.named_parameters()
                   if re.search(cd.PARTS[part], name)) == count
    base = {name: torch.zeros(w.shape) for name, w in cd.keys_and_values(unet.state_dict()).items()}
    cd.save_concept(tmp_path / "a.pt", base, {"<new1>": torch.zeros(768)}, ["<new1> dog"], base)
    assert len(base) == 32 and round((tmp_path / "a.pt").stat().st_size / 2 ** 20) == 73
    with pytest.raises(ValueError, match="no cross-attention"):
        cd.keys_and_values(nn.Linear(2, 2).state_dict())


def test_training_changes_keys_values_and_the_new_word_only():
    model, tokenizer = tiny()
    before = copy.deepcopy(model.state_dict())
    rare = before["text.text_model.embeddings.token_embedding.weight"][tokenizer.ids["rarely"]]
    learns = cd.personalise(model, tokenizer, {"<new1>": "rarely"})
    assert torch.equal(model.text.rows[0], rare)                    # the very row of that word
    assert sorted({name.split(".")[-2] for name in learns}) == ["rows", "to_k", "to_v"]
    optimizer = torch.optim.AdamW(learns.values(), lr=1e-2, weight_decay=1e-2)
    ids, x = tokenizer(["a <new1> dog", "a red cat"]), torch.randn(2, 3, 8, 8)
    model(x, torch.tensor([3, 500]), ids).square().mean().backward()
    optimizer.step()
    after = {name.replace("text.text.", "text."): w for name, w in model.state_dict().items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in learns if "denoiser." in name} and len(moved) == 14
    assert not torch.equal(model.text.rows[0], rare)
    assert set(after) - set(before) == {"text.rows.0"}


def test_personalise_detaches_the_start_token_in_every_layer():
    """All captions have the same one: W_k and W_v get no gradient through it (appendix E)."""
    model, tokenizer = tiny()
    cd.personalise(model, tokenizer, {"<new1>": "rarely"})
    context = torch.randn(1, 3, 24, generator=generator())
    layers = [m for k, m in model.denoiser.named_modules() if re.search(r"attn2\.to_[kv]$", k)]
    for layer in layers:
        start, rest = (torch.autograd.grad(layer(context)[:, part].sum(), layer.weight)[0]
                       for part in (slice(1), slice(1, None)))
        assert not start.any() and rest.any()
    assert len(layers) == 14


# --------------------------------------------------------------------------------------------------
# data

def uniforms(row):
    """Uniform draws that lead to the whole numbers of a golden row, if the ranges are official."""
    u = [(value - low + 0.5) / (high - low) for low, high, value in row["draws"]]
    second = row["caption"].startswith(("very small", "close up"))
    return [*u, *[0.5] * (4 - len(u)), 0.75 if second else 0.25]


@pytest.mark.parametrize("case", ["cd_augment", "cd_augment_small"])
def test_augmentation_is_the_official_one(case):
    d, _ = golden_case(case)
    rows, size = d["rows"], d["config"]["size"]
    u = torch.tensor([uniforms(row) for row in rows])
    for row, side, corner, mask, word in zip(rows, *cd.geometry(u, size, 8)):
        (top, left), side = corner.tolist(), side.item()
        assert side == (row["scale"] if len(row["draws"]) == 4 else size)
        assert [max(top, 0), max(left, 0), min(top + side, size), min(left + side, size)] \
            == row["canvas_box"]
        assert cd.SIZE_WORDS[word] + "photo of a <new1> cat" == row["caption"]
        if side > size:                                     # enlarged: cut around the drawn centre
            assert [size // 2 - top, size // 2 - left] == [draw[2] for draw in row["draws"][2:]]
        want, (a, b, c, e) = torch.zeros(size // 8, size // 8), row["mask_box"]
        want[a:c, b:e] = 1
        assert torch.equal(mask[0], want) and mask.sum() == row["mask_cells"]


def test_resizing_is_that_of_interpolate_then_pasted_or_cut():
    u, seen = torch.rand(60, 5, generator=generator()), set()
    x = torch.randn(60, 3, 32, 32, generator=generator(1))
    out, mask, words = cd.augment(x, u)
    for k, (side, corner) in enumerate(zip(*cd.geometry(u, 32, 1)[:2])):
        (top, left), side = corner.tolist(), side.item()
        resized = F.interpolate(x[k:k + 1], (side, side), mode="bilinear", antialias=True)[0]
        want = torch.zeros(3, 32, 32)
        if side <= 32:
            want[:, top:top + side, left:left + side] = resized
        else:
            want = resized[:, -top:32 - top, -left:32 - left]
        assert_close(out[k], want, rtol=1e-4, atol=1e-5)
        border = side < 32                                  # a pixel all around is left out
        assert mask[k].sum() == ((side - 2) ** 2 if border else 32 ** 2)
        assert not border or mask[k, 0, top + 1:top + side - 1, left + 1:left + side - 1].all()
        assert (words[k] in (1, 2)) == border and (words[k] in (3, 4)) == (side > 32)
        seen.add(int(words[k]))
    assert seen == {0, 1, 2, 3, 4}


# shares of masks that the official code leaves empty
@pytest.mark.parametrize("size,factor,share", [(64, 8, 0.015), (48, 8, 0.11), (32, 8, 0.26),
                                               (32, 4, 0.022), (32, 1, 0), (512, 8, 0)])
def test_a_mask_is_never_empty_and_otherwise_official(size, factor, share):
    u, filled_up = torch.rand(4000, 5, generator=generator(size)), 0
    sides, corners, masks, _ = cd.geometry(u, size, factor)
    for k in torch.nonzero(sides < size)[:, 0].tolist():
        want, side = torch.zeros(size // factor, size // factor), sides[k].item()
        (a, b), (c, e) = ((max(corner // factor + 1, 0), max((corner + side) // factor - 1, 0))
                          for corner in corners[k].tolist())
        want[a:b, c:e] = 1
        assert masks[k].any()
        filled_up += not want.any()
        assert not want.any() or torch.equal(masks[k, 0], want)
    assert masks[sides >= size].all() and filled_up / 4000 == pytest.approx(share, abs=0.02)
    if size == 512:
        assert (sides < size).float().mean() == pytest.approx(0.266, abs=0.03)
        assert (sides == size).float().mean() == pytest.approx(0.4, abs=0.03)


def test_a_picture_is_far_away_below_six_tenths_of_the_side():
    """Of 20 pixels: 6 to 10 are far away, 12, which is six tenths, to 20 are left as they are."""
    drawn, u = torch.arange(6, 21), torch.zeros(15, 5)
    u[:, 1] = (drawn - 5.5) / 15                # from a third of the side to the side itself
    side, _, _, words = cd.geometry(u, 20, 2)
    even = [n + n % 2 for n in drawn.tolist()]
    assert side.flatten().tolist() == [n if n < 12 else 20 for n in even]
    assert words.flatten().tolist() == [1 if n < 12 else 0 for n in even]


def test_sizes_that_cannot_be_augmented_are_named():
    for size, factor in ((31, 1), (28, 8)):
        with pytest.raises(ValueError, match=f"not {size}"):
            cd.geometry(torch.rand(1, 5), size, factor)


def test_mix_is_half_and_half_and_everyone_has_a_turn():
    picture = lambda v, n: torch.arange(v, v + n).view(n, 1, 1, 1).expand(n, 3, 8, 8) / 100
    concepts = [(picture(0, 2), ["a <new1> dog", "a red <new1> dog"]),
                (picture(10, 3), ["a <new2> cat"] * 3)]
    prior = (picture(50, 5), [f"prior {k}" for k in range(5)])
    x, captions, mask = cd.mix(concepts, prior, 12, 2, augmented=False, generator=generator())
    value = (x[:, 0, 0, 0] * 100).round().int().tolist()
    assert value[:12] == [0, 10, 1, 11, 0, 12, 1, 10, 0, 11, 1, 12]
    assert captions[:3] == ["a <new1> dog", "a <new2> cat", "a red <new1> dog"]
    assert captions[12:] == [f"prior {v - 50}" for v in value[12:]] and len(captions) == 24
    assert sorted(value[12:17]) == sorted(value[17:22]) == [*range(50, 55)]     # in rounds
    assert mask.shape == (24, 1, 4, 4) and mask.all()
    x = cd.mix(concepts, None, 4, augmented=False, first=8)[0]          # the next part goes on
    assert (x[:, 0, 0, 0] * 100).round().int().tolist() == value[8:12]
    x, captions, mask = cd.mix(concepts, prior, 200, factor=1, generator=generator())
    shrunk = [c.startswith(("a far away a", "very small a")) for c in captions[:200]]
    assert shrunk == [not m.all() for m in mask[:200]] and 20 < sum(shrunk) < 90
    assert mask[200:].all() and not any(c.startswith(cd.SIZE_WORDS[1:]) for c in captions[200:])
    x, captions, _ = cd.mix(concepts, None, 50, words=(), generator=generator())
    assert len(x) == len(captions) == 50
    assert set(captions) == {"a <new1> dog", "a red <new1> dog", "a <new2> cat"}


@pytest.mark.parametrize("flow", [False, True])
def test_masked_loss_is_the_official_one_over_the_number_of_channels(flow):
    d, g = golden_case("cd_masked_loss")
    pred, noise, mask = g["pred"].requires_grad_(), g["noise"], g["mask"]
    # the target of a flow from x0 = 0 is eps as well
    process = RectifiedFlow() if flow else GaussianDiffusion()
    x0 = torch.zeros(4, 4, 8, 8) if flow else torch.randn(4, 4, 8, 8)

    def loss(rows, mask):
        draws = {"t": torch.arange(1, 5)[rows], "eps": noise[rows]}
        model = lambda xt, t, y: pred[rows]
        return process.loss(model, x0[rows], None, mask, **draws)[0]
    ours, C = loss(slice(4), mask), 4
    assert_close(ours.detach(), g["loss_channel_mean"])
    assert_close(C * ours.detach(), g["loss_compvis"])
    assert_close(C * torch.autograd.grad(ours, pred)[0], g["grad_pred_compvis"])
    targets, prior = C * loss(slice(2), mask[:2]).detach(), loss(slice(2, 4), None).detach()
    assert_close(targets, g["loss_diffusers_instance"])
    assert_close(prior, g["loss_diffusers_prior"])
    assert_close(targets + d["config"]["prior_loss_weight"] * prior, g["loss_diffusers_total"])


def test_rows_of_a_caption_are_its_words_and_its_end():
    model, tokenizer = tiny()
    captions = ["a red dog", "", "photo of a cat", "photo of all", "sky"]
    tokenizer.add_token("all")
    states = model.text(tokenizer(captions)).detach()
    rows = cd.caption_rows(model.text, tokenizer, captions, lead="photo of a")
    want = [states[0, 1:5], states[1, 1:2], states[2, 4:6], states[3, 1:5], states[4, 1:3]]
    assert all(torch.equal(a, b) for a, b in zip(rows, want)) and not rows[0].requires_grad


def test_broken_pictures_of_a_thing_may_be_left_out_and_its_category_is_a_whole_word(tmp_path):
    data.save_grid(torch.zeros(1, 3, 8, 8), tmp_path / "a.png", pad=0, scale=1)
    (tmp_path / "b.png").write_bytes(b"no picture")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("A wildcat and a Cat, a cat")
    task = SimpleNamespace(prompt="a {}", info={"image_size": 8},
                           config=SimpleNamespace(data_dir="data", skip_bad=True))
    read = lambda: cd.ConceptTask.photographs(task, f"folder:{tmp_path}", "cat", "<new1>")
    assert read()[1] == ["A wildcat and a <new1> Cat, a cat"]
    task.config.skip_bad = False
    with pytest.raises(ValueError, match="b.png.*--skip-bad"):
        read()


def test_the_prior_speaks_of_the_class():
    """A text encoder whose end state is the number of dogs and of cats: cosines by hand."""
    tokenizer = WordTokenizer(WORDS, reserved=0, max_length=8)
    dog, cat = tokenizer.ids["dog"], tokenizer.ids["cat"]
    text = nn.Module()
    text.forward = lambda ids: 1e-6 + torch.stack([(ids == i).cumsum(1) for i in (dog, cat)], -1)
    # cosines               1         .89       0          .95           .71          1
    captions = ["dog", "dog dog cat", "cat", "dog dog dog cat", "red cat dog", "dog red"]
    select = lambda **how: sorted(cd.select_prior(text, tokenizer, captions, "photo of a dog",
                                                  **how).tolist())
    assert select() == [0, 1, 3, 5] and select(threshold=0.9) == [0, 3, 5]
    assert select(threshold=0.6) == [0, 1, 3, 4, 5]
    chosen = {tuple(select(count=2, generator=generator(seed))) for seed in range(20)}
    assert len(chosen) > 2 and all(set(pair) < {0, 1, 3, 5} and len(pair) == 2 for pair in chosen)
    with pytest.raises(ValueError, match="nearest has 1.000"):
        select(threshold=1.01)


# --------------------------------------------------------------------------------------------------
# what was learned

def test_weight_change_is_the_papers():
    d, g = golden_case("cd_delta")
    tensors = d["config"]["tensors"]
    shapes = [(name, shape) for name, shape, _ in tensors]
    before, tuned = filled(shapes), filled(shapes, "tuned.")
    after = {name: before[name].double() + scale * tuned[name].double()
             for name, _, scale in tensors}
    before["zero.bias"], after["zero.bias"] = torch.zeros(3), torch.ones(3)
    before["count"] = after["count"] = torch.tensor(7)
    change, means = weight_change(before, after)
    assert list(change) == [name for name, _ in shapes]
    change = torch.tensor(list(change.values()), dtype=torch.float64)
    assert_close(change, g["per_tensor"], rtol=1e-7, atol=1e-12)
    assert means == pytest.approx(d["category_means"], rel=1e-7)


def expand(factors, W0):
    """{name: W0 + u v}, what compress kept. Source: official compress.py."""
    return {name: W0[name] + u @ v for name, (u, v) in factors.items()}


def test_compression_is_the_official_one():
    d, g = golden_case("cd_compress")
    W0 = filled(d["params"])
    W = {name: w + g[f"delta:{name}"] for name, w in W0.items()}
    for ratio in d["config"]["ratios"]:
        factors = cd.compress(W, W0, ratio)
        for name, (u, v) in factors.items():
            assert u.shape[1] == v.shape[0] == d["ranks"][str(ratio)][name]
            assert_close(u @ v, g[f"lowrank@{ratio}:{name}"], rtol=1e-5, atol=2e-6)
            assert_close(expand(factors, W0)[name], W0[name] + g[f"lowrank@{ratio}:{name}"],
                         rtol=1e-5, atol=2e-6)


def test_compression_at_the_ends():
    W0, W = {"w": torch.zeros(6, 4, dtype=torch.float64)}, {"w": normal(6, 4)}
    assert_close(expand(cd.compress(W, W0, 1.0), W0), W)
    assert cd.compress(W, W0, 0.0)["w"][0].shape == (6, 0)
    assert not expand(cd.compress(W0, W0, 0.6), W0)["w"].any()       # nothing learned: no NaN


# --------------------------------------------------------------------------------------------------
# merge

def golden_merge(case):
    """(W0, concepts, C_reg, arrays, description) of a golden case."""
    d, g = golden_case(case)
    c, W0, Cs = d["config"], filled(d["params"]), g["C"].split(d["config"]["s"])
    Ws = [moved(W0, d, k) for k in range(1, c["n_concepts"] + 1)]
    return W0, list(zip(Ws, Cs)), g["Creg"], g, d


def moved(W0, d, k):
    """Concept k's matrices in a golden merge."""
    deltas = filled(d["params"], f"concept{k}.")
    return {name: w + torch.tensor(d["config"]["delta"]) * deltas[name] for name, w in W0.items()}


@pytest.mark.parametrize("case", ["cd_merge_2concepts", "cd_merge_3concepts", "cd_merge_illcond"])
def test_merge_is_the_exact_answer_and_the_official_one(case):
    W0, concepts, C_reg, g, d = golden_merge(case)
    W, report = cd.merge(W0, concepts, C_reg, ridge=0)
    P, _ = cd.merge_map(g["C"].double(), C_reg.double(), ridge=0)
    stats, C, off = d["stats"]["per_layer"], g["C"].double(), 2e-5 if "illcond" in case else 1e-6
    for name in W0:
        base, V = W0[name].double(), g[f"V:{name}"].double()
        assert_close(base + (V - base @ C.T) @ P, g[f"Wexact:{name}"], rtol=0, atol=1e-11)
        # beyond that: V is stored in float32, and the official answer computed in it
        assert_close(W[name], g[f"Wexact:{name}"], rtol=0, atol=off)
        assert_close(W[name], g[f"W:{name}"].double(), rtol=0, atol=off)
        dW = (W[name] - base).norm().item()
        assert dW == pytest.approx(stats[name]["nullspace_f64"]["dW"], rel=1e-5)
    assert max(report["constraint"]) < 1e-13 and report["dropped"] == 0
    assert report["cond_G"] ** 0.5 == pytest.approx(d["stats"]["cond_Creg"], rel=1e-4)


class ToyText(nn.Module):
    """The golden cases' text encoder: word + half its place, mixed with the running mean so far."""

    def __init__(self, tokenizer, words, rows, d):
        super().__init__()
        shapes = {"tok": (2 + len(words), d), "pos": (16, d), "mix": (d, d)}
        w = filled([(f"text.{name}.weight", shape) for name, shape in shapes.items()])
        start, end, *known = d ** 0.5 * w["text.tok.weight"]
        self.table = {0: end, 1: start, 2: end}
        self.table |= {tokenizer.ids[word]: row for word, row in zip(words, known)}
        self.table |= {tokenizer.ids[word]: row for word, row in rows.items()}
        self.places, self.mixing = d ** 0.5 * w["text.pos.weight"], w["text.mix.weight"]

    def forward(self, ids):
        h = torch.stack([torch.stack([self.table[i] for i in row]) for row in ids.tolist()])
        h = h + 0.5 * self.places
        mean = h.cumsum(1) / torch.arange(1, 17)[None, :, None]
        return torch.tanh(h + mean @ self.mixing.T)


@pytest.mark.parametrize("case,dropped", [("cd_merge_compose", None),
                                          ("cd_merge_compose_dedup", 5)])
def test_merge_from_words_to_weights_is_the_official_one(case, dropped):
    d, g = golden_case(case)
    c = d["config"]
    tokenizer = WordTokenizer(c["words"], reserved=4, max_length=16)
    tokens, rows = [f"<new{k}>" for k in range(1, len(c["categories"]) + 1)], {}
    for k, token in enumerate(tokens, 1):
        tokenizer.add_token(token)
        row = filled([(f"concept{k}.embed", (1, c["d"]))])[f"concept{k}.embed"][0]
        rows[token] = c["d"] ** 0.5 * row
    text = ToyText(tokenizer, c["words"], rows, c["d"])
    C_reg = torch.cat(cd.caption_rows(text, tokenizer, c["reg_captions"], "photo of a"))
    assert_close(C_reg, g["Creg"], rtol=1e-5, atol=1e-6)
    Cs = [cd.prompt_rows(text, tokenizer, f"{new} {what}")
          for new, what in zip(tokens, c["categories"])]
    W0 = filled(d["params"])
    Ws = [moved(W0, d, k) for k in range(1, len(tokens) + 1)]
    W, report = cd.merge(W0, list(zip(Ws, Cs)), C_reg, ridge=0)
    assert report["rows"] == len(g["C"]) == sum(map(len, Cs)) - report["dropped"]
    assert dropped is None or report["dropped"] == dropped
    for name in W0:
        # the float32 of the official answer is off by as much as its own golden says
        off = d["stats"][name]["max_abs_minus_nullspace"]
        assert_close(W[name].float(), g[f"W:{name}"], rtol=0, atol=1.5 * off + 1e-5)
        V = g[f"V:{name}"].double()
        assert (W[name] @ g["C"].double().T - V).norm() / V.norm() < 1e-5


def problem(d=12, s=(2, 3), r=40, outs=(5, 7), seed=0):
    """(W0, concepts, C_reg), random, float64."""
    W0 = {f"w{k}": normal(o, d, seed=seed + k) for k, o in enumerate(outs)}
    tuned = lambda n: {name: w + 0.3 * normal(*w.shape, seed=seed + 50 + 9 * n + k)
                       for k, (name, w) in enumerate(W0.items())}
    concepts = [(tuned(n), normal(rows, d, seed=seed + 20 + n)) for n, rows in enumerate(s)]
    return W0, concepts, normal(r, d, seed=seed + 99)


def values_of(concepts, name):
    """(C (s, d), V (o, s)) of Eq. 4 for one layer."""
    return (torch.cat([C for _, C in concepts]),
            torch.cat([W[name] @ C.T for W, C in concepts], 1))


def kkt_solution(W0, C, V, G):
    """Eq. 4 by its Lagrangian, all unknowns at once: [G C^T; C 0] [W^T; -mu] = [G W0^T; V^T]."""
    s, d = C.shape
    below = torch.cat([C, torch.zeros(s, s, dtype=G.dtype)], 1)
    system = torch.cat([torch.cat([G, C.T], 1), below])
    return torch.linalg.solve(system, torch.cat([G @ W0.T, V.T]))[:d].T


def length(W, W0):
    """||W - W0|| over all layers."""
    return torch.cat([(W[name] - W0[name]).flatten() for name in W0]).norm().item()


@pytest.mark.parametrize("ridge", [0, 1e-6, 0.1])
def test_merge_solves_the_lagrangian_system(ridge):
    W0, concepts, C_reg = problem()
    W, report = cd.merge(W0, concepts, C_reg, ridge)
    G = C_reg.T @ C_reg
    G = G + ridge * G.trace() / 12 * torch.eye(12, dtype=torch.float64)
    for name in W0:
        C, V = values_of(concepts, name)
        assert_close(W[name], kkt_solution(W0[name], C, V, G), rtol=0, atol=1e-11)
        null = torch.linalg.svd(C)[2][5:].T                                 # ker C, (d, d - s)
        step = W[name] + normal(len(W[name]), 7, seed=3) @ null.T * 1e-2    # another feasible point
        cost = lambda w: ((w - W0[name]) @ G * (w - W0[name])).sum()
        assert_close(step @ C.T, V)
        assert cost(step) > cost(W[name])
    assert report["dW"] == pytest.approx(length(W, W0))
    assert report["changes"] == pytest.approx([length(Wn, W0) for Wn, _ in concepts])
    D = C @ torch.linalg.inv(G)
    assert report["cond_G"] == pytest.approx(torch.linalg.cond(G).item(), rel=1e-6)
    assert report["cond_DCt"] == pytest.approx(torch.linalg.cond(D @ C.T).item(), rel=1e-6)
    assert max(report["constraint"]) < 1e-13


def test_the_soft_merge_is_the_least_squares_answer_to_all_rows():
    W0, concepts, C_reg = problem(r=9)                              # 9 rows in 12 directions
    parts = [(C_reg, W0, 1.0), *((C, W, 3.0) for W, C in concepts)]
    G = sum(share * C.T @ C / len(C) for C, _, share in parts)
    parts.append((torch.eye(12, dtype=torch.float64), W0, 1e-3 * G.trace()))      # the ridge
    rows = torch.cat([(share / len(C)) ** 0.5 * C for C, _, share in parts])            # (n, d)
    got = custom_merge.soft_merge(W0, concepts, C_reg, weight=3.0, ridge=1e-3)
    for name in W0:
        wanted = torch.cat([(share / len(C)) ** 0.5 * C @ W[name].double().T
                            for C, W, share in parts])                                  # (n, o)
        assert_close(got[name], torch.linalg.lstsq(rows, wanted).solution.T, rtol=0, atol=1e-10)
    near = custom_merge.soft_merge(W0, concepts, C_reg, weight=1e9, ridge=1e-15)
    assert max(cd.missed(near, W, C) for W, C in concepts) < 1e-4       # few rows: all are served
    assert cd.missed(got, concepts[0][0], concepts[0][1]) > 1e-3


def test_missed_is_the_worst_layers_share_of_the_answers():
    V = {"a": torch.eye(2), "b": 2 * torch.eye(2)}
    W = {"a": torch.tensor([[1.0, 0], [0, 1.5]]), "b": torch.tensor([[2.0, 0], [0, 2.2]])}
    assert cd.missed(W, V, torch.tensor([[0.0, 1]])) == pytest.approx(0.5)
    assert cd.missed(W, V, torch.tensor([[1.0, 0]])) == 0


def test_properties_of_the_merge():
    W0, concepts, C_reg = problem()
    W, _ = cd.merge(W0, concepts, C_reg, 0)
    near = lambda other: assert_close(other[0], W, rtol=0, atol=1e-10)
    unchanged, report = cd.merge(W0, [(W0, C) for _, C in concepts], C_reg)
    assert_close(unchanged, W0)
    assert report["dW"] == 0
    C = normal(12, 12, seed=7)                          # as many rows as the width: all of W_1
    W1 = concepts[0][0]
    assert_close(cd.merge(W0, [(W1, C)], C_reg)[0], W1, rtol=0, atol=1e-9)
    near(cd.merge(W0, concepts, 7 * C_reg, 0))
    near(cd.merge(W0, concepts, torch.linalg.qr(normal(40, 40, seed=5))[0] @ C_reg, 0))
    mixed = [(Wn, normal(len(C), len(C), seed=11) @ C) for Wn, C in concepts]   # the same span
    near(cd.merge(W0, mixed, C_reg, 0))
    near(cd.merge(W0, concepts[::-1], C_reg, 0))
    least, _ = cd.merge(W0, concepts, torch.eye(12, dtype=torch.float64), 0)    # smallest change
    for name in W0:
        C, V = values_of(concepts, name)
        want = (V - W0[name] @ C.T) @ torch.linalg.pinv(C).T
        assert_close(least[name] - W0[name], want, rtol=0, atol=1e-10)
    assert_close(cd.merge(W0, concepts, C_reg, 1e-6)[0], W, rtol=0, atol=1e-4)


def test_a_ridge_gives_the_smallest_change_where_captions_say_nothing():
    W0, concepts, C_reg = problem(r=8)                              # 8 rows in 12 directions
    with pytest.raises(ValueError, match="span 8 of 12"):
        cd.merge(W0, concepts, C_reg, ridge=0)
    G = C_reg.T @ C_reg
    for ridge in (1e-8, 1e-6):
        W, report = cd.merge(W0, concepts, C_reg, ridge)
        assert max(report["constraint"]) < 1e-10
        for name in W0:
            more = ridge * G.trace() / 12 * torch.eye(12, dtype=torch.float64)
            exact = kkt_solution(W0[name], *values_of(concepts, name), G + more)
            assert_close(W[name], exact, rtol=0, atol=1e-6)


def test_rows_that_are_nearly_equal_count_once_and_what_they_cost_is_reported():
    W0, ((W1, C1), (W2, C2)), C_reg = problem()
    both = lambda e: torch.cat([C2[:1], C1[:1] + e * normal(1, 12, seed=8)])    # the second is C1's
    concepts = [(W1, C1), (W2, both(1e-5))]
    W, report = cd.merge(W0, concepts, C_reg)
    assert (report["rows"], report["dropped"]) == (3, 1)
    assert_close(W["w0"] @ C1[0], W1["w0"] @ C1[0])             # the first concept's value holds
    for k, (Wn, C) in enumerate(concepts):                          # over all rows, the dropped too
        missed = [(((W[n] - Wn[n]) @ C.T).norm() / (Wn[n] @ C.T).norm()).item() for n in W0]
        assert report["constraint"][k] == pytest.approx(max(missed), rel=1e-6, abs=1e-12)
    assert report["constraint"][0] < 1e-12 and report["constraint"][1] > 0.1
    _, loose = cd.merge(W0, concepts, C_reg, tolerance=1e-9)
    assert loose["rows"] == 4 and loose["dW"] > 1e3 * report["dW"]
    with pytest.raises(ValueError, match="concept 2 keeps no row"):
        cd.merge(W0, [(W1, C1), (W2, both(1e-5)[1:])], C_reg)
    with pytest.raises(ValueError, match="13 target rows, 12 wide"):
        cd.merge(W0, [(W1, normal(13, 12))], C_reg)
    with pytest.raises(ValueError, match="3 target rows.*dependent"):
        cd.merge(W0, [(W1, torch.stack([C1[0], C1[1], C1[0] + C1[1]]))], C_reg)


def test_nearly_equal_is_a_share_of_the_mean_length():
    """Lengths 100, 1 and about 1: their mean is 34, so a hundredth of it is 0.34."""
    W0, ((W1, _), *_), C_reg = problem()
    a, b, c = torch.eye(12, dtype=torch.float64)[:3]
    for apart, kept in ((0.5, 3), (0.2, 2)):
        C = torch.stack([100 * a, b, b + apart * c])
        assert cd.merge(W0, [(W1, C)], C_reg, tolerance=0.01)[1]["rows"] == kept


# --------------------------------------------------------------------------------------------------
# files and the command line

def learned(seed=1):
    """(base U-Net's state_dict, changed K/V, row of V*) of a tiny model."""
    unet = tiny()[0].denoiser.state_dict()
    W = {name: w + 0.1 * normal(*w.shape, seed=seed).float()
         for name, w in cd.keys_and_values(unet).items()}
    return unet, W, normal(24, seed=seed).float()


def test_what_is_saved_comes_back(tmp_path):
    unet, W, row = learned()
    words = {"<new1>": row}, ["<new1> dog"]
    save = lambda name, W: cd.save_concept(tmp_path / name, W, *words, unet)
    save("a.pt", W)
    back, rows, concepts = cd.load_concept(tmp_path / "a.pt", unet)
    assert_close(back, W, rtol=0, atol=0)
    assert torch.equal(rows["<new1>"], row) and concepts == ["<new1> dog"]
    half = {name: w.half().float() for name, w in unet.items()}     # an exported base is the same
    assert_close(cd.load_concept(tmp_path / "a.pt", half)[0], W, rtol=0, atol=0)
    bias = {next(name for name in unet if name.endswith("attn2.to_out.0.bias")): torch.ones(32)}
    save("b.pt", {**W, **bias, **cd.compress(W | bias, unet, 0.6)})     # a bias is not compressed
    want = {**expand(cd.compress(W, unet, 0.6), unet), **bias}
    assert_close(cd.load_concept(tmp_path / "b.pt", unet)[0], want)
    save("v.pt", {})                                                    # textual inversion
    assert cd.load_concept(tmp_path / "v.pt", unet)[0] == {}
    with pytest.raises(ValueError, match="another base"):
        cd.load_concept(tmp_path / "a.pt", {name: w + 1 for name, w in unet.items()})


def test_a_concept_makes_the_model_what_it_was_when_trained(tmp_path):
    model, tokenizer = tiny()
    unet = copy.deepcopy(model.denoiser.state_dict())
    learns = cd.personalise(model, tokenizer, {"<new1>": "rarely"})
    for p in learns.values():
        p.data.add_(0.1)
    W = {name.removeprefix("denoiser."): p for name, p in learns.items() if "attn2" in name}
    cd.save_concept(tmp_path / "a.pt", W, {"<new1>": model.text.rows[0]}, ["<new1> dog"], unet)
    fresh, other = tiny()
    found = cd.load_concept(tmp_path / "a.pt", fresh.denoiser.state_dict())
    cd.apply_concept(fresh, other, *found[:2])
    x, t, caption = torch.randn(1, 3, 8, 8), torch.tensor([9]), ["photo of a <new1> dog"]
    assert torch.equal(fresh(x, t, other(caption)), model(x, t, tokenizer(caption)))


def test_a_concept_is_saved_with_the_averaged_weights(tmp_path):
    model, tokenizer = tiny()
    unet = copy.deepcopy(model.denoiser.state_dict())
    learns = cd.personalise(model, tokenizer, {"<new1>": "rarely"})
    task = SimpleNamespace(
        model=model, frozen={*model.state_dict()} - {*learns}, words={"<new1>": "rarely"},
        things=["<new1> dog"], W0=unet, config=SimpleNamespace(out=str(tmp_path)))
    average = copy.deepcopy(model)
    for name in learns:
        average.get_parameter(name).data.add_(0.1)
    cd.ConceptTask.finish(task, average, None, "cpu")
    W, rows, _ = cd.load_concept(tmp_path / "concept.pt", unet)
    assert len(W) == 14 and torch.equal(rows["<new1>"], average.text.rows[0])
    assert all(torch.equal(w, average.denoiser.state_dict()[name]) for name, w in W.items())


@pytest.mark.parametrize("part", ["kv", "crossattn"])
def test_published_files_of_both_repositories(tmp_path, part):
    """CompVis names with a table of rows; diffusers' names with a dict of rows; compressed ones."""
    unet, W, row = learned()
    if part == "crossattn":
        W = {name: w + 0.1 for name, w in unet.items() if ".attn2." in name}
    compvis = {f"model.diffusion_model.{name}": w for name, w in W.items()}
    torch.save({"state_dict": compvis | {"embed": row[None]}}, tmp_path / "compvis.ckpt")
    # one ResBlock per level and two levels: input 1, 3; middle; output 0, 1, 2, 3
    places = {"input_blocks.1.1": "down_blocks.0.attentions.0",
              "input_blocks.3.1": "down_blocks.1.attentions.0",
              "middle_block.1": "mid_block.attentions.0",
              "output_blocks.0.1": "up_blocks.0.attentions.0",
              "output_blocks.1.1": "up_blocks.0.attentions.1",
              "output_blocks.2.1": "up_blocks.1.attentions.0",
              "output_blocks.3.1": "up_blocks.1.attentions.1"}
    rename = lambda name: next(name.replace(a, b) for a, b in places.items() if name.startswith(a))
    words, factors = {"modifier_token": {"<new1>": row}}, cd.compress(W, unet, 0.9)
    low = {rename(name): {"u": u, "v": v} for name, (u, v) in factors.items()}
    whole = {rename(name): w.half() for name, w in reversed(W.items())}
    torch.save({"unet": whole, **words}, tmp_path / "delta.bin")
    torch.save({"unet": {**whole, **low}, **words}, tmp_path / "compressed_delta.bin")
    for file, want, near in (("compvis.ckpt", W, 0), ("delta.bin", W, 1e-3),
                             ("compressed_delta.bin", W | expand(factors, unet), 1e-3)):
        back, rows, concepts = cd.load_concept(tmp_path / file, unet)
        assert_close(back, want, rtol=0, atol=near, msg=lambda m: f"{file}: {m}")
        assert_close(rows, {"<new1>": row})
        assert concepts == ["<new1>"]


INPUT = "transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize("content,words", [
    ({"state_dict": {"a": torch.ones(2)}}, "no concept for this U-Net"),
    ({"unet": {f"down_blocks.0.attentions.0.{INPUT}": torch.ones(2)}}, "concept .* tensors differ"),
    ({"unet": {f"down_blocks.7.attentions.0.{INPUT}": torch.ones(2)}}, "concept .* tensors differ"),
    ({"state_dict": {f"input_blocks.1.1.{INPUT}": torch.ones(2)}}, "concept .* tensors differ"),
    ({"unet": {}, "modifier_token": {"<new1>": torch.ones(7)}}, "differ: <new1>: file"),
    ({"tensors": {}, "modifiers": {}}, "no named tensors"), ([1, 2], "no named tensors")])
def test_files_that_are_no_concept_are_named(tmp_path, content, words):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=words):
        cd.load_concept(tmp_path / "x.bin", learned()[0])


def test_new_words_of_several_files_are_numbered(tmp_path):
    unet, W, _ = learned()
    rows = [torch.full((24,), float(k)) for k in range(4)]
    files = {"a": {"<new1> dog": 0}, "b": {"<new1> cat": 1, "<new2> pot": 2},
             "c": {"<cat-toy> sky": 3}}
    for name, things in files.items():
        words = {thing.split()[0]: rows[k] for thing, k in things.items()}
        cd.save_concept(tmp_path / f"{name}.pt", W, words, list(things), unet)
    _, words, concepts = cd.gather([tmp_path / f"{name}.pt" for name in files], unet)
    assert concepts == [["<new1> dog"], ["<new2> cat", "<new3> pot"], ["<new4> sky"]]
    assert {new: row[0].item() for new, row in words.items()} == {
        "<new1>": 0, "<new2>": 1, "<new3>": 2, "<new4>": 3}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint, two concepts of the tiny model and a file of captions; their paths by name."""
    save_checkpoint(tmp_path / "base.pt", {"task": "unet", "ema": tiny()[0].state_dict()})
    for seed, what in enumerate(("dog", "cat"), 1):
        unet, W, row = learned(seed)
        cd.save_concept(tmp_path / f"{what}.pt", W, {"<new1>": row}, [f"<new1> {what}"], unet)
    captions = [f"{a} {b} {c}" for a in ("a", "photo of a") for b in ("red", "blue", "green")
                for c in WORDS[2:]]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    return lambda name: str(tmp_path / name)


@pytest.fixture
def base(monkeypatch):
    """Let the commands read the tiny model as their base, which is no model of the table."""
    class Task:
        info = {"name": ""}

        def __init__(self, path, bpe):
            self.model, self.tokenizer = tiny()
    monkeypatch.setattr(cd, "base_task", Task)


@pytest.mark.parametrize("part,paper,ours", [("kv", 8e-5, 1e-2), ("all", 8e-6, 5e-4)])
def test_what_others_published_learns_as_the_official_code_has_it(part, paper, ours, tmp_path):
    """A base in a folder of diffusers; one of ours has fewer weights, so it learns faster."""
    flags = ["--concept", "folder:x", "--category", "dog", "--part", part, "--device", "cpu"]
    options, config = cd.read_flags([*flags, "--base", str(tmp_path)])
    assert (config.lr, config.word_lr, config.lr_decay) == (paper, 8e-5, "constant")
    assert (config.optimizer, config.warmup, config.batch_size) == ("adamw", 0, 8)
    assert (config.weight_decay, options.augment, options.prior) == (0.01, True, "generated")
    options, config = cd.read_flags([*flags, "--base", str(ROOT / "assets/unet-scenes.pt")])
    assert (config.lr, config.word_lr, options.augment, options.prior) == (ours, 0.1, False, None)


def test_merge_from_the_command_line(folder, base, capsys):
    cd.main(["merge", folder("dog.pt"), folder("cat.pt"), "--captions", folder("captions.txt"),
             "--out", folder("new/both.pt")])
    said = capsys.readouterr().out
    assert "12 target rows (0 dropped" in said and "<new2> cat: keys and values off by" in said
    model, tokenizer = tiny()
    W0 = copy.deepcopy(model.denoiser.state_dict())
    W, rows, concepts = cd.load_concept(folder("new/both.pt"), W0)
    assert list(rows) == ["<new1>", "<new2>"] and concepts == ["<new1> dog", "<new2> cat"]
    cd.apply_concept(model, tokenizer, W, rows)
    for k, what in enumerate(("dog", "cat"), 1):            # each word reaches its own K and V
        own, word, _ = cd.load_concept(folder(f"{what}.pt"), W0)
        assert torch.equal(rows[f"<new{k}>"], word["<new1>"])
        states = model.text(tokenizer([f"<new{k}> {what}"]))[0, 1:4].detach()
        for name in W:
            assert_close(states @ W[name].T, states @ own[name].T, rtol=1e-3, atol=1e-4)


def test_compress_from_the_command_line_and_what_is_refused(folder, base, capsys):
    cd.main(["compress", folder("dog.pt"), "--ratio", "0.3", "--out", folder("small.pt")])
    sizes = [len(open(folder(name), "rb").read()) for name in ("small.pt", "dog.pt")]
    assert sizes[0] < 0.7 * sizes[1]
    unet, W, row = learned()
    torch.save({"unet": W, "modifier_token": {"<new1>": row}}, folder("published.bin"))
    cd.save_concept(folder("v.pt"), {}, {"<new1>": row}, ["<new1> dog"], unet)
    merging = ["merge", folder("dog.pt"), folder("published.bin"), "--out", folder("both.pt"),
               "--captions", folder("captions.txt")]
    pot = ["--category", "pot"]
    capsys.readouterr()
    for flags, words in ((merging, "--category"),
                         ([*merging, *pot, "--captions", "nothing"], "nothing"),
                         ([*merging[:-2], *pot], "--captions"),
                         (["merge", folder("v.pt"), *merging[3:]], "--part kv"),
                         (["merge", folder("dog.pt"), folder("dog.pt"), *merging[3:], "--tolerance",
                           "9"], "concept 2 keeps no row"),
                         (["compress", folder("base.pt"), "--out", folder("x.pt")], "no concept"),
                         (["compress", folder("dog.pt"), "--out", folder("cat.pt")], "exists"),
                         (["squeeze"], "learn, merge or compress")):
        with pytest.raises(SystemExit) as stopped:
            cd.main(flags)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and words in err and len(err.strip().splitlines()) == 1
    cd.main([*merging, *pot])
    assert cd.load_concept(folder("both.pt"), unet)[2] == ["<new1> dog", "<new2> pot"]


# --------------------------------------------------------------------------------------------------
# damaged, hand-made and hostile files; things that lose

def changed(good, **values):
    """The dict `good` with other values; KeyError takes a key out."""
    return {k: v for k, v in {**good, **values}.items() if v is not KeyError}


NAN = torch.full((24,), float("nan"))
# what a concept's file may be made to say: one value each, as the function of a good file
HAND_MADE = [
    lambda f: changed(f, modifiers=KeyError), lambda f: changed(f, tensors=[1]),
    lambda f: changed(f, tensors=None), lambda f: changed(f, tensors="abc"),
    lambda f: changed(f, base=KeyError), lambda f: changed(f, base=3),
    lambda f: changed(f, format=1), lambda f: changed(f, format="2.0"),
    lambda f: changed(f, concepts=None), lambda f: changed(f, concepts="<new1> dog"),
    lambda f: changed(f, concepts=[1]), lambda f: changed(f, concepts=["<new7> dog"]),
    lambda f: changed(f, modifiers=["<new1>"]), lambda f: changed(f, modifiers={"<new1>": "x"}),
    lambda f: changed(f, modifiers={"<new1>": [1.0]}), lambda f: changed(f, modifiers={3: NAN}),
    lambda f: changed(f, modifiers={"<new1>": NAN}),
    lambda f: changed(f, modifiers={"a b": torch.ones(24)}),
    lambda f: changed(f, modifiers={"": torch.ones(24)}),
    lambda f: changed(f, modifiers={"<new1>": torch.ones(24).long()}),
    lambda f: changed(f, modifiers={"<new1>": torch.ones(1, 24)}),
    *(lambda f, w=w: changed(f, tensors={**f["tensors"], next(iter(f["tensors"])): w(
        next(iter(f["tensors"].values())))}) for w in (
            lambda w: "x", lambda w: 3, lambda w: None, lambda w: {}, lambda w: {"u": w},
            lambda w: {"u": "a", "v": "b"}, lambda w: {"u": w, "v": w}, lambda w: w * float("nan"),
            lambda w: w / 0, lambda w: w.int(), lambda w: w.to(torch.complex64), lambda w: w[:1],
            lambda w: w.to("meta"), lambda w: w.to_sparse())),
    lambda f: changed(f, tensors={3: torch.ones(2)}),
    *(lambda f, x=x: x for x in (
        [1], 3, None, torch.ones(3), {}, {"unet": "a"}, {"unet": None}, {"unet": [1]},
        {"unet": {"x.attn2.to_k.weight": "a"}}, {"state_dict": {3: torch.ones(2)}},
        {"state_dict": {"embed": 3}}, {"state_dict": {"embed": torch.ones(())}},
        {"unet": {}, "modifier_token": [1]}, {"unet": {}, "modifier_token": {1: torch.ones(24)}},
        {"unet": {}, "modifier_token": {"<new1>": NAN}},
        {"lora_unet_mid_block_0_attn2_to_k.lora_up.weight": torch.ones(2, 2)}))]


@pytest.mark.parametrize("number", range(len(HAND_MADE)))
def test_a_file_made_by_hand_gets_one_line(number, tmp_path):
    unet, W, row = learned()
    cd.save_concept(tmp_path / "good.pt", W, {"<new1>": row}, ["<new1> dog"], unet)
    good = torch.load(tmp_path / "good.pt", weights_only=True)
    torch.save(HAND_MADE[number](good), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt") as error:
        cd.load_concept(tmp_path / "x.pt", unet)
    assert "\n" not in str(error.value)


def mutations(good, count, seed):
    """`count` damaged copies of bytes: flipped bits, cut, a hole of zeros, bytes put in twice."""
    rng = random.Random(seed)
    for _ in range(count):
        body, where = bytearray(good), rng.randrange(len(good))
        kind = rng.choice(("many", "few", "cut", "hole", "twice"))
        if kind in ("many", "few"):
            for place in rng.sample(range(len(good)), len(good) // 10 if kind == "many" else 2):
                body[place] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del body[where:]
        elif kind == "hole":
            body[where:where + 64] = bytes(len(body[where:where + 64]))
        else:
            body[where:where] = body[where:where + rng.randrange(1, 200)]
        yield bytes(body)


@pytest.mark.parametrize("name", ["concept.pt", "small.pt", "delta.bin"])
def test_a_damaged_concept_is_refused_or_read_as_it_was(name, tmp_path):
    """The checksums of the zip are compared before a number is believed."""
    unet, W, row = learned()
    if name == "delta.bin":
        torch.save({"unet": W, "modifier_token": {"<new1>": row}}, tmp_path / name)
    else:
        tensors = cd.compress(W, unet, 0.6) if name == "small.pt" else W
        cd.save_concept(tmp_path / name, tensors, {"<new1>": row}, ["<new1> dog"], unet)
    right, refused = cd.load_concept(tmp_path / name, unet), 0
    for body in mutations((tmp_path / name).read_bytes(), 40, seed=0):
        (tmp_path / "x.pt").write_bytes(body)
        try:
            found = cd.load_concept(tmp_path / "x.pt", unet)
            assert_close(found[:2], right[:2], rtol=0, atol=0)
            assert found[2] == right[2]
        except ValueError as error:
            assert "x.pt" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 30


class Hostile:
    """Its pickle makes a file when it is loaded by an unsafe reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_concept_runs_nothing(zipped, tmp_path):
    unet, W, row = learned()
    content = {"unet": W, "modifier_token": {"<new1>": row}, "x": Hostile(str(tmp_path / "ran"))}
    torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="x.bin holds more than tensors"):
        cd.load_concept(tmp_path / "x.bin", unet)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name, content, words", [
    ("x.bin", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ("x.pt", b"<!DOCTYPE html>", "web page"), ("x.pt", b"", "truncated")])
def test_what_downloads_bring_is_named(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        cd.load_concept(tmp_path / name, learned()[0])


def test_a_model_without_a_u_net_with_text_is_named_before_anything_else(tmp_path):
    unet, W, row = learned()
    cd.save_concept(tmp_path / "a.pt", W, {"<new1>": row}, ["<new1> dog"], unet)
    for state in ({}, {"blocks.0.attn.qkv.weight": torch.ones(2, 2)}):
        with pytest.raises(ValueError, match="no cross-attention"):
            cd.load_concept(tmp_path / "a.pt", state)


def test_every_thing_of_a_file_is_measured_and_must_keep_a_row(folder, base, capsys, tmp_path):
    """Two things of one category: as good as one, so the second would be lost in silence."""
    unet, W, row = learned(1)
    other = normal(24, seed=9).float()
    cd.save_concept(folder("two.pt"), W, {"<new1>": row, "<new2>": other},
                    ["<new1> cat", "<new2> dog"], unet)
    files, rest = [folder("dog.pt"), folder("two.pt")], ["--captions", folder("captions.txt"),
                                                         "--out", folder("all.pt")]
    with pytest.raises(SystemExit) as stopped:      # <new3> dog is near <new1> dog, <new2> cat not
        cd.main(["merge", *files, *rest, "--tolerance", "9"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "keeps no row of its own" in err
    assert len(err.splitlines()) == 1 and not (tmp_path / "all.pt").exists()
    cd.main(["merge", *files, *rest])
    said = capsys.readouterr().out
    for thing in ("<new1> dog", "<new2> cat", "<new3> dog"):
        assert re.search(rf"^{thing}: keys and values off by .*start token; plain captions moved",
                         said, re.M), said


def test_a_rare_row_of_one_thing_is_not_taken_for_that_of_its_file():
    """merge() itself: the second concept's only row equals the first's; its file has another."""
    W0, ((W1, C1), (W2, C2)), C_reg = problem()
    with pytest.raises(ValueError, match="concept 2 keeps no row"):
        cd.merge(W0, [(W1, C1), (W2, C1[:1] + 1e-9), (W2, C2)], C_reg)


@pytest.mark.parametrize("flags, words", [
    (["--captions", "BAD"], "--captions: give .*, or UTF-8 text with one a line"),
    (["--captions", "EMPTY"], "--captions: give a data set that has some"),
    (["--captions", "FOLDER"], "--captions: give a data set that has some"),
    (["--captions", "CAPTIONS", "--category", "dog"], "--category dog is not read"),
    (["--captions", "CAPTIONS", "--out", "DOG"], "exists"),
    (["--captions", "CAPTIONS", "--out", "LINK"], "exists"),
    (["--captions", "CAPTIONS", "--ridge", "-1"], "--ridge -1"),
    (["--captions", "CAPTIONS", "--lr", "1"], "unknown argument '--lr'")])
def test_merge_refuses_in_one_line_and_leaves_files_alone(flags, words, folder, base, capsys,
                                                          tmp_path, pictures):
    (tmp_path / "bad.txt").write_bytes("고양이".encode("cp949"))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "link.pt").symlink_to(tmp_path / "nowhere.pt")
    names = {"BAD": folder("bad.txt"), "EMPTY": folder("empty.txt"), "DOG": folder("dog.pt"),
             "CAPTIONS": folder("captions.txt"), "LINK": folder("link.pt"),
             "FOLDER": f"folder:{pictures}"}
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        cd.main(["merge", folder("dog.pt"), folder("cat.pt"), "--out", folder("new.pt"),
                 *(names.get(flag, flag) for flag in flags)])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and re.match(f"error: .*{words}", err), err
    assert len(err.strip().splitlines()) == 1
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_compress_of_words_alone_is_refused(folder, base, capsys):
    unet, _, row = learned()
    cd.save_concept(folder("v.pt"), {}, {"<new1>": row}, ["<new1> dog"], unet)
    with pytest.raises(SystemExit):
        cd.main(["compress", folder("v.pt"), "--out", folder("small.pt")])
    assert "new words alone" in capsys.readouterr().err
