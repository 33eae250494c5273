"""VQ-Diffusion's chain: how much to mask, how many calls, how to jump, how much to truncate

Claims (Gu et al. 2022, ablations; Tang et al. 2022): a chain that ends 90 % masked and 10 % random
beats masking alone and replacing alone; a quarter of the calls keeps the quality; truncation at
0.86 helps. And ours: a jump over several steps has an exact posterior, and the released
approximation loses quality with few calls. Here: vq-tiny on the 8x8 tokens of `scenes`, guidance 3,
read by the exact reader. Mask rates: 400 steps of 32, 25 calls (90 CPU-seconds each, 18 of them).
Samplers: the full run, `python train.py --model vq-tiny --data scenes`, three seeds (10 CPU-minutes
each).

    python -m studies.vq_chain
"""
import pathlib

import data
import sample
from adapters import anova
from cli import one_line
from evaluate import prompt_accuracy
from studies.common import (Table, compared, figure, markdown, mean_se, notice, parser, run, setup,
                            shown, train_and_watch)
from train import main as train_main
from vqdiffusion import MaskReplace

RATES, STEPS, OUT = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0), 400, "out/studies/scenes-vq"
AXES = ("shape", "color", "relation", "all", "legible")
CAPTIONS = 480                                                  # the first edition read 96
SAMPLERS = [{"steps": n, "stride": stride, "truncation": 1.0} for n in (100, 50, 25, 10, 5)
            for stride in ("exact", "official")]
SAMPLERS += [{"steps": 25, "stride": "exact", "truncation": r} for r in (0.95, 0.86, 0.7, 0.5)]
MASKS, JUMPS = Table("vq_mask", ["rate", "seed"]), Table("vq_samplers", ["seed"])


def first_stage():
    """The VQ-VAE that all models of these studies share, trained once -> its checkpoint."""
    path = pathlib.Path(OUT, "first_stage", "ckpt.pt")
    if not path.is_file():
        train_main(["--model", "vq-vae", "--data", "scenes", "--sample-every", "0",
                    "--out", str(path.parent)])
    return str(path)


def base(seed):
    """(task, averaged model) of the full run with this seed, trained if it is not there yet."""
    path = pathlib.Path(OUT, f"seed-{seed}", "ckpt.pt")
    if not path.is_file():
        train_main(["--model", "vq-tiny", "--data", "scenes", "--first-stage", first_stage(),
                    "--seed", str(seed), "--sample-every", "0", "--out", str(path.parent)])
    return sample.load(path)


def short_run(rate, seed, steps=STEPS, **flags):
    """(task, averaged model) of a chain that ends with this share of [MASK].

    0 only replaces, 1 only masks.
    """
    flags = {"first_stage": first_stage(), **flags} if "first_stage" not in flags else flags
    config, dataset, task = setup("vq-tiny", OUT, data="scenes", steps=steps, seed=seed, **flags)
    ends = {0.0: "replace-only", 1.0: "mask-only"}.get(rate, (0.99999, 9e-6, 9e-6, rate))
    task.process = MaskReplace(100, task.process.num_codes, ends, task.process.aux_weight)
    return task, train_and_watch(config, dataset, task, steps, lambda ema: {})[1]


def accuracy(task, model, captions, **options):
    """{axis: rate} of pictures sampled for captions."""
    pictures = sample.sample_all(task, model, task.tokenizer(captions), **options)[1]
    rates = prompt_accuracy(pictures, captions)
    return {"captions": len(captions), **{axis: rates[axis][0] for axis in AXES}}


def captions_of(table):
    """How many captions the rows of a table are rates of."""
    return 96 if table.first_edition else table.column("captions")[0]


def report():
    """Three tables: mask rates, jumps, truncation."""
    if not MASKS.rows() or not JUMPS.rows():
        return ""
    rates = lambda table, **where: [shown(table.column(axis, **where), 1, 100) for axis in AXES]
    masks = [[rate, *rates(MASKS, rate=rate)] for rate in RATES]
    F, p = anova([MASKS.column("all", rate=rate) for rate in RATES])
    jumps = [[s["steps"], s["stride"], s["truncation"], *rates(JUMPS, **s)] for s in SAMPLERS]
    by = lambda axis, n, stride: JUMPS.by("seed", axis, steps=n, stride=stride, truncation=1)
    gaps = [[n, *(compared(by(axis, n, "exact"), by(axis, n, "official"), 1, 100)
                  for axis in AXES)] for n in (50, 25, 10, 5)]
    few = [[n, *(compared(by(axis, n, "exact"), by(axis, 100, "exact"), 1, 100) for axis in AXES)]
           for n in (25, 5)]
    return ("**How much to mask**\n\n" + notice(MASKS)
            + markdown(["masked at the end", *AXES], masks)
            + f"\nPer cent of {captions_of(MASKS)} captions after {STEPS} steps. One-way analysis "
            f"of variance of `all` over the rates: F {F:.1f}, p {p:.2g}. Shapes are near chance "
            "after so few steps, so this table does not test the claim.\n\n"
            "**How to sample**, with the full run; its three seeds are runs of train.py\n\n"
            + markdown(["calls", "jump", "truncation", *AXES], jumps)
            + f"\nPer cent of {captions_of(JUMPS)} captions. Exact minus official jumps, paired by "
            "seed:\n\n" + markdown(["calls", *AXES], gaps)
            + "\nFewer calls minus 100 calls, exact jumps:\n\n" + markdown(["calls", *AXES], few))


def plot(axes):
    """Shares of captions right against the share of [MASK]."""
    for axis in ("all", "shape", "legible"):
        means = [mean_se(MASKS.column(axis, rate=rate)) for rate in RATES]
        axes.errorbar(RATES, *zip(*means), marker="o", capsize=2, label=axis)
    axes.set(xlabel="share of [MASK] at the chain's end", ylabel="share of captions right",
             title="How much to mask")
    axes.legend()


@one_line
def main(argv):
    """Command line of the study."""
    args = parser(__doc__).parse_args(argv)
    captions = [] if args.summary else data.load("scenes", split="test", count=CAPTIONS).captions

    def samplers(cell):
        task, model = base(**cell)
        return [{**cell, **s, **accuracy(task, model, captions, **s)} for s in SAMPLERS]

    def masks(cell):
        return [{**cell, **accuracy(*short_run(**cell), captions, truncation=1.0)}]
    run(args, JUMPS, [{"seed": seed} for seed in range(args.seeds)], samplers)
    run(args, MASKS, [{"rate": rate, "seed": seed} for seed in range(args.seeds)
                      for rate in RATES], masks)
    print(report())
    figure("vq_mask", plot)


if __name__ == "__main__":
    main()
