"""No silent flag: another legal value changes what a command does, or is refused with the reason.

Every flag of every options class is found by itself, and set beside a line of each context that
accepts it (a family of models, a kind of checkpoint). What a command did is: the tensors, pictures,
rows and words it wrote, the files it made, its steps, saves and compilations. Copies of the flags
themselves (config.json, "config" in a checkpoint) do not count.

    python -m pytest tests/test_flags.py
"""
import copy
import dataclasses
import functools
import hashlib
import pickle
import re
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from test_fuzz import (DIT, MANY, PLAIN, SHORT, TEXT, fields_of, shop,         # noqa: F401
                       split, tree)

import bench
import models
import tasks
import train
from cli import flag
from studies import meters

RECORDS = ("config", "settings", "options")             # of a checkpoint: the flags themselves
BOLD = "--steps 2 --warmup 0 --lr 0.05"          # so that two steps change a model for all to see
LONG = DIT.replace("--steps 1", BOLD), TEXT.replace("--steps 1", BOLD)
LEARN = SHORT.replace("--steps 1", BOLD)
OFFICIAL = f"--image-size 64 --n 2 --prompt low --bpe in/merges.txt {PLAIN}"
CONTEXTS = {        # name: (command line, what it is)
    "train dit": f"train {LONG[0]} --data folder:in/pictures --out new",
    "train dit linear": f"train {LONG[0]} --data folder:in/pictures --schedule linear --out new",
    "train dit latent": f"train {LONG[0]} --data folder:in/pictures --model DiT-32x1/2 "
                        "--first-stage in/ae/ckpt.pt --out new",
    "train dit new": f"train {LONG[0]} --data folder:in/pictures --model DiT-32x1/2 --first-stage "
                     "new --first-stage-steps 1 --out new",
    "train udit": f"train --model udit-nano {LONG[1]} --data folder:in/pictures --out new",
    "train unet": f"train --model unet-nano {LONG[1]} --data folder:in/jsonl --first-stage none "
                  "--out new",
    "train encoder": f"train --model unet-nano {LONG[1]} --data folder:in/jsonl --first-stage none "
                     "--text-encoder in/sd.safetensors --bpe in/merges.txt --out new",
    "train vq": f"train --model vq-nano {LONG[1]} --data folder:in/jsonl --first-stage "
                "in/vqvae/ckpt.pt --init in/vq/ckpt.pt --out new",
    "train tiny-ae": f"train --model tiny-ae {LONG[1]} --data folder:in/pictures --out new",
    "train kl-ae": f"train --model kl-ae {LONG[1]} --data folder:in/pictures --out new",
    "train vq-vae": f"train --model vq-vae {LONG[1]} --data folder:in/pictures --codes 8 "
                    "--factor 2 --out new",
    "sample pixels": f"sample --ckpt in/dit/ckpt.pt --n 2 {PLAIN}",
    "sample gauss": f"sample --ckpt in/gauss/ckpt.pt --n 2 {PLAIN}",
    "sample latents": f"sample --ckpt in/latent/ckpt.pt --n 2 {PLAIN}",
    "sample text": f"sample --ckpt in/base.pt --prompt dog --n 2 {PLAIN}",
    "sample tokens": f"sample --ckpt in/vq/ckpt.pt --prompt dog --n 2 {PLAIN}",
    "sample photo": f"sample --ckpt in/latent/ckpt.pt --init in/photo.png --n 2 {PLAIN}",
    "sample adapter": "sample --ckpt in/adapter/adapter.pt --base in/base.pt --prompt dog --n 2 "
                      + PLAIN,
    "sample official": f"sample --ckpt in/dit.bin --vae in/vae.safetensors --class 1 {PLAIN}",
    "sample stable": f"sample --ckpt in/sd.safetensors {OFFICIAL}",
    "sample export": "sample --ckpt in/dit/ckpt.pt --export new.pt",
    "sample folder": "sample --ckpt in/base.pt --export new --diffusers",
    "sample stable folder": "sample --ckpt in/sd.safetensors --bpe in/merges.txt --export new "
                            "--diffusers",
    "evaluate run": "evaluate --ckpt in/dit/ckpt.pt --n 2 --steps 2 --device cpu",
    "evaluate images": "evaluate --images in/few.npz --data folder:in/pictures --device cpu",
    "evaluate shapes": "evaluate --images in/shapes.npz --data shapes",
    "bench": "bench --models tiny-ae --steps 1 --batch-size 2 --image-size 8 --device cpu",
    "bench overfit": "bench --models tiny-ae --overfit --steps 2 --batch-size 2 --image-size 8 "
                     "--device cpu",
    "adapters": "adapters learn --base in/base.pt --concept folder:in/thing --category dog "
                f"--prior folder:in/jsonl --rank 2 {LEARN} --batch-size 8 --out new",
    "concepts": "custom_diffusion learn --base in/base.pt --concept folder:in/thing --category dog "
                f"--prior folder:in/jsonl {LEARN} --batch-size 8 --out new",
    "merge": "custom_diffusion merge in/concept/concept.pt in/other/concept.pt --base in/base.pt "
             "--captions in/captions.txt --ridge 0.1 --out new.pt",
    "compress": "custom_diffusion compress in/concept/concept.pt --base in/base.pt --out new.pt"}

# another legal value for flags whose type does not tell one
OTHER = {"model": "DiT-32x1/1", "data": "npz:in/samples.npz", "data_dir": "in/official",
         "image_size": "16", "batch_size": "4", "steps": "3", "lr": "0.7", "grad_clip": "0.001",
         "ema": "0.05", "out": "elsewhere", "init": "in/exported.pt", "save_latents": "z.npz",
         "first_stage": "in/vqvae/ckpt.pt", "ckpt": "in/udit/ckpt.pt", "classes": "pear",
         "prompt": "cat", "negative": "cat", "base": "in/unet/ckpt.pt",
         "concept": "in/concept/concept.pt", "vae": "in/vae.safetensors", "bpe": "in/captions.txt",
         "export": "small.pt", "note": "words", "mask": "in/mask.png", "json": "scores.json",
         "images": "in/samples.npz", "models": "DiT-32x1/2", "category": "cat", "prior": "none",
         "files": "in/small.pt", "sampler": "ddim", "codes": "16",
         "factor": "2", "n": "3", "log_every": "1", "sample_every": "1", "save_every": "1",
         "text_encoder": "in/dit.bin", "warmup": "9", "cfg_channels": "1", "min_snr": "1e-6"}
INSIDE = {("train vq-vae", "factor"): "4", ("train vq", "first_stage"): "in/ae/ckpt.pt",
          ("train vq", "cfg_scale"): "1e4",             # after two steps words change little yet
          ("train vq", "data"): "folder:in/few", ("train kl-ae", "model"): "tiny-ae",
          ("sample gauss", "sampler"): "ddpm",
          ("sample official", "sampler"): "ddim", ("sample stable", "sampler"): "ddpm",
          ("sample photo", "init"): "in/mask.png", ("sample official", "vae"): "in/photo.png",
          ("sample stable", "vae"): "in/photo.png",
          ("merge", "captions"): "in/more.txt",
          ("sample", "init"): "in/photo.png", ("sample", "out"): "other.png",
          ("sample", "image_size"): "128", ("concepts", "concept"): "folder:in/txt",
          ("adapters", "concept"): "folder:in/txt",
          ("merge", "out"): "other.pt", ("compress", "out"): "other.pt",
          ("bench", "image_size"): "16", ("evaluate", "data"): "folder:in/txt"}
EXCUSED = {         # flag, or "context flag": why it may change nothing
    "device": "a machine without a GPU has one device",
    "accum": "the same result by its definition: test_registry_runs.py compares",
    "checkpointing": "the same result by its definition: test_registry_runs.py compares",
    "data_dir": "a place to look for official files: test_official_files_are_looked_for",
    "skip_bad": "a permission: test_skip_bad",
    "train vq relative": "its --init has no such weights, and says which: test_tokens.py",
    "train vq learned_null": "its --init has no such weights, and says which: test_tokens.py",
    "sample tokens dtype": "it may change no token in two steps: test_sample.py has a larger model",
    "batch_size": "of sampling: picture i has its own seed; its passes are counted in one context"}


# read by the loop, which does not ask what it trains: tried with one model, with FUZZ with all
LOOP = ("steps", "batch_size", "lr", "weight_decay", "warmup", "lr_decay", "grad_clip", "ema",
        "seed", "compile", "precision", "out", "log_every", "log_to", "sample_every", "save_every",
        "keep")
# a refusal may name what no longer fits in place of these, which choose or change all else
CHOOSERS = ("model", "ckpt", "models", "images", "files", "padding", "save_latents")


def legal(where, command, name, field):
    """Other legal values of a flag, as words of a command line."""
    word = "--" + ("class" if name == "classes" else name.replace("_", "-"))
    if field.type is bool:
        return [[word], ["--no-" + word[2:]]]
    if field.metadata["choices"]:
        choices = field.metadata["choices"]
        return [[word, choice] for choice in choices[:: max(1, len(choices) // 6)]]
    value = INSIDE.get((where, name)) or INSIDE.get((command, name)) or OTHER.get(name)
    if value is None:
        value = {int: "3", float: "0.7", str: "x", tuple: "x"}[field.type]
    return [[word, value]]


def digest(path):
    """What stands in a file, without copies of the flags and without times."""
    if path.suffix == ".pt":
        state = {k: v for k, v in Bytes(path).load().items() if k not in RECORDS}
        return hashlib.sha256(repr(state).encode()).hexdigest()
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: (arrays[name].shape, arrays[name].tobytes()) for name in arrays.files}
    if path.name == "log.csv":
        rows = [line.split(",") for line in path.read_text().split()]
        keep = [k for k, name in enumerate(rows[0] if rows else ()) if name != "seconds"]
        return [[row[k] for k in keep] for row in rows]
    return path.read_bytes()


class Bytes(pickle.Unpickler):
    """A file of torch.save, read without torch, which takes ten times as long: a tensor becomes
    its storage's bytes, offset, shape and strides."""

    def __init__(self, path):
        self.zipped = zipfile.ZipFile(path)
        pickled, = (name for name in self.zipped.namelist() if name.endswith("/data.pkl"))
        self.folder = pickled.removesuffix("data.pkl")
        super().__init__(self.zipped.open(pickled))

    def find_class(self, module, name):
        return (OrderedDict if name == "OrderedDict" else f"{module}.{name}"
                if "Storage" in name else lambda *given: given)

    def persistent_load(self, place):
        return place[1], self.zipped.read(f"{self.folder}data/{place[2]}")


@pytest.fixture(scope="module")
def did(shop):                                                                  # noqa: F811
    """did(command, argv) -> (exit code, error, evidence); the box is put right again."""
    notes = []

    def noting(name, function):
        def noted(*given, **how):
            notes.append((name, given[-1] if name == "save" else given[1].images.shape))
            return function(*given, **how)
        return noted

    def run(command, argv):
        notes.clear()
        done = shop(command, argv, 20)
        files = {path: digest(shop.box / path) for path in {*done.new, *done.changed}
                 if (shop.box / path).is_file() and not path.endswith("config.json")}
        shop.restore(done)
        words = re.sub(r"[-\s\d.e+]+", "", done.out) if command == "bench" else done.out
        return done.code, done.err + done.trace, (files, words, list(notes), shop.count, done.code)
    tokenizer = functools.cache(models.CLIPTokenizer)       # slow to make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "CLIPTokenizer", lambda path="", merges=(): copy.deepcopy(
            tokenizer(path, tuple(merges))))
        patch.setattr(tasks, "macs", lambda task: 0)            # what the banner tells
        patch.setattr(torch.nn.Module, "compile", lambda net: notes.append("compiled"))
        patch.setattr(train, "save", noting("save", train.save))
        patch.setattr(meters, "make_step", noting("shape", meters.make_step))
        yield run


def silent(did, where, line, only=()):
    """The flags of a context that change nothing and are not refused, each with what was said."""
    command, argv = split(line)
    code, error, plain = did(command, argv)
    assert code in (0, 1), f"{where}: {error}"
    assert did(command, argv)[2] == plain, f"{where}: the same line does two things"
    found = {}
    for word, field in fields_of(command, argv).items():
        name, results = field.name, []
        again = name in LOOP and where != "train dit" and not MANY and (
            where[:5] in ("train", "adapt", "conce"))
        excused = {name, f"{where} {name}"} & EXCUSED.keys()
        if excused or again or only and name not in only:
            continue
        for words in legal(where, command, name, field):
            code, error, evidence = did(command, [*argv, *words])
            named = re.search(rf"{name}|{name.replace('_', '-')}|{word}\b", error) or (
                words[-1] in error)
            if code == 2 and not named and name not in CHOOSERS:
                results.append(f"refused without its name: {error.strip()[-160:]}")
            elif code == 2 or code in (0, 1) and evidence != plain:
                results.append("")
            else:
                results.append(f"silent: {words}" if code in (0, 1) else error.strip()[-300:])
        # one of the choices is what there was, and auto is the same as another
        choices = field.metadata["choices"] or ()
        may_be_silent = 1 + ("auto" in choices) if choices or field.type is bool else 0
        if sum(map(bool, results)) > may_be_silent or not any(result == "" for result in results):
            found[word] = max(results, key=bool)
    return found


@pytest.mark.parametrize("where", CONTEXTS)
def test_no_flag_is_silent(did, where):
    found = silent(did, where, CONTEXTS[where])
    assert not found, f"{where}: {len(found)} flags\n" + "\n".join(
        f"  {word}: {why}" for word, why in found.items())


def test_a_planted_silent_flag_is_noticed(did, monkeypatch):
    """A new flag that nobody reads, and one that is refused without its name."""
    planted = dataclasses.make_dataclass("Config", [
        ("silent", int, flag(1, "read by nobody", "[1, inf)")),
        ("quiet", bool, flag(False, "read by nobody"))], bases=(train.Config,),
        namespace={"__doc__": "flags of the loop"})
    monkeypatch.setattr(train, "Config", planted)
    found = silent(did, "train dit", CONTEXTS["train dit"], ("silent", "quiet", "seed", "steps"))
    assert found.keys() == {"--silent", "--quiet"} and "silent: ['--silent', '3']" in (
        found["--silent"])


def test_one_flag_has_one_range():
    """A flag that several commands have means the same, so its range is the same."""
    found = {}
    for line in CONTEXTS.values():
        command, argv = split(line)
        for word, field in fields_of(command, argv).items():
            if field.type in (int, float) and (command, word) != ("sample", "--image-size"):
                # there it is the size of Stable Diffusion's pictures alone
                found.setdefault((word, field.type), {})[field.metadata["within"]] = command
    assert not {key: ranges for key, ranges in found.items() if len(ranges) > 1}


def test_official_files_are_looked_for(did):
    """--data-dir, where it is read."""
    line = DIT.replace("--image-size 8", "--image-size 32") + " --data mnist --out new --data-dir"
    assert did(*split(f"train {line} in/official"))[0] == 0
    code, error, _ = did(*split(f"train {line} elsewhere"))
    assert code == 2 and "elsewhere" in error


def test_skip_bad(did, shop):                                                   # noqa: F811
    """--skip-bad, where there is something to skip."""
    line = f"train {DIT} --data folder:in/pictures --out new"
    plain, bad = did(*split(line)), shop.box / "in" / "pictures" / "apple" / "0.png"
    kept = bad.read_bytes()
    bad.write_bytes(b"no picture")
    shop.before = tree(shop.box)
    code, error, _ = did(*split(line))
    skipping = did(*split(line + " --skip-bad"))
    bad.write_bytes(kept)
    shop.before = tree(shop.box)
    assert code == 2 and "--skip-bad" in error and skipping[0] == 0 and skipping[2] != plain[2]
