"""What the studies share: one way to train, a table of results, statistics, text and figures.

A study is a list of cells, such as one model with one seed. A finished cell adds its rows to a CSV
in studies/results, so a study that was stopped goes on with the same command. `--part 0/2` and
`--part 1/2` divide one between two processes; train its first stage before, with one of them.
Cell (model, seed k) is the run of `python train.py --model ... --first-stage FILE --seed k`.

    python -m studies.dit_conditioning              # run what is left, print table, plot figure
    python -m studies.dit_conditioning --summary    # only table and figure, from the CSV
    python -m studies.report                        # write studies/README.md from all CSVs
"""
import argparse
import csv
import dataclasses
import functools
import math
import os
import pathlib
import random
import re
import statistics
import time

import torch
from tqdm import tqdm

import train
from adapters import incomplete_beta
from models import make_task, resolve_first_stage

RESULTS = pathlib.Path(__file__).parent / "results"


def setup(model, out, on=("--device", "cpu"), **flags):
    """(config, dataset, task) as `python train.py --model MODEL ...` has them.

    flags: those of train.py, {name: value}; on: those that say where, as words. A first stage that
    is to be new is trained once, with seed 0, in OUT/first_stage, and then used by all runs, as
    --first-stage FILE does.
    """
    argv = ["--model", model, *on, "--out", f"{out}/unused"]
    for name, value in flags.items():
        word = ("no-" if value is False else "") + name.replace("_", "-")
        argv += [f"--{word}"] + ([] if isinstance(value, bool) else [str(value)])
    config, settings = train.read_flags(argv)
    resolve_first_stage(config, settings)
    if getattr(settings, "first_stage", "") == "new":
        shared = dataclasses.replace(config, out=str(out), seed=0)
        settings.first_stage = train.train_first_stage(shared, settings, train.load_data(shared))
    dataset = train.load_data(config)
    return config, dataset, make_task(config, settings, dataset)


def train_and_watch(config, dataset, task, every, measure):
    """Train, and measure(averaged model) -> dict every so many steps -> (rows, averaged model).

    A row has the step, the CPU seconds of training until then, and what was measured.
    """
    step, rows, cpu = train.make_step(config, dataset, task), [], 0.0
    for s in tqdm(range(config.steps), leave=False, unit="step"):
        begin = time.process_time()
        step(s)
        cpu += time.process_time() - begin
        if (s + 1) % every == 0 or s + 1 == config.steps:
            rows.append({"step": s + 1, "cpu_s": round(cpu, 2), **measure(step.ema)})
    return rows, step.ema


@torch.no_grad()
def heldout_loss(task, model, x0, y, levels=8, seed=0):
    """Loss on pictures x0 (N, C, H, W) that were not trained on, at fixed times and noise.

    Times are the middles of `levels` equal parts of [0, 1000]; the same for every model.
    """
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    losses = []
    for k in range(levels):
        t = torch.full((len(x0),), 1000 * (k + 0.5) / levels)
        for rows in torch.arange(len(x0)).split(100):
            loss, _ = task.process.loss(model, x0[rows], y[rows], t=t[rows], eps=eps[rows])
            losses.append(loss.item() * len(rows))
    return math.fsum(losses) / (levels * len(x0))


# --------------------------------------------------------------------------------------------------
# the table and the command

class Table:
    """studies/results/NAME.csv. keys: the columns that name a cell. Numbers come back as such."""

    def __init__(self, name, keys, folder=None):
        self.name, self.keys, self.folder = name, keys, folder

    @property
    def path(self):
        return pathlib.Path(self.folder or RESULTS) / f"{self.name}.csv"

    def rows(self):
        """All rows so far, a list of dicts."""
        if not self.path.is_file():
            return []
        state = self.path.stat()
        return _read(self.path, state.st_mtime_ns, state.st_size)

    def __contains__(self, cell):
        return any(all(_same(row[k], cell[k]) for k in self.keys) for row in self.rows())

    def add(self, *rows):
        """Append the rows of one cell in one write: a kill loses the running cell and no other."""
        new = not self.path.is_file()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**row, "edition": 2} for row in rows]          # 2: every seed has its own noise
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            text = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                    for row in rows]
            writer.writerows([*([dict(zip(rows[0], rows[0]))] if new else []), *text])
            file.flush()
            os.fsync(file.fileno())

    def column(self, name, **where):
        """The values of a column in the rows that match."""
        return [row[name] for row in self.rows() if all(_same(row[k], where[k]) for k in where)]

    def by(self, unit, name, **where):
        """{value of the column `unit`: mean of the column `name`} over the rows that match."""
        groups = {}
        for key, value in zip(self.column(unit, **where), self.column(name, **where)):
            groups.setdefault(key, []).append(value)
        return {key: statistics.fmean(values) for key, values in groups.items()}


@functools.lru_cache(64)
def _read(path, changed, size):
    """Rows of a CSV; kept until the file changes."""
    with open(path, newline="") as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _same(stored, asked):
    return stored == asked or str(stored) == str(asked)         # 1.0 is stored as 1


def _number(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


FLAGS = {"part": (dict(default="0/1"), "i/n: this process takes cells i, i+n, ... (default 0/1)"),
         "seeds": (dict(default=3), "how many seeds (default 3)"),
         "summary": (dict(action="store_true"), "only table and figure, from the CSV"),
         "threads": (dict(default=1), "threads of this process (default 1)")}


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is a ValueError, which cli.one_line prints as one line."""

    def error(self, message):
        raise ValueError(f"{message} (see --help)")

    def parse_args(self, argv):
        """Raises ValueError also for flags that --summary and --tune leave unread."""
        args = super().parse_args(argv)
        unread = [word for word in argv if word[:2] == "--" and word != "--summary"]
        if getattr(args, "summary", False) and unread:
            self.error(f"{unread[0]} is not read with --summary, which runs nothing")
        if getattr(args, "tune", False) and "--seeds" in [word.partition("=")[0] for word in argv]:
            self.error("--seeds is not read with --tune, which has a seed of its own")
        return args


def parser(description, flags=tuple(FLAGS)):
    """The flags that a study takes, of FLAGS; it may add others."""
    p = Parser(description=description, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {"part": part, "seeds": whole, "threads": whole}
    for name in flags:
        how, help = FLAGS[name]
        p.add_argument(f"--{name}", help=help, **how,
                       **{"type": kinds[name]} if name in kinds else {})
    return p


def whole(text):
    """A whole number of at least 1, for a flag."""
    if not re.fullmatch(r"0*[1-9]\d{0,6}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def part(text):
    """i/n, for --part."""
    if not re.fullmatch(r"\d+/\d+", text) or not int(text.split("/")[0]) < int(text.split("/")[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: give i/n with i below n, such as 0/2 and 1/2")
    return text


def todo(cells, table, part):
    """The cells of this part that the table does not hold yet, with a progress bar."""
    i, n = map(int, part.split("/"))
    left = [cell for k, cell in enumerate(cells) if k % n == i and cell not in table]
    for cell in tqdm(left, desc=table.name, unit="cell"):
        tqdm.write(f"{table.name}: {cell}")
        yield cell


def run(args, table, cells, run_cell):
    """Run the cells that the table lacks: run_cell(cell) -> its rows. With --summary, none."""
    torch.set_num_threads(args.threads)
    for cell in () if args.summary else todo(cells, table, args.part):
        table.add(*run_cell(cell))


# --------------------------------------------------------------------------------------------------
# statistics, text, figures

def mean_se(values):
    """(mean, standard error of the mean); the error of a single value is nan."""
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def bootstrap(differences, draws=10_000, seed=0):
    """95 % interval of the mean of paired differences, by resampling the pairs -> (low, high)."""
    rng, n = random.Random(seed), len(differences)
    means = sorted(statistics.fmean(rng.choices(differences, k=n)) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def shown(values, digits=2, scale=1, unit=""):
    """ "mean ± standard error" of values times scale; without an error if there is one value."""
    mean, error = (scale * v for v in mean_se(values))
    return f"{mean:.{digits}f}{unit if math.isnan(error) else f' ± {error:.{digits}f}{unit}'}"


def difference(a, b):
    """Paired difference of two {unit: value}: (mean of a - b, standard error, t, p of the t-test).

    Raises ValueError if fewer than two units are in both.
    """
    gaps = [a[unit] - b[unit] for unit in a if unit in b]
    if len(gaps) < 2:
        raise ValueError(f"fewer than two units are in both: {sorted(a)} and {sorted(b)}")
    (mean, error), df = mean_se(gaps), len(gaps) - 1
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    return mean, error, t, incomplete_beta(df / (df + t * t), df / 2, 0.5)


def interval(values, miss=0.05):
    """(mean, low, high): the t interval, which misses the true mean with probability `miss`.

    values: of independent units. Raises ValueError for fewer than two.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs two units, not {len(values)}")
    (mean, error), t = mean_se(values), student(len(values) - 1, miss)
    return mean, mean - t * error, mean + t * error


@functools.cache
def student(df, miss):
    """Which |t| of Student's t is exceeded with probability `miss`; by halving, hence kept."""
    low, high = 0.0, 1e9
    for _ in range(80):
        t = (low + high) / 2
        beyond = incomplete_beta(df / (df + t * t), df / 2, 0.5)    # chance of a larger |t|
        low, high = (t, high) if beyond > miss else (low, t)
    return low


RULE = """A claim **comes out** if the whole interval is above 0, and **does not** if it is below;
else it is *not decidable here*. The interval is that of Student's t over the units, so wide that
all intervals of one table hold at once in 19 cases of 20 (Bonferroni).
"""


def claims(unit, rows):
    """The verdicts of a study as a table.

    unit: what the units are, such as "things". rows: [(the paper's sentence, its numbers, what
    should be above 0, {unit: that} or a list)]. Source: RULE.
    """
    lines = []
    for sentence, numbers, gap, values in rows:
        values = list(values.values()) if isinstance(values, dict) else list(values)
        mean, low, high = interval(values, 0.05 / len(rows))
        verdict = ("**comes out**" if low > 0 else "**does not**" if high < 0 else
                   "not decidable here")
        lines.append([sentence, numbers, gap, f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]",
                      len(values), verdict])
    return markdown(["the paper", "its numbers", "above 0?", "ours", unit, "verdict"], lines)


def compared(a, b, digits=3, scale=1):
    """The same as text, "+0.017 ± 0.004 (t 4.5)"; bold if p < 0.05."""
    mean, error, t, p = difference(a, b)
    text = f"{scale * mean:+.{digits}f} ± {scale * error:.{digits}f} (t {t:.1f})"
    return f"**{text}**" if p < 0.05 else text


def markdown(header, rows):
    """A table as text."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def figure(name, plot, size=(5, 4), panels=1, **options):
    """studies/results/NAME.png by plot(axes), or plot(list of them) for several panels.

    options: of Figure.subplots.
    """
    from matplotlib.figure import Figure        # not pyplot, whose backend belongs to the caller
    fig = Figure(figsize=size, dpi=90)
    axes = fig.subplots(1, panels, squeeze=False, **options)
    plot(axes[0][0] if panels == 1 else axes[0])
    fig.tight_layout()
    fig.savefig(RESULTS / f"{name}.png")
