"""What the studies share: a table that survives a kill, one way to train, one held-out loss, and statistics.

A study is a list of cells (variant, seed, ...). Each finished cell adds rows to a CSV in studies/results, so a study
that was stopped goes on with the same command; `--part 0/2` and `--part 1/2` share one between two processes.

    python -m studies.dit_conditioning              # for example; every study says what it asks and what it costs
"""
import argparse
import csv
import dataclasses
import math
import os
import pathlib
import random
import statistics
import time

import torch
from tqdm import tqdm

import data
from tasks import TASKS, build_first_stage, describe, task_name
from train import Config, prepare_run, step_maker, train_first_stage

RESULTS = pathlib.Path(__file__).parent / "results"


class Table:
    """studies/results/NAME.csv. keys: the columns that name a cell. Numbers come back as floats."""

    def __init__(self, name, keys, folder=None):
        self.path, self.keys = pathlib.Path(folder or RESULTS) / f"{name}.csv", keys
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self):
        """All rows so far, a list of dicts."""
        if not self.path.is_file():
            return []
        with open(self.path, newline="") as file:
            return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]

    def __contains__(self, cell):
        return any(all(_same(row[k], cell[k]) for k in self.keys) for row in self.rows())

    def add(self, *rows):
        """Append the rows of one cell in one write: a kill loses the cell that is running, never part of one."""
        new = not self.path.is_file()
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            text = [] if not new else [dict(zip(rows[0], rows[0]))]
            writer.writerows([*text, *({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                                       for row in rows)])
            file.flush()
            os.fsync(file.fileno())

    def column(self, name, **where):
        """The values of a column in the rows that match."""
        return [row[name] for row in self.rows() if all(_same(row[k], v) for k, v in where.items())]


def _same(stored, asked):
    return stored == asked or str(stored) == str(asked)         # 1.0 is stored as 1


def _number(text):
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


def parser(description):
    """The flags that every study takes."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", default="0/1", help="this process takes cells i, i+n, ... of the study: i/n (default 0/1)")
    p.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    p.add_argument("--summary", action="store_true", help="only redraw table and figure from the CSV")
    p.add_argument("--threads", type=int, default=1, help="threads of this process (default 1; two processes beat two)")
    return p


def todo(cells, table, part):
    """The cells of this part that the table does not hold yet, with a progress bar."""
    i, n = map(int, part.split("/"))
    left = [cell for k, cell in enumerate(cells) if k % n == i and cell not in table]
    for cell in tqdm(left, desc=table.path.stem, unit="cell"):
        tqdm.write(f"{table.path.stem}: {cell}")
        yield cell


def setup(model, out, build=None, **flags):
    """(config, dataset, task) as train.py would make them; a tiny first stage is trained once, in OUT/first_stage.

    flags: fields of train.Config. build(config, info, first_stage) -> task: for a model that train.py has no name for.
    """
    config = prepare_run(Config(model=model, out=f"{out}/nothing", device="cpu", **flags))     # a study saves no models
    dataset = data.load(config.data, config.image_size, "train", config.data_dir, seed=0)
    if config.first_stage == "tiny":                            # one first stage for all seeds of the study
        config.first_stage = train_first_stage(dataclasses.replace(config, out=str(out), seed=0), dataset)
    first_stage = build_first_stage(config, dataset.images.shape[1])
    info = describe(dataset, config, first_stage)
    torch.manual_seed(config.seed)
    task = (build or TASKS[task_name(model)])(config, info, first_stage)
    return config, task.prepare(dataset, "cpu"), task           # prepared first: it may set the latents' scale


def train_and_watch(config, dataset, task, every, measure):
    """Train, and measure(average) -> dict every so many steps -> (rows, average).

    A row has the step, the CPU seconds of the training so far (without the measuring), and what was measured.
    """
    run, _, ema = step_maker(config, dataset, task)
    rows, cpu = [], 0.0
    for step in tqdm(range(config.steps), leave=False, unit="step"):
        start = time.process_time()
        run(step)
        cpu += time.process_time() - start
        if (step + 1) % every == 0 or step + 1 == config.steps:
            rows.append({"step": step + 1, "cpu_s": round(cpu, 2), **measure(ema)})
    return rows, ema


@torch.no_grad()
def heldout_loss(task, model, x0, y, levels=8, seed=0):
    """Loss on pictures x0 (N, C, H, W) that were not trained on, at fixed times and noise, the same for every model.

    Times are the middles of `levels` equal parts of [0, 1000].
    """
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    losses = []
    for k in range(levels):
        t = torch.full((len(x0),), 1000 * (k + 0.5) / levels)
        losses += [task.process.loss(model, x0[i:i + 100], y[i:i + 100], t[i:i + 100], eps[i:i + 100])[0].item()
                   for i in range(0, len(x0), 100)]
    return statistics.fmean(losses)


def mean_se(values):
    """(mean, standard error of the mean); the error of a single value is nan."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def bootstrap(differences, draws=10_000, seed=0):
    """95 % interval of the mean of paired differences, by resampling the pairs -> (low, high)."""
    rng = random.Random(seed)
    means = sorted(statistics.fmean(rng.choices(differences, k=len(differences))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def write_markdown(name, header, rows, note=""):
    """studies/results/NAME.md: a table that can be pasted into the README; also printed."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(v) for v in row) + " |" for row in rows]
    text = "\n".join(lines) + "\n" + (f"\n{note}\n" if note else "")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def figure(name, draw, size=(5, 4), panels=1, **options):
    """studies/results/NAME.png: draw(axes), or draw(a list of them) for several panels; options of Figure.subplots."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=size, dpi=90)
    axes = fig.subplots(1, panels, squeeze=False, **options)
    draw(axes[0][0] if panels == 1 else axes[0])
    fig.tight_layout()
    fig.savefig(RESULTS / f"{name}.png")
