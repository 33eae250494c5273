"""What the studies of DiT and U-DiT share: rivals, latents that are made once, learning rates

Rivals: the class-conditional U-Net of latent diffusion, and U-ViT. Every arm has the learning rates
of train.py times a factor of RATES, which is chosen on a seed that no table uses (--tune).

    python -c "from studies.dit_rivals import ClassUNet, UViT"
"""
import functools
import math
import pathlib

import torch
from torch import nn

import data
import sample
from dit import DiT, LabelEmbedder
from evaluate import class_accuracy
from models import CONTINUOUS, FAMILIES, Family, class_conditional
from studies.common import heldout_loss, setup, train_and_watch
from tasks import macs
from train import Config
from unet import UNet

RATES, TUNING_SEED = (0.5, 1.0, 2.0), 1000
LITTLE = dict(num_res_blocks=1, attention_resolutions=(2,), num_heads=2, context_dim=64,
              norm_groups=2)
UNETS = {       # on 8x8 latents; within 2.5 % the MACs of DiT-64x2/2, DiT-96x3/2 and DiT-128x4/2
    "U-Net, 1.8 M": dict(LITTLE, model_channels=12, channel_mult=(1, 16 / 12)),
    "U-Net, 5.6 M": dict(LITTLE, model_channels=24, channel_mult=(1, 26 / 24)),
    "U-Net, 13.3 M": dict(LITTLE, model_channels=32, channel_mult=(1, 46 / 32))}


class ClassUNet(nn.Module):
    """The U-Net of unet.py for classes, as published for ImageNet: the embedding of the class is a
    context of one token, and attention is on all levels but the first. Source: LDM §4.3.1."""
    matrices = UNet.matrices.replace("(?:", r"unet\.(?:", 1)
    drop_labels, null_condition = DiT.drop_labels, DiT.null_condition

    def __init__(self, input_size, in_channels, num_classes, class_dropout_prob, **sizes):
        super().__init__()
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.can_guide = num_classes > 0 and class_dropout_prob > 0
        self.unet = UNet(in_channels, in_channels, **sizes)
        self.label = LabelEmbedder(num_classes, sizes["context_dim"], class_dropout_prob)

    def forward(self, x, t, y):
        return self.unet(x, t, self.label(y)[:, None])                          # (B, C, H, W)


class UViT(DiT):
    """A ViT with long skips: block k from the end also reads what block k from the start gave. The
    side stays the same; t and y are tokens. Source: Bao et al. 2022 (2209.12152) Fig. 1."""
    matrices = r"(blocks|skips)\."

    def __init__(self, hidden_size, depth, **more):
        super().__init__(hidden_size=hidden_size, depth=depth, conditioning="in_context",
                         learn_sigma=False, **more)
        self.skips = nn.ModuleList(nn.Linear(2 * hidden_size, hidden_size)
                                   for _ in range(depth // 2))
        self.initialize_weights()

    def forward(self, x, t, y):
        x, kept = self.patchify(x) + self.pos_embed, []                         # (B, N, D)
        tokens = torch.stack([self.t_embedder(t), self.y_embedder(y)], dim=1)   # (B, 2, D)
        N, x = x.shape[1], torch.cat([x, tokens], dim=1)                        # (B, N + 2, D)
        for i, block in enumerate(self.blocks):
            if i >= len(self.blocks) - len(self.skips):
                x = self.skips[len(kept) - 1](torch.cat([x, kept.pop()], dim=-1))
            x = block(x, None, tokens)
            if i < len(self.skips):
                kept.append(x)
        return self.unpatchify(self.final_layer(x[:, :N], None))                # (B, C, H, W)


def add_models(models):
    """Give train.py's table of models the rows of a study, {name: (family, sizes)}."""
    for family, Model in (("class-unet", ClassUNet), ("uvit", UViT)):
        FAMILIES.setdefault(family, Family(CONTINUOUS, class_conditional(Model), {}, "tiny-ae"))
    for name, (family, sizes) in models.items():
        FAMILIES[family].sizes[name] = sizes


# --------------------------------------------------------------------------------------------------
# one run

def latents(name, out, **stage):
    """Flags of train.py for the training pictures as latents. The first stage (stage: its flags)
    and the file of latents are made once, in OUT; delete OUT to begin anew."""
    path = pathlib.Path(out, "latents.npz")
    if not path.is_file():
        _, dataset, task = setup("DiT-32x1/2", out, data=name, first_stage="new", **stage)
        made = task.prepare(dataset, "cpu")
        data.save_latents(path, made.images.half(), made.labels, None, made.class_names)
    return {"data": f"latents:{path}", "first_stage": f"{out}/first_stage/ckpt.pt"}


@functools.lru_cache(2)
def test_pictures(name, count):
    """Pictures that were not trained on."""
    return data.load(name, split="test", count=count)


def run_model(model, name, out, stage, every, *, rate, count, levels, **flags):
    """Train a model on the latents of a data set -> (rows, task, averaged model).

    rate: a factor of both learning rates; count, levels: pictures and times of the held-out loss;
    flags: of train.py. A row is one of train_and_watch, with loss and sizes.
    """
    config, dataset, task = setup(model, out, **latents(name, out, **stage), lr=rate * Config.lr,
                                  muon_lr=rate * Config.muon_lr, **flags)
    test = test_pictures(name, count)
    x0 = task.encode(data.to_float(test.images))                                # (N, C, H, W)
    measure = lambda ema: {"loss": heldout_loss(task, ema, x0, test.labels, levels)}
    rows, ema = train_and_watch(config, dataset, task, every, measure)
    sizes = {"macs_m": macs(task) / 1e6, "params": sum(p.numel() for p in task.model.parameters())}
    return [{**row, **sizes} for row in rows], task, ema


def read(task, model, count=240, **how):
    """(share of samples of `shapes` with shape and colour right, share also legible)."""
    y = torch.arange(count) % 48
    rates = class_accuracy(sample.sample_all(task, model, y, **how)[1], y)
    return rates["all"][0], rates["legible_all"][0]


# --------------------------------------------------------------------------------------------------
# tables

def rate_of(table, model):
    """The factor of RATES with the lowest loss. Raises ValueError if one was not tried."""
    losses = {row["rate"]: row["loss"] for row in table.rows() if row["model"] == model}
    if not {*RATES} <= {*losses}:
        raise ValueError(f"{table.path} lacks rates of {model!r}: first run the study with --tune")
    return min(losses, key=losses.get)


def rates_text(table, models):
    """The factor of each arm, and for how many of them a larger one might be better still."""
    chosen = {model: rate_of(table, model) for model in models}
    edge = sum(rate == max(RATES) for rate in chosen.values())
    return (f"Learning rates, times those of train.py, of {', '.join(f'{r:g}' for r in RATES)} by "
            "the held-out loss of another seed: "
            + ", ".join(f"{model} {rate:g}" for model, rate in chosen.items())
            + f". {edge} of {len(chosen)} are the largest that was tried.\n")


def columns(table, names, models, **where):
    """{model: {name: {seed: value}}} of the rows that match, a row per seed, of the seeds that
    every model has; {} below two of these, which have no interval."""
    rows = [row for row in table.rows() if all(row[key] == value for key, value in where.items())]
    mine = {model: {row["seed"]: row for row in rows if row["model"] == model} for model in models}
    seeds = sorted(set.intersection(*(set(found) for found in mine.values())))
    return {model: {name: {seed: found[seed][name] for seed in seeds} for name in names}
            for model, found in mine.items()} if len(seeds) > 1 else {}


def log_gap(a, b):
    """{seed: log(a / b)}: about the relative difference of two losses {seed: loss}."""
    return {seed: math.log(a[seed] / b[seed]) for seed in a if seed in b}


def minus(a, b):
    """{seed: a - b}."""
    return {seed: a[seed] - b[seed] for seed in a if seed in b}
