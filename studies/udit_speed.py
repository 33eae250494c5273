"""What a training step of U-DiT costs beside one of DiT with equal multiply-accumulates

Claim (U-DiT, Table 11): at 0.72 times its FLOPs, U-DiT-L with all tricks trains at half the speed
of DiT-XL/2, because depth-wise convolutions and many small operations are bound by memory. Here:
DiT-S/2 (6.06 G MACs), U-DiT-S (6.02 G) and U-DiT-S without the tricks (5.89 G); forward, backward
and AdamW, batch 8, 32x32x4, float32, one thread, in turns. CPU seconds (user + system), because
other programs may run. Two minutes.

    python -m studies.udit_speed
    python -m studies.udit_speed --profile      # and the ten costliest operations of each
"""
import statistics
import time

import torch
from torch.profiler import profile
from tqdm import tqdm

from cli import one_line
from dit import DIT_CONFIGS, DiT
from studies.common import Table, markdown, parser, whole
from udit import UDIT_CONFIGS, UDiT

MODELS = {"DiT-S/2": lambda: DiT(**DIT_CONFIGS["DiT-S/2"]),
          "U-DiT-S": lambda: UDiT(**UDIT_CONFIGS["U-DiT-S"]),
          "U-DiT-S vanilla": lambda: UDiT(**UDIT_CONFIGS["U-DiT-S"], cosine=False, rope=False,
                                          mlp="basic")}
TABLE = Table("udit_speed", ["model"])


def step_of(build, batch=8, side=32):
    """A model's training step, without arguments."""
    torch.manual_seed(0)
    model = build()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    x, target = torch.randn(batch, 4, side, side), torch.randn(batch, 8, side, side)
    t, y = torch.randint(1000, (batch,)), torch.randint(1000, (batch,))

    def step():
        (model(x, t, y) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def race(steps, rounds):
    """{name: [(CPU seconds, wall seconds) per round]}; a round has all models, to be fair."""
    seconds = {name: [] for name in steps}
    for turn in tqdm(range(-1, rounds), desc="rounds"):             # round -1 warms up
        for name, step in steps.items():
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            if turn >= 0:
                seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return seconds


def row_of(name, seconds, first):
    """What the table says of a model; ratios are within a round, to the model `first`."""
    cpu, wall = zip(*seconds[name])
    cpu_ratio, wall_ratio = ([a[i] / b[i] for a, b in zip(seconds[name], seconds[first])]
                             for i in (0, 1))
    row = {"cpu_s_median": statistics.median(cpu), "cpu_s_min": min(cpu),
           "wall_s_median": statistics.median(wall),
           "cpu_ratio_median": statistics.median(cpu_ratio), "cpu_ratio_low": min(cpu_ratio),
           "cpu_ratio_high": max(cpu_ratio),
           "cpu_ratio_of_minima": min(cpu) / min(seconds[first])[0],
           "wall_ratio_median": statistics.median(wall_ratio)}
    return {"model": name, "rounds": len(cpu), **{k: round(v, 3) for k, v in row.items()}}


def report():
    """The table from the CSV."""
    lines = [[r["model"], r["rounds"], f"{r['cpu_s_median']:.2f}", f"{r['cpu_ratio_median']:.2f}",
              f"{r['cpu_ratio_low']:.2f} to {r['cpu_ratio_high']:.2f}"] for r in TABLE.rows()]
    return markdown(["model", "rounds", "CPU-s of a step, median", "times DiT-S/2, median",
                     "lowest to highest"], lines) if lines else ""


@one_line
def main(argv):
    """Command line of the study."""
    p = parser(__doc__, ("summary", "threads"))
    p.add_argument("--rounds", type=whole, default=9, help="steps of each model")
    p.add_argument("--profile", action="store_true", help="the costliest operations")
    args = p.parse_args(argv)
    if not args.summary:
        torch.set_num_threads(args.threads)
        steps = {name: step_of(build) for name, build in MODELS.items()}
        seconds = race(steps, args.rounds)
        TABLE.path.unlink(missing_ok=True)                          # a new run replaces the old
        TABLE.add(*(row_of(name, seconds, "DiT-S/2") for name in MODELS))
        for name, step in steps.items() if args.profile else ():
            with profile() as seen:
                step()
            print(name, seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=10))
    print(report())


if __name__ == "__main__":
    main()
