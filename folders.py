"""folders.py: a folder of pictures and captions, as people have them, to arrays.

The idea
    No layout has to be named; the files tell.
    class folders     cat/a.png dog/b.png: the first folder is the class; numbers sort as numbers
    splits            train/ alone or beside val/, valid/, validation/ or test/, in any case
    tables            metadata.jsonl or metadata.csv in any folder, with the columns file_name and
                      text (or caption): Hugging Face's imagefolder; no classes then
    caption files     a.txt or a.caption beside a.png, in class folders or not: kohya's layout;
                      the 10 of "10_sks dog" is cut off, and no picture is repeated
    A picture is what Pillow can read.  Hidden files and folders are skipped.  Text is UTF-8.
    Nothing else is left out without being counted in the last thing that read_folder returns.

How to use
    python train.py --data folder:my_pictures
    images, labels, captions, class_names, left_out = read_folder("my_pictures", image_size=64)
"""
import csv
import io
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

SPLITS = {"train": "train", "val": "test", "valid": "test", "validation": "test", "test": "test"}
NOT_DECODED = {"PDF", "PALM", "BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow only knows their names


def read_folder(root, image_size=32, split="train", count=None, seed=0, skip_bad=False):
    """The pictures of a split of a folder; `choose` makes the split if there is no test folder.

    count: keep this many, chosen by seed.  skip_bad: leave out unreadable pictures, do not stop.
    Returns images (N, 3, H, W) uint8, labels (N,) int64, captions (N strings) or None, class names,
    what is left out (one line).  Raises ValueError that names the file or the folder.
    """
    root = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(root):
        raise ValueError(f"there is no folder {root}")
    rows, left_out = _list_folder(root)
    if not rows:
        raise ValueError(f"no images in {root}; left out: {left_out or 'nothing'}")
    classes = sorted({row[2] for row in rows}, key=_natural)  # of both splits, so they agree
    if any(row[1] == "test" for row in rows):
        rows, split = [row for row in rows if row[1] == split], None
    bare = [row[0] for row in rows if row[3] is None]
    if 0 < len(bare) < len(rows):
        raise ValueError(f"{len(bare)} of {len(rows)} images in {root} have no caption, the first "
                         f"is {bare[0]}: write one, or remove the image")
    if "" in classes and len(classes) > 1 and bare:
        raise ValueError(f"{root} holds both images and folders of images ({classes[1]}): keep one "
                         "of the two")
    number = {} if "" in classes else {name: i for i, name in enumerate(classes)}
    rows = [rows[i] for i in choose(len(rows), split, count, seed)]
    images, good = _read_images([row[0] for row in rows], image_size, skip_bad)
    if len(good) < len(rows):
        left_out = f"{len(rows) - len(good)} unreadable, {left_out}".removesuffix(", ")
    labels = torch.tensor([number.get(rows[i][2], 0) for i in good])
    captions = None if bare else [rows[i][3] for i in good]
    return images, labels, captions, list(number), left_out


def choose(total, split, count, seed):
    """Which of `total` items to keep: (n,) sorted positions.  split None: already split."""
    chosen = torch.arange(total)
    if total >= 200 and split is not None:  # the same test split for every seed
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        chosen = order[:total // 20] if split == "test" else order[total // 20:]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
    return chosen[order[:count]].sort().values


def _list_folder(root):
    """A row (path, split or None, class or "", caption or None) per image, and what is left out."""
    Image.init()
    endings = {e for e, kind in Image.registered_extensions().items() if kind not in NOT_DECODED}
    files = _files(root)
    images = [path for path in files if path.suffix.lower() in endings]
    captions, used, is_table = _captions(files, images)
    ignored = Counter(path.suffix or path.name for path in set(files).difference(images, used))
    left_out = [f"{n} {ending} (no image to Pillow)" for ending, n in sorted(ignored.items())]
    inside = {path: path.relative_to(root).parts[:-1] for path in images}  # its folders
    tops = {folders[0].lower() for folders in inside.values() if folders}
    # "train" beside car/ and bus/ is a class.
    has_splits = "train" in tops and (len(tops) == 1 or len(tops & SPLITS.keys()) > 1)
    rows = []
    for path, folders in inside.items():
        split = None
        if has_splits:
            split, folders = SPLITS.get("".join(folders[:1]).lower(), "none"), folders[1:]
        name = "" if is_table else "".join(folders[:1])
        if path in captions:
            name = re.sub(r"^\d+_", "", name)  # "10_sks dog" would mean: 10 times an epoch
        rows += [(path, split, name, caption) for caption in captions.get(path, [None])]
    kept = [row for row in rows if row[1] != "none"]
    if len(kept) < len(rows):
        left_out.append(f"{len(rows) - len(kept)} outside train/ and test/")
    return kept, ", ".join(left_out)


def _files(root):
    """All files under root in natural order, without hidden files and folders."""
    found = []
    for folder, inside, names in os.walk(root, followlinks=True):
        parent, real = os.path.realpath(os.path.dirname(folder)), os.path.realpath(folder)
        if folder != root and f"{parent}/".startswith(f"{real}/"):
            inside.clear()  # a link to a folder above: a circle
            continue
        inside[:] = [name for name in inside if name[0] != "."]
        found += [Path(folder, name) for name in names if name[0] != "."]
    return sorted(found, key=_natural)


def _natural(name):
    """A sort key by which 2 comes before 10."""
    return [int(s) if i % 2 else s for i, s in enumerate(re.split(r"(\d+)", str(name)))]


def _captions(files, images):
    """{image: its captions, as keys}, the files they are from, whether these are tables."""
    tables = [path for path in files if path.name in ("metadata.jsonl", "metadata.csv")]
    captions, there = {}, set(images if tables else files)
    for where, image, caption in (row for path in tables for row in _read_table(path)):
        if image not in there:
            raise ValueError(f"{where}: there is no image {image}")
        captions.setdefault(image, {})[caption] = None
    beside = {path: text for path in images for ending in (".caption", ".txt")
              if (text := path.with_suffix(ending)) in there}
    captions |= {path: {_read_text(text).strip(): None} for path, text in beside.items()}
    return captions, [*tables, *beside.values()], bool(tables)


def _read_table(path):
    """(where, image, caption) of each row of a metadata.jsonl or metadata.csv."""
    text, is_csv = _read_text(path), path.suffix == ".csv"
    lines = csv.DictReader(io.StringIO(text, newline="")) if is_csv else text.split("\n")
    for number, line in enumerate(lines, 1):
        if is_csv:
            number = lines.line_num
        elif not line.strip():
            continue
        try:
            row = line if is_csv else json.loads(line)
            image = Path(os.path.normpath(path.parent / row["file_name"]))
            caption = row["text"] if "text" in row else row["caption"]
            if not isinstance(caption, str):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number}: expected file_name and text (strings), found "
                             f"{str(line)[:80]}") from error
        yield f"{path} line {number}", image, caption


def _read_text(path):
    """The text of a UTF-8 file, with or without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise ValueError(f"{path} line {line} is not UTF-8: save the file as UTF-8") from error


# ---------------------------------------------------------------- picture files


def _to_rgb(image, background):
    """Any Pillow image to RGB, upright."""
    image = ImageOps.exif_transpose(image)  # phones store upright pictures sideways
    if image.mode.startswith("I"):  # 16-bit grey is scaled, not clipped: 65535 / 255 = 257
        image = Image.fromarray((np.array(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def _square(image, size):
    """The centre square, halved with a box filter while it can be, then bicubic (as ADM, DiT)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    while image.width >= 2 * size:
        image = image.resize((image.width // 2,) * 2, Image.Resampling.BOX)
    return image.resize((size, size), Image.Resampling.BICUBIC)


def read_image(path, size, background="white"):
    """One picture file as uint8 (3, size, size): its centre square, resized.

    background: what shows through where the picture is transparent; "black" for a mask.
    Raises ValueError with the file's name.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(_square(_to_rgb(image, background), size))             # (H, W, 3)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot read image {path} ({type(error).__name__}): damaged, cut short "
                         "or no image; delete it, or leave it out with --skip-bad") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)                                 # (3, H, W)


def _read_images(paths, size, skip_bad):
    """All files as (N, 3, H, W) uint8, and the positions in `paths` that could be read."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def read(i):
        try:
            images[i] = read_image(paths[i], size)
        except ValueError:
            if not skip_bad:
                raise
            return False
        return True

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # map cancels the rest after an exception
        work = tqdm(pool.map(read, range(len(paths))), "reading images", len(paths), disable=None)
        good = [i for i, is_read in enumerate(work) if is_read]
    if not good:
        raise ValueError(f"none of the {len(paths)} images could be read, the first is {paths[0]}")
    return (images if len(good) == len(paths) else images[good]), good
