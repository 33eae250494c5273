"""Other people's weights: Stable Diffusion v1 in each form in which it is published.

Papers: Latent Diffusion Models (Rombach et al. 2022); CLIP (Radford et al. 2021).

The idea. unet.py, vae.py and text.py keep the official names, so loading takes three small steps:
  read    a file becomes {name: tensor}. The tensors are mapped, not read: a page comes from disk
          when it is first used. Nothing in a file is executed.
  name    one CompVis file holds three models, told apart by a prefix. A diffusers folder holds them
          in sub-folders, with blocks counted within each level; here they are counted throughout.
  build   sizes are read off the shapes, but heads, GroupNorm groups and the scale of the latents
          are taken as published; the module is made without memory and takes the tensors over.

    parts = read_stable_diffusion("v1-5-pruned-emaonly.safetensors")    # or a folder of diffusers
    models = build(parts, dtype=torch.float32)  # {"unet": UNet, "vae": AutoencoderKL, "text": ...}
    python -m pytest tests/test_pretrained.py

SD 2 and SD XL do not load. While tensors are in use, do not write into their file: replace it.
"""
import json
import math
import mmap
import pathlib
import re

import torch

from checkpoint import check_tensors, load_checkpoint, named_tensors, read_torch
from dit import DIT_CONFIGS
from text import TextEncoder
from unet import UNet
from vae import AutoencoderKL, first_stage_from

# ---- sizes, and the modules ----------------------------------------------------------------------

def infer_unet(state):
    """Arguments of the UNet with this state_dict; 8 heads, as in SD v1. Source: LDM table 15."""
    shape = _shapes(state, "a U-Net of the Stable Diffusion family")
    context_dim = shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    if context_dim == 1024 or any(name.startswith(("add_embedding.", "label_emb."))
                                  for name in state):
        raise ValueError("a U-Net of Stable Diffusion 2 or XL: give v1's")
    model_channels, in_channels = shape("input_blocks.0.0.weight", 4)[:2]
    down = sorted(int(name.split(".")[1]) for name in state
                  if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name))
    first = [1, *(i + 1 for i in down)]             # the first block of each level
    widths = [shape(f"input_blocks.{i}.0.out_layers.3.weight", 4)[0] for i in first]
    return dict(
        in_channels=in_channels, out_channels=shape("out.2.weight", 4)[0],
        model_channels=model_channels, channel_mult=tuple(w / model_channels for w in widths),
        # block 0 is the first convolution
        num_res_blocks=(down or [_count(state, r"input_blocks\.(\d+)\.")])[0] - 1,
        attention_resolutions=tuple(2 ** level for level, i in enumerate(first)
                                    if f"input_blocks.{i}.1.norm.weight" in state),
        num_heads=8, context_dim=context_dim)


def infer_vae(state):
    """Arguments of the AutoencoderKL with this state_dict; scale: SD v1. Source: LDM appendix G."""
    shape = _shapes(state, "an AutoencoderKL")
    channels, in_channels = shape("encoder.conv_in.weight", 4)[:2]
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight", 4)[0]
              for level in range(max(1, _count(state, r"encoder\.down\.(\d+)\.")))]
    return dict(channels=channels, multipliers=tuple(width // channels for width in widths),
                in_channels=in_channels, z_channels=shape("post_quant_conv.weight", 4)[0],
                res_blocks=_count(state, r"encoder\.down\.0\.block\.(\d+)\."))


def infer_text(state):
    """Arguments of the TextEncoder with this state_dict; width / 64 heads. Source: CLIP §2.4."""
    shape = _shapes(state, "CLIP's text encoder")
    vocab_size, width = shape("text_model.embeddings.token_embedding.weight", 2)
    if width in (1024, 1280):               # with another activation
        raise ValueError(f"a text encoder of width {width}, Stable Diffusion 2's or XL's: give v1")
    mlp_hidden = shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0]
    return dict(vocab_size=vocab_size, hidden_size=width, num_heads=max(1, width // 64),
                max_length=shape("text_model.embeddings.position_embedding.weight", 2)[0],
                depth=_count(state, r"text_model\.encoder\.layers\.(\d+)\."),
                mlp_ratio=mlp_hidden / width)


def infer_dit(state):
    """Arguments of the adaln_zero DiT with this state_dict. Heads: from the paper's table by
    width, else width / 32. Not of a SiT, with the same names and shapes, which predicts a velocity:
    its weights of the variance never got a gradient and are 0. Source: DiT Table 1; SiT's code."""
    shape = _shapes(state, "an adaln_zero DiT")
    width, in_channels, patch, _ = shape("x_embedder.proj.weight", 4)
    shape("blocks.0.adaLN_modulation.1.weight", 2)          # it is there
    out_channels = shape("final_layer.linear.weight", 2)[0] // patch ** 2
    learn_sigma, final = out_channels == 2 * in_channels, state["final_layer.linear.weight"]
    variance = final.view(patch ** 2, -1, width)[:, in_channels:]
    if learn_sigma and final.any() and not variance.any():
        raise ValueError("a SiT, or another DiT whose variance was never trained, is not read here")
    heads = {sizes["hidden_size"]: sizes["num_heads"] for sizes in DIT_CONFIGS.values()}
    return dict(input_size=round(shape("pos_embed", 3)[1] ** 0.5) * patch, patch_size=patch,
                in_channels=in_channels, hidden_size=width, depth=_count(state, r"blocks\.(\d+)\."),
                num_heads=heads.get(width, width // 32),
                num_classes=shape("y_embedder.embedding_table.weight", 2)[0] - 1,
                learn_sigma=learn_sigma)


def infer_udit(state):
    """Arguments of the UDiT with this state_dict. What no tensor shows is the paper's: input size
    32, down_factor 2, shortcut; rope if cosine, else heads of 24 channels. Source: U-DiT §4.1."""
    shape = _shapes(state, "a U-DiT")
    hidden_size, in_channels = shape("x_embedder.proj.weight", 4)[:2]
    kinds = {"dwconv.0": "rep", "dwconv": "dw", "fc1": "basic"}     # by a layer that only it has
    layer = next((layer for layer in kinds if f"latent.0.mlp1.{layer}.weight" in state), "fc1")
    levels = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")
    scale, kernel = "latent.0.attn1.logit_scale", "latent.0.attn1.downsampler.layer.weight"
    cosine = scale in state
    return dict(
        in_channels=in_channels, hidden_size=hidden_size,
        depth=tuple(_count(state, rf"{level}\.(\d+)\.") for level in levels),
        num_heads=shape(scale, 3)[0] if cosine else max(1, hidden_size // 24),
        mlp_ratio=shape(f"latent.0.mlp1.{layer}.weight", 4)[0] / (4 * hidden_size),     # width 4D
        num_classes=shape("y_embedder_1.embedding_table.weight", 2)[0] - 1,
        learn_sigma=shape("final_layer.out_proj.weight", 4)[0] == 2 * in_channels,
        cosine=cosine, rope=cosine, mlp=kinds[layer],
        kernel_size=shape(kernel, 4)[-1] if kernel in state else 0)


def _shapes(state, what):
    """shape(name, axes): of a tensor that must be there, with so many axes, else ValueError."""
    def shape(name, axes):
        if name not in state or state[name].dim() != axes:
            found = f"has shape {tuple(state[name].shape)}" if name in state else "is not there"
            raise ValueError(f"this is not the state_dict of {what}: {name} {found}")
        return state[name].shape
    return shape


def _count(names, pattern):
    """How many different numbers the pattern's group takes at the beginning of names."""
    return len({match[1] for match in (re.match(pattern, name) for name in names) if match})


PARTS = {"unet": (infer_unet, UNet), "vae": (infer_vae, AutoencoderKL),
         "text": (infer_text, TextEncoder)}


def build(parts, dtype=None):
    """{"unet" | "vae" | "text": state} -> {the same: module}, which takes the tensors over.
    dtype: None keeps the file's. Raises ValueError for tensors that do not fit exactly."""
    models = {}
    for part, state in parts.items():
        infer, make = PARTS[part]
        sizes = infer(state)
        if part == "unet" and sizes["in_channels"] != sizes["out_channels"]:
            raise ValueError(f"a U-Net of {sizes['in_channels']} channels in and "
                             f"{sizes['out_channels']} out, for inpainting (9), pix2pix (8), depth "
                             "(5) and the like: give a plain text-to-image model")
        with torch.device("meta"):
            models[part] = make(**sizes)
        check_tensors(models[part].state_dict(), state, f"{part}:")
        cast = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
        models[part].load_state_dict(cast, assign=True)
    return models


def load_first_stage(path):
    """The frozen first stage in a file: a run of tiny-ae, kl-ae or vq-vae, what a diffusion model's
    checkpoint carries, or an official AutoencoderKL. Raises ValueError if there is none."""
    state = {} if is_official(path) else load_checkpoint(path)
    if "sizes" in state:                                        # a run of an autoencoder
        state["first_stage"] = {**state, "kind": state["task"], "model": state["ema"]}
    if "first_stage" in state:
        return first_stage_from(state["first_stage"], path)
    parts = {} if state else read_stable_diffusion(path)
    if "vae" not in parts:
        raise ValueError(f"{path} holds no autoencoder: --first-stage wants that of --model "
                         "tiny-ae, kl-ae or vq-vae, or an official AutoencoderKL")
    return build({"vae": parts["vae"]}, torch.float32)["vae"].eval().requires_grad_(False)


# ---- names: one CompVis file, three models -------------------------------------------------------

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
            "text": "cond_stage_model.transformer."}
MARKS = {"unet": "input_blocks.0.0.weight", "vae": "encoder.down.0.block.0.conv1.weight",
         "text": "text_model.embeddings.token_embedding.weight"}    # in a file without prefixes


def read_stable_diffusion(path):
    """A file of Stable Diffusion v1 (CompVis names) or a diffusers folder -> parts, for build."""
    folder = pathlib.Path(path).is_dir()
    return read_diffusers(path) if folder else split_compvis(read_weights(path))


def is_official(path):
    """Is this a file or folder that others published, and not one of ours? Raises ValueError."""
    path = pathlib.Path(path)
    return path.is_dir() or path.is_file() and is_safetensors(path) or (
        "format" not in load_checkpoint(path))


def split_compvis(state):
    """Names of a CompVis file -> {"unet": state, "vae": state, "text": state}, what is there; one
    part (such as vae-ft-mse-840000-ema-pruned) may lack the prefixes. Left out: the EMA copy, the
    schedule, the first stage's training loss and position_ids. Source: LDM's code."""
    if any(name.startswith(("cond_stage_model.model.", "conditioner.")) for name in state):
        raise ValueError("it has the text encoder of Stable Diffusion 2 or XL: give a file of v1")
    if "v_pred" in state or any("lora_" in name.lower() for name in state):
        raise ValueError("it is a LoRA, a change to a model, or predicts v: give a full file of v1")
    prefixes = PREFIXES
    if not any(name.startswith(tuple(PREFIXES.values())) for name in state):
        prefixes = {part: "" for part, mark in MARKS.items() if mark in state}
    parts = {}
    for part, prefix in prefixes.items():
        kept = re.compile(re.escape(prefix) + r"(?!loss\.|model_ema\.)")
        if tensors := {name.removeprefix(prefix): tensor for name, tensor in state.items()
                       if kept.match(name)}:
            parts[part] = _text_names(tensors) if part == "text" else _as_convolutions(tensors)
    if not parts:
        raise ValueError("no part of Stable Diffusion in this file: names such as "
                         f"{', '.join(list(state)[:3])} (for a diffusers folder: read_diffusers)")
    return parts


def _as_convolutions(state):
    """Attention's 1x1 convolutions, Linear in some files: (C_out, C_in) -> (C_out, C_in, 1, 1)."""
    convolution = re.compile(r"(\.proj_in|\.proj_out|\.attn_1\.[qkv])\.weight$")
    return {name: tensor[:, :, None, None]                                  # (C_out, C_in, 1, 1)
            if tensor.dim() == 2 and convolution.search(name) else tensor
            for name, tensor in state.items()}


def _text_names(state):
    """Without position_ids, a buffer of old transformers; with `text_model.`, which some lack."""
    return {"text_model." + name.removeprefix("text_model."): tensor
            for name, tensor in state.items() if not name.endswith("position_ids")}


# ---- names: a diffusers folder -------------------------------------------------------------------

# ours by diffusers' name: the layers outside blocks, then those inside each kind of block
UNET_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
UNET_LEAVES = {"downsamplers": {"conv": "op"}, "resnets": {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}}
VAE_ENDS = {f"{half}.conv_norm_out": f"{half}.norm_out" for half in ("encoder", "decoder")}
VAE_LEAVES = {"resnets": {"conv_shortcut": "nin_shortcut"}, "attentions": {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    # before diffusers 0.17, and so in most published files
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}}
BLOCK = re.compile(r"(encoder\.|decoder\.|)(down_blocks|up_blocks|mid_block)(?:\.(\d+))?"
                   r"\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def rename_unet(state):
    """Names of diffusers' UNet2DConditionModel (the SD-v1 family) -> those of UNet.
    diffusers numbers levels and the blocks in each: down_blocks.L.resnets.J. Here blocks have one
    running number; a down-sampler is a block by itself, an up-sampler the last layer of its
    level's last block. Source: diffusers' convert_diffusers_to_original_stable_diffusion.py."""
    blocks = _count(state, r"down_blocks\.0\.resnets\.(\d+)\.")     # of a level; up has one more

    def places(level, j):
        first = level * (blocks + 1)                    # number of the level's first block
        attends = any(name.startswith(f"up_blocks.{level}.attentions.") for name in state)
        return {"mid_block resnets": f"middle_block.{2 * j}",
                "mid_block attentions": f"middle_block.{2 * j + 1}",
                "down_blocks resnets": f"input_blocks.{first + j + 1}.0",   # 0: first convolution
                "down_blocks attentions": f"input_blocks.{first + j + 1}.1",
                "down_blocks downsamplers": f"input_blocks.{first + blocks + 1}.0",
                "up_blocks resnets": f"output_blocks.{first + j}.0",
                "up_blocks attentions": f"output_blocks.{first + j}.1",
                "up_blocks upsamplers": f"output_blocks.{first + blocks}.{1 + attends}"}
    return _renamed(state, places, UNET_ENDS, UNET_LEAVES)


def rename_vae(state):
    """Names of diffusers' AutoencoderKL, before and after version 0.17 -> those of ours.
    diffusers numbers up_blocks as they run, ours from the highest resolution. Source: the same."""
    levels = _count(state, r"decoder\.up_blocks\.(\d+)\.")

    def places(level, j):
        up = levels - 1 - level
        return {"mid_block resnets": f"mid.block_{j + 1}", "mid_block attentions": "mid.attn_1",
                "down_blocks resnets": f"down.{level}.block.{j}",
                "down_blocks downsamplers": f"down.{level}.downsample",
                "up_blocks resnets": f"up.{up}.block.{j}",
                "up_blocks upsamplers": f"up.{up}.upsample"}
    return _renamed(state, places, VAE_ENDS, VAE_LEAVES)


def _renamed(state, places, ends, leaves):
    """{our name: tensor}; an unknown name stays, so that build refuses it."""
    def rename(name):
        end, _, kind = name.rpartition(".")             # kind: weight or bias
        match = BLOCK.fullmatch(end)
        if not match:
            return f"{ends.get(end, end)}.{kind}"
        half, side, level, layer, j, leaf = match.groups()
        place = places(int(level or 0), int(j)).get(f"{side} {layer}", f"{side} {layer}")
        return f"{half}{place}.{leaves.get(layer, {}).get(leaf, leaf)}.{kind}"
    return _as_convolutions({rename(name): tensor for name, tensor in state.items()})


# what a config may say, in all files of a diffusers folder: Stable Diffusion v1's values
SD_V1 = {
    "prediction_type": ["epsilon"], "beta_schedule": ["scaled_linear"], "beta_start": [0.00085],
    "beta_end": [0.012], "num_train_timesteps": [1000], "trained_betas": [None], "steps_offset":
    [0, 1], "rescale_betas_zero_snr": [False], "timestep_spacing": ["leading", "linspace"],
    "attention_head_dim": [8], "act_fn": ["silu"], "norm_eps": [1e-5], "norm_num_groups": [32],
    "class_embed_type": [None], "scaling_factor": [0.18215], "shift_factor": [None],
    "hidden_act": ["quick_gelu"], "layer_norm_eps": [1e-5]}


def check_configs(folder):
    """Raise ValueError if a config of a diffusers folder says what would be drawn wrongly."""
    for name in ("scheduler/scheduler_", "unet/", "vae/", "text_encoder/", ""):
        path = folder / f"{name}config.json"
        try:
            said = json.loads(path.read_bytes()) if path.is_file() else {}
            wrong = [key for key in SD_V1 if said.get(key, SD_V1[key][0]) not in SD_V1[key]]
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged or no config of diffusers") from error
        for key in wrong:
            raise ValueError(f"{path} says {key} {str(said[key])[:40]}, and only Stable Diffusion "
                             f"v1's can be read, {SD_V1[key][0]}")


def read_diffusers(folder):
    """A diffusers folder -> {"unet": state, "vae": state, "text": state}, the parts it has:
    sub-folders unet, vae, text_encoder, or itself, if a U-Net's or autoencoder's weights are in it
    (such as sd-vae-ft-ema). Raises ValueError if it has none. Source: diffusers' saved pipeline."""
    folder, parts = pathlib.Path(folder), {}
    check_configs(folder)
    if file := _find(folder):
        state = read_weights(file)
        is_vae = "encoder.conv_in.weight" in state
        return {"vae": rename_vae(state)} if is_vae else {"unet": rename_unet(state)}
    for part, sub, rename in (("unet", "unet", rename_unet), ("vae", "vae", rename_vae),
                              ("text", "text_encoder", _text_names)):
        if file := _find(folder / sub):
            parts[part] = rename(read_weights(file))
    if not parts:
        raise ValueError(f"{folder} is no diffusers folder: it has no weights in sub-folders unet, "
                         "vae or text_encoder (files split into shards are not read)")
    return parts


def read_delta(state):
    """What a file of Custom Diffusion holds, CompVis or diffusers -> ({our name: W, or {"u", "v"}
    of its low-rank change}, {token: row (D,)}). Source: official get_deltas.py, compress.py."""
    given = state.get("unet", state.get("state_dict", {}))
    rows = state.get("modifier_token") or {
        f"<new{k}>": row for k, row in enumerate(given.get("embed", ()), 1)}
    rows = {token: row.float().flatten() for token, row in rows.items()}                # (D,)
    given = {name.removeprefix("model.diffusion_model."): w for name, w in given.items()
             if ".attn2." in name}
    if any(".attentions." in name for name in given):           # diffusers' names
        # rename_unet counts ResBlocks, of which one is beside every attention
        beside = [re.sub(r"attentions\.(\d+)\..*", r"resnets.\1.conv1.weight", n) for n in given]
        names = rename_unet(dict.fromkeys([*given, *beside], torch.empty(0)))
        given = dict(zip(names, given.values()))
    return given, rows


def _find(folder):
    """A folder's file of weights or None: full precision before fp16, safetensors before .bin."""
    names = [stem + end for end in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin")
             for stem in ("diffusion_pytorch_model", "model", "pytorch_model")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


# ---- files. safetensors: 8 bytes, a JSON's length; JSON {name: {dtype, shape, data_offsets}}; data

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def read_weights(path):
    """{name: tensor} of a file, safetensors or torch by its first bytes. Raises ValueError."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    read = read_safetensors if is_safetensors(path) else read_torch
    return named_tensors(read(path), path)


def is_safetensors(path):
    """Does the file begin like safetensors? Raises ValueError for what downloads often bring."""
    with open(path, "rb") as file:
        head = file.read(64)
    other = (b"version https://git-lfs", b"<!doctype", b"<html")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(other):
        raise ValueError(f"{path} is a web page or a Git LFS pointer in place of the weights: "
                         "download the file itself, or run git lfs pull")
    torch_file = head.startswith((b"PK", b"\x80"))          # a zip file, or a bare pickle
    return head[8:9] == b"{" or str(path).endswith(".safetensors") and not torch_file


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, mapped: writing to a tensor leaves the file as it is.
    Raises ValueError for any other file. Source: github.com/huggingface/safetensors, "Format"."""
    try:
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(buffer[:8], "little")        # the first byte of the data
        header, last, tensors = json.loads(buffer[8:start]), start, {}
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            begin, end = (start + offset for offset in entry["data_offsets"])
            count = math.prod(shape)
            if begin != last or end - begin != count * dtype.itemsize or end > len(buffer):
                raise ValueError(f"{name!r}, {shape} {dtype}, is at {entry['data_offsets']}")
            # a storage for each tensor, so saving one does not save the file; not aligned: a copy
            where = dict(buffer=buffer, offset=begin) if begin % dtype.itemsize == 0 else dict(
                buffer=bytearray(buffer[begin:end]))
            tensors[name] = torch.frombuffer(**where, dtype=dtype, count=count).view(shape) \
                if count else torch.empty(shape, dtype=dtype)
            last = end
        if last != len(buffer):
            raise ValueError(f"{len(buffer) - last} bytes after the last tensor")
        return tensors
    except Exception as error:                  # a damaged file may fail in any way
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"{path} is missing, truncated, damaged or no safetensors file "
                         f"({type(error).__name__}: {reason})") from error
