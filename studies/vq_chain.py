"""VQ-Diffusion's chain: how much to mask, how many calls to sample with, how to jump, how much to truncate.

The claims (Gu et al. 2022, ablations; Tang et al. 2022): a chain that ends 90 % masked and 10 % random beats masking
alone and replacing alone; a quarter of the calls keeps the quality; truncation at 0.86 helps.  And ours: a jump over
several steps has an exact posterior, and the released approximation pays for few calls.  Here vq-tiny on the 8x8
tokens of `scenes`, guidance 3, read by the exact reader on 96 captions, 39 of them with two objects. Mask rates: 400
steps of 32 (90 CPU-seconds each on one thread, 18 of them), 25 calls. Samplers: the full run, `python train.py --model
vq-tiny --data scenes`, with three seeds (10 CPU-minutes each).

    python -m studies.vq_chain                      # -> studies/results/vq_mask.{csv,md,png}, vq_samplers.{csv,md}
"""
import pathlib

import torch

import data
import sample
from evaluate import prompt_accuracy
from studies.common import Table, figure, mean_se, parser, setup, todo, train_and_watch, write_markdown
from tasks import TASKS
from train import main as train_main
from vqdiffusion import MaskReplace

RATES, STEPS, OUT = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0), 400, "out/studies/scenes-vq"
AXES = ("shape", "color", "relation", "all", "legible")
SAMPLERS = [{"steps": n, "stride": stride, "truncation": 1.0} for n in (100, 50, 25, 10, 5)
            for stride in ("exact", "official")]
SAMPLERS += [{"steps": 25, "stride": "exact", "truncation": r} for r in (0.95, 0.86, 0.7, 0.5)]


def first_stage():
    """The VQ-VAE that all models of these studies share, trained once -> its checkpoint."""
    path = pathlib.Path(OUT) / "first_stage" / "ckpt.pt"
    if not path.is_file():
        train_main(["--model", "vq-vae", "--data", "scenes", "--sample-every", "0", "--out", str(path.parent)])
    return str(path)


def base(seed):
    """(task, averaged model) of the README's run with this seed, trained if it is not there yet."""
    path = pathlib.Path(OUT) / f"seed-{seed}" / "ckpt.pt"
    if not path.is_file():
        train_main(["--model", "vq-tiny", "--data", "scenes", "--first-stage", first_stage(), "--seed", str(seed),
                    "--sample-every", "0", "--out", str(path.parent)])
    return sample.load(path)


def short_run(rate, seed):
    """(task, averaged model) of a chain of which this share is [MASK] at its end: 0 only replaces, 1 only masks."""
    def build(config, info, vqvae):
        task = TASKS["vq"](config, info, vqvae)
        ends = {0.0: "replace-only", 1.0: "mask-only"}.get(rate, (0.99999, 9e-6, 9e-6, rate))
        task.process = MaskReplace(100, vqvae.num_codes, ends, config.aux_weight)
        return task
    config, dataset, task = setup("vq-tiny", OUT, build, data="scenes", steps=STEPS, batch_size=32, seed=seed,
                                  cfg_scale=3.0, first_stage=first_stage())
    return task, train_and_watch(config, dataset, task, STEPS, lambda ema: {})[1]


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
    note = "per cent of 96 captions, mean ± standard error over seeds: `python -m studies.vq_chain`"
    rows = [[rate, *show(masks, {"rate": rate})] for rate in done]
    write_markdown("vq_mask", ["masked at the end", *AXES], rows, f"{STEPS} steps of 32, {note}")
    write_markdown("vq_samplers", ["calls", "jump", "truncation", *AXES],
                   [[*s.values(), *show(samplers, s)] for s in SAMPLERS if len(samplers.column("all", **s)) > 1],
                   f"The full run, {note}")

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
    for cell in [] if args.summary else todo([{"seed": seed} for seed in range(args.seeds)], samplers, args.part):
        task, model = base(**cell)
        samplers.add(*({**cell, **s, **accuracy(task, model, captions, **s)} for s in SAMPLERS))
    for cell in [] if args.summary else todo(cells, masks, args.part):
        masks.add({**cell, **accuracy(*short_run(**cell), captions, truncation=1.0)})
    summarise(masks, samplers)


if __name__ == "__main__":
    main()
