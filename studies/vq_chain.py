"""VQ-Diffusion's chain: how much to mask, how many calls to sample with, how to jump, how much to truncate.

The claims (Gu et al. 2022, ablations; Tang et al. 2022): a chain that ends 90 % masked and 10 % random beats masking
alone and replacing alone; a quarter of the calls keeps the quality; truncation at 0.86 helps.  And ours: a jump over
several steps has an exact posterior, and the released approximation pays for few calls.  Here vq-tiny on the 8x8
tokens of `scenes`, 1,500 steps of 32; 96 test captions, guidance 3, read by the exact reader.
About 5 CPU-minutes a mask rate and seed on one thread (18 of them), and 5 for the samplers of a seed.

    python -m studies.vq_chain                      # -> studies/results/vq_mask.{csv,md,png}, vq_samplers.{csv,md}
"""
import torch

import data
import sample
from evaluate import prompt_accuracy
from studies.common import Table, figure, mean_se, parser, setup, todo, train_and_watch, write_markdown
from tasks import TASKS
from vqdiffusion import MaskReplace

RATES, PAPER = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0), 0.9
STEPS, OUT, AXES = 1500, "out/studies/scenes-vq", ("shape", "color", "relation", "all", "legible")
SAMPLERS = [{"steps": n, "stride": stride, "truncation": 1.0} for n in (100, 50, 25, 10, 5)
            for stride in ("exact", "official")]
SAMPLERS += [{"steps": 25, "stride": "exact", "truncation": r} for r in (0.95, 0.86, 0.7, 0.5)]


def chain(rate, codes, aux_weight):
    """The paper's schedule with another share of [MASK] at its end: 0 only replaces, 1 only masks."""
    ends = {0.0: "replace-only", 1.0: "mask-only"}.get(rate, (0.99999, 9e-6, 9e-6, rate))
    return MaskReplace(100, codes, ends, aux_weight)


def train(rate, seed):
    """(task, averaged model) of a chain with this mask rate."""
    def build(config, info, first_stage):
        task = TASKS["vq"](config, info, first_stage)
        task.process = chain(rate, first_stage.num_codes, config.aux_weight)
        return task
    config, dataset, task = setup("vq-tiny", OUT, build, data="scenes", steps=STEPS, batch_size=32, seed=seed,
                                  cfg_scale=3.0, first_stage_steps=1600)
    _, model = train_and_watch(config, dataset, task, STEPS, lambda ema: {})
    return task, model


def accuracy(task, model, captions, **options):
    """Axis -> rate, of pictures drawn for captions."""
    _, pictures, _ = sample.draw_all(task, model, task.tokenizer(captions), seed=0, **options)
    rates = prompt_accuracy(pictures, captions)
    return {axis: rates[axis][0] for axis in AXES}


def summarise(masks, samplers):
    """Two tables and the figure of mask rates."""
    show = lambda table, where: ["{:.0f} ± {:.0f}".format(*(100 * v for v in mean_se(table.column(axis, **where))))
                                 for axis in AXES]
    done = [rate for rate in RATES if len(masks.column("all", rate=rate)) > 1]
    note = (f"{STEPS} steps of 32, per cent of 96 captions, mean ± standard error over seeds: "
            "`python -m studies.vq_chain`")
    rows = [[rate, *show(masks, {"rate": rate})] for rate in done]
    write_markdown("vq_mask", ["masked at the end", *AXES], rows, note)
    write_markdown("vq_samplers", ["calls", "jump", "truncation", *AXES],
                   [[*s.values(), *show(samplers, s)] for s in SAMPLERS if len(samplers.column("all", **s)) > 1], note)

    def draw(axes):
        for axis in ("all", "shape", "legible"):
            means = [mean_se(masks.column(axis, rate=rate)) for rate in done]
            axes.errorbar(done, [m for m, _ in means], [e for _, e in means], marker="o", capsize=2, label=axis)
        axes.set(xlabel="share of [MASK] at the chain's end", ylabel="share of captions right",
                 title="How much to mask")
        axes.legend()
    figure("vq_mask", draw)


def main():
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    masks, samplers = Table("vq_mask", ["rate", "seed"]), Table("vq_samplers", ["seed"])
    captions = data.load("scenes", split="test", count=96).captions
    cells = [{"rate": rate, "seed": seed} for seed in range(args.seeds) for rate in RATES]
    for cell in [] if args.summary else todo(cells, masks, args.part):
        task, model = train(**cell)
        masks.add({**cell, **accuracy(task, model, captions)})
        if cell["rate"] == PAPER and {"seed": cell["seed"]} not in samplers:
            samplers.add(*({"seed": cell["seed"], **s, **accuracy(task, model, captions, **s)} for s in SAMPLERS))
    summarise(masks, samplers)


if __name__ == "__main__":
    main()
