"""Tasks: what one training step is, for every model.

The idea.  A task is a model, a process that makes noise, and a first stage in whose latents all
happens; or a first stage alone. The loop in train.py never asks which one it runs. It calls
    check_batch(batch_size)                           once: raises ValueError if it is too small
    prepare(dataset, device) -> dataset               once: pictures to latents, captions to ids
    draw(n, generator, device) -> {name: (n, ...)}    every random number of a step
    loss(net, x, y, index, **draws) -> (scalar, metrics)      a pure function of tensors
    preview(model, dataset, device, path)             a picture of what has been learned
    finish(model, dataset, device)                    after the last step, before the last save
    state() -> dict                                   what else travels in the checkpoint
    inputs(count) -> meta tensors of one forward, to count its operations

    python train.py --model unet-tiny --data scenes       # a DiffusionTask with a U-Net"""
import copy
import csv
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import zlib
from contextlib import nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from checkpoint import (built_from, fingerprint, load_checkpoint, load_weights, save_checkpoint,
                        written_whole)
from data import check_target, save_grid, to_float, to_uint8
from diffusion import seeds
from optim import load_moments


class DiffusionTask:
    """Train a diffusion model, and sample from it, on pixels, latents or tokens.
    settings: its family's flags; info: see models.describe; model(x, t, y), y class numbers (B,) or
    with a tokenizer caption ids (B, L); process: its noise; first_stage: see vae.py.
    shape: of one example in model space, (C, H, W) or (N,). Source: DiT §3; LDM §3."""
    frozen = frozenset()            # names of tensors that do not learn, and are not saved again
    dtype = torch.float32           # of the network's products when it samples
    check_batch = finish = lambda self, *given: None                        # nothing to do

    def __init__(self, settings, info, model, process, first_stage, tokenizer=None):
        self.settings, self.info, self.model, self.process = settings, info, model, process
        self.first_stage, self.tokenizer = first_stage, tokenizer
        self.shape = first_stage.latent_shape(image_shape(info))
        self.on_pixels = not first_stage.state_dict()   # vae.Pixels: the identity, without weights
        self.at_once = max(1, 1_024_000 // info["image_size"] ** 2)     # pictures in memory

    def prepare(self, dataset, device):
        """Captions to ids, and all pictures to latents at once, so that no step encodes any."""
        if (words := self.tokenizer) is not None:       # of held-out captions, known words alone
            captions = dataset.captions if words.open else [
                " ".join([word for word in words.WORD.findall(text.lower()) if word in words.ids]
                         [:words.max_length - 2]) for text in dataset.captions]
            dataset = dataclasses.replace(dataset, labels=words(captions), captions=None)   # (N, L)
        if self.on_pixels or dataset.images.dtype != torch.uint8:       # or latents already
            return dataset
        x, y = dataset.images, dataset.labels
        if dataset.flip:                    # latents cannot be mirrored: mirror before encoding
            x, y = torch.cat([x, x.flip(-1)]), torch.cat([y, y])
        stage = self.first_stage.to(device)
        if not stage.standardised:
            stage.standardise(to_float(x[::max(1, len(x) // 2000)][:2000]).to(device))
        z = torch.cat([self.encode(to_float(some.to(device))) for some in x.split(self.at_once)])
        return dataclasses.replace(dataset, images=z, labels=y, captions=None, flip=False)

    def draw(self, n, generator, device):
        drop, flip = (torch.rand(n, generator=generator, device=device) for _ in range(2))
        return {"drop": drop, "flip": flip} | self.process.draw((n, *self.shape), generator, device)

    def loss(self, net, x, y, index, drop, **draws):
        if x.dtype != torch.int64:          # pixels, or latents in half precision, and no tokens
            x = to_float(x) if x.dtype == torch.uint8 else x.float()
        return self.process.loss(net, x, self.model.drop_labels(y, drop), **draws)

    @torch.no_grad()
    def sample(self, model, y, null=None, cfg_scale=None, steps=None, sampler=None,
               callback=lambda x0: None, **options):
        """Sample one example per condition y, (B,) or (B, L) -> (B, *shape); see to_pictures.
        null: what guidance steers away from, like y (default: nothing asked for); cfg_scale,
        steps, sampler: default to the run's guidance and the process's own; callback(x0 guess)
        after every step; options: those of the process. Raises ValueError for one not read."""
        if cfg_scale is None:
            cfg_scale = self.settings.cfg_scale if model.can_guide else 1.0
        elif cfg_scale != 1 and not model.can_guide:
            raise ValueError(f"--cfg-scale {cfg_scale:g}: no --class-dropout, nothing to guide by")
        null = model.null_condition(len(y), y.device) if null is None else null
        if self.tokenizer is not None:      # encode the words once, not at every step
            y, null = model.text(y), model.text(null)                       # (B, L, D_ctx)
        options |= {"clip": True} if self.on_pixels and self.shape[0] in (1, 3) else {}
        net = torch.autocast(y.device.type, self.dtype, self.dtype != torch.float32)(model)
        for x, x0 in self.process.trajectory(net, (len(y), *self.shape), y, null, sampler, steps,
                                             cfg_scale=cfg_scale, device=y.device, **options):
            callback(x0)
        return x

    @torch.no_grad()
    def encode(self, x):
        """Pictures (B, C, H, W) in [-1, 1] -> model space (B, *shape). Source: LDM §3.1."""
        return self.first_stage.to(x.device).encode(x)

    def to_pictures(self, x):
        """Model space -> uint8 (B, C, H, W); latents that nothing decodes: in false colours."""
        x = self.first_stage.to(x.device).decode(x).float()
        return to_uint8(x if x.shape[1] in (1, 3) else x[:, :3] / 3)

    def examples(self):
        """What to sample when nothing is asked for: (conditions, names or None), at most 48."""
        if self.tokenizer is not None:
            return self.tokenizer(self.info["examples"]), self.info["examples"]
        names = self.info["class_names"]
        each = max(1, 40 // max(1, len(names)))         # a few of each class, when there are few
        y = torch.arange(min(48, max(1, len(names)) * each)) % max(1, len(names))
        return y, [names[i] for i in y.tolist()] if names else None

    def preview(self, model, dataset, device, path):
        y, names = self.examples()
        images = sample_all(self, model, y.to(device), 0, self.at_once, steps=25,
                            sampler=self.process.samplers[0])[1]
        save_grid(images, path, 8, names, scale=None if names else max(1, 64 // images.shape[-1]))

    def state(self):
        stage = self.first_stage
        return {} if self.on_pixels else {"first_stage": {
            "kind": stage.kind, "sizes": stage.sizes, "model": stage.state_dict()}}

    def inputs(self, count):
        dtype = torch.float32 if len(self.shape) == 3 else torch.int64      # or tokens
        x = torch.zeros(count, *self.shape, dtype=dtype, device="meta")
        return x, x.new_zeros(count).long(), self.model.null_condition(count, "meta")


class AutoencoderTask:
    """Train a first stage to give pictures back. Source: LDM §3.1; VQ-Diffusion §3.1."""
    frozen, at_once = frozenset(), 32
    prepare = lambda self, dataset, device: dataset                     # as it is: pictures

    def __init__(self, settings, info, model):
        self.settings, self.info, self.model = settings, info, model
        self.sizes = model.sizes            # for the checkpoint, measured anew at the end
        self.check_batch, self.shape = model.check_batch, image_shape(info)

    def draw(self, n, generator, device):
        return {**self.model.draw(n, self.shape, generator, device),
                "flip": torch.rand(n, generator=generator, device=device)}

    def loss(self, net, x, y, index, **draws):
        return net(to_float(x), draws)

    def preview(self, model, dataset, device, path):
        x = to_float(dataset.images[:32]).to(device)
        y = torch.cat([model.decode(model.encode(some)) for some in x.split(self.at_once)])
        save_grid(torch.stack([x, y], 1).flatten(0, 1), path, nrow=16, scale=2)    # (64, C, H, W)

    def finish(self, model, dataset, device):
        """Measure the latents' scale, which travels with the checkpoint; report the quality."""
        x = to_float(dataset.images[::max(1, len(dataset) // 2000)][:2000]).to(device)
        model.standardise(x)
        self.sizes, x, generator = model.sizes, x[:200], torch.Generator(device).manual_seed(0)
        draws = model.draw(len(x), self.shape, generator, device)
        found = {k: v.item() for k, v in model.objective(x, draws)[1].items() if v.dim() == 0}
        print(f"{len(x)} pictures: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()))

    def state(self):
        return {"sizes": self.sizes}

    def inputs(self, count):
        x = torch.zeros(count, *self.shape, device="meta")
        return x, self.model.draw(count, self.shape, None, "meta")


def sample_all(task, model, y, seed=0, batch_size=None, per_picture=(), film=False, **options):
    """Sample for all conditions y, (N,) or (N, L), batch by batch; picture i with seed + i.
    per_picture: {option: (N, ...) tensor}, cut like y; others are of DiffusionTask.sample. Returns
    model space (N, ...), uint8 (N, C, H, W), and if `film`, of every step and the end, else [],
    ("step 03 noise 0.88", uint8 (N, C, 2H, W): x_t above the guess at x0)."""
    sampled, pictures, films, read = [], [], [], []
    size = batch_size or max(1, min(64, 2 ** 16 // torch.Size(task.shape).numel()))
    listen = lambda net, given: read.append(given[:2])          # what the network reads: x_t and t
    for first in tqdm(range(0, len(y), size), "sampling", leave=None, disable=None, unit="batch"):
        rows, seen = slice(first, first + size), []
        def watch(x0):
            (xt, t), _ = read[0], read.clear()                  # guidance reads two copies of x_t
            both = [task.to_pictures(x).cpu() for x in (xt[:len(x0)], x0)]
            noise = t[0] / getattr(task.process, "steps", 1000)             # a flow has t = 1000 u
            seen.append((f"step {len(seen):02} noise {noise:.2f}", torch.cat(both, 2)))
        mine = {name: value[rows] for name, value in dict(per_picture).items()}
        mine |= {"callback": watch} if film else {}
        mine["generator"] = seeds(seed + first, len(y[rows]), y.device)
        with model.register_forward_pre_hook(listen) if film else nullcontext():
            sampled.append(task.sample(model, y[rows], **mine, **options))
        pictures.append(task.to_pictures(sampled[-1]).cpu())
        films.append([*seen, ("end: noise 0.00", pictures[-1].repeat(1, 1, 2, 1))] if film else [])
    film = [(step[0][0], torch.cat([x for _, x in step])) for step in zip(*films)]
    return torch.cat(sampled), torch.cat(pictures), film


def image_shape(info):
    """(C, H, W) of the pictures that `info` describes."""
    return info["channels"], info["image_size"], info["image_size"]


def macs(task):
    """Multiply-accumulates that one more example adds to a forward: those of 2 minus those of 1.
    So products of weights with weights (udit.RepMlp) are left out. Source: torch's flop counter."""
    model, flops = copy.deepcopy(task.model).to("meta"), []
    for count in (1, 2):
        with FlopCounterMode(display=False) as counter:
            model(*task.inputs(count))
        flops.append(counter.get_total_flops())                 # 2 for each multiply-accumulate
    return (flops[1] - flops[0]) // 2


# ---- what belongs together -----------------------------------------------------------------------
IDENTITY = ("name", "class_names", "words", "image_size", "channels", "base", "data", "first_stage")


def identity(info, state):
    """What a run is, {key of IDENTITY: value}, by its info and a checkpoint or task.state(). A task
    over a frozen base has in its state the fingerprints "base" and "data" (of its pictures)."""
    stage = state["first_stage"]["model"] if "first_stage" in state else {}
    return {**info, "words": (info.get("vocabulary") or {}).get("words"),
            "base": state.get("base"), "data": state.get("data"), "first_stage": fingerprint(stage)}


def check_same(was, now, path, cure, keys=IDENTITY):
    """Raise ValueError unless `was`, the identity of the file `path`, and `now` agree in `keys`."""
    for a, b, key in [(was[key], now[key], key) for key in keys if was[key] != now[key]]:
        if isinstance(a, list) and isinstance(b, list):         # what only one of them has
            a, b = ([x for x in a if x not in b] or a), ([x for x in b if x not in a] or b)
        raise ValueError(f"{path} is of something else: its {key.replace('_', ' ')} is "
                         f"{str(a)[:80]}, and here it is {str(b)[:80]}; {cure}")


# ---- the files of a run: its folder, checkpoint, log, plot ---------------------------------------
def default_out(model, data_name):
    """out/MODEL-DATA; letters of all alphabets stay, and other signs add a checksum of the name."""
    name = re.sub(r"\W+", "-", data_name).strip("-")
    mark = "" if name == data_name.replace(":", "-") else f"-{zlib.crc32(data_name.encode()):08x}"
    return f"out/{model.replace('/', '-')}-{name}{mark}"


def check_out(config):
    """Refuse an output folder that holds something else, or no run to resume; config.resume becomes
    False where the run ended before its first checkpoint. Raises ValueError or OSError."""
    out = pathlib.Path(config.out)
    for name in ("samples/000000.png", "config.json", "log.csv"):
        check_target(out / name, b"")
    if config.log_to and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--log-to tensorboard: no such package is here; pip install tensorboard")
    has = lambda name: any((out / file).is_file() for file in (name, f"first_stage/{name}"))
    if config.resume and not out.is_dir():
        raise ValueError(f"--resume: no checkpoint is in {out}; leave the flag out to start")
    known = config.resume if has("ckpt.pt") else has("lock")    # a lock: a run that was not saved
    for path in () if known else filter(pathlib.Path.is_file, out.rglob("*")):
        raise ValueError(f"{out} exists and is not empty, it holds {path.name}: choose another "
                         "--out, or add --resume if a run with a checkpoint is there")
    config.resume = config.resume and (out / "ckpt.pt").is_file()


def lock(folder):
    """FOLDER/lock, open: this process alone has it (except on Windows). Raises ValueError."""
    file = open(pathlib.Path(folder, "lock"), "a+")
    try:
        if os.name == "posix":
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = pathlib.Path(folder, "lock").read_text()
        raise ValueError(f"process {pid} works in {folder}: choose another --out") from error
    file.truncate(0), file.write(str(os.getpid())), file.flush()
    return file


def check_fit(config, task):
    """Multiply-accumulates per picture. Raises ValueError for a task that cannot be trained so, or
    is not that of the checkpoint to go on with, RuntimeError if a batch exceeds the memory."""
    task.check_batch(n := config.batch_size)
    # ask for a batch's memory now: used bit by bit, too much of it ends the process without a word
    batch = [task.inputs(n)[0], *task.draw(n, None, "meta").values()]
    torch.empty(sum(x.nbytes for x in batch), dtype=torch.uint8, device=config.device)
    if config.resume:
        path = f"{config.out}/ckpt.pt"
        state = load_checkpoint(path, "step", "info", "model", "ema", "opt")
        check_same(identity(state["info"], state), identity(task.info, task.state()), path,
                   f"give the same --data, or start a new run with --init {path}")
        if (s := state["step"]) > config.steps:
            raise ValueError(f"{path} is at step {s}: --steps {config.steps} is less, give more")
    return macs(task)


def begin_files(config, task, s):
    """Write config.json, and log.csv without damaged rows and those beyond step s; both whole."""
    log = pathlib.Path(config.out, "log.csv")
    header, *lines = (log.read_text(errors="replace") if s and log.is_file() else "").split("\n")
    number = r"-?(\d+\.?\d*(e[-+]\d+)?|nan|inf)"              # as add_row writes it
    row = re.compile(rf"(\d+)(,{number}){{{header.count(',')}}}")
    kept = [line for line in lines if (m := row.fullmatch(line)) and int(m[1]) <= s]
    lines = [header, *kept] if header.startswith("step,loss,") else []
    with written_whole(log) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    with written_whole(pathlib.Path(config.out, "config.json")) as file:
        file.write(json.dumps(dataclasses.asdict(config) | vars(task.settings), indent=1).encode())


def save(path, config, task, step, s):
    """Write the run's checkpoint, but no tensor that does not learn; --keep: also as ckpt-STEP.pt,
    of which so many stay, without the first stage. Raises ValueError for nan."""
    learned = lambda net: {k: v for k, v in net.state_dict().items() if k not in task.frozen}
    nets = {"model": learned(task.model), "ema": learned(step.ema)}
    held = [*nets.values(), *(m for o in step.optimizers for m in o.state.values())]
    if not all(v.isfinite().all() for tensors in held for v in tensors.values()):
        raise ValueError(f"the weights of step {s} are not finite and were not saved; the previous "
                         "checkpoint, if any, is intact: lower --lr (and --muon-lr)")
    state = {"task": task.family, "config": dataclasses.asdict(config), "info": task.info,
             "step": s, "settings": dict(vars(task.settings)), **nets, **task.state(),
             "opt": [o.state_dict() for o in step.optimizers]}
    save_checkpoint(path, state)
    if config.keep:
        if stage := state.pop("first_stage", None):         # the same in all: see load_checkpoint
            state["first_stage_hash"] = fingerprint(stage["model"])
        save_checkpoint(path.with_name(f"ckpt-{s:06d}.pt"), state)
        number = lambda file: int(file.stem.removeprefix("ckpt-"))
        for old in sorted(path.parent.glob("ckpt-[0-9]*.pt"), key=number)[:-config.keep]:
            old.unlink()


def resume(path, task, step):
    """Put a run back to its checkpoint -> the step. Its rates are the flags'. Raises ValueError."""
    state = load_checkpoint(path)
    if len(state["opt"]) != len(step.optimizers):
        raise ValueError(f"{path} lacks an optimizer: start a new run with --init {path}")
    for net, learned in ((task.model, state["model"]), (step.ema, state["ema"])):
        frozen = {k: v for k, v in net.state_dict().items() if k in task.frozen}
        load_weights(net, {**frozen, **learned}, path)
    with built_from(path):
        for optimizer, saved in zip(step.optimizers, state["opt"]):
            load_moments(optimizer, saved)
    return state["step"]


def add_row(table, row):
    """Append {column: number} to log.csv, with a header if it is empty."""
    with open(table, "a") as file:
        header = "" if file.tell() else ",".join(row) + "\n"
        file.write(header + ",".join(f"{value:.9g}" for value in row.values()) + "\n")


def plot_loss(table, path):
    """log.csv -> a picture of the loss of single batches, faint, its mean, and of held-out data."""
    from matplotlib.figure import Figure        # not pyplot, whose backend belongs to the caller
    rows = [*csv.DictReader(pathlib.Path(table).read_text().splitlines())]
    steps, losses, held_out = torch.tensor([[float(row.get(name, "nan")) for row in rows]
        for name in ("step", "loss", "held_out")]).nan_to_num(torch.nan, torch.nan, torch.nan)
    # of 5 rows before and 5 after, at first of equally fewer: a mean of the past would come late
    means = [losses[i - min(i, 5):i + min(i, 5) + 1].nanmean() for i in range(len(rows))]
    axes = Figure(figsize=(5, 4), dpi=90, layout="tight").subplots()
    axes.plot(steps, losses, alpha=0.3, label="loss of a batch")
    axes.plot(steps, means, label="running mean")
    if (there := held_out.isfinite()).any():
        axes.plot(steps[there], held_out[there], "o-", label="held-out data, averaged weights")
    axes.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    axes.legend()
    axes.figure.savefig(path)
