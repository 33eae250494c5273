"""Training: one loop for every model of this repository.

    python train.py                                  # a DiT on `shapes`: three minutes on a laptop
    python train.py --model unet-tiny --data scenes  # text to image; vq-tiny: the same on tokens
    python train.py --model udit-tiny --help         # the flags that a U-DiT reads
    python train.py --data folder:my_pictures --out out/mine --steps 20000
    python train.py --out out/mine --resume          # after Ctrl-C or a crash: bit for bit the same
    torchrun --nproc-per-node 2 train.py ...         # the same run on more devices

The idea.  Step s is a function of (seed, s) alone: its rows of the data, its noise, its hidden
labels, its learning rate. So the state of a run is its tensors and the number s. Hence exact
resume, and the same result on one device or more: each draws the noise of the whole batch, and
keeps its rows. The output folder gets ckpt.pt, config.json, log.csv, loss.png, samples/, lock."""
import argparse
import dataclasses
import os
import pathlib
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from checkpoint import load_checkpoint
from cli import flag, one_line, parse, resolve_device
from models import (FAMILIES, FLAGS, PAPER, PRESETS, UNREAD, check_read, find_model, make_task,
                    readers_of, resolve_first_stage, resumed_flags, save_encoded, settings_class)
from optim import average_of, make_optimizers, update
from tasks import (add_row, begin_files, check_fit, check_out, default_out, lock, plot_loss, resume,
                   save)


def ranks():
    """(number of this process, number of processes), as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def micro_size(config):
    """Pictures in a micro-batch of one process. Raises ValueError if the batch does not split."""
    size, parts = config.batch_size, ranks()[1] * config.accum
    if size % parts:
        raise ValueError(f"--batch-size {size} does not split into {parts}, processes x --accum")
    return size // parts


def blocks_of(module):
    """The blocks of a model: what stands in its lists of modules, the outermost ones."""
    for child in module.children():
        yield from child if isinstance(child, torch.nn.ModuleList) else blocks_of(child)


def make_step(config, dataset, task, held_out=None):
    """One training step as a function: step(s) -> (metrics, gradient norm, 1 if taken else 0).
    Everything that trains a model calls this. step.ema is the averaged model, step.optimizers its
    optimizers, step.held_out() its loss on held_out, always with one noise. Raises ValueError."""
    device, model = config.device, task.model.to(config.device)
    (rank, world), size = ranks(), micro_size(config)
    task.check_batch(config.batch_size)
    batches = data.Batches(task.prepare(dataset, device), config.batch_size, device, config.seed)
    ema, optimizers = average_of(model), make_optimizers(config, model)
    if config.checkpointing:                    # of the class, so that a second call adds nothing
        for block in blocks_of(model):
            block.forward = partial(checkpoint, partial(type(block).forward, block),
                                    use_reentrant=False, preserve_rng_state=False)
    low = config.precision == "bfloat16" or (config.precision == "auto" and device == "cuda")
    autocast = torch.autocast(device, torch.bfloat16, enabled=low)
    generator = torch.Generator(device)
    def micro_batch(s, micro, batches=batches):
        generator.manual_seed((config.seed * 1_000_003 + s) % 2 ** 63)
        draws = task.draw(config.batch_size, generator, device)     # of the whole batch,
        first = (micro * world + rank) * size
        rows = slice(first, first + size)                           # of which these rows are ours
        batch = batches.batch(s, rows, draws.pop("flip"))
        return {**batch, **{name: value[rows] for name, value in draws.items()}}
    net = model if world == 1 else DistributedDataParallel(model, broadcast_buffers=False)
    if config.compile == "on" or (config.compile == "auto" and device == "cuda"):
        net.compile()                           # in place, so that names stay clean
        try:
            with autocast:
                task.loss(net, **micro_batch(0, 0))[0].backward()
        except Exception as error:              # no compiler, an unsupported platform, ...
            print(f"torch.compile failed ({error!r:.100}); going on without it", file=sys.stderr)
            net._compiled_call_impl = None
        net.zero_grad(set_to_none=True)

    def step(s):
        sums, vectors = {}, []
        for micro in range(config.accum):       # gradients add up; the last backward averages ranks
            with net.no_sync() if world > 1 and micro < config.accum - 1 else nullcontext():
                with autocast:
                    loss, metrics = task.loss(net, **micro_batch(s, micro))
                (loss / config.accum).backward()
            if "vectors" in metrics:            # what a codebook learns from, in the batch's order
                mine = metrics.pop("vectors").contiguous()
                parts = [mine.clone() for _ in range(world)]            # of rank 0, rank 1, ...
                if world > 1:
                    dist.all_gather(parts, mine)
                vectors += parts
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums.get(name, 0.0) + value.float() / config.accum
        return sums, *update(config, model, ema, optimizers, s, vectors)
    others = held_out and data.Batches(task.prepare(held_out, device), config.batch_size, device)
    step.held_out = torch.no_grad()(lambda: task.loss(ema, **micro_batch(0, 0, others))[0].item())
    step.ema, step.optimizers = ema, optimizers
    return step


def train(config, dataset, task, caught, bar, held_out=None):
    """Run a task until config.steps -> path of its checkpoint. caught: list for the number of a
    signal, after which the run is saved, and ends; bar: tqdm's; held_out: pictures whose loss is
    logged, or None. Raises ValueError for ten non-finite steps in a row, or a failed save."""
    device, out, (rank, world) = config.device, pathlib.Path(config.out), ranks()
    step = make_step(config, dataset, task, held_out)
    s = resume(out / "ckpt.pt", task, step) if config.resume else 0
    task.at_once = min(task.at_once, micro_size(config))        # of a preview, as in a step
    bad, worst = torch.zeros((), device=device), torch.zeros((), device=device)
    bar.initial, bar.n, started, stop = s, s, time.perf_counter(), 0
    if rank == 0:
        begin_files(config, task, s)
        if config.log_to:
            from torch.utils.tensorboard import SummaryWriter       # a package of its own
            board = SummaryWriter(out, purge_step=s + 1)            # rows of a crash are replaced
    while s < config.steps:
        metrics, norm, keep = step(s)
        bad = (bad + 1) * (1 - keep)                    # skipped steps in a row, on the device
        worst = torch.maximum(worst, bad)
        s += 1
        bar.update()
        preview = s == config.steps or (config.sample_every and s % config.sample_every == 0)
        if preview or s % config.log_every == 0 or (world == 1 and caught):
            signum = torch.tensor(float(sum(caught[:1])), device=device)
            values = torch.stack([*metrics.values(), norm, worst, signum])
            if world > 1:
                dist.all_reduce(values)                 # norm and counter are alike; losses average
                values /= world
            *values, skipped, stop = values.tolist()    # the one place where the host waits
            caught += [signal.SIGTERM] if stop and not caught else []       # all processes agree
            if skipped >= 10:
                raise ValueError(f"loss or gradient not finite ten times in a row, up to step {s}; "
                                 "the last checkpoint is intact: lower --lr (and --muon-lr)")
            if skipped:
                worst = torch.zeros_like(bad)
                tqdm.write(f"step {s}: loss or gradient not finite (loss {values[0]}), "
                           f"{skipped:.0f} step(s) in a row skipped", file=sys.stderr)
            if rank == 0:
                bar.set_postfix_str(f"loss {values[0]:.4f}", refresh=False)
                values += [optimizer.param_groups[0]["lr"] for optimizer in step.optimizers]
                row = dict(zip(["step", *metrics, "grad_norm", "lr", "muon_lr"], [s, *values]))
                row |= {"held_out": step.held_out() if preview else torch.nan} if held_out else {}
                add_row(out / "log.csv", {**row, "seconds": time.perf_counter() - started})
                for name in row if config.log_to else ():
                    board.add_scalar(name, row[name], s)
        if s == config.steps:
            task.finish(step.ema, dataset, device)
        if rank == 0 and (s % config.save_every == 0 or preview or stop):
            save(out / "ckpt.pt", config, task, step, s)
        if rank == 0 and preview and not stop:
            task.preview(step.ema, dataset, device, out / "samples" / f"{s:06d}.png")
            plot_loss(out / "log.csv", out / "loss.png")
        if stop or (preview and caught and world == 1):
            break
    bar.close()
    if world > 1:
        dist.barrier()                  # nobody reads the checkpoint before it is written
    if caught:
        print(f"stopped at step {s}, saved in {out}; go on with --resume", file=sys.stderr)
        raise SystemExit(128 + caught[0])
    return out / "ckpt.pt"


@dataclasses.dataclass
class Config:
    """flags of the loop"""
    model: str = flag("DiT-128x4/2", "DiT-S/2 ... DiT-XL/8, DiT-WxD/p (width, depth, patch size), "
                      "U-DiT-S, udit-tiny, unet-tiny, vq-tiny, VQ-S, ..., tiny-ae, kl-ae, vq-vae")
    data: str = flag("shapes", "shapes, scenes, mnist, fashion, cifar10, folder|npz|latents:PATH")
    data_dir: str = flag("data", "where official files are looked for, and downloaded to")
    image_size: int = flag(32, "side of the training pictures in pixels", "[1, 65536]")
    hold_out: bool = flag(False, "shapes, scenes: keep six shape-colour pairs out of training")
    skip_bad: bool = flag(False, "folder: leave out pictures that cannot be read")
    flip: str = flag("auto", "mirror pictures; auto: if harmless", "", ["auto", "on", "off"])
    recipe: str = flag("fast", "a set of defaults", choices=["fast", "paper"])
    steps: int = flag(1000, "optimizer steps", "[1, inf)")
    batch_size: int = flag(64, "pictures per optimizer step, over all devices", "[1, 1e9]")
    accum: int = flag(1, "micro-batches: less memory, same result (tiny-ae: nearly)", "[1, inf)")
    checkpointing: bool = flag(False, "compute blocks again in backward: less memory, same result")
    optimizer: str = flag("muon", "muon: on the blocks, adamw elsewhere", "", ["muon", "adamw"])
    lr: float = flag(2e-3, "learning rate of AdamW", "(0, inf)")
    muon_lr: float = flag(0.02, "learning rate of Muon", "(0, inf)")
    weight_decay: float = flag(0.0, "decoupled weight decay", "[0, 1e3]")
    warmup: int = flag(30, "steps of linear warm-up", "[0, inf)")
    lr_decay: str = flag("cosine", "after the warm-up", choices=["cosine", "constant"])
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 = any", "[0, inf)")
    ema: float = flag(0.99, "decay of the averaged weights, less at first", "[0, 1)")
    seed: int = flag(0, "of weights, data order and noise", "[0, 1e15)")
    device: str = flag("auto", "where to run", choices=["auto", "cpu", "cuda", "mps"])
    precision: str = flag("auto", "auto: bfloat16 on cuda", "", ["auto", "float32", "bfloat16"])
    compile: str = flag("auto", "torch.compile; auto: on cuda", choices=["auto", "on", "off"])
    out: str = flag("", "output folder; default: out/MODEL-DATA")
    resume: bool = flag(False, "go on with the run in --out")
    init: str = flag("", "start from the averaged weights of this checkpoint")
    log_every: int = flag(10, "steps between rows of log.csv", "[1, inf)")
    log_to: str = flag(None, "where the rows also go, for curves", "", ["tensorboard"])
    sample_every: int = flag(500, "steps between previews; 0 = only at the end", "[0, inf)")
    save_every: int = flag(500, "steps between checkpoints; previews save as well", "[1, inf)")
    keep: int = flag(0, "also keep the last so many of them, as ckpt-STEP.pt", "[0, inf)")
    save_latents: str = flag("", "only encode the training pictures of --data into this file")


def read_flags(argv):
    """Command line -> (Config, settings of the model's family). A run that goes on has the flags of
    its checkpoint, and --init hands on the model and its family's. Raises ValueError."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("model", "data", "out", "init"):
        look.add_argument(f"--{name}", default="")
    look.add_argument("--resume", action=argparse.BooleanOptionalAction)
    first, given = look.parse_known_args(argv)[0], {}
    start = load_checkpoint(first.init) if os.path.isfile(first.init) else {}
    model = first.model or str(start.get("config", {}).get("model", Config.model))
    out = first.out or default_out(model, first.data or Config.data)
    path = f"{out}/ckpt.pt" if first.resume and os.path.isfile(f"{out}/ckpt.pt") else ""
    if path and not first.model:
        model = str(load_checkpoint(path, "config")["config"].get("model", model))
    def presets(flags):
        given.update(flags)
        paper = PAPER if given.get("recipe") == "paper" else {}
        saved = resumed_flags(given, path, "settings") if path else {
            **start.get("settings", {}), "first_stage": "auto", "model": model}
        flags = {**PRESETS.get(model, {}), **paper, **saved, "resume": False, "out": out}
        flow = {**flags, **given}.get("schedule", "flow") == "flow"     # unset what is not read
        return flags | {name: FLAGS[name][1].default for name in UNREAD[flow]}
    family = settings_class(find_model(model)[0])
    config, settings = parse(argv, __doc__, Config, family, presets=presets, other=readers_of)
    resolve_first_stage(config, settings)
    check_read(given, config, settings)
    return config, settings


def load_data(config, split="train", count=None):
    """A split of --data, at most `count` pictures of it, with --flip as asked."""
    dataset = data.load(config.data, config.image_size, split, config.data_dir, count, config.seed,
                        config.hold_out, config.skip_bad)
    flip = dataset.flip if config.flip == "auto" else config.flip == "on"
    return dataclasses.replace(dataset, flip=flip)


def train_first_stage(config, settings, dataset):
    """--first-stage new: train it in OUT/first_stage, or go on with that -> its checkpoint."""
    model = FAMILIES[find_model(config.model)[0]].first_stage
    names = "data data_dir image_size hold_out skip_bad seed device compile precision accum"
    same = {name: getattr(config, name) for name in names.split()}
    loop = Config(**{**PRESETS[model], **same, "steps": settings.first_stage_steps, "model": model,
                     "out": f"{config.out}/first_stage"})
    loop.batch_size += -loop.batch_size % (loop.accum * ranks()[1])     # it must split as well
    flags = settings_class(model)(**{k: getattr(settings, k) for k in FAMILIES[model].flags})
    if os.path.isfile(path := f"{loop.out}/ckpt.pt"):
        resumed_flags({**same, **vars(flags)}, path, "settings")
        loop.resume = True
    return str(run(loop, make_task(loop, flags, dataset), dataset))


def run(config, task, dataset, held_out=None):
    """Say what is trained and what it costs, and train it -> path of the checkpoint."""
    cost, caught, rank = check_fit(config, task), [], ranks()[0]    # before a folder is made
    if rank == 0:
        count = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
        unread = dataset.captions is not None and getattr(task, "tokenizer", None) is None
        print(f"{config.model} on {dataset.about}{' (not read by this model)' * unread}: "
              f"{count / 1e6:.2f} M parameters, {cost / 1e6:.1f} M MACs per picture, "
              f"{config.steps} steps of {config.batch_size}, {config.device} -> {config.out}")
        pathlib.Path(config.out, "samples").mkdir(parents=True, exist_ok=True)
    handle = lambda n, frame: os._exit(128 + n) if caught else caught.append(n)   # twice: at once
    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with nullcontext() if rank else lock(config.out), tqdm(desc=config.model, unit="step",
                total=config.steps, disable=rank > 0, dynamic_ncols=True,
                bar_format="{l_bar}{bar} {n}/{total} {remaining} left {rate_fmt}{postfix}") as bar:
            return train(config, dataset, task, caught, bar, held_out)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


@one_line
def main(argv):
    """The command line. What can be refused is refused before a first stage is trained."""
    config, settings = read_flags(argv)
    config.device, (rank, world) = resolve_device(config.device), ranks()
    if config.save_latents:
        return None if rank else save_encoded(config, settings, load_data)      # by one process
    micro_size(config)
    check_out(config)
    if world > 1:
        dist.init_process_group("nccl" if config.device == "cuda" else "gloo")
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dataset = load_data(config)             # a loss on held-out data: from 200 training pictures on
    held_out = rank == 0 and len(dataset) >= 200 and load_data(config, "test", config.batch_size)
    if getattr(settings, "first_stage", "") == "new" and not config.resume:
        check_fit(config, make_task(config, settings, dataset))     # raises if parts do not fit
        settings.first_stage = train_first_stage(config, settings, dataset)
    path = run(config, make_task(config, settings, dataset), dataset, held_out)
    if rank == 0:
        print(f"done: {path}\nlook at {config.out}/samples; python sample.py --ckpt {path}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
