"""Weights from and to files: our own checkpoints, and Stable Diffusion v1 in each form in which it is published.

Papers: High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al. 2022); CLIP (Radford et al. 2021).

The idea.  unet.py, vae.py and text.py keep the official names, so loading is three small steps and no table:
  read    a file becomes {name: tensor}. The tensors are mapped, not read: a page comes from disk when it is first
          used, and 4 GB of file do not cost 4 GB of memory. Nothing in a file is ever executed.
  name    one CompVis file holds three models, told apart by a prefix. A diffusers folder holds them in sub-folders,
          under other names: same tensors, blocks counted per level instead of throughout. The rule is computed from
          the names that are there, so it holds at any number of levels and blocks.
  build   sizes are read off the tensors, the module is made without storage (meta device) and takes the tensors over.
What a tensor cannot tell, the caller may state: heads, GroupNorm groups, the scale of the latents.

Contents: read_safetensors, write_safetensors, read_weights; save_checkpoint, load_checkpoint, load_weights, for our own
files; split_compvis; rename_unet, rename_vae, read_diffusers; infer_unet, infer_vae, infer_text; is_official,
read_stable_diffusion, build.

    import weights                                     # a file, or a folder of diffusers
    parts = weights.read_stable_diffusion("v1-5-pruned-emaonly.safetensors")
    models = weights.build(parts, dtype=torch.float32)  # {"unet": UNet, "vae": AutoencoderKL, "text": TextEncoder}

    python -m pytest tests/test_weights.py             # what it must do, on shrunk files of the full structure

Beyond SD v1: the U-Net of SD 2 loads (its Linear projections get the axes of a 1x1 convolution); its text encoder and
SD XL do not. While tensors are in use, replace their file as `write_safetensors` does, never write into it.
"""
import json
import math
import mmap
import os
import pathlib
import pickle
import re
import zipfile

import torch

from text import TextEncoder
from unet import UNet
from vae import AutoencoderKL

# ----------------------------------------------------------------------------------------------------------------------
# files: safetensors (8 bytes, the header's length; JSON header {name: {dtype, shape, data_offsets}}; raw bytes), torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER = 100_000_000        # bytes; Source: the reference reader's own limit


def _unique(pairs):
    """JSON object -> dict, refusing a name that comes twice (json would keep the last)."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} appears twice in its header")
    return dict(pairs)


def _entry(where, entry):
    """Checked (begin, end, dtype, shape) of one header entry; begin and end count from the end of the header."""
    entry = entry if isinstance(entry, dict) else {}
    shape, offsets, kind = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    natural = all(isinstance(x, list) and all(type(n) is int and n >= 0 for n in x) for x in (shape, offsets))
    # 2^63: what torch can count, also in the strides of an empty tensor
    if not natural or len(offsets) != 2 or math.prod(n or 1 for n in shape) >= 2 ** 63:
        raise ValueError(f"{where} has no valid shape and data_offsets: {str(entry)[:80]}")
    if str(kind) not in DTYPES:
        raise ValueError(f"{where} has dtype {kind!r}, readable are {', '.join(DTYPES)}")
    (begin, end), dtype = offsets, DTYPES[kind]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{where}: {shape} x {kind} takes {math.prod(shape) * dtype.itemsize} bytes, its data_offsets "
                         f"{offsets} hold {end - begin}")
    return begin, end, dtype, shape


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, mapped into memory copy-on-write: writing to a tensor leaves the file.

    Raises ValueError, naming file and tensor, for a missing, truncated or inconsistent file.
    Source: the format's own description (github.com/huggingface/safetensors, "Format").
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(f"no file at {path}")
    with open(path, "rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise ValueError(f"{path} has {size} bytes and names a header of {length}: it is truncated, or no "
                             "safetensors file")
        try:
            header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {str(error)[:120]}") from error
        if not isinstance(header, dict):
            raise ValueError(f"{path} is no safetensors file: its header is a {type(header).__name__}")
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    header.pop("__metadata__", None)
    entries = [(*_entry(f"{path}, tensor {name!r}", entry), name) for name, entry in header.items()]
    start, last, tensors = 8 + length, 0, {}
    for begin, end, dtype, shape, name in sorted(entries, key=lambda e: e[:2]):
        if end > size - start:
            raise ValueError(f"{path}, tensor {name!r} ends at byte {end} of {size - start}: the file is truncated")
        if begin != last:
            raise ValueError(f"{path}, tensor {name!r} begins at byte {begin}, the one before it ends at {last}: they "
                             "overlap, or data is missing")
        # a tensor has a storage of its own, so saving one does not save the whole file
        where = dict(buffer=buffer, offset=start + begin)
        if (start + begin) % dtype.itemsize:                # written without alignment: copy
            where = dict(buffer=bytearray(buffer[start + begin:start + end]))
        count = math.prod(shape)
        tensors[name] = torch.frombuffer(**where, dtype=dtype, count=count).view(shape) if count else \
            torch.empty(shape, dtype=dtype)
        last = end
    if last != size - start:
        raise ValueError(f"{path} holds {size - start - last} bytes after its last tensor: it is damaged")
    return tensors


def write_safetensors(path, tensors):
    """Write {name: tensor} to path, complete or not at all; any device, any layout in memory.

    Raises ValueError for a dtype that the format here lacks, and for a folder that is not there. Source: as above.
    """
    path, kinds = pathlib.Path(path), {dtype: kind for kind, dtype in DTYPES.items()}
    if not path.parent.is_dir():
        raise ValueError(f"no folder {path.parent}: make it first")
    # the widest numbers first: then every tensor begins at a multiple of its item size
    names, header, end = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n)), {}, 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in kinds:
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}, writable are {', '.join(DTYPES)}")
        begin, end = end, end + tensor.nbytes
        header[name] = dict(dtype=kinds[tensor.dtype], shape=list(tensor.shape), data_offsets=[begin, end])
    # diffusers and transformers ask for this format mark
    head = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    head += b" " * (-len(head) % 8)
    part = path.with_name(path.name + ".tmp")
    try:
        with open(part, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name in names:
                file.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_torch(path):
    """What torch.save wrote, if it is tensors and plain values; mapped where the file allows (since torch 1.6).

    Raises ValueError for a file that is none, or holds code. Source: torch.load.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:                              # a damaged pickle may fail in any way
        # "operand": bytes that are no pickle; all else that the unpickler refuses is code or a class
        if isinstance(error, pickle.UnpicklingError) and "Unsupported operand" not in str(error):
            raise ValueError(
                f"{path} holds more than tensors and plain values, so it was not loaded (it could run code). Take its "
                ".safetensors edition, or if you trust its source, convert it: x = torch.load(path, "
                "weights_only=False); torch.save({'state_dict': x['state_dict']}, new_path)") from error
        reason = (re.findall(r"Unsupported operand \d+", str(error)) or str(error).splitlines()
                  or [type(error).__name__])[0][:120]
        raise ValueError(f"{path} is not readable as a torch file (truncated, or another kind of file): "
                         f"{reason}") from error


def read_weights(path):
    """{name: tensor} of a .safetensors or torch file; of {"ema" | "model" | "state_dict": ...} the first there is.

    `module.` and `_orig_mod.` are stripped. Raises ValueError for a missing, damaged, unsafe or empty file.
    Source: none.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: read_diffusers reads those")
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    return _named_tensors(read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path), path)


def _named_tensors(state, path):
    """The state_dict in what a file held, without the prefixes of DDP and compile."""
    state = state if isinstance(state, dict) else {}
    state = next((state[k] for k in ("ema", "model", "state_dict") if isinstance(state.get(k), dict)), state)
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in state.items()
             if isinstance(name, str) and torch.is_tensor(tensor)}
    if not state:
        raise ValueError(f"{path} holds no named tensors: it is no file of weights")
    return state


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints: a plain dict of tensors and builtins, written whole or not at all, read without running any code in it

def save_checkpoint(path, state):
    """Write atomically: a crash, a kill or a full disk leaves the old file as it was.

    Raises ValueError if it cannot. Source: none.
    """
    path = pathlib.Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:        # torch reports a failed write as RuntimeError
        part.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise ValueError(f"could not write {path} ({reason}); the previous checkpoint, if any, is intact") from error


def load_checkpoint(path):
    """A checkpoint of ours, or an official file, as {"model": state_dict, ...}; DDP and compile prefixes are stripped.

    Official: a bare state_dict or {"ema" | "model" | "state_dict": ...}. Raises ValueError for a missing, damaged or
    unsafe file. Source: none.
    """
    if not pathlib.Path(path).is_file():
        hint = ": train first (python train.py)" if "ckpt.pt" in str(path) else ""
        raise ValueError(f"no checkpoint at {path}" + hint)
    if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip() is not None:        # a flipped bit loads silently
        raise ValueError(f"{path} is damaged (a checksum inside it does not match): copy or download it again")
    state = read_torch(path)
    if isinstance(state, dict) and "format" in state:
        return state
    weights = _named_tensors(state, path)
    return {"model": weights, "ema": weights}


def load_weights(model, weights, path):
    """Copy a state_dict into model. Raises ValueError with the first five names that do not fit, and both shapes.

    Source: none.
    """
    have = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in weights.items()}
    wrong = [f"{k}: file {given.get(k, 'has none')}, model {have.get(k, 'has none')}"
             for k in sorted(have.keys() | given.keys()) if have.get(k) != given.get(k)]
    if wrong:
        raise ValueError(f"{path} does not fit this model, {len(wrong)} tensors differ: " + "; ".join(wrong[:5]))
    model.load_state_dict(weights)


# ----------------------------------------------------------------------------------------------------------------------
# names: one CompVis file, three models

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.transformer."}
# a file of one model has no prefix; by this name it is known
MARKS = {"unet": "input_blocks.0.0.weight", "vae": "encoder.down.0.block.0.conv1.weight",
         "text": "text_model.embeddings.token_embedding.weight"}


def _as_convolutions(state):
    """The 1x1 convolutions of attention that some files hold as Linear: (C_out, C_in) -> (C_out, C_in, 1, 1)."""
    return {name: tensor[:, :, None, None] if tensor.dim() == 2                                 # (C_out, C_in, 1, 1)
            and re.search(r"(\.proj_in|\.proj_out|\.attn_1\.[qkv])\.weight$", name) else tensor
            for name, tensor in state.items()}


def _text_names(state):
    """Drop the position_ids, a buffer of old transformers; put back `text_model.`, which some files leave out."""
    return {re.sub(r"^(?=embeddings\.|encoder\.|final_layer_norm\.)", "text_model.", name): tensor
            for name, tensor in state.items() if not name.endswith("position_ids")}


def split_compvis(state):
    """Names of a CompVis file -> {"unet": state, "vae": state, "text": state}, the parts that are there.

    A file of one part (such as vae-ft-mse-840000-ema-pruned) may come without prefixes. The EMA copy (model_ema.*),
    schedule buffers, the first stage's training loss and position_ids are left out.
    Raises ValueError if no part is there, or the text encoder is of another family. Source: LDM's released code.
    """
    foreign = next((name for name in state if name.startswith(("cond_stage_model.model.", "conditioner."))), None)
    if foreign:
        raise ValueError(f"{foreign} belongs to the text encoder of Stable Diffusion 2 or XL; only v1's, CLIP "
                         "ViT-L/14, can be built: leave the names of that prefix out to load the rest")
    prefixes = PREFIXES
    if not any(name.startswith(tuple(PREFIXES.values())) for name in state):
        prefixes = {part: "" for part, mark in MARKS.items() if mark in state}
    parts = {part: {name[len(prefix):]: tensor for name, tensor in state.items() if name.startswith(prefix)}
             for part, prefix in prefixes.items()}
    parts = {part: {name: tensor for name, tensor in tensors.items() if not name.startswith(("loss.", "model_ema."))}
             for part, tensors in parts.items()}
    parts = {part: tensors for part, tensors in parts.items() if tensors}
    if not parts:
        raise ValueError(f"no part of Stable Diffusion in this file: names such as {', '.join(list(state)[:3])}; "
                         f"expected prefixes {', '.join(PREFIXES.values())} (for a diffusers folder: read_diffusers)")
    return {part: _text_names(tensors) if part == "text" else _as_convolutions(tensors)
            for part, tensors in parts.items()}


# ----------------------------------------------------------------------------------------------------------------------
# names: a diffusers folder. L counts levels, J the blocks within one

UNET_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
# the second name of each is the one before diffusers 0.17
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "query": "q", "to_k": "k", "key": "k", "to_v": "v", "value": "v",
                 "to_out.0": "proj_out", "proj_attn": "proj_out"}
BLOCK = re.compile(r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)"
                   r"\.(\d+)\.(.+)\.(weight|bias)")


def _count(names, pattern):
    """How many different numbers the group of the pattern takes at the beginning of names."""
    return len({match[1] for match in (re.match(pattern, name) for name in names) if match})


def _renamed(state, rename, what):
    """{rename(name): tensor}; rename gives None, or raises KeyError, for a name that it does not know."""
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


def rename_unet(state):
    """Names of diffusers' UNet2DConditionModel (the SD-v1 family, any levels and blocks) -> those of UNet.

    A level's blocks are `down_blocks.L.resnets.J` there and one running number here, in which the down-sampler of a
    level is a block of its own, and the up-sampler a last layer of its level's last block.
    Raises ValueError for a name that is none. Source: diffusers' convert_diffusers_to_original_stable_diffusion.py.
    """
    blocks = _count(state, r"down_blocks\.0\.resnets\.(\d+)\.")            # per level down; one more up
    attended = {name.split(".attentions.")[0] for name in state if ".attentions." in name}

    def rename(name):
        match = BLOCK.fullmatch(name)
        if not match:
            end, _, kind = name.rpartition(".")
            return f"{UNET_ENDS[end]}.{kind}"
        side, level, layer, j, leaf, kind = match.groups()
        first, j = int(level or 0) * (blocks + 1), int(j)                 # the level's first number, going up
        leaf = RESNET[leaf] if layer == "resnets" else leaf
        item = 0 if layer == "resnets" else 1
        if side == "mid_block":
            where = f"middle_block.{2 * j + item}"                         # ResBlock, transformer, ResBlock
        elif layer == "downsamplers":
            where, leaf = f"input_blocks.{first + blocks + 1}.0", {"conv": "op"}[leaf]
        elif layer == "upsamplers":
            where = f"output_blocks.{first + blocks}.{2 if f'up_blocks.{level}' in attended else 1}"
        elif side == "down_blocks":
            where = f"input_blocks.{first + j + 1}.{item}"                 # number 0 is the first convolution
        else:
            where = f"output_blocks.{first + j}.{item}"
        return f"{where}.{leaf}.{kind}"

    return _renamed(state, rename, "a U-Net of the SD-v1 family")


def rename_vae(state):
    """Names of diffusers' AutoencoderKL, before and after version 0.17 -> those of ours, attention as convolutions.

    `up_blocks` are numbered as they run, `up` by resolution, from the highest: the one backwards is the other.
    Raises ValueError for a name that is none. Source: diffusers' convert_diffusers_to_original_stable_diffusion.py.
    """
    levels = _count(state, r"decoder\.up_blocks\.(\d+)\.")

    def rename(name):
        half, _, rest = name.partition(".")
        match = BLOCK.fullmatch(rest)
        if not match:
            same = r"(post_)?quant_conv|(en|de)coder\.conv_(in|norm_out|out)"
            known = re.fullmatch(rf"({same})\.(weight|bias)", name)
            return known and name.replace("conv_norm_out", "norm_out")
        side, level, layer, j, leaf, kind = match.groups()
        leaf = VAE_ATTENTION[leaf] if layer == "attentions" else leaf.replace("conv_shortcut", "nin_shortcut")
        if side == "mid_block":
            where = f"mid.block_{int(j) + 1}" if layer == "resnets" else "mid.attn_1"
        else:
            level = int(level) if side == "down_blocks" else levels - 1 - int(level)
            where = f"{side.removesuffix('_blocks')}.{level}."
            where += {"resnets": f"block.{j}", "downsamplers": "downsample", "upsamplers": "upsample"}[layer]
        return f"{half}.{where}.{leaf}.{kind}"

    return _renamed(state, rename, "an AutoencoderKL")


def _find(folder, stems):
    """The file of weights in a folder or None: full precision before fp16, safetensors before pickles."""
    names = [f"{stem}{variant}{suffix}" for variant in ("", ".fp16")
             for stem, suffix in zip(stems, (".safetensors", ".bin"))]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_diffusers(folder):
    """A diffusers folder -> {"unet": state, "vae": state, "text": state} under official names, the parts it has.

    Parts are the sub-folders unet, vae, text_encoder; a folder with the weights of one U-Net or autoencoder itself
    (such as sd-vae-ft-ema) is one part.
    Raises ValueError if nothing is there, or a name is none. Source: diffusers' layout of a saved pipeline.
    """
    folder, diffusion, clip = pathlib.Path(folder), ("diffusion_pytorch_model",) * 2, ("model", "pytorch_model")
    if not folder.is_dir():
        raise ValueError(f"no folder at {folder}")
    single = _find(folder, diffusion)
    if single:
        state = read_weights(single)
        return {"vae": rename_vae(state)} if "encoder.conv_in.weight" in state else {"unet": rename_unet(state)}
    parts = {}
    for part, sub, stems, rename in (("unet", "unet", diffusion, rename_unet), ("vae", "vae", diffusion, rename_vae),
                                     ("text", "text_encoder", clip, _text_names)):
        if not (folder / sub).is_dir():
            continue
        file = _find(folder / sub, stems)
        if not file:
            raise ValueError(f"{folder / sub} holds neither {stems[0]}.safetensors nor {stems[1]}.bin (files split "
                             "into shards are not read)")
        parts[part] = rename(read_weights(file))
    if not parts:
        raise ValueError(f"{folder} is no diffusers folder: it has no sub-folder unet, vae or text_encoder")
    return parts


# ----------------------------------------------------------------------------------------------------------------------
# sizes, and the modules

def _shape(state, name, axes, what):
    """The shape of a tensor that must be there, with so many axes."""
    if name not in state or state[name].dim() != axes:
        found = f"has shape {tuple(state[name].shape)}" if name in state else "is not there"
        raise ValueError(f"this is not the state_dict of {what}: {name} {found}")
    return state[name].shape


def _multiples(widths, unit):
    return tuple(width // unit if width % unit == 0 else width / unit for width in widths)


def infer_unet(state, **stated):
    """Constructor arguments of the UNet whose state_dict this is.

    stated: arguments that win, for num_heads and norm_groups cannot be read: 8 heads and 32 groups as in SD v1, or
    heads of 64 channels when the context is 1024 wide, as in SD 2.
    Raises ValueError if the tensors are not those of such a U-Net. Source: LDM table 15; v2-inference.yaml of SD 2.
    """
    what = "a U-Net of the Stable Diffusion family"
    model_channels, in_channels = _shape(state, "input_blocks.0.0.weight", 4, what)[:2]
    count = _count(state, r"input_blocks\.(\d+)\.")
    down = sorted(int(n.split(".")[1]) for n in state if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", n))
    num_res_blocks = (down or [count])[0] - 1               # number 0 is the first convolution
    starts = [1, *(i + 1 for i in down)]
    widths = [_shape(state, f"input_blocks.{i}.0.out_layers.3.weight", 4, what)[0] for i in starts]
    attention = tuple(2 ** level for level, i in enumerate(starts) if f"input_blocks.{i}.1.norm.weight" in state)
    context_dim = _shape(state, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2, what)[1]
    heads = dict(num_heads=8) if context_dim != 1024 else dict(num_heads=-1, num_head_channels=64)
    return dict(in_channels=in_channels, out_channels=_shape(state, "out.2.weight", 4, what)[0],
                model_channels=model_channels, channel_mult=_multiples(widths, model_channels),
                num_res_blocks=num_res_blocks, attention_resolutions=attention,
                transformer_depth=_count(state, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
                context_dim=context_dim) | heads | stated


def infer_vae(state, **stated):
    """Constructor arguments of the AutoencoderKL whose state_dict this is.

    stated: arguments that win, for scale cannot be read: 0.18215, that of SD v1 and 2.
    Raises ValueError if the tensors are not those of an AutoencoderKL. Source: LDM appendix G.
    """
    what = "an AutoencoderKL"
    channels, in_channels = _shape(state, "encoder.conv_in.weight", 4, what)[:2]
    widths = [_shape(state, f"encoder.down.{level}.block.0.conv1.weight", 4, what)[0]
              for level in range(max(1, _count(state, r"encoder\.down\.(\d+)\.")))]
    return dict(channels=channels, multipliers=_multiples(widths, channels), in_channels=in_channels,
                res_blocks=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
                z_channels=_shape(state, "post_quant_conv.weight", 4, what)[0]) | stated


def infer_text(state, **stated):
    """Constructor arguments of the TextEncoder whose state_dict this is.

    stated: arguments that win, for num_heads cannot be read: width / 64, as in every CLIP.
    Raises ValueError if the tensors are not those of CLIP's text encoder, or its width is that of SD 2's and XL's.
    Source: CLIP §2.4.
    """
    what, embeddings = "CLIP's text encoder", "text_model.embeddings."
    vocab_size, width = _shape(state, embeddings + "token_embedding.weight", 2, what)
    if width in (1024, 1280):
        raise ValueError(f"a text encoder of width {width}, Stable Diffusion 2's or XL's, uses another activation than "
                         "TextEncoder's quick GELU: only v1's, CLIP ViT-L/14 of width 768, can be built")
    return dict(vocab_size=vocab_size, hidden_size=width, num_heads=max(1, width // 64),
                max_length=_shape(state, embeddings + "position_embedding.weight", 2, what)[0],
                depth=_count(state, r"text_model\.encoder\.layers\.(\d+)\."),
                mlp_ratio=_shape(state, "text_model.encoder.layers.0.mlp.fc1.weight", 2, what)[0] / width) | stated


PARTS = {"unet": (infer_unet, UNet), "vae": (infer_vae, AutoencoderKL), "text": (infer_text, TextEncoder)}


def is_official(path):
    """Is this a file or folder that somebody else published, and not by train.py? Raises ValueError. Source: none."""
    path = pathlib.Path(path)
    return path.is_dir() or path.suffix == ".safetensors" or "format" not in load_checkpoint(path)


def read_stable_diffusion(path):
    """A file of Stable Diffusion v1 (CompVis names) or a diffusers folder -> its parts, as build takes them.

    Raises ValueError if it is neither. Source: LDM's and diffusers' released code.
    """
    return read_diffusers(path) if pathlib.Path(path).is_dir() else split_compvis(read_weights(path))


def build(parts, dtype=None, stated=None):
    """{"unet" | "vae" | "text": state} -> {the same: module}, which takes the tensors over instead of copying them.

    dtype: of the modules, else the file's; stated: arguments that tensors cannot tell, {"unet": {"num_heads": 4}}.
    The tensors must fit exactly. Raises ValueError with the first five that do not. Source: none.
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
        except TypeError as error:                          # a stated name that is none, a width that is no multiple
            raise ValueError(f"{part}: cannot build it from {sizes}: {str(error).splitlines()[0]}") from error
        have = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        wrong = [f"{name}: file {given.get(name, 'has none')}, model {have.get(name, 'has none')}"
                 for name in sorted(have.keys() | given.keys()) if have.get(name) != given.get(name)]
        wrong += [f"{name}: dtype {tensor.dtype}" for name, tensor in state.items() if not tensor.is_floating_point()]
        if wrong:
            raise ValueError(f"{part}: {len(wrong)} tensors do not fit: {'; '.join(wrong[:5])}")
        model.load_state_dict({name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}, assign=True)
        models[part] = model
    return models
