"""U-DiT: a transformer in the shape of a U-Net, whose attention runs on downsampled tokens.

Paper: U-DiTs: Downsample Tokens in U-Shaped Diffusion Transformers (Tian et al. 2024, 2405.02730).

The idea.  A U-Net processes the picture at several sizes, DiT (dit.py) at one. On a U-Net's main
path features are mostly low frequencies, so a transformer in this shape does not have to compare
every token with every other. Token-downsampling attention:
  filter   a depth-wise convolution, added to its input, mixes each token with its neighbours
  split    the map is cut into 2x2 = 4 smaller maps: (even row, even column), (even, odd), ...
  attend   within each of the four, with the same weights: a quarter of the pairs
  merge    every token goes back to its place; no token is lost
Four changes are added: cosine attention, rotary positions in 2-D, a depth-wise convolution in the
MLP, and extra branches in it while training; for inference they are added into one, at no cost.
Captions, which the paper does not have, are read as in dit.py: a cross-attention in every block.

    python train.py --model udit-tiny                     # on 8x8 latents, minutes on a laptop
    python train.py --model U-DiT-S --data latents:FILE   # the paper's smallest, on one GPU

Differences from the official code (YuchuanTian/U-DiT; state_dict names, order, numbers are equal):
1. A dropped label is dropped in all three label tables, by the caller. The official code draws for
   each: all are dropped, as guidance needs, in 1 of 1,000 samples. Guidance acts on all channels.
2. RepMlp trains on its summed weights (all its branches are linear): same function and gradients.
3. `fold` returns a new model. The official one folds in .eval() and changes the trained kernels."""
import copy
import math
import re
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

from dit import Attention as DiTAttention, DiT, LabelEmbedder, TimestepEmbedder, joined, modulate

MAX_LOGIT_SCALE = 4.6052        # ln 100: cosine logits stay within +-100. Source: Swin V2 §3.2


def split_phases(x, f):
    """Map (B, H, W, D) -> f*f smaller maps as tokens, (B, f*f, N, D) with N = H/f * W/f.
    Group f*i + j holds rows i, i + f, i + 2f, ... and columns j, j + f, ... Source: U-DiT §3.2."""
    B, H, W, D = x.shape
    x = x.reshape(B, H // f, f, W // f, f, D).permute(0, 2, 4, 1, 3, 5)     # (B, f, f, H/f, W/f, D)
    return x.reshape(B, f * f, -1, D)                                       # (B, f*f, N, D)


def merge_phases(x, f, side):
    """The inverse for a square map: (B, f*f, N, D) -> (B, side, side, D). Source: U-DiT §3.2."""
    B, D, small = len(x), x.shape[-1], side // f
    x = x.reshape(B, f, f, small, small, D).permute(0, 3, 1, 4, 2, 5)       # (B, H/f, f, W/f, f, D)
    return x.reshape(B, side, side, D)


class Downsampler(nn.Module):
    """Filter, then split: (B, H, W, D) -> (B, f*f, N, D). Source: U-DiT §3.2, Table 7."""

    def __init__(self, dim, down_factor, kernel_size, shortcut):
        super().__init__()
        self.down_factor, self.shortcut = down_factor, shortcut
        self.layer = MapConv2d(dim, dim, kernel_size, groups=dim) if kernel_size else None

    def kernel(self):
        """The filter (D, 1, k, k); x + conv(x) has 1 more at its centre. Source: U-DiT §3.2."""
        w = self.layer.weight
        identity = F.pad(w.new_ones(len(w), 1, 1, 1), (w.shape[-1] // 2,) * 4)      # (D, 1, k, k)
        return w + identity if self.shortcut else w

    def forward(self, x):
        x = x if self.layer is None else convolve(x, self.kernel(), self.layer.bias)
        return split_phases(x, self.down_factor)                            # (B, f*f, N, D)


class Attention(nn.Module):
    """Self-attention on downsampled tokens, (B, side, side, D) -> the same.
    downsample "tokens": tokens attend within each of the f*f groups; "kv": every unfiltered token
    asks, keys and values are group 0 of the filtered map. Source: U-DiT §3.2, Tables 1 and 9."""

    def __init__(self, dim, side, num_heads, down_factor=2, downsample="tokens", cosine=True,
                 rope=True, kernel_size=5, shortcut=True):
        super().__init__()
        if dim % num_heads or (rope and dim // num_heads % 4):
            raise ValueError(f"width {dim} / num_heads {num_heads} must be whole, and for rope a "
                             "multiple of 4: change one of them")
        if downsample not in ("tokens", "kv") or (kernel_size and kernel_size % 2 == 0):
            raise ValueError(f"downsample {downsample!r}, kernel_size {kernel_size}: choose tokens "
                             "or kv, and an odd number, or 0 for no filter")
        self.num_heads, self.kv_only = num_heads, downsample == "kv"
        self.query_factor = 1 if self.kv_only else down_factor
        self.logit_scale = nn.Parameter(torch.zeros(num_heads, 1, 1)) if cosine else None
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = MapConv2d(dim, dim, 1)
        self.downsampler = Downsampler(dim, down_factor, kernel_size, shortcut)
        # positions are counted within a group; for "kv", group 0 is at 0, f, 2f, ... of the map
        positions = torch.arange(side // self.query_factor)
        for name, step in (("query_table", 1), ("key_table", down_factor // self.query_factor)):
            table = rope_table(positions[::step], dim // num_heads) if rope else None
            self.register_buffer(name, table, persistent=False)

    def queries_keys_values(self, x):
        """x (B, H, W, D) -> q, k, v, each (B * groups, h, N, d). Source: U-DiT §3.2, §3.4."""
        groups = self.downsampler(x)                                        # (B, f*f, N, D)
        asked, read = (split_phases(x, 1), groups[:, :1]) if self.kv_only else (groups, groups)
        # three products, not one: splitting the result of one would cost more than it saves
        q, k, v = (F.linear(u.flatten(0, 1), w, b).unflatten(-1, (self.num_heads, -1))
                   for u, w, b in zip((asked, read, read), self.to_qkv.weight.chunk(3),
                                      self.to_qkv.bias.chunk(3)))           # 3x (B*groups, N, h, d)
        wide = torch.promote_types(v.dtype, torch.float32)                  # not in half precision
        if self.logit_scale is not None:
            # logits are scale * cos(q, k): q gets the length `scale` (h, 1), k gets 1
            scale = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()[..., 0]
            q, k = unit(q.to(wide), scale), unit(k.to(wide))
        if self.query_table is not None:
            q, k = rotate(q.to(wide), self.query_table), rotate(k.to(wide), self.key_table)
        return [u.to(v.dtype).transpose(1, 2) for u in (q, k, v)]           # 3x (B*groups, h, N, d)

    def forward(self, x):
        q, k, v = self.queries_keys_values(x)
        scale = None if self.logit_scale is None else 1.0                   # None: 1 / sqrt(d)
        tokens = F.scaled_dot_product_attention(q, k, v, scale=scale)       # (B*groups, h, N, d)
        tokens = tokens.transpose(1, 2).flatten(2).unflatten(0, (len(x), -1))   # (B, groups, N, D)
        return self.to_out(merge_phases(tokens, self.query_factor, x.shape[1]))     # (B, H, W, D)


def unit(x, length=1.0):
    """x with its last axis scaled to a length (faster than F.normalize). Source: Swin V2 §3.2."""
    return x * (length * (x.square().sum(-1, keepdim=True) + 1e-24).rsqrt())


def rope_table(positions, head_dim, base=10000.0):
    """(cos, sin) of the rotary angles of a square of tokens, row by row: (N, 1, head_dim/2, 2).
    positions (sqrt(N),): of the rows, and of the columns. A token's angles are column * w0,
    row * w0, column * w1, row * w1, ..., with w_i = base^(-4i / head_dim). Source: U-DiT §3.4."""
    w = base ** (-torch.arange(0, head_dim, 4, dtype=torch.float64) / head_dim)            # (d/4,)
    column_row = torch.cartesian_prod(positions, positions).flip(1)                         # (N, 2)
    angles = (w[:, None] * column_row[:, None]).flatten(1)[:, None]                    # (N, 1, d/2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()                # (N, 1, d/2, 2)


def rotate(x, table):
    """Rotate channels 2m and 2m + 1 of x (B, N, h, d) by its token's angle m -> the same shape.
    The pair is a complex number, times cos + i sin. Source: Su et al. 2021 (2104.09864) Eq. 12."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))                         # (B, N, h, d/2)
    return torch.view_as_real(pairs * torch.view_as_complex(table.to(x.dtype))).flatten(-2)


def basic_mlp(dim, hidden):
    """Two layers per token, (B, H, W, D) -> the same. Source: DiT §3.2."""
    return nn.Sequential(OrderedDict(fc1=MapConv2d(dim, hidden, 1), gelu=nn.GELU("tanh"),
                                     fc2=MapConv2d(hidden, dim, 1)))


def depthwise_mlp(dim, hidden):
    """An MLP with a 5x5 depth-wise convolution in the middle. Source: U-DiT §3.4, Table 9."""
    return nn.Sequential(OrderedDict(
        project_in=MapConv2d(dim, hidden, 1), gelu=nn.GELU(),
        dwconv=MapConv2d(hidden, hidden, 5, groups=hidden), project_out=MapConv2d(hidden, dim, 1)))


class RepMlp(nn.Module):
    """depthwise_mlp, but each 1x1 layer is two, and its kernel is 5x5 + 3x3 + 1x1 + the identity.
    Source: U-DiT §3.4; RepVGG, Ding et al. 2021 (2101.03697), Fig. 4."""

    def __init__(self, dim, hidden):
        super().__init__()
        half = hidden // 2
        self.project_in = nn.Sequential(MapConv2d(dim, half, 1), MapConv2d(half, hidden, 1))
        self.dwconv = nn.ModuleList(MapConv2d(hidden, hidden, k, groups=hidden) for k in (5, 3, 1))
        self.project_out = nn.Sequential(MapConv2d(hidden, half, 1), MapConv2d(half, dim, 1))

    def summed(self):
        """{layer: (weight, bias)} of the equal depthwise_mlp, differentiable.
        W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2). Kernels are added centre on centre."""
        layers = {}
        for name in ("project_in", "project_out"):
            (w1, b1), (w2, b2) = ((u.weight.flatten(1), u.bias) for u in getattr(self, name))
            layers[name] = (w2 @ w1)[:, :, None, None], w2 @ b1 + b2        # (D_out, D_in, 1, 1)
        k5, k3, k1 = (conv.weight for conv in self.dwconv)
        kernel = k5 + F.pad(k3, (1,) * 4) + F.pad(k1 + 1, (2,) * 4)         # (r*D, 1, 5, 5)
        return layers | {"dwconv": (kernel, sum(conv.bias for conv in self.dwconv))}

    def forward(self, x):
        layers = self.summed()
        x = F.gelu(convolve(x, *layers["project_in"]))                      # (B, H, W, r*D)
        return convolve(convolve(x, *layers["dwconv"]), *layers["project_out"])


MLPS = {"basic": basic_mlp, "dw": depthwise_mlp, "rep": RepMlp}       # rep: re-parameterised


class UDiTBlock(nn.Module):
    """Attention, MLP, attention, MLP, each with shift, scale and gate from c (B, D): -> like x.
    hidden: width inside the MLP; mlp: a name of MLPS; cross: before all that, x reads the tokens
    (B, L, D) of a caption. Source: DiT Fig. 3 (adaLN-Zero), twice; PixArt-alpha Fig. 4 (cross)."""

    def __init__(self, D, hidden, mlp, cross=False, **attention):
        super().__init__()
        for i in (1, 2):
            self.add_module(f"attn{i}", Attention(D, **attention))
            self.add_module(f"mlp{i}", MLPS[mlp](D, hidden))
            self.add_module(f"adaLN_modulation{i}", nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D)))
        self.cross_attn = DiTAttention(D, attention["num_heads"], cross=True) if cross else None

    def forward(self, x, c, tokens=None):
        if self.cross_attn:
            x = x + self.cross_attn(norm(x).flatten(1, 2), tokens).view_as(x)
        for attn, mlp, modulation in ((self.attn1, self.mlp1, self.adaLN_modulation1),
                                      (self.attn2, self.mlp2, self.adaLN_modulation2)):
            parts = modulation(c)[:, None].chunk(6, dim=-1)                 # 6x (B, 1, D)
            for layer, (shift, scale, gate) in ((attn, parts[:3]), (mlp, parts[3:])):
                x = x + gate[:, None] * layer(modulate(norm(x), shift, scale))
        return x


class Level(nn.ModuleList):
    """Blocks in a row: x (B, H, W, D), c, tokens: see UDiTBlock -> like x. Source: U-DiT Fig. 2."""

    def forward(self, x, c, tokens=None):
        for block in self:
            x = block(x, c, tokens)
        return x


class Resample(nn.Module):
    """Map (B, H, W, D) -> (B, H/2, W/2, 2D), or up: (B, 2H, 2W, D/2). Source: U-DiT Fig. 2."""

    def __init__(self, dim, up=False):
        super().__init__()
        conv = nn.Conv2d(dim, 2 * dim if up else dim // 2, 3, padding=1, bias=False)
        self.body = nn.Sequential(conv, nn.PixelShuffle(2) if up else nn.PixelUnshuffle(2))

    def forward(self, x):
        return self.body(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class UDiT(nn.Module):
    """U-shaped diffusion transformer; the defaults are U-DiT-S.
    input_size: side S of x, a multiple of 4 * down_factor; hidden_size: width D of the first level;
    depth: blocks in encoders 1, 2, latent, decoders 2, 1, of side S, S/2, S/4, S/2, S and width D,
    2D, 4D, 2D, 2D; num_heads: at every level; others: as in DiT. Ablations: down_factor: f of the
    attention, 1 = full; downsample: "tokens", or "kv" = keys and values only; cosine: else dot
    products; rope: rotary positions; mlp: of MLPS; kernel_size: of the filter, odd, or 0 = none;
    shortcut: add its input to its output. Vanilla U-DiT is cosine=False, rope=False, mlp="basic";
    DiT-UNet is that with down_factor=1, kernel_size=0. Source: U-DiT §3, Fig. 2, Tables 1, 7, 9."""
    # Muon's share: the matrices between first convolution and final layer, no depth-wise kernels
    matrices = r"(?!.*(downsampler|dwconv|logit_scale))(enc|down|latent|up|reduce|dec|output)"

    def __init__(self, input_size=32, in_channels=4, hidden_size=96, depth=(2, 5, 8, 5, 2),
                 num_heads=4, mlp_ratio=2, num_classes=1000, class_dropout_prob=0.1,
                 learn_sigma=True, down_factor=2, downsample="tokens", cosine=True, rope=True,
                 mlp="rep", kernel_size=5, shortcut=True, context_dim=0):
        super().__init__()
        if down_factor < 1 or input_size % (4 * down_factor):
            raise ValueError(f"input size {input_size} is not divisible by {4 * down_factor} = 4 "
                             f"(two halvings) * down_factor {down_factor}: change one of them")
        if len(depth) != 5 or mlp not in MLPS:
            raise ValueError(f"depth {tuple(depth)}, mlp {mlp!r}: five numbers; basic, dw or rep")
        self.input_size, self.in_channels = input_size, in_channels
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.can_guide = num_classes > 0 and class_dropout_prob > 0         # there is a null class
        D, S, cross = hidden_size, input_size, context_dim > 0
        attention = dict(num_heads=num_heads, down_factor=down_factor, downsample=downsample,
                         cosine=cosine, rope=rope, kernel_size=kernel_size, shortcut=shortcut)
        level = lambda count, dim, side: Level(UDiTBlock(
            dim, int(mlp_ratio * dim), mlp, cross, side=side, **attention) for _ in range(count))
        self.x_embedder = nn.ModuleDict({"proj": MapConv2d(in_channels, D, 3)})
        for i, dim in ((1, D), (2, 2 * D), (3, 4 * D)):
            self.add_module(f"t_embedder_{i}", TimestepEmbedder(dim))
            self.add_module(f"y_embedder_{i}", nn.Linear(context_dim, dim) if context_dim else
                            LabelEmbedder(num_classes, dim, class_dropout_prob))
        self.encoder_level_1 = level(depth[0], D, S)
        self.down1_2 = Resample(D)
        self.encoder_level_2 = level(depth[1], 2 * D, S // 2)
        self.down2_3 = Resample(2 * D)
        self.latent = level(depth[2], 4 * D, S // 4)
        self.up3_2 = Resample(4 * D, up=True)
        self.reduce_chan_level2 = MapConv2d(4 * D, 2 * D, 1)
        self.decoder_level_2 = level(depth[3], 2 * D, S // 2)
        self.up2_1 = Resample(2 * D, up=True)
        self.reduce_chan_level1 = MapConv2d(2 * D, 2 * D, 1)    # reduces nothing, as published, so
        self.decoder_level_1 = level(depth[4], 2 * D, S)        # decoder 1 is as wide as decoder 2
        self.output = MapConv2d(2 * D, 2 * D, 3)
        self.final_layer = nn.ModuleDict({
            "out_proj": MapConv2d(2 * D, (1 + learn_sigma) * in_channels, 3),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(2 * D, 4 * D))})
        self.initialize_weights()

    def initialize_weights(self):
        """Every initial value of the model, in one place. Source: U-DiT §4.1 (as in DiT).
        | what                  | how                  | why                                    |
        | Linear and Conv2d     | Xavier, bias 0; the  | depth-wise kernels are then tiny: the  |
        |                       | first as a matrix    | downsampler starts as its shortcut     |
        | dwconv of mlp="dw"    | 1 more in the centre | RepMlp has it; else the output is tiny |
        | label tables, t MLPs  | normal(0, 0.02)      | small conditions at first              |
        | shift, scale and gate | 0                    | gates 0: every block is the identity   |
        | last convolution      | 0                    | the first prediction is 0              |
        | cross_attn.proj       | 0                    | the block begins as the identity       |
        | logit_scale           | ln 10                | logits are between -10 and 10          |"""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                w = module.weight
                nn.init.xavier_uniform_(w.flatten(1) if name == "x_embedder.proj" else w)
        for name, parameter in self.named_parameters():
            if "embedding_table" in name or ("t_embedder" in name and name.endswith("weight")):
                nn.init.normal_(parameter, std=0.02)
            elif re.search(r"adaLN_modulation|out_proj|cross_attn\.proj|bias$", name):
                nn.init.zeros_(parameter)
            elif "logit_scale" in name:
                nn.init.constant_(parameter, math.log(10))
            elif name.endswith("dwconv.weight"):        # RepMlp's are dwconv.0.weight and so on
                parameter.data[:, :, 2, 2] += 1

    drop_labels, null_condition = DiT.drop_labels, DiT.null_condition       # exactly as in DiT

    def forward(self, x, t, y):
        """x (B, C, H, W), and t, y as in DiT.forward -> (B, C_out, H, W)."""
        if x.shape[2:] != (self.input_size, self.input_size):
            raise ValueError(f"x {tuple(x.shape)} must have sides of input_size {self.input_size}")
        # c: (B, D), (B, 2D), (B, 4D); and the same as tokens, which blocks read if y is text
        c1, tokens1 = joined(self.t_embedder_1(t), self.y_embedder_1(y))
        c2, tokens2 = joined(self.t_embedder_2(t), self.y_embedder_2(y))
        c3, tokens3 = joined(self.t_embedder_3(t), self.y_embedder_3(y))
        x = self.x_embedder["proj"](x.permute(0, 2, 3, 1))                  # (B, H, W, D)
        x = skip1 = self.encoder_level_1(x, c1, tokens1)
        x = skip2 = self.encoder_level_2(self.down1_2(x), c2, tokens2)      # (B, H/2, W/2, 2D)
        x = self.latent(self.down2_3(x), c3, tokens3)                       # (B, H/4, W/4, 4D)
        x = torch.cat([self.up3_2(x), skip2], dim=-1)                       # (B, H/2, W/2, 4D)
        x = self.decoder_level_2(self.reduce_chan_level2(x), c2, tokens2)   # (B, H/2, W/2, 2D)
        x = torch.cat([self.up2_1(x), skip1], dim=-1)                       # (B, H, W, 2D)
        x = self.decoder_level_1(self.reduce_chan_level1(x), c2, tokens2)   # width 2D, hence c2
        shift, scale = self.final_layer["adaLN_modulation"](c2)[:, None].chunk(2, dim=-1)
        x = modulate(norm(self.output(x)), shift, scale)                    # (B, H, W, 2D)
        return self.final_layer["out_proj"](x).permute(0, 3, 1, 2)          # (B, C_out, H, W)


def fold(model):
    """A copy of a UDiT with the equal depthwise_mlp for every RepMlp. Source: RepVGG §3.3."""
    folded = copy.deepcopy(model)
    for name, mlp in list(folded.named_modules()):
        if isinstance(mlp, RepMlp):
            with torch.device("meta"):              # no memory, and no random numbers drawn
                plain = depthwise_mlp(mlp.project_in[0].in_channels, mlp.dwconv[0].in_channels)
            state = {f"{layer}.{kind}": tensor.detach() for layer, pair in mlp.summed().items()
                     for kind, tensor in zip(("weight", "bias"), pair)}
            plain.load_state_dict(state, assign=True)
            folded.set_submodule(name, plain.train(mlp.training))
    return folded


UDIT_CONFIGS = {    # the paper's three, two for a laptop; millions of parameters, and when folded
    "U-DiT-S": dict(hidden_size=96, num_heads=4),       # 59, 52
    "U-DiT-B": dict(hidden_size=192, num_heads=8),      # 231, 204
    "U-DiT-L": dict(hidden_size=384, num_heads=16),     # 916, 810
    "udit-tiny": dict(hidden_size=32, num_heads=2, depth=(1, 1, 1, 1, 1)),      # 1.6, 1.4
    "udit-small": dict(hidden_size=48, num_heads=2, depth=(1, 2, 2, 2, 1))}     # 5.3, 4.7


def norm(x):
    """LayerNorm over the last axis, without weights. Source: DiT §3.2 (adaLN)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class MapConv2d(nn.Conv2d):
    """nn.Conv2d for maps, (B, H, W, D) -> (B, H, W, D_out), always padded by k // 2; k is odd."""

    def forward(self, x):
        return convolve(x, self.weight, self.bias)


def convolve(x, weight, bias):
    """MapConv2d as a function of x (B, H, W, D) and weight (D_out, D, k, k) or (D, 1, k, k)."""
    groups, k = x.shape[-1] // weight.shape[1], weight.shape[-1]
    if groups == k == 1:
        return F.linear(x, weight.flatten(1), bias)                         # (B, H, W, D_out)
    x, apart = x.permute(0, 3, 1, 2), groups > 1 and x.device.type == "cpu"     # (B, D, H, W)
    x = F.conv2d(x, weight, None if apart else bias, padding=k // 2, groups=groups)
    x = x.permute(0, 2, 3, 1).contiguous()                                  # (B, H, W, D_out)
    return x + bias if apart else x     # a CPU is slow at the bias's gradient inside conv2d
