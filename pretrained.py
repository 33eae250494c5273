"""Other people's weights, in and out: Stable Diffusion v1 in each form in which it is published.

Papers: Latent Diffusion Models (Rombach et al. 2022); CLIP (Radford et al. 2021).

The idea. unet.py, vae.py and text.py keep the official names, so loading takes three small steps:
  read    a file becomes {name: tensor}. The tensors are mapped, not read: a page comes from disk
          when it is first used. Nothing in a file is executed.
  name    one CompVis file holds three models, told apart by a prefix. A diffusers folder holds them
          in sub-folders under other names: there blocks are counted within each level, here
          throughout. The rule reads the counts off the names, so any number of levels will do.
  build   sizes are read off the shapes; the module is made without memory (meta device) and takes
          the tensors over.
Heads, GroupNorm groups and the scale of the latents cannot be read off a tensor: state them.

Contents: infer_unet, infer_vae, infer_text, build; read_stable_diffusion, is_official,
split_compvis; rename_unet, rename_vae, read_diffusers; read_weights, read_safetensors,
write_safetensors.

    parts = read_stable_diffusion("v1-5-pruned-emaonly.safetensors")    # or a folder of diffusers
    models = build(parts, dtype=torch.float32)  # {"unet": UNet, "vae": AutoencoderKL, "text": ...}
    python -m pytest tests/test_pretrained.py

The U-Net of SD 2 loads too (its Linear projections become 1x1 convolutions); its text encoder and
SD XL do not. While tensors are in use, replace their file as write_safetensors does, and do not
write into it.
"""
import json
import math
import mmap
import pathlib
import re

import torch

from checkpoint import load_checkpoint, mismatch, named_tensors, read_torch, written_whole
from dit import DIT_CONFIGS
from text import TextEncoder
from unet import UNet
from vae import AutoencoderKL, first_stage_from

# --------------------------------------------------------------------------------------------------
# sizes, and the modules

def infer_unet(state, **stated):
    """Constructor arguments of the UNet whose state_dict this is.

    stated: arguments that cannot be read off tensors. Default: 32 groups and 8 heads as in SD v1,
    or heads of 64 channels when the context is 1024 wide, as in SD 2.
    Raises ValueError if the tensors are not those of such a U-Net.
    Source: LDM table 15; v2-inference.yaml of SD 2.
    """
    shape = _shapes(state, "a U-Net of the Stable Diffusion family")
    model_channels, in_channels = shape("input_blocks.0.0.weight", 4)[:2]
    count = _count(state, r"input_blocks\.(\d+)\.")
    down = sorted(int(name.split(".")[1]) for name in state
                  if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name))
    first = [1, *(i + 1 for i in down)]             # the first block of each level
    widths = [shape(f"input_blocks.{i}.0.out_layers.3.weight", 4)[0] for i in first]
    context_dim = shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    sd2 = dict(num_heads=-1, num_head_channels=64)
    return dict(
        in_channels=in_channels, out_channels=shape("out.2.weight", 4)[0],
        model_channels=model_channels, channel_mult=_multiples(widths, model_channels),
        num_res_blocks=(down or [count])[0] - 1,    # block 0 is the first convolution
        attention_resolutions=tuple(2 ** level for level, i in enumerate(first)
                                    if f"input_blocks.{i}.1.norm.weight" in state),
        transformer_depth=_count(state, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
        context_dim=context_dim) | (sd2 if context_dim == 1024 else dict(num_heads=8)) | stated


def infer_vae(state, **stated):
    """Constructor arguments of the AutoencoderKL whose state_dict this is.

    stated: arguments that cannot be read off tensors. Default: the scale of SD v1 and 2, 0.18215.
    Raises ValueError if the tensors are not those of an AutoencoderKL. Source: LDM appendix G.
    """
    shape = _shapes(state, "an AutoencoderKL")
    channels, in_channels = shape("encoder.conv_in.weight", 4)[:2]
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight", 4)[0]
              for level in range(max(1, _count(state, r"encoder\.down\.(\d+)\.")))]
    return dict(channels=channels, multipliers=_multiples(widths, channels),
                in_channels=in_channels,
                res_blocks=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
                z_channels=shape("post_quant_conv.weight", 4)[0]) | stated


def infer_text(state, **stated):
    """Constructor arguments of the TextEncoder whose state_dict this is.

    stated: arguments that cannot be read off tensors. Default: width / 64 heads, as in every CLIP.
    Raises ValueError if the tensors are not those of CLIP's text encoder, or its width is that of
    SD 2 or XL. Source: CLIP §2.4.
    """
    shape = _shapes(state, "CLIP's text encoder")
    vocab_size, width = shape("text_model.embeddings.token_embedding.weight", 2)
    if width in (1024, 1280):
        raise ValueError(f"a text encoder of width {width}, Stable Diffusion 2's or XL's, has "
                         "another activation than TextEncoder: only v1's (width 768) can be built")
    mlp_hidden = shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0]
    return dict(vocab_size=vocab_size, hidden_size=width, num_heads=max(1, width // 64),
                max_length=shape("text_model.embeddings.position_embedding.weight", 2)[0],
                depth=_count(state, r"text_model\.encoder\.layers\.(\d+)\."),
                mlp_ratio=mlp_hidden / width) | stated


def _shapes(state, what):
    """shape(name, axes): the shape of a tensor that must be there, with so many axes."""
    def shape(name, axes):
        if name not in state or state[name].dim() != axes:
            found = f"has shape {tuple(state[name].shape)}" if name in state else "is not there"
            raise ValueError(f"this is not the state_dict of {what}: {name} {found}")
        return state[name].shape
    return shape


def _multiples(widths, unit):
    return tuple(width // unit if width % unit == 0 else width / unit for width in widths)


def _count(names, pattern):
    """How many different numbers the pattern's group takes at the beginning of names."""
    return len({match[1] for match in (re.match(pattern, name) for name in names) if match})


PARTS = {"unet": (infer_unet, UNet), "vae": (infer_vae, AutoencoderKL),
         "text": (infer_text, TextEncoder)}


def build(parts, dtype=None, stated=None):
    """{"unet" | "vae" | "text": state} -> {the same: module}, which takes the tensors over.

    dtype: of the modules, else the file's; stated: {"unet": {"num_heads": 4}}, see infer_unet.
    Raises ValueError, with the first five tensors that do not fit exactly.
    """
    stated, models = stated or {}, {}
    for part in [*parts, *stated]:
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}: choose of {', '.join(PARTS)}")
    for part, state in parts.items():
        infer, make = PARTS[part]
        sizes = infer(state, **stated.get(part, {}))
        try:
            with torch.device("meta"):
                model = make(**sizes)
        except TypeError as error:      # an unknown name in `stated`, a width that is no multiple
            raise ValueError(f"{part}: cannot build it from {sizes}: "
                             f"{str(error).splitlines()[0]}") from error
        wrong = mismatch(model.state_dict(), state)
        wrong += [f"{name}: dtype {tensor.dtype}" for name, tensor in state.items()
                  if not tensor.is_floating_point()]
        if wrong:
            raise ValueError(f"{part}: {len(wrong)} tensors do not fit: {'; '.join(wrong[:5])}")
        model.load_state_dict({name: tensor.to(dtype or tensor.dtype)
                               for name, tensor in state.items()}, assign=True)
        models[part] = model
    return models


# --------------------------------------------------------------------------------------------------
# names: one CompVis file, three models

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
            "text": "cond_stage_model.transformer."}
# a file of one model has no prefix; it is recognised by this name
MARKS = {"unet": "input_blocks.0.0.weight", "vae": "encoder.down.0.block.0.conv1.weight",
         "text": "text_model.embeddings.token_embedding.weight"}


def read_stable_diffusion(path):
    """A file of Stable Diffusion v1 (CompVis names) or a diffusers folder -> its parts, for build.

    Raises ValueError if it is neither. Source: LDM's and diffusers' released code.
    """
    folder = pathlib.Path(path).is_dir()
    return read_diffusers(path) if folder else split_compvis(read_weights(path))


def is_official(path):
    """Is this a file or folder that others published, and not one of ours? Raises ValueError."""
    path = pathlib.Path(path)
    return path.is_dir() or path.is_file() and _is_safetensors(path) or (
        "format" not in load_checkpoint(path))


def split_compvis(state):
    """Names of a CompVis file -> {"unet": state, "vae": state, "text": state}, what is there.

    A file of one part (such as vae-ft-mse-840000-ema-pruned) may come without prefixes. The EMA
    copy, the schedule's buffers, the first stage's training loss and position_ids are left out.
    Raises ValueError if no part is there, or the text encoder is that of SD 2 or XL.
    Source: LDM's released code.
    """
    later = ("cond_stage_model.model.", "conditioner.")
    foreign = [name for name in state if name.startswith(later)]
    if foreign:
        raise ValueError(f"{foreign[0]} belongs to the text encoder of Stable Diffusion 2 or XL, "
                         "only v1's can be built: leave out the names of its prefix")
    prefixes = PREFIXES
    if not any(name.startswith(tuple(PREFIXES.values())) for name in state):
        prefixes = {part: "" for part, mark in MARKS.items() if mark in state}
    parts = {}
    for part, prefix in prefixes.items():
        tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items()
                   if name.startswith(prefix)
                   and not name.startswith((f"{prefix}loss.", f"{prefix}model_ema."))}
        if tensors:
            parts[part] = _text_names(tensors) if part == "text" else _as_convolutions(tensors)
    if not parts:
        raise ValueError("no part of Stable Diffusion in this file: names such as "
                         f"{', '.join(list(state)[:3])}; expected prefixes "
                         f"{', '.join(PREFIXES.values())} (for a diffusers folder: read_diffusers)")
    return parts


def _as_convolutions(state):
    """Attention's 1x1 convolutions, Linear in some files: (C_out, C_in) -> (C_out, C_in, 1, 1)."""
    convolution = re.compile(r"(\.proj_in|\.proj_out|\.attn_1\.[qkv])\.weight$")
    return {name: tensor[:, :, None, None]                                  # (C_out, C_in, 1, 1)
            if tensor.dim() == 2 and convolution.search(name) else tensor
            for name, tensor in state.items()}


def _text_names(state):
    """Without position_ids, a buffer of old transformers; with `text_model.`, which some lack."""
    bare = re.compile(r"^(?=embeddings\.|encoder\.|final_layer_norm\.)")
    return {bare.sub("text_model.", name): tensor for name, tensor in state.items()
            if not name.endswith("position_ids")}


# --------------------------------------------------------------------------------------------------
# names: a diffusers folder

UNET_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
          "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
# the second name of each is the one before diffusers 0.17
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "query": "q", "to_k": "k", "key": "k",
                 "to_v": "v", "value": "v", "to_out.0": "proj_out", "proj_attn": "proj_out"}
BLOCK = re.compile(r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?"
                   r"\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)\.(weight|bias)")


def rename_unet(state):
    """Names of diffusers' UNet2DConditionModel (the SD-v1 family) -> those of UNet.

    diffusers numbers levels and the blocks in each: down_blocks.L.resnets.J. Here blocks have one
    running number; a down-sampler is a block by itself, an up-sampler the last layer of its
    level's last block. Raises ValueError for an unknown name.
    Source: diffusers' convert_diffusers_to_original_stable_diffusion.py.
    """
    blocks = _count(state, r"down_blocks\.0\.resnets\.(\d+)\.")     # of a level; up has one more
    attended = {name.split(".attentions.")[0] for name in state if ".attentions." in name}

    def rename(name):
        match = BLOCK.fullmatch(name)
        if not match:
            end, _, kind = name.rpartition(".")
            return f"{UNET_ENDS[end]}.{kind}"
        side, level, layer, j, leaf, kind = match.groups()
        first, j = int(level or 0) * (blocks + 1), int(j)           # number of the level's first
        leaf = RESNET[leaf] if layer == "resnets" else leaf
        item = 0 if layer == "resnets" else 1                       # ResBlock, then transformer
        if side == "mid_block":
            where = f"middle_block.{2 * j + item}"
        elif layer == "downsamplers":
            where, leaf = f"input_blocks.{first + blocks + 1}.0", {"conv": "op"}[leaf]
        elif layer == "upsamplers":
            after = 2 if f"up_blocks.{level}" in attended else 1
            where = f"output_blocks.{first + blocks}.{after}"
        elif side == "down_blocks":
            where = f"input_blocks.{first + j + 1}.{item}"          # 0 is the first convolution
        else:
            where = f"output_blocks.{first + j}.{item}"
        return f"{where}.{leaf}.{kind}"

    return _renamed(state, rename, "a U-Net of the SD-v1 family")


def rename_vae(state):
    """Names of diffusers' AutoencoderKL, before and after version 0.17 -> those of ours.

    diffusers numbers up_blocks in the order in which they run, ours from the highest resolution.
    Raises ValueError for an unknown name.
    Source: diffusers' convert_diffusers_to_original_stable_diffusion.py.
    """
    levels = _count(state, r"decoder\.up_blocks\.(\d+)\.")

    def rename(name):
        half, _, rest = name.partition(".")
        match = BLOCK.fullmatch(rest)
        if not match:
            same = r"((post_)?quant_conv|(en|de)coder\.conv_(in|norm_out|out))\.(weight|bias)"
            return re.fullmatch(same, name) and name.replace("conv_norm_out", "norm_out")
        side, level, layer, j, leaf, kind = match.groups()
        leaf = VAE_ATTENTION[leaf] if layer == "attentions" else leaf.replace(
            "conv_shortcut", "nin_shortcut")
        if side == "mid_block":
            where = f"mid.block_{int(j) + 1}" if layer == "resnets" else "mid.attn_1"
        else:
            level = int(level) if side == "down_blocks" else levels - 1 - int(level)
            layers = {"resnets": f"block.{j}", "downsamplers": "downsample",
                      "upsamplers": "upsample"}
            where = f"{side.removesuffix('_blocks')}.{level}.{layers[layer]}"
        return f"{half}.{where}.{leaf}.{kind}"

    return _renamed(state, rename, "an AutoencoderKL")


def _renamed(state, rename, what):
    """{rename(name): tensor}; for an unknown name, rename gives None or raises KeyError."""
    renamed = {}
    for name, tensor in state.items():
        try:
            new = rename(name)
        except KeyError:
            new = None
        if new is None or new in renamed:
            raise ValueError(f"{name} {tuple(tensor.shape)} is no name of {what} in diffusers"
                             + (f", or a second one for {new}" if new else ""))
        renamed[new] = tensor
    return _as_convolutions(renamed)


def read_diffusers(folder):
    """A diffusers folder -> {"unet": state, "vae": state, "text": state}, the parts it has.

    Parts are the sub-folders unet, vae, text_encoder; a folder that itself holds the weights of a
    U-Net or autoencoder (such as sd-vae-ft-ema) is one part.
    Raises ValueError if nothing is there, or a name is unknown.
    Source: diffusers' layout of a saved pipeline.
    """
    folder, parts = pathlib.Path(folder), {}
    if not folder.is_dir():
        raise ValueError(f"no folder at {folder}")
    diffusion, clip = ("diffusion_pytorch_model",) * 2, ("model", "pytorch_model")
    file = _find(folder, diffusion)
    if file:
        state = read_weights(file)
        is_vae = "encoder.conv_in.weight" in state
        return {"vae": rename_vae(state)} if is_vae else {"unet": rename_unet(state)}
    for part, sub, stems, rename in (("unet", "unet", diffusion, rename_unet),
                                     ("vae", "vae", diffusion, rename_vae),
                                     ("text", "text_encoder", clip, _text_names)):
        if not (folder / sub).is_dir():
            continue
        file = _find(folder / sub, stems)
        if not file:
            raise ValueError(f"{folder / sub} holds neither {stems[0]}.safetensors nor "
                             f"{stems[1]}.bin (files split into shards are not read)")
        parts[part] = rename(read_weights(file))
    if not parts:
        raise ValueError(f"{folder} is no diffusers folder: it has no sub-folder unet, vae or "
                         "text_encoder")
    return parts


def _find(folder, stems):
    """A folder's file of weights or None: full precision before fp16, safetensors before .bin."""
    names = [f"{stem}{variant}{suffix}" for variant in ("", ".fp16")
             for stem, suffix in zip(stems, (".safetensors", ".bin"))]
    return next((folder / name for name in names if (folder / name).is_file()), None)


# --------------------------------------------------------------------------------------------------
# files. safetensors: 8 bytes, the header's length; JSON {name: {dtype, shape, data_offsets}}; data

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER = 100_000_000        # bytes; Source: the reference reader's own limit


def read_weights(path):
    """{name: tensor} of a file, safetensors or torch by its first bytes, whatever its name.

    Of {"ema" | "model" | "state_dict": ...} the first there is; `module.` and `_orig_mod.` are
    stripped. Raises ValueError for a missing, damaged, unsafe or empty file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is a folder: read_diffusers reads those" if path.is_dir() else
                         f"no file at {path}")
    read = read_safetensors if _is_safetensors(path) else read_torch
    return named_tensors(read(path), path)


def _is_safetensors(path):
    """Does the file begin like safetensors? Raises ValueError for what downloads often bring."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, three lines of text in place of the "
                         "weights: run git lfs pull, or download the file itself")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path} is a web page: download the file that it offers instead")
    torch_file = head.startswith((b"PK", b"\x80"))          # a zip file, or a bare pickle
    return head[8:9] == b"{" or path.suffix == ".safetensors" and not torch_file


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, mapped: writing to a tensor leaves the file as it is.

    Raises ValueError for a missing, truncated or inconsistent file.
    Source: the format's own description (github.com/huggingface/safetensors, "Format").
    """
    try:
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(buffer[:8], "little")        # the first byte of the data
        if start > min(len(buffer), MAX_HEADER):
            raise ValueError(f"its {len(buffer)} bytes announce a header of {start - 8}")
        header, last, tensors = json.loads(buffer[8:start]), start, {}
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            begin, end = (start + offset for offset in entry["data_offsets"])
            count = math.prod(shape)
            if begin != last or end - begin != count * dtype.itemsize or end > len(buffer):
                raise ValueError(f"{name!r}, {shape} {dtype}, is at {entry['data_offsets']}")
            # a storage for each tensor, so saving one does not save the whole file
            where = dict(buffer=buffer, offset=begin)
            if begin % dtype.itemsize:                          # not aligned: copy
                where = dict(buffer=bytearray(buffer[begin:end]))
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


def write_safetensors(path, tensors):
    """Write {name: tensor} to path, whole or not at all; any device, any layout in memory.

    Raises ValueError for a dtype that the format lacks, or a failed write. Source: as above.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    # the widest numbers first: then every tensor begins at a multiple of its item size
    names, header, end = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n)), {}, 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in kinds:
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}, writable are "
                             f"{', '.join(DTYPES)}")
        begin, end = end, end + tensor.nbytes
        header[name] = dict(dtype=kinds[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[begin, end])
    # diffusers and transformers ask for this mark
    head = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    head += b" " * (-len(head) % 8)
    with written_whole(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy())



def infer_dit(state):
    """Constructor arguments of the adaln_zero DiT whose state_dict this is, as in official files.

    The weights do not tell the heads: they come from the paper's table by width, else width / 32.
    Raises ValueError if a tensor that every such DiT has is missing. Source: DiT Table 1.
    """
    names = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed",
             "final_layer.linear.weight", "blocks.0.adaLN_modulation.1.weight")
    if missing := [name for name in names if name not in state]:
        raise ValueError(f"not the state_dict of an adaln_zero DiT: it has no tensor {missing[0]}")
    (width, in_channels, patch, _), (rows, _), (_, tokens, _), (out, _), _ = (
        state[name].shape for name in names)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    heads = {sizes["hidden_size"]: sizes["num_heads"] for sizes in DIT_CONFIGS.values()}
    return dict(input_size=round(tokens ** 0.5) * patch, patch_size=patch, in_channels=in_channels,
                hidden_size=width, depth=depth, num_heads=heads.get(width, width // 32),
                num_classes=rows - 1, learn_sigma=out == 2 * in_channels * patch ** 2)

def load_first_stage(path):
    """The frozen first stage in a file: a run of tiny-ae, kl-ae or vq-vae, what a diffusion model's
    checkpoint carries, or an official AutoencoderKL. Raises ValueError if there is none.
    """
    state = {} if is_official(path) else load_checkpoint(path)
    if "sizes" in state:
        state["first_stage"] = {"kind": state["task"], "sizes": state["sizes"],
                                "model": state["ema"]}
    if "first_stage" in state:
        return first_stage_from(state["first_stage"], path)
    parts = {} if state else read_stable_diffusion(path)
    if "vae" not in parts:
        raise ValueError(f"{path} holds no autoencoder: --first-stage wants that of --model "
                         "tiny-ae, kl-ae or vq-vae, or an official AutoencoderKL")
    return build({"vae": parts["vae"]}, torch.float32)["vae"].eval().requires_grad_(False)
