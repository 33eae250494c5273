"""What bench.py measures with: the limit of a machine, its clock and memory, the parts of a step

The limit is the rate of a large matrix product by the fastest way that a machine has. There are
several: a convolution is a product too, and no library is the fastest everywhere.

    python bench.py                                 # names the rate of each way above its table
"""
import contextlib
import pathlib
import re
import sys
import time
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from train import make_step


def overfit(config, task, dataset, steps):
    """Train on one batch with fixed noise -> (first, last loss). A sound model gets below 5 %."""
    step = make_step(config, dataset, task)
    losses = [step(0)[0]["loss"] for _ in tqdm(range(steps), desc=f"{config.model}, one batch")]
    return losses[0].item(), losses[-1].item()


def measure(config, task, dataset, steps):
    """A model's row of the table, {column: number}, and the limit, {way: TFLOP/s}. Steps and limit
    are measured in turns, as a machine's speed changes with its other work."""
    memory(device := config.device, anew=True)
    step, rates, seconds = make_step(config, dataset, task), {}, []
    with FlopCounterMode(display=False) as counter:
        step(0)
    for s in range(3):                              # compile, allocate, settle
        step(s)
    for s in range(steps):
        for way, rate in limit(device).items() if s % 5 == 0 else ():
            rates[way] = max(rates.get(way, 0), rate / 1e12)
        start = clock(device)
        step(s)
        seconds.append(clock(device) - start)
    median, peak = max(sorted(seconds)[len(seconds) // 2], 1e-9), memory(device)    # a coarse clock
    rate = counter.get_total_flops() / median / 1e12
    return {"batch": config.batch_size, "step ms": 1000 * median,
            "pictures/s": config.batch_size / median, "TFLOP/s": rate,
            "share %": 100 * rate / best(rates, device)[0],
            "other %": 100 * outside(step, task, device),
            "sample ms": 1000 * sampling(task, step.ema, dataset, device),
            "GiB": peak / 2 ** 30}, rates


def ways(device):
    """Large products by every way that this machine has: {name: (operations, function)}."""
    n = 8192 if device == "cuda" else 1024
    x, w = torch.randn(2, n, n, device=device)
    half, cube = (x.bfloat16(), w.bfloat16()), 2 * n ** 3           # a product and a sum count 2
    found = {"bfloat16 product": (cube, lambda: F.linear(*half))}
    if device == "cuda":
        return found
    can = getattr(torch.cpu, "get_capabilities", dict)()            # new in torch 2.12
    if device != "cpu" or not (can.get("avx512_bf16") or can.get("amx_bf16") or can.get("bf16")):
        found.clear()                                               # else emulated, slowly
    found["product"] = cube, lambda: F.linear(x, w)
    if device == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):      # not in every build
        onednn = torch.ops.mkldnn._linear_pointwise
        found["oneDNN product"] = cube, lambda: onednn(x, w, None, "none", [], "")
    last = lambda a, *shape: a.flatten()[:torch.Size(shape).numel()].view(shape).movedim(3, 1)
    image, kernel = last(x, 1, 32, 32, n), last(w, n, 1, 1, n)      # channels last: pixels are rows
    found["1x1 convolution"] = cube, lambda: F.conv2d(image, kernel)
    images, kernels = last(x, 4, 32, 32, n // 4), last(w, n // 4, 3, 3, n // 4)
    found["3x3 convolution"] = 9 * cube // 4, lambda: F.conv2d(images, kernels, padding=1)
    return found


def limit(device, seconds=0.1):
    """{way: operations per second of a large product}; cuda is waited for once in ten products."""
    rates = {}
    for way, (operations, product) in ways(device).items():
        product()                                       # the first one takes longer
        start, count = clock(device), 0
        while clock(device) - start < seconds:
            for _ in range(many := 10 if device == "cuda" else 1):
                product()
            count += many
        rates[way] = operations * count / (clock(device) - start)
    return rates


def best(rates, device):
    """(rate, way) of the fastest in the models' number format: on cuda bfloat16, else float32."""
    return max((rate, way) for way, rate in rates.items()
               if ("bfloat16" in way) == (device == "cuda"))


def clock(device):
    """Seconds, after the device has finished; on one thread of a CPU those of this process alone,
    which other programs do not lengthen."""
    if device in ("cuda", "mps"):
        getattr(torch, device).synchronize()
    alone = device == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def outside(step, task, device, steps=3):
    """The share of a training step outside forward, backward and the optimizers' steps."""
    def timed(function):
        def run(*given, **named):
            inside.append(-clock(device))
            result = function(*given, **named)
            inside.append(clock(device))
            return result
        return run
    parts, inside = [(task, "loss"), (torch.Tensor, "backward")], []
    with contextlib.ExitStack() as stack:
        for part, name in parts + [(optimizer, "step") for optimizer in step.optimizers]:
            stack.enter_context(mock.patch.object(part, name, timed(getattr(part, name))))
        start = clock(device)
        for s in range(steps):
            step(s)
        return 1 - sum(inside) / (clock(device) - start)


def sampling(task, model, dataset, device):
    """Seconds per picture of one step of the sampler, or for a first stage to encode and decode."""
    x = data.to_float(dataset.images[:8]).to(device)
    run = lambda: model.decode(model.encode(x))
    if hasattr(task, "sample"):
        x = task.examples()[0][:8].to(device)
        run = lambda: task.sample(model, x, steps=1)
    with torch.no_grad():
        run()
        start = clock(device)
        run()
        return (clock(device) - start) / len(x)


def memory(device, anew=False):
    """Peak memory in bytes, of the device on cuda, else of this process. anew: counted from here on
    (only Linux can: elsewhere it is the peak of all models so far)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats() if anew else None
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":                     # getrusage would count the parent's peak too
        if anew:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    import resource                                 # absent on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
