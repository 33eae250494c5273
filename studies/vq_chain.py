"""VQ-Diffusion's chain: how much to mask, how many calls, how to jump, what to sample from

Claims (Gu et al. 2022, ablations; Tang et al. 2022): a chain that ends 90 % masked and 10 % random
beats masking alone and replacing alone; a quarter of the calls keeps the quality; truncation at
0.86 helps; revealing tokens where the network is sure ("purity") helps. And ours: a jump over
several steps has an exact posterior, and the released approximation loses quality with few calls.
Here: vq-tiny on the 8x8 tokens of `scenes`, guidance 3, 480 test captions, half of them of two
objects, read by the exact reader; verdicts are of all of them, for after so few steps nearly no
picture of two objects is right. Mask rates: the runs of studies.vq_parts, 1,500 steps, and their
bound; those that end 90 % masked are its arm "all". Samplers: the default run, `train.py --model
vq-tiny --data scenes --hold-out`, 3,000 steps. About 6 CPU-minutes a mask rate and seed; the
samplers take longer, and ran on a GPU alone. Seeds 0 to 2: on an H100 in float32 (torch 2.11).

    python -m studies.vq_chain --seeds 5 --only masks       # after studies.vq_parts
    python -m studies.vq_chain --seeds 5 --only samplers
"""
import sample
from cli import one_line
from studies import vq_parts
from studies.common import (RULE, Table, claims, figure, markdown, mean_se, parser, run, shown)
from studies.scenes_base import trained
from studies.vq_base import AXES, DEVICE, ON, OUT, accuracy, captions_of
from vqdiffusion import MaskReplace

RATES = (0.0, 0.5, 0.9, 1.0)
FULL = ["--model", "vq-tiny", "--steps", "3000"]
WAYS = {**{f"{n} calls": {"steps": n} for n in (100, 25, 10, 5)},
        **{f"{n} calls, released jumps": {"steps": n, "released": True} for n in (25, 10, 5)},
        **{f"truncation {r}": {"truncation": r} for r in (0.86, 0.7)},
        "fewer": {"sampler": "fewer"}, "purity 1": {"sampler": "purity", "purity": 1.0},
        "purity 2": {"sampler": "purity", "purity": 2.0}}
MASKS, JUMPS = Table("vq_mask", ["rate", "seed"]), Table("vq_samplers", ["seed"])
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


def full(seed):
    """(task, averaged model) of the default run with this seed, trained if it is not there yet."""
    flags = [*FULL, "--first-stage", vq_parts.first_stage(), "--seed", str(seed)]
    return sample.load(trained(flags, OUT / f"default-{seed}", ON), DEVICE)


def sampled(task, model, captions, released=False, **options):
    """The columns of `accuracy` for a way to sample."""
    chain, kind = task.process, Released if released else MaskReplace
    task.process = kind(chain.steps, chain.num_codes, "paper", chain.aux_weight)
    return accuracy(task, model, captions, **{"steps": 25, **options})


def by_seed(column, way):
    """{seed: rate} of a way to sample, or of a share of [MASK]."""
    if isinstance(way, str):
        return JUMPS.by("seed", column, way=way)
    return vq_parts.TABLE.by("seed", column, arm="all") if way == 0.9 else MASKS.by(
        "seed", column, rate=way)


# (the sentence, what should be above 0, column, a, b, more): a - b + more of every seed
MASK_CLAIMS = [
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


def verdicts(rows):
    """The papers' sentences and ours, those of which two seeds are measured."""
    found = []
    for said, above, column, a, b, more in rows:
        first, second = by_seed(column, a), by_seed(column, b)
        both = {seed: first[seed] - second[seed] + more for seed in first if seed in second}
        found += [(said, "", above, both)] if len(both) > 1 else []
    return claims("seeds", found) if found else ""


def report():
    """Mask rates and ways to sample: the verdicts, and a table."""
    def table(head, ways, columns):
        lines = [[way, len(by_seed("all", way)),
                  *(shown(by_seed(c, way).values(), 3 if c == "bound" else 1,
                          1 if c == "bound" else 100) for c in columns)]
                 for way in ways if by_seed("all", way)]
        return markdown([head, "seeds", *columns], lines) if lines else ""
    masks = table("masked at the end", RATES, ("bound", *COLUMNS)) if MASKS.rows() else ""
    jumps = table("way", WAYS, COLUMNS)
    if not masks and not jumps:
        return ""
    return (RULE + "\nPer cent of 480 captions, mean of the seeds ± its standard error; the bound "
            "in nats per token.\n\n" + "\n".join(part for part in (
                verdicts(MASK_CLAIMS), masks, verdicts(JUMP_CLAIMS), jumps) if part))


def plot(panels):
    """Left: pictures right against the share of [MASK]. Right: against the calls."""
    shares = [rate for rate in RATES if by_seed("all", rate)] if MASKS.rows() else []
    for column in ("two", "one"):
        panels[0].errorbar(shares, *zip(*(mean_se(by_seed(column, rate).values())
                                          for rate in shares)) if shares else [[]],
                           marker="o", capsize=2, label=column)
    for kind in ("", ", released jumps"):
        calls = [n for n in (100, 25, 10, 5) if by_seed("all", f"{n} calls{kind}")]
        means = [mean_se(by_seed("all", f"{n} calls{kind}").values()) for n in calls]
        panels[1].errorbar(calls, *zip(*means) if means else [[]], marker="o", capsize=2,
                           label=f"all{kind or ', exact jumps'}")
    panels[0].set(xlabel="share of [MASK] at the chain's end", ylabel="share right")
    panels[1].set(xlabel="calls of the network", xscale="log")
    for axes in panels:
        axes.legend()


@one_line
def main(argv):
    """Command line of the study."""
    p = parser(__doc__)
    p.add_argument("--only", choices=["masks", "samplers"], help="one half of the study")
    args = p.parse_args(argv)

    def masks(cell):
        made = vq_parts.trained("all", cell["seed"], process=masking(cell["rate"]))
        return [{**cell, **vq_parts.measure(*made)}]

    def samplers(cell):
        task, model = full(**cell)
        return [{**cell, "way": way, **sampled(task, model, captions_of(240, 240), **options)}
                for way, options in WAYS.items()]
    seeds = range(args.seeds)
    if args.only != "samplers":
        run(args, MASKS, [{"rate": rate, "seed": seed} for seed in seeds for rate in RATES
                          if rate != 0.9], masks)
    if args.only != "masks":
        run(args, JUMPS, [{"seed": seed} for seed in seeds], samplers)
    print(report())
    if report():
        figure("vq_mask", plot, (9, 3.4), 2)


if __name__ == "__main__":
    main()
