"""Quality against Gflops: does it matter how a DiT spends them?

The claim (DiT, figure 8 and table 4): FID falls with the Gflops of a forward pass, whether they come from width and
depth or from smaller patches; parameters alone do not explain it.  Here three sizes x three patch sizes on latents of
`shapes`, equal steps; loss on held-out pictures at fixed times and noise (the target is the same for every patch size).
20 to 100 CPU-seconds a cell on one thread, 9 cells a seed.

    python -m studies.dit_scaling                   # -> studies/results/dit_scaling.{csv,md,png}
"""
import math

import torch

import data
from studies.common import Table, figure, heldout_loss, mean_se, parser, setup, todo, train_and_watch, write_markdown

SIZES, PATCHES, STEPS = ("DiT-64x2", "DiT-96x3", "DiT-128x4"), (4, 2, 1), 300


def run_cell(cell):
    """Train one size and patch with one seed -> its row."""
    config, dataset, task = setup(f"{cell['size']}/{cell['patch']}", "out/studies/shapes", data="shapes", steps=STEPS,
                                  seed=cell["seed"])
    test = data.load("shapes", split="test", count=500)
    x0 = task.encode(data.to_float(test.images))                                            # (500, 4, 8, 8)
    rows, _ = train_and_watch(config, dataset, task, STEPS,
                              lambda ema: {"loss": heldout_loss(task, ema, x0, test.labels)})
    params = sum(p.numel() for p in task.model.parameters())
    return {**cell, "macs_m": task.macs() / 1e6, "params": params, **rows[-1]}


def correlation(x, y):
    """Pearson's r of two lists."""
    return torch.corrcoef(torch.tensor([x, y], dtype=torch.float64))[0, 1].item()


def summarise(table):
    """Table, figure, and how well log Gflops and log parameters each explain log loss."""
    points = []
    for size in SIZES:
        for patch in PATCHES:
            if losses := table.column("loss", size=size, patch=patch):
                one = {c: table.column(c, size=size, patch=patch)[0] for c in ("macs_m", "params")}
                points.append((size, patch, one["macs_m"], one["params"], mean_se(losses), len(losses)))
    logs = [[math.log(v) for v in column] for column in zip(*((p[2], p[3], p[4][0]) for p in points))]
    by_macs, by_params = (correlation(x, logs[2]) for x in logs[:2])
    note = (f"{STEPS} steps of 64, mean ± standard error over seeds: `python -m studies.dit_scaling`. Correlation of "
            f"log loss with log MACs {by_macs:.2f}, with log parameters {by_params:.2f}.")
    write_markdown("dit_scaling", ["model", "seeds", "M MACs", "M params", "held-out loss"],
                   [[f"{size}/{patch}", n, f"{macs:.1f}", f"{params / 1e6:.2f}", f"{m:.4f} ± {e:.4f}"]
                    for size, patch, macs, params, (m, e), n in sorted(points, key=lambda p: p[2])], note)

    def draw(axes):
        for size in SIZES:
            mine = [p for p in points if p[0] == size]
            axes.errorbar([p[2] / 1e3 * 2 for p in mine], [p[4][0] for p in mine], [p[4][1] for p in mine], marker="o",
                          capsize=2, label=size)
            for _, patch, macs, _, (mean, _), _ in mine:
                axes.annotate(f"/{patch}", (macs / 1e3 * 2, mean), textcoords="offset points", xytext=(4, 4))
        axes.set(xlabel="Gflops of a forward pass (2 per multiply-accumulate)", ylabel="held-out loss (velocity MSE)",
                 xscale="log", yscale="log", title="Quality against Gflops, equal steps")
        axes.legend()
    figure("dit_scaling", draw)


def main():
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    table = Table("dit_scaling", ["size", "patch", "seed"])
    cells = [{"size": size, "patch": patch, "seed": seed} for seed in range(args.seeds) for size in SIZES
             for patch in PATCHES]
    for cell in [] if args.summary else todo(cells, table, args.part):
        table.add(run_cell(cell))
    summarise(table)


if __name__ == "__main__":
    main()
