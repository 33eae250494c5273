"""What makes a U-DiT: the shape of a U, attention on downsampled tokens, and four tricks, added one by one.

The claim (U-DiT, tables 1, 4, 7 and 8): a plain U with transformer blocks (DiT-UNet) gains little over an isotropic
DiT; downsampling only keys and values loses; downsampling all tokens wins, and each trick adds to it.  Here every model
has the same multiply-accumulates (28 M, by the width of its MLP), on 16x16 latents of `shapes` and of CIFAR-10; on 8x8
the lowest level would have one token per group, and nothing to attend to. The learning rate is constant, so that one
run answers two questions: the loss at equal steps, and, read off where each had used the same CPU seconds, at equal
time. Then samples: what the reader sees (shapes, guidance 2), classifier-FID (CIFAR-10, no guidance). About 80
CPU-seconds a cell on one thread, 8 models x 2 data sets x 3 seeds; and once 5 minutes for autoencoders and classifier.

    python -m studies.udit_ablation                         # -> studies/results/udit_ablation.{csv,md,png}
    python -m studies.udit_ablation --cifar folder:PATH     # CIFAR-10 from your own copy, a folder per class

The committed rows are of its first 1,000 pictures of each class: 400 steps do not see more, and a cell is faster.
"""
import torch

import data
import sample
from dit import DiT, dit_config
from evaluate import class_accuracy, score_pictures
from studies.common import (Table, figure, heldout_loss, mean_se, parser, setup, todo, train_and_watch,
                            write_markdown)
from tasks import DiffusionTask, model_shape
from udit import UDiT

VANILLA = dict(cosine=False, rope=False, mlp="basic")
MODELS = {"isotropic DiT": None, "DiT-UNet": dict(VANILLA, down_factor=1, kernel_size=0),
          "U, keys and values downsampled": dict(VANILLA, downsample="kv"), "U, tokens downsampled": VANILLA,
          "+ cosine": dict(VANILLA, cosine=True), "+ rotary positions": dict(VANILLA, cosine=True, rope=True),
          "+ depth-wise MLP": dict(cosine=True, rope=True, mlp="dw"),
          "+ re-parameterised": dict(cosine=True, rope=True, mlp="rep")}
U, ISOTROPIC = dict(hidden_size=16, num_heads=2, depth=(1, 1, 1, 1, 1)), dit_config("DiT-96x3/2")
MACS, STEPS, EVERY, BATCH = 28.3e6, 400, 100, 32
LATENT = {"shapes": dict(), "cifar10": dict(first_stage="tiny", latent_noise=0.1)}


def build(name):
    """A builder of the named model with an MLP as wide as the budget of multiply-accumulates allows."""
    def task_of(config, info, first_stage):
        channels, size, _ = model_shape(info, first_stage)
        common = dict(input_size=size, in_channels=channels, num_classes=len(info["class_names"]), learn_sigma=False)

        def make(mlp_ratio):
            if MODELS[name] is None:
                return DiT(**common, **{**ISOTROPIC, "mlp_ratio": mlp_ratio})
            return UDiT(**common, **{**U, **MODELS[name], "mlp_ratio": mlp_ratio})

        def macs(mlp_ratio):
            with torch.device("meta"):
                return DiffusionTask(config, info, make(mlp_ratio), first_stage).macs()
        best = 1 + (MACS - macs(1)) / (macs(2) - macs(1))       # they grow evenly with the ratio
        torch.manual_seed(config.seed)
        return DiffusionTask(config, info, make(round(16 * best) / 16), first_stage)
    return task_of


def run_cell(cell, cifar):
    """Train one model on one data set with one seed -> rows for the table."""
    world = "shapes" if cell["data"] == "shapes" else cifar
    out = f"out/studies/{cell['data']}-16x16"
    config, dataset, task = setup("DiT-96x3/2", out, build(cell["model"]), data=world, steps=STEPS, batch_size=BATCH,
                                  seed=cell["seed"], lr_decay="constant", factor=2, **LATENT[cell["data"]])
    test = data.load(world, split="test", count=256)
    x0 = task.encode(data.to_float(test.images))                                            # (256, 4, 16, 16)
    rows, ema = train_and_watch(config, dataset, task, EVERY,
                                lambda ema: {"loss": heldout_loss(task, ema, x0, test.labels)})
    y = torch.arange(240 if world == "shapes" else 480) % len(dataset.class_names)
    _, pictures, _ = sample.draw_all(task, ema, y, seed=0, cfg_scale=2.0 if world == "shapes" else 1.0)
    if world == "shapes":
        quality = class_accuracy(pictures, y)["match"]
    else:
        quality = score_pictures(world, config.data_dir, pictures, None, f"{out}/classifier.pt", 1000, "cpu")["fid"]
    own = {"macs_m": task.macs() / 1e6, "params": sum(p.numel() for p in task.model.parameters())}
    return [{**cell, **row, **own, "quality": quality if row["step"] == STEPS else ""} for row in rows]


def at_time(table, budget, **cell):
    """The held-out loss of a cell when it had used so many CPU seconds, between two measurements."""
    times, losses = table.column("cpu_s", **cell), table.column("loss", **cell)
    k = next(k for k, t in enumerate(times) if t >= budget)
    share = (budget - times[k - 1]) / (times[k] - times[k - 1]) if k else 1.0
    return losses[k] if not k else losses[k - 1] + share * (losses[k] - losses[k - 1])


def summarise(table):
    """Table and figure from the CSV."""
    rows, curves = [], {}
    for world, unit in (("shapes", "right"), ("cifar10", "classifier-FID")):
        done = [m for m in MODELS if table.column("loss", data=world, model=m, step=STEPS)]
        budget = min((min(table.column("cpu_s", data=world, model=m, step=STEPS)) for m in done), default=0)
        for model in done:
            cell = dict(data=world, model=model)
            seeds = sorted(set(table.column("seed", **cell)))
            loss, cpu, quality = (mean_se(table.column(c, step=STEPS, **cell)) for c in ("loss", "cpu_s", "quality"))
            timed = mean_se([at_time(table, budget, seed=s, **cell) for s in seeds])
            show = "{:.0%} ± {:.1%}" if world == "shapes" else "{:.2f} ± {:.2f}"
            rows.append([world, model, len(seeds), f"{table.column('macs_m', **cell)[0]:.2f}",
                         f"{table.column('params', **cell)[0] / 1e6:.2f}", f"{cpu[0]:.0f}",
                         f"{loss[0]:.4f} ± {loss[1]:.4f}", f"{timed[0]:.4f} ± {timed[1]:.4f}",
                         f"{unit}: " + show.format(*quality)])
            curves.setdefault(world, {})[model] = loss, timed
    write_markdown("udit_ablation", ["data", "model", "seeds", "M MACs", "M params", "CPU-s", "loss, equal steps",
                                     "loss, equal CPU time", "samples"], rows,
                   f"{STEPS} steps of {BATCH}, mean ± standard error over seeds: `python -m studies.udit_ablation`")
    figure("udit_ablation", lambda panels: draw(curves, panels if len(curves) > 1 else [panels]), (9, 4),
           max(1, len(curves)))


def draw(curves, panels):
    """Held-out loss of every model, at equal steps and at equal time, one panel per data set."""
    for k, (axes, (world, models)) in enumerate(zip(panels, curves.items())):
        for which, (label, shift) in enumerate((("equal steps", 0.1), ("equal CPU time", -0.1))):
            points = [both[which] for both in models.values()]
            axes.errorbar([m for m, _ in points], [i + shift for i in range(len(points))], xerr=[e for _, e in points],
                          fmt="o", capsize=2, label=label)
        axes.set_yticks(range(len(models)), models if k == 0 else [""] * len(models))
        axes.invert_yaxis()
        axes.set(xlabel="held-out loss (velocity MSE)", title=f"{world}, equal MACs")
        axes.legend(ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))


def main():
    p = parser(__doc__)
    p.add_argument("--cifar", default="cifar10", help="where CIFAR-10 is: cifar10 (downloads) or folder:PATH")
    p.add_argument("--data", nargs="*", default=["shapes", "cifar10"], choices=["shapes", "cifar10"])
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    table = Table("udit_ablation", ["data", "model", "seed"])
    cells = [{"data": d, "model": m, "seed": s} for d in args.data for s in range(args.seeds) for m in MODELS]
    for cell in [] if args.summary else todo(cells, table, args.part):
        table.add(*run_cell(cell, args.cifar))
    summarise(table)


if __name__ == "__main__":
    main()
