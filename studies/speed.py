"""How fast and how large: a row for each model, growth with size, checkpointing, the official code

- The table of `python bench.py`; its docstring explains the columns. The limit is measured by each
  way that the machine has to multiply matrices; the share is of the fastest one in float32.
- Growth: the training step of train.py (Muon, pixels) of DiT-128x4/2 with 64 tokens and 16
  pictures (tokens: 4 pictures), and one of the four sizes changed. Slope: of the logarithm of time
  or memory against that of the size, over all sizes and over the last two; 1 is proportional.
- `train.py --checkpointing`: the same step with the blocks computed again in backward, by AdamW.
- Against the official code: forward, mean square, backward and fused AdamW of the same weights, in
  a checkout that you give. The code of DiT needs timm, that of U-DiT needs einops. Ours also in
  bfloat16.

Times are medians of one thread's CPU time, in turns: a round has every setting once. Memory is the
peak of a process of its own, less what it had after importing; about 150 MiB of it any step needs,
for 512 pictures and what the first step loads. Five minutes of a free core without the official
code.

    python -m studies.speed --against DiT U-DiT     # two checkouts: all of it, into the CSV
    python -m studies.speed --only grow             # one of: table, grow, checkpointing, against
"""
import importlib.util
import math
import multiprocessing
import pathlib
import statistics

import torch
from tqdm import tqdm

import bench
import train
from cli import one_line
from dit import DIT_CONFIGS, DiT
from studies import meters
from studies.common import Table, markdown, parser, whole
from studies.meters import clock, memory
from udit import UDIT_CONFIGS, UDiT

TABLE = Table("speed", ["what", "setting"])
# (model, pictures, side of a picture, more flags) of a run
GROWTH = {
    "depth": {n: (f"DiT-128x{n}/2", 16, 16) for n in (2, 4, 8)},
    "width": {n: (f"DiT-{n}x4/2", 16, 16) for n in (64, 128, 256)},
    "tokens": {(n // 2) ** 2: ("DiT-128x4/2", 4, n) for n in (8, 16, 32, 64)},
    "batch": {n: ("DiT-128x4/2", n, 16) for n in (4, 16, 64)}}
CHECKPOINTED = (("DiT-S/2", 4, 32), ("unet-small", 8, 32))
# a file of the checkout -> (what it names the model, our name, pictures, our model)
OFFICIAL = {
    "udit_models.py": ("U_DiT_S", "U-DiT-S", 4, lambda: UDiT(**UDIT_CONFIGS["U-DiT-S"])),
    "models.py": ("DiT_S_2", "DiT-S/2", 8, lambda: DiT(**DIT_CONFIGS["DiT-S/2"]))}


def row(what, setting, measure, value):
    return {"what": what, "setting": setting, "measure": measure, "value": value}


def machine(device):
    """The processor as it names itself, with what counts here; or the card."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    can = getattr(torch.cpu, "get_capabilities", dict)()
    more = [name for name in ("avx512_bf16", "amx_bf16") if can.get(name)]
    return ", ".join([str(can.get("cpu_name", "a CPU")), *more])


# --------------------------------------------------------------------------------------------------
# measuring

def race(steps, rounds, device):
    """{name: median seconds} of functions; a round has all of them, and one before warms up."""
    seconds = {name: [] for name in steps}
    for turn in tqdm(range(-1, rounds), desc="rounds", leave=False):
        for name, step in steps.items():
            start = clock(device)
            step()
            if turn >= 0:
                seconds[name].append(clock(device) - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def step_of(run, device, *flags):
    """One training step of a run (model, pictures, side), as a function without arguments."""
    model, batch, side = run
    options = bench.Options(batch_size=batch, image_size=side, device=device, compile="off")
    stage = "new" if model.startswith("unet") else "none"
    step = train.make_step(*order(bench.run_of(model, options, "--first-stage", stage, *flags)))
    return lambda: step(0)


def order(run):
    """(config, task, data set) -> the order of make_step."""
    config, task, dataset = run
    return config, dataset, task


def peak(run, device, flags, queue):
    """Put what two steps of a run add to this process's peak memory into a queue, in MiB."""
    torch.set_num_threads(1)
    before, step = memory(device, anew=True), step_of(run, device, *flags)
    step(), step()
    queue.put((memory(device) - before) / 2 ** 20)


def fresh_peak(run, device, *flags):
    """The same from a new process, whose peak no other run has raised. Raises RuntimeError."""
    context = multiprocessing.get_context("forkserver")     # which imports everything only once
    context.set_forkserver_preload(["studies.speed"])
    queue = context.SimpleQueue()
    process = context.Process(target=peak, args=(run, device, flags, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the process that measures {run} ended with {process.exitcode}")
    return queue.get()


def slope(sizes, values):
    """Of the least-squares line through the logarithms."""
    x, y = ([math.log(v) for v in some] for some in (sizes, values))
    return statistics.linear_regression(x, y).slope


# --------------------------------------------------------------------------------------------------
# what is measured: each yields rows

def grow(device, rounds=6):
    """Time and memory of a step against depth, width, tokens and batch."""
    runs = {run for sizes in GROWTH.values() for run in sizes.values()}      # they share one
    seconds = race({run: step_of(run, device) for run in sorted(runs)}, rounds, device)
    memories = {run: fresh_peak(run, device) for run in tqdm(sorted(runs), desc="memory")}
    for axis, sizes in GROWTH.items():
        times, peaks = ([of[run] for run in sizes.values()] for of in (seconds, memories))
        for size, time, mib in zip(sizes, times, peaks):
            yield row("grow", f"{axis} {size}", "step ms", 1000 * time)
            yield row("grow", f"{axis} {size}", "MiB", mib)
        for name, values in (("time", times), ("memory", peaks)):
            setting = f"{axis}, slopes"
            yield row("grow", setting, f"{name}, all", slope(list(sizes), values))
            yield row("grow", setting, f"{name}, last two", slope(list(sizes)[-2:], values[-2:]))


def checkpointing(device, rounds=6):
    """What --checkpointing saves, and what it costs."""
    for run in CHECKPOINTED:
        ways = {"plain": ("--optimizer", "adamw"),
                "checkpointing": ("--optimizer", "adamw", "--checkpointing")}
        seconds = race({way: step_of(run, device, *flags) for way, flags in ways.items()},
                       rounds, device)
        mib = {way: fresh_peak(run, device, *flags) for way, flags in ways.items()}
        setting = f"{run[0]}, batch {run[1]}"
        for name, found, unit in (("step ms", seconds, 1000), ("MiB", mib, 1)):
            for way in ways:
                yield row("checkpointing", setting, f"{name}, {way}", unit * found[way])
            yield row("checkpointing", setting, f"{name}, ratio",
                      found["checkpointing"] / found["plain"])


def against(path, device, rounds=6):
    """The official model in a checkout, and ours with its weights. Raises ValueError."""
    file = next((pathlib.Path(path, name) for name in OFFICIAL
                 if pathlib.Path(path, name).is_file()), None)
    if file is None:
        raise ValueError(f"{path} has no {' and no '.join(OFFICIAL)}: give a checkout of "
                         "facebookresearch/DiT or YuchuanTian/U-DiT")
    theirs_name, name, batch, ours = OFFICIAL[file.name]
    spec = importlib.util.spec_from_file_location("official_models", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{file} needs {error.name}: pip install {error.name}") from error
    torch.manual_seed(0)
    models = {"official": getattr(module, theirs_name)().to(device), "ours": ours().to(device)}
    for p in models["official"].parameters():           # else the last layer gives 0
        p.data.add_(0.02 * torch.randn_like(p))
    models["ours"].load_state_dict(models["official"].state_dict())
    x, target = (torch.randn(batch, channels, 32, 32, device=device) for channels in (4, 8))
    t, y = (torch.randint(1000, (batch,), device=device) for _ in range(2))
    with torch.no_grad():
        a, b = (model.eval()(x, t, y) for model in models.values())
    setting = f"{name}, batch {batch}"
    yield row("against", setting, "relative difference", ((a - b).norm() / a.norm()).item())
    given = x, t, y, target
    seconds = race({"official": training(models["official"].train(), *given),
                    "ours": training(models["ours"].train(), *given),
                    "ours in bfloat16": training(models["ours"], *given, bfloat16=True)},
                   rounds, device)
    for who in seconds:
        yield row("against", setting, f"step ms, {who}", 1000 * seconds[who])
    for who in [*seconds][1:]:
        yield row("against", setting, f"{who} / official", seconds[who] / seconds["official"])


def training(model, x, t, y, target, bfloat16=False):
    """A step of a model on given inputs, as a function without arguments."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            out = model(x, t, y)
        (out - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def table(device, rounds=10):
    """The rows and the limit of bench.py."""
    best = {}
    for model in bench.DEFAULT:
        found, rates = meters.measure(*bench.run_of(model, bench.Options(device=device)), rounds)
        best = {way: max(rate, best.get(way, 0)) for way, rate in rates.items()}
        for measure, value in found.items():
            yield row("table", model, measure, value)
    for way, rate in best.items():
        yield row("limit", way, "TFLOP/s", rate)


# --------------------------------------------------------------------------------------------------
# the report, and the commands

TITLES = {"limit": "Limit", "table": "Models", "grow": "Growth", "against": "Official code",
          "checkpointing": "Checkpointing"}


def shown(rows):
    """A table for each kind: a line for every setting, a column for every measure."""
    text = ""
    for what, title in TITLES.items():
        for slopes in (False, True):
            mine = [r for r in rows if r["what"] == what and ("slopes" in r["setting"]) == slopes]
            measures = list(dict.fromkeys(r["measure"] for r in mine))
            found = {(r["setting"], r["measure"]): f"{r['value']:.4g}" for r in mine}
            lines = [[setting, *(found.get((setting, measure), "") for measure in measures)]
                     for setting in dict.fromkeys(r["setting"] for r in mine)]
            text += markdown([title, *measures], lines) + "\n" if mine else ""
    return text.rstrip("\n") + "\n"


def report():
    """All tables, of the CSV."""
    rows = TABLE.rows()
    names = dict.fromkeys(r["setting"] for r in rows if r["what"] == "machine")
    return f"Measured on {'; '.join(names)}, one thread.\n\n{shown(rows)}" if rows else ""


def replace(what, rows):
    """Put rows in the place of those that the table has of these kinds."""
    kept = [r for r in TABLE.rows() if r["what"] not in what]
    TABLE.path.unlink(missing_ok=True)
    TABLE.add(*kept, *rows)


@one_line
def main(argv):
    """The command of the study."""
    kinds = {"table": table, "grow": grow, "checkpointing": checkpointing}
    p = parser(__doc__, ["summary"])
    p.add_argument("--only", choices=[*kinds, "against"], help="one kind of rows")
    p.add_argument("--against", nargs="+", default=[], help="checkouts of DiT and U-DiT")
    p.add_argument("--rounds", type=whole, default=6, help="steps of each setting (default 6)")
    args = p.parse_args(argv)
    if args.only == "against" and not args.against:
        raise ValueError("--only against needs --against with a checkout")
    if not args.summary:
        torch.set_num_threads(1)
        replace(["machine"], [row("machine", machine("cpu"), "torch", torch.__version__)])
    for kind in [] if args.summary else [args.only] if args.only else kinds:
        if kind in kinds:
            replace([kind, "limit"] if kind == "table" else [kind],
                    list(kinds[kind]("cpu", args.rounds)))
    if args.against:
        rows = [r for path in args.against for r in against(path, "cpu", args.rounds)]
        replace(["against"], rows)
    print(report())


if __name__ == "__main__":
    main()
