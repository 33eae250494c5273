"""How long the merge takes at Stable Diffusion's size, with all layers at once and one by one.

The claim (Custom Diffusion): merging takes about 2 seconds. Here 32 matrices of K and V, 768 wide,
two concepts of eight text states each, and 12,000 rows of C_reg, as many as 1,000 captions have;
columns on scales from 1 to 1e-2. Half a minute on one CPU core; --threads 2 only where nothing else
runs.

    python -m studies.merge_speed                   # -> studies/results/merge_speed.csv
"""
import csv
import statistics
import time

import torch

from cli import one_line
from custom_diffusion import keys_and_values, merge
from studies.common import Table, markdown, parser
from unet import UNET_CONFIGS, UNet


TABLE = Table("merge_speed", ["how"])


def problem(rows=12_000, own=8, seed=0):
    """(W0, concepts, C_reg) of Stable Diffusion v1's shape, random."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    with torch.device("meta"):
        unet = UNet(**UNET_CONFIGS["SD-v1"]).state_dict()
    shapes = {name: w.shape for name, w in keys_and_values(unet).items()}
    spread = torch.logspace(0, -2, 768)
    W0 = {name: normal(*shape) / 768 ** 0.5 for name, shape in shapes.items()}
    concepts = [({name: w + 0.02 * normal(*w.shape) for name, w in W0.items()},
                 normal(own, 768) * spread) for _ in range(2)]
    return W0, concepts, normal(rows, 768) * spread


def measure(threads):
    """Five times all layers at once, twice each layer on its own -> rows of the CSV."""
    torch.set_num_threads(threads)
    W0, concepts, C_reg = problem()
    together = lambda: [merge(W0, concepts, C_reg)]
    apart = lambda: [merge({name: w}, concepts, C_reg) for name, w in W0.items()]
    rows = []
    for what, run, repeats in (("all layers at once", together, 5),
                               ("each layer on its own", apart, 2)):
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            reports = [report for _, report in run()]
            seconds.append(time.perf_counter() - start)
        worst = max(max(report["constraint"]) for report in reports)
        rows.append({"how": what, "threads": threads,
                     "median_s": f"{statistics.median(seconds):.2f}",
                     "best_s": f"{min(seconds):.2f}", "constraint": f"{worst:.1e}",
                     "cond_G": f"{reports[0]['cond_G']:.3g}"})
    return rows


def report():
    """Seconds of a merge at Stable Diffusion's size."""
    rows, columns = TABLE.rows(), ("how", "threads", "median_s", "best_s", "constraint")
    header = ["how", "threads", "seconds, median", "best", "constraint missed by"]
    return markdown(header, [[row[column] for column in columns] for row in rows]) if rows else ""


@one_line
def main(argv):
    """Measure anew, in place of what the CSV holds."""
    rows = measure(parser(__doc__, ["threads"]).parse_args(argv).threads)
    with open(TABLE.path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(report())


if __name__ == "__main__":
    main()
