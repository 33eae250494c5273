"""What makes a U-DiT: a U, attention on downsampled tokens, a filter, and four tricks

Claims (U-DiT, Tables 1, 2, 3, 7 and 9): a plain U with transformer blocks (DiT-UNet) gains a little
over an isotropic DiT; downsampling only keys and values loses, downsampling all tokens wins, if a
filter comes first; each of four tricks adds to it. Here: eleven models of equal multiply-
accumulates (28 M within 1 %, by the width of the MLP) on 16x16 latents of `shapes` and of CIFAR-10,
400 steps of 16 at a constant learning rate, chosen per model on `shapes` with 200 steps of another
seed. The tricks are added to "U, tokens" one at a time; the paper adds them one after another. The
depth-wise kernel begins as the identity, alone and re-parameterised. U-ViT: dit_rivals.py.
  equal steps     held-out loss (velocity MSE) after all steps: 200 pictures, 4 fixed times
  equal CPU time  the same when the fastest model is done; a model's time of a step is the median of
                  its runs, and between two measurements the loss is on a line in logarithms
  samples         shapes: share of 240 right (guidance 2, 12 Euler steps); CIFAR-10: classifier-FID
                  of 2,000 to 10,000 pictures (no guidance, 8 Euler steps), every arm and seed
  main path       U-DiT §3.2 says that features there are mostly low frequencies: the share of low
                  ones (spectra.py) in what comes up to the first level, minus that of its skip
About 75 CPU-seconds a cell of `shapes` and 100 of CIFAR-10, 11 models x 5 seeds each; before, 33 of
30 for the rates, and 10 minutes for first stages, latents, classifier: run the first cell of either
data set alone before you divide the study with --part.

    python -m studies.udit_ablation --tune
    python -m studies.udit_ablation --seeds 5 --cifar folder:PATH   # CIFAR-10, a folder per class
"""
import functools
import math
import statistics

import torch

import data
import sample
from cli import one_line
from evaluate import features, frechet_distance, kept_classifier
from studies import spectra
from studies.common import (RULE, Table, claims, figure, markdown, mean_se, parser, run, shown)
from studies.dit_rivals import (RATES, TUNING_SEED, add_models, columns, log_gap, minus, rate_of,
                                rates_text, read, run_model, test_pictures)

U = dict(hidden_size=16, num_heads=2, depth=(1, 1, 1, 1, 1))
PLAIN = dict(U, cosine=False, rope=False, mlp="basic", mlp_ratio=6.4375)
ISOTROPIC = dict(hidden_size=80, depth=5, num_heads=2, patch_size=2)
MODELS = {      # name: (family, constructor arguments); mlp_ratio makes the MACs equal
    "isotropic DiT": ("dit", ISOTROPIC),
    "U-ViT": ("uvit", dict(ISOTROPIC, mlp_ratio=3.4375)),
    "DiT-UNet": ("udit", dict(PLAIN, down_factor=1, kernel_size=0, mlp_ratio=2)),
    "U, keys and values": ("udit", dict(PLAIN, downsample="kv", mlp_ratio=7.1875)),
    "U, tokens, no filter": ("udit", dict(PLAIN, kernel_size=0, mlp_ratio=6.875)),
    "U, tokens": ("udit", PLAIN),
    "+ cosine": ("udit", dict(PLAIN, cosine=True)),
    "+ rotary positions": ("udit", dict(PLAIN, rope=True)),
    "+ depth-wise MLP": ("udit", dict(PLAIN, mlp="dw", mlp_ratio=4.5625)),
    "+ re-parameterised": ("udit", dict(PLAIN, mlp="rep", mlp_ratio=4.5625)),
    "all four: U-DiT": ("udit", dict(U, mlp_ratio=4.5625))}
STEPS, EVERY, TIMES = 400, 100, (200, 800)
STAGES = {"shapes": dict(factor=2), "cifar10": dict(factor=2, latent_noise=0.1)}
QUALITY = {"shapes": "samples right, %", "cifar10": "classifier-FID"}
MEASURES = {"loss": "equal steps", "timed": "equal CPU time", "quality": "samples"}
TABLE = Table("udit_ablation", ["data", "model", "seed"])
TUNED = Table("udit_rates", ["model", "rate"])
CLAIMS = [      # the paper's sentence, its FID, the model that is to lose, the one to win
    ("a U of transformer blocks beats an isotropic DiT", "97.85, 93.48", "isotropic DiT",
     "DiT-UNet"),
    ("downsampling keys and values alone loses", "94.38, 93.48", "U, keys and values", "DiT-UNet"),
    ("downsampling all tokens wins", "93.48, 89.43", "DiT-UNet", "U, tokens"),
    ("all tokens are better than keys and values", "94.38, 89.43", "U, keys and values",
     "U, tokens"),
    ("without a filter, downsampling loses", "96.15, 93.48", "U, tokens, no filter", "DiT-UNet"),
    ("the filter helps", "96.15, 89.43", "U, tokens, no filter", "U, tokens"),
    ("cosine attention helps", "89.43, 86.96", "U, tokens", "+ cosine"),
    ("rotary positions help", "86.96, 84.64", "U, tokens", "+ rotary positions"),
    ("a depth-wise convolution in the MLP helps", "84.64, 79.30", "U, tokens", "+ depth-wise MLP"),
    ("re-parameterising it helps", "79.30, 75.71", "+ depth-wise MLP", "+ re-parameterised"),
    ("all four tricks help", "89.43, 75.71", "U, tokens", "all four: U-DiT"),
    ("U-DiT beats DiT at equal MACs", "67.40, 31.51", "isotropic DiT", "all four: U-DiT"),
    ("U-DiT beats U-ViT", "21.22 (76.4 G), 16.64 (22.2 G)", "U-ViT", "all four: U-DiT")]


# --------------------------------------------------------------------------------------------------
# one cell

@functools.lru_cache(1)
def yardstick(name, out, count):
    """Of photographs: (classifier, features of 10,000, those of `count` others, classes)."""
    real = data.load(name)
    classifier = kept_classifier(real, folder=out)[0]
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    rest, floor = (features(classifier, real.images[rows])
                   for rows in (order[count:][:10_000], order[:count]))
    return classifier, rest, floor, len(real.class_names)


def quality_of(world, task, ema, name, out, count):
    """{"quality", "floor"}: the share of samples that are right, or distance, and of real ones."""
    if world == "shapes":
        return {"quality": read(task, ema, min(count, 240), cfg_scale=2.0, steps=12)[0],
                "floor": ""}
    classifier, rest, floor, classes = yardstick(name, out, count)
    pictures = sample.sample_all(task, ema, torch.arange(count) % classes, cfg_scale=1.0,
                                 steps=8)[1]
    return {"quality": frechet_distance(features(classifier, pictures), rest),
            "floor": frechet_distance(floor, rest)}


@torch.no_grad()
def main_path(task, ema, name, count=64):
    """{"low 200", "low 800"}: share of low frequencies on a U's main path, less its skip's."""
    if not hasattr(ema, "up2_1"):
        return {f"low {t}": "" for t in TIMES}
    test, found = test_pictures(name, count), {}
    x0 = task.encode(data.to_float(test.images))                                # (N, C, H, W)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    for t in TIMES:
        times = torch.full((len(x0),), float(t))
        maps = spectra.features(ema, task.process.q_sample(x0, times, eps), times, test.labels)
        found[f"low {t}"] = spectra.low_share(maps["backbone"]) - spectra.low_share(maps["skip"])
    return found


def run_cell(cell, cifar="cifar10", steps=STEPS, out="out/studies", samples=2000, stage={},
             **flags):
    """Train one model with one seed, or one rate of it -> rows for its table."""
    add_models(MODELS)
    tuning, world = "rate" in cell, cell.get("data", "shapes")
    name, out = "shapes" if world == "shapes" else cifar, f"{out}/{world}-16x16"
    last = steps // 2 if tuning else steps
    rows, task, ema = run_model(
        cell["model"], name, out, {**STAGES[world], **stage}, last if tuning else EVERY,
        rate=cell["rate"] if tuning else rate_of(TUNED, cell["model"]), count=200, levels=4,
        steps=last, seed=TUNING_SEED if tuning else cell["seed"],
        **{"batch_size": 16, "lr_decay": "constant", **flags})
    if tuning:
        return [{**cell, **rows[-1]}]
    more = {**quality_of(world, task, ema, name, out, samples), **main_path(task, ema, name)}
    blank = dict.fromkeys(more, "")
    return [{**cell, **row, **(more if row["step"] == steps else blank)} for row in rows]


# --------------------------------------------------------------------------------------------------
# the tables

def loss_at(step, measured):
    """The loss at a step, on a line of logarithms between two of {step: loss}.

    Raises ValueError for a step before the first or after the last.
    """
    steps = sorted(measured)
    pair = next(((a, b) for a, b in zip(steps, steps[1:]) if a <= step <= b), None)
    if pair is None:
        raise ValueError(f"no loss was measured before or after step {step:.0f}: {steps}")
    a, b = pair
    share = math.log(step / a) / math.log(b / a)
    return measured[a] ** (1 - share) * measured[b] ** share


def results(world):
    """{model: {"loss", "timed", "quality", ...: {seed: value}}} of the seeds that every model has
    on this data set; {} below two of them."""
    steps = sorted(set(TABLE.column("step", data=world)))
    names = ("loss", "quality", "cpu_s", "params", "macs_m", *(f"low {t}" for t in TIMES))
    found = columns(TABLE, names, MODELS, data=world, step=steps[-1]) if steps else {}
    losses = {step: columns(TABLE, ["loss"], MODELS, data=world, step=step) for step in steps}
    seconds = {model: statistics.median(r["cpu_s"].values()) / steps[-1]
               for model, r in found.items()}
    for model, r in found.items():              # how far each gets while the fastest does all steps
        reached = steps[-1] * min(seconds.values()) / seconds[model]
        r["timed"] = {seed: loss_at(reached, {step: losses[step][model]["loss"][seed]
                                              for step in steps}) for seed in r["loss"]}
    return found


def verdicts(world, found, measure):
    """The paper's sentences beside the differences in one measure."""
    rows = []
    for sentence, numbers, worse, better in CLAIMS:
        a, b = found[worse][measure], found[better][measure]
        if measure != "quality":
            gap, text = log_gap(a, b), f"log loss: {worse} - {better}"
        elif world == "shapes":
            gap, text = minus(b, a), f"right: {better} - {worse}"
        else:
            gap, text = minus(a, b), f"FID: {worse} - {better}"
        rows.append((sentence, numbers, text, gap))
    return claims("seeds", rows)


def report():
    """For each data set whose seeds are whole: models, and verdicts by three measures."""
    text, main = "", []
    for world in QUALITY:
        if not (found := results(world)):
            continue
        scale = 100 if world == "shapes" else 1
        lines = [[model, len(r["loss"]), f"{mean_se(r['params'].values())[0] / 1e6:.2f}",
                  f"{mean_se(r['macs_m'].values())[0]:.1f}",
                  f"{statistics.median(r['cpu_s'].values()):.0f}", shown(r["loss"].values(), 4),
                  shown(r["timed"].values(), 4), shown(r["quality"].values(), 2, scale)]
                 for model, r in found.items()]
        text += f"\n**{world}: models**\n\n" + markdown(
            ["model", "seeds", "M params", "M MACs", "CPU-s", "loss, equal steps",
             "loss, equal CPU time", QUALITY[world]], lines)
        if world == "cifar10":
            text += (f"\nReal pictures have a distance of "
                     f"{max(v for v in TABLE.column('floor', data=world) if v != ''):.2f}.\n")
        for measure, what in MEASURES.items():
            text += f"\n**{world}: {what}**\n\n" + verdicts(world, found, measure)
        main += [(f"the main path holds mostly low frequencies: {world}, t = {t}", "",
                  "share of low ones: backbone - skip, DiT-UNet", found["DiT-UNet"][f"low {t}"])
                 for t in TIMES]
    return (RULE + text + "\n**The main path**\n\n" + claims("seeds", main) + "\n"
            + rates_text(TUNED, MODELS)) if text else ""


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
    p.add_argument("--tune", action="store_true", help="first: choose the learning rates")
    args = p.parse_args(argv)
    if args.tune and (args.cifar or args.data != list(QUALITY)):
        p.error("--tune is on shapes alone, and does not read --cifar and --data")
    if args.cifar and "cifar10" not in args.data:
        p.error("--cifar is not read without --data cifar10")
    name = args.cifar or "cifar10"
    if "cifar10" in args.data and not (args.summary or args.tune):
        data.load(name, count=1)                            # raises before the first cell is run
    cells = [{"data": world, "model": model, "seed": seed} for seed in range(args.seeds)
             for world in args.data for model in MODELS]
    if args.tune:
        cells = [{"model": model, "rate": rate} for model in MODELS for rate in RATES]
    run(args, TUNED if args.tune else TABLE, cells, lambda cell: run_cell(cell, name))
    print(report())
    if all(results(world) for world in QUALITY):
        figure("udit_ablation", plot, (9, 4), 2)


if __name__ == "__main__":
    main()
