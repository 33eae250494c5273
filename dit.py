"""DiT: a diffusion model whose network is a plain transformer.

Paper: Scalable Diffusion Models with Transformers (Peebles & Xie 2022, arXiv 2212.09748).

The idea.  Cut the noisy picture (usually a latent of an autoencoder) into p x p patches, call each
patch a token, and let a Vision Transformer (ViT) denoise them. Two questions remain.
  How does the network learn the timestep t and the class y?  The paper tries four blocks:
    adaln_zero        the condition c = emb(t) + emb(y) sets shift and scale after each norm, and a
                      gate on each branch; gates start at 0, so a block starts as the identity
    adaln             the same without gates
    cross_attention   a second attention layer reads two condition tokens, emb(t) and emb(y)
    in_context        the two condition tokens are appended to the image tokens
  How does quality grow?  With compute: more depth and width, or smaller patches (half the side is
  four times the tokens). In the paper's comparison adaln_zero is the best of the four.
A caption, in place of a class, has a token for each word. Then c of adaln and adaln_zero is emb(t),
and in each block a cross-attention reads the words (PixArt-alpha, 2310.00426, Fig. 4).

    python train.py                                    # a tiny DiT on 8x8 latents, minutes on a CPU
    python train.py --model DiT-S/2 --data cifar10     # the paper's smallest width, on one GPU

Differences from the official code (facebookresearch/DiT; same state_dict names, same numbers):
1. All four blocks; only adaln_zero was released. The others follow the paper's text and counts.
2. Label dropout draws no random numbers in forward: the caller passes them to `drop_labels`, so a
   training step is a function of its inputs (it compiles, resumes, and splits over GPUs).
3. Guidance (CFG: Ho & Salimans 2022) is diffusion.guided for all models; it guides all channels.
4. Arguments that the paper does not have, off by default: qk_norm, context_dim."""
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion import check_name, timestep_embedding


def modulate(x, shift, scale):
    """x (B, N, D) scaled and shifted by (B, D) each -> (B, N, D). Source: DiT §3.2 (adaLN)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])     # addcmul: a + b * c, one pass


class Block(nn.Module):
    """The standard ViT block, block(x (B, N, D), c (B, D), tokens (B, L, D)) -> (B, N, D).
    c, tokens: see joined. cross: after attention, x reads the tokens ("cross_attention"); else
    this block reads neither, for x already holds the tokens ("in_context"). A norm has no weight if
    a modulation follows. qk_norm: see Attention. Source: DiT §3.2, Fig. 3; ViT Eq. 2 and 3."""
    modulations = 0     # how many vectors (D,) are computed from c: shifts, scales, gates

    def __init__(self, hidden_size, num_heads, mlp_ratio, qk_norm=False, cross=False):
        super().__init__()
        D, wide = hidden_size, int(hidden_size * mlp_ratio)
        self.norm1 = nn.LayerNorm(D, eps=1e-6, elementwise_affine=not self.modulations)
        self.attn = Attention(D, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(D, eps=1e-6, elementwise_affine=not self.modulations)
        self.mlp = nn.Sequential(OrderedDict(       # ViT §3.1
            fc1=nn.Linear(D, wide), gelu=nn.GELU("tanh"), fc2=nn.Linear(wide, D)))
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(D, self.modulations * D)) if self.modulations else None
        self.norm_cross = nn.LayerNorm(D, eps=1e-6) if cross else None
        self.cross_attn = Attention(D, num_heads, qk_norm, cross=True) if cross else None

    def read(self, x, tokens):
        """x, and what it reads in the tokens, if this block has a cross-attention."""
        return x + self.cross_attn(self.norm_cross(x), tokens) if self.cross_attn else x

    def forward(self, x, c, tokens):
        x = self.read(x + self.attn(self.norm1(x)), tokens)
        return x + self.mlp(self.norm2(x))


class AdaLNZeroBlock(Block):
    """c sets shift, scale and gate of attention and MLP. Source: DiT §3.2, Fig. 3 (left block)."""
    modulations = 6

    def forward(self, x, c, tokens):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        attn = self.attn(modulate(self.norm1(x), shift1, scale1))
        x = self.read(torch.addcmul(x, gate1[:, None], attn), tokens)
        return torch.addcmul(x, gate2[:, None], self.mlp(modulate(self.norm2(x), shift2, scale2)))


class AdaLNBlock(Block):
    """c sets shift and scale of attention and MLP; no gates. Source: DiT §3.2 (adaLN block)."""
    modulations = 4

    def forward(self, x, c, tokens):
        shift1, scale1, shift2, scale2 = self.adaLN_modulation(c).chunk(4, dim=1)
        x = self.read(x + self.attn(modulate(self.norm1(x), shift1, scale1)), tokens)
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))


BLOCKS = {"in_context": Block, "cross_attention": Block, "adaln": AdaLNBlock,
          "adaln_zero": AdaLNZeroBlock}


class Attention(nn.Module):
    """Multi-head attention, x (B, N, D) -> (B, N, D). Queries come from x, keys and values too, or
    if `cross` from tokens (B, L, D). Source: Vaswani et al. 2017 Eq. 1; DiT §3.2 (cross-attention).
    qk_norm: RMSNorm of each query and each key over its head width d, one learned weight (d,) for
    queries and one for keys, for all heads. Source: Stable Diffusion 3 (2403.03206) Fig. 2."""

    def __init__(self, hidden_size, num_heads, qk_norm=False, cross=False):
        super().__init__()
        self.num_heads, D = num_heads, hidden_size
        if cross:
            self.q, self.kv = nn.Linear(D, D), nn.Linear(D, 2 * D)
        else:
            self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.q_norm, self.k_norm = (nn.RMSNorm(D // num_heads, eps=1e-6) if qk_norm
                                    else nn.Identity() for _ in range(2))

    def forward(self, x, tokens=None):
        if tokens is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)                              # 3x (B, N, D)
        else:
            q, (k, v) = self.q(x), self.kv(tokens).chunk(2, dim=-1)             # (B, N or L, D)
        q, k, v = (u.unflatten(2, (self.num_heads, -1)).transpose(1, 2)         # (B, h, N or L, d)
                   for u in (q, k, v))
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)   # (B, h, N, d)
        return self.proj(x.transpose(1, 2).flatten(2))                          # (B, N, D)


class DiT(nn.Module):
    """Diffusion transformer. The defaults are DiT-XL/2.
    input_size: side of x, in pixels or latent cells; num_classes: 0 = no classes, y is always the
    null class 0; class_dropout_prob: share of the labels that training hides; above 0 there is a
    null class, num_classes, which guidance needs; learn_sigma: 2C channels out, prediction then
    variance; conditioning: a key of BLOCKS; context_dim: above 0, the width of the text states that
    y is, in place of classes (text.TextConditional). Source: DiT §3, Fig. 3, Table 1."""
    matrices = r"blocks\."          # Muon's share (optim.py); embedders and last layer: AdamW

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28,
                 num_heads=16, mlp_ratio=4.0, num_classes=1000, class_dropout_prob=0.1,
                 learn_sigma=True, conditioning="adaln_zero", qk_norm=False, context_dim=0):
        super().__init__()
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"make input_size {input_size} a multiple of patch_size {patch_size}, "
                             f"hidden_size {hidden_size} one of num_heads {num_heads} and of 4")
        check_name("conditioning", conditioning, BLOCKS)
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.can_guide = num_classes > 0 and class_dropout_prob > 0     # classes, and a null class
        self.conditioning, adaptive = conditioning, BLOCKS[conditioning].modulations > 0
        self.x_embedder = nn.ModuleDict({       # patchify: p x p patches, row by row, Fig. 4
            "proj": nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)})
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = nn.Linear(context_dim, hidden_size) if context_dim else LabelEmbedder(
            num_classes, hidden_size, class_dropout_prob)
        positions = torch.zeros(1, (input_size // patch_size) ** 2, hidden_size)        # (1, N, D)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)   # official files hold it
        cross = conditioning == "cross_attention" or bool(context_dim and adaptive)
        self.blocks = nn.ModuleList(BLOCKS[conditioning](
            hidden_size, num_heads, mlp_ratio, qk_norm, cross) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, adaptive)
        self.initialize_weights()

    def forward(self, x, t, y):
        """x (B, C, H, W), t (B,) steps 0..999 or fractions, y (B,) int64, or text states
        (B, L, context_dim) -> (B, C_out, H, W)."""
        if x.shape[1:] != (expected := (self.in_channels, self.input_size, self.input_size)):
            raise ValueError(f"this DiT expects pictures of shape {expected}, got "
                             f"{tuple(x.shape[1:])}: resize them, or change the model's sizes")
        x = self.patchify(x) + self.pos_embed                                   # (B, N, D)
        c, tokens = joined(self.t_embedder(t), self.y_embedder(y))      # (B, D), (B, 1 + L, D)
        if self.conditioning == "in_context":
            x = torch.cat([x, tokens], dim=1)                                   # (B, N + 1 + L, D)
        for block in self.blocks:
            x = block(x, c, tokens)
        x = self.final_layer(x[:, :self.pos_embed.shape[1]], c)                 # (B, N, p*p*C_out)
        return self.unpatchify(x)                                               # (B, C_out, H, W)

    def patchify(self, x):
        """(B, C, H, W) -> (B, N, D). A convolution whose stride is its size, p, is one linear layer
        on all patches, which is faster. Source: DiT §3.2 (patchify), Fig. 4."""
        patches = F.pixel_unshuffle(x, self.patch_size).flatten(2).mT.contiguous()  # (B, N, C*p*p)
        return F.linear(patches, self.x_embedder.proj.weight.flatten(1), self.x_embedder.proj.bias)

    def unpatchify(self, x):
        """(B, N, p*p*C_out) -> (B, C_out, H, W). Source: DiT §3.2 (transformer decoder)."""
        B, g, p = len(x), self.input_size // self.patch_size, self.patch_size
        # a token holds its patch channel last: (B, row, column, row in patch, column in patch, C)
        x = x.view(B, g, g, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(B, self.out_channels, g * p, g * p)                    # (B, C_out, H, W)

    def initialize_weights(self):
        """Every initial value of the model, in one place. Source: DiT §3.2 and its released code.
        | what                            | how                     | why                       |
        | Linear layers, patch projection | Xavier uniform, bias 0  | as ViT, conv = its matrix |
        | norms that have a weight        | weight 1, bias 0        | only normalise at first   |
        | label table, timestep MLP       | normal(0, 0.02)         | small conditions at first |
        | modulations: shift, scale, gate | 0                       | gate 0: identity          |
        | cross_attn.proj, if modulated   | 0                       | the same                  |
        | last linear layer               | 0                       | the first prediction is 0 |
        | pos_embed                       | 2-D sine-cosine, frozen | nothing to learn          |"""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
        # the children of an embedder: of labels its table, of text none
        for module in (*self.y_embedder.children(), *self.t_embedder.mlp[::2]):
            nn.init.normal_(module.weight, std=0.02)
        zero = ["adaLN_modulation", "final_layer.linear"]
        zero += ["cross_attn.proj"] * (self.blocks[0].modulations > 0)
        for name, parameter in self.named_parameters():
            if any(part in name for part in zero):
                nn.init.zeros_(parameter)
        side = self.input_size // self.patch_size
        self.pos_embed.data.copy_(sincos_positions(self.pos_embed.shape[2], side))

    def null_condition(self, count, device="cpu"):
        """The condition "no class" of guidance, (count,) int64. Source: CFG Eq. 6."""
        return torch.full((count,), self.num_classes, device=device)

    def drop_labels(self, y, draws):
        """y (B,), or null where draws (B,) in [0, 1) < class_dropout_prob. Source: CFG Alg. 1."""
        return torch.where(draws < self.class_dropout_prob, self.num_classes, y)


class FinalLayer(nn.Module):
    """(B, N, D) -> (B, N, p*p*C_out); adaptive: c sets shift and scale. Source: DiT §3.2."""

    def __init__(self, hidden_size, patch_size, out_channels, adaptive):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=not adaptive)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size)) if adaptive else None

    def forward(self, x, c):
        x = self.norm_final(x)                                                  # (B, N, D)
        if self.adaLN_modulation is not None:
            x = modulate(x, *self.adaLN_modulation(c).chunk(2, dim=1))          # shift, scale
        return self.linear(x)                                                   # (B, N, p*p*C_out)


class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, D): a sinusoid of 256 numbers, then an MLP. Source: DiT appendix A."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(timestep_embedding(t, 256).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """y (B,) -> (B, D); with label dropout one more row, the null class. Source: CFG Alg. 1."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        if num_classes == 0 and dropout_prob == 0:
            raise ValueError("num_classes 0 needs class_dropout_prob > 0, for the null class")
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y):
        return self.embedding_table(y)                                          # (B, D)


def joined(t, y):
    """emb(t) (B, D), emb(y) (B, D) -> c = emb(t) + emb(y), tokens (B, 2, D) = [emb(t), emb(y)].
    y of text (B, L, D): c = emb(t), tokens (B, 1 + L, D). Source: DiT §3.2; PixArt-alpha §2.2."""
    c, y = (t, y) if y.dim() == 3 else (t + y, y[:, None])                      # y (B, L, D)
    return c, torch.cat([t[:, None], y], dim=1)


def sincos_positions(hidden_size, grid_size):
    """Fixed (grid_size^2, D) float32, D % 4 = 0: half column, half row. Source: DiT §3.2."""
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)  # (D/4,)
    args = torch.arange(grid_size, dtype=torch.float64)[:, None] * omega        # (g, D/4)
    line = torch.cat([args.sin(), args.cos()], dim=1)                           # (g, D/2)
    # a token's column, then its row: (g*g, D)
    return torch.cat([line.repeat(grid_size, 1), line.repeat_interleave(grid_size, 0)], 1).float()


DIT_CONFIGS = {     # the twelve of the paper (Table 1); after the slash stands the patch size
    f"DiT-{name}/{patch}": dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
    for name, width, depth, heads in (("S", 384, 12, 6), ("B", 768, 12, 12), ("L", 1024, 24, 16),
                                      ("XL", 1152, 28, 16)) for patch in (2, 4, 8)}
