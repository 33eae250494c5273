"""Where a U-Net looks for each word of a caption: maps for the lectures.

Adapters read and add to cross-attention, and Custom Diffusion changes its keys and values: a map
shows which part of the picture a word reaches.

    maps = word_attention(model.denoiser, x, t, model.text(ids))        # (B, L, H, W)
"""
import torch
import torch.nn.functional as F


@torch.no_grad()
def word_attention(unet, x, t, context):
    """How much each cell of a picture attends to each text state, at one step of denoising: the
    softmax of all cross-attentions, mean over heads and layers -> (B, L, H, W), its sum over L is 1
    in every cell. Smaller maps are enlarged to the size of x. x, t, context: as of UNet.forward.
    Source: LDM §3.3 (the softmax); Tang et al. 2022 (arXiv 2210.04885) §2.2 (the mean)."""
    maps, (H, W) = [], x.shape[2:]

    def record(layer, inputs, out):
        # q (B, h, N, d), k (B, h, L, d)
        q, k = (u.unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
                for u in (layer.to_q(inputs[0]), layer.to_k(inputs[1])))
        weights = (q @ k.mT / q.shape[3] ** 0.5).softmax(dim=3).mean(dim=1)     # (B, N, L)
        factor = round((H * W / weights.shape[1]) ** 0.5)       # this layer's map is H/f x W/f
        cells = weights.float().mT.unflatten(2, (H // factor, W // factor))     # (B, L, H/f, W/f)
        maps.append(F.interpolate(cells, (H, W), mode="bilinear"))              # (B, L, H, W)
    hooks = [module.register_forward_hook(record) for name, module in unet.named_modules()
             if name.endswith(".attn2")]
    try:
        unet(x, t, context)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(maps) / len(maps)
