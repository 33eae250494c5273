"""Custom Diffusion: teach a text-to-image model a thing of your own from a few pictures, and put such things together.

Paper: Multi-Concept Customization of Text-to-Image Diffusion (Kumari et al. 2022, arXiv 2212.04488).

The idea.  Words enter the U-Net in one place: cross-attention turns every text state c into a key W_k c and a value
W_v c. So a new thing is learned by
  a new word V*     one new row of the word table, which starts as a copy of a rare word's row
  W_k and W_v       of every cross-attention: 2.2 % of Stable Diffusion's U-Net, the 73 MiB that are saved
from pictures of the thing ("photo of a V* dog"), mixed one to one with pictures of its class, the prior, so that "dog"
keeps its meaning. Targets are shrunk and enlarged, the caption says so, and the loss looks at the picture alone.
  Two things?  Learned apart they are two sets of matrices. But K and V are linear maps of known text states, so ask for
the matrix that maps the states of each thing's own words (rows of C) exactly as its own model does, and moves the
words of other captions (rows of C_reg) as little as possible (eq. 4):
    min ||(W - W0) C_reg^T||  such that  W C^T = V        G = C_reg^T C_reg,  D = C G^-1
    W = W0 + (V - W0 C^T) (D C^T)^-1 D                                                             (eq. 5)
D and D C^T hold text states only: they are factorised once, for all layers.

Contents: what is trained (trainable_kv, detach_first_token, NewWords, personalise, rare_tokens); data and loss
(caption_rows, select_prior, geometry, augment, mix, concept_loss); what was learned (weight_change, compress, expand,
average, add_changes); merge; files; the command line.

    python custom_diffusion.py merge dog.pt cat.pt --base BASE.pt --out both.pt
    python custom_diffusion.py compress dog.pt --base BASE.pt --ratio 0.6 --out small.pt
    python -m studies.merge_speed                   # the merge at Stable Diffusion's size
    python -m pytest tests/test_custom_diffusion.py

Trap: a merge may keep every constraint to 14 digits and still draw nothing. Where the target rows nearly lie in the
span of few captions' rows, or of each other, dW is huge, and prompts that are in neither set are ruined. Compare ||dW||
with the concepts' own ||W_n - W0||, both printed: a larger ridge (0.1 to 10) and tolerance (to 0.5) make it smaller.
On a small base, --padding --ridge 10 --tolerance 0.5; and no higher rate than it takes to learn the thing.

Differences from the official code (adobe-research/custom-diffusion):
1. V* is a parameter outside the table. There the table itself is in AdamW, whose weight decay shrinks every other row.
2. The masked loss is the true mean over valid numbers. There it sums channels and divides by cells, C times as much;
   official_scale=True. In its diffusers port that applies to targets alone, and weighs them C to 1 against the prior.
3. A shrunk picture always has valid cells. There the one-cell border can leave none (0/0) on maps of few cells.
4. Half the pictures are targets, to the picture; there 199 of 400. Resizing is bilinear with antialiasing, as a product
   of matrices, on any device. No mirroring here: left and right mean something in captions.
5. Merge in float64, with a small ridge, from one factorisation (there float32, none, one per layer and row). States
   that are nearly equal count once (there: exactly equal); too many or dependent rows are refused (there: a wrong
   answer). A concept is a style when "art" is one of its words (there: three letters anywhere, as in "party").
6. compress with ratio 1 keeps everything (there the last component is lost).
"""
import argparse
import collections
import hashlib
import pathlib
import re
import sys

import torch
import torch.nn as nn

import data
from text import CLIPTokenizer, TextEncoder, WordTokenizer
from weights import (build, is_official, load_checkpoint, load_weights, read_stable_diffusion, read_torch,
                     save_checkpoint)

KV = r"\.attn2\.to_[kv]\.weight$"
# what learns in the U-Net: the paper's method; its choice for faces; DreamBooth and "fine-tune all"; textual inversion
PARTS = {"kv": KV, "crossattn": r"\.attn2\.", "all": r"", "none": r"(?!)"}
RARE = ("ktn", "pll", "ucd</w>")            # CLIP's ids 42170, 47629, 43514. Source: official code
# no word while the size is about right; two for a small picture, two for an enlarged one. Source: official code
SIZE_WORDS = ("", "a far away ", "very small ", "zoomed in ", "close up ")
PROMPTS, STYLE_PROMPTS = ("{}", "photo of a {}"), ("{}", "painting in the style of {}")


# ----------------------------------------------------------------------------------------------------------------------
# what is trained

def trainable_kv(unet, part="kv"):
    """Freeze a U-Net but for the part that is to learn -> {name: parameter}.

    part: "kv", W_k and W_v of every cross-attention; "crossattn", all of it; "all"; "none".
    Raises ValueError for another part, or if the model has no cross-attention. Source: §3.1; official code.
    """
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r} of a U-Net: choose of {', '.join(PARTS)}")
    unet.requires_grad_(False)
    chosen = {name: p for name, p in unet.named_parameters() if re.search(PARTS[part], name)}
    if not chosen and part != "none":
        raise ValueError("this model has no cross-attention (attn2) that could learn: take a U-Net with text")
    for p in chosen.values():
        p.requires_grad_(True)
    return chosen


def detach_first_token(unet):
    """Let no gradient through key and value of the start token in cross-attention -> handles; .remove() undoes it.

    Its state is the same for every caption. The output stays bit for bit what it was; to_q, to_out and the picture get
    the same gradient as before. It is not the context that is detached, for W_k and W_v too must not learn from it.
    Source: appendix E; official code.
    """
    def hook(layer, inputs, out):
        return torch.cat([out[:, :1].detach(), out[:, 1:]], dim=1)                          # (B, L, D)
    layers = [module for name, module in unet.named_modules() if re.search(r"\battn2\.to_[kv]$", name)]
    return [layer.register_forward_hook(hook) for layer in layers]


class NewWords(nn.Module):
    """A text encoder with words of its own: ids (B, L) -> states (B, L, D).

    text: a TextEncoder; rows: {id: row (D,)}, each a parameter of its own. Source: §3.2 (V*).
    """

    def __init__(self, text, rows):
        super().__init__()
        self.text, self.ids = text, list(rows)
        self.rows = nn.ParameterList(nn.Parameter(row.detach().clone()) for row in rows.values())

    def forward(self, ids):
        return self.text(ids, dict(zip(self.ids, self.rows)))


def add_words(model, tokenizer, rows):
    """Teach model.text and the tokenizer new words, {token: row (D,)}. Raises ValueError for a token that is taken.

    Source: §3.2.
    """
    model.text = NewWords(model.text, {tokenizer.add_token(token): row for token, row in rows.items()})


def personalise(model, tokenizer, words, part="kv"):
    """Make a text-to-image model (.unet, .text) ready to learn -> {name: parameter} of all that will be trained.

    words: {new token: token whose row it starts from}; {} for a thing that a caption can name; part: see trainable_kv.
    Raises ValueError for a token that is not in the vocabulary, or is taken. Source: §3.2; official code.
    """
    missing = [rare for rare in words.values() if rare not in tokenizer.ids]
    if missing:
        raise ValueError(f"{missing[0]!r} is no token of this vocabulary, so no new word can start from its row: "
                         f"choose one that is, such as {', '.join(list(tokenizer.ids)[-3:])}")
    model.requires_grad_(False)
    table = model.text.text_model.embeddings.token_embedding.weight                         # (vocab_size, D)
    if words:
        add_words(model, tokenizer, {token: table[tokenizer.ids[rare]] for token, rare in words.items()})
    trainable_kv(model.unet, part)
    detach_first_token(model.unet)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def rare_tokens(tokenizer, captions, count=1):
    """Tokens for new words to start from: used 5 to 10 times in `captions`, or else the rarest -> list of `count`.

    Letters only, and no part of another token in use. For CLIP the official choice is RARE.
    Raises ValueError if there are too few. Source: the paper's details of training (200,000 captions of LAION).
    """
    names = {i: token for token, i in tokenizer.ids.items()}
    used = collections.Counter(names[i] for caption in captions for i in tokenizer.encode(caption))
    word = lambda token: token.removesuffix("</w>")
    fit = [t for t in used if word(t).isalpha() and not any(word(t) in other for other in used if other != t)]
    if len(fit) < count:
        raise ValueError(f"{len(fit)} tokens of these captions could serve, {count} are wanted: name them yourself")
    return sorted(fit, key=lambda t: (not 5 <= used[t] <= 10, used[t], t))[:count]


# ----------------------------------------------------------------------------------------------------------------------
# data and loss

@torch.no_grad()
def caption_rows(text, tokenizer, captions, lead="", padding=False):
    """States of each caption's own words and of its end token -> list of (n, D), never the start token's.

    lead: words that are left out where a caption begins with them; padding: also the rows after the end token, which
    cross-attention reads as well. Source: official composenW.py (without padding).
    """
    rows, device = [], next((p.device for p in text.parameters()), "cpu")
    for first in range(0, len(captions), 256):
        part = captions[first:first + 256]
        states = text(tokenizer(part).to(device))                                           # (b, L, D)
        for caption, state in zip(part, states):
            skip = len(tokenizer.encode(lead)) if (caption + " ").startswith(lead + " ") else 0
            end = min(len(tokenizer.encode(caption)) + 1, len(state) - 1)                   # a long caption was cut
            rows.append(state[1 + skip:None if padding else end + 1])                       # (n, D)
    return rows


def select_prior(text, tokenizer, captions, target, count=200, threshold=0.85, generator=None):
    """Which captions speak of the target's class: cosine of end states above `threshold` -> up to `count` indices.

    target: the prompt without V*, such as "photo of a dog". Drawn at random among those that are near enough, for the
    nearest alone would be the same few words. An end state says as much as its encoder was taught to put there:
    CLIP's a lot, that of a small world little. Raises ValueError if there is none.
    Source: the paper's details of training (200 captions above 0.85).
    """
    ends = torch.stack([rows[-1] for rows in caption_rows(text, tokenizer, [target, *captions])])       # (1+N, D)
    cosine = nn.functional.cosine_similarity(ends[1:], ends[:1])                            # (N,)
    near = torch.nonzero(cosine > threshold)[:, 0].cpu()
    if not len(near):
        raise ValueError(f"no caption is as near to {target!r} as {threshold}, the nearest has {cosine.max():.3f}: "
                         "lower the threshold, give other captions, or let the base model draw the prior")
    return near[torch.randperm(len(near), generator=generator)[:count]]


def geometry(u, size, factor):
    """Where each picture goes: uniform draws u (n, 5) -> dict of side, top, left, words (n,) and mask (n, 1, h, w).

    The picture is made `side` pixels wide, its corner put at (top, left), negative to cut from the middle; words: index
    into SIZE_WORDS; mask, on the cells of a latent `factor` times smaller: True inside the picture but for a border of
    one cell, and never empty. Raises ValueError for a size that is odd or no multiple of factor.
    Source: official finetune_data.py.
    """
    if size % 2 or size % factor:
        raise ValueError(f"pictures of {size} pixels: the augmentation needs an even size that factor {factor} divides")
    pick = lambda u, low, high: low + (u * (high - low)).long()                             # whole, in [low, high)
    scale = torch.where(pick(u[:, 0], 0, 3) < 2, pick(u[:, 1], size // 3, size + 1),
                        pick(u[:, 1], int(1.2 * size), int(1.4 * size)))
    scale = scale + scale % 2
    far, near, half, middle = scale < 0.6 * size, scale > size, scale // 2, size // 2
    low, high = torch.where(far, half, middle), torch.where(far, size - half, scale - middle) + 1
    centres = [pick(u[:, 2], low, high), pick(u[:, 3], low, high)]                          # row, column
    corner = lambda c: torch.where(far, c - half, torch.where(near, middle - c, 0))
    cells = torch.arange(size // factor, device=u.device)

    def valid(c):
        first, last, cell = (c - half) // factor + 1, (c + half) // factor - 1, c // factor
        first, last = torch.where(first < last, first, cell), torch.where(first < last, last, cell + 1)
        return (cells >= first[:, None]) & (cells < last[:, None]) | ~far[:, None]          # (n, size / factor)

    rows, columns = valid(centres[0]), valid(centres[1])
    return {"side": torch.where(far | near, scale, size), "top": corner(centres[0]), "left": corner(centres[1]),
            "words": torch.where(far, 1, torch.where(near, 3, 0)) + (far | near) * pick(u[:, 4], 0, 2),
            "mask": rows[:, None, :, None] & columns[:, None, None, :]}                     # (n, 1, h, w)


def _resize_matrix(side, start, size):
    """(n, size, size): how row i of the new picture mixes the rows of the old one; 0 where the new one is canvas.

    The triangle filter, as wide as a new pixel when shrinking: bilinear with antialiasing, which is linear and acts on
    rows and columns alike, so that resizing, pasting and cutting are one product of matrices.
    """
    pixels = torch.arange(size, device=side.device)
    at, step = pixels - start[:, None], size / side[:, None]                                # (n, size), (n, 1)
    centre, width = (at + 0.5) * step - 0.5, step.clamp(min=1)[..., None]
    weight = (1 - (pixels - centre[..., None]).abs() / width).clamp(min=0)                  # (n, size, size)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)
    return weight * ((at >= 0) & (at < side[:, None]))[..., None]


def augment(x, u, factor=1):
    """Shrink or enlarge targets x (n, C, S, S) in [-1, 1], by draws u (n, 5) -> (x, mask (n, 1, h, w), words (n,)).

    The canvas is 0, mid grey; no value is read on the host. See geometry. Source: official finetune_data.py.
    """
    g = geometry(u, x.shape[-1], factor)
    rows, columns = (_resize_matrix(g["side"], g[start], x.shape[-1])[:, None] for start in ("top", "left"))
    return rows @ x @ columns.mT, g["mask"].float(), g["words"]                             # (n, C, S, S)


def mix(concepts, prior, count, factor=1, words=SIZE_WORDS, augmented=True, generator=None):
    """`count` targets, then as many prior pictures -> (x (N, C, S, S), captions, masks (N, 1, S/factor, S/factor)).

    concepts: [(pictures (n, C, S, S) in [-1, 1], n captions)], which take turns, as their pictures do; prior: the same
    for the classes, drawn at random, or None; words: SIZE_WORDS, or () for a vocabulary without them.
    Source: the paper's details of training (targets are repeated until both sets are equal) and joint training.
    """
    turns = [(k % len(concepts), k // len(concepts)) for k in range(count)]
    targets = [(concepts[c][0][i % len(concepts[c][0])], concepts[c][1][i % len(concepts[c][1])]) for c, i in turns]
    x, captions = torch.stack([picture for picture, _ in targets]), [caption for _, caption in targets]
    mask = torch.ones(count, 1, *(side // factor for side in x.shape[2:]))
    if augmented:
        x, mask, said = augment(x, torch.rand(count, 5, generator=generator), factor)
        captions = [(words[w] if words else "") + caption for w, caption in zip(said.tolist(), captions)]
    if prior is not None:
        drawn = torch.cat([torch.randperm(len(prior[0]), generator=generator)
                           for _ in range(-(-count // len(prior[0])))])[:count]             # (count,)
        x, mask = torch.cat([x, prior[0][drawn]]), torch.cat([mask, torch.ones_like(mask)])
        captions = captions + [prior[1][i] for i in drawn.tolist()]
    return x, captions, mask


def concept_loss(process, model, x0, cond, mask, t=None, eps=None, official_scale=False, generator=None):
    """The process's loss on valid cells mask (B, 1, h, w), a true mean per picture -> (scalar, metrics).

    Targets and prior weigh the same: there is no lambda. official_scale: C times that. Source: official model.py.
    """
    loss, metrics = process.loss(model, x0, cond, t, eps, mask, generator)
    return loss * x0.shape[1] if official_scale else loss, metrics


# ----------------------------------------------------------------------------------------------------------------------
# what was learned. W and W0 are state_dicts or parts of them, {name: tensor}

def weight_change(W0, W):
    """How far each tensor moved, ||W - W0|| / ||W0|| -> ({name: change}, {kind of layer: mean}).

    Kinds: cross-attention, self-attention, other. Tensors that began as zero have no such number and are left out.
    Source: §3.1 and figure 3.
    """
    change, kinds = {}, {"cross-attention": [], "self-attention": [], "other": []}
    for name, before in W0.items():
        if before.is_floating_point() and before.any():
            change[name] = ((W[name].double() - before.double()).norm() / before.double().norm()).item()
            kind = {"attn2": "cross-attention", "attn1": "self-attention"}
            kinds[next((kind[part] for part in name.split(".") if part in kind), "other")].append(change[name])
    return change, {kind: sum(values) / len(values) for kind, values in kinds.items() if values}


def compress(W, W0, ratio=0.6, energy=False):
    """Each change W - W0 as a product of few columns and rows -> {name: (u (o, r), v (r, d))}; see expand.

    Kept are the largest singular values while they make up no more than `ratio` of the sum of all (so r may be 0); with
    energy, as few as make up `ratio` of the sum of squares. Raises ValueError for a ratio outside [0, 1].
    Source: official compress.py; the paper keeps 60 %.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio {ratio}: give a share between 0 and 1")
    factors = {}
    for name, tensor in W.items():
        U, s, Vt = torch.linalg.svd(tensor.double() - W0[name].double(), full_matrices=False)
        share = (s.square() if energy else s).cumsum(0)
        share = share / share[-1].clamp(min=1e-300)                                         # ends on exactly 1
        rank = int((share < ratio).sum() + (ratio > 0) if energy else (share <= ratio).sum())
        factors[name] = ((U[:, :rank] * s[:rank]).to(tensor.dtype), Vt[:rank].to(tensor.dtype))
    return factors


def expand(factors, W0):
    """{name: W0 + u v}, what compress kept. Source: official compress.py."""
    return {name: W0[name] + u @ v for name, (u, v) in factors.items()}


def average(Ws):
    """{name: mean of W_n}: the simplest way to put concepts together, which keeps none of them. Source: none."""
    return {name: sum(W[name] for W in Ws) / len(Ws) for name in Ws[0]}


def add_changes(W0, Ws):
    """{name: W0 + sum of (W_n - W0)}. Source: task arithmetic, Ilharco et al. 2022 (arXiv 2212.04089)."""
    return {name: W0[name] + sum(W[name] - W0[name] for W in Ws) for name in Ws[0]}


# ----------------------------------------------------------------------------------------------------------------------
# merge

def _distinct(C, tolerance):
    """Indices of the rows of C (s, d) that are farther than tolerance x mean norm from each kept row before them."""
    distance = torch.cdist(C, C, compute_mode="donot_use_mm_for_euclid_dist") / C.norm(dim=1).mean()    # (s, s)
    kept = []
    for i in range(len(C)):
        if not kept or distance[i, kept].min() > tolerance:
            kept.append(i)
    return torch.tensor(kept)


def merge_map(C, C_reg, ridge=1e-6):
    """The part of eq. 5 that all layers share: P (s, d) = (D C^T)^-1 D -> (P, residual, {"cond_G", "cond_DCt"}).

    C (s, d) and C_reg (r, d) float64; residual (s, d): P G / ||G|| without its part in the rows of C, 0 at the optimum.
    Raises ValueError if s > d, or rows of C depend on each other, or C_reg spans too little. Source: eq. 5.
    """
    (s, d), eps = C.shape, torch.finfo(C.dtype).eps
    if s > d:
        raise ValueError(f"{s} target rows, but the text states are only {d} wide, so no matrix maps all of them as "
                         "asked: use fewer prompts or concepts")
    G = C_reg.T @ C_reg                                                                     # (d, d)
    G = G + ridge * G.trace() / d * torch.eye(d, dtype=G.dtype)
    values, Q = torch.linalg.eigh(G)                                                        # ascending (d,), (d, d)
    rank = int((values > d * eps * values[-1]).sum())
    if rank < d:
        raise ValueError(f"the regularisation captions span {rank} of {d} directions, so eq. 5 has no unique answer: "
                         "give more captions, or a ridge such as 1e-6")
    # D C^T = A A^T with A = C G^-1/2: by A's singular values, no digit is lost to squaring
    A = C @ Q / values.sqrt()                                                               # (s, d)
    U, spread, Vt = torch.linalg.svd(A, full_matrices=False)                                # (s, s), (s,), (s, d)
    if spread[-1] <= s * eps * spread[0]:
        raise ValueError(f"the {s} target rows depend on each other, so they cannot all be mapped as asked: use fewer "
                         "prompts, or a larger tolerance")
    P, span = (U / spread) @ (Vt / values.sqrt()) @ Q.T, torch.linalg.qr(C.T)[0]            # (s, d), (d, s)
    PG = P @ (G / G.norm())
    return P, PG - PG @ span @ span.T, {"cond_G": (values[-1] / values[0]).item(),
                                        "cond_DCt": (spread[0] / spread[-1]).square().item()}


def merge(W0, concepts, C_reg, ridge=1e-6, tolerance=1e-3):
    """One set of matrices for several concepts, eq. 5 -> ({name: W (o, d) float64}, report).

    W0: {name: (o, d)} of the base; concepts: [({name: W_n}, C_n (s_n, d))], text states as rows, and the matrices that
    map them; C_reg (r, d): states whose maps should stay; ridge: so much of trace(G)/d is added to G's diagonal (0: the
    formula as printed); tolerance: rows nearer than this share of their length are one, and the first's value holds.
    report: rows, dropped, cond_G, cond_DCt; the worst layer's constraint ||W C^T - V|| / ||V|| and kkt
    ||(W - W0) G N|| / (||W - W0|| ||G||), N = ker C; norms W0, dW, and the list changes = ||W_n - W0||, of all layers.
    Raises ValueError for missing matrices, unfitting widths, and as merge_map. Source: eq. 4 and 5.
    """
    missing = [name for W, _ in concepts for name in W0 if name not in W]
    widths = {C_reg.shape[1], *(C.shape[1] for _, C in concepts), *(w.shape[1] for w in W0.values())}
    if missing or len(widths) > 1:
        raise ValueError(f"a concept has no {missing[0]}" if missing else
                         f"matrices and text states of widths {sorted(widths)}: they must come from one model")
    Cs = [C.double() for _, C in concepts]
    C = torch.cat(Cs)                                                                       # (s, d)
    kept = _distinct(C, tolerance)
    P, residual, report = merge_map(C[kept], C_reg.double(), ridge)
    out, constraint, kkt, norms, changes = {}, 0.0, 0.0, torch.zeros(2, dtype=torch.float64), [0.0] * len(concepts)
    for name, base in W0.items():
        base = base.double()
        deltas = [W[name].double() - base for W, _ in concepts]
        asked = torch.cat([dW @ C.T for dW, C in zip(deltas, Cs)], dim=1)[:, kept]          # (o, s) = V - W0 C^T
        dW = asked @ P                                                                      # (o, d)
        out[name], V = base + dW, base @ C[kept].T + asked
        constraint = max(constraint, ((out[name] @ C[kept].T - V).norm() / V.norm()).item())
        kkt = max(kkt, ((asked @ residual).norm() / dW.norm().clamp(min=1e-300)).item())
        norms += torch.stack([base.norm(), dW.norm()]).square()
        changes = [total + delta.norm().square().item() for total, delta in zip(changes, deltas)]
    report |= {"rows": len(kept), "dropped": len(C) - len(kept), "constraint": constraint, "kkt": kkt,
               "W0": norms[0].sqrt().item(), "dW": norms[1].sqrt().item(), "changes": [c ** 0.5 for c in changes]}
    return out, report


# ----------------------------------------------------------------------------------------------------------------------
# files

def base_id(unet):
    """Which model a concept belongs to, from the K/V of its U-Net's state_dict: the same in float32 and float16.

    Source: none.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in unet if re.search(KV, name)):
        digest.update(unet[name].detach().cpu().half().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_concept(path, W, modifiers, concepts, unet, ratio=None, energy=False):
    """Write what was learned, and no more: the matrices in full or, with a ratio, compressed. Raises ValueError.

    W: {name of the U-Net: tensor}; modifiers: {token: row (D,)}; concepts: ["<new1> dog", ...]; unet: the base's
    state_dict. At SD v1's size: 73 MiB in full. Source: official get_deltas.py.
    """
    cpu = lambda tensor: tensor.detach().cpu().contiguous().clone()
    squeezed = {} if ratio is None else {name: w for name, w in W.items() if w.dim() == 2}
    factors = compress(squeezed, unet, ratio, energy) if squeezed else {}
    learned = {name: cpu(w) for name, w in W.items() if name not in factors}
    learned |= {name: {"u": cpu(u), "v": cpu(v)} for name, (u, v) in factors.items()}
    save_checkpoint(path, {"format": 1, "kind": "custom-diffusion", "base": base_id(unet), "concepts": list(concepts),
                           "modifiers": {token: cpu(row) for token, row in modifiers.items()}, "tensors": learned})


def load_concept(path, unet):
    """A file of save_concept, or one published for Stable Diffusion -> ({name: W}, {token: row (D,)}, concepts).

    unet: the base's state_dict. Published files do not say their category: concepts are then the bare tokens.
    Raises ValueError for a file that is none, or belongs to another base. Source: official get_deltas.py, compress.py
    and diffusers_model_pipeline.py.
    """
    state = read_torch(path)
    state = state if isinstance(state, dict) else {}
    if state.get("kind") == "custom-diffusion":
        if state["base"] != base_id(unet):
            raise ValueError(f"{path} was learned on base {state['base']}, this one is {base_id(unet)}: give the "
                             "checkpoint that it was trained from")
        given, modifiers = state["tensors"], state["modifiers"]
    else:
        given = state.get("unet", state.get("state_dict", {}))
        modifiers = state.get("modifier_token") or {f"<new{k}>": row for k, row in enumerate(given.get("embed", ()), 1)}
        modifiers = {token: row.float().flatten() for token, row in modifiers.items()}      # (D,)
        given = _official_names({name: w for name, w in given.items() if ".attn2." in name}, unet)
    wrong = [name for name in given if name not in unet]
    whole = {name: unet[name].cpu().float() + w["u"].float() @ w["v"].float() if isinstance(w, dict) else w.float()
             for name, w in given.items() if name in unet}
    wrong += [name for name, w in whole.items() if w.shape != unet[name].shape]
    if wrong or not (whole or modifiers):
        raise ValueError(f"{path} holds no concept for this U-Net" + (f": {wrong[0]} does not fit" if wrong else ""))
    return whole, modifiers, list(state.get("concepts", modifiers))


def _official_names(given, unet):
    """CompVis names without their prefix; diffusers' names by order: both list the attentions down, middle, up."""
    given = {name.removeprefix("model.diffusion_model."): w for name, w in given.items()}
    if all(name in unet for name in given):
        return given
    tails = {name.split(".attn2.")[-1] for name in given}
    ours = [name for name in unet if ".attn2." in name and name.split(".attn2.")[1] in tails]
    sides = ("down_blocks", "input_blocks", "mid_block", "middle_block", "up_blocks", "output_blocks")
    order = lambda name: (sides.index(name.split(".")[0]) // 2, *map(int, re.findall(r"\d+", name)),
                          name.split(".attn2.")[1])
    try:
        theirs = sorted(given, key=order)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{next(iter(given))} is no name of a U-Net's cross-attention that is known here") from error
    if len(theirs) != len(ours):
        raise ValueError(f"{len(theirs)} matrices of cross-attention in this file, {len(ours)} in the U-Net")
    return {name: given[other] for name, other in zip(sorted(ours, key=order), theirs)}


def apply_concept(model, tokenizer, W, modifiers):
    """Put a loaded concept into a text-to-image model (.unet, .text) and its tokenizer. Source: official sample.py."""
    model.unet.load_state_dict({**model.unet.state_dict(), **W})
    if modifiers:
        add_words(model, tokenizer, modifiers)


def read_base(path, bpe):
    """A checkpoint of ours or of Stable Diffusion v1 -> (U-Net's state_dict, text encoder, tokenizer, data set's name).

    bpe: CLIP's list of merges, for Stable Diffusion. Raises ValueError. Source: LDM §3.3.
    """
    if not is_official(path):
        state = load_checkpoint(path)
        if "vocabulary" not in state.get("info", {}):
            raise ValueError(f"{path} is no text-to-image checkpoint: --base wants the one that was personalised")
        part = lambda prefix: {n.removeprefix(prefix): w.float() for n, w in state["ema"].items()
                               if n.startswith(prefix)}
        tokenizer, unet = WordTokenizer.from_state(state["info"]["vocabulary"]), part("unet.")
        width = next(w.shape[1] for n, w in unet.items() if re.search(KV, n))
        text = TextEncoder(tokenizer.vocab_size, tokenizer.max_length, hidden_size=width)
        load_weights(text, part("text."), path)
        return unet, text.eval(), tokenizer, state["config"]["data"]
    parts = read_stable_diffusion(path)
    missing = [part for part in ("unet", "text") if part not in parts]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}: --base wants the whole model that was personalised")
    return parts["unet"], build({"text": parts["text"]}, torch.float32)["text"].eval(), CLIPTokenizer(bpe), ""


# ----------------------------------------------------------------------------------------------------------------------
# command line

def prompt_rows(text, tokenizer, concept, padding=False):
    """Rows of C for a concept such as "<new1> dog": its words in the paper's two prompts -> (s, D).

    In a small vocabulary without "photo": in "a <new1> dog". Source: official composenW.py.
    """
    prompts, lead = STYLE_PROMPTS if "art" in concept.split() else PROMPTS, "photo of a"
    if isinstance(tokenizer, WordTokenizer) and "photo" not in tokenizer.ids:
        prompts, lead = ("a {}",), "a"
    return torch.cat(caption_rows(text, tokenizer, [prompt.format(concept) for prompt in prompts], lead, padding))


def gather(paths, unet, categories=()):
    """Concept files -> ([W_n], {token: row}, [[concept, ...] of each file]); a taken token becomes <newK>.

    categories: what things are, for files that do not say it, in their order. Raises ValueError if one is missing.
    Source: official composenW.py.
    """
    Ws, modifiers, concepts, categories = [], {}, [], list(categories)
    for path in paths:
        W, rows, own = load_concept(path, unet)
        if own == list(rows):                                       # bare tokens: a published file
            if len(categories) < max(1, len(own)):
                raise ValueError(f"{path} does not say what it shows: add --category, such as --category dog")
            own = [f"{token} {categories.pop(0)}".strip() for token in own or [""]]
        names = {}
        for token, row in rows.items():
            free = (f"<new{k}>" for k in range(1, 1000) if f"<new{k}>" not in {**modifiers, **rows})
            names[token] = token if token not in modifiers else next(free)
            modifiers[names[token]] = row
        Ws.append(W)
        concepts.append([" ".join(names.get(word, word) for word in concept.split()) for concept in own])
    return Ws, modifiers, concepts


def _merge_files(o):
    """`merge` of the command line: concept files of one base -> one file that draws them all."""
    unet, text, tokenizer, data_name = read_base(o.base, o.bpe)
    W0 = {name: w for name, w in unet.items() if re.search(KV, name)}
    Ws, modifiers, concepts = gather(o.files, unet, o.category)
    more = [path for path, W in zip(o.files, Ws) if set(W) != set(W0)]
    if more:
        raise ValueError(f"{more[0]} was not learned in keys and values alone: only those can be merged")
    if pathlib.Path(o.captions).is_file():
        captions = pathlib.Path(o.captions).read_text(encoding="utf-8").split("\n")
    elif o.captions or data_name:
        captions = data.load(o.captions or data_name, count=1000).captions
    else:
        raise ValueError("--captions is missing: a file with about a thousand captions, one a line, whose pictures "
                         "should stay as they are")
    words = NewWords(text, {tokenizer.add_token(token): row for token, row in modifiers.items()})
    C_reg = torch.cat(caption_rows(words, tokenizer, [c for c in captions if c], "photo of a", o.padding))
    Cs = [torch.cat([prompt_rows(words, tokenizer, concept, o.padding) for concept in own]) for own in concepts]
    W, r = merge(W0, list(zip(Ws, Cs)), C_reg, o.ridge, o.tolerance)
    save_concept(o.out, {name: w.float() for name, w in W.items()}, modifiers, sum(concepts, []), unet)
    print(f"{sum(map(len, concepts))} concept(s), {r['rows']} target rows ({r['dropped']} dropped as equal), "
          f"{len(C_reg):,} rows of {len(captions):,} captions\n"
          f"cond(G) {r['cond_G']:.3g}, cond(D C^T) {r['cond_DCt']:.3g}; constraint {r['constraint']:.1e}, "
          f"KKT {r['kkt']:.1e}\n||W0|| {r['W0']:.4g}, ||W_n - W0|| {', '.join(f'{c:.4g}' for c in r['changes'])}, "
          f"||dW|| of the merge {r['dW']:.4g}")
    if r["dW"] > 3 * sum(r["changes"]):
        print("||dW|| is far larger than the concepts' own changes: other prompts may be ruined; try --padding "
              "--ridge 10 --tolerance 0.5")


def _compress_file(o):
    """`compress` of the command line: one concept file -> a smaller one."""
    unet, *_ = read_base(o.base, o.bpe)
    W, modifiers, concepts = load_concept(o.file, unet)
    save_concept(o.out, W, modifiers, concepts, unet, o.ratio, o.energy)


def main(argv=None):
    """Command line of custom_diffusion.py; exit code 2 and one line for what the user can mend. Source: none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--base", required=True, help="the checkpoint that was personalised")
    common.add_argument("--out", required=True, help="file for the result")
    common.add_argument("--bpe", default="data/bpe_simple_vocab_16e6.txt.gz", help="Stable Diffusion: CLIP's merges")
    merging = commands.add_parser("merge", parents=[common], help="several concepts into one file")
    merging.add_argument("files", nargs="+", help="concept files of one base")
    merging.add_argument("--captions", default="", help="file, a caption a line, or data set; default: the base's")
    merging.add_argument("--category", action="append", default=[], help="for published files: what each thing is")
    merging.add_argument("--ridge", type=float, default=1e-6, help="share of the mean eigenvalue added to G; 0: none")
    merging.add_argument("--tolerance", type=float, default=1e-3, help="text states nearer than this are one")
    merging.add_argument("--padding", action="store_true", help="hold the rows after the end token too")
    merging.set_defaults(run=_merge_files)
    squeezing = commands.add_parser("compress", parents=[common], help="one concept into a smaller file")
    squeezing.add_argument("file", help="concept file")
    squeezing.add_argument("--ratio", type=float, default=0.6, help="share of the singular values' sum to keep")
    squeezing.add_argument("--energy", action="store_true", help="share of the sum of their squares instead")
    squeezing.set_defaults(run=_compress_file)
    o = parser.parse_args(argv)
    try:
        o.run(o)
        print(f"written: {o.out} ({pathlib.Path(o.out).stat().st_size / 2 ** 20:.2f} MiB)\n"
              f"draw with it: python sample.py --ckpt {o.base} --concept-weights {o.out} --prompt ...")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
