"""pretrained.py: shrunk files of every published form come back tensor for tensor."""
import argparse
import copy
import json
import pathlib
import random
import re
import struct
import sys
import tracemalloc
import types

import numpy as np
import pytest
import torch

import checkpoint
import pretrained
from adapters import load_adapters, read_adapter
from checkpoint import save_checkpoint
from conftest import fill_by_recipe, golden_case, write_safetensors
from diffusion import GaussianDiffusion, RectifiedFlow
from dit import DIT_CONFIGS, DiT
from models import find_model, official_task
from text import CLIPTokenizer, TextEncoder, WordTokenizer
from unet import UNet
from vae import AutoencoderKL, Pixels, TinyAutoencoder

UNET = dict(in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2, 2),
            num_res_blocks=1, attention_resolutions=(1, 2), num_heads=8, context_dim=64)
VAE = dict(channels=32, multipliers=(1, 2, 2), res_blocks=1, in_channels=3, z_channels=4)
TEXT = dict(vocab_size=50, max_length=9, hidden_size=64, depth=2, num_heads=1, mlp_ratio=4.0)
PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
          "text": "cond_stage_model.transformer."}


@pytest.fixture(scope="module")
def models():
    return {"unet": fill_by_recipe(UNet(**UNET)), "vae": fill_by_recipe(AutoencoderKL(**VAE)),
            "text": fill_by_recipe(TextEncoder(**TEXT))}


@pytest.fixture(scope="module")
def states(models):
    return {part: model.state_dict() for part, model in models.items()}


def same(a, b):
    """Equal names, shapes, dtypes and bits, part for part."""
    assert a.keys() == b.keys()
    for part in a:
        assert a[part].keys() == b[part].keys()
        for name, tensor in a[part].items():
            assert tensor.dtype == b[part][name].dtype and torch.equal(tensor, b[part][name]), name


def compvis(states):
    """What a CompVis file holds: three prefixes and much else."""
    text, vae = "cond_stage_model.", "first_stage_model."
    state = {PREFIX[part] + name: tensor for part, tensors in states.items()
             for name, tensor in tensors.items()}
    return state | {"betas": torch.rand(1000), "alphas_cumprod": torch.rand(1000),
                    "scale_factor": torch.tensor(0.2), "model_ema.decay": torch.tensor(0.9999),
                    "model_ema.num_updates": torch.tensor(7),
                    "model_ema.diffusion_modelinput_blocks00weight": torch.rand(3),
                    vae + "loss.logvar": torch.zeros(()), vae + "model_ema.decay": torch.ones(()),
                    vae + "loss.perceptual_loss.net.slice1.0.weight": torch.rand(2, 2),
                    text + "transformer.text_model.embeddings.position_ids": torch.arange(9)[None],
                    text + "logit_scale": torch.ones(())}


def parts_of(path):
    return pretrained.read_official(path)[1]


def parts_in(state):
    """The parts in a file's tensors."""
    return pretrained.recognise(state, "x")[1](state, "x")


def outputs(models, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (2, 9), generator=g)
    x, image = (torch.randn(s, generator=g).to(dtype) for s in ((2, 4, 8, 8), (1, 3, 16, 16)))
    with torch.no_grad():
        context = models["text"](ids)
        return dict(text=context, unet=models["unet"](x, torch.tensor([3, 800]), context),
                    encode=models["vae"].encode(image), decode=models["vae"].decode(x[:1]))


# --------------------------------------------------------------------------------------------------
# the names of diffusers, written down by hand: this side knows nothing of the rule under test

# the shrunk U-Net: three levels of one block, the lowest without attention
BLOCKS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.4.0.op",
    "down_blocks.2.resnets.0": "input_blocks.5.0",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0", "up_blocks.1.attentions.1": "output_blocks.3.1",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.3.2.conv",
    "up_blocks.2.resnets.0": "output_blocks.4.0", "up_blocks.2.attentions.0": "output_blocks.4.1",
    "up_blocks.2.resnets.1": "output_blocks.5.0", "up_blocks.2.attentions.1": "output_blocks.5.1"}
SD_BLOCKS = {                           # Stable Diffusion v1
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.resnets.1": "input_blocks.2.0", "down_blocks.0.attentions.1": "input_blocks.2.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0": "input_blocks.4.0", "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.resnets.1": "input_blocks.5.0", "down_blocks.1.attentions.1": "input_blocks.5.1",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "down_blocks.2.resnets.0": "input_blocks.7.0", "down_blocks.2.attentions.0": "input_blocks.7.1",
    "down_blocks.2.resnets.1": "input_blocks.8.0", "down_blocks.2.attentions.1": "input_blocks.8.1",
    "down_blocks.2.downsamplers.0.conv": "input_blocks.9.0.op",
    "down_blocks.3.resnets.0": "input_blocks.10.0", "down_blocks.3.resnets.1": "input_blocks.11.0",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.resnets.2": "output_blocks.2.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.3.0", "up_blocks.1.attentions.0": "output_blocks.3.1",
    "up_blocks.1.resnets.1": "output_blocks.4.0", "up_blocks.1.attentions.1": "output_blocks.4.1",
    "up_blocks.1.resnets.2": "output_blocks.5.0", "up_blocks.1.attentions.2": "output_blocks.5.1",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.resnets.0": "output_blocks.6.0", "up_blocks.2.attentions.0": "output_blocks.6.1",
    "up_blocks.2.resnets.1": "output_blocks.7.0", "up_blocks.2.attentions.1": "output_blocks.7.1",
    "up_blocks.2.resnets.2": "output_blocks.8.0", "up_blocks.2.attentions.2": "output_blocks.8.1",
    "up_blocks.2.upsamplers.0.conv": "output_blocks.8.2.conv",
    "up_blocks.3.resnets.0": "output_blocks.9.0", "up_blocks.3.attentions.0": "output_blocks.9.1",
    "up_blocks.3.resnets.1": "output_blocks.10.0", "up_blocks.3.attentions.1": "output_blocks.10.1",
    "up_blocks.3.resnets.2": "output_blocks.11.0", "up_blocks.3.attentions.2": "output_blocks.11.1"}
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
          "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
TRANSFORMER = ["norm", "proj_in", "proj_out", *("transformer_blocks.0." + leaf for leaf in (
    "norm1", "norm2", "norm3", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"))]
VAE_BLOCKS = {                          # the shrunk autoencoder: three levels, one block each
    "encoder.conv_in": "encoder.conv_in", "encoder.conv_norm_out": "encoder.norm_out",
    "encoder.conv_out": "encoder.conv_out", "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    "encoder.down_blocks.0.resnets.0": "encoder.down.0.block.0",
    "encoder.down_blocks.0.downsamplers.0.conv": "encoder.down.0.downsample.conv",
    "encoder.down_blocks.1.resnets.0": "encoder.down.1.block.0",
    "encoder.down_blocks.1.downsamplers.0.conv": "encoder.down.1.downsample.conv",
    "encoder.down_blocks.2.resnets.0": "encoder.down.2.block.0",
    "encoder.mid_block.resnets.0": "encoder.mid.block_1",
    "encoder.mid_block.resnets.1": "encoder.mid.block_2",
    "encoder.mid_block.attentions.0": "encoder.mid.attn_1",
    "decoder.conv_in": "decoder.conv_in", "decoder.conv_norm_out": "decoder.norm_out",
    "decoder.conv_out": "decoder.conv_out",
    "decoder.mid_block.resnets.0": "decoder.mid.block_1",
    "decoder.mid_block.resnets.1": "decoder.mid.block_2",
    "decoder.mid_block.attentions.0": "decoder.mid.attn_1",
    "decoder.up_blocks.0.resnets.0": "decoder.up.2.block.0",
    "decoder.up_blocks.0.resnets.1": "decoder.up.2.block.1",
    "decoder.up_blocks.0.upsamplers.0.conv": "decoder.up.2.upsample.conv",
    "decoder.up_blocks.1.resnets.0": "decoder.up.1.block.0",
    "decoder.up_blocks.1.resnets.1": "decoder.up.1.block.1",
    "decoder.up_blocks.1.upsamplers.0.conv": "decoder.up.1.upsample.conv",
    "decoder.up_blocks.2.resnets.0": "decoder.up.0.block.0",
    "decoder.up_blocks.2.resnets.1": "decoder.up.0.block.1"}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2",
              "conv_shortcut": "nin_shortcut"}
VAE_NEW = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_OLD = {"group_norm": "norm", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}


def to_diffusers(state, blocks, resnet, attention, linear=()):
    """The official state under diffusers' names, each tensor used once; weights named in `linear`
    lose the two axes of 1x1."""
    out, left = {}, dict(state)
    for theirs, ours in blocks.items():
        leaves = (resnet if ".resnets." in theirs else
                  attention if ".attentions." in theirs else {"": ""})
        for their_leaf, our_leaf in leaves.items():
            for kind in ("weight", "bias"):
                name = ".".join(filter(None, (ours, our_leaf, kind)))
                if name in left:
                    tensor, new = left.pop(name), ".".join(filter(None, (theirs, their_leaf, kind)))
                    drop = our_leaf in linear and kind == "weight"
                    out[new] = tensor[:, :, 0, 0] if drop else tensor
    assert not left, list(left)
    return out


def unet_to_diffusers(state, blocks=BLOCKS, linear=()):
    return to_diffusers(state, blocks, RESNET, {name: name for name in TRANSFORMER}, linear)


def vae_to_diffusers(state, attention=VAE_NEW):
    linear = ("q", "k", "v", "proj_out")
    return to_diffusers(state, VAE_BLOCKS, VAE_RESNET, attention, linear)


def write(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    safetensors = path.suffix == ".safetensors"
    write_safetensors(path, state) if safetensors else torch.save(state, path)


# --------------------------------------------------------------------------------------------------
# files

def test_safetensors_round_trip_of_every_dtype_and_layout(tmp_path):
    path, g = tmp_path / "a.safetensors", torch.Generator().manual_seed(0)
    floats, integers = torch.randn(4, 6, generator=g), torch.randint(0, 100, (3, 5), generator=g)
    tensors = {str(dtype): (floats if dtype.is_floating_point else integers).to(dtype)
               for dtype in checkpoint.DTYPES.values()}
    tensors |= {"truth": floats > 0, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3),
                "turned": floats.T, "every other": floats[:, ::2],
                "spread": torch.ones(1).expand(5), "a \"quoted\" näme": torch.ones(2),
                "parameter": torch.nn.Parameter(torch.ones(2))}
    write_safetensors(path, tensors)
    same({"": pretrained.read_safetensors(path)}, {"": {k: v.detach() for k, v in tensors.items()}})
    write_safetensors(path, {})
    assert pretrained.read_safetensors(path) == {}


def test_safetensors_written_by_hand_without_alignment(tmp_path):
    """The format as described, not as our writer writes it: a header of odd length, and in another
    order than the data."""
    header = (b'{"b":{"dtype":"F32","shape":[2],"data_offsets":[3,11]},'
              b'"a":{"shape":[3],"dtype":"U8","data_offsets":[0,3]},"__metadata__":{"x":"y"},'
              b'"c":{"dtype":"BF16","shape":[],"data_offsets":[11,13]}}')
    header += b" " * (1 - len(header) % 2)                          # an odd length
    path = tmp_path / "a.safetensors"
    data = bytes([7, 8, 9]) + struct.pack("<2f", 1.5, -2) + struct.pack("<H", 0x3FC0)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    got = pretrained.read_safetensors(path)
    assert got["a"].tolist() == [7, 8, 9] and got["b"].tolist() == [1.5, -2]
    assert got["b"].data_ptr() % 4 == 0
    assert (got["c"].item(), got["c"].shape, got["c"].dtype) == (1.5, (), torch.bfloat16)


def test_mapped_tensors_do_not_touch_the_file_and_save_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"small": torch.ones(4), "large": torch.zeros(100_000)})
    before, got = path.read_bytes(), pretrained.read_safetensors(path)
    got["small"].mul_(2)
    assert path.read_bytes() == before
    torch.save(got["small"], tmp_path / "small.pt")
    assert (tmp_path / "small.pt").stat().st_size < 10_000


def hand(path, header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("header, size", [
    (b"{]", 0), (b"\xff\xfe{}", 0), (b"[" * 100_000, 0), (b"[1]", 0),             # no JSON object
    (b'{"w": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}, "w": {}}', 1),
    ({"w": 3}, 0), ({"w": {"dtype": "F32", "shape": [2]}}, 8),                      # no entry
    *((({"w": GOOD | {"shape": shape}}), 8) for shape in ([-2], [-1, -2], [2.0], "2", None, [3])),
    ({"w": GOOD | {"shape": [0, -5], "data_offsets": [0, 0]}}, 0),
    ({"w": GOOD | {"dtype": "F8_E4M3"}}, 8), ({"w": GOOD | {"dtype": ["F32"]}}, 8),
    *(({"w": GOOD | {"data_offsets": offsets}}, 8)
      for offsets in ([0, 4, 8], [8, 0], [0, 4], [0.0, 8.0], [-8, 0], 8)),
    ({"w": GOOD}, 7), ({"w": GOOD}, 9),                                             # cut; a rest
    ({"w": GOOD, "v": GOOD}, 8),                                                  # overlaps
    ({"w": GOOD, "v": GOOD | {"data_offsets": [4, 12]}}, 12),
    ({"w": GOOD, "v": GOOD | {"data_offsets": [12, 20]}}, 20),                      # a gap
])
def test_bad_safetensors(tmp_path, header, size):
    with pytest.raises(ValueError, match="bad.safetensors is missing, truncated, dam") as error:
        pretrained.read_safetensors(hand(tmp_path / "bad.safetensors", header, bytes(size)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_every_truncation_of_a_safetensors_file_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": torch.ones(3), "n": torch.arange(2)})
    raw = path.read_bytes()
    huge = struct.pack("<Q", 2 ** 60) + raw[8:]
    for bad in [raw[:size] for size in range(len(raw))] + [huge]:
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="a.safetensors is missing, truncated, dam"):
            pretrained.read_weights(path)
    with pytest.raises(ValueError, match="none.safetensors is missing"):
        pretrained.read_safetensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.bin", "a"])
def test_files_are_known_by_their_first_bytes(tmp_path, name):
    path, state = tmp_path / name, {"w": torch.randn(3, 2)}
    for length in range(4, 300, 8):       # one header's length begins with the byte of a pickle
        held = state | {"x" * length: torch.ones(1)}
        write_safetensors(path, held)
        same({"": pretrained.read_weights(path)}, {"": held})
        assert pretrained.is_official(path)
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80" and path.read_bytes()[8:9] == b"{"
    for zipped in (True, False):
        torch.save({"state_dict": {"module.w": state["w"]}}, path,
                   _use_new_zipfile_serialization=zipped)
        same({"": pretrained.read_weights(path)}, {"": state})
        assert pretrained.is_official(path)
    save_checkpoint(path, {"model": state, "ema": state})
    assert not pretrained.is_official(path) and pretrained.is_official(tmp_path)
    for content, said in ((b"version https://git-lfs.github.com/spec/v1\noid x\n", "Git LFS"),
                          (b"<!DOCTYPE html><title>Sign in</title>", "is a web page"),
                          (b"\xef\xbb\xbf\n <HTML>Not found", "is a web page"),
                          (b"garbage", "truncated"), (b"", "truncated")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said) as error:
            pretrained.read_weights(path)
        assert name in str(error.value) and "\n" not in str(error.value)
        if said != "truncated":
            with pytest.raises(ValueError, match=said):
                pretrained.is_official(path)


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no file at none.ckpt"):
        pretrained.read_weights("none.ckpt")
    assert not pretrained.is_official(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="no file at"):
        pretrained.read_weights(tmp_path)


# --------------------------------------------------------------------------------------------------
# CompVis files

@pytest.mark.parametrize("name", ["sd.ckpt", "sd.safetensors"])
def test_compvis_file_to_models(tmp_path, models, states, name):
    path, state = tmp_path / name, compvis(states)
    write(path, state) if path.suffix == ".safetensors" else torch.save(
        {"state_dict": state, "global_step": 1}, path)
    parts = parts_of(path)
    same(parts, states)
    built = pretrained.build(parts)
    for (name, got), want in zip(outputs(built).items(), outputs(models).values()):
        assert torch.equal(got, want), name
    for part, model in built.items():                               # taken over, not copied
        for name, p in model.named_parameters():
            assert p.data_ptr() == parts[part][name].data_ptr() and p.requires_grad


def test_parts_alone_and_bare_files(states):
    split = parts_in
    for part, state in states.items():
        same(split({PREFIX[part] + name: tensor for name, tensor in state.items()}), {part: state})
        same(split(state), {part: state})
    junk = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(()),
            "loss.discriminator.main.0.weight": torch.ones(2)}
    same(split(states["vae"] | junk), {"vae": states["vae"]})


def test_bare_vae_under_state_dict(tmp_path, states):
    path = tmp_path / "vae-ft-mse.ckpt"
    torch.save({"state_dict": states["vae"] | {"loss.logvar": torch.zeros(())}}, path)
    same(parts_of(path), {"vae": states["vae"]})


def test_text_names_without_text_model_and_linear_projections(states):
    short = {PREFIX["text"] + k.removeprefix("text_model."): v for k, v in states["text"].items()}
    flat = ("proj_in.weight", "proj_out.weight")
    linear = {PREFIX["unet"] + k: v[:, :, 0, 0] if k.endswith(flat) else v
              for k, v in states["unet"].items()}
    same(parts_in(short | linear), {"unet": states["unet"], "text": states["text"]})


# --------------------------------------------------------------------------------------------------
# diffusers folders

@pytest.mark.parametrize("stems, suffix, attention, linear", [
    (("diffusion_pytorch_model", "model"), ".safetensors", VAE_NEW, ()),
    (("diffusion_pytorch_model", "pytorch_model"), ".bin", VAE_OLD, ("proj_in", "proj_out")),
    (("diffusion_pytorch_model", "model"), ".fp16.safetensors", VAE_OLD, ()),
    (("diffusion_pytorch_model", "pytorch_model"), ".fp16.bin", VAE_NEW, ("proj_in", "proj_out"))])
def test_diffusers_folder_to_models(tmp_path, models, states, stems, suffix, attention, linear):
    half = "fp16" in suffix
    want = {part: {k: v.half() if half else v for k, v in state.items()}
            for part, state in states.items()}
    write(tmp_path / "unet" / (stems[0] + suffix), unet_to_diffusers(want["unet"], linear=linear))
    write(tmp_path / "vae" / (stems[0] + suffix), vae_to_diffusers(want["vae"], attention))
    write(tmp_path / "text_encoder" / (stems[1] + suffix),
          want["text"] | {"text_model.embeddings.position_ids": torch.arange(9)[None]})
    parts = parts_of(tmp_path)
    same(parts, want)
    built = pretrained.build(parts, dtype=torch.float32)
    filled = pretrained.build(want, dtype=torch.float32) if half else models
    for (name, got), expected in zip(outputs(built).items(), outputs(filled).values()):
        assert torch.equal(got, expected), name


def test_diffusers_folder_of_one_part_and_the_choice_of_file(tmp_path, states):
    vae, unet = vae_to_diffusers(states["vae"]), unet_to_diffusers(states["unet"])
    write(tmp_path / "sd-vae-ft-ema" / "diffusion_pytorch_model.bin", vae)
    same(parts_of(tmp_path / "sd-vae-ft-ema"), {"vae": states["vae"]})
    write(tmp_path / "some-unet" / "diffusion_pytorch_model.safetensors", unet)
    same(parts_of(str(tmp_path / "some-unet")), {"unet": states["unet"]})
    zero = {k: 0 * v for k, v in vae.items()}       # full precision wins, then safetensors
    for name, state in (("fp16.safetensors", zero), ("safetensors", vae), ("bin", zero),
                        ("fp16.bin", zero)):
        write(tmp_path / "pipe" / "vae" / f"diffusion_pytorch_model.{name}", state)
    same(parts_of(tmp_path / "pipe"), {"vae": states["vae"]})


def test_bad_diffusers_folders(tmp_path, states):
    (tmp_path / "text_encoder").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match=f"no file at {folder}|{folder} is no diffusers fol"):
            parts_of(folder)
    unet, vae = unet_to_diffusers(states["unet"]), vae_to_diffusers(states["vae"])
    for name in ("down_blocks.0.resnets.0.conv3.weight", "x",
                 "down_blocks.0.oddities.0.x.bias", "down_blocks.0.downsamplers.0.norm.weight"):
        renamed = pretrained.from_diffusers("unet", unet | {name: torch.ones(2, 3)})
        with pytest.raises(ValueError, match=r"unet: 1 .*: file \(2, 3\), model has none"):
            pretrained.build({"unet": renamed})
    for name in ("encoder.conv_mid.weight", "encoder.mid_block.attentions.0.to_r.weight",
                 "quant_conv", "x"):
        renamed = pretrained.from_diffusers("vae", vae | {name: torch.ones(2, 3)})
        with pytest.raises(ValueError, match=r"vae: 1 .*: file \(2, 3\), model has none"):
            pretrained.build({"vae": renamed})


def test_all_686_names_of_the_real_unet_one_to_one_from_diffusers():
    with torch.device("meta"):
        official = UNet().state_dict()
    theirs = unet_to_diffusers(official, SD_BLOCKS)
    assert len(official) == len(theirs) == 686
    # sizes of the public unet/config.json, with diffusers' names
    block = "transformer_blocks.0"
    for name, shape in {"down_blocks.2.resnets.0.conv1.weight": (1280, 640, 3, 3),
                        "up_blocks.1.resnets.2.conv1.weight": (1280, 1920, 3, 3),
                        "up_blocks.3.resnets.0.conv_shortcut.weight": (320, 960, 1, 1),
                        "up_blocks.3.resnets.2.conv_shortcut.weight": (320, 640, 1, 1),
                        "up_blocks.2.upsamplers.0.conv.weight": (640, 640, 3, 3),
                        f"down_blocks.1.attentions.1.{block}.attn2.to_k.weight": (640, 768),
                        f"mid_block.attentions.0.{block}.ff.net.0.proj.bias": (10240,),
                        "time_embedding.linear_2.weight": (1280, 1280)}.items():
        assert tuple(theirs[name].shape) == shape
    assert sum(".conv_shortcut." in name for name in theirs) == 2 * 14
    back = pretrained.from_diffusers("unet", theirs)
    assert back.keys() == official.keys()
    assert all(back[name] is official[name] for name in official)   # the tensor itself
    assert pretrained.infer_unet(back) == dict(
        in_channels=4, out_channels=4, model_channels=320, channel_mult=(1, 2, 4, 4),
        num_res_blocks=2, attention_resolutions=(1, 2, 4), num_heads=8, context_dim=768)


# --------------------------------------------------------------------------------------------------
# out: the same names, turned round

WORDS = WordTokenizer([f"w{k}" for k in range(39)], 8, 9)          # 50 rows, as the shrunk encoder


def task_of(unet, text, vae, schedule="scaled_linear", predicts="eps", words=WORDS):
    process = RectifiedFlow(3.0) if schedule == "flow" else (
        GaussianDiffusion(1000, schedule, predicts))
    return types.SimpleNamespace(
        model=types.SimpleNamespace(denoiser=unet, text=text), first_stage=vae, tokenizer=words,
        settings=types.SimpleNamespace(schedule=schedule), process=process, shape=(4, 8, 8),
        on_pixels=not vae.state_dict())


@pytest.mark.parametrize("sizes, blocks", [(UNET, BLOCKS), ({}, SD_BLOCKS)])
def test_a_unet_under_diffusers_names(sizes, blocks, models):
    """By the tables above; the config is that of unet/config.json of Stable Diffusion v1.5."""
    with torch.device("meta"):
        unet = UNet(**sizes)
    files = pretrained.to_diffusers(task_of(unet, models["text"], models["vae"]))
    theirs = files["unet/diffusion_pytorch_model.safetensors"]
    want = unet_to_diffusers(unet.state_dict(), blocks)
    assert {name: w.shape for name, w in theirs.items()} == {n: w.shape for n, w in want.items()}
    assert files["unet/config.json"] == {
        "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4,
        "layers_per_block": 1 if sizes else 2, "cross_attention_dim": 64 if sizes else 768,
        "attention_head_dim": 8, "norm_num_groups": 32, "sample_size": 8,
        "block_out_channels": [32, 64, 64] if sizes else [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * (2 if sizes else 3) + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (2 if sizes else 3)}


def test_parts_under_diffusers_names_come_back(tmp_path, models, states):
    """Names by the tables above, and the folder is read again: equal tensors, and the same outputs
    with sizes that tensors do not show."""
    files = pretrained.to_diffusers(task_of(models["unet"], models["text"], models["vae"]))
    same({name: w for name, w in files.items() if name.endswith(".safetensors")}, {
        "unet/diffusion_pytorch_model.safetensors": unet_to_diffusers(states["unet"]),
        "vae/diffusion_pytorch_model.safetensors": vae_to_diffusers(states["vae"]),
        "text_encoder/model.safetensors": states["text"]})
    odd = {"unet": fill_by_recipe(UNet(**dict(UNET, num_heads=4, norm_groups=8))),
           "text": fill_by_recipe(TextEncoder(**{**TEXT, "num_heads": 2})),
           "vae": fill_by_recipe(AutoencoderKL(**VAE, scale=2.5))}
    files = pretrained.to_diffusers(task_of(**odd, predicts="v"))
    for name, content in files.items():
        if name.endswith(".json"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(json.dumps(content))
        else:
            write(tmp_path / name, content)
    _, parts, said = pretrained.read_official(tmp_path)
    same(parts, {part: model.state_dict() for part, model in odd.items()})
    assert said["process"] == {"schedule": "scaled_linear", "prediction": "v",
                               "spacing": ("trailing", 1, True)}
    built = pretrained.build(parts, None, said)
    for (name, got), wanted in zip(outputs(built).items(), outputs(odd).values()):
        assert torch.equal(got, wanted), name
    assert files["vae/config.json"] == {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
        "layers_per_block": 1, "scaling_factor": 2.5, "norm_num_groups": 32,
        "block_out_channels": [32, 64, 64], "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3}
    assert files["text_encoder/config.json"] == {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 50,
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 9, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("schedule, predicts, want", [
    ("flow", "", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}),
    ("linear", "v", {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
                     "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("scaled_linear", "x0", {"beta_schedule": "scaled_linear", "beta_start": 0.00085,
                             "beta_end": 0.012, "prediction_type": "sample", "steps_offset": 1,
                             "timestep_spacing": "trailing"}),
    ("cosine", "eps", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon",
                       "timestep_spacing": "leading"})])
@pytest.mark.parametrize("stage", [Pixels, TinyAutoencoder])
def test_a_schedule_as_diffusers_writes_it(models, capsys, schedule, predicts, want, stage):
    """Flows are trained at shifted times and sampled at even ones, so its shift is 1. Diffusers
    0.42 takes the same ten steps with guidance, to 2e-6 of the norm; a flow with given sigmas."""
    task = task_of(models["unet"], models["text"], stage(), schedule, predicts)
    files = pretrained.to_diffusers(task)
    gauss = {"_class_name": "DDIMScheduler", "clip_sample": stage is Pixels} if predicts else {}
    assert files["scheduler/scheduler_config.json"] == {
        "num_train_timesteps": 1000, **gauss, **want}
    said = capsys.readouterr().out
    assert not any(name.startswith("vae") for name in files)
    assert said == "" if stage is Pixels else said.startswith("left out: the tiny-ae, ")


def test_tokenizers_as_transformers_reads_them(models):
    """transformers 5.24 makes equal ids of 24 captions of scenes by one, and by the other, with
    CLIP's own merges, of letters, numbers and signs of many alphabets."""
    files = pretrained.to_diffusers(task_of(models["unet"], models["text"], models["vae"]))
    said = files["tokenizer/tokenizer.json"]
    assert said["model"]["vocab"] == {"[PAD]": 0, "[START]": 1, "[END]": 2, **WORDS.ids}
    assert said["model"]["unk_token"] not in said["model"]["vocab"]         # unknown: an error
    assert re.findall(said["pre_tokenizer"]["pattern"]["Regex"], "a <new1>, V*.") == [
        "a", "<new1>", "V*"]
    assert [item["ids"] for item in said["post_processor"]["special_tokens"].values()] == [[1], [2]]
    assert files["tokenizer/tokenizer_config.json"]["model_max_length"] == 9
    assert "model_index.json" not in files
    clip = CLIPTokenizer(pathlib.Path(__file__).parent / "tiny_merges.txt")
    files = pretrained.to_diffusers(task_of(models["unet"], models["text"], models["vae"],
                                            words=clip))
    assert files["tokenizer/vocab.json"] == clip.ids and "model_index.json" in files
    assert files["tokenizer/merges.txt"].split("\n")[1:] == [" ".join(p) for p in clip.ranks]


def test_safetensors_that_we_write(tmp_path):
    """Every dtype and layout comes back; the header has the lines, and data begins aligned."""
    path, floats = tmp_path / "a.safetensors", torch.randn(4, 6)
    tensors = {str(dtype): (3 * floats).to(dtype) for dtype in checkpoint.DTYPES.values()}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3), "turned": floats.T,
                "spread": torch.ones(1).expand(5), "grad": torch.nn.Parameter(floats)}
    with checkpoint.written_whole(path) as file:
        checkpoint.write_safetensors(file, tensors, {"format": "pt", "licence": "n\u00e4me"})
    same({"": pretrained.read_safetensors(path)}, {"": {k: w.detach() for k, w in tensors.items()}})
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    assert header.pop("__metadata__") == {"format": "pt", "licence": "n\u00e4me"} and size % 8 == 0
    for name, entry in header.items():
        assert entry["data_offsets"][0] % tensors[name].dtype.itemsize == 0


# --------------------------------------------------------------------------------------------------
# sizes and modules

def test_sizes_are_read_off_the_tensors(states):
    unet, vae, text = pretrained.infer_unet, pretrained.infer_vae, pretrained.infer_text
    assert unet(states["unet"]) == UNET
    assert vae(states["vae"]) == VAE
    assert text(states["text"]) == TEXT


@pytest.mark.parametrize("sizes", [
    # one level; in_channels of the inpainting model
    dict(model_channels=64, channel_mult=(1,), num_res_blocks=3, attention_resolutions=(),
         num_heads=8, context_dim=5, in_channels=9, out_channels=8),
    dict(model_channels=64, channel_mult=(1, 1.5, 2.5), num_res_blocks=2,
         attention_resolutions=(4,), num_heads=8, context_dim=7, in_channels=3, out_channels=3)])
def test_other_unets(sizes):
    with torch.device("meta"):
        state = UNet(**sizes).state_dict()
    assert pretrained.infer_unet(state) == sizes


def test_published_sizes_of_the_other_two():
    clip = dict(vocab_size=49_408, max_length=77, hidden_size=768, depth=12, num_heads=12)
    with torch.device("meta"):
        vae, text = AutoencoderKL().state_dict(), TextEncoder(**clip).state_dict()
    assert pretrained.infer_vae(vae) == dict(channels=128, multipliers=(1, 2, 4, 4), res_blocks=2,
                                             in_channels=3, z_channels=4)
    assert pretrained.infer_text(text) == clip | dict(mlp_ratio=4.0)


@pytest.mark.parametrize("name", [*DIT_CONFIGS, "DiT-32x1/2", "DiT-160x2/1", "DiT-512x1/4"])
def test_sizes_of_a_dit_are_read_off_its_tensors(name):
    """The paper's heads by width, or heads of 32 channels, as every DiT-WxD/p has them."""
    sizes = {**find_model(name)[1], "input_size": 16, "in_channels": 3, "num_classes": 7,
             "learn_sigma": False}
    with torch.device("meta"):
        state = DiT(**sizes).state_dict()
    assert pretrained.infer_dit(state) == sizes


@pytest.mark.parametrize("infer, part, what", [
    (pretrained.infer_unet, "unet", "a U-Net of the Stable Diffusion family"),
    (pretrained.infer_vae, "vae", "an AutoencoderKL"),
    (pretrained.infer_text, "text", "CLIP's text encoder")])
def test_states_of_something_else(states, infer, part, what):
    for state in ({}, {"x": torch.ones(1)}):
        with pytest.raises(ValueError, match=f"not the state_dict of {what}: .* is not there"):
            infer(state)
    whole = states[part]
    for name in whole:              # whatever is missing or flat, the error is one that names it
        for state in ({k: v for k, v in whole.items() if k != name},
                      whole | {name: whole[name].flatten()}):
            try:
                infer(state)
            except ValueError as error:
                assert name in str(error)


def test_build_is_strict_and_says_what_differs(states):
    unet = dict(states["unet"])
    build = lambda state: pretrained.build({"unet": state})
    missing = {k: v for k, v in unet.items() if k != "out.0.bias"}
    with pytest.raises(ValueError, match=r"unet: 1 .* out.0.bias: file has none, model \(32,\)"):
        build(missing)
    with pytest.raises(ValueError, match=r"unet: 1 .* time_emb.0.weight: file \(3,\), model"):
        build(unet | {"time_emb.0.weight": torch.ones(3)})
    with pytest.raises(ValueError, match=r"unet: 1 .* out.0.bias: file \(31,\), model \(32,\)"):
        build(unet | {"out.0.bias": torch.ones(31)})
    with pytest.raises(ValueError, match=r"unet: 7 .* x.0: .* x.4: file \(1,\), model has none$"):
        build(unet | {f"x.{i}": torch.ones(1) for i in range(7)})           # the first five
    with pytest.raises(ValueError, match="unet: 1 .* out.0.bias: dtype torch.int8"):
        build(unet | {"out.0.bias": torch.ones(32, dtype=torch.int8)})
    with pytest.raises(ValueError, match="unet: 1 .* out.0.bias: .* not finite"):
        build(unet | {"out.0.bias": torch.full((32,), float("nan"))})
    wide = states["vae"] | {"encoder.down.1.block.0.conv1.weight": torch.ones(48, 32, 3, 3)}
    with pytest.raises(ValueError, match=r"vae: .* differ: .*: file \(64,"):
        pretrained.build({"vae": wide})                             # 48 is no multiple of 32


def test_build_keeps_the_dtype_unless_told(states):
    half = {part: {k: v.half() for k, v in state.items()} for part, state in states.items()}
    for dtype, want in ((None, torch.float16), (torch.float32, torch.float32),
                        (torch.bfloat16, torch.bfloat16)):
        for model in pretrained.build(half, dtype).values():
            assert {p.dtype for p in model.state_dict().values()} == {want}
            assert not any(p.is_meta for p in model.parameters())


def test_built_models_train(tmp_path, states):
    """On a mapped file: the weights move, the file stays."""
    path = tmp_path / "text.safetensors"
    write_safetensors(path, states["text"])
    built = pretrained.build({"text": pretrained.read_weights(path)})["text"]
    optimizer = torch.optim.SGD(built.parameters(), lr=0.1)
    built(torch.arange(9)[None]).square().sum().backward()
    optimizer.step()
    name = "text_model.final_layer_norm.bias"
    assert not torch.equal(built.state_dict()[name], states["text"][name])
    same({"text": pretrained.read_weights(path)}, {"text": states["text"]})


# --------------------------------------------------------------------------------------------------
# what would be drawn wrongly in silence is refused by name

CONFIGS = {     # as Stable Diffusion v1.5 is published
    "scheduler/scheduler_config.json": {
        "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "skip_prk_steps": True,
        "set_alpha_to_one": False, "trained_betas": None, "clip_sample": False},
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
        "cross_attention_dim": 768, "norm_eps": 1e-05, "norm_num_groups": 32, "in_channels": 4},
    "vae/config.json": {"_class_name": "AutoencoderKL", "act_fn": "silu", "norm_num_groups": 32},
    "text_encoder/config.json": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-05}}


def pipeline(folder, states, **changes):
    """A diffusers folder; changes: {file: {key: value}} of its configs, or bytes."""
    unet = unet_to_diffusers(states["unet"])
    write(folder / "unet" / "diffusion_pytorch_model.safetensors", unet)
    write(folder / "vae" / "diffusion_pytorch_model.safetensors", vae_to_diffusers(states["vae"]))
    write(folder / "text_encoder" / "model.safetensors", states["text"])
    for name, said in CONFIGS.items():
        change = changes.get(name.split("/")[0], {})
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(change if isinstance(change, bytes) else json.dumps(
            {**said, **change}).encode())
    return folder


@pytest.mark.parametrize("where, key, value", [
    ("scheduler", "prediction_type", "flow_prediction"), ("scheduler", "beta_schedule", "linear"),
    ("scheduler", "beta_end", 0.02), ("scheduler", "beta_start", [0.1]),
    ("scheduler", "num_train_timesteps", 4000), ("scheduler", "trained_betas", [0.1]),
    ("scheduler", "rescale_betas_zero_snr", True), ("scheduler", "steps_offset", 2),
    ("scheduler", "timestep_spacing", "other"), ("unet", "attention_head_dim", [5, 10, 20]),
    ("unet", "attention_head_dim", -8), ("unet", "attention_head_dim", True),
    ("unet", "class_embed_type", "timestep"), ("vae", "norm_num_groups", 16),
    ("vae", "scaling_factor", 0), ("vae", "scaling_factor", "1"), ("vae", "shift_factor", 0.1159),
    ("text_encoder", "hidden_act", "gelu"), ("scheduler", "clip_sample", True)])
def test_a_config_that_cannot_be_followed_is_refused(where, key, value, tmp_path, states):
    folder = pipeline(tmp_path, states, **{where: {key: value}})
    words = rf"{where}/.*config.json says (betas|{key}) .* only .* can be read"
    with pytest.raises(ValueError, match=words) as error:
        parts_of(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_configs_are_followed_and_damaged_ones_named(tmp_path, states):
    """Heads, scale and schedule; the folder as Stable Diffusion v1.5 is published has none of its
    own but the offset and the end of the chain."""
    what, parts, said = pretrained.read_official(pipeline(tmp_path / "plain", states))
    same(parts, states)
    assert (what, said) == ("a diffusers folder", {
        "unet": {"num_heads": 8, "norm_groups": 32}, "vae": {}, "text": {}, "process": {
            "schedule": "scaled_linear", "prediction": "eps", "spacing": ("leading", 1, False)}})
    more = {"scheduler": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
            "vae": {"scaling_factor": 0.13025}, "unet": {"attention_head_dim": 4},
            "text_encoder": {"num_attention_heads": 2}}
    _, parts, said = pretrained.read_official(pipeline(tmp_path / "new", states, **more))
    built = pretrained.build(parts, None, said)
    assert said["process"]["prediction"] == "v" and said["process"]["spacing"][0] == "trailing"
    assert (built["vae"].scale, built["vae"].sizes["scale"]) == (0.13025, 0.13025)
    assert built["unet"].middle_block[1].transformer_blocks[0].attn2.num_heads == 4
    assert built["text"].text_model.encoder.layers[0].self_attn.num_heads == 2
    # one part by its file, --vae: the config beside it counts as well
    vae = tmp_path / "new/vae/diffusion_pytorch_model.safetensors"
    for path in (vae, vae.parent):
        assert pretrained.read_official(path, "vae")[2]["vae"] == {"scale": 0.13025}
    for content in (b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b"3"):
        (tmp_path / "new/unet/config.json").write_bytes(content)
        with pytest.raises(ValueError, match="unet/config.json is damaged or no config"):
            parts_of(tmp_path / "new")


def test_shards_and_variants_of_a_folder(tmp_path, states):
    """As diffusers 0.42 and transformers 5.24 name them, asked for shards of 200 kB and a variant:
    the index is NAME.safetensors.index.json, or .index.fp16.json."""
    vae = vae_to_diffusers(states["vae"])
    for kind, (shard, index) in {
            "plain": ("diffusion_pytorch_model-0000{}-of-00002.safetensors",
                      "diffusion_pytorch_model.safetensors.index.json"),
            "fp16": ("diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors",
                     "diffusion_pytorch_model.safetensors.index.fp16.json"),
            "text": ("model-0000{}-of-00002.bin", "model.bin.index.json")}.items():
        names = [*vae]
        shards = {shard.format(k + 1): names[k::2] for k in range(2)}
        for file, held in shards.items():
            write(tmp_path / kind / file, {name: vae[name] for name in held})
        weight_map = {name: file for file, held in shards.items() for name in held}
        (tmp_path / kind / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        same(parts_of(tmp_path / kind), {"vae": states["vae"]})
        same(parts_of(tmp_path / kind / index), {"vae": states["vae"]})
    (tmp_path / "plain" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="no file at .*-00002-of-00002.safetensors"):
        parts_of(tmp_path / "plain")
    zero = {k: 0 * v for k, v in vae.items()}               # without EMA: only if nothing else is
    for name, state in (("non_ema", zero), ("bf16", vae)):
        write(tmp_path / "pipe/vae" / f"diffusion_pytorch_model.{name}.bin", state)
        same(parts_of(tmp_path / "pipe"),
             {"vae": {k: 0 * v for k, v in states["vae"].items()} if name == "non_ema" else
              states["vae"]})


OTHERS = {      # published beside Stable Diffusion v1: names and shapes of some of their tensors
    "a LoRA, a change": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (2, 2),
                         "lora_unet_mid_block_attentions_0_proj_in.alpha": ()},
    "a LoRA": {"unet.mid_block.attentions.0.proj_in.lora_A.weight": (2, 2)},
    "a LoRA, ": {"mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight":
                 (2, 2)},
    "a part of Stable Diffusion XL": {"conditioner.embedders.0.transformer.x.weight": (2,),
                                      "model.diffusion_model.input_blocks.0.0.bias": (320,)},
    "a part of Stable Diffusion XL,": {"add_embedding.linear_1.bias": (3,),
                                       "down_blocks.0.resnets.0.norm1.weight": (320,)},
    "a part of Stable Diffusion XL, which": {"clip_g": (1, 1280), "clip_l": (1, 768)},
    "a part of Stable Diffusion 2": {"cond_stage_model.model.ln_final.weight": (1024,),
                                     "first_stage_model.encoder.conv_in.bias": (128,)},
    "a part of Stable Diffusion 2,": {
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (1280, 1024),
        "down_blocks.0.resnets.0.norm1.weight": (320,)},
    "a part of Stable Diffusion 2, which": {"text_model.embeddings.token_embedding.weight":
                                            (5, 1024)},
    "Stable Diffusion that predicts v": {"v_pred": (), "model.diffusion_model.out.2.bias": (4,)},
    "a U-Net for inpainting": {"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)},
    "a U-Net for pix2pix": {"conv_in.weight": (320, 8, 3, 3)},
    "a U-Net for depth": {"input_blocks.0.0.weight": (320, 5, 3, 3)},
    "VQ-Diffusion or its codec": {"transformer.content_emb.emb.weight": (9, 8)},
    "Stable Diffusion 3 or FLUX": {"context_embedder.weight": (8, 8),
                                   "transformer_blocks.0.norm1.linear.bias": (8,)},
    "Stable Diffusion 3 or FLUX, ": {"model.diffusion_model.joint_blocks.0.x.weight": (2,)},
    "a ControlNet": {"controlnet_cond_embedding.conv_in.bias": (16,),
                     "down_blocks.0.resnets.0.norm1.weight": (320,)},
    "VQ-Diffusion or its codec, which": {"quantize.embed.weight": (9, 8),
                                         "encoder.down.0.block.0.norm1.bias": (32,)},
    "VQ-Diffusion or its codec, ": {"latent_image_embedding.emb.weight": (9, 8),
                                    "transformer_blocks.0.norm1.emb.weight": (9, 8)},
    "a concept with a text encoder of its own": {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 8),
        "text_encoder.text_model.final_layer_norm.bias": (8,)},
    "an adapter of unet-finetune": {f"adp.{k}.{kind}": shape for k, kind, shape in (
        (0, "weight", (60, 320)), (0, "bias", (60,)), (2, "weight", (320, 60)))}}


def test_a_word_may_have_any_name(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"<floral-style>": torch.ones(8)})
    assert parts_of(tmp_path / "x.safetensors")["concept"][1].keys() == {"<floral-style>"}


@pytest.mark.parametrize("what", OTHERS)
def test_files_of_other_kinds_are_refused_by_name(what, tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {name: torch.zeros(shape) for name, shape in OTHERS[what].items()})
    with pytest.raises(ValueError, match=f"x.safetensors is {what}.* not read here: ") as error:
        parts_of(path)
    assert "\n" not in str(error.value)
    for name in ("pytorch_lora_weights.safetensors", "adapter_model.bin"):      # in a folder alone
        write(tmp_path / what / name, {"x.lora_A.weight": torch.ones(1)})
        with pytest.raises(ValueError, match="is a LoRA"):
            parts_of(tmp_path / what)
        (tmp_path / what / name).unlink()


@pytest.mark.parametrize("what, name, shape", [
    ("a ControlNet", "control_model.input_blocks.0.0.bias", (2,)),
    ("a ControlNet", "controlnet_down_blocks.0.bias", (2,)),
    ("a LoRA", "x.hada_w1_a", (2, 2)), ("a LoRA", "x.lokr_w1", (2, 2)),
    ("a part of Stable Diffusion XL", "x.label_emb.0.0.bias", (2,)),
    ("a part of Stable Diffusion XL", "text_projection.weight", (2, 2)),
    ("a part of Stable Diffusion XL", "x.attn2.to_k.weight", (8, 2048)),
    ("Stable Diffusion 3 or FLUX", "double_blocks.0.img_mod.lin.bias", (2,)),
    ("a U-Net for upscaling", "x.input_blocks.0.0.weight", (8, 7, 3, 3)),
    ("VQ-Diffusion or its codec", "content_codec.x", (2,)),
    ("an adapter of unet-finetune", "x.adapter_inout.adp.0.bias", (2,))])
def test_one_tensor_of_another_kind_is_enough_to_refuse_a_file(what, name, shape, states):
    """Such as of a ControlNet, whose file holds all of Stable Diffusion as well."""
    with pytest.raises(ValueError, match=f"x is {what}.* not read here: "):
        pretrained.recognise(compvis(states) | {name: torch.zeros(shape)}, "x")


@pytest.mark.parametrize("part, said, args", [
    *((part, {key: other}, None) for part, key, other in (
        ("unet", "act_fn", "gelu"), ("unet", "norm_eps", 1e-06), ("vae", "act_fn", "relu"),
        ("text", "layer_norm_eps", 1e-06), ("dit", "activation_fn", "gelu"),
        ("dit", "norm_eps", 1e-06), ("dit", "norm_num_groups", 16))),
    ("unet", {"num_attention_heads": 5}, {"num_heads": 5}),
    ("process", {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
     {"schedule": "linear", "spacing": ("leading", 0, True), "prediction": "eps"})])
def test_a_config_is_followed_or_refused_in_every_row_of_the_table(part, said, args, tmp_path):
    """What a schedule does not say is as diffusers' DDIMScheduler has it."""
    (tmp_path / "config.json").write_text(json.dumps(said))
    read = lambda: pretrained.read_config(tmp_path / "config.json", part)
    if args:
        assert read() == args
    else:
        with pytest.raises(ValueError, match=f"says {[*said][0]} .*, and only .* can be read"):
            read()


# --------------------------------------------------------------------------------------------------
# a folder's own schedule, DiT's folders, things of one's own

@pytest.mark.parametrize("spacing, predicts", [
    (("leading", 1, False), "epsilon"), (("leading", 0, True), "epsilon"),
    (("leading", 1, False), "v_prediction"), (("trailing", 0, True), "v_prediction"),
    (("leading", 1, False), "sample")])
def test_ten_steps_of_a_folders_own_ddim(spacing, predicts, tmp_path):
    """DDIM as diffusers' DDIMScheduler documents it: from t to t - 100, and from the last t to
    alpha_bar 1 or, without set_alpha_to_one, that of t = 0. On a shrunk folder written by diffusers
    0.42, its own pictures after ten steps differ from ours by at most 2e-6 of their norm."""
    kind, offset, to_one = spacing
    said = {"prediction_type": predicts, "timestep_spacing": kind, "steps_offset": offset,
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "set_alpha_to_one": to_one}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(said))
    args = pretrained.read_config(tmp_path / "scheduler_config.json", "process")
    g = torch.Generator().manual_seed(0)
    mix, x = 0.5 * torch.randn(4, 4, generator=g), torch.randn(2, 4, 3, 3, generator=g)
    model = lambda x, t, y: torch.einsum("ij,bjhw->bihw", mix, x) * (1 + t.view(-1, 1, 1, 1) / 999)
    got = GaussianDiffusion(**args).sample(model, x.shape, sampler="ddim", steps=10, noise=x)
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    times = [99 + 100 * k for k in range(10)] if kind == "trailing" else [
        offset + 100 * k for k in range(10)]
    for t in reversed(times):
        ab, before = alpha_bar[t].item(), 1.0 if to_one else alpha_bar[0].item()
        before = alpha_bar[t - 100].item() if t >= 100 else before
        out = model(x, torch.tensor([t, t]), None)
        x0 = {"epsilon": (x - (1 - ab) ** 0.5 * out) / ab ** 0.5, "sample": out,
              "v_prediction": ab ** 0.5 * x - (1 - ab) ** 0.5 * out}[predicts]
        eps = (x - ab ** 0.5 * x0) / (1 - ab) ** 0.5
        x = before ** 0.5 * x0 + (1 - before) ** 0.5 * eps
    assert (got - x).norm() < 1e-4 * x.norm()


@pytest.mark.parametrize("spacing", [("leading", 1, False), ("trailing", 0, True)])
def test_chains_of_every_length_begin_and_end_as_asked(spacing):
    """One step, all steps, and the weakest image-to-image still call the model at least once."""
    process = GaussianDiffusion(schedule="scaled_linear", spacing=spacing)
    for sampler, steps, strength in (("ddim", 1, 1), ("ddpm", 1000, 1), ("dpm++", 7, 1),
                                     ("ddim", 30, 1), ("ddim", 50, 0.0005)):
        chain, path = process.path(sampler, steps, strength)
        assert len(path) > 1 and path[-1] == (-1 if spacing[2] else 0, 0.0)
        assert [t for t, _ in path] == sorted({t for t, _ in path}, reverse=True)
        assert path[0][0] == chain.steps - 1
    assert process.path("ddim", 30)[0].timestep_map[-1] == (958 if spacing[0] == "leading" else 999)


def test_a_dit_folder_of_diffusers(tmp_path):
    """Names as DiTTransformer2DModel of diffusers 0.42 saves them: each block has a copy of the
    embedders. Its forward equals ours to 3e-6 once its timestep frequencies are those of DiT's
    code, 10000^(-k / 128); as it is, it divides by 127, and differs by 13 % on random weights."""
    dit = fill_by_recipe(DiT(input_size=16, in_channels=4, hidden_size=64, depth=2, num_heads=4,
                             num_classes=3, learn_sigma=True), ["pos_embed"])
    state, theirs = dit.state_dict(), {}
    for name in ("weight", "bias"):
        for new, old in {"pos_embed.proj": "x_embedder.proj", "proj_out_2": "final_layer.linear",
                         "proj_out_1": "final_layer.adaLN_modulation.1"}.items():
            theirs[f"{new}.{name}"] = state[f"{old}.{name}"]
        for block in range(2):
            new, old = f"transformer_blocks.{block}", f"blocks.{block}"
            q, k, v = state[f"{old}.attn.qkv.{name}"].chunk(3)
            theirs |= {f"{new}.attn1.to_{x}.{name}": w for x, w in zip("kvq", (k, v, q))}
            theirs |= {f"{new}.{leaf}.{name}": state[f"{old}.{ours}.{name}"] for leaf, ours in {
                "norm1.linear": "adaLN_modulation.1", "attn1.to_out.0": "attn.proj",
                "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2"}.items()}
            embedder = f"{new}.norm1.emb.timestep_embedder.linear_"
            theirs |= {f"{embedder}{k + 1}.{name}": state[f"t_embedder.mlp.{2 * k}.{name}"]
                       for k in range(2)}
            theirs[f"{new}.norm1.emb.class_embedder.embedding_table.weight"] = state[
                "y_embedder.embedding_table.weight"]
    folder = tmp_path / "transformer"
    write(folder / "diffusion_pytorch_model.safetensors", theirs)
    (folder / "config.json").write_text('{"num_attention_heads": 4, "sample_size": 16, '
                                        '"attention_head_dim": 16, "norm_eps": 1e-05}')
    assert len(theirs) == 2 * 19 + 6 and len(state) == 2 * 10 + 12
    what, parts, said = pretrained.read_official(tmp_path)
    assert what == "a DiT of diffusers" and said["dit"] == {"num_heads": 4, "input_size": 16}
    same(parts, {"dit": {name: w for name, w in state.items() if name != "pos_embed"}})
    model = official_task(tmp_path, None, torch.float32, None, None).model
    same({"": model.state_dict()}, {"": state})
    assert model.blocks[0].attn.num_heads == 4
    theirs["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] = torch.ones(64)
    with pytest.raises(ValueError, match="linear_1.bias is not that of block 0"):
        pretrained.rename_dit(theirs)


@pytest.mark.parametrize("end", [".bin", ".safetensors"])
def test_custom_diffusion_as_diffusers_saves_it(end, tmp_path, states):
    """Names as save_attn_procs of diffusers 0.42 writes them: without safetensors, an empty dict
    for each self-attention as well. The words are files beside it. By the file or its folder."""
    theirs = {theirs: ours for ours, theirs in zip(
        states["unet"], unet_names(states["unet"])) if ".attn2." in ours}
    ours = {mine: states["unet"][mine] + 1 for mine in theirs.values()}
    saved = {re.sub(r"\.(to_\w+)\.", r".processor.\1_custom_diffusion.", name): ours[mine]
             for name, mine in theirs.items()}
    row, path = torch.randn(64), tmp_path / f"pytorch_custom_diffusion_weights{end}"
    if end == ".bin":
        torch.save({"down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor": {}} | saved,
                   path)
    else:
        write_safetensors(path, saved)
    write(tmp_path / f"<new1>{end}", {"<new1>": row})
    for place in (path, tmp_path):
        W, rows = parts_of(place)["concept"]
        same({"W": W, "rows": rows}, {"W": ours, "rows": {"<new1>": row}})
    W, rows = parts_of(tmp_path / f"<new1>{end}")["concept"]
    assert not W and [*rows] == ["<new1>"]


def test_a_compressed_delta_of_the_official_code(tmp_path):
    """Its compress.py puts {"u", "v"} in place of a matrix, beside what it leaves whole."""
    name, u, v, rows = "input_blocks.1.1.x.attn2.to_k.weight", torch.ones(4, 1), torch.ones(1, 3), (
        torch.randn(2, 3))
    torch.save({"state_dict": {f"model.diffusion_model.{name}": {"u": u, "v": v}, "embed": rows}},
               tmp_path / "compressed_delta.ckpt")
    W, words = parts_of(tmp_path / "compressed_delta.ckpt")["concept"]
    same({"": W.pop(name)}, {"": {"u": u, "v": v}})
    assert not W and torch.equal(torch.stack([words["<new1>"], words["<new2>"]]), rows)


THEIR_CONFIG = """model:
  scale: 9
  params:
    unet_config:
      params:
        adapter_config: # where
          {kind}_adp_config:
            - type: inout # of several entries the last counts
              din: transo
              dout: transo
              scale: 5.0
            - type: inout
              din: {din}
              dout: {dout} #
              mid_dim: {mid_dim}
              method: "{method}"
              # scale: 3.0
              scale: {scale}
    first_stage_config:
      scale: 7"""


def write_their_adapter(folder, tensors, said):
    """{name in their U-Net: tensor} as its save_adapter_to_dir does: a file for every module that
    has "adapter" in its name, so a transformer block's twice; and its config beside, as training
    leaves it."""
    files = {}
    for name, w in tensors.items():
        for end in ("adapter_inout", "adapter_inout.adp", "adapter"):
            if f".{end}." in name:
                block, rest = name.split(f".{end}.")
                files.setdefault(f"{block}.{end}.pt", {})[rest] = w
    for file, state in files.items():
        write(folder / file, state)
    config = folder.parent.parent / "configs/2023-04-01T12-00-00-project.yaml"
    config.parent.mkdir()
    config.write_text(THEIR_CONFIG.format(**said))
    return config


@pytest.mark.parametrize("case", ["attn1i_transo", "attn2c_attn2c", "attn2o_ffni", "resi_reso"])
def test_an_adapter_of_unet_finetune_computes_the_official_numbers(case, tmp_path):
    """Read from the folders that its training leaves; the output is that of the official code. With
    folders that the official code wrote, outputs of its 20 configs differ by at most 2e-6."""
    d, g = golden_case(f"adapter_unet_{case}")
    (kind, said), state = next(iter(d["config"]["adapter_config"].items())), {}
    fill_by_recipe(types.SimpleNamespace(
        state_dict=lambda: {name: torch.zeros(shape) for name, shape in d["params"]},
        load_state_dict=lambda filled, strict: state.update(filled)))
    folder = tmp_path / "checkpoints/500-adapters"
    config = write_their_adapter(folder, {k: w for k, w in state.items() if "adapter" in k},
                                 {**said, "kind": kind})
    unet = UNet(**{key: d["config"][key] for key in (
        "in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks",
        "attention_resolutions", "num_heads", "context_dim")})
    unet.load_state_dict({name: w for name, w in state.items() if "adapter" not in name})
    model, found = torch.nn.ModuleDict({"denoiser": unet}), read_adapter(folder)
    bare = copy.deepcopy(model)
    assert found["spec"]["scale"] == said["scale"]
    load_adapters(model, found)
    with torch.no_grad():
        got = unet(g["in_x"], g["in_t"], g["in_context"])
    assert (got - g["out_out"]).abs().max() < 1e-3 * g["out_out"].abs().max()
    good = config.read_text()
    for content, words in (("", "by .*its.yaml .KeyError"), (
            good.replace(said["din"], "attn3"), "attn3"), (
            good.replace(f"mid_dim: {said['mid_dim']}", "mid_dim: 7"), "tensors differ"), (
            good.replace(f'"{said["method"]}"', "tanh"), "unknown activation 'tanh'")):
        (folder / "its.yaml").write_text(content)           # one inside comes first
        with pytest.raises(ValueError, match=words):
            load_adapters(bare, read_adapter(folder))
    (folder / "its.yaml").unlink(), config.unlink()
    with pytest.raises(ValueError, match="500-adapters is an adapter .* put the config"):
        read_adapter(folder)
    assert read_adapter(tmp_path) is read_adapter(config) is None


def unet_names(state):
    """diffusers' name of each of our U-Net's names, in order."""
    numbered = {name: torch.full((1,), float(k)) for k, name in enumerate(state)}
    order = unet_to_diffusers(numbered)
    return sorted(order, key=lambda name: order[name].item())


def test_words_of_textual_inversion_in_each_form(tmp_path):
    """learned_embeds of diffusers; string_to_param, a ParameterDict, of the first code, and a plain
    dict of the web interface, with more rows; emb_params. The first names its word, else the file
    does, as the web interface has it."""
    one, two = torch.randn(6), torch.randn(2, 6)
    table = torch.nn.ParameterDict({"*": torch.nn.Parameter(two)})
    token = {"string_to_token": {"*": torch.tensor(265)}, "name": "x", "step": 9}
    files = {"learned_embeds.bin": ({"<cat-toy>": one.half()}, {"<cat-toy>": one.half().float()}),
             "learned_embeds.safetensors": ({"<b>": one}, {"<b>": one}),
             "My style (2).pt": (token | {"string_to_param": table},
                                 {"<My-style-2->": two[0], "<My-style-2->_1": two[1]}),
             "a.pt": (token | {"string_to_param": {"*": two[:1]}}, {"<a>": two[0]}),
             "none.pt": ({"emb_params": two[:0]}, {}),
             "e.safetensors": ({"emb_params": two}, {"<e>": two[0], "<e>_1": two[1]})}
    for name, (content, want) in files.items():
        safe = name.endswith("safetensors")
        write_safetensors(tmp_path / name, content) if safe else torch.save(
            content, tmp_path / name)
        W, rows = parts_of(tmp_path / name)["concept"]
        same({"": W, "rows": rows}, {"": {}, "rows": want})
    folder = tmp_path / "folder"
    write(folder / "learned_embeds.safetensors", {"<b>": one})
    assert [*parts_of(folder)["concept"][1]] == ["<b>"]
    with pytest.raises(ValueError, match="a.pt is a word of textual inversion: it has no Auto"):
        pretrained.load_first_stage(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="say --ckpt BASE --concept .*a.pt"):
        official_task(tmp_path / "a.pt", None, torch.float32, None, None)


def test_an_unknown_file_says_what_is_in_it(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a.b": torch.ones(1), "c": torch.ones(2)})
    with pytest.raises(ValueError, match="of no kind known here, .* it has names such as a.b, c"):
        parts_of(tmp_path / "x.safetensors")


def test_a_sit_is_told_from_a_dit_by_the_variance_that_it_never_learned():
    """Its code drops the second half of the channels, so their weights stay at their first 0."""
    dit = fill_by_recipe(DiT(input_size=8, in_channels=4, hidden_size=64, depth=1, num_heads=2,
                             num_classes=3, learn_sigma=True), ["pos_embed"])
    state = dit.state_dict()
    assert pretrained.infer_dit(state)["learn_sigma"]
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-2, weight_decay=0)
    with torch.no_grad():
        dit.final_layer.linear.weight.zero_(), dit.final_layer.linear.bias.zero_()
    assert pretrained.infer_dit(dit.state_dict())           # nothing learned yet: a DiT as well
    for _ in range(2):                                      # as the flow of a SiT is trained
        out = dit(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1]))
        optimizer.zero_grad(), (out.chunk(2, dim=1)[0] - 1).square().mean().backward()
        optimizer.step()
    with pytest.raises(ValueError, match="a SiT, or another DiT whose variance was never trained"):
        pretrained.infer_dit(dit.state_dict())


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_damaged_weights_are_refused_and_nothing_else_fails(name, tmp_path, states):
    """A safetensors file has no checksum: a flipped bit of a number cannot be noticed there."""
    write(tmp_path / name, states["text"])
    good, rng, refused = (tmp_path / name).read_bytes(), random.Random(0), 0
    for number in range(15):
        body = bytearray(good)
        for place in rng.sample(range(len(good)), 2 if number % 2 else len(good) // 10):
            body[place] ^= 1 << rng.randrange(8)
        body = body[:rng.randrange(len(good))] if number % 5 == 0 else body
        (tmp_path / name).write_bytes(body)
        try:
            found = pretrained.read_weights(tmp_path / name)
            if name == "x.bin":
                same({"": found}, {"": states["text"]})
        except ValueError as error:
            assert name in str(error) and "\n" not in str(error)
            refused += 1
    assert refused >= 7


@pytest.mark.parametrize("length, header", [
    (1 << 50, b"{}"), ((1 << 64) - 1, b"{}"),
    (None, b'{"a": {"dtype": "F32", "shape": [1125899906842624], "data_offsets": [0, 1]}}'),
    (None, b'{"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, -16]}}'),
    (None, b'{"a": {"dtype": "U8", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 1]}}'),
    (None, b'{"a": ' + b"[" * 100_000)])
def test_a_header_that_promises_too_much_takes_no_memory(length, header, tmp_path):
    path, length = tmp_path / "x.safetensors", len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(16))
    tracemalloc.start()
    with pytest.raises(ValueError, match="x.safetensors is missing, truncated, damaged") as error:
        pretrained.read_weights(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 ** 24 and "\n" not in str(error.value)


class Hostile:
    """Its pickle makes a file when it is loaded by an unsafe reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_files_of_trainers_are_read_without_them_and_nothing_is_run(tmp_path, monkeypatch):
    """Lightning's objects beside SD v1's weights, as published; the Namespace, folder and numpy
    numbers of DiT's and U-DiT's own training. Python's own functions are refused."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    weights, hostile = {"a.b": torch.randn(2, 3)}, Hostile(str(tmp_path / "ran"))
    flags = argparse.Namespace(lr=1e-4, results=tmp_path, best=np.float64(3), seen=np.arange(3))
    with monkeypatch.context() as patch:                # only while the files are written
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            patch.setitem(sys.modules, part, types.SimpleNamespace(ModelCheckpoint=callback))
        for file, content in {
                "sd.ckpt": {"state_dict": weights, "callbacks": {callback: {"best": callback()}}},
                "dit.pt": {"model": {}, "ema": weights, "opt": {"state": {}}, "args": flags},
                "bad.ckpt": {"state_dict": weights, "callbacks": {callback: hostile}},
                "old.ckpt": {"state_dict": weights, "args": flags}}.items():
            torch.save(content, tmp_path / file,
                       _use_new_zipfile_serialization=file != "old.ckpt")
    for file in ("sd.ckpt", "dit.pt"):
        same({"": pretrained.read_weights(tmp_path / file)}, {"": weights})
    for file in ("bad.ckpt", "old.ckpt"):
        with pytest.raises(ValueError, match=f"{file} holds more than tensors") as error:
            pretrained.read_weights(tmp_path / file)
    assert not (tmp_path / "ran").exists()
    # the cure of the message works as printed
    path, new = tmp_path / "old.ckpt", tmp_path / "new.pt"
    exec(str(error.value).partition("if you trust it, ")[2], dict(torch=torch, path=path, new=new))
    same({"": pretrained.read_weights(new)}, {"": weights})
