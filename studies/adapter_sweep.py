"""Where should an adapter stand? All twenty placements, then activation and scale

Claims (Xiang et al. 2023): (1) what an adapter reads matters, what it adds to hardly; (2) its
activation and scale hardly matter; (3) reading the output of cross-attention is best. As there, a
thing is learned from few pictures, with a prior of its category: `adapters.py learn --concept` on
assets/unet-scenes.pt, 150 steps of 8 + 8 pictures, adapters of 0.75 % of the U-Net (residual
placements: the nearest that a whole rank allows), and the new word learns too. Beside them LoRA on
keys and values with the same budget, all weights, and no training. The rate of each kind was chosen
on two other things (--tune), by alignment minus leak. Columns:
  alignment  contrast of the part (things.py) for three prompts: 0 no part, 1 real pictures
  body, hits likeness of the body's colour; share of pictures with part > 0.5 and body > 0.6
  leak       share of hits when the bare category is asked for, less that of the base
  bare       mean contrast of the part when the bare category is asked for, less that of the base
  at equal leak  alignment less b (leak - its mean), with the b of the analysis below
  plain      24 other captions: share with all attributes right
Analysis of variance: units are placements (mean over seeds, then over things), as runs of one are
alike. p: the share of 1,999 permutations with as large an F, of the placements, or where F is
adjusted for the other factor of what that one leaves. eta²: the factor's share of what it could
explain (partial). At equal leak: both factors and b times the leak of a placement explain its
alignment (analysis of covariance). By these rules a claim comes out / does not / is not decidable
here, with and without equal leak:
(1) p < 0.05 for what is read and not for what is added to, both adjusted / the reverse / else;
(2) no two levels of either differ by 0.1 in the mean / those of one do, with p < 0.05 / else;
(3) ca_out has the best mean, and is better than the other placements in transformer blocks, paired
over things, p < 0.05 / it is worse than these, p < 0.05 / else.
About 25 CPU-seconds a cell: 48 cells of rates, 402 of methods, 90 of activation and scale.

    python -m studies.adapter_sweep --tune          # first: rates, -> results/adapter_rates.csv
    python -m studies.adapter_sweep
"""
import itertools
import statistics

import numpy as np
import torch

import adapters
import custom_diffusion
import data
import sample
import worlds
from adapters import PLACEMENTS
from cli import one_line
from evaluate import prompt_accuracy
from models import base_task
from studies import things
from studies.common import (Table, difference, figure, markdown, parser, run, shown,
                            train_and_watch)
from studies.custom_concepts import folder_of
from train import load_data

BASE, STEPS, BUDGET = "assets/unet-scenes.pt", 150, 0.0075
METHODS = (*PLACEMENTS, "lora", "full")                 # "none" needs no second seed
FORMS = tuple(itertools.product(adapters.ACTIVATIONS, (0.5, 1.0, 2.0, 4.0)))
DATA = {}                                               # {seed: the base's data}, of one seed
CORNERS = ("ca_out-ffn_in", "sa_in-sa_in", "ffn_in-trans_out")      # where the forms are varied
RATES = {"lora": (3e-3, 1e-2, 3e-2, 1e-1), "full": (3e-4, 1e-3, 3e-3, 1e-2)}    # adapters: as lora
MEASURES = ("alignment", EQUAL := "at equal leak")
TABLE = Table("adapter_sweep", ["thing", "method", "activation", "scale", "seed"])
TUNED = Table("adapter_rates", ["thing", "method", "lr"])


@torch.no_grad()
def prediction_difference(unet, xt, t, context_a, context_b):
    """Where two prompts make the model predict differently: rms over channels, (B, H, W).
    xt (B, C, H, W) a noised picture, t (B,), contexts (B, L, D_ctx), such as those of "a photo of
    V* dog" and "a photo of dog". Source: Xiang et al. 2023 (its probe)."""
    difference = unet(xt, t, context_a) - unet(xt, t, context_b)                    # (B, C, H, W)
    return difference.float().square().mean(dim=1).sqrt()                           # (B, H, W)


def kind_of(method):
    """Methods that share a learning rate: lora, full, residual or transformer."""
    return method if method in RATES else "residual" if method[:3] == "res" else "transformer"


def rate_of(kind):
    """The rate of a kind with the largest alignment minus leak, mean over what was tuned."""
    rows = [row for row in TUNED.rows() if kind_of(row["method"]) == kind]
    if not rows:
        raise ValueError(f"{TUNED.path} has no rate of {kind}: run with --tune first")
    return max(sorted({row["lr"] for row in rows}), key=lambda lr: statistics.fmean(
        row["alignment"] - row["leak"] for row in rows if row["lr"] == lr))


def rates_text():
    """The rate of each kind that was tuned, among those tried."""
    rows, said = TUNED.rows(), []
    for kind in dict.fromkeys(kind_of(row["method"]) for row in rows):
        tried = sorted({row["lr"] for row in rows if kind_of(row["method"]) == kind})
        said.append(f"{kind} {rate_of(kind):g} (of {', '.join(f'{lr:g}' for lr in tried)})")
    return f"Rates, chosen on {' and '.join(things.TUNING)}: {'; '.join(said)}."


def task_of(cell, lr, steps=STEPS):
    """(config, dataset, task) as `learn` makes them, of adapters.py or custom_diffusion.py."""
    thing, method = cell["thing"], cell["method"]
    flags = ["--base", BASE, "--concept", folder_of(thing), "--category",
             things.THINGS[thing][0], "--steps", str(steps), "--lr", str(lr), "--weight-decay", "0",
             "--seed", str(cell.get("seed", 0)), "--device", "cpu"]
    if method == "full":
        module, Task = custom_diffusion, custom_diffusion.ConceptTask
        flags += ["--part", "all", "--no-augment"]
    else:
        module, Task = adapters, adapters.ThingTask
        flags += ["--adapter", CORNERS[0] if method == "none" else method, "--budget", str(BUDGET)]
    if method in PLACEMENTS and "activation" in cell:
        flags += ["--activation", cell["activation"], "--scale", str(cell["scale"])]
    options, config = module.read_flags(flags)
    if config.seed not in DATA:
        DATA.clear()
        DATA[config.seed] = load_data(config)
    torch.manual_seed(config.seed)
    dataset = DATA[config.seed]
    return config, dataset, Task(base_task(BASE), dataset, options, config)


class Bench:
    """Measures of a thing, and how the base itself does in those of the bare category."""

    def __init__(self, thing):
        base, self.category = base_task(BASE), things.THINGS[thing][0]
        base.model.eval().requires_grad_(False)
        self.judge = things.Judge(thing, base)
        test = data.load("scenes", split="test", count=400, seed=7).captions
        self.plain = [c for c in test if "relation" not in worlds.parse_caption(c)][:24]
        self.base = self.bare(base, base.model)

    def sample(self, task, model, prompts):
        """Pictures of prompts, uint8 (B, 3, H, W), from the same noise in every cell."""
        return sample.sample_all(task, model, task.tokenizer(prompts), steps=12)[1]

    def bare(self, task, model):
        """Share of hits and mean contrast of the part, for the bare category."""
        pictures = self.sample(task, model, [f"a {self.category}"] * 24)
        part, _ = self.judge(pictures)
        return self.judge.hits(pictures).float().mean().item(), part.mean().item()

    def measure(self, task, model):
        """The columns of one model."""
        thing = f"<new1> {self.category}"
        asked = [f"a {thing}", f"a large {thing} on gray", f"a small {thing} on navy"]
        pictures = self.sample(task, model, asked * 12)
        part, body = self.judge(pictures)
        (leak, bare), (base_leak, base_bare) = self.bare(task, model), self.base
        plain = prompt_accuracy(self.sample(task, model, self.plain), self.plain)["all"][0]
        return {"alignment": part.mean().item(), "body": body.mean().item(),
                "hits": self.judge.hits(pictures).float().mean().item(), "leak": leak - base_leak,
                "bare": bare - base_bare, "plain": plain}


def run_cell(cell, bench, steps=STEPS):
    """Train and measure one cell -> its row. A cell of TUNED has its rate, others that of RATES."""
    method = cell["method"]
    lr = cell.get("lr") or (0.001 if method == "none" else rate_of(kind_of(method)))
    config, dataset, task = task_of(cell, lr, steps)
    model, row = task.model, {"lr": lr, "params": 0, "s_per_step": 0.0}
    if method != "none":
        row["params"] = sum(p.numel() for p in model.denoiser.parameters() if p.requires_grad)
        (last,), model = train_and_watch(config, dataset, task, steps, lambda ema: {})
        row["s_per_step"] = last["cpu_s"] / steps
    return {**cell, **row, **bench.measure(task, model)}


def cells_of(seeds):
    """All runs: every method on a thing, then the next thing, then the next seed, then forms."""
    plain = [{"thing": thing, "method": method, "activation": "relu", "scale": 1.0, "seed": seed}
             for seed in range(seeds) for thing in things.SIX
             for method in (*METHODS, *["none"] * (seed == 0))]
    forms = [{"thing": things.SIX[0], "method": method, "activation": a, "scale": s, "seed": seed}
             for seed in range(2) for method in CORNERS for a, s in FORMS
             if seed >= seeds or (a, s) != ("relu", 1)]
    return plain + forms


def rates_to_try():
    """The cells of TUNED."""
    return [{"thing": thing, "method": method, "lr": lr} for thing in things.TUNING
            for method in (*CORNERS, "res_in-res_out", *RATES)
            for lr in RATES.get(method, RATES["lora"])]


# --------------------------------------------------------------------------------------------------
# analysis of variance

def design(n, factors, covariate=None):
    """What explains n numbers: a column of ones, one per level, and a covariate, (n, columns)."""
    levels = [[float(level == at) for level in levels] for levels in factors
              for at in dict.fromkeys(levels)]
    return np.array([[1.0] * n, *levels, *([] if covariate is None else [covariate])]).T


def effect(y, factor, *others, covariate=None, rounds=1999):
    """(F, p by permutation, partial eta squared) of a factor, adjusted for the others.

    y: n numbers; factor, others: the level of each; covariate: n numbers that are held equal. Two
    least-squares fits with a number per level, without and with the factor, leave the sums of
    squares S0 and S1: F = ((S0 - S1) / df1) / (S1 / df2), eta^2 = (S0 - S1) / S0. What the others
    leave is permuted. Source: Fisher 1925; Freedman & Lane 1983. Raises ValueError where the factor
    cannot be told from the others.
    """
    y = np.array(y, dtype=float)

    def left_over(factors):     # the projection on what the factors do not explain, (n, n)
        X = design(len(y), factors, covariate)
        return np.eye(len(y)) - X @ np.linalg.pinv(X)
    without, whole = left_over(others), left_over([factor, *others])
    df1, df2 = round(np.trace(without - whole)), round(np.trace(whole))
    if df1 < 1 or df2 < 1:
        raise ValueError(f"{len(y)} values do not tell this factor from the others")

    def sums(rows):             # (rounds, n) -> S0, S1 (rounds,)
        return [((rows @ projection) * rows).sum(-1) for projection in (without, whole)]
    rng, residual = np.random.default_rng(0), y @ without
    shuffled = [rng.permutation(residual) for _ in range(rounds)]
    S0, S1 = sums(np.array([residual, *shuffled]))
    eta = (S0 - S1) / S0                                    # grows with F
    return (S0[0] - S1[0]) / df1 / (S1[0] / df2), (eta >= eta[0] - 1e-9).mean(), eta[0]


def rank_correlation(a, b):
    """Spearman's, of two sequences without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def slope(y, covariate, *factors):
    """b of the covariate, where the factors explain y too."""
    return float((np.linalg.pinv(design(len(y), factors, covariate)) @ np.array(y))[-1])


def whole_rounds():
    """The rows, ReLU and scale 1, of every thing and seed that all methods have, with EQUAL."""
    rows = [row for row in TABLE.rows() if (row["activation"], row["scale"]) == ("relu", 1)]
    done = {}
    for row in rows:
        done.setdefault((row["thing"], row["seed"]), set()).add(row["method"])
    rows = [row for row in rows if done[row["thing"], row["seed"]] >= {*METHODS}]
    if rows:
        y, leak = (placement_means(rows, column) for column in ("alignment", "leak"))
        b = slope(y, leak, *zip(*(p.split("-") for p in PLACEMENTS)))
        mean = statistics.fmean(leak)
        rows = [{**row, EQUAL: row["alignment"] - b * (row["leak"] - mean)} for row in rows]
    return rows


def by_thing(rows, column, *methods):
    """{thing: mean of a column over the methods' rows}."""
    groups = {}
    for row in rows:
        if row["method"] in methods:
            groups.setdefault(row["thing"], []).append(row[column])
    return {thing: statistics.fmean(values) for thing, values in groups.items()}


def placement_means(rows, column, placements=PLACEMENTS):
    """The mean of a column over things, per placement."""
    return [statistics.fmean(by_thing(rows, column, p).values()) for p in placements]


def method_table(rows):
    """A line per method; units are things."""
    columns, lines = ("alignment", "body", "hits", "leak", "bare", EQUAL, "plain"), []
    for method in (*METHODS, "none"):
        if mine := [row for row in rows if row["method"] == method]:
            lines.append([method, mine[0]["params"], f"{mine[0]['lr']:g}",
                          f"{statistics.fmean(row['s_per_step'] for row in mine):.3f}",
                          *(shown(by_thing(rows, c, method).values()) for c in columns)])
    return markdown(["method", "trained", "lr", "s/step", *columns], lines)


def variance_table(rows):
    """F, p, partial eta squared of input and output -> (text, {(column, factor): adjusted p})."""
    lines, found = [], {}
    some = [p for p in PLACEMENTS if p[:3] != "res"]
    for column, (many, placements) in itertools.product(
            MEASURES, (("all 20", PLACEMENTS), ("17, no residual", some))):
        y = placement_means(rows, "alignment", placements)
        leak = placement_means(rows, "leak", placements) if column == EQUAL else None
        read, add = zip(*(p.split("-") for p in placements))
        for name, factor, other in (("read from", read, add), ("added to", add, read)):
            alone, adjusted = (effect(y, factor, *also, covariate=leak) for also in ((), (other,)))
            found.setdefault((column, name), adjusted[1])       # of all placements
            lines.append([column, many, name,
                          *(f"{v:.2f}" if k != 1 else f"{v:.2g}" for one in (alone, adjusted)
                            for k, v in enumerate(one))])
    return markdown(["of", "placements", "factor", "F", "p", "eta²", "F adjusted", "p", "eta²"],
                    lines), found


VERDICT = {True: "comes out", False: "**does not**", None: "not decidable here"}


def claim_of_the_input(p):
    """Rule (1). p: {"read from": p, "added to": p}."""
    read, add = p["read from"] < 0.05, p["added to"] < 0.05
    return None if read == add else read


def claim_of_the_forms(spreads, ps):
    """Rule (2). spreads: largest difference of level means, per factor; ps: its p."""
    if max(spreads) < 0.1:
        return True
    return False if any(s >= 0.1 and p < 0.05 for s, p in zip(spreads, ps)) else None


def claim_of_the_best(rows, column):
    """Rule (3) -> (verdict, text)."""
    blocks = [p for p in PLACEMENTS if p[:3] != "res"]
    mine = [p for p in blocks if p.startswith("ca_out")]
    a, b = by_thing(rows, column, *mine), by_thing(rows, column, *(set(blocks) - set(mine)))
    levels = {read: statistics.fmean(placement_means(rows, column, group)) for read, group in
              ((r, [p for p in PLACEMENTS if p.split("-")[0] == r]) for r in adapters.LEGAL)}
    best = max(levels, key=levels.get)
    text = (f"best input {best} ({levels[best]:.2f}; ca_out {levels['ca_out']:.2f}, worst "
            f"{min(levels, key=levels.get)} {min(levels.values()):.2f})")
    if len(a) < 2:
        return None, text
    gap, error, _, p = difference(a, b)
    verdict = None if p >= 0.05 or (gap > 0 and best != "ca_out") else gap > 0
    return verdict, f"{text}; ca_out minus the others {gap:+.2f} ± {error:.2f} (p {p:.2g})"


def forms_text():
    """Activation and scale, whose units are the forms at each of three placements."""
    cells = {}
    for row in TABLE.rows():
        if row["method"] in CORNERS and row["thing"] == things.SIX[0] and row["seed"] < 2:
            form = row["method"], row["activation"], row["scale"]
            cells.setdefault(form, []).append(row)
    if len(cells) < len(CORNERS) * len(FORMS) or min(map(len, cells.values())) < 2:
        return ""
    places, activations, scales = zip(*cells)
    text = (f"\nActivation and scale: {things.SIX[0]}, {len(cells)} forms at three placements, "
            "mean of two seeds each; F is adjusted for the other and the placement.\n\n")
    y, leak = ([statistics.fmean(row[column] for row in rows) for rows in cells.values()]
               for column in ("alignment", "leak"))
    b = slope(y, leak, *zip(*cells))
    equal = [a - b * (l - statistics.fmean(leak)) for a, l in zip(y, leak)]
    for column, covariate, shown_y in zip(MEASURES, (None, leak), (y, equal)):
        said, spreads, ps = [], [], []
        for name, factor, other in (("activation", activations, scales),
                                    ("scale", scales, activations)):
            F, p, eta = effect(y, factor, other, places, covariate=covariate)
            means = {at: statistics.fmean(v for v, level in zip(shown_y, factor) if level == at)
                     for at in dict.fromkeys(factor)}
            said.append(f"{name}: F {F:.2f}, p {p:.2g}, eta² {eta:.2f} ("
                        + ", ".join(f"{at} {m:.2f}" for at, m in means.items()) + ")")
            spreads.append(max(means.values()) - min(means.values()))
            ps.append(p)
        text += (f"- {column}: {'; '.join(said)}. Claim (2): "
                 f"{VERDICT[claim_of_the_forms(spreads, ps)]}.\n")
    return text


def report():
    """The table of methods, the analysis of variance on placements, and the verdicts."""
    rows = whole_rounds() if TABLE.rows() and "thing" in TABLE.rows()[0] else []
    if not rows:
        return ""
    names = list(dict.fromkeys(row["thing"] for row in rows))
    variance, ps = variance_table(rows)
    counts = sorted({len({row["seed"] for row in rows if row["thing"] == n}) for n in names})
    seeds = "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))      # of a thing
    text = (f"{len(names)} things ({', '.join(names)}), {seeds} seeds; "
            f"± is the standard error over things. {rates_text()}\n\n"
            + method_table(rows) + "\n"
            + variance + "\n")
    for column in MEASURES:
        first = claim_of_the_input({f: ps[column, f] for f in ("read from", "added to")})
        third, said = claim_of_the_best(rows, column)
        text += (f"- {column}: claim (1) {VERDICT[first]}. Claim (3) {VERDICT[third]}: {said}.")
        if len(names) > 1:
            y = [[by_thing(rows, column, p)[name] for p in PLACEMENTS] for name in names]
            pairs = [rank_correlation(a, b) for a, b in itertools.combinations(y, 2)]
            text += (f" The placements' ranks of two things correlate at "
                     f"{statistics.fmean(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f}).")
        text += "\n"
    return text + forms_text()


def plot(panels):
    """Means of the placements over things, by input and by output; hollow: at equal leak."""
    if not (rows := whole_rounds()):
        return
    for k, (axes, what) in enumerate(zip(panels, ("read from", "added to"))):
        levels = list(dict.fromkeys(p.split("-")[k] for p in PLACEMENTS))
        for column, face in zip(MEASURES, ("C0", "none")):
            axes.plot([levels.index(p.split("-")[k]) for p in PLACEMENTS],
                      placement_means(rows, column), "o", mfc=face, mec="C0", label=column)
        for method, color in (("full", "C2"), ("lora", "C3")):
            axes.axhline(statistics.fmean(by_thing(rows, "alignment", method).values()),
                         color=color, ls="--", lw=1, label=f"{method}, alignment")
        axes.set_xticks(range(len(levels)), levels, rotation=45)
        axes.set(xlabel=what, title="twenty placements, mean over things")
    panels[0].set_ylabel("contrast of the part (0 none, 1 real)")
    panels[0].legend(fontsize=8)


@one_line
def main(argv):
    """Command line of the study."""
    p, made = parser(__doc__), {}
    p.add_argument("--tune", action="store_true", help="measure the rates, and stop")
    args = p.parse_args(argv)

    def with_bench(cell):
        if cell["thing"] not in made:
            made.clear()
            made[cell["thing"]] = Bench(cell["thing"])
        return [run_cell(cell, made[cell["thing"]])]
    if args.tune:
        run(args, TUNED, rates_to_try(), with_bench)
        return print(rates_text())
    run(args, TABLE, cells_of(args.seeds), with_bench)
    print(report())
    if whole_rounds():
        figure("adapter_sweep", plot, (9, 3.4), 2, sharey=True)


if __name__ == "__main__":
    main()
