"""Training: one loop for every model of this repository.

    python train.py                                    # a class-conditional DiT on `shapes`: five minutes on a laptop
    python train.py --recipe paper                     # the same model as the DiT paper trains it: AdamW, eps, linear
    python train.py --model DiT-S/2 --data cifar10     # the paper's smallest DiT on 32x32 photographs, on one GPU
    python train.py --data folder:my_pictures --out out/mine --steps 20000
    python train.py --model udit-tiny                  # a U-shaped DiT (udit.py)
    python train.py --model unet-tiny --data scenes    # text to image
    python train.py --model vq-tiny --data scenes      # the same on tokens: a VQ-VAE, then VQ-Diffusion
    python train.py --init assets/unet-scenes.pt --concept folder:my_thing --category circle    # a thing of your own
    python train.py --init v1-5-pruned.safetensors --concept folder:my_dog --category dog --out out/dog     # on SD v1
    python train.py --out out/mine --resume            # after Ctrl-C, SIGTERM, or a crash: bit for bit the same run
    torchrun --nproc-per-node 2 train.py ...           # data-parallel: the same run on more devices

The idea.  A task (tasks.py) says what a step is: `draw` takes every random number of the step at once, `loss` is then
a pure function of tensors. `train` is the loop, and does not ask which task it runs. Because step s draws from a
generator seeded by (seed, s), and batch s is a function of (seed, s), the state of a run is its tensors and the number
s. Hence exact resume in a few lines, and the same result on one device or several: each draws the noise of the whole
batch and keeps its own rows.

Contents: Config, Muon, the loop, the self-check and the benchmark, the command line.
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
import re
import signal
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data as data_module
from data import Batches
from dit import dit_config
from tasks import (AUTOENCODERS, TASKS, AdapterTask, ConceptTask, build_first_stage, describe, load_first_stage,
                   stable_diffusion, task_name)
from weights import is_official, load_checkpoint, load_weights, read_stable_diffusion, save_checkpoint


# ----------------------------------------------------------------------------------------------------------------------
# configuration: one dataclass; every field is a flag, its default stands here and nowhere else

def flag(default, help, **choices):
    """A dataclass field that becomes a flag: its default, its words in --help, and choices=[...] if values are few."""
    return dataclasses.field(default=default, metadata={"help": help, **choices})


@dataclasses.dataclass
class Config:
    """Everything that defines a run. The defaults are the five-minute run."""
    model: str = flag("DiT-128x4/2", "DiT-S/2 ... DiT-XL/8 of the paper, DiT-WxD/p (width, depth, patch), U-DiT-S/B/L, "
                                     "udit-tiny, udit-small; unet-tiny, unet-small (text to image); vq-tiny, "
                                     "vq-small (on tokens); or tiny-ae, kl-ae, vq-vae (autoencoders)")
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
                                    "(pixels), an autoencoder's checkpoint, or auto (tiny for shapes and scenes, none "
                                    "otherwise)")
    first_stage_steps: int = flag(500, "optimizer steps of --first-stage tiny")
    latent_channels: int = flag(4, "channels of the tiny autoencoder's latents")
    latent_noise: float = flag(0.3, "noise that its decoder learns to undo, as a share of the latents' spread")
    aux_weight: float = flag(1.0, "VQ: weight of the plain cross-entropy beside the variational bound; the paper's "
                                  "5e-4 is for long runs")
    codes: int = flag(256, "vq-vae: how many different tokens there are")
    factor: int = flag(4, "how much smaller its latents are, per side")
    conditioning: str = flag("adaln_zero", "DiT block",
                             choices=["adaln_zero", "adaln", "cross_attention", "in_context"])
    class_dropout: float = flag(0.1, "share of labels or captions hidden in training, for guidance")
    schedule: str = flag("flow", "flow (straight lines, velocity) or a Gaussian schedule",
                         choices=["flow", "linear", "cosine", "scaled_linear"])
    flow_shift: float = flag(1.0, "flow: above 1 trains more at high noise, where it is decided what goes where")
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
    init: str = flag("", "start from the (EMA) weights of this checkpoint; with --adapter or --concept also a file or "
                         "diffusers folder of Stable Diffusion v1")
    adapter: str = flag("", "train only an adapter on --init: READ-ADD, such as ca_out-ffn_in (adapters.py)")
    rank: int = flag(16, "width of the adapter")
    concept: tuple = flag((), "teach --init a thing from these pictures, folder:PATH; may be repeated "
                              "(custom_diffusion.py)")
    category: tuple = flag((), "what the thing is, one --category per --concept, such as dog")
    prior: str = flag("", "pictures that keep the category what it was: a data set with captions, generated (drawn by "
                          "--init), or none; default: the data of --init, generated for Stable Diffusion")
    part: str = flag("kv", "--concept: what learns in the U-Net", choices=["kv", "crossattn", "all", "none"])
    word_lr: float = flag(1e-2, "--concept: learning rate of the new words")
    bpe: str = flag("data/bpe_simple_vocab_16e6.txt.gz", "Stable Diffusion: CLIP's published list of merges")
    augment: bool = flag(True, "--concept: also shrink and enlarge its pictures")
    log_every: int = flag(10, "steps between rows of log.csv")
    sample_every: int = flag(500, "steps between previews; 0 = only at the end")
    save_every: int = flag(500, "steps between checkpoints")
    save_latents: str = flag("", "encode --data with --first-stage into this file, for --data latents:FILE, and stop")
    overfit_batch: bool = flag(False, "self-check: one batch with fixed noise again and again; its loss must fall "
                                      "below 5 %%")
    bench: int = flag(0, "time this many steps, print throughput against the machine's matrix-product peak, and stop")


RECIPES = {  # what a recipe or a model changes among the defaults above
    "fast": {},
    # DiT §4
    "paper": dict(schedule="linear", prediction="eps", learn_sigma=True, optimizer="adamw", lr=1e-4,
                  lr_decay="constant", warmup=0, grad_clip=0.0, ema=0.9999),
    "tiny-ae": dict(steps=500), "kl-ae": dict(steps=1000),
    "unet-tiny": dict(steps=2500, latent_channels=6, latent_noise=0.2, first_stage_steps=800, cfg_scale=3.0,
                      flow_shift=3.0)}
RECIPES["unet-small"] = RECIPES["unet-tiny"]
SD_V1 = dict(model="SD-v1", image_size=512, first_stage="none", schedule="scaled_linear", prediction="eps",
             cfg_scale=7.5)                         # what its files do not say; their autoencoder comes with them
RECIPES["vq-vae"] = dict(steps=1600, batch_size=32, lr=4e-3)
RECIPES["vq-tiny"] = RECIPES["vq-small"] = dict(steps=3000, batch_size=32, first_stage_steps=1600, cfg_scale=3.0)


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are one line like all others."""

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


class HelpFormat(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help keeps the docstring's lines and shows every default."""


def parse(cls, argv, description, presets=lambda args: {}):
    """Command line -> cls. Flags are its fields with dashes (underscores will do); `presets(args)` may shift defaults.

    Exits with code 2 and one line for an unknown flag (naming the nearest) or a bad value.
    """
    def read(defaults):
        parser = Parser(description=description, formatter_class=HelpFormat, allow_abbrev=False)
        for f in dataclasses.fields(cls):
            how = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(action="append")}.get(
                type(f.default), dict(type=type(f.default)))
            if "choices" in f.metadata:
                how["choices"] = f.metadata["choices"]
            default = None if type(f.default) is tuple else defaults.get(f.name, f.default)     # given ones replace it
            parser.add_argument("--" + f.name.replace("_", "-"), default=default, help=f.metadata["help"], **how)
        dashed = [re.sub(r"^(--[^=]*)", lambda m: m[1].replace("_", "-"), a) for a in argv]
        args, unknown = parser.parse_known_args(dashed)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], list(parser._option_string_actions), 1)
            hint = f": did you mean {near[0]}?" if near else ": see --help"
            raise ValueError(f"unknown argument {unknown[0]!r}" + hint)
        return cls(**{k: tuple(defaults.get(k, ())) if v is None else v for k, v in vars(args).items()})
    return read(presets(read({})))


def resolve_device(name):
    """auto -> cuda, mps or cpu; anything asked for by name must be there. Raises ValueError otherwise."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(k for k, there in have.items() if there)
    if not have[name]:
        raise ValueError(f"--device {name}: this machine or this build of torch has none; leave the flag out, or say "
                        "--device cpu")
    return name


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
    rest = [p for n, p in named if id(p) not in chosen and ".rows." not in n]
    words = [p for n, p in named if ".rows." in n]                  # new words of custom_diffusion.py
    fused = next(task.model.parameters()).device.type in ("cuda", "cpu")
    groups = [{"params": rest}, {"params": words, "lr": config.word_lr}]
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, weight_decay=config.weight_decay,
                                    fused=fused)]
    if matrices:
        optimizers.append(Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def average_of(model):
    """A copy of a model to average its weights in; what does not learn is shared, not copied."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(ema, model, decay, keep):
    """ema += (1 - decay) * keep * (model - ema), in a few kernels; keep (0-dim tensor, 0 or 1): was this step taken.

    Source: DiT §4.
    """
    averaged, current = zip(*((a, c) for a, c in zip(ema.parameters(), model.parameters()) if a is not c))
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
    from matplotlib.figure import Figure            # not pyplot: its backend belongs to the caller, a notebook say
    with open(out / "log.csv") as f:
        rows = [(int(r["step"]), float(r["loss"])) for r in csv.DictReader(f)]
    steps, losses, smooth = [s for s, _ in rows], [l for _, l in rows], []
    for loss in losses:
        smooth.append(loss if not smooth or not math.isfinite(smooth[-1]) else 0.9 * smooth[-1] + 0.1 * loss)
    figure = Figure(figsize=(5, 4), dpi=90)
    axes = figure.subplots()
    axes.plot(steps, losses, alpha=0.3, label="loss of a batch")
    axes.plot(steps, smooth, label="running mean")
    axes.set(xlabel="optimizer step", ylabel="training loss", yscale="log", title=out.name)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "loss.png")


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

    Raises ValueError for a batch that cannot be split, a failed save, or ten non-finite steps in a row.
    Source: DiT §4 (recipe).
    """
    # --- where: device, rank, precision
    device, out = config.device, pathlib.Path(config.out)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % (world * config.accum):
        raise ValueError(f"batch size {config.batch_size} does not split over {world} process(es) x {config.accum} "
                        "micro-batch(es)")
    autocast = torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext()

    # --- what: data on the device, model (float32 master weights), its average, optimizers
    model = task.model.to(device)
    batches = Batches(task.prepare(dataset, device), config.batch_size, device, config.seed)
    ema = average_of(model)
    optimizers = make_optimizers(config, task)
    step = resume(out / "ckpt.pt", task, ema, optimizers) if config.resume else 0

    # --- a micro-batch: the random numbers of the whole step, of which this rank and this part keep their rows
    generator, part = torch.Generator(device), config.batch_size // (world * config.accum)

    def micro_batch(step, micro):
        generator.manual_seed((config.seed * 1_000_003 + step) % 2 ** 63)
        draws, first = task.draw(config.batch_size, generator, device), (micro * world + rank) * part
        rows = slice(first, first + part)
        return {**batches.batch(step, rows, draws.pop("flip")), **{k: v[rows] for k, v in draws.items()}}

    def save():                                     # what --init brought and nobody trains stays in its own file
        learned = lambda net: {k: v for k, v in net.state_dict().items() if k not in task.frozen}
        save_checkpoint(out / "ckpt.pt", {
            "format": 1, "task": task_name(config.model), "config": dataclasses.asdict(config), "info": task.info,
            "step": step, "model": learned(model), "ema": learned(ema),
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
                raise ValueError(f"loss or gradient not finite ten times in a row, up to step {step}. Weights were "
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
        if step == config.steps:
            task.finish(ema, dataset, device)
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


def resume(path, task, ema, optimizers):
    """Put a run back to where its checkpoint was written -> the step. Raises ValueError if the file does not fit."""
    state = load_checkpoint(path)
    if "opt" not in state:
        raise ValueError(f"{path} holds weights only, nothing to resume: start a new run with --init {path}")
    for net, learned in ((task.model, state["model"]), (ema, state["ema"])):
        load_weights(net, {**{k: v for k, v in net.state_dict().items() if k in task.frozen}, **learned}, path)
    if len(state["opt"]) != len(optimizers):
        raise ValueError(f"{path} was trained with another --optimizer: use the same flags as then")
    for optimizer, saved in zip(optimizers, state["opt"]):
        optimizer.load_state_dict(saved)
    return state["step"]


# ----------------------------------------------------------------------------------------------------------------------
# self-check and benchmark

def step_maker(config, dataset, task, fixed=False):
    """(run, model, its average): run(step) is one training step -> loss. fixed: the same batch and noise every time."""
    device, model = config.device, task.model.to(config.device)
    batches = Batches(task.prepare(dataset, device), config.batch_size, device, config.seed)
    optimizers, ema = make_optimizers(config, task), average_of(model)
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
    return run, model, ema


def overfit(config, dataset, task):
    """One batch, one draw of noise, again and again: a sound model and loss get under 5 %. Returns True if they did."""
    run, *_ = step_maker(config, dataset, task, fixed=True)
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
    one_step, model, _ = step_maker(config, dataset, task)
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
        saved = json.loads((default_out(args) / "config.json").read_text())
        return {**saved, "resume": False, "init": saved["init"] if saved["adapter"] or saved["concept"] else ""}
    if (args.adapter or args.concept) and args.init:
        return small_run(args)
    return {**RECIPES[args.recipe], **RECIPES.get(args.model, {}), **({"steps": 300} if args.overfit_batch else {})}


def small_run(args):
    """Defaults of --adapter and --concept: what --init is stays as it is; few steps, AdamW, a rate for its size."""
    run = {"steps": 250, "optimizer": "adamw", "warmup": 0, "ema": 0.9, "sample_every": 0}
    if is_official(args.init):                      # the papers' own rates
        rates = dict(lr=1e-4) if args.adapter else dict(
            lr=8e-6 if args.part == "all" else 8e-5, word_lr=8e-5, weight_decay=0.01, prior="generated",
            data=args.concept[0])
        return {**SD_V1, "batch_size": 8, "lr_decay": "constant", **run, **rates}
    state = load_checkpoint(args.init)
    if "vocabulary" not in state.get("info", {}):
        raise ValueError(f"--init {args.init} is no text-to-image checkpoint, on which --adapter and --concept build: "
                         "try assets/unet-scenes.pt")
    base = state["config"]
    same = ("model", "data", "image_size", "schedule", "flow_shift", "prediction", "latent_channels", "factor",
            "cfg_scale")
    rates = dict(lr=5e-3) if args.adapter else dict(lr=3e-3, weight_decay=0.01)     # measured on the tiny U-Net
    return {**{k: base[k] for k in same if k in base}, "batch_size": 16, **run, **rates}


def prepare_run(config):
    """Fill in what is "auto", and refuse what cannot work, before anything is loaded or trained -> config."""
    config = dataclasses.replace(config, device=resolve_device(config.device), out=str(default_out(config)))
    for name in ("steps", "batch_size", "accum", "image_size", "log_every", "save_every", "factor", "latent_channels"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: give a positive number")
    if not 0 <= config.class_dropout < 1:
        raise ValueError(f"--class-dropout {config.class_dropout}: give a share from 0 to below 1")
    if (config.adapter or config.concept) and not config.init:
        raise ValueError("--adapter and --concept need --init: the checkpoint that they build on, for instance "
                         "assets/unet-scenes.pt")
    if len(config.concept) != len(config.category) or config.adapter and config.concept:
        raise ValueError(f"{len(config.concept)} --concept and {len(config.category)} --category: give one category "
                         "for each concept, and no --adapter beside them")
    if config.concept:
        config.data = config.prior if config.prior not in ("", "generated", "none") else config.data
    if config.flow_shift <= 0:
        raise ValueError(f"--flow-shift {config.flow_shift}: give a positive number; 1 = no shift, 3 = more noise")
    task, out = task_name(config.model), pathlib.Path(config.out)
    writes = not (config.bench or config.overfit_batch or config.save_latents)
    if int(os.environ.get("RANK", 0)) == 0 and writes:
        if config.resume and not any((out / f / "ckpt.pt").is_file() for f in (".", "first_stage")):
            raise ValueError(f"--resume: there is no checkpoint in {out}; leave the flag out to start")
        if not config.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} exists and is not empty: add --resume to go on with it, or choose another --out")
    if config.first_stage == "auto" and config.init and task not in AUTOENCODERS:
        config.first_stage = config.init if load_first_stage(load_checkpoint(config.init), config.init) else "none"
    if config.first_stage == "auto":
        latent = (task == "unet" and not config.data.startswith("latents:")) or config.data in ("shapes", "scenes")
        latent = latent or task == "vq"
        config.first_stage = "tiny" if latent and task not in AUTOENCODERS else "none"
    if task in ("dit", "udit") and config.first_stage in ("tiny", "none"):     # before minutes go into the first stage
        size = config.image_size // (config.factor if config.first_stage == "tiny" else 1)
        unit = dit_config(config.model)["patch_size"] if task == "dit" else 8       # two halvings, two phases
        if size % unit:
            what = "by its patch size " if task == "dit" else "by "
            raise ValueError(f"{config.model} needs a side divisible {what}{unit}, and --image-size "
                            f"{config.image_size} gives {size}")
    return config


def train_first_stage(config, dataset):
    """`--first-stage tiny`: train the autoencoder in OUT/first_stage, unless it is there already -> its checkpoint.

    Source: LDM §3.1.
    """
    model = "vq-vae" if task_name(config.model) == "vq" else "tiny-ae"
    base = Config(**{**RECIPES[model], "steps": config.first_stage_steps})
    keep = ("data", "data_dir", "image_size", "hold_out", "skip_bad", "latent_channels", "latent_noise", "codes",
            "factor", "seed", "device", "compile")
    own = dataclasses.replace(base, model=model, first_stage="none", out=f"{config.out}/first_stage",
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


def save_encoded(config, task, dataset):
    """--save-latents: the data set as the first stage's latents, half precision, with labels and captions."""
    if getattr(task, "first_stage", None) is None:
        raise ValueError("--save-latents needs --first-stage FILE: the autoencoder that makes the latents")
    z = task.prepare(dataclasses.replace(dataset, flip=False), config.device).images
    data_module.save_latents(config.save_latents, z.half().cpu(), dataset.labels, dataset.captions, dataset.class_names)
    print(f"{len(z):,} latents of {'x'.join(map(str, z.shape[1:]))} in {config.save_latents}; train on them with\n"
          f"--data latents:{config.save_latents} --first-stage {config.first_stage}")


def run(config, dataset):
    """Build the task, say what it is and what it costs, and train it (or time it, or check it) -> checkpoint path."""
    torch.manual_seed(config.seed)
    main, first_stage = int(os.environ.get("RANK", 0)) == 0, build_first_stage(config, dataset.images.shape[1])
    small = config.adapter or config.concept        # then the base's words are the words
    official = small and is_official(config.init)
    if official:
        task = stable_diffusion(config, read_stable_diffusion(config.init), torch.float32, config.bpe, config.init)
    else:
        info = load_checkpoint(config.init)["info"] if small else describe(dataset, config, first_stage)
        task = TASKS[task_name(config.model)](config, info, first_stage)
    if config.save_latents:
        return save_encoded(config, task, dataset)
    if config.resume and not (pathlib.Path(config.out) / "ckpt.pt").is_file():
        config.resume = False                       # it was stopped in its first stage: this part starts anew
    if config.init and not official:
        load_weights(task.model, load_checkpoint(config.init)["ema"], config.init)
    if small:
        task = (AdapterTask if config.adapter else ConceptTask)(config, task, dataset)
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
            draw = f"--ckpt {path}"
            if config.adapter:
                draw = f"--ckpt {config.out}/adapter.pt --base {config.init}"
            if config.concept:
                draw = f'--ckpt {config.init} --concept-weights {config.out}/concept.pt --prompt "a <new1> ..."'
            print(f"done: {path}\nlook at {config.out}/samples, or draw more: python sample.py {draw}")
        if dist.is_initialized():
            dist.destroy_process_group()
    except ValueError as error:                     # something that the person at the keyboard can mend: one line
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:                       # before the loop, where nothing is lost yet
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
