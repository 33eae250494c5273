"""Sampling: draw pictures from a checkpoint. Everything but your wish comes from the checkpoint itself.

    python sample.py                                            # a labelled grid from the default run
    python sample.py --ckpt out/mine/ckpt.pt --class 3 --n 16 --cfg-scale 3
    python sample.py --ckpt out/unet-tiny-scenes/ckpt.pt --prompt "a small red star on the left on navy"
    python sample.py --ckpt out/mine/ckpt.pt --class "red circle" --strip --gif     # how noise becomes a picture
    python sample.py --ckpt out/mine/ckpt.pt --init photo.png --strength 0.6        # image-to-image
    python sample.py --ckpt out/mine/ckpt.pt --init photo.png --mask mask.png       # inpainting: white is painted anew
    python sample.py --ckpt out/mine/ckpt.pt --interpolate      # a walk between noises, row by row
    python sample.py --ckpt out/mine/ckpt.pt --npz 50000        # for the standard ADM evaluator
    python sample.py --ckpt adapter.pt --base assets/unet-scenes.pt --scale 0.7     # an adapter (adapters.py)
    python sample.py --ckpt assets/unet-scenes.pt --concept-weights concept.pt --prompt "a <new1> circle"
    python sample.py --ckpt v1-5-pruned-emaonly.safetensors --prompt "an astronaut riding a horse"  # official weights
    python sample.py --ckpt DiT-XL-2-256x256.pt --vae vae-ft-mse-840000-ema-pruned.safetensors --class 207   # or U-DiT

Picture i has a seed of its own (--seed + i), so it is the same picture whatever the batch size.
Contents: load (checkpoint -> task and averaged weights), draw (n pictures, for evaluate.py), the command line.
"""
import dataclasses
import difflib
import math
import pathlib
import sys

import numpy as np
import torch
from tqdm import tqdm

import data
from adapters import load_adapters, set_scale
from custom_diffusion import apply_concept, load_concept
from data import make_grid, save_gif, save_grid, to_float, to_uint8
from diffusion import randn
from dit import DiT, infer_config
from tasks import AUTOENCODERS, TASKS, DiffusionTask, load_first_stage, stable_diffusion
from train import SD_V1, Config, flag, parse, resolve_device
from udit import UDiT, fold
from udit import infer_config as infer_udit
from weights import (build, is_official, load_checkpoint, load_weights, read_stable_diffusion, read_weights,
                     save_checkpoint)


@dataclasses.dataclass
class Options:
    """What to draw and how."""
    ckpt: str = flag("out/DiT-128x4-2-shapes/ckpt.pt", "checkpoint of train.py, or an official file")
    classes: str = flag("", "--class: class numbers or names, separated by commas; default: all in turn (up to 48)")
    prompt: str = flag("", "what to draw, for models trained on captions; several prompts are separated by |")
    negative: str = flag("", "a prompt to steer away from, instead of from the empty one")
    n: int = flag(0, "how many pictures; default: one of each that is asked for")
    cfg_scale: float = flag(-1.0, "guidance: 1 = none; default: the run's own, or the official demo's")
    cfg_interval: str = flag("0,1", "guide only while the noise level (0 clean .. 1 noise) is in this range")
    cfg_channels: int = flag(0, "guide only so many channels, 0 = all; 3 reproduces the official DiT code")
    sampler: str = flag("", "ddpm, ddim, dpm++ (Gaussian); euler, heun (flow); posterior, fewer, purity (VQ); "
                            "default: what the run was trained for")
    steps: str = flag("", 'steps, or a respacing ("ddim25", "10,15,20"); default 25 (euler), 250 (ddpm), else 50')
    truncation: float = flag(1.0, "VQ: draw from the likeliest codes that make up this share of the probability")
    eta: float = flag(0.0, "noise added back by ddim: 0 none, 1 as much as ddpm")
    seed: int = flag(0, "picture i is drawn from seed + i")
    batch_size: int = flag(0, "pictures drawn at once; default: as many as make 65,536 numbers, at most 64")
    base: str = flag("", "--ckpt adapter.pt: the checkpoint that the adapter was trained on")
    scale: float = flag(-1.0, "--ckpt adapter.pt: strength of the adapter, 0 = off; default: as trained")
    concept_weights: str = flag("", "add what was learned of a thing: concept.pt of train.py --concept, a merge, or a "
                                    "file published for Stable Diffusion; its new words then work in --prompt")
    weights: str = flag("ema", "averaged or raw weights", choices=["ema", "model"])
    device: str = flag("auto", "auto, cpu, cuda or mps", choices=["auto", "cpu", "cuda", "mps"])
    vae: str = flag("", "official files: the autoencoder, for a DiT file, or instead of the one inside")
    bpe: str = flag("data/bpe_simple_vocab_16e6.txt.gz", "Stable Diffusion: CLIP's published list of merges")
    image_size: int = flag(512, "Stable Diffusion: side of the picture in pixels")
    dtype: str = flag("auto", "official files: float32, float16 or bfloat16; auto = float16 on cuda, else float32",
                      choices=["auto", "float32", "float16", "bfloat16"])
    out: str = flag("", "file for the grid; default samples.png beside the checkpoint")
    export: str = flag("", "write a small checkpoint here (averaged weights in half precision) instead of drawing")
    note: str = flag("", "--export: a line that travels in the file, for instance how it was trained")
    strip: bool = flag(False, "also NAME-strip.png: ten moments of the denoising, one row per picture")
    gif: bool = flag(False, "also NAME.gif: the denoising as a film")
    npz: int = flag(0, "write so many pictures, classes in turn, as uint8 NHWC arr_0 (and labels) to NAME.npz, and no "
                       "grid")
    interpolate: bool = flag(False, "rows of eight pictures between two noises each")
    init: str = flag("", "picture to start from: image-to-image, or inpainting with --mask")
    mask: str = flag("", "picture of the same shape: white is painted anew, black comes back untouched")
    strength: float = flag(0.6, "image-to-image: how much noise to start from, in (0, 1]")


def load(path, device="cpu", weights="ema", o=None):
    """Checkpoint -> (task, model in eval mode on the device).

    The task knows process, sizes, class names or vocabulary, and first stage. Official files are recognised by their
    tensors; `o` are the Options that they need. Raises ValueError, also for a checkpoint that draws nothing.
    """
    o = o or Options()
    if is_official(path):
        return load_official(path, device, o)
    state = load_checkpoint(path)
    if "adapter" in state:
        if not o.base:
            raise ValueError(f"{path} is an adapter: give its --base, which was {state.get('init', 'not recorded')}")
        task, model = load(o.base, device, weights, o)
        load_adapters(model, state)
        set_scale(model, state["spec"]["scale"] if o.scale < 0 else o.scale)
        return task, model.to(device).requires_grad_(False)
    if "tensors" in state:
        raise ValueError(f"{path} is a concept: say --ckpt BASE --concept-weights {path}")
    if state["task"] in AUTOENCODERS:
        raise ValueError(f"{path} is an autoencoder: it does not draw by itself; give a diffusion model's checkpoint")
    if "opt" in state and (state["config"].get("adapter") or state["config"].get("concept")):
        raise ValueError(f"{path} is a run's memory, for --resume: draw from the adapter.pt or concept.pt beside it")
    known = {f.name for f in dataclasses.fields(Config)}
    config = Config(**{k: v for k, v in state["config"].items() if k in known})
    task = TASKS[state["task"]](config, state["info"], load_first_stage(state, path))
    if weights not in state:
        raise ValueError(f"{path} was exported with its averaged weights alone: leave out --weights")
    load_weights(task.model, state[weights], path)
    task.model = fold(task.model) if isinstance(task.model, UDiT) else task.model       # the same function, cheaper
    task.model.to(device).eval().requires_grad_(False)
    return task, task.model


def load_official(path, device, o):
    """An official DiT, U-DiT or Stable Diffusion v1 file, or a diffusers folder -> (task, model). Raises ValueError.

    Source: the releases of DiT, U-DiT, Stable Diffusion v1.
    """
    dtype = getattr(torch, o.dtype if o.dtype != "auto" else "float16" if device == "cuda" else "float32")
    state = {} if pathlib.Path(path).is_dir() else read_weights(path)
    is_dit = "x_embedder.proj.weight" in state
    parts = {} if is_dit else read_stable_diffusion(path)
    if o.vae:
        parts["vae"] = read_stable_diffusion(o.vae)["vae"]
    if "unet" in parts:
        config = Config(**SD_V1 | {"image_size": o.image_size})
        task = stable_diffusion(config, parts, dtype, o.bpe, path)
        return task, task.model.to(device).eval().requires_grad_(False)
    vae = build(parts, dtype)["vae"].to(device).eval().requires_grad_(False) if "vae" in parts else None
    if not is_dit:
        raise ValueError(f"{path} holds {' and '.join(parts)} only: there is no model in it that draws")
    is_udit = "latent.0.attn1.to_qkv.weight" in state
    sizes = infer_udit(state) if is_udit else infer_config(state)
    model = UDiT(**sizes) if is_udit else DiT(**sizes)
    load_weights(model, state, path)
    model = fold(model) if is_udit else model
    model.to(device).eval().requires_grad_(False)
    # both: linear schedule, learned variance; guidance as in their demos
    config = Config(schedule="linear", prediction="eps", learn_sigma=sizes["learn_sigma"],
                    cfg_scale=1.5 if is_udit else 4.0)
    info = {"name": "", "class_names": [], "channels": sizes["in_channels"],
            "image_size": model.input_size * (vae.factor if vae else 1)}
    return DiffusionTask(config, info, model, vae), model


def export(path, out, note):
    """A checkpoint of ours -> one for sampling and --init alone: averaged weights in half precision, and a note.

    A fraction of the size: no raw weights, no optimizer. Raises ValueError for an official file.
    """
    state = load_checkpoint(path)
    if "format" not in state:
        raise ValueError(f"{path} is not a checkpoint of train.py; there is nothing to export")
    half = lambda weights: {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    small = {k: state[k] for k in ("format", "task", "config", "info", "step")}
    small |= {"ema": half(state["ema"]), "note": note}
    if "first_stage" in state:
        small["first_stage"] = {**state["first_stage"], "model": half(state["first_stage"]["model"])}
    save_checkpoint(out, small)


def seeds(first, count, device):
    """One generator per picture, seeded first, first + 1, ..."""
    return [torch.Generator(device).manual_seed(first + i) for i in range(count)]


def add_concept(path, task, model, device):
    """Put a concept's matrices and new words into a loaded text-to-image model. Raises ValueError if they do not fit.

    Source: Custom Diffusion §3.
    """
    if task.tokenizer is None:
        raise ValueError("--concept-weights needs a text-to-image --ckpt: this one was trained on classes")
    W, rows, concepts = load_concept(path, model.unet.state_dict())
    apply_concept(model, task.tokenizer, W, rows)
    model.to(device).eval().requires_grad_(False)
    print(f"new words: {', '.join(concepts) or 'none'}")


def draw_all(task, model, y, seed=0, batch_size=0, per_picture=(), keep_states=False, **options):
    """Draw for all conditions y (N,) or (N, L), batch by batch -> (model space (N, C, H, W), pictures, states).

    per_picture: {option: (N, ...) tensor or None}, cut like y; keep_states: also every step's x0 guess as pictures,
    one (N, C, H, W) per step. Other options as in DiffusionTask.sample. Source: DiT §4.
    """
    drawn, pictures, states = [], [], []
    batch_size = batch_size or max(1, min(64, 2 ** 16 // math.prod(task.shape)))
    for first in tqdm(range(0, len(y), batch_size), desc="drawing", disable=None, unit="batch"):
        rows = slice(first, first + batch_size)
        film, own = [], {k: v[rows] for k, v in dict(per_picture).items() if v is not None}
        watch = (lambda x0: film.append(task.to_pictures(x0).cpu())) if keep_states else None
        drawn.append(task.sample(model, y[rows], generator=seeds(seed + first, len(y[rows]), y.device), callback=watch,
                                 **own, **options))
        pictures.append(task.to_pictures(drawn[-1]).cpu())
        states.append(film)
    return torch.cat(drawn), torch.cat(pictures), [torch.cat(step) for step in zip(*states)]


def draw(path, n=480, cfg_scale=None, steps=None, seed=0, device="auto", batch_size=0, **options):
    """n pictures from a checkpoint, for evaluate.py: classes in turn, or captions that were held out of training.

    Returns (uint8 (N, C, H, W), labels (N,) or None, captions or None). cfg_scale, steps: None = the run's own.
    Raises ValueError. Source: DiT §4 (evaluation).
    """
    device = resolve_device(device)
    task, model = load(path, device)
    names, captions, labels = task.info["class_names"], None, None
    if task.tokenizer is not None:
        c = task.config
        held_out = data.load(c.data, c.image_size, "test", c.data_dir, count=n, seed=c.seed, skip_bad=c.skip_bad)
        captions = held_out.captions
        y = task.tokenizer(captions).to(device)                                 # (N, L)
    else:
        y = torch.arange(n, device=device) % max(1, task.model.num_classes)     # (N,)
        labels = y.cpu() if names else None
    _, images, _ = draw_all(task, model, y, seed, batch_size, cfg_scale=cfg_scale, steps=steps, **options)
    return images, labels, captions


def choose_classes(text, names, num_classes):
    """"3,red circle" -> [3, 0]; raises ValueError for a number out of range or an unknown name (nearest suggested)."""
    chosen = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        if item.lstrip("-").isdigit():
            if not 0 <= int(item) < num_classes:
                raise ValueError(f"class {item} is out of range: this checkpoint knows classes 0 to {num_classes - 1}")
            chosen.append(int(item))
        elif item in names:
            chosen.append(names.index(item))
        else:
            near = difflib.get_close_matches(item, names, 1)
            hint = f": did you mean {near[0]!r}?" if near else f": this checkpoint knows {', '.join(names[:8])} ..."
            raise ValueError(f"unknown class {item!r}" + hint)
    return chosen


def conditions(o, task):
    """What is to be drawn -> (y (N,) or (N, L), N names or None). Raises ValueError for unknown words and classes."""
    if task.tokenizer is not None:
        if o.classes:
            raise ValueError("this checkpoint was trained on captions: say --prompt instead of --class")
        prompts = [p.strip() for p in o.prompt.split("|")] if o.prompt else task.info["examples"]
    elif o.prompt or o.negative:
        raise ValueError("this checkpoint was trained on classes: say --class instead of --prompt")
    else:
        names, num_classes = task.info["class_names"], task.model.num_classes
        some = range(min(48 if names else 8, max(1, num_classes)))
        prompts = choose_classes(o.classes, names, num_classes) or list(some)
    count = o.n or o.npz or (8 * len(prompts[:4]) if o.interpolate else len(prompts))
    asked = [prompts[(i // 8 if o.interpolate else i) % len(prompts)] for i in range(count)]     # a walk stays with one
    if task.tokenizer is not None:
        return task.tokenizer(asked), asked
    return torch.tensor(asked), [names[i] for i in asked] if names else None


def read_picture(path, info, count):
    """A picture file as (count, C, H, W) float in [-1, 1] at the model's size. Raises ValueError naming the file."""
    if not pathlib.Path(path).is_file():
        raise ValueError(f"no picture at {path}")
    picture = to_float(data.read_image(path, info["image_size"]))[None]                     # (1, 3, H, W)
    picture = picture.mean(1, keepdim=True) if info["channels"] == 1 else picture
    return picture.expand(count, -1, -1, -1)


def run(o):
    """Options -> files; prints where they are. Raises ValueError."""
    if o.export:
        export(o.ckpt, o.export, o.note)
        print(f"exported to {o.export}")
        return
    device = resolve_device(o.device)
    task, model = load(o.ckpt, device, o.weights, o)
    if o.concept_weights:
        add_concept(o.concept_weights, task, model, device)
    y, names = conditions(o, task)
    out = pathlib.Path(o.out) if o.out else pathlib.Path(o.ckpt).with_name("samples.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        low, high = map(float, o.cfg_interval.split(","))
    except ValueError:
        raise ValueError(f"--cfg-interval {o.cfg_interval}: give two numbers, low,high, between 0 and 1") from None
    if o.mask and not o.init:
        raise ValueError("--mask needs --init: the picture whose black-masked part is to be kept")
    options = {"cfg_scale": None if o.cfg_scale < 0 else o.cfg_scale, "cfg_interval": (low, high), "eta": o.eta,
               "cfg_channels": o.cfg_channels or None, "sampler": o.sampler or None,
               "steps": int(o.steps) if o.steps.isdigit() else o.steps or None}

    own, original, mask = {}, None, None                                        # what each picture has of its own
    if o.interpolate:
        own["noise"] = interpolated_noise(len(y), task.shape, o.seed, device)
    if o.truncation < 1:
        options["truncation"] = o.truncation
    if o.negative:
        own["null"] = task.tokenizer([o.negative] * len(y)).to(device)
    if o.init:
        original = read_picture(o.init, task.info, len(y)).to(device)
        own["x_init"], options["strength"] = task.encode(original), 1.0 if o.mask else o.strength
    if o.mask:
        mask = (read_picture(o.mask, task.info, len(y)).mean(1, keepdim=True) > 0).float().to(device)     # (N, 1, H, W)
        own["mask"] = task.shrink_mask(mask)
    x, images, film = draw_all(task, model, y.to(device), o.seed, o.batch_size, own, o.strip or o.gif, **options)
    if mask is not None:        # decoding a latent changes even what was kept: known pixels are put back as given
        images = torch.where(mask.cpu() > 0.5, images, to_uint8(original.cpu()))
    write(o, out, task, images, x, y, names, film)


def write(o, out, task, images, x, y, names, film):
    """The files that were asked for: npz, or grid, strip, film, and latents that nothing here can decode."""
    if o.npz:
        labels = {"labels": y.numpy()} if y.dim() == 1 and names else {}
        np.savez(out.with_suffix(".npz"), arr_0=images.permute(0, 2, 3, 1).numpy(), **labels)   # (N, H, W, C)
        print(f"{len(images)} pictures in {out.with_suffix('.npz')}")
        return
    save_grid(images, out, nrow=8, captions=names, scale=None if names else max(1, 64 // images.shape[-1]))
    print(f"{len(images)} pictures in {out}")
    if task.first_stage is None and task.shape[0] not in (1, 3):
        data.save_latents(out.with_suffix(".pt"), x.cpu(), y)
        print(f"these are latents in false colours; the latents themselves are in {out.with_suffix('.pt')}")
    if o.strip:
        moments = [film[round(k * (len(film) - 1) / 9)] for k in range(10)]
        path = out.with_name(out.stem + "-strip.png")
        save_grid(torch.stack(moments, 1)[:8].flatten(0, 1), path, nrow=10, scale=2)    # first eight, ten moments each
        print(f"strip in {path}")
    if o.gif:
        frames = [make_grid(x, nrow=8, scale=2) for x in [*film, *[film[-1]] * 10]]     # the end stays for a while
        save_gif(frames, out.with_suffix(".gif"))
        print(f"film in {out.with_suffix('.gif')}")


def interpolated_noise(count, shape, seed, device):
    """Rows of eight noises on the great circle between two draws, (count, *shape): every point has the norm of noise.

    Source: DDIM §5.3.
    """
    rows = []
    for row in range((count + 7) // 8):
        a, b = randn((2, *shape), seeds(seed + 2 * row, 2, device), device)     # each (C, H, W)
        angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
        ks = torch.linspace(0, 1, 8, device=device).view(8, 1, 1, 1)
        arc = torch.sin((1 - ks) * angle) * a + torch.sin(ks * angle) * b       # (8, C, H, W)
        rows.append(arc / torch.sin(angle))
    return torch.cat(rows)[:count]


def main(argv=None):
    """Command line of sample.py; exit code 2 and one line for anything that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    argv = ["--classes" + a[7:] if a == "--class" or a.startswith("--class=") else a for a in argv]
    try:
        run(parse(Options, argv, __doc__))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
