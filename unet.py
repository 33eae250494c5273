"""The conditional U-Net of latent diffusion (Stable Diffusion v1), with named tensors for adapters.

Paper: High-Resolution Image Synthesis with Latent Diffusion Models (LDM; Rombach et al. 2022, arXiv
2112.10752). Convolutions as in DDPM (Ho et al. 2020) and ADM (Dhariwal & Nichol 2021).

The idea.  A denoiser that sees the picture at several sizes. On the way down, residual blocks work
on smaller and wider maps; on the way up, each block also gets the map of its size from the way down
(the skip connection), so no detail is lost. Two inputs steer it:
  the timestep t   becomes a vector emb, added to the feature maps inside every ResBlock
  the text         is a sequence of vectors, context (B, L, D_ctx). In a transformer block each cell
                   of the map is a token, which attends to the other cells (self-attention), then to
                   the words (cross-attention). Only to_k and to_v read the words:
                   custom_diffusion.py trains just these, adapters.py adds to the blocks.

    python train.py --model unet-tiny --data scenes    # captions to pictures of shapes, on a CPU

Differences from the official code (CompVis/latent-diffusion; same names, order and numbers):
1. Only what Stable Diffusion v1 uses: no dropout (an empty slot keeps the names), scale-shift norm,
   class label, resampling ResBlock, fp16 or older attention block. A context is always required.
2. channel_mult may hold fractions and begin with any number (official: 1).
3. attention_resolutions are checked: given pixel sizes, the official code builds no attention.
4. norm_groups may be below the published 32: with 32 groups for 32 channels each group is one
   channel, and normalising it removes the constant that t adds, so the block would ignore t."""
from collections import OrderedDict

import torch
import torch.nn as nn

from diffusion import timestep_embedding


class CrossAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v in heads, x (B, N, query_dim) -> like x. q comes from x, k and v
    from context (B, L, context_dim), x if self-attention. Source: LDM §3.3; Vaswani 2017 Eq. 1."""

    def __init__(self, query_dim, context_dim, num_heads, head_dim):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(query_dim, num_heads * head_dim, bias=False)
        self.to_k = nn.Linear(context_dim, num_heads * head_dim, bias=False)
        self.to_v = nn.Linear(context_dim, num_heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(num_heads * head_dim, query_dim))

    def forward(self, x, context):
        q, k, v = (u.unflatten(2, (self.num_heads, -1)).transpose(1, 2)     # (B, h, N or L, d)
                   for u in (self.to_q(x), self.to_k(context), self.to_v(context)))
        x = nn.functional.scaled_dot_product_attention(q, k, v)                 # (B, h, N, d)
        return self.to_out(x.transpose(1, 2).flatten(2))                        # (B, N, query_dim)


class Tapped(nn.Module):
    """A block whose named tensors pass through `tap`, where an adapter can read or change them.
    taps: name -> channels, in the order of computation. adapter: None, or an nn.Module with
    forward(name, x) -> tensor like x, called once per tap; the block goes on with what it returns.
    `block.adapter = None` removes it. Source: Xiang et al. 2023 (arXiv 2303.18181) Fig. 4."""

    def __init__(self, taps):
        super().__init__()
        self.taps = taps
        self.register_module("adapter", None)

    def tap(self, name, x):
        return x if self.adapter is None else self.adapter(name, x)


class TransformerBlock(Tapped):
    """Self-attention, cross-attention, MLP, each on a LayerNorm and added: (B, N, D) -> (B, N, D).
        sa_out  = attn1(LN(sa_in))         ca_in     = sa_out + sa_in
        ca_out  = attn2(LN(ca_in), ca_c)   ffn_in    = ca_out + ca_in
        ffn_out = ff(LN(ffn_in))           trans_out = ffn_out + ffn_in
    These are its taps; ca_c is the context (B, L, D_ctx). Source: LDM §3.3; Xiang et al. Fig. 4."""

    def __init__(self, dim, num_heads, head_dim, context_dim):
        names = ("sa_in", "sa_out", "ca_in", "ca_c", "ca_out", "ffn_in", "ffn_out", "trans_out")
        super().__init__({name: context_dim if name == "ca_c" else dim for name in names})
        self.attn1 = CrossAttention(dim, dim, num_heads, head_dim)
        layers = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))
        self.ff = nn.Sequential(OrderedDict(net=layers))        # as published; Identity: dropout
        self.attn2 = CrossAttention(dim, context_dim, num_heads, head_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x, context):
        x = self.tap("sa_in", x)
        h = self.norm1(x)
        x = self.tap("ca_in", self.tap("sa_out", self.attn1(h, h)) + x)
        context = self.tap("ca_c", context)
        x = self.tap("ffn_in", self.tap("ca_out", self.attn2(self.norm2(x), context)) + x)
        return self.tap("trans_out", self.tap("ffn_out", self.ff(self.norm3(x))) + x)


class GEGLU(nn.Module):
    """value * GELU(gate), (B, N, D) -> (B, N, D_out). Source: Shazeer 2020 §2."""

    def __init__(self, dim, dim_out):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim_out)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)                             # 2x (B, N, D_out)
        return value * nn.functional.gelu(gate)


class SpatialTransformer(nn.Module):
    """A transformer block over the cells of a map (B, C, H, W), added to it. Source: LDM §3.3."""

    def __init__(self, channels, num_heads, head_dim, context_dim, norm_groups=32):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)       # as published, else 1e-5
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = TransformerBlock(channels, num_heads, head_dim, context_dim)
        self.transformer_blocks = nn.ModuleList([block])        # one; in a list, as published
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)               # (B, H*W, C)
        h = self.transformer_blocks[0](h, context)                              # (B, H*W, C)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))   # (B, C, H, W)


class ResBlock(Tapped):
    """Two convolutions, t added between: x (B, C, H, W), emb (B, E) -> (B, C_out, H, W).
    Taps: res_in, the input of both branches, and res_out, their sum. Source: DDPM appendix B."""

    def __init__(self, channels, emb_channels, out_channels, norm_groups=32):
        super().__init__({"res_in": channels, "res_out": out_channels})
        self.in_layers = nn.Sequential(nn.GroupNorm(norm_groups, channels), nn.SiLU(),
                                       nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(norm_groups, out_channels), nn.SiLU(), nn.Identity(),  # official: dropout
            nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        x = self.tap("res_in", x)
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]          # (B, C_out, H, W)
        return self.tap("res_out", self.skip_connection(x) + self.out_layers(h))


class Stage(nn.Sequential):
    """Layers in a row; each gets what it reads of h, emb and context. Source: ADM appendix A."""

    def forward(self, h, emb, context):
        reads = {ResBlock: [emb], SpatialTransformer: [context]}
        for layer in self:
            h = layer(h, *reads.get(type(layer), []))
        return h


class UNet(nn.Module):
    """The conditional U-Net. The defaults are Stable Diffusion v1.
    channel_mult: width of each level in units of model_channels, the largest map first;
    num_res_blocks: per level on the way down, one more on the way up; attention_resolutions: down-
    sampling factors (1, 2, 4, ...) of the levels with transformers, the middle always has one;
    context_dim: width D_ctx of a text state. Source: LDM Eq. 3, §3.3, Table 15."""
    # what Muon (optim.py) trains: all but the first and last convolution and the timestep MLP
    matrices = r"(?:input_blocks\.(?!0\.)|middle_block\.|output_blocks\.)"

    def __init__(self, in_channels=4, out_channels=4, model_channels=320, channel_mult=(1, 2, 4, 4),
                 num_res_blocks=2, attention_resolutions=(1, 2, 4), num_heads=8, context_dim=768,
                 norm_groups=32):
        super().__init__()
        for width in (mult * model_channels for mult in channel_mult):
            if width % num_heads:
                raise ValueError(f"{width:g} channels are not a multiple of num_heads {num_heads}")
        factors = [2 ** level for level in range(len(channel_mult))]
        if not set(attention_resolutions) <= set(factors):
            raise ValueError(f"attention_resolutions {tuple(attention_resolutions)} must be down-"
                             f"sampling factors out of {factors} (1 = full size), not pixel sizes")
        self.context_dim, self.model_channels = context_dim, model_channels
        self.in_channels, self.min_size, emb_dim = in_channels, factors[-1], 4 * model_channels
        def layers(ch_in, ch, attend):
            stage = [ResBlock(ch_in, emb_dim, ch, norm_groups)]
            sizes = ch, num_heads, ch // num_heads, context_dim, norm_groups
            return [*stage, SpatialTransformer(*sizes)] if attend else stage
        levels = [(int(mult * model_channels), factor in attention_resolutions)
                  for mult, factor in zip(channel_mult, factors)]   # width, and whether it attends
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.build_blocks(levels, num_res_blocks, layers)
        self.out = nn.Sequential(nn.GroupNorm(norm_groups, levels[0][0]), nn.SiLU(),
                                 nn.Conv2d(levels[0][0], out_channels, 3, padding=1))
        self.initialize_weights()

    def build_blocks(self, levels, num_res_blocks, layers):
        """Add the blocks; layers(ch_in, ch, attend) makes those of a stage. Source: LDM Fig. 3."""
        ch = self.model_channels                        # width of the current map
        skips = [ch]                                    # widths of the maps kept for the way up
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(self.in_channels, ch, 3, padding=1))])
        for level, (width, attend) in enumerate(levels):
            if level > 0:
                half = nn.Conv2d(ch, ch, 3, stride=2, padding=1)        # (B, C, H/2, W/2)
                self.input_blocks.append(Stage(nn.Sequential(OrderedDict(op=half))))
                skips.append(ch)
            for _ in range(num_res_blocks):
                self.input_blocks.append(Stage(*layers(ch, width, attend)))
                skips.append(ch := width)
        self.middle_block = Stage(*layers(ch, ch, True), *layers(ch, ch, False))
        self.output_blocks = nn.ModuleList()
        for level, (width, attend) in reversed(list(enumerate(levels))):
            for i in range(num_res_blocks + 1):
                stage = layers(ch + skips.pop(), width, attend)
                if level > 0 and i == num_res_blocks:
                    larger = nn.Upsample(scale_factor=2, mode="nearest")        # (B, C, 2H, 2W)
                    conv = nn.Conv2d(width, width, 3, padding=1)
                    stage.append(nn.Sequential(OrderedDict(larger=larger, conv=conv)))
                self.output_blocks.append(Stage(*stage))
                ch = width

    def forward(self, x, t, context):
        """x (B, C, H, W), t (B,) in 0..999, context (B, L, D_ctx) -> (B, C_out, H, W)."""
        if x.shape[2] % self.min_size or x.shape[3] % self.min_size:
            raise ValueError(f"sides {tuple(x.shape[2:])} must be multiples of {self.min_size}")
        if context.dim() != 3 or context.shape[2] != self.context_dim:
            raise ValueError(f"context has shape {tuple(context.shape)}, expected (batch, tokens, "
                             f"{self.context_dim}): change context_dim or the text encoder")
        t = timestep_embedding(t, self.model_channels)                          # (B, ch)
        emb = self.time_embed(t.to(self.time_embed[0].weight.dtype))            # (B, E)
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb, context)                                          # (B, C_i, H/f, W/f)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)         # (B, C_i, H/f, W/f)
        return self.out(h)                                                      # (B, C_out, H, W)

    def initialize_weights(self):
        """Every initial value of the model, in one place. Source: DDPM's and LDM's code.
        | what                           | how                      | why                     |
        | Linear and Conv2d              | uniform +-1/sqrt(fan_in) | PyTorch's, as published |
        | norms                          | weight 1, bias 0         | only normalise at first |
        | last convolution of a ResBlock | 0                        | first output: its skip  |
        | proj_out of a transformer      | 0                        | first output: its input |
        | last convolution of the model  | 0                        | first output: 0         |"""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)):
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if "out_layers.3." in name or "proj_out." in name or name.startswith("out.2."):
                nn.init.zeros_(parameter)


# what the two for 8x8 latents on a CPU share (in_channels, out_channels: those of the latents)
LITTLE = dict(model_channels=64, num_res_blocks=1, attention_resolutions=(1, 2), num_heads=4,
              context_dim=64, norm_groups=8)
UNET_CONFIGS = {
    "SD-v1": dict(),        # the defaults: for 64x64x4 latents, 77 CLIP states; 860 M parameters
    "unet-tiny": dict(LITTLE, channel_mult=(1, 1.5)),       # 2.8 M parameters
    "unet-small": dict(LITTLE, channel_mult=(1, 2))}        # 4.2 M: the lower level is wider
