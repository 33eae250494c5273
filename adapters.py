"""Adapters: a small network beside a frozen U-Net, at any of the twenty places where one can stand.

Paper: A Closer Look at Parameter-Efficient Tuning in Diffusion Models (Xiang et al. 2023, arXiv
2303.18181).

The idea.  To teach a big model something new, freeze it, and train A(x) = up(act(down(x))) beside
every block, d -> rank -> d: A reads one tensor of the block, and scale * A(x) is added to another.
Where? Ten tensors can be read and seven be added to; an adapter can only add to a tensor that is
computed after the one it reads, and shapes must fit: LEGAL holds the 20 pairs that are left. Adding
to sa_out equals adding to ca_in = sa_out + sa_in, and the second name is used (see STREAM). The
paper's answer: what is read matters most (analysis of variance), cross-attention's output is best.

    python adapters.py learn --data folder:my_captioned_pictures --adapter lora
    python adapters.py learn --concept folder:my_thing --category circle    # <new1> circle
    python sample.py --ckpt out/adapter/adapter.pt --base assets/unet-scenes.pt --scale 0.7

Differences from the official code (Xiang-cd/unet-finetune; equal numbers with init="official"):
1. `up` starts at zero, so a new adapter changes nothing. There, it changes the output.
2. An impossible placement is refused; every parameter is listed once (there: twice).
3. In a ResBlock the norm has as many groups as the block's; the rank may follow from a budget.
4. A thing has a new word, whose row learns too. There, a rare word that stays as it is."""
import dataclasses
import math
import pathlib
import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import built_from, check_tensors, save_checkpoint
from cli import flag, one_line, parse, resolve_device
from custom_diffusion import ConceptTask, learn, take_things
from diffusion import check_name
from models import base_flags
from pretrained import PUBLISHED, read_weights
from tasks import DiffusionTask, fingerprint
from train import Config
from unet import Tapped

LEGAL = {       # read -> add to; Source: Xiang et al. 2023 figure 4
    "sa_in": ("sa_in", "ca_in", "ffn_in", "trans_out"),     # a transformer block's input
    "sa_out": ("ca_in", "ffn_in", "trans_out"),             # self-attention
    "ca_in": ("ca_in", "ffn_in", "trans_out"),              # the sum behind it
    "ca_c": ("ca_c",),                                      # the text states, for this block alone
    "ca_out": ("ffn_in", "trans_out"),                      # cross-attention
    "ffn_in": ("ffn_in", "trans_out"),                      # the sum behind it
    "ffn_out": ("trans_out",),                              # the MLP
    "trans_out": ("trans_out",),                            # the sum behind it
    "res_in": ("res_in", "res_out"),                        # a ResBlock's input
    "res_out": ("res_out",)}                                # and its output
PLACEMENTS = tuple(f"{read}-{add}" for read in LEGAL for add in LEGAL[read])
LORA = ("ca_c", "ca_kv")                                # not of the paper: see Adapter
STREAM = {"sa_out": "ca_in", "ca_out": "ffn_in", "ffn_out": "trans_out"}    # output -> sum it joins
ACTIVATIONS = {"relu": F.relu, "sigmoid": torch.sigmoid, "silu": F.silu, "identity": lambda x: x}


class Adapter(nn.Module):
    """One block's adapter, called as adapter(name, x) -> x: reads one tap, adds to another. A(x):
    transformer block  up(act(down(x))), Linear: x (B, N, d_in) -> (B, N, d_out)
    ResBlock           up(act(down(SiLU(GN(x))))), 3x3 Conv2d: (B, d_in, H, W) -> (B, d_out, H, W)
    to_k, to_v         up(act(down(x))), no biases; with identity: W + scale * up @ down
    Arguments: see add_adapters. Source: Xiang et al. (form); official code (norm); LoRA §4.1."""

    def __init__(self, block, read, add, rank, activation, scale, init):
        super().__init__()
        self.spec = dict(read=read, add=add, rank=rank, activation=activation)
        self.read, self.add, self.act = read, add, ACTIVATIONS[activation]
        self.scale, self.delta, tapped = float(scale), None, isinstance(block, Tapped)
        d_in, d_out = (block.taps[read], block.taps[add]) if tapped else block.weight.shape[::-1]
        layer, norm = lambda *widths: nn.Linear(*widths, bias=tapped), nn.Identity()
        if read.startswith("res"):
            layer = lambda *widths: nn.Conv2d(*widths, 3, padding=1)
            norm = nn.Sequential(nn.GroupNorm(block.in_layers[0].num_groups, d_in), nn.SiLU())
        self.before, self.down, self.up = norm, layer(d_in, rank), layer(rank, d_out)
        if init == "zero":      # A(x) = 0 at first, yet `up` learns (LoRA §4.1); else torch's own
            for parameter in self.up.parameters():
                nn.init.zeros_(parameter)

    def change(self, x):
        """scale * A(x)."""
        return self.scale * self.up(self.act(self.down(self.before(x))))

    def forward(self, name, x):
        if name == self.read:
            self.delta = self.change(x)
        if name == self.add:
            x, self.delta = x + self.delta, None
        return x


def check_placement(read, add):
    """Two names of positions -> (read, add), where a sub-layer's output becomes the sum it joins.
    Raises ValueError with the reason. Source: Xiang et al. 2023 figure 4."""
    joined = STREAM.get(add, add)
    if joined in LEGAL.get(read, ()) or (read, add) == LORA:
        return read, joined
    if unknown := [name for name in (read, add) if name not in LEGAL]:
        reason = f"{unknown[0]!r} is not one of the ten positions {', '.join(LEGAL)}"
    elif "ca_c" in (read, add):
        reason = "ca_c holds text states, the others cells of the picture: count and width differ"
    elif read.startswith("res") != add.startswith("res"):
        reason = "one is in a ResBlock, the other in a transformer block"
    else:
        reason = f"{add} comes before {read}, and is already used when {read} is known"
    raise ValueError(f"no adapter can read {read} and add to {add}: {reason}. "
                     f"Legal: {', '.join(PLACEMENTS)}")


def add_adapters(unet, read, add, rank=None, budget=None, activation="relu", scale=1, init="zero"):
    """Put an adapter into every block, in place, and freeze everything else.
    unet: a UNet, or a module that holds one; read, add: names of taps, or *LORA; rank: width of the
    adapter, or budget: its parameters over the whole U-Net, from which the rank follows;
    activation: one of ACTIVATIONS; scale: strength; init: zero or official. Source: figure 4."""
    if (rank is None) == (budget is None):
        raise ValueError(f"rank {rank}, budget {budget}: give exactly one of them")
    make = lambda r: _make(unet, read, add, r, activation, scale, init)
    if rank is None:                    # the size is a straight line in the rank: take the nearest
        with torch.device("meta"):
            one, two = (sum(w.numel() for w in _tensors(make(r)).values()) for r in (1, 2))
        if (rank := 1 + round((budget - one) / (two - one))) < 1:
            raise ValueError(f"a budget of {budget:,} parameters is too small: rank 1 has {one:,}")
    _attach(unet, make(rank))


def _make(unet, read, add, rank, activation, scale, init="zero"):
    """Check everything, and make an Adapter for every block -> [(path, block, adapter)]."""
    read, add = check_placement(read, add)
    check_name("activation", activation, ACTIVATIONS)
    check_name("init", init, ("zero", "official"))
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank {rank!r}: give a whole number of at least 1")
    if not math.isfinite(scale):
        raise ValueError(f"scale {scale}: give a finite number")
    if made := [(path, m, Adapter(m, read, add, rank, activation, scale, init))
                for path, m in unet.named_modules()
                if (path.endswith(("attn2.to_k", "attn2.to_v")) if (read, add) == LORA else
                    isinstance(m, Tapped) and read in m.taps)]:
        return made
    raise ValueError(f"no block of this {type(unet).__name__} has a {read}: give a U-Net")


def _attach(unet, made):
    """Hang what _make made into its blocks, on their device, and freeze the rest."""
    if any(isinstance(m, Adapter) for m in unet.modules()):
        raise ValueError("there are adapters in this model already: remove_adapters first")
    unet.requires_grad_(False)
    for _, block, adapter in made:
        adapter.to(next(block.parameters()))
        if not hasattr(block, "adapter"):               # a Linear layer: before detach_first_token
            block.register_forward_hook(prepend=True, hook=lambda layer, inputs, out: (
                out if layer.adapter is None else out + layer.adapter.change(inputs[0])))
        block.adapter = adapter


def _placed(unet):
    """The adapters of a model -> [(path of the block, block, adapter)]; none is an error."""
    if found := [(path, m, m.adapter) for path, m in unet.named_modules()
                 if getattr(m, "adapter", None) is not None]:
        return found
    raise ValueError("there is no adapter in this model: add_adapters first")


def set_scale(unet, scale):
    """Set the strength of the adapters; 0 is as if there were none."""
    for *_, adapter in _placed(unet):
        adapter.scale = float(scale)


def remove_adapters(unet):
    """Take the adapters out; the base stays frozen until requires_grad_(True)."""
    for _, block, _ in _placed(unet):
        block.adapter = None


# ---- files: adapter tensors only, and the base to which they belong ------------------------------
def base_hash(unet):
    """Identity of a model without its adapters, see tasks.fingerprint."""
    return fingerprint({name: tensor for name, tensor in unet.state_dict().items()
                        if "adapter" not in name.split(".")})


def adapter_state(unet):
    """What to save: {"spec": how to make it, "base": base_hash, "adapter": its tensors}."""
    found = _placed(unet)
    return {"spec": {**found[0][2].spec, "scale": found[0][2].scale}, "base": base_hash(unet),
            "adapter": _tensors(found)}


def _tensors(made):
    return {f"{path}.{k}": v for path, _, adapter in made for k, v in adapter.state_dict().items()}


def load_adapters(unet, state):
    """Add the adapter that adapter_state saved. A model that it does not fit is left as it was.
    Raises ValueError with the tensors that differ, or for a base with other weights."""
    with built_from("this adapter's file"):
        with torch.device("meta"):                      # so the largest rank takes no memory
            made = _make(unet, **state["spec"])
        words = state.get("modifiers", {})              # checked here; apply_concept adds them
        rows = {w: unet.text.text_model.embeddings.token_embedding.weight[0] for w in words}
        check_tensors(_tensors(made) | rows, state["adapter"] | words, "the adapter does not fit,")
        if state["base"] not in ("any", base_hash(unet)):
            raise ValueError("the adapter's base has the same shape with other weights")
    for path, _, adapter in made:
        adapter.load_state_dict({k: state["adapter"][f"{path}.{k}"].clone()
                                 for k in adapter.state_dict()}, assign=True)
    _attach(unet, made)


def read_adapter(path):
    """A folder of unet-finetune, a file per block -> what adapter_state gives; else None. A config,
    a .yaml inside or where its training leaves it, says its place: ValueError without. Source: its
    save_adapter_to_dir; its README, "Notation"."""
    path, names = pathlib.Path(path), PUBLISHED["unet-finetune"]
    if not (files := sorted(path.glob("*.adapter*.pt"))):
        return None
    configs = [*sorted(path.glob("../../configs/*-project.yaml")), *path.glob("*.yaml")]
    if not configs:
        raise ValueError(f"{path} is an adapter of unet-finetune: put the config of its run there, "
                         "such as attn2o-ffni.yaml, which says where it stands")
    config = configs[-1].read_text("utf-8", "replace").partition("adapter_config:")[2]
    lines = re.findall(r"""^[ -]*(\w+): *["']?([\w.]+)""", config.split("_stage_config")[0], re.M)
    said = {key: names.get(value, value) for key, value in lines}   # of several the last, as there
    ours = lambda name: re.sub(r"adapter[\w.]*\d", lambda layer: names.get(layer[0], ""), name)
    with built_from(configs[-1]):
        spec = dict(read=said["din"], add=said["dout"], activation=said["method"],
                    rank=int(said["mid_dim"]), scale=float(said["scale"]))
        return {"spec": spec, "base": "any", "adapter": {
            f"denoiser.{ours(f'{file.stem}.{name}')}": w for file in files
            for name, w in read_weights(file).items()}}


# ---- analysis of variance ------------------------------------------------------------------------
def anova(groups):
    """One-way analysis of variance -> (F, p): do groups differ by more than their inner scatter?
    groups: one sequence of numbers per level of a factor. F = MSB / MSE, the mean squares between
    and within groups, ValueError if undefined; p: the chance of a larger F. Source: Fisher 1925."""
    groups = [torch.tensor([*group], dtype=torch.float64) for group in groups]
    values, sizes = torch.cat(groups), [*map(len, groups)]
    n, k = sum(sizes), len(sizes)
    if k < 2 or not all(sizes) or n <= k:
        raise ValueError(f"ANOVA needs 2 groups, none empty, one larger than 1, not sizes {sizes}")
    if not values.isfinite().all():
        raise ValueError("some values are not finite: leave failed runs out")
    if all(group.min() == group.max() for group in groups):
        raise ValueError("all values inside every group are equal, so F would divide by zero")
    MSB = sum(len(x) * (x.mean() - values.mean()) ** 2 for x in groups).item() / (k - 1)
    MSE = sum((x - x.mean()).square().sum() for x in groups).item() / (n - k)
    tail = (n - k) / (n - k + (k - 1) * MSB / MSE)
    return MSB / MSE, incomplete_beta(tail, (n - k) / 2, (k - 1) / 2)


def incomplete_beta(x, a, b):
    """Regularised incomplete beta function I_x(a, b), a, b from 1/2 to hundreds: how likely a
    Beta(a, b) number is below x. With x = sin^2 u it is the integral of sin^(2a-1) cos^(2b-1) up to
    u over that up to pi/2, each a sum over Gauss-Legendre points. Source: DLMF 8.17.1, 3.5.v."""
    points, weights = np.polynomial.legendre.leggauss(200)                  # on [-1, 1]
    def integral(end):
        u = end * (points + 1) / 2
        return end * (weights * np.sin(u) ** (2 * a - 1) * np.cos(u) ** (2 * b - 1)).sum()
    return float(integral(math.asin(math.sqrt(x))) / integral(math.pi / 2))


# ---- the tasks, and the command ------------------------------------------------------------------
@dataclasses.dataclass
class Options:
    """flags of adapters.py learn"""
    base: str = flag("assets/unet-scenes.pt", "text-to-image checkpoint, or Stable Diffusion v1")
    adapter: str = flag("ca_out-ffn_in", "READ-ADD; or lora, on K and V", "", (*PLACEMENTS, "lora"))
    rank: int = flag(None, "its width (default: 16)", "[1, inf)", needs="!budget")
    budget: float = flag(None, "its share of the U-Net's parameters, such as 0.0075", "(0, 1]")
    activation: str = flag(None, "between its layers (default: relu)", "", list(ACTIVATIONS))
    scale: float = flag(1.0, "its strength")
    concept: tuple = flag(None, "instead of --data: pictures of each thing, folder:PATH ...")
    category: tuple = flag(None, "what each thing is, one word each, such as dog", needs="concept")
    prior: str = flag(None, "others like it: a data set, generated or none", needs="concept")
    augment: bool = flag(None, "shrink and enlarge the pictures of things", needs="concept")
    word_lr: float = flag(None, "learning rate of new words", "[0, inf)", needs="concept")
    bpe: str = flag(None, "Stable Diffusion: CLIP's list of merges; default: in data/")
    part = "none"                       # of the base: for ConceptTask, and no flag


class AdapterTask(DiffusionTask):
    """Train an adapter on captioned pictures, the model of `base` frozen -> OUT/adapter.pt."""
    family, words, things, state = "adapter", {}, [], ConceptTask.state

    def __init__(self, base, dataset, options, config):
        super().__init__(base.settings, base.info, base.model, base.process, base.first_stage,
                         base.tokenizer)
        if dataset.captions is None:
            raise ValueError(f"{dataset.name} has no captions: give a folder with metadata.jsonl")
        self.options, self.config = options, config
        self.belongs = {"base": base_hash(self.model), "data": fingerprint(
            {repr(dataset.captions): dataset.images})}
        self.tokenizer(dataset.captions)                        # raises for a word it does not know
        self.info = {**base.info, "examples": dataset.captions[:min(24, self.at_once)]}
        self.model.requires_grad_(False)
        self.add_adapter()

    def add_adapter(self):
        """Put the adapter of the options into the U-Net. It learns, with new words, if any."""
        o, unet, lora = self.options, self.model.denoiser, self.options.adapter == "lora"
        budget = o.budget and round(o.budget * sum(p.numel() for p in unet.parameters()))
        add_adapters(unet, *(LORA if lora else o.adapter.split("-")),
                     None if o.budget else o.rank or 16, budget,
                     o.activation or ("identity" if lora else "relu"), o.scale)
        learned = {name for name, p in self.model.named_parameters() if p.requires_grad}
        self.frozen = frozenset(self.model.state_dict()) - learned
        self.sampled_by = f"{self.config.out}/adapter.pt --base {o.base}"

    def finish(self, model, dataset, device):
        save_checkpoint(f"{self.config.out}/adapter.pt", {      # base: as it was without the words
            **adapter_state(model), "base": self.belongs["base"], "concepts": self.things,
            "modifiers": dict(zip(self.words, getattr(model.text, "rows", ())))})


class ThingTask(ConceptTask):
    """Teach things, each with a new word whose row learns together with the adapter."""
    family = "adapter"
    add_adapter, finish = AdapterTask.add_adapter, AdapterTask.finish

    def __init__(self, *given):
        super().__init__(*given)
        self.add_adapter()


def read_flags(argv):
    """Flags of `learn` -> (Options, Config). Raises ValueError."""
    def presets(given):
        ours, paper = dict(lr=5e-3, batch_size=16), dict(lr=1e-4, lr_decay="constant", batch_size=8)
        if given.get("concept"):
            for name in {"data", "flip"} & given.keys():
                raise ValueError(f"--{name} is not read beside --concept, whose prior is --prior")
            ours |= {"word_lr": 0.1}
            paper |= {"word_lr": 8e-5, "prior": "generated", "batch_size": 2, "steps": 2500}
        return base_flags({"base": Options.base, "out": "out/adapter", **given}, ours, paper)
    options, config = parse(argv, __doc__, Options, Config, presets=presets)
    config.device = resolve_device(config.device)
    return options, take_things(options, config) if options.concept else config


@one_line
def main(argv):
    """The command, adapters.py learn ...: train an adapter on --data, or on a --concept."""
    if argv[:1] != ["learn"]:
        raise ValueError("say python adapters.py learn ..., or learn --help")
    options, config = read_flags(argv[1:])
    learn(options, config, ThingTask if options.concept else AdapterTask)


if __name__ == "__main__":
    main()
