"""Runs that are killed or stopped at any moment: nothing saved is lost, nothing half-written stays.

A server process imports everything once, and forks a clean process for each run. Such a run draws
no plot and counts no operations: that would be three quarters of its time, with few moments at
which anything is saved.
"""
import contextlib
import csv
import io
import multiprocessing
import os
import random
import re
import signal
import sys
import time

import pytest
import torch
import torch._dynamo        # once, in the server: a run would need a second for it

import data
import folders
import tasks
import train
from checkpoint import load_checkpoint, save_checkpoint
from conftest import ROOT

pytestmark = pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(),
                                reason="needs fork")
TINY = ["--model", "DiT-32x1/4", "--image-size", "8", "--batch-size", "4", "--log-every", "1",
        "--device", "cpu", "--lr-decay", "constant", "--precision", "float32"]


@pytest.fixture(autouse=True, scope="module")
def server(tmp_path_factory):
    """The process that imports everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        Run.context.set_forkserver_preload(["test_kills"])
        Run(tmp_path_factory.mktemp("server"), ["--help"]).wait()


def work(err, argv, hook):
    """What the process of a run does: train.main(argv) after hook(), stderr to the file `err`."""
    file, code = open(err, "w", buffering=1), 99            # 99: a traceback
    os.dup2(file.fileno(), 2)
    sys.stderr, sys.stdout = file, open(os.devnull, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    tasks.DiffusionTask.examples = lambda task: (torch.zeros(2, dtype=torch.int64), None)
    tasks.macs, train.plot_loss = lambda task: 0, lambda table, path: path.write_text("a plot")
    try:
        if hook:
            hook[0](*hook[1:])
        train.main(argv)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    finally:
        file.flush()
        os._exit(code)


class Run:
    """A process that trains. hook: (function, arguments ...), called in it first."""
    context = multiprocessing.get_context("forkserver")

    def __init__(self, folder, argv, *hook):
        self.err = folder / f"err{len(list(folder.glob('err*')))}"
        self.err.touch()
        self.process = self.context.Process(target=work, args=(self.err, argv, hook))
        self.process.start()
        self.pid = self.process.pid

    def wait(self, seconds=60):
        """Its exit code, -n for a kill by signal n."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"the process did not end: {self.said()}")
        return self.process.exitcode

    def said(self):
        """Its lines on stderr, without those of the progress bar."""
        text = self.err.read_text().replace("\r", "\n").split("\n")
        bar = re.compile(r"(step|it|batch)/s|s/(step|it|batch)")        # the second if it is slow
        return [line for line in text if line and not bar.search(line)]


def log(out):
    """The steps in log.csv, after a check that each row is whole."""
    rows = list(csv.reader(io.StringIO((out / "log.csv").read_text())))
    assert not rows or rows[0][:2] == ["step", "loss"]
    for row in rows[1:]:
        assert len(row) == len(rows[0]) and all(float(number) is not None for number in row)
    return [int(row[0]) for row in rows[1:]]


def test_a_run_survives_kills_at_any_moment(tmp_path, pictures):
    """SIGKILL twelve times, at moments from the start to the last step; then the run ends well."""
    out, chosen = tmp_path / "run", random.Random(0)
    argv = [*TINY, "--data", f"folder:{pictures}", "--out", str(out), "--first-stage", "new",
            "--factor", "2", "--first-stage-steps", "3", "--sample-every", "7", "--save-every", "3"]
    started = time.perf_counter()
    assert Run(tmp_path, [*argv, "--out", str(tmp_path / "whole"), "--steps", "9"]).wait() == 0
    span, steps, last, resumed = time.perf_counter() - started, 21, 0, 0
    for kill in range(12):
        begun = any((out / name / "ckpt.pt").is_file() for name in (".", "first_stage"))
        # before the first checkpoint the same command starts again, with --resume and without
        again = ["--resume"] * (begun or kill % 2 and out.is_dir())
        run = Run(tmp_path, [*argv, "--steps", str(steps), *again])
        time.sleep(span * chosen.uniform(0, 1))
        with contextlib.suppress(ProcessLookupError):       # it has ended already
            os.kill(run.pid, signal.SIGKILL)
        code = run.wait()
        assert code == -signal.SIGKILL or code == 0, run.said()
        if (out / "ckpt.pt").is_file():
            state = load_checkpoint(out / "ckpt.pt")
            assert last <= state["step"] <= steps
            assert all(w.isfinite().all() for w in state["model"].values())
            resumed += state["step"] > last
            last = state["step"]
            if last == steps:
                steps += 21
    assert resumed, "no kill came after a new checkpoint"
    assert Run(tmp_path, [*argv, "--steps", str(steps), "--resume"]).wait() == 0
    assert load_checkpoint(out / "ckpt.pt")["step"] == steps
    assert log(out) == list(range(1, steps + 1))            # no row was lost, none is there twice
    assert not list(out.glob("*.part"))


def saving(path, said):
    """Save one checkpoint after the other, and say the number of each."""
    torch.set_num_threads(1)
    for i in range(10 ** 6):
        save_checkpoint(path, {"i": i, "x": torch.full((500_000,), float(i))})
        said.send(i)


def test_a_checkpoint_survives_kills_while_it_is_written(tmp_path):
    path = tmp_path / "ckpt.pt"
    for wait in (0.0, 0.013, 0.029, 0.05, 0.083):
        hear, said = Run.context.Pipe(duplex=False)
        run = Run.context.Process(target=saving, args=(path, said))
        run.start()
        for _ in range(3):
            assert hear.poll(60) and hear.recv() >= 0
        time.sleep(wait)
        run.kill()
        run.join()
        state = load_checkpoint(path)
        assert (state["x"] == state["i"]).all()


def test_a_kill_right_after_resume_loses_no_row(tmp_path, pictures):
    out = tmp_path / "run"
    argv = [*TINY, "--data", f"folder:{pictures}", "--out", str(out), "--first-stage", "none"]
    assert Run(tmp_path, [*argv, "--steps", "6"]).wait() == 0
    for step in (0, 1):                                     # before the first step, and after it
        run = Run(tmp_path, [*argv, "--steps", "9", "--resume"], killed_at, step)
        assert run.wait() == -signal.SIGKILL
        assert log(out) == [1, 2, 3, 4, 5, 6]


def killed_at(step):
    """Let the process kill itself when log.csv is ready (0), or before its first row (1)."""
    real, die = train.begin_files, lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    train.begin_files = lambda *args: real(*args) or step or die()
    train.add_row = die


WHERE = {       # a moment -> (what runs then, what the run has saved when it is stopped there)
    "loading": ("train.load_data", None), "first stage": ("tasks.AutoencoderTask.loss", "stage"),
    "encoding": ("tasks.DiffusionTask.prepare", None), "step": ("tasks.DiffusionTask.loss", "run"),
    "save": ("tasks.save_checkpoint", "run"), "row": ("train.add_row", "run"),
    "preview": ("tasks.DiffusionTask.sample", "run"), "plot": ("train.plot_loss", "run")}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
@pytest.mark.parametrize("where", WHERE)
def test_a_signal_saves_and_leaves_one_line(tmp_path, pictures, where, signum):
    name, saved = WHERE[where]
    out = tmp_path / "run"
    argv = [*TINY, "--data", f"folder:{pictures}", "--out", str(out), "--first-stage",
            "new" if where in ("first stage", "encoding") else "none", "--steps", "5000",
            "--sample-every", "2", "--save-every", "3"]
    argv += ["--factor", "2", "--first-stage-steps", "4"] * (where in ("first stage", "encoding"))
    run = Run(tmp_path, argv, signalled, name, [signum])
    assert run.wait() == 128 + signum, run.said()
    words = [line for line in run.said() if not line.startswith("reading")]
    assert len(words) == 1 and words[0].startswith("stopped"), words
    if saved:
        folder = out / "first_stage" if saved == "stage" else out
        state = load_checkpoint(folder / "ckpt.pt")
        assert "--resume" in words[0] and log(folder)[-1] == state["step"] >= 1
    if signum == signal.SIGINT:
        return
    # the same command goes on, or starts again
    begun = any((out / name / "ckpt.pt").is_file() for name in (".", "first_stage"))
    done = Run(tmp_path, [*argv[:argv.index("5000")], "4", *argv[argv.index("5000") + 1:],
                          *["--resume"] * begun])
    assert done.wait() == 0, done.said()


@pytest.mark.parametrize("where", ["step", "preview"])
def test_a_second_signal_ends_at_once(tmp_path, pictures, where):
    out = tmp_path / "run"
    argv = [*TINY, "--data", f"folder:{pictures}", "--out", str(out), "--first-stage", "none",
            "--steps", "5000", "--sample-every", "2"]
    run = Run(tmp_path, argv, signalled, WHERE[where][0], [signal.SIGINT, signal.SIGINT])
    assert run.wait() == 130 and "Traceback" not in run.err.read_text()
    if where == "preview":                                  # which is saved before it is drawn
        assert load_checkpoint(out / "ckpt.pt")["step"] == 2


def signalled(name, signals):
    """Let the function `name` send these signals to its own process when it is called first."""
    module, *path = name.split(".")
    owner = {"train": train, "tasks": tasks, "folders": folders}[module]
    for part in path[:-1]:
        owner = getattr(owner, part)
    real, left = getattr(owner, path[-1]), list(signals)

    def function(*args, **more):
        while left:
            os.kill(os.getpid(), left.pop())
        return real(*args, **more)
    setattr(owner, path[-1], function)


def test_two_runs_do_not_share_a_folder(tmp_path, pictures):
    """The second is refused while the first runs; a lock that a kill has left stops nobody."""
    out = tmp_path / "run"
    argv = [*TINY, "--data", f"folder:{pictures}", "--out", str(out), "--first-stage", "none"]
    run = Run(tmp_path, [*argv, "--steps", "100000", "--save-every", "1"])
    deadline = time.time() + 30
    while not (out / "ckpt.pt").is_file() and time.time() < deadline:
        time.sleep(0.01)
    second = Run(tmp_path, [*argv, "--resume"])
    assert second.wait() == 2
    said, = second.said()
    assert f"process {run.pid}" in said and "another --out" in said
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert (out / "lock").read_text() == str(run.pid)
    (out / "lock").write_text("1")                          # of a process that lives
    step = load_checkpoint(out / "ckpt.pt")["step"]
    third = Run(tmp_path, [*argv, "--steps", str(step + 1), "--resume"])
    assert third.wait() == 0, third.said()


def test_data_loading_stops_too(tmp_path):
    """Ctrl-C while the threads of folders.py read pictures."""
    for i in range(20):
        data.save_grid(torch.zeros(1, 3, 8, 8), tmp_path / "mine" / f"{i}.png")
    run = Run(tmp_path, [*TINY, "--data", f"folder:{tmp_path / 'mine'}", "--out",
                         str(tmp_path / "run")], signalled, "folders.read_image", [signal.SIGINT])
    assert run.wait() == 130 and run.said()[-1] == "stopped"
    assert "Traceback" not in run.err.read_text() and not (tmp_path / "run").exists()
