"""Custom Diffusion on things whose every part can be measured: what learns, what leaks, what merges.

The claims (Kumari et al. 2022, tables 1, 2 and 4, figure 10): training keys and values with a new word comes near to
training all weights, beats the word alone, and forgets less; without the prior the category turns into the thing;
concepts learned apart merge by the closed form better than by averaging.  Here six things (things.py) on
assets/unet-scenes.pt, 250 steps of 8 + 8 pictures; centre-symmetric ones, and one that is cut in two halves (hard).
Alignment: 0 what the base draws, 1 real pictures. Text: size and background as asked. Leak: share of the bare
category's pictures that look like the thing, less the base's own share. Category: 48 held-out captions of its own
category, all attributes right, and the classifier-KID (x 1000) of these pictures to real ones, less that of the base.
Plain: 48 held-out captions about anything. Both: pairs that show each thing in its half. Then, from the files that this
leaves behind: how far each kind of layer moved when all weights learned, and what a compressed change still draws.
The second merge's settings were chosen on two pairs with seed 0. About 35 CPU-seconds a cell on one thread; 126 single
cells and 54 pairs.

    python -m studies.custom_concepts               # -> custom_{concepts,pairs,compression,change}.md, .csv; a figure
"""
import contextlib
import io
import pathlib

import torch
from PIL import Image

import custom_diffusion
import data
import sample
from custom_diffusion import add_changes, average, gather, load_concept, save_concept, weight_change
from evaluate import features, kernel_distance, prompt_accuracy, read_shapes, train_classifier
from studies.common import Table, bootstrap, figure, mean_se, parser, todo, write_markdown
from studies.things import HARD, THINGS, Judge, photographs
from tasks import ConceptTask
from train import Config, parse, prepare_run, presets, step_maker

BASE, OUT = "assets/unet-scenes.pt", pathlib.Path("out/studies/concepts")
METHODS = {"K/V and word": [], "word alone": ["--part", "none", "--word-lr", "3e-2"],     # rates: those of train.py
           "all weights": ["--part", "all", "--lr", "5e-4"], "no prior": ["--prior", "none"],
           "generated prior": ["--prior", "generated"], "no augmentation": ["--no-augment"],
           "word not optimised": ["--word-lr", "0"]}
MAIN = ("K/V and word", "word alone", "all weights")            # with all seeds; the ablations with one
PAIRS = (("hub ring", "gem cross"), ("target circle", "pearl star"), ("eye square", "hub ring"))
COMBINE = ("joint", "merge", "merge with padding", "average", "sum", "sequential")
RATIOS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)                        # of the sum of singular values


def folder_of(name, word="<new1>"):
    """Six photographs of a thing as files with captions -> folder:PATH."""
    folder = OUT / f"{name} {word[1:-1]}"
    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pictures, captions = photographs(name, 6, word)
        for k, picture in enumerate(pictures):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{k}.png")
        lines = [f'{{"file_name": "{k}.png", "text": "{caption}"}}\n' for k, caption in enumerate(captions)]
        (folder / "metadata.jsonl").write_text("".join(lines))
    return f"folder:{folder}"


def learn(names, path, flags, seed, before=None):
    """Train on the things `names`, together, and save the concept in `path`, unless it is there already (from whatever
    flags: delete OUT to begin anew).

    before: a concept file whose model is the one to start from (sequential training); the result then holds both.
    """
    if path.is_file():
        return
    first = 1 + len(before[1]) if before else 1
    given = [f for k, name in enumerate(names, first)
             for f in ("--concept", folder_of(name, f"<new{k}>"), "--category", THINGS[name][0])]
    argv = ["--init", BASE, *given, *flags, "--seed", str(seed), "--out", str(OUT / "nothing")]
    config = prepare_run(parse(Config, argv, __doc__, presets))
    base, model = sample.load(BASE)
    if before:                                                  # the first thing's word becomes a row like any other
        W, rows, _ = before
        model.unet.load_state_dict({**model.unet.state_dict(), **W})
        table = model.text.text_model.embeddings.token_embedding.weight
        for word, row in rows.items():
            table.data[base.tokenizer.add_token(word)] = row
    base.model.requires_grad_(True)
    original = sample.load(BASE)[1].unet.state_dict()
    task = ConceptTask(config, base, data.load(config.data, count=4000))
    run, _, model = step_maker(config, data.load(config.data, count=10), task)         # the average, as train.py saves
    for step in range(config.steps):
        run(step)
    learned = {name: w for name, w in model.unet.state_dict().items()
               if f"unet.{name}" not in task.frozen or before and name in before[0]}
    rows = {**(before[1] if before else {}), **dict(zip(task.words, model.text.rows))}
    concepts = (before[2] if before else []) + task.things
    save_concept(path, learned, rows, concepts, original)


def split(pictures):
    """Left and right half of pictures (B, 3, H, W), each filled up with the background."""
    border = torch.cat([pictures[:, :, 0], pictures[:, :, -1]], -1).median(-1).values[..., None, None]   # (B, 3, 1, 1)
    left = torch.arange(pictures.shape[-1]) < pictures.shape[-1] // 2
    return torch.where(left, pictures, border), torch.where(left, border, pictures)


class Bench:
    """The base, loaded once, what it draws of every category, and how much of that passes for the thing already."""

    def __init__(self):
        self.task, self.model = sample.load(BASE)
        self.eye, _ = train_classifier(data.load("scenes", count=20_000), steps=300)
        test = data.load("scenes", split="test", count=2000)
        single = [i for i, c in enumerate(test.captions) if "relation" not in data.parse_caption(c)]
        self.plain = [test.captions[i] for i in single[:48]]
        mine = {name: [i for i in single if f" {THINGS[name][0]}" in test.captions[i]] for name in THINGS}
        self.own = {name: [test.captions[i] for i in mine[name][:48]] for name in THINGS}
        self.real = {name: features(self.eye, test.images[mine[name]]) for name in THINGS}
        bare = {name: f"a {THINGS[name][0]}" for name in THINGS}
        drawn = {name: self.draw(self.task, self.model, [said] * 32) for name, said in bare.items()}
        self.judges = {name: Judge(name, self.task, pictures) for name, pictures in drawn.items()}
        self.own_leak = {name: self.judges[name].hits(pictures) for name, pictures in drawn.items()}
        self.own_kid = {name: self.kid(self.draw(self.task, self.model, self.own[name]), name) for name in THINGS}

    def draw(self, task, model, prompts):
        return sample.draw_all(task, model, task.tokenizer(prompts), seed=0, steps=16)[1]

    def kid(self, pictures, name):
        return 1000 * kernel_distance(features(self.eye, pictures), self.real[name])

    def measure(self, path, names):
        """Alignment and text alignment of the things in a concept file, leak, forgetting; of a pair, both at once."""
        task, model = sample.load(BASE)
        with contextlib.redirect_stdout(io.StringIO()):
            sample.add_concept(str(path), task, model, "cpu")
        out = {"alignment": [], "text": [], "leak": [], "category": [], "kid": []}
        for k, name in enumerate(names, 1):
            category = THINGS[name][0]
            asked = [f"a <new{k}> {category}", f"a large <new{k}> {category} on gray",
                     f"a small <new{k}> {category} on navy"]
            pictures = [self.draw(task, model, [prompt] * 16) for prompt in asked]
            read = [read_shapes(p) for p in pictures[1:]]
            right = [(r["size"][:, 0] == size) & (r["background"] == ground)
                     for r, size, ground in zip(read, (1, 0), (1, 2))]      # data.SIZES, data.BACKGROUNDS
            out["alignment"].append(self.judges[name](torch.cat(pictures)).mean().item())
            out["text"].append(torch.cat(right).float().mean().item())
            leak = self.judges[name].hits(self.draw(task, model, [f"a {category}"] * 32))
            out["leak"].append(leak - self.own_leak[name])
            pictures = self.draw(task, model, self.own[name])
            out["category"].append(prompt_accuracy(pictures, self.own[name])["all"][0])
            out["kid"].append(self.kid(pictures, name) - self.own_kid[name])
        row = {key: sum(values) / len(values) for key, values in out.items()}
        if len(names) == 2:
            said = " left of ".join(f"a <new{k}> {THINGS[name][0]}" for k, name in enumerate(names, 1))
            halves = split(self.draw(task, model, [said] * 32))
            seen = [self.judges[name](half) > 0.5 for name, half in zip(names, halves)]
            row["both"] = (seen[0] & seen[1]).float().mean().item()
        return {**row, "plain": prompt_accuracy(self.draw(task, model, self.plain), self.plain)["all"][0]}


def combine(pair, how, seed, path):
    """One concept file for two things that were learned apart (or together, or in turn)."""
    own = [OUT / f"{name}-K V and word-{seed}.pt" for name in pair]
    for name, file in zip(pair, own):
        learn([name], file, [], seed)
    unet = sample.load(BASE)[1].unet.state_dict()
    if how == "joint":
        learn(pair, path, ["--batch-size", "32"], seed)         # as many pictures of each as apart
    elif how == "sequential":
        learn(pair[1:], path, [], seed, before=load_concept(own[0], unet))
    elif how.startswith("merge"):                               # the U-Net also reads the padding after a short caption
        flags = ["--base", BASE, "--out", str(path)]
        flags += ["--padding", "--ridge", "10", "--tolerance", "0.5"] if how.endswith("padding") else ["--ridge", "0.1"]
        with contextlib.redirect_stdout(io.StringIO()):
            custom_diffusion.main(["merge", *map(str, own), *flags])
    else:
        Ws, rows, concepts = gather(own, unet)
        W0 = {name: unet[name] for name in Ws[0]}
        W = average(Ws) if how == "average" else add_changes(W0, Ws)
        save_concept(path, W, rows, sum(concepts, []), unet)


def run_cell(cell, bench):
    """One row of the table of single things, of pairs, or of compression."""
    path = OUT / ("-".join(map(str, cell.values())).replace("/", " ") + ".pt")
    if "ratio" in cell:
        unet = bench.model.unet.state_dict()
        W, rows, concepts = load_concept(OUT / f"{cell['thing']}-K V and word-0.pt", unet)
        save_concept(path, W, rows, concepts, unet, cell["ratio"])
        return {**cell, "kb": path.stat().st_size / 1e3, **bench.measure(path, [cell["thing"]])}
    if "how" in cell:
        pair = tuple(cell["pair"].split(" + "))
        combine(pair, cell["how"], cell["seed"], path)
        return {**cell, **bench.measure(path, pair)}
    learn([cell["thing"]], path, METHODS[cell["method"]], cell["seed"])
    return {**cell, **bench.measure(path, [cell["thing"]])}


def summarise(table, key, names, baseline):
    """Means ± standard errors, and the paired difference to a baseline with its bootstrap interval."""
    rows, lines = table.rows(), []
    shown = ["alignment", "text", "leak", "category", "kid", "plain"] + ["both"] * (key == "how")
    pair_of = lambda r: (r["thing"] if "thing" in r else r["pair"], r["seed"])
    reference = {pair_of(r): r["alignment"] for r in rows if r[key] == baseline}
    for name in names:
        mine = [r for r in rows if r[key] == name]
        if len(mine) > 1:
            gaps = [r["alignment"] - reference[pair_of(r)] for r in mine if pair_of(r) in reference]
            low, high = bootstrap(gaps) if len(gaps) > 1 else (float("nan"),) * 2
            lines.append([name, len(mine), *("{:.2f} ± {:.2f}".format(*mean_se([r[k] for r in mine])) for k in shown),
                          f"{sum(gaps) / max(1, len(gaps)):+.2f} [{low:+.2f}, {high:+.2f}]"])
    header = [key, "runs", *shown, f"alignment against {baseline}"]
    write_markdown(table.path.stem, header, lines,
                   f"Hard things included ({', '.join(HARD)}). `python -m studies.custom_concepts`")


def draw(sets, panels):
    """The paper's figure 8: image alignment against text alignment, a point with its standard errors per method."""
    for axes, (title, key, names, table) in zip(panels, sets):
        for name in names:
            values = [table.column(column, **{key: name}) for column in ("text", "alignment")]
            if len(values[0]) > 1:
                (x, dx), (y, dy) = map(mean_se, values)
                axes.errorbar(x, y, dy, dx, fmt="o", capsize=2, label=name)
        axes.set(xlabel="text alignment (size and background as asked)", title=title)
        axes.legend(fontsize=8)
    panels[0].set_ylabel("image alignment (0 base, 1 real)")


def summarise_files(table):
    """What is left of a concept at each ratio; and, where the files of "all weights" are, how far each layer moved."""
    show = lambda values, form="{:.2f}": f"{form} ± {form}".format(*mean_se(values))
    rows = [[ratio, *(show(table.column(k, ratio=ratio)) for k in ("kb", "alignment", "text", "leak"))]
            for ratio in RATIOS if len(table.column("kb", ratio=ratio)) > 1]
    write_markdown("custom_compression", ["singular values kept", "kB", "alignment", "text", "leak"], rows,
                   "Mean ± standard error over things: `python -m studies.custom_concepts`")
    moved, unet = Table("custom_change", ["thing", "seed"]), None
    for path in sorted(OUT.glob("*-all weights-*.pt")):
        thing, _, seed = path.stem.split("-")
        if {"thing": thing, "seed": seed} not in moved:
            unet = unet or sample.load(BASE)[1].unet.state_dict()
            _, kinds = weight_change(unet, {**unet, **load_concept(path, unet)[0]})
            moved.add({"thing": thing, "seed": seed, **kinds})
    if len(moved.rows()) > 1:
        write_markdown("custom_change", ["kind of layer", "||W - W0|| / ||W0||"],
                       [[kind, show(moved.column(kind), "{:.4f}")] for kind in
                        ("cross-attention", "self-attention", "other")],
                       "All weights trained, mean ± standard error over runs: `python -m studies.custom_concepts`")


def main():
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    OUT.mkdir(parents=True, exist_ok=True)
    singles = Table("custom_concepts", ["thing", "method", "seed"])
    pairs = Table("custom_pairs", ["pair", "how", "seed"])
    squeezed = Table("custom_compression", ["thing", "ratio"])
    single = lambda methods, s: [{"thing": t, "method": m, "seed": s} for m in methods for t in THINGS]
    plan = []
    for s in range(args.seeds):                                 # a study that is stopped early has whole comparisons
        plan += [(singles, single(MAIN, s)),
                 (pairs, [{"pair": " + ".join(p), "how": h, "seed": s} for p in PAIRS for h in COMBINE])]
    plan += [(singles, single([m for m in METHODS if m not in MAIN], s)) for s in range(args.seeds)]
    plan += [(squeezed, [{"thing": t, "ratio": r} for t in list(THINGS)[:3] for r in RATIOS])]
    bench = None if args.summary else Bench()
    for table, cells in plan:
        for cell in [] if args.summary else todo(cells, table, args.part):
            table.add(run_cell(cell, bench))
    summarise(singles, "method", METHODS, "K/V and word")
    summarise(pairs, "how", COMBINE, "average")
    summarise_files(squeezed)
    sets = [("one thing", "method", METHODS, singles), ("two things", "how", COMBINE, pairs)]
    figure("custom_concepts", lambda panels: draw(sets, panels), (9, 4), 2, sharey=True)


if __name__ == "__main__":
    main()
