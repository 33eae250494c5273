"""LoRA on keys and values, which the study of adapters compares them with.

    python -m studies.adapter_sweep                 # the study that uses this
"""
import math

import torch.nn as nn
from torch.nn.utils import parametrize

from adapters import rank_of
from unet import TransformerBlock


class LowRank(nn.Module):
    """W -> W + scale * up @ down for a weight W (d_out, d_in), rank << d. Source: LoRA §4.1."""

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
    """Low-rank updates of every to_k and to_v that reads text states; the rest is frozen. rank,
    budget: as in add_adapters. Returns the parameters to train. Source: LoRA (Hu et al. 2021) §4.
    """
    layers = [layer for m in unet.modules() if isinstance(m, TransformerBlock)
              for layer in (m.attn2.to_k, m.attn2.to_v)]
    rank = rank_of(rank, budget, lambda r: r * sum(sum(layer.weight.shape) for layer in layers))
    unet.requires_grad_(False)
    updates = [LowRank(layer.weight, rank, scale) for layer in layers]
    for layer, update in zip(layers, updates):
        parametrize.register_parametrization(layer, "weight", update)
    return [p for update in updates for p in update.parameters()]
