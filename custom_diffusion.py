"""Custom Diffusion: teach a text-to-image model a thing of your own, and put several things together.

Paper: Multi-Concept Customization of Text-to-Image Diffusion (Kumari et al. 2022, arXiv 2212.04488).

The idea.  Words enter the U-Net in one place: cross-attention turns every text state c into a key W_k c
and a value W_v c. So a new thing is learned by
    a new word V*     one new row of the word table, which starts as a copy of a rare word's row
    W_k and W_v       of every cross-attention: 2.2 % of Stable Diffusion's U-Net, a file of 73 MiB
from pictures of the thing ("photo of a V* dog"), mixed one to one with other pictures of its class, the
prior, so that "dog" keeps its meaning. Targets are shrunk and enlarged, and the caption says so.
Two things?  Learned apart they are two sets of matrices W_1, W_2. Keys and values are linear in the text
states, so look for the W that maps the states of each thing's own words (rows of C) as that thing's own
matrices do (rows of V), and changes those of other captions (rows of C_reg) as little as possible (Eq. 4):
    min ||(W - W0) C_reg^T||  such that  W C^T = V^T         G = C_reg^T C_reg,  D = C G^-1
    W = W0 + (V^T - W0 C^T) (D C^T)^-1 D                                                     (Eq. 5)

    python custom_diffusion.py learn --concept folder:my_dog --category dog --base BASE.pt --out out/dog
    python custom_diffusion.py merge out/dog/concept.pt out/cat/concept.pt --base BASE.pt --out both.pt
    python custom_diffusion.py compress dog.pt --base BASE.pt --ratio 0.6 --out small.pt

If the text states of the targets are almost linearly dependent, the merged change dW is huge and ruins
other prompts: compare ||dW|| with the concepts' own changes, both printed. On a small base use --padding
--ridge 10 --tolerance 0.5, and learn with the smallest learning rate that still learns the thing.

Differences from the official code (adobe-research/custom-diffusion):
1. V* is a parameter outside the table. There, weight decay shrinks every other row of the table too.
2. The masked loss is a mean over valid numbers. There, it is a sum over channels: C times as much.
3. A shrunk picture always has valid cells. There, its border of one cell can leave none (0/0).
4. Half of a batch are targets, exactly; pictures are not mirrored, as captions say left and right.
5. Merge in float64 with a small ridge, from one factorisation. States that are nearly equal count once;
   too many or dependent rows are refused. A concept is a style if "art" is one of its words.
6. compress with ratio 1 keeps everything. There, the last component is lost.
"""
import collections
import dataclasses
import difflib
import pathlib
import re

import torch
import torch.nn as nn
from tqdm import tqdm

import data
from checkpoint import load_checkpoint, read_torch, save_checkpoint
from cli import flag, one_line, parse, resolve_device
from data import to_float
from models import base_flags, base_task, fingerprint
from tasks import DiffusionTask
from train import Config, check_out, load_data, run

KV = r"\.attn2\.to_[kv]\.weight$"
# what learns in the U-Net: Custom Diffusion; its choice for faces; DreamBooth; textual inversion
PARTS = {"kv": KV, "crossattn": r"\.attn2\.", "all": r"", "none": r"(?!)"}
RARE = ("ktn", "pll", "ucd</w>")            # CLIP's ids 42170, 47629, 43514. Source: official code
# prefix of a caption: none if unscaled, 1 or 2 if shrunk, 3 or 4 if enlarged. Source: official code
SIZE_WORDS = ("", "a far away ", "very small ", "zoomed in ", "close up ")
PROMPTS, STYLE_PROMPTS = ("{}", "photo of a {}"), ("{}", "painting in the style of {}")


# --------------------------------------------------------------------------------------------------
# what is trained

def trainable_kv(unet, part="kv"):
    """Freeze a U-Net but for the part that is to learn -> {name: parameter}.

    part: "kv", W_k and W_v of every cross-attention; "crossattn", all of it; "all"; "none".
    Raises ValueError for another part, or if there is no cross-attention. Source: §3.1.
    """
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r} of a U-Net: choose of {', '.join(PARTS)}")
    unet.requires_grad_(False)
    chosen = {name: p for name, p in unet.named_parameters() if re.search(PARTS[part], name)}
    if not chosen and part != "none":
        raise ValueError("this model has no cross-attention (attn2) that could learn: take a U-Net "
                         "with text")
    for p in chosen.values():
        p.requires_grad_(True)
    return chosen


def detach_first_token(unet):
    """Stop the gradient through key and value of the start token in cross-attention -> hook handles.

    Its state is the same for every caption. K and V are detached, not the text state: otherwise W_k and
    W_v would still get its gradient. The output does not change. Source: appendix E; official code.
    """
    def hook(layer, inputs, out):
        return torch.cat([out[:, :1].detach(), out[:, 1:]], dim=1)                      # (B, L, D)
    layers = [m for name, m in unet.named_modules() if re.search(r"\battn2\.to_[kv]$", name)]
    return [layer.register_forward_hook(hook) for layer in layers]


class NewWords(nn.Module):
    """A text encoder with new words: ids (B, L) -> states (B, L, D).

    text: a TextEncoder; rows: {id: row (D,)}, each a parameter of its own. Source: §3.2 (V*).
    """

    def __init__(self, text, rows):
        super().__init__()
        self.text, self.ids = text, list(rows)
        self.rows = nn.ParameterList(nn.Parameter(row.detach().clone()) for row in rows.values())

    def forward(self, ids):
        return self.text(ids, dict(zip(self.ids, self.rows)))


def add_words(model, tokenizer, rows):
    """Teach model.text and the tokenizer new words, {token: row (D,)}. Raises ValueError if taken."""
    model.text = NewWords(model.text, {tokenizer.add_token(token): row for token, row in rows.items()})


def personalise(model, tokenizer, words, part="kv"):
    """Make a text-to-image model (.denoiser, .text) ready to learn -> {name: parameter that trains}.

    words: {new token: token whose row it starts from}; part: see trainable_kv. Raises ValueError for a
    token that is not in the vocabulary, or is taken. Source: §3.2; official code.
    """
    missing = [rare for rare in words.values() if rare not in tokenizer.ids]
    if missing:
        raise ValueError(f"{missing[0]!r} is no token of this vocabulary, so no new word can start from "
                         f"its row: choose one that is, such as {', '.join(list(tokenizer.ids)[-3:])}")
    model.requires_grad_(False)
    table = model.text.text_model.embeddings.token_embedding.weight                     # (vocab_size, D)
    if words:
        add_words(model, tokenizer, {new: table[tokenizer.ids[rare]] for new, rare in words.items()})
    trainable_kv(model.denoiser, part)
    detach_first_token(model.denoiser)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def rare_tokens(tokenizer, captions, count=1):
    """Tokens for new words to start from: used 5 to 10 times in `captions`, else the rarest -> list.

    Letters only, and no part of another token in use. For CLIP the official choice is RARE. Raises
    ValueError if there are too few. Source: the paper's details of training (200,000 captions).
    """
    names = {i: token for token, i in tokenizer.ids.items()}
    used = collections.Counter(names[i] for caption in captions for i in tokenizer.encode(caption))
    word = lambda token: token.removesuffix("</w>")
    fit = [t for t in used if word(t).isalpha()
           and not any(word(t) in other for other in used if other != t)]
    if len(fit) < count:
        raise ValueError(f"{len(fit)} words of these captions could serve to start from, {count} are "
                         "wanted: teach the things one by one")
    return sorted(fit, key=lambda t: (not 5 <= used[t] <= 10, used[t], t))[:count]


# --------------------------------------------------------------------------------------------------
# merge: Eq. 4 and 5

def merge_map(C, C_reg, ridge=1e-6):
    """What Eq. 5 shares between layers: P (s, d) = (D C^T)^-1 D -> (P, residual, condition numbers).

    C (s, d) and C_reg (r, d) float64; residual (s, d): P G / ||G|| without its part in the rows of C,
    0 at the optimum. Raises ValueError if s > d, if rows of C depend on each other, or if C_reg spans
    too little. Source: Eq. 5.
    """
    (s, d), eps = C.shape, torch.finfo(C.dtype).eps
    if s > d:
        raise ValueError(f"{s} target rows, but text states are only {d} wide, so no matrix maps all of "
                         "them as asked: use fewer prompts or concepts")
    G = C_reg.T @ C_reg                                                                 # (d, d)
    G = G + ridge * G.trace() / d * torch.eye(d, dtype=G.dtype)
    values, Q = torch.linalg.eigh(G)                                            # ascending (d,), (d, d)
    rank = int((values > d * eps * values[-1]).sum())
    if rank < d:
        raise ValueError(f"the regularisation captions span {rank} of {d} directions, so Eq. 5 has no "
                         "unique answer: give more captions, or a ridge such as 1e-6")
    # D C^T = A A^T with A = C G^-1/2: by A's singular values, no digit is lost to squaring
    A = C @ Q / values.sqrt()                                                           # (s, d)
    U, spread, Vt = torch.linalg.svd(A, full_matrices=False)                    # (s, s), (s,), (s, d)
    if spread[-1] <= s * eps * spread[0]:
        raise ValueError(f"the {s} target rows depend on each other, so they cannot all be mapped as "
                         "asked: use fewer prompts, or a larger tolerance")
    P, span = (U / spread) @ (Vt / values.sqrt()) @ Q.T, torch.linalg.qr(C.T)[0]        # (s, d), (d, s)
    PG = P @ (G / G.norm())
    return P, PG - PG @ span @ span.T, {"cond_G": (values[-1] / values[0]).item(),
                                        "cond_DCt": (spread[0] / spread[-1]).square().item()}


def merge(W0, concepts, C_reg, ridge=1e-6, tolerance=1e-3):
    """One set of matrices for several concepts, Eq. 5 -> ({name: W (o, d) float64}, report).

    W0: {name: (o, d)} of the base; concepts: [({name: W_n}, C_n (s_n, d))], C_n the text states of the
    concept's own words; C_reg (r, d): states whose keys and values should stay; ridge: so much of
    trace(G) / d is added to G's diagonal; tolerance: rows nearer than this share of their length are
    one, and the first's value holds. report: rows, dropped, cond_G, cond_DCt; of the worst layer the
    constraint ||W C^T - V^T|| / ||V|| over the rows that were kept and kkt ||(W - W0) G N|| /
    (||W - W0|| ||G||), N = ker C; norms W0 and dW and the list changes = ||W_n - W0||, of all layers.
    Raises ValueError for missing matrices, unequal widths, and as merge_map. Source: Eq. 4 and 5.
    """
    missing = [name for W, _ in concepts for name in W0 if name not in W]
    widths = {C_reg.shape[1], *(C.shape[1] for _, C in concepts), *(w.shape[1] for w in W0.values())}
    if missing or len(widths) > 1:
        raise ValueError(f"a concept has no {missing[0]}" if missing else
                         f"matrices and text states of widths {sorted(widths)}: take those of one model")
    Cs = [C.double() for _, C in concepts]
    C = torch.cat(Cs)                                                                   # (s, d)
    kept = _distinct(C, tolerance)
    P, residual, report = merge_map(C[kept], C_reg.double(), ridge)
    out, constraint, kkt, changes = {}, 0.0, 0.0, torch.zeros(len(concepts))
    norms = torch.zeros(2, dtype=torch.float64)
    for name, base in W0.items():
        base = base.double()
        deltas = [W[name].double() - base for W, _ in concepts]
        asked = torch.cat([dW @ C_n.T for dW, C_n in zip(deltas, Cs)], 1)[:, kept]  # (o, s) V^T - W0 C^T
        dW = asked @ P                                                                  # (o, d)
        out[name], V = base + dW, base @ C[kept].T + asked
        constraint = max(constraint, ((out[name] @ C[kept].T - V).norm() / V.norm()).item())
        kkt = max(kkt, ((asked @ residual).norm() / dW.norm().clamp(min=1e-300)).item())
        norms += torch.stack([base.norm(), dW.norm()]).square()
        changes += torch.tensor([delta.norm().square() for delta in deltas])
    report |= {"rows": len(kept), "dropped": len(C) - len(kept), "constraint": constraint, "kkt": kkt,
               "W0": norms[0].sqrt().item(), "dW": norms[1].sqrt().item(),
               "changes": changes.sqrt().tolist()}
    return out, report


def _distinct(C, tolerance):
    """Indices of rows of C (s, d) farther than tolerance x mean norm from each kept row before them."""
    distance = torch.cdist(C, C, compute_mode="donot_use_mm_for_euclid_dist")           # (s, s)
    distance, kept = distance / C.norm(dim=1).mean(), []
    for i in range(len(C)):
        if not kept or distance[i, kept].min() > tolerance:
            kept.append(i)
    return torch.tensor(kept)


@torch.no_grad()
def caption_rows(text, tokenizer, captions, lead="", padding=False):
    """Text states of each caption's words and of its end token -> list of (n, D), without the start.

    lead: words that are left out where a caption begins with them; padding: also the rows after the
    end token, which cross-attention reads too. Source: official composenW.py (without padding).
    """
    rows, device = [], next((p.device for p in text.parameters()), "cpu")
    for first in range(0, len(captions), 256):
        some = captions[first:first + 256]
        for caption, state in zip(some, text(tokenizer(some).to(device))):              # state (L, D)
            skip = len(tokenizer.encode(lead)) if (caption + " ").startswith(lead + " ") else 0
            end = min(len(tokenizer.encode(caption)) + 1, len(state) - 1)       # a long caption was cut
            rows.append(state[1 + skip:None if padding else end + 1])                   # (n, D)
    return rows


def prompt_rows(text, tokenizer, concept, padding=False):
    """Rows of C for a concept such as "<new1> dog": its words in the paper's two prompts -> (s, D).

    In a vocabulary without "photo": in "a <new1> dog". Source: official composenW.py.
    """
    prompts, lead = STYLE_PROMPTS if "art" in concept.split() else PROMPTS, "photo of a"
    if not tokenizer.open and "photo" not in tokenizer.ids:
        prompts, lead = ("a {}",), "a"
    return torch.cat(caption_rows(text, tokenizer, [p.format(concept) for p in prompts], lead, padding))


# --------------------------------------------------------------------------------------------------
# data

def select_prior(text, tokenizer, captions, target, count=200, threshold=0.85, generator=None):
    """Which captions speak of the target's class: cosine of end states above `threshold` -> indices.

    target: the prompt without V*, such as "photo of a dog". Up to `count`, at random among those near
    enough. Raises ValueError if there is none. Source: the paper's details of training.
    """
    ends = torch.stack([rows[-1] for rows in caption_rows(text, tokenizer, [target, *captions])])
    cosine = nn.functional.cosine_similarity(ends[1:], ends[:1])                        # (N,)
    near = torch.nonzero(cosine > threshold)[:, 0].cpu()
    if not len(near):
        raise ValueError(f"no caption is as near to {target!r} as {threshold}, the nearest has "
                         f"{cosine.max():.3f}: give other captions, or --prior generated")
    return near[torch.randperm(len(near), generator=generator)[:count]]


def geometry(u, size, factor):
    """Where each picture goes: uniform draws u (n, 5) -> dict of side, top, left, words (n,) and mask.

    The picture is made `side` pixels wide, its corner put at (top, left), negative to cut from the
    middle; words: index into SIZE_WORDS; mask (n, 1, h, w), on latent cells of `factor` pixels: True
    inside the picture but for a border of one cell, and never empty. Raises ValueError for a size that
    is odd or no multiple of factor. Source: official finetune_data.py.
    """
    if size % 2 or size % factor:
        raise ValueError(f"pictures of {size} pixels: the augmentation needs an even size that the "
                         f"first stage's factor {factor} divides")
    pick = lambda u, low, high: low + (u * (high - low)).long()                 # whole, in [low, high)
    scale = torch.where(pick(u[:, 0], 0, 3) < 2, pick(u[:, 1], size // 3, size + 1),
                        pick(u[:, 1], int(1.2 * size), int(1.4 * size)))
    scale = scale + scale % 2
    far, near, half, middle = scale < 0.6 * size, scale > size, scale // 2, size // 2
    low = torch.where(far, half, middle)
    high = torch.where(far, size - half, scale - middle) + 1
    centres = [pick(u[:, 2], low, high), pick(u[:, 3], low, high)]              # row, column
    corner = lambda c: torch.where(far, c - half, torch.where(near, middle - c, 0))
    cells = torch.arange(size // factor, device=u.device)

    def valid(c):
        first, last, cell = (c - half) // factor + 1, (c + half) // factor - 1, c // factor
        first, last = (torch.where(first < last, first, cell),
                       torch.where(first < last, last, cell + 1))
        return (cells >= first[:, None]) & (cells < last[:, None]) | ~far[:, None]      # (n, size / factor)

    rows, columns = valid(centres[0]), valid(centres[1])
    words = torch.where(far, 1, torch.where(near, 3, 0)) + (far | near) * pick(u[:, 4], 0, 2)
    return {"side": torch.where(far | near, scale, size), "top": corner(centres[0]),
            "left": corner(centres[1]), "words": words,
            "mask": rows[:, None, :, None] & columns[:, None, None, :]}                 # (n, 1, h, w)


def _resize_matrix(side, start, size):
    """(n, size, size): how row i of the new picture mixes the rows of the old one; 0 on the canvas.

    A triangle filter, as wide as a new pixel when shrinking: bilinear with antialiasing. It is linear
    and acts on rows and columns alike, so resize, paste and cut are one product of matrices.
    """
    pixels = torch.arange(size, device=side.device)
    offset, step = pixels - start[:, None], size / side[:, None]                        # (n, size), (n, 1)
    centre, width = (offset + 0.5) * step - 0.5, step.clamp(min=1)[..., None]
    weight = (1 - (pixels - centre[..., None]).abs() / width).clamp(min=0)              # (n, size, size)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)
    return weight * ((offset >= 0) & (offset < side[:, None]))[..., None]


def augment(x, u, factor=1):
    """Shrink or enlarge targets x (n, C, S, S) by draws u (n, 5) -> (x, mask (n, 1, h, w), words (n,)).

    The canvas is 0, mid grey. See geometry. Source: official finetune_data.py.
    """
    g, size = geometry(u, x.shape[-1], factor), x.shape[-1]
    rows = _resize_matrix(g["side"], g["top"], size)[:, None]
    columns = _resize_matrix(g["side"], g["left"], size)[:, None]
    return rows @ x @ columns.mT, g["mask"].float(), g["words"]                         # (n, C, S, S)


def mix(concepts, prior, count, factor=1, words=SIZE_WORDS, augmented=True, generator=None):
    """`count` targets, then as many prior pictures -> (x (N, C, S, S), captions, mask (N, 1, h, w)).

    concepts: [(pictures (n, C, S, S), n captions)], which take turns, as their pictures do; prior: the
    same for the classes, in random order, or None; words: SIZE_WORDS, or () for a small vocabulary.
    Source: the paper's details of training (targets are repeated until both sets are equal).
    """
    turns = [(k % len(concepts), k // len(concepts)) for k in range(count)]
    targets = [(concepts[c][0][i % len(concepts[c][0])], concepts[c][1][i % len(concepts[c][1])])
               for c, i in turns]
    x, captions = torch.stack([picture for picture, _ in targets]), [text for _, text in targets]
    mask = torch.ones(count, 1, *(side // factor for side in x.shape[2:]))
    if augmented:
        x, mask, said = augment(x, torch.rand(count, 5, generator=generator), factor)
        captions = [(words[w] if words else "") + text for w, text in zip(said.tolist(), captions)]
    if prior is not None:
        order = torch.cat([torch.randperm(len(prior[0]), generator=generator)
                           for _ in range(-(-count // len(prior[0])))])[:count]         # (count,)
        x, mask = torch.cat([x, prior[0][order]]), torch.cat([mask, torch.ones_like(mask)])
        captions = captions + [prior[1][i] for i in order.tolist()]
    return x, captions, mask


# --------------------------------------------------------------------------------------------------
# what was learned. W and W0 are state_dicts or parts of them, {name: tensor}

def weight_change(W0, W):
    """How far each tensor moved, ||W - W0|| / ||W0|| -> ({name: change}, {kind of layer: mean}).

    Kinds: cross-attention, self-attention, other. Tensors that are 0 in W0 are left out.
    Source: §3.1 and figure 3.
    """
    change, kinds = {}, {"cross-attention": [], "self-attention": [], "other": []}
    for name, before in W0.items():
        if before.is_floating_point() and before.any():
            moved = (W[name].double() - before.double()).norm()
            change[name] = (moved / before.double().norm()).item()
            kind = {"attn2": "cross-attention", "attn1": "self-attention"}
            parts = [kind[part] for part in name.split(".") if part in kind]
            kinds[parts[0] if parts else "other"].append(change[name])
    return change, {kind: sum(values) / len(values) for kind, values in kinds.items() if values}


def compress(W, W0, ratio=0.6, energy=False):
    """Each change W - W0 as a product of few columns and rows -> {name: (u (o, r), v (r, d))}.

    Kept are the largest singular values while they make up no more than `ratio` of the sum of all (so r
    may be 0); with energy, as few as make up `ratio` of the sum of squares. Raises ValueError for a
    ratio outside [0, 1]. Source: official compress.py; the paper keeps 60 %.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio {ratio}: give a share between 0 and 1")
    factors = {}
    for name, tensor in W.items():
        U, s, Vt = torch.linalg.svd(tensor.double() - W0[name].double(), full_matrices=False)
        share = (s.square() if energy else s).cumsum(0)
        share = share / share[-1].clamp(min=1e-300)                             # ends on exactly 1
        rank = int((share < ratio).sum() + (ratio > 0) if energy else (share <= ratio).sum())
        factors[name] = ((U[:, :rank] * s[:rank]).to(tensor.dtype), Vt[:rank].to(tensor.dtype))
    return factors


def expand(factors, W0):
    """{name: W0 + u v}, what compress kept. Source: official compress.py."""
    return {name: W0[name] + u @ v for name, (u, v) in factors.items()}


def average(Ws):
    """{name: mean of W_n}: a simple way to put concepts together, to compare with."""
    return {name: sum(W[name] for W in Ws) / len(Ws) for name in Ws[0]}


def add_changes(W0, Ws):
    """{name: W0 + sum of (W_n - W0)}. Source: task arithmetic, Ilharco et al. 2022, Eq. 2."""
    return {name: W0[name] + sum(W[name] - W0[name] for W in Ws) for name in Ws[0]}


# --------------------------------------------------------------------------------------------------
# the task

@dataclasses.dataclass
class Options:
    """flags of custom_diffusion.py learn"""
    base: str = flag("assets/unet-scenes.pt", "text-to-image checkpoint, or Stable Diffusion v1")
    concept: tuple = flag((), "pictures of each thing, folder:PATH ...")
    category: tuple = flag((), "what each thing is, one word each, such as dog")
    prior: str = flag("", "pictures that keep the category what it was: a data set with captions, "
                      "generated (by the base) or none; default: the base's own data")
    part: str = flag("kv", "what learns in the U-Net", "", list(PARTS))
    augment: bool = flag(True, "shrink and enlarge the pictures of things")
    bpe: str = flag("data/bpe_simple_vocab_16e6.txt.gz", "Stable Diffusion: CLIP's list of merges")


@dataclasses.dataclass
class LearnConfig(Config):
    """flags of the loop"""
    word_lr: float = flag(1e-2, "learning rate of the new words", "(0, inf)")


class ConceptTask(DiffusionTask):
    """Teach the model of the task `base` things from a few pictures each.

    dataset: the prior's pictures, or None for --prior generated or none; options: Options; config: of
    the loop. At the end OUT/concept.pt holds what was learned. Raises ValueError for a category that the
    vocabulary or the prior does not know. Source: Custom Diffusion §3.
    """
    family = "concept"

    def __init__(self, base, dataset, options, config):
        super().__init__(base.settings, base.info, base.model, base.process, base.first_stage,
                         base.tokenizer)
        self.options, self.config = options, config
        known, count = self.tokenizer.ids, len(options.concept)
        if not count or count != len(options.category):
            raise ValueError(f"{count} --concept and {len(options.category)} --category: give one "
                             "category for each concept")
        for category in () if self.tokenizer.open else options.category:
            if category not in known:
                near = ", ".join(difflib.get_close_matches(category, list(known), 3))
                raise ValueError(f"--category {category}: {options.base} does not know this word"
                                 + (f"; near it: {near}" if near else ""))
        if self.tokenizer.open and count > len(RARE):
            raise ValueError(f"{count} things at once, and {len(RARE)} rare tokens to start from: teach "
                             "some of them apart, and merge")
        unet = self.model.denoiser.state_dict()
        self.W0 = {name: w.clone() for name, w in unet.items() if ".attn2." in name}
        captions = base.info["examples"] + (dataset.captions or [] if dataset else [])
        rare = RARE if self.tokenizer.open else rare_tokens(self.tokenizer, captions, count)
        free = (f"<new{k}>" for k in range(1, 1000) if f"<new{k}>" not in known)
        self.words = dict(zip(free, rare[:count]))
        self.prompt = "photo of a {}" if self.tokenizer.open else "a {}"
        self.things = [f"{word} {what}" for word, what in zip(self.words, options.category)]
        self.pictures = [self.photographs(*row) for row in zip(options.concept, options.category,
                                                               self.things)]
        self.prior = self.select(dataset)
        personalise(self.model, self.tokenizer, self.words, options.part)
        learned = {name for name, p in self.model.named_parameters() if p.requires_grad}
        self.frozen = frozenset(self.model.state_dict()) - learned
        asked = [self.prompt.format(thing) for thing in (*self.things, *options.category)]
        some = max(len(asked), min(8 * len(asked), self.at_once))
        self.info = {**base.info, "examples": (asked * 8)[:some]}

    def photographs(self, name, category, thing):
        """A concept's pictures and captions, in which the new word stands before the category."""
        dataset = data.load(name, self.info["image_size"], data_dir=self.config.data_dir,
                            skip_bad=self.config.skip_bad)
        captions = dataset.captions or [self.prompt.format(category)] * len(dataset)
        unnamed = [text for text in captions if category not in text.split()]
        if unnamed:
            raise ValueError(f"{name}: the caption {unnamed[0]!r} does not name the category {category}, "
                             "so the new word has no place in it: change it, or leave captions out")
        named = [" ".join(thing if w == category else w for w in text.split()) for text in captions]
        return to_float(dataset.images), named

    @torch.no_grad()
    def select(self, dataset):
        """The prior, (pictures (n, C, S, S), captions), or None.

        Generated by the base, or those of the data set whose captions name a category (for CLIP: are
        near to one); without captions, by class names; a folder without either shows the category.
        Source: the paper's details of training.
        """
        categories = self.options.category
        bare = [self.prompt.format(category) for category in categories]
        if self.options.prior == "none":
            return None
        if self.options.prior == "generated":
            return self.generate((bare * 200)[:200])
        captions, classes = dataset.captions, dataset.class_names
        if captions is None and len(classes) < 2 and len(categories) > 1:
            raise ValueError(f"{dataset.name} has no captions: with two categories the prior needs them")
        if captions is None and len(classes) > 1:
            captions = [self.prompt.format(classes[k]) for k in dataset.labels.tolist()]
        captions = captions or bare * len(dataset)
        if self.tokenizer.open:
            rows = torch.cat([select_prior(self.model.text, self.tokenizer, captions, text)
                              for text in bare])
            return to_float(dataset.images[rows]), [captions[i] for i in rows.tolist()]
        named = {i: [c for c in categories if c in text.split()] for i, text in enumerate(captions)}
        rows = [i for i, found in named.items() if found][:2000]
        if not rows:
            raise ValueError(f"no caption of {dataset.name} names {', '.join(sorted(categories))}: "
                             "choose another --prior, or --prior generated")
        # half the prior captions are the bare category, to keep its meaning
        said = [captions[i] if k % 2 else f"a {named[i][0]}" for k, i in enumerate(rows)]
        return to_float(dataset.images[rows]), said

    def generate(self, captions):
        """Pictures of captions by the base -> (pictures, captions)."""
        device, size, pictures = self.config.device, min(50, self.at_once), []
        model, ids = self.model.to(device).eval(), self.tokenizer(captions).to(device)
        for k in tqdm(range(0, len(captions), size), desc="prior", leave=False):
            seeds = [torch.Generator(device).manual_seed(i) for i in range(k, k + len(ids[k:k + size]))]
            x = self.sample(model, ids[k:k + size], generator=seeds)
            pictures.append(to_float(self.to_pictures(x).cpu()))
        model.train()
        return torch.cat(pictures), captions

    @torch.no_grad()
    def prepare(self, dataset, device):
        """All pictures of the run, augmented and encoded at once, so that no step encodes any."""
        c, parts, total = self.config, [], self.config.steps * self.config.batch_size // 2
        generator = torch.Generator().manual_seed(c.seed)
        words = SIZE_WORDS if self.tokenizer.open else ()
        for first in range(0, total, 500):
            x, captions, mask = mix(self.pictures, self.prior, min(500, total - first),
                                    self.first_stage.factor, words, self.options.augment, generator)
            z = torch.cat([self.encode(some.to(device)) for some in x.split(self.at_once)])
            parts.append((z, self.tokenizer(captions), mask))
        z, ids, mask = (torch.cat(column) for column in zip(*parts))
        self.mask = mask.to(device)                                                     # (N, 1, h, w)
        print(f"{', '.join(self.things)}: {total} target pictures will be seen, "
              f"{sum(len(x) for x, _ in self.pictures)} different ones, and "
              f"{'as many' if self.prior else 'none'} of the prior; learning rate {c.lr:g}, of the words "
              f"{c.word_lr:g}")
        return data.Dataset(self.things[0], z, ids, None, [], False)

    def loss(self, net, x, y, index, drop, **draws):
        return self.process.loss(net, x.float(), y, mask=self.mask[index], **draws)

    def finish(self, model, dataset, device):
        W = {name.removeprefix("denoiser."): w for name, w in model.state_dict().items()
             if name.startswith("denoiser.") and name not in self.frozen}
        rows = dict(zip(self.words, model.text.rows))
        save_concept(f"{self.config.out}/concept.pt", W, rows, self.things, self.W0)

    def state(self):
        return {"options": vars(self.options)}


# --------------------------------------------------------------------------------------------------
# files

def keys_and_values(unet):
    """{name: tensor} of W_k and W_v of every cross-attention in a U-Net's state_dict."""
    return {name: w for name, w in unet.items() if re.search(KV, name)}


def save_concept(path, W, modifiers, concepts, unet, ratio=None, energy=False):
    """Write what was learned and no more: matrices in full or, with a ratio, compressed.

    W: {name in the U-Net: tensor}; modifiers: {token: row (D,)}; concepts: ["<new1> dog", ...]; unet:
    the base's state_dict. Raises ValueError. Source: official get_deltas.py.
    """
    cpu = lambda tensor: tensor.detach().cpu().contiguous().clone()
    matrices = {name: w for name, w in W.items() if w.dim() == 2 and ratio is not None}
    factors = compress(matrices, unet, ratio, energy) if matrices else {}
    learned = {name: cpu(w) for name, w in W.items() if name not in factors}
    learned |= {name: {"u": cpu(u), "v": cpu(v)} for name, (u, v) in factors.items()}
    save_checkpoint(path, {"base": fingerprint(keys_and_values(unet)), "concepts": list(concepts),
                           "modifiers": {token: cpu(row) for token, row in modifiers.items()},
                           "tensors": learned})


def load_concept(path, unet):
    """A concept's file, ours or published for Stable Diffusion -> ({name: W}, {token: row}, concepts).

    unet: the base's state_dict. Published files do not say their category: concepts are then the bare
    tokens. Raises ValueError for another kind of file or another base. Source: official get_deltas.py,
    compress.py and diffusers_model_pipeline.py.
    """
    state = read_torch(path)
    state = state if isinstance(state, dict) else {}
    if "tensors" in state and "modifiers" in state:
        if state["base"] != fingerprint(keys_and_values(unet)):
            raise ValueError(f"{path} was learned on another base: give the checkpoint that it was "
                             "trained from")
        given, modifiers = state["tensors"], state["modifiers"]
    else:
        given = state.get("unet", state.get("state_dict", {}))
        modifiers = state.get("modifier_token") or {
            f"<new{k}>": row for k, row in enumerate(given.get("embed", ()), 1)}
        modifiers = {token: row.float().flatten() for token, row in modifiers.items()}  # (D,)
        given = _official_names({name: w for name, w in given.items() if ".attn2." in name}, unet)
    wrong = [name for name in given if name not in unet]
    whole = {name: unet[name].cpu().float() + w["u"].float() @ w["v"].float()
             if isinstance(w, dict) else w.float() for name, w in given.items() if name in unet}
    wrong += [name for name, w in whole.items() if w.shape != unet[name].shape]
    if wrong or not (whole or modifiers):
        raise ValueError(f"{path} holds no concept for this U-Net"
                         + (f": {wrong[0]} does not fit" if wrong else ""))
    return whole, modifiers, list(state.get("concepts", modifiers))


def _official_names(given, unet):
    """CompVis names without prefix; diffusers' by order: both list attentions down, middle, up."""
    given = {name.removeprefix("model.diffusion_model."): w for name, w in given.items()}
    if all(name in unet for name in given):
        return given
    tails = {name.split(".attn2.")[-1] for name in given}
    ours = [name for name in unet if ".attn2." in name and name.split(".attn2.")[1] in tails]
    sides = ("down_blocks", "input_blocks", "mid_block", "middle_block", "up_blocks", "output_blocks")

    def order(name):
        place, tail = name.split(".attn2.")
        return sides.index(name.split(".")[0]) // 2, [*map(int, re.findall(r"\d+", place))], tail
    try:
        theirs = sorted(given, key=order)
    except ValueError as error:
        raise ValueError(f"{next(iter(given))} is no name of a cross-attention known here") from error
    if len(theirs) != len(ours):
        raise ValueError(f"{len(theirs)} matrices of cross-attention in this file, {len(ours)} in the "
                         "U-Net")
    return {name: given[other] for name, other in zip(sorted(ours, key=order), theirs)}


def apply_concept(model, tokenizer, W, modifiers):
    """Put a loaded concept into a text-to-image model (.denoiser, .text) and its tokenizer."""
    model.denoiser.load_state_dict({**model.denoiser.state_dict(), **W})
    if modifiers:
        add_words(model, tokenizer, modifiers)


def gather(paths, unet, categories=()):
    """Concept files -> ([W_n], {token: row}, [[concept, ...] of each file]); taken tokens: <newK>.

    categories: what things are, for files that do not say it, in their order. Raises ValueError if one
    is missing. Source: official composenW.py.
    """
    Ws, modifiers, concepts, categories = [], {}, [], list(categories)
    for path in paths:
        W, rows, named = load_concept(path, unet)
        if named == list(rows):                                 # bare tokens: a published file
            if len(categories) < max(1, len(named)):
                raise ValueError(f"{path} does not say what it shows: add --category, such as "
                                 "--category dog")
            named = [f"{token} {categories.pop(0)}".strip() for token in named or [""]]
        names = {}
        for token, row in rows.items():
            free = (f"<new{k}>" for k in range(1, 1000) if f"<new{k}>" not in {**modifiers, **rows})
            names[token] = token if token not in modifiers else next(free)
            modifiers[names[token]] = row
        Ws.append(W)
        concepts.append([" ".join(names.get(w, w) for w in text.split()) for text in named])
    return Ws, modifiers, concepts


# --------------------------------------------------------------------------------------------------
# the commands

@dataclasses.dataclass
class MergeOptions:
    """flags of custom_diffusion.py merge FILE FILE ..."""
    files: tuple = flag((), "concept files of one base")
    base: str = flag("assets/unet-scenes.pt", "the checkpoint that was personalised")
    out: str = flag("out/merged.pt", "file for the result")
    captions: str = flag("", "file with a caption a line, or a data set; default: the base's")
    category: tuple = flag((), "for published files: what each thing is")
    ridge: float = flag(1e-6, "share of the mean eigenvalue added to G", "[0, inf)")
    tolerance: float = flag(1e-3, "text states nearer than this are one", "[0, inf)")
    padding: bool = flag(False, "hold the rows after the end token too")
    bpe: str = flag("data/bpe_simple_vocab_16e6.txt.gz", "Stable Diffusion: CLIP's list of merges")


@dataclasses.dataclass
class CompressOptions:
    """flags of custom_diffusion.py compress FILE"""
    files: tuple = flag((), "concept file")
    base: str = flag("assets/unet-scenes.pt", "the checkpoint that was personalised")
    out: str = flag("out/compressed.pt", "file for the result")
    ratio: float = flag(0.6, "share of the singular values' sum to keep", "[0, 1]")
    energy: bool = flag(False, "share of the sum of their squares instead")
    bpe: str = flag("data/bpe_simple_vocab_16e6.txt.gz", "Stable Diffusion: CLIP's list of merges")


def learn(argv):
    """`learn`: teach a base new things."""
    def presets(given):
        out = given.get("out", "out/concept")
        if given.get("resume"):
            state = load_checkpoint(f"{out}/ckpt.pt")
            return {**state["config"], **state["options"], "out": out}
        if "data" in given:
            raise ValueError("--data: say --prior for pictures that keep the category what it was")
        taken, official = base_flags(given.get("base", Options.base))
        rates = dict(lr=3e-3, batch_size=16)                    # measured on unet-tiny
        if official:                                            # the paper's
            rates = dict(lr=8e-6 if given.get("part") == "all" else 8e-5, word_lr=8e-5, batch_size=8,
                         lr_decay="constant", prior="generated")
        return {"steps": 250, "optimizer": "adamw", "warmup": 0, "ema": 0.9, "sample_every": 0,
                "weight_decay": 0.01, **taken, **rates, "out": out}
    options, config = parse(argv, __doc__, Options, LearnConfig, presets=presets)
    config.device = resolve_device(config.device)
    check_out(config)
    drawn = options.prior in ("generated", "none")
    config.data = config.data if drawn or not options.prior else options.prior
    dataset = None if drawn else load_data(config)
    torch.manual_seed(config.seed)
    base = base_task(options.base, options.bpe, config.image_size)
    task = ConceptTask(base, dataset, options, config)
    run(config, task, dataset)
    print(f'python sample.py --ckpt {options.base} --concept {config.out}/concept.pt --prompt '
          f'"{task.prompt.format(task.things[0])}"')


def merge_files(argv):
    """`merge`: several concept files of one base into one that samples them all."""
    o, = parse(argv, __doc__, MergeOptions)
    base = base_task(o.base, o.bpe)
    unet, tokenizer = base.model.denoiser.state_dict(), base.tokenizer
    W0, (Ws, modifiers, concepts) = keys_and_values(unet), gather(o.files, unet, o.category)
    more = [path for path, W in zip(o.files, Ws) if set(W) != set(W0)]
    if more or not Ws:
        raise ValueError(f"{more[0]} was not learned in keys and values alone: only those can be merged"
                         if more else "merge: name the concept files")
    if pathlib.Path(o.captions).is_file():
        captions = pathlib.Path(o.captions).read_text(encoding="utf-8").split("\n")
    elif o.captions or base.info["name"]:
        captions = data.load(o.captions or base.info["name"], count=1000).captions
    else:
        raise ValueError("--captions is missing: a file with about a thousand captions, one a line, "
                         "whose pictures should stay as they are")
    words = NewWords(base.model.text,
                     {tokenizer.add_token(token): row for token, row in modifiers.items()})
    C_reg = torch.cat(caption_rows(words, tokenizer, [c for c in captions if c], "photo of a", o.padding))
    Cs = [torch.cat([prompt_rows(words, tokenizer, concept, o.padding) for concept in named])
          for named in concepts]
    W, r = merge(W0, list(zip(Ws, Cs)), C_reg, o.ridge, o.tolerance)
    pathlib.Path(o.out).parent.mkdir(parents=True, exist_ok=True)
    save_concept(o.out, {name: w.float() for name, w in W.items()}, modifiers, sum(concepts, []), unet)
    print(f"{sum(map(len, concepts))} concept(s), {r['rows']} target rows ({r['dropped']} dropped as "
          f"equal), {len(C_reg):,} rows of {len(captions):,} captions\ncond(G) {r['cond_G']:.3g}, cond(D "
          f"C^T) {r['cond_DCt']:.3g}; constraint {r['constraint']:.1e}, KKT {r['kkt']:.1e}\n||W0|| "
          f"{r['W0']:.4g}, ||W_n - W0|| {', '.join(f'{c:.4g}' for c in r['changes'])}, ||dW|| of the "
          f"merge {r['dW']:.4g}")
    if r["dW"] > 3 * sum(r["changes"]):
        print("||dW|| is far larger than the concepts' own changes, so other prompts may be ruined: try "
              "--padding --ridge 10 --tolerance 0.5")
    print(f"python sample.py --ckpt {o.base} --concept {o.out} --prompt ...")


def compress_file(argv):
    """`compress`: one concept file -> a smaller one."""
    o, = parse(argv, __doc__, CompressOptions)
    if len(o.files) != 1:
        raise ValueError(f"compress: name one concept file, not {len(o.files)}")
    unet = base_task(o.base, o.bpe).model.denoiser.state_dict()
    W, modifiers, concepts = load_concept(o.files[0], unet)
    pathlib.Path(o.out).parent.mkdir(parents=True, exist_ok=True)
    save_concept(o.out, W, modifiers, concepts, unet, o.ratio, o.energy)
    print(f"written: {o.out} ({pathlib.Path(o.out).stat().st_size / 2 ** 20:.2f} MiB)")


@one_line
def main(argv):
    """The command line: custom_diffusion.py learn | merge | compress ..."""
    commands = {"learn": learn, "merge": merge_files, "compress": compress_file}
    if not argv or argv[0] not in commands:
        raise ValueError("say python custom_diffusion.py learn, merge or compress; each has --help")
    words = argv[1:]
    if words and not words[0].startswith("-"):
        words = ["--files", *words]                             # merge a.pt b.pt
    commands[argv[0]](words)


if __name__ == "__main__":
    main()
