"""custom_diffusion.py: the official figures, brute force, and what a merge, a file and a new word promise."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import custom_diffusion as cd
from conftest import fill_by_recipe, golden_case
from diffusion import GaussianDiffusion, RectifiedFlow
from tasks import TextToImage
from text import TextEncoder, WordTokenizer
from unet import UNET_CONFIGS, CrossAttention, UNet
from weights import save_checkpoint

WORDS = ["a", "blue", "cat", "dog", "green", "of", "photo", "pot", "rarely", "red", "sky", "tree", "wooden"]


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
    """A text-to-image model with lively weights, and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = WordTokenizer(WORDS, reserved=4, max_length=10)
    unet = UNet(**{**UNET_CONFIGS["unet-tiny"], "model_channels": 32, "channel_mult": (1, 2), "context_dim": 24,
                   "in_channels": 3, "out_channels": 3})
    text = TextEncoder(tokenizer.vocab_size, tokenizer.max_length, hidden_size=24)
    model = TextToImage(unet, text, tokenizer([""])[0], 0.1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model, tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# what is trained

def test_the_start_token_is_detached_as_officially():
    d, g = golden_case("cd_attn_detach")
    c = d["config"]
    for kind in ("plain", "custom"):
        block = nn.ModuleDict({"attn2": CrossAttention(c["query_dim"], c["context_dim"], c["heads"], c["dim_head"])})
        attention = fill_by_recipe(block["attn2"])
        handles = cd.detach_first_token(block) if kind == "custom" else []
        x, context = g["x"].requires_grad_(), g["context"].requires_grad_()
        out = attention(x, context)
        assert_close(out.detach(), g[f"out_{kind}"], rtol=1e-5, atol=1e-6)
        names = [name for name, _ in attention.named_parameters()]
        wanted = [*attention.parameters(), x, context]
        grads = dict(zip([*names, "x", "context"], torch.autograd.grad((out * g["r"]).sum(), wanted)))
        for name, grad in grads.items():
            assert_close(grad, g[f"grad_{kind}:{name}"], rtol=1e-5, atol=1e-5, msg=lambda m: f"{kind} {name}: {m}")
        assert kind == "plain" or not grads["context"][:, 0].any()
    detached = out.detach()
    for handle in handles:
        handle.remove()
    assert torch.equal(attention(x, context), detached) and len(handles) == 2
    assert torch.autograd.grad(attention(x, context).sum(), context)[0][:, 0].any()


def test_sizes_at_stable_diffusions_shape():
    with torch.device("meta"):
        unet = UNet(**UNET_CONFIGS["SD-v1"])
    count = lambda part: sum(p.numel() for p in cd.trainable_kv(unet, part).values())
    assert len(cd.trainable_kv(unet)) == 32 and count("kv") == 19_169_280
    assert count("crossattn") == 43_962_560 and count("none") == 0 and count("all") == 859_520_964
    cd.trainable_kv(unet, "crossattn")
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == 43_962_560
    with pytest.raises(ValueError, match="kv, crossattn, all, none"):
        cd.trainable_kv(unet, "attn1")
    with pytest.raises(ValueError, match="no cross-attention"):
        cd.trainable_kv(nn.Linear(2, 2))


def test_training_changes_keys_values_and_the_new_word_only():
    model, tokenizer = tiny()
    before = copy.deepcopy(model.state_dict())
    rare = before["text.text_model.embeddings.token_embedding.weight"][tokenizer.ids["rarely"]]
    learns = cd.personalise(model, tokenizer, {"<new1>": "rarely"})
    assert torch.equal(model.text.rows[0], rare) and model.text.rows[0].shape == (24,)
    assert sorted({name.split(".")[-2] for name in learns}) == ["rows", "to_k", "to_v"] and len(learns) == 15
    optimizer = torch.optim.AdamW(learns.values(), lr=1e-2, weight_decay=1e-2)
    ids, x = tokenizer(["a <new1> dog", "a red cat"]), torch.randn(2, 3, 8, 8)
    for _ in range(2):
        model(x, torch.tensor([3, 500]), ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    after = {name.replace("text.text.", "text."): w for name, w in model.state_dict().items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in learns if "unet." in name}
    assert not torch.equal(model.text.rows[0], rare) and set(after) - set(before) == {"text.rows.0"}
    with pytest.raises(ValueError, match="'ktn' is no token"):
        cd.personalise(*tiny(), {"<new1>": "ktn"})


def test_rare_tokens_are_rare_letters_and_nobodys_part():
    use = {"a": 90, "dog": 20, "red": 7, "blue": 6, "pot": 5, "sky": 4, "of": 5, "wooden": 5, "rarely": 2}
    captions = [word for word, n in use.items() for _ in range(n)]
    tokenizer = WordTokenizer([*use, "pottery", "7up"], 2, 9)
    captions += ["pottery"] * 50 + ["7up"] * 6
    # "pot" is a part of "pottery", "7up" no word of letters; nearest to five uses first, then the other rare ones
    assert cd.rare_tokens(tokenizer, captions, 6) == ["of", "wooden", "blue", "red", "rarely", "sky"]
    with pytest.raises(ValueError, match="99 are wanted"):
        cd.rare_tokens(tokenizer, captions, 99)


# ----------------------------------------------------------------------------------------------------------------------
# data

def uniforms(row):
    """Uniform draws that lead to the whole numbers of a golden row, if the ranges are the official ones."""
    u = [(value - low + 0.5) / (high - low) for low, high, value in row["draws"]]
    second = row["caption"].startswith(("very small", "close up"))
    return [*u, *[0.5] * (4 - len(u)), 0.75 if second else 0.25]


@pytest.mark.parametrize("case", ["cd_augment", "cd_augment_small"])
def test_augmentation_is_the_official_one(case):
    d, _ = golden_case(case)
    rows, size = d["rows"], d["config"]["size"]
    g = cd.geometry(torch.tensor([uniforms(row) for row in rows]), size, 8)
    for k, row in enumerate(rows):
        top, left, side = (g[name][k].item() for name in ("top", "left", "side"))
        resized = len(row["draws"]) == 4
        assert side == (row["scale"] if resized else size)
        box = [max(top, 0), max(left, 0), min(top + side, size), min(left + side, size)]
        assert box == row["canvas_box"] and cd.SIZE_WORDS[g["words"][k]] + "photo of a <new1> cat" == row["caption"]
        if side > size:                                                 # enlarged: cut around the drawn centre
            assert [size // 2 - top, size // 2 - left] == [draw[2] for draw in row["draws"][2:]]
        mask, (a, b, c, e) = torch.zeros(size // 8, size // 8, dtype=torch.bool), row["mask_box"]
        mask[a:c, b:e] = True
        assert torch.equal(g["mask"][k, 0], mask) and mask.sum() == row["mask_cells"]


def test_resizing_is_that_of_interpolate_then_pasted_or_cut():
    u = torch.rand(60, 5, generator=generator())
    x = torch.randn(60, 3, 32, 32, generator=generator(1))
    g, (out, mask, words) = cd.geometry(u, 32, 1), cd.augment(x, u)
    seen = set()
    for k in range(60):
        top, left, side = (g[name][k].item() for name in ("top", "left", "side"))
        resized = F.interpolate(x[k:k + 1], (side, side), mode="bilinear", antialias=True)[0]
        want = torch.zeros(3, 32, 32)
        if side <= 32:
            want[:, top:top + side, left:left + side] = resized
        else:
            want = resized[:, -top:32 - top, -left:32 - left]
        assert_close(out[k], want, rtol=1e-4, atol=1e-5)
        border = side < 32                                              # in pixels too, one all around is left out
        assert mask[k].sum() == ((side - 2) ** 2 if border else 32 ** 2)
        assert not border or mask[k, 0, top + 1:top + side - 1, left + 1:left + side - 1].all()
        assert (words[k] in (1, 2)) == border and (words[k] in (3, 4)) == (side > 32)
        seen.add(int(words[k]))
        assert side != 32 or torch.equal(out[k], x[k])
    assert seen == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("size,factor", [(24, 8), (32, 8), (48, 8), (64, 8), (32, 4), (32, 1), (512, 8)])
def test_a_mask_is_never_empty_and_otherwise_official(size, factor):
    u = torch.rand(4000, 5, generator=generator(size))
    g, filled_up = cd.geometry(u, size, factor), 0
    for k in torch.nonzero(g["side"] < size)[:, 0].tolist():
        s, cells = g["side"][k].item(), size // factor
        want = torch.zeros(cells, cells, dtype=torch.bool)
        lines = [slice(corner // factor + 1, (corner + s) // factor - 1)
                 for corner in (g["top"][k].item(), g["left"][k].item())]
        want[max(lines[0].start, 0):max(lines[0].stop, 0), max(lines[1].start, 0):max(lines[1].stop, 0)] = True
        assert g["mask"][k].any()
        filled_up += not want.any()
        assert not want.any() or torch.equal(g["mask"][k, 0], want)
    # shares of empty masks measured with the official code
    want = {(64, 8): 0.015, (48, 8): 0.11, (32, 8): 0.26, (32, 4): 0.022, (32, 1): 0, (512, 8): 0}.get((size, factor))
    assert want is None or filled_up / 4000 == pytest.approx(want, abs=0.02)
    if size == 512:
        far, plain = (g["side"] < size).float().mean(), (g["side"] == size).float().mean()
        assert far == pytest.approx(0.266, abs=0.02) and plain == pytest.approx(0.4, abs=0.02)


def test_sizes_that_cannot_be_augmented_are_named():
    for size, factor in ((31, 1), (28, 8)):
        with pytest.raises(ValueError, match=f"{size} pixels"):
            cd.geometry(torch.rand(1, 5), size, factor)


def test_mix_is_half_and_half_and_everyone_has_a_turn():
    picture = lambda v, n: torch.arange(v, v + n).view(n, 1, 1, 1).expand(n, 3, 8, 8) / 100
    concepts = [(picture(0, 2), ["a <new1> dog", "a red <new1> dog"]), (picture(10, 3), ["a <new2> cat"] * 3)]
    prior = (picture(50, 5), [f"prior {k}" for k in range(5)])
    x, captions, mask = cd.mix(concepts, prior, 12, factor=2, augmented=False, generator=generator())
    value = (x[:, 0, 0, 0] * 100).round().int().tolist()
    assert value[:12] == [0, 10, 1, 11, 0, 12, 1, 10, 0, 11, 1, 12]
    assert captions[:3] == ["a <new1> dog", "a <new2> cat", "a red <new1> dog"] and len(captions) == 24
    assert captions[12:] == [f"prior {v - 50}" for v in value[12:]]
    assert sorted(value[12:17]) == sorted(value[17:22]) == [*range(50, 55)]             # in rounds, each in any order
    assert mask.shape == (24, 1, 4, 4) and mask.all()
    x, captions, mask = cd.mix(concepts, prior, 200, factor=1, generator=generator())
    shrunk = [c.startswith(("a far away a", "very small a")) for c in captions[:200]]
    assert shrunk == [not m.all() for m in mask[:200]] and 20 < sum(shrunk) < 90
    assert mask[200:].all() and not any(c.startswith(cd.SIZE_WORDS[1:]) for c in captions[200:])
    x, captions, _ = cd.mix(concepts, None, 50, words=(), generator=generator())
    assert len(x) == len(captions) == 50 and set(captions) == {"a <new1> dog", "a red <new1> dog", "a <new2> cat"}


@pytest.mark.parametrize("flow", [False, True])
def test_masked_loss(flow):
    d, g = golden_case("cd_masked_loss")
    pred, noise, mask = g["pred"].requires_grad_(), g["noise"], g["mask"]
    process, x0 = (RectifiedFlow(), torch.zeros(4, 4, 8, 8)) if flow else (GaussianDiffusion(), torch.randn(4, 4, 8, 8))
    model, t = lambda xt, t, cond: pred, torch.tensor([1, 2, 3, 4])         # a flow's target from 0 is eps as well
    true, _ = cd.concept_loss(process, model, x0, None, mask, t, noise)
    official, _ = cd.concept_loss(process, model, x0, None, mask, t, noise, official_scale=True)
    assert_close(true.detach(), g["loss_channel_mean"])
    assert_close(official.detach(), g["loss_compvis"])
    assert_close(torch.autograd.grad(official, pred)[0], g["grad_pred_compvis"])
    half = lambda rows, m, scale: cd.concept_loss(process, lambda xt, t, cond: pred[rows], x0[rows], None, m, t[rows],
                                                  noise[rows], official_scale=scale)[0].detach()
    targets, prior = half(slice(2), mask[:2], True), half(slice(2, 4), None, False)
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
    padded = cd.caption_rows(model.text, tokenizer, captions, padding=True)
    assert torch.equal(torch.stack(padded), states[:, 1:])


def test_the_prior_speaks_of_the_class():
    """A text encoder whose end state is the number of dogs and of cats: cosines by hand."""
    tokenizer = WordTokenizer(WORDS, reserved=0, max_length=8)
    dog, cat = tokenizer.ids["dog"], tokenizer.ids["cat"]
    text = nn.Module()
    text.forward = lambda ids: torch.stack([(ids == dog).cumsum(1), (ids == cat).cumsum(1)], -1) + 1e-6
    captions = ["dog", "dog dog cat", "cat", "dog dog dog cat", "red cat dog", "dog red"]   # 1 .89 0 .95 .71 1
    select = lambda **how: sorted(cd.select_prior(text, tokenizer, captions, "photo of a dog", **how).tolist())
    assert select() == [0, 1, 3, 5] and select(threshold=0.9) == [0, 3, 5] and select(threshold=0.6) == [0, 1, 3, 4, 5]
    drawn = {tuple(select(count=2, generator=generator(seed))) for seed in range(20)}
    assert len(drawn) > 2 and all(set(pair) < {0, 1, 3, 5} and len(pair) == 2 for pair in drawn)
    with pytest.raises(ValueError, match="nearest has 1.000"):
        select(threshold=1.01)


# ----------------------------------------------------------------------------------------------------------------------
# what was learned

def test_weight_change_is_the_papers():
    d, g = golden_case("cd_delta")
    shapes, names = [(name, shape) for name, shape, _ in d["config"]["tensors"]], [t[0] for t in d["config"]["tensors"]]
    before, tuned = filled(shapes), filled(shapes, "tuned.")
    after = {name: before[name].double() + scale * tuned[name].double() for name, _, scale in d["config"]["tensors"]}
    before["zero.bias"], after["zero.bias"] = torch.zeros(3), torch.ones(3)
    before["count"] = after["count"] = torch.tensor(7)
    change, means = cd.weight_change(before, after)
    assert list(change) == names
    assert_close(torch.tensor(list(change.values()), dtype=torch.float64), g["per_tensor"], rtol=1e-7, atol=1e-12)
    assert means == pytest.approx(d["category_means"], rel=1e-7)


def test_compression_is_the_official_one():
    d, g = golden_case("cd_compress")
    W0 = filled(d["params"])
    W = {name: w + g[f"delta:{name}"] for name, w in W0.items()}
    for ratio in d["config"]["ratios"]:
        factors = cd.compress(W, W0, ratio)
        for name, (u, v) in factors.items():
            assert u.shape[1] == v.shape[0] == d["ranks"][str(ratio)][name]
            assert_close(u @ v, g[f"lowrank@{ratio}:{name}"], rtol=1e-5, atol=2e-6)
            assert_close(cd.expand(factors, W0)[name], W0[name] + g[f"lowrank@{ratio}:{name}"], rtol=1e-5, atol=2e-6)


def test_compression_by_energy_and_at_the_ends():
    W0, W = {"w": torch.zeros(6, 4, dtype=torch.float64)}, {"w": normal(6, 4)}
    s = torch.linalg.svdvals(W["w"])
    for ratio in (0.2, 0.5, 0.9, 0.99):
        u, v = cd.compress(W, W0, ratio, energy=True)["w"]
        kept = 1 - ((W["w"] - u @ v).norm() / W["w"].norm()) ** 2
        assert kept >= ratio > (s[:u.shape[1] - 1] ** 2).sum() / (s ** 2).sum()             # enough, and not one more
    for energy in (False, True):
        assert_close(cd.expand(cd.compress(W, W0, 1.0, energy), W0), W)
        assert cd.compress(W, W0, 0.0, energy)["w"][0].shape == (6, 0)
        assert not cd.expand(cd.compress(W0, W0, 0.6, energy), W0)["w"].any()               # nothing learned: no NaN
    with pytest.raises(ValueError, match="ratio 1.5"):
        cd.compress(W, W0, 1.5)


# ----------------------------------------------------------------------------------------------------------------------
# merge

def golden_merge(case):
    """(W0, concepts, C_reg, arrays, description) of a golden case."""
    d, g = golden_case(case)
    c, W0 = d["config"], filled(d["params"])
    Cs = g["C"].split(c["s"])
    Ws = [{name: w + torch.tensor(c["delta"]) * delta for (name, w), delta in
           zip(W0.items(), filled(d["params"], f"concept{k}.").values())} for k in range(1, c["n_concepts"] + 1)]
    return W0, list(zip(Ws, Cs)), g["Creg"], g, d


@pytest.mark.parametrize("case", ["cd_merge_2concepts", "cd_merge_3concepts", "cd_merge_illcond"])
def test_merge_is_the_exact_answer_and_the_official_one(case):
    W0, concepts, C_reg, g, d = golden_merge(case)
    W, report = cd.merge(W0, concepts, C_reg, ridge=0)
    P, _, _ = cd.merge_map(g["C"].double(), C_reg.double(), ridge=0)
    stats = d["stats"]["per_layer"]
    for name in W0:
        base, C, V = W0[name].double(), g["C"].double(), g[f"V:{name}"].double()
        assert_close(base + (V - base @ C.T) @ P, g[f"Wexact:{name}"], rtol=0, atol=1e-11)
        # beyond that: V is stored in float32, and the official answer computed in it
        assert_close(W[name], g[f"Wexact:{name}"], rtol=0, atol=2e-5 if "illcond" in case else 1e-6)
        assert_close(W[name], g[f"W:{name}"].double(), rtol=0, atol=2e-5 if "illcond" in case else 1e-6)
        V = torch.cat([Wn[name] @ C.T for Wn, C in concepts], 1)
        assert_close(V, g[f"V:{name}"], rtol=1e-5, atol=1e-5)
        dW = (W[name] - W0[name].double()).norm().item()
        assert dW == pytest.approx(stats[name]["nullspace_f64"]["dW"], rel=1e-5)
    assert report["constraint"] < 1e-13 and report["kkt"] < 1e-13 and report["dropped"] == 0
    assert report["cond_G"] ** 0.5 == pytest.approx(d["stats"]["cond_Creg"], rel=1e-4)
    # the two simple ways miss the constraints by as much as was measured with the official code's matrices
    Ws, C = [W for W, _ in concepts], torch.cat([C for _, C in concepts])
    for name, mine in (("average_of_concepts", cd.average(Ws)), ("sum_of_deltas", cd.add_changes(W0, Ws))):
        for layer in W0:
            V = g[f"V:{layer}"]
            miss = ((mine[layer] @ C.T - V).norm() / V.norm()).item()
            assert miss == pytest.approx(stats[layer][name]["constraint_rel"], rel=1e-4)


class ToyText(nn.Module):
    """The text encoder of the end-to-end cases: word + half its place, mixed with the running mean of what came."""

    def __init__(self, tokenizer, words, rows, d):
        super().__init__()
        shapes = [("text.tok.weight", (2 + len(words), d)), ("text.pos.weight", (16, d)), ("text.mix.weight", (d, d))]
        start, end, *own = d ** 0.5 * filled(shapes)["text.tok.weight"]
        self.table = {0: end, 1: start, 2: end, **{tokenizer.ids[word]: row for word, row in zip(words, own)},
                      **{tokenizer.ids[word]: row for word, row in rows.items()}}
        self.places, self.mixing = d ** 0.5 * filled(shapes)["text.pos.weight"], filled(shapes)["text.mix.weight"]

    def forward(self, ids):
        h = torch.stack([torch.stack([self.table[i] for i in row]) for row in ids.tolist()]) + 0.5 * self.places
        mean = h.cumsum(1) / torch.arange(1, 17)[None, :, None]
        return torch.tanh(h + mean @ self.mixing.T)


@pytest.mark.parametrize("case,dropped", [("cd_merge_compose", None), ("cd_merge_compose_dedup", 5)])
def test_merge_from_words_to_weights_is_the_official_one(case, dropped):
    d, g = golden_case(case)
    c = d["config"]
    tokenizer = WordTokenizer(c["words"], reserved=4, max_length=16)
    tokens, rows = [f"<new{k}>" for k in range(1, len(c["categories"]) + 1)], {}
    for k, token in enumerate(tokens, 1):
        tokenizer.add_token(token)
        rows[token] = c["d"] ** 0.5 * filled([(f"concept{k}.embed", (1, c["d"]))])[f"concept{k}.embed"][0]
    text = ToyText(tokenizer, c["words"], rows, c["d"])
    C_reg = torch.cat(cd.caption_rows(text, tokenizer, c["reg_captions"], "photo of a"))
    assert_close(C_reg, g["Creg"], rtol=1e-5, atol=1e-6)
    Cs = [cd.prompt_rows(text, tokenizer, f"{token} {what}") for token, what in zip(tokens, c["categories"])]
    W0 = filled(d["params"])
    Ws = [{name: w + torch.tensor(c["delta"]) * delta for (name, w), delta in
           zip(W0.items(), filled(d["params"], f"concept{k}.").values())} for k in range(1, len(tokens) + 1)]
    W, report = cd.merge(W0, list(zip(Ws, Cs)), C_reg, ridge=0)
    everything, kept = torch.cat(Cs), len(g["C"])
    assert report["rows"] == kept and report["dropped"] == len(everything) - kept
    assert dropped is None or report["dropped"] == dropped
    assert_close(everything[cd._distinct(everything.double(), 1e-3)], g["C"], rtol=1e-5, atol=1e-6)
    for name in W0:
        # the float32 of the official answer is off by as much as its own golden says
        off = d["stats"][name]["max_abs_minus_nullspace"]
        assert_close(W[name].float(), g[f"W:{name}"], rtol=0, atol=1.5 * off + 1e-5)
        V = g[f"V:{name}"].double()
        assert (W[name] @ g["C"].double().T - V).norm() / V.norm() < 1e-5


def problem(d=12, s=(2, 3), r=40, outs=(5, 7), seed=0):
    W0 = {f"w{k}": normal(o, d, seed=seed + k) for k, o in enumerate(outs)}
    tuned = lambda n: {name: w + 0.3 * normal(*w.shape, seed=seed + 50 + 9 * n + k)
                       for k, (name, w) in enumerate(W0.items())}
    concepts = [(tuned(n), normal(rows, d, seed=seed + 20 + n)) for n, rows in enumerate(s)]
    return W0, concepts, normal(r, d, seed=seed + 99)


def kkt_solution(W0, C, V, G):
    """Eq. 4 by its Lagrangian, every unknown at once: [G C^T; C 0] [W^T; -mu] = [G W0^T; V^T]."""
    (s, d), o = C.shape, W0.shape[0]
    system = torch.cat([torch.cat([G, C.T], 1), torch.cat([C, torch.zeros(s, s, dtype=G.dtype)], 1)])
    return torch.linalg.solve(system, torch.cat([G @ W0.T, V.T]))[:d].T


@pytest.mark.parametrize("ridge", [0, 1e-6, 0.1])
def test_merge_solves_the_lagrangian_system(ridge):
    W0, concepts, C_reg = problem()
    W, report = cd.merge(W0, concepts, C_reg, ridge)
    C, G = torch.cat([C for _, C in concepts]), C_reg.T @ C_reg
    G = G + ridge * G.trace() / 12 * torch.eye(12, dtype=torch.float64)
    null = torch.linalg.svd(C)[2][5:].T                                                     # (d, d - s): ker C
    for name in W0:
        V = torch.cat([Wn[name] @ C.T for Wn, C in concepts], 1)
        assert_close(W[name], kkt_solution(W0[name], C, V, G), rtol=0, atol=1e-11)
        step = W[name] + normal(*W0[name].shape[:1], 7, seed=3) @ null.T * 1e-2             # any other feasible point
        cost = lambda w: ((w - W0[name]) @ G * (w - W0[name])).sum()
        assert_close(step @ C.T, V) and cost(step) > cost(W[name])
    dW = torch.cat([W[name] - W0[name] for name in W0])
    assert report["dW"] == pytest.approx(dW.norm().item())
    assert report["W0"] == pytest.approx(torch.cat(list(W0.values())).norm().item())
    assert report["changes"] == pytest.approx([
        torch.cat([Wn[k] - W0[k] for k in W0]).norm().item() for Wn, _ in concepts])
    D = C @ torch.linalg.inv(G)
    assert report["cond_G"] == pytest.approx(torch.linalg.cond(G).item(), rel=1e-6)
    assert report["cond_DCt"] == pytest.approx(torch.linalg.cond(D @ C.T).item(), rel=1e-6)
    assert report["kkt"] < 1e-14 and report["constraint"] < 1e-14


def test_the_reported_residual_is_the_one_defined_and_can_fail():
    """kkt = ||dW G N|| / (||dW|| ||G||), here for the smallest change that keeps the constraints: not the optimum."""
    W0, concepts, C_reg = problem()
    C, G = torch.cat([C for _, C in concepts]), C_reg.T @ C_reg
    with pytest.MonkeyPatch.context() as patch:                     # as if G were the identity
        patch.setattr(torch.linalg, "eigh", lambda G: (torch.ones(12).double(), torch.eye(12).double()))
        W, report = cd.merge(W0, concepts, C_reg, 0)
    null = torch.linalg.svd(C)[2][5:].T
    worst = max(((W[k] - W0[k]) @ G @ null).norm() / (W[k] - W0[k]).norm() / G.norm() for k in W0)
    assert report["constraint"] < 1e-13 and report["kkt"] == pytest.approx(worst.item(), rel=1e-6) and worst > 0.01


def test_properties_of_the_merge():
    W0, concepts, C_reg = problem()
    W, _ = cd.merge(W0, concepts, C_reg, 0)
    near = lambda other: assert_close(other[0], W, rtol=0, atol=1e-10)
    unchanged, report = cd.merge(W0, [(W0, C) for _, C in concepts], C_reg)
    assert_close(unchanged, W0) and report["dW"] == 0
    C = normal(12, 12, seed=7)                                      # as many rows as the width: all of W_1 is asked for
    assert_close(cd.merge(W0, [(concepts[0][0], C)], C_reg)[0], concepts[0][0], rtol=0, atol=1e-9)
    near(cd.merge(W0, concepts, 7 * C_reg, 0))
    near(cd.merge(W0, concepts, C_reg.flip(0), 0))
    near(cd.merge(W0, concepts, torch.linalg.qr(normal(40, 40, seed=5))[0] @ C_reg, 0))
    mixed = [(Wn, normal(len(C), len(C), seed=11) @ C) for Wn, C in concepts]       # other rows, the same span
    near(cd.merge(W0, mixed, C_reg, 0))
    near((cd.merge(W0, concepts[::-1], C_reg, 0)[0],))
    for Wn, C in concepts:                                          # each thing's words give its own keys and values
        assert_close({k: w @ C.T for k, w in W.items()}, {k: Wn[k] @ C.T for k in W}, rtol=1e-9, atol=1e-9)
    least, _ = cd.merge(W0, concepts, torch.eye(12, dtype=torch.float64), 0)        # G = I: the smallest change
    C = torch.cat([C for _, C in concepts])
    for name in W0:
        V = torch.cat([Wn[name] @ C.T for Wn, C in concepts], 1)
        assert_close(least[name] - W0[name], (V - W0[name] @ C.T) @ torch.linalg.pinv(C).T, rtol=0, atol=1e-10)
    assert_close(cd.merge(W0, concepts, C_reg, 1e-6)[0], W, rtol=0, atol=1e-4)


def test_a_ridge_gives_the_smallest_change_where_captions_say_nothing():
    W0, concepts, C_reg = problem(r=8)                              # 8 rows in 12 directions
    with pytest.raises(ValueError, match="span 8 of 12"):
        cd.merge(W0, concepts, C_reg, ridge=0)
    C, G = torch.cat([C for _, C in concepts]), C_reg.T @ C_reg
    for ridge in (1e-8, 1e-6):
        W, report = cd.merge(W0, concepts, C_reg, ridge)
        assert report["constraint"] < 1e-10
        for name in W0:                 # 4 free directions, 5 constraints: least cost, in the limit, by the null space
            V = torch.cat([Wn[name] @ C.T for Wn, C in concepts], 1)
            exact = kkt_solution(W0[name], C, V, G + ridge * G.trace() / 12 * torch.eye(12, dtype=torch.float64))
            assert_close(W[name], exact, rtol=0, atol=1e-6)


def test_rows_that_are_nearly_equal_count_once_and_bad_ones_are_refused():
    W0, ((W1, C1), (W2, C2)), C_reg = problem()
    apart = lambda e: torch.cat([C2[:1], C1[:1] + e * normal(1, 12, seed=8)])       # one row of C2 is nearly one of C1
    W, report = cd.merge(W0, [(W1, C1), (W2, apart(1e-5))], C_reg)
    assert (report["rows"], report["dropped"]) == (3, 1)
    assert_close(W["w0"] @ C1[0], W1["w0"] @ C1[0])                                 # the first concept's value holds
    _, loose = cd.merge(W0, [(W1, C1), (W2, apart(1e-5))], C_reg, tolerance=1e-9)
    assert loose["rows"] == 4 and loose["dW"] > 1e3 * report["dW"] and loose["cond_DCt"] > 1e6 * report["cond_DCt"]
    with pytest.raises(ValueError, match="13 target rows.*12 wide"):
        cd.merge(W0, [(W1, normal(13, 12))], C_reg)
    with pytest.raises(ValueError, match="3 target rows depend"):
        cd.merge(W0, [(W1, torch.stack([C1[0], C1[1], C1[0] + C1[1]]))], C_reg)
    with pytest.raises(ValueError, match="no w1"):
        cd.merge(W0, [({"w0": W1["w0"]}, C1)], C_reg)
    with pytest.raises(ValueError, match=r"widths \[11, 12\]"):
        cd.merge(W0, [(W1, C1)], C_reg[:, :11])


# ----------------------------------------------------------------------------------------------------------------------
# files and the command line

def learned(seed=1):
    """(base U-Net's state_dict, changed K/V, row of V*) of a tiny model."""
    unet = tiny()[0].unet.state_dict()
    kv = [name for name in unet if "attn2.to_k" in name or "attn2.to_v" in name]
    return unet, {name: unet[name] + 0.1 * normal(*unet[name].shape, seed=seed).float() for name in kv}, \
        normal(24, seed=seed).float()


def test_what_is_saved_comes_back(tmp_path):
    unet, W, row = learned()
    cd.save_concept(tmp_path / "a.pt", W, {"<new1>": row}, ["<new1> dog"], unet)
    back, modifiers, concepts = cd.load_concept(tmp_path / "a.pt", unet)
    assert_close(back, W, rtol=0, atol=0)
    assert torch.equal(modifiers["<new1>"], row) and concepts == ["<new1> dog"]
    cd.save_concept(tmp_path / "b.pt", W, {"<new1>": row}, ["<new1> dog"], unet, ratio=0.6)
    small, *_ = cd.load_concept(tmp_path / "b.pt", unet)
    assert_close(small, cd.expand(cd.compress(W, unet), unet))
    half = {name: w.half().float() for name, w in unet.items()}                 # an exported base is the same base
    assert_close(cd.load_concept(tmp_path / "a.pt", half)[0], W, rtol=0, atol=0)
    bias = {next(name for name in unet if name.endswith("attn2.to_out.0.bias")): torch.ones(32)}
    cd.save_concept(tmp_path / "c.pt", W | bias, {}, ["dog"], unet, ratio=0.6)              # all of cross-attention
    assert_close(cd.load_concept(tmp_path / "c.pt", unet)[0], small | bias)
    cd.save_concept(tmp_path / "v.pt", {}, {"<new1>": row}, ["<new1> dog"], unet)           # textual inversion
    assert cd.load_concept(tmp_path / "v.pt", unet)[0] == {}
    other = {name: w + 1 for name, w in unet.items()}
    with pytest.raises(ValueError, match="learned on base"):
        cd.load_concept(tmp_path / "a.pt", other)


def test_a_concept_makes_the_model_what_it_was_when_trained(tmp_path):
    model, tokenizer = tiny()
    unet = {name: w.clone() for name, w in model.unet.state_dict().items()}
    cd.personalise(model, tokenizer, {"<new1>": "rarely"})
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.1)
    W = {name: p for name, p in model.unet.named_parameters() if p.requires_grad}
    cd.save_concept(tmp_path / "a.pt", W, {"<new1>": model.text.rows[0]}, ["<new1> dog"], unet)
    fresh, other = tiny()
    cd.apply_concept(fresh, other, *cd.load_concept(tmp_path / "a.pt", fresh.unet.state_dict())[:2])
    x, t, caption = torch.randn(1, 3, 8, 8), torch.tensor([9]), ["photo of a <new1> dog"]
    assert torch.equal(fresh(x, t, other(caption)), model(x, t, tokenizer(caption)))


def test_file_of_stable_diffusions_size_is_73_mebibytes(tmp_path):
    with torch.device("meta"):
        names = {name: p.shape for name, p in cd.trainable_kv(UNet(**UNET_CONFIGS["SD-v1"])).items()}
    unet = {name: torch.zeros(shape) for name, shape in names.items()}
    cd.save_concept(tmp_path / "a.pt", unet, {"<new1>": torch.zeros(768)}, ["<new1> dog"], unet)
    assert round((tmp_path / "a.pt").stat().st_size / 2 ** 20) == 73


def test_published_files_of_both_repositories(tmp_path):
    """CompVis names with a table of rows; diffusers' names, counted per level, with a dict of rows; compressed ones."""
    unet, W, row = learned()
    compvis = {f"model.diffusion_model.{name}": w for name, w in W.items()}
    torch.save({"state_dict": compvis | {"embed": row[None]}}, tmp_path / "compvis.ckpt")
    # one ResBlock per level and two levels: input 1, 3; middle; output 0, 1, 2, 3
    places = {"input_blocks.1.1": "down_blocks.0.attentions.0", "input_blocks.3.1": "down_blocks.1.attentions.0",
              "middle_block.1": "mid_block.attentions.0", "output_blocks.0.1": "up_blocks.0.attentions.0",
              "output_blocks.1.1": "up_blocks.0.attentions.1", "output_blocks.2.1": "up_blocks.1.attentions.0",
              "output_blocks.3.1": "up_blocks.1.attentions.1"}
    rename = lambda name: next(name.replace(a, b) for a, b in places.items() if name.startswith(a))
    diffusers = {rename(name): w.half() for name, w in reversed(W.items())}
    torch.save({"unet": diffusers, "modifier_token": {"<new1>": row}}, tmp_path / "delta.bin")
    factors = {rename(name): {"u": u, "v": v} for name, (u, v) in cd.compress(W, unet, 0.9).items()}
    torch.save({"unet": factors, "modifier_token": {"<new1>": row}}, tmp_path / "compressed_delta.bin")
    for file, want, near in (("compvis.ckpt", W, 0), ("delta.bin", W, 1e-3),
                             ("compressed_delta.bin", cd.expand(cd.compress(W, unet, 0.9), unet), 1e-5)):
        back, modifiers, concepts = cd.load_concept(tmp_path / file, unet)
        assert_close(back, want, rtol=0, atol=near, msg=lambda m: f"{file}: {m}")
        assert_close(modifiers, {"<new1>": row}) and concepts == ["<new1>"]


@pytest.mark.parametrize("content,words", [
    ({"state_dict": {"a": torch.ones(2)}}, "no concept for this U-Net"),
    ({"unet": {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(2)}}, "1 matrices"),
    ({"unet": {"somewhere.attn2.to_k.weight": torch.ones(2)}}, "no name of"),
    ({"state_dict": {"input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(2)}}, "does not fit"),
    ([1, 2], "no concept for this U-Net")])
def test_files_that_are_no_concept_are_named(tmp_path, content, words):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=words):
        cd.load_concept(tmp_path / "x.bin", learned()[0])


@pytest.fixture
def folder(tmp_path):
    """A base checkpoint, two concepts of it and a file of captions."""
    model, tokenizer = tiny()
    save_checkpoint(tmp_path / "base.pt", {
        "format": 1, "task": "unet", "config": {"data": "scenes"}, "info": {"vocabulary": tokenizer.state()},
        "ema": model.state_dict()})
    for seed, (name, what) in enumerate((("dog", "<new1> dog"), ("cat", "<new1> cat")), 1):
        unet, W, row = learned(seed)
        cd.save_concept(tmp_path / f"{name}.pt", W, {"<new1>": row}, [what], unet)
    captions = [f"{a} {b} {c}" for a in ("a", "photo of a") for b in ("red", "blue", "green") for c in WORDS[2:]]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    return tmp_path


def test_names_that_are_taken_are_numbered(tmp_path):
    unet, W, _ = learned()
    rows = [torch.full((24,), float(k)) for k in range(5)]
    cd.save_concept(tmp_path / "a.pt", W, {"<new1>": rows[0]}, ["<new1> dog"], unet)
    cd.save_concept(tmp_path / "b.pt", W, {"<new1>": rows[1], "<new2>": rows[2]}, ["<new1> cat", "<new2> pot"], unet)
    cd.save_concept(tmp_path / "c.pt", W, {"<new2>": rows[3]}, ["<new2> sky"], unet)
    _, modifiers, concepts = cd.gather([tmp_path / name for name in ("a.pt", "b.pt", "c.pt")], unet)
    assert concepts == [["<new1> dog"], ["<new3> cat", "<new2> pot"], ["<new4> sky"]]
    assert {token: row[0].item() for token, row in modifiers.items()} == {"<new1>": 0, "<new3>": 1, "<new2>": 2,
                                                                           "<new4>": 3}


def test_merge_from_the_command_line(folder, capsys):
    at = lambda name: str(folder / name)
    cd.main(["merge", at("dog.pt"), at("cat.pt"), "--base", at("base.pt"), "--captions", at("captions.txt"), "--out",
             at("both.pt")])
    said = capsys.readouterr().out
    assert "cond(G)" in said and "||dW||" in said and "12 target rows (0 dropped" in said
    model, tokenizer = tiny()
    W0 = copy.deepcopy(model.unet.state_dict())
    W, modifiers, concepts = cd.load_concept(folder / "both.pt", W0)
    assert list(modifiers) == ["<new1>", "<new2>"] and concepts == ["<new1> dog", "<new2> cat"]
    cd.apply_concept(model, tokenizer, W, modifiers)
    for k, (file, what) in enumerate((("dog.pt", "dog"), ("cat.pt", "cat")), 1):    # each word reaches its own K and V
        own, word, _ = cd.load_concept(folder / file, W0)
        assert torch.equal(modifiers[f"<new{k}>"], word["<new1>"])
        states = model.text(tokenizer([f"<new{k}> {what}"]))[0, 1:4].detach()
        for name in W:
            assert_close(states @ W[name].T, states @ own[name].T, rtol=1e-3, atol=1e-4)


def test_compress_from_the_command_line_and_published_categories(folder, capsys):
    at = lambda name: str(folder / name)
    cd.main(["compress", at("dog.pt"), "--base", at("base.pt"), "--ratio", "0.3", "--out", at("small.pt")])
    assert (folder / "small.pt").stat().st_size < 0.7 * (folder / "dog.pt").stat().st_size
    unet, W, row = learned()
    torch.save({"unet": W, "modifier_token": {"<new1>": row}}, folder / "published.bin")
    merging = ["merge", at("dog.pt"), at("published.bin"), "--base", at("base.pt"), "--captions", at("captions.txt"),
               "--out", at("both.pt")]
    cd.main([*merging, "--category", "pot"])
    assert cd.load_concept(folder / "both.pt", unet)[2] == ["<new1> dog", "<new2> pot"]
    cd.save_concept(folder / "v.pt", {}, {"<new1>": row}, ["<new1> dog"], unet)
    capsys.readouterr()
    for flags, words in ((merging, "--category"), ([*merging, "--captions", "nothing", "--category", "pot"], "nothing"),
                         ([*merging[:2], at("v.pt"), *merging[3:]], "only those can be merged"),
                         (["compress", at("base.pt"), "--base", at("base.pt"), "--out", at("x.pt")], "no concept"),
                         (["compress", at("dog.pt"), "--base", at("dog.pt"), "--out", at("x.pt")], "no text-to-image")):
        with pytest.raises(SystemExit) as stopped:
            cd.main(flags)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and words in err and len(err.strip().splitlines()) == 1
