"""What one GPU says: equal losses, waits, speed, memory, CUDA graphs, and a small CIFAR-10

Question: is what was written on a CPU right and fast on a card? Ten minutes of one NVIDIA H200.

- (a) Compiled bfloat16 and eager bfloat16 against eager float32, same seeds: largest relative
  difference of the smoothed losses; new graphs after step 2; lines where the host waits for the
  card. The data are 512 pictures, so that an epoch has few steps; its order is copied to the card.
- (b) A training step of published sizes by the paper's recipe (AdamW) on random data. Share: six
  operations per multiply-accumulate of a forward, over time and the rate of a large bfloat16
  product (meters.limit). Kernels: what the card did in one step, and how long.
- (c) Sampling with CUDA graphs, 50 guided steps. (d) Memory of Stable Diffusion v1 in float16.
- (e) `python train.py` with nothing compiled before, and 480 samples judged as by evaluate.py.
- (f) DiT-S/2 on CIFAR-10 pixels by Muon; classifier-FID of 2,000 samples, with its floor.
- (m) As (b), by Muon and by AdamW; DiT-128x4/2 has the batch and the latents of the default run.
- (t) What the tests say of a CPU, for one model of each kind in float32: the gradients are those of
  the CPU, and a run that was saved and goes on equals one that was never stopped. Added after the
  run below: not yet measured on a card.

Each part is a process with a time limit. They compile side by side; while one measures, the others
are halted. A part that fails leaves its reason, and the same command tries it again; the others go
on. --tiny runs all on the CPU with small models, in one process and with nothing compiled. OUT
gets proof.csv, proof.md, the grid of (f), the profiles and the logs.

Seen in the profiles: a step of the default run is the host's time, not the card's. U-DiT's
rotations are complex numbers, which torch.compile leaves uncompiled. Stable Diffusion's U-Net
spends a part of its step on changing the layout of pictures for its convolutions.

    python bench.py --proof out/proof                           # or with more flags:
    python -m studies.gpu_proof --out out/proof --cifar data/cifar10
    cp out/proof/proof.csv studies/results/gpu_proof.csv        # and gpu_proof.png, for the report
"""
import collections
import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings

import torch
from torch._dynamo.utils import counters

import bench
import data
import evaluate
import sample
import train
from cli import one_line, resolve_device
from diffusion import GaussianDiffusion
from models import make_task, settings_class
from studies import meters
from studies.common import Table, markdown, parser, whole
from tasks import DiffusionTask, macs, resume, save
from text import TextConditional, TextEncoder
from unet import UNET_CONFIGS, UNet
from vae import AutoencoderKL

ROOT = pathlib.Path(__file__).parents[1]
TABLE = Table("gpu_proof", ["part"])
TINY = {"U-DiT-B": "udit-tiny", "SD-v1": "unet-tiny", "VQ-B": "vq-tiny", "vq-tiny": "vq-tiny"}
TARGETS = ("DiT-XL/2 at batch 256 at least 60 % of the product; Stable Diffusion's sampling below "
           "6 GiB; the default run below 60 s; losses within rounding, no new graphs, no waits")


def row(setting, measure, value, note=""):
    return {"setting": setting, "measure": measure, "value": value, "note": note}


# --------------------------------------------------------------------------------------------------
# the parts: f(options, model, alone, ...) yields rows; inside `with alone():` the others are halted

def losses(o, model, alone, steps):
    """Part a: three runs from the same seeds."""
    curves, steps = {}, 3 if o.tiny else steps
    for name in ("float32 eager", "bfloat16 eager", "bfloat16 compiled"):
        config, task, dataset = bench.run_of(
            model, bench.Options(device=o.device, batch_size=8 if o.tiny else None))
        full, compiled = name[:7] == "float32", name[9:] == "compiled" and not o.tiny
        config.precision = "float32" if full else "auto"                # auto: bfloat16 on cuda
        config.compile = "on" if compiled else "off"
        torch.set_float32_matmul_precision("highest" if full else "high")   # as train.main does
        step, seen = train.make_step(config, dataset, task), []
        run = lambda some: seen.extend(step(s)[0]["loss"] for s in some)
        run(range(min(3, steps)))
        graphs = counters["stats"]["unique_graphs"]
        waits = host_waits(lambda: run(range(3, steps)), o.device)
        curves[name] = smooth(torch.stack(seen).tolist())
        setting = f"{steps} steps, {name}"
        yield row(setting, "smoothed loss at the end", curves[name][-1])
        if compiled:
            check_compiled()
            yield row(setting, "new graphs after step 2",
                      counters["stats"]["unique_graphs"] - graphs)
            yield row(setting, "graph breaks", sum(counters["graph_break"].values()))
            yield row(setting, "waits after step 2", sum(waits.values()), "; ".join(
                f"{n} in {place}" for place, n in waits.most_common(5)))
        first = curves["float32 eager"]
        if not full:
            yield row(setting, "largest relative difference", max(
                abs(a / b - 1) for a, b in zip(curves[name], first)))


def smooth(values):
    """Running mean, as in loss.png."""
    means = values[:1]
    for value in values[1:]:
        means.append(0.9 * means[-1] + 0.1 * value)
    return means


def host_waits(run, device):
    """{lines of this repository: how often the host waited for the card there} during run()."""
    found = collections.Counter()

    def note(message, *more, **options):
        frames = [f for f in traceback.extract_stack() if pathlib.Path(f.filename).parent == ROOT]
        if "synchroniz" in str(message):
            found[" < ".join(f"{pathlib.Path(f.filename).name}:{f.lineno}"
                             for f in frames[:-3:-1]) or "elsewhere"] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        run()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return found


def check_compiled():
    """Raises RuntimeError if nothing was compiled: train.make_step then goes on without it."""
    if not counters["stats"]["unique_graphs"]:
        raise RuntimeError("torch.compile failed: its message is in the log")


def random_run(o, model, batch, recipe="paper", compile="off"):
    """(config, data set, task) of a model on random pictures, latents or captions of its size."""
    tokens, text = model[:2] in ("VQ", "vq"), model[:2] in ("VQ", "vq", "SD", "un")
    config, settings = train.read_flags([
        "--model", model, "--recipe", recipe, "--batch-size", str(batch), "--device", o.device,
        "--first-stage", "new" if tokens else "none", "--compile", compile, "--data", "random",
        "--out", f"{o.out}/unused"])
    torch.manual_seed(0)
    count, side = 2 * batch, 8 if o.tiny or model == "DiT-128x4/2" else 64 if text else 32
    x = torch.randn(count, 4, side, side)
    if tokens:
        x = torch.randint(256, (count, 3, config.image_size, config.image_size)).to(torch.uint8)
    y = torch.zeros(count, dtype=torch.int64) if text else torch.randint(1000, (count,))
    words = " ".join(f"w{i}" for i in range(71))        # 77 states with start, end and room
    dataset = data.Dataset("random", x, y, [words] * count if text else None,
                           [] if text else [str(i) for i in range(1000)], False)
    return config, dataset, make_task(config, settings, dataset)


def speed(o, model, alone, batch, compile="on", recipe="paper"):
    """Parts b and m: time of a step, share of the card's product, memory, kernels."""
    torch.set_float32_matmul_precision("high")
    if o.tiny:
        batch, compile = 4, "off"
    config, dataset, task = random_run(o, model, batch, recipe, compile)
    operations, begin = 6 * macs(task) * batch, meters.clock(o.device)
    step, seconds = train.make_step(config, dataset, task), []
    for s in range(3):
        step(s)
    start = meters.clock(o.device) - begin
    if compile == "on":
        check_compiled()
    if o.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with alone():
        limit = product_rate(o)
        for s in range(2 if o.tiny else 12):
            begin = meters.clock(o.device)
            step(s)
            seconds.append(meters.clock(o.device) - begin)
        limit = max(limit, product_rate(o))
        memory, profiled = meters.memory(o.device) / 2 ** 30, profile(o, step)
    name = f"batch {batch}, {config.optimizer}, {'compiled' if compile == 'on' else 'eager'}"
    file = f"profile-{model}-{name}.txt".replace("/", "-").replace(", ", "-").replace(" ", "")
    median, table = statistics.median(seconds), profiled.key_averages()
    pathlib.Path(o.out, file).write_text(table.table(sort_by="self_device_time_total",
                                                     row_limit=25, max_name_column_width=90))
    for measure, value in {"ms per step": 1000 * median, "steps/s": 1 / median,
                           "TFLOP/s": operations / median / 1e12, "product, TFLOP/s": limit / 1e12,
                           "share, %": 100 * operations / median / limit, "peak GiB": memory,
                           "s to the third step, beside other work": start}.items():
        yield row(name, measure, value)
    kernels = [e for e in profiled.events()
               if "CUDA" in str(e.device_type) and not e.is_user_annotation]
    yield row(name, "kernels", len(kernels))
    yield row(name, "ms of kernels", sum(e.time_range.elapsed_us() for e in kernels) / 1000)


def product_rate(o):
    """Operations per second of a large product, by the fastest way there is."""
    return meters.best(meters.limit(o.device, 0.01 if o.tiny else 0.5), o.device)[0]


def profile(o, step):
    """One step under torch's profiler; with --tiny nothing, as reading its events takes long."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA][:1 + (o.device == "cuda")]) as p:
        if not o.tiny:
            step(3)
        meters.clock(o.device)
    return p


def families(o, model, alone):
    """Part t: gradients on the card beside the CPU's, and a run that goes on, in float32."""
    torch.set_float32_matmul_precision("highest")
    for name in (model, "tiny-ae") if o.tiny else bench.DEFAULT:
        found, draws = [], {}
        for device in ("cpu", o.device):
            options = bench.Options(device=device, batch_size=8, compile="off")
            config, task, dataset = bench.run_of(name, options)
            torch.manual_seed(0)
            for p in task.model.parameters():       # else what lies before a last 0 has none
                p.data.add_(0.02 * torch.randn_like(p))
            draws = draws or task.draw(8, torch.Generator().manual_seed(0), "cpu")
            few = task.prepare(dataclasses.replace(
                dataset, images=dataset.images[:8], labels=dataset.labels[:8],
                captions=dataset.captions and dataset.captions[:8]), "cpu")
            given = {k: v.to(device) for k, v in draws.items() if k != "flip"}
            task.loss(task.model.to(device), few.images.to(device), few.labels.to(device),
                      torch.arange(8, device=device), **given)[0].backward()
            found.append(torch.cat([p.grad.flatten().cpu() for p in task.model.parameters()
                                    if p.grad is not None]))
        yield row(name, "gradients, relative difference",
                  ((found[0] - found[1]).norm() / found[0].norm()).item())
        yield row(name, "weights of a run that went on, largest difference", gone_on(o, name))


def gone_on(o, name):
    """Largest difference of weights after steps 0, 1, 2, and after 0, 1, saving, loading, 2."""
    ends, path = [], f"{o.out}/gone-on-{os.getpid()}.pt"
    for start in (0, 2):
        config, task, dataset = bench.run_of(name, bench.Options(device=o.device, batch_size=8,
                                                                 compile="off"))
        config.precision = "float32"
        step = train.make_step(config, dataset, task)
        if start:
            resume(path, task, step)
        for s in range(start, 3):
            save(path, config, task, step, s) if s == 2 and not start else None
            step(s)
        ends.append([p.detach().float().cpu() for p in task.model.state_dict().values()])
    os.remove(path)
    return max((a - b).abs().max().item() for a, b in zip(*ends))


def graphs(o, model, alone):
    """Part c: seconds to sample, eager and by CUDA graphs, in float32 and bfloat16."""
    _, _, task = random_run(o, model, 4, "fast")
    steps, net = 2 if o.tiny else 50, task.model.to(o.device).eval()
    for p in net.parameters():                  # else the last layer is 0, and so is every picture
        p.data.add_(0.02 * torch.randn_like(p))
    for count in (1, 2 if o.tiny else 64):
        y, wanted = torch.arange(count, device=o.device) % 10, None
        for half in (False, True):
            fast = net if o.tiny else torch.compile(net, mode="reduce-overhead", dynamic=False)
            cast = lambda: torch.autocast(o.device, torch.bfloat16, enabled=half)
            for kind, some in (("eager", net), ("CUDA graphs", fast)):
                with cast():                    # compile, record, replay
                    sample.sample_all(task, some, y, steps=3 if some is fast else 1)
                with alone(), cast():
                    begin = meters.clock(o.device)
                    x = sample.sample_all(task, some, y, steps=steps)[0]
                    seconds = meters.clock(o.device) - begin
                wanted = x if wanted is None else wanted
                name = f"batch {count}, {'bfloat16' if half else 'float32'}, {kind}"
                yield row(name, f"s for {steps} steps", seconds)
                yield row(name, "relative difference to float32, eager",
                          ((x - wanted).norm() / wanted.norm()).item())


def sd_memory(o, model, alone):
    """Part d: guided 512 x 512 pictures from random weights in float16, decoder included."""
    sizes = dict(UNET_CONFIGS[model], in_channels=4, out_channels=4)
    text = TextEncoder(99, 77, 64, 1) if o.tiny else TextEncoder(49408, 77, 768, 12, 12)
    stage, ids = AutoencoderKL(32, (1, 2), 1) if o.tiny else AutoencoderKL(), torch.arange(77)
    net = TextConditional(UNet(**sizes), text, ids, 0.1).half().to(o.device)
    task = DiffusionTask(settings_class("unet")(schedule="scaled_linear", cfg_scale=7.5),
                         {"channels": 3, "image_size": 16 if o.tiny else 512}, net,
                         GaussianDiffusion(schedule="scaled_linear"), stage.half(), "not needed")
    for part in (net, stage.to(o.device)):
        part.eval().requires_grad_(False)
    for count, steps in ((1, 2),) if o.tiny else ((1, 20), (4, 20)):
        name, y = f"batch {count}, float16", ids.expand(count, -1).to(o.device)
        with alone():
            sample.sample_all(task, net, y, steps=1)
            if o.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            begin = meters.clock(o.device)
            sample.sample_all(task, net, y, steps=steps)
            seconds = meters.clock(o.device) - begin
        yield row(name, "sampling, peak GiB", meters.memory(o.device) / 2 ** 30)
        yield row(name, f"s for {steps} steps and decoding", seconds)


def command(o, name, *argv):
    """Seconds of `python NAME.py argv` in a new process; with --tiny, in this one."""
    argv, begin = [*map(str, argv), "--device", o.device], time.perf_counter()
    if o.tiny:
        importlib.import_module(name).main(argv)
    else:
        subprocess.run([sys.executable, ROOT / f"{name}.py", *argv], check=True)
    return time.perf_counter() - begin


def last_seconds(out):
    """The seconds in the last row of a run's log.csv."""
    return float(pathlib.Path(out, "log.csv").read_text().split()[-1].split(",")[-1])


def default(o, model, alone):
    """Part e: the first command of the README with an empty cache of compiled kernels."""
    out, scores = f"{o.out}/default-{os.getpid()}", pathlib.Path(o.out, "default.json")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{out}/cache"
    os.environ.pop("TORCHINDUCTOR_COMPILE_THREADS", None)
    few = ["--steps", 2, "--first-stage", "none"] if o.tiny else []
    with alone():
        whole = command(o, "train", "--model", model, "--out", f"{out}/run", *few)
        judged = command(o, "evaluate", "--ckpt", f"{out}/run/ckpt.pt", "--n",
                         4 if o.tiny else 480, "--json", scores)
    yield row("", "whole command, s", whole)
    yield row("", "the DiT's steps, s", last_seconds(f"{out}/run"))
    yield row("", "sampling and judging, s", judged)
    rates = json.loads(scores.read_text())["rates"]
    yield row("", "right, %", 100 * rates["all"][0])
    yield row("", "legible, %", 100 * rates["legible"][0])


def photographs(o, model, alone):
    """Part f: train on the pictures of --cifar, sample a grid, compare with real pictures."""
    out, ckpt, steps = f"{o.out}/cifar", f"{o.out}/cifar/ckpt.pt", 2 if o.tiny else 5000
    resume = ["--resume"] if os.path.isfile(ckpt) else []
    command(o, "train", "--model", model, "--data", f"folder:{o.cifar}", "--steps", steps,
            "--batch-size", 8 if o.tiny else 256, "--qk-norm", "--flip", "on", "--ema", 0.999,
            "--warmup", 100, "--sample-every", 0, "--log-every", 50, "--out", out, *resume)
    yield row(f"{steps} steps", "s of training beside other work", last_seconds(out))
    torch.set_float32_matmul_precision("high")
    sample.main(["--ckpt", ckpt, "--n", "60", "--steps", "2" if o.tiny else "50", "--cfg-scale",
                 "2", "--device", o.device, "--out", f"{o.out}/gpu_proof.png"])
    few = ["--n", "8", "--steps", "2", "--classifier-steps", "2"] if o.tiny else ["--n", "2000"]
    for scale in ("2", "1.5"):
        scores, name = pathlib.Path(o.out, f"cifar-{scale}.json"), f"guidance {scale}"
        evaluate.main(["--ckpt", ckpt, "--cfg-scale", scale, "--json", str(scores), "--device",
                       o.device, *few])
        found = json.loads(scores.read_text())
        yield row(name, "classifier-FID", found["fid"])
        yield row(name, "its floor", found["fid_floor"])
        yield row(name, "right class, %", 100 * found["rates"]["class"][0])


# name -> (function, model, more arguments, GiB that it needs, limit in seconds); first things first
PARTS = {
    "b DiT-XL/2": (speed, "DiT-XL/2", {"batch": 256}, 100, 300),
    "f DiT-S/2": (photographs, "DiT-S/2", {}, 14, 500),
    "a DiT-128x4/2": (losses, "DiT-128x4/2", {"steps": 200}, 2, 200),
    "t one of each kind": (families, "DiT-128x4/2", {}, 2, 120),
    "c DiT-S/2": (graphs, "DiT-S/2", {}, 3, 240),
    "d SD-v1": (sd_memory, "SD-v1", {}, 9, 120),
    **{f"a {model}": (losses, model, {"steps": 100}, 2, 240)
       for model in ("DiT-S/2", "udit-tiny", "unet-tiny", "vq-tiny")},
    **{f"m {model} {optimizer}": (speed, model, {"batch": batch, "recipe": recipe}, 14, 240)
       for model, batch in (("DiT-128x4/2", 64), ("DiT-S/2", 256))
       for optimizer, recipe in (("muon", "fast"), ("adamw", "paper"))},
    "b SD-v1": (speed, "SD-v1", {"batch": 16}, 30, 300),
    "b U-DiT-B": (speed, "U-DiT-B", {"batch": 128}, 32, 300),
    "b VQ-B": (speed, "VQ-B", {"batch": 16}, 25, 300),
    "b DiT-B/2": (speed, "DiT-B/2", {"batch": 256}, 28, 200),
    "b DiT-XL/2 eager": (speed, "DiT-XL/2", {"batch": 128, "compile": "off"}, 62, 120),
    "e DiT-128x4/2": (default, "DiT-128x4/2", {}, 3, 200)}


# --------------------------------------------------------------------------------------------------
# several at once

def measured(name, o, alone):
    """The rows of a part as they come; the last is "done", or "failed" with the reason."""
    function, model, more, _, _ = PARTS[name]
    begin = time.perf_counter()
    try:
        for line in function(o, TINY.get(model, "DiT-32x1/4") if o.tiny else model, alone, **more):
            yield {"part": name, **line}
        yield {"part": name, **row("", "done", time.perf_counter() - begin)}
    except (Exception, SystemExit) as error:    # the other parts go on, and the log has it all
        traceback.print_exc()
        yield failure(name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")


def failure(name, why):
    return {"part": name, **row("", "failed", "", why)}


def child(conn, name, o):
    """A part in a process group of its own, its words in OUT/log-PART.txt."""
    os.setsid()
    log = open(pathlib.Path(o.out, "log-" + name.replace("/", "-") + ".txt"), "a")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    conn.send("here")

    @contextlib.contextmanager
    def alone():
        conn.send("ready")
        conn.recv()
        yield
        conn.send("over")
    for line in measured(name, o, alone):
        conn.send(line)


class Part:
    """A running part. It is halted and ended with all processes that it has started."""

    def __init__(self, name, o):
        spawn = multiprocessing.get_context("spawn")
        self.name, (self.conn, theirs) = name, multiprocessing.Pipe()
        self.process = spawn.Process(target=child, args=(theirs, name, o))
        self.process.start()
        theirs.close()
        self.here, self.wants, self.end = False, False, time.monotonic() + PARTS[name][4]

    def signal(self, number):
        """To its whole group, once it has one; before, it can only be ended."""
        if self.process.is_alive() and self.here:
            os.killpg(self.process.pid, number)
        elif number == signal.SIGKILL:
            self.process.kill()

    def hear(self):
        """The next message; a process that died without one has failed."""
        try:
            return self.conn.recv()
        except EOFError:
            return failure(self.name, "its process ended, see its log")


class Together:
    """Parts side by side, as the card's memory allows; measurements one at a time."""

    def __init__(self, names, table, o):
        self.table, self.o, self.waiting, self.running = table, o, list(names), []
        self.holder, self.end = None, time.monotonic() + 60 * o.minutes

    def run(self):
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "4"       # of each part, which inherits it
        try:
            while self.waiting or self.running:
                if not self.start_one():
                    conns = [part.conn for part in self.running]
                    ready = multiprocessing.connection.wait(conns, 0.5)
                    for part in [part for part in self.running if part.conn in ready]:
                        self.answer(part, part.hear())
                    self.end_late_ones()
                    self.give_the_card()
        finally:
            for part in self.running:
                part.signal(signal.SIGKILL)

    def start_one(self):
        """Start the first waiting part that fits. -> was there one?"""
        used = sum(PARTS[part.name][3] for part in self.running)
        fits = [name for name in self.waiting
                if used + PARTS[name][3] <= self.o.gib or not self.running]
        if not fits or self.holder or len(self.running) == self.o.at_once:
            return False
        self.waiting.remove(fits[0])
        self.running.append(Part(fits[0], self.o))
        return True

    def answer(self, part, message):
        """here, ready, over, or a row of the table."""
        part.here, part.wants = part.here or message == "here", part.wants or message == "ready"
        if message == "here" and self.holder:
            part.signal(signal.SIGSTOP)
        elif message == "over":
            self.release()
        elif isinstance(message, dict):
            self.table.add(message)
            if message["measure"] in ("done", "failed"):
                print(f"{part.name}: {message['measure']} {message['note']}", flush=True)
                self.leave(part)

    def end_late_ones(self):
        self.waiting = self.waiting if time.monotonic() < self.end else []
        for part in list(self.running):
            if part is self.holder or not self.holder:          # nobody is late while halted
                if time.monotonic() > min(part.end, self.end):
                    self.answer(part, failure(part.name, "its time was over"))

    def leave(self, part):
        part.process.join(5 * (time.monotonic() < part.end))
        part.signal(signal.SIGKILL)
        self.running.remove(part)
        if part is self.holder:
            self.release()

    def give_the_card(self):
        """Halt all parts but the first that wants to measure."""
        wanting = [part for part in self.running if part.wants]
        if wanting and not self.holder:
            self.holder, self.since = wanting[0], time.monotonic()
            self.holder.wants = False
            for part in self.running:
                part.signal(signal.SIGCONT if part is self.holder else signal.SIGSTOP)
            self.holder.conn.send("go")

    def release(self):
        """Let the others go on; their halt does not count as their time."""
        for part in self.running:
            if part is not self.holder:
                part.end += time.monotonic() - self.since
                part.signal(signal.SIGCONT)
        self.holder = None


# --------------------------------------------------------------------------------------------------
# the report, and the command

def report(table=None):
    """For each letter a table: a line for every setting, a column for every measure."""
    rows = [r for r in (table or TABLE).rows() if r["measure"] != "done"]
    if not rows:
        return ""
    cards = dict.fromkeys(f"{r['setting']}, torch {r['value']}" for r in rows
                          if r["measure"] == "torch")
    text = f"Measured on {'; '.join(cards)}. Targets: {TARGETS}.\n"
    done = [r for r in rows if r["measure"] not in ("torch", "failed")]
    for letter in sorted({r["part"][0] for r in done}):
        mine = [r for r in done if r["part"][0] == letter]
        found = {(r["part"], r["setting"], r["measure"]): r["value"] for r in mine}
        measures, lines = list(dict.fromkeys(r["measure"] for r in mine)), []
        for part, setting in dict.fromkeys((r["part"], r["setting"]) for r in mine):
            cells = [found.get((part, setting, measure), "") for measure in measures]
            lines.append([part[2:], setting, *(f"{cell:.4g}" if isinstance(cell, float) else cell
                                               for cell in cells)])
        text += "\n" + markdown([f"({letter})", "", *measures], lines)
        text += "".join(f"\n{r['part'][2:]}, {r['measure']}: {r['note']}.\n"
                        for r in mine if r["note"])
    return text + "".join(f"\nNot finished: ({r['part'][0]}) {r['part'][2:]}: {r['note']}.\n"
                          for r in rows if r["measure"] == "failed")


def from_bench(options):
    """bench.py --proof. ValueError without a GPU, unless --device cpu asks for tiny models."""
    tiny = resolve_device(options.device) != "cuda"
    if tiny and options.device != "cpu":
        raise ValueError("--proof needs a GPU; with --device cpu it tries all with tiny models")
    main(["--out", options.proof, *["--tiny"] * tiny])


@one_line
def main(argv):
    """Command line of the study."""
    p = parser(__doc__, ())
    p.add_argument("--out", required=True, help="folder of proof.csv, the picture and the logs")
    p.add_argument("--minutes", type=whole, default=9, help="for all parts (default 9)")
    p.add_argument("--tiny", action="store_true", help="small models on the CPU: does it run?")
    p.add_argument("--parts", default="", help="letters, such as a,c, or whole names")
    p.add_argument("--cifar", default="data/cifar10", help="folder with train/ and test/")
    p.add_argument("--at-once", type=whole, default=10, help="processes (default 10)")
    o = p.parse_args(argv)
    o.device, asked = "cpu" if o.tiny else "cuda", o.parts.split(",") if o.parts else []
    unknown = set(asked) - PARTS.keys() - {name[0] for name in PARTS}
    if unknown:
        raise ValueError(f"--parts {', '.join(unknown)}: choose of {'; '.join(PARTS)}")
    if not o.tiny and not torch.cuda.is_available():
        raise ValueError("this needs a GPU; --tiny tries the script without one")
    pathlib.Path(o.out).mkdir(parents=True, exist_ok=True)
    table = Table("proof", ["part"], o.out)
    done = {r["part"] for r in table.rows() if r["measure"] == "done"}
    names = [name for name in PARTS if (not asked or {name, name[0]} & set(asked))
             and name not in done]
    if o.tiny:
        for name in names:
            for line in measured(name, o, contextlib.nullcontext):
                table.add(line)
    else:
        card = torch.cuda.get_device_properties(0)
        o.gib = card.total_memory / 2 ** 30 - 4
        table.add({"part": "machine", **row(card.name, "torch", torch.__version__)})
        Together(names, table, o).run()
    picture = "\n![samples of (f)](gpu_proof.png)\n" * os.path.isfile(f"{o.out}/gpu_proof.png")
    pathlib.Path(o.out, "proof.md").write_text(f"# What one GPU says\n\n{report(table)}{picture}")
    print(f"wrote {o.out}/proof.md")


if __name__ == "__main__":
    main()
