"""Quality against Gflops: does it matter how a DiT spends them?

Claims (DiT, Fig. 2, 6, 8 and 10, Table 4): FID falls with the Gflops of a forward pass, whether
they come from width and depth or from smaller patches; parameters alone do not explain it; models
of equal Gflops are equally good; more sampling steps do not replace a larger model. Here: three
sizes times three patch sizes on latents of `shapes`, 300 steps of 64, and beside three of them a
U-Net of equal MACs (within 2.5 %). DiTs have the learning rates chosen for adaLN-Zero, U-Nets those
of the U-Net, both in dit_conditioning. Held-out loss and samples: as there; the
target of the loss is the same for every patch size. For the fit of log loss = a + b log x each seed
gives a slope b and a squared correlation, and these are the units.
5 to 150 CPU-seconds a cell, 400 a seed, 12 cells a seed.

    python -m studies.dit_conditioning --tune       # if it has not been run
    python -m studies.dit_scaling --seeds 5
"""
import math
import statistics

from cli import one_line
from studies.common import (RULE, Table, claims, figure, interval, markdown, mean_se, parser, run,
                            shown)
from studies.dit_conditioning import OUT, TUNED
from studies.dit_rivals import (UNETS, add_models, columns, log_gap, minus, rate_of, read,
                                run_model)

SIZES, PATCHES, STEPS = ("DiT-64x2", "DiT-96x3", "DiT-128x4"), (4, 2, 1), 300
DITS = [f"{size}/{patch}" for size in SIZES for patch in PATCHES]
RIVALS = dict(zip(UNETS, ("DiT-64x2/2", "DiT-96x3/2", "DiT-128x4/2")))      # of equal MACs
SAMPLED = {"DiT-96x3/2": 100, "DiT-128x4/2": 10}        # sampling steps: many small, few large
TABLE = Table("dit_scaling", ["model", "seed"])


def run_cell(cell, steps=STEPS, out=OUT, samples=240, stage={}, **flags):
    """Train one model with one seed -> its row."""
    add_models({name: ("class-unet", sizes) for name, sizes in UNETS.items()})
    name = cell["model"]
    rate = rate_of(TUNED, "U-Net" if name in UNETS else "adaLN-Zero")
    rows, task, ema = run_model(name, "shapes", out, stage, steps, rate=rate, count=500, levels=8,
                                steps=steps, seed=cell["seed"], **flags)
    right, clean = read(task, ema, samples, cfg_scale=1.0)
    other = (read(task, ema, samples, cfg_scale=1.0, steps=SAMPLED[name])[0] if name in SAMPLED
             else "")
    return [{**cell, **rows[-1], "right": right, "clean": clean, "right_other": other}]


def results():
    """{model: {column: {seed: value}}} of the seeds that every model has."""
    return columns(TABLE, ("params", "macs_m", "cpu_s", "loss", "right", "clean", "right_other"),
                   (*DITS, *UNETS))


def fits(found, column, models=DITS):
    """{seed: (slope, squared correlation)} of log loss against the log of a column."""
    fit = {}
    for seed in found[models[0]]["loss"]:
        x, y = ([math.log(found[model][name][seed]) for model in models]
                for name in (column, "loss"))
        fit[seed] = (statistics.linear_regression(x, y).slope, statistics.correlation(x, y) ** 2)
    return fit


def mean_of(gaps):
    """The mean over [{seed: value}], seed by seed."""
    return {seed: statistics.fmean(gap[seed] for gap in gaps) for seed in gaps[0]}


def verdicts(found):
    """The paper's sentences beside our differences."""
    loss = {model: r["loss"] for model, r in found.items()}
    by_macs, by_params = (fits(found, name) for name in ("macs_m", "params"))
    smaller = lambda a, b: mean_of([log_gap(loss[f"{s}/{a}"], loss[f"{s}/{b}"]) for s in SIZES])
    larger = lambda a, b: mean_of([log_gap(loss[f"{a}/{p}"], loss[f"{b}/{p}"]) for p in PATCHES])
    few, many = (found[model]["right_other"] for model in ("DiT-128x4/2", "DiT-96x3/2"))
    equal = {seed: 0.02 - abs(gap) for seed, gap in
             log_gap(loss["DiT-64x2/2"], loss["DiT-96x3/4"]).items()}
    return claims("seeds", [
        ("quality grows with Gflops", "log Gflops and FID correlate at -0.93",
         "minus the slope on log MACs", {seed: -fit[0] for seed, fit in by_macs.items()}),
        ("Gflops explain more than parameters", "", "r²: MACs - parameters",
         {seed: by_macs[seed][1] - by_params[seed][1] for seed in by_macs}),
        ("smaller patches help at equal parameters", "FID, S/8 153.60, S/4 100.41",
         "log loss: /4 - /2, mean of sizes", smaller(4, 2)),
        ("and again", "S/4 100.41, S/2 68.40", "log loss: /2 - /1", smaller(2, 1)),
        ("larger models help at equal patches", "S/2 68.40, B/2 43.47",
         "log loss: 64x2 - 96x3, mean of patches", larger("DiT-64x2", "DiT-96x3")),
        ("and again", "B/2 43.47, L/2 23.33", "log loss: 96x3 - 128x4",
         larger("DiT-96x3", "DiT-128x4")),
        ("equal Gflops, equal quality", "S/2 (6.06 G) 68.40, B/4 (5.56 G) 68.38",
         "0.02 - size of log loss: 64x2/2 - 96x3/4", equal),
        ("more sampling steps do not replace a larger model",
         "FID, L/2 with 80.7 T 25.9, XL/2 with 15.2 T 23.7",
         "right: 128x4/2 in 10 steps - 96x3/2 in 100", minus(few, many)),
        *(("a transformer beats the U-Net", "FID with guidance 3.60, 2.27",
           f"log loss: {unet} - {dit}", log_gap(loss[unet], loss[dit]))
          for unet, dit in RIVALS.items())])


def report():
    """Verdicts, fits and the table; "" before two seeds are whole."""
    if not (found := results()):
        return ""
    lines = []
    for models, what in ((DITS, "DiT"), (list(UNETS), "U-Net")):
        for column, name in (("macs_m", "MACs"), ("params", "parameters")):
            fit = fits(found, column, models)
            slope, low, high = interval([slope for slope, _ in fit.values()])
            lines.append([what, len(models), name, f"{slope:+.3f} [{low:+.3f}, {high:+.3f}]",
                          "{:.2f} [{:.2f}, {:.2f}]".format(*interval([r for _, r in
                                                                      fit.values()]))])
    rows = [[model, len(r["loss"]), *(f"{mean_se(r[name].values())[0] / by:.{digits}f}"
                                      for name, by, digits in (("macs_m", 1, 1),
                                                               ("params", 1e6, 2),
                                                               ("cpu_s", 1, 0))),
             shown(r["loss"].values(), 4), shown(r["right"].values(), 1, 100),
             shown(r["clean"].values(), 1, 100)]
            for model, r in sorted(found.items(), key=lambda item: max(
                item[1]["macs_m"].values()))]
    return (RULE + "\n" + verdicts(found) + "\n**Fits** of log loss, a slope and a squared "
            "correlation r² per seed: mean [95 % interval]. Two models of one size differ in MACs "
            "by the patches alone, so MACs and parameters are not the same variable.\n\n"
            + markdown(["models", "how many", "against log", "slope", "r²"], lines)
            + "\n**Models**, fewest MACs first\n\n" + markdown(
                ["model", "seeds", "M MACs", "M params", "CPU-s", "held-out loss", "right, %",
                 "clean, %"], rows))


def plot(axes):
    """Held-out loss against Gflops, a line per size, and one of the U-Nets."""
    found = results()
    for name, models in (*((size, [f"{size}/{p}" for p in PATCHES]) for size in SIZES),
                         ("U-Net", list(UNETS))):
        x = [2e-3 * mean_se(found[model]["macs_m"].values())[0] for model in models]
        means = [mean_se(found[model]["loss"].values()) for model in models]
        axes.errorbar(x, *zip(*means), marker="o", capsize=2, label=name,
                      **{"ls": "--", "color": "gray"} if name == "U-Net" else {})
        for model, gflops, (mean, _) in zip(models, x, means):
            if model in DITS:
                axes.annotate(model[-2:], (gflops, mean), textcoords="offset points",
                              xytext=(4, 4))
    axes.set(xlabel="Gflops of a forward pass (2 per multiply-accumulate)", xscale="log",
             ylabel="held-out loss (velocity MSE)", yscale="log",
             title="Quality against Gflops, equal steps")
    axes.legend()


@one_line
def main(argv):
    """Command line of the study."""
    args = parser(__doc__).parse_args(argv)
    cells = [{"model": model, "seed": seed} for seed in range(args.seeds)
             for model in (*DITS, *UNETS)]
    run(args, TABLE, cells, run_cell)
    print(report())
    if results():
        figure("dit_scaling", plot)


if __name__ == "__main__":
    main()
