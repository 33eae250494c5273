"""folders.py: a folder of pictures and captions, as people have them, to arrays.

    python train.py --data folder:my_pictures

No layout has to be named; the files tell.
  class folders     cat/a.png dog/b.png: the first folder is the class; numbers sort as numbers
  splits            train/, val/, valid/, validation/, test/, in any case, if there is no other
                    folder, or if train/ and another of them are there
  tables            metadata.jsonl or metadata.csv in any folder, a row per caption: file_name and
                    text (or caption), as in Hugging Face's imagefolder; no classes then
  caption files     a.txt or a.caption beside a.png: kohya's layout; "10_sks dog" is "sks dog"
A picture is what Pillow reads.  What is hidden is skipped.  Text is UTF-8; an empty one is none."""
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

MEMORY = "/proc/meminfo"        # where Linux says how much is free; elsewhere nothing is refused
SPLITS = {"train": "train", "val": "test", "valid": "test", "validation": "test", "test": "test"}


def read_folder(root, image_size=32, split="train", count=None, seed=0, skip_bad=False,
                encode=lambda images: images):
    """The pictures of a split of a folder; `choose` makes the split if there is no test folder.
    count: keep this many, chosen by seed.  skip_bad: leave out unreadable pictures, do not stop.
    encode: images (n, 3, H, W) uint8, of 64 files at once -> what is kept of them in memory.
    Returns images or codes (N, ...), labels (N,) int64, captions (N strings) or None, class names,
    what is left out (one line).  Raises ValueError that names the file or the folder."""
    root = Path(os.path.abspath(os.path.expanduser(root)))
    (rows, left_out), asked = _list_folder(root), split
    classes = sorted({name for _, _, name, _ in rows}, key=_natural)  # of both splits
    if any(row[1] == "test" for row in rows):
        rows, split = [row for row in rows if row[1] == split], None
    bare = [path for path, _, _, caption in rows if caption is None]
    if 0 < len(bare) < len(rows):
        raise ValueError(f"{len(bare)} of {len(rows)} images in {root} have no caption, the first "
                         f"is {bare[0]}: write one, or remove the image")
    if "" in classes and len(classes) > 1 and bare:
        raise ValueError(f"{root} holds images beside the folder {classes[1]}: keep one of the two")
    number = {} if "" in classes else {name: i for i, name in enumerate(classes)}
    paths = [*dict.fromkeys(row[0] for row in rows)]    # all captions of a picture stay together
    kept = {paths[i] for i in choose(len(paths), split, count, seed)}
    rows = [row for row in rows if row[0] in kept]
    images, good = _read_images([row[0] for row in rows], image_size, skip_bad, encode)
    left_out["unreadable"] = len(rows) - len(good)
    left_out = ", ".join(f"{n} {what}" for what, n in left_out.items() if n)
    if not good:
        raise ValueError(f"no images in {root} to {asked}; left out: {left_out or 'nothing'}")
    labels = torch.tensor([number.get(rows[i][2], 0) for i in good])
    return images, labels, None if bare else [rows[i][3] for i in good], list(number), left_out


def choose(total, split, count, seed):
    """Which of `total` items to keep: (n,) sorted positions.  split None: already split."""
    chosen = torch.arange(total)
    if total >= 200 and split is not None:  # the same test split for every seed
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        chosen = order[:total // 20] if split == "test" else order[total // 20:]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
    return chosen[order[:count]].sort().values


def _list_folder(root):
    """(path, split, class or "", caption or None) per image; {kind: number} of what is left out."""
    def stop(error):
        raise ValueError(f"there is no folder {error.filename} that can be read: {error.strerror}")
    files = []
    for folder, inner, names in os.walk(root, onerror=stop, followlinks=True):
        above = {os.path.realpath(path) for path in (folder, *Path(folder).parents)}
        inner[:] = [name for name in inner if name[0] != "."    # or a link to what holds it
                    and os.path.realpath(Path(folder, name)) not in above]
        files += [Path(folder, name) for name in names if name[0] != "."]
    # OPEN is empty until registered_extensions is asked; the last six Pillow cannot read by itself
    endings = {e for e, kind in Image.registered_extensions().items() if kind in
               {*Image.OPEN, "MPO"} - {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}}
    inside = {path: [*path.relative_to(root).parts[:-1], "", ""]    # the images, their folders
              for path in sorted(files, key=_natural) if path.suffix.lower() in endings}
    others, captions = set(files).difference(inside), {path: {} for path in inside}
    tables = [(path, None) for path in sorted(others)
              if path.name in ("metadata.jsonl", "metadata.csv") and path.is_file()]
    beside = [(text, image) for image in inside for ending in (".caption", ".txt", ".TXT")
              if (text := image.with_suffix(ending)) in others and text.is_file()]
    for path, image in tables + beside:
        _read_captions(path, image, captions)
    others = sorted(others.difference(path for path, _ in tables + beside))
    left_out = Counter(ascii(path.suffix or path.name)[1:-1] for path in others)
    tops = {folders[0].lower() for folders in inside.values()} - {""}
    splits, rows = tops & SPLITS.keys(), []     # "train" beside car/ and bus/ is a class
    has_splits = bool(splits) and (splits == tops or "train" in splits and len(splits) > 1)
    for path, folders in inside.items():
        split = SPLITS.get(folders[0].lower()) if has_splits else "all"
        left_out["outside train/ and test/"] += split is None
        name = "" if tables else folders[has_splits]
        if captions[path] and name:  # img/"10_sks dog" would mean: 10 times an epoch
            name = next((n[1] for f in folders if (n := re.match(r"\d+_(.+)", f))), name)
        rows += [(path, split, name, text) for text in captions[path] or [None] if split]
    return rows, left_out


def _natural(name):
    """A sort key by which 2 comes before 10."""
    return [int(s) if i % 2 else s for i, s in enumerate(re.split(r"(\d+)", str(name)))]


def _read_captions(path, image, captions):
    """Add a table's rows, or the text of a file beside `image`, to {image: {caption: None}}."""
    number, row = 1, "other bytes"
    try:
        text = path.read_bytes().decode("utf-8-sig")
        # a cell too many, such as after a comma without quotes, takes the place of the text
        table = csv.DictReader(io.StringIO(text), restkey="text", strict=True)
        rows = (table if path.suffix == ".csv" else text.split("\n") if image is None else
                [{"file_name": image.name, "text": text}])
        for number, row in enumerate(rows, 1):
            number = table.line_num or number
            if str(row).strip():
                row = json.loads(row) if isinstance(row, str) else row
                image = Path(os.path.normpath(path.parent / row["file_name"]))
                caption = str.strip(row["text"] if "text" in row else row["caption"])
                captions[image] |= {caption: None} if caption.encode() else {}
    except (ValueError, KeyError, TypeError, csv.Error, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} line {number}: expected UTF-8 (in tables: file_name, an existing "
                         f"image, and text), found {str(row)[:80]}") from error


def read_image(path, size, background="white"):
    """The centre square of a picture file, resized as in ADM and DiT: (3, size, size) uint8.
    background: shows through where the picture is transparent.  Raises ValueError with the path."""
    try:
        if not os.path.isfile(path):  # Pillow would wait for a pipe
            raise FileNotFoundError
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)  # phones store upright pictures sideways
            if image.mode.startswith("I"):  # 16-bit grey: scaled, not clipped; 65535 / 255 = 257
                image = Image.fromarray((np.array(image).clip(0, 65535) / 257 + 0.5).astype("B"))
            if image.has_transparency_data:
                canvas, image = Image.new("RGBA", image.size, background), image.convert("RGBA")
                image = Image.alpha_composite(canvas, image)
            image = image.convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot read image {path} ({type(error).__name__}): it is damaged, cut "
                         "short, too large or no image; give another") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    while image.width >= 2 * size:
        image = image.resize((image.width // 2,) * 2, Image.Resampling.BOX)
    pixels = np.array(image.resize((size, size), Image.Resampling.BICUBIC))          # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)                                 # (3, H, W)


def _read_images(paths, size, skip_bad, encode):
    """What `encode` keeps of all files, (N, ...), and the positions in `paths` of those that could
    be read.  Raises ValueError for the others, unless skip_bad, and if memory is too small."""
    def read(path):
        try:
            return read_image(path, size)
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{error}, delete it, or add --skip-bad") from error
    images, good = torch.empty(0), []
    said = Path(MEMORY).read_text() if os.path.isfile(MEMORY) else ""
    free = 1024 * float(re.search(r"MemAvailable: *(\d+)|$", said)[1] or "inf")
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(
            desc="reading images", total=len(paths), disable=None) as bar:
        for first in range(0, len(paths), 64):
            part = [*pool.map(read, paths[first:first + 64])]
            if found := [i for i, image in enumerate(part) if image is not None]:
                codes = encode(torch.stack([part[i] for i in found]))                # (n, ...)
                if (needed := len(paths) * codes[0].nbytes) > free:
                    raise ValueError(f"{len(paths):,} pictures take {needed:,} bytes, and "
                        f"{free:,.0f} are free: take a smaller --image-size, or encode them first: "
                        "python train.py --first-stage FILE --save-latents FILE --data ...")
                images = images if good else codes.new_empty(len(paths), *codes.shape[1:])
                images[len(good):len(good) + len(found)] = codes
                good += [first + i for i in found]
            bar.update(len(part))
    return images[:len(good)], good
