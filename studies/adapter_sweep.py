"""Where should an adapter stand? All twenty placements, then activation and scale

Claim (Xiang et al. 2023): what an adapter reads matters most (largest F), the best is the output of
cross-attention; activation and scale hardly matter. Here: the base assets/unet-scenes.pt, adapters
of 0.75 % of the U-Net, 100 steps of 16 as `adapters.py learn` trains; half of the pictures are a
thing (things.py), half others of its category; and one style, striped backgrounds. Beside them all
weights, LoRA on keys and values with the same budget, and no training. Residual placements get the
nearest budget that a whole rank allows. Alignment: 0 what the base draws, 1 real pictures. Leak:
the share of the bare category's pictures that look like the thing. The units of the analysis of
variance are placements, because runs of one placement are alike. About 13 CPU-seconds a cell: 161
cells, and 90 of forms.

    python -m studies.adapter_sweep
"""
import copy
import dataclasses
import itertools
import random

import numpy as np
import torch

import data
import sample
import worlds
from adapters import PLACEMENTS, add_adapters, anova, incomplete_beta
from cli import one_line
from data import to_float
from evaluate import prompt_accuracy
from studies.common import (Table, figure, heldout_loss, markdown, mean_se, notice, parser, run,
                            shown, train_and_watch)
from studies.lora import add_lora
from studies.things import THINGS, Judge, photographs, striped
from train import Config

BASE, STEPS, BUDGET = "assets/unet-scenes.pt", 100, 0.0075
TASKS = ("target circle", "gem cross", "stripes")
FORMS = tuple(itertools.product(("relu", "sigmoid", "silu", "identity"), (0.5, 1.0, 2.0, 4.0)))
# where activation and scale are varied: best, middle and worst of the first sweep
CORNERS = ("ca_c-ca_c", "sa_out-trans_out", "ffn_in-trans_out")
TABLE = Table("adapter_sweep", ["task", "method", "activation", "scale", "seed"])


@torch.no_grad()
def prediction_difference(unet, xt, t, context_a, context_b):
    """Where two prompts make the model predict differently: rms over channels, (B, H, W).
    xt (B, C, H, W) a noised picture, t (B,), contexts (B, L, D_ctx), such as those of "a photo of
    V* dog" and "a photo of dog". Source: Xiang et al. 2023 (its probe)."""
    difference = unet(xt, t, context_a) - unet(xt, t, context_b)                    # (B, C, H, W)
    return difference.float().square().mean(dim=1).sqrt()                           # (B, H, W)


def learn(world, method, seed=0, activation="relu", scale=1.0, steps=STEPS):
    """Train an adapter (READ-ADD), "lora" or "full" on a World -> (averaged model, facts)."""
    task = copy.copy(world.task)
    task.model = model = copy.deepcopy(world.model).requires_grad_(True)
    torch.manual_seed(seed)
    budget, lr = BUDGET * sum(p.numel() for p in model.denoiser.parameters()), 5e-3
    model.text.requires_grad_(False)
    if method == "full":
        lr = 5e-4
    elif method == "lora":
        add_lora(model.denoiser, budget=budget)
    else:
        add_adapters(model.denoiser, *method.split("-"), budget=budget, activation=activation,
                     scale=scale)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = Config(model="unet-tiny", steps=steps, batch_size=16, optimizer="adamw", lr=lr,
                    warmup=0, ema=0.9, seed=seed, device="cpu")
    rows, ema = train_and_watch(config, world.dataset, task, steps, lambda ema: {})
    return ema, {"params": count, "s_per_step": rows[-1]["cpu_s"] / steps}


class World:
    """The base, the pictures that a task learns from, and how it is measured.

    name: one of THINGS, or "stripes"; count: rows of the training set, half of them the thing.
    """

    def __init__(self, name, count=400):
        self.name, (self.task, self.model) = name, sample.load(BASE)
        train, test = (data.load("scenes", split=s, count=count, seed=7) for s in ("train", "test"))
        single = [c for c in test.captions if "relation" not in worlds.parse_caption(c)]
        self.plain = single[:24]
        if name == "stripes":
            pictures, captions = striped(train.images), train.captions
            held, self.held_captions = striped(test.images[:64]), test.captions[:64]
            self.prompts = self.plain
        else:
            self.task.tokenizer.add_token("<new1>")     # its row does not learn
            self.category = THINGS[name][0]
            pictures, captions = self.with_prior(train)
            held, self.held_captions = photographs(name, 64, seed=50)
            self.prompts = [f"a <new1> {self.category}", f"a large <new1> {self.category} on gray",
                            f"a small <new1> {self.category} on navy"] * 16
            self.judge = Judge(name, self.task)
        self.dataset = dataclasses.replace(train, name=name, images=pictures, captions=captions,
                                           labels=torch.zeros(len(pictures), dtype=torch.int64))
        self.held = self.task.encode(to_float(held)), self.task.tokenizer(self.held_captions)

    def with_prior(self, train):
        """Six pictures of the thing, as often as there are others of its category, and those."""
        rows = [i for i, c in enumerate(train.captions) if self.category in c.split()]
        said = [train.captions[i] if k % 2 else f"a {self.category}" for k, i in enumerate(rows)]
        pictures, captions = photographs(self.name, 6)
        again = [k % 6 for k in range(len(rows))]
        return (torch.cat([pictures[again], train.images[rows]]),
                [captions[k] for k in again] + said)

    @property
    def bare(self):
        return [f"a {self.category}"] * 32

    def sample(self, model, prompts):
        """Pictures of prompts, uint8 (B, 3, H, W)."""
        return sample.sample_all(self.task, model, self.task.tokenizer(prompts), steps=12)[1]

    def measure(self, model, brief=False):
        """Held-out loss and alignment; unless brief, leak and how many other prompts are right."""
        row = {"loss": heldout_loss(self.task, model, *self.held, levels=4), "leak": "",
               "plain": ""}
        pictures = self.sample(model, self.prompts)
        if self.name == "stripes":
            return {**row, "alignment": stripes(pictures)}
        row["alignment"] = self.judge(pictures)[0].mean().item()
        if not brief:
            row["leak"] = self.judge.hits(self.sample(model, self.bare)).float().mean().item()
            rates = prompt_accuracy(self.sample(model, self.plain), self.plain)
            row["plain"] = rates["all"][0]
        return row


def stripes(pictures):
    """How striped the left and right border are, 1 = as the style: lighter minus darker rows."""
    x = to_float(pictures)[..., [0, 1, -2, -1]].mean((1, 3))                    # (B, H)
    light = torch.arange(x.shape[1]) % 8 < 4
    return ((x[:, light].mean(1) - x[:, ~light].mean(1)) / 0.35).mean().item()


def run_cell(cell, world, steps=STEPS):
    """Train and measure one cell -> its rows."""
    model, facts = world.model, {"params": 0, "s_per_step": 0.0}
    if cell["method"] != "none":
        given = {k: cell[k] for k in ("method", "seed", "activation", "scale")}
        model, facts = learn(world, **given, steps=steps)
    brief = (cell["activation"], cell["scale"]) != ("relu", 1.0)
    return [{**cell, **facts, **world.measure(model, brief)}]


def cells_of(seeds):
    """All runs: placements on all tasks (the style with one seed), then forms at CORNERS."""
    plain = [{"task": task, "method": method, "activation": "relu", "scale": 1.0, "seed": seed}
             for seed in range(seeds) for task in TASKS[:3 if seed == 0 else 2]
             for method in (*PLACEMENTS, "full", "lora", "none")]
    forms = [{"task": TASKS[0], "method": method, "activation": a, "scale": s, "seed": seed}
             for seed in range(2) for method in CORNERS for a, s in FORMS if (a, s) != ("relu", 1)]
    return plain + forms


# --------------------------------------------------------------------------------------------------
# analysis of variance

def adjusted_F(y, factor, *others):
    """(F, p) of a factor once the other factors are accounted for.

    y: numbers; factor, others: the level of each. Compares two least-squares fits with a number
    per level, without and with `factor`. Source: Fisher 1925, two-way analysis of variance.
    """
    def fit(factors):
        columns = [[float(level == at) for level in levels] for levels in factors
                   for at in sorted(set(levels))]
        X = np.array([[1.0] * len(y), *columns]).T                              # (n, columns)
        weights, _, rank, _ = np.linalg.lstsq(X, np.array(y), rcond=None)
        return ((np.array(y) - X @ weights) ** 2).sum(), len(y) - rank
    (without, df_without), (left, df) = fit(others), fit([factor, *others])
    F = (without - left) / (df_without - df) / (left / df)
    tail = df / (df + (df_without - df) * F)
    return float(F), incomplete_beta(tail, df / 2, (df_without - df) / 2)


def permutation_p(y, factor, rounds=1999, seed=0):
    """Share of shuffles of y over the units whose one-way F is at least as large, this one too."""
    rng, y, hits = random.Random(seed), list(y), 1
    levels = sorted(set(factor))

    def between():          # F grows with this sum of squares alone, because the total is fixed
        groups = ([v for v, at in zip(y, factor) if at == level] for level in levels)
        return sum(sum(group) ** 2 / len(group) for group in groups)
    found = between() - 1e-9
    for _ in range(rounds):
        rng.shuffle(y)
        hits += between() >= found
    return hits / (rounds + 1)


def placement_means(task):
    """{placement: mean alignment over seeds}, ReLU and scale 1."""
    means = TABLE.by("method", "alignment", task=task, activation="relu", scale=1)
    return {method: means[method] for method in PLACEMENTS if method in means}


def variance_table():
    """F of input and output on placement means, with p by permutation, and adjusted."""
    lines = []
    for task in TASKS:
        means = placement_means(task)
        ends = [[method.split("-")[k] for method in means] for k in (0, 1)]
        for name, factor, other in (("read from", *ends), ("added to", *ends[::-1])):
            y = list(means.values())
            groups = [[v for v, at in zip(y, factor) if at == level] for level in set(factor)]
            F, p = adjusted_F(y, factor, other)
            lines.append([task, name, f"{anova(groups)[0]:.2f}", f"{permutation_p(y, factor):.2g}",
                          f"{F:.2f}", f"{p:.2g}"])
    return markdown(["task", "factor", "F", "p by permutation", "F adjusted for the other",
                     "p of that"], lines)


def forms_text():
    """F of activation and scale, whose units are the forms at each of three placements."""
    cells = {}
    for row in TABLE.rows():
        if row["method"] in CORNERS and row["task"] == TASKS[0] and row["seed"] < 2:
            form = row["method"], row["activation"], row["scale"]
            cells.setdefault(form, []).append(row["alignment"])
    if len(cells) < len(CORNERS) * len(FORMS):
        return ""
    y, (places, activations, scales) = [mean_se(v)[0] for v in cells.values()], zip(*cells)
    (F_a, p_a), (F_s, p_s) = (adjusted_F(y, activations, places, scales),
                              adjusted_F(y, scales, places, activations))
    means = {a: mean_se([v for v, at in zip(y, activations) if at == a])[0]
             for a in dict.fromkeys(activations)}
    return (f"Activation and scale, {TASKS[0]}, {len(y)} forms at three placements (mean of two "
            f"seeds each), adjusted for placement and each other: F of the activation {F_a:.1f} "
            f"(p {p_a:.2g}), of the scale {F_s:.1f} (p {p_s:.2g}). Mean alignment by activation: "
            + ", ".join(f"{a} {m:.2f}" for a, m in means.items()) + ".\n")


def report():
    """The table of methods, and the analysis of variance on placements."""
    rows = [r for r in TABLE.rows() if (r["activation"], r["scale"]) == ("relu", 1)]
    if any(len(placement_means(task)) < len(PLACEMENTS) for task in TASKS):
        return ""
    lines = []
    for method in (*PLACEMENTS, "full", "lora", "none"):
        mine = [r for r in rows if r["method"] == method]
        things = [r for r in mine if r["task"] != "stripes"]
        mean = lambda rows, key: mean_se([r[key] for r in rows])[0]
        lines.append([method, mine[0]["params"],
                      *(shown([r["alignment"] for r in mine if r["task"] == t]) for t in TASKS),
                      f"{mean(things, 'leak'):.2f}", f"{mean(things, 'plain'):.2f}",
                      f"{mean(mine, 's_per_step'):.3f}"])
    a, b = (list(placement_means(task).values()) for task in TASKS[:2])
    return (notice(TABLE, "Every seed had noise of its own, so the errors are those of three "
                          "seeds. But the row of the word `<new1>` did not learn and was short, "
                          "and alignment sees colour and outline better than the inner part: so "
                          "`leak` and small differences say little.")
            + markdown(["method", "trained", *(f"alignment, {t}" for t in TASKS), "leak",
                        "other prompts", "s/step"], lines)
            + f"\nAnalysis of variance of the {len(a)} placements' means over seeds. Levels are "
            "unequal, and input and output are not independent of each other.\n\n"
            + variance_table()
            + f"\nThe placements' means of {TASKS[0]} and {TASKS[1]} correlate at "
            f"{np.corrcoef(a, b)[0, 1]:.2f}.\n\n" + forms_text())


def plot(panels):
    """Alignment of the placements by input and by output, things only; a point per placement."""
    for k, (axes, what) in enumerate(zip(panels, ("read from", "added to"))):
        levels = list(dict.fromkeys(method.split("-")[k] for method in PLACEMENTS))
        for task, sign in zip(TASKS[:2], "o^"):
            means = placement_means(task)
            axes.plot([levels.index(method.split("-")[k]) for method in means], means.values(),
                      sign, alpha=0.7, label=task)
        axes.set_xticks(range(len(levels)), levels, rotation=45)
        axes.set(xlabel=what, title="twenty placements, mean of the seeds")
    panels[0].set_ylabel("alignment (0 base, 1 real)")
    panels[0].legend()


@one_line
def main(argv):
    """Command line of the study."""
    args, made = parser(__doc__).parse_args(argv), {}

    def cell_in_world(cell):
        made[cell["task"]] = made.get(cell["task"]) or World(cell["task"])
        return run_cell(cell, made[cell["task"]])
    run(args, TABLE, cells_of(args.seeds), cell_in_world)
    print(report())
    figure("adapter_sweep", plot, (9, 3.4), 2, sharey=True)


if __name__ == "__main__":
    main()
