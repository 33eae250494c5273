"""What a training step of U-DiT costs beside one of DiT with equal multiply-accumulates

Claim (U-DiT, Table 11): at 0.72 times its FLOPs, U-DiT-L with all tricks trains at half the speed
of DiT-XL/2, because depth-wise convolutions and many small operations are bound by memory. Here:
DiT-S/2 (6.06 G MACs), U-DiT-S (6.02 G) and U-DiT-S without the tricks (5.89 G); forward, backward
and AdamW, batch 8, 32x32x4, float32, one thread, in turns. CPU seconds (user + system), because
other programs may run. Units are rounds, a step of each model. Two minutes.

    python -m studies.udit_speed
    python -m studies.udit_speed --profile      # and the ten costliest operations of each
"""
import math
import statistics
import time

import torch
from torch.profiler import profile
from tqdm import tqdm

from cli import one_line
from dit import DIT_CONFIGS, DiT
from studies.common import RULE, Table, claims, markdown, parser, whole
from udit import UDIT_CONFIGS, UDiT

MODELS = {"DiT-S/2": lambda: DiT(**DIT_CONFIGS["DiT-S/2"]),
          "U-DiT-S": lambda: UDiT(**UDIT_CONFIGS["U-DiT-S"]),
          "U-DiT-S vanilla": lambda: UDiT(**UDIT_CONFIGS["U-DiT-S"], cosine=False, rope=False,
                                          mlp="basic")}
GIGA = {"DiT-S/2": 6.056, "U-DiT-S": 6.021, "U-DiT-S vanilla": 5.893}       # MACs of a forward
TABLE = Table("udit_speed", ["model", "round"])


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


def ratio(name, other, per_mac=False):
    """{round: log of the times' ratio}; per_mac: of the times per multiply-accumulate."""
    a, b = (TABLE.by("round", "cpu_s", model=model) for model in (name, other))
    less = math.log(GIGA[name] / GIGA[other]) if per_mac else 0.0
    return {k: math.log(a[k] / b[k]) - less for k in a if k in b}


def report():
    """Verdicts and the table from the CSV."""
    if len(TABLE.column("round", model="DiT-S/2")) < 2:
        return ""
    lines, (dit, udit, vanilla) = [], MODELS
    for model in MODELS:
        times = [math.exp(v) for v in ratio(model, dit).values()]
        lines.append([model, len(times), f"{GIGA[model]:.2f}",
                      f"{statistics.median(TABLE.column('cpu_s', model=model)):.2f}",
                      f"{statistics.median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}"])
    rows = [("an operation of U-DiT takes longer than one of DiT",
             "steps a second, DiT 1.71, U-DiT 0.84 at 0.72 of its FLOPs",
             "log time per MAC: U-DiT - DiT", ratio(udit, dit, True)),
            ("because of the tricks", "without 1.55, with 0.84", "log time: with - without",
             ratio(udit, vanilla)),
            ("without them it still does", "DiT 1.71, U-DiT 1.55 at 0.72 of its FLOPs",
             "log time per MAC: U-DiT vanilla - DiT", ratio(vanilla, dit, True))]
    return RULE + "\n" + claims("rounds", rows) + "\n" + markdown(
        ["model", "rounds", "G MACs", "CPU-s of a step, median", "times DiT-S/2, median",
         "lowest to highest"], lines)


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
        TABLE.add(*({"model": name, "round": k, "cpu_s": cpu, "wall_s": wall}
                    for name in MODELS for k, (cpu, wall) in enumerate(seconds[name])))
        for name, step in steps.items() if args.profile else ():
            with profile() as seen:
                step()
            print(name, seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=10))
    print(report())


if __name__ == "__main__":
    main()
