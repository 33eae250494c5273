"""Two things in one model: trained together, in turn, or apart and put together by a formula

Claims (Kumari et al. 2022, table 1): of two things in one model, training together comes first,
then in turn, then the closed-form merge of two that learned apart. Here: six pairs of the things of
custom_concepts.py, each thing in two of them, learned apart as there; together with twice the
batch, so each thing is seen as often. Columns as there, the mean of both things; and
  both       share of 48 pictures "a <new1> ... left of a <new2> ..." with each a hit in its half
  plain      48 held-out captions of any category: share with all attributes right
"apart" is what each thing's own file draws. "joint, all weights" learns together with all weights
at a rate of 5e-4, half of the best one for single things, from captions that name the thing also as
the second of two objects. "merge" is Eq. 5 as published. It asks only the rows of two prompts, from
the second word to the end token, but the U-Net reads the start token and the padding after a short
caption too. "softly" (soft_merge) asks all rows of many captions, as a compromise of least squares;
its weight was chosen on two things that are in no table. Missed: what a merge leaves out of the
change of keys and values that a thing learned, at the rows of one kind of its prompts,
||(W - W_n) C^T|| / ||(W_n - W0) C^T||; 1 = all of it. The paper's tables have neither average nor
sum. About 25 CPU-seconds a cell, 130 if it trains.

    python -m studies.custom_merge          # after studies.custom_concepts
"""
import re

import torch

import custom_diffusion
import data
from cli import one_line
from custom_diffusion import (apply_concept, gather, keys_and_values, load_concept,
                              save_concept)
from evaluate import prompt_accuracy
from models import base_task
from studies.common import RULE, Table, claims, figure, markdown, mean_se, parser, run, shown
from studies.custom_concepts import ALWAYS, BASE, OUT, Bench, flags_of, learn
from studies.things import SIX, THINGS

PAIRS = [(name, SIX[(k + 1) % len(SIX)]) for k, name in enumerate(SIX)]
COMBINE = ("apart", "average", "sum", "merge", "softly", "joint", "sequential",
           "joint, all weights")
TABLE = Table("custom_merge", ["pair", "how", "seed"])
WHOLE = [*ALWAYS, "--part", "all", "--lr", "5e-4", "--word-lr", "0.1"]
KINDS = ("start", "words", "end", "padding")


def average(Ws):
    """{name: mean of W_n}: the simplest way to put concepts together."""
    return {name: sum(W[name] for W in Ws) / len(Ws) for name in Ws[0]}


def add_changes(W0, Ws):
    """{name: W0 + sum of (W_n - W0)}. Source: task arithmetic, Ilharco et al. 2022, Eq. 2."""
    return {name: W0[name] + sum(W[name] - W0[name] for W in Ws) for name in Ws[0]}


def soft_merge(W0, concepts, C_reg, weight=10.0, ridge=1e-6):
    """A compromise of least squares for many rows -> {name: W (o, d) float64}, which minimises
    ||(W - W0) C_reg^T||^2 / r + weight * sum over n of ||(W - W_n) C_n^T||^2 / s_n.

    concepts: [({name: W_n}, C_n (s_n, d))]. Eq. 5 asks so few rows that it can serve them exactly.
    """
    moment = lambda C: C.double().T @ C.double() / len(C)                           # (d, d)
    moments = [weight * moment(C) for _, C in concepts]
    G = moment(C_reg) + sum(moments)
    G += ridge * G.trace() / len(G) * torch.eye(len(G), dtype=G.dtype)
    # the gradient is 0: (W - W0) G = sum over n of (W_n - W0) G_n
    asked = lambda name, base: sum((W[name] - base).double() @ G_n
                                   for (W, _), G_n in zip(concepts, moments))       # (o, d)
    return {name: base.double() + torch.linalg.solve(G, asked(name, base).T).T
            for name, base in W0.items()}


def rows_in_captions(text, tokenizer, concept, captions):
    """All rows (s, D) of the captions that name a concept's category, with its new word before it:
    start token, words, end and padding, as the U-Net reads them."""
    category = concept.split()[-1]
    with_it = [re.sub(rf"\b{category}\b", concept, caption, count=1) for caption in captions
               if category in caption.split()]
    return text(tokenizer([f"a {concept}", *with_it])).flatten(0, 1)


@torch.no_grad()
def softly(own, path):
    """Concept files -> one, by soft_merge over a thousand captions."""
    task = base_task(BASE, "")
    unet, captions = task.model.denoiser.state_dict(), data.load("scenes", count=1000).captions
    Ws, words, concepts = gather(own, unet)
    apply_concept(task.model, task.tokenizer, {}, words)
    encoder = task.model.text, task.tokenizer
    C_reg = task.model.text(task.tokenizer(captions)).flatten(0, 1)                 # (r, D)
    things = [(W, rows_in_captions(*encoder, thing[0], captions))
              for W, thing in zip(Ws, concepts)]
    W = soft_merge(keys_and_values(unet), things, C_reg)
    save_concept(path, {name: w.float() for name, w in W.items()}, words, sum(concepts, []), unet)


def own_files(pair, seed):
    """The files of two things that learned apart, trained if they are not there yet."""
    own = [OUT / f"{name}-K V and word-{seed}.pt" for name in pair]
    for name, file in zip(pair, own):
        learn([name], file, flags_of("K/V and word"), seed)
    return own


def combine(pair, how, seed, path):
    """One concept file for two things that were learned apart (or together, or in turn)."""
    own = own_files(pair, seed)
    unet, flags = base_task(BASE, "").model.denoiser.state_dict(), flags_of("K/V and word")
    if how == "joint":
        learn(pair, path, [*flags, "--batch-size", "32"], seed)
    elif how == "joint, all weights":
        learn(pair, path, [*WHOLE, "--batch-size", "32"], seed, turned=True)
    elif how == "sequential":
        learn(pair[1:], path, flags, seed, before=load_concept(own[0], unet))
    elif how == "merge":
        path.unlink(missing_ok=True)                            # of a cell that was stopped
        custom_diffusion.main(["merge", *map(str, own), "--base", BASE, "--out", str(path)])
    elif how == "softly":
        softly(own, path)
    else:
        Ws, rows, concepts = gather(own, unet)
        W = average(Ws) if how == "average" else add_changes(unet, Ws)
        save_concept(path, W, rows, sum(concepts, []), unet)
    return own


def halves(pictures):
    """Left and right half of pictures (B, 3, H, W), each filled up with the background."""
    border = torch.cat([pictures[:, :, 0], pictures[:, :, -1]], -1)                     # (B, 3, 2W)
    ground = border.median(-1).values[..., None, None]                              # (B, 3, 1, 1)
    left = torch.arange(pictures.shape[-1]) < pictures.shape[-1] // 2
    return torch.where(left, pictures, ground), torch.where(left, ground, pictures)


@torch.no_grad()
def missed(task, own, pair):
    """{kind of row: share of the change that is not there}, the mean of both things."""
    unet = base_task(BASE, "").model.denoiser.state_dict()
    W0, W = keys_and_values(unet), keys_and_values(task.model.denoiser.state_dict())
    shares = {kind: 0.0 for kind in KINDS}
    for k, (name, Wn) in enumerate(zip(pair, gather(own, unet)[0])):
        word, category = f"<new{k + 1}>", THINGS[name][0]
        prompts = [f"a {word} {category}", f"a large {word} {category} on gray",
                   f"a small {word} {category} on navy"]
        ids = task.tokenizer(prompts)                                               # (3, L)
        states, tokens = task.model.text(ids), task.tokenizer
        rows = {"start": ids == tokens.START, "words": ids > tokens.END, "end": ids == tokens.END,
                "padding": ids == tokens.PAD}
        for kind, where in rows.items():
            C = states[where]                                                       # (n, D)
            size = lambda A, B: sum(((A[x] - B[x]) @ C.T).square().sum() for x in W0).sqrt()
            shares[kind] += (size(W, Wn) / size(Wn, W0)).item() / 2
    return {f"missed {kind}": share for kind, share in shares.items()}


def run_cell(cell, bench):
    """One row of the table."""
    pair = tuple(cell["pair"].split(" + "))
    if cell["how"] == "apart":
        own = own_files(pair, cell["seed"])
        rows = [bench.measure_thing(bench.with_concept(path), name, "<new1>")
                for path, name in zip(own, pair)]
        more = dict.fromkeys(["both", "plain", *(f"missed {kind}" for kind in KINDS)], "")
    else:
        path = OUT / ("-".join(map(str, cell.values())) + ".pt")
        own = combine(pair, cell["how"], cell["seed"], path)
        task = bench.with_concept(path)
        rows = [bench.measure_thing(task, name, f"<new{k}>") for k, name in enumerate(pair, 1)]
        one, two = (f"a <new{k}> {THINGS[name][0]}" for k, name in enumerate(pair, 1))
        seen = [bench.judges[name].hits(half) for name, half in
                zip(pair, halves(bench.sample(task, [f"{one} left of {two}"] * 48)))]
        plain = prompt_accuracy(bench.sample(task, bench.plain), bench.plain)["all"][0]
        more = {"both": (seen[0] & seen[1]).float().mean().item(), "plain": plain,
                **missed(task, own, pair)}
    return {**cell, **{key: (rows[0][key] + rows[1][key]) / 2 for key in rows[0]},
            "first": rows[0]["part"], "second": rows[1]["part"], **more}


def gap(column, how, other, share=1.0):
    """{pair: column of one way - share * that of another}."""
    a, b = (TABLE.by("pair", column, how=name) for name in (how, other))
    return {pair: a[pair] - share * b[pair] for pair in a if pair in b}


def report():
    """The verdicts, and the table of ways."""
    done = [how for how in COMBINE if len(TABLE.by("pair", "part", how=how)) == len(PAIRS)]
    if "merge" not in done:
        return ""
    rows = [
        ("joint training draws things better than the merge", "image alignment .706, .695",
         "part: joint - merge", gap("part", "joint", "merge")),
        ("in turn is better than the merge", ".700, .695", "part: sequential - merge",
         gap("part", "sequential", "merge")),
        ("together is better than in turn", ".706, .700", "part: joint - sequential",
         gap("part", "joint", "sequential")),
        ("in turn, the first thing is forgotten", ".674, together .702",
         "first thing's part: joint - sequential", gap("first", "joint", "sequential")),
        ("two things stand in one picture", "figure 7", "both: joint - 0.5",
         {pair: both - 0.5 for pair, both in TABLE.by("pair", "both", how="joint").items()}),
        ("(ours) they do if all weights learn, and captions name a thing second too", "",
         "both: joint, all weights - 0.5", {pair: both - 0.5 for pair, both in
                                            TABLE.by("pair", "both", how=COMBINE[-1]).items()}),
        ("(ours) the merge beats the average", "", "part: merge - average",
         gap("part", "merge", "average")),
        ("(ours) softly beats the merge", "", "part: softly - merge",
         gap("part", "softly", "merge")),
        ("(ours) softly keeps nine tenths", "", "part: softly - 0.9 apart",
         gap("part", "softly", "apart", 0.9))]
    text = RULE + "\n" + claims("pairs", [row for row in rows if len(row[-1]) == len(PAIRS)])
    columns = ["part", "first", "second", "body", "hits", "text"]
    more = ["both", "plain", *(f"missed {kind}" for kind in KINDS)]
    value = lambda how, column: shown(TABLE.by("pair", column, how=how).values())
    lines = [[how, len(set(TABLE.column("seed", how=how))), *(value(how, c) for c in columns),
              *("" if how == "apart" else value(how, c) for c in more)] for how in done]
    return text + ("\nMean of six pairs ± its standard error; a pair is the mean of its seeds. "
                   "Every thing is in two pairs, so the pairs are not quite independent.\n\n"
                   + markdown(["how", "seeds", *columns, *more], lines))


def plot(axes):
    """The paper's figure 8: the part against what other captions keep."""
    for how in COMBINE[1:]:
        if TABLE.column("part", how=how):
            (x, dx), (y, dy) = (mean_se(TABLE.by("pair", column, how=how).values())
                                for column in ("plain", "part"))
            axes.errorbar(x, y, dy, dx, fmt="o", capsize=2, label=how)
    axes.axhline(mean_se(TABLE.by("pair", "part", how="apart").values())[0], color="gray",
                 linestyle=":", label="apart")
    axes.set(xlabel="other captions with everything right", ylabel="part, both things (1 = real)",
             title="two things in one model, six pairs")
    axes.legend(fontsize=8)


@one_line
def main(argv):
    """Command line of the study."""
    args, made = parser(__doc__).parse_args(argv), []

    def with_bench(cell):
        made.append(made[0] if made else Bench())
        return [run_cell(cell, made[0])]
    cells = [{"pair": " + ".join(pair), "how": how, "seed": seed} for seed in range(args.seeds)
             for how in COMBINE for pair in PAIRS]
    run(args, TABLE, cells, with_bench)
    print(report())
    figure("custom_merge", plot)


if __name__ == "__main__":
    main()
