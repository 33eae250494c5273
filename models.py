"""The table of models: for every name its flags, its sizes, and how its task is built.

The idea.  Models that share flags and a builder are a family: a row of FAMILIES. A flag belongs to
the families that read it, and train.py refuses it for all others. To add a model, write its file
and add one row here; tests/test_registry.py then tests it without another word:

    "mine": Family(CONTINUOUS, class_conditional(MyModel), {"mine-tiny": dict(width=64)}, "tiny-ae")

    python train.py --model mine-tiny"""
import dataclasses
import difflib
import os
import re
import tempfile

import numpy as np
import torch
from tqdm import tqdm

import data
from checkpoint import built_from, load_checkpoint, load_weights, read_torch
from cli import check, flag
from diffusion import GaussianDiffusion, RectifiedFlow
from dit import BLOCKS, DIT_CONFIGS, DiT
from folders import read_folder
from pretrained import (build, infer_dit, infer_text, infer_udit, infer_vq, infer_vqgan,
                        is_official, load_first_stage, read_official)
from tasks import AutoencoderTask, DiffusionTask, check_same, identity, image_shape
from text import CLIPTokenizer, TextConditional, TextEncoder, WordTokenizer
from udit import UDIT_CONFIGS, UDiT
from unet import UNET_CONFIGS, UNet
from vae import VQVAE, AutoencoderKL, Pixels, TinyAutoencoder, first_stage_from
from vqdiffusion import VQ_CONFIGS, LearnedNull, MaskReplace, VQTransformer

FLAGS = {
    "first_stage": (str, flag("auto", "what it runs on: new (trained before), none (pixels) or "
                              "FILE; auto: new for text, worlds, folders from 32 pixels")),
    "first_stage_steps": (int, flag(500, "optimizer steps of --first-stage new", "[1, inf)")),
    "class_dropout": (float, flag(0.1, "share of labels or captions hidden, to guide", "[0, 1)")),
    "cfg_scale": (float, flag(2.0, "guidance when sampling; 1 = none", "[0, inf)")),
    "latent_channels": (int, flag(4, "channels of the first stage's latents", "[1, 1024]")),
    "latent_noise": (float, flag(0.3, "noise that its decoder learns to undo", "[0, inf)")),
    "factor": (int, flag(4, "how much smaller its latents or tokens are, per side", "[1, 256]")),
    "codes": (int, flag(256, "how many different tokens there are", "[2, 1e6]")),
    "schedule": (str, flag("flow", "flow (straight lines, predicts a velocity) or a Gaussian one",
                           choices=["flow", "linear", "cosine", "scaled_linear"])),
    "flow_shift": (float, flag(None, "flow: above 1 = more at high noise; default: 1", "(0, 1e4]")),
    "logit_normal": (bool, flag(False, "flow: train more at middle noise levels, as SD3 does")),
    "min_snr": (float, flag(None, "Gaussian: weigh by SNR of x0, at most this; try 5", "(0, inf)")),
    "prediction": (str, flag(None, "what Gaussian ones predict (eps)", "", ["eps", "v", "x0"])),
    "learn_sigma": (bool, flag(False, "Gaussian schedules: also learn the variance")),
    "conditioning": (str, flag("adaln_zero", "kind of block", choices=[*reversed(BLOCKS)])),
    "qk_norm": (bool, flag(False, "normalise queries and keys")),
    "captions": (bool, flag(None, "read captions, not classes (default: if there are no classes)")),
    "text_encoder": (str, flag(None, "file with CLIP's text encoder, to read captions; frozen")),
    "bpe": (str, flag(None, "its list of merges (default: in data/)", needs="text_encoder")),
    "aux_weight": (float, flag(1.0, "weight of the cross-entropy; long runs: 5e-4", "[0, inf)")),
    "relative": (bool, flag(False, "tokens also attend by how far apart they are")),
    "learned_null": (bool, flag(False, "guide by learned text states, not by the empty caption"))}
CONTEXT_DIM = 64                    # width of the text states that a DiT, U-DiT or VQ model reads
MERGES = "data/bpe_simple_vocab_16e6.txt.gz"            # CLIP's list of merges, if not given
TINY = ("latent_channels", "latent_noise", "factor")
ALL = ("first_stage", "first_stage_steps", "class_dropout", "cfg_scale", "text_encoder", "bpe")
CONTINUOUS = (*ALL, *TINY, "schedule", "flow_shift", "logit_normal", "prediction", "min_snr")
TOKENS = (*ALL, "codes", "factor")
# schedule is flow -> the flags that it does not read
UNREAD = {True: ("prediction", "learn_sigma", "min_snr"), False: ("flow_shift", "logit_normal")}


def settings_class(family):
    """The dataclass of a family's flags."""
    fields = [(name, *FLAGS[name]) for name in FAMILIES[family].flags]
    title = f"flags of --model {', '.join(list(FAMILIES[family].sizes)[:3])} and their like"
    return dataclasses.make_dataclass("Settings", fields, namespace={"__doc__": title})


def readers_of(flag_name):
    """Which families read a flag such as "--codes", as a sentence; None if no family does."""
    name = flag_name[2:].replace("-", "_").removeprefix("no_")
    families = [family for family, row in FAMILIES.items() if name in row.flags]
    return f"it is read by the families {', '.join(families)} alone" if families else None


# ---- builders: (sizes of the model, settings, info, first stage) -> task -------------------------
def process_of(settings):
    """The process of a continuous model. Raises ValueError for a flag its schedule ignores."""
    flow = settings.schedule == "flow"
    for name in UNREAD[flow]:
        if getattr(settings, name, None):
            kind = "a Gaussian schedule: --schedule linear or cosine" if flow else "--schedule flow"
            raise ValueError(f"--{name.replace('_', '-')} needs {kind}, not {settings.schedule}")
    if flow:
        return RectifiedFlow(settings.flow_shift or 1.0, settings.logit_normal)
    return GaussianDiffusion(schedule=settings.schedule, prediction=settings.prediction or "eps",
        learn_sigma=getattr(settings, "learn_sigma", False), min_snr=settings.min_snr)


def class_conditional(Model):
    """Builder for a Model, whose arguments are also its family's flags that are not CONTINUOUS."""
    def build_model(sizes, settings, info, first_stage):
        channels, size, _ = first_stage.latent_shape(image_shape(info))
        more = {k: v for k, v in vars(settings).items() if k not in (*CONTINUOUS, "captions")}
        text = {"context_dim": CONTEXT_DIM} if "vocabulary" in info else {}
        model = Model(input_size=size, in_channels=channels, num_classes=len(info["class_names"]),
                      class_dropout_prob=settings.class_dropout, **{**text, **sizes, **more})
        return denoising_task(model, CONTEXT_DIM, process_of(settings), settings, info, first_stage)
    return build_model


def denoising_task(denoiser, width, process, settings, info, first_stage, Encoder=TextEncoder):
    """The task of a denoiser; if it reads captions, with a text encoder. Source: LDM §3.3."""
    if "vocabulary" not in info:
        return DiffusionTask(settings, info, denoiser, process, first_stage)
    if published := info["vocabulary"].get("encoder"):
        tokenizer = CLIPTokenizer(merges=info["vocabulary"]["merges"])
        text = TextEncoder(**published).requires_grad_(False)       # make_task puts its weights in
    else:
        tokenizer = WordTokenizer(**info["vocabulary"])
        text = Encoder(tokenizer.vocab_size, tokenizer.max_length, hidden_size=width)
    model = TextConditional(denoiser, text, tokenizer([""])[0], settings.class_dropout)
    return DiffusionTask(settings, info, model, process, first_stage, tokenizer)


def build_unet(sizes, settings, info, first_stage):
    """A text-conditional U-Net. Source: LDM §3.3."""
    channels = first_stage.latent_shape(image_shape(info))[0]
    unet = UNet(**dict(sizes, in_channels=channels, out_channels=channels))
    return denoising_task(unet, unet.context_dim, process_of(settings), settings, info, first_stage)


def build_vq(sizes, settings, info, first_stage):
    """VQ-Diffusion on captions, else on classes, else on nothing. Source: VQ-Diffusion §4."""
    K, classes, text = first_stage.num_codes, len(info["class_names"]), "vocabulary" in info
    if settings.learned_null and (settings.text_encoder or not (text and settings.class_dropout)):
        raise ValueError("--learned-null is for captions and --class-dropout above 0, without "
                         "--text-encoder")
    model = VQTransformer(**dict(sizes, num_codes=K, grid=first_stage.grid, num_classes=classes,
        condition="text" if text else "class" if classes else "none", relative=settings.relative,
        class_dropout_prob=settings.class_dropout, codebook=first_stage.codebook))
    process = MaskReplace(num_codes=K, aux_weight=settings.aux_weight)
    width = sizes.get("context_dim", CONTEXT_DIM)
    Encoder = LearnedNull if settings.learned_null else TextEncoder
    return denoising_task(model, width, process, settings, info, first_stage, Encoder)


NEW_STAGES = {          # kl-ae is a small AutoencoderKL, 4 times smaller per side
    "tiny-ae": lambda s, info: TinyAutoencoder(
        info["channels"], s.latent_channels, s.factor, latent_noise=s.latent_noise),
    "kl-ae": lambda s, info: AutoencoderKL(
        32, (1, 2, 2), 1, info["channels"], s.latent_channels, scale=1.0),
    "vq-vae": lambda s, info: VQVAE(info["image_size"], info["channels"], s.codes, s.factor)}


def build_autoencoder(sizes, settings, info, first_stage):
    """A first stage that is to be trained. Source: LDM §3.1; VQ-Diffusion §3.1."""
    return AutoencoderTask(settings, info, NEW_STAGES[sizes["kind"]](settings, info))


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of the table. sizes: {model name: constructor arguments}; first_stage: what is trained
    for --first-stage new; always_latent: pixels are not enough; axes: of an example; captions:
    "needed", "used" if any, "asked" for by --captions or the lack of classes, or "" (classes)."""
    flags: tuple
    build: callable
    sizes: dict
    first_stage: str = ""
    always_latent: bool = False
    axes: int = 3
    captions: str = ""


FAMILIES = {
    "dit": Family((*CONTINUOUS, "captions", "learn_sigma", "conditioning", "qk_norm"),
                  class_conditional(DiT), DIT_CONFIGS, "tiny-ae", captions="asked"),
    "udit": Family((*CONTINUOUS, "captions", "learn_sigma"), class_conditional(UDiT), UDIT_CONFIGS,
                   "tiny-ae", captions="asked"),
    "unet": Family(CONTINUOUS, build_unet, UNET_CONFIGS, "tiny-ae", True, 3, "needed"),
    "vq": Family((*TOKENS, "aux_weight", "relative", "learned_null"), build_vq, VQ_CONFIGS,
                 "vq-vae", True, 1, "used"),
    **{kind: Family(flags, build_autoencoder, {kind: {"kind": kind}}) for kind, flags in {
        "tiny-ae": TINY, "kl-ae": ("latent_channels",), "vq-vae": ("codes", "factor")}.items()}}


# what a model changes among the defaults of all flags
PAPER = dict(schedule="linear", prediction="eps", learn_sigma=True, optimizer="adamw", lr=1e-4,
             warmup=0, lr_decay="constant", grad_clip=0.0, ema=0.9999)      # DiT §4
UNET = dict(steps=2500, latent_channels=12, latent_noise=0.2, first_stage_steps=1200,
            cfg_scale=3.0, flow_shift=3.0)
VQ = dict(steps=3000, batch_size=32, first_stage_steps=1600, cfg_scale=3.0, relative=True)
PRESETS = {
    "tiny-ae": dict(steps=500), "kl-ae": dict(steps=1000), "unet-tiny": UNET, "unet-small": UNET,
    "vq-vae": dict(steps=1600, batch_size=32, lr=4e-3), "vq-tiny": VQ, "vq-small": VQ,
    **{name: dict(VQ, relative=False, codes=s["num_codes"], image_size=256, factor=256 // s["grid"])
       for name, s in VQ_CONFIGS.items() if "grid" in s}}


def find_model(name):
    """Name of a model -> (its family, constructor arguments). Beside those of FAMILIES, DiT-WxD/p:
    width W, a multiple of 32 = width of a head; depth D; patch size p. Raises ValueError."""
    for family, row in FAMILIES.items():
        if name in row.sizes:
            return family, dict(row.sizes[name])
    size = re.fullmatch(r"DiT-([1-9]\d*)x([1-9]\d*)/([1-9]\d*)", name)
    if size and int(size[1]) % 32 == 0:
        width, depth, patch = map(int, size.groups())
        return "dit", dict(hidden_size=width, depth=depth, num_heads=width // 32, patch_size=patch)
    known = [model for row in FAMILIES.values() for model in row.sizes]
    near = difflib.get_close_matches(name, known, 1, 0.4)
    raise ValueError(f"unknown model {name!r}{f', did you mean {near[0]}?' if near else '.'} Known:"
                     f" DiT-WxD/p (width, a multiple of 32; depth; patch), {', '.join(known)}")


def build_task(model, settings, info, first_stage):
    """The task of a model by its name. Raises ValueError for flags and sizes that clash."""
    family, sizes = find_model(model)
    row, shape = FAMILIES[family], first_stage.latent_shape(image_shape(info))
    if len(shape) != row.axes:
        wants = "tokens, from a vq-vae" if row.axes == 1 else "numbers, from a tiny-ae or kl-ae"
        raise ValueError(f"{model} works on {wants}; --first-stage gives {shape}: leave it out")
    if published := info.get("vocabulary", {}).get("encoder"):
        sizes["context_dim"] = published["hidden_size"]
    task = row.build(sizes, settings, info, first_stage)
    task.family = family
    return task


def describe(dataset, model, first_stage, asked=None, words=None):
    """What a model needs to know of its data, plain values that travel in the checkpoint. asked:
    --captions; words: a vocabulary in place of the captions' own. Raises ValueError for missing
    captions, and for latents of another first stage."""
    row, (channels, side) = FAMILIES[find_model(model)[0]], dataset.images.shape[1:3]
    captions, latents = row.captions, dataset.images.is_floating_point()
    if latents and not row.first_stage:
        raise ValueError(f"{model} learns from pictures, and {dataset.name} holds latents")
    if latents and first_stage.kind == "none" and channels < 4:
        raise ValueError(f"{dataset.name}: latents of {channels} channels need their --first-stage")
    if latents and first_stage.kind != "none":
        given, side = tuple(dataset.images.shape[1:]), side * first_stage.factor
        channels = first_stage.in_channels
        if (made := first_stage.latent_shape((channels, side, side))) != given:
            raise ValueError(f"{dataset.name} holds {given}, the first stage makes {made}: give "
                             "the --first-stage that made these latents")
    info = {"name": dataset.name, "class_names": list(dataset.class_names), "channels": channels,
            "image_size": side}
    if captions == "asked":
        captions = {True: "needed", False: "", None: "" if dataset.class_names else "used"}[asked]
    if captions == "needed" and dataset.captions is None:
        raise ValueError(f"{model} wants captions, and {dataset.name} has none: try --data scenes")
    if captions and dataset.captions is not None:
        info |= {"vocabulary": words or WordTokenizer.from_captions(dataset.captions).state(),
                 "examples": dataset.captions[::max(1, len(dataset) // 24)][:24]}   # maybe sorted
    elif words:
        raise ValueError("--text-encoder is for captions, and here classes are read, or nothing: "
                         "give data with captions, and say --captions")
    return info


def resolve_first_stage(config, settings):
    """Replace "auto" in settings.first_stage by new, none, or the file given by --init."""
    if getattr(settings, "first_stage", "") != "auto":
        return
    encode = FAMILIES[find_model(config.model)[0]].always_latent and config.data[:8] != "latents:"
    encode |= config.data[:7] == "folder:" and config.image_size >= 32      # pixels take hours
    settings.first_stage = "new" if encode or config.data in ("shapes", "scenes") else "none"
    if config.init:
        carried = "first_stage" in load_checkpoint(config.init)
        settings.first_stage = config.init if carried else "none"


def make_task(config, settings, dataset):
    """The task of a run, study or benchmark: equal flags, equal weights. settings.first_stage: new,
    none, or a file; to go on, the checkpoint's. Raises ValueError, also if --init does not fit."""
    torch.manual_seed(config.seed)
    row, name = FAMILIES[find_model(config.model)[0]], getattr(settings, "first_stage", "none")
    path = f"{config.out}/ckpt.pt" if config.resume else config.init
    start = load_checkpoint(path, "ema") if path else {}
    with built_from(path or ("" if name in ("new", "none") else name)):
        if config.resume:
            first_stage = first_stage_from(start.get("first_stage"), path)
        elif name == "new":
            info = {"channels": dataset.images.shape[1], "image_size": dataset.images.shape[-1]}
            first_stage = NEW_STAGES[row.first_stage](settings, info).eval().requires_grad_(False)
        else:
            first_stage = Pixels() if name == "none" else load_first_stage(name)
        known, published = start.get("info", {}).get("vocabulary", {}), {}
        if encoder := getattr(settings, "text_encoder", None):
            if start and start.get("settings", {}).get("text_encoder") != encoder:
                raise ValueError(f"--text-encoder: {path} has one already: leave it out")
            if not start:
                published = read_official(encoder, "text")[1]["text"]
                known = {"encoder": infer_text(published)}                  # its sizes
                known["merges"] = [*clip_words(settings.bpe, known["encoder"], encoder).ranks]
        info = describe(dataset, config.model, first_stage, getattr(settings, "captions", None),
                        known if encoder else None)
        if "vocabulary" in info and "words" in known:
            tokenizer = WordTokenizer(**known)                  # words keep their rows
            for word in [w for w in info["vocabulary"]["words"] if w not in tokenizer.ids]:
                tokenizer.add_token(word)
            tokenizer(dataset.captions)                         # raises for one that is too long
            info["vocabulary"] = tokenizer.state()
        task = build_task(config.model, settings, info, first_stage)
    if published:
        load_weights(task.model.text, published, encoder)
    if config.init and not config.resume:
        if "info" in start:
            check_init(task, identity(start["info"], start), path)
        load_weights(task.model, start["ema"], path)
    return task


def check_init(task, was, path):
    """Raise ValueError if `task` cannot start from the checkpoint `path`, of identity `was`."""
    now, names = identity(task.info, task.state()), was["class_names"]
    check_same(was, now, path, "leave --first-stage out", ("channels", "first_stage"))
    reads_classes = FAMILIES[task.family].first_stage and "vocabulary" not in task.info
    for number, name in enumerate(now["class_names"] if reads_classes else []):
        if name in names and names.index(name) != number:
            raise ValueError(f"{path} knows class {name!r} as number {names.index(name)}, and here "
                             f"it is number {number}: name the class folders in the same order")


def save_encoded(config, settings, load_data):
    """--save-latents: the data set as latents, in half precision. First into a file without a name,
    as they, like the pictures of a folder, may be more than the memory holds."""
    out, stage = config.save_latents, load_first_stage(settings.first_stage).to(config.device)
    data.check_target(out, data.LATENTS_MARK)
    os.makedirs(folder := os.path.dirname(os.path.abspath(out)), exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        def encode(images):                                 # (n, C, H, W) -> (n, 0, h, w)
            shape = stage.latent_shape(images.shape[1:])
            if len(shape) != 3 or images.dtype != torch.uint8 or not stage.standardised:
                raise ValueError("--save-latents needs --data of pictures, --first-stage of "
                                 "numbers, which was trained to its end")
            for x in images.split(max(1, 262_144 // images.shape[-1] ** 2)):        # 4 of 256x256
                stage.encode(data.to_float(x.to(config.device))).half().cpu().numpy().tofile(file)
            return torch.empty(len(images), 0, *shape[1:])
        if config.data[:7] == "folder:":
            z, *said, _ = read_folder(config.data[7:], config.image_size, skip_bad=config.skip_bad,
                                      encode=encode)
        else:
            x = load_data(config)
            said = x.labels, x.captions, x.class_names
            z = torch.cat([encode(some) for some in tqdm(x.images.split(64), disable=None)])
        z = torch.from_numpy(np.memmap(file, np.float16)).view(len(z), -1, *z.shape[2:])
        data.save_latents(out, z, *said)
    print(f"{len(z):,} latents of {tuple(z.shape[1:])}; train on them with\n--data latents:{out} "
          f"--first-stage {settings.first_stage}")


def task_from(state, path, weights="ema"):
    """A loaded checkpoint of train.py -> its task, with averaged or raw ("model") weights.
    Raises ValueError for other files, and for weights that are not there."""
    if state.get("task") not in FAMILIES or "sizes" in state:
        raise ValueError(f"{path} does not sample by itself: give a model's checkpoint, or "
                         "the adapter.pt or concept.pt beside it")
    if weights not in state:
        raise ValueError(f"{path} was exported with averaged weights alone: leave out --weights")
    with built_from(path):
        settings = check(settings_class(state["task"])(**state["settings"]))
        "".join(state["info"]["class_names"])           # raises for what is no text
        task = build_task(state["config"]["model"], settings, state["info"],
                          first_stage_from(state.get("first_stage"), path))
    load_weights(task.model, state[weights], path)
    return task


def official_task(path, vae, dtype, bpe, image_size):
    """An official DiT, U-DiT, SD v1 or VQ-Diffusion file, or a diffusers folder -> its
    task. vae: file, or None; bpe: CLIP's merges. Raises ValueError. Source: LDM §4.3.1; DiT §4."""
    what, parts, said = read_official(path)
    if vae and "vq" not in parts:
        stage = load_first_stage(vae)                   # with the scale of a kl-ae of ours
        parts, said = {**parts, "vae": stage.state_dict()}, {**said, "vae": stage.sizes}
    info = {"name": "", "class_names": [], "channels": 3, "image_size": image_size,
            "examples": ["an astronaut riding a horse"]}
    if "concept" in parts:
        raise ValueError(f"{path} is {what}: say --ckpt BASE --concept {path}")
    name = next((name for name in ("dit", "udit", "vq") if name in parts), "unet")
    if missing := dict(unet={"unet", "vae", "text"}, vq={"vqgan"}).get(name, set()) - parts.keys():
        raise ValueError(f"{path} is {what}, with no {' and no '.join(sorted(missing))}: give the "
                         "full file" + (", or a --vae" if "vae" in missing else ""))
    if name == "vq":
        return official_vq(path, parts, dtype, bpe, info)
    state = {} if name == "unet" else parts.pop(name)
    models = build(parts, dtype, said)
    first_stage = models["vae"].eval().requires_grad_(False) if parts else Pixels()
    if name == "unet":
        process = {"schedule": "scaled_linear", **said["process"]}
        settings = settings_class("unet")(schedule=process["schedule"], cfg_scale=7.5)
        process = GaussianDiffusion(**process)
        tokenizer = clip_words(bpe, infer_text(models["text"].state_dict()), path)
        model = TextConditional(models["unet"], models["text"], tokenizer([""])[0], 0.1)
        return DiffusionTask(settings, info, model, process, first_stage, tokenizer)
    infer, make, cfg_scale = {"dit": (infer_dit, DiT, 4.0), "udit": (infer_udit, UDiT, 1.5)}[name]
    model = make(**(sizes := {**infer(state), **said[name]}))
    computed = {k: w for k, w in model.state_dict().items() if k == "pos_embed"}    # may lack
    load_weights(model, {**computed, **state}, path)
    info |= {"channels": 3 if parts else sizes["in_channels"],
             "image_size": model.input_size * first_stage.factor}
    settings = settings_class("dit")(cfg_scale=cfg_scale)       # that of their demos
    process = GaussianDiffusion(**said["process"], learn_sigma=sizes["learn_sigma"])
    return DiffusionTask(settings, info, model, process, first_stage)


def official_vq(path, parts, dtype, bpe, info):
    """The same of a published VQ-Diffusion. Which token each code of its VQGAN is, if not all are,
    says a list beside it, taming_vqvae_K.pt. Source: VQ-Diffusion §3.1, §5.1; its configs."""
    K, stage = infer_vq(parts["vq"])["num_codes"], parts["vqgan"]
    total = len(stage.get("codes", ()))
    used = os.path.join(os.path.dirname(path), f"taming_vqvae_{K}.pt")
    if total != K and not os.path.isfile(used):
        raise ValueError(f"{path} uses {K} of {total} codes: fetch the file {used} from "
                         "help_folder/statistics of github.com/microsoft/VQ-Diffusion")
    with built_from(used):
        stage["token"] = torch.arange(K) if total == K else read_torch(used)
        grid = 256 // 2 ** (len(infer_vqgan(stage)["multipliers"]) - 1)
    models = build(parts, torch.float32, {"vq": {"grid": grid}})
    model, text, tokenizer = models["vq"], models.get("text") or models.get("learned_null"), None
    if text:
        tokenizer = clip_words(bpe, infer_text(text.state_dict()), path)
        tokenizer.pad, text.end = 0, tokenizer.end
        text.text_model.final_layer_norm.register_forward_hook(     # states of length 1
            lambda layer, inputs, x: x / x.norm(dim=-1, keepdim=True))
        model = TextConditional(model, text, tokenizer([""])[0], 0.1)
    info |= {"image_size": 256, "examples": ["a teddy bear playing in the pool"]}
    settings = settings_class("vq")(cfg_scale=1 + 2.0 * ("learned_null" in models))     # as there
    task = DiffusionTask(settings, info, model, MaskReplace(models["vq"].steps, K, "released"),
                         models["vqgan"].eval().requires_grad_(False), tokenizer)
    task.dtype = dtype
    return task


def clip_words(bpe, sizes, path):
    """CLIP's tokenizer by a list of merges, for the text encoder of these sizes in the file `path`.
    Raises ValueError if they do not belong together."""
    tokenizer = CLIPTokenizer(bpe := bpe or MERGES)
    if tokenizer.vocab_size != sizes["vocab_size"]:
        raise ValueError(f"{bpe} makes {tokenizer.vocab_size:,} tokens, the text encoder of "
                         f"{path} has {sizes['vocab_size']:,}: give the full list")
    return tokenizer


# ---- what adapters.py and custom_diffusion.py build on -------------------------------------------
def base_task(path, bpe=None, image_size=512):
    """A text-to-image checkpoint of ours, or Stable Diffusion v1 -> its task, in float32."""
    if not (official := is_official(path)) and bpe:
        raise ValueError(f"--bpe is for Stable Diffusion: {path} brings its own words")
    task = official_task(path, None, torch.float32, bpe or MERGES, image_size) if official else (
        task_from(load_checkpoint(path), path))
    if task.tokenizer is None:
        raise ValueError(f"{path} does not read captions: try assets/unet-scenes.pt")
    return task


MAY_CHANGE = """steps batch_size accum lr muon_lr word_lr weight_decay warmup lr_decay grad_clip ema
    class_dropout cfg_scale flow_shift aux_weight log_every log_to sample_every save_every keep
    device compile precision checkpointing data_dir skip_bad flip out resume bpe""".split()


def resumed_flags(given, path, part):
    """{flag: value} of the run in the checkpoint `path`, those in state[part] too. given: {flag:
    value} of the command line. Raises ValueError for one that would make it another run."""
    state = load_checkpoint(path, "config", part, "opt")
    saved = {**state["config"], **state[part]}
    for name, value in given.items():
        was = saved.get(name)
        stage = value == "new" and str(was).endswith("first_stage/ckpt.pt")     # that in --out
        if name not in MAY_CHANGE and value not in (was, "auto") and not stage:
            raise ValueError(f"--{name.replace('_', '-')} {value}: the run in {path} has {was}; "
                             f"leave the flag out, or start a new run with --init {path}")
    return saved


def check_read(given, config, settings):
    """Raise ValueError for a flag that nothing reads in this run. given: {flag: value}."""
    kind, stage = config.data.partition(":")[0], getattr(settings, "first_stage", "new")
    read = {
        "save_latents": (stage not in ("new", "none"), "--first-stage FILE"),
        "muon_lr": (config.optimizer == "muon", "--optimizer muon"),
        "checkpointing": (FAMILIES[find_model(config.model)[0]].first_stage, "models with blocks"),
        "bpe": (not (config.resume or config.init), "new runs, without --resume or --init"),
        "data_dir": (kind in data.OFFICIAL, f"--data {', '.join(data.OFFICIAL)}"),
        "skip_bad": (kind == "folder", "--data folder:PATH"),
        "image_size": (kind != "latents", "pictures, not latents"),
        "flip": (kind != "latents" or config.flip == "off", "pictures, not latents"),
        "cfg_scale": (getattr(settings, "class_dropout", 1) > 0, "--class-dropout above 0"),
        **dict.fromkeys(("first_stage_steps", "latent_channels", "latent_noise", "factor", "codes"),
                        (stage == "new" or config.resume, "--first-stage new"))}
    if config.save_latents:
        encode = "data data_dir image_size skip_bad device first_stage save_latents" + (
            " hold_out seed" * (kind in ("shapes", "scenes")))
        read |= {name: (False, "training") for name in given if name not in encode.split()}
    for name, (used, by) in read.items():
        if not used and given.get(name, False) is not False:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]} is for {by}: leave it out")


def base_flags(given, ours, paper):
    """Defaults of a short run on given["base"]: `ours`, or `paper` if that is an official file; to
    resume a run, its flags. given: {flag: value}, with "base" and "out". Raises ValueError."""
    if len(given) == 2 and not os.path.exists(given["base"]):
        return {}                                           # --help, where there is no base
    flags, taken, rates, unread = given, {"model": "SD-v1", "image_size": 512}, paper, ""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("torchrun is for train.py alone: start this with python")
    if goes_on := given.get("resume") and os.path.isfile(path := f"{given['out']}/ckpt.pt"):
        said = {name: value for name, value in given.items() if name != "base"}
        flags = {**resumed_flags(said, path, "options"), "out": given["out"]}
    elif not is_official(given["base"]):
        state, rates, unread = load_checkpoint(given["base"]), ours, "image_size"
        said = {**state.get("config", {}), **state.get("info", {})}     # of latents: info's size
        taken = {k: said[k] for k in ("model", "data", "image_size") if k in said}
    sources = " ".join([flags.get("data") or taken.get("data", ""), flags.get("prior") or "",
                        *(flags.get("concept") or ())])
    word = flags.get("part") == "none"                  # nothing but words, at --word-lr
    read = {"muon_lr": flags.get("optimizer") == "muon" and not word, "lr": not word,
            "data_dir": any(name in sources for name in data.OFFICIAL),
            "skip_bad": "folder:" in sources}
    unread = {"model", "init", "recipe", "save_latents", unread, *(k for k in read if not read[k])}
    for name in given.keys() & unread:
        raise ValueError(f"--{name.replace('_', '-')} is not read here"
                         f"{' (--part none)' * word}: leave it out")
    if not sources.strip() and rates is paper:
        raise ValueError("say with --data or --concept what to learn from: the base has no data")
    return flags if goes_on else {"steps": 250, "optimizer": "adamw", "warmup": 0, "ema": 0.9,
                                  "sample_every": 0, **taken, **rates, "out": given["out"]}
