"""Quality against Gflops: does it matter how a DiT spends them?

Claim (DiT, Fig. 8 and Table 4): FID falls with the Gflops of a forward pass, whether they come from
width and depth or from smaller patches; parameters alone do not explain it. Here: three sizes times
three patch sizes on latents of `shapes`, 300 steps of 64; the loss on held-out pictures at fixed
times and noise, whose target is the same for every patch size. 20 to 100 CPU-seconds a cell, 9
cells a seed.

    python -m studies.dit_scaling
"""
import math
import statistics

import data
from cli import one_line
from studies.common import (Table, compared, figure, heldout_loss, markdown, mean_se, notice,
                            parser, run, setup, shown, train_and_watch)
from tasks import macs

SIZES, PATCHES, STEPS = ("DiT-64x2", "DiT-96x3", "DiT-128x4"), (4, 2, 1), 300
TABLE = Table("dit_scaling", ["size", "patch", "seed"])


def run_cell(cell, steps=STEPS, out="out/studies/shapes", **flags):
    """Train one size and patch with one seed -> its row."""
    config, dataset, task = setup(f"{cell['size']}/{cell['patch']}", out, data="shapes",
                                  steps=steps, seed=cell["seed"], **flags)
    test = data.load("shapes", split="test", count=500)
    x0 = task.encode(data.to_float(test.images))                                # (500, 4, 8, 8)
    measure = lambda ema: {"loss": heldout_loss(task, ema, x0, test.labels)}
    rows, _ = train_and_watch(config, dataset, task, steps, measure)
    sizes = {"macs_m": macs(task) / 1e6, "params": sum(p.numel() for p in task.model.parameters())}
    return [{**cell, **sizes, **rows[-1]}]


def points():
    """[(size, patch, million MACs, parameters, losses of the seeds)], fewest MACs first."""
    found = []
    for size in SIZES:
        for patch in PATCHES:
            column = lambda key: TABLE.column(key, size=size, patch=patch)
            if column("loss"):
                found.append((size, patch, column("macs_m")[0], column("params")[0],
                              column("loss")))
    return sorted(found, key=lambda point: point[2])


def report():
    """Table and sentences from the CSV."""
    found = points()
    if len(found) < len(SIZES) * len(PATCHES):
        return ""
    lines = [[f"{size}/{patch}", len(losses), f"{million:.1f}", f"{params / 1e6:.2f}",
              shown(losses, 4)] for size, patch, million, params, losses in found]
    loss = [math.log(mean_se(point[4])[0]) for point in found]
    by_macs, by_params = (statistics.correlation([math.log(point[k]) for point in found], loss)
                          for k in (2, 3))
    wide, fine = (next(p for p in found if p[:2] == name)
                  for name in (("DiT-128x4", 4), ("DiT-64x2", 1)))
    gap = compared(*(TABLE.by("seed", "loss", size=p[0], patch=p[1]) for p in (wide, fine)), 4)
    return (notice(TABLE)
            + markdown(["model", "seeds", "M MACs", "M params", "held-out loss"], lines)
            + f"\nThe logarithm of the loss correlates with that of the MACs at {by_macs:.2f}, and "
            f"with that of the parameters at {by_params:.2f}. A wider model with large patches "
            f"against a narrow one with small patches: DiT-128x4/4 has {wide[2] / fine[2]:.2f} "
            f"times the MACs of DiT-64x2/1, and its loss minus the other's is {gap}.\n")


def plot(axes):
    """Held-out loss against Gflops, a line per size."""
    for size in SIZES:
        mine = [(2e-3 * p[2], p[1], *mean_se(p[4])) for p in points() if p[0] == size]
        axes.errorbar(*zip(*((x, mean, error) for x, _, mean, error in mine)), marker="o",
                      capsize=2, label=size)
        for x, patch, mean, _ in mine:
            axes.annotate(f"/{patch}", (x, mean), textcoords="offset points", xytext=(4, 4))
    axes.set(xlabel="Gflops of a forward pass (2 per multiply-accumulate)", xscale="log",
             ylabel="held-out loss (velocity MSE)", yscale="log",
             title="Quality against Gflops, equal steps")
    axes.legend()


@one_line
def main(argv):
    """Command line of the study."""
    args = parser(__doc__).parse_args(argv)
    cells = [{"size": size, "patch": patch, "seed": seed} for seed in range(args.seeds)
             for size in SIZES for patch in PATCHES]
    run(args, TABLE, cells, run_cell)
    print(report())
    figure("dit_scaling", plot)


if __name__ == "__main__":
    main()
