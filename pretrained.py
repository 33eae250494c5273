"""Other people's weights: what a published file is, its tensors under our names, and back.

Papers: Latent Diffusion Models (Rombach et al. 2022); CLIP (Radford et al. 2021).

The idea. Our modules keep the official names, so loading takes four small steps:
  read       a file becomes {name: tensor}, mapped: a page comes from disk when it is first used, so
             replace such a file, do not write into it. Nothing is executed.
  recognise  names and shapes tell what it is: the first row of KINDS that fits.
  name       one CompVis file holds three models, told apart by a prefix; diffusers counts blocks
             within each level, here they are counted throughout.
  build      sizes are read off the shapes; what those do not show (heads, scale, schedule) off the
             configs beside them, else as published. The module takes the tensors over.

    python sample.py --ckpt v1-5-pruned-emaonly.safetensors     # or a diffusers folder
    what, parts, said = read_official(path); models = build(parts, torch.float32, said)"""
import itertools
import json
import pathlib
import re

import torch

from checkpoint import check_tensors, load_checkpoint, named_tensors, read_safetensors, read_torch
from dit import DIT_CONFIGS
from text import TextEncoder
from unet import UNet
from vae import VQGAN, AutoencoderKL, first_stage_from
from vqdiffusion import LearnedNull, VQTransformer

# ---- sizes, and the modules ----------------------------------------------------------------------
def infer_unet(state):
    """Arguments of the UNet with this state_dict; 8 heads, as in SD v1. Source: LDM table 15."""
    shape = _shapes(state, "a U-Net of the Stable Diffusion family")
    context_dim = shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    model_channels, in_channels = shape("input_blocks.0.0.weight", 4)[:2]
    down = sorted(int(name.split(".")[1]) for name in state
                  if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name))
    first = [1, *(i + 1 for i in down)]     # each level's first block; 0 is the first convolution
    widths = [shape(f"input_blocks.{i}.0.out_layers.3.weight", 4)[0] for i in first]
    return dict(
        in_channels=in_channels, context_dim=context_dim, out_channels=shape("out.2.weight", 4)[0],
        model_channels=model_channels, channel_mult=tuple(w / model_channels for w in widths),
        num_res_blocks=(down or [_count(state, r"input_blocks\.(\d+)\.")])[0] - 1, num_heads=8,
        attention_resolutions=tuple(2 ** level for level, i in enumerate(first)
                                    if f"input_blocks.{i}.1.norm.weight" in state))


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
    return dict(vocab_size=vocab_size, hidden_size=width, num_heads=max(1, width // 64),
                max_length=shape("text_model.embeddings.position_embedding.weight", 2)[0],
                depth=_count(state, r"text_model\.encoder\.layers\.(\d+)\."),
                mlp_ratio=shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0] / width)


def infer_dit(state):
    """Arguments of the adaln_zero DiT with this state_dict. Heads: from the paper's table by
    width, else width / 32. Not of a SiT, with the same names and shapes, which predicts a velocity:
    its weights of the variance never got a gradient and are 0. Source: DiT Table 1; SiT's code."""
    shape = _shapes(state, "an adaln_zero DiT")
    width, in_channels, patch, _ = shape("x_embedder.proj.weight", 4)
    learn_sigma = shape("final_layer.linear.weight", 2)[0] == patch ** 2 * 2 * in_channels
    final = state["final_layer.linear.weight"].view(patch ** 2, -1, width)      # -1: channels out
    if learn_sigma and final.any() and not final[:, in_channels:].any():
        raise ValueError("a SiT, or another DiT whose variance was never trained, is not read here")
    heads = {sizes["hidden_size"]: sizes["num_heads"] for sizes in DIT_CONFIGS.values()}
    side = round(shape("pos_embed", 3)[1] ** 0.5) if "pos_embed" in state else 16   # of diffusers
    return dict(
        input_size=side * patch, patch_size=patch, in_channels=in_channels, hidden_size=width,
        depth=_count(state, r"blocks\.(\d+)\."), num_heads=heads.get(width, width // 32),
        num_classes=shape("y_embedder.embedding_table.weight", 2)[0] - 1, learn_sigma=learn_sigma)


def infer_udit(state):
    """Arguments of the UDiT with this state_dict. What no tensor shows is the paper's: input size
    32, down_factor 2, shortcut; rope if cosine, else heads of 24 channels. Source: U-DiT §4.1."""
    shape = _shapes(state, "a U-DiT")
    hidden_size, in_channels = shape("x_embedder.proj.weight", 4)[:2]      # latent: 4 times as wide
    kinds = {"dwconv.0": "rep", "dwconv": "dw", "fc1": "basic"}     # by a layer that only it has
    layer = next((layer for layer in kinds if f"latent.0.mlp1.{layer}.weight" in state), "fc1")
    levels = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")
    scale, kernel = "latent.0.attn1.logit_scale", "latent.0.attn1.downsampler.layer.weight"
    cosine = scale in state
    return dict(in_channels=in_channels, hidden_size=hidden_size, mlp=kinds[layer], cosine=cosine,
                depth=tuple(_count(state, rf"{level}\.(\d+)\.") for level in levels),
                num_heads=shape(scale, 3)[0] if cosine else max(1, hidden_size // 24),
                mlp_ratio=shape(f"latent.0.mlp1.{layer}.weight", 4)[0] / (4 * hidden_size),
                num_classes=shape("y_embedder_1.embedding_table.weight", 2)[0] - 1,
                learn_sigma=shape("final_layer.out_proj.weight", 4)[0] == 2 * in_channels,
                kernel_size=shape(kernel, 4)[-1] if kernel in state else 0, rope=cosine)


def infer_vq(state):
    """Arguments of the VQTransformer with this state_dict; 16 heads. Source: VQ-Diffusion §5.1."""
    shape, has = _shapes(state, "VQ-Diffusion's network"), lambda end: f"blocks.0.{end}" in state
    num_codes, D = shape("to_logits.1.weight", 2)
    conv, text = has("mlp.conv1.weight"), has("attn2.key.weight")
    wide = shape(f"blocks.0.mlp.{'conv1' if conv else 0}.weight", 4 if conv else 2)[0]
    labels = shape("blocks.0.ln2.emb.weight", 2)[0] if has("ln2.emb.weight") else 0
    context = {"context_dim": shape("blocks.0.attn2.key.weight", 2)[1]} if text else {}
    return dict(                                            # 1,001 labels: the last stands for none
        num_codes=num_codes, hidden_size=D, num_heads=16, depth=_count(state, r"blocks\.(\d+)\."),
        steps=shape("blocks.0.ln1.emb.weight", 2)[0], mlp="conv" if conv else "fc", **context,
        table=shape("content_emb.height_emb.weight", 2)[0], mlp_ratio=wide / D,
        condition="text" if text else "class" if labels else "none",
        num_classes=min(labels, 1000), class_dropout_prob=0.1 * (labels > 1000))


def infer_vqgan(state):
    """Arguments of the VQGAN with this state_dict. Source: VQ-Diffusion's configs."""
    total, dim = _shapes(state, "a VQGAN")("codes", 2)
    return {**infer_vae(state), "total": total, "dim": dim, "logits": "proj.weight" in state,
            "num_codes": 1 + state["token"].max().item()}


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
         "text": (infer_text, TextEncoder), "learned_null": (infer_text, LearnedNull),
         "vq": (infer_vq, VQTransformer), "vqgan": (infer_vqgan, VQGAN)}


def build(parts, dtype=None, said=None):
    """{"unet" | "vae" | "text": state} -> {the same: module}, which takes the tensors over. dtype:
    None keeps the file's; said: of read_official. ValueError for tensors that do not fit."""
    models = {}
    for part, state in parts.items():
        infer, make = PARTS[part]
        with torch.device("meta"):
            models[part] = make(**{**infer(state), **(said or {}).get(part, {})})
        check_tensors(models[part].state_dict(), state, f"{part}:")
        models[part].load_state_dict(state, assign=True)
        models[part].to(dtype=dtype)                        # of integers, nothing changes
    return models


def load_first_stage(path):
    """The frozen first stage in a file: a run of tiny-ae, kl-ae or vq-vae, what a diffusion model's
    checkpoint carries, or an official AutoencoderKL. Raises ValueError if there is none."""
    state = {} if is_official(path) else load_checkpoint(path)
    if "sizes" in state:                                        # a run of an autoencoder
        state["first_stage"] = {**state, "kind": state["task"], "model": state["ema"]}
    if "first_stage" in state:
        return first_stage_from(state["first_stage"], path)
    if state:
        raise ValueError(f"{path} holds no autoencoder: give a run of tiny-ae, kl-ae or vq-vae")
    _, parts, said = read_official(path, "vae")
    return build({"vae": parts["vae"]}, torch.float32, said)["vae"].eval().requires_grad_(False)


# ---- names: CompVis, diffusers -------------------------------------------------------------------
# names of others. Of diffusers: layers, {their layer: ours}, of a U-Net and an autoencoder outside
# blocks, then inside each kind of block; places, {their block: ours}, see layer_names; of a config,
# arguments, {key: ours}; usable, {key: all values that can be used}; folder: what is written
PUBLISHED = json.loads((pathlib.Path(__file__).parent / "assets/published.json").read_text())
PREFIXES = PUBLISHED["prefixes"]            # of the three parts in a CompVis file


def split_compvis(state, _):
    """A CompVis file -> {part: state}, what is there, without its EMA and schedule. Source: LDM."""
    named = {part: _plain({name.removeprefix(prefix): tensor for name, tensor in state.items()
                           if name.startswith(prefix)}) for part, prefix in PREFIXES.items()}
    return {part: tensors for part, tensors in named.items() if tensors}


def split_vq(state, _):
    """A file of VQ-Diffusion -> {"vq", "vqgan" and, of captions, "text" or "learned_null"}; all of
    its names that are read are in PUBLISHED. Source: VQ-Diffusion's dalle.py; CLIP's code."""
    parts = {}
    for name, w in state.items():
        for old, new in PUBLISHED["vq-diffusion"]:
            name = re.sub(old, new, name)
        part, _, name = name.partition(":")
        qkv = "qkv" if "in_proj_" in name else "-"              # three in one: (3D, D) or (3D,)
        names = [name.replace("in_proj_", f"{x}_proj.") for x in qkv]
        parts.setdefault(part, {}).update(zip(names, w.chunk(len(names))) if name else ())
    if "null" in parts.get("text", ()):
        parts["learned_null"] = parts.pop("text")
    return {part: parts[part] for part in PARTS if part in parts}


def _plain(state):
    """A part without its training loss and averages, and position_ids of old transformers; with
    `text_model.`, which some files lack; attention's 1x1 convolutions, Linear in some, as such:
    (C_out, C_in) -> (C_out, C_in, 1, 1)."""
    text = re.compile(r"^(?=embeddings\.|encoder\.layers\.|final_layer_norm\.)")
    convolution = re.compile(r"(\.proj_in|\.proj_out|\.attn_1\.[qkv])\.weight$")
    return {text.sub("text_model.", name): w[:, :, None, None]
            if w.dim() == 2 and convolution.search(name) else w for name, w in state.items()
            if not name.startswith(("loss.", "model_ema.")) and not name.endswith("position_ids")}


def layer_names(part, blocks, levels, attends):
    """{diffusers' layer: ours} of a U-Net or AutoencoderKL. Our U-Net counts the blocks of all
    levels, down-samplers too; an up-sampler ends the last block of its level. Our decoder counts
    levels from the largest map. blocks: of a level, up has one more; attends: levels of up_blocks
    with attention. Source: diffusers' convert_diffusers_to_original_stable_diffusion.py."""
    kinds = PUBLISHED["layers"][part]
    names = {**kinds[""]}
    for level, j in itertools.product(range(levels), range(blocks + 1)):
        first = level * (blocks + 1)                # in our U-Net, of this level
        numbers = dict(level=level, j=j, up=first + j, down=first + j + 1, above=levels - 1 - level,
                       last=first + blocks, half=first + blocks + 1, after=1 + (level in attends))
        for theirs, ours in PUBLISHED["places"][part].items():
            theirs, ours = theirs.format(**numbers), ours.format(**numbers)
            names |= {f"{theirs}.{layer}": f"{ours}.{new}"
                      for layer, new in kinds[theirs.split(".")[-2]].items()}
    return names


def from_diffusers(part, state):
    """{diffusers' name: tensor} of a U-Net or AutoencoderKL, also before diffusers 0.17, -> {our
    name: tensor}. An unknown name stays: build refuses it."""
    blocks = _count(state, r"(?:encoder\.)?down_blocks\.0\.(?:resnets|attentions)\.(\d+)\.")
    levels = [k for k in range(8) if _count(state, rf"(.*)(?:down|up)_blocks\.{k}\.")]
    attends = [k for k in levels if _count(state, rf"(.*)up_blocks\.{k}\.attentions\.")]
    return renamed(state, layer_names(part, blocks, 1 + max(levels, default=0), attends))


def to_diffusers(task):
    """The task of a U-Net that reads captions -> {file of a diffusers folder: {name: tensor}, or
    what a .json or .txt says}. Prints what is left out. Raises ValueError for other models."""
    unet, stage, words = getattr(task.model, "denoiser", None), task.first_stage, task.tokenizer
    if not hasattr(unet, "middle_block") or ".adapter." in " ".join(unet.state_dict()):
        raise ValueError("--diffusers is for U-Nets that read captions, without an adapter; for a "
                         "DiT or U-DiT of classes say --official")
    parts, rows = {"unet": unet, "text": task.model.text}, PUBLISHED["folder"]
    if hasattr(stage, "quant_conv"):
        parts["vae"] = stage
    elif not task.on_pixels:
        print(f"left out: the {stage.kind}, for the only first stage of diffusers is a kl-ae")
    predicts = dict(zip(PREDICTIONS.values(), PREDICTIONS))     # ours -> theirs; a flow has none
    values = {"side": task.shape[-1], "clip": task.on_pixels, "max_length": words.max_length,
              "ids": words.ids, "predicts": predicts.get(getattr(task.process, "prediction", ""))}
    if words.open:
        values["merges"] = "\n".join(["#version: 0.2", *map(" ".join, words.ranks)])
    else:
        ids = {"[PAD]": words.PAD, "[START]": words.START, "[END]": words.END, **words.ids}
        values |= {"ids": ids, "pattern": words.WORD.pattern}
    files = _filled(rows[task.settings.schedule] | rows["clip" if words.open else "words"], values)
    for part, module in parts.items():
        files |= _filled(rows[part], values | turned(part, module))
    if "vae" not in parts or task.settings.schedule == "flow":      # no StableDiffusionPipeline
        files.pop("model_index.json", None)
    return files


def _filled(said, values):
    """Nested dicts with each word that is a key of `values` replaced by its value."""
    if isinstance(said, dict):
        return {key: _filled(value, values) for key, value in said.items()}
    return values.get(said, said) if isinstance(said, str) else said


def turned(part, module):
    """from_diffusers the other way: a module -> {"tensors": {diffusers' name: w}, and sizes}."""
    s = PARTS[part][0](state := module.state_dict())
    for inner in module.modules():                          # what no shape shows
        s |= {k: v for k, v in vars(inner).items() if k in ("num_heads", "num_groups", "scale")}
    mult = s.get("multipliers") or s.get("channel_mult", ())
    kinds = ["CrossAttn" * (2 ** k in s.get("attention_resolutions", ())) for k in range(len(mult))]
    names = layer_names(part, s.get("res_blocks") or s.get("num_res_blocks", 0), len(mult),
                        [level for level, kind in enumerate(kinds[::-1]) if kind])
    new = renamed(state, {ours: theirs for theirs, ours in names.items()})
    coder = ("Encoder", "Decoder") if part == "vae" else ("", "")
    return s | {        # there, an autoencoder's attention is Linear: (C, C, 1, 1) -> (C, C)
        "tensors": {k: w.flatten(1) if ".to_" in k and w.dim() > 1 else w for k, w in new.items()},
        "widths": [int(m * (s.get("model_channels") or s["channels"])) for m in mult],
        "down": [f"{kind}Down{coder[0]}Block2D" for kind in kinds],
        "up": [f"{kind}Up{coder[1]}Block2D" for kind in kinds[::-1]],
        "mlp_width": int(s.get("mlp_ratio", 0) * s.get("hidden_size", 0))}


def renamed(state, layers):
    """{name: tensor} with every layer, a name without its last word, renamed by {old: new}."""
    split = ((*name.rpartition("."), tensor) for name, tensor in state.items())
    return _plain({f"{layers.get(end, end)}.{kind}": tensor for end, _, kind, tensor in split})


def rename_dit(state):
    """Names of diffusers' DiT, with q, k, v apart and no positions, -> those of DiT. There each
    block has a copy of what all blocks share. Source: diffusers' convert_dit_to_diffusers.py."""
    ours, layers = {}, PUBLISHED["layers"]["dit"]
    for name, tensor in state.items():
        block, end = re.match(r"(?:transformer_(blocks\.\d+)\.)?(.*)", name, re.S).groups()
        end, _, kind = end.rpartition(".")
        if end in ("attn1.to_k", "attn1.to_v"):
            continue
        if end == "attn1.to_q":
            k, v = (state.get(name.replace("to_q", to), tensor[:0]) for to in ("to_k", "to_v"))
            tensor = torch.cat([tensor, k, v])                                  # (3D, D) or (3D,)
        new = f"{layers.get(end, end)}.{kind}".replace("blocks", block or "blocks")
        if not torch.equal(ours.setdefault(new, tensor), tensor):
            raise ValueError(f"{name} is not that of block 0: DiT has one for all blocks")
    return ours


def read_delta(state):
    """What a file of Custom Diffusion holds, CompVis or diffusers -> ({our name: W, or {"u", "v"}
    of its low-rank change}, {token: row (D,)}). Source: official get_deltas.py, compress.py."""
    rows, given = {f"<new{k}>": row for k, row in enumerate(state.get("embed", ()), 1)}, {}
    for name, w in state.items():
        end = re.sub(r"^(unet|model\.diffusion_model)\.|\.processor|_custom_diffusion", "", name)
        if name.startswith("modifier_token."):
            rows[name.removeprefix("modifier_token.")] = w
        elif ".attn2." in name and end[-2:] in (".u", ".v"):
            given.setdefault(end[:-2], {})[end[-1]] = w
        elif ".attn2." in name:
            given[end] = w
    if any(".attentions." in name for name in given):           # diffusers' names
        ours = from_diffusers("unet", dict.fromkeys(given, torch.empty(0)))
        given = dict(zip(ours, given.values()))
    return given, {token: row.float().flatten() for token, row in rows.items()}     # (D,)


def read_word(state, stem):
    """A file of textual inversion -> {word: row (D,)}: the word that it names, else <stem>; if it
    has more rows, <cat>, <cat>_1, ... in this order. Source: Gal et al. 2022 §4."""
    word, rows = next(item for item in state.items() if item[0][:16] != "string_to_token.")
    if word == "emb_params" or word.startswith("string_to_param."):
        word = f"<{re.sub('[^0-9A-Za-z]+', '-', stem)}>"
    rows = torch.atleast_2d(rows.float()).flatten(0, -2)                            # (n, D)
    return {f"{word}_{k}" if k else word: row for k, row in enumerate(rows)}


# ---- what a file is ------------------------------------------------------------------------------
# what it is; a pattern in its tensors, listed in lines like "out.2.bias (4,)", the first that fits;
# its reader, (tensors, file's stem) -> {part: tensors}, or a sentence: why it is not read
only = lambda part, rename=dict: lambda tensors, stem: {part: rename(tensors)}
renumbered = lambda part: only(part, lambda tensors: from_diffusers(part, tensors))
KINDS = (
    ("VQ-Diffusion", r"^transformer\.transformer\.content_emb\.", split_vq),
    *PUBLISHED["refused"],
    ("a concept of Custom Diffusion", r"^unet\.|^modifier_token\.|^embed |_custom_diffusion\.|"
     r"\A(.*\.attn2\..*\n)+\Z", only("concept", read_delta)),
    ("a word of textual inversion", r"^string_to_param\.|^emb_params |\A\S+ \((\d+, )?\d+,?\)\n\Z",
     lambda tensors, stem: {"concept": ({}, read_word(tensors, stem))}),
    ("a U-DiT", r"^latent\.0\.attn1\.to_qkv\.", only("udit")),
    ("a DiT", r"^x_embedder\.proj\.", only("dit")),
    ("a DiT of diffusers", r"^transformer_blocks\.0\.norm1\.emb\.class_", only("dit", rename_dit)),
    ("Stable Diffusion v1", f"^({'|'.join(map(re.escape, PREFIXES.values()))})", split_compvis),
    ("a U-Net", r"^input_blocks\.0\.0\.", only("unet", _plain)),
    ("an autoencoder", r"^encoder\.down\.0\.block\.0\.", only("vae", _plain)),
    ("a U-Net of diffusers", r"^down_blocks\.0\.resnets\.0\.", renumbered("unet")),
    ("an autoencoder of diffusers", r"^encoder\.down_blocks\.0\.resn", renumbered("vae")),
    ("CLIP's text encoder", r"^(text_model\.)?embeddings\.token_em", only("text", _plain)))


def recognise(tensors, path):
    """What a file is by its {name: tensor}, and its reader, see KINDS. ValueError if not read."""
    lines = "".join(f"{name} {tuple(tensor.shape)}\n" for name, tensor in tensors.items())
    found = ((what, read) for what, mark, read in KINDS if re.search(mark, lines, re.MULTILINE))
    some = f"it has names such as {', '.join(list(tensors)[:3])[:200]}"
    what, read = next(found, ("of no kind known here", some))
    if isinstance(read, str):
        raise ValueError(f"{path} is {what}, which is not read here: {read}")
    return what, read


def read_official(path, wanted=""):
    """What others published -> (what it is, {part: tensors}, {part: arguments that configs say}).
    path: a file, or a folder of diffusers. parts: unet, vae, text, dit, udit, and concept, ({name:
    W}, {word: row}); said has "process" too. Raises ValueError, also without a part `wanted`."""
    path, parts, said, what = pathlib.Path(path), {}, {}, ""
    folder = path if path.is_dir() else path.parent
    places = [folder / name for name in ("", "unet", "vae", "text_encoder", "transformer")]
    files = [path] if path != folder else [*filter(None, map(find_weights, places))]
    if any(file.name.startswith(CUSTOM) for file in files):
        files += sorted(folder.glob("<*>.*"))               # the words that were learned with it
    for file in files:
        tensors = read_weights(file)
        kind, read = recognise(tensors, file)
        what = "a diffusers folder" if what else kind
        beside = file.parent / ("config.json" if file.name.startswith(STEMS) else "")
        for part, found in read(tensors, file.stem).items():
            if part in parts:                               # of a concept
                found = tuple({**a, **b} for a, b in zip(parts[part], found))
            parts[part], said[part] = found, read_config(beside, part)
    if not files or wanted not in ("", *parts):
        lacks = wanted.replace("vae", "AutoencoderKL") or "weights, nor have unet, vae, ... in it"
        raise ValueError(f"{path} is {what or 'no diffusers folder'}: it has no {lacks}")
    said["process"] = read_config(path / "scheduler/scheduler_config.json", "process")
    return what, parts, said


# ---- diffusers: configs, and which file ----------------------------------------------------------
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SPACING = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}


def read_config(path, part):
    """What a part's config says -> {argument of its module, or of GaussianDiffusion: value}, {} if
    there is none. Raises ValueError if it is damaged, or says what would be drawn wrongly."""
    try:
        said = json.loads(path.read_bytes()) if path.is_file() else {}
        said = {key: value for key, value in said.items() if value is not None}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no config of diffusers") from error
    if schedule := bool(part == "process" and said):
        said["betas"] = [said.get(f"beta_{key}") for key in ("schedule", "start", "end")]
    names, usable = (PUBLISHED[key].get(part, {}) for key in ("arguments", "usable"))
    for key in [key for key in (*usable, *names) if key in said]:
        positive = type(said[key]) in (int, float) and 0 < said[key] < 1000
        if not (said[key] in usable[key] if key in usable else positive):
            raise ValueError(f"{path} says {key} {str(said[key])[:60]}, and only "
                             f"{usable.get(key, 'one positive number')} can be read")
    return {names[key]: said[key] for key in names if key in said} if not schedule else {
        "schedule": said["betas"][0], "spacing": tuple({**SPACING, **said}[k] for k in SPACING),
        "prediction": PREDICTIONS[said.get("prediction_type", "epsilon")]}


CUSTOM = "pytorch_custom_diffusion_weights"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", CUSTOM, "learned_embeds",
         "pytorch_lora_weights", "adapter_model")           # the last two: LoRA, refused by name


def find_weights(folder):
    """A folder's file of weights, or the index of its shards, the first that is there, or None."""
    names = [name for variant in ("", ".fp16", ".bf16", ".non_ema")
             for end in (".safetensors", ".bin") for stem in STEMS
             for name in (f"{stem}{variant}{end}", f"{stem}{end}.index{variant}.json")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_weights(path):
    """{name: tensor} of a file, safetensors or torch by its first bytes, or of all shards that an
    index.json lists; inside dicts, names with dots. Raises ValueError."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    if path.suffix == ".json":
        listed = re.findall(r'": *"([^"/]+\.(?:safetensors|bin))"', path.read_text("utf-8"))
        return {name: tensor for shard in sorted({*listed})
                for name, tensor in read_weights(path.with_name(shard)).items()}
    return named_tensors(read_safetensors(path) if is_safetensors(path) else read_torch(path), path)


def is_official(path):
    """Is this a file or folder that others published, and not one of ours? Raises ValueError."""
    if not (path := pathlib.Path(path)).is_file() or is_safetensors(path):
        return path.exists()
    return not (isinstance(content := read_torch(path), dict) and "format" in content)


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
