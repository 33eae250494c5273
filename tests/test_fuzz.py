"""Whatever stands on a command line or in a file: exit code 0 or 2, one line, nothing left behind.

Three kinds of cases, all seeded: mutated command lines of every command, mutated files of every
kind that a command reads, and values out of range for every flag of every options class. A command
runs inside this process, in a folder with one small file of each kind, which is put right again
after each case. Long loops end early: a run that takes its ninth step counts as accepted.

    FUZZ=2000 python -m pytest tests/test_fuzz.py                   # so many cases of each kind
    FUZZ=1 FUZZ_FIRST=37 python -m pytest tests/test_fuzz.py        # case 37 of each kind again
"""
import contextlib
import copy
import dataclasses
import functools
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile

import numpy as np
import pytest
import torch
import tqdm
from conftest import ROOT, assert_same, fewer_drawn, fill_by_recipe, write_safetensors
from PIL import Image

import adapters
import bench
import custom_diffusion
import data
import evaluate
import models
import sample
import studies.common
import studies.meters
import tasks
import train
from diffusion import GaussianDiffusion, RectifiedFlow
from dit import DiT
from text import CLIPTokenizer, TextEncoder
from unet import UNet
from vae import AutoencoderKL
from vqdiffusion import MaskReplace

FIRST = int(os.environ.get("FUZZ_FIRST", 0))
LOG = os.environ.get("FUZZ_LOG")                    # a file to which a line per case is added
MANY = int(os.environ.get("FUZZ", 0))               # 0: the counts that are written at each test
MAINS = {"train": train.main, "sample": sample.main, "evaluate": evaluate.main, "bench": bench.main,
         "adapters": adapters.main, "custom_diffusion": custom_diffusion.main}
STUDIES = ("default_run", "dit_conditioning", "dit_scaling", "udit_ablation", "adapter_sweep",
           "custom_concepts", "vq_autoregressive", "vq_chain", "dreambooth", "udit_speed")
MAINS |= {name: importlib.import_module(f"studies.{name}").main for name in STUDIES}
NANO = {"udit": ("udit-nano", dict(hidden_size=8, num_heads=1, depth=(1, 1, 1, 1, 1))),
        "unet": ("unet-nano", dict(model_channels=16, channel_mult=(1,), num_res_blocks=1,
                                   num_heads=2, attention_resolutions=(1,), context_dim=16,
                                   norm_groups=8)),
        "vq": ("vq-nano", dict(hidden_size=32, depth=1, num_heads=1, context_dim=16))}
TINY_MERGES = pathlib.Path(__file__).parent / "tiny_merges.txt"


# --------------------------------------------------------------------------------------------------
# the workshop: a command in a folder, cut short, and what it did

class Enough(BaseException):
    """The command was accepted and does long work: no more is needed."""


class Hang(BaseException):
    """Ten seconds are over."""


@dataclasses.dataclass
class Outcome:
    """What a command did: exit code ("traceback", "hang" or a number), its words, new files."""
    code: object
    out: str
    err: str
    trace: str
    long: bool          # it was stopped by Enough
    stepped: bool       # it had begun to train or to sample
    new: list           # paths that were not there before
    changed: list       # files that were there before and now differ or are gone


def tree(root):
    """{path: (size, time, number)} of all files, and {path: None} of all folders."""
    found, folders = {}, [""]
    for folder in folders:                                              # which grows on the way
        for entry in os.scandir(os.path.join(root, folder)):
            path = f"{folder}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                found[path] = None
                folders.append(f"{path}/")
            else:
                state = entry.stat(follow_symlinks=False)
                found[path] = state.st_size, state.st_mtime_ns, entry.inode()
    return found


def surroundings():
    """What a command must leave alone: the repository's files, and the folder around the box."""
    return {str(folder): sorted((e.name, e.stat().st_mtime_ns) for e in os.scandir(folder)
                                if e.name not in ("__pycache__", ".pytest_cache"))
            for folder in (ROOT, ROOT / "assets", ROOT / "studies", ROOT / "tests")}


class Workshop:
    """The box, a folder with one small file of every kind, and commands that run in it."""

    def __init__(self, box):
        self.box, self.count = box, 0
        (box / "in").mkdir(parents=True)

    def keep(self):
        """From now on each command finds the box as it is now."""
        self.kept = self.box.with_name("kept")
        shutil.copytree(self.box, self.kept)
        self.before = tree(self.box)

    def patches(self, patch):
        """Cut what takes long; no network; no files in the repository."""
        make_step = train.make_step

        def tick(most):
            self.count += 1
            if self.count > most:
                raise Enough

        def short_step(*given):
            step = make_step(*given)

            def ticking(s):
                tick(8)
                return step(s)
            ticking.ema, ticking.optimizers = step.ema, step.optimizers
            return ticking

        def short(trajectory):
            def ticking(*given, **options):
                for state in trajectory(*given, **options):
                    tick(30)
                    yield state
            return ticking
        for module in (train, studies.meters):
            patch.setattr(module, "make_step", short_step)
        for process in (GaussianDiffusion, RectifiedFlow, MaskReplace):
            patch.setattr(process, "trajectory", short(process.trajectory))
        for family, (name, sizes) in NANO.items():
            patch.setitem(models.FAMILIES[family].sizes, name, sizes)
        fewer_drawn(patch, 64)
        learn = evaluate.train_classifier
        patch.setattr(evaluate, "train_classifier", lambda real, steps=1000, *more: learn(
            real, min(steps, 2), *more))
        patch.setattr(studies.meters, "limit", lambda device: {"product": 1e9})
        patch.setattr("torch._guards.detect_fake_mode", lambda *given: None)    # asked per tensor
        patch.setattr("torch.nn.Module.compile", lambda net: None)      # takes half a minute
        patch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **how: None)
        sampled = tasks.DiffusionTask.sample
        patch.setattr(tasks.DiffusionTask, "sample", lambda *given, steps=None, **how: sampled(
            *given, steps=2 if steps == 25 else steps, **how))      # a preview's 25 steps
        examples = tasks.DiffusionTask.examples
        patch.setattr(tasks.DiffusionTask, "examples", lambda task: tuple(
            None if found is None else found[:2] for found in examples(task)))

        def offline(url, *given, **how):
            raise OSError("no network in this test")
        patch.setattr(torch.hub, "download_url_to_file", offline)
        quiet = tqdm.std.tqdm.__init__
        patch.setattr(tqdm.std.tqdm, "__init__", lambda bar, *given, **how: quiet(
            bar, *given, **{**how, "disable": True}))
        results = self.box / "results"
        results.mkdir(exist_ok=True)
        shutil.copy(studies.common.RESULTS / "default_run.csv", results)
        patch.setattr(studies.common, "RESULTS", results)
        todo = studies.common.todo

        def first_cell(*given):
            for _ in todo(*given):
                raise Enough
            return ()
        patch.setattr(studies.common, "todo", first_cell)

        def enough(*given, **how):
            raise Enough
        patch.setattr("studies.udit_speed.step_of", enough)
        patch.setattr("studies.custom_concepts.measure_moves", enough)

    def __call__(self, command, argv, seconds=10):
        """Run a command in the box -> Outcome. The box is left as the command made it."""
        self.count, handlers = 0, {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        text = lambda: io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", newline="")
        out, err, code, trace, long = text(), text(), 0, "", False
        begun, here, threads = time.process_time(), os.getcwd(), torch.get_num_threads()
        os.chdir(self.box)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
                    native_stderr() as native, limited(seconds), \
                    warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("default")
                try:
                    MAINS[command](argv)
                except SystemExit as stop:
                    code = 0 if stop.code is None else stop.code
                except Enough:
                    long = True
                except Hang:
                    disarm()
                    code, trace = "hang", traceback.format_exc()
                except BaseException:
                    code, trace = "traceback", traceback.format_exc()
        finally:
            os.chdir(here)
            torch.set_num_threads(threads)
            for n, handler in handlers.items():
                signal.signal(n, handler)
        if time.process_time() - begun > seconds:
            code = "hang"
        said = [f"{w.filename}:{w.lineno}: {w.category.__name__}: {w.message}" for w in warned
                if not issubclass(w.category, (DeprecationWarning, ResourceWarning))]
        for stream in (out, err):
            stream.flush()
        lines = [err.buffer.getvalue().decode(), native(), *said]
        after = tree(self.box)
        return Outcome(code, out.buffer.getvalue().decode(), "\n".join(filter(None, lines)), trace,
                       long, self.count > 0, sorted(after.keys() - self.before.keys()),
                       sorted(p for p in self.before if after.get(p, 0) != self.before[p]
                              and not p.endswith("/lock")))

    def restore(self, outcome):
        """Put the box right again."""
        if not outcome.new and not outcome.changed:
            return
        for path in reversed(outcome.new):          # a folder after what is in it
            whole = self.box / path
            shutil.rmtree(whole) if whole.is_dir() and not whole.is_symlink() else whole.unlink()
        for path in outcome.changed:
            whole = self.box / path
            if self.before[path] is None:
                whole.is_dir() or whole.unlink(missing_ok=True)
                whole.mkdir(parents=True, exist_ok=True)
                continue
            if whole.is_dir() and not whole.is_symlink():
                shutil.rmtree(whole)
            whole.parent.mkdir(parents=True, exist_ok=True)
            whole.unlink(missing_ok=True)
            shutil.copy2(self.kept / path, whole)
        self.before = tree(self.box)


@contextlib.contextmanager
def native_stderr():
    """What C libraries write to file descriptor 2, as a function that gives the text."""
    with tempfile.TemporaryFile() as file:
        old, said = os.dup(2), []
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: said[0]
        finally:
            os.dup2(old, 2)
            os.close(old)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def disarm():
    """No more alarms."""
    for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF) if hasattr(signal, "setitimer") else ():
        signal.setitimer(timer, 0)


@contextlib.contextmanager
def limited(seconds):
    """Hang after so many seconds of CPU time, or three times as many on the clock, as a shared
    machine may be slow; and at most 1 GiB more memory, so that a huge size fails at once."""
    def stop(*given):
        raise Hang
    with contextlib.ExitStack() as undo:
        if hasattr(signal, "setitimer"):
            for timer, n, limit in ((signal.ITIMER_REAL, signal.SIGALRM, 3 * seconds),
                                    (signal.ITIMER_PROF, signal.SIGPROF, seconds)):
                undo.callback(signal.signal, n, signal.signal(n, stop))
                signal.setitimer(timer, limit, 1)               # again, if it was swallowed
            undo.callback(disarm)                               # before the handlers go
        if os.path.exists("/proc/self/statm"):
            import resource
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            undo.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
            resource.setrlimit(resource.RLIMIT_AS, (
                pages * resource.getpagesize() + 2 ** 30, hard))
        yield


# --------------------------------------------------------------------------------------------------
# what must hold

OUTPUTS = ("--out", "--json", "--export", "--save-latents", "--save_latents")
INNER = re.compile(      # what a user cannot mend, as it names no flag, file or value of theirs
    r"values to unpack|^error: invalid literal|^error: could not convert|^error: Expecting|"
    r"object is not|has no attribute|index out of|^error: '\w+' codec|must be (str|real|int)|"
    r"argument \w+ must|^error: math domain|positional arg|keyword arg|"
    r"^error: \[Errno \d+\] [^']*$", re.M)
LEFT_OPEN = re.compile(r"\.(part|tmp)$|~$")


def problems(shop, argv, outcome):
    """What is wrong with an outcome, as a list of sentences."""
    found, lines = [], [line for line in outcome.err.splitlines() if line.strip()]
    unlearned = outcome.code == 1 and "NOT ok" in outcome.out       # of bench.py --overfit
    if outcome.code not in (0, 2) and not unlearned:
        found.append(f"exit code {outcome.code}")
    if len(lines) > 3:
        found.append(f"{len(lines)} lines on stderr")
    if "Traceback" in outcome.err + outcome.out:
        found.append("a traceback is printed")
    if outcome.code == 2 and not any("error: " in line for line in lines):
        found.append("exit code 2 without a line that begins with error")
    if outcome.code == 2 and re.fullmatch(r"error: ?(\S{0,20}|'[^']*')", "".join(lines[-1:])):
        found.append("the error line has no sentence")
    if outcome.code == 2 and (
            inner := INNER.search(re.sub(r"\(.*\)", "", outcome.err))):   # a detail may be added
        found.append(f"a message of Python's own, {inner[0]!r}")
    tried = "could not download" in outcome.err         # that is not known at the start
    if outcome.code == 2 and outcome.new and not outcome.stepped and not tried:
        found.append(f"refused, and yet made {', '.join(outcome.new[:4])}")
    if outcome.code == 2 and outcome.changed and not outcome.stepped:
        found.append(f"refused, and yet changed {', '.join(outcome.changed[:4])}")
    found += [f"{path}: {why}" for path in outcome.new if (why := unfinished(shop.box / path))
              and not (outcome.long and path.endswith("log.csv"))]
    named = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word in OUTPUTS]
    named += [word.split("=", 1)[1] for word in argv if word.startswith(OUTPUTS) and "=" in word]
    for path in outcome.changed:
        stem, above = os.path.splitext(path)[0], [*map(str, pathlib.PurePath(path).parents)]
        inside = any(os.path.normpath(name) in (path, *above, stem + os.path.splitext(name)[1])
                     for name in named if name)
        if not inside and outcome.code != "traceback":
            found.append(f"changed {path}, which no output flag names")
        elif inside and shop.before[path] and (shop.box / path).is_file() and (
                kind(shop.box / path) != kind(shop.kept / path)):
            found.append(f"overwrote {path}, which was of another kind")
    return found


def unfinished(path):
    """Why a new file is not whole, or None."""
    if LEFT_OPEN.search(path.name):
        return "is left half-written"
    if not path.is_file():
        return None
    if path.stat().st_size == 0:
        return "has 0 bytes"
    try:
        if path.suffix in (".png", ".jpg", ".gif", ".webp", ".bmp"):
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix in (".pt", ".npz"):
            with zipfile.ZipFile(path) as file:
                assert file.testzip() is None
        elif path.suffix == ".json":
            json.loads(path.read_text())
    except Exception as error:
        return f"is damaged ({type(error).__name__})"
    return None


def kind(path):
    """The kind of a file, by what is in it."""
    head = path.read_bytes()[:8]
    if head.startswith(b"PK"):
        try:
            names = zipfile.ZipFile(path).namelist()
        except zipfile.BadZipFile:
            return "damaged zip"
        if any(name.endswith(".npy") for name in names):
            return "latents" if "latents.npy" in names else "npz"
        state = torch.load(path, weights_only=True)
        return next((key for key in ("opt", "ema", "tensors", "adapter") if key in state), "torch")
    return {b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp"}.get(head[:4], path.suffix)


def mechanism(outcome, wrong):
    """One name for all cases that fail in the same way."""
    places = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n', outcome.trace)
    ours = [f"{pathlib.Path(file).name}:{line} {name}" for file, line, name in places
            if pathlib.Path(file).parent in (ROOT, ROOT / "studies")]
    if outcome.trace:
        return f"{outcome.trace.strip().splitlines()[-1].split(':')[0]} @ {(ours or ['?'])[-1]}"
    short = re.sub(r"--?[A-Za-z-]+=?.*|[^ ]*/[^ ]*", "...", wrong[0])
    return f"{short} @ {outcome.err.strip()[-80:]}"


class Findings:
    """The failures of a test, one example for each mechanism."""

    def __init__(self):
        self.groups, self.count, self.codes = {}, 0, {}

    def look(self, shop, command, argv, case, outcome, more=()):
        """Judge an outcome; more: sentences that the caller found."""
        wrong = [*problems(shop, argv, outcome), *more]
        if LOG:
            with open(LOG, "a") as file:
                print(command, argv, outcome.code, outcome.err.strip()[-300:], wrong, file=file)
        self.count += 1
        self.codes[outcome.code] = self.codes.get(outcome.code, 0) + 1
        if wrong:
            known = self.groups.setdefault(mechanism(outcome, wrong), [0, ""])
            known[0] += 1
            known[1] = known[1] or (
                f"case {case}: {command} {shlex.join(argv)[:600]}\n    {'; '.join(wrong)}\n    "
                + (outcome.err.strip() + "\n" + outcome.trace.strip())[-900:].strip())
        shop.restore(outcome)

    def close(self):
        """Fail with one example of each mechanism."""
        print(f"{self.count} cases, exit codes {self.codes}, {len(self.groups)} mechanisms")
        groups = sorted(self.groups.items(), key=lambda item: -item[1][0])
        assert not groups, "\n\n".join(
            [f"{len(groups)} mechanisms in {self.count} cases, exit codes {self.codes}"]
            + [f"{count} x {name}\n  {text}" for name, (count, text) in groups])


# --------------------------------------------------------------------------------------------------
# one small file of every kind

def write_pictures(root):
    random_picture = np.random.RandomState(0).randint(256, size=(16, 8, 8, 3)).astype("uint8")
    pictures = [Image.fromarray(p) for p in random_picture]
    for k, ending in enumerate(("png", "jpg", "webp", "gif", "bmp", "png")):
        for name in ("apple", "pear"):
            (root / "pictures" / name).mkdir(parents=True, exist_ok=True)
            pictures[k].save(root / "pictures" / name / f"{k}.{ending}")
    lines = ["a red dog", "a blue cat", "a red cat on blue", "a blue dog"]
    for name in ("jsonl", "csv", "txt", "few", "thing", "subjects/dog6", "subjects/cat2"):
        (root / name).mkdir(parents=True)
        for k in range(4):
            pictures[k].save(root / name / f"{k}.png")
    rows = [{"file_name": f"{k}.png", "text": text} for k, text in enumerate(lines)]
    (root / "jsonl" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "csv" / "metadata.csv").write_text("file_name,text\n" + "".join(
        f"{row['file_name']},{row['text']}\n" for row in rows))
    for k, text in enumerate(lines):
        (root / "txt" / f"{k}.txt").write_text(text)
        (root / "few" / f"{k}.txt").write_text(text)
    (root / "few" / "0.png").unlink()
    (root / "captions.txt").write_text("\n".join(lines) + "\n")
    (root / "more.txt").write_text("a dog\na cat on blue\nblue\n")
    pictures[0].save(root / "photo.png")
    Image.fromarray((random_picture[1] > 128).astype("uint8") * 255).save(root / "mask.png")
    np.savez(root / "samples.npz", arr_0=random_picture, labels=np.arange(16) % 2)
    np.savez(root / "few.npz", arr_0=random_picture[:4])
    np.savez(root / "shapes.npz", arr_0=data.load("shapes", count=4).images.permute(0, 2, 3, 1),
             labels=np.arange(4))


def write_official(root):
    (root / "official" / "mnist").mkdir(parents=True)
    for file in data.OFFICIAL["mnist"][1]:
        body = bytes(16) + bytes(8 * 784) if "images" in file else bytes(8) + bytes(range(8))
        (root / "official" / "mnist" / file).write_bytes(gzip.compress(body, mtime=0))
    torch.manual_seed(0)
    unet = fill_by_recipe(UNet(4, 4, 32, (1,), 1, (1,), num_heads=8, context_dim=64))
    vae = fill_by_recipe(AutoencoderKL(32, (1, 1, 1, 1), 1))       # 8 times smaller per side
    text = fill_by_recipe(TextEncoder(CLIPTokenizer(TINY_MERGES).vocab_size, 77, hidden_size=64,
                                      depth=1, num_heads=1))
    parts = {"model.diffusion_model.": unet, "first_stage_model.": vae,
             "cond_stage_model.transformer.": text}
    state = {prefix + name: tensor for prefix, part in parts.items()
             for name, tensor in part.state_dict().items()}
    write_safetensors(root / "sd.safetensors", state)
    torch.save({"state_dict": state}, root / "sd.ckpt")
    write_safetensors(root / "vae.safetensors", vae.state_dict())
    dit = fill_by_recipe(DiT(input_size=8, patch_size=4, in_channels=4, hidden_size=384, depth=1,
                             num_heads=6, num_classes=4, learn_sigma=True), ["pos_embed"])
    torch.save({k: v.half() for k, v in dit.state_dict().items()}, root / "dit.bin")
    shutil.copy(TINY_MERGES, root / "merges.txt")


DIT = "--model DiT-32x1/4 --image-size 8 --steps 1 --batch-size 2 --device cpu"
TEXT = "--image-size 8 --steps 1 --batch-size 2 --device cpu"
SHORT = "--steps 1 --batch-size 2 --device cpu"
FILES = f"""
train {DIT} --data folder:in/pictures --out in/dit
train {DIT} --data folder:in/pictures --schedule cosine --out in/gauss
train --model tiny-ae {TEXT} --data folder:in/pictures --factor 2 --out in/ae
train --model vq-vae {TEXT} --data folder:in/pictures --codes 8 --factor 2 --out in/vqvae
train {DIT} --model DiT-32x1/2 --data folder:in/pictures --first-stage in/ae/ckpt.pt --out in/latent
train --model udit-nano {TEXT} --data folder:in/pictures --out in/udit
train --model unet-nano {TEXT} --data folder:in/jsonl --first-stage none --out in/unet
train --model vq-nano {TEXT} --data folder:in/jsonl --first-stage in/vqvae/ckpt.pt --out in/vq
train --image-size 8 --data folder:in/pictures --first-stage in/ae/ckpt.pt --save-latents \
in/latents.npz
sample --ckpt in/dit/ckpt.pt --export in/exported.pt
sample --ckpt in/unet/ckpt.pt --export in/base.pt
adapters learn --base in/base.pt --concept folder:in/thing --category dog --prior none \
--rank 1 {SHORT} --out in/adapter
custom_diffusion learn --base in/base.pt --concept folder:in/thing --category dog \
--prior none {SHORT} --out in/concept
custom_diffusion learn --base in/base.pt --concept folder:in/thing --category cat \
--prior none {SHORT} --seed 1 --out in/other
custom_diffusion compress in/concept/concept.pt --base in/base.pt --out in/small.pt
""".replace("\\\n", "").strip().splitlines()


def stir(root, paths):
    """Noise on the weights of new checkpoints of denoisers: after one step they still answer 0."""
    for path in [root.parent / p for p in paths if p.endswith("/ckpt.pt")]:
        state = torch.load(path, weights_only=True)
        generator = torch.Generator().manual_seed(len(paths))
        for weights in () if "sizes" in state else (state["model"], state["ema"]):
            for tensor in weights.values():
                if tensor.is_floating_point():
                    tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
        torch.save(state, path)


def own_mnist(patch, root):
    """The checksums of the files in root/official are those of mnist."""
    words, files, kind = data.OFFICIAL["mnist"]
    sums = {file: hashlib.md5((root / "official/mnist" / file).read_bytes()).hexdigest()
            for file in files}
    patch.setitem(data.OFFICIAL, "mnist", (words, sums, kind))


@functools.cache
def files(base):
    """A folder in `base` with all files of FILES in it, made once for test_flags.py and here."""
    shop = Workshop(base / "files" / "box")
    root = shop.box / "in"
    write_pictures(root)
    write_official(root)
    with pytest.MonkeyPatch.context() as patch:
        shop.patches(patch)
        own_mnist(patch, root)
        shop.keep()
        for line in FILES:
            done = shop(*split(line))
            assert done.code == 0 and not done.long, f"{line}\n{done.err}{done.trace}"
            stir(root, done.new)
    return root


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """The workshop with a copy of these files in it."""
    shop = Workshop(tmp_path_factory.mktemp("workshop") / "box")
    made = files(tmp_path_factory.getbasetemp())
    shutil.copytree(made, shop.box / "in", dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        shop.patches(patch)
        own_mnist(patch, shop.box / "in")
        shop.keep()
        around = surroundings()
        yield shop
        assert surroundings() == around, "a command wrote outside its folder"


def split(line):
    """A command line -> (name of the command, its words)."""
    command, *argv = shlex.split(line)
    return command, argv


# --------------------------------------------------------------------------------------------------
# valid lines of every command

PLAIN = "--device cpu --steps 2 --out new.png"
LINES = f"""
train {DIT} --data folder:in/pictures --out new
train {DIT} --data folder:in/pictures --out new --recipe paper --log-every 1 --save-every 1
train {DIT} --data npz:in/samples.npz --out new --init in/exported.pt
train --model DiT-32x1/2 {SHORT} --data latents:in/latents.npz --first-stage in/ae/ckpt.pt --out new
train {DIT} --data mnist --data-dir in/official --image-size 32 --out new
train {DIT} --data folder:in/csv --flip on --skip-bad --out new --schedule cosine --prediction v
train {DIT} --data shapes --hold-out --image-size 16 --first-stage new --first-stage-steps 1 \
--out new
train --image-size 8 --data folder:in/pictures --first-stage in/ae/ckpt.pt --save-latents new.npz
train --model tiny-ae {TEXT} --data folder:in/pictures --factor 2 --out new
train --model kl-ae {TEXT} --data folder:in/pictures --latent-channels 2 --out new
train --model vq-vae {TEXT} --data folder:in/pictures --codes 8 --factor 2 --out new
train --model udit-nano {TEXT} --data folder:in/pictures --learn-sigma --schedule linear --out new
train --model unet-nano {TEXT} --data folder:in/txt --first-stage none --out new --cfg-scale 2
train --model vq-nano {TEXT} --data folder:in/jsonl --first-stage in/vqvae/ckpt.pt --out new
train --out in/dit --resume --steps 2
train --out in/unet --resume --steps 2 --data folder:in/jsonl
sample --ckpt in/dit/ckpt.pt --class apple,1 --n 2 {PLAIN}
sample --ckpt in/dit/ckpt.pt --cfg-scale 2 --cfg-channels 1 {PLAIN}
sample --ckpt in/gauss/ckpt.pt --sampler ddim --eta 0.5 --n 1 --strip --gif {PLAIN}
sample --ckpt in/gauss/ckpt.pt --sampler dpm++ --npz 3 --batch-size 2 --seed 4 {PLAIN}
sample --ckpt in/latent/ckpt.pt --init in/photo.png --strength 0.5 {PLAIN}
sample --ckpt in/latent/ckpt.pt --init in/photo.png --mask in/mask.png --n 2 {PLAIN}
sample --ckpt in/udit/ckpt.pt --weights model {PLAIN}
sample --ckpt in/unet/ckpt.pt --prompt a|dog --negative cat --n 2 {PLAIN}
sample --ckpt in/base.pt --concept in/concept/concept.pt --prompt <new1> {PLAIN}
sample --ckpt in/adapter/adapter.pt --base in/base.pt --scale 0.5 {PLAIN}
sample --ckpt in/vq/ckpt.pt --prompt dog --truncation 0.9 --sampler purity {PLAIN}
sample --ckpt in/dit/ckpt.pt --export new.pt --note words
sample --ckpt in/dit.bin --vae in/vae.safetensors --class 1 --dtype float32 {PLAIN}
sample --ckpt in/sd.safetensors --bpe in/merges.txt --prompt low --image-size 64 --n 1 {PLAIN}
sample --ckpt in/sd.ckpt --bpe in/merges.txt --prompt low --image-size 64 --n 1 {PLAIN}
evaluate --images in/shapes.npz --data shapes --json new.json
evaluate --images in/few.npz --data folder:in/pictures --classifier-steps 1 --skip-bad
evaluate --ckpt in/dit/ckpt.pt --n 2 --steps 1 --cfg-scale 1 --seed 3 --device cpu
bench --models DiT-32x1/2 tiny-ae --steps 1 --batch-size 2 --image-size 8 --device cpu
bench --models vq-nano --overfit --steps 2 --batch-size 2 --image-size 8 --compile off
adapters learn --base in/base.pt --data folder:in/jsonl --rank 1 {SHORT} --out new
adapters learn --adapter res_in-res_out --base in/base.pt --data folder:in/txt {SHORT} --out new
adapters learn --adapter lora --base in/base.pt --concept folder:in/thing --category dog \
--prior none --budget 0.5 {SHORT} --out new
adapters learn --out in/adapter --resume --steps 2
custom_diffusion learn --base in/base.pt --concept folder:in/thing --category dog \
--prior none {SHORT} --out new
custom_diffusion learn --base in/base.pt --concept folder:in/thing --category cat \
--prior folder:in/jsonl --part all --no-augment {SHORT} --out new
custom_diffusion learn --out in/concept --resume --steps 2
custom_diffusion merge in/concept/concept.pt in/other/concept.pt --base in/base.pt \
--captions in/captions.txt --ridge 0.1 --out new.pt
custom_diffusion compress in/concept/concept.pt --base in/base.pt --ratio 0.5 --out new.pt
default_run --summary
dit_conditioning --part 0/1 --seeds 1 --threads 1
dit_scaling --part 0/2 --seeds 1
udit_ablation --data shapes --seeds 1
adapter_sweep --part 1/2 --seeds 1
vq_chain --seeds 1 --part 0/1
dreambooth --cifar folder:in/pictures --subjects in/subjects
udit_speed --rounds 1
""".replace("\\\n", "").strip().splitlines()

VALUES = ["", " ", "-1", "0", "nan", "inf", "-inf", "1e999", "\u0663", "1.5", "x" * 5000, "None",
          "nowhere.pt", "no/such/folder", "in", "in/dit", "in/dit/ckpt.pt", "in/photo.png",
          "in/samples.npz", "in/latents.npz", "in/captions.txt", "in/concept/concept.pt",
          "in/adapter/adapter.pt", "in/exported.pt", "in/ae/ckpt.pt", "in/vqvae/ckpt.pt",
          "in/sd.safetensors", "in/vae.safetensors", "in/dit.bin", "in/merges.txt", "a\nb",
          "folder:in/pictures", "folder:in/jsonl", "folder:nowhere", "folder:", "npz:in",
          "npz:in/captions.txt", "latents:in/samples.npz", "latents:nowhere.npz", "mnist",
          "cifar10", "shapes", "scenes", "--out", "--", "-", "\udcff", "\u00e9\u4e2d",
          "100000000000000000000000000", "2,1", "1/0", "|", ",", "new.png", "new", "[]", "1000000"]


def options_of(command, argv):
    """The options classes of a command line."""
    if command == "train":
        model = [b for a, b in zip(argv, argv[1:]) if a == "--model"][-1:] or ["DiT-32x1/4"]
        return train.Config, models.settings_class(models.find_model(model[0])[0])
    learn = argv[:1] == ["learn"]
    return {"sample": (sample.Options,), "evaluate": (evaluate.Options,), "bench": (bench.Options,),
            "adapters": (adapters.Options, train.Config),
            "custom_diffusion": (custom_diffusion.Options, train.Config) if learn else
            (custom_diffusion.MergeOptions,) if argv[:1] == ["merge"] else
            (custom_diffusion.CompressOptions,)}.get(command, ())


def fields_of(command, argv):
    """The flags of a command line: {"--flag": dataclass field}."""
    return {"--" + ("class" if f.name == "classes" else f.name.replace("_", "-")): f
            for cls in options_of(command, argv) for f in dataclasses.fields(cls)}


def plausible(field, rng):
    """Words that a flag may take."""
    if field.type is bool:
        return []
    if field.metadata["choices"]:
        return [rng.choice(list(field.metadata["choices"]))]
    some = {int: ("1", "2", "3", "4", "8", "16", "64"), float: ("0", "0.001", "0.3", "1", "7")}
    return [rng.choice(some.get(field.type, VALUES))]


def mutated(command, argv, rng):
    """A valid command line with one to three changes."""
    words, fields = list(argv), fields_of(command, argv)
    flags = [*fields, "--no-such-flag", "--n", "--help"]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        i = rng.randrange(len(words)) if words else 0
        values = [k for k, word in enumerate(words) if not word.startswith("--")]
        how = rng.choice(("drop", "double", "swap", "value", "value", "value", "any", "flag",
                          "flag", "letter", "join"))
        if how == "flag" or not words:
            flag = rng.choice(flags)
            words += [flag, *plausible(fields[flag], rng)] if flag in fields and (
                rng.random() < 0.7) else [flag] + [rng.choice(VALUES)] * (rng.random() < 0.8)
        elif how == "drop":
            del words[i]
        elif how == "double":
            words.insert(i, words[i])
        elif how == "swap":
            k = rng.randrange(len(words))
            words[i], words[k] = words[k], words[i]
        elif how in ("value", "any"):
            words[rng.choice(values) if values and how == "value" else i] = rng.choice(VALUES)
        elif how == "letter" and words[i]:
            k = rng.randrange(len(words[i]))
            words[i] = words[i][:k] + rng.choice(("", "-", "1", "x", "\u00e9")) + words[i][k + 1:]
        elif how == "join":
            words[i:i + 2] = ["=".join(words[i:i + 2])]
    # nothing may lead out of the box
    return [word for word in words if not word.startswith("/") and ".." not in word]


def numbers(count):
    """Numbers of the cases to run."""
    return range(FIRST, FIRST + (MANY or count))


# --------------------------------------------------------------------------------------------------
# the tests

def test_the_lines_are_valid_and_the_judge_is_strict(shop, monkeypatch):
    """Lines that are to be mutated work (every second, or with FUZZ all), and a planted fault of
    each kind is noticed."""
    findings = Findings()
    for line in LINES if MANY else LINES[::2]:
        command, argv = split(line)
        done = shop(command, argv)
        more = [] if done.code in (0, 1) else [f"a valid line ends with {done.code}"]
        findings.look(shop, command, argv, line, done, more)
    findings.close()

    def planted(how):
        monkeypatch.setitem(MAINS, "planted", how)
        done = shop("planted", ["--out", "new"], seconds=0.4)
        found = problems(shop, ["--out", "new"], done)
        shop.restore(done)
        return " ".join(found)

    def refuse(text="error: a sentence that says why\n", code=2):
        sys.stderr.write(text)
        raise SystemExit(code)
    assert planted(lambda argv: None) == planted(lambda argv: refuse()) == ""
    assert "traceback" in planted(lambda argv: 1 / 0)
    assert "hang" in planted(lambda argv: [None for _ in iter(int, 1)])
    assert "hang" in planted(lambda argv: time.sleep(60))
    assert "4 lines" in planted(lambda argv: refuse("error: a b\n1\n2\n3\n"))
    assert "4 lines" in planted(lambda argv: os.write(2, b"1\n2\n3\n4\n"))
    assert "exit code 1" in planted(lambda argv: refuse(code=1))
    assert "no sentence" in planted(lambda argv: refuse("error: 'ema'\n"))
    assert "Python's own" in planted(lambda argv: refuse("error: not enough values to unpack"))
    assert "without a line" in planted(lambda argv: refuse(""))
    assert "made" in planted(lambda argv: (os.mkdir("folder"), refuse()))
    assert "0 bytes" in planted(lambda argv: open("new.png", "w").close())
    assert "half-written" in planted(lambda argv: pathlib.Path("a.part").write_text("x"))
    assert "damaged" in planted(lambda argv: pathlib.Path("a.png").write_text("x"))
    assert "no output flag" in planted(lambda argv: pathlib.Path("in/photo.png").unlink())
    assert not problems(shop, [], shop("sample", split(LINES[16])[1])) and "new.png" in (
        tree(shop.box))
    shop.restore(shop("planted", []))


def test_mutated_command_lines(shop):
    findings = Findings()
    for case in numbers(100):
        rng = random.Random(f"line {case}")
        command, argv = split(rng.choice(LINES))
        argv = mutated(command, argv, rng)
        findings.look(shop, command, argv, case, shop(command, argv))
    findings.close()


# --------------------------------------------------------------------------------------------------
# damaged files

CKPT = "sample --ckpt FILE --n 1 " + PLAIN
RESUME = "train --out in/dit --resume --steps 2"
IN_FOLDER = f"""train {DIT} --data folder:in/pictures --out new
train {DIT} --data folder:in/pictures --skip-bad --out new"""
OFFICIAL = "sample --ckpt FILE --bpe in/merges.txt --prompt low --image-size 64 --n 1 " + PLAIN
READERS = {     # file: the lines that read it
    "in/dit/ckpt.pt": f"{CKPT}\n{RESUME}\nevaluate --ckpt FILE --n 2 --steps 1 --device cpu\n"
                      "sample --ckpt FILE --export new.pt",
    "in/gauss/ckpt.pt": CKPT, "in/latent/ckpt.pt": CKPT, "in/udit/ckpt.pt": CKPT,
    "in/unet/ckpt.pt": CKPT, "in/vq/ckpt.pt": CKPT,
    "in/exported.pt": f"{CKPT}\ntrain {DIT} --data folder:in/pictures --init FILE --out new",
    "in/ae/ckpt.pt": f"train {DIT} --data folder:in/pictures --model DiT-32x1/2 --first-stage FILE "
                     f"--out new\n{CKPT}",
    "in/vqvae/ckpt.pt": f"train --model vq-nano {TEXT} --data folder:in/jsonl --first-stage FILE "
                        "--out new",
    "in/base.pt": f"{CKPT}\n"
                  "custom_diffusion compress in/concept/concept.pt --base FILE --out x.pt\n"
                  f"adapters learn --base FILE --data folder:in/jsonl --rank 1 {SHORT} --out new",
    "in/concept/concept.pt":
        f"sample --ckpt in/base.pt --concept FILE --prompt <new1> {PLAIN}\n"
        "custom_diffusion compress FILE --base in/base.pt --out new.pt\n"
        "custom_diffusion merge FILE in/other/concept.pt --base in/base.pt --captions "
        "in/captions.txt --ridge 0.1 --out new.pt",
    "in/small.pt": f"sample --ckpt in/base.pt --concept FILE --prompt <new1> {PLAIN}",
    "in/concept/ckpt.pt": "custom_diffusion learn --out in/concept --resume --steps 2",
    "in/adapter/adapter.pt": f"sample --ckpt FILE --base in/base.pt --n 1 {PLAIN}",
    "in/adapter/ckpt.pt": "adapters learn --out in/adapter --resume --steps 2",
    "in/latents.npz": f"train --model DiT-32x1/2 {SHORT} --data latents:FILE --out new "
                      "--first-stage in/ae/ckpt.pt\n"
                      f"train --model DiT-32x1/2 {SHORT} --data latents:FILE --out new",
    "in/samples.npz": f"train {DIT} --data npz:FILE --out new",
    "in/shapes.npz": "evaluate --images FILE --data shapes",
    "in/pictures/apple/0.png": IN_FOLDER, "in/pictures/apple/1.jpg": IN_FOLDER,
    "in/pictures/apple/2.webp": IN_FOLDER, "in/pictures/apple/3.gif": IN_FOLDER,
    "in/pictures/apple/4.bmp": IN_FOLDER,
    "in/photo.png": f"sample --ckpt in/dit/ckpt.pt --init FILE --n 1 {PLAIN}",
    "in/mask.png": f"sample --ckpt in/dit/ckpt.pt --init in/photo.png --mask FILE --n 1 {PLAIN}",
    "in/jsonl/metadata.jsonl": f"train {DIT} --data folder:in/jsonl --out new",
    "in/csv/metadata.csv": f"train {DIT} --data folder:in/csv --out new",
    "in/txt/0.txt": f"train {DIT} --data folder:in/txt --out new",
    "in/captions.txt": "custom_diffusion merge in/concept/concept.pt in/other/concept.pt --base "
                       "in/base.pt --captions FILE --ridge 0.1 --out new.pt",
    "in/official/mnist/train-images-idx3-ubyte.gz":
        f"train {DIT} --data mnist --data-dir in/official --image-size 32 --out new",
    "in/sd.safetensors": OFFICIAL, "in/sd.ckpt": OFFICIAL,
    "in/merges.txt": "sample --ckpt in/sd.safetensors --bpe FILE --prompt low --image-size 64 "
                     f"--n 1 {PLAIN}",
    "in/vae.safetensors": f"sample --ckpt in/dit.bin --vae FILE --class 1 {PLAIN}",
    "in/dit.bin": f"sample --ckpt FILE --vae in/vae.safetensors --class 1 {PLAIN}",
    "in/dit/log.csv": RESUME, "in/dit/config.json": RESUME}


def damaged(raw, others, rng):
    """(how, other bytes): a file with some of its bytes changed."""
    raw, size = bytearray(raw), max(1, len(raw))
    how = rng.choice(("flips", "flips", "few", "few", "bit", "cut", "insert", "zeros", "swap",
                      "empty", "double"))
    if how in ("flips", "few", "bit"):
        share = rng.uniform(0.01, 0.1) if how == "flips" else 0
        for _ in range(max(int(share * size), 1 if how == "bit" else rng.randint(1, 4))):
            k = rng.randrange(size)
            raw[k:k + 1] = [raw[k] ^ 1 << rng.randrange(8) if how == "bit" else rng.randrange(256)]
    elif how == "cut":
        del raw[rng.randrange(size):]
    elif how == "insert":
        k = rng.randrange(size)
        raw[k:k] = rng.randbytes(rng.randint(1, 64))
    elif how == "zeros":
        k = rng.randrange(size)
        length = min(len(raw) - k, rng.randint(1, size // 4 + 1))
        raw[k:k + length] = bytes(length)
    elif how == "swap":
        raw = rng.choice(others)
    elif how == "empty":
        raw = b""
    else:
        raw = raw + raw
    return how, bytes(raw)


def content(raw, name):
    """What torch or numpy reads from the bytes of a .pt or .npz file."""
    if name.endswith(".npz"):
        with np.load(io.BytesIO(raw)) as arrays:
            return {key: arrays[key].tolist() for key in arrays.files}
    return torch.load(io.BytesIO(raw), weights_only=True)


def believed(path, raw, kept):
    """A sentence if a changed file with checksums (a zip file) was taken for good, else []."""
    if not kept.startswith(b"PK") or raw == kept:
        return []
    try:
        assert_same(content(raw, path), content(kept, path))
    except Exception as error:
        return [f"{path} is damaged and was believed ({type(error).__name__})"]
    return []


def try_file(shop, findings, case, path, line, write, judge=lambda done: []):
    """Replace a file by write(path), run a line that reads it, judge, and put it back."""
    target = shop.box / path
    target.unlink()
    write(target)
    shop.before = tree(shop.box)
    command, argv = split(line.replace("FILE", path))
    done = shop(command, argv)
    findings.look(shop, command, argv, f"{case} ({path})", done, judge(done))
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    shutil.copy2(shop.kept / path, target)
    shop.before = tree(shop.box)


def test_mutated_files(shop):
    findings, paths = Findings(), sorted(READERS)
    whole = {path: (shop.kept / path).read_bytes() for path in paths}
    for case in numbers(100):
        rng = random.Random(f"file {case}")
        path = paths[case % len(paths)]
        line = rng.choice(READERS[path].splitlines())
        how, raw = damaged(whole[path], [*whole.values()], rng)
        judge = lambda done: [] if done.code or how == "swap" else believed(path, raw, whole[path])
        try_file(shop, findings, f"{case} {how}", path, line, lambda f: f.write_bytes(raw), judge)
    findings.close()


JUNK = [None, True, 0, -1, 3, 10 ** 9, 10 ** 30, 0.5, math.nan, math.inf, "", "x", "folder:nowhere",
        [], [1, 2], ["x"], (), {}, {"x": 1}, {1: "x"}, torch.zeros(2), torch.zeros(0),
        torch.tensor(3), torch.tensor([True]), torch.full((2, 2), math.nan)]


def hand_made(state, rng):
    """A checkpoint's dict with one to three values replaced, removed, renamed or added."""
    root = {"": state}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        here, key = root, ""
        while rng.random() < 0.8 and isinstance(here[key], (dict, list)) and here[key]:
            here[key] = here = copy.copy(here[key])         # the caller's stays as it is
            keys = [*here] if isinstance(here, dict) else [*range(len(here))]
            key = rng.choice(keys)
        how = rng.choice(("replace", "replace", "replace", "remove", "rename", "add"))
        if how == "remove" and key != "":
            del here[key]
        elif how in ("rename", "add") and isinstance(here, dict) and key != "":
            value = here.pop(key) if how == "rename" else rng.choice(JUNK)
            here[rng.choice(("x", 3, None, f"{key}x"))] = value
        elif key == "":
            root[""] = rng.choice(JUNK) if rng.random() < 0.2 else root[""]
        else:
            here[key] = rng.choice(JUNK)
    return root[""]


def test_hand_made_files(shop):
    findings = Findings()
    paths = [path for path in sorted(READERS) if path.endswith((".pt", ".ckpt", ".bin"))]
    whole = {path: torch.load(shop.kept / path, weights_only=True) for path in paths}
    for case in numbers(100):
        rng = random.Random(f"hand {case}")
        path = paths[case % len(paths)]
        line = rng.choice(READERS[path].splitlines())
        state = hand_made(whole[path], rng)
        try_file(shop, findings, case, path, line, lambda file: torch.save(state, file))
    findings.close()


def test_a_folder_in_place_of_each_file(shop):
    findings = Findings()
    for path, lines in READERS.items():
        for line in lines.splitlines():
            try_file(shop, findings, "folder", path, line, os.mkdir)
    findings.close()


# --------------------------------------------------------------------------------------------------
# values out of range

CONTEXTS = [f"train {DIT} --data folder:in/pictures --out new",
            *(f"train --model {name} {TEXT} --data folder:in/jsonl --out new"
              for name in ("udit-nano", "unet-nano", "vq-nano", "tiny-ae", "kl-ae", "vq-vae")),
            f"sample --ckpt in/dit/ckpt.pt {PLAIN}",
            "evaluate --images in/shapes.npz --data shapes",
            "bench --models tiny-ae --steps 1 --batch-size 2 --image-size 8",
            f"adapters learn --base in/base.pt --data folder:in/jsonl {SHORT} --out new",
            f"custom_diffusion learn --base in/base.pt --concept folder:in/thing --category dog "
            f"--prior none {SHORT} --out new",
            "custom_diffusion merge in/concept/concept.pt in/other/concept.pt --base in/base.pt "
            "--captions in/captions.txt --ridge 0.1 --out new.pt",
            "custom_diffusion compress in/concept/concept.pt --base in/base.pt --out new.pt"]


def refused(field):
    """Values that a flag must refuse, by its type and the range that its field states."""
    if field.type in (int, float):
        within = field.metadata["within"]
        low, high = map(float, within[1:-1].split(","))
        found = ["nan", "inf", "-inf", "1e999", "x", "", " ", "1,5", "--", "0x10"]
        found += ["1.5", "1e3"] if field.type is int else ["1e"]
        for end, closed, outside in ((low, within[0] == "[", -1), (high, within[-1] == "]", 1)):
            if math.isfinite(end):
                beyond = [end + outside, end + outside * 1e9] + ([] if closed else [end])
                beyond += [] if field.type is int else [end + outside * 1e-6]
                found += [f"{field.type(value)!r}" for value in beyond]
        return found
    if field.metadata["choices"]:
        return ["no such", "", " ", field.metadata["choices"][0].upper() + "x"]
    return []


def test_a_value_out_of_range_of_every_flag(shop):
    """Refused, in a line that names the flag. What may be legal (30 digits, odd texts) ends well.
    A flag that several commands take from one class is tried in full with the first of them, and
    now and then with others."""
    findings, tried, rng = Findings(), set(), random.Random(f"value {FIRST}")
    for line in CONTEXTS:
        command, argv = split(line)
        for flag, field in fields_of(command, argv).items():
            new = (flag, str(field.metadata)) not in tried
            tried.add((flag, str(field.metadata)))
            values = [f"{flag}={value}" for value in refused(field)]
            values += [f"{flag}=1", f"--no-{flag[2:]}=x"] if field.type is bool else []
            for word in values if new or MANY else []:
                done, more = shop(command, [*argv, word]), []
                if done.code == 0:
                    more = [f"{word} is accepted"]
                elif not re.search(flag.replace("-", "[-_]") + r"\b|unknown argument", done.err):
                    more = [f"{flag} is not named"]
                findings.look(shop, command, [*argv, word], word, done, more)
            wild = {int: ["1" + 30 * "0", str(2 ** 31), str(2 ** 63)], float: ["1e300", "1e-300"],
                    str: ["", " ", "x", "\u0663", "a\nb", "x" * 5000], tuple: ["", "a\nb"]}
            wild = wild.get(field.type, []) if not field.metadata["choices"] else []
            some = 2 if new else rng.random() < 0.2
            for value in wild if MANY else rng.sample(wild, min(some, len(wild))):
                word = f"{flag}={value}"
                findings.look(shop, command, [*argv, word], word, shop(command, [*argv, word]))
    findings.close()
