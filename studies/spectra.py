"""Spectra of the maps inside a U-DiT: does its main path hold low frequencies? (notebooks/02_udit)

U-DiT §3.2 argues that features on a U-Net's main path are mostly low frequencies. The paper plots
no spectrum; these four functions do.

    python -c "from studies.spectra import low_share"
"""
import torch


@torch.no_grad()
def features(model, x, t, y):
    """Maps inside a UDiT for one batch, {name: (B, D, H', W')}: "skip" (the output of encoder 1),
    "latent", "backbone" (what is concatenated with the skip) and "decoder" (1).

    Source: FreeU, Si et al. 2023 (2309.11497) §3.
    """
    maps, where = {}, {"skip": model.encoder_level_1, "latent": model.latent,
                       "backbone": model.up2_1, "decoder": model.decoder_level_1}
    hooks = [module.register_forward_hook(
        lambda _, args, out, name=name: maps.update({name: out.permute(0, 3, 1, 2)}))
        for name, module in where.items()]
    model(x, t, y)
    for hook in hooks:
        hook.remove()
    return maps


def radial_spectrum(x):
    """Mean power of square maps x (B, C, S, S) at 0, 1, ..., S/2 cycles per side, (S/2 + 1,).

    All directions are averaged. White noise of variance 1 has power 1. Source: FreeU Fig. 3.
    """
    S = x.shape[-1]
    power = torch.fft.fft2(x).abs().square().mean((0, 1)) / S ** 2                      # (S, S)
    f = torch.fft.fftfreq(S, 1 / S, device=x.device)                                    # (S,)
    radius = torch.hypot(f[:, None], f[None]).round().long().flatten()                  # (S*S,)
    total, count = torch.bincount(radius, power.flatten()), torch.bincount(radius)
    return (total / count)[:S // 2 + 1]


def low_share(x):
    """Share of the energy of maps x (B, C, S, S), means removed, at |fx|, |fy| < 1/4 cycle a cell.

    In [0, 1]. A map of half the side can hold these frequencies. Source: U-DiT §3.2.
    """
    low = torch.fft.fftfreq(x.shape[-1], device=x.device).abs() < 0.25                  # (S,)
    power = torch.fft.fft2(x - x.mean((2, 3), keepdim=True)).abs().square()         # (B, C, S, S)
    return (power[..., low, :][..., low].sum() / power.sum()).item()


def frequency_response(kernel, size=32):
    """Mean gain of kernels (D, 1, k, k), such as Downsampler.kernel(): (size, size), lowest first.

    Source: U-DiT Table 7, which compares filters.
    """
    return torch.fft.fft2(kernel.detach()[:, 0], s=(size, size)).abs().mean(0)
