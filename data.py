"""data.py: pictures and captions in, batches to train on, grids and films out.

    python train.py --data folder:my_pictures              # any name that load knows"""
import difflib
import functools
import gzip
import hashlib
import io
import json
import math
import os
import sys
import tarfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

import worlds
from checkpoint import written_whole
from folders import choose, read_folder, read_image  # noqa: F401 (for callers of data.read_image)


@dataclass
class Dataset:
    """A whole data set in memory.  ValueError if labels or captions do not fit the images."""
    name: str
    images: torch.Tensor      # (N, C, H, W) uint8, or float latents
    labels: torch.Tensor      # (N,) int64, all 0 when there are no classes; or token ids (N, L)
    captions: list            # N strings, or None
    class_names: list         # empty = unconditional
    flip: bool                # whether a left-right flip keeps the meaning
    left_out: str = ""        # what the source holds beside these pictures

    def __post_init__(self):
        counts = [len(x) for x in (self.images, self.labels, self.captions) if x is not None]
        if len(set(counts)) > 1:
            raise ValueError(f"{self.name}: images, labels and captions must agree, not {counts}")
        if len(self) and self.labels.ndim == 1:
            low, high, top = *self.labels.aminmax(), max(0, len(self.class_names) - 1)
            if low < 0 or high > top:
                raise ValueError(f"{self.name}: labels {low} to {high}, class names for 0 to {top}")

    @property
    def about(self):
        """One line: how many pictures, classes and captions, and what was left out."""
        captions = "no" if self.captions is None else f"{len(self):,}"
        return (f"{self.name}: {len(self):,} pictures, {len(self.class_names) or 'no'} classes, "
                f"{captions} captions" + f"; left out: {self.left_out}" * bool(self.left_out))

    def __len__(self):
        return len(self.images)


class Batches:
    """Shuffled batches as a function of the step. All epochs, each in its own order, form one
    endless row of examples, and batch s is its positions s * batch_size to (s + 1) * batch_size."""

    def __init__(self, dataset, batch_size, device="cpu", seed=0):
        self.images, self.labels = dataset.images.to(device), dataset.labels.to(device)
        self.batch_size, self.flip, self.seed = batch_size, dataset.flip, seed
        self.order = functools.lru_cache(2)(self._order)  # a batch may need two epochs

    def _order(self, epoch):
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
        return torch.randperm(len(self.images), generator=generator).to(self.images.device)

    def batch(self, step, rows=slice(None), flip_draws=None):
        """The batch of a step (from 0): {"x": (B, C, H, W) as stored, "y": (B,), "index": (B,)}.
        rows: the slice of the whole batch that this process works on.  flip_draws: (batch_size,),
        uniform in [0, 1), of the whole batch: if dataset.flip, those below 0.5 are mirrored."""
        start, end, count = step * self.batch_size, (step + 1) * self.batch_size, len(self.images)
        pieces = [self.order(epoch)[max(0, start - epoch * count):end - epoch * count]
                  for epoch in range(start // count, (end - 1) // count + 1)]
        index = torch.cat(pieces)[rows]                                              # (B,)
        x = self.images[index]                                                       # (B, C, H, W)
        if self.flip and flip_draws is not None:
            x = torch.where(flip_draws[rows, None, None, None] < 0.5, x.flip(-1), x)
        return {"x": x, "y": self.labels[index], "index": index}


def to_float(images):
    """uint8 0..255 -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float [-1, 1] (clamped) -> uint8; undoes to_float exactly."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def load(name, image_size=32, split="train", data_dir="data", count=None, seed=0, hold_out=False,
         skip_bad=False):
    """Load a data set into memory.
    name: shapes, scenes            drawn (worlds.py); count None = 48,000 (train), 2,000 (test)
          mnist, fashion, cifar10   official files in data_dir, checked; downloaded if absent
          folder:PATH               classes or captions, see folders.py
          npz:FILE, latents:FILE    see read_arrays, save_latents (latents: image_size not used)
    split: train or test.  Where a source has no test split it is a fixed 5 %, or all if under 200.
    count: keep this many, chosen by seed.  hold_out: see plan_world.  skip_bad: see read_folder.
    Returns a Dataset.  Raises ValueError for anything that the caller can mend."""
    if split not in ("train", "test") or image_size < 1 or (count is not None and count < 1):
        raise ValueError(f"say train or test, positive sizes, not {split!r}, {image_size}, {count}")
    kind, _, path = name.partition(":")
    if hold_out and name not in ("shapes", "scenes"):
        raise ValueError(f"hold_out is for shapes and scenes, not for {name}")
    if name in ("shapes", "scenes"):
        plan = worlds.plan_world(name, split, count, seed, hold_out)
        return Dataset(name, worlds.draw_scene(plan, image_size), plan["label"], plan["captions"],
                       list(worlds.CLASS_NAMES), flip=False)
    if name in OFFICIAL:
        return _take(_official(name, image_size, split, data_dir), image_size, None, count, seed)
    if kind == "folder" and path:
        *found, left_out = read_folder(path, image_size, split, count, seed, skip_bad)
        # A caption may say left or right: flips only without captions.
        return Dataset(name, *found, flip=found[2] is None, left_out=left_out)
    if kind in ("npz", "latents") and path:
        x, y, captions, class_names = read_arrays(path, kind)
        y = torch.zeros(len(x)).long() if y is None else y
        if not class_names and 0 < y.max() < 1_000_000:
            class_names = [*map(str, range(int(y.max()) + 1))]
        whole = Dataset(name, x, y, captions, class_names, kind == "npz" and captions is None)
        return _take(whole, image_size if kind == "npz" else None, split, count, seed)
    known = ["shapes", "scenes", *OFFICIAL, "folder:PATH", "npz:FILE", "latents:FILE"]
    near = [f"did you mean {near}? " for near in difflib.get_close_matches(name, known, 1, 0.5)]
    raise ValueError(f"unknown data set {name!r}; {''.join(near)}Known: {', '.join(known)}")


def _take(whole, image_size, split, count, seed):
    """The chosen examples of a data set, resized if image_size (or None) is another."""
    chosen = choose(len(whole), split, count, seed)
    images, labels = whole.images[chosen], whole.labels[chosen]
    if image_size not in (None, images.shape[-1]):
        images = F.interpolate(images, size=image_size, mode="bicubic", antialias=True)  # uint8
    captions = whole.captions and [whole.captions[i] for i in chosen]
    return Dataset(whole.name, images, labels, captions, whole.class_names, whole.flip)


# {name: (address, {file: md5}, class names)}
OFFICIAL = json.loads((Path(__file__).parent / "assets/official.json").read_text())


def _official(name, image_size, split, data_dir):
    """A whole official split, as its files have it; MNIST with a border unless image_size is 28."""
    _, files, class_names = OFFICIAL[name]
    raw = [_official_bytes(name, file, data_dir) for file in files
           if name == "cifar10" or file.startswith("train") == (split == "train")]
    if name == "cifar10":
        with tarfile.open(fileobj=io.BytesIO(raw[0])) as tar:
            kind = "data_batch" if split == "train" else "test_batch"
            members = sorted(member for member in tar.getnames() if kind in member)
            raw = bytearray(b"".join(tar.extractfile(member).read() for member in members))
        records = torch.frombuffer(raw, dtype=torch.uint8).view(-1, 3073)  # label, 3 x 1024 pixels
        images, labels = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]
    else:
        images, labels = (torch.frombuffer(part, dtype=torch.uint8) for part in raw)
        images, labels = images[16:].view(-1, 1, 28, 28), labels[8:]      # after their headers
        if image_size != 28:
            images = F.pad(images, (2, 2, 2, 2))                          # (N, 1, 32, 32), black
    return Dataset(name, images, labels.long(), None, list(class_names), flip=name != "mnist")


def _official_bytes(name, file, data_dir):
    """The checked and unzipped bytes of a file, downloaded first if it is not there."""
    path, url, md5 = Path(data_dir, name, file), OFFICIAL[name][0] + file, OFFICIAL[name][1][file]
    if not path.exists():
        try:  # writes under another name, then renames the complete file
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
        except Exception as error:  # no network, no such host, refused, cut off, disk full
            raise ValueError(f"could not download {url} ({error}): put it at {path}") from error
    raw = path.read_bytes()
    if (found := hashlib.md5(raw, usedforsecurity=False).hexdigest()) != md5:
        raise ValueError(f"{path} has md5 {found}, expected {md5}: delete the file and load again")
    return bytearray(gzip.decompress(raw))


LATENTS = ("latents", "labels", "captions", "class_names")  # all in a file of latents, empty = none
LATENTS_MARK = b"latents.npy"           # so begins the file: no other command writes such an array
FORMS = {"latents": (LATENTS, "finite floats (N, C, h, h)"),
         "npz": (("arr_0",), "square, uint8 (N, H, H, 1 or 3)")}


def read_arrays(path, kind):
    """Of an npz file of sample.py, or of latents: images uint8 or latents (N, C, H, H), labels (N,)
    and captions, or None, class names. kind: npz or latents. Raises ValueError."""
    (needed, form), path = FORMS[kind], os.path.expanduser(path)
    try:
        if not os.path.isfile(path):                # a pipe would be waited for
            raise ValueError("no such file")
        with np.load(path, allow_pickle=False) as file:
            size = sum(entry.file_size for entry in file.zip.infolist())
            if size > max(2 ** 30, 100 * os.path.getsize(path)):    # a few MB can become a TB
                raise ValueError(f"it would grow to {size:,} bytes, store it without compression")
            arrays = {name: file[name] for name in file.files}
            if not arrays.keys() >= set(needed) or file.zip.testzip():  # compares all checksums
                raise ValueError(f"damaged, or only {', '.join(arrays) or 'nothing'} in it")
        x = torch.from_numpy(arrays[needed[0]])
    except Exception as error:  # not there, no zip, cut short, Python objects, text
        needed = ", ".join(needed)
        raise ValueError(f"{path} is not a whole npz file with {needed}: {error}") from error
    given = f"{x.dtype} {tuple(x.shape)}"
    if kind == "npz" and x.ndim == 4:
        x = x.permute(0, 3, 1, 2).contiguous()                                       # (N, C, H, H)
    square = x.ndim == 4 and x.numel() and x.shape[2] == x.shape[3]
    if not square or not (x.dtype == torch.uint8 and x.shape[1] in (1, 3) if kind == "npz" else
                          x.is_floating_point() and x.isfinite().all()):
        raise ValueError(f"{path}: {needed[0]} must be {form}, N > 0, not {given}")
    labels, captions, names = (arrays.get(name, np.array([])) for name in LATENTS[1:])
    for what, array, count, kinds in (("labels (numbers)", labels, len(x), "iu"),
                                      ("captions", captions, len(x), "U"),
                                      ("class_names", names, names.size, "U")):
        if array.size and (array.shape != (count,) or array.dtype.kind not in kinds):
            raise ValueError(f"{path}: give {count} {what}, not {array.dtype} {array.shape}")
    labels = torch.from_numpy(labels.astype(np.int64)) if labels.size else None
    return x, labels, captions.tolist() or None, names.tolist()


def save_latents(path, latents, labels=None, captions=None, class_names=()):
    """Write (N, C, h, h) float latents for `latents:PATH`, as npz, whole or not at all."""
    labels = np.zeros(0, int) if labels is None else labels.cpu().numpy()
    texts = (np.array(some, str) for some in (captions or [], class_names))
    with written_whole(path) as file:
        np.savez(file, **dict(zip(LATENTS, (latents.cpu().numpy(), labels, *texts))))


def check_target(path, mark):
    """Raise ValueError unless `path` can be written, and is new or has the bytes `mark` near its
    start, which the same command left there; None: it must be new. Leaves nothing behind."""
    path = Path(path)
    if os.path.lexists(path) and (mark is None or not os.path.isfile(path) or
                                  mark not in np.fromfile(path, np.uint8, 2 ** 20).tobytes()):
        raise ValueError(f"{path} exists and was not made by this command: choose another name")
    there = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    probe = there / f"{max(path.parts, key=len)}.part"      # folders may have to be made as well
    try:
        with open(probe, "wb"):
            probe.unlink(missing_ok=True)       # of two processes the other may have been first
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): choose another") from error


@functools.lru_cache
def _font(letters):
    """A font of 10 pixels: Pillow's, or for other letters the installed one with most of them."""
    if letters.isascii():
        return ImageFont.load_default(10)
    from matplotlib import font_manager, ft2font  # slow to import and seldom needed
    fonts = (ft2font.FT2Font(f.fname) for f in font_manager.fontManager.ttflist
             if os.path.exists(f.fname) and "Last Resort" not in f.name)    # which has only boxes
    lacks = {f.fname: {*map(ord, letters)} - {*f.get_charmap()} for f in fonts if f.scalable}
    best = min(lacks, key=lambda f: len(lacks[f]))
    if missing := "".join(map(chr, sorted(lacks[best])))[:20]:
        print(f"no font here has {missing!r}: apt install fonts-noto-cjk", file=sys.stderr)
    return ImageFont.truetype(best, 10)


def _strips(captions, width):
    """Captions wrapped to `width` pixels, cut after five lines: (N, h, width, 3) uint8."""
    captions = [" ".join(caption.split()) for caption in captions]  # no font measures two lines
    font, texts = _font("".join(sorted(set("".join(captions))))), []
    for caption in captions:
        lines, most = [caption], 2 + int(2 * width * len(caption) / (font.getlength(caption) + 1))
        while max(map(font.getlength, lines)) > width - 6 and most > 1:             # 6: a gap
            lines = textwrap.wrap(caption, most := most - 1)[:5]
        texts.append(lines)
    height = 12 * max(1, *map(len, texts)) + 3
    strips = Image.new("RGB", (width, height * len(texts)), "white")    # one below the other
    for i, lines in enumerate(texts):
        for j, line in enumerate(lines):
            ImageDraw.Draw(strips).text((1, height * i + 12 * j), line, fill="black", font=font)
    return np.array(strips).reshape(len(texts), height, width, 3)


def make_grid(images, nrow=8, captions=None, pad=2, scale=None):
    """Images (N, C, H, W), uint8 or float [-1, 1], C = 1 or 3, as one picture (H', W', 3) uint8.
    captions: N strings, put below.  scale: whole; None = 1, or for captions to 64 pixels."""
    images = (images if images.dtype == torch.uint8 else to_uint8(images)).detach().cpu()
    tiles = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()                 # (N, H, W, 3)
    scale = scale or (math.ceil(64 / tiles.shape[2]) if captions else 1)
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)                        # nearest
    if captions:
        tiles = np.concatenate([tiles, _strips(captions, tiles.shape[2])], axis=1)
    columns = min(nrow, len(tiles))
    blank = -len(tiles) % columns                                       # tiles to fill the last row
    tiles = np.pad(tiles, ((0, blank), (pad, 0), (pad, 0), (0, 0)), constant_values=255)
    rows = tiles.reshape(-1, columns, *tiles.shape[1:]).swapaxes(1, 2)  # (rows, h, columns, w, 3)
    grid = rows.reshape(-1, columns * tiles.shape[2], 3)
    return np.pad(grid, ((0, pad), (0, pad), (0, 0)), constant_values=255)


def save_grid(images, path, nrow=8, captions=None, pad=2, scale=None, made_by=""):
    """make_grid, written as a PNG, whole or not at all. made_by: the mark of a command in it."""
    picture, info = Image.fromarray(make_grid(images, nrow, captions, pad, scale)), PngInfo()
    info.add_text("Software", made_by)
    with written_whole(path) as file:
        picture.save(file, "PNG", pnginfo=info)


def save_gif(frames, path, ms=80, made_by=""):
    """Write (H, W, 3) uint8 arrays, as make_grid returns them, as an endless GIF, ms per frame."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    with written_whole(path) as file:
        first.save(file, "GIF", save_all=True, append_images=rest, duration=ms, loop=0,
                   comment=made_by)
