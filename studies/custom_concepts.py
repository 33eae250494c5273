"""Custom Diffusion on things that can be measured exactly: what learns, what leaks, what merges.

The claims (Kumari et al. 2022, tables 1, 2 and 4, figure 10): training keys and values with a new
word comes near to training all weights, beats the word alone, and forgets less; without the prior
the category turns into the thing; concepts learned apart merge by the closed form better than by
averaging.  Here six things (things.py) on assets/unet-scenes.pt, 250 steps of 8 + 8 pictures; five
have a centre, and one is cut in two halves (hard). Columns:
  alignment  contrast of the part (things.py): 0 no part, 1 real pictures
  body, hits likeness of the body's colour; share of pictures with part > 0.5 and body > 0.6
  text       share of pictures with size and background as asked
  leak       share of the bare category's pictures that look like the thing, less the base's share
  category   48 held-out captions of its category: share with all attributes right
  kid        classifier-KID (x 1000) of these pictures to real ones, less that of the base
  plain      48 held-out captions of any category: share with all attributes right
  both       share of pictures of a pair that show each thing in its half
Then, from the files that this leaves behind: how far each kind of layer moved when all weights
learned, and what a compressed change still samples. The settings of the second merge were chosen on
one pair with seed 0. About 35 CPU-seconds a cell on one thread; 126 single cells and 54 pairs.

    python -m studies.custom_concepts       # -> results/custom_*.csv, a figure
"""
import copy
import json
import pathlib
import re

import torch
from PIL import Image

import custom_diffusion
import data
import sample
import worlds
from cli import one_line
from custom_diffusion import ConceptTask, gather, load_concept, save_concept
from evaluate import features, kernel_distance, prompt_accuracy, read_shapes, train_classifier
from models import base_task
from studies.common import (Table, compared, figure, markdown, mean_se, notice, parser, run,
                            shown)
from studies.things import THINGS, Judge, photographs
from train import load_data, make_step

BASE, OUT = "assets/unet-scenes.pt", pathlib.Path("out/studies/concepts")
METHODS = {"K/V and word": [], "word alone": ["--part", "none", "--word-lr", "3e-2"],
           "all weights": ["--part", "all", "--lr", "5e-4"], "no prior": ["--prior", "none"],
           "generated prior": ["--prior", "generated"], "no augmentation": ["--no-augment"],
           "word not optimised": ["--word-lr", "0"]}
MAIN = ("K/V and word", "word alone", "all weights")            # the rest are ablations
PAIRS = (("hub ring", "gem cross"), ("target circle", "pearl star"), ("eye square", "hub ring"))
COMBINE = ("joint", "merge", "merge with padding", "average", "sum", "sequential")
RATIOS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)                        # of the sum of singular values
SINGLE = Table("custom_concepts", ["thing", "method", "seed"])
PAIR = Table("custom_pairs", ["pair", "how", "seed"])
SMALL = Table("custom_compression", ["thing", "ratio"])
MOVED = Table("custom_change", ["thing", "seed"])


def average(Ws):
    """{name: mean of W_n}: the simplest way to put concepts together."""
    return {name: sum(W[name] for W in Ws) / len(Ws) for name in Ws[0]}


def add_changes(W0, Ws):
    """{name: W0 + sum of (W_n - W0)}. Source: task arithmetic, Ilharco et al. 2022, Eq. 2."""
    return {name: W0[name] + sum(W[name] - W0[name] for W in Ws) for name in Ws[0]}


def weight_change(W0, W):
    """How far each tensor of a state_dict moved, ||W - W0|| / ||W0||, but for those that were 0
    -> ({name: change}, {kind of layer: mean}). Source: Custom Diffusion §3.1 and figure 3."""
    change = {name: ((W[name].double() - w.double()).norm() / w.double().norm()).item()
              for name, w in W0.items() if w.is_floating_point() and w.any()}
    kinds = {}
    for name, value in change.items():
        kind = re.search(r"\.attn([12])\.|$", name)[1]
        kinds.setdefault({"1": "self-attention", "2": "cross-attention"}.get(kind, "other"),
                         []).append(value)
    return change, {kind: sum(values) / len(values) for kind, values in kinds.items()}


def folder_of(name):
    """Six photographs of a thing as files, with captions of its category -> folder:PATH."""
    folder = OUT / name
    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pictures, captions = photographs(name, 6)
        for k, picture in enumerate(pictures):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{k}.png")
        rows = [{"file_name": f"{k}.png", "text": caption.replace("<new1> ", "")}
                for k, caption in enumerate(captions)]
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "metadata.jsonl").write_text("".join(lines))
    return f"folder:{folder}"


def learn(names, path, flags, seed, before=None):
    """Train on the things `names`, as custom_diffusion.py learn does -> the concept, in `path`.

    A file that is there already is kept, whatever its flags were: delete OUT to begin anew. before:
    what load_concept gave for a concept to start from; the result then holds both.
    """
    if path.is_file():
        return
    given = ["--base", BASE, "--concept", *map(folder_of, names), "--category",
             *(THINGS[name][0] for name in names), *flags, "--seed", str(seed), "--device", "cpu"]
    options, config = custom_diffusion.read_flags(given)
    dataset, base = load_data(config), base_task(BASE, options.bpe)
    original = copy.deepcopy(base.model.denoiser.state_dict())
    if before:                              # the first thing's word becomes a row like any other
        W, rows, _ = before
        base.model.denoiser.load_state_dict({**original, **W})
        table = base.model.text.text_model.embeddings.token_embedding.weight
        for word, row in rows.items():
            table.data[base.tokenizer.add_token(word)] = row
    task = ConceptTask(base, dataset, options, config)
    step = make_step(config, dataset, task)
    for s in range(config.steps):
        step(s)
    folder = path.with_suffix(".run")           # of this cell alone: two processes may run
    folder.mkdir(parents=True, exist_ok=True)
    config.out = str(folder)
    task.finish(step.ema, dataset, "cpu")
    made = folder / "concept.pt"
    if before:
        W, rows, things = load_concept(made, task.W0)
        save_concept(made, W, {**before[1], **rows}, before[2] + things, original)
    made.rename(path)
    folder.rmdir()


def split(pictures):
    """Left and right half of pictures (B, 3, H, W), each filled up with the background."""
    border = torch.cat([pictures[:, :, 0], pictures[:, :, -1]], -1)                     # (B, 3, 2W)
    ground = border.median(-1).values[..., None, None]                              # (B, 3, 1, 1)
    left = torch.arange(pictures.shape[-1]) < pictures.shape[-1] // 2
    return torch.where(left, pictures, ground), torch.where(left, ground, pictures)


class Bench:
    """The base, what it samples of every category, and how much of that passes for the thing."""

    def __init__(self):
        self.task = sample.load(BASE)[0]
        self.eye, _ = train_classifier(data.load("scenes", count=20_000), steps=300)
        test = data.load("scenes", split="test", count=2000)
        single = [i for i, caption in enumerate(test.captions)
                  if "relation" not in worlds.parse_caption(caption)]
        self.plain = [test.captions[i] for i in single[:48]]
        mine = {name: [i for i in single if f" {THINGS[name][0]}" in test.captions[i]]
                for name in THINGS}
        self.own = {name: [test.captions[i] for i in rows[:48]] for name, rows in mine.items()}
        self.real = {name: features(self.eye, test.images[rows]) for name, rows in mine.items()}
        bare = {name: self.sample(self.task, [f"a {THINGS[name][0]}"] * 32) for name in THINGS}
        self.judges = {name: Judge(name, self.task) for name in THINGS}
        self.base_leak = {name: self.judges[name].hits(pictures).float().mean().item()
                          for name, pictures in bare.items()}
        self.base_kid = {name: self.kid(self.sample(self.task, self.own[name]), name)
                         for name in THINGS}

    def sample(self, task, prompts):
        """A picture of each prompt, (B, 3, 32, 32) uint8, from the same noise in every cell."""
        return sample.sample_all(task, task.model, task.tokenizer(prompts), seed=0, steps=16)[1]

    def kid(self, pictures, name):
        return 1000 * kernel_distance(features(self.eye, pictures), self.real[name])

    def measure(self, path, names):
        """The columns of a concept file with the things `names`."""
        task = sample.load(BASE)[0]
        sample.add_concept(str(path), task)
        rows = [self.measure_thing(task, name, f"<new{k}>") for k, name in enumerate(names, 1)]
        row = {key: sum(r[key] for r in rows) / len(rows) for key in rows[0]}
        if len(names) == 2:
            one, two = (f"a <new{k}> {THINGS[name][0]}" for k, name in enumerate(names, 1))
            halves = split(self.sample(task, [f"{one} left of {two}"] * 32))
            seen = [self.judges[name].hits(half) for name, half in zip(names, halves)]
            row["both"] = (seen[0] & seen[1]).float().mean().item()
        plain = prompt_accuracy(self.sample(task, self.plain), self.plain)["all"][0]
        return {**row, "plain": plain}

    def measure_thing(self, task, name, word):
        """The columns of one thing."""
        category, judge = THINGS[name][0], self.judges[name]
        asked = [f"a {word} {category}", f"a large {word} {category} on gray",
                 f"a small {word} {category} on navy"]
        pictures = [self.sample(task, [prompt] * 16) for prompt in asked]
        wanted = [(worlds.SIZES.index(size), list(worlds.BACKGROUNDS).index(ground))
                  for size, ground in (("large", "gray"), ("small", "navy"))]
        right = [(read["size"][:, 0] == size) & (read["background"] == ground)
                 for read, (size, ground) in zip(map(read_shapes, pictures[1:]), wanted)]
        leak = judge.hits(self.sample(task, [f"a {category}"] * 32)).float().mean().item()
        own = self.sample(task, self.own[name])
        part, body = judge(torch.cat(pictures))
        hits = judge.hits(torch.cat(pictures)).float().mean().item()
        return {"alignment": part.mean().item(), "body": body.mean().item(), "hits": hits,
                "text": torch.cat(right).float().mean().item(),
                "leak": leak - self.base_leak[name],
                "category": prompt_accuracy(own, self.own[name])["all"][0],
                "kid": self.kid(own, name) - self.base_kid[name]}


def combine(pair, how, seed, path):
    """One concept file for two things that were learned apart (or together, or in turn)."""
    own = [OUT / f"{name}-K V and word-{seed}.pt" for name in pair]
    for name, file in zip(pair, own):
        learn([name], file, [], seed)
    unet = base_task(BASE, "").model.denoiser.state_dict()
    if how == "joint":
        learn(pair, path, ["--batch-size", "32"], seed)         # as many pictures of each as apart
    elif how == "sequential":
        learn(pair[1:], path, [], seed, before=load_concept(own[0], unet))
    elif how.startswith("merge"):           # the U-Net also reads the padding after a short caption
        padding = ["--padding", "--ridge", "10", "--tolerance", "0.3"]
        path.unlink(missing_ok=True)                            # of a cell that was stopped
        custom_diffusion.main(["merge", *map(str, own), "--base", BASE, "--out", str(path),
                               *(padding if how.endswith("padding") else ["--ridge", "0.1"])])
    else:
        Ws, rows, concepts = gather(own, unet)
        W = average(Ws) if how == "average" else add_changes(unet, Ws)
        save_concept(path, W, rows, sum(concepts, []), unet)


def run_cell(cell, bench):
    """One row of the table of single things, of pairs, or of compression."""
    path = OUT / ("-".join(map(str, cell.values())).replace("/", " ") + ".pt")
    if "ratio" in cell:
        unet = bench.task.model.denoiser.state_dict()
        W, rows, concepts = load_concept(OUT / f"{cell['thing']}-K V and word-0.pt", unet)
        small = custom_diffusion.compress(W, unet, cell["ratio"])
        save_concept(path, {**W, **small}, rows, concepts, unet)
        return {**cell, "kb": path.stat().st_size / 1e3, **bench.measure(path, [cell["thing"]])}
    if "how" in cell:
        pair = tuple(cell["pair"].split(" + "))
        combine(pair, cell["how"], cell["seed"], path)
        return {**cell, **bench.measure(path, pair)}
    learn([cell["thing"]], path, METHODS[cell["method"]], cell["seed"])
    return {**cell, **bench.measure(path, [cell["thing"]])}


def comparison(table, unit, key, baseline, columns):
    """A table of methods, units' means ± standard error over units, and the gaps to a baseline."""
    names = list(dict.fromkeys(table.column(key)))
    by = lambda name, column: table.by(unit, column, **{key: name})
    rows = [[name, *(shown(by(name, column).values()) for column in columns)] for name in names]
    gaps = [[name, *(compared(by(name, column), by(baseline, column), 2) for column in columns)]
            for name in names if name != baseline]
    units = len(by(baseline, columns[0]))
    return (markdown([key, *columns], rows) + f"\nMinus {baseline}, paired ({units} units):\n\n"
            + markdown([key, *columns], gaps))


def report():
    """Tables of single things, of pairs, of compressed changes, of how far layers move."""
    if not all(table.rows() for table in (SINGLE, PAIR, SMALL, MOVED)):
        return ""
    text = notice(SINGLE) + notice(SINGLE, (
        "Their alignment saw colour and outline and hardly the inner part: real pictures of "
        "the thing without its part passed as hits. So `alignment`, `leak` and `both` measure "
        "whether colour and outline arrived. A new run measures the part by itself."))
    text += "**One thing**; units are things, each the mean of its seeds\n\n" + comparison(
        SINGLE, "thing", "method", "K/V and word",
        ["alignment", "text", "leak", "category", "kid", "plain"])
    text += "\n**Two things**; units are pairs\n\n" + comparison(
        PAIR, "pair", "how", "average", ["alignment", "text", "leak", "both", "plain"])
    columns, ratios = ("kb", "alignment", "text", "leak"), sorted(set(SMALL.column("ratio")))
    lines = [[ratio, *(shown(SMALL.column(column, ratio=ratio)) for column in columns)]
             for ratio in ratios[::-1]]
    text += (f"\n**Compressed**; {len(set(SMALL.column('thing')))} things, one seed. Kept: the "
             "share of the sum of singular values of the change of keys and values\n\n"
             + markdown(["kept", "kB", "alignment", "text", "leak"], lines))
    kinds = ("cross-attention", "self-attention", "other")
    moved = (f"{kind} {shown(MOVED.by('thing', kind).values(), 4)}" for kind in kinds)
    return text + ("\n**How far weights move** when all learn, ||W - W0|| / ||W0||; units are "
                   "things: " + ", ".join(moved) + ".\n")


def measure_moves():
    """How far each kind of layer moved, of every file of all weights that is there."""
    unet = base_task(BASE, "").model.denoiser.state_dict()
    for path in sorted(OUT.glob("*-all weights-*.pt")):
        thing, _, seed = path.stem.split("-")
        if {"thing": thing, "seed": seed} not in MOVED:
            _, kinds = weight_change(unet, {**unet, **load_concept(path, unet)[0]})
            MOVED.add({"thing": thing, "seed": seed, **kinds})


def plot(panels):
    """The paper's figure 8: image against text alignment, with standard errors, per method."""
    for axes, table, key in zip(panels, (SINGLE, PAIR), ("method", "how")):
        for name in dict.fromkeys(table.column(key)):
            (x, dx), (y, dy) = (mean_se(table.column(column, **{key: name}))
                                for column in ("text", "alignment"))
            axes.errorbar(x, y, dy, dx, fmt="o", capsize=2, label=name)
        axes.set(xlabel="text alignment (size and background as asked)",
                 title="one thing" if table is SINGLE else "two things")
        axes.legend(fontsize=8)
    panels[0].set_ylabel("image alignment (0 base, 1 real)")


def cells_of(seeds):
    """[(table, its cells)] in the order of work: stopped early, whole comparisons are there."""
    single = lambda methods, seed: [{"thing": thing, "method": method, "seed": seed}
                                    for method in methods for thing in THINGS]
    plan = []
    for s in range(seeds):
        couples = [{"pair": " + ".join(p), "how": h, "seed": s} for p in PAIRS for h in COMBINE]
        plan += [(SINGLE, single(MAIN, s)), (PAIR, couples)]
    plan += [(SINGLE, single([m for m in METHODS if m not in MAIN], s)) for s in range(seeds)]
    return plan + [(SMALL, [{"thing": t, "ratio": r} for t in list(THINGS)[:3] for r in RATIOS])]


@one_line
def main(argv):
    """Command line of the study."""
    args, made = parser(__doc__).parse_args(argv), []

    def with_bench(cell):
        made.append(made[0] if made else Bench())
        return [run_cell(cell, made[0])]
    OUT.mkdir(parents=True, exist_ok=True)
    for table, cells in cells_of(args.seeds):
        run(args, table, cells, with_bench)
    if not args.summary:
        measure_moves()
    print(report())
    figure("custom_concepts", plot, (9, 4), 2, sharey=True)


if __name__ == "__main__":
    main()
