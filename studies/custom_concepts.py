"""Custom Diffusion on things that can be measured exactly: what learns, what leaks, what it costs

Claims (Kumari et al. 2022, tables 1 and 4, figure 10): training keys and values with a new word
comes near to training all weights and beats the word alone; the prior keeps the meaning of the
category; a change can be compressed. Here: twelve things (things.py), 10 pictures each, on
assets/unet-scenes.pt, 500 steps of 8 + 8 pictures without shrinking or enlarging, 16 Euler steps.
The learning rates of each method are, of the four that are tried, those with the most part minus
leak on two other things. "no prior" sees as many pictures of the thing as the others. "augmented"
shrinks and enlarges; the words for it, which the paper adds to captions, are not in this
vocabulary. One more thing, cut in two colours, is outside of what the base can draw. Six things
have three seeds, the others one or two. Columns:
  part       contrast of the part (things.py), 48 pictures: 0 no part, 1 real pictures
  body, hits likeness of the body's colour; share of pictures with part > 0.5 and body > 0.6
  text       share of pictures with size and background as asked
  leak       share of 48 pictures of the bare category that are hits, less the base's share
  category   48 held-out captions of its category: share with all attributes right
  kid        classifier-KID (x 1000) of these pictures to real ones, less that of the base
  plain      48 held-out captions of any category: share with all attributes right
Then, from the files that this leaves behind: what a compressed change still samples, how far each
kind of layer moved when all weights learned, and what the exact reader says of the hits, which are
judged by one axis of colour inside the thing's outline. About 80 CPU-seconds a cell.

    python -m studies.custom_concepts       # -> results/custom_*.csv, a figure
"""
import json
import math
import pathlib
import re
import statistics

import torch
from PIL import Image

import custom_diffusion
import data
import sample
import worlds
from cli import one_line
from custom_diffusion import ConceptTask, load_concept, save_concept
from evaluate import features, kept_classifier, prompt_accuracy, read_shapes
from models import base_task
from studies.common import RULE, Table, claims, figure, markdown, mean_se, parser, run, shown
from studies.things import (EASY, HARD, SIX, THINGS, TUNING, Judge, any_part,
                            photographs)
from train import load_data, make_step

BASE, OUT = "assets/unet-scenes.pt", pathlib.Path("out/studies/concepts")
ALWAYS = ["--no-augment", "--steps", "500"]
METHODS = {"K/V and word": [], "word alone": ["--part", "none"], "all weights": ["--part", "all"],
           "no prior": ["--prior", "none", "--batch-size", "8"],
           "generated prior": ["--prior", "generated"], "augmented": ["--augment"],
           "word not optimised": []}                    # its rates below say so
MAIN = ("K/V and word", "word alone", "all weights")
LR = (3e-3, 1e-2, 2e-2, 4e-2)                           # of keys and values
RATES = {**{method: [(lr, 1e-1) for lr in LR] for method in METHODS},
         "word alone": [(0, 1e-1), (0, 3e-2), (0, 1e-2), (0, 3e-1)],
         "all weights": [(5e-4, 1e-1), (2e-4, 1e-1), (1e-3, 1e-1), (2e-3, 1e-1)],
         "word not optimised": [(lr, 0) for lr in LR]}
RATIOS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)                        # of the sum of singular values
RATE = Table("custom_rates", ["method", "lr", "word_lr", "thing"])
SINGLE = Table("custom_concepts", ["thing", "method", "seed"])
SMALL = Table("custom_compression", ["thing", "ratio"])
MOVED = Table("custom_change", ["thing", "seed"])
CHANCE = Table("custom_chance", ["thing"])
SECOND = Table("custom_second_look", ["thing", "look"])           # look: whose hits they are
LOOKS = ("K/V and word", "all weights", "no prior")


def folder_of(name, turned=False):
    """Ten photographs of a thing as files, with captions of its category -> folder:PATH."""
    folder = OUT / f"{name}{' turned' * turned}"
    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pictures, captions = photographs(name, turned=turned)
        for k, picture in enumerate(pictures):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{k}.png")
        rows = [{"file_name": f"{k}.png", "text": caption.replace("<new1> ", "")}
                for k, caption in enumerate(captions)]
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "metadata.jsonl").write_text("".join(lines))
    return f"folder:{folder}"


def flags_of(method):
    """The flags of a method, with the learning rates that RATE chose for it."""
    score = {}
    for row in RATE.rows():
        if row["method"] == method:
            score.setdefault((row["lr"], row["word_lr"]), []).append(row["part"] - row["leak"])
    if [len(score.get(rates, ())) for rates in RATES[method]] != [len(TUNING)] * len(RATES[method]):
        raise ValueError(f"the rates of {method!r} are not all measured: when the other --part has "
                         "done that, say the same command again")
    lr, word_lr = max(score, key=lambda rates: sum(score[rates]))
    return [*ALWAYS, *rate_flags(lr, word_lr), *METHODS[method]]


def rate_flags(lr, word_lr):
    return [*(["--lr", str(lr)] if lr else []), "--word-lr", str(word_lr)]


def learn(names, path, flags, seed, before=None, turned=False):
    """Train on the things `names`, as custom_diffusion.py learn does -> the concept, in `path`.

    A file that is there already is kept, whatever its flags were: delete OUT to begin anew. before:
    what load_concept gave for a concept to start from; the result then holds both. turned: in some
    captions the thing is named second.
    """
    if path.is_file():
        return
    given = ["--base", BASE, "--concept", *(folder_of(name, turned) for name in names),
             "--category",
             *(THINGS[name][0] for name in names), *flags, "--seed", str(seed), "--device", "cpu"]
    options, config = custom_diffusion.read_flags(given)
    dataset, base = load_data(config), base_task(BASE, options.bpe)
    original = {name: w.clone() for name, w in base.model.denoiser.state_dict().items()}
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


# --------------------------------------------------------------------------------------------------
# what is measured

def kernel_distance(a, b):
    """Unbiased squared maximum mean discrepancy of a (N, D) and b (M, D), kernel (x . y / D + 1)^3.
    Its mean is 0 for equal distributions. Source: Binkowski et al. Sec. 4; Gretton et al. Eq. 3."""
    a, b = a.cpu().double(), b.cpu().double()
    kaa, kbb, kab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    # means over (N, N), (M, M) and (N, M), without the diagonals: pairs of two different rows
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kaa, kbb)]
    return (within[0] + within[1] - 2 * kab.mean()).item()


class Bench:
    """The base, what it samples of every category, and how much of that passes for the thing."""

    def __init__(self):
        self.task = sample.load(BASE)[0]
        self.eye, *_ = kept_classifier(data.load("scenes", count=20_000), OUT, steps=300)
        test = data.load("scenes", split="test", count=2000)
        single = [i for i, caption in enumerate(test.captions)
                  if "relation" not in worlds.parse_caption(caption)]
        self.plain = [test.captions[i] for i in single[:48]]
        mine = {name: [i for i in single if f" {THINGS[name][0]}" in test.captions[i]]
                for name in THINGS}
        self.own = {name: [test.captions[i] for i in rows[:48]] for name, rows in mine.items()}
        self.real = {name: features(self.eye, test.images[rows]) for name, rows in mine.items()}
        self.judges = {name: Judge(name, self.task) for name in THINGS}
        self.base = {}                                  # {thing: its row of the base}, when asked

    def sample(self, task, prompts):
        """A picture of each prompt, (B, 3, 32, 32) uint8, from the same noise in every cell."""
        return sample.sample_all(task, task.model, task.tokenizer(prompts), seed=0, steps=16)[1]

    def with_concept(self, path):
        """The base's task with the concept in a file."""
        task = sample.load(BASE)[0]
        sample.add_concept(str(path), task)
        return task

    def measure(self, path, name):
        """The columns of a concept file that holds one thing."""
        task = self.with_concept(path)
        if name not in self.base:
            self.base[name] = self.measure_category(self.task, name)
        category = self.measure_category(task, name)
        category = {key: value - self.base[name][key] * (key != "category")
                    for key, value in category.items()}
        plain = prompt_accuracy(self.sample(task, self.plain), self.plain)["all"][0]
        return {**self.measure_thing(task, name, "<new1>"), **category, "plain": plain}

    def measure_thing(self, task, name, word):
        """Part, body, hits and text alignment of one thing."""
        category, judge = THINGS[name][0], self.judges[name]
        asked = [f"a {word} {category}", f"a large {word} {category} on gray",
                 f"a small {word} {category} on navy"]
        pictures = [self.sample(task, [prompt] * 16) for prompt in asked]
        wanted = [(worlds.SIZES.index(size), list(worlds.BACKGROUNDS).index(ground))
                  for size, ground in (("large", "gray"), ("small", "navy"))]
        right = [(read["size"][:, 0] == size) & (read["background"] == ground)
                 for read, (size, ground) in zip(map(read_shapes, pictures[1:]), wanted)]
        part, body = judge(torch.cat(pictures))
        return {"part": part.mean().item(), "body": body.mean().item(),
                "hits": judge.hits(torch.cat(pictures)).float().mean().item(),
                "text": torch.cat(right).float().mean().item()}

    def measure_category(self, task, name):
        """What became of the thing's category: leak, without that of the base; rate right; KID."""
        bare, own = self.sample(task, [f"a {THINGS[name][0]}"] * 48), self.sample(
            task, self.own[name])
        return {"leak": self.judges[name].hits(bare).float().mean().item(),
                "category": prompt_accuracy(own, self.own[name])["all"][0],
                "kid": 1000 * kernel_distance(features(self.eye, own), self.real[name])}


def run_cell(cell, bench):
    """One row of the table of rates, of single things, or of compression."""
    path = OUT / ("-".join(map(str, cell.values())).replace("/", " ") + ".pt")
    if "look" in cell:
        return second_look(cell, bench)
    if [*cell] == CHANCE.keys:
        judge, x = bench.judges[cell["thing"]], data.to_float(any_part(cell["thing"]))
        pictures = bench.task.to_pictures(bench.task.encode(x))
        hits = judge.hits(pictures).float().mean().item()
        return {**cell, "part": judge(pictures)[0].mean().item(), "hits": hits}
    if "ratio" in cell:
        unet = bench.task.model.denoiser.state_dict()
        W, rows, concepts = load_concept(OUT / f"{cell['thing']}-K V and word-0.pt", unet)
        small = custom_diffusion.compress(W, unet, cell["ratio"])
        save_concept(path, {**W, **small}, rows, concepts, unet)
        kb = path.stat().st_size / 1e3
        return {**cell, "kb": kb, **bench.measure(path, cell["thing"])}
    if "lr" in cell:
        flags = [*ALWAYS, *METHODS[cell["method"]], *rate_flags(cell["lr"], cell["word_lr"])]
        learn([cell["thing"]], path, flags, 0)
    else:
        learn([cell["thing"]], path, flags_of(cell["method"]), cell["seed"])
    return {**cell, **bench.measure(path, cell["thing"])}


def second_look(cell, bench):
    """One row: of the hits among 96 pictures, half of them of the bare category, those in which the
    exact reader sees the category's shape, and the part in its own colour."""
    name, path = cell["thing"], OUT / f"{cell['thing']}-{cell['look'].replace('/', ' ')}-0.pt"
    learn([name], path, flags_of(cell["look"]), 0)
    category, _, _, color, _ = THINGS[name]
    prompts = [f"a <new1> {category}"] * 48 + [f"a {category}"] * 48
    pictures = bench.sample(bench.with_concept(path), prompts)
    hits, read = bench.judges[name].hits(pictures), read_shapes(pictures)
    seen = {"shape": read["shape"][:, 0] == worlds.SHAPES.index(category),
            "part_color": read["part_color"][:, 0] == list(worlds.COLORS).index(color)}
    return {**cell, "hits": hits.sum().item(), "in_bare": hits[48:].sum().item(),
            **{what: (hits & right).sum().item() for what, right in seen.items()}}


# --------------------------------------------------------------------------------------------------
# the tables

def by_thing(method, column):
    """{thing: mean over seeds} of the twelve things; {} if one of them is not measured yet."""
    values = SINGLE.by("thing", column, method=method)
    return {thing: values[thing] for thing in EASY} if {*EASY} <= values.keys() else {}


def gap(column, method, other, share=1.0, less=0.0):
    """{thing: column of a method - share * that of another - less}, the mean over those seeds that
    both have; {} if one of the twelve things has none."""
    first, second = ({(row["thing"], row["seed"]): row[column] for row in SINGLE.rows()
                      if row["method"] == name} for name in (method, other))
    gaps = {}
    for thing, seed in first.keys() & second.keys():
        gaps.setdefault(thing, []).append(
            first[thing, seed] - share * second[thing, seed] - less)
    return {thing: statistics.fmean(gaps[thing]) for thing in EASY} if {*EASY} <= {*gaps} else {}


def verdicts():
    """The paper's sentences beside our differences."""
    kv, word, whole = MAIN
    small = {ratio: SMALL.by("thing", "part", ratio=ratio) for ratio in (0.6, 1)}
    moved = [MOVED.by("thing", kind) for kind in ("cross-attention", "self-attention", "other")]
    less = lambda a, b, share=1.0: {k: a[k] - share * b[k] for k in EASY if k in a and k in b}
    rows = [
        ("keys and values draw the thing as well as all weights", "image alignment .775, .748",
         "part: K/V - all weights", gap("part", kv, whole)),
        ("they come near to all weights", "", "part: K/V - 0.6 all weights",
         gap("part", kv, whole, 0.6)),
        ("the word alone draws it best", ".827, .775", "part: word - K/V", gap("part", word, kv)),
        ("what was asked beside it is drawn better than with the word alone",
         "text alignment .795, .670", "text: K/V - word", gap("text", kv, word)),
        ("without the prior the category suffers", "KID 32.64, 20.96", "leak: no prior - K/V",
         gap("leak", "no prior", kv)),
        ("with the prior it does not", "KID 20.96, before 22.27", "0.05 - leak of K/V",
         {thing: 0.05 - leak for thing, leak in by_thing(kv, "leak").items()}),
        ("a generated prior is worse than real pictures", "KID 34.70, 20.96",
         "KID: generated - K/V", gap("kid", "generated prior", kv)),
        ("without the prior, much of the category becomes the thing", "", "leak: no prior - 0.2",
         {thing: leak - 0.2 for thing, leak in by_thing("no prior", "leak").items()}),
        ("(ours) keys and values draw the part, the word alone does not", "",
         "part: K/V - word - 0.25", gap("part", kv, word, less=0.25)),
        ("all weights keep the category better than keys and values", "KID 19.27, 20.96",
         "leak: K/V - all weights", gap("leak", kv, whole)),
        ("shrinking and enlarging, without words for it, helps", "image alignment .775, .736",
         "part: augmented - K/V", gap("part", "augmented", kv)),
        ("the word must learn too", "image alignment .774, .733", "part: K/V - word not optimised",
         gap("part", kv, "word not optimised")),
        ("60 % of the singular values' sum is enough", "quality the same", "part: 60 % - 0.9 all",
         less(small[0.6], small[1], 0.9)),
        ("cross-attention moves most when all weights learn", "a figure",
         "change: cross-attention - the most of the others",
         {k: moved[0][k] - max(moved[1][k], moved[2][k]) for k in EASY if k in moved[0]})]
    return claims("things", [row for row in rows if len(row[-1]) == len(EASY)])


def report():
    """The verdicts, and tables of single things, rates, compressed changes, moved layers. A method
    is shown when each of the twelve things has been measured with it."""
    done = [method for method in METHODS if by_thing(method, "part")]
    if MAIN[0] not in done:
        return ""
    columns = ["part", "body", "hits", "text", "leak", "category", "kid", "plain"]
    seeds = {method: [len(SINGLE.column("seed", thing=t, method=method)) for t in EASY]
             for method in done}
    table = [[method, "-".join(map(str, sorted({min(seeds[method]), max(seeds[method])}))),
              *(shown(by_thing(method, column).values(), 1 if column == "kid" else 2)
                for column in columns)] for method in done]
    things = [name for name in (*EASY, *HARD) if name in SINGLE.column("thing")]
    value = lambda thing, column, m: SINGLE.by("thing", column, method=m).get(thing, math.nan)
    parts = [[thing, *(f"{value(thing, column, m):.2f}" for column in ("part", "leak")
                       for m in MAIN)] for thing in things]
    tried = {m: ", ".join(f"{lr:g} / {word:g}" for lr, word in RATES[m]) for m in MAIN}
    chosen = "; ".join(f"{m}: `{' '.join(flags_of(m)[len(ALWAYS):])}`, of (--lr / --word-lr) "
                       f"{tried[m]}" for m in MAIN)
    text = (RULE + "\n" + verdicts() + "\n**Methods**; mean of the things ± its standard error; a "
            "thing is the mean of its seeds\n\n" + markdown(["method", "seeds", *columns], table)
            + chance_text() + second_text() + "\n**Things**\n\n" + markdown(
                ["thing", *(f"{column}, {m}" for column in ("part", "leak") for m in MAIN)], parts)
            + f"\n**Rates**, chosen by part - leak on {' and '.join(TUNING)}: {chosen}\n")
    if SMALL.rows():
        lines = [[ratio, *(shown(SMALL.column(column, ratio=ratio), digits) for column, digits in
                           (("kb", 1), ("part", 2), ("body", 2), ("leak", 2)))]
                 for ratio in RATIOS if len(SMALL.column("part", ratio=ratio)) == len(EASY)]
        text += ("\n**Compressed** changes; kept: the share of the sum of singular values of the "
                 "change of keys and values\n\n"
                 + markdown(["kept", "kB", "part", "body", "leak"], lines))
    if MOVED.rows():
        kinds = ("cross-attention", "self-attention", "other")
        text += ("\n**How far weights move** when all learn, ||W - W0|| / ||W0||, mean of things: "
                 + ", ".join(f"{kind} {shown(MOVED.by('thing', kind).values(), 4)}"
                             for kind in kinds)
                 + ". Other: convolutions, norms and the layers of the time.\n")
    return text


def chance_text():
    """What pictures score that show the body alone."""
    if not {*EASY} <= {*CHANCE.column("thing")}:
        return ""
    part, hits = (shown(CHANCE.by("thing", column).values()) for column in ("part", "hits"))
    return (f"\nReal pictures of the body with any other part of the world, or none, have part "
            f"{part} and hits {hits}: this, and not 0, is what learning the body alone reaches.\n")


def second_text():
    """What the exact reader says of the hits."""
    total = {what: sum(SECOND.column(what)) for what in ("hits", "in_bare", "shape", "part_color")}
    if not total["hits"]:
        return ""
    return (f"\nThe exact reader, which looks at shapes and at all eight colours, was asked about "
            f"{total['hits']} hits ({', '.join(LOOKS)}; {total['in_bare']} where the bare category "
            f"was asked for): it sees the category's shape in {total['shape'] / total['hits']:.1%} "
            f"and the part in its own colour in {total['part_color'] / total['hits']:.1%}.\n")


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


def measure_moves():
    """How far each kind of layer moved, of every file of all weights that is there."""
    unet = base_task(BASE, "").model.denoiser.state_dict()
    for path in sorted(OUT.glob("*-all weights-?.pt")):
        thing, _, seed = path.stem.split("-")
        if {"thing": thing, "seed": seed} not in MOVED:
            _, kinds = weight_change(unet, {**unet, **load_concept(path, unet)[0]})
            MOVED.add({"thing": thing, "seed": seed, **kinds})


def plot(panels):
    """Left: part against leak of every method. Right: part of every thing, by the main methods."""
    for method in [m for m in METHODS if by_thing(m, "part")]:
        (x, dx), (y, dy) = (mean_se(by_thing(method, column).values())
                            for column in ("leak", "part"))
        panels[0].errorbar(x, y, dy, dx, fmt="o", capsize=2, label=method)
    panels[0].set(xlabel="leak: the category turned into the thing", ylabel="part (1 = real)",
                  title="twelve things, mean and standard error")
    for k, method in enumerate(MAIN):
        means = by_thing(method, "part")
        panels[1].bar([EASY.index(name) + 0.27 * (k - 1) for name in means], means.values(), 0.25,
                      label=method)
    panels[1].set_xticks(range(len(EASY)), EASY, rotation=30, ha="right")
    panels[1].set(title="part of each thing")
    for axes in panels:
        axes.legend(fontsize=8)


def cells_of(seeds):
    """[(table, its cells)] in the order of work: stopped early, whole comparisons are there."""
    single = lambda methods, things, seed: [{"thing": thing, "method": method, "seed": seed}
                                            for method in methods for thing in things]
    rates = [{"method": method, "lr": lr, "word_lr": word, "thing": thing}
             for k in range(4) for method in METHODS for thing in TUNING
             for lr, word in RATES[method][k:k + 1]]
    plan, others = [(RATE, rates)], [m for m in METHODS if m not in MAIN]
    plan += [(SINGLE, single(MAIN, EASY, 0)), (SINGLE, single(others, EASY, 0)),
             (SINGLE, single(MAIN, HARD, 0))]
    for seed in range(1, seeds):
        plan += [(SINGLE, single(METHODS, SIX, seed))]
    plan += [(CHANCE, [{"thing": name} for name in EASY]),
             (SECOND, [{"thing": name, "look": look} for look in LOOKS for name in EASY])]
    return [*plan, (SMALL, [{"thing": name, "ratio": ratio} for name in EASY for ratio in RATIOS])]


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
    figure("custom_concepts", plot, (9, 4), 2)


if __name__ == "__main__":
    main()
