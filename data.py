"""data.py: pictures and captions, in and out.

The idea
    A diffusion model needs pictures before it needs anything else, and the first run should need no download.
    So this file draws its own: `shapes` (one object on black, 48 classes) and `scenes` (one or two objects, with
    sizes, places, relations, backgrounds and a caption).  Each object is a signed distance d to its outline, in
    pixels, and its coverage of a pixel is clamp(0.5 - d, 0, 1): soft edges, no supersampling, any image size.
    Because we draw the pictures, we know what is true of each of them, and evaluate.py can read them back exactly.
    The same `load` reads real data: official files (MNIST, Fashion-MNIST, CIFAR-10), a folder, emoji, latents.
    A data set is one tensor in memory.  A batch is a pure function of the step: resuming needs no saved state.

Contents
    SHAPES ... PLACES, HELD_OUT        the vocabulary of the procedural worlds
    shape_coverage, render_shapes      drawing
    caption_of, parse_caption          the grammar, forwards and backwards
    load, Dataset, save_latents        every source, one type
    Batches, to_float, to_uint8        from a data set to training batches
    make_grid, save_grid, save_gif     looking at results

How to use
    python train.py --data folder:my_pictures              # any name that load knows
    python train.py --data cifar10 --flip off

    train = load("scenes", image_size=32)                  # or shapes mnist fashion cifar10 emoji
    mine = load("folder:photos", image_size=64)            # or latents:FILE.pt
    batches = Batches(train, batch_size=64, device="cpu", seed=0)
    x = to_float(batches.batch(step=0)["x"])               # (64, 3, 32, 32) in [-1, 1]
    save_grid(x, "grid.png")

It is longer than its neighbours because every source fails in its own way, and each failure gets its own sentence.
"""
import difflib
import gzip
import hashlib
import io
import json
import math
import os
import re
import struct
import sys
import tarfile
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

# ---------------------------------------------------------------- the vocabulary of the procedural worlds

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
NEW_SHAPES = ("heart", "diamond")  # shape index 6 and 7: never in a training set, kept for teaching new concepts
COLORS = {
    "red": (230, 40, 40), "green": (50, 180, 60), "blue": (60, 100, 255), "yellow": (250, 220, 40),
    "orange": (255, 125, 10), "purple": (160, 60, 220), "cyan": (40, 215, 230), "white": (250, 250, 250),
}
# Dull on purpose: every colour is at RGB distance >= 90 from every background.
BACKGROUNDS = {"black": (20, 20, 26), "gray": (110, 110, 115), "navy": (20, 30, 90), "brown": (90, 55, 25)}
SIZES = ("small", "large")
PLACES = ("in the middle", "on the left", "on the right", "at the top", "at the bottom")
RELATIONS = ("left of", "right of", "above", "below")
# Of captions with a relation, the share that says "right of" or "below", the converse of "left of" or "above".
# Training prefers one of the two, as people do: with even odds neither the order of the objects nor the relation word
# by itself tells anything about who is where, only both together (an exclusive or), and 4,000 steps did not find it.
CONVERSE = {"train": 0.2, "test": 0.5}
# Pairs that hold_out=True removes from training, to test composition: each shape once, six different colours.
HELD_OUT = (("circle", "purple"), ("square", "cyan"), ("triangle", "orange"),
            ("star", "blue"), ("cross", "yellow"), ("ring", "red"))

CLASS_NAMES = [f"{color} {shape}" for shape in SHAPES for color in COLORS]  # class = shape * 8 + color
CANVAS = 32.0  # cx, cy, r are pixels of a 32-pixel picture, whatever the image size

# ---------------------------------------------------------------- drawing


def _star(x, y):
    # Five-fold symmetry: fold the plane into one 36 degree wedge, where the outline is a single straight edge.
    tip, notch, wedge = 1.05, 0.55, math.pi / 5
    y = y - 0.1                                                                 # centre the bounding box, not the tips
    angle = torch.remainder(torch.atan2(x, -y) + wedge, 2 * wedge).sub_(wedge).abs_()
    radius = torch.hypot(x, y)
    edge = (notch * math.cos(wedge) - tip, notch * math.sin(wedge))             # from the tip to the notch
    length = math.hypot(*edge)
    return (radius * angle.cos() - tip) * (edge[1] / length) - radius * angle.sin() * (edge[0] / length)


def _heart(x, y):
    # A square on its corner and a disc on each of its two upper sides.
    q = 0.8                                                                     # half diagonal
    y = y - 0.1 * q
    x = x.abs()
    square = (x + y.abs() - q) * math.sqrt(0.5)
    disc = torch.hypot(x - q / 2, y + q / 2) - q * math.sqrt(0.5)
    return torch.minimum(square, disc)


def _triangle(x, y):
    # Apex (0, -0.95), base from (-1, 0.95) to (1, 0.95).
    slope = math.hypot(1.9, 1.0)
    return torch.maximum((1.9 * x.abs() - (y + 0.95)) / slope, y - 0.95)


def _cross(x, y):
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 0.36, y - 0.98), torch.maximum(x - 0.98, y - 0.36))


# Signed distance (negative inside) for unit size; x (n, 1, W), y (n, H, 1), y points down.  Every shape lies inside
# the square |x|, |y| <= 1, so r bounds the object, and every area is between 1.7 r^2 and 2.4 r^2.
# Distances are exact along the edges; beyond a sharp corner they are those of the extended edge, a hair too small.
OUTLINES = (
    lambda x, y: torch.hypot(x, y) - 0.86,                                      # circle
    lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.76,                        # square
    _triangle,
    _star,
    _cross,
    lambda x, y: (torch.hypot(x, y) - 0.77).abs_() - 0.22,                      # ring: radii 0.55 to 0.99
    _heart,
    lambda x, y: (x.abs() + y.abs() - 1.0) * math.sqrt(0.5),                    # diamond
)


def shape_coverage(shape_index, cx, cy, r, image_size=32):
    """How much of each pixel a shape covers.

    shape_index: (B,) int64 into SHAPES + NEW_SHAPES, or one int; -1 = absent, covers nothing.
    cx, cy, r: (B,) float, centre and half extent in pixels of a 32-pixel picture that spans [0, 32].
    Returns (B, H, W) float32 in [0, 1].
    """
    shape_index = torch.as_tensor(shape_index, device=cx.device).expand_as(cx)  # (B,)
    scale = image_size / CANVAS
    grid = (torch.arange(image_size, device=cx.device) + 0.5) / scale           # (W,) pixel centres
    coverage = torch.zeros(len(cx), image_size, image_size, device=cx.device)   # (B, H, W)
    for index, outline in enumerate(OUTLINES):
        rows = (shape_index == index).nonzero()[:, 0]                           # (n,)
        if len(rows) == 0:
            continue
        size = r[rows, None, None].float()                                      # (n, 1, 1)
        x = (grid - cx[rows, None].float())[:, None, :] / size                  # (n, 1, W)
        y = (grid - cy[rows, None].float())[:, :, None] / size                  # (n, H, 1)
        distance = outline(x, y) * (size * scale)                               # (n, H, W) pixels of this image
        coverage[rows] = (0.5 - distance).clamp_(0, 1)
    return coverage


def render_shapes(shape, color, cx, cy, r, background, image_size=32):
    """Draw B pictures of up to K objects each; later objects lie over earlier ones.

    shape: (B, K) int64, -1 = absent; color: (B, K, 3) uint8; background: (B, 3) uint8.
    cx, cy, r: (B, K) float, pixels of a 32-pixel picture.  Works on any device.
    Returns (B, 3, H, W) uint8.
    """
    images = torch.empty(len(shape), 3, image_size, image_size, dtype=torch.uint8, device=shape.device)
    chunk = max(1, 256 * 1024 // image_size ** 2)  # small enough for the processor's cache
    for i in range(0, len(shape), chunk):
        rows = slice(i, i + chunk)
        canvas = background[rows, :, None, None].float().repeat(1, 1, image_size, image_size)  # (b, 3, H, W)
        for k in range(shape.shape[1]):
            alpha = shape_coverage(shape[rows, k], cx[rows, k], cy[rows, k], r[rows, k], image_size)
            canvas.lerp_(color[rows, k, :, None, None].float(), alpha[:, None])                # (b, 3, H, W)
        images[rows] = canvas.add_(0.5).to(torch.uint8)  # + 0.5: the conversion cuts, we want to round
    return images


# ---------------------------------------------------------------- the grammar


def caption_of(objects, relation=None, background=None):
    """The caption of a scene, e.g. "a red circle left of a blue square on gray".

    objects: one or two dicts with shape, color and, for a single object, optionally size and place.
    The inverse of parse_caption: caption_of(**parse_caption(text)) == text.
    """
    phrases = []
    for thing in objects:
        words = [thing[key] for key in ("size", "color", "shape") if key in thing]
        article = "an" if words[0] == "orange" else "a"
        phrases.append(" ".join([article] + words + ([thing["place"]] if "place" in thing else [])))
    text = f" {relation} ".join(phrases)
    return text + (f" on {background}" if background else "")


def parse_caption(caption):
    """Read a caption of `shapes` or `scenes` back into the facts it states.

    Returns {"objects": [{"shape", "color", "size"?, "place"?}, ...], "relation"?, "background"?}; ? = if stated.
    Raises ValueError for a caption outside the grammar.
    """
    colors, shapes = "|".join(COLORS), "|".join(SHAPES + NEW_SHAPES)
    one = (rf"an? (?:(?P<size>{'|'.join(SIZES)}) )?(?P<color>{colors}) (?P<shape>{shapes})"
           rf"(?: (?P<place>{'|'.join(PLACES)}))?")
    two = (rf"an? (?P<color>{colors}) (?P<shape>{shapes}) (?P<relation>{'|'.join(RELATIONS)}) "
           rf"an? (?P<color2>{colors}) (?P<shape2>{shapes})")
    ground = rf"(?: on (?P<background>{'|'.join(BACKGROUNDS)}))?"
    match = re.fullmatch(one + ground, caption) or re.fullmatch(two + ground, caption)
    if match is None:
        raise ValueError(f"not a caption of this world: {caption!r}; expected for example "
                         '"a small red circle on the left on black" or "a red circle left of a blue square on gray"')
    found = {key: value for key, value in match.groupdict().items() if value is not None}
    facts = {"objects": [{key: found[key] for key in ("shape", "color", "size", "place") if key in found}]}
    if "shape2" in found:
        facts["objects"].append({"shape": found["shape2"], "color": found["color2"]})
    return facts | {key: found[key] for key in ("relation", "background") if key in found}


# ---------------------------------------------------------------- data sets


@dataclass
class Dataset:
    """A whole data set in memory."""
    name: str
    images: torch.Tensor      # (N, C, H, W) uint8, or float latents
    labels: torch.Tensor      # (N,) int64, all 0 when there are no classes
    captions: list            # N strings, or None
    class_names: list         # empty = unconditional
    flip: bool                # whether a left-right flip keeps the meaning

    @property
    def num_classes(self):
        """How many class names there are; 0 = no classes."""
        return len(self.class_names)

    def __len__(self):
        return len(self.images)


def _uniform(count, low, high, generator):
    """(count,) draws, uniform in [low, high]; the ends may be tensors."""
    return low + (high - low) * torch.rand(count, generator=generator)


def _draw_classes(count, split, hold_out, generator):
    """First and second object of each picture: (count,) int64 each, every allowed class equally often as the first."""
    removed = {f"{color} {shape}" for shape, color in HELD_OUT} if hold_out and split == "train" else set()
    allowed = torch.tensor([i for i, name in enumerate(CLASS_NAMES) if name not in removed])
    first = torch.arange(count)[torch.randperm(count, generator=generator)] % len(allowed)
    second = (first + torch.randint(1, len(allowed), (count,), generator=generator)) % len(allowed)  # never the same
    return allowed[first], allowed[second]


def _procedural(name, image_size, split, count, seed, hold_out):
    count = count or (48_000 if split == "train" else 2_000)
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    first, second = _draw_classes(count, split, hold_out, generator)
    world = (_shapes_world(first, second, generator) if name == "shapes" else
             _scenes_world(first, second, generator, CONVERSE[split]))
    pair, cx, cy, r, ground, captions = world
    palette = torch.tensor(list(COLORS.values()), dtype=torch.uint8)
    grounds = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.uint8)
    shape = torch.where(pair < 0, -1, pair // len(COLORS))                      # (N, K)
    images = render_shapes(shape, palette[pair % len(COLORS)], cx, cy, r, grounds[ground], image_size)
    return Dataset(name, images, first, captions, list(CLASS_NAMES), flip=False)


def _thing(label):
    color, shape = CLASS_NAMES[label].split()
    return {"shape": shape, "color": color}


def _shapes_world(first, second, generator):
    """One large object near the centre, on black: class (N, 1), cx, cy, r (N, 1), background (N,), captions."""
    count = len(first)
    cx, cy = (_uniform((count, 1), 13.0, 19.0, generator) for _ in range(2))
    r = _uniform((count, 1), 8.0, 11.0, generator)
    captions = [caption_of([_thing(label)]) for label in first.tolist()]
    return first[:, None], cx, cy, r, torch.zeros(count, dtype=torch.int64), captions


def _scenes_world(first, second, generator, converse):
    """One object (60 %) or two (40 %).  Returns class (N, 2), cx, cy, r (N, 2), background (N,), captions."""
    count = len(first)
    two = torch.rand(count, generator=generator) < 0.4                          # (N,)
    small, place, upright, ground = (torch.randint(n, (count,), generator=generator) for n in (2, 5, 2, 4))
    small = small.bool()
    relation = 2 * upright + (torch.rand(count, generator=generator) < converse)    # (N,) the order of RELATIONS

    # One object: a small one has more room, so it goes further to the side.
    r1 = torch.where(small | two, _uniform(count, 4.5, 6.0, generator), _uniform(count, 8.5, 10.5, generator))
    side = torch.tensor([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])[place]      # (N, 2) the order of PLACES
    jitter = _uniform((count, 2), -1.0, 1.0, generator) * torch.where(small, 1.5, 1.0)[:, None]
    alone = 16.0 + side * torch.where(small, 8.0, 5.0)[:, None] + jitter        # (N, 2) centre x, y
    alone = torch.maximum(torch.minimum(alone, CANVAS - r1[:, None]), r1[:, None])  # fully inside the picture

    # Two objects: each keeps to its own half, at least one pixel apart; on the other axis they nearly agree.
    r2 = _uniform(count, 4.5, 6.0, generator)
    near, far = (_uniform(count, r + 0.5, 15.5 - r, generator) for r in (r1, r2))
    level = _uniform(count, 10.0, 22.0, generator)[:, None] + _uniform((count, 2), -1.0, 1.0, generator)  # (N, 2)
    along = torch.stack([near, CANVAS - far], 1)                                # (N, 2) per object: low half, high half
    along = torch.where((relation % 2 == 0)[:, None], along, CANVAS - along)    # right of, below: the other way round
    sideways = (relation < 2)[:, None]
    pair_x, pair_y = torch.where(sideways, along, level), torch.where(sideways, level, along)

    cx = torch.where(two[:, None], pair_x, alone[:, :1])                        # (N, 2) the absent object's is unused
    cy = torch.where(two[:, None], pair_y, alone[:, 1:])
    labels = torch.stack([first, torch.where(two, second, -1)], 1)
    captions = []
    columns = zip(*(column.tolist() for column in (first, second, two, small, place, relation, ground)))
    for a, b, is_two, is_small, where, how, on in columns:
        on = tuple(BACKGROUNDS)[on]
        if is_two:
            captions.append(caption_of([_thing(a), _thing(b)], RELATIONS[how], on))
        else:
            captions.append(caption_of([_thing(a) | {"size": SIZES[not is_small], "place": PLACES[where]}], None, on))
    return labels, cx, cy, torch.stack([r1, r2], 1), ground, captions


# ---------------------------------------------------------------- files of your own

IMAGE_TYPES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


def _to_rgb(image):
    """Any Pillow image to RGB: 16-bit grey is scaled, not clipped; what is transparent becomes white."""
    image = ImageOps.exif_transpose(image)  # phones store upright pictures sideways
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))  # 65535 / 255 = 257
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


def _square(image, size):
    """Resize so that the shorter side is `size`, then cut the centre square (the order of ADM and DiT)."""
    if max(image.size) > 8 * min(image.size):  # a 1 x 4000 line would first grow to a gigabyte
        image = ImageOps.fit(image, (min(image.size),) * 2)
    while min(image.size) >= 2 * size:  # halving with a box first keeps bicubic from aliasing
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _read_image(path, size):
    """(H, W, 3) uint8, or the exception if the file cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(_square(_to_rgb(image), size))
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...; _read_images reports it
        return error


def _read_images(paths, size, skip_bad):
    """All files as (N, 3, H, W) uint8, and the positions in `paths` that could be read."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    good = []
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        pixels = pool.map(lambda path: _read_image(path, size), paths)
        for i, array in enumerate(tqdm(pixels, "reading images", len(paths), disable=None)):  # None: only on a terminal
            if isinstance(array, np.ndarray):
                images[len(good)] = torch.tensor(array).permute(2, 0, 1)        # (H, W, 3) -> (3, H, W)
                good.append(i)
            elif not skip_bad:
                raise ValueError(f"cannot read image {paths[i]} ({type(array).__name__}): damaged, cut short or not an "
                                 "image; delete it, or leave out such files with --skip-bad")
    finally:
        pool.shutdown(cancel_futures=True)
    if len(good) < len(paths):
        print(f"skipped {len(paths) - len(good)} unreadable of {len(paths)} images", file=sys.stderr)
    if not good:
        raise ValueError(f"none of the {len(paths)} images could be read, the first is {paths[0]}")
    return images[:len(good)], good


def read_image(path, size):
    """One picture file as uint8 (3, size, size), converted and cut like a folder's. Raises ValueError with its name."""
    return _read_images([Path(path)], size, skip_bad=False)[0][0]


def _images_in(folder, pattern="*"):
    # A leading dot: thumbnails and resource forks that file managers leave behind.
    return sorted(path for path in folder.glob(pattern)
                  if path.suffix.lower() in IMAGE_TYPES and not path.name.startswith("."))


def _metadata(folder):
    """Paths and captions of a Hugging Face metadata.jsonl: one {"file_name": ..., "text": ...} a line."""
    paths, captions = [], []
    for number, line in enumerate((folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines(), 1):
        where = f"{folder / 'metadata.jsonl'} line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            path, caption = folder / row["file_name"], row["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{where}: expected {{"file_name": ..., "text": ...}}, found {line[:80]!r}') from error
        if not isinstance(caption, str):
            raise ValueError(f"{where}: the text of {row['file_name']} must be a string, found {caption!r}")
        if not path.is_file():
            raise ValueError(f"{where}: there is no file {path}")
        paths.append(path)
        captions.append(caption)
    return paths, captions


def _list_folder(folder):
    """Returns paths, labels, captions or None, class names; see load for the layouts."""
    if (folder / "metadata.jsonl").is_file():
        paths, captions = _metadata(folder)
        return paths, [0] * len(paths), captions, []
    paths = _images_in(folder)
    classes = {sub.name: _images_in(sub, "**/*") for sub in sorted(folder.iterdir()) if sub.is_dir()}
    classes = {name: members for name, members in classes.items() if members}
    if paths and classes:
        raise ValueError(f"{folder} holds both images and folders of images ({next(iter(classes))}); keep one of the "
                         "two")
    if classes:
        labels = [label for label, members in enumerate(classes.values()) for _ in members]
        return sum(classes.values(), []), labels, None, list(classes)
    texts = [path.with_suffix(".txt") for path in paths]
    missing = [path for path, text in zip(paths, texts) if not text.is_file()]
    if len(missing) == len(paths):
        return paths, [0] * len(paths), None, []
    if missing:
        raise ValueError(f"{len(missing)} of {len(paths)} images in {folder} have no caption file, the first is "
                         f"{missing[0].name}; write {missing[0].stem}.txt or remove the image")
    return paths, [0] * len(paths), [text.read_text(encoding="utf-8").strip() for text in texts], []


def _choose(total, split, count, seed):
    """Which of `total` items belong to a split that nobody made: (n,) sorted positions.

    A twentieth is the test split, the same one for every seed.  Under 200 items both splits are everything.
    """
    chosen = torch.arange(total)
    if total >= 200 and split is not None:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        chosen = order[:total // 20] if split == "test" else order[total // 20:]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
    return chosen[order[:count]].sort().values


def _folder(name, path, image_size, split, count, seed, skip_bad):
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    if (root / "train").is_dir() and (root / "test").is_dir():
        root, split = root / split, None  # the folder brings its own split
    paths, labels, captions, class_names = _list_folder(root)
    if not paths:
        raise ValueError(f"no images in {root}; looked for {' '.join(sorted(IMAGE_TYPES))}")
    chosen = _choose(len(paths), split, count, seed)
    images, good = _read_images([paths[i] for i in chosen], image_size, skip_bad)
    chosen = chosen[good]
    return Dataset(name, images, torch.tensor(labels)[chosen], captions and [captions[i] for i in chosen],
                   class_names, flip=captions is None)  # a caption may say left or right


# ---------------------------------------------------------------- official files

# File -> (md5, sha256 or None).  MNIST and Fashion-MNIST use the same four names.
IDX_FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
             "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # http only: the checksum is essential
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CHECKSUMS = {
    "mnist/train-images-idx3-ubyte.gz": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", None),
    "mnist/train-labels-idx1-ubyte.gz": ("d53e105ee54ea40749a09fcbcd1e9432",
                                         "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    "mnist/t10k-images-idx3-ubyte.gz": ("9fb629c4189551a2d022fa330f9573f3",
                                        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    "mnist/t10k-labels-idx1-ubyte.gz": ("ec29112dd5afa0611ce80d1b7f02629c",
                                        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    "fashion/train-images-idx3-ubyte.gz": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", None),
    "fashion/train-labels-idx1-ubyte.gz": ("25c81989df183df01b3e8a0aad5dffbe", None),
    "fashion/t10k-images-idx3-ubyte.gz": ("bef4ecab320f06d8554ea6380940ec79", None),
    "fashion/t10k-labels-idx1-ubyte.gz": ("bb300cfdad3c16e7a12a480ee83cd310", None),
    "cifar10/cifar-10-binary.tar.gz": ("c32a1d4ab5d03f1284b67883e8d87530",
                                       "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
}
OFFICIAL_CLASSES = {
    "mnist": list("0123456789"),
    "fashion": ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"],
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
}


def _official_bytes(data_dir, key, url):
    """The checked bytes of data_dir/key, downloaded first if the file is not there."""
    path = Path(data_dir) / key
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:  # writes under a temporary name and moves it into place when complete
            torch.hub.download_url_to_file(url + path.name, str(path), progress=sys.stderr.isatty())
        except Exception as error:  # no network, no such host, refused, cut off, disk full
            raise ValueError(f"could not download {url}{path.name} ({error}); "
                             f"fetch it elsewhere and put it at {path}") from error
    raw = path.read_bytes()
    for algorithm, wanted in zip(("md5", "sha256"), CHECKSUMS[key]):
        found = hashlib.new(algorithm, raw, usedforsecurity=False).hexdigest()
        if wanted not in (None, found):
            raise ValueError(f"{path} has {algorithm} {found}, expected {wanted}: delete the file and load again")
    return raw


def _read_idx(data_dir, name, stem, url):
    """An IDX file, gzipped or extracted: images (N, rows, columns) or labels (N,), uint8."""
    plain = Path(data_dir) / name / stem
    raw = plain.read_bytes() if plain.exists() else gzip.decompress(_official_bytes(data_dir, f"{name}/{stem}.gz", url))
    ndim = 3 if "images" in stem else 1
    magic, *shape = struct.unpack_from(f">{1 + ndim}I", raw.ljust(16, b"\0"))   # big-endian
    header = 4 * (1 + ndim)
    if magic != 0x800 + ndim or len(raw) - header != math.prod(shape):  # 0x08: bytes; last digit: dimensions
        raise ValueError(f"{plain} is not a complete IDX file (magic {magic:#x}, {len(raw)} bytes): "
                         "delete it and load again")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)[header:].view(shape)


def _read_cifar(data_dir, split):
    """images (N, 3, 32, 32) and labels (N,), uint8; a record is 1 label byte and 3 x 1024 colour bytes, row by row."""
    members = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    for folder in (Path(data_dir) / "cifar10", Path(data_dir) / "cifar10" / "cifar-10-batches-bin"):
        if all((folder / member).exists() for member in members):
            raw = [(folder / member).read_bytes() for member in members]
            break
    else:
        archive = io.BytesIO(_official_bytes(data_dir, "cifar10/cifar-10-binary.tar.gz", CIFAR_URL))
        with tarfile.open(fileobj=archive) as tar:
            raw = [tar.extractfile(f"cifar-10-batches-bin/{member}").read() for member in members]
    for member, part in zip(members, raw):
        if len(part) == 0 or len(part) % 3073 or max(part[::3073]) > 9:
            raise ValueError(f"{member} of cifar10 is not made of 3073-byte records with labels 0 to 9: "
                             "delete it and load again")
    records = torch.frombuffer(bytearray(b"".join(raw)), dtype=torch.uint8).view(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _official(name, image_size, split, data_dir, count, seed):
    if name == "cifar10":
        images, labels = _read_cifar(data_dir, split)
    else:
        url = MNIST_URL if name == "mnist" else FASHION_URL
        images, labels = (_read_idx(data_dir, name, stem, url) for stem in IDX_FILES[split])
        images = images[:, None]                                                # (N, 28, 28) -> (N, 1, 28, 28)
        if image_size != images.shape[-1]:
            images = F.pad(images, (2, 2, 2, 2))                                # (N, 1, 32, 32) black border
    if len(images) != len(labels):
        raise ValueError(f"{name} in {data_dir}: {len(images)} images but {len(labels)} labels; "
                         "the files do not belong together")
    chosen = _choose(len(images), None, count, seed)
    images, labels = images[chosen], labels[chosen].long()
    if image_size != images.shape[-1]:
        images = F.interpolate(images, size=image_size, mode="bicubic", antialias=True)  # uint8 in, uint8 out
    return Dataset(name, images, labels, None, list(OFFICIAL_CLASSES[name]), flip=name != "mnist")


# ---------------------------------------------------------------- emoji

EMOJI_FONTS = ("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",             # Debian, Ubuntu
               "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",         # Fedora
               "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
               "/usr/share/fonts/noto/NotoColorEmoji.ttf")                      # Arch
# Pictures among the single code points of Unicode 14 (no letters, arrows, buttons, skin tones), pinned so that the
# data set does not change with the version of Python or of the font.
EMOJI = """
231a-231b 2328 23f0-23f3 2600-2604 260e 2614-2615 2618 261d 2620 2622-2623 2626 262a 262e-262f 2639-263a
265f-2660 2663 2665-2666 2668 267b 267f 2692-2697 2699 269b-269c 26a0-26a1 26aa-26ab 26b0-26b1 26bd-26be
26c4-26c5 26c8 26ce-26cf 26d1 26d3-26d4 26e9-26ea 26f0-26f5 26f7-26fa 26fd 2702 2708-270d 270f 2712 271d 2721
2728 2744 2747 274c 2763-2764 2b1b-2b1c 2b50 2b55 1f004 1f0cf 1f300-1f321 1f324-1f393 1f396-1f397 1f399-1f39b
1f39e-1f3f0 1f3f3-1f3f5 1f3f7-1f3fa 1f400-1f4fd 1f4ff 1f507-1f518 1f525-1f53d 1f549-1f54e 1f550-1f567
1f56f-1f570 1f573-1f57a 1f587 1f58a-1f58d 1f590 1f595-1f596 1f5a4-1f5a5 1f5a8 1f5b1-1f5b2 1f5bc 1f5c2-1f5c4
1f5d1-1f5d3 1f5dc-1f5de 1f5e1 1f5e3 1f5e8 1f5ef 1f5f3 1f5fa-1f64f 1f680-1f6c5 1f6cb-1f6d2 1f6d5-1f6d7
1f6dd-1f6e5 1f6e9 1f6eb-1f6ec 1f6f0 1f6f3-1f6fc 1f7e0-1f7eb 1f7f0 1f90c-1f93a 1f93c-1f945 1f947-1f9af
1f9b4-1f9ff 1fa70-1fa74 1fa78-1fa7c 1fa80-1fa86 1fa90-1faac 1fab0-1faba 1fac0-1fac5 1fad0-1fad9 1fae0-1fae7
1faf0-1faf6
"""


def _emoji(name, image_size, split, count, seed):
    font_path = next((path for path in EMOJI_FONTS if os.path.exists(path)), None)
    if font_path is None:
        raise ValueError("no colour emoji font found; install Noto Color Emoji (apt install fonts-noto-color-emoji), "
                         "or use a folder of pictures: folder:PATH")
    font = ImageFont.truetype(font_path, 109, layout_engine=ImageFont.Layout.BASIC)  # 109: the only size it contains
    spans = [[int(end, 16) for end in span.split("-")] for span in EMOJI.split()]
    glyphs = [chr(code) for span in spans for code in range(span[0], span[-1] + 1)]
    images, captions = [], []
    for i in _choose(len(glyphs), split, count, seed):
        canvas = Image.new("RGB", (136, 136), "white")                          # every glyph is 136 x 128
        ImageDraw.Draw(canvas).text((0, 4), glyphs[i], font=font, embedded_color=True, anchor="lt")
        images.append(torch.tensor(np.asarray(_square(canvas, image_size))).permute(2, 0, 1))  # (3, H, W)
        captions.append(unicodedata.name(glyphs[i]).lower())
    return Dataset(name, torch.stack(images), torch.zeros(len(images), dtype=torch.int64), captions, [], flip=False)


# ---------------------------------------------------------------- latents


def save_latents(path, latents, labels=None, captions=None, class_names=()):
    """Write (N, C, h, w) float latents for `latents:PATH`; complete or not at all."""
    temporary = f"{path}.tmp"
    torch.save({"latents": latents.cpu(), "labels": None if labels is None else labels.cpu(),
                "captions": None if captions is None else list(captions), "class_names": list(class_names)}, temporary)
    os.replace(temporary, path)


def _latents(name, path, split, count, seed):
    if not os.path.isfile(path):
        raise ValueError(f"there is no latents file {path}; make one with train.py --save-latents")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        latents, labels, captions = saved["latents"], saved["labels"], saved["captions"]
        class_names = list(saved["class_names"])
    except Exception as error:  # cut short, not a torch file, forbidden types, other keys
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a file of save_latents (latents, labels, captions, class_names): "
                         f"{reason}") from error
    if not (torch.is_tensor(latents) and latents.is_floating_point() and latents.ndim == 4 and len(latents)):
        raise ValueError(f"{path}: latents must be a float tensor (N, C, h, w) with N > 0")
    labels = torch.zeros(len(latents), dtype=torch.int64) if labels is None else labels.long()
    if len(labels) != len(latents) or (captions is not None and len(captions) != len(latents)):
        raise ValueError(f"{path}: {len(latents)} latents, {len(labels)} labels, "
                         f"{'no' if captions is None else len(captions)} captions; the numbers must agree")
    if class_names and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise ValueError(f"{path}: labels {labels.min()} to {labels.max()} but {len(class_names)} class names")
    chosen = _choose(len(latents), split, count, seed)
    return Dataset(name, latents[chosen], labels[chosen], captions and [captions[i] for i in chosen],
                   class_names, flip=False)


# ---------------------------------------------------------------- the front door


def load(name, image_size=32, split="train", data_dir="data", count=None, seed=0, hold_out=False, skip_bad=False):
    """Load a data set into memory.

    name: shapes, scenes            drawn here; count defaults to 48,000 (train) and 2,000 (test)
          mnist, fashion, cifar10   official files in data_dir, checked; downloaded only if absent
          emoji                     the installed Noto colour font, captions are Unicode names
          folder:PATH               class sub-folders, or metadata.jsonl, or image.jpg + image.txt, or just images;
                                    with train/ and test/ inside, split chooses, else a fixed 5 % is the test split
          latents:PATH              a file of save_latents; image_size is ignored
    count: keep this many, chosen by seed.  hold_out: drop the HELD_OUT pairs from training (shapes, scenes).
    skip_bad: leave out unreadable images of a folder instead of stopping.
    Raises ValueError, one sentence, for anything the caller can put right.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, not {split!r}")
    if image_size < 1 or (count is not None and count < 1):
        raise ValueError(f"image_size and count must be positive, not {image_size} and {count}")
    kind, _, path = name.partition(":")
    if hold_out and kind not in ("shapes", "scenes"):
        raise ValueError(f"hold_out is for shapes and scenes, not for {name}")
    if name in ("shapes", "scenes"):
        return _procedural(name, image_size, split, count, seed, hold_out)
    if name in OFFICIAL_CLASSES:
        return _official(name, image_size, split, data_dir, count, seed)
    if name == "emoji":
        return _emoji(name, image_size, split, count, seed)
    if kind == "folder" and path:
        return _folder(name, path, image_size, split, count, seed, skip_bad)
    if kind == "latents" and path:
        return _latents(name, path, split, count, seed)
    known = ["shapes", "scenes", "mnist", "fashion", "cifar10", "emoji", "folder:PATH", "latents:PATH"]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"unknown data set {name!r}; {hint}Known: {', '.join(known)}")


# ---------------------------------------------------------------- batches


def to_float(images):
    """uint8 0..255 -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float [-1, 1] (clamped) -> uint8; undoes to_float exactly."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


class Batches:
    """Shuffled batches as a pure function of the step: resuming needs the step and nothing else.

    The examples of all epochs form one endless row, each epoch in its own order; batch s is its positions
    [s * batch_size, (s + 1) * batch_size).  So a batch may end one epoch and begin the next, and over any whole epoch
    every example comes exactly once.  The data set lives on the device, and drawing a batch never waits for it.
    """

    def __init__(self, dataset, batch_size, device="cpu", seed=0):
        if batch_size < 1 or len(dataset) == 0:
            raise ValueError(f"need a positive batch size and some data, not {batch_size} and {len(dataset)} examples")
        self.images, self.labels = dataset.images.to(device), dataset.labels.to(device)
        self.batch_size, self.flip, self.seed = batch_size, dataset.flip, seed
        self.orders = {}  # epoch -> (N,) on the device

    def _order(self, epoch):
        if epoch not in self.orders:
            self.orders = {e: order for e, order in self.orders.items() if e == epoch - 1}  # forget all but the last
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
            self.orders[epoch] = torch.randperm(len(self.images), generator=generator).to(self.images.device)
        return self.orders[epoch]

    def batch(self, step, rows=slice(None), flip_draws=None):
        """The batch of a step (from 0): {"x": (B, C, H, W) as stored, "y": (B,) int64, "index": (B,)}.

        index: where in the data set.  rows: the slice of the global batch that this process works on.
        flip_draws: (batch_size,) uniform draws in [0, 1) for the global batch, on the device; under 0.5 means
            mirrored, in data sets whose meaning survives it.  None: no flips.
        """
        position, end, parts = step * self.batch_size, (step + 1) * self.batch_size, []
        while position < end:
            epoch, offset = divmod(position, len(self.images))
            parts.append(self._order(epoch)[offset:offset + end - position])
            position += len(parts[-1])
        index = torch.cat(parts)[rows]                                          # (B,)
        x = self.images[index]                                                  # (B, C, H, W)
        if self.flip and flip_draws is not None:
            x = torch.where(flip_draws[rows, None, None, None] < 0.5, x.flip(-1), x)
        return {"x": x, "y": self.labels[index], "index": index}


# ---------------------------------------------------------------- looking at results


def _labels(captions, width, font):
    """Captions wrapped to at most four lines of `width` pixels, longer ones cut: (N, h, width, 3) uint8."""
    texts = []
    for caption in captions:
        lines = [""]
        for word in caption.split():
            longer = f"{lines[-1]} {word}".strip()
            fits = font.getlength(longer) <= width or not lines[-1]
            lines = lines[:-1] + [longer] if fits else lines + [word]
        texts.append(lines[:4])
    strips = []
    for lines in texts:
        strip = Image.new("RGB", (width, 12 * max(map(len, texts)) + 3), "white")
        for i, line in enumerate(lines):
            ImageDraw.Draw(strip).text((1, 12 * i), line, fill="black", font=font)
        strips.append(np.asarray(strip))
    return np.stack(strips)


def make_grid(images, nrow=8, captions=None, pad=2, scale=None):
    """Tile images into one picture.

    images: (N, C, H, W), uint8 or float [-1, 1], C = 1 or 3.  captions: N strings, drawn under the tiles.
    scale: whole-number enlargement; by default 1, with captions as much as makes a tile at least 64 pixels wide.
    Returns (H', W', 3) uint8, numpy.
    """
    images = images.detach().cpu()
    images = images if images.dtype == torch.uint8 else to_uint8(images)
    tiles = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()            # (N, H, W, 3)
    scale = scale or (math.ceil(64 / tiles.shape[2]) if captions else 1)
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)                   # nearest neighbour
    if captions:
        tiles = np.concatenate([tiles, _labels(captions, tiles.shape[2], ImageFont.load_default(10))], axis=1)
    count, height, width, _ = tiles.shape
    columns = min(nrow, count)
    grid = np.full((math.ceil(count / columns) * (height + pad) + pad, columns * (width + pad) + pad, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + pad) + pad, i % columns * (width + pad) + pad
        grid[top:top + height, left:left + width] = tile
    return grid


def save_grid(images, path, nrow=8, captions=None, pad=2, scale=None):
    """make_grid, written as a PNG; makes the folder if needed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(make_grid(images, nrow, captions, pad, scale)).save(path)


def save_gif(frames, path, ms=80):
    """Write (H, W, 3) uint8 arrays, as make_grid returns them, as an endless GIF with ms milliseconds a frame."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=ms, loop=0)
