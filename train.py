"""Training: one loop for every model of this repository.

    python train.py                                    # a class-conditional DiT on `shapes`: five minutes on a laptop
    python train.py --recipe paper                     # the same model as the DiT paper trains it: AdamW, eps, linear
    python train.py --model DiT-S/2 --data cifar10     # the paper's smallest DiT on 32x32 photographs, on one GPU
    python train.py --data folder:my_pictures --out out/mine --steps 20000
    python train.py --out out/mine --resume            # after Ctrl-C, SIGTERM, or a crash: bit for bit the same run
    torchrun --nproc-per-node 2 train.py ...           # data-parallel: the same run on more devices

The idea.  A task says what a step is: `draw` takes every random number of the step at once, `loss` is then a pure
function of tensors. `train` is the loop, and does not ask which task it runs. Because step s draws from a generator
seeded by (seed, s), and batch s is a function of (seed, s), the state of a run is its tensors and the number s. Hence
exact resume in a few lines, and the same result on one device or several: each draws the noise of the whole batch and
keeps its own rows.

Contents: Config, checkpoints, Muon, the tasks (tiny autoencoder; diffusion with a DiT), the loop, the benchmark.
In the output folder: ckpt.pt, config.json, log.csv, loss.png, samples/000500.png (EMA weights, always the same seeds).
"""
import argparse
import copy
import csv
import dataclasses
import difflib
import json
import math
import os
import pathlib
import pickle
import re
import signal
import sys
import time
import zipfile
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data as data_module
from data import Batches, save_grid, to_float, to_uint8
from diffusion import GaussianDiffusion, RectifiedFlow, randn
from dit import DIT_CONFIGS, DiT, dit_config
from text import TextEncoder, WordTokenizer
from unet import UNET_CONFIGS, UNet
from vae import TinyAutoencoder


# ----------------------------------------------------------------------------------------------------------------------
# configuration: one dataclass; every field is a flag, its default stands here and nowhere else

def flag(default, help, **choices):
    """A dataclass field that becomes a flag: its default, its words in --help, and choices=[...] if values are few."""
    return dataclasses.field(default=default, metadata={"help": help, **choices})


@dataclasses.dataclass
class Config:
    """Everything that defines a run. The defaults are the five-minute run."""
    model: str = flag("DiT-128x4/2", "DiT-S/2 ... DiT-XL/8 of the paper, DiT-WxD/p (width, depth, patch), or tiny-ae "
                                     "(an autoencoder)")
    data: str = flag("shapes", "shapes, scenes, mnist, fashion, cifar10, emoji, folder:PATH (class sub-folders, "
                               "captions, or flat), latents:PATH")
    data_dir: str = flag("data", "where official files are looked for, and downloaded to when asked for by name")
    image_size: int = flag(32, "side of the training pictures in pixels")
    hold_out: bool = flag(False, "shapes, scenes: keep six shape-colour pairs out of training, to test composition")
    skip_bad: bool = flag(False, "folder: drop unreadable images and count them, instead of stopping")
    flip: str = flag("auto", "mirror pictures at random: on, off, auto (off where left and right mean something: "
                             "captions, shapes, digits)", choices=["auto", "on", "off"])
    recipe: str = flag("fast", "a set of defaults; any flag that you give wins", choices=["fast", "paper"])
    first_stage: str = flag("auto", "what DiT runs on: tiny (latents of a small autoencoder, trained first), none "
                                    "(pixels), a tiny-ae checkpoint, or auto (tiny for shapes and scenes, none "
                                    "otherwise)")
    first_stage_steps: int = flag(500, "optimizer steps of --first-stage tiny")
    latent_channels: int = flag(4, "channels of the tiny autoencoder's latents")
    latent_noise: float = flag(0.3, "noise that its decoder learns to undo, as a share of the latents' spread")
    factor: int = flag(4, "how much smaller its latents are, per side")
    conditioning: str = flag("adaln_zero", "DiT block",
                             choices=["adaln_zero", "adaln", "cross_attention", "in_context"])
    class_dropout: float = flag(0.1, "share of labels or captions hidden in training, for guidance")
    schedule: str = flag("flow", "flow (straight lines, velocity) or a Gaussian schedule",
                         choices=["flow", "linear", "cosine", "scaled_linear"])
    prediction: str = flag("eps", "Gaussian schedules: what the network predicts", choices=["eps", "v", "x0"])
    learn_sigma: bool = flag(False, "Gaussian schedules: also learn the variance")
    steps: int = flag(1000, "optimizer steps")
    batch_size: int = flag(64, "pictures per optimizer step, over all devices")
    accum: int = flag(1, "split each batch into so many micro-batches (less memory, same result)")
    optimizer: str = flag("muon", "muon (on the matrices inside the blocks; AdamW on the rest) or adamw (on "
                                  "everything)", choices=["muon", "adamw"])
    lr: float = flag(2e-3, "learning rate of AdamW")
    muon_lr: float = flag(0.02, "learning rate of Muon")
    weight_decay: float = flag(0.0, "decoupled weight decay")
    warmup: int = flag(30, "steps of linear warm-up")
    lr_decay: str = flag("cosine", "after the warm-up: cosine to zero, or constant", choices=["cosine", "constant"])
    grad_clip: float = flag(1.0, "largest gradient norm; 0 = no clipping")
    ema: float = flag(0.99, "decay of the averaged weights, min(ema, (1+s)/(10+s)) at step s")
    cfg_scale: float = flag(2.0, "guidance of the previews; 1 = none")
    seed: int = flag(0, "of weights, data order and noise")
    device: str = flag("auto", "auto, cpu, cuda or mps", choices=["auto", "cpu", "cuda", "mps"])
    compile: str = flag("auto", "torch.compile the model: on, off, auto (on for cuda)", choices=["auto", "on", "off"])
    out: str = flag("", "output folder; default out/MODEL-DATA")
    resume: bool = flag(False, "continue the run in --out")
    init: str = flag("", "start from the (EMA) weights of this checkpoint")
    log_every: int = flag(10, "steps between rows of log.csv")
    sample_every: int = flag(500, "steps between previews; 0 = only at the end")
    save_every: int = flag(500, "steps between checkpoints")
    overfit_batch: bool = flag(False, "self-check: one batch with fixed noise again and again; its loss must fall "
                                      "below 5 %%")
    bench: int = flag(0, "time this many steps, print throughput against the machine's matrix-product peak, and stop")


RECIPES = {  # what a recipe or a model changes among the defaults above
    "fast": {},
    # DiT §4
    "paper": dict(schedule="linear", prediction="eps", learn_sigma=True, optimizer="adamw", lr=1e-4,
                  lr_decay="constant", warmup=0, grad_clip=0.0, ema=0.9999),
    "tiny-ae": dict(steps=500),
    "unet-tiny": dict(steps=2500, latent_channels=6, latent_noise=0.2, first_stage_steps=800, cfg_scale=3.0)}
RECIPES["unet-small"] = RECIPES["unet-tiny"]


class UserError(ValueError):
    """Something that the person at the keyboard can mend: shown as one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are one line like all others."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


class HelpFormat(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help keeps the docstring's lines and shows every default."""


def parse(cls, argv, description, presets=lambda args: {}):
    """Command line -> cls. Flags are its fields with dashes (underscores will do); `presets(args)` may shift defaults.

    Exits with code 2 and one line for an unknown flag (naming the nearest) or a bad value.
    """
    def read(defaults):
        parser = Parser(description=description, formatter_class=HelpFormat, allow_abbrev=False)
        for f in dataclasses.fields(cls):
            boolean = isinstance(f.default, bool)
            how = dict(action=argparse.BooleanOptionalAction) if boolean else dict(type=type(f.default))
            if "choices" in f.metadata:
                how["choices"] = f.metadata["choices"]
            parser.add_argument("--" + f.name.replace("_", "-"), default=defaults.get(f.name, f.default),
                                help=f.metadata["help"], **how)
        dashed = [re.sub(r"^(--[^=]*)", lambda m: m[1].replace("_", "-"), a) for a in argv]
        args, unknown = parser.parse_known_args(dashed)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], list(parser._option_string_actions), 1)
            hint = f": did you mean {near[0]}?" if near else ": see --help"
            raise UserError(f"unknown argument {unknown[0]!r}" + hint)
        return cls(**vars(args))
    return read(presets(read({})))


def resolve_device(name):
    """auto -> cuda, mps or cpu; anything asked for by name must be there. Raises UserError otherwise."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(k for k, there in have.items() if there)
    if not have[name]:
        raise UserError(f"--device {name}: this machine or this build of torch has none; leave the flag out, or say "
                        "--device cpu")
    return name


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints: a plain dict of tensors and builtins, written whole or not at all, read without running any code in it

def save_checkpoint(path, state):
    """Write atomically: a crash, a kill or a full disk leaves the old file as it was. Raises UserError if it cannot."""
    path = pathlib.Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:        # torch reports a failed write as RuntimeError
        part.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"could not write {path} ({reason}); the previous checkpoint, if any, is intact") from error


def load_checkpoint(path):
    """A checkpoint of ours, or an official file, as {"model": state_dict, ...}; DDP and compile prefixes are stripped.

    Official: a bare state_dict or {"ema" | "model" | "state_dict": ...}. Raises UserError for a missing, damaged or
    unsafe file.
    """
    if not pathlib.Path(path).is_file():
        hint = ": train first (python train.py)" if "ckpt.pt" in str(path) else ""
        raise UserError(f"no checkpoint at {path}" + hint)
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip() is not None:
            raise UserError(f"{path} is damaged (a checksum inside it does not match): copy or download it again")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors and plain values, so it was not loaded (it could run code). "
                        "If you trust its source: x = torch.load(path, "
                        "weights_only=False); torch.save({'model': x['ema']}, new_path)") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path} is not a readable checkpoint (truncated, or another kind of file): "
                        f"{reason}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    if "format" in state:
        return state
    weights = next((state[k] for k in ("ema", "model", "state_dict") if isinstance(state.get(k), dict)), state)
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in weights.items() if torch.is_tensor(v)}
    return {"model": weights, "ema": weights}


def load_weights(model, weights, path):
    """Copy a state_dict into model. Raises UserError with the first five names that do not fit, and both shapes."""
    have = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in weights.items()}
    wrong = [f"{k}: file {given.get(k, 'has none')}, model {have.get(k, 'has none')}"
             for k in sorted(have.keys() | given.keys()) if have.get(k) != given.get(k)]
    if wrong:
        raise UserError(f"{path} does not fit this model, {len(wrong)} tensors differ: " + "; ".join(wrong[:5]))
    model.load_state_dict(weights)


# ----------------------------------------------------------------------------------------------------------------------
# Muon: every matrix's update is replaced by the nearest orthogonal one, so that all directions learn at the same pace

@torch.no_grad()
def orthogonalise(G, steps=5):
    """Push the singular values of matrices G (n, rows, cols) to about 1 without an SVD.

    Source: Jordan et al. 2024 (Newton-Schulz quintic).
    """
    X = G.bfloat16() if G.is_cuda else G        # bfloat16 is five times slower than float32 on a CPU
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    for _ in range(steps):
        A = X @ X.mT                                                                        # (n, min, min)
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalisation, for weights with two or more axes (all but the first are flattened).

    torch.optim.Muon does one matrix at a time and in bfloat16, which costs a CPU more than the forward pass; here equal
    shapes are stacked. Like torch's fused optimizers it skips the step when its `found_inf` (a 0-dim tensor on the
    device) is 1. Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers"; scale sqrt(max(1, rows/cols)).
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self):
        """One update of every parameter. Source: Jordan et al. 2024."""
        keep = 1.0 - self.found_inf                                                         # 0 = change nothing
        for group in self.param_groups:
            stacks = {}
            for p in group["params"]:
                stacks.setdefault(p.shape, []).append(p)
            for shape, params in stacks.items():
                grads = torch.stack([p.grad for p in params])                               # (n, *shape)
                grads = torch.where(keep > 0, grads, 0.0)
                state = self.state[params[0]]                                               # one tensor for the stack
                momentum = state.setdefault("momentum", torch.zeros_like(grads))            # (n, *shape)
                momentum.lerp_(grads, (1 - group["momentum"]) * keep)
                update = orthogonalise(grads.lerp(momentum, group["momentum"]).flatten(2))  # (n, rows, cols), Nesterov
                update = update.view_as(grads) * max(1, shape[0] / math.prod(shape[1:])) ** 0.5
                for p, u in zip(params, update):
                    p.sub_((u + group["weight_decay"] * p) * (group["lr"] * keep))


# ----------------------------------------------------------------------------------------------------------------------
# tasks: build(config, info) -> model, prepare, draw, loss, preview. `info` says what the data look like (see describe)

class AutoencoderTask:
    """Train a TinyAutoencoder to give pictures back. Source: vae.py; LDM §3.1."""
    def __init__(self, config, info):
        self.config, self.info = config, info
        if info["image_size"] % config.factor:
            raise UserError(f"image size {info['image_size']} is not divisible by the autoencoder's factor "
                            f"{config.factor}")
        self.model = TinyAutoencoder(info["channels"], config.latent_channels, config.factor)
        side = info["image_size"] // config.factor
        self.latent_shape = (config.latent_channels, side, side)

    def prepare(self, dataset, device):
        return dataset

    def macs(self):
        """Multiply-accumulates of one forward of one picture. Source: torch.utils.flop_counter (2 flops each)."""
        meta = copy.deepcopy(self.model).to("meta")
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            picture = torch.zeros(1, self.info["channels"], *[self.info["image_size"]] * 2)
            meta(picture, torch.zeros(1, *self.latent_shape))
        return counter.get_total_flops() // 2

    def draw(self, n, generator, device):
        return {"noise": randn((n, *self.latent_shape), generator, device),
                "flip": torch.rand(n, generator=generator, device=device)}

    def loss(self, net, batch):
        recon, z = net(to_float(batch["x"]), batch["noise"], self.config.latent_noise)
        mse = (recon.float() - to_float(batch["x"])).square().mean()
        psnr = 10 * torch.log10(4 / mse.detach())
        # the small pull keeps latents bounded; see vae.py
        return mse + 1e-4 * z.float().square().mean(), {"mse": mse.detach(), "psnr": psnr}

    def preview(self, model, dataset, device, path):
        x = to_float(dataset.images[:32]).to(device)
        pairs = torch.stack([x, model.decode(model.encode(x)).clamp(-1, 1)], 1)         # (32, 2, C, H, W)
        rows = pairs.flatten(0, 1)                                                      # (64, C, H, W)
        save_grid(rows.cpu(), path, nrow=16, scale=2)

    def state(self):
        return {}


class TextToImage(nn.Module):
    """A text encoder and a U-Net: model(x (B, C, H, W), t (B,), ids (B, L) or encoded text (B, L, D_ctx)) -> like x.

    null_ids: the empty caption's ids (L,), which stands in for a share class_dropout_prob of captions, so that guidance
    has something to compare with. Source: LDM §3.3.
    """
    matrices = rf"unet\.{UNet.matrices}|text\.text_model\.encoder\.layers\."         # Muon's share

    def __init__(self, unet, text, null_ids, class_dropout_prob):
        super().__init__()
        self.unet, self.text, self.class_dropout_prob = unet, text, class_dropout_prob
        self.register_buffer("null_ids", null_ids, persistent=False)

    def forward(self, x, t, y):
        context = y if y.is_floating_point() else self.text(y)                          # (B, L, D_ctx)
        return self.unet(x.to(context.dtype), t, context)                               # (B, C, H, W)

    def null_condition(self, count, device="cpu"):
        """The empty caption, (count, L)."""
        return self.null_ids.to(device).expand(count, -1)

    def drop_labels(self, ids, draws):
        """Replace captions ids (B, L) by the empty one where draws (B,), uniform in [0, 1), are small."""
        return torch.where((draws < self.class_dropout_prob)[:, None], self.null_ids, ids)


class DiffusionTask:
    """Train and sample a diffusion model, on pixels or on the latents of a frozen first stage.

    model: model(x, t, y) with y classes (B,) or, with a tokenizer, caption ids (B, L). It also answers
    null_condition(count, device) and drop_labels(y, draws). Raises UserError for flags that clash.
    Source: DiT §3; LDM §3.
    """

    def __init__(self, config, info, model, first_stage=None, tokenizer=None):
        self.config, self.info, self.model = config, info, model
        self.first_stage, self.tokenizer = first_stage, tokenizer
        if config.schedule == "flow" and config.learn_sigma:
            raise UserError("--learn-sigma belongs to a Gaussian schedule: add --schedule linear or cosine")
        self.process = RectifiedFlow() if config.schedule == "flow" else GaussianDiffusion(
            schedule=config.schedule, prediction=config.prediction, learn_sigma=config.learn_sigma)
        self.shape = model_shape(info, first_stage)

    @torch.no_grad()
    def prepare(self, dataset, device):
        """Pictures -> what DiT is trained on: with a first stage, all latents at once, so no step encodes anything."""
        if self.tokenizer is not None:
            dataset = dataclasses.replace(dataset, labels=self.tokenizer(dataset.captions))     # (N, L)
        if self.first_stage is None:
            return dataset
        vae, x = self.first_stage.to(device), dataset.images
        x = torch.cat([x, x.flip(-1)]) if dataset.flip else x      # a latent cannot be mirrored: mirror before encoding
        if bool((vae.std == 1).all()):
            vae.standardise(to_float(x[:2000]).to(device))
        z = torch.cat([vae.encode(to_float(c.to(device))) for c in x.split(1000)])          # (N, c, h, w)
        labels = torch.cat([dataset.labels] * 2) if dataset.flip else dataset.labels
        return dataclasses.replace(dataset, images=z, labels=labels, flip=False)

    def macs(self):
        """Multiply-accumulates of one forward of one picture. Source: torch.utils.flop_counter (2 flops each)."""
        meta = copy.deepcopy(self.model).to("meta")
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            meta(torch.zeros(1, *self.shape), torch.zeros(1), self.model.null_condition(1).to("meta"))
        return counter.get_total_flops() // 2

    def draw(self, n, generator, device):
        uniform = lambda: torch.rand(n, generator=generator, device=device)
        return {"drop": uniform(), "flip": uniform(), **self.process.draw((n, *self.shape), generator, device)}

    def loss(self, net, batch):
        x0 = batch["x"] if batch["x"].is_floating_point() else to_float(batch["x"])
        y = self.model.drop_labels(batch["y"], batch["drop"])
        return self.process.loss(net, x0, y, batch["t"], batch["eps"])

    @torch.no_grad()
    def sample(self, model, y, null=None, cfg_scale=None, steps=None, sampler=None, callback=None, **options):
        """Draw one example per condition y (B,) or (B, L) -> (B, C, H, W) in model space; see to_pictures.

        null: what guidance steers away from, like y (default: nothing asked for); cfg_scale, steps, sampler: default to
        the run's guidance, and ddpm in 250 steps for a learned variance, else ddim in 50, or euler in 25 for a flow;
        callback(x0 guess) is called after every step; options as in diffusion's sample. Source: DiT §3.1.
        """
        cfg_scale = self.config.cfg_scale if cfg_scale is None else cfg_scale
        if self.model.class_dropout_prob == 0 or getattr(self.model, "num_classes", 1) == 0:
            cfg_scale = 1.0                                          # nothing to guide by
        null = self.model.null_condition(len(y), y.device) if null is None else null
        if self.tokenizer is not None:                               # encode the words once, not at every step
            y, null = self.model.text(y), self.model.text(null)      # (B, L, D_ctx)
        sampler = sampler or ("ddpm" if self.config.learn_sigma else self.process.samplers[0])
        options = {"clip": self.first_stage is None and self.shape[0] in (1, 3), "device": y.device, **options}
        walk = self.process.trajectory(model, (len(y), *self.shape), y, null, sampler=sampler, cfg_scale=cfg_scale,
                                       steps=steps or {"ddpm": 250, "euler": 25}.get(sampler, 50), **options)
        for x, x0 in walk:
            if callback is not None:
                callback(x0)
        return x

    @torch.no_grad()
    def encode(self, x):
        """Pictures (B, C, H, W) in [-1, 1] -> model space. Source: LDM §3.1."""
        if self.first_stage is None:
            return x
        vae = self.first_stage.to(x.device)
        return vae.encode(x.to(next(vae.parameters()).dtype)).float()

    def shrink_mask(self, mask):
        """Mask (B, 1, H, W), 1 = paint here -> model space: a latent cell is painted if any of its pixels is.

        Source: LDM §4.5.
        """
        if mask is None or self.first_stage is None:
            return mask
        return torch.nn.functional.max_pool2d(mask, self.first_stage.factor)                # (B, 1, h, w)

    @torch.no_grad()
    def to_pictures(self, x):
        """Model space -> uint8 pictures (B, C, H, W). Latents without a first stage: three channels in false colours.

        Source: LDM §3.1.
        """
        if self.first_stage is not None:
            vae = self.first_stage.to(x.device)
            return to_uint8(vae.decode(x.to(next(vae.parameters()).dtype)).float())
        return to_uint8(x if x.shape[1] in (1, 3) else x[:, :3] / 3)

    def examples(self):
        """What to draw when nothing is asked for: (conditions, their names or None), at most 48."""
        if self.tokenizer is not None:
            return self.tokenizer(self.info["examples"]), self.info["examples"]
        names = self.info["class_names"]
        each = max(1, 40 // max(1, len(names)))                     # a few of each class, when there are few
        y = torch.arange(min(48, max(1, len(names)) * each)) % max(1, len(names))
        return y, [names[i] for i in y.tolist()] if names else None

    def preview(self, model, dataset, device, path):
        y, names = self.examples()
        seeds = [torch.Generator(device).manual_seed(i) for i in range(len(y))]
        sampler = "ddim" if self.config.learn_sigma else None       # 250 ancestral steps would outlast the training
        images = self.to_pictures(self.sample(model, y.to(device), generator=seeds, steps=25, sampler=sampler))
        save_grid(images.cpu(), path, nrow=8, captions=names)

    def state(self):
        if self.first_stage is None:
            return {}
        return {"first_stage": {"factor": self.first_stage.factor, "model": self.first_stage.state_dict()}}


def model_shape(info, first_stage):
    """(C, H, W) of what the diffusion model sees: pixels, or the first stage's latents. Raises UserError."""
    size, channels = info["image_size"], info["channels"]
    if first_stage is None:
        return channels, size, size
    if size % first_stage.factor:
        raise UserError(f"image size {size} is not divisible by the first stage's factor {first_stage.factor}")
    return first_stage.latent_channels, size // first_stage.factor, size // first_stage.factor


def build_autoencoder(config, info, first_stage=None):
    """Config -> AutoencoderTask. Source: LDM §3.1."""
    return AutoencoderTask(config, info)


def build_dit(config, info, first_stage=None):
    """Config -> DiffusionTask with a class-conditional DiT. Source: DiT §3."""
    channels, size, _ = model_shape(info, first_stage)
    model = DiT(input_size=size, in_channels=channels, num_classes=len(info["class_names"]),
                learn_sigma=config.learn_sigma, class_dropout_prob=config.class_dropout,
                conditioning=config.conditioning, **dit_config(config.model))
    return DiffusionTask(config, info, model, first_stage)


def build_unet(config, info, first_stage=None):
    """Config -> DiffusionTask with a text-conditional U-Net and its text encoder. Source: LDM §3.3."""
    if config.learn_sigma:
        raise UserError("--learn-sigma (and so --recipe paper) is DiT's; the U-Net predicts eps, v or a velocity alone")
    channels, _, _ = model_shape(info, first_stage)
    tokenizer, sizes = WordTokenizer.from_state(info["vocabulary"]), UNET_CONFIGS[config.model]
    unet = UNet(**{**sizes, "in_channels": channels, "out_channels": channels})
    text = TextEncoder(tokenizer.vocab_size, tokenizer.max_length, hidden_size=unet.context_dim)
    model = TextToImage(unet, text, tokenizer([""])[0], config.class_dropout)
    return DiffusionTask(config, info, model, first_stage, tokenizer)


def build_first_stage(config, info):
    """config.first_stage -> frozen autoencoder or None.

    It is a checkpoint's path, "none", or "tiny" (untrained, for --bench and --overfit-batch). Raises UserError.
    """
    if config.first_stage == "none" or config.model == "tiny-ae":
        return None
    if config.first_stage == "tiny":
        return TinyAutoencoder(info["channels"], config.latent_channels, config.factor).eval().requires_grad_(False)
    first_stage = load_first_stage(load_checkpoint(config.first_stage), config.first_stage)
    if first_stage is None:
        raise UserError(f"{config.first_stage} holds no autoencoder: --first-stage wants that of --model tiny-ae")
    return first_stage


def load_first_stage(state, path):
    """The frozen autoencoder in a tiny-ae checkpoint, or in a diffusion checkpoint that carries one; else None.

    Source: LDM §3.1.
    """
    if state.get("task") == "tiny-ae":
        state = {"factor": state["config"]["factor"], "model": state["ema"]}
    elif "first_stage" in state:
        state = state["first_stage"]
    else:
        return None
    cell, latent = state["model"]["encoder.1.weight"].shape[1], state["model"]["mean"].shape[0]
    vae = TinyAutoencoder(cell // state["factor"] ** 2, latent, state["factor"])
    load_weights(vae, state["model"], path)
    return vae.eval().requires_grad_(False)


# name -> how to build it; the loop never asks which one it runs
TASKS = {"tiny-ae": build_autoencoder, "dit": build_dit, "unet": build_unet}


def task_name(model):
    """Which task trains a model of this name. Raises UserError with the nearest legal names."""
    if model == "tiny-ae":
        return model
    if model in UNET_CONFIGS:
        return "unet"
    try:
        dit_config(model)
    except ValueError as error:
        known = ["tiny-ae", "DiT-128x4/2", *DIT_CONFIGS, *UNET_CONFIGS]
        near = difflib.get_close_matches(model, known, 1)
        hint = f". Did you mean {near[0]}?" if near else ""
        raise UserError(f"{error}; or {', '.join(UNET_CONFIGS)}, tiny-ae{hint}") from error
    return "dit"


def describe(dataset, config):
    """What a model needs to know of its data, as plain values that travel in the checkpoint. Raises UserError."""
    info = {"name": dataset.name, "class_names": list(dataset.class_names), "channels": dataset.images.shape[1],
            "image_size": config.image_size}
    if task_name(config.model) == "unet":
        if dataset.captions is None:
            raise UserError(f"{config.model} wants captions, and {config.data} has none: try --data scenes, or a "
                            "folder with metadata.jsonl")
        info |= {"vocabulary": WordTokenizer.from_captions(dataset.captions).state(), "examples": dataset.captions[:24]}
    return info


# ----------------------------------------------------------------------------------------------------------------------
# the loop

def learning_rate(step, config):
    """Factor on every learning rate at a step: linear warm-up, then constant or cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.lr_decay == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def make_optimizers(config, task):
    """AdamW on everything that requires grad, or Muon on the task's block matrices and AdamW on the rest -> list."""
    named = [(n, p) for n, p in task.model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if config.optimizer == "muon" and p.dim() >= 2 and re.match(task.model.matrices, n)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    fused = rest[0].device.type in ("cuda", "cpu")
    optimizers = [torch.optim.AdamW(rest, lr=config.lr, weight_decay=config.weight_decay, fused=fused)]
    if matrices:
        optimizers.append(Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


@torch.no_grad()
def update_ema(ema, model, decay, keep):
    """ema += (1 - decay) * keep * (model - ema), in a few kernels; keep (0-dim tensor, 0 or 1): was this step taken.

    Source: DiT §4.
    """
    averaged, current = list(ema.parameters()), list(model.parameters())
    delta = torch._foreach_sub(current, averaged)
    torch._foreach_mul_(delta, (1 - decay) * keep)
    torch._foreach_add_(averaged, delta)
    for a, c in zip(ema.buffers(), model.buffers()):
        a.copy_(c)


def update(config, model, ema, optimizers, step):
    """Everything after backward: learning rate, clipping, the optimizers, the average.

    Returns (gradient norm, 1 if the step was taken else 0). A non-finite gradient skips the update on the device:
    nothing changes, and the host need not wait to hear of it.
    """
    scale = learning_rate(step, config)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf, foreach=True)
    keep = torch.isfinite(norm).float()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
        optimizer.found_inf = 1.0 - keep
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    update_ema(ema, model, min(config.ema, (1 + step) / (10 + step)), keep)
    return norm.float(), keep


class Stop:
    """Ctrl-C and SIGTERM set a flag, the loop saves at the next step boundary; a second signal ends it at once."""

    def __init__(self):
        self.signum = 0
        self.old = {s: signal.signal(s, self.catch) for s in (signal.SIGINT, signal.SIGTERM)}

    def catch(self, signum, frame):
        if self.signum:
            os._exit(128 + signum)
        self.signum = signum

    def restore(self):
        for s, handler in self.old.items():
            signal.signal(s, handler)


def draw_loss(out):
    """log.csv -> loss.png: the loss, faint, and its running mean."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    with open(out / "log.csv") as f:
        rows = [(int(r["step"]), float(r["loss"])) for r in csv.DictReader(f)]
    steps, losses, smooth = [s for s, _ in rows], [l for _, l in rows], []
    for loss in losses:
        smooth.append(loss if not smooth or not math.isfinite(smooth[-1]) else 0.9 * smooth[-1] + 0.1 * loss)
    figure, axes = plt.subplots(figsize=(5, 4), dpi=90)
    axes.plot(steps, losses, alpha=0.3, label="loss of a batch")
    axes.plot(steps, smooth, label="running mean")
    axes.set(xlabel="optimizer step", ylabel="training loss", yscale="log", title=out.name)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "loss.png")
    plt.close(figure)


class Log:
    """log.csv, the progress bar's text and the time estimate."""

    def __init__(self, out, config, step, batch_size, bar):
        self.config, self.bar, self.batch_size, self.first_step = config, bar, batch_size, step
        self.started = self.marked = time.perf_counter()
        self.marked_step, rows = step, []
        if step and (out / "log.csv").is_file():    # after a resume: keep the rows up to the checkpoint, drop the rest
            with open(out / "log.csv", newline="") as f:
                rows = [r for r in csv.reader(f) if r[0] == "step" or int(r[0]) <= step]
        self.file = open(out / "log.csv", "w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerows(rows)
        self.empty = not rows

    def row(self, step, names, values, lr):
        now = time.perf_counter()
        rate = (step - self.marked_step) * self.batch_size / max(1e-9, now - self.marked)
        if self.empty:
            self.writer.writerow(["step", *names, "lr", "images_per_s", "seconds"])
            self.empty = False
        self.writer.writerow([step, *(f"{v:.9g}" for v in values), f"{lr:.6g}", f"{rate:.1f}",
                              f"{now - self.started:.1f}"])
        self.file.flush()
        self.bar.set_postfix_str(f"loss {values[0]:.4f}, {rate:.0f} images/s", refresh=False)
        if self.marked_step == self.first_step + self.config.log_every:      # the second interval: the first warms up
            to_go = self.config.steps - step
            left = (now - self.marked) / (step - self.marked_step) * to_go
            self.bar.write(f"about {left / 60:.1f} minutes to go on this machine ({to_go} steps)", file=sys.stderr)
        self.mark(step)

    def mark(self, step):
        """Start the next interval here: drawing previews is not training."""
        self.marked, self.marked_step = time.perf_counter(), step


def compile_or_warn(net, step_loss):
    """net.compile(), in place so that names in checkpoints stay clean; where that fails, one warning, and eager.

    step_loss: a callable that runs one forward.
    """
    net.compile()
    try:
        step_loss().backward()
    except Exception as error:                      # no compiler, an unsupported platform: many errors, one consequence
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        print(f"torch.compile failed ({reason}); going on without it", file=sys.stderr)
        net._compiled_call_impl = None
    net.zero_grad(set_to_none=True)


def train(config, dataset, task):
    """Run a task until config.steps -> path of its checkpoint. Ctrl-C or SIGTERM: saves, exits with 128 + the signal.

    Raises UserError for a batch that cannot be split, a failed save, or ten non-finite steps in a row.
    Source: DiT §4 (recipe).
    """
    # --- where: device, rank, precision
    device, out = config.device, pathlib.Path(config.out)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % (world * config.accum):
        raise UserError(f"batch size {config.batch_size} does not split over {world} process(es) x {config.accum} "
                        "micro-batch(es)")
    autocast = torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext()

    # --- what: data on the device, model (float32 master weights), its average, optimizers
    model = task.model.to(device)
    batches = Batches(task.prepare(dataset, device), config.batch_size, device, config.seed)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = make_optimizers(config, task)
    step = resume(out / "ckpt.pt", model, ema, optimizers) if config.resume else 0

    # --- a micro-batch: the random numbers of the whole step, of which this rank and this part keep their rows
    generator, part = torch.Generator(device), config.batch_size // (world * config.accum)

    def micro_batch(step, micro):
        generator.manual_seed((config.seed * 1_000_003 + step) % 2 ** 63)
        draws, first = task.draw(config.batch_size, generator, device), (micro * world + rank) * part
        rows = slice(first, first + part)
        return {**batches.batch(step, rows, draws.pop("flip")), **{k: v[rows] for k, v in draws.items()}}

    def save():
        save_checkpoint(out / "ckpt.pt", {
            "format": 1, "task": task_name(config.model), "config": dataclasses.asdict(config), "info": task.info,
            "step": step, "model": model.state_dict(), "ema": ema.state_dict(),
            "opt": [o.state_dict() for o in optimizers], **task.state()})

    net = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    if config.compile == "on" or (config.compile == "auto" and device == "cuda"):
        with autocast:
            compile_or_warn(net, lambda: task.loss(net, micro_batch(step, 0))[0])

    # --- the loop
    stop, bad, worst = Stop(), torch.zeros((), device=device), torch.zeros((), device=device)
    bar = tqdm(total=config.steps, initial=step, disable=rank > 0, unit="step", dynamic_ncols=True, desc=config.model)
    log = Log(out, config, step, config.batch_size, bar) if rank == 0 else None
    while step < config.steps:
        sums = {}
        for micro in range(config.accum):           # gradients add up; only the last backward talks to the other ranks
            with net.no_sync() if world > 1 and micro < config.accum - 1 else nullcontext():
                with autocast:
                    loss, metrics = task.loss(net, micro_batch(step, micro))
                (loss / config.accum).backward()
            for k, v in {"loss": loss.detach(), **metrics}.items():
                sums[k] = sums.get(k, 0.0) + v.float() / config.accum

        norm, keep = update(config, model, ema, optimizers, step)
        bad = (bad + 1) * (1 - keep)
        worst = torch.maximum(worst, bad)
        step += 1
        bar.update()

        if step % config.log_every == 0 or step == config.steps or (world == 1 and stop.signum):
            values = torch.stack([*sums.values(), norm, worst, torch.tensor(float(stop.signum), device=device)])
            if world > 1:
                dist.all_reduce(values)             # norm and counter are the same everywhere; losses are averaged
                values /= world
            *values, skipped, signum = values.tolist()      # the one place where the host waits for the device
            if skipped >= 10:
                raise UserError(f"loss or gradient not finite ten times in a row, up to step {step}. Weights were "
                                "never updated with one, and the last checkpoint is intact: lower --lr (and "
                                "--muon-lr), or look at the data")
            if skipped:
                bar.write(f"step {step}: loss or gradient not finite (loss {values[0]}), {int(skipped)} step(s) in a "
                          "row skipped", file=sys.stderr)
                worst = bad.clone()
            if rank == 0:
                log.row(step, [*sums, "grad_norm"], values, learning_rate(step - 1, config) * config.lr)
            stop.signum = stop.signum or math.ceil(signum)
        stopping = stop.signum if world == 1 or step % config.log_every == 0 or step == config.steps else 0
        if rank == 0 and (step % config.save_every == 0 or step == config.steps or stopping):
            save()
        preview_due = step == config.steps or (config.sample_every and step % config.sample_every == 0)
        if rank == 0 and not stopping and preview_due:
            task.preview(ema, dataset, device, out / "samples" / f"{step:06d}.png")
            draw_loss(out)
            log.mark(step)
        if stopping:
            break
    bar.close()
    stop.restore()
    if world > 1:
        dist.barrier()                              # nobody reads the checkpoint before it is written
    if stop.signum:
        print(f"stopped at step {step}, saved in {out}; the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(128 + stop.signum)
    return out / "ckpt.pt"


def resume(path, model, ema, optimizers):
    """Put a run back to where its checkpoint was written -> the step. Raises UserError if the file does not fit."""
    state = load_checkpoint(path)
    if "opt" not in state:
        raise UserError(f"{path} holds weights only, nothing to resume: start a new run with --init {path}")
    load_weights(model, state["model"], path)
    load_weights(ema, state["ema"], path)
    if len(state["opt"]) != len(optimizers):
        raise UserError(f"{path} was trained with another --optimizer: use the same flags as then")
    for optimizer, saved in zip(optimizers, state["opt"]):
        optimizer.load_state_dict(saved)
    return state["step"]


# ----------------------------------------------------------------------------------------------------------------------
# self-check and benchmark

def step_maker(config, dataset, task, fixed=False):
    """(run, model): run(step) is one training step -> loss. fixed: the same batch and the same noise every time."""
    device, model = config.device, task.model.to(config.device)
    batches = Batches(task.prepare(dataset, device), config.batch_size, device, config.seed)
    optimizers, ema = make_optimizers(config, task), copy.deepcopy(model).eval().requires_grad_(False)
    autocast = torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext()
    generator = torch.Generator(device)

    def run(step):
        generator.manual_seed(config.seed if fixed else step)
        draws = task.draw(config.batch_size, generator, device)
        with autocast:
            loss, _ = task.loss(model, {**batches.batch(0 if fixed else step, flip_draws=draws.pop("flip")), **draws})
        loss.backward()
        update(config, model, ema, optimizers, step)
        return loss.detach()
    return run, model


def overfit(config, dataset, task):
    """One batch, one draw of noise, again and again: a sound model and loss get under 5 %. Returns True if they did."""
    run, _ = step_maker(config, dataset, task, fixed=True)
    losses = [run(step) for step in tqdm(range(config.steps), desc="overfit one batch")]
    first, last = losses[0].item(), losses[-1].item()
    verdict = last < 0.05 * first
    print(f"{'ok' if verdict else 'NOT ok'}: loss {first:.4f} -> {last:.4f} ({last / first:.1%}) in {config.steps} "
          "steps on one batch")
    return verdict


def gemm_peak(device, seconds=1.0):
    """Measured rate of a large matrix product in FLOP/s: bfloat16 on cuda, float32 elsewhere."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    a @ b
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ b
        wait()
        count += 1
    return 2 * n ** 3 * count / (time.perf_counter() - start)


def bench(config, dataset, task):
    """Time config.bench training steps and the GEMM peak, in turns; print one line.

    Flops are counted, forward and backward and optimizer.
    """
    device = config.device
    one_step, model = step_maker(config, dataset, task)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    with FlopCounterMode(display=False) as counter:
        one_step(0)
    if config.compile == "on" or (config.compile == "auto" and device == "cuda"):
        model.compile()
    for step in range(5):                           # compile, allocate, settle
        one_step(step)
    peak, seconds, done = gemm_peak(device), 0.0, 0
    while done < config.bench:
        count = min(config.bench - done, max(1, config.bench // 4))
        wait()
        start = time.perf_counter()
        for step in range(done, done + count):
            one_step(step)
        wait()
        seconds, done = seconds + time.perf_counter() - start, done + count
        peak = max(peak, gemm_peak(device, 0.5))
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        import resource                             # absent on Windows, and only this line needs it
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    rate = counter.get_total_flops() * done / seconds
    print(f"{config.model} batch {config.batch_size} on {device}, {torch.get_num_threads()} thread(s): "
          f"{1000 * seconds / done:.1f} ms/step, {config.batch_size * done / seconds:.1f} images/s, "
          f"{rate / 1e12:.3f} TFLOP/s of a GEMM peak of {peak / 1e12:.3f} = {rate / peak:.0%}; "
          f"peak memory {memory / 2 ** 30:.2f} GiB")


# ----------------------------------------------------------------------------------------------------------------------
# command line

def default_out(args):
    """Output folder of a run that names none."""
    model, data = args.model.replace("/", "-"), re.sub("[^A-Za-z0-9]+", "-", args.data).strip("-")
    return pathlib.Path(args.out or f"out/{model}-{data}")


def presets(args):
    """Defaults that a recipe, a model, or the run being resumed brings along; flags on the command line still win."""
    if args.resume and (default_out(args) / "config.json").is_file():
        return {**json.loads((default_out(args) / "config.json").read_text()), "resume": False, "init": ""}
    return {**RECIPES[args.recipe], **RECIPES.get(args.model, {}), **({"steps": 300} if args.overfit_batch else {})}


def prepare_run(config):
    """Fill in what is "auto", and refuse what cannot work, before anything is loaded or trained -> config."""
    config = dataclasses.replace(config, device=resolve_device(config.device), out=str(default_out(config)))
    for name in ("steps", "batch_size", "accum", "image_size", "log_every", "save_every", "factor", "latent_channels"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: give a positive number")
    if not 0 <= config.class_dropout < 1:
        raise UserError(f"--class-dropout {config.class_dropout}: give a share from 0 to below 1")
    task, out = task_name(config.model), pathlib.Path(config.out)
    if int(os.environ.get("RANK", 0)) == 0 and not config.bench and not config.overfit_batch:
        if config.resume and not any((out / f / "ckpt.pt").is_file() for f in (".", "first_stage")):
            raise UserError(f"--resume: there is no checkpoint in {out}; leave the flag out to start")
        if not config.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is not empty: add --resume to go on with it, or choose another --out")
    if config.first_stage == "auto" and config.init and task != "tiny-ae":
        config.first_stage = config.init if load_first_stage(load_checkpoint(config.init), config.init) else "none"
    if config.first_stage == "auto":
        config.first_stage = "tiny" if task == "unet" or config.data in ("shapes", "scenes") else "none"
    if task == "dit" and config.first_stage in ("tiny", "none"):        # before minutes go into the first stage
        size = config.image_size // (config.factor if config.first_stage == "tiny" else 1)
        patch = dit_config(config.model)["patch_size"]
        if size % patch:
            raise UserError(f"{config.model} needs a side divisible by its patch size {patch}, and --image-size "
                            f"{config.image_size} gives {size}")
    return config


def train_first_stage(config, dataset):
    """`--first-stage tiny`: train the autoencoder in OUT/first_stage, unless it is there already -> its checkpoint.

    Source: LDM §3.1.
    """
    base = Config(steps=config.first_stage_steps)
    keep = ("data", "data_dir", "image_size", "hold_out", "skip_bad", "latent_channels", "latent_noise", "factor",
            "seed", "device", "compile")
    own = dataclasses.replace(base, model="tiny-ae", first_stage="none", out=f"{config.out}/first_stage",
                              **{k: getattr(config, k) for k in keep})
    path = pathlib.Path(own.out) / "ckpt.pt"
    own.resume = path.is_file()
    if own.resume and load_checkpoint(path).get("step") == own.steps:
        return str(path)
    return str(run(own, dataset))


def write_config(config):
    """config.json in the output folder: what --resume starts from."""
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))


def run(config, dataset):
    """Build the task, say what it is and what it costs, and train it (or time it, or check it) -> checkpoint path."""
    torch.manual_seed(config.seed)
    info, main = describe(dataset, config), int(os.environ.get("RANK", 0)) == 0
    task = TASKS[task_name(config.model)](config, info, build_first_stage(config, info))
    if config.resume and not (pathlib.Path(config.out) / "ckpt.pt").is_file():
        config.resume = False                       # it was stopped in its first stage: this part starts anew
    if config.init:
        load_weights(task.model, load_checkpoint(config.init)["ema"], config.init)
    out = pathlib.Path(config.out)
    if main:
        count = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
        where = "" if config.bench or config.overfit_batch else f" -> {out}"
        print(f"{config.model} on {config.data}: {len(dataset):,} pictures, {count / 1e6:.2f} M parameters, "
              f"{task.macs() / 1e6:.1f} M MACs per picture, {config.steps} steps of {config.batch_size}, "
              f"{config.device}{where}")
    if config.bench:
        return bench(config, dataset, task)
    if config.overfit_batch:
        raise SystemExit(0 if overfit(config, dataset, task) else 1)
    if main:
        write_config(config)
        for stale in out.glob("*.part"):            # left by a run that was killed while saving
            stale.unlink()
    return train(config, dataset, task)


def main(argv=None):
    """Command line of train.py; exit code 2 and one line for anything that the user can mend."""
    try:
        config = prepare_run(parse(Config, sys.argv[1:] if argv is None else argv, __doc__, presets))
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            dist.init_process_group("nccl" if config.device == "cuda" else "gloo")
            if config.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if config.device == "cuda":
            torch.set_float32_matmul_precision("high")
        dataset = data_module.load(config.data, config.image_size, "train", config.data_dir, seed=config.seed,
                                   hold_out=config.hold_out, skip_bad=config.skip_bad)
        if config.flip != "auto":
            dataset = dataclasses.replace(dataset, flip=config.flip == "on")
        if config.first_stage == "tiny" and not config.bench and not config.overfit_batch:
            if int(os.environ.get("RANK", 0)) == 0:
                write_config(config)
            config.first_stage = train_first_stage(config, dataset)
        path = run(config, dataset)
        if path is not None and int(os.environ.get("RANK", 0)) == 0:
            print(f"done: {path}\nlook at {config.out}/samples, or draw more: python sample.py --ckpt {path}")
        if dist.is_initialized():
            dist.destroy_process_group()
    except ValueError as error:                     # UserError and the data loader's own: one line each
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:                       # before the loop, where nothing is lost yet
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
