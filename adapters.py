"""Adapters: a small network beside a frozen U-Net, at any of the twenty places where one can stand.

Paper: A Closer Look at Parameter-Efficient Tuning in Diffusion Models (Xiang et al. 2023, arXiv 2303.18181).

The idea.  To teach a big model something new, freeze it and train A(x) = up(act(down(x))), d -> rank -> d, beside every
block: A reads a tensor of the block and scale * A(x) is added to a tensor of the same block. The paper's question is
where. Ten tensors can be read, and only seven be added to: adding to what a sub-layer puts out is adding to the stream
it joins at once (c = a + x, so (a + d) + x = c + d); hence the names sa_out, ca_out and ffn_out as an output mean
ca_in, ffn_in and trans_out. Note that adding there changes the stream for good, not only what the next sub-layer sees.
No effect before its cause, and the shapes must fit: of 10 x 7 pairs these 20 remain (the taps' formulas: unet.py).

    read                         add to                                   read        add to
    sa_in    block's input       sa_in, ca_in, ffn_in, trans_out          ffn_in      ffn_in, trans_out
    sa_out   self-attention      ca_in, ffn_in, trans_out                 ffn_out     trans_out
    ca_in    stream behind it    ca_in, ffn_in, trans_out                 trans_out   trans_out
    ca_c     the words           ca_c, as this block sees them            res_in      res_in, res_out
    ca_out   cross-attention     ffn_in, trans_out                        res_out     res_out

The paper's answer: what is read matters most (by an analysis of variance), and cross-attention's output is best.

Contents: placements, Adapter, add and remove, fold, save and load, LoRA to compare with, the probe, ANOVA.

    add_adapters(unet, "ca_out", "ffn_in", rank=16)                       # edits the U-Net in place, and freezes it
    optimizer = torch.optim.AdamW(adapter_parameters(unet), lr=1e-4)
    save_checkpoint("dog.pt", adapter_state(unet))                        # adapter tensors and the hash of their base
    load_adapters(another, load_checkpoint("dog.pt")); set_scale(another, 0.7)
    python -m pytest tests/test_adapters.py                               # what it must do, against official figures

`unet` is always a UNet, or any module that holds one, for instance a text-to-image model: then all of it is frozen, and
part of the base's hash.

Differences from the official code (Xiang-cd/unet-finetune; with init="official" the numbers are the same):
1. `up` starts at zero, so a new adapter changes nothing. Officially nothing is zero: the adapted model starts broken.
2. An impossible placement is refused with the reason; officially it dies later, on an unbound variable.
3. Every parameter is listed once. Officially the transformer ones are listed, and stepped by AdamW, twice.
4. Several adapters work at once. Officially a list is accepted, and its last entry used.
5. In a ResBlock the norm has as many groups as the block's own: 32 as published, fewer in the tiny U-Nets.
6. fold, and the rank from a parameter budget: the published residual adapters are twice the size of the others.
"""
import hashlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

from unet import Tapped, TransformerBlock

LEGAL = {       # read -> add to; Source: Xiang et al. 2023 figure 4
    "sa_in": ("sa_in", "ca_in", "ffn_in", "trans_out"), "sa_out": ("ca_in", "ffn_in", "trans_out"),
    "ca_in": ("ca_in", "ffn_in", "trans_out"), "ca_c": ("ca_c",), "ca_out": ("ffn_in", "trans_out"),
    "ffn_in": ("ffn_in", "trans_out"), "ffn_out": ("trans_out",), "trans_out": ("trans_out",),
    "res_in": ("res_in", "res_out"), "res_out": ("res_out",)}
PLACEMENTS = tuple(f"{input}-{output}" for input in LEGAL for output in LEGAL[input])
STREAM = {"sa_out": "ca_in", "ca_out": "ffn_in", "ffn_out": "trans_out"}        # a sub-layer's output -> what it joins
# the Linear whose output is read, where the reading is the last thing before the sum
FOLDS = {"sa_out-ca_in": "attn1.to_out.0", "ca_out-ffn_in": "attn2.to_out.0", "ffn_out-trans_out": "ff.net.2"}
ACTIVATIONS = {"relu": F.relu, "sigmoid": torch.sigmoid, "silu": F.silu, "identity": lambda x: x}


def check_placement(input, output):
    """Two names of positions -> (input, output), where a sub-layer's output as `output` becomes the stream it joins.

    Raises ValueError with the reason and the legal placements. Source: Xiang et al. 2023 figure 4; the official
    repository's twenty configurations.
    """
    joined = STREAM.get(output, output)
    if joined in LEGAL.get(input, ()):
        return input, joined
    unknown = [name for name in (input, output) if name not in LEGAL]
    if unknown:
        reason = f"{unknown[0]!r} is not one of the ten positions {', '.join(LEGAL)}"
    elif "ca_c" in (input, output):
        reason = "ca_c is the words, the others are cells of the picture: neither count nor width fits"
    elif input.startswith("res") != output.startswith("res"):
        reason = "one is in a ResBlock, the other in a transformer block"
    else:
        reason = f"{output} comes before {input}, so nothing is left to add to when it is known"
    raise ValueError(f"no adapter can go from {input} to {output}: {reason}. Legal: {', '.join(PLACEMENTS)}")


class Adapter(nn.Module):
    """The adapter of one block, called as adapter(name, x) -> x: reads tap `input`, adds scale * A(.) to tap `output`.

    transformer block   A(x) = up(act(down(x)))             two Linear,           x (B, N, d_in) -> (B, N, d_out)
    ResBlock            A(x) = up(act(down(SiLU(GN(x)))))   two 3x3 convolutions, x (B, d_in, H, W) -> (B, d_out, H, W)
    Arguments as in add_adapters. Source: Xiang et al. 2023 (function form); the official code for the norm and SiLU.
    """

    def __init__(self, block, input, output, rank, activation, scale, init):
        super().__init__()
        self.spec = dict(input=input, output=output, rank=rank, activation=activation)
        self.input, self.output, self.act, self.scale = input, output, ACTIVATIONS[activation], float(scale)
        self.enabled, self.delta, self.original = True, None, None      # original: the base's weights before fold
        d_in, d_out = block.taps[input], block.taps[output]
        if input.startswith("res"):
            self.before = nn.Sequential(nn.GroupNorm(block.in_layers[0].num_groups, d_in), nn.SiLU())
            self.down, self.up = nn.Conv2d(d_in, rank, 3, padding=1), nn.Conv2d(rank, d_out, 3, padding=1)
        else:
            self.before, self.down, self.up = nn.Identity(), nn.Linear(d_in, rank), nn.Linear(rank, d_out)
        self.initialize_weights(init)

    def initialize_weights(self, init):
        """`down`, and `up` if official: PyTorch's uniform +-1/sqrt(fan_in); `up` otherwise 0, so A(x) = 0 at first.

        Never both 0: neither would ever get a gradient. Source: official code; Houlsby et al. 2019 §2.1.
        """
        if init == "zero":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, name, x):
        if self.enabled and self.original is None:
            if name == self.input:
                self.delta = self.scale * self.up(self.act(self.down(self.before(x))))      # shape of `output`
            if name == self.output:
                x, self.delta = x + self.delta, None
        return x


class Stack(nn.ModuleDict):
    """The adapters of one block, name -> Adapter, in the order of adding: each sees what the earlier ones left.

    Source: none; the official code has one.
    """

    def forward(self, name, x):
        for adapter in self.values():
            x = adapter(name, x)
        return x


# ----------------------------------------------------------------------------------------------------------------------
# add, find, switch, remove

def _make(unet, input, output, rank, activation="relu", scale=1.0, init="zero"):
    """Check everything, and make one Adapter for every block with these taps -> [(path, block, adapter)]."""
    input, output = check_placement(input, output)
    for what, value, known in (("activation", activation, ACTIVATIONS), ("init", init, ("zero", "official"))):
        if value not in known:
            raise ValueError(f"{what} {value!r} is not one of {', '.join(known)}")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank {rank!r}: give a whole number of at least 1")
    if not math.isfinite(scale):
        raise ValueError(f"scale {scale}: give a finite number")
    blocks = [(path, m) for path, m in unet.named_modules() if isinstance(m, Tapped) and input in m.taps]
    if not blocks:
        raise ValueError(f"no block of this {type(unet).__name__} has a tensor called {input}: give a U-Net")
    return [(path, block, Adapter(block, input, output, rank, activation, scale, init)) for path, block in blocks]


def rank_for(unet, input, output, budget):
    """The rank whose adapters have as nearly `budget` parameters as can be, over the whole U-Net.

    Raises ValueError for a budget nearer to nothing than to rank 1. Source: none; makes placements comparable.
    """
    with torch.device("meta"):
        one, two = (sum(p.numel() for *_, adapter in _make(unet, input, output, rank) for p in adapter.parameters())
                    for rank in (1, 2))
    rank = 1 + round((budget - one) / (two - one))                          # the count grows linearly
    if rank < 1:
        raise ValueError(f"a budget of {budget:,} parameters is too small: {input}-{output} has {one:,} at rank 1")
    return rank


def _is_base(name):
    """Whether the tensor of this name belongs to the model itself, not to an adapter."""
    return "adapter" not in name.split(".")


def add_adapters(unet, input, output, rank=None, budget=None, activation="relu", scale=1.0, init="zero",
                 name="adapter"):
    """Put an adapter into every block, in place, and freeze everything else: only adapters train.

    input, output: the tensor to read and the one to add to; rank: width of the adapter, or budget: its parameters over
    the whole U-Net, from which the rank follows; activation: relu, sigmoid, silu, identity; scale: strength; init: zero
    or official; name: for several adapters in one U-Net (no dots). The base stays frozen when they are removed.
    Raises ValueError for an illegal placement or value. Source: Xiang et al. 2023.
    """
    if (rank is None) == (budget is None):
        raise ValueError(f"rank {rank}, budget {budget}: give exactly one of them")
    rank = rank_for(unet, input, output, budget) if rank is None else rank
    _attach(unet, _make(unet, input, output, rank, activation, scale, init), name)


def _attach(unet, made, name):
    """Hang what _make made into its blocks under this name, and freeze the rest."""
    _check_unfolded(unet)
    if not name or "." in name or hasattr(Stack(), name):
        raise ValueError(f"{name!r} cannot name an adapter: take a plain word without dots")
    if name in {key for m in unet.modules() if isinstance(m, Stack) for key in m}:
        raise ValueError(f"there is an adapter {name!r} already: remove it, or give this one another name")
    for key, p in unet.named_parameters():
        if _is_base(key):
            p.requires_grad_(False)
    for _, block, adapter in made:
        adapter.to(next(p for key, p in block.named_parameters() if _is_base(key)))      # its device and precision
        block.adapter = Stack() if block.adapter is None else block.adapter
        block.adapter[name] = adapter


def _placed(unet, name=None):
    """The adapters of this name, or of every name -> [(path, block, name, adapter)]; none is an error."""
    stacks = [(path, m) for path, m in unet.named_modules() if isinstance(m, Tapped) and isinstance(m.adapter, Stack)]
    found = [(path, m, key, m.adapter[key]) for path, m in stacks for key in m.adapter if name in (None, key)]
    if not found:
        there = sorted({key for _, m in stacks for key in m.adapter}) or "none"
        raise ValueError(f"no adapter {'at all' if name is None else repr(name)} in this model; there are: {there}")
    return found


def adapter_parameters(unet, name=None):
    """What an optimizer is to train, every tensor once. Raises ValueError if there is none. Source: none."""
    return [p for *_, adapter in _placed(unet, name) for p in adapter.parameters()]


def set_scale(unet, scale, name=None):
    """Set the strength of adapters; 0 is as if there were none. Raises ValueError. Source: Xiang et al. 2023."""
    _check_unfolded(unet)
    if not math.isfinite(scale):
        raise ValueError(f"scale {scale}: give a finite number")
    for *_, adapter in _placed(unet, name):
        adapter.scale = float(scale)


def enable(unet, on=True, name=None):
    """Switch adapters on or off; off, the base answers as ever, bit for bit. Raises ValueError. Source: none."""
    _check_unfolded(unet)
    for *_, adapter in _placed(unet, name):
        adapter.enabled = on


def remove_adapters(unet, name=None):
    """Take adapters out; the base stays frozen until requires_grad_(True). Raises ValueError. Source: none."""
    _check_unfolded(unet)
    for _, block, key, _ in _placed(unet, name):
        del block.adapter[key]
        if not block.adapter:
            block.adapter = None


# ----------------------------------------------------------------------------------------------------------------------
# fold: a linear adapter on the output of a Linear is that Linear, changed

def _check_unfolded(unet):
    """Until an adapter is unfolded, the base is not the base: nothing else may be done."""
    if any(isinstance(m, Adapter) and m.original is not None for m in unet.modules()):
        raise ValueError("an adapter is folded into the base: unfold(unet) first")


@torch.no_grad()
def fold(unet):
    """Multiply the model's one adapter into the weights of the base: the same function (up to rounding), at no cost.

    y = W x + b, then y + s A(y) with A(y) = U (D y + e) + f:  W' = (I + s U D) W,  b' = (I + s U D) b + s (U e + f).
    Exact for the identity activation at sa_out-ca_in, ca_out-ffn_in and ffn_out-trans_out alone: elsewhere something
    nonlinear, or a second reader, stands between. Raises ValueError then, and if there are other adapters (they would
    read the changed tensor) or it is off. Source: linear algebra.
    """
    _check_unfolded(unet)
    found = _placed(unet)
    spec = found[0][3].spec
    where = f"{spec['input']}-{spec['output']}"
    if where not in FOLDS or spec["activation"] != "identity":
        raise ValueError(f"{where} with {spec['activation']} cannot be folded: exact only for {', '.join(FOLDS)} with "
                         "the activation identity")
    if len({key for _, _, key, _ in found}) > 1 or not all(adapter.enabled for *_, adapter in found):
        raise ValueError("fold wants one adapter, switched on: remove the others, or enable it")
    for _, block, _, adapter in found:
        linear = block.get_submodule(FOLDS[where])
        W, b, D, e, U, f = (p.double() for p in (linear.weight, linear.bias, adapter.down.weight, adapter.down.bias,
                                                 adapter.up.weight, adapter.up.bias))
        adapter.original = linear.weight.clone(), linear.bias.clone()
        linear.weight.copy_(W + adapter.scale * U @ (D @ W))                            # (d, d_in)
        linear.bias.copy_(b + adapter.scale * (U @ (D @ b + e) + f))                    # (d,)


@torch.no_grad()
def unfold(unet):
    """Undo fold, bit for bit, from the weights it kept. Raises ValueError if nothing is folded. Source: none."""
    found = [(block, adapter) for _, block, _, adapter in _placed(unet) if adapter.original is not None]
    if not found:
        raise ValueError("nothing is folded here")
    for block, adapter in found:
        linear = block.get_submodule(FOLDS[f"{adapter.input}-{adapter.output}"])
        linear.weight.copy_(adapter.original[0])
        linear.bias.copy_(adapter.original[1])
        adapter.original = None


# ----------------------------------------------------------------------------------------------------------------------
# save and load: adapter tensors only, and whom they belong to

def base_hash(unet):
    """Identity of a model without its adapters: SHA-256 of names, shapes and values.

    Values are rounded to half precision, so a model, its half-precision export and either one loaded as float32 are the
    same base (bfloat16 rounds otherwise, and is another). Raises ValueError if folded. Source: none.
    """
    _check_unfolded(unet)
    digest = hashlib.sha256()
    for name, tensor in unet.state_dict().items():
        if _is_base(name):
            value = tensor.half() if tensor.is_floating_point() else tensor
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(value.flatten().cpu().view(torch.uint8).numpy())              # (bytes,)
    return digest.hexdigest()


def adapter_state(unet, name="adapter"):
    """What to save of one adapter: {"spec": how to make it, "base": base_hash, "adapter": its tensors}.

    Raises ValueError if there is none of this name, or one is folded. Source: none.
    """
    found = _placed(unet, name)
    spec = {**found[0][3].spec, "scale": found[0][3].scale}
    tensors = {f"{path}.{k}": v for path, *_, adapter in found for k, v in adapter.state_dict().items()}
    return {"format": 1, "spec": spec, "base": base_hash(unet), "adapter": tensors}


def load_adapters(unet, state, name="adapter"):
    """Add the adapter that adapter_state saved. A model that it does not fit is refused and left as it was.

    Raises ValueError with the tensors that differ, or for a base of the same shapes with other weights. Source: none.
    """
    missing = [k for k in ("spec", "base", "adapter") if k not in state]
    if missing:
        raise ValueError(f"this is not an adapter's checkpoint: it has no {' and no '.join(map(repr, missing))}")
    made, given = _make(unet, **state["spec"]), {k: tuple(v.shape) for k, v in state["adapter"].items()}
    want = {f"{path}.{k}": tuple(v.shape) for path, _, adapter in made for k, v in adapter.state_dict().items()}
    wrong = [f"{k}: file {given.get(k, 'has none')}, model {want.get(k, 'has none')}"
             for k in sorted(want.keys() | given.keys()) if want.get(k) != given.get(k)]
    if wrong:
        raise ValueError(f"the adapter does not fit this model, {len(wrong)} tensors differ: " + "; ".join(wrong[:5]))
    here = base_hash(unet)
    if here != state["base"]:
        raise ValueError(f"the adapter belongs to another base ({state['base'][:12]}, this one is {here[:12]}): load "
                         "the weights on which it was trained")
    for path, _, adapter in made:
        adapter.load_state_dict({k: state["adapter"][f"{path}.{k}"] for k in adapter.state_dict()})
    _attach(unet, made, name)


# ----------------------------------------------------------------------------------------------------------------------
# LoRA, to compare with

class LowRank(nn.Module):
    """W -> W + scale * up @ down for a weight W (d_out, d_in), rank << d. Source: LoRA (Hu et al. 2021) §4.1."""

    def __init__(self, weight, rank, scale):
        super().__init__()
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.up = nn.Parameter(weight.new_empty(weight.shape[0], rank))
        self.scale = scale
        self.initialize_weights()

    def initialize_weights(self):
        """down: uniform +-1/sqrt(fan_in); up: 0, so W is unchanged at first. Source: LoRA §4.1."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.zeros_(self.up)

    def forward(self, W):
        return W + self.scale * self.up @ self.down


def add_lora(unet, rank=None, budget=None, scale=1.0):
    """Low-rank updates of every to_k and to_v that reads the words -> the parameters to train; the rest is frozen.

    rank or budget as in add_adapters. Unlike an adapter it always folds into W: torch's remove_parametrizations(layer,
    "weight"), with leave_parametrized=False to drop it. Raises ValueError. Source: LoRA (Hu et al. 2021) §4.
    """
    attention = [m.attn2 for m in unet.modules() if isinstance(m, TransformerBlock)]
    layers = [layer for m in attention for layer in (m.to_k, m.to_v)]
    if (rank is None) == (budget is None):
        raise ValueError(f"rank {rank}, budget {budget}: give exactly one of them")
    one = sum(sum(layer.weight.shape) for layer in layers)
    rank = round(budget / one) if rank is None else rank
    if rank < 1:
        raise ValueError(f"a budget of {budget:,} parameters is too small: rank 1 has {one:,}")
    unet.requires_grad_(False)
    updates = [LowRank(layer.weight, rank, scale) for layer in layers]
    for layer, update in zip(layers, updates):
        parametrize.register_parametrization(layer, "weight", update)
    return [p for update in updates for p in update.parameters()]


# ----------------------------------------------------------------------------------------------------------------------
# what the paper measures

@torch.no_grad()
def prediction_difference(unet, xt, t, context_a, context_b):
    """Where two prompts make the model predict differently: root mean square over channels, (B, H, W).

    xt (B, C, H, W) a noised picture, t (B,), contexts (B, L, D_ctx). For "a photo of V* dog" and "a photo of dog" the
    paper sees a large difference where the adapter has learned to tell them apart. Source: Xiang et al. 2023 (probe).
    """
    difference = unet(xt, t, context_a) - unet(xt, t, context_b)                        # (B, C, H, W)
    return difference.float().square().mean(dim=1).sqrt()                               # (B, H, W)


def incomplete_beta(x, a, b):
    """Regularised incomplete beta function I_x(a, b), 0 <= x <= 1, a and b > 0: the Beta(a, b) chance to be below x.

    I = x^a (1-x)^b / (a B(a,b)) / (1 + d1/(1 + d2/(1 + ...))), the fraction by Lentz's method: the ratios C and D of
    successive numerators and denominators. Source: DLMF 8.17.22; Lentz 1976.
    """
    if x in (0, 1):
        return float(x)
    if x > (a + 1) / (a + b + 2):                   # there the fraction converges slowly; I_x(a, b) = 1 - I_1-x(b, a)
        return 1 - incomplete_beta(1 - x, b, a)
    C, D, fraction, n = 1.0, 0.0, 1.0, 0
    while n == 0 or abs(C * D - 1) > 1e-14:
        n += 1
        m = n // 2
        d = -(a + m) * (a + b + m) if n % 2 else m * (b - m)
        d *= x / ((a + n - 1) * (a + n))
        C, D = 1 + d / C, 1 / (1 + d * D)
        fraction *= C * D
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_front) / (a * fraction)


def anova(groups):
    """One-way analysis of variance -> (F, p): do groups differ by more than the scatter inside them explains?

    groups: one sequence of numbers per level of a factor, of any sizes. F = MSB / MSE, with
    MSB = sum n_i (mean_i - mean)^2 / (k - 1),  MSE = sum (y_ij - mean_i)^2 / (n - k);  p = P(F or more by chance).
    Raises ValueError where F is not defined. Source: Fisher 1925; used by Xiang et al. 2023, one factor at a time.
    """
    groups = [[float(y) for y in group] for group in groups]
    values, k = [y for group in groups for y in group], len(groups)
    n = len(values)
    if k < 2 or not all(groups):
        raise ValueError(f"ANOVA compares at least two groups, none empty: got sizes {[*map(len, groups)]}")
    if n <= k:
        raise ValueError(f"{n} values in {k} groups leave no scatter inside the groups: give some group two or more")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{sum(not math.isfinite(y) for y in values)} of {n} values are not finite: drop failed runs")
    if all(min(group) == max(group) for group in groups):
        raise ValueError("all values inside every group are the same, F would divide by zero: is the metric constant?")
    mean, means = math.fsum(values) / n, [math.fsum(group) / len(group) for group in groups]
    MSB = math.fsum(len(group) * (m - mean) ** 2 for group, m in zip(groups, means)) / (k - 1)
    MSE = math.fsum((y - m) ** 2 for group, m in zip(groups, means) for y in group) / (n - k)
    F_ratio = MSB / MSE
    return F_ratio, incomplete_beta((n - k) / (n - k + (k - 1) * F_ratio), (n - k) / 2, (k - 1) / 2)
