"""Four ways to tell a DiT its class and time, and a U-Net of equal cost

Claims (DiT, Fig. 5, Tables 2 and 4): adaLN-Zero beats adaLN, cross-attention and in-context
conditioning; a transformer can replace the U-Net. Here: DiT-128x4/2 on latents of `shapes`, 500
steps of 64, all else as in `python train.py`. The U-Net is that of latent diffusion for classes
(dit_rivals.py), with convolutions alone on its first level, and 13.3 M MACs. Every arm has its own
learning rate, chosen with 250 steps of another seed. Columns:
  held-out loss   velocity MSE of 500 test pictures at 8 fixed times, with fixed noise
  right, clean    of 240 samples without guidance: shape and colour as asked; and legible too
  guided          clean, with guidance 2
About 90 CPU-seconds a cell, 5 arms x 5 seeds; before, 15 of 45 for the rates. The first cell makes
first stage and latents, so run it alone before you divide a study with --part.

    python -m studies.dit_conditioning --tune
    python -m studies.dit_conditioning --seeds 5
"""
from cli import one_line
from studies.common import (RULE, Table, claims, figure, markdown, mean_se, parser, run, shown)
from studies.dit_rivals import (RATES, TUNING_SEED, UNETS, add_models, columns, log_gap, minus,
                                rate_of, rates_text, read, run_model)

STEPS, EVERY, OUT = 500, 100, "out/studies/shapes"
MODELS = {name: ("DiT-128x4/2", {"conditioning": block}) for name, block in {
    "in-context": "in_context", "cross-attention": "cross_attention", "adaLN": "adaln",
    "adaLN-Zero": "adaln_zero"}.items()} | {"U-Net": ("U-Net, 13.3 M", {})}
TABLE = Table("dit_conditioning", ["model", "seed"])
TUNED = Table("dit_rates", ["model", "rate"])
CLAIMS = [      # the paper's sentence, its numbers, the arm that is to lose, the one to win
    ("adaLN-Zero beats in-context conditioning", "FID 35.24, 19.47", "in-context", "adaLN-Zero"),
    ("adaLN-Zero beats cross-attention", "26.14, 19.47", "cross-attention", "adaLN-Zero"),
    ("adaLN-Zero beats adaLN: starting as the identity helps", "25.21, 19.47", "adaLN",
     "adaLN-Zero"),
    ("adaLN beats cross-attention", "26.14, 25.21", "cross-attention", "adaLN"),
    ("cross-attention beats in-context", "35.24, 26.14", "in-context", "cross-attention"),
    ("a transformer beats the U-Net", "FID with guidance 3.60, 2.27", "U-Net", "adaLN-Zero")]


def run_cell(cell, steps=STEPS, out=OUT, samples=240, stage={}, **flags):
    """Train one arm with one seed, or one rate of it -> rows for its table."""
    add_models({name: ("class-unet", sizes) for name, sizes in UNETS.items()})
    model, more = MODELS[cell["model"]]
    tuning = "rate" in cell
    rate = cell["rate"] if tuning else rate_of(TUNED, cell["model"])
    rows, task, ema = run_model(
        model, "shapes", out, stage, steps // 2 if tuning else EVERY, rate=rate, count=500,
        levels=8, steps=steps // 2 if tuning else steps,
        seed=TUNING_SEED if tuning else cell["seed"], **more, **flags)
    if tuning:
        return [{**cell, **rows[-1]}]
    right, clean = read(task, ema, samples, cfg_scale=1.0)
    last = {"right": right, "clean": clean, "guided": read(task, ema, samples, cfg_scale=2.0)[1]}
    blank = dict.fromkeys(last, "")
    return [{**cell, **row, **(last if row["step"] == steps else blank)} for row in rows]


def results():
    """{arm: {column: {seed: value after the last step}}}, of the seeds that every arm has."""
    return columns(TABLE, ("params", "macs_m", "cpu_s", "loss", "right", "clean", "guided"),
                   MODELS, step=max(TABLE.column("step"), default=0))


def report():
    """The verdicts and the table, of the seeds that every arm has; "" below two."""
    if not (found := results()):
        return ""
    loss, clean = ({model: r[name] for model, r in found.items()} for name in ("loss", "clean"))
    lines = [[model, len(r["loss"]), f"{mean_se(r['params'].values())[0] / 1e6:.2f}",
              f"{mean_se(r['macs_m'].values())[0]:.1f}", f"{mean_se(r['cpu_s'].values())[0]:.0f}",
              shown(r["loss"].values(), 4), *(shown(r[name].values(), 1, 100)
                                              for name in ("right", "clean", "guided"))]
             for model, r in found.items()]
    guided = ("guidance improves the samples", "FID of DiT-XL/2 9.62, 2.27",
              "clean: adaLN-Zero, guided - not",
              minus(found["adaLN-Zero"]["guided"], clean["adaLN-Zero"]))
    return (RULE + "\n**Held-out loss**\n\n"
            + claims("seeds", [(said, numbers, f"log loss: {worse} - {better}",
                                log_gap(loss[worse], loss[better]))
                               for said, numbers, worse, better in CLAIMS])
            + "\n**Samples**, clean without guidance\n\n"
            + claims("seeds", [*((said, numbers, f"clean: {better} - {worse}",
                                  minus(clean[better], clean[worse]))
                                 for said, numbers, worse, better in CLAIMS), guided])
            + "\n**Arms**\n\n" + markdown(
                ["arm", "seeds", "M params", "M MACs", "CPU-s", "held-out loss", "right, %",
                 "clean, %", "guided, %"], lines)
            + "\nAt DiT-XL/2 the blocks cost 119.4 (in-context), 137.6 (cross-attention), 118.6 "
            "(adaLN) and 118.6 (adaLN-Zero) G MACs, in the paper and counted in tests/test_dit.py. "
            + rates_text(TUNED, MODELS))


def plot(axes):
    """Held-out loss against steps."""
    for model in MODELS:
        steps = sorted(set(TABLE.column("step", model=model)))
        means = [mean_se(TABLE.column("loss", model=model, step=s)) for s in steps]
        if means:
            axes.errorbar(steps, *zip(*means), label=model, capsize=2)
    axes.set(xlabel="optimizer step", ylabel="held-out loss (velocity MSE)", yscale="log",
             title="Conditioning blocks and a U-Net")
    axes.legend()


@one_line
def main(argv):
    """Command line of the study."""
    p = parser(__doc__)
    p.add_argument("--tune", action="store_true", help="first: choose the learning rates")
    args = p.parse_args(argv)
    cells = [{"model": model, "seed": seed} for seed in range(args.seeds) for model in MODELS]
    if args.tune:
        cells = [{"model": model, "rate": rate} for model in MODELS for rate in RATES]
    run(args, TUNED if args.tune else TABLE, cells, run_cell)
    print(report())
    if results():
        figure("dit_conditioning", plot)


if __name__ == "__main__":
    main()
