"""Where should an adapter stand? All twenty placements, then activation and scale, on a budget of 0.75 % of the U-Net.

The claim (Xiang et al. 2023): what an adapter reads matters most (largest F), best is the output of cross-attention;
activation and scale hardly matter.  Here the base is assets/unet-scenes.pt; the tasks are two things (things.py) with
prior preservation, as in DreamBooth, and one style, striped backgrounds. Every run: 100 steps, 8 pictures and 8 of the
prior, AdamW at 5e-3. Also full fine-tuning (5e-4), LoRA on K and V with the same budget, and no training at all.
Residual placements get the nearest budget that a whole rank allows; real counts stand in the CSV.
About 13 CPU-seconds a cell on one thread: 161 cells (the style with one seed); and 90 forms, 10 each.

    python -m studies.adapter_sweep                 # -> studies/results/adapter_sweep.{csv,md,png}
"""
import copy
import itertools
import time

import torch

import data
import sample
from adapters import PLACEMENTS, adapter_parameters, add_adapters, add_lora, anova
from data import to_float
from evaluate import prompt_accuracy
from studies.common import Table, figure, heldout_loss, mean_se, parser, todo, write_markdown
from studies.things import THINGS, Judge, photographs, striped

BASE, STEPS, BUDGET = "assets/unet-scenes.pt", 100, 0.0075
TASKS = ("target circle", "gem cross", "stripes")
FORMS = tuple(itertools.product(("relu", "sigmoid", "silu", "identity"), (0.5, 1.0, 2.0, 4.0)))
CORNERS = ("ca_c-ca_c", "sa_out-trans_out", "ffn_in-trans_out")      # best, middle and worst of the first sweep


def cells_of(seeds):
    """Every run: placements on all tasks, baselines, then activation and scale at three placements."""
    plain = [{"task": t, "method": m, "activation": "relu", "scale": 1.0, "seed": s} for s in range(seeds)
             for t in TASKS[:3 if s == 0 else 2] for m in (*PLACEMENTS, "full", "lora", "none")]
    forms = [{"task": TASKS[0], "method": m, "activation": a, "scale": s, "seed": seed} for seed in range(2)
             for m in CORNERS for a, s in FORMS if (a, s) != ("relu", 1.0)]
    return plain + forms


class World:
    """The base, the pictures of a task and its prior, encoded, and what its prompts are."""

    def __init__(self, name):
        self.name, (self.task, self.model) = name, sample.load(BASE)
        train, test = (data.load("scenes", split=s, count=400, seed=7) for s in ("train", "test"))
        one = [i for i, c in enumerate(test.captions) if "relation" not in data.parse_caption(c)][:24]
        self.plain = [test.captions[i] for i in one]
        if name == "stripes":
            self.x, self.captions = striped(train.images), train.captions
            held_x, held_captions, self.prompts = striped(test.images[:64]), test.captions[:64], self.plain
            self.prior = None
        else:
            self.task.tokenizer.add_token("<new1>")             # a reserved row, fixed: adapters leave words alone
            self.x, self.captions = photographs(name, 6)
            held_x, held_captions = photographs(name, 64, seed=50)
            category = THINGS[name][0]
            self.prompts = [f"a <new1> {category}", f"a large <new1> {category} on gray",
                            f"a small <new1> {category} on navy"] * 16
            rows = [i for i, c in enumerate(train.captions) if category in c.split()]
            said = [train.captions[i] if k % 2 else f"a {category}" for k, i in enumerate(rows)]
            self.prior = self.encode(train.images[rows]), self.task.tokenizer(said)
            self.judge = Judge(name, self.task, self.draw(self.model, [f"a {category}"] * 32))
        self.z, self.ids = self.encode(self.x), self.task.tokenizer(self.captions)
        self.held = self.encode(held_x), self.task.tokenizer(held_captions)

    def encode(self, pictures):
        return self.task.encode(to_float(pictures))

    def draw(self, model, prompts):
        return sample.draw_all(self.task, model, self.task.tokenizer(prompts), seed=0, steps=12)[1]

    def batch(self, generator):
        """8 pictures and 8 of the prior (16 of a style) -> latents (16, ...), ids (16, L)."""
        pick = lambda z, ids, n: (lambda rows: (z[rows], ids[rows]))(torch.randint(len(z), (n,), generator=generator))
        if self.prior is None:
            return pick(self.z, self.ids, 16)
        return tuple(torch.cat(pair) for pair in zip(pick(self.z, self.ids, 8), pick(*self.prior, 8)))

    def measure(self, model, brief):
        """Held-out loss, alignment of the task's prompts; and, unless brief, leak into the category, other prompts."""
        loss = heldout_loss(self.task, model, *self.held, levels=4)
        if brief:
            alignment = self.judge(self.draw(model, self.prompts)).mean().item()
            return {"loss": loss, "alignment": alignment, "leak": "", "plain": ""}
        plain = self.draw(model, self.plain)
        if self.name == "stripes":
            return {"loss": loss, "alignment": stripes(plain), "leak": "", "plain": ""}
        category = self.draw(model, [f"a {THINGS[self.name][0]}"] * 32)
        return {"loss": loss, "alignment": self.judge(self.draw(model, self.prompts)).mean().item(),
                "leak": self.judge.hits(category), "plain": prompt_accuracy(plain, self.plain)["all"][0]}


def stripes(pictures):
    """How striped the left and right border are, 1 = as the style: lighter rows minus darker ones, over 0.35."""
    x = to_float(pictures)[..., [0, 1, -2, -1]].mean((1, 3))                                 # (B, H)
    light = torch.arange(x.shape[1]) % 8 < 4
    return ((x[:, light].mean(1) - x[:, ~light].mean(1)) / 0.35).mean().item()


def prepare(model, cell, budget):
    """Make ready what the cell trains -> (parameters, learning rate)."""
    if cell["method"] == "full":
        return list(model.unet.requires_grad_(True).parameters()), 5e-4
    if cell["method"] == "lora":
        return add_lora(model.unet, budget=budget), 5e-3
    read, _, add = cell["method"].partition("-")
    add_adapters(model.unet, read, add, budget=budget, activation=cell["activation"], scale=cell["scale"])
    return adapter_parameters(model.unet), 5e-3


def run_cell(cell, world):
    """Train and measure one cell -> its row."""
    model, seconds, count = copy.deepcopy(world.model), 0.0, 0
    if cell["method"] != "none":
        torch.manual_seed(cell["seed"])
        budget = BUDGET * sum(p.numel() for p in model.unet.parameters())
        parameters, lr = prepare(model, cell, budget)
        count, opt = sum(p.numel() for p in parameters), torch.optim.AdamW(parameters, lr=lr, fused=True)
        generator, start = torch.Generator().manual_seed(cell["seed"]), time.process_time()
        for _ in range(STEPS):
            x0, ids = world.batch(generator)
            draws = world.task.process.draw(x0.shape, generator)
            world.task.process.loss(model, x0, model.text(ids), **draws)[0].backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            opt.step()
            opt.zero_grad()
        seconds = (time.process_time() - start) / STEPS
    brief = (cell["activation"], cell["scale"]) != ("relu", 1.0)
    return {**cell, "params": count, "s_per_step": seconds, **world.measure(model.eval().requires_grad_(False), brief)}


def factor(rows, of):
    """Observations grouped by a factor's level, and F and p of their one-way analysis of variance on alignment."""
    groups = {}
    for row in rows:
        groups.setdefault(of(row), []).append(row["alignment"])
    return groups, anova(list(groups.values()))


def centred(rows):
    """The same rows with the mean of their placement subtracted: what is left to explain within placements."""
    means = {m: mean_se([r["alignment"] for r in rows if r["method"] == m])[0] for m in {r["method"] for r in rows}}
    return [{**r, "alignment": r["alignment"] - means[r["method"]]} for r in rows]


def summarise(table):
    """Table of placements, F and p of the four factors, box plots of the positions."""
    rows = table.rows()
    first = [r for r in rows if r["method"] in PLACEMENTS and (r["activation"], r["scale"]) == ("relu", 1.0)]
    forms = [r for r in rows if r["method"] in CORNERS and r["task"] == TASKS[0] and r["seed"] < 2]
    lines = []
    for method in (*PLACEMENTS, "full", "lora", "none"):
        mine = [r for r in rows if r["method"] == method and (r["activation"], r["scale"]) == ("relu", 1.0)]
        show = lambda key, task: "{:.2f} ± {:.2f}".format(
            *mean_se([r[key] for r in mine if r["task"] == task])).removesuffix(" ± nan")
        if {r["task"] for r in mine} == set(TASKS):
            things = [r for r in mine if r["task"] != "stripes"]
            lines.append([method, int(mine[0]["params"]), *(show("alignment", t) for t in TASKS),
                          *("{:.2f}".format(mean_se([r[key] for r in things])[0]) for key in ("leak", "plain")),
                          "{:.3f}".format(mean_se([r["s_per_step"] for r in mine])[0])])
    notes = []
    for t in TASKS:
        part = [r for r in first if r["task"] == t]
        if len({r["method"] for r in part}) == len(PLACEMENTS):
            (_, (f_in, p_in)), (_, (f_out, p_out)) = (factor(part, lambda r, k=k: r["method"].split("-")[k])
                                                      for k in (0, 1))
            notes.append(f"{t}: F of the input {f_in:.2f} (p {p_in:.2g}), of the output {f_out:.2f} (p {p_out:.2g}).")
    if len(forms) == 2 * len(CORNERS) * len(FORMS):
        (groups, (f_a, p_a)), (_, (f_s, p_s)) = (factor(centred(forms), lambda r, k=k: r[k])
                                                 for k in ("activation", "scale"))
        worst = min(groups, key=lambda name: mean_se(groups[name])[0])
        notes.append(f"{TASKS[0]}, within three placements: F of the activation {f_a:.2f} (p {p_a:.2g}; {worst} is "
                     f"lowest), of the scale {f_s:.2f} (p {p_s:.2g}).")
    notes.append("Levels are unequal (4 placements read sa_in, 1 reads ffn_out), and input and output hang together: "
                 "take F as a description. `python -m studies.adapter_sweep`")
    write_markdown("adapter_sweep", ["method", "trained", *(f"alignment, {t}" for t in TASKS), "leak", "other prompts",
                                     "s/step"], lines, "\n".join(notes))
    things = [r for r in first if r["task"] != "stripes"]
    figure("adapter_sweep", lambda panels: draw(things, panels), (9, 3.4), 2, sharey=True)


def draw(rows, panels):
    """Box plots of alignment by input and by output, things only."""
    for k, (axes, what) in enumerate(zip(panels, ("read from", "added to"))):
        groups = {}
        for r in rows:
            groups.setdefault(r["method"].split("-")[k], []).append(r["alignment"])
        axes.boxplot(list(groups.values()), tick_labels=list(groups))
        axes.tick_params(axis="x", rotation=45)
        axes.set(xlabel=what, title=f"{len(rows)} runs, two things")
    panels[0].set_ylabel("alignment (0 base, 1 real)")


def main():
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    table, worlds = Table("adapter_sweep", ["task", "method", "activation", "scale", "seed"]), {}
    for cell in [] if args.summary else todo(cells_of(args.seeds), table, args.part):
        name = cell["task"]
        worlds[name] = worlds.get(name) or World(name)
        table.add(run_cell(cell, worlds[name]))
    summarise(table)


if __name__ == "__main__":
    main()
