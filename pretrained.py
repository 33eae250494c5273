"""Other people's weights: what a published file is, and its tensors under our names.

Papers: Latent Diffusion Models (Rombach et al. 2022); CLIP (Radford et al. 2021).

The idea. Our modules keep the official names, so loading takes four small steps:
  read       a file becomes {name: tensor}. The tensors are mapped: a page comes from disk when it
             is first used, so replace such a file, do not write into it. Nothing is executed.
  recognise  names and shapes tell what it is: the first row of KINDS that fits.
  name       one CompVis file holds three models, told apart by a prefix; diffusers counts blocks
             within each level, here they are counted throughout.
  build      sizes are read off the shapes; what those do not show (heads, scale, schedule) off the
             configs beside them, else as published. The module takes the tensors over.

    what, parts, said = read_official("v1-5-pruned-emaonly.safetensors")    # or a diffusers folder
    models = build(parts, torch.float32, said)
    python -m pytest tests/test_pretrained.py"""
import json
import pathlib
import re

import torch

from checkpoint import check_tensors, load_checkpoint, named_tensors, read_safetensors, read_torch
from dit import DIT_CONFIGS
from text import TextEncoder
from unet import UNet
from vae import AutoencoderKL, first_stage_from

# ---- sizes, and the modules ----------------------------------------------------------------------

def infer_unet(state):
    """Arguments of the UNet with this state_dict; 8 heads, as in SD v1. Source: LDM table 15."""
    shape = _shapes(state, "a U-Net of the Stable Diffusion family")
    context_dim = shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
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
    side = round(shape("pos_embed", 3)[1] ** 0.5) if "pos_embed" in state else 16   # of diffusers
    return dict(input_size=side * patch, patch_size=patch,
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


def build(parts, dtype=None, said=None):
    """{"unet" | "vae" | "text": state} -> {the same: module}, which takes the tensors over. dtype:
    None keeps the file's; said: of read_official. ValueError for tensors that do not fit."""
    models = {}
    for part, state in parts.items():
        infer, make = PARTS[part]
        with torch.device("meta"):
            models[part] = make(**{**infer(state), **(said or {}).get(part, {})})
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
    if state:
        raise ValueError(f"{path} holds no autoencoder: give a run of tiny-ae, kl-ae or vq-vae, or "
                         "an official AutoencoderKL")
    _, parts, said = read_official(path, "vae")
    return build({"vae": parts["vae"]}, torch.float32, said)["vae"].eval().requires_grad_(False)


# ---- names: CompVis, diffusers -------------------------------------------------------------------

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
            "text": "cond_stage_model.transformer."}


def split_compvis(state):
    """Names of a CompVis file -> {"unet": state, "vae": state, "text": state}, what is there. Left
    out: the EMA copy, the schedule, the first stage's training loss, position_ids. Source: LDM."""
    named = {part: (_text_names if part == "text" else _plain)({
        name.removeprefix(prefix): tensor for name, tensor in state.items()
        if name.startswith(prefix)}) for part, prefix in PREFIXES.items()}
    return {part: tensors for part, tensors in named.items() if tensors}


def _plain(state):
    """A U-Net or autoencoder without what trains it; attention's 1x1 convolutions, Linear in some
    files, as such: (C_out, C_in) -> (C_out, C_in, 1, 1)."""
    convolution = re.compile(r"(\.proj_in|\.proj_out|\.attn_1\.[qkv])\.weight$")
    return {name: w[:, :, None, None] if w.dim() == 2 and convolution.search(name) else w
            for name, w in state.items() if not name.startswith(("loss.", "model_ema."))}


def _text_names(state):
    """Without position_ids, a buffer of old transformers; with `text_model.`, which some lack."""
    return {"text_model." + name.removeprefix("text_model."): tensor
            for name, tensor in state.items() if not name.endswith("position_ids")}


# layers: diffusers' name of a layer: ours; of a U-Net and an autoencoder those outside blocks, then
# those inside each kind of block. config: of a part, values or the arguments that they are
DIFFUSERS = json.loads((pathlib.Path(__file__).parent / "assets/diffusers.json").read_text())


def unet_names(blocks, attends):
    """{layer of diffusers' UNet2DConditionModel, down_blocks.LEVEL.resnets.J: layer of UNet, one
    running number}. A down-sampler is a block by itself, an up-sampler the last layer of its
    level's last block. blocks: of a level, up has one more; attends: the levels of up_blocks that
    have attention. Source: diffusers' convert_diffusers_to_original_stable_diffusion.py."""
    places = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
              "mid_block.resnets.1": "middle_block.2"}
    for level in range(8):                              # no published U-Net has more levels
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        first = level * (blocks + 1)                    # number of the level's first block
        for j, layer in ((j, k) for j in range(blocks + 1) for k in ("resnets", "attentions")):
            k = int(layer == "attentions")              # input block 0: the first convolution
            places[f"{down}.{layer}.{j}"] = f"input_blocks.{first + j + 1}.{k}"
            places[f"{up}.{layer}.{j}"] = f"output_blocks.{first + j}.{k}"
        places[f"{down}.downsamplers.0"] = f"input_blocks.{first + blocks + 1}.0"
        places[f"{up}.upsamplers.0"] = f"output_blocks.{first + blocks}.{1 + (level in attends)}"
    return _layers(places, "unet")


def vae_names(blocks, levels):
    """The same of AutoencoderKL. diffusers numbers up_blocks as they run, ours from the highest
    resolution. Source: the same."""
    places = {f"{half}.mid_block.{theirs}": f"{half}.mid.{ours}" for half in ("encoder", "decoder")
              for theirs, ours in (("resnets.0", "block_1"), ("attentions.0", "attn_1"),
                                   ("resnets.1", "block_2"))}
    for level in range(levels):
        down, up, above = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}", levels - 1
        for j in range(blocks + 1):
            places[f"{down}.resnets.{j}"] = f"encoder.down.{level}.block.{j}"
            places[f"{up}.resnets.{j}"] = f"decoder.up.{above - level}.block.{j}"
        places[f"{down}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        places[f"{up}.upsamplers.0"] = f"decoder.up.{above - level}.upsample"
    return _layers(places, "vae")


def _layers(places, part):
    """{their layer: our layer} of {their block: our block}, and of the layers outside blocks."""
    kinds = DIFFUSERS["layers"][part]
    return kinds[""] | {f"{theirs}.{leaf}": f"{ours}.{new}" for theirs, ours in places.items()
                        for leaf, new in kinds[theirs.split(".")[-2]].items()}


def rename_unet(state):
    """{diffusers' name: tensor} -> {our name: tensor}. An unknown one stays: build refuses it."""
    attends = {level for level in range(8) if _count(state, rf"up_blocks\.({level})\.att")}
    blocks = _count(state, r"down_blocks\.0\.resnets\.(\d+)\.")
    return renamed(state, unet_names(blocks, attends))


def rename_vae(state):
    """The same of an AutoencoderKL, before and after diffusers 0.17."""
    blocks, levels = (_count(state, pattern) for pattern in (
        r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", r"decoder\.up_blocks\.(\d+)\."))
    return renamed(state, vae_names(blocks, levels))


def to_diffusers(part, module):
    """A U-Net, autoencoder or text encoder of ours -> ({diffusers' name: tensor}, its config).
    Raises ValueError for a U-Net that diffusers does not have."""
    found = lambda key: next((vars(m)[key] for m in module.modules() if key in vars(m)), None)
    s = PARTS[part][0](state := module.state_dict())
    s |= {key: found(key) for key in ("num_heads", "num_groups", "scale")}
    mult, width = s.get("multipliers") or s.get("channel_mult", ()), s.get("model_channels")
    if part == "unet" and mult[0] != 1:
        raise ValueError(f"diffusers has no U-Net with channel_mult {mult}: it begins with 1 there")
    kinds = ["CrossAttn" * (2 ** k in s.get("attention_resolutions", ())) for k in range(len(mult))]
    down, up = ("DownEncoder", "UpDecoder") if part == "vae" else ("Down", "Up")
    s |= {"widths": [int(m * (width or s["channels"])) for m in mult],
          "down": [f"{kind}{down}Block2D" for kind in kinds],
          "up": [f"{kind}{up}Block2D" for kind in kinds[::-1]],
          "mlp_hidden": int(s.get("mlp_ratio", 0) * s.get("hidden_size", 0))}
    layers = {"unet": lambda: unet_names(s["num_res_blocks"],
                                         {k for k, kind in enumerate(kinds[::-1]) if kind}),
              "vae": lambda: vae_names(s["res_blocks"], len(mult)), "text": dict}[part]()
    state = renamed(state, {ours: theirs for theirs, ours in layers.items()})
    linear = lambda name, w: w[:, :, 0, 0] if part == "vae" and "attentions" in name and (
        w.dim() == 4) else w                                                    # (C_out, C_in)
    config = {key: s[value] if isinstance(value, str) and value in s else value
              for key, value in DIFFUSERS["config"][part].items()}
    return {name: linear(name, w) for name, w in state.items()}, config


def renamed(state, layers):
    """{name: tensor} with every layer, a name without its last word, renamed by {old: new}."""
    split = ((*name.rpartition("."), tensor) for name, tensor in state.items())
    return _plain({f"{layers.get(end, end)}.{kind}": tensor for end, _, kind, tensor in split})


def rename_dit(state):
    """Names of diffusers' DiT, where q, k, v are apart and positions are not saved, -> those of
    DiT. What all blocks share has no number here, there each block has a copy. Source: diffusers'
    convert_dit_to_diffusers.py."""
    ours, layers = {}, DIFFUSERS["layers"]["dit"]
    for name, tensor in state.items():
        block, end = re.match(r"(?:transformer_(blocks\.\d+)\.)?(.*)", name, re.S).groups()
        end, _, kind = end.rpartition(".")
        new = f"{layers.get(end, end)}.{kind}".replace("blocks", block or "blocks")
        if end == "attn1.to_q":
            k, v = (state.get(name.replace("to_q", to), tensor[:0]) for to in ("to_k", "to_v"))
            tensor = torch.cat([tensor, k, v])                                  # (3D, D) or (3D,)
        if end not in ("attn1.to_k", "attn1.to_v") and not torch.equal(
                ours.setdefault(new, tensor), tensor):
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
        # rename_unet counts ResBlocks, of which one is beside every attention
        beside = [re.sub(r"attentions\.(\d+)\..*", r"resnets.\1.conv1.weight", n) for n in given]
        names = rename_unet(dict.fromkeys([*given, *beside], torch.empty(0)))
        given = dict(zip(names, given.values()))
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
V1 = "of Stable Diffusion, version 1 alone is"
KINDS = (
    ("a LoRA, a change to a model", "(?i)lora|hada_w1|lokr_w1", "merge it into its model first"),
    ("a part of Stable Diffusion XL", r"^conditioner\.|add_embedding|label_emb\.|^text_projection|"
     r"^clip_g |attn2\.to_k\.weight \(\d+, 2048\)", V1),
    ("a part of Stable Diffusion 2", r"^cond_stage_model\.model\.|"
     r"(token_embedding|attn2\.to_k)\.weight \(\d+, 1024\)", V1),
    ("Stable Diffusion that predicts v", "^v_pred ", "give it as a diffusers folder"),
    *((f"a U-Net for {task}", rf"(\binput_blocks\.0\.0|^conv_in)\.weight \(\d+, {channels},",
       f"it has {channels} channels in: give a plain text-to-image model")
      for channels, task in ((9, "inpainting"), (8, "pix2pix"), (7, "upscaling"), (5, "depth"))),
    ("VQ-Diffusion", r"\bcontent_emb\.|^content_codec\.", "train one with --model vq-tiny"),
    ("an adapter of unet-finetune", r"^(adp\.)?0\.weight |\badapter(_inout)?\.", "it does not say "
     "where it stands: learn it anew with adapters.py"),
    ("a concept of Custom Diffusion", r"^unet\.|^modifier_token\.|^embed |_custom_diffusion\.|"
     r"\A(.*\.attn2\..*\n)+\Z", only("concept", read_delta)),
    ("a word of textual inversion", r"^string_to_param\.|^emb_params |\A\S+ \((\d+, )?\d+,?\)\n\Z",
     lambda tensors, stem: {"concept": ({}, read_word(tensors, stem))}),
    ("a U-DiT", r"^latent\.0\.attn1\.to_qkv\.", only("udit")),
    ("a DiT", r"^x_embedder\.proj\.", only("dit")),
    ("a DiT of diffusers", r"^transformer_blocks\.0\.norm1\.emb\.class_", only("dit", rename_dit)),
    ("Stable Diffusion v1", r"^(model\.diffusion_model|first_stage_model|cond_stage_model\."
     r"transformer)\.", lambda tensors, stem: split_compvis(tensors)),
    ("a U-Net", r"^input_blocks\.0\.0\.", only("unet", _plain)),
    ("an autoencoder", r"^encoder\.down\.0\.block\.0\.", only("vae", _plain)),
    ("a U-Net of diffusers", r"^down_blocks\.0\.resnets\.0\.", only("unet", rename_unet)),
    ("an autoencoder of diffusers", r"^encoder\.down_blocks\.0\.resn", only("vae", rename_vae)),
    ("CLIP's text encoder", r"^(text_model\.)?embeddings\.token_em", only("text", _text_names)))


def recognise(tensors, path):
    """What a file is by its {name: tensor}, and its reader, see KINDS. ValueError if not read."""
    lines = "".join(f"{name} {tuple(tensor.shape)}\n" for name, tensor in tensors.items())
    found = ((what, read) for what, mark, read in KINDS if re.search(mark, lines, re.MULTILINE))
    names = ", ".join(list(tensors)[:3])[:200]
    what, read = next(found, ("of no kind known here", f"it has names such as {names}"))
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
BETAS = ["scaled_linear", 0.00085, 0.012], ["linear", 0.0001, 0.02]
# of all configs of a diffusers folder: the values that can be used, the first if nothing is said
USABLE = {
    "num_train_timesteps": [1000], "trained_betas": [None], "rescale_betas_zero_snr": [False],
    "timestep_spacing": ["leading", "linspace", "trailing"], "steps_offset": [0, 1], "act_fn":
    ["silu"], "norm_eps": [1e-5], "norm_num_groups": [32], "class_embed_type": [None],
    "prediction_type": list(PREDICTIONS), "shift_factor": [None], "hidden_act": ["quick_gelu"],
    "layer_norm_eps": [1e-5], "activation_fn": ["gelu-approximate"], "clip_sample": [False]}
# of part: {key of its config: argument of its module}
ARGUMENTS = {"unet": {"attention_head_dim": "num_heads", "num_attention_heads": "num_heads",
                      "norm_num_groups": "norm_groups"},
             "vae": {"scaling_factor": "scale"}, "text": {"num_attention_heads": "num_heads"},
             "dit": {"num_attention_heads": "num_heads", "sample_size": "input_size"}}


def read_config(path, part):
    """What a part's config says -> {argument of its module, or of GaussianDiffusion: value}, {} if
    there is none. Raises ValueError if it is damaged, or says what would be drawn wrongly."""
    try:
        said = json.loads(path.read_bytes()) if path.is_file() else {}
        said = {key: value for key, value in said.items() if value is not None}
        wrong = [key for key in USABLE if key not in ARGUMENTS.get(part, ())
                 and said.get(key, USABLE[key][0]) not in USABLE[key]]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no config of diffusers") from error
    names = {key: new for key, new in ARGUMENTS.get(part, {}).items() if key in said}
    wrong += [k for k in names if type(said[k]) not in (int, float) or not 0 < said[k] < 1000]
    if part == "process" and said:
        said["betas"] = [said.get(key) for key in ("beta_schedule", "beta_start", "beta_end")]
        wrong += ["betas"] * (said["betas"] not in BETAS)
    for key in wrong:
        usable = {**USABLE, "betas": BETAS}.get(key, "one positive number")
        raise ValueError(f"{path} says {key} {str(said[key])[:60]}, and only {usable} can be read")
    spacing = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}
    return {new: said[key] for key, new in names.items()} if "betas" not in said else dict(
        schedule=said["betas"][0], prediction=PREDICTIONS[said.get("prediction_type", "epsilon")],
        spacing=tuple(said.get(key, value) for key, value in spacing.items()))


def scheduler(settings, process):
    """scheduler_config.json of a flow, whose times and velocities are diffusers' own, or of a
    Gaussian process. Raises ValueError for a schedule that diffusers does not have."""
    configs, betas = DIFFUSERS["config"], [b for b in BETAS if b[0] == settings.schedule]
    if settings.schedule == "flow":
        return configs["flow"]
    if not betas:
        raise ValueError(f"diffusers has no schedule equal to our {settings.schedule}")
    predicts = next(name for name, ours in PREDICTIONS.items() if ours == process.prediction)
    keys = ("beta_schedule", "beta_start", "beta_end", "prediction_type", "timestep_spacing",
            "steps_offset", "set_alpha_to_one")
    return {**configs["gaussian"], **dict(zip(keys, (*betas[0], predicts, *process.spacing)))}


CUSTOM = "pytorch_custom_diffusion_weights"
STEMS = "diffusion_pytorch_model", "model", "pytorch_model", CUSTOM, "learned_embeds"


def find_weights(folder):
    """A folder's file of weights, or the index of its shards, or None: full precision before half,
    without EMA last, safetensors before .bin."""
    names = [name for variant in ("", ".fp16", ".bf16", ".non_ema")
             for end in (".safetensors", ".bin") for stem in STEMS
             for name in (f"{stem}{variant}{end}", f"{stem}{end}.index{variant}.json")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


# ---- files ---------------------------------------------------------------------------------------

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
    content = read_safetensors(path) if is_safetensors(path) else read_torch(path)
    wrapped = isinstance(content, dict) and {"ema", "model", "state_dict"} & content.keys()
    return named_tensors(content if wrapped else _flat(content), path)


def _flat(content, before=""):
    """{dotted name: tensor} of nested dicts, and of what stands for torch's ParameterDict."""
    content = getattr(content, "_parameters", content)
    named = content.items() if isinstance(content, dict) else ()
    return {key: tensor for name, value in named if isinstance(name, str) for key, tensor in (
        {before + name: value} if torch.is_tensor(value) else
        _flat(value, f"{before}{name}.")).items()}


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
