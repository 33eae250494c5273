"""U-DiT: a transformer in the shape of a U, whose attention runs on downsampled tokens.

Paper: U-DiTs: Downsample Tokens in U-Shaped Diffusion Transformers (Tian et al. 2024, arXiv 2405.02730).

The idea.  A U-Net looks at the picture at several sizes, DiT (dit.py) at one. Put transformer blocks into a U-Net, and
little is gained (the paper's DiT-UNet). But the features on a U-Net's main path are mostly low frequencies, so its
attention need not compare every token with every other. Token-downsampling attention:
  filter   a depth-wise convolution, added to its input, mixes each token with its neighbours
  split    the map is cut into 2x2 = 4 smaller maps: the tokens on even rows and even columns, even and odd, ...
  attend   within each of the four, with the same weights: a quarter of the pairs
  merge    every token goes back to its place; nothing was thrown away
Four tricks come on top: cosine attention (queries and keys of length 1, a learned temperature), rotary positions in
2-D, a depth-wise convolution in the MLP, and its re-parameterisation: more weights in training, none of them at rest.

Contents: layers on maps, attention, the three MLPs, block, UDiT, fold, UDIT_CONFIGS, infer_config; spectra of features.
A model is model(x (B,C,H,W), t (B,), y (B,)) -> (B, C or 2C, H, W); inside it maps are channels last, (B, H, W, D).

    python train.py --model udit-tiny                     # on 8x8 latents, minutes on a laptop
    python train.py --model U-DiT-S --data latents:FILE   # the paper's smallest, on one GPU

Differences from the official code (YuchuanTian/U-DiT; state_dict names, order and numbers are the same):
1. One label-drop mask per sample for all three label tables, drawn by the caller as in dit.py. Three masks, as
   published, hide a label completely once in a thousand samples, and guidance builds on exactly that case.
2. Guidance is diffusion.guided and acts on all channels.
3. RepMlp trains on its summed kernel: branches and chained layers are linear, so their weights are added and
   multiplied, then applied once. The function and the gradients are the same.
4. `fold` returns a new model. The published one folds inside .eval(), into the 5x5 kernels themselves: the state_dict
   has changed then, and going back to .train() computes something else.
5. Rotary tables are made with the model, real, and move with it.
6. What the paper only compares with, arguments can build: full attention, key-value downsampling, every trick alone.
"""
import copy
import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

from dit import DiT, LabelEmbedder, TimestepEmbedder, modulate

MAX_LOGIT_SCALE = 4.6052        # ln 100: logits of cosine attention stay within +-100; Source: Swin V2 §3.2


# ----------------------------------------------------------------------------------------------------------------------
# layers on maps (B, H, W, D)

def channels_last(layer, x):
    """Apply a layer made for (B, D, H, W) to x (B, H, W, D) -> (B, H', W', D'). The permutations are views.

    Source: measured; a CPU convolves depth-wise two to four times as fast in this layout.
    """
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()                # (B, H', W', D')


def pointwise(x, weight, bias):
    """A 1x1 convolution, weight (D_out, D, 1, 1), as the matrix product it is: (B, H, W, D) -> (B, H, W, D_out).

    Source: U-DiT's released code (names and shapes).
    """
    return F.linear(x, weight.flatten(1), bias)                                         # (B, H, W, D_out)


def depthwise(x, weight, bias):
    """One kernel per channel, weight (D, 1, k, k), k odd, zeros around the map: (B, H, W, D) -> the same.

    Source: U-DiT §3.2.
    """
    if x.device.type == "cpu":
        return channels_last(lambda x: DepthwiseOnCPU.apply(x, weight), x) + bias
    return channels_last(lambda x: F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)), x)


class DepthwiseOnCPU(torch.autograd.Function):
    """The same convolution, no bias, of x (B, D, H, W), with a weight gradient two to three times as fast.

    oneDNN has a depth-wise routine for it up to three columns; for wider kernels it takes a dense one, sixteen times
    the work, and also for the bias. So three columns at a time. Source: ONEDNN_VERBOSE=1.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        """Gradient of the result -> gradients of x and weight. Source: the correlation of x with it, column by column.
        """
        x, weight = ctx.saved_tensors
        D, k, W = len(weight), weight.shape[-1], x.shape[-1]
        grad_x = F.conv2d(grad, weight.flip(2, 3), padding=k // 2, groups=D)            # (B, D, H, W)
        wide, columns = F.pad(x, (k // 2, k // 2)), [(j, min(3, k - j)) for j in range(0, k, 3)]
        parts = [torch.nn.grad.conv2d_weight(wide[..., j:j + W + n - 1], (D, 1, k, n), grad, padding=(k // 2, 0),
                                             groups=D) for j, n in columns]             # each (D, 1, k, n)
        return grad_x, torch.cat(parts, dim=-1)


def norm(x):
    """LayerNorm over the last axis without weights of its own. Source: DiT §3.2 (adaLN)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# attention

def split_phases(x, f):
    """Map (B, H, W, D) -> f*f smaller maps as tokens, (B, f*f, N, D) with N = H/f * W/f.

    Group f*i + j has rows i, i + f, i + 2f, ... and columns j, j + f, ... Source: U-DiT §3.2.
    """
    B, H, W, D = x.shape
    x = x.view(B, H // f, f, W // f, f, D).permute(0, 2, 4, 1, 3, 5)                    # (B, f, f, H/f, W/f, D)
    return x.reshape(B, f * f, -1, D)                                                   # (B, f*f, N, D)


def merge_phases(x, f, side):
    """The inverse for a square map: (B, f*f, N, D) -> (B, side, side, D). Source: U-DiT §3.2."""
    B, _, _, D = x.shape
    x = x.view(B, f, f, side // f, side // f, D).permute(0, 3, 1, 4, 2, 5)              # (B, H/f, f, W/f, f, D)
    return x.reshape(B, side, side, D)


def rope_table(positions, head_dim):
    """(cos, sin) of the rotary angles of the tokens at positions x positions, row by row: (N, 1, head_dim/2, 2).

    The angles are column * w0, row * w0, column * w1, row * w1, ..., with w_i = 10000^(-4i / head_dim).
    Source: U-DiT §3.4 (RoPE2D); Su et al. 2021 (arXiv 2104.09864).
    """
    w = 10000.0 ** (-torch.arange(0, head_dim, 4, dtype=torch.float64) / head_dim)      # (d/4,)
    places = torch.cartesian_prod(positions, positions).flip(1)                         # (N, 2): column, row
    angles = (w[:, None] * places[:, None]).flatten(1)[:, None]                         # (N, 1, d/2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()                    # (N, 1, d/2, 2)


def rotate(x, table):
    """Turn each pair of channels (2m, 2m + 1) of x (B, N, h, d) float32 by its token's angle m -> the same shape.

    A pair is a complex number here, and the turn a product: one pass over memory. Source: Su et al. 2021 eq. 12.
    """
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))                             # (B, N, h, d/2)
    return torch.view_as_real(pairs * torch.view_as_complex(table.float())).flatten(-2)


def unit(x, length=1.0):
    """x with its last axis scaled to a length: F.normalize at half the cost of its gradient. Source: Swin V2 §3.2."""
    return x * (length * (x.square().sum(-1, keepdim=True) + 1e-24).rsqrt())


class Downsampler(nn.Module):
    """Filter, then split: (B, H, W, D) -> (B, f*f, N, D). kernel_size 0: split only. Source: U-DiT §3.2, table 7."""

    def __init__(self, dim, down_factor, kernel_size, shortcut):
        super().__init__()
        self.down_factor, self.shortcut = down_factor, shortcut
        self.layer = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim) if kernel_size else None

    def kernel(self):
        """The filter as one kernel (D, 1, k, k): x + conv(x) is a convolution with 1 more at its centre.

        Source: U-DiT §3.2.
        """
        w = self.layer.weight
        return w + F.pad(w.new_ones(len(w), 1, 1, 1), (w.shape[-1] // 2,) * 4) if self.shortcut else w

    def forward(self, x):
        x = x if self.layer is None else depthwise(x, self.kernel(), self.layer.bias)
        return split_phases(x, self.down_factor)                                        # (B, f*f, N, D)


class Attention(nn.Module):
    """Self-attention on downsampled tokens, (B, side, side, D) -> the same.

    downsample "tokens": inside each of the f*f groups; "kv": all tokens ask, but only the first group answers.
    Source: U-DiT §3.2, tables 1 and 9.
    """

    def __init__(self, dim, side, num_heads, down_factor, downsample, cosine, rope, kernel_size, shortcut):
        super().__init__()
        self.num_heads, self.kv_only = num_heads, downsample == "kv"
        self.query_factor = 1 if self.kv_only else down_factor
        self.logit_scale = nn.Parameter(torch.zeros(num_heads, 1, 1)) if cosine else None
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Conv2d(dim, dim, 1)
        self.downsampler = Downsampler(dim, down_factor, kernel_size, shortcut)
        places = torch.arange(side // self.query_factor)
        for name, at in (("query_table", places), ("key_table", places[::down_factor] if self.kv_only else places)):
            self.register_buffer(name, rope_table(at, dim // num_heads) if rope else None, persistent=False)

    def queries_keys_values(self, x):
        """x (B, H, W, D) -> q, k, v, each (B * groups, h, N, d); lengths and angles are set in float32.

        Source: U-DiT §3.2, §3.4.
        """
        groups = self.downsampler(x)                                                    # (B, f*f, N, D)
        read = (split_phases(x, 1), groups[:, :1], groups[:, :1]) if self.kv_only else (groups,) * 3
        # three products, not one: that would cost more to take apart, and its gradients to put together
        q, k, v = (F.linear(u.flatten(0, 1), w, b).unflatten(-1, (self.num_heads, -1))
                   for u, w, b in zip(read, self.to_qkv.weight.chunk(3), self.to_qkv.bias.chunk(3)))
        if self.logit_scale is not None:
            q = unit(q.float(), self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()[..., 0])
            k = unit(k.float())
        if self.query_table is not None:
            q, k = rotate(q.float(), self.query_table), rotate(k.float(), self.key_table)
        return (u.to(v.dtype).transpose(1, 2) for u in (q, k, v))                       # 3x (B*groups, h, N, d)

    def forward(self, x):
        q, k, v = self.queries_keys_values(x)
        scale = None if self.logit_scale is None else 1.0                               # None: 1 / sqrt(d)
        o = F.scaled_dot_product_attention(q, k, v, scale=scale)                        # (B*groups, h, N, d)
        o = o.transpose(1, 2).reshape(len(x), -1, o.shape[2], x.shape[-1])              # (B, groups, N, D)
        o = merge_phases(o, self.query_factor, x.shape[1])                              # (B, H, W, D)
        return pointwise(o, self.to_out.weight, self.to_out.bias)


# ----------------------------------------------------------------------------------------------------------------------
# the three MLPs

class BasicMlp(nn.Module):
    """Two layers per token, (B, H, W, D) -> the same, as in DiT. Source: DiT §3.2."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x):
        x = F.gelu(pointwise(x, self.fc1.weight, self.fc1.bias), approximate="tanh")    # (B, H, W, r*D)
        return pointwise(x, self.fc2.weight, self.fc2.bias)                             # (B, H, W, D)


def depthwise_mlp(x, w):
    """Layer, GELU, depth-wise convolution, layer, from named weights: (B, H, W, D) -> the same. Source: U-DiT §3.4."""
    x = F.gelu(pointwise(x, w["project_in.weight"], w["project_in.bias"]))              # (B, H, W, r*D)
    x = depthwise(x, w["dwconv.weight"], w["dwconv.bias"])
    return pointwise(x, w["project_out.weight"], w["project_out.bias"])                 # (B, H, W, D)


class DepthwiseMlp(nn.Module):
    """The MLP with a 5x5 depth-wise convolution in its middle. Source: U-DiT §3.4, table 9 (DWconv FFN)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.project_in = nn.Conv2d(dim, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden)
        self.project_out = nn.Conv2d(hidden, dim, 1)

    def forward(self, x):
        return depthwise_mlp(x, dict(self.named_parameters()))


class RepMlp(nn.Module):
    """A DepthwiseMlp grown from more weights: two layers for each one, kernels of 5x5 + 3x3 + 1x1 and the identity.

    Source: U-DiT §3.4 (re-parameterisation); RepVGG, Ding et al. 2021 (arXiv 2101.03697).
    """

    def __init__(self, dim, hidden):
        super().__init__()
        self.project_in = nn.Sequential(nn.Conv2d(dim, hidden // 2, 1), nn.Conv2d(hidden // 2, hidden, 1))
        self.dwconv = nn.ModuleList(nn.Conv2d(hidden, hidden, k, padding=k // 2, groups=hidden) for k in (5, 3, 1))
        self.project_out = nn.Sequential(nn.Conv2d(hidden, hidden // 2, 1), nn.Conv2d(hidden // 2, dim, 1))

    def summed(self):
        """{name: weight} of the equal DepthwiseMlp, as a differentiable function of the weights here.

        W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2); smaller kernels sit in the middle, the identity is a 1 there.
        Source: RepVGG figure 4.
        """
        weights = {}
        for name in ("project_in", "project_out"):
            (w1, b1), (w2, b2) = ((conv.weight.flatten(1), conv.bias) for conv in getattr(self, name))
            weights |= {f"{name}.weight": (w2 @ w1)[:, :, None, None], f"{name}.bias": w2 @ b1 + b2}
        k5, k3, k1 = (conv.weight for conv in self.dwconv)
        return weights | {"dwconv.weight": k5 + F.pad(k3, (1,) * 4) + F.pad(k1 + 1, (2,) * 4),      # (r*D, 1, 5, 5)
                          "dwconv.bias": sum(conv.bias for conv in self.dwconv)}

    def forward(self, x):
        return depthwise_mlp(x, self.summed())


MLPS = {"basic": BasicMlp, "dw": DepthwiseMlp, "rep": RepMlp}


# ----------------------------------------------------------------------------------------------------------------------
# the model

class UDiTBlock(nn.Module):
    """Attention, MLP, attention, MLP, each with adaLN-Zero's shift, scale, gate: x (B, H, W, D), c (B, D) -> like x.

    attention: the other arguments of Attention. Source: U-DiT's released code (two of DiT's blocks in a row).
    """

    def __init__(self, dim, hidden, mlp, **attention):
        super().__init__()
        for i in (1, 2):
            self.add_module(f"attn{i}", Attention(dim, **attention))
            self.add_module(f"mlp{i}", MLPS[mlp](dim, hidden))
            self.add_module(f"adaLN_modulation{i}", nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim)))

    def forward(self, x, c):
        for attn, mlp, modulation in ((self.attn1, self.mlp1, self.adaLN_modulation1),
                                      (self.attn2, self.mlp2, self.adaLN_modulation2)):
            parts = modulation(c)[:, None].chunk(6, dim=-1)                             # 6x (B, 1, D)
            shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
            x = x + gate_attn[:, None] * attn(modulate(norm(x), shift_attn, scale_attn))
            x = x + gate_mlp[:, None] * mlp(modulate(norm(x), shift_mlp, scale_mlp))
        return x


class Level(nn.ModuleList):
    """Blocks in a row: x (B, H, W, D), c (B, D) -> like x. Source: U-DiT figure 2."""

    def forward(self, x, c):
        for block in self:
            x = block(x, c)
        return x


class Resample(nn.Module):
    """Another side: a 3x3 convolution to dim_out channels, then pixel (un)shuffle by 2. Source: Restormer's code."""

    def __init__(self, dim, dim_out, shuffle):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(dim, dim_out, 3, padding=1, bias=False), shuffle)

    def forward(self, x):
        return channels_last(self.body, x)                      # (B, H/2, W/2, 4 dim_out) or (B, 2H, 2W, dim_out/4)


class FinalLayer(nn.Module):
    """Norm, modulation, 3x3 convolution: x (B, H, W, D), c (B, D) -> (B, H, W, C_out). Source: DiT §3.2."""

    def __init__(self, dim, out_channels):
        super().__init__()
        self.out_proj = nn.Conv2d(dim, out_channels, 3, padding=1)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)               # 2x (B, 1, D)
        return channels_last(self.out_proj, modulate(norm(x), shift, scale))            # (B, H, W, C_out)


class UDiT(nn.Module):
    """U-shaped diffusion transformer; the defaults are U-DiT-S.

    input_size: side of x, a multiple of 4 * down_factor; in_channels: C of x; hidden_size: width D of the first level;
    depth: blocks (of two attentions) in encoder 1, encoder 2, latent, decoder 2, decoder 1, where the side is S, S/2,
    S/4, S/2, S and the width D, 2D, 4D, 2D, 2D; num_heads: at every level; mlp_ratio, num_classes, class_dropout_prob,
    learn_sigma: as in DiT; down_factor: f of the attention, 1 = full attention; downsample: "tokens", or "kv" for keys
    and values alone; cosine: cosine attention instead of dot products; rope: rotary positions; mlp: "basic", "dw"
    (with a depth-wise convolution) or "rep" (the same, re-parameterised); kernel_size: of the downsampler's filter, odd
    or 0 = none; shortcut: add the filter's input to its output.
    The paper's vanilla U-DiT is cosine=False, rope=False, mlp="basic"; its DiT-UNet is that with down_factor=1,
    kernel_size=0. Raises ValueError for sizes that do not fit together. Source: U-DiT §3, figure 2, tables 1, 7, 9.
    """

    # Muon's share in train.py: the matrices between first convolution and final layer; depth-wise kernels are none
    matrices = r"(?!.*(downsampler|dwconv|logit_scale))(encoder|down|latent|up|reduce|decoder|output)"

    def __init__(self, input_size=32, in_channels=4, hidden_size=96, depth=(2, 5, 8, 5, 2), num_heads=4, mlp_ratio=2,
                 num_classes=1000, class_dropout_prob=0.1, learn_sigma=True, down_factor=2, downsample="tokens",
                 cosine=True, rope=True, mlp="rep", kernel_size=5, shortcut=True):
        super().__init__()
        if input_size % (4 * down_factor):
            raise ValueError(f"input size {input_size} is not divisible by {4 * down_factor} = 4 (two halvings) * "
                             f"down_factor {down_factor}: change one of them")
        if hidden_size % num_heads or (rope and hidden_size // num_heads % 4):
            raise ValueError(f"hidden_size {hidden_size} and num_heads {num_heads}: one must divide the other, and for "
                             "rope into multiples of 4: change one of them")
        if downsample not in ("tokens", "kv") or mlp not in MLPS or len(depth) != 5:
            raise ValueError(f"downsample {downsample!r}, mlp {mlp!r}, depth {tuple(depth)}: choose tokens or kv; one "
                             f"of {', '.join(MLPS)}; and five numbers of blocks")
        if kernel_size and kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} must be odd, for a map to keep its side, or 0 for no filter")
        if num_classes == 0 and class_dropout_prob == 0:
            raise ValueError("num_classes 0 needs class_dropout_prob > 0: the null class is then the only one")
        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        self.class_dropout_prob = class_dropout_prob
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        D, attention = hidden_size, dict(num_heads=num_heads, down_factor=down_factor, downsample=downsample,
                                         cosine=cosine, rope=rope, kernel_size=kernel_size, shortcut=shortcut)

        def level(i, width, side):
            return Level(UDiTBlock(width, int(mlp_ratio * width), mlp, side=side, **attention) for _ in range(depth[i]))

        self.x_embedder = nn.Sequential(OrderedDict(proj=nn.Conv2d(in_channels, D, 3, padding=1)))
        for i, width in ((1, D), (2, 2 * D), (3, 4 * D)):
            self.add_module(f"t_embedder_{i}", TimestepEmbedder(width))
            self.add_module(f"y_embedder_{i}", LabelEmbedder(num_classes, width, class_dropout_prob))
        self.encoder_level_1 = level(0, D, input_size)
        self.down1_2 = Resample(D, D // 2, nn.PixelUnshuffle(2))
        self.encoder_level_2 = level(1, 2 * D, input_size // 2)
        self.down2_3 = Resample(2 * D, D, nn.PixelUnshuffle(2))
        self.latent = level(2, 4 * D, input_size // 4)
        self.up3_2 = Resample(4 * D, 8 * D, nn.PixelShuffle(2))
        self.reduce_chan_level2 = nn.Conv2d(4 * D, 2 * D, 1)
        self.decoder_level_2 = level(3, 2 * D, input_size // 2)
        self.up2_1 = Resample(2 * D, 4 * D, nn.PixelShuffle(2))
        self.reduce_chan_level1 = nn.Conv2d(2 * D, 2 * D, 1)                # reduces nothing, as published:
        self.decoder_level_1 = level(4, 2 * D, input_size)                  # decoder 1 is twice as wide as encoder 1
        self.output = nn.Conv2d(2 * D, 2 * D, 3, padding=1)
        self.final_layer = FinalLayer(2 * D, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Every initial value of the model, in one place. Source: U-DiT's released code.

        | what                                   | how                    | why                                        |
        | Linear and Conv2d                      | Xavier uniform, bias 0 | depth-wise kernels come out tiny, so the   |
        |                                        |                        | downsampler starts as its shortcut         |
        | first convolution                      | the same, as a matrix  | as in DiT                                  |
        | label tables, timestep MLPs            | normal(0, 0.02)        | small conditions at first                  |
        | modulation (all shifts, scales, gates) | 0                      | gates 0: every block is the identity       |
        | last convolution                       | 0                      | the first prediction is 0, loss is 1       |
        | logit_scale                            | ln 10                  | cosines become logits between -10 and 10   |
        """
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1) if name == "x_embedder.proj" else module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if "y_embedder" in name or ("t_embedder" in name and name.endswith("weight")):
                nn.init.normal_(parameter, std=0.02)
            elif "adaLN_modulation" in name or "out_proj" in name:
                nn.init.zeros_(parameter)
            elif "logit_scale" in name:
                nn.init.constant_(parameter, math.log(10))

    # labels are hidden, and their absence named, exactly as in DiT
    drop_labels, null_condition = DiT.drop_labels, DiT.null_condition

    def forward(self, x, t, y):
        """x (B, C, H, W), t (B,) steps 0..999 (fractions allowed), y (B,) int64 classes -> (B, C_out, H, W).

        Raises ValueError if H or W is not input_size. Source: U-DiT figure 2.
        """
        if x.shape[2:] != (self.input_size, self.input_size):
            raise ValueError(f"x is {x.shape[2]}x{x.shape[3]}, this model was made for input_size {self.input_size}: "
                             "change one of them")
        c1 = self.t_embedder_1(t) + self.y_embedder_1(y)                                # (B, D)
        c2 = self.t_embedder_2(t) + self.y_embedder_2(y)                                # (B, 2D)
        c3 = self.t_embedder_3(t) + self.y_embedder_3(y)                                # (B, 4D)
        x = self.x_embedder(x).permute(0, 2, 3, 1).contiguous()                         # (B, H, W, D)
        x = skip1 = self.encoder_level_1(x, c1)
        x = skip2 = self.encoder_level_2(self.down1_2(x), c2)                           # (B, H/2, W/2, 2D)
        x = self.latent(self.down2_3(x), c3)                                            # (B, H/4, W/4, 4D)
        x = torch.cat([self.up3_2(x), skip2], dim=-1)                                   # (B, H/2, W/2, 4D)
        x = pointwise(x, self.reduce_chan_level2.weight, self.reduce_chan_level2.bias)  # (B, H/2, W/2, 2D)
        x = self.decoder_level_2(x, c2)
        x = torch.cat([self.up2_1(x), skip1], dim=-1)                                   # (B, H, W, 2D)
        x = pointwise(x, self.reduce_chan_level1.weight, self.reduce_chan_level1.bias)
        x = self.decoder_level_1(x, c2)
        x = self.final_layer(channels_last(self.output, x), c2)                         # (B, H, W, C_out)
        return x.permute(0, 3, 1, 2)                                                    # (B, C_out, H, W)


def fold(model):
    """A copy of a UDiT in which every RepMlp is the DepthwiseMlp it stands for: same function, fewer weights.

    The copy is a UDiT(mlp="dw"): where the state_dict had mlp1.project_in.0 and .1, mlp1.dwconv.0 to .2 and
    mlp1.project_out.0 and .1 it has mlp1.project_in, mlp1.dwconv, mlp1.project_out (likewise mlp2); the other names
    stay. The model itself is left alone, and a folded one comes back as a plain copy. Source: RepVGG §3.3.
    """
    folded = copy.deepcopy(model)
    for name, module in list(folded.named_modules()):
        if isinstance(module, RepMlp):
            weights = {k: w.detach() for k, w in module.summed().items()}
            with torch.device("meta"):                          # no memory, and no random numbers drawn
                plain = DepthwiseMlp(module.project_in[0].in_channels, module.dwconv[0].in_channels)
            plain.load_state_dict(weights, assign=True)
            folded.set_submodule(name, plain.train(module.training))
    return folded


UDIT_CONFIGS = {
    # the paper's three, on 32x32x4 latents: 59, 231 and 916 M parameters in training, 52, 204 and 810 M folded
    "U-DiT-S": dict(hidden_size=96, num_heads=4),
    "U-DiT-B": dict(hidden_size=192, num_heads=8),
    "U-DiT-L": dict(hidden_size=384, num_heads=16),
    # on 8x8 or 16x16 latents on a laptop: 1.6 and 5.3 M parameters
    "udit-tiny": dict(hidden_size=32, num_heads=2, depth=(1, 1, 1, 1, 1)),
    "udit-small": dict(hidden_size=48, num_heads=2, depth=(1, 2, 2, 2, 1)),
}


def infer_config(state):
    """Constructor arguments of the UDiT whose state_dict this is, for instance an official file.

    What no tensor tells is taken from the paper: 32x32 latents, down_factor 2, shortcut, rotary positions along with
    cosine attention, and, where no logit_scale counts the heads, 24 channels each at the first level.
    Raises ValueError if the tensors are not those of a U-DiT. Source: U-DiT's released code, §4.1.
    """
    block = {name.removeprefix("latent.0."): w.shape for name, w in state.items() if name.startswith("latent.0.")}
    mlps = {"mlp1.dwconv.0.weight": "rep", "mlp1.dwconv.weight": "dw", "mlp1.fc1.weight": "basic"}
    mlp_name = next((name for name in mlps if name in block), "mlp1.fc1.weight")
    try:
        hidden_size, in_channels = state["x_embedder.proj.weight"].shape[:2]
        num_classes, mlp_hidden = len(state["y_embedder_1.embedding_table.weight"]) - 1, block[mlp_name][0]
        learn_sigma = len(state["final_layer.out_proj.weight"]) == 2 * in_channels
    except KeyError as error:
        raise ValueError(f"this is not the state_dict of a U-DiT: it has no tensor {error}") from error
    levels = ("encoder_level_1.", "encoder_level_2.", "latent.", "decoder_level_2.", "decoder_level_1.")
    depth = tuple(len({name.split(".")[1] for name in state if name.startswith(level)}) for level in levels)
    cosine = "attn1.logit_scale" in block
    return dict(in_channels=in_channels, hidden_size=hidden_size, depth=depth, mlp_ratio=mlp_hidden / (4 * hidden_size),
                num_heads=block["attn1.logit_scale"][0] if cosine else max(1, hidden_size // 24),
                num_classes=num_classes, learn_sigma=learn_sigma, cosine=cosine, rope=cosine, mlp=mlps[mlp_name],
                kernel_size=block.get("attn1.downsampler.layer.weight", (0,))[-1])


# ----------------------------------------------------------------------------------------------------------------------
# spectra: does the main path of the U hold low frequencies, as the paper's argument has it? (the paper shows no figure)

@torch.no_grad()
def features(model, x, t, y):
    """Maps inside a UDiT for one batch, each (B, D, H', W'): "skip" (encoder 1's, carried over), "latent", "backbone"
    (what comes up to meet the skip) and "decoder". Source: FreeU, Si et al. 2023 (arXiv 2309.11497) §3.
    """
    maps, where = {}, {"skip": model.encoder_level_1, "latent": model.latent, "backbone": model.up2_1,
                       "decoder": model.decoder_level_1}
    hooks = [module.register_forward_hook(lambda _, args, out, name=name: maps.update({name: out.permute(0, 3, 1, 2)}))
             for name, module in where.items()]
    model(x, t, y)
    for hook in hooks:
        hook.remove()
    return maps


def radial_spectrum(x):
    """Mean power of square maps x (B, C, S, S) at 0, 1, ..., S/2 cycles per side, in any direction -> (S/2 + 1,).

    White noise of variance 1 has power 1 everywhere. Source: FreeU figure 3.
    """
    S = x.shape[-1]
    power = torch.fft.fft2(x).abs().square().mean((0, 1)) / S ** 2                      # (S, S)
    f = torch.fft.fftfreq(S, 1 / S, device=x.device)                                    # cycles per side
    radius = torch.hypot(f[:, None], f[None]).round().long().flatten()                  # (S*S,)
    total, count = torch.bincount(radius, power.flatten()), torch.bincount(radius)
    return (total / count)[:S // 2 + 1]


def low_share(x):
    """Share of the energy of maps x (B, C, S, S), means removed, at |fx|, |fy| < 1/4 cycle per cell, in [0, 1].

    That is what a map of half the side can hold. Source: U-DiT §3.2.
    """
    low = torch.fft.fftfreq(x.shape[-1], device=x.device).abs() < 0.25                  # (S,)
    power = torch.fft.fft2(x - x.mean((2, 3), keepdim=True)).abs().square()             # (B, C, S, S)
    return (power[..., low, :][..., low].sum() / power.sum()).item()


def frequency_response(kernel, size=32):
    """Mean gain of kernels (D, 1, k, k), such as Downsampler.kernel(), per frequency: (size, size), [0, 0] the lowest.

    Source: U-DiT table 7, which asks how much the filter matters.
    """
    return torch.fft.fft2(kernel.detach()[:, 0], s=(size, size)).abs().mean(0)
