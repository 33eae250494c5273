"""Four ways to tell a DiT its class and time, raced on one budget.

The claim (DiT, figure 5): adaLN-Zero beats cross-attention and in-context conditioning at a fraction of their cost, and
beats adaLN without the zero start.  Here DiT-128x4/2 on latents of `shapes`, everything else as in `python train.py`;
loss on held-out pictures at fixed times and noise, and what the reader sees in samples at the end.
About 90 CPU-seconds a cell on one thread, 4 blocks x 3 seeds.

    python -m studies.dit_conditioning              # -> studies/results/dit_conditioning.{csv,md,png}
"""
import torch

import data
import sample
from evaluate import class_accuracy
from studies.common import Table, figure, heldout_loss, mean_se, parser, setup, todo, train_and_watch, write_markdown

BLOCKS = {"in_context": "in-context", "cross_attention": "cross-attention", "adaln": "adaLN",
          "adaln_zero": "adaLN-Zero"}
STEPS, EVERY = 600, 100


def run_cell(cell):
    """Train one block with one seed -> rows for the table."""
    config, dataset, task = setup("DiT-128x4/2", "out/studies/shapes", data="shapes", steps=STEPS, seed=cell["seed"],
                                  conditioning=cell["block"])
    test = data.load("shapes", split="test", count=500)
    x0 = task.encode(data.to_float(test.images))                                            # (500, 4, 8, 8)
    rows, ema = train_and_watch(config, dataset, task, EVERY,
                                lambda ema: {"loss": heldout_loss(task, ema, x0, test.labels)})
    y = torch.arange(48).repeat(5)                                                          # (240,)
    _, pictures, _ = sample.draw_all(task, ema, y, seed=0)
    right = class_accuracy(pictures, y)["match"]
    macs, params = task.macs() / 1e6, sum(p.numel() for p in task.model.parameters())
    return [{**cell, **row, "macs_m": macs, "params": params, "right": right if row["step"] == STEPS else ""}
            for row in rows]


def summarise(table):
    """Table and figure from the CSV."""
    rows = []
    for block, name in BLOCKS.items():
        last = dict(block=block, step=STEPS)
        if not (losses := table.column("loss", **last)):
            continue
        loss, right, cpu = (mean_se(table.column(c, **last)) for c in ("loss", "right", "cpu_s"))
        rows.append([name, len(losses), f"{table.column('params', **last)[0] / 1e6:.2f}",
                     f"{table.column('macs_m', **last)[0]:.1f}", f"{cpu[0]:.0f}", f"{loss[0]:.4f} ± {loss[1]:.4f}",
                     f"{100 * right[0]:.0f} ± {100 * right[1]:.0f} %"])
    write_markdown("dit_conditioning", ["block", "seeds", "M params", "M MACs", "CPU-s", "held-out loss",
                                        "shape and colour right"], rows,
                   f"{STEPS} steps of 64, mean ± standard error over seeds: `python -m studies.dit_conditioning`")

    def draw(axes):
        for block, name in BLOCKS.items():
            steps = sorted(set(table.column("step", block=block)))
            means = [mean_se(table.column("loss", block=block, step=s)) for s in steps]
            axes.errorbar(steps, [m for m, _ in means], [e for _, e in means], label=name, capsize=2)
        axes.set(xlabel="optimizer step", ylabel="held-out loss (velocity MSE)", yscale="log",
                 title="Conditioning blocks, equal steps")
        axes.legend()
    figure("dit_conditioning", draw)


def main():
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    table = Table("dit_conditioning", ["block", "seed"])
    cells = [{"block": block, "seed": seed} for seed in range(args.seeds) for block in BLOCKS]
    for cell in [] if args.summary else todo(cells, table, args.part):
        table.add(*run_cell(cell))
    summarise(table)


if __name__ == "__main__":
    main()
