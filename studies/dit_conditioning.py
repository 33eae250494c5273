"""Four ways to tell a DiT its class and time

Claim (DiT, Fig. 5): adaLN-Zero beats cross-attention and in-context conditioning at a fraction of
their cost, and beats adaLN without the zero start. Here: DiT-128x4/2 on latents of `shapes`, 600
steps of 64, everything else as in `python train.py`; the loss on held-out pictures at fixed times
and noise, and what the reader sees in 240 samples. About 90 CPU-seconds a cell, 4 blocks x 3 seeds.

    python -m studies.dit_conditioning
"""
import torch

import data
import sample
from cli import one_line
from evaluate import class_accuracy
from studies.common import (Table, compared, figure, heldout_loss, markdown, mean_se, notice,
                            parser, run, setup, shown, train_and_watch)
from tasks import macs

BLOCKS = {"in_context": "in-context", "cross_attention": "cross-attention", "adaln": "adaLN",
          "adaln_zero": "adaLN-Zero"}
STEPS, EVERY = 600, 100
TABLE = Table("dit_conditioning", ["block", "seed"])


def run_cell(cell, steps=STEPS, out="out/studies/shapes", **flags):
    """Train one block with one seed -> rows for the table."""
    config, dataset, task = setup("DiT-128x4/2", out, data="shapes", steps=steps, seed=cell["seed"],
                                  conditioning=cell["block"], **flags)
    test = data.load("shapes", split="test", count=500)
    x0 = task.encode(data.to_float(test.images))                                # (500, 4, 8, 8)
    measure = lambda ema: {"loss": heldout_loss(task, ema, x0, test.labels)}
    rows, ema = train_and_watch(config, dataset, task, EVERY, measure)
    y = torch.arange(48).repeat(5)                                              # (240,)
    right = class_accuracy(sample.sample_all(task, ema, y)[1], y)["all"][0]
    sizes = {"macs_m": macs(task) / 1e6, "params": sum(p.numel() for p in task.model.parameters())}
    return [{**cell, **row, **sizes, "right": right if row["step"] == steps else ""}
            for row in rows]


def report():
    """Table and sentences from the CSV."""
    last, lines = max(TABLE.column("step"), default=0), []
    for block, name in BLOCKS.items():
        column = lambda key: TABLE.column(key, block=block, step=last)
        if column("loss"):
            lines.append([name, len(column("loss")), f"{column('params')[0] / 1e6:.2f}",
                          f"{column('macs_m')[0]:.1f}", f"{mean_se(column('cpu_s'))[0]:.0f}",
                          shown(column("loss"), 4), shown(column("right"), 1, 100, " %")])
    if len(lines) < len(BLOCKS):
        return ""
    losses = {block: TABLE.by("seed", "loss", block=block, step=last) for block in BLOCKS}
    gaps = ", ".join(f"{name} {compared(losses[block], losses['adaln_zero'], 4)}"
                     for block, name in BLOCKS.items() if block != "adaln_zero")
    return (notice(TABLE) + markdown(["block", "seeds", "M params", "M MACs", "CPU-s",
                                      "held-out loss", "shape and colour right"], lines)
            + f"\nHeld-out loss after {last} steps, minus that of adaLN-Zero: {gaps}.\n")


def plot(axes):
    """Held-out loss against steps."""
    for block, name in BLOCKS.items():
        steps = sorted(set(TABLE.column("step", block=block)))
        means = [mean_se(TABLE.column("loss", block=block, step=s)) for s in steps]
        axes.errorbar(steps, *zip(*means), label=name, capsize=2)
    axes.set(xlabel="optimizer step", ylabel="held-out loss (velocity MSE)", yscale="log",
             title="Conditioning blocks, equal steps")
    axes.legend()


@one_line
def main(argv):
    """Command line of the study."""
    args = parser(__doc__).parse_args(argv)
    cells = [{"block": block, "seed": seed} for seed in range(args.seeds) for block in BLOCKS]
    run(args, TABLE, cells, run_cell)
    print(report())
    figure("dit_conditioning", plot)


if __name__ == "__main__":
    main()
