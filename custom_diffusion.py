"""Custom Diffusion: teach a text-to-image model a thing of your own; put several into one model.

Paper: Multi-Concept Customization of Text-to-Image Diffusion (Kumari et al. 2022, 2212.04488).

The idea.  Words enter the U-Net in one place: cross-attention turns every text state c into a key
W_k c and a value W_v c. So a thing is learned by W_k and W_v, 2.2 % of Stable Diffusion's U-Net,
and by V*, a new row of the word table, at first a copy of a rare word's. Pictures of it ("photo of
a V* dog"), shrunk or enlarged and captioned so, are mixed with as many others of its category, the
prior, to keep the meaning of "dog". Two things learned apart are two sets of matrices. Keys and
values are linear in the text states: look for the W that maps those of each thing's own words (rows
of C) as its own matrices do (rows of V), and those of other captions (C_reg) nearly as W0 (Eq. 4):
    min ||(W - W0) C_reg^T||  such that  W C^T = V^T        G = C_reg^T C_reg,  D = C G^-1
    W = W0 + (V^T - W0 C^T) (D C^T)^-1 D                                                  (Eq. 5)

    python custom_diffusion.py learn --concept folder:my_dog --category dog --base BASE.pt
    python custom_diffusion.py merge dog.pt cat.pt --base BASE.pt --out both.pt
    python custom_diffusion.py compress dog.pt --base BASE.pt --ratio 0.6 --out small.pt

Differences from the official code (adobe-research/custom-diffusion):
1. V* is a parameter outside the table. There, weight decay shrinks every other row too.
2. The masked loss is a mean over valid numbers. There, it is a sum over channels: C times as much.
3. A shrunk picture always has valid cells. There, its border of one cell can leave none (0/0).
4. Pictures are not mirrored; on our bases half of the prior's captions are the bare category.
5. merge: in float64, with a small ridge; nearly equal text states count once."""
import copy
import dataclasses
import pathlib
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from checkpoint import built_from, check_tensors, load_checkpoint, save_checkpoint
from cli import flag, one_line, parse, resolve_device
from models import base_flags, base_task
from pretrained import is_official, read_official
from tasks import DiffusionTask, fingerprint, sample_all
from train import Config, check_out, load_data, micro_size, run

KV = r"\.attn2\.to_[kv]\.weight$"
# what learns in the U-Net: Custom Diffusion; its choice for faces; its "all"; textual inversion
PARTS = {"kv": KV, "crossattn": r"\.attn2\.", "all": r"", "none": r"(?!)"}
lead = lambda what: "painting in the style of " if "art" in what.split() else "photo of a "


def keys_and_values(unet):
    """{name: tensor} of W_k and W_v in a U-Net's state_dict. Raises ValueError if none is there."""
    if found := {name: w for name, w in unet.items() if re.search(KV, name)}:
        return found
    raise ValueError("this model has no cross-attention (attn2) for a --concept: take a U-Net")


def detach_first_token(unet):
    """Stop the gradient through K and V of the start token, the same in all captions. Detaching its
    text state instead would leave W_k and W_v its gradient. Returns hooks. Source: appendix E."""
    hook = lambda layer, inputs, out: torch.cat([out[:, :1].detach(), out[:, 1:]], dim=1)
    return [layer.register_forward_hook(hook) for name, layer in unet.named_modules()   # (B, L, D)
            if re.search(r"\battn2\.to_[kv]$", name)]


class NewWords(nn.Module):
    """A TextEncoder with new words, {id: row (D,)}: ids (B, L) -> (B, L, D). Source: §3.2."""

    def __init__(self, text, rows):
        super().__init__()
        self.text, self.ids = text, list(rows)
        self.rows = nn.ParameterList(nn.Parameter(row.detach().clone()) for row in rows.values())

    def forward(self, ids):
        return self.text(ids, dict(zip(self.ids, self.rows)))


def personalise(model, tokenizer, words, part="kv"):
    """Make a text-to-image model (.denoiser, .text) ready -> {name: parameter that learns}.
    words: {new token: token whose row it starts from}; part: see PARTS. Source: §3.2."""
    model.requires_grad_(False)
    for name, p in model.denoiser.named_parameters():
        p.requires_grad_(bool(re.search(PARTS[part], name)))
    detach_first_token(model.denoiser)
    table = model.text.text_model.embeddings.token_embedding.weight             # (vocab_size, D)
    rows = {new: table[tokenizer.ids[rare]] for new, rare in words.items()}
    apply_concept(model, tokenizer, {}, rows)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def apply_concept(model, tokenizer, W, rows):
    """Put {name: W} into model.denoiser, and new words, {token: row (D,)}, into model.text."""
    model.denoiser.load_state_dict({**model.denoiser.state_dict(), **W})
    model.text = NewWords(model.text, {tokenizer.add_token(new): row for new, row in rows.items()})


# ---- merge ---------------------------------------------------------------------------------------
def merge_map(C, C_reg, ridge=1e-6):
    """What Eq. 5 shares between layers, of C (s, d), C_reg (r, d) float64: (D C^T)^-1 D (s, d), and
    condition numbers. Raises ValueError if rows of C are dependent, or C_reg spans too little."""
    (s, d), eps = C.shape, torch.finfo(C.dtype).eps
    G = C_reg.T @ C_reg                                                             # (d, d)
    G = G + ridge * G.trace() / d * torch.eye(d, dtype=G.dtype)
    values, Q = torch.linalg.eigh(G)                                        # ascending (d,), (d, d)
    if (rank := int((values > d * eps * values[-1]).sum())) < d:
        raise ValueError(f"the captions span {rank} of {d} directions: give more, or a --ridge")
    # D C^T = A A^T with A = C G^-1/2: by A's singular values, no digit is lost to squaring
    A = C @ Q / values.sqrt()                                                       # (s, d)
    U, spread, Vt = torch.linalg.svd(A, full_matrices=False)                # (s, s), (s,), (s, d)
    if s > d or spread[-1] <= s * eps * spread[0]:
        raise ValueError(f"{s} target rows, {d} wide, are dependent: give a larger --tolerance")
    condition = {"cond_G": values[-1] / values[0], "cond_DCt": (spread[0] / spread[-1]).square()}
    return (U / spread) @ (Vt / values.sqrt()) @ Q.T, {k: v.item() for k, v in condition.items()}


def merge(W0, concepts, C_reg, ridge=1e-6, tolerance=1e-3):
    """One set of matrices for several concepts, Eq. 5 -> ({name: W (o, d) float64}, report).
    W0: {name: (o, d)} of the base; concepts: [({name: W_n}, C_n (s_n, d))], C_n: states of its own
    words; C_reg (r, d): states whose keys and values should stay; ridge: share of trace(G) / d
    added to G's diagonal; tolerance: rows nearer to an earlier one than this share of the mean
    length go. report: rows, dropped, cond_G, cond_DCt; dW = ||W - W0||; of each concept changes =
    ||W_n - W0||, constraint = missed(W, W_n, C_n). Raises ValueError. Source: Eq. 4, 5."""
    double = lambda tensors: {name: tensors[name].double() for name in W0}
    W0, concepts = double(W0), [(double(W), C.double()) for W, C in concepts]
    C = torch.cat([C for _, C in concepts])                                         # (s, d)
    owner, kept = [n for n, (_, C) in enumerate(concepts) for _ in C], []
    distance = torch.cdist(C, C, compute_mode="donot_use_mm_for_euclid_dist")       # (s, s)
    for i in range(len(C)):
        if not kept or distance[i, kept].min() > tolerance * C.norm(dim=1).mean():
            kept.append(i)
    for n in sorted({*owner} - {owner[i] for i in kept}):
        raise ValueError(f"concept {n + 1} keeps no row of its own: give a smaller --tolerance")
    P, report = merge_map(C[kept], C_reg.double(), ridge)
    asked = lambda name: torch.cat([(W[name] - W0[name]) @ C.T for W, C in concepts], 1)
    # Eq. 5, (o, d), where `asked` (o, s) is V^T - W0 C^T
    merged = {name: base + asked(name)[:, kept] @ P for name, base in W0.items()}
    change = lambda W: sum((W[name] - W0[name]).square().sum() for name in W0).sqrt().item()
    return merged, report | {"rows": len(kept), "dropped": len(C) - len(kept), "dW": change(merged),
                             "changes": [change(W) for W, _ in concepts],
                             "constraint": [missed(merged, W, C) for W, C in concepts]}


def missed(W, V, C):
    """How far W is from V at rows C (n, d), in the worst layer: ||(W - V) C^T|| / ||V C^T||."""
    at = lambda w: w.double() @ C.double().T                                        # (o, n)
    return max(((at(W[name]) - at(v)).norm() / at(v).norm()).item() for name, v in V.items())


@torch.no_grad()
def caption_rows(text, tokenizer, captions, lead=""):
    """List of states (n, D), of each caption's words after `lead` and end. Source: composenW.py."""
    rows, device = [], next((p.device for p in text.parameters()), "cpu")
    for some in (captions[k:k + 256] for k in range(0, len(captions), 256)):
        for caption, state in zip(some, text(tokenizer(some).to(device))):          # state (L, D)
            skip = len(tokenizer.encode(lead)) if (caption + " ").startswith(lead + " ") else 0
            end = min(len(tokenizer.encode(caption)) + 1, len(state) - 1)   # a long caption was cut
            rows.append(state[1 + skip:end + 1])                                    # (n, D)
    return rows


def prompt_rows(text, tokenizer, concept):
    """Rows of C (s, D) for a concept such as "<new1> dog", in the paper's two prompts; "art" makes
    it a style. In a vocabulary without "photo": "a <new1> dog". Source: official composenW.py."""
    few = not tokenizer.open and "photo" not in tokenizer.ids
    prompts = [f"a {concept}"] if few else [concept, lead(concept) + concept]
    return torch.cat(caption_rows(text, tokenizer, prompts, "a" if few else "photo of a"))


def compress(W, W0, ratio=0.6):
    """The change W - W0 of each matrix by its largest singular values, while they make up no more
    than `ratio` of their sum -> {name: (u (o, r), v (r, d))}; r may be 0. Source: compress.py."""
    def factors(w, w0):
        U, s, Vt = torch.linalg.svd(w.double() - w0.double(), full_matrices=False)
        # up to rounding: ratio 1 keeps everything, where the official code loses the last one
        rank = int((s.cumsum(0) <= ratio * (1 + 1e-12) * s.sum()).sum())
        return (U[:, :rank] * s[:rank]).to(w.dtype), Vt[:rank].to(w.dtype)
    return {name: factors(w, W0[name]) for name, w in W.items() if w.dim() == 2}


# ---- pictures and captions, and what a step is ---------------------------------------------------
RARE = ("ktn", "pll", "ucd</w>")        # CLIP's ids 42170, 47629, 43514. Source: official code
# prefix of a caption: none if unscaled, 1 or 2 if shrunk, 3 or 4 if enlarged. Source: official code
SIZE_WORDS = ("", "a far away ", "very small ", "zoomed in ", "close up ")


def select_prior(text, tokenizer, captions, target, count=200, threshold=0.85, generator=None):
    """Captions near to a prompt such as "photo of a dog", at random -> at most `count` indices.
    Near: cosine of end states > threshold; none: ValueError. Source: details of training."""
    ends = torch.stack([rows[-1] for rows in caption_rows(text, tokenizer, [target, *captions])])
    cosine = F.cosine_similarity(ends[1:], ends[:1])                    # (N,)
    if not len(near := torch.nonzero(cosine > threshold)[:, 0].cpu()):
        raise ValueError(f"no caption is as near to {target!r} as {threshold}, the nearest has "
                         f"{cosine.max():.3f}: say --prior generated")
    return near[torch.randperm(len(near), generator=generator)[:count]]


def geometry(u, size, factor):
    """Where pictures go: uniform draws u (n, 5) -> side, corner (n, 2), mask, words.
    side: new size in pixels; corner: row and column on the canvas, negative to cut from the middle;
    mask, on latent cells of `factor` pixels: 1 inside the picture but for a border of one cell,
    never all 0; words (n,): index into SIZE_WORDS. Source: official finetune_data.py."""
    if size % 2 or size % factor:
        raise ValueError(f"--augment needs an even --image-size that {factor} divides, not {size}")
    pick = lambda u, low, high: low + (u * (high - low)).long()             # whole, in [low, high)
    scale = torch.where(pick(u[:, :1], 0, 3) < 2, pick(u[:, 1:2], size // 3, size + 1),
                        pick(u[:, 1:2], int(1.2 * size), int(1.4 * size)))
    scale = scale + scale % 2                                                       # (n, 1)
    far, near, half, middle = scale < 0.6 * size, scale > size, scale // 2, size // 2
    low, high = torch.where(far, half, middle), torch.where(far, size - half, scale - middle) + 1
    centre = pick(u[:, 2:4], low, high)                                             # (n, 2)
    first, last = (centre - half) // factor + 1, (centre + half) // factor - 1      # cells
    cells = torch.arange(size // factor)
    valid = (cells >= first[..., None]) & (cells < last[..., None])                 # (n, 2, h)
    valid = torch.where(valid.any(2, True), valid, cells == centre[..., None] // factor)
    words = torch.where(far, 1, 3) + pick(u[:, 4:], 0, 2)                           # (n, 1)
    mask = valid[:, :1, :, None] & valid[:, 1:, None] | ~far[..., None, None]       # (n, 1, h, w)
    corner = torch.where(far, centre - half, torch.where(near, middle - centre, 0))
    side, words = torch.where(far | near, torch.cat([scale, words], 1), torch.tensor([size, 0])).T
    return side, corner, mask.float(), words


def augment(x, u, factor=1):
    """Shrink or enlarge targets x (n, C, S, S) by u (n, 5) -> (x, mask, words), see geometry."""
    side, corner, mask, words = geometry(u, size := x.shape[-1], factor)
    placed = []
    for picture, n, (top, left) in zip(x, side.tolist(), corner.tolist()):
        picture = F.interpolate(picture[None], (n, n), mode="bilinear", antialias=True)[0]
        placed.append(F.pad(picture, (left, size - left - n, top, size - top - n)))  # negative: cut
    return torch.stack(placed), mask, words                                         # (n, C, S, S)


def mix(targets, prior, count, factor=1, words=SIZE_WORDS, augmented=True, generator=None, first=0):
    """`count` targets, then as many of the prior -> (x (N, C, S, S), captions, mask (N, 1, h, w)).
    targets: [(pictures (n, C, S, S), n captions)], in turn, from the turn `first` on; prior: the
    same, in random order, or None; words: SIZE_WORDS, or () for a vocabulary without them."""
    turns = [(targets[k % len(targets)], k // len(targets)) for k in range(first, first + count)]
    x = torch.stack([pictures[k % len(pictures)] for (pictures, _), k in turns])
    captions = [texts[k % len(texts)] for (_, texts), k in turns]
    mask = torch.ones(count, 1, *(side // factor for side in x.shape[2:]))
    if augmented:
        x, mask, said = augment(x, torch.rand(count, 5, generator=generator), factor)
        captions = [(words[w] if words else "") + text for w, text in zip(said.tolist(), captions)]
    if prior is not None:
        rounds = torch.rand(-(-count // len(prior[0])), len(prior[0]), generator=generator)
        order = rounds.argsort(dim=1).flatten()[:count]                             # (count,)
        x, mask = torch.cat([x, prior[0][order]]), torch.cat([mask, torch.ones_like(mask)])
        captions += [prior[1][i] for i in order.tolist()]
    return x, captions, mask


@dataclasses.dataclass
class Options:
    """flags of custom_diffusion.py learn"""
    base: str = flag("assets/unet-scenes.pt", "text-to-image checkpoint, or Stable Diffusion v1")
    concept: tuple = flag((), "pictures of each thing, folder:PATH ...")
    category: tuple = flag((), "what each thing is, one word each, such as dog")
    prior: str = flag(None, "its category: a data set (default: the base's), generated or none")
    part: str = flag("kv", "what learns in the U-Net", "", list(PARTS))
    augment: bool = flag(True, "shrink and enlarge the pictures of things (our bases: not)")
    word_lr: float = flag(0.1, "learning rate of the new words", "[0, inf)")
    bpe: str = flag(None, "Stable Diffusion: CLIP's list of merges; default: in data/")


class ConceptTask(DiffusionTask):
    """Teach the model of the task `base` things from a few pictures each -> OUT/concept.pt.
    dataset: the prior's. Raises ValueError for unknown words, captions without one. Source: §3."""
    family = "concept"

    def __init__(self, base, dataset, options, config):
        super().__init__(base.settings, base.info, base.model, base.process, base.first_stage,
                         base.tokenizer)
        self.options, self.config, known = options, config, self.tokenizer.ids
        self.prompt = lambda what: (lead(what) if self.tokenizer.open else "a ") + what
        self.bare = [*map(self.prompt, options.category)]
        self.tokenizer(self.bare)                               # raises for a word it does not know
        used, words = " ".join(base.info["examples"]).split(), filter(str.isalpha, known)
        rare = RARE if self.tokenizer.open else sorted(words, key=used.count)
        free = (f"<new{k}>" for k in range(1, 1000) if f"<new{k}>" not in known)
        self.words = {word: rare[k % len(rare)] for k, word in zip(range(len(self.bare)), free)}
        self.things = [f"{word} {what}" for word, what in zip(self.words, options.category)]
        self.sampled_by = (f"{options.base} --concept {config.out}/concept.pt --prompt "
                           f'"{self.prompt(self.things[0])}"')
        self.pictures = [*map(self.photographs, options.concept, options.category, self.words)]
        self.W0 = copy.deepcopy(keys_and_values(self.model.denoiser.state_dict()))
        if options.augment:
            geometry(torch.zeros(1, 5), self.info["image_size"], self.first_stage.factor)
        self.prior = self.select(dataset)
        sources = *self.pictures, (dataset.images, dataset.captions)
        self.belongs = {"base": fingerprint(self.model.state_dict()), "data": fingerprint(
            {f"{k} {texts}": x for k, (x, texts) in enumerate(sources)})}
        learned = personalise(self.model, self.tokenizer, self.words, options.part)
        self.frozen = frozenset(self.model.state_dict()) - set(learned)
        asked = [*map(self.prompt, self.things), *self.bare]
        self.info = {**base.info, "examples": (asked * 8)[:max(len(asked), self.at_once)]}
        longest = SIZE_WORDS[1] * self.tokenizer.open
        self.tokenizer([longest + text for _, texts in self.pictures for text in texts])

    def photographs(self, name, category, word):
        """Pictures (n, C, S, S) of a thing, and captions with the new word before the category."""
        dataset = data.load(name, self.info["image_size"], data_dir=self.config.data_dir,
                            skip_bad=self.config.skip_bad)
        captions, place = [], rf"(?i)(?:<new\d+> )?\b({re.escape(category)})\b"
        for text in dataset.captions or [self.prompt(category)] * len(dataset):
            captions.append(re.sub(place, rf"{word} \1", text, count=1))
            if word not in captions[-1]:
                raise ValueError(f"{name}: caption {text!r} has no {category}, which all must name")
        return data.to_float(dataset.images), captions

    def select(self, dataset):
        """The prior, (pictures (n, C, S, S), captions), or None: sampled from the base, or what the
        data set has of the categories by captions (CLIP: near), class names, or all if neither."""
        options, captions, classes = self.options, dataset.captions, dataset.class_names
        if options.prior == "none":
            return None
        if options.prior == "generated":
            captions, device = (self.bare * 200)[:200], self.config.device
            y, size = self.tokenizer(captions).to(device), min(50, self.at_once)
            return data.to_float(sample_all(self, self.model.to(device), y, 0, size)[1]), captions
        if captions is None:
            classes = [*map(self.prompt, classes)] if classes[1:] else self.bare
            captions = [classes[k] for k in dataset.labels.tolist()]
        if self.tokenizer.open:
            generator = torch.Generator().manual_seed(self.config.seed)
            rows = torch.cat([select_prior(self.model.text, self.tokenizer, captions, bare,
                                           generator=generator) for bare in self.bare]).tolist()
            return data.to_float(dataset.images[rows]), [captions[i] for i in rows]
        split = [self.tokenizer.WORD.findall(text.lower()) for text in captions]
        named = [[c for c in options.category if c.lower() in words] for words in split]
        for category in [c for c in options.category if all(c not in found for found in named)]:
            raise ValueError(f"nothing in {dataset.name} names {category}: say --prior generated")
        rows = [i for i, found in enumerate(named) if found]
        rows = rows[::-(-len(rows) // 2000)]                # of the whole data set, at most 2,000
        said = [captions[i] if k % 2 else f"a {named[i][0]}" for k, i in enumerate(rows)]
        return data.to_float(dataset.images[rows]), said

    def prepare(self, dataset, device):
        """All pictures, augmented and encoded at once; 8,192 targets at most, which then repeat."""
        config, rows, generator = self.config, [], torch.Generator().manual_seed(self.config.seed)
        total = min(8192, -(-config.steps * config.batch_size // (2 if self.prior else 1)))
        how = self.first_stage.factor, SIZE_WORDS * self.tokenizer.open, self.options.augment
        for first in range(0, total, 500):
            x, captions, mask = mix(self.pictures, self.prior, min(500, total - first), *how,
                                    generator, first)
            z = torch.cat([self.encode(some.to(device)) for some in x.split(self.at_once)])
            rows.append((z, self.tokenizer(captions), mask))
        z, ids, mask = (torch.cat(column) for column in zip(*rows))
        self.mask = mask.to(device)                                                 # (N, 1, h, w)
        return data.Dataset(", ".join(self.things), z, ids, None, [], False)

    def loss(self, net, x, y, index, drop, **draws):
        return self.process.loss(net, x, y, mask=self.mask[index], **draws)

    def finish(self, model, dataset, device):
        W = {name: w for name, w in model.denoiser.state_dict().items()
             if f"denoiser.{name}" not in self.frozen}
        save_concept(f"{self.config.out}/concept.pt", W, dict(zip(self.words, model.text.rows)),
                     self.things, self.W0)

    def state(self):
        return {"options": vars(self.options), **self.belongs}


# ---- files and commands --------------------------------------------------------------------------
def save_concept(path, W, rows, concepts, unet):
    """Write W {name in the U-Net: tensor, or (u, v) of compress}, rows {token: row (D,)}, concepts
    ["<new1> dog", ...], and the base's hash, of state_dict unet. Source: get_deltas.py."""
    cpu = lambda w: (dict(zip("uv", map(cpu, w))) if isinstance(w, tuple) else
                     w.detach().cpu().contiguous().clone())
    save_checkpoint(path, {"base": fingerprint(keys_and_values(unet)), "concepts": list(concepts),
                           "modifiers": {token: cpu(row) for token, row in rows.items()},
                           "tensors": {name: cpu(w) for name, w in W.items()}})


def load_concept(path, unet):
    """A file of ours or published -> ({name: W}, {token: row}, ["<new1> dog", or bare tokens]).
    unet: the base's state_dict, to which it must belong: ValueError. Source: get_deltas.py."""
    known = keys_and_values(unet)
    with built_from(path):
        state = {} if is_official(path) else load_checkpoint(path)          # of ours: checked
        if "tensors" in state and state.get("base") != fingerprint(known):
            raise ValueError(f"{path} was learned on another base: give the one it was learned on")
        given, rows = (state.get("tensors", {}), state.get("modifiers", {})) if state else (
            read_official(path, "concept")[1]["concept"])
        W = {name: w["u"].float() @ w["v"].float() if isinstance(w, dict) else w
             for name, w in given.items()}
        have = {name: unet[name] for name in unet if name in W}
        have |= dict.fromkeys(rows, next(iter(known.values()))[0])                  # (D,)
        check_tensors(have, W | rows, f"{path} holds no concept for this U-Net:")
        concepts = list(state.get("concepts", rows))
        if not W | rows or any(not rows.keys() & {*text.split()} for text in concepts):
            raise ValueError(f"{path} holds no concept for this U-Net, or its words are missing")
    return {name: w.float() + (unet[name].cpu().float() if isinstance(given[name], dict) else 0)
            for name, w in W.items()}, rows, concepts


def gather(paths, unet, categories=()):
    """Concept files -> ([W_n], {<newK>: row}, [[concept, ...] of each file]), new words numbered.
    categories: what things are, for files that do not say it. Source: official composenW.py."""
    Ws, words, concepts, categories = [], {}, [], list(categories)
    for path in paths:
        W, rows, named = load_concept(path, unet)
        if named == list(rows):                                 # bare tokens: a published file
            if len(categories) < max(1, len(named)):
                raise ValueError(f"{path} does not say what it shows: add --category, such as dog")
            named = [f"{token} {categories.pop(0)}".strip() for token in named or [""]]
        new = {token: f"<new{len(words) + k}>" for k, token in enumerate(rows, 1)}
        words |= {new[token]: row for token, row in rows.items()}
        Ws.append(W)
        concepts.append([" ".join(new.get(w, w) for w in text.split()) for text in named])
    if categories:
        raise ValueError(f"--category {categories[0]} is not read: the files say what they show")
    return Ws, words, concepts


@dataclasses.dataclass
class FileOptions:
    """files"""
    files: tuple = flag((), "concept files of one base")
    base: str = flag("assets/unet-scenes.pt", "the checkpoint that was personalised")
    out: str = flag("out/concepts.pt", "new file for the result")
    bpe: str = flag(None, "Stable Diffusion: CLIP's list of merges; default: in data/")


@dataclasses.dataclass
class MergeOptions(FileOptions):
    """flags of custom_diffusion.py merge FILE FILE ..."""
    captions: str = flag(None, "file with a caption a line, or a data set; default: the base's")
    category: tuple = flag((), "for published files: what each thing is")
    ridge: float = flag(1e-6, "share of the mean eigenvalue added to G", "[0, inf)")
    tolerance: float = flag(1e-3, "text states nearer than this are one", "[0, inf)")


@dataclasses.dataclass
class CompressOptions(FileOptions):
    """flags of custom_diffusion.py compress FILE"""
    ratio: float = flag(0.6, "share of the singular values' sum to keep", "[0, 1]")


def read_flags(argv):
    """Flags of `learn` -> (Options, Config). Raises ValueError."""
    def presets(given):
        for name in {"data", "flip"} & set(given):
            raise ValueError(f"--{name} is not read: pictures are --concept and --prior")
        whole = given.get("part") == "all"      # ours: see the rates of studies/custom_concepts.py
        ours = dict(lr=5e-4 if whole else 1e-2, steps=500, batch_size=16, weight_decay=0.01,
                    augment=False)              # a third of 32 pixels shows no details
        word, things = given.get("part") == "none", len(given.get("concept", "1"))
        paper = dict(lr=8e-6 if whole else 8e-5, word_lr=0.04 if word else 8e-5, batch_size=8,
                     weight_decay=0.01, lr_decay="constant", prior="generated",
                     steps=5000 if word else 250 * (1 + whole) * things)
        return base_flags({"base": Options.base, "out": "out/concept", **given}, ours, paper)
    options, config = parse(argv, __doc__, Options, Config, presets=presets)
    config.device = resolve_device(config.device)
    return options, take_things(options, config)


def take_things(options, config):
    """Put the data set of the prior and the words' rate into config. Raises ValueError."""
    if not options.concept or len(options.concept) != len(options.category or ()):
        raise ValueError("give one --category for each --concept, and at least one of both")
    config.data = {None: config.data, "none": options.concept[0],
                   "generated": options.concept[0]}.get(options.prior, options.prior)
    if config.data.startswith("latents:"):
        raise ValueError(f"{config.data} holds no pictures: give another --prior, or generated")
    config.word_lr = options.word_lr
    return config


def learn(options, config, Task):
    """`learn`: train Task(base, data set, options, config), and say how to sample from it."""
    micro_size(config)
    check_out(config)
    dataset = load_data(config)
    torch.manual_seed(config.seed)
    task = Task(base_task(options.base, options.bpe, config.image_size), dataset, options, config)
    run(config, task, dataset)
    print(f"python sample.py --ckpt {task.sampled_by}")


def merge_files(argv):
    """`merge`: several concept files of one base into one that samples them all."""
    o, = parse(argv, __doc__, MergeOptions)
    data.check_target(o.out, None)
    base = base_task(o.base, o.bpe)
    unet, texts = base.model.denoiser.state_dict(), o.captions or base.info["name"]
    W0, (Ws, words, concepts) = keys_and_values(unet), gather(o.files, unet, o.category)
    if not Ws or any(set(W) != set(W0) for W in Ws):
        raise ValueError("merge takes files of concepts that were learned with --part kv")
    if o.captions and pathlib.Path(texts).is_file():
        captions = pathlib.Path(texts).read_text("utf-8-sig", "replace").split("\n")
    else:
        captions = texts and data.load(texts, count=1000, skip_bad=True).captions
    if not (captions := [*filter(str.strip, captions or ())]) or "\ufffd" in "".join(captions):
        raise ValueError("--captions: give a data set that has some, or UTF-8 text with one a line")
    apply_concept(base.model, base.tokenizer, {}, words)
    C_reg = torch.cat(caption_rows(base.model.text, base.tokenizer, captions, "photo of a"))
    things = [(W_n, prompt_rows(base.model.text, base.tokenizer, thing), thing)
              for W_n, named in zip(Ws, concepts) for thing in named]
    W, r = merge(W0, [(W_n, C) for W_n, C, _ in things], C_reg, o.ridge, o.tolerance)
    print(f"{r['rows']} target rows ({r['dropped']} dropped as equal), {len(C_reg):,} of captions, "
          f"cond(G) {r['cond_G']:.3g}, cond(D C^T) {r['cond_DCt']:.3g}, ||dW|| {r['dW']:.4g}, of "
          f"the things alone {', '.join(f'{change:.4g}' for change in r['changes'])}; if far "
          "larger, it ruins other prompts: say --ridge 0.1")
    save_concept(o.out, {name: w.float() for name, w in W.items()}, words, sum(concepts, []), unet)
    start = base.model.text(base.tokenizer([""]))[0, :1]                            # (1, D)
    for W_n, C, thing in things:
        print(f"{thing}: keys and values off by {missed(W, W_n, C):.1e} at the rows of its prompts,"
              f" {missed(W, W_n, start):.1e} at the start token; plain captions moved by "
              f"{missed(W, W0, C_reg):.2f}, by it alone {missed(W_n, W0, C_reg):.2f}")
    print(f"python sample.py --ckpt {o.base} --concept {o.out} --prompt ...")


def compress_file(argv):
    """`compress`: one concept file -> a smaller one."""
    o, = parse(argv, __doc__, CompressOptions)
    data.check_target(o.out, None)
    unet = base_task(o.base, o.bpe).model.denoiser.state_dict()
    if len(o.files) != 1:
        raise ValueError(f"compress: name one concept file, not {len(o.files)}")
    W, rows, concepts = load_concept(o.files[0], unet)
    if not W:
        raise ValueError(f"{o.files[0]} holds new words alone, which compress leaves as they are")
    save_concept(o.out, {**W, **compress(W, unet, o.ratio)}, rows, concepts, unet)
    print(f"written: {o.out} ({pathlib.Path(o.out).stat().st_size / 2 ** 20:.2f} MiB)")


@one_line
def main(argv):
    """The command line: custom_diffusion.py learn | merge | compress ..."""
    commands = {"learn": lambda argv: learn(*read_flags(argv), ConceptTask),
                "merge": merge_files, "compress": compress_file}
    if not argv or argv[0] not in commands:
        raise ValueError("say python custom_diffusion.py learn, merge or compress; each has --help")
    named = len(argv) > 1 and not argv[1].startswith("-")       # merge a.pt b.pt
    commands[argv[0]](["--files"] * named + list(argv[1:]))


if __name__ == "__main__":
    main()
