"""What makes shapes on tokens: rotary positions, a bias per offset, codes that start alike?

Ours: VQ-Diffusion's transformer knows where a token is from tables of rows and columns alone. What
a cell looks like depends on its neighbours, at every place in the same way, so a table must learn
that anew for each place. vq-tiny adds three things: rotary angles and a learned bias per head and
offset in self-attention (`--relative`), and code vectors that start from the codebook. Each alone,
each left out, none ("published") and all: 1,500 steps of 32 on the 8x8 tokens of `scenes`. Beside
them all three with a learned null text (Tang et al. 2022: the best way to guide, `--learned-null`).
Columns: the bound on the negative log-likelihood and the cross-entropy, in nats per token, of 800
test pictures, every step of the chain equally often, the same noise for all; per cent of 480 test
captions, half of them of two objects, of which everything is right, guidance 3, 25 calls. About 6
CPU-minutes a cell, nine cells a seed; seed k is the run of `train.py --seed k`. Seeds 0 to 2 ran on
an H100 in float32 (torch 2.11), the others on a CPU: column `device`. Of so short a run nearly no
picture of two objects is right; studies.vq_base trains for 14,000 steps.

    python -m studies.vq_parts --seeds 5
"""
import torch

import data
from cli import one_line
from studies import scenes_base
from studies.common import (RULE, Table, claims, figure, markdown, mean_se, parser, run, setup,
                            shown, train_and_watch)
from studies.vq_base import DEVICE, ON, OUT, accuracy, captions_of
from vqdiffusion import Attention

STEPS, CODES = 1500, OUT / "first_stage-4"
PARTS = ("rotary", "bias", "codebook")
ARMS = {"published": (), "all": PARTS, **{f"without {part}": tuple(p for p in PARTS if p != part)
                                          for part in PARTS},
        **{f"{part} alone": (part,) for part in PARTS}, "all, learned null": PARTS}
TABLE = Table("vq_parts", ["arm", "seed"])
COLUMNS = {"bound": (3, 1), "ce": (3, 1), "two": (1, 100), "one": (1, 100), "shape": (1, 100),
           "color": (1, 100), "legible": (1, 100)}


def first_stage():
    """The VQ-VAE of the default run, cells of 4x4 pixels, trained once -> its checkpoint."""
    return scenes_base.trained(["--model", "vq-vae", "--steps", "1600"], CODES, ON)


def keep_parts(model, parts, seed):
    """Take out of a new VQTransformer with relative=True, in place, what is not in `parts`."""
    for layer in model.modules():
        if isinstance(layer, Attention) and layer.relative:
            if "rotary" not in parts:               # turned by no angle
                layer.angles.copy_(torch.tensor([1.0, 0.0]))
            layer.bias.requires_grad_("bias" in parts)
    if "codebook" not in parts:
        generator = torch.Generator().manual_seed(seed)
        model.content_emb.emb.weight.data.normal_(std=0.02, generator=generator)


def trained(arm, seed, steps=STEPS, process=lambda process: process, **flags):
    """(task, averaged model, CPU seconds) of a short run. process: what to make of its chain."""
    flags = {"first_stage": first_stage(), **flags} if "first_stage" not in flags else flags
    config, dataset, task = setup("vq-tiny", OUT, ON, data="scenes", hold_out=True, steps=steps,
                                  seed=seed, learned_null="null" in arm, **flags)
    keep_parts(task.model.denoiser, ARMS[arm], seed)
    task.process = process(task.process)
    rows, model = train_and_watch(config, dataset, task, steps, lambda ema: {})
    return task, model, rows[-1]["cpu_s"]


@torch.no_grad()
def bound(task, model, count=800):
    """{"bound", "ce"} of test pictures, nats per token. Picture i is noised to step i mod T."""
    world = data.load("scenes", split="test", count=count)
    x0 = torch.cat([task.encode(data.to_float(some.to(DEVICE)))
                    for some in world.images.split(100)])
    y, t = task.tokenizer(world.captions), torch.arange(count) % task.process.steps
    u = torch.rand((*x0.shape, 2), generator=torch.Generator().manual_seed(0))
    y, t, u = (x.to(DEVICE) for x in (y, t, u))
    parts = [task.process.loss(model, *(v[rows] for v in (x0, y)), t=t[rows], u=u[rows])[1]
             for rows in torch.arange(count).split(100)]
    mean = lambda key: (sum(part[key] for part in parts) / len(parts)).item()
    return {"bound": mean("vlb"), "ce": mean("ce")}


def measure(task, model, cpu):
    """The columns of a run."""
    return {**bound(task, model), **accuracy(task, model, captions_of(240, 240)), "cpu_s": cpu}


def gap(column, a, b):
    """{seed: column of arm a - that of arm b}."""
    first, second = (TABLE.by("seed", column, arm=arm) for arm in (a, b))
    return {seed: first[seed] - second[seed] for seed in first if seed in second}


def verdicts():
    """Our sentences, each with the differences of the seeds that have both arms."""
    rows = [("all three draw more pictures right", "all: all - published",
             gap("all", "all", "published")),
            ("all three lower the bound", "bound: published - all",
             gap("bound", "published", "all")),
            *((f"{part} lowers it alone", f"bound: published - {part} alone",
               gap("bound", "published", f"{part} alone")) for part in PARTS),
            *((f"{part} is needed beside the others", f"bound: without {part} - all",
               gap("bound", f"without {part}", "all")) for part in PARTS),
            ("(paper) a learned null text is better than the empty caption",
             "all: all, learned null - all", gap("all", "all, learned null", "all"))]
    return claims("seeds", [(said, "", above, values) for said, above, values in rows
                            if len(values) > 1])


def report():
    """The verdicts, and a line for every arm."""
    lines = [[arm, len(TABLE.column("seed", arm=arm)),
              *(shown(TABLE.column(c, arm=arm), *how) for c, how in COLUMNS.items())]
             for arm in ARMS if TABLE.column("seed", arm=arm)]
    if not lines:
        return ""
    told = verdicts() if len(TABLE.column("seed", arm="all")) > 1 else ""
    return (RULE + "\n" + told + "\nMean of the seeds ± its standard error.\n\n"
            + markdown(["arm", "seeds", *COLUMNS], lines))


def plot(panels):
    """Bound and share of captions right of every arm."""
    arms = [arm for arm in ARMS if TABLE.column("seed", arm=arm)]
    for axes, column, label in zip(panels, ("bound", "all"), ("bound, nats per token",
                                                              "share of captions all right")):
        means = [mean_se(TABLE.column(column, arm=arm)) for arm in arms]
        axes.errorbar([m for m, _ in means], arms, xerr=[e for _, e in means], fmt="o", capsize=2)
        axes.set(xlabel=label)
        axes.invert_yaxis()


@one_line
def main(argv):
    """Command line of the study."""
    args = parser(__doc__).parse_args(argv)
    cells = [{"arm": arm, "seed": seed} for seed in range(args.seeds) for arm in ARMS]
    run(args, TABLE, cells, lambda cell: [{**cell, **measure(*trained(**cell))}])
    print(report())
    if TABLE.rows():
        figure("vq_parts", plot, (9, 3.4), 2, sharey=True)


if __name__ == "__main__":
    main()
