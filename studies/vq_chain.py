"""VQ-Diffusion's chain: how much to mask, how many calls, how to jump, what to sample from

Claims (Gu et al. 2022, ablations; Tang et al. 2022): a chain that ends 90 % masked and 10 % random
beats masking alone and replacing alone; a quarter of the calls keeps the quality; truncation at
0.86 helps; revealing tokens where the network is sure ("purity") helps. And ours: a jump over
several steps has an exact posterior, and the released approximation loses quality with few calls.
Here: vq-tiny on the 8x8 tokens of `scenes`, guidance 3, 480 test captions, half of them of two
objects, read by the exact reader; verdicts are of all of them. Twice: of short runs, whose shapes
are mostly wrong, and of 6,000 steps on the VQ-VAE of studies.vq_base, as its model begins.
Short runs of the mask rates: those of studies.vq_parts, 1,500 steps (its arm "all" ends 90 %
masked). Short runs of the samplers: the default run, `train.py --model vq-tiny --data scenes
--hold-out`, 3,000 steps. On one CPU thread a mask rate and seed takes 6 minutes, a long one 26, the
samplers of a seed half an hour. Column `device`: some ran on an H100 in float32 (torch 2.11).

    python -m studies.vq_chain --seeds 5 --only masks       # after studies.vq_parts
    python -m studies.vq_chain --seeds 3 --only long-masks
    python -m studies.vq_chain --seeds 3 --only samplers
    python -m studies.vq_chain --seeds 3 --only long-samplers
"""
import sample
from cli import one_line
from studies import vq_base, vq_parts
from studies.common import (RULE, Table, claims, figure, markdown, mean_se, parser, run, shown)
from studies.scenes_base import trained
from studies.vq_base import AXES, DEVICE, ON, OUT, accuracy, captions_of
from vqdiffusion import MaskReplace

RATES = {vq_parts.STEPS: (0.0, 0.5, 0.9, 1.0), vq_base.STEPS[0]: (0.9, 1.0)}
SHORT, LONG = RATES
FULL = {3000: ["--model", "vq-tiny"], LONG: vq_base.BASE}       # of the samplers
WAYS = {**{f"{n} calls": {"steps": n} for n in (100, 25, 10, 5)},
        **{f"{n} calls, released jumps": {"steps": n, "released": True} for n in (25, 10, 5)},
        **{f"truncation {r}": {"truncation": r} for r in (0.86, 0.7)},
        "fewer": {"sampler": "fewer"}, "purity 1": {"sampler": "purity", "purity": 1.0},
        "purity 2": {"sampler": "purity", "purity": 2.0}}
MASKS, JUMPS = Table("vq_mask", ["steps", "rate", "seed"]), Table("vq_samplers", ["steps", "seed"])
COLUMNS = ("two", "one", *AXES)


class Released(MaskReplace):
    """The chain with the released fast sampler. Source: VQ-Diffusion's code."""

    def jumps(self, steps, first=None):
        """Calls at every (T // steps)-th t and at 0; the posterior treats x_t as if it were
        x_{t - skip} and takes one step, to the next call's t."""
        times = sorted({0, *range(self.steps - 1, -1, -(self.steps // steps))}, reverse=True)
        times = [t for t in times if first is None or t <= first] or [first]
        skip = times[0] - times[1] - 1 if len(times) > 1 else 0
        taken = [t - skip if t > skip else t for t in times]        # the last one: for what it is
        return list(zip(times, taken, [t - 1 for t in taken]))


def masking(rate):
    """{chain -> chain that ends with this share of [MASK]}; 0 only replaces, 1 only masks."""
    ends = {0.0: "replace-only", 1.0: "mask-only"}.get(rate, (0.99999, 9e-6, 9e-6, rate))
    return lambda chain: MaskReplace(chain.steps, chain.num_codes, ends, chain.aux_weight)


def full(steps, seed):
    """(task, averaged model) of the default run or of a long one, trained if it is not there."""
    stage = (vq_base if steps == LONG else vq_parts).first_stage()
    flags = [*FULL[steps], "--steps", str(steps), "--first-stage", stage, "--seed", str(seed)]
    folder = OUT / f"{'long' if steps == LONG else 'default'}-{seed}"
    return sample.load(trained(flags, folder, ON), DEVICE)


def sampled(task, model, captions, released=False, **options):
    """The columns of `accuracy` for a way to sample."""
    chain, kind = task.process, Released if released else MaskReplace
    task.process = kind(chain.steps, chain.num_codes, "paper", chain.aux_weight)
    return accuracy(task, model, captions, **{"steps": 25, **options})


def by_seed(column, way):
    """{seed: value} of a pair (steps, way to sample) or (steps, share of [MASK] at the end)."""
    if isinstance(way[1], str):
        return JUMPS.by("seed", column, steps=way[0], way=way[1])
    if way == (SHORT, 0.9):
        return vq_parts.TABLE.by("seed", column, arm="all")
    return MASKS.by("seed", column, steps=way[0], rate=way[1])


# What should be above 0, of every seed: column of a - column of b + more.
MASK_CLAIMS = [                     # (the sentence, its words, column, a, b, more)
    ("90 % masked beats masking alone (Fig. 5)", "bound: 100 % - 90 %", "bound", 1.0, 0.9, 0),
    ("the same", "all: 90 % - 100 %", "all", 0.9, 1.0, 0),
    ("90 % masked beats replacing alone", "bound: 0 % - 90 %", "bound", 0.0, 0.9, 0),
    ("the same", "all: 90 % - 0 %", "all", 0.9, 0.0, 0)]
JUMP_CLAIMS = [
    ("a quarter of the calls keeps the quality", "all: 25 calls - 100 + 0.03", "all",
     "25 calls", "100 calls", 0.03),
    *((f"(ours) with {n} calls exact jumps beat the released ones",
       f"all: exact - released, {n} calls", "all", f"{n} calls", f"{n} calls, released jumps", 0)
      for n in (25, 10, 5)),
    ("truncation 0.86 helps", "all: 0.86 - none", "all", "truncation 0.86", "25 calls", 0),
    ("purity beats the same number of tokens anywhere", "all: purity 1 - fewer", "all",
     "purity 1", "fewer", 0),
    ("purity beats the posterior", "all: purity 1 - 25 calls", "all", "purity 1", "25 calls",
     0)]


def verdicts(rows, steps):
    """The papers' sentences and ours, those of which two seeds of so many steps are measured."""
    found = []
    for said, above, column, a, b, more in rows:
        first, second = by_seed(column, (steps, a)), by_seed(column, (steps, b))
        both = {seed: first[seed] - second[seed] + more for seed in first if seed in second}
        found += [(said, "", above, both)] if len(both) > 1 else []
    return claims("seeds", found) if found else ""


def report():
    """Mask rates and ways to sample, short and long runs: the verdicts, and a table."""
    parts = []
    for table, said, head, ways, columns in (
            (MASKS, MASK_CLAIMS, "masked at the end", RATES, ("bound", *COLUMNS)),
            (JUMPS, JUMP_CLAIMS, "way", dict.fromkeys(FULL, WAYS), COLUMNS)):
        for steps in ways:
            lines = [[way, len(by_seed("all", (steps, way))),
                      *(shown(by_seed(c, (steps, way)).values(), 3 if c == "bound" else 1,
                              1 if c == "bound" else 100) for c in columns)]
                     for way in ways[steps] if by_seed("all", (steps, way))]
            if table.column("seed", steps=steps):
                parts += [verdicts(said, steps),
                          markdown([f"{head}, {steps:,} steps", "seeds", *columns], lines)]
    return "" if not parts else (
        RULE + "\nPer cent of 480 captions, mean of the seeds ± its standard error; the bound in "
        "nats per token.\n\n" + "\n".join(part for part in parts if part))


def plot(panels):
    """Left: pictures right against the share of [MASK]. Right: against the calls."""
    def curve(axes, xs, column, ways, label, look):
        if ways:
            means = [mean_se(by_seed(column, way).values()) for way in ways]
            axes.errorbar(xs, *zip(*means), fmt=look, capsize=2, label=label)
    for steps, line in zip(RATES, ("--", "-")):
        rates = [r for r in RATES[steps] if MASKS.rows() and by_seed("all", (steps, r))]
        for column, color in (("two", "C0"), ("one", "C1")):
            curve(panels[0], rates, column, [(steps, rate) for rate in rates],
                  f"{column}, {steps:,} steps", f"{color}o{line}")
    for steps, line in zip(FULL, ("--", "-")):
        for kind, color in (("", "C0"), (", released jumps", "C1")):
            calls = [n for n in (100, 25, 10, 5) if by_seed("all", (steps, f"{n} calls{kind}"))]
            curve(panels[1], calls, "all", [(steps, f"{n} calls{kind}") for n in calls],
                  f"{kind[2:] or 'exact jumps'}, {steps:,} steps", f"{color}o{line}")
    panels[0].set(xlabel="share of [MASK] at the chain's end", ylabel="share right")
    panels[1].set(xlabel="calls of the network", xscale="log", ylabel="all captions right")
    for axes in panels:
        axes.legend(fontsize=7)


@one_line
def main(argv):
    """Command line of the study."""
    p = parser(__doc__)
    p.add_argument("--only", choices=["masks", "long-masks", "samplers", "long-samplers"],
                   help="one part of the study")
    args = p.parse_args(argv)

    def masks(cell):
        if cell["steps"] == SHORT:
            made = vq_parts.trained("all", cell["seed"], process=masking(cell["rate"]))
        elif cell["rate"] == 0.9:
            made = (*full(LONG, cell["seed"]), "")              # its seconds: in its log.csv
        else:
            made = vq_parts.trained("all", cell["seed"], LONG, masking(cell["rate"]), ema=0.998,
                                    first_stage=vq_base.first_stage(), batch_size=vq_base.BATCH)
        return [{**cell, **vq_parts.measure(*made)}]

    def samplers(cell):
        task, model = full(**cell)
        return [{**cell, "way": way, **sampled(task, model, captions_of(240, 240), **options)}
                for way, options in WAYS.items()]
    seeds = range(args.seeds)
    for part, steps in zip(("masks", "long-masks"), RATES):
        if args.only in (None, part):
            run(args, MASKS, [{"steps": steps, "rate": rate, "seed": seed} for seed in seeds
                              for rate in RATES[steps] if (steps, rate) != (SHORT, 0.9)], masks)
    for part, steps in zip(("samplers", "long-samplers"), FULL):
        if args.only in (None, part):
            run(args, JUMPS, [{"steps": steps, "seed": seed} for seed in seeds], samplers)
    print(report())
    if report():
        figure("vq_mask", plot, (9, 3.4), 2)


if __name__ == "__main__":
    main()
