"""Tests of data.py: every source gives back what was written, batches, grids and films."""
import gzip
import hashlib
import io
import math
import os
import pathlib
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
import folders
import train
import worlds
from conftest import write_safetensors
from vae import AutoencoderKL


def bytes_like(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# ---------------------------------------------------------------- batches


def numbered(count, flip=False):
    """Image i holds the number i, its right-hand column 200, its lower row 100."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 3)
    images[:, :, 1], images[..., 2] = 100, 200
    return data.Dataset("numbers", images, torch.arange(count) % 4, None, list("abcd"), flip)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 23])
def test_every_epoch_is_a_permutation(batch_size):
    batches = data.Batches(numbered(10), batch_size, seed=3)
    steps = [batches.batch(step) for step in range(math.ceil(50 / batch_size))]
    assert all(len(b["index"]) == batch_size for b in steps)
    epochs = torch.cat([b["index"] for b in steps])[:50].view(5, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5    # each has its own order
    for b in steps:
        assert torch.equal(b["x"][:, 0, 0, 0].long(), b["index"])
        assert torch.equal(b["y"], b["index"] % 4)
        assert b["x"].dtype == torch.uint8 and b["y"].dtype == torch.int64


def test_resuming_needs_only_the_step():
    straight = data.Batches(numbered(10), 4, seed=1)
    row = [straight.batch(step)["index"].tolist() for step in range(20)]
    for step in (19, 0, 7, 8, 2):                                   # also backwards
        again = data.Batches(numbered(10), 4, seed=1).batch(step)["index"].tolist()
        assert again == straight.batch(step)["index"].tolist() == row[step]
    other = data.Batches(numbered(10), 4, seed=2)
    assert [other.batch(step)["index"].tolist() for step in range(20)] != row


def test_the_order_does_not_change():
    """Two epochs of 10 at seed 1: a resumed run of another version sees the same rows."""
    generators = [torch.Generator().manual_seed(1_000_003 + epoch) for epoch in range(2)]
    want = torch.cat([torch.randperm(10, generator=generator) for generator in generators])
    batches = data.Batches(numbered(10), 4, seed=1)
    assert torch.equal(torch.cat([batches.batch(step)["index"] for step in range(5)]), want)


def test_rows_slice_the_whole_batch():
    batches = data.Batches(numbered(10, flip=True), 8, seed=1)
    draws = torch.tensor([0.1, 0.2, 0.9, 0.8, 0.49, 0.5, 0.99, 0.0])
    for step in range(4):
        whole = batches.batch(step, flip_draws=draws)
        parts = [batches.batch(step, slice(r * 2, r * 2 + 2), draws) for r in range(4)]
        for key in ("x", "y", "index"):
            assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])


def test_flips():
    """Left and right change places, above and below do not."""
    draws = torch.tensor([0.1, 0.9, 0.49, 0.5])
    for flip in (True, False):
        x = data.Batches(numbered(9, flip), 4).batch(0, flip_draws=draws)["x"]
        mirrored = [True, False, True, False] if flip else [False] * 4
        assert (x[:, 0, 0, 0] == 200).tolist() == mirrored
        assert (x[:, 0, 1, 1] == 100).all() and (x[:, 0, 0, 1] != 100).all()
    assert (data.Batches(numbered(9, True), 4).batch(0)["x"][..., -1] == 200).all()


def test_float_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(every)
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32
    want = torch.linspace(-1, 1, 256, dtype=torch.float64)
    torch.testing.assert_close(x.double(), want, rtol=0, atol=1e-6)
    assert torch.equal(data.to_uint8(x), every)
    assert data.to_uint8(torch.tensor([-7.0, 7.0, 0.0])).tolist() == [0, 255, 128]


# ---------------------------------------------------------------- data sets by name


def test_labels_and_captions_must_fit():
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    for labels, captions, names, message in (
            ([0, 1, 2], None, ["a", "b"], "labels 0 to 2, class names for 0 to 1"),
            ([0, -1, 0], None, ["a", "b"], "labels -1 to 0"), ([0, 1, 0], None, [], "for 0 to 0"),
            ([0, 0], None, [], "captions must agree, not"), ([0, 0, 0], ["one"], [], "must agree"),
            ([0, 0, 0], [], [], "captions must agree, not")):
        with pytest.raises(ValueError, match=message):
            data.Dataset("x", images, torch.tensor(labels), captions, names, False)


@pytest.mark.parametrize("name", ["shapes", "scenes"])
def test_drawn_worlds_come_whole(name):
    options = {"count": 30, "seed": 2, "hold_out": True}
    got = data.load(name, 16, "test", **options)
    plan = worlds.plan_world(name, "test", **options)
    assert torch.equal(got.images, worlds.draw_scene(plan, 16))
    assert torch.equal(got.labels, plan["label"]) and got.captions == plan["captions"]
    assert got.class_names == worlds.CLASS_NAMES and not got.flip
    assert got.about == f"{name}: 30 pictures, 48 classes, 30 captions"
    held = {f"{color} {shape}" for shape, color in worlds.HELD_OUT}
    for hold_out in (False, True):
        got = data.load(name, 4, count=480, hold_out=hold_out)
        drawn = {got.class_names[label] for label in got.labels}
        assert held.isdisjoint(drawn) if hold_out else held <= drawn


def test_folders_say_what_was_left_out(tmp_path):
    for name, value in (("cat", 50), ("ant", 100)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (value, 0, 0)).save(tmp_path / name / "x.png")
    (tmp_path / "ant" / "y.png").write_bytes(b"")
    (tmp_path / "ant" / "z.heic").write_bytes(b"")
    got = data.load(f"folder:{tmp_path}", 8, skip_bad=True)
    assert got.class_names == ["ant", "cat"] and got.flip
    assert dict(zip(got.labels.tolist(), got.images[:, 0, 0, 0].tolist())) == {0: 100, 1: 50}
    assert got.about == (f"folder:{tmp_path}: 2 pictures, 2 classes, no captions; left out: "
                         "1 .heic, 1 unreadable")
    (tmp_path / "ant" / "y.png").unlink()
    for name in ("ant", "cat"):
        (tmp_path / name / "x.txt").write_text(f"a {name} on the left")
    got = data.load(f"folder:{tmp_path}", 8)
    assert got.captions == ["a ant on the left", "a cat on the left"] and not got.flip
    assert data.load(f"folder:{tmp_path}", 8, count=1).images.shape == (1, 3, 8, 8)


def test_wrong_names():
    for wrong, right in (("shape", "shapes"), ("cifar", "cifar10"), ("fashon", "fashion"),
                         ("mnits", "mnist"), ("folder:", "folder:PATH"), ("npz:", "npz:FILE")):
        with pytest.raises(ValueError, match=f"did you mean {right}\\?"):
            data.load(wrong)
    with pytest.raises(ValueError, match="unknown data set"):
        data.load("qqqqqq")
    with pytest.raises(ValueError, match="train or test"):
        data.load("shapes", split="valid")
    with pytest.raises(ValueError, match="positive"):
        data.load("shapes", count=0)
    with pytest.raises(ValueError, match="hold_out"):
        data.load("mnist", hold_out=True)


# ---------------------------------------------------------------- official files


def official(folder, monkeypatch, name="mnist", count=5):
    """Synthetic files in the official format, and the checksums to go with them."""
    images, labels = bytes_like(count, 28, 28), np.arange(count, dtype=np.uint8) % 11
    (folder / name).mkdir(parents=True)
    for i, split in enumerate(("train", "t10k")):
        pixels = struct.pack(">4I", 0x803, count, 28, 28) + (images + i).tobytes()
        for stem, raw in ((f"{split}-images-idx3-ubyte.gz", pixels),
                          (f"{split}-labels-idx1-ubyte.gz",
                           struct.pack(">2I", 0x801, count) + labels.tobytes())):
            raw = gzip.compress(raw)
            (folder / name / stem).write_bytes(raw)
            monkeypatch.setitem(data.OFFICIAL[name][1], stem, hashlib.md5(raw).hexdigest())
    return images, labels


@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_idx(tmp_path, monkeypatch, name):
    images, labels = official(tmp_path, monkeypatch, name)
    for i, split in enumerate(("train", "test")):
        got = data.load(name, 32, split, tmp_path)
        assert len(got.class_names) == 10 and got.flip == (name == "fashion") and len(got) == 5
        assert np.array_equal(got.images[:, 0, 2:30, 2:30], images + i)
        assert got.images.sum() == (images + i).sum(dtype=np.int64)      # the border is black
        assert got.labels.tolist() == labels.tolist()
    assert np.array_equal(data.load(name, 28, data_dir=tmp_path).images[:, 0], images)
    small = data.load(name, 16, data_dir=tmp_path, count=2)
    assert small.images.shape == (2, 1, 16, 16)
    assert abs(small.images.float().mean() - images.mean() * (28 / 32) ** 2) < 5


def test_official_files_are_checked(tmp_path, monkeypatch):
    official(tmp_path / "eleven", monkeypatch, count=11)
    with pytest.raises(ValueError, match="mnist: labels 0 to 10"):
        data.load("mnist", data_dir=tmp_path / "eleven")
    file = tmp_path / "eleven" / "mnist" / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match="md5 .* delete the file"):
        data.load("mnist", data_dir=tmp_path / "eleven")


def test_checksums_are_well_formed():
    sums = [md5 for _, files, _ in data.OFFICIAL.values() for md5 in files.values()]
    assert len(set(sums)) == 9 and all(len(bytes.fromhex(md5)) == 16 for md5 in sums)
    assert all(len(names) == 10 for *_, names in data.OFFICIAL.values())


def test_cifar10(tmp_path, monkeypatch):
    """A record is a label, then the red, green and blue plane, row by row."""
    pixels, labels = bytes_like(18, 3, 32, 32), np.arange(18) % 10
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    (tmp_path / "cifar10").mkdir()
    file = tmp_path / "cifar10" / "cifar-10-binary.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        for i in (5, 3, 0, 1, 2, 4):                                # in any order
            raw = b"".join(bytes([label]) + image.tobytes() for label, image in
                           zip(labels[3 * i:3 * i + 3], pixels[3 * i:3 * i + 3]))
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{names[i]}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setitem(data.OFFICIAL["cifar10"][1], file.name, md5)
    for split, rows in (("train", slice(0, 15)), ("test", slice(15, 18))):
        got = data.load("cifar10", 32, split, tmp_path)
        assert np.array_equal(got.images, pixels[rows])
        assert got.labels.tolist() == labels[rows].tolist()
    assert got.flip and got.class_names[3] == "cat"


def test_failed_download(tmp_path, monkeypatch):
    asked = []

    def refuse(url, path, progress):
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    for name in ("mnist", "fashion", "cifar10"):
        with pytest.raises(ValueError, match="could not download .*no network.* put it") as caught:
            data.load(name, data_dir=tmp_path)
        assert asked[-1] in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_download(tmp_path, monkeypatch):
    """Through a file: address, so without network: fetched once, checked, left in place."""
    images, _ = official(tmp_path / "far", monkeypatch)
    far = (tmp_path / "far" / "mnist").as_uri() + "/"
    monkeypatch.setitem(data.OFFICIAL, "mnist", (far, *data.OFFICIAL["mnist"][1:]))
    got = data.load("mnist", 28, data_dir=tmp_path / "near")
    assert np.array_equal(got.images[:, 0], images)
    assert sorted(os.listdir(tmp_path / "near" / "mnist")) == [
        "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]


# ---------------------------------------------------------------- arrays and latents


def save_npz(path, pixels, **others):
    np.savez(path, arr_0=pixels, **others)
    return path


def test_npz(tmp_path):
    pixels = bytes_like(250, 8, 8, 3)                                        # (N, H, W, C)
    labels, captions = np.arange(250) % 12, np.array([f"고양이 {i}" for i in range(250)])
    path = save_npz(tmp_path / "a.npz", pixels, labels=labels, captions=captions)
    images, y, texts, _ = data.read_arrays(path, "npz")
    assert np.array_equal(images, pixels.transpose(0, 3, 1, 2)) and images.dtype == torch.uint8
    assert np.array_equal(y, labels) and texts == captions.tolist() and y.dtype == torch.int64
    splits = [data.load(f"npz:{path}", 8, split) for split in ("train", "test")]
    seen = []
    for got in splits:
        rows = [int(caption.split()[1]) for caption in got.captions]
        assert np.array_equal(got.images, pixels[rows].transpose(0, 3, 1, 2))
        assert np.array_equal(got.labels, labels[rows]) and not got.flip
        assert got.class_names == list(map(str, range(12)))
        seen += rows
    assert len(splits[1]) == 12 and sorted(seen) == list(range(250))
    bare = data.load(f"npz:{save_npz(tmp_path / 'b.npz', pixels[:5, ..., :1])}", 16)
    assert bare.images.shape == (5, 1, 16, 16) and bare.captions is None and bare.flip
    assert bare.class_names == [] and bare.labels.tolist() == [0] * 5
    assert data.read_arrays(tmp_path / "b.npz", "npz")[1:] == (None, None, [])


def test_arrays_shrink_without_aliases(tmp_path):
    """Every fourth column white: a quarter of white is left, wherever the white column is."""
    pixels = np.zeros((4, 64, 64, 1), np.uint8)
    for first in range(4):
        pixels[first, :, first::4] = 200
    small = data.load(f"npz:{save_npz(tmp_path / 'a.npz', pixels)}", 16).images.float()
    inside = small[..., 4:-4]           # at the borders the filter has fewer columns
    assert small.shape == (4, 1, 16, 16) and (inside - 50).abs().max() <= 1     # of rounding


@pytest.mark.parametrize("arrays, message", [
    ({"images": np.zeros(3)}, "only images"), ({"arr_0": np.array([{}], dtype=object)}, "npz file"),
    ({"arr_0": np.array(["text"])}, "npz file"), ({"arr_0": np.zeros((2, 8, 8, 3))}, "uint8"),
    ({"arr_0": bytes_like(2, 3, 8, 8)}, "uint8 .N, H, H"),
    ({"arr_0": bytes_like(2, 8, 4, 3)}, "square"),
    ({"arr_0": bytes_like(0, 8, 8, 3)}, "uint8"),
    ({"arr_0": bytes_like(2, 8, 8, 3), "labels": np.zeros(3, int)}, "labels"),
    ({"arr_0": bytes_like(2, 8, 8, 3), "labels": np.zeros(2)}, "labels"),
    ({"arr_0": bytes_like(2, 8, 8, 3), "labels": np.array([0, -1])}, "labels -1 to 0"),
    ({"arr_0": bytes_like(2, 8, 8, 3), "captions": np.zeros(2)}, "captions")])
def test_wrong_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=f"a.npz.*{message}"):
        data.load(f"npz:{tmp_path / 'a.npz'}")


def test_latents(tmp_path):
    path = tmp_path / "z.pt"                             # any ending
    z, y = torch.randn(6, 4, 8, 8).half(), torch.tensor([0, 1, 2, 0, 1, 2])
    data.save_latents(path, z, y, [f"c{i}" for i in range(6)], ["a", "b", "c"])
    got = data.load(f"latents:{path}")
    assert torch.equal(got.images, z) and got.images.dtype == torch.float16
    assert torch.equal(got.labels, y) and got.captions == [f"c{i}" for i in range(6)]
    assert got.class_names == ["a", "b", "c"] and not got.flip and os.listdir(tmp_path) == ["z.pt"]
    data.save_latents(path, z)
    got = data.load(f"latents:{path}", count=4)
    assert len(got) == 4 and got.captions is None and not got.flip
    assert got.class_names == [] and got.labels.tolist() == [0] * 4
    data.save_latents(path, z, y)
    assert data.load(f"latents:{path}").class_names == ["0", "1", "2"]


@pytest.mark.parametrize("bad", [False, True])
def test_a_folder_larger_than_memory_is_refused_and_can_be_encoded(tmp_path, monkeypatch, capsys,
                                                                   bad):
    """In parts of 64, each no longer needed when the next is read; broken pictures are left out."""
    folder, stage, out = tmp_path / "set", str(tmp_path / "vae.safetensors"), tmp_path / "z.npz"
    for i in range(70):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / "ab"[i % 2] / f"{i}.png")
    (folder / "a" / "60.png").write_bytes(b"") if bad else None
    vae, sizes = AutoencoderKL(32, (1, 2, 2), 1), []
    write_safetensors(stage, vae.state_dict())
    line = ["--data", f"folder:{folder}", "--image-size", "8"] + ["--skip-bad"] * bad
    whole = data.load(f"folder:{folder}", 8, skip_bad=bad)
    (tmp_path / "meminfo").write_text("MemTotal:  99 kB\nMemAvailable:      13 kB\nCached: 0 kB\n")
    monkeypatch.setattr(folders, "MEMORY", str(tmp_path / "meminfo"))
    with pytest.raises(SystemExit):
        train.main([*line, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert "13,440 bytes, and 13,312 are free" in said and "--save-latents" in said
    read = folders.read_image
    monkeypatch.setattr(folders, "read_image", lambda *given: sizes.append(1) or read(*given))
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x, encode=AutoencoderKL.encode: (
        sizes.append(-len(x)), encode(self, x))[1])
    train.main([*line, "--first-stage", stage, "--save-latents", str(out)])
    assert max(np.cumsum(sizes)) <= 64 and sum(sizes) == bad and len(whole) == 70 - bad
    z = data.load(f"latents:{out}")
    assert torch.equal(z.labels, whole.labels) and z.class_names == ["a", "b"]
    torch.testing.assert_close(z.images, vae.encode(data.to_float(whole.images)).half(),
                               rtol=2 ** -10, atol=1e-6)


def test_latents_replace_only_latents(tmp_path):
    for name, write in (("ckpt.pt", lambda path: torch.save({"model": {}}, path)),
                        ("s.npz", lambda path: save_npz(path, bytes_like(1, 2, 2, 3)))):
        write(tmp_path / name)
        before = (tmp_path / name).read_bytes()
        with pytest.raises(ValueError, match=name):
            data.check_target(tmp_path / name, data.LATENTS_MARK)
        assert (tmp_path / name).read_bytes() == before


def test_bad_latents(tmp_path):
    path = tmp_path / "z.npz"
    with pytest.raises(ValueError, match="no such file"):
        data.load(f"latents:{path}")
    z = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    none = np.array([], str)
    good = {"labels": np.zeros(0, int), "captions": none, "class_names": none}
    for arrays, message in (
            ({"latents": z.astype(np.uint8)}, "finite floats"),
            ({"latents": z[:, :, 0]}, "finite floats"),
            ({"latents": z[:0]}, "N > 0"), ({"latents": z[..., :4]}, "h, h"),
            ({"latents": z * np.inf}, "finite"), ({"latents": None}, "not a whole"),
            ({"latents": z, "labels": np.zeros(3, int)}, "labels"),
            ({"latents": z, "labels": np.zeros((2, 1), int)}, "labels"),
            ({"latents": z, "captions": np.array(["one"])}, "captions"),
            ({"latents": z, "labels": np.array([0, -1])}, "labels -1 to 0"),
            ({"latents": z, "labels": np.array([0, 2]), "class_names": np.array(["a", "b"])},
             "labels 0 to 2")):
        np.savez(path, **(good | arrays))
        with pytest.raises(ValueError, match=message):
            data.load(f"latents:{path}")
    np.savez(path, latents=z)
    with pytest.raises(ValueError, match="only latents in it"):
        data.load(f"latents:{path}")


@pytest.mark.parametrize("what,value", [("class_names", np.array([["a"], ["b"]])),
                                        ("class_names", np.array([1, 2])),
                                        ("labels", np.array([True, False])),
                                        ("captions", np.array([b"a", b"b"]))])
def test_words_and_numbers_of_latents_have_their_kind(tmp_path, what, value):
    none, path = np.array([], str), tmp_path / "z.npz"
    good = {"latents": np.zeros((2, 4, 8, 8), np.float32), "labels": np.array([0, 1]),
            "captions": none, "class_names": none}
    np.savez(path, **(good | {what: value}))
    with pytest.raises(ValueError, match=f"z.npz.*{what}"):
        data.load(f"latents:{path}")


def hostile(path, declared, body=b""):
    """An npz file whose arr_0 says that it has the shape `declared`."""
    head = str({"descr": "|u1", "fortran_order": False, "shape": declared}).encode()
    head += b" " * (63 - (len(head) + 10) % 64) + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("arr_0.npy", "w", force_zip64=True) as entry:
            entry.write(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + body)


@pytest.mark.parametrize("declared", [(10 ** 6, 512, 512, 3), (10 ** 15, 8, 8, 3), ("a",),
                                      (2, 8, 8, 10 ** 30), (-1, 8, 8, 3), (2 ** 62, 4, 1, 1),
                                      (10 ** 9,) * 60])
def test_shapes_that_lie_are_one_line(tmp_path, declared):
    hostile(tmp_path / "a.npz", declared, b"xyz")
    with pytest.raises(ValueError, match="a.npz is not a whole npz file"):
        data.load(f"npz:{tmp_path / 'a.npz'}")


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    hostile(path, (2 ** 31, 1, 1, 1), bytes(10 ** 6))
    raw = bytearray(path.read_bytes())
    where = raw.index(b"PK\1\2") + 24                       # what the entry says of its length
    raw[where:where + 4] = (2 ** 31).to_bytes(4, "little")
    path.write_bytes(raw)
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *args: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match="store it without compression"):
        data.load(f"npz:{path}")


def test_pipes_devices_and_folders_are_no_arrays(tmp_path):
    os.mkfifo(tmp_path / "pipe")                            # opening it would wait for ever
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero", "/dev/null"):
        with pytest.raises(ValueError, match="no such file"):
            data.load(f"npz:{path}")


@pytest.mark.parametrize("kind", ["npz", "latents"])
@pytest.mark.parametrize("seed", range(20))
def test_files_of_which_a_tenth_is_noise_are_one_line(tmp_path, kind, seed):
    path, random = tmp_path / "a.npz", np.random.default_rng(seed)
    if kind == "npz":
        save_npz(path, bytes_like(8, 8, 8, 3), labels=np.arange(8))
    else:
        data.save_latents(path, torch.randn(8, 4, 4, 4), torch.arange(8))
    raw = np.frombuffer(path.read_bytes(), np.uint8).copy()
    wrong = random.random(len(raw)) < 0.1
    raw[wrong] = random.integers(256, size=wrong.sum())
    path.write_bytes(raw[:len(raw) - seed % 4 * 100].tobytes())
    with pytest.raises(ValueError, match="a.npz"):
        data.load(f"{kind}:{path}")


def test_a_file_of_objects_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "ran",)
    objects = np.empty(1, object)
    objects[0] = Evil()
    np.savez(tmp_path / "a.npz", arr_0=objects)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Evil()))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(ValueError, match=name):
            data.load(f"npz:{tmp_path / name}")
    assert not (tmp_path / "ran").exists()


def test_every_byte_is_compared_with_its_checksum(tmp_path):
    """numpy alone reads as much as the header says, and then compares nothing."""
    path = tmp_path / "z.npz"
    data.save_latents(path, torch.randn(2, 4, 64, 64))
    path.write_bytes(path.read_bytes().replace(b"(2, 4, 64, 64)", b"(1, 4, 64, 64)"))
    with pytest.raises(ValueError, match="damaged"):
        data.load(f"latents:{path}")


@pytest.mark.parametrize("seed", range(60))
def test_damaged_latents_never_load(tmp_path, seed):
    """One byte changed, or the end cut off: refused, or everything read is what was written."""
    path, random = tmp_path / "z.npz", np.random.default_rng(seed)
    z, captions = torch.randn(2, 4, 4, 4), ["one", "two"]
    data.save_latents(path, z, torch.tensor([0, 1]), captions, ["a", "b"])
    raw = bytearray(path.read_bytes())
    if seed % 3:
        raw[random.integers(len(raw))] ^= 1 + random.integers(255)
    else:
        raw = raw[:random.integers(len(raw))]
    path.write_bytes(raw)
    try:
        got = data.load(f"latents:{path}")
    except ValueError as error:
        assert "z.npz" in str(error)
    else:
        assert torch.equal(got.images, z) and got.labels.tolist() == [0, 1]
        assert got.captions == captions and got.class_names == ["a", "b"]


# ---------------------------------------------------------------- grids and films


def test_grid_layout(tmp_path):
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).repeat(1, 3, 4, 6) * 50
    grid = data.make_grid(images, nrow=3, pad=2)
    assert grid.shape == (2 * 4 + 3 * 2, 3 * 6 + 4 * 2, 3) and grid.dtype == np.uint8
    for i in range(5):
        top, left = 2 + i // 3 * 6, 2 + i % 3 * 8
        assert (grid[top:top + 4, left:left + 6] == 50 * i).all()
        assert (grid[top - 1, left] == 255).all()
    assert (grid[8:12, 18:24] == 255).all()                       # the empty sixth place
    assert np.array_equal(data.make_grid(data.to_float(images), nrow=3), grid)
    assert data.make_grid(images[:, :1], nrow=3, scale=3).shape == (2 * 12 + 6, 3 * 18 + 8, 3)
    path = tmp_path / "new" / "grid.png"
    data.save_grid(images, path, nrow=3)
    assert np.array_equal(np.asarray(Image.open(path)), grid)


def test_a_grid_of_one_shows_its_pixels():
    pixels = torch.from_numpy(bytes_like(1, 3, 4, 6))
    assert np.array_equal(data.make_grid(pixels, pad=0), pixels[0].permute(1, 2, 0))


def test_grid_captions():
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    plain = data.make_grid(images, captions=["a", "b", ""])
    long = data.make_grid(images, captions=["word " * 40, "w" * 300, "two\nlines"])
    assert plain.shape[1] == long.shape[1] == 3 * 64 + 4 * 2      # tiles are doubled to 64 pixels
    assert plain.shape[0] > 64 + 2 * 2 and long.shape[0] < 64 + 2 * 2 + 64
    label = plain[2 + 64:-2]
    assert label[:, 2:66].min() < 128 and label[:, 68:132].min() < 128
    assert label[:, 134:].min() == 255
    assert (long[:, 66:68] == 255).all()                          # nothing enters the next tile
    wide = data.make_grid(images[:1], captions=["wwww iiii wwwww mmmm iiiii MMMM WWW"])
    assert (wide[66:, 60:] == 255).all() and wide[66:, 40:60].min() < 128     # a gap at the end
    assert data.make_grid(images, captions=["", "", ""]).shape[1] == plain.shape[1]


@pytest.mark.parametrize("side,shown", [(8, 64), (24, 72), (40, 80), (64, 64), (100, 100)])
def test_captioned_tiles_are_enlarged_until_64_pixels_fit(side, shown):
    grid = data.make_grid(torch.zeros(1, 3, side, side, dtype=torch.uint8), captions=["a"], pad=0)
    assert grid.shape[1] == shown


def test_captions_in_letters_that_pillows_font_lacks():
    """Cyrillic is in the font that matplotlib brings: different letters, different pixels."""
    image = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    grid = data.make_grid(image, captions=["жук", "щит"], pad=0)
    assert not np.array_equal(grid[64:, :64], grid[64:, 64:])
    assert data._font("abc") is data._font("abc") and data._font("жук").getname()[0] != "Aileron"


def test_letters_that_no_font_has_are_named(monkeypatch, capsys):
    """Boxes stand for them; the fonts that hold boxes alone, or fixed sizes, are not chosen."""
    from matplotlib import font_manager
    files = [f for f in font_manager.fontManager.ttflist if f.name in ("DejaVu Sans", "STIXGeneral")
             or "Last Resort" in f.name]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", files)
    data._font.cache_clear()
    image = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    grid = data.make_grid(image, captions=["고양이", "жук"], pad=0)
    assert not np.array_equal(grid[64:, :64], grid[64:, 64:])
    said = capsys.readouterr().err
    assert "고양이" in "".join(sorted(said)) or all(letter in said for letter in "고양이")
    assert "ж" not in said and len(said.splitlines()) == 1
    data._font.cache_clear()


@pytest.mark.parametrize("caption", ["a\ud800", "\x00\x1b", "😀", "two\nlines 고", "", " "])
def test_any_caption_can_stand_under_a_picture(caption):
    image = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert data.make_grid(image, captions=[caption, "x"]).shape[1] == 2 * 64 + 3 * 2


def test_gif(tmp_path):
    frames = [np.full((10, 12, 3), v, np.uint8) for v in (0, 120, 240)]
    data.save_gif(frames, tmp_path / "deep" / "a.gif", ms=50)
    with Image.open(tmp_path / "deep" / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.size == (12, 10)
        assert gif.info["duration"] == 50 and gif.info["loop"] == 0
        gif.seek(2)
        assert abs(np.asarray(gif.convert("RGB")).astype(int) - 240).max() <= 3


# ---------------------------------------------------------------- where to write


def test_a_target_is_new_or_of_the_same_command(tmp_path):
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    data.save_grid(image, tmp_path / "ours.png", made_by="made by x")
    data.save_gif([np.zeros((8, 8, 3), np.uint8)] * 2, tmp_path / "ours.gif", made_by="made by x")
    for name in ("ours.png", "ours.gif", "new.png", "deep/er/new.png"):
        data.check_target(tmp_path / name, b"made by x")
    data.save_grid(image, tmp_path / "other.png", made_by="made by y")
    data.save_grid(image, tmp_path / "photo.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    before = sorted(tmp_path.rglob("*"))
    for name in ("other.png", "photo.png", "empty.png", "folder.png", "link.png", "pipe.png"):
        with pytest.raises(ValueError, match=f"{name} exists and was not made by this command"):
            data.check_target(tmp_path / name, b"made by x")
    for name in ("photo.png/x.png", "x" * 252 + ".png", "x" * 300 + "/x.png"):
        with pytest.raises(ValueError, match="cannot be written"):
            data.check_target(tmp_path / name, b"made by x")
    with pytest.raises(ValueError, match="/dev/full exists"):
        data.check_target("/dev/full", b"made by x")
    assert sorted(tmp_path.rglob("*")) == before            # nothing was made, not even a folder


def test_a_target_may_be_checked_by_several_processes(tmp_path, monkeypatch):
    """All write the same probe: another one may have removed it a moment before."""
    def removed(path, mode):
        file = open(path, mode)
        os.unlink(path)
        return file
    monkeypatch.setattr(data, "open", removed, raising=False)
    data.check_target(tmp_path / "new.png", b"made by x")


@pytest.mark.parametrize("name", ["grid.png", "film.gif", "z.npz"])
def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch, name):
    image = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    write = {"grid.png": lambda path, seed: data.save_grid(
                 torch.from_numpy(image).permute(2, 0, 1)[None].roll(seed, -1), path),
             "film.gif": lambda path, seed: data.save_gif([np.roll(image, seed, 0), image], path),
             "z.npz": lambda path, seed: data.save_latents(path, torch.ones(9, 4, 8, 8) * seed)}
    path = tmp_path / "new" / name
    write[name](path, 1)
    whole = path.read_bytes()

    class Full(io.FileIO):                                  # a disk with room for 500 bytes
        def write(self, some):
            if self.tell() + len(some) > 500:
                raise OSError(28, "No space left on device")
            return super().write(some)
    monkeypatch.setattr("builtins.open", lambda path, *how: Full(path, *how))
    with pytest.raises(ValueError, match=f"could not write .*{name}.*No space left"):
        write[name](path, 2)
    monkeypatch.undo()
    assert path.read_bytes() == whole and os.listdir(path.parent) == [name]
