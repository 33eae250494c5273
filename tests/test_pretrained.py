"""weights.py: files of every published form, shrunk but of the full structure, come back tensor for tensor."""
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch

import weights
from conftest import fill_by_recipe
from text import TextEncoder
from unet import UNet
from vae import AutoencoderKL

UNET = dict(in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=1,
            attention_resolutions=(1, 2), num_heads=8, transformer_depth=1, context_dim=64)
VAE = dict(channels=32, multipliers=(1, 2, 2), res_blocks=1, in_channels=3, z_channels=4)
TEXT = dict(vocab_size=50, max_length=9, hidden_size=64, depth=2, num_heads=1, mlp_ratio=4.0)
PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.transformer."}


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
    state = {PREFIX[part] + name: tensor for part, tensors in states.items() for name, tensor in tensors.items()}
    return state | {"betas": torch.rand(1000), "alphas_cumprod": torch.rand(1000), "scale_factor": torch.tensor(0.2),
                    "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7),
                    "model_ema.diffusion_modelinput_blocks00weight": torch.rand(3),
                    "first_stage_model.loss.logvar": torch.zeros(()),
                    "first_stage_model.model_ema.decay": torch.ones(()),
                    "first_stage_model.loss.perceptual_loss.net.slice1.0.weight": torch.rand(2, 2),
                    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(9)[None],
                    "cond_stage_model.logit_scale": torch.ones(())}


def outputs(models, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (2, 9), generator=g)
    x, image = (torch.randn(s, generator=g).to(dtype) for s in ((2, 4, 8, 8), (1, 3, 16, 16)))
    with torch.no_grad():
        context = models["text"](ids)
        return dict(text=context, unet=models["unet"](x, torch.tensor([3, 800]), context),
                    encode=models["vae"].encode(image), decode=models["vae"].decode(x[:1]))


# ----------------------------------------------------------------------------------------------------------------------
# the names of diffusers, written down by hand: this side knows nothing of the rule under test

BLOCKS = {                              # the shrunk U-Net: three levels of one block, the lowest without attention
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
    "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0", "up_blocks.1.attentions.1": "output_blocks.3.1",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.3.2.conv",
    "up_blocks.2.resnets.0": "output_blocks.4.0", "up_blocks.2.attentions.0": "output_blocks.4.1",
    "up_blocks.2.resnets.1": "output_blocks.5.0", "up_blocks.2.attentions.1": "output_blocks.5.1"}
SD_BLOCKS = {                                               # Stable Diffusion v1
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
    "up_blocks.0.resnets.2": "output_blocks.2.0", "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
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
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
TRANSFORMER = ["norm", "proj_in", "proj_out", *("transformer_blocks.0." + leaf for leaf in (
    "norm1", "norm2", "norm3", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k",
    "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"))]
VAE_BLOCKS = {                                              # the shrunk autoencoder: three levels, one block each
    "encoder.conv_in": "encoder.conv_in", "encoder.conv_norm_out": "encoder.norm_out",
    "encoder.conv_out": "encoder.conv_out", "quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv",
    "encoder.down_blocks.0.resnets.0": "encoder.down.0.block.0",
    "encoder.down_blocks.0.downsamplers.0.conv": "encoder.down.0.downsample.conv",
    "encoder.down_blocks.1.resnets.0": "encoder.down.1.block.0",
    "encoder.down_blocks.1.downsamplers.0.conv": "encoder.down.1.downsample.conv",
    "encoder.down_blocks.2.resnets.0": "encoder.down.2.block.0",
    "encoder.mid_block.resnets.0": "encoder.mid.block_1", "encoder.mid_block.resnets.1": "encoder.mid.block_2",
    "encoder.mid_block.attentions.0": "encoder.mid.attn_1",
    "decoder.conv_in": "decoder.conv_in", "decoder.conv_norm_out": "decoder.norm_out",
    "decoder.conv_out": "decoder.conv_out",
    "decoder.mid_block.resnets.0": "decoder.mid.block_1", "decoder.mid_block.resnets.1": "decoder.mid.block_2",
    "decoder.mid_block.attentions.0": "decoder.mid.attn_1",
    "decoder.up_blocks.0.resnets.0": "decoder.up.2.block.0", "decoder.up_blocks.0.resnets.1": "decoder.up.2.block.1",
    "decoder.up_blocks.0.upsamplers.0.conv": "decoder.up.2.upsample.conv",
    "decoder.up_blocks.1.resnets.0": "decoder.up.1.block.0", "decoder.up_blocks.1.resnets.1": "decoder.up.1.block.1",
    "decoder.up_blocks.1.upsamplers.0.conv": "decoder.up.1.upsample.conv",
    "decoder.up_blocks.2.resnets.0": "decoder.up.0.block.0", "decoder.up_blocks.2.resnets.1": "decoder.up.0.block.1"}
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
VAE_NEW = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_OLD = {"group_norm": "norm", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}


def to_diffusers(state, blocks, resnet, attention, linear=()):
    """The official state under diffusers' names, each tensor used once; weights named in `linear` lose their 1x1."""
    out, left = {}, dict(state)
    for theirs, ours in blocks.items():
        leaves = resnet if ".resnets." in theirs else attention if ".attentions." in theirs else {"": ""}
        for their_leaf, our_leaf in leaves.items():
            for kind in ("weight", "bias"):
                name = ".".join(filter(None, (ours, our_leaf, kind)))
                if name in left:
                    tensor = left.pop(name)
                    drop = our_leaf in linear and kind == "weight"
                    out[".".join(filter(None, (theirs, their_leaf, kind)))] = tensor[:, :, 0, 0] if drop else tensor
    assert not left, list(left)
    return out


def unet_to_diffusers(state, blocks=BLOCKS, linear=()):
    return to_diffusers(state, blocks, RESNET, {name: name for name in TRANSFORMER}, linear)


def vae_to_diffusers(state, attention=VAE_NEW):
    return to_diffusers(state, VAE_BLOCKS, VAE_RESNET, attention, linear=("q", "k", "v", "proj_out"))


def write(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    weights.write_safetensors(path, state) if path.suffix == ".safetensors" else torch.save(state, path)


# ----------------------------------------------------------------------------------------------------------------------
# files

def test_safetensors_round_trip_of_every_dtype_and_layout(tmp_path):
    path, g = tmp_path / "a.safetensors", torch.Generator().manual_seed(0)
    floats = torch.randn(4, 6, generator=g)
    tensors = {str(dtype): floats.to(dtype) for dtype in weights.DTYPES.values() if dtype.is_floating_point}
    tensors |= {str(dtype): torch.randint(0, 100, (3, 5), generator=g).to(dtype) for dtype in weights.DTYPES.values()
                if not dtype.is_floating_point and dtype != torch.bool}
    tensors |= {"bool": floats > 0, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3), "turned": floats.T,
                "every other": floats[:, ::2], "spread": torch.ones(1).expand(5), "a \"quoted\" näme": torch.ones(2),
                "parameter": torch.nn.Parameter(torch.ones(2))}
    weights.write_safetensors(path, tensors)
    same({"": weights.read_safetensors(path)}, {"": {k: v.detach() for k, v in tensors.items()}})
    assert os.listdir(tmp_path) == ["a.safetensors"]                    # no temporary file stays
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    assert (8 + length) % 8 == 0 and json.loads(raw[8:8 + length])["__metadata__"] == {"format": "pt"}
    weights.write_safetensors(path, {})
    assert weights.read_safetensors(path) == {}


def test_safetensors_written_by_hand_without_alignment(tmp_path):
    """The format as described, not as our writer writes it: odd header length, header order unlike the data's."""
    header = (b'{"b":{"dtype":"F32","shape":[2],"data_offsets":[3,11]},'
              b'"a":{"shape":[3],"dtype":"U8","data_offsets":[0,3]},"__metadata__":{"x":"y"},'
              b'"c":{"dtype":"BF16","shape":[],"data_offsets":[11,13]}}')
    header += b" " * (1 - len(header) % 2)                              # an odd length
    path = tmp_path / "a.safetensors"
    data = bytes([7, 8, 9]) + struct.pack("<2f", 1.5, -2) + struct.pack("<H", 0x3FC0)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    got = weights.read_safetensors(path)
    assert got["a"].tolist() == [7, 8, 9] and got["b"].tolist() == [1.5, -2] and got["c"].item() == 1.5
    assert got["c"].shape == () and got["c"].dtype == torch.bfloat16 and got["b"].data_ptr() % 4 == 0


def test_mapped_tensors_do_not_touch_the_file_and_save_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    weights.write_safetensors(path, {"small": torch.ones(4), "large": torch.zeros(100_000)})
    before, got = path.read_bytes(), weights.read_safetensors(path)
    got["small"].mul_(2)
    weights.write_safetensors(path, got)                                # onto the very file that is mapped
    assert path.read_bytes() != before and weights.read_safetensors(path)["small"].tolist() == [2] * 4
    assert got["small"].tolist() == [2] * 4 and not got["large"].any()
    torch.save(got["small"], tmp_path / "small.pt")
    assert (tmp_path / "small.pt").stat().st_size < 10_000


def hand(path, header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("header, size, message", [
    (b"{]", 0, "is damaged, or no safetensors file"),
    (b"\xff\xfe{}", 0, "is damaged, or no safetensors file"),
    (b"[" * 100_000, 0, "is damaged, or no safetensors file"),
    (b"[1]", 0, "its header is a list"),
    (b'{"w": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}, "w": {}}', 1, "'w' appears twice"),
    ({"w": 3}, 0, "tensor 'w' has no valid shape and data_offsets: "),
    ({"w": {"dtype": "F32", "shape": [2]}}, 8, "tensor 'w' has no valid shape"),
    ({"w": GOOD | {"shape": [-2]}}, 8, "tensor 'w' has no valid shape"),
    ({"w": GOOD | {"shape": [2.0]}}, 8, "tensor 'w' has no valid shape"),
    ({"w": GOOD | {"shape": [True, 2]}}, 8, "tensor 'w' has no valid shape"),
    ({"w": GOOD | {"shape": [0, 2 ** 40, 2 ** 40], "data_offsets": [0, 0]}}, 0, "tensor 'w' has no valid shape"),
    ({"w": GOOD | {"data_offsets": [0, 4, 8]}}, 8, "tensor 'w' has no valid shape"),
    ({"w": GOOD | {"dtype": "F8_E4M3"}}, 8, "tensor 'w' has dtype 'F8_E4M3', readable are F64, F32"),
    ({"w": GOOD | {"dtype": ["F32"]}}, 8, "tensor 'w' has dtype"),
    ({"w": GOOD | {"shape": [3]}}, 8, r"tensor 'w': \[3\] x F32 takes 12 bytes, its data_offsets \[0, 8\] hold 8"),
    ({"w": GOOD | {"data_offsets": [8, 0]}}, 8, "tensor 'w': .* hold -8"),
    ({"w": GOOD}, 7, "tensor 'w' ends at byte 8 of 7: the file is truncated"),
    ({"w": GOOD, "v": GOOD}, 8, "tensor 'v' begins at byte 0, the one before it ends at 8: they overlap"),
    ({"w": GOOD, "v": GOOD | {"data_offsets": [4, 12]}}, 12, "tensor 'v' begins at byte 4"),
    ({"w": GOOD, "v": GOOD | {"data_offsets": [12, 20]}}, 20, "tensor 'v' begins at byte 12, .* data is missing"),
    ({"w": GOOD}, 9, "holds 1 bytes after its last tensor"),
])
def test_bad_safetensors(tmp_path, header, size, message):
    with pytest.raises(ValueError, match=message) as error:
        weights.read_safetensors(hand(tmp_path / "bad.safetensors", header, bytes(size)))
    assert "bad.safetensors" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_every_truncation_of_a_safetensors_file_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    weights.write_safetensors(path, {"w": torch.ones(3), "n": torch.arange(2)})
    raw = path.read_bytes()
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        with pytest.raises(ValueError, match="truncated"):
            weights.read_safetensors(path)
    path.write_bytes(struct.pack("<Q", 2 ** 60) + raw[8:])
    with pytest.raises(ValueError, match=f"names a header of {2 ** 60}: it is truncated, or no safetensors file"):
        weights.read_safetensors(path)
    with pytest.raises(ValueError, match="no file at"):
        weights.read_safetensors(tmp_path / "none.safetensors")


def test_bad_writes_leave_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    weights.write_safetensors(path, {"w": torch.ones(1)})
    with pytest.raises(ValueError, match="'z' has dtype torch.complex64, writable are F64"):
        weights.write_safetensors(path, {"w": torch.zeros(1), "z": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(RuntimeError):                                   # no storage to write, noticed half-way
        weights.write_safetensors(path, {"w": torch.zeros(1), "z": torch.zeros(1, device="meta", dtype=torch.half)})
    assert weights.read_safetensors(path)["w"].tolist() == [1] and os.listdir(tmp_path) == ["a.safetensors"]
    with pytest.raises(ValueError, match="no folder .*nowhere: make it first"):
        weights.write_safetensors(tmp_path / "nowhere" / "a.safetensors", {})


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s},
                                  lambda s: {"model": {k: 0 * v for k, v in s.items()}, "ema": s, "opt": {0: {}}}])
def test_torch_files_are_unwrapped_and_prefixes_stripped(tmp_path, wrap):
    state = {"a.weight": torch.randn(3, 2), "b": torch.arange(3)}
    for name, prefix in (("x.ckpt", ""), ("x.pt", "module."), ("x.bin", "module._orig_mod."), ("x", "_orig_mod.")):
        torch.save(wrap({prefix + k: v for k, v in state.items()} | {"note": "no tensor"}), tmp_path / name)
        same({"": weights.read_weights(tmp_path / name)}, {"": state})
    torch.save(wrap(state), tmp_path / "old", _use_new_zipfile_serialization=False)     # before torch 1.6
    same({"": weights.read_weights(tmp_path / "old")}, {"": state})


class Callback:                                                         # as Lightning's in the published sd-v1-4.ckpt
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_bad_torch_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for zipped in (True, False):
        torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": Callback()}, "a.ckpt",
                   _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="a.ckpt holds more than tensors .* Take its .safetensors edition, or if "
                                             "you trust its source, convert it: x = torch.load") as error:
            weights.read_weights("a.ckpt")
        assert "\n" not in str(error.value) and not os.path.exists("executed")
    torch.save({"w": torch.ones(1000)}, "b.ckpt")
    raw = open("b.ckpt", "rb").read()
    for bad in (raw[:-300], raw[:1000], b"", b"<html>not found</html>" * 50, b"garbage", raw[2000:]):
        open("c.ckpt", "wb").write(bad)
        with pytest.raises(ValueError, match="c.ckpt is not readable as a torch file") as error:
            weights.read_weights("c.ckpt")
        assert "\n" not in str(error.value)
    with zipfile.ZipFile("d.ckpt", "w") as z:
        z.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="d.ckpt is not readable as a torch file"):
        weights.read_weights("d.ckpt")
    for nothing in ([torch.ones(2)], torch.ones(2), {"state_dict": {}}, {"epoch": 3}):
        torch.save(nothing, "e.ckpt")
        with pytest.raises(ValueError, match="e.ckpt holds no named tensors"):
            weights.read_weights("e.ckpt")
    with pytest.raises(ValueError, match="no file at none.ckpt"):
        weights.read_weights("none.ckpt")
    with pytest.raises(ValueError, match="is a folder: read_diffusers"):
        weights.read_weights(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# CompVis files

@pytest.mark.parametrize("name", ["sd.ckpt", "sd.safetensors"])
def test_compvis_file_to_models(tmp_path, models, states, name):
    state, path = compvis(states), tmp_path / name
    torch.save({"state_dict": state, "global_step": 1}, path) if name.endswith("ckpt") else write(path, state)
    parts = weights.split_compvis(weights.read_weights(path))
    same(parts, states)
    built = weights.build(parts)
    for (name, got), want in zip(outputs(built).items(), outputs(models).values()):
        assert torch.equal(got, want), name
    for part, model in built.items():                                   # taken over, not copied
        assert all(p.data_ptr() == parts[part][k].data_ptr() and p.requires_grad for k, p in model.named_parameters())


def test_parts_alone_and_bare_files(states):
    for part, state in states.items():
        same(weights.split_compvis({PREFIX[part] + k: v for k, v in state.items()}), {part: state})
        same(weights.split_compvis(state), {part: state})
    junk = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(()), "loss.discriminator.main.0.weight":
            torch.ones(2)}
    same(weights.split_compvis(states["vae"] | junk), {"vae": states["vae"]})


def test_bare_vae_under_state_dict(tmp_path, states):
    torch.save({"state_dict": states["vae"] | {"loss.logvar": torch.zeros(())}}, tmp_path / "vae-ft-mse.ckpt")
    same(weights.split_compvis(weights.read_weights(tmp_path / "vae-ft-mse.ckpt")), {"vae": states["vae"]})


def test_text_names_without_text_model_and_linear_projections(states):
    short = {PREFIX["text"] + k.removeprefix("text_model."): v for k, v in states["text"].items()}
    linear = {PREFIX["unet"] + k: v[:, :, 0, 0] if k.endswith(("proj_in.weight", "proj_out.weight")) else v
              for k, v in states["unet"].items()}
    same(weights.split_compvis(short | linear), {"unet": states["unet"], "text": states["text"]})


def test_files_of_other_models_are_named(states):
    for name in ("cond_stage_model.model.ln_final.weight", "conditioner.embedders.0.transformer.x"):
        with pytest.raises(ValueError, match=f"{name} belongs to the text encoder of Stable Diffusion 2 or XL"):
            weights.split_compvis(compvis(states) | {name: torch.ones(1)})
    with pytest.raises(ValueError, match="no part of Stable Diffusion in this file: names such as a.b"):
        weights.split_compvis({"a.b": torch.ones(1)})
    with pytest.raises(ValueError, match="for a diffusers folder: read_diffusers"):
        weights.split_compvis(vae_to_diffusers(states["vae"]))


# ----------------------------------------------------------------------------------------------------------------------
# diffusers folders

@pytest.mark.parametrize("stems, suffix, attention, linear", [
    (("diffusion_pytorch_model", "model"), ".safetensors", VAE_NEW, ()),
    (("diffusion_pytorch_model", "pytorch_model"), ".bin", VAE_OLD, ("proj_in", "proj_out")),
    (("diffusion_pytorch_model", "model"), ".fp16.safetensors", VAE_OLD, ()),
    (("diffusion_pytorch_model", "pytorch_model"), ".fp16.bin", VAE_NEW, ("proj_in", "proj_out"))])
def test_diffusers_folder_to_models(tmp_path, models, states, stems, suffix, attention, linear):
    half = "fp16" in suffix
    want = {part: {k: v.half() if half else v for k, v in state.items()} for part, state in states.items()}
    write(tmp_path / "unet" / (stems[0] + suffix), unet_to_diffusers(want["unet"], linear=linear))
    write(tmp_path / "vae" / (stems[0] + suffix), vae_to_diffusers(want["vae"], attention))
    write(tmp_path / "text_encoder" / (stems[1] + suffix),
          want["text"] | {"text_model.embeddings.position_ids": torch.arange(9)[None]})
    parts = weights.read_diffusers(tmp_path)
    same(parts, want)
    built = weights.build(parts, dtype=torch.float32)
    filled = weights.build(want, dtype=torch.float32) if half else models
    for (name, got), expected in zip(outputs(built).items(), outputs(filled).values()):
        assert torch.equal(got, expected), name


def test_diffusers_folder_of_one_part_and_the_choice_of_file(tmp_path, states):
    vae, unet = vae_to_diffusers(states["vae"]), unet_to_diffusers(states["unet"])
    write(tmp_path / "sd-vae-ft-ema" / "diffusion_pytorch_model.bin", vae)
    same(weights.read_diffusers(tmp_path / "sd-vae-ft-ema"), {"vae": states["vae"]})
    write(tmp_path / "some-unet" / "diffusion_pytorch_model.safetensors", unet)
    same(weights.read_diffusers(str(tmp_path / "some-unet")), {"unet": states["unet"]})
    zero = {k: 0 * v for k, v in vae.items()}                           # full precision wins, then safetensors
    for name, state in (("fp16.safetensors", zero), ("safetensors", vae), ("bin", zero), ("fp16.bin", zero)):
        write(tmp_path / "pipe" / "vae" / f"diffusion_pytorch_model.{name}", state)
    same(weights.read_diffusers(tmp_path / "pipe"), {"vae": states["vae"]})


def test_bad_diffusers_folders(tmp_path, states):
    with pytest.raises(ValueError, match="no folder at .*nowhere"):
        weights.read_diffusers(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no diffusers folder: it has no sub-folder unet, vae or text_encoder"):
        weights.read_diffusers(tmp_path)
    (tmp_path / "text_encoder").mkdir()
    with pytest.raises(ValueError, match="text_encoder holds neither model.safetensors nor pytorch_model.bin"):
        weights.read_diffusers(tmp_path)
    unet, vae = unet_to_diffusers(states["unet"]), vae_to_diffusers(states["vae"])
    extra = torch.ones(2, 3)
    for name in ("add_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv3.weight",
                 "down_blocks.0.oddities.0.x.bias", "down_blocks.0.downsamplers.0.norm.weight", "x"):
        with pytest.raises(ValueError, match=rf"{name} \(2, 3\) is no name of a U-Net of the SD-v1 family"):
            weights.rename_unet(unet | {name: extra})
    for name in ("encoder.conv_mid.weight", "encoder.mid_block.attentions.0.to_r.weight", "quant_conv", "x"):
        with pytest.raises(ValueError, match=rf"{name} \(2, 3\) is no name of an AutoencoderKL"):
            weights.rename_vae(vae | {name: extra})
    with pytest.raises(ValueError, match="query.weight .* a second one for encoder.mid.attn_1.q.weight"):
        weights.rename_vae(vae | {"encoder.mid_block.attentions.0.query.weight": extra})


def test_all_686_names_of_the_real_unet_one_to_one_from_diffusers():
    with torch.device("meta"):
        official = UNet().state_dict()
    theirs = unet_to_diffusers(official, SD_BLOCKS)
    assert len(official) == len(theirs) == 686
    # figures of the public unet/config.json and papers/unet.md's table, which our names have no part in
    for name, shape in {"down_blocks.2.resnets.0.conv1.weight": (1280, 640, 3, 3),
                        "up_blocks.1.resnets.2.conv1.weight": (1280, 1920, 3, 3),
                        "up_blocks.3.resnets.0.conv_shortcut.weight": (320, 960, 1, 1),
                        "up_blocks.3.resnets.2.conv_shortcut.weight": (320, 640, 1, 1),
                        "up_blocks.2.upsamplers.0.conv.weight": (640, 640, 3, 3),
                        "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k.weight": (640, 768),
                        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.bias": (10240,),
                        "time_embedding.linear_2.weight": (1280, 1280)}.items():
        assert tuple(theirs[name].shape) == shape
    assert sum(".conv_shortcut." in name for name in theirs) == 2 * 14
    back = weights.rename_unet(theirs)
    assert back.keys() == official.keys()
    assert all(back[name] is official[name] for name in official)       # the very tensor, not one of equal shape
    assert weights.infer_unet(back) == dict(
        in_channels=4, out_channels=4, model_channels=320, channel_mult=(1, 2, 4, 4), num_res_blocks=2,
        attention_resolutions=(1, 2, 4), num_heads=8, transformer_depth=1, context_dim=768)


# ----------------------------------------------------------------------------------------------------------------------
# sizes and modules

def test_sizes_are_read_off_the_tensors(states):
    assert weights.infer_unet(states["unet"]) == UNET
    assert weights.infer_vae(states["vae"]) == VAE
    assert weights.infer_text(states["text"]) == TEXT
    assert weights.infer_unet(states["unet"], num_heads=4, norm_groups=8) == UNET | dict(num_heads=4, norm_groups=8)
    assert weights.infer_vae(states["vae"], scale=0.13025)["scale"] == 0.13025
    assert weights.infer_text(states["text"], num_heads=2)["num_heads"] == 2


@pytest.mark.parametrize("sizes", [
    dict(model_channels=64, channel_mult=(1,), num_res_blocks=3, attention_resolutions=(), num_heads=8, context_dim=5,
         transformer_depth=2, in_channels=9, out_channels=8),           # one level; in_channels of the inpainting model
    dict(model_channels=64, channel_mult=(1, 1.5, 2.5), num_res_blocks=2, attention_resolutions=(4,), num_heads=8,
         context_dim=7, transformer_depth=1, in_channels=3, out_channels=3),
    dict(model_channels=320, channel_mult=(1, 2, 4, 4), num_res_blocks=2, attention_resolutions=(1, 2, 4), num_heads=-1,
         num_head_channels=64, context_dim=1024, transformer_depth=1, in_channels=4, out_channels=4)])
def test_other_unets(sizes):
    with torch.device("meta"):
        state = UNet(**sizes).state_dict()
    assert weights.infer_unet(state) == sizes


def test_published_sizes_of_the_other_two():
    with torch.device("meta"):
        vae, text = AutoencoderKL().state_dict(), TextEncoder(49_408, 77, 768, 12, 12).state_dict()
    assert weights.infer_vae(vae) == dict(channels=128, multipliers=(1, 2, 4, 4), res_blocks=2, in_channels=3,
                                          z_channels=4)
    assert weights.infer_text(text) == dict(vocab_size=49_408, max_length=77, hidden_size=768, depth=12, num_heads=12,
                                            mlp_ratio=4.0)


def test_states_of_something_else(states):
    for infer, what in ((weights.infer_unet, "a U-Net of the Stable Diffusion family"), (weights.infer_vae,
                        "an AutoencoderKL"), (weights.infer_text, "CLIP's text encoder")):
        for state in ({}, {"x": torch.ones(1)}):
            with pytest.raises(ValueError, match=f"this is not the state_dict of {what}: .* is not there"):
                infer(state)
    for infer, part in ((weights.infer_unet, "unet"), (weights.infer_vae, "vae"), (weights.infer_text, "text")):
        for name in states[part]:                                       # whatever is missing or flat: a ValueError
            for state in ({k: v for k, v in states[part].items() if k != name},
                          states[part] | {name: states[part][name].flatten()}):
                try:
                    infer(state)
                except ValueError as error:
                    assert name in str(error)
    for width in (1024, 1280):
        with pytest.raises(ValueError, match=f"width {width}, Stable Diffusion 2's or XL's"):
            weights.infer_text({"text_model.embeddings.token_embedding.weight": torch.empty(5, width, device="meta")})


def test_build_is_strict_and_says_what_differs(states):
    unet = dict(states["unet"])
    missing = {k: v for k, v in unet.items() if k != "out.0.bias"}
    with pytest.raises(ValueError, match=r"unet: 1 tensors do not fit: out.0.bias: file has none, model \(32,\)"):
        weights.build({"unet": missing})
    with pytest.raises(ValueError, match=r"unet: 1 tensors .* label_emb.0.weight: file \(3,\), model has none"):
        weights.build({"unet": unet | {"label_emb.0.weight": torch.ones(3)}})
    with pytest.raises(ValueError, match=r"unet: 1 tensors .* out.0.bias: file \(31,\), model \(32,\)"):
        weights.build({"unet": unet | {"out.0.bias": torch.ones(31)}})
    with pytest.raises(ValueError, match=r"unet: 7 tensors .* x.0: .* x.4: file \(1,\), model has none$"):
        weights.build({"unet": unet | {f"x.{i}": torch.ones(1) for i in range(7)}})         # the first five
    with pytest.raises(ValueError, match="unet: 1 tensors do not fit: out.0.bias: dtype torch.int8"):
        weights.build({"unet": unet | {"out.0.bias": torch.ones(32, dtype=torch.int8)}})
    with pytest.raises(ValueError, match="unknown part 'vqgan': choose of unet, vae, text"):
        weights.build({"vqgan": {}})
    with pytest.raises(ValueError, match="unet: cannot build it from .*heads"):
        weights.build({"unet": unet}, stated={"unet": {"heads": 4}})
    with pytest.raises(ValueError, match="not divisible by num_heads 7"):
        weights.build({"unet": unet}, stated={"unet": {"num_heads": 7}})


def test_build_keeps_the_dtype_unless_told_and_hears_what_is_stated(states):
    half = {part: {k: v.half() for k, v in state.items()} for part, state in states.items()}
    for dtype, want in ((None, torch.float16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        for model in weights.build(half, dtype).values():
            assert {p.dtype for p in model.state_dict().values()} == {want}
            assert not any(p.is_meta for p in model.parameters())
    stated = {"unet": dict(num_heads=4, norm_groups=8), "vae": dict(scale=0.5), "text": dict(num_heads=2)}
    built = weights.build(states, stated=stated)
    direct = {"unet": UNet(**UNET | stated["unet"]), "vae": AutoencoderKL(**VAE, scale=0.5),
              "text": TextEncoder(**TEXT | stated["text"])}
    for part, model in direct.items():
        model.load_state_dict(states[part])
    for (name, got), want in zip(outputs(built).items(), outputs(direct).values()):
        assert torch.equal(got, want), name


def test_built_models_train(tmp_path, states):
    """On a mapped file: the weights move, the file stays."""
    path = tmp_path / "text.safetensors"
    weights.write_safetensors(path, states["text"])
    built = weights.build({"text": weights.read_weights(path)})["text"]
    optimizer = torch.optim.SGD(built.parameters(), lr=0.1)
    built(torch.arange(9)[None]).square().sum().backward()
    optimizer.step()
    name = "text_model.final_layer_norm.bias"
    assert not torch.equal(built.state_dict()[name], states["text"][name])
    same({"text": weights.read_weights(path)}, {"text": states["text"]})
