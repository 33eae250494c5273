"""How fast is it, and does it learn at all? Measured against what this machine can do.

    python bench.py                               # time of a step, share of the machine's limit
    python bench.py --models DiT-S/2 unet-tiny --steps 20
    python bench.py --overfit --steps 200 --models udit-tiny    # self-check: one batch, same noise
"""
import dataclasses
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from cli import flag, one_line, parse, resolve_device
from models import FAMILIES, find_model, make_task
from train import make_step, read_flags


@dataclasses.dataclass
class Options:
    """what to measure"""
    models: tuple = flag(("DiT-128x4/2", "udit-tiny", "unet-tiny", "vq-tiny", "tiny-ae", "vq-vae"),
                         "names of models, see train.py")
    steps: int = flag(None, "steps to time (default: 10), or to --overfit (200)", "[1, inf)")
    batch_size: int = flag(None, "pictures per step (default: as in training)", "[1, 1e9]")
    image_size: int = flag(None, "side of the pictures (default: as in training)", "[1, 65536]")
    overfit: bool = flag(False, "train on one batch: its loss must fall below 5 %%")
    device: str = flag("auto", "where to run", "", ["auto", "cpu", "cuda", "mps"])
    compile: str = flag("auto", "torch.compile; auto: on cuda", "", ["auto", "on", "off"])


def run_of(model, options, *flags):
    """(config, task, data set) of a model as train.py trains it, on an untrained first stage."""
    world = "scenes" if FAMILIES[find_model(model)[0]].captions else "shapes"
    for name in ("batch_size", "image_size", "device", "compile"):
        if getattr(options, name):
            flags += f"--{name.replace('_', '-')}", str(getattr(options, name))
    config, settings = read_flags(["--model", model, "--data", world, *flags])
    config.device = resolve_device(config.device)
    dataset = data.load(config.data, config.image_size, count=max(512, config.batch_size))
    return config, make_task(config, settings, dataset), dataset


def overfit(model, options):
    """Train on one batch with fixed noise -> (first, last loss). A sound model gets below 5 %."""
    config, task, dataset = run_of(model, options, "--warmup", "0", "--lr-decay", "constant")
    step = make_step(config, dataset, task)
    losses = [step(0)[0]["loss"] for _ in tqdm(range(options.steps), desc=f"{model}, one batch")]
    return losses[0].item(), losses[-1].item()


def limit(device, seconds=0.5):
    """Operations per second of a large matrix product: bfloat16 on cuda, float32 elsewhere."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b                                           # the first product takes longer
    start, count = clock(device), 0
    while clock(device) - start < seconds:
        a @ b
        count += 1
    return 2 * n ** 3 * count / (clock(device) - start)


def clock(device):
    """Seconds, after the device has finished what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(model, options):
    """Time a model's training step -> {"ms", "pictures/s", "TFLOP/s", "limit", "share", "GiB"}.
    Steps and the limit are measured in turns, as a machine's speed changes with its other work."""
    config, task, dataset = run_of(model, options)
    step, device, best, seconds = make_step(config, dataset, task), config.device, 0.0, []
    with FlopCounterMode(display=False) as counter:
        step(0)
    for s in range(3):                              # compile, allocate, settle
        step(s)
    for s in range(options.steps):
        best = max(best, limit(device)) if s % 5 == 0 else best
        start = clock(device)
        step(s)
        seconds.append(clock(device) - start)
    median = sorted(seconds)[len(seconds) // 2]
    rate = counter.get_total_flops() / median
    return {"ms": 1000 * median, "pictures/s": config.batch_size / median, "TFLOP/s": rate / 1e12,
            "limit": best / 1e12, "share": rate / best, "GiB": memory(device) / 2 ** 30}


def memory(device):
    """Peak memory in bytes: of the device on cuda, else of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource                                 # absent on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@one_line
def main(argv):
    """The command. --overfit exits with 1 if a model did not learn its batch."""
    (options,), failed = parse(argv, __doc__, Options), 0
    options.steps = options.steps or (200 if options.overfit else 10)
    for model in options.models:            # what is wrong with the last is said before the first
        run_of(model, options)
    for model in options.models:
        if options.overfit:
            first, last = overfit(model, options)
            failed += not (learned := last < 0.05 * first)              # False for nan too
            print(f"{model}: loss {first:.4f} -> {last:.4f} ({last / first:.1%}), "
                  f"{'ok' if learned else 'NOT ok'}")
        else:
            row = measure(model, options)
            print(f"{model:14}" + ", ".join(f"{name} {value:.3g}" for name, value in row.items()))
    raise SystemExit(int(failed > 0))


if __name__ == "__main__":
    main()
