"""What makes a U-DiT: a U, attention on downsampled tokens, and four tricks, added one by one

Claim (U-DiT, Tables 1, 4, 7 and 8): a plain U with transformer blocks (DiT-UNet) gains little over
an isotropic DiT; downsampling only keys and values loses; downsampling all tokens wins, and each
trick adds to it. Here: models of equal multiply-accumulates (28 M, by the width of the MLP) on
16x16 latents of `shapes` and of CIFAR-10, 400 steps of 32 at a constant learning rate. So one run
gives the loss at equal steps, and at the time when the fastest run was done. Then samples: the
reader's verdict (shapes, guidance 2), the classifier-FID of 480 (CIFAR-10, no guidance). About 80
CPU-seconds a cell, 8 models x 2 data sets x 3 seeds, and once 5 minutes for first stages and
classifier.

    python -m studies.udit_ablation
    python -m studies.udit_ablation --cifar folder:PATH     # CIFAR-10 as a folder per class
"""
import torch

import data
import sample
from cli import one_line
from evaluate import class_accuracy, kept_classifier, score_pictures
from models import FAMILIES, find_model
from studies.common import (Table, compared, figure, heldout_loss, markdown, mean_se,
                            notice, parser, run, setup, shown, train_and_watch)
from tasks import macs

U = dict(hidden_size=16, num_heads=2, depth=(1, 1, 1, 1, 1))
PLAIN = dict(U, cosine=False, rope=False, mlp="basic")
MODELS = {      # name: (family, constructor arguments); mlp_ratio makes the MACs equal
    "isotropic DiT": ("dit", dict(find_model("DiT-96x3/2")[1], mlp_ratio=5.1875)),
    "DiT-UNet": ("udit", dict(PLAIN, down_factor=1, kernel_size=0, mlp_ratio=2)),
    "U, keys and values downsampled": ("udit", dict(PLAIN, downsample="kv", mlp_ratio=7.1875)),
    "U, tokens downsampled": ("udit", dict(PLAIN, mlp_ratio=6.4375)),
    "+ cosine": ("udit", dict(PLAIN, cosine=True, mlp_ratio=6.4375)),
    "+ rotary positions": ("udit", dict(PLAIN, cosine=True, rope=True, mlp_ratio=6.4375)),
    "+ depth-wise MLP": ("udit", dict(U, mlp="dw", mlp_ratio=4.5625)),
    "+ re-parameterised": ("udit", dict(U, mlp="rep", mlp_ratio=4.5625))}
STEPS, EVERY = 400, 100
FLAGS = {"shapes": dict(factor=2), "cifar10": dict(factor=2, first_stage="new", latent_noise=0.1)}
QUALITY = {"shapes": "samples right, %", "cifar10": "classifier-FID"}
TABLE = Table("udit_ablation", ["data", "model", "seed"])


def add_models():
    """Give train.py's table of models the rows of this study."""
    for name, (family, sizes) in MODELS.items():
        FAMILIES[family].sizes[name] = sizes


def quality_of(world, task, ema, name, out):
    """Share of 240 samples that are right (shapes), or the classifier-FID of 480 (CIFAR-10)."""
    if world == "shapes":
        y = torch.arange(240) % 48
        return class_accuracy(sample.sample_all(task, ema, y, cfg_scale=2.0)[1], y)["all"][0]
    real = data.load(name)
    pictures = sample.sample_all(task, ema, torch.arange(480) % real.num_classes, cfg_scale=1.0)[1]
    return score_pictures(kept_classifier(real, folder=out)[0], pictures, real)["fid"]


def run_cell(cell, cifar="cifar10", steps=STEPS, out="out/studies", **flags):
    """Train one model on one data set with one seed -> rows for the table."""
    add_models()
    world, out = cell["data"], f"{out}/{cell['data']}-16x16"
    name = "shapes" if world == "shapes" else cifar
    config, dataset, task = setup(cell["model"], out, data=name, steps=steps, batch_size=32,
                                  seed=cell["seed"], lr_decay="constant", **FLAGS[world], **flags)
    test = data.load(name, split="test", count=256)
    x0 = task.encode(data.to_float(test.images))                                # (256, 4, 16, 16)
    measure = lambda ema: {"loss": heldout_loss(task, ema, x0, test.labels)}
    rows, ema = train_and_watch(config, dataset, task, EVERY, measure)
    sizes = {"macs_m": macs(task) / 1e6, "params": sum(p.numel() for p in task.model.parameters())}
    quality = quality_of(world, task, ema, name, out)
    return [{**cell, **row, **sizes, "quality": quality if row["step"] == steps else ""}
            for row in rows]


def at_time(table, budget, **cell):
    """The held-out loss of a cell after so many CPU seconds, between two measurements."""
    times, losses = table.column("cpu_s", **cell), table.column("loss", **cell)
    k = next(k for k, time in enumerate(times) if time >= budget)
    if k == 0:
        return losses[0]
    share = (budget - times[k - 1]) / (times[k] - times[k - 1])
    return losses[k - 1] + share * (losses[k] - losses[k - 1])


def results(world):
    """{model: {"loss", "timed" (loss at equal time), "quality", "cpu_s": {seed: value}}}."""
    last = max(TABLE.column("step"), default=0)
    seconds = TABLE.column("cpu_s", data=world, step=last)
    found = {}
    for model in MODELS:
        by = lambda name: TABLE.by("seed", name, data=world, model=model, step=last)
        if seeds := by("loss"):
            timed = {seed: at_time(TABLE, min(seconds), data=world, model=model, seed=seed)
                     for seed in seeds}
            found[model] = {"loss": seeds, "timed": timed, "quality": by("quality"),
                            "cpu_s": by("cpu_s")}
    return found


def report():
    """Two tables per data set."""
    text = ""
    if TABLE.first_edition:
        text = notice(TABLE) + notice(TABLE, (
            "The depth-wise kernel of `+ depth-wise MLP` began with values that make its output "
            "nearly 0, so that row measures its start, not the block. It now begins with the "
            "identity, as the re-parameterised one does (udit.py)."))
    for world in QUALITY:
        found, scale = results(world), 100 if world == "shapes" else 1
        if len(found) < len(MODELS):
            continue
        lines = [[model, len(r["loss"]), f"{mean_se(r['cpu_s'].values())[0]:.0f}",
                  shown(r["loss"].values(), 4), shown(r["timed"].values(), 4),
                  shown(r["quality"].values(), 2, scale)] for model, r in found.items()]
        text += f"**{world}**\n\n" + markdown(
            ["model", "seeds", "CPU-s", "loss, equal steps", "loss, equal CPU time",
             QUALITY[world]], lines)
        lines = [[model, *(compared(found[model][key], found[before][key], digits, by)
                           for key, digits, by in (("loss", 4, 1), ("timed", 4, 1),
                                                   ("quality", 2, scale)))]
                 for before, model in zip(MODELS, list(MODELS)[1:])]
        text += "\nEach model minus the one above it, paired by seed:\n\n" + markdown(
            ["model", "loss, equal steps", "loss, equal CPU time", QUALITY[world]], lines) + "\n"
    return text if "**shapes**" in text else ""


def plot(panels):
    """Held-out loss of every model, at equal steps and at equal time, one panel per data set."""
    for k, (axes, world) in enumerate(zip(panels, QUALITY)):
        found = results(world)
        for key, label, shift in (("loss", "equal steps", 0.1), ("timed", "equal CPU time", -0.1)):
            means, errors = zip(*(mean_se(r[key].values()) for r in found.values()))
            axes.errorbar(means, [i + shift for i in range(len(means))], xerr=errors, fmt="o",
                          capsize=2, label=label)
        axes.set_yticks(range(len(found)), found if k == 0 else [""] * len(found))
        axes.invert_yaxis()
        axes.set(xlabel="held-out loss (velocity MSE)", title=f"{world}, equal MACs")
        axes.legend(ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))


@one_line
def main(argv):
    """Command line of the study."""
    p = parser(__doc__)
    p.add_argument("--cifar", help="CIFAR-10: cifar10 (the default; downloads) or folder:PATH")
    p.add_argument("--data", nargs="*", default=list(QUALITY), choices=list(QUALITY))
    args = p.parse_args(argv)
    if args.cifar and "cifar10" not in args.data:
        p.error("--cifar is not read without --data cifar10")
    name = args.cifar or "cifar10"
    if "cifar10" in args.data and not args.summary:
        data.load(name, count=1)                            # raises before the first cell is run
    cells = [{"data": world, "model": model, "seed": seed} for world in args.data
             for seed in range(args.seeds) for model in MODELS]
    run(args, TABLE, cells, lambda cell: run_cell(cell, name))
    print(report())
    if all(results(world) for world in QUALITY):
        figure("udit_ablation", plot, (9, 4), 2)


if __name__ == "__main__":
    main()
