"""Adapters: a small network beside a frozen U-Net, at any of the twenty places where one can stand.

Paper: A Closer Look at Parameter-Efficient Tuning in Diffusion Models (Xiang et al. 2023, arXiv
2303.18181).

The idea.  To teach a big model something new, freeze it, and train A(x) = up(act(down(x))) beside
every block, d -> rank -> d: A reads one tensor of the block, and scale * A(x) is added to another.
Where? Ten tensors can be read and seven be added to; an adapter can only add to a tensor that is
computed after the one it reads, and shapes must fit. 20 pairs are left:

    read                       add to                             read       add to
    sa_in   block's input      sa_in, ca_in, ffn_in, trans_out    ffn_in     ffn_in, trans_out
    sa_out  self-attention     ca_in, ffn_in, trans_out           ffn_out    trans_out
    ca_in   sum behind it      ca_in, ffn_in, trans_out           trans_out  trans_out
    ca_c    the text states    ca_c, as this block sees them      res_in     res_in, res_out
    ca_out  cross-attention    ffn_in, trans_out                  res_out    res_out

ca_in = sa_out + sa_in, so adding to sa_out equals adding to ca_in, and the second name is used;
likewise ca_out and ffn_in, ffn_out and trans_out. The paper's answer: what is read matters most (by
an analysis of variance), and cross-attention's output is best.

    python adapters.py learn --base assets/unet-scenes.pt --data folder:my_pictures --out out/mine
    python sample.py --ckpt out/mine/adapter.pt --base assets/unet-scenes.pt --scale 0.7

Differences from the official code (Xiang-cd/unet-finetune; equal numbers with init="official"):
1. `up` starts at zero, so a new adapter changes nothing. There, it changes the output.
2. An impossible placement is refused; every parameter is listed once (there: twice).
3. In a ResBlock the norm has as many groups as the block's; the rank may follow from a budget.
"""
import dataclasses
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import built_from, check_tensors, save_checkpoint
from cli import flag, one_line, parse, resolve_device
from diffusion import check_name
from models import base_flags, base_task
from tasks import DiffusionTask, fingerprint
from train import Config, check_out, load_data, micro_size, run
from unet import Tapped

LEGAL = {       # read -> add to; Source: Xiang et al. 2023 figure 4
    "sa_in": ("sa_in", "ca_in", "ffn_in", "trans_out"), "sa_out": ("ca_in", "ffn_in", "trans_out"),
    "ca_in": ("ca_in", "ffn_in", "trans_out"), "ca_c": ("ca_c",), "ca_out": ("ffn_in", "trans_out"),
    "ffn_in": ("ffn_in", "trans_out"), "ffn_out": ("trans_out",), "trans_out": ("trans_out",),
    "res_in": ("res_in", "res_out"), "res_out": ("res_out",)}
PLACEMENTS = tuple(f"{read}-{add}" for read in LEGAL for add in LEGAL[read])
STREAM = {"sa_out": "ca_in", "ca_out": "ffn_in", "ffn_out": "trans_out"}    # output -> sum it joins
ACTIVATIONS = {"relu": F.relu, "sigmoid": torch.sigmoid, "silu": F.silu, "identity": lambda x: x}


class Adapter(nn.Module):
    """The adapter of one block, called as adapter(name, x) -> x: reads one tap, adds to another.
    transformer block   A(x) = up(act(down(x))), two Linear: x (B, N, d_in) -> (B, N, d_out)
    ResBlock            A(x) = up(act(down(SiLU(GN(x))))), two 3x3 convolutions:
                        x (B, d_in, H, W) -> (B, d_out, H, W)
    Arguments as in add_adapters. Source: Xiang et al. 2023 (its form); official code (norm)."""

    def __init__(self, block, read, add, rank, activation, scale, init):
        super().__init__()
        self.spec = dict(read=read, add=add, rank=rank, activation=activation)
        self.read, self.add, self.act = read, add, ACTIVATIONS[activation]
        self.scale, self.enabled, self.delta = float(scale), True, None
        d_in, d_out = block.taps[read], block.taps[add]
        if read.startswith("res"):
            groups = block.in_layers[0].num_groups
            self.before = nn.Sequential(nn.GroupNorm(groups, d_in), nn.SiLU())
            self.down = nn.Conv2d(d_in, rank, 3, padding=1)
            self.up = nn.Conv2d(rank, d_out, 3, padding=1)
        else:
            self.before = nn.Identity()
            self.down, self.up = nn.Linear(d_in, rank), nn.Linear(rank, d_out)
        self.initialize_weights(init)

    def initialize_weights(self, init):
        """init "zero" or "official". Source: official code; Houlsby et al. 2019 §2.1.
        | what | how                          | why                                     |
        | down | uniform +-1/sqrt(fan_in)     | PyTorch's own                           |
        | up   | zero: 0; official: as `down` | 0: A(x) = 0 at first, yet `up` learns   |
        """
        if init == "zero":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, name, x):
        if self.enabled:
            if name == self.read:
                self.delta = self.scale * self.up(self.act(self.down(self.before(x))))
            if name == self.add:
                x, self.delta = x + self.delta, None
        return x


def check_placement(read, add):
    """Two names of positions -> (read, add), where a sub-layer's output becomes the sum it joins.
    Raises ValueError with the reason. Source: Xiang et al. 2023 figure 4."""
    joined = STREAM.get(add, add)
    if joined in LEGAL.get(read, ()):
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


def add_adapters(unet, read, add, rank=None, budget=None, activation="relu", scale=1.0,
                 init="zero"):
    """Put an adapter into every block, in place, and freeze everything else.
    unet: a UNet, or a module that holds one; read, add: names of taps; rank: width of the adapter,
    or budget: its parameters over the whole U-Net, from which the rank follows; activation: one of
    ACTIVATIONS; scale: strength; init: zero or official. Source: Xiang et al. 2023 figure 4."""
    rank = rank_of(rank, budget, lambda r: sum(
        p.numel() for *_, adapter in _make(unet, read, add, r) for p in adapter.parameters()))
    _attach(unet, _make(unet, read, add, rank, activation, scale, init))


def rank_of(rank, budget, count):
    """The rank, or the one whose parameter count(rank), a straight line, is nearest to budget."""
    if (rank is None) == (budget is None):
        raise ValueError(f"rank {rank}, budget {budget}: give exactly one of them")
    if rank is None:
        with torch.device("meta"):
            one, two = count(1), count(2)
        rank = 1 + round((budget - one) / (two - one))
        if rank < 1:
            raise ValueError(f"a budget of {budget:,} parameters is too small: rank 1 has {one:,}")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank {rank!r}: give a whole number of at least 1")
    return rank


def _make(unet, read, add, rank, activation="relu", scale=1.0, init="zero"):
    """Check everything, and make an Adapter for every block -> [(path, block, adapter)]."""
    read, add = check_placement(read, add)
    check_name("activation", activation, ACTIVATIONS)
    check_name("init", init, ("zero", "official"))
    if not math.isfinite(scale):
        raise ValueError(f"scale {scale}: give a finite number")
    blocks = [(path, m) for path, m in unet.named_modules()
              if isinstance(m, Tapped) and read in m.taps]
    if not blocks:
        raise ValueError(f"no block of this {type(unet).__name__} has a {read}: give a U-Net")
    return [(path, block, Adapter(block, read, add, rank, activation, scale, init))
            for path, block in blocks]


def _attach(unet, made):
    """Hang what _make made into its blocks, on their device, and freeze the rest."""
    if any(isinstance(m, Adapter) for m in unet.modules()):
        raise ValueError("there are adapters in this model already: remove_adapters first")
    unet.requires_grad_(False)
    for _, block, adapter in made:
        adapter.to(next(block.parameters()))
        block.adapter = adapter


def _placed(unet):
    """The adapters of a model -> [(path of the block, block, adapter)]; none is an error."""
    found = [(path, m, m.adapter) for path, m in unet.named_modules()
             if isinstance(m, Tapped) and m.adapter is not None]
    if not found:
        raise ValueError("there is no adapter in this model: add_adapters first")
    return found


def set_scale(unet, scale):
    """Set the strength of the adapters; 0 is as if there were none. Raises ValueError."""
    if not math.isfinite(scale):
        raise ValueError(f"scale {scale}: give a finite number")
    for *_, adapter in _placed(unet):
        adapter.scale = float(scale)


def enable(unet, on=True):
    """Switch the adapters on or off; off, the base answers bit for bit as before."""
    for *_, adapter in _placed(unet):
        adapter.enabled = on


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
    if missing := [k for k in ("spec", "base", "adapter") if k not in state]:
        raise ValueError(f"this is no adapter's file: it has no {' and no '.join(missing)}")
    with built_from("this adapter's file"):
        spec = {"scale": None, **state["spec"], "rank": rank_of(state["spec"]["rank"], None, None)}
        with torch.device("meta"):                      # so the largest rank takes no memory
            made = _make(unet, **spec)
        check_tensors(_tensors(made), state["adapter"], "the adapter does not fit,")
    if base_hash(unet) != state["base"]:
        raise ValueError("the adapter's base has the same shape with other weights: give that one")
    made = _make(unet, **spec)
    for path, _, adapter in made:
        adapter.load_state_dict({k: state["adapter"][f"{path}.{k}"] for k in adapter.state_dict()})
    _attach(unet, made)


# ---- analysis of variance ------------------------------------------------------------------------

def anova(groups):
    """One-way analysis of variance -> (F, p): do groups differ by more than their inner scatter?
    groups: one sequence of numbers per level of a factor. F = MSB / MSE, the mean squares between
    and within groups, ValueError if undefined; p: the chance of a larger F. Source: Fisher 1925."""
    groups = [[float(y) for y in group] for group in groups]
    values, sizes = [y for group in groups for y in group], [*map(len, groups)]
    n, k = sum(sizes), len(sizes)
    if k < 2 or not all(sizes) or n <= k:
        raise ValueError(f"ANOVA needs 2 groups, none empty, one larger than 1, not sizes {sizes}")
    if not all(map(math.isfinite, values)):
        raise ValueError("some values are not finite: leave failed runs out")
    if all(min(group) == max(group) for group in groups):
        raise ValueError("all values inside every group are equal, so F would divide by zero")
    mean, means = math.fsum(values) / n, [math.fsum(group) / len(group) for group in groups]
    MSB = math.fsum(len(group) * (m - mean) ** 2 for group, m in zip(groups, means)) / (k - 1)
    MSE = math.fsum((y - m) ** 2 for group, m in zip(groups, means) for y in group) / (n - k)
    F_ratio, tail = MSB / MSE, (n - k) / (n - k + (k - 1) * MSB / MSE)
    return F_ratio, incomplete_beta(tail, (n - k) / 2, (k - 1) / 2)


def incomplete_beta(x, a, b):
    """Regularised incomplete beta function I_x(a, b): how likely a Beta(a, b) number is below x.
    I = x^a (1-x)^b / (a B(a,b)) / (1 + d1/(1 + d2/(1 + ...))), the fraction by Lentz's method: C
    and D are ratios of successive numerators and denominators. Source: DLMF 8.17.22; Lentz 1976."""
    if x in (0, 1):
        return float(x)
    if x > (a + 1) / (a + b + 2):           # slow there: use I_x(a, b) = 1 - I_1-x(b, a)
        return 1 - incomplete_beta(1 - x, b, a)
    C, D, fraction, n = 1.0, 0.0, 1.0, 0
    while n == 0 or abs(C * D - 1) > 1e-14:
        n, m = n + 1, (n + 1) // 2
        d = -(a + m) * (a + b + m) if n % 2 else m * (b - m)
        d *= x / ((a + n - 1) * (a + n))
        C, D = 1 + d / C, 1 / (1 + d * D)
        fraction *= C * D
    log_front = a * math.log(x) + b * math.log1p(-x) - math.log(a)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(log_front - log_beta) / fraction


# ---- the task, and the command -------------------------------------------------------------------

@dataclasses.dataclass
class Options:
    """flags of adapters.py learn"""
    base: str = flag("assets/unet-scenes.pt", "text-to-image checkpoint, or Stable Diffusion v1")
    adapter: str = flag("ca_out-ffn_in", "where it stands: READ-ADD", "", PLACEMENTS)
    rank: int = flag(16, "its width", "[1, inf)")
    bpe: str = flag(None, "Stable Diffusion: CLIP's list of merges; default: in data/")


class AdapterTask(DiffusionTask):
    """Train an adapter (options.adapter, options.rank) beside the frozen model of the task `base`.
    At the end it is written to OUT/adapter.pt, which sample.py reads."""
    family = "adapter"

    def __init__(self, base, dataset, options, out):
        super().__init__(base.settings, base.info, base.model, base.process, base.first_stage,
                         base.tokenizer)
        if dataset.captions is None:
            raise ValueError(f"an adapter learns from captions, and {dataset.name} has none: give "
                             "--data a folder with metadata.jsonl")
        self.options, self.out = options, out
        self.belongs = {"base": base_hash(self.model), "data": fingerprint(
            {repr(dataset.captions): dataset.images})}
        self.tokenizer(dataset.captions)                        # raises for a word it does not know
        add_adapters(self.model, *options.adapter.split("-"), rank=options.rank)
        learned = {name for name, p in self.model.named_parameters() if p.requires_grad}
        self.frozen = frozenset(self.model.state_dict()) - learned
        self.info = {**base.info, "examples": dataset.captions[:min(24, self.at_once)]}

    def finish(self, model, dataset, device):
        save_checkpoint(f"{self.out}/adapter.pt", adapter_state(model))

    def state(self):
        return {"options": vars(self.options), **self.belongs}


def learn(argv):
    """`learn`: train an adapter on --data."""
    ours, paper = dict(lr=5e-3, batch_size=16), dict(lr=1e-4, lr_decay="constant", batch_size=8)
    options, config = parse(argv, __doc__, Options, Config, presets=lambda given: base_flags(
        {"base": Options.base, "out": "out/adapter", **given}, ours, paper))
    config.device = resolve_device(config.device)
    micro_size(config)
    check_out(config)
    dataset = load_data(config)
    torch.manual_seed(config.seed)
    base = base_task(options.base, options.bpe, config.image_size)
    run(config, AdapterTask(base, dataset, options, config.out), dataset)
    print(f"python sample.py --ckpt {config.out}/adapter.pt --base {options.base}")


@one_line
def main(argv):
    """The command line: adapters.py learn ..."""
    if argv[:1] != ["learn"]:
        raise ValueError("say python adapters.py learn ..., or learn --help")
    learn(argv[1:])


if __name__ == "__main__":
    main()
