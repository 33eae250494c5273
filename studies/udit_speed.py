"""What a training step of U-DiT costs beside one of DiT, when their multiply-accumulates are equal.

The claim (U-DiT, table 11): at 0.72 times its FLOPs, U-DiT-L with all tricks trains at half the speed of DiT-XL/2, for
depth-wise convolutions and many small operations are bound by memory, not by arithmetic.  Here DiT-S/2 (6.06 G MACs),
U-DiT-S (6.02 G) and vanilla U-DiT-S (5.89 G): forward, backward and AdamW, batch 8, 32x32x4, float32, one thread of a
CPU, in turns. CPU-seconds (user + system), for other programs may run; wall seconds too. Two minutes on a free core.

    python -m studies.udit_speed                    # -> studies/results/udit_speed.csv
    python -m studies.udit_speed --profile          # and the ten costliest operations of each
"""
import argparse
import csv
import statistics
import time

import torch
from torch.profiler import profile
from tqdm import tqdm

from dit import DiT, dit_config
from studies.common import RESULTS
from udit import UDIT_CONFIGS, UDiT

MODELS = {"DiT-S/2": lambda: DiT(**dit_config("DiT-S/2")), "U-DiT-S": lambda: UDiT(**UDIT_CONFIGS["U-DiT-S"]),
          "U-DiT-S vanilla": lambda: UDiT(**UDIT_CONFIGS["U-DiT-S"], cosine=False, rope=False, mlp="basic")}


def step_of(build, batch=8):
    """A model's training step, without arguments."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    x, target = torch.randn(batch, 4, 32, 32), torch.randn(batch, 8, 32, 32)
    t, y = torch.randint(1000, (batch,)), torch.randint(1000, (batch,))

    def step():
        (model(x, t, y) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def race(steps, rounds):
    """{name: [(CPU seconds, wall seconds) per round]}, all models in every round, so that they share what disturbs."""
    seconds = {name: [] for name in steps}
    for turn in tqdm(range(-1, rounds), desc="rounds"):             # round -1 warms up
        for name, step in steps.items():
            start = time.process_time(), time.perf_counter()
            step()
            if turn >= 0:
                seconds[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return seconds


def main():
    """Command line of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="steps of each model")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = {name: step_of(build) for name, build in MODELS.items()}
    seconds, rows = race(steps, args.rounds), []
    for name, times in seconds.items():
        ratios = [[a[i] / b[i] for a, b in zip(times, seconds["DiT-S/2"])] for i in (0, 1)]    # within each round
        cpu, wall = zip(*times)
        rows.append({"model": name, "rounds": args.rounds, "cpu_s_median": statistics.median(cpu),
                     "cpu_s_min": min(cpu), "wall_s_median": statistics.median(wall),
                     "cpu_ratio_median": statistics.median(ratios[0]), "cpu_ratio_low": min(ratios[0]),
                     "cpu_ratio_high": max(ratios[0]), "cpu_ratio_of_minima": min(cpu) / min(seconds["DiT-S/2"])[0],
                     "wall_ratio_median": statistics.median(ratios[1])})
        rows[-1] = {k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}
        print(", ".join(f"{k} {v}" for k, v in rows[-1].items()))
    with open(RESULTS / "udit_speed.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for name, step in steps.items() if args.profile else ():
        with profile() as seen:
            step()
        print(name, seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=10), sep="\n")


if __name__ == "__main__":
    main()
