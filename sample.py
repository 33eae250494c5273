"""Sampling: draw pictures from a checkpoint. Everything but your wish comes from the checkpoint itself.

    python sample.py                                            # a labelled grid from the default run
    python sample.py --ckpt out/mine/ckpt.pt --class 3 --n 16 --cfg-scale 3
    python sample.py --ckpt out/mine/ckpt.pt --class "red circle" --strip --gif     # how noise becomes a picture
    python sample.py --ckpt out/mine/ckpt.pt --init photo.png --strength 0.6        # image-to-image
    python sample.py --ckpt out/mine/ckpt.pt --init photo.png --mask mask.png       # inpainting: white is painted anew
    python sample.py --ckpt out/mine/ckpt.pt --interpolate      # a walk between noises, row by row
    python sample.py --ckpt out/mine/ckpt.pt --npz 50000        # for the standard ADM evaluator
    python sample.py --ckpt DiT-XL-2-256x256.pt --class 207     # official weights: latents of ImageNet classes

Picture i has a seed of its own (--seed + i), so it is the same picture whatever the batch size.
Contents: load (checkpoint -> task and averaged weights), draw (n pictures, for evaluate.py), the command line.
"""
import dataclasses
import difflib
import pathlib
import sys

import numpy as np
import torch
from tqdm import tqdm

import data
from data import make_grid, save_gif, save_grid, to_float
from diffusion import randn
from dit import infer_config
from train import (AutoencoderTask, Config, DiffusionTask, UserError, flag, load_checkpoint, load_first_stage,
                   load_weights, parse, resolve_device)


@dataclasses.dataclass
class Options:
    """What to draw and how."""
    ckpt: str = flag("out/DiT-128x4-2-shapes/ckpt.pt", "checkpoint of train.py, or an official DiT file")
    classes: str = flag("", "what to draw: class numbers or names, separated by commas; default: all in turn (up to "
                            "48)")
    n: int = flag(0, "how many pictures; default: one per class asked for")
    cfg_scale: float = flag(-1.0, "guidance: 1 = none; default: the run's own, 4 for official files")
    cfg_interval: str = flag("0,1", "guide only while the noise level (0 clean .. 1 noise) is in this range")
    cfg_channels: int = flag(0, "guide only so many channels, 0 = all; 3 reproduces the official DiT code")
    sampler: str = flag("", "ddpm, ddim, dpm++ (Gaussian) or euler, heun (flow); default: what the run was trained for")
    steps: str = flag("", 'denoising steps, or a respacing such as "ddim25" or "10,15,20"; default 50, 250 for ddpm')
    eta: float = flag(0.0, "noise added back by ddim: 0 none, 1 as much as ddpm")
    seed: int = flag(0, "picture i is drawn from seed + i")
    batch_size: int = flag(64, "pictures drawn at once")
    weights: str = flag("ema", "averaged or raw weights", choices=["ema", "model"])
    device: str = flag("auto", "auto, cpu, cuda or mps", choices=["auto", "cpu", "cuda", "mps"])
    out: str = flag("", "file for the grid; default samples.png beside the checkpoint")
    strip: bool = flag(False, "also NAME-strip.png: ten moments of the denoising, one row per picture")
    gif: bool = flag(False, "also NAME.gif: the denoising as a film")
    npz: int = flag(0, "write so many pictures, classes in turn, as uint8 NHWC arr_0 (and labels) to NAME.npz, and no "
                       "grid")
    interpolate: bool = flag(False, "rows of eight pictures between two noises each")
    init: str = flag("", "picture to start from: image-to-image, or inpainting with --mask")
    mask: str = flag("", "picture of the same shape: white is painted anew, black comes back untouched")
    strength: float = flag(0.6, "image-to-image: how much noise to start from, in (0, 1]")


def load(path, device="cpu", weights="ema"):
    """Checkpoint -> (task, model in eval mode on the device).

    The task knows process, sizes, class names and first stage. An official DiT file is recognised by its tensors; its
    task draws latents. Raises UserError.
    """
    state = load_checkpoint(path)
    if "format" not in state:
        try:
            shape = infer_config(state["model"])
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        task = DiffusionTask.official(shape)
    else:
        known = {f.name for f in dataclasses.fields(Config)}
        config = Config(**{k: v for k, v in state["config"].items() if k in known})
        build = AutoencoderTask if state["task"] == "tiny-ae" else DiffusionTask
        extra = {} if state["task"] == "tiny-ae" else {"first_stage": load_first_stage(state, path)}
        task = build(config, state["info"], **extra)
    load_weights(task.model, state[weights], path)
    task.model.to(device).eval().requires_grad_(False)
    return task, task.model


def seeds(first, count, device):
    """One generator per picture, seeded first, first + 1, ..."""
    return [torch.Generator(device).manual_seed(first + i) for i in range(count)]


def draw(path, n=480, cfg_scale=None, steps=None, seed=0, device="auto", batch_size=64, **options):
    """n pictures from a checkpoint, classes in turn, for evaluate.py.

    Returns (uint8 (N, C, H, W), labels (N,) or None, captions None). cfg_scale, steps: None = the run's own.
    Raises UserError for a checkpoint that draws nothing. Source: DiT §4 (evaluation).
    """
    device = resolve_device(device)
    task, model = load(path, device)
    if not hasattr(task, "sample"):
        raise UserError(f"{path} is an autoencoder: it reconstructs, it does not draw; give a diffusion checkpoint")
    names = task.info["class_names"]
    y = torch.arange(n, device=device) % max(1, len(names))
    if cfg_scale is not None:
        options["cfg_scale"] = cfg_scale
    if steps is not None:
        options["steps"] = steps
    images = []
    for first in tqdm(range(0, n, batch_size), desc="drawing", disable=None, unit="batch"):
        part = y[first:first + batch_size]
        generator = seeds(seed + first, len(part), device)
        images.append(task.to_pictures(task.sample(model, part, generator=generator, **options)).cpu())
    return torch.cat(images), y.cpu() if names else None, None


def choose_classes(text, names, num_classes):
    """"3,red circle" -> [3, 0]; raises UserError for a number out of range or an unknown name (nearest suggested)."""
    chosen = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        if item.lstrip("-").isdigit():
            if not 0 <= int(item) < num_classes:
                raise UserError(f"class {item} is out of range: this checkpoint knows classes 0 to {num_classes - 1}")
            chosen.append(int(item))
        elif item in names:
            chosen.append(names.index(item))
        else:
            near = difflib.get_close_matches(item, names, 1)
            hint = f": did you mean {near[0]!r}?" if near else f": this checkpoint knows {', '.join(names[:8])} ..."
            raise UserError(f"unknown class {item!r}" + hint)
    return chosen


def read_picture(path, info, device, count):
    """A picture file as (count, C, H, W) float in [-1, 1] at the model's size. Raises UserError naming the file."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"no picture at {path}")
    picture = to_float(data.read_image(path, info["image_size"]))[None]                     # (1, 3, H, W)
    picture = picture.mean(1, keepdim=True) if info["channels"] == 1 else picture
    return picture.expand(count, -1, -1, -1).to(device)


def run(o):
    """Options -> files; prints where they are. Raises UserError."""
    device = resolve_device(o.device)
    task, model = load(o.ckpt, device, o.weights)
    if not hasattr(task, "sample"):
        raise UserError(f"{o.ckpt} is an autoencoder: it does not draw by itself; give the checkpoint of a diffusion "
                        "model")
    names, num_classes = task.info["class_names"], task.model.num_classes
    chosen = choose_classes(o.classes, names, num_classes) or list(range(min(48 if names else 8, max(1, num_classes))))
    out = pathlib.Path(o.out) if o.out else pathlib.Path(o.ckpt).with_name("samples.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    low, _, high = o.cfg_interval.partition(",")
    options = {"cfg_scale": o.cfg_scale if o.cfg_scale >= 0 else task.config.cfg_scale,
               "cfg_interval": (float(low), float(high)), "cfg_channels": o.cfg_channels or None, "eta": o.eta}
    if o.sampler:
        options["sampler"] = o.sampler
    ancestral = o.sampler == "ddpm" or (not o.sampler and task.config.learn_sigma)
    options["steps"] = int(o.steps) if o.steps.isdigit() else o.steps or (250 if ancestral else 50)

    if o.npz:
        images, labels, _ = draw(o.ckpt, o.npz, seed=o.seed, device=device, batch_size=o.batch_size, **options)
        path = out.with_suffix(".npz")
        extra = {} if labels is None else {"labels": labels.numpy()}
        np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **extra)                   # (N, H, W, C)
        print(f"{len(images)} pictures in {path}")
        return

    count = o.n or (8 * len(chosen[:4]) if o.interpolate else len(chosen))
    turn = [i // 8 if o.interpolate else i for i in range(count)]               # a row of the walk is of one class
    y = torch.tensor([chosen[k % len(chosen)] for k in turn], device=device)    # (count,)
    noise = interpolated_noise(count, task.shape, o.seed, device) if o.interpolate else None
    if o.mask and not o.init:
        raise UserError("--mask needs --init: the picture whose black-masked part is to be kept")
    x_init, mask, original = None, None, None
    if o.init:
        original = read_picture(o.init, task.info, device, count)
        x_init = task.encode(original)
        options["strength"] = 1.0 if o.mask else o.strength
    if o.mask:
        mask = (read_picture(o.mask, task.info, device, count).mean(1, keepdim=True) > 0).float()   # (count, 1, H, W)

    images, latents, frames = [], [], []
    for first in tqdm(range(0, count, o.batch_size), desc="drawing", disable=None, unit="batch"):
        part, states = slice(first, first + o.batch_size), []
        take = lambda t: None if t is None else t[part]
        x = task.sample(model, y[part], callback=states.append if o.strip or o.gif else None, noise=take(noise),
                        x_init=take(x_init), mask=take(task.shrink_mask(mask)),
                        generator=seeds(o.seed + first, len(y[part]), device), **options)
        latents.append(x.cpu())
        images.append(task.to_pictures(x).cpu())
        frames.append([task.to_pictures(s).cpu() for s in states])
    images = torch.cat(images)
    if mask is not None:        # decoding a latent changes even what was kept: known pixels are put back as given
        kept = data.to_uint8(original.cpu())
        images = torch.where(mask.cpu() > 0.5, images, kept)
    save_grid(images, out, nrow=8, captions=[names[i] for i in y.tolist()] if names else None)
    print(f"{count} pictures in {out}")
    if task.first_stage is None and task.shape[0] not in (1, 3):
        data.save_latents(out.with_suffix(".pt"), torch.cat(latents), y.cpu())
        print(f"these are latents in false colours; the latents themselves are in {out.with_suffix('.pt')}")
    if o.strip or o.gif:
        film = [torch.cat(states) for states in zip(*frames)]                   # per step: (count, C, H, W)
        if o.strip:
            moments = [film[round(k * (len(film) - 1) / 9)] for k in range(10)]
            rows = torch.stack(moments, 1)[:8].flatten(0, 1)                    # first eight pictures, ten columns
            path = out.with_name(out.stem + "-strip.png")
            save_grid(rows, path, nrow=10, scale=2)
            print(f"strip in {path}")
        if o.gif:
            path = out.with_suffix(".gif")
            save_gif([make_grid(x, nrow=8, scale=2) for x in film] + [make_grid(film[-1], nrow=8, scale=2)] * 10, path)
            print(f"film in {path}")


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
