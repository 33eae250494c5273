"""DiT: a diffusion model whose network is a plain transformer.

Paper: Scalable Diffusion Models with Transformers (Peebles & Xie 2022, arXiv 2212.09748).

The idea.  Cut the noisy picture (usually a latent of an autoencoder) into p x p patches, call each patch a token, and
let a Vision Transformer denoise them. Two questions remain:
  How does the network learn the timestep t and the class y?  The paper tries four blocks, all here:
    in-context   t and y are two extra tokens in the sequence
    cross-attn   a second attention layer reads those two tokens
    adaln        LayerNorm's shift and scale are computed from c = emb(t) + emb(y)
    adaln_zero   the same, plus a gate on every residual branch, starting at zero: each block begins as the identity
  How does quality grow?  With Gflops: more depth and width, or smaller patches (4x the tokens); adaln_zero wins
  everywhere.

Contents: attention and MLP, embedders, the four blocks, the final layer, DiT, the twelve configurations.
A model is model(x (B,C,H,W), t (B,), y (B,)) -> (B, C or 2C, H, W); training is `train.py`, the maths `diffusion.py`.

    python train.py                                    # a tiny DiT on 8x8 latents, minutes on a laptop
    python train.py --model DiT-S/2 --data cifar10     # the paper's smallest, on one GPU

Differences from the official code (facebookresearch/DiT, adaLN-Zero only; state_dict names and numbers are the same):
1. All four block designs. The other three were never released; they follow the paper's text, and their sizes match its
   table.
2. Label dropout draws nothing inside forward: the caller passes its random numbers to `drop_labels`, so a step is a
   pure function (it compiles, resumes, and splits over GPUs without a change in the result).
3. The guided forward lives in diffusion.guided, for every model, and guides all channels.
"""
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion import timestep_embedding


def modulate(x, shift, scale):
    """Scale and shift normalised tokens per sample: x (B, N, D), shift and scale (B, D) -> (B, N, D).

    Source: DiT §3.2 (adaLN).
    """
    return x * (1 + scale[:, None]) + shift[:, None]


# ----------------------------------------------------------------------------------------------------------------------
# layers

class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D). Source: Vaswani et al. 2017; ViT's fused qkv."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)      # 3x (B, h, N, d)
        x = F.scaled_dot_product_attention(q, k, v)                                         # (B, h, N, d)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))                                # (B, N, D)


class CrossAttention(nn.Module):
    """Image tokens (B, N, D) read condition tokens (B, L, D) -> (B, N, D). Source: DiT §3.2 (cross-attention block)."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x, tokens):
        B, N, D = x.shape
        q = self.q(x).view(B, N, self.num_heads, -1).transpose(1, 2)                        # (B, h, N, d)
        kv = self.kv(tokens).view(B, tokens.shape[1], 2, self.num_heads, -1)                # (B, L, 2, h, d)
        k, v = kv.permute(2, 0, 3, 1, 4)                                                    # 2x (B, h, L, d)
        x = F.scaled_dot_product_attention(q, k, v)                                         # (B, h, N, d)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))                                # (B, N, D)


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between, (B, N, D) -> (B, N, D). Source: ViT."""

    def __init__(self, hidden_size, mlp_hidden):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden)
        self.fc2 = nn.Linear(mlp_hidden, hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PatchEmbed(nn.Module):
    """Picture to tokens: (B, C, H, W) -> (B, N, D), one p x p patch per token, row by row.

    Source: DiT §3.2 (patchify).
    """

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)                                      # (B, N, D)


class TimestepEmbedder(nn.Module):
    """Timestep t (B,) -> (B, D): a sinusoid of 256 numbers and a two-layer MLP. Source: DiT appendix A; ADM."""

    def __init__(self, hidden_size, frequency_size=256):
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        return self.mlp(timestep_embedding(t, self.frequency_size).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class y (B,) -> (B, D). With label dropout there is one more row, index num_classes: "no class".

    Source: Ho & Salimans 2022.
    """

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


def sincos_positions(hidden_size, grid_size):
    """Fixed 2-D sine-cosine table, (grid_size^2, D) float32. First half of D: the column; second half: the row.

    Raises ValueError unless D is a multiple of 4. Source: DiT §3.2; MAE's table, computed in float64.
    """
    if hidden_size % 4:
        raise ValueError(f"hidden_size {hidden_size} must be a multiple of 4 for 2-D sine-cosine positions")
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)              # (D/4,)
    args = torch.arange(grid_size, dtype=torch.float64)[:, None] * omega                    # (g, D/4)
    line = torch.cat([args.sin(), args.cos()], dim=1)                                       # (g, D/2)
    column, row = line.repeat(grid_size, 1), line.repeat_interleave(grid_size, 0)           # 2x (g*g, D/2)
    return torch.cat([column, row], dim=1).float()                                          # (g*g, D)


# ----------------------------------------------------------------------------------------------------------------------
# the four blocks: each is block(x (B, N, D), c (B, D), tokens (B, 2, D)) -> (B, N, D) and takes what it needs

class InContextBlock(nn.Module):
    """A standard pre-norm ViT block; the condition sits in the sequence itself. Source: DiT §3.2, figure 3 right."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    def forward(self, x, c, tokens):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CrossAttentionBlock(nn.Module):
    """ViT block with one more attention, from the image tokens to the two condition tokens.

    Source: DiT §3.2, figure 3 middle.
    """

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm_cross = nn.LayerNorm(hidden_size, eps=1e-6)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    def forward(self, x, c, tokens):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), tokens)
        return x + self.mlp(self.norm2(x))


class AdaLNBlock(nn.Module):
    """LayerNorms without weights of their own: shift and scale come from c. Source: DiT §3.2 (adaLN block)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 4 * hidden_size))

    def forward(self, x, c, tokens):
        shift_msa, scale_msa, shift_mlp, scale_mlp = self.adaLN_modulation(c).chunk(4, dim=1)   # 4x (B, D)
        x = x + self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class AdaLNZeroBlock(nn.Module):
    """adaLN plus a gate per residual branch, zero at first, so the block starts as the identity.

    Source: DiT §3.2, figure 3 left.
    """

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c, tokens):
        parts = self.adaLN_modulation(c).chunk(6, dim=1)                                    # 6x (B, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


BLOCKS = {"in_context": InContextBlock, "cross_attention": CrossAttentionBlock, "adaln": AdaLNBlock,
          "adaln_zero": AdaLNZeroBlock}


class FinalLayer(nn.Module):
    """Tokens to patches: norm (adaptive in the adaLN models), one linear layer, (B, N, D) -> (B, N, p*p*C_out).

    Source: DiT §3.2.
    """

    def __init__(self, hidden_size, patch_size, out_channels, adaptive):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=not adaptive, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size)) if adaptive else None

    def forward(self, x, c):
        x = self.norm_final(x)
        if self.adaLN_modulation is not None:
            shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)                         # 2x (B, D)
            x = modulate(x, shift, scale)
        return self.linear(x)                                                               # (B, N, p*p*C_out)


# ----------------------------------------------------------------------------------------------------------------------
# the model

class DiT(nn.Module):
    """Diffusion transformer.

    input_size: height = width of x, in pixels or latent cells; patch_size: side of a token, divides input_size;
    in_channels: C of x; num_classes: 0 is allowed (unconditional: every y is the null class); class_dropout_prob: how
    often training hides the label, > 0 adds the null class y = num_classes that guidance needs; learn_sigma: output 2C
    channels, eps and variance. conditioning: "adaln_zero", "adaln", "cross_attention" or "in_context".
    Raises ValueError for sizes that do not fit together. Source: DiT §3.
    """

    matrices = r"blocks\."        # Muon's share in train.py: everything inside the blocks, the modulations too

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, num_classes=1000, class_dropout_prob=0.1, learn_sigma=True, conditioning="adaln_zero"):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input size {input_size} is not divisible by patch size {patch_size}: change one of them")
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not divisible by num_heads {num_heads}: change one of them")
        if conditioning not in BLOCKS:
            raise ValueError(f"unknown conditioning {conditioning!r}: choose one of {', '.join(BLOCKS)}")
        if num_classes == 0 and class_dropout_prob == 0:
            raise ValueError("num_classes 0 needs class_dropout_prob > 0: the null class is then the only one")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_classes, self.class_dropout_prob, self.conditioning = num_classes, class_dropout_prob, conditioning
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # fixed, yet a Parameter: the official checkpoints carry it and the paper's counts leave it out
        self.pos_embed = nn.Parameter(torch.zeros(1, (input_size // patch_size) ** 2, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(BLOCKS[conditioning](hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        adaptive = conditioning.startswith("adaln")
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, adaptive)
        self.initialize_weights()

    def initialize_weights(self):
        """Every initial value of the model, in one place. Source: DiT §3.2 and its released code.

        | what                                   | how                        | why                                    |
        | Linear layers, patch projection        | Xavier uniform, bias 0     | as in ViT; the conv counts as a matrix |
        | label table, timestep MLP              | normal(0, 0.02)            | small conditions at first              |
        | modulation (all shifts, scales, gates) | 0                          | gates 0: every block is the identity   |
        | final linear                           | 0                          | the first prediction is 0, loss is 1   |
        | pos_embed                              | 2-D sine-cosine, frozen    | positions need no learning             |
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for module in [*self.blocks, self.final_layer]:
            if getattr(module, "adaLN_modulation", None) is not None:
                nn.init.zeros_(module.adaLN_modulation[1].weight)
                nn.init.zeros_(module.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)
        self.pos_embed.data.copy_(sincos_positions(self.pos_embed.shape[2], self.input_size // self.patch_size))

    def null_condition(self, count, device="cpu"):
        """The condition "no class" for guidance, (count,) int64. Source: Ho & Salimans 2022."""
        return torch.full((count,), self.num_classes, device=device)

    def drop_labels(self, y, draws):
        """Replace y (B,) by the null class where draws (B,), uniform in [0, 1), fall below class_dropout_prob.

        Source: Ho & Salimans 2022 alg. 1.
        """
        return torch.where(draws < self.class_dropout_prob, self.num_classes, y)

    def unpatchify(self, x):
        """(B, N, p*p*C_out) -> (B, C_out, H, W). A token holds its patch as (row, column, channel).

        Source: DiT §3.2 (decoder).
        """
        B, g, p = x.shape[0], self.input_size // self.patch_size, self.patch_size
        x = x.view(B, g, g, p, p, self.out_channels)                                    # (B, row, col, p_row, p_col, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, self.out_channels, g * p, g * p)  # (B, C, H, W)

    def forward(self, x, t, y):
        """x (B, C, H, W), t (B,) steps 0..999 (fractions allowed), y (B,) int64 classes -> (B, C_out, H, W).

        Source: DiT figure 3.
        """
        x = self.x_embedder(x) + self.pos_embed                                             # (B, N, D)
        N = x.shape[1]
        t, y = self.t_embedder(t), self.y_embedder(y)                                       # (B, D), (B, D)
        c, tokens = t + y, torch.stack([t, y], dim=1)                                       # (B, D), (B, 2, D)
        if self.conditioning == "in_context":
            x = torch.cat([x, tokens], dim=1)                                               # (B, N + 2, D)
        for block in self.blocks:
            x = block(x, c, tokens)                                                         # (B, N, D)
        x = self.final_layer(x[:, :N], c)                                                   # (B, N, p*p*C_out)
        return self.unpatchify(x)                                                           # (B, C_out, H, W)


# the twelve of the paper (table 1): name -> width, depth, heads; /p is the patch size
DIT_CONFIGS = {f"DiT-{name}/{patch}": dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
               for name, width, depth, heads in (("S", 384, 12, 6), ("B", 768, 12, 12), ("L", 1024, 24, 16),
                                                 ("XL", 1152, 28, 16))
               for patch in (2, 4, 8)}


def dit_config(name):
    """Sizes of a named DiT: a paper's name ("DiT-S/2"), or "DiT-WxD/p" = width W (heads of 32), depth D, patch p.

    For example "DiT-96x4/1". Raises ValueError for anything else. Source: DiT table 1.
    """
    if name in DIT_CONFIGS:
        return dict(DIT_CONFIGS[name])
    size = re.fullmatch(r"DiT-(\d+)x(\d+)/(\d+)", name)
    if not size or min(map(int, size.groups())) < 1 or int(size[1]) % 32:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(DIT_CONFIGS)}, or DiT-WxD/p (width W, a "
                         "multiple of 32)")
    width, depth, patch = map(int, size.groups())
    return dict(hidden_size=width, depth=depth, num_heads=width // 32, patch_size=patch)


def infer_config(state):
    """Constructor arguments of the adaLN-Zero DiT whose state_dict this is, for instance an official file.

    Heads cannot be read off the weights: they come from the paper's table by width, else width / 32.
    Raises ValueError if the tensors are not those of a DiT. Source: papers' names, DiT table 1.
    """
    try:
        hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        rows, tokens = state["y_embedder.embedding_table.weight"].shape[0], state["pos_embed"].shape[1]
        out_channels = state["final_layer.linear.weight"].shape[0] // patch_size ** 2
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        state["blocks.0.adaLN_modulation.1.weight"]
    except KeyError as error:
        raise ValueError(f"this is not the state_dict of an adaLN-Zero DiT: it has no tensor {error}") from error
    heads = {c["hidden_size"]: c["num_heads"] for c in DIT_CONFIGS.values()}.get(hidden_size, hidden_size // 32)
    return dict(input_size=round(tokens ** 0.5) * patch_size, patch_size=patch_size, in_channels=in_channels,
                hidden_size=hidden_size, depth=depth, num_heads=heads, num_classes=rows - 1,
                learn_sigma=out_channels == 2 * in_channels)
