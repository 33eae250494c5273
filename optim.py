"""Optimizers: what happens between the gradient and the next step.

Papers: Muon (Jordan et al. 2024); AdamW (Loshchilov & Hutter 2019); averaged weights as in DiT §4.

The idea.  AdamW scales every number of a gradient by its own history. Muon looks at a whole matrix:
it replaces the update by the nearest orthogonal matrix, so that all directions are learned at the
same rate. Here Muon gets the matrices inside the blocks (`model.matrices`), AdamW the rest. What is
sampled from is the running average of the weights.

    python train.py --optimizer adamw                 # compare with the default, muon"""
import copy
import math
import re

import torch


def orthogonalise(G, steps=5):
    """Push the singular values of matrices G (n, rows, cols) to about 1, without an SVD: `steps`
    times X <- P X, P = a I + b A + c A^2, A = X X^T. Source: Jordan et al. 2024 (Newton-Schulz).
    If X is wide, all P are multiplied first: polynomials of one A commute, so the next A is P A P.
    Not in bfloat16, on cuda: A holds squares, and the small ones would be lost."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16() if G.is_cuda else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X                                                 # (n, min, max)
    A, Q, wide = X @ X.mT, None, X.shape[-1] > 1.5 * X.shape[-2]            # (n, min, min)
    for last in [False] * (steps - 1) + [True]:
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)                         # b A + c A^2
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        if wide and not G.is_cuda:
            Q, A = P if Q is None else P @ Q, A if last else P @ A @ P
        else:
            X = P @ X
            A = A if last else X @ X.mT
    X = X if Q is None else Q @ X
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalisation, of weights with two or more axes (flattened to matrices).
    Matrices of one shape are stacked and updated together; torch.optim.Muon takes them one by one,
    in bfloat16. Like torch's fused optimizers it does nothing when `found_inf` (0-dim) is 1.
    Source: Jordan et al. 2024; the factor sqrt(max(1, rows / cols)) is theirs."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self):
        keep = 1.0 - self.found_inf                                         # 0 = change nothing
        for group in self.param_groups:
            rate, stacks = group["lr"] * keep, {}
            for p in group["params"]:
                stacks.setdefault(p.shape, []).append(p)
            for shape, params in stacks.items():
                grads = torch.stack([p.grad for p in params]).where(keep > 0, 0.0)  # (n, *shape)
                momentum = self.state[params[0]].setdefault("momentum", torch.zeros_like(grads))
                momentum.lerp_(grads, (1 - group["momentum"]) * keep)       # one tensor per stack
                nesterov = grads.lerp(momentum, group["momentum"]).flatten(2)   # (n, rows, cols)
                scale = max(1, shape[0] / math.prod(shape[1:])) ** 0.5
                update = orthogonalise(nesterov).view_as(grads) * (scale * rate)
                if group["weight_decay"]:
                    torch._foreach_mul_(params, 1 - group["weight_decay"] * rate)
                torch._foreach_sub_(params, list(update.unbind()))


def make_optimizers(config, model):
    """[AdamW, Muon] over the parameters that learn; without --optimizer muon, AdamW has them all.
    New words of Custom Diffusion (names with ".rows.") get the rate config.word_lr."""
    matrices, words, rest = [], [], []
    for name, p in model.named_parameters():
        by_muon = config.optimizer == "muon" and p.dim() >= 2 and re.match(model.matrices, name)
        if p.requires_grad:
            (matrices if by_muon else words if ".rows." in name else rest).append(p)
    groups = [{"params": rest}, {"params": words, "lr": getattr(config, "word_lr", config.lr)}]
    if not (groups := [group for group in groups if group["params"]]):
        raise ValueError("--optimizer muon leaves nothing to adamw here: leave it out")
    fused, decay = next(model.parameters()).device.type in ("cuda", "cpu"), config.weight_decay
    adamw = torch.optim.AdamW(groups, lr=config.lr, weight_decay=decay, fused=fused)
    return [adamw, Muon(matrices, lr=config.muon_lr, weight_decay=decay)] if matrices else [adamw]


def load_moments(optimizer, saved):
    """Put back the state of a state_dict `saved`, but no rates. ValueError: of other weights."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, held in saved["state"].items():
        shape, count = params[i].shape, sum(p.shape == params[i].shape for p in params)
        wanted = ({"momentum": (count, *shape)} if "momentum" in optimizer.defaults else
                  {"step": (), "exp_avg": shape, "exp_avg_sq": shape})
        if {name: value.shape for name, value in held.items()} != wanted:
            raise ValueError(f"optimizer state of weight {i} is not {wanted}: start with --init")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})


def learning_rate(step, config):
    """Factor on every learning rate at a step: linear warm-up, then constant or cosine to zero."""
    warm, angle = min(1.0, (step + 1) / max(1, config.warmup)), math.pi * step / config.steps
    return warm if config.lr_decay == "constant" else warm * 0.5 * (1 + math.cos(angle))


def average_of(model):
    """A copy of `model` in which its weights are averaged; what does not learn is shared."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(ema, model, decay, keep):
    """ema += (1 - decay) * keep * (model - ema), keep (0-dim) 1 or 0. Buffers: as in model."""
    pairs = ((a, c) for a, c in zip(ema.parameters(), model.parameters()) if a is not c)
    averaged, current = zip(*pairs)
    delta = torch._foreach_sub(current, averaged)
    torch._foreach_mul_(delta, (1 - decay) * keep)
    torch._foreach_add_(averaged, delta)
    for a, c in zip(ema.buffers(), model.buffers()):
        a.copy_(c)


def update(config, model, ema, optimizers, step, vectors=()):
    """Everything after backward: rate, clipping, optimizers, codebook, average.
    vectors: parts (n, D) of what the codebook of a VQ-VAE learns from; else none. A gradient that
    is not finite changes nothing. Returns (gradient norm, 1 if the step was taken else 0)."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    keep = torch.isfinite(norm).float()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * learning_rate(step, config)
        plain = optimizer.defaults.get("fused") is False        # AdamW on mps reads no found_inf
        optimizer.found_inf = None if plain else 1.0 - keep
        if not plain or keep:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if vectors:
        model.codebook.update(torch.cat(vectors), keep, step)
    update_ema(ema, model, min(config.ema, (1 + step) / (10 + step)), keep)
    return norm.float(), keep
