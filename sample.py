"""Sampling: pictures from a checkpoint. Sizes, process, class names and words are read from it.

    python sample.py                                            # a labelled grid by the default run
    python sample.py --ckpt out/mine/ckpt.pt --class "red circle" --n 16 --strip --gif
    python sample.py --ckpt assets/unet-scenes.pt --prompt "a small red star on the left on navy"
    python sample.py --ckpt out/mine/ckpt.pt --init photo.png --strength 0.6        # image-to-image
    python sample.py --ckpt out/mine/ckpt.pt --init photo.png --mask mask.png       # inpainting
    python sample.py --ckpt out/mine/ckpt.pt --npz 50000        # to score elsewhere, see README.md
    python sample.py --ckpt assets/unet-scenes.pt --concept concept.pt --prompt "a <new1> circle"
    python sample.py --ckpt v1-5-pruned-emaonly.safetensors --prompt "an astronaut riding a horse"
    python sample.py --ckpt DiT-XL-2-256x256.pt --vae vae-ft-mse.safetensors --class 207"""
import copy
import dataclasses
import difflib
import json
import pathlib
import re
import shlex

import numpy as np
import torch
from PIL import Image, ImageOps

import data
from adapters import load_adapters, read_adapter, set_scale
from checkpoint import load_checkpoint, save_checkpoint, write_safetensors, written_whole
from cli import flag, one_line, parse, refuse, resolve_device
from custom_diffusion import apply_concept, load_concept
from data import make_grid, save_gif, save_grid, to_float, to_uint8
from models import FAMILIES, MERGES, base_task, find_model, official_task, task_from
from pretrained import (CUSTOM, PREFIXES, infer_dit, infer_udit, is_official, to_diffusers,
                        turned)
from tasks import sample_all
from udit import fold

MADE_BY, EXPORTED = "made by sample.py", "sample.py --export"   # marks in files: data.check_target
LICENCE = "of the code: MIT; of the weights: that of their data, and of the weights they began from"


@dataclasses.dataclass
class Options:
    """what to sample, and how"""
    ckpt: str = flag("out/DiT-128x4-2-shapes/ckpt.pt", "of train.py, or an official file")
    classes: str = flag(None, "--class: names or numbers, between commas (default: all, or 48)")
    prompt: str = flag(None, "what to sample, for models of captions; several between |", "text")
    negative: str = flag(None, "a prompt to steer away from, not from the empty one", "text")
    n: int = flag(None, "how many pictures (default: one of each)", "[1, 1e6]", needs="!npz")
    cfg_scale: float = flag(None, "guidance, 1 = none (default: the run's)", "[0, inf)")
    cfg_channels: int = flag(None, "guide the first so many channels; 3 = official DiT", "[1, inf)")
    sampler: str = flag(None, "ddim, ddpm, dpm++; flow: euler, heun; tokens: posterior, purity")
    steps: int = flag(None, "how many (default: the sampler's own)", "[1, inf)")
    truncation: float = flag(None, "tokens: keep the likeliest codes of this share", "(0, 1]")
    eta: float = flag(None, "ddim, euler: noise added back; 1 = as ddpm, or the SDE", "[0, 1]")
    seed: int = flag(None, "picture i is sampled from seed + i (default: 0)", "[0, 1e15)")
    batch_size: int = flag(None, "pictures at once (default: at most 64)", "[1, 1e9]")
    base: str = flag(None, "--ckpt adapter.pt or of unet-finetune: what it was trained on")
    scale: float = flag(None, "--ckpt adapter.pt: its strength, 0 = off (default: as trained)")
    concept: str = flag(None, "a concept, ours or published: its words work in --prompt")
    weights: str = flag(None, "of a run: averaged (ema, default) or raw", "", ["ema", "model"])
    device: str = flag(None, "where to run (default: auto)", "", ["auto", "cpu", "cuda", "mps"])
    vae: str = flag(None, "official files: the autoencoder, if it is not inside")
    bpe: str = flag(None, f"Stable Diffusion: CLIP's list of merges (default: {MERGES})")
    image_size: int = flag(None, "Stable Diffusion: side in pixels (default: 512)", "[64, 1e5]")
    dtype: str = flag(None, "of products (default: float32; official files on cuda: float16)", "",
                      ["float32", "float16", "bfloat16"])
    out: str = flag(None, "file for the grid (default: samples.png beside a run's checkpoint)")
    export: str = flag(None, "write a small checkpoint here instead of sampling")
    official: bool = flag(None, "--export as the official code reads it", needs="export")
    diffusers: bool = flag(None, "--export a folder that diffusers reads", needs="export !official")
    note: str = flag(None, "--export: a line that travels in the file", "text", needs="export")
    strip: bool = flag(None, "also NAME-strip.png: x_t above the guess at x0", needs="!npz")
    gif: bool = flag(None, "also NAME.gif: the same as a film", needs="!npz")
    npz: int = flag(None, "write so many pictures as uint8 NHWC arr_0 to NAME.npz", "[1, 1e6]")
    init: str = flag(None, "picture to start from: image-to-image, or inpainting with --mask")
    mask: str = flag(None, "for inpainting: white is painted anew, all else stays", needs="init")
    strength: float = flag(None, "image-to-image: noise level (0.6)", "(0, 1]", needs="init !mask")


def load(path, device="cpu", options=None):
    """Checkpoint -> (task, model in eval mode on the device). options: for what files do not say.
    Official files are known by their tensors. Raises ValueError for files that sample nothing."""
    options = options or Options()
    state = read_adapter(path) or (None if is_official(path) else load_checkpoint(path))
    if state is None:
        refuse(options, "weights base scale", f"is not for {path}, an official file")
        dtype = getattr(torch, options.dtype or ("float16" if device == "cuda" else "float32"))
        task = official_task(path, options.vae, dtype, options.bpe, options.image_size or 512)
        unread = "bpe image_size" * (task.tokenizer is None) + " dtype" * task.on_pixels
        refuse(options, unread + " vae image_size" * (task.shape[1:] == ()), f"is not for {path}")
    elif "tensors" in state:
        raise ValueError(f"{path} is a concept: say --ckpt BASE --concept {path}")
    elif "adapter" not in state:
        refuse(options, "base scale", f"is for adapters, and {path} is none")
        refuse(options, "vae bpe image_size", f"is for official files, and {path} is none")
        task = task_from(state, path, options.weights or "ema")
        task.dtype = getattr(torch, options.dtype or "float32")
    elif not options.base:
        raise ValueError(f"{path} is an adapter: give the --base that it was trained on")
    else:
        task = load(options.base, device, dataclasses.replace(options, base=None, scale=None))[0]
        load_adapters(task.model, state)
        set_scale(task.model, state["spec"]["scale"] if options.scale is None else options.scale)
        if words := state.get("modifiers"):
            refuse(options, "concept", f"is not read: {path} brings new words of its own")
            apply_concept(task.model, task.tokenizer, {}, words)
            task.info["examples"] = [f"a {thing}" for thing in state.get("concepts", words)]
    task.model = fold(task.model).to(device).eval().requires_grad_(False)   # fold: a cheaper U-DiT
    return task, task.model


def add_concept(path, task):
    """Put a concept into a text-to-image task -> the names of its things. Raises ValueError."""
    if task.tokenizer is None:
        raise ValueError("--concept needs a text-to-image --ckpt: this one was trained on classes")
    W, words, things = load_concept(path, task.model.denoiser.state_dict())
    apply_concept(task.model, task.tokenizer, W, words)
    task.model.to(next(task.model.parameters()).device).eval().requires_grad_(False)
    return things


def export(path, out, note="", form="", flags="", options=Options()):
    """Write what a checkpoint holds to `out`. form: "" in half precision, for sampling and --init;
    "official" as the official code reads it, also what was learned on options.base; "diffusers" a
    folder, also of a concept. note, flags: of the command, inside. Raises ValueError."""
    state, base = {} if is_official(path) else load_checkpoint(path), options.base
    if form == "diffusers" and "tensors" not in state:
        task, _ = load(path, options=options)
        files, config = to_diffusers(task), {"cfg_scale": task.settings.cfg_scale}
    else:
        if not base and not (state.get("task") in FAMILIES and ("opt" in state or form)):
            raise ValueError(f"{path} is no run's checkpoint: say --official, --base BASE")
        if not form:
            small = halved({k: v for k, v in state.items() if k not in ("model", "opt")})
            return save_checkpoint(out, {"made_by": EXPORTED, **small, "note": note})
        files, config = learned(path, state, base, form) if base else official(path, state)
        end = ".ckpt" if "state_dict" in files.get("", ()) else ".safetensors"
        if form == "official" and pathlib.Path(out).suffix != end:
            raise ValueError(f"--export {out}: give a name that ends in {end}")
    about = {"made_by": EXPORTED, "licence": LICENCE, "note": note,
             "command": f"python sample.py {flags}", "config": json.dumps(config)}
    for name, content in files.items():
        with written_whole(pathlib.Path(out, name)) as file:
            if name.endswith((".json", ".txt")):
                text = content if isinstance(content, str) else json.dumps(content, indent=1)
                file.write(text.encode())
            elif "state_dict" in content or name.endswith(".bin"):      # they read no other
                torch.save(content if name else {**content, **about}, file)
            else:
                write_safetensors(file, content, {"format": "pt", **about})


def halved(x):
    """Nested dicts with their numbers in half precision."""
    if isinstance(x, dict):
        return {key: halved(value) for key, value in x.items()}
    real = torch.is_tensor(x) and x.is_floating_point() and (x.abs() < 65504).all()
    return x.half() if real else x


def official(path, state):
    """A DiT or U-DiT, whose names are ours -> ({name: tensor}, arguments of its official class).
    Raises ValueError for another model, or one that the official code would draw otherwise."""
    task = task_from(state, path)
    if task.tokenizer or task.family not in (infer := {"dit": infer_dit, "udit": infer_udit}):
        raise ValueError(f"{path} is no DiT or U-DiT of classes: leave --official out")
    tensors = task.model.state_dict()
    there = {"conditioning": "adaln_zero", "qk_norm": False, "schedule": "linear", "prediction":
             "eps", "input_size": task.model.input_size, **infer[task.family](tensors)}
    here = {**vars(task.settings), **find_model(state["config"]["model"])[1],
            "num_classes": task.model.num_classes}
    for key in [k for k in there if here.get(k) not in (None, there[k])]:
        raise ValueError(f"{path} has {key} {here[key]}, and the official code {there[key]}: it "
                         "would draw something else")
    return {"": tensors}, there


def learned(path, state, base, form):
    """The same of an adapter, with its spec, or a concept: delta.ckpt, or for load_attn_procs and
    load_textual_inversion of diffusers. ValueError for another base. Source: get_deltas.py."""
    model = base_task(base).model
    if "adapter" in state:
        load_adapters(model, state)                         # it fits
        tensors = {**state["adapter"], **state.get("modifiers", {})}            # and new words
        return {"": tensors}, {**state["spec"], "base": state["base"]}
    W, rows, things = load_concept(path, unet := model.denoiser.state_dict())
    if form == "diffusers":
        theirs = dict(zip(unet, turned("unet", model.denoiser)["tensors"]))
        place = lambda name: re.sub(r"(to_[a-z]+)", r"processor.\1_custom_diffusion", theirs[name])
        if not all(".attn2." in name for name in W):
            raise ValueError(f"{path} changes more than diffusers can load: --part kv, crossattn")
        new = {place(name): w for name, w in W.items()}                 # {}: as it was
        new |= {name[:-11] + "processor": {} for name in theirs.values() if "attn1.to_q" in name}
        return {f"{CUSTOM}.bin": new, **{f"{w}.bin": {w: row} for w, row in rows.items()}}, {}
    W = {PREFIXES["unet"] + name: w for name, w in W.items()}
    W |= {"embed": torch.stack([*rows.values()])} if rows else {}               # (words, D)
    return {"": {"state_dict": W}}, {"concepts": things}


def choose_classes(text, names, count):
    """"3,red circle" -> [3, 0]; a name comes before a number. Raises ValueError."""
    asked = [item.strip() for item in text.split(",")] if text else []
    known = {str(k): k for k in range(count)} | {name: k for k, name in enumerate(names)}
    for item in [item for item in asked if item not in known]:
        near = difflib.get_close_matches(item, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {count}, numbered from 0"
        raise ValueError(f"unknown class {item!r}: {hint}")
    return [known[item] for item in asked]


def held_out(task, config, count):
    """`count` captions of the test split of config["data"], again from the first if it has fewer ->
    (ids (N, L), captions). Words that no training caption has share a row; long ones are cut."""
    where = {key: config[key] for key in ("image_size", "data_dir", "seed", "skip_bad")}
    found = data.load(config["data"], split="test", count=count, **where).captions
    if found is None:
        raise ValueError(f"this model samples from captions, and {config['data']} has none")
    tokenizer, captions = copy.copy(task.tokenizer), [found[i % len(found)] for i in range(count)]
    if tokenizer.open:
        return tokenizer(captions), captions
    words = [tokenizer.WORD.findall(caption.lower()) for caption in captions]
    if (unseen := sorted(set().union(*words) - tokenizer.ids.keys())) and tokenizer.reserved:
        print(f"unseen in training, read as one word ({len(unseen)}): {', '.join(unseen[:9])}")
        tokenizer.ids = {**dict.fromkeys(unseen, 3 + len(tokenizer.words)), **tokenizer.ids}
    return tokenizer([" ".join(line[:tokenizer.max_length - 2]) for line in words]), captions


def conditions(options, task, config=None):
    """What is asked for -> (y (N,) or (N, L), N names or None). config: says what data set the
    held-out captions of --npz are of; None = the run's. Raises ValueError."""
    if task.tokenizer is not None:
        refuse(options, "classes", "is for other models: say --prompt, not --class")
        if options.npz and options.prompt is None and not options.concept:
            if config := config or not is_official(options.ckpt) and (
                    load_checkpoint(options.ckpt).get("config")):
                return held_out(task, config, options.npz)
        asked = task.info["examples"] if options.prompt is None else options.prompt.split("|")
        asked = [str(text).strip() for text in asked] or [""]
    else:
        refuse(options, "prompt negative", "is for other models: say --class, not --prompt")
        names, count = task.info["class_names"], task.model.num_classes
        most = count if options.npz or options.n else 48 if names else 8
        asked = choose_classes(options.classes, names, count) or [*range(max(1, min(most, count)))]
    count = options.n or options.npz or len(asked)
    asked = [asked[i % len(asked)] for i in range(count)]
    if task.tokenizer is not None:
        return task.tokenizer(asked), asked
    return torch.tensor(asked), [names[i] for i in asked] if names else None


def read_picture(path, info, background="white"):
    """A picture file as (1, C, H, W) float in [-1, 1] at the model's size. Raises ValueError."""
    picture = to_float(data.read_image(path, info["image_size"], background))[None]  # (1, 3, H, W)
    return picture.mean(1, keepdim=True) if info["channels"] == 1 else picture


def read_mask(options, info):
    """--mask as (1, 1, H, W), 1 where it is white. Raises ValueError if it does not fit --init."""
    white = read_picture(options.mask, info, "black").mean(1, keepdim=True) > 0
    (w, h), (W, H) = (ImageOps.exif_transpose(Image.open(path)).size
                      for path in (options.mask, options.init))
    if abs(w * H - W * h) > 0.01 * W * h or not white.any():
        raise ValueError(f"--mask {options.mask}, {w} x {h}: give one of the shape of --init, "
                         f"{W} x {H}, and white where the picture shall be painted anew")
    return white.float()


def targets(options):
    """{kind: file that will be written}. The grid: --out; or samples.png beside a run's checkpoint;
    or, for other files, out/NAME.png. Raises ValueError if one cannot be written."""
    ckpt, run = pathlib.Path(options.ckpt).absolute(), pathlib.Path(options.ckpt).parent
    beside = run / "samples.png" if (run / "log.csv").is_file() else f"out/{ckpt.stem}.png"
    out = pathlib.Path(options.out or beside)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: give a picture's name, such as {out}.png")
    ends = {"npz": ".npz"} if options.npz else dict(grid=".png", strip="-strip.png", gif=".gif")
    files = {kind: out.with_name(out.stem + end) for kind, end in ends.items()
             if kind == "grid" or getattr(options, kind)}
    for file in files.values():
        data.check_target(file, MADE_BY.encode())
    return files


def write(files, images, x, y, names, film, classes=()):
    """Write what `targets` and main ask for. classes: the names of all of them."""
    scale = None if names else max(1, 64 // images.shape[-1])
    if "grid" in files:
        save_grid(images, files["grid"], nrow=8, captions=names, scale=scale, made_by=MADE_BY)
    if "npz" in files:
        arrays = {"captions": names} if y.dim() == 2 else {} if not (names or y.any()) else {
            "labels": y.numpy(), "class_names": np.array(classes, str)}
        with written_whole(files["npz"]) as file:                           # arr_0: (N, H, W, C)
            np.savez(file, made_by=MADE_BY.encode(), **arrays, arr_0=images.permute(0, 2, 3, 1))
    if "strip" in files:
        said, moments = zip(*(film[round(k * (len(film) - 1) / 9)] for k in range(10)))
        moments = torch.stack(moments, 1)[:8]                               # (N, 10, C, 2H, W)
        save_grid(moments.flatten(0, 1), files["strip"], 10, said * len(moments), made_by=MADE_BY)
    if "gif" in files:
        frames = [make_grid(x, captions=[said] * len(x)) for said, x in film]
        save_gif(frames + frames[-1:] * 10, files["gif"], made_by=MADE_BY)
    if "latents" in files:
        data.save_latents(files["latents"], x.cpu(), y)
        print("there is no autoencoder: pictures in false colours, and the latents themselves")
    print(f"{len(images)} pictures in {', '.join(map(str, files.values()))}")


@one_line
def main(argv):
    """The command: options -> files."""
    options, = parse([re.sub("^--class(?=$|=)", "--classes", x) for x in argv], __doc__, Options)
    if options.export:
        form = "official" * bool(options.official) or "diffusers" * bool(options.diffusers)
        also = "base" if form and options.base else "bpe vae weights" * (form == "diffusers")
        unread = vars(options).keys() - {*f"ckpt export note official diffusers {also}".split()}
        refuse(options, " ".join(sorted(unread)), "is not read beside --export, --base: omit it")
        data.check_target(options.export, EXPORTED.encode())
        export(options.ckpt, options.export, options.note or "", form, shlex.join(argv), options)
        return print(f"exported to {options.export}")
    device, files = resolve_device(options.device or "auto"), targets(options)
    (task, model), seed = load(options.ckpt, device, options), options.seed or 0
    read = ("cfg_scale", "cfg_channels", "sampler", "steps", "truncation", "eta")   # by a process
    given = {name: value for name in read if (value := getattr(options, name)) is not None}
    if given.get("cfg_scale", task.settings.cfg_scale if model.can_guide else 1) == 1:
        refuse(options, "negative cfg_channels", "is read with guidance alone: give a "
               "--cfg-scale other than 1, and a model that was trained with --class-dropout")
    if task.on_pixels and task.shape[0] not in (1, 3):
        refuse(options, "npz init", "needs an autoencoder: add --vae, or train with --first-stage")
        files["latents"] = files["grid"].with_suffix(".npz")
        data.check_target(files["latents"], data.LATENTS_MARK)
    if options.concept:
        print(f"new words: {', '.join(add_concept(options.concept, task)) or 'none'}")
    (y, names), per_picture, mask = conditions(options, task), {}, None
    if options.negative is not None:
        per_picture["null"] = task.tokenizer([options.negative] * len(y)).to(device)
    if options.init:
        original = read_picture(options.init, task.info).to(device)
        known = {"x_init": task.encode(original)}                           # one for all pictures
        given |= {} if options.mask else {"strength": options.strength or 0.6}
        if options.mask:
            mask = read_mask(options, task.info).to(device)                 # (1, 1, H, W)
            known["mask"] = task.first_stage.shrink_mask(mask)
        per_picture |= {k: v.expand(len(y), *v.shape[1:]) for k, v in known.items()}
    x, images, film = sample_all(task, model, y.to(device), seed, options.batch_size, per_picture,
                                 "strip" in files or "gif" in files, **given)
    if mask is not None:        # decoding changes even what was kept: put known pixels back
        images = torch.where(mask.cpu() > 0.5, images, to_uint8(original.cpu()))
    write(files, images, x, y, names, film, task.info["class_names"])


if __name__ == "__main__":
    main()
