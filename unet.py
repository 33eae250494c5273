"""The conditional U-Net of latent diffusion (Stable Diffusion v1), with a name on every tensor an adapter may touch.

Paper: High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al. 2022, arXiv 2112.10752), §3.3.
The convolutional trunk is that of DDPM (Ho et al. 2020) and ADM (Dhariwal & Nichol 2021).

The idea.  A denoiser that looks at the picture at several sizes. On the way down, residual blocks see it ever smaller
and wider; on the way up each block also gets the map of its size from the way down (the skip), so no detail is lost.
Two things steer it:
  the timestep t   becomes a vector emb, added to the feature maps inside every ResBlock
  the text         is a sequence of vectors, context (B, L, D_ctx). In the transformer block after a ResBlock every cell
                   of the map is a token: first the cells look at each other (self-attention), then each cell asks the
                   words (cross-attention), then comes a gated MLP. Only to_k and to_v ever see the words; hence the
                   later papers that personalise a model by training just these two (custom_diffusion.py) or what lies
                   around them (adapters.py).

Contents: taps, attention, GEGLU, transformer block, spatial transformer, ResBlock, re-samplers, UNet, UNET_CONFIGS.
A model is model(x (B,C,H,W), t (B,), context (B,L,D_ctx)) -> (B, C_out, H, W).

    python -m pytest tests/test_unet.py                # what it must do, against the official figures

Taps.  Blocks pass each named tensor through `tap(name, x)`, which returns it as it is until somebody sets
`block.adapter`, any nn.Module with forward(name, x) -> tensor of the same shape. What it returns is what the block goes
on with, so one module may read, change, or read here and add there. As a sub-module it moves, saves and is deep-copied
with the model. `block.adapter = None` removes it.

    TransformerBlock   sa_out  = attn1(LN(sa_in))           ca_in     = sa_out + sa_in
                       ca_out  = attn2(LN(ca_in), ca_c)     ffn_in    = ca_out + ca_in
                       ffn_out = ff(LN(ffn_in))             trans_out = ffn_out + ffn_in
    ResBlock           res_in, before the main path and the skip; res_out, after their sum

Muon's share of the parameters (train.py): the names that match `UNet.matrices` and have two or more axes, that is the
matrices of the trunk. The first convolution, the timestep MLP and the head stay with AdamW.

Differences from the official code (CompVis/latent-diffusion; state_dict names, order and numbers are the same):
1. Only what Stable Diffusion v1 uses: no dropout, scale-shift norm, class label, resampling ResBlock, fp16 switch, nor
   the older attention block. Where dropout stood in the names there is an empty slot. A context is always required.
2. channel_mult may hold fractions, 64 x (1, 1.5) = 64, 96, and begin with any number (official: 1, or it crashes).
3. attention_resolutions are checked: they are down-sampling factors; pixel sizes by mistake would silently mean no
   attention.
4. Taps instead of adapter code inside the blocks.
5. norm_groups, 32 as published, may be smaller. A width of 32 in 32 groups makes groups of one channel, and the norm
   that follows removes the very constant by which t speaks: such ResBlocks do not know t. The tiny ones here use 8.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion import timestep_embedding

GROUPS = 32             # of every GroupNorm; Source: DDPM's and LDM's code


class Tapped(nn.Module):
    """A block with named tensors.

    taps: name -> channels, in order of time; adapter: None, or a module called as adapter(name, x) -> x, same shape.
    Source: Xiang et al. 2023 (arXiv 2303.18181) figure 4, the ten positions.
    """

    def __init__(self, taps):
        super().__init__()
        self.taps = taps
        self.register_module("adapter", None)

    def tap(self, name, x):
        """The tensor x, or what the adapter makes of it: same shape. Source: Xiang et al. 2023 §3."""
        return x if self.adapter is None else self.adapter(name, x)


# ----------------------------------------------------------------------------------------------------------------------
# attention and the transformer

class CrossAttention(nn.Module):
    """Multi-head attention: tokens x (B, N, query_dim) read context (B, L, context_dim) -> (B, N, query_dim).

    Self-attention is context = x. No biases on q, k, v. Source: LDM §3.3; Vaswani et al. 2017.
    """

    def __init__(self, query_dim, context_dim, num_heads, head_dim):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(query_dim, num_heads * head_dim, bias=False)
        self.to_k = nn.Linear(context_dim, num_heads * head_dim, bias=False)
        self.to_v = nn.Linear(context_dim, num_heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(num_heads * head_dim, query_dim))

    def forward(self, x, context):
        q, k, v = (u.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                   for u in (self.to_q(x), self.to_k(context), self.to_v(context)))     # (B, h, N, d), 2x (B, h, L, d)
        x = F.scaled_dot_product_attention(q, k, v)                                     # (B, h, N, d)
        return self.to_out(x.transpose(1, 2).flatten(2))                                # (B, N, query_dim)


class GEGLU(nn.Module):
    """A linear layer gated by another, (B, N, D) -> (B, N, D_out). Source: Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, dim, dim_out):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim_out)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)                                     # 2x (B, N, D_out)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, then back: (B, N, D) -> (B, N, D). Source: LDM's code."""

    def __init__(self, dim):
        super().__init__()
        # slot 1 is the official dropout
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(Tapped):
    """Self-attention, cross-attention, MLP, each on a LayerNorm and added back: (B, N, D) -> (B, N, D).

    Its eight taps are the transformer positions of the adapter paper; ca_c is the context (B, L, D_ctx) as this block
    alone sees it. Source: LDM §3.3 and figure 3.
    """

    def __init__(self, dim, num_heads, head_dim, context_dim):
        names = ("sa_in", "sa_out", "ca_in", "ca_c", "ca_out", "ffn_in", "ffn_out", "trans_out")
        super().__init__({name: context_dim if name == "ca_c" else dim for name in names})
        self.attn1 = CrossAttention(dim, dim, num_heads, head_dim)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, num_heads, head_dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x, context):
        x = self.tap("sa_in", x)
        h = self.norm1(x)
        x = self.tap("ca_in", self.tap("sa_out", self.attn1(h, h)) + x)
        context = self.tap("ca_c", context)
        x = self.tap("ffn_in", self.tap("ca_out", self.attn2(self.norm2(x), context)) + x)
        return self.tap("trans_out", self.tap("ffn_out", self.ff(self.norm3(x))) + x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the cells of a map, added to it: (B, C, H, W) -> (B, C, H, W). Source: LDM appendix E."""

    def __init__(self, channels, num_heads, head_dim, depth, context_dim):
        super().__init__()
        width = num_heads * head_dim
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)        # as published: 1e-6 here, 1e-5 everywhere else
        self.proj_in = nn.Conv2d(channels, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, head_dim, context_dim) for _ in range(depth))
        self.proj_out = nn.Conv2d(width, channels, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x))                                                  # (B, C, H, W)
        H, W = h.shape[2:]
        h = h.flatten(2).transpose(1, 2)                                                # (B, H*W, C)
        for block in self.transformer_blocks:
            h = block(h, context)                                                       # (B, H*W, C)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, (H, W)))                # (B, C, H, W)


# ----------------------------------------------------------------------------------------------------------------------
# the convolutional trunk

class ResBlock(Tapped):
    """Two convolutions, the timestep added in between: x (B, C_in, H, W), emb (B, E) -> (B, C_out, H, W).

    Source: DDPM appendix B; ADM's code.
    """

    def __init__(self, channels, emb_channels, out_channels):
        super().__init__({"res_in": channels, "res_out": out_channels})
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(                            # slot 2 is the official dropout
            nn.GroupNorm(GROUPS, out_channels), nn.SiLU(), nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        x = self.tap("res_in", x)
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]                  # (B, C_out, H, W)
        return self.tap("res_out", self.skip_connection(x) + self.out_layers(h))


class Downsample(nn.Module):
    """Half the side by a strided convolution, (B, C, H, W) -> (B, C, H/2, W/2). Source: DDPM's code."""

    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)                                                               # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Twice the side: nearest neighbour, then a convolution, (B, C, H, W) -> (B, C, 2H, 2W). Source: DDPM's code."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))              # (B, C, 2H, 2W)


class Stage(nn.Sequential):
    """Layers in a row; each gets what it needs of (h, emb, context). Source: ADM's code (TimestepEmbedSequential)."""

    def forward(self, h, emb, context):
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, context)
            else:
                h = layer(h)
        return h


# ----------------------------------------------------------------------------------------------------------------------
# the model

def check_sizes(model_channels, channel_mult, attention_resolutions, num_heads, num_head_channels):
    """Raises ValueError for sizes that do not fit together; arguments as in UNet. Source: LDM's code."""
    if (num_heads == -1) == (num_head_channels == -1):
        raise ValueError(f"num_heads {num_heads}, num_head_channels {num_head_channels}: exactly one must be -1")
    what, divisor = ("num_heads", num_heads) if num_head_channels == -1 else ("num_head_channels", num_head_channels)
    widths = [mult * model_channels for mult in channel_mult]
    for width in (model_channels, *widths):
        if width % GROUPS:
            raise ValueError(f"{width:g} channels are not a multiple of {GROUPS}, the number of GroupNorm groups: "
                             f"change model_channels {model_channels} or channel_mult {tuple(channel_mult)}")
    for width in widths:
        if width % divisor:
            raise ValueError(f"{width:g} channels are not divisible by {what} {divisor}: change one of them")
    factors = [2 ** level for level in range(len(channel_mult))]
    if not set(attention_resolutions) <= set(factors):
        raise ValueError(f"attention_resolutions {tuple(attention_resolutions)} must be down-sampling factors out of "
                         f"{factors} (1 = full size, 2 = half), not pixel sizes")


class UNet(nn.Module):
    """The conditional U-Net. The defaults are Stable Diffusion v1.

    in_channels, out_channels: C of x and of the answer; model_channels: the unit of width, a multiple of 32;
    channel_mult: width of each level in that unit, one entry per size of the map, the largest first;
    num_res_blocks: ResBlocks per level on the way down (one more on the way up);
    attention_resolutions: down-sampling factors (1, 2, 4, ...) of the levels with transformers (also in the middle);
    num_heads: attention heads at every width, or -1 and num_head_channels: channels per head at every width;
    transformer_depth: blocks per transformer; context_dim: width D_ctx of a text state; norm_groups: of each GroupNorm.
    Raises ValueError for sizes that do not fit together. Source: LDM §3.3, table 15 (appendix E).
    """

    matrices = r"(?:input_blocks\.(?!0\.)|middle_block\.|output_blocks\.)"              # Muon's share, see above

    def __init__(self, in_channels=4, out_channels=4, model_channels=320, channel_mult=(1, 2, 4, 4), num_res_blocks=2,
                 attention_resolutions=(1, 2, 4), num_heads=8, num_head_channels=-1, transformer_depth=1,
                 context_dim=768, norm_groups=GROUPS):
        super().__init__()
        check_sizes(model_channels, channel_mult, attention_resolutions, num_heads, num_head_channels)
        self.in_channels, self.out_channels, self.context_dim = in_channels, out_channels, context_dim
        self.model_channels, self.min_size = model_channels, 2 ** (len(channel_mult) - 1)
        emb_dim = 4 * model_channels

        def transformer(ch):
            heads = ch // num_head_channels if num_heads == -1 else num_heads
            return SpatialTransformer(ch, heads, ch // heads, transformer_depth, context_dim)

        levels = [(2 ** i, int(mult * model_channels), [transformer] * (2 ** i in attention_resolutions))
                  for i, mult in enumerate(channel_mult)]           # factor, width, attention or none
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, model_channels, 3, padding=1))])
        ch, skips = model_channels, [model_channels]                # width now; widths of the maps kept for the way up
        for factor, width, attention in levels:
            if factor > 1:
                self.input_blocks.append(Stage(Downsample(ch)))
                skips.append(ch)
            for _ in range(num_res_blocks):
                self.input_blocks.append(Stage(ResBlock(ch, emb_dim, width), *(make(width) for make in attention)))
                ch = width
                skips.append(ch)
        self.middle_block = Stage(ResBlock(ch, emb_dim, ch), transformer(ch), ResBlock(ch, emb_dim, ch))
        self.output_blocks = nn.ModuleList()
        for factor, width, attention in reversed(levels):
            for i in range(num_res_blocks + 1):
                stage = [ResBlock(ch + skips.pop(), emb_dim, width), *(make(width) for make in attention)]
                if factor > 1 and i == num_res_blocks:
                    stage.append(Upsample(width))
                self.output_blocks.append(Stage(*stage))
                ch = width
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, ch), nn.SiLU(), nn.Conv2d(ch, out_channels, 3, padding=1))
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = norm_groups     # no tensor depends on it, so names and official files stay the same
        self.initialize_weights()

    def initialize_weights(self):
        """Every initial value of the model, in one place. Source: DDPM's and LDM's code.

        | what                              | how                           | why                                     |
        | Linear and Conv2d                 | uniform +-1/sqrt(fan_in)      | PyTorch's own, as published             |
        | norms                             | weight 1, bias 0              | the same                                |
        | last convolution of each ResBlock | 0                             | each block begins as its skip           |
        | proj_out of each transformer      | 0                             | each transformer begins as the identity |
        | last convolution of the model     | 0                             | the first prediction is 0, loss is 1    |
        """
        zero = [self.out[2]]
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)):
                module.reset_parameters()
            elif isinstance(module, (ResBlock, SpatialTransformer)):
                zero.append(module.out_layers[3] if isinstance(module, ResBlock) else module.proj_out)
        for conv in zero:
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, x, t, context):
        """x (B, C, H, W), t (B,) steps 0..999 (fractions allowed), context (B, L, D_ctx) -> (B, C_out, H, W).

        Raises ValueError if H or W cannot be halved down to the lowest level, or D_ctx is wrong. Source: LDM figure 3.
        """
        if x.shape[2] % self.min_size or x.shape[3] % self.min_size:
            raise ValueError(f"a {x.shape[2]}x{x.shape[3]} map cannot be halved down to the lowest level: "
                             f"make height and width multiples of {self.min_size}")
        if context.dim() != 3 or context.shape[2] != self.context_dim:
            raise ValueError(f"context has shape {tuple(context.shape)}, this U-Net expects (batch, tokens, "
                             f"{self.context_dim}): change context_dim or the text encoder")
        t = timestep_embedding(t, self.model_channels)                                  # (B, model_channels)
        emb = self.time_embed(t.to(self.time_embed[0].weight.dtype))                    # (B, E)
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb, context)                                                  # (B, C_level, H/f, W/f)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)                 # (B, C_level, H/f, W/f)
        return self.out(h)                                                              # (B, C_out, H, W)


UNET_CONFIGS = {
    # Stable Diffusion v1: 64x64x4 latents, 77 CLIP states; 860 M parameters
    "SD-v1": dict(in_channels=4, out_channels=4, model_channels=320, channel_mult=(1, 2, 4, 4), num_res_blocks=2,
                  attention_resolutions=(1, 2, 4), num_heads=8, context_dim=768),
    # for 8x8 latents on a laptop, in_channels and out_channels follow the latents: widths 64, 96; 2.8 M parameters
    "unet-tiny": dict(model_channels=64, channel_mult=(1, 1.5), num_res_blocks=1, attention_resolutions=(1, 2),
                      num_heads=4, context_dim=64, norm_groups=8),
    # the same with widths 64, 128; 4.2 M parameters
    "unet-small": dict(model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2),
                       num_heads=4, context_dim=64, norm_groups=8),
}
