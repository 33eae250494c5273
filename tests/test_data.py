"""Tests of data.py: drawing against a brute-force rasteriser, the grammar, every file format, batches, grids."""
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import struct
import tarfile
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import data

EIGHT = data.SHAPES + data.NEW_SHAPES

# ---------------------------------------------------------------- drawing


def inside(name, x, y):
    """Is the point (x, y), in units of r, y down, in the shape?  Corner lists and circles: no distances, no folding."""
    def polygon(corners):  # even-odd rule
        hit = np.zeros(x.shape, bool)
        for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1]):
            if y1 != y2:
                hit ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
        return hit
    def disc(cx, cy, radius):
        return (x - cx) ** 2 + (y - cy) ** 2 < radius ** 2
    def box(w, h):
        return (abs(x) < w) & (abs(y) < h)
    if name == "circle":
        return disc(0, 0, 0.86)
    if name == "square":
        return box(0.76, 0.76)
    if name == "triangle":
        return polygon([(0, -0.95), (1, 0.95), (-1, 0.95)])
    if name == "star":
        radii, angles = [1.05, 0.55] * 5, [math.radians(36 * i) for i in range(10)]
        return polygon([(r * math.sin(a), 0.1 - r * math.cos(a)) for r, a in zip(radii, angles)])
    if name == "cross":
        return box(0.36, 0.98) | box(0.98, 0.36)
    if name == "ring":
        return disc(0, 0, 0.99) & ~disc(0, 0, 0.55)
    if name == "heart":
        q, up = 0.8, 0.08
        return polygon([(0, up - q), (q, up), (0, up + q), (-q, up)]) | disc(q / 2, up - q / 2, q / 2**0.5) | \
            disc(-q / 2, up - q / 2, q / 2**0.5)
    return polygon([(0, -1), (1, 0), (0, 1), (-1, 0)])  # diamond


def brute_force(name, cx, cy, r, size):
    """Coverage by 8 x 8 points a pixel."""
    points = (np.arange(8 * size) + 0.5) / 8 * 32 / size
    x, y = np.meshgrid((points - cx) / r, (points - cy) / r)
    return inside(name, x, y).reshape(size, 8, size, 8).mean((1, 3))


@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize("size", [32, 64])
def test_coverage_matches_brute_force(index, size):
    random = np.random.default_rng(index)
    for r in (4.5, 5.0, 8.0, 11.0):
        cx, cy = random.uniform(12, 20, 2)
        got = data.shape_coverage(index, *(torch.tensor([v]) for v in (cx, cy, r)), size)[0].numpy()
        want = brute_force(EIGHT[index], cx, cy, r, size)
        assert abs(got - want).sum() / want.sum() < 0.07, r  # of the object's area; all of it lies on the outline
        assert abs(got.sum() / want.sum() - 1) < 0.04, r
        assert abs(got - want).max() < 0.5, r


def test_shapes_are_comparable_and_distinct():
    five = torch.full((8,), 5.0)
    masks = data.shape_coverage(torch.arange(8), five * 3.2, five * 3.2, five)
    area = masks.sum((1, 2))
    assert area.max() / area.min() < 1.5
    for a, b in itertools.combinations(range(8), 2):
        assert (masks[a] - masks[b]).abs().sum() / area.mean() > 0.15, (EIGHT[a], EIGHT[b])


def test_render_places_colours_and_layers():
    shape = torch.tensor([[1, 1], [1, -1], [-1, -1]])
    color = torch.tensor([[[200, 10, 30], [7, 250, 90]]] * 3, dtype=torch.uint8)
    cx, cy, r = torch.tensor([[10.0, 14.0]] * 3), torch.full((3, 2), 12.0), torch.full((3, 2), 5.0)
    ground = torch.tensor([[1, 2, 3]] * 3, dtype=torch.uint8)
    images = data.render_shapes(shape, color, cx, cy, r, ground)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8
    pixel = lambda i, x, y: images[i, :, y, x].tolist()
    assert pixel(0, 7, 12) == [200, 10, 30]      # only the first square reaches here
    assert pixel(0, 12, 12) == [7, 250, 90]      # both do, the later one lies on top
    assert pixel(1, 12, 12) == [200, 10, 30] and pixel(1, 16, 12) == [1, 2, 3]
    assert pixel(0, 12, 25) == [1, 2, 3]         # x is not y
    assert (images[2] == torch.tensor([1, 2, 3]).view(3, 1, 1)).all()


def test_edges_are_blended_and_rounded():
    """A square of half side 0.76 * 5 = 3.8 at 16 ends at 12.2: it covers 0.8 of column 12, and 0.8 * 202 = 161.6."""
    one = torch.ones(1, 1)
    image = data.render_shapes(one.long(), torch.full((1, 1, 3), 202).byte(), 16 * one, 16 * one, 5 * one,
                               torch.zeros(1, 3).byte())
    assert image[0, 0, 16, 10:15].tolist() == [0, 0, 162, 202, 202]


def test_chunks_do_not_show():
    """Drawing 600 at once equals drawing them one by one."""
    args = [torch.arange(600)[:, None] % 8, torch.randint(256, (600, 1, 3)).byte(), *torch.rand(2, 600, 1) * 32,
            torch.rand(600, 1) * 6 + 4, torch.randint(256, (600, 3)).byte()]
    whole = data.render_shapes(*args)
    for i in (0, 255, 256, 511, 512, 599):
        assert torch.equal(whole[i:i + 1], data.render_shapes(*(a[i:i + 1] for a in args)))


def test_palette_is_well_apart():
    table = lambda names: np.array(list(names.values()), float)
    distance = lambda a, b: np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    colors, grounds = table(data.COLORS), table(data.BACKGROUNDS)
    assert len(colors) == 8 and len(grounds) == 4
    assert distance(colors, grounds).min() >= 90
    assert (distance(grounds, grounds) + 1e3 * np.eye(4)).min() >= 45
    assert (distance(colors, colors) + 1e3 * np.eye(8)).min() >= 90


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes", "scenes"])
def test_fifty_thousand_in_ten_seconds(name):
    start = time.process_time()
    assert len(data.load(name, count=50_000)) == 50_000
    assert time.process_time() - start < 10 * 2  # twice the promise: the machine may be slow or busy


# ---------------------------------------------------------------- the procedural worlds


@pytest.fixture(scope="module")
def scenes():
    return data.load("scenes", count=2000)


def test_shapes_world():
    world = data.load("shapes", count=480)
    assert world.images.shape == (480, 3, 32, 32) and world.num_classes == 48 and not world.flip
    assert Counter(world.labels.tolist()) == dict.fromkeys(range(48), 10)
    for label, caption in zip(world.labels.tolist(), world.captions):
        shape, color = data.SHAPES[label // 8], list(data.COLORS)[label % 8]
        assert world.class_names[label] == f"{color} {shape}"
        assert caption == f"{'an' if color == 'orange' else 'a'} {color} {shape}"
    assert len(data.load("shapes", split="test")) == 2000


def seen(image, facts):
    """Masks of the stated objects, found by colour alone: pixels nearer to the object's colour than to the others."""
    names = [data.BACKGROUNDS[facts["background"]]] + [data.COLORS[thing["color"]] for thing in facts["objects"]]
    distance = ((image[None].float() - torch.tensor(names)[:, :, None, None].float()) ** 2).sum(1)  # (1 + K, H, W)
    return [distance.argmin(0) == k for k in range(1, len(names))]


def test_scenes_look_as_captioned(scenes):
    """Place, size, relation, background and colour, all measured from the pixels of the picture."""
    kinds = Counter()
    for image, label, caption in zip(scenes.images, scenes.labels.tolist(), scenes.captions):
        facts = data.parse_caption(caption)
        things = facts["objects"]
        assert data.caption_of(**facts) == caption
        assert scenes.class_names[label] == f"{things[0]['color']} {things[0]['shape']}"
        kinds[len(things), facts.get("relation")] += 1
        corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners.T == torch.tensor(data.BACKGROUNDS[facts["background"]])).all(1).sum() >= 2
        if len(things) == 2:
            assert (things[0]["shape"], things[0]["color"]) != (things[1]["shape"], things[1]["color"])
            if things[0]["color"] == things[1]["color"]:
                continue  # colour alone cannot part them
        centres = []
        for thing, mask in zip(things, seen(image, facts)):
            y, x = mask.nonzero().float().T
            centres.append(((x.min() + x.max()) / 2 + 0.5, (y.min() + y.max()) / 2 + 0.5))
            if len(things) == 1:
                extent = max(x.max() - x.min(), y.max() - y.min()) + 1
                assert (extent > 12.6) == (thing["size"] == "large"), caption
        if len(things) == 1:
            x, y = centres[0][0] - 16, centres[0][1] - 16
            far = 2.5
            place = ("on the left" if x < -far else "on the right" if x > far else
                     "at the top" if y < -far else "at the bottom" if y > far else "in the middle")
            assert place == things[0]["place"], caption
        else:
            dx, dy = (a - b for a, b in zip(*centres))
            relation = ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
            assert relation == facts["relation"], caption
    assert 0.55 < kinds[1, None] / 2000 < 0.65
    assert all(kinds[2, relation] > 50 for relation in data.RELATIONS)


def test_training_prefers_left_of_and_above_and_tests_do_not():
    for split, share in (("train", 0.2), ("test", 0.5)):
        captions = data.load("scenes", split=split, count=2000).captions
        said = Counter(data.parse_caption(c).get("relation") for c in captions)
        for plain, converse in (("left of", "right of"), ("above", "below")):
            both = said[plain] + said[converse]
            assert both > 300 and abs(said[converse] / both - share) < 4 * (share * (1 - share) / both) ** 0.5


@pytest.mark.parametrize("name", ["shapes", "scenes"])
def test_objects_are_inside_and_disjoint(name, monkeypatch):
    """Each object is drawn again alone, on a canvas with a margin, from the arguments that render_shapes got."""
    calls = []
    blank = lambda *args: calls.append(args) or torch.zeros(len(args[0]), 3, 32, 32).byte()
    monkeypatch.setattr(data, "render_shapes", blank)
    data.load(name, count=1500)
    shape, _, cx, cy, r, _, _ = calls[0]
    present = shape >= 0
    assert ((cx - r)[present].min() >= 0 and (cx + r)[present].max() <= 32 and
            (cy - r)[present].min() >= 0 and (cy + r)[present].max() <= 32)
    apart = 0
    for i in range(0, 1500, 5):
        masks = []
        for s, x, y, size in zip(*(v[i].tolist() for v in (shape, cx, cy, r))):
            if s >= 0:
                masks.append(brute_force(EIGHT[s], (x + 16) / 2, (y + 16) / 2, size / 2, 64) > 0)  # half size, 8 margin
                assert masks[-1].sum() == masks[-1][16:48, 16:48].sum() > 0
        if len(masks) == 2:
            assert not (masks[0] & masks[1]).any()
            apart += 1
    assert apart > 90 or name == "shapes"


def test_seeds_splits_and_sizes():
    a, b = data.load("scenes", count=64), data.load("scenes", count=64)
    assert torch.equal(a.images, b.images) and a.captions == b.captions
    for other in (data.load("scenes", count=64, seed=1), data.load("scenes", count=64, split="test")):
        assert other.captions != a.captions and not torch.equal(other.images, a.images)
    big = data.load("scenes", count=64, image_size=64)  # the same scenes, sharper
    assert big.captions == a.captions
    shrunk = big.images.float().view(64, 3, 32, 2, 32, 2).mean((3, 5))
    assert (shrunk - a.images.float()).abs().mean() < 1.0


@pytest.mark.parametrize("name", ["shapes", "scenes"])
def test_hold_out(name):
    shapes, colors = zip(*data.HELD_OUT)
    assert sorted(shapes) == sorted(data.SHAPES) and len(set(colors)) == 6
    held = set(data.HELD_OUT)
    pairs = lambda d: {(o["shape"], o["color"]) for c in d.captions for o in data.parse_caption(c)["objects"]}
    train = data.load(name, count=4200, hold_out=True)
    assert not pairs(train) & held and len(pairs(train)) == 42
    assert set(Counter(train.labels.tolist()).values()) == {100}
    assert held <= pairs(data.load(name, count=2000, hold_out=True, split="test"))
    assert held <= pairs(data.load(name, count=2000))


def test_parse_caption():
    assert data.parse_caption("a small red circle on the left on black") == {
        "objects": [{"shape": "circle", "color": "red", "size": "small", "place": "on the left"}],
        "background": "black"}
    assert data.parse_caption("an orange ring right of a blue heart") == {
        "objects": [{"shape": "ring", "color": "orange"}, {"shape": "heart", "color": "blue"}], "relation": "right of"}
    assert data.parse_caption("a red circle") == {"objects": [{"shape": "circle", "color": "red"}]}
    for bad in ("", "red circle", "a red", "a circle red", "a red circle near a blue square", "a pink circle",
                "a red circle ", "a red circle on pink", "A red circle", "a red circle left of",
                "a red circle left of a small blue square"):
        with pytest.raises(ValueError, match="not a caption"):
            data.parse_caption(bad)


def test_names():
    for wrong, right in (("shape", "shapes"), ("cifar", "cifar10"), ("fashon", "fashion"), ("mnits", "mnist")):
        with pytest.raises(ValueError, match=f"did you mean {right}\\?"):
            data.load(wrong)
    with pytest.raises(ValueError, match="unknown data set"):
        data.load("qqqqqq")
    with pytest.raises(ValueError, match="did you mean folder:PATH"):
        data.load("folder:")
    with pytest.raises(ValueError, match="split"):
        data.load("shapes", split="valid")
    with pytest.raises(ValueError, match="positive"):
        data.load("shapes", count=0)
    with pytest.raises(ValueError, match="hold_out"):
        data.load("mnist", hold_out=True)


# ---------------------------------------------------------------- folders


def put(path, color=(10, 120, 240), size=(32, 32), mode="RGB", **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **save)
    return path


def load_one(folder, **keywords):
    return data.load(f"folder:{folder}", **keywords).images[0]


def near(image, color, tolerance=1):
    return (image.float() - torch.tensor(color).view(3, 1, 1)).abs().max() <= tolerance


@pytest.mark.parametrize("mode, color, want", [
    ("RGBA", (200, 100, 0, 255), (200, 100, 0)), ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
    ("RGBA", (0, 100, 200, 51), (204, 224, 244)), ("LA", (0, 0), (255, 255, 255)), ("LA", (100, 255), (100, 100, 100)),
    ("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255)), ("I;16", 25700, (100, 100, 100)),
    ("I;16", 65535, (255, 255, 255))])
def test_png_modes(tmp_path, mode, color, want):
    put(tmp_path / "a.png", color, mode=mode)
    assert near(load_one(tmp_path), want)


def test_palette_cmyk_gif_bmp_webp(tmp_path):
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 250, 20, 60])
    image.paste(0, (0, 0, 16, 32))
    (tmp_path / "p").mkdir()
    image.save(tmp_path / "p" / "a.png", transparency=0)  # the left half is transparent black
    got = load_one(tmp_path / "p")
    assert near(got[:, :, :16], (255, 255, 255)) and near(got[:, :, 16:], (250, 20, 60))
    put(tmp_path / "c" / "a.jpg", (0, 255, 255, 0), mode="CMYK", quality=95)
    assert near(load_one(tmp_path / "c"), (255, 0, 0), 3)
    frames = [Image.new("RGB", (32, 32), c) for c in ("red", "blue")]
    (tmp_path / "g").mkdir()
    frames[0].save(tmp_path / "g" / "a.GIF", save_all=True, append_images=frames[1:])
    assert near(load_one(tmp_path / "g"), (255, 0, 0))
    put(tmp_path / "b" / "a.bmp")
    put(tmp_path / "w" / "a.webp", lossless=True)
    put(tmp_path / "n" / "été 猫.JPEG", quality=95)
    for folder in "bwn":
        assert near(load_one(tmp_path / folder), (10, 120, 240), 4)


def test_exif_turns_upright(tmp_path):
    image = Image.new("RGB", (32, 32), "red")
    image.paste("blue", (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    assert near(load_one(tmp_path)[:, 20:], (0, 0, 255))


@pytest.mark.parametrize("width, height", [(1, 1), (1, 400), (400, 1), (31, 33), (100, 70), (300, 200), (32, 64)])
def test_any_size_becomes_square(tmp_path, width, height):
    put(tmp_path / "a.png", size=(width, height))
    for size in (16, 32):
        image = load_one(tmp_path, image_size=size)
        assert image.shape == (3, size, size) and near(image, (10, 120, 240))


def test_resize_takes_the_centre(tmp_path):
    """A 96 x 64 ramp: box halving then the centre columns, worked out by hand."""
    ramp = np.repeat(np.arange(96, dtype=np.uint8)[None] * 2, 64, 0)
    Image.fromarray(np.stack([ramp] * 3, -1)).save(tmp_path / "a.png")
    got = load_one(tmp_path)[0, 0].float()                    # halved: columns average 4k + 1; the centre 32 of 48
    assert (got - (4 * torch.arange(8, 40) + 1)).abs().max() <= 1
    put(tmp_path / "b" / "a.png", (9, 9, 9), size=(33, 32))   # no resize needed: cropped, pixels untouched
    assert near(load_one(tmp_path / "b"), (9, 9, 9), 0)


def test_resize_halves_with_a_box(tmp_path):
    """64 -> 32 is the mean of 2 x 2 blocks (bicubic would give something sharper), also when more than one halving."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    for size in (32, 16):
        want = noise.reshape(size, 64 // size, size, 64 // size, 3).astype(float).mean((1, 3))
        assert abs(load_one(tmp_path, image_size=size).permute(1, 2, 0).numpy() - want).max() <= 2  # four roundings


def damaged(folder):
    """One good image and every kind of bad one."""
    good = put(folder / "good.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("png", "jpg"):
        buffer = io.BytesIO()
        noise.save(buffer, {"png": "png", "jpg": "jpeg"}[kind])
        (folder / f"cut.{kind}").write_bytes(buffer.getvalue()[:len(buffer.getvalue()) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("this is no picture")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    return good, ["cut.png", "cut.jpg", "empty.png", "text.png", "link.png"]


def test_damaged_images(tmp_path, capfd):
    _, bad = damaged(tmp_path / "all")
    for name in bad:
        folder = tmp_path / f"only {name}"
        put(folder / "good.png")
        (tmp_path / "all" / name).rename(folder / name)
        with pytest.raises(ValueError, match="skip-bad") as caught:
            data.load(f"folder:{folder}")
        assert str(folder / name) in str(caught.value)
    damaged(tmp_path / "again")
    capfd.readouterr()
    assert len(data.load(f"folder:{tmp_path / 'again'}", skip_bad=True)) == 1
    err = capfd.readouterr().err
    assert "skipped 5 unreadable of 6 images" in err
    (tmp_path / "again" / "good.png").unlink()
    with pytest.raises(ValueError, match="none of the 5"):
        data.load(f"folder:{tmp_path / 'again'}", skip_bad=True)


def test_skip_bad_keeps_labels_and_captions_aligned(tmp_path):
    for i in range(6):
        put(tmp_path / f"{i}.png", (40 * i, 0, 0))
        (tmp_path / f"{i}.txt").write_text(f"number {i}\n")
    (tmp_path / "2.png").write_bytes(b"")
    got = data.load(f"folder:{tmp_path}", skip_bad=True)
    assert got.captions == [f"number {i}" for i in (0, 1, 3, 4, 5)]
    assert got.images[:, 0, 0, 0].tolist() == [0, 40, 120, 160, 200]


def test_class_folders(tmp_path):
    for name, value in (("cat", 50), ("ant", 100), ("bee/deep", 150)):
        put(tmp_path / name / "x.png", (value,) * 3)
    put(tmp_path / "bee" / ".hidden.png", (0, 0, 0))
    (tmp_path / "notes").mkdir()  # no images: no class
    got = data.load(f"folder:{tmp_path}")
    assert got.class_names == ["ant", "bee", "cat"] and got.labels.tolist() == [0, 1, 2] and got.flip
    assert got.images[:, 0, 0, 0].tolist() == [100, 150, 50] and got.captions is None and got.num_classes == 3
    put(tmp_path / "stray.png")
    with pytest.raises(ValueError, match="both images and folders"):
        data.load(f"folder:{tmp_path}")


def test_flat_empty_missing(tmp_path):
    put(tmp_path / "flat" / "a.png")
    got = data.load(f"folder:{tmp_path / 'flat'}")
    assert got.class_names == [] and got.num_classes == 0 and got.captions is None and got.labels.tolist() == [0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        data.load(f"folder:{tmp_path / 'empty'}")
    with pytest.raises(ValueError, match="there is no folder"):
        data.load(f"folder:{tmp_path / 'nowhere'}")


def test_captions_by_text_files(tmp_path):
    put(tmp_path / "b.png"), put(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("ein Hündchen\n", encoding="utf-8")
    with pytest.raises(ValueError, match="1 of 2 images .*b.png"):
        data.load(f"folder:{tmp_path}")
    (tmp_path / "b.txt").write_text("two")
    got = data.load(f"folder:{tmp_path}")
    assert got.captions == ["ein Hündchen", "two"] and not got.flip


def test_captions_by_metadata(tmp_path):
    put(tmp_path / "in" / "x.png", (1, 1, 1)), put(tmp_path / "y.png", (2, 2, 2)), put(tmp_path / "unlisted.png")
    rows = [{"file_name": "y.png", "text": "why"}, {"file_name": "in/x.png", "text": "ex", "more": 1}]
    file = tmp_path / "metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    got = data.load(f"folder:{tmp_path}")
    assert got.captions == ["why", "ex"] and got.images[:, 0, 0, 0].tolist() == [2, 1] and not got.flip
    for line, message in (('{"file_name": "y.png"', "line 2: expected"), ('{"file_name": "y.png"}', "line 2: expected"),
                          ('["y.png", "t"]', "line 2: expected"),
                          ('{"file_name": "gone.png", "text": "t"}', "there is no file"),
                          ('{"file_name": "y.png", "text": null}', "must be a string")):
        file.write_text(json.dumps(rows[0]) + "\n" + line)
        with pytest.raises(ValueError, match=message):
            data.load(f"folder:{tmp_path}")
    file.write_text("")
    with pytest.raises(ValueError, match="no images"):
        data.load(f"folder:{tmp_path}")


def test_folder_splits(tmp_path):
    for i in range(240):
        put(tmp_path / "one" / f"{i:03}.png", (i, 0, 0), size=(4, 4))
    values = lambda split, **k: data.load(f"folder:{tmp_path / 'one'}", 4, split, **k).images[:, 0, 0, 0].tolist()
    train, test = values("train"), values("test")
    assert len(test) == 12 and sorted(train + test) == list(range(240))
    assert values("test", seed=5) == test                 # the split does not move with the seed
    few = values("train", count=30)
    assert len(few) == 30 and set(few) <= set(train) and values("train", count=30, seed=1) != few
    put(tmp_path / "two" / "train" / "a.png", (1, 0, 0)), put(tmp_path / "two" / "test" / "a.png", (2, 0, 0))
    for split, value in (("train", 1), ("test", 2)):
        assert load_one(tmp_path / "two", split=split)[0, 0, 0] == value
    put(tmp_path / "few" / "a.png", (7, 0, 0))
    for split in ("train", "test"):
        assert len(data.load(f"folder:{tmp_path / 'few'}", split=split)) == 1


# ---------------------------------------------------------------- official files


def official(folder, monkeypatch, name="mnist", count=5, side=28, zipped=True):
    """Synthetic files in the official format, and the checksums to go with them."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (count, side, side), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
    (folder / name).mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        pixels = struct.pack(">4I", 0x803, count, side, side) + images.tobytes()
        for stem, raw in ((f"{part}-images-idx3-ubyte", pixels),
                          (f"{part}-labels-idx1-ubyte", struct.pack(">2I", 0x801, count) + labels.tobytes())):
            raw = gzip.compress(raw) if zipped else raw
            (folder / name / (stem + ".gz" * zipped)).write_bytes(raw)
            monkeypatch.setitem(data.CHECKSUMS, f"{name}/{stem}.gz", (hashlib.md5(raw).hexdigest(), None))
    return images, labels


@pytest.mark.parametrize("name", ["mnist", "fashion"])
@pytest.mark.parametrize("zipped", [True, False])
def test_idx(tmp_path, monkeypatch, name, zipped):
    images, labels = official(tmp_path, monkeypatch, name, zipped=zipped)
    for split in ("train", "test"):
        got = data.load(name, 32, split, tmp_path)
        assert got.images.shape == (5, 1, 32, 32) and got.num_classes == 10 and got.flip == (name == "fashion")
        assert np.array_equal(got.images[:, 0, 2:30, 2:30], images) and got.labels.tolist() == labels.tolist()
        assert got.images.sum() == images.sum(dtype=np.int64)  # the border is black
    assert np.array_equal(data.load(name, 28, data_dir=tmp_path).images[:, 0], images)
    small = data.load(name, 16, data_dir=tmp_path)
    assert small.images.shape == (5, 1, 16, 16)
    assert abs(small.images.float().mean() - images.mean() * (28 / 32) ** 2) < 3
    assert len(data.load(name, data_dir=tmp_path, count=2)) == 2


def test_official_files_are_checked(tmp_path, monkeypatch):
    official(tmp_path, monkeypatch)
    file = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match="md5 .* delete the file"):
        data.load("mnist", data_dir=tmp_path)
    raw = file.read_bytes()
    monkeypatch.setitem(data.CHECKSUMS, "mnist/" + file.name, (hashlib.md5(raw).hexdigest(), "0" * 64))
    with pytest.raises(ValueError, match="sha256 .* delete the file"):
        data.load("mnist", data_dir=tmp_path)
    plain = file.with_suffix("")
    for wrong in (b"", b"\0" * 40, struct.pack(">4I", 0x803, 9, 28, 28) + b"\0" * 100,
                  struct.pack(">4I", 0x801, 1, 28, 28) + b"\0" * 784):
        plain.write_bytes(wrong)
        with pytest.raises(ValueError, match="not a complete IDX file"):
            data.load("mnist", data_dir=tmp_path)
    plain.write_bytes(struct.pack(">4I", 0x803, 1, 28, 28) + b"\0" * 784)
    with pytest.raises(ValueError, match="1 images but 5 labels"):
        data.load("mnist", data_dir=tmp_path)


def test_checksums_are_well_formed():
    assert len(data.CHECKSUMS) == 9
    for md5, sha256 in data.CHECKSUMS.values():
        assert len(bytes.fromhex(md5)) == 16 and (sha256 is None or len(bytes.fromhex(sha256)) == 32)


def cifar_records(count, first):
    random = np.random.default_rng(first)
    labels = (np.arange(count, dtype=np.uint8) + first) % 10
    images = random.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    return images, labels, b"".join(bytes([l]) + i.tobytes() for i, l in zip(images, labels))


@pytest.mark.parametrize("form", ["archive", "bin", "folder"])
def test_cifar10(tmp_path, monkeypatch, form):
    parts = {f"data_batch_{i}.bin": cifar_records(2, i) for i in range(1, 6)} | {"test_batch.bin": cifar_records(3, 7)}
    home = tmp_path / "cifar10"
    home.mkdir()
    if form == "archive":
        file = home / "cifar-10-binary.tar.gz"
        with tarfile.open(file, "w:gz") as tar:
            for name, (_, _, raw) in parts.items():
                info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
        whole = file.read_bytes()
        monkeypatch.setitem(data.CHECKSUMS, "cifar10/" + file.name,
                            (hashlib.md5(whole).hexdigest(), hashlib.sha256(whole).hexdigest()))
    else:
        home = home / "cifar-10-batches-bin" if form == "folder" else home
        home.mkdir(exist_ok=True)
        for name, (_, _, raw) in parts.items():
            (home / name).write_bytes(raw)
    train, test = (data.load("cifar10", split=split, data_dir=tmp_path) for split in ("train", "test"))
    assert np.array_equal(train.images, np.concatenate([parts[f"data_batch_{i}.bin"][0] for i in range(1, 6)]))
    assert train.labels.tolist() == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6] and train.flip and train.class_names[3] == "cat"
    assert np.array_equal(test.images, parts["test_batch.bin"][0])
    if form == "bin":
        for wrong in (parts["test_batch.bin"][2][:-1], b"", b"\xff" * 3073):
            (home / "test_batch.bin").write_bytes(wrong)
            with pytest.raises(ValueError, match="3073-byte records"):
                data.load("cifar10", split="test", data_dir=tmp_path)


def test_failed_download(tmp_path, monkeypatch):
    asked = []
    def refuse(url, path, progress):
        asked.append(url)
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    for name in ("mnist", "fashion", "cifar10"):
        with pytest.raises(ValueError, match="could not download .*no network.* put it at") as caught:
            data.load(name, data_dir=tmp_path)
        assert asked[-1] in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_download(tmp_path, monkeypatch):
    """Through a file: address, so without network: fetched once, checked, left in place."""
    images, _ = official(tmp_path / "far", monkeypatch)
    monkeypatch.setattr(data, "MNIST_URL", (tmp_path / "far" / "mnist").as_uri() + "/")
    assert np.array_equal(data.load("mnist", 28, data_dir=tmp_path / "near").images[:, 0], images)
    assert sorted(os.listdir(tmp_path / "near" / "mnist")) == [
        "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]


# ---------------------------------------------------------------- emoji


def test_emoji():
    if not any(map(os.path.exists, data.EMOJI_FONTS)):
        pytest.skip("no colour emoji font installed")
    got = data.load("emoji", count=60)
    assert len(got) == 60 and got.images.shape == (60, 3, 32, 32) and got.class_names == [] and not got.flip
    assert (got.images[:, :, 0, 0] == 255).all()                                    # on white
    assert (got.images.flatten(1).float().std(1) > 5).all()                         # something is drawn
    assert (got.images.float().std(1).mean((1, 2)) > 1).float().mean() > 0.7        # and most of it in colour
    assert len(set(got.captions)) == 60 and all(caption == caption.lower() for caption in got.captions)


def test_emoji_without_font(monkeypatch):
    monkeypatch.setattr(data, "EMOJI_FONTS", ("/nowhere/NotoColorEmoji.ttf",))
    with pytest.raises(ValueError, match="fonts-noto-color-emoji.*folder:PATH"):
        data.load("emoji")


# ---------------------------------------------------------------- latents


def test_latents(tmp_path):
    path = tmp_path / "z.pt"
    z, y = torch.randn(6, 4, 8, 8).half(), torch.tensor([0, 1, 2, 0, 1, 2])
    data.save_latents(path, z, y, [f"c{i}" for i in range(6)], ["a", "b", "c"])
    got = data.load(f"latents:{path}")
    assert torch.equal(got.images, z) and got.images.dtype == torch.float16 and torch.equal(got.labels, y)
    assert got.captions[4] == "c4" and got.class_names == ["a", "b", "c"] and not got.flip
    assert os.listdir(tmp_path) == ["z.pt"]
    data.save_latents(path, z)
    got = data.load(f"latents:{path}", count=4)
    assert len(got) == 4 and got.captions is None and got.class_names == [] and got.labels.tolist() == [0] * 4


def test_save_latents_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "z.pt"
    data.save_latents(path, torch.ones(1, 4, 2, 2))
    def fail(content, name):
        open(name, "wb").write(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        data.save_latents(path, torch.zeros(1, 4, 2, 2))
    assert data.load(f"latents:{path}").images.sum() == 16


def test_bad_latents(tmp_path):
    path = tmp_path / "z.pt"
    with pytest.raises(ValueError, match="no latents file"):
        data.load(f"latents:{path}")
    good = {"latents": torch.randn(2, 4, 8, 8), "labels": None, "captions": None, "class_names": []}
    for change, message in (({"latents": torch.zeros(2, 4, 8, 8).byte()}, "float tensor"),
                            ({"latents": torch.randn(2, 4)}, "float"),
                            ({"latents": torch.zeros(0, 4, 8, 8)}, "N > 0"), ({"labels": torch.zeros(3)}, "must agree"),
                            ({"captions": ["one"]}, "must agree"), ({"latents": None}, "float tensor"),
                            ({"labels": torch.tensor([0, 2]), "class_names": ["a", "b"]}, "labels 0 to 2 but 2")):
        torch.save(good | change, path)
        with pytest.raises(ValueError, match=message):
            data.load(f"latents:{path}")
    for content in (b"", b"junk", None):
        if content is None:
            torch.save({"z": 1}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="not a file of save_latents"):
            data.load(f"latents:{path}")


# ---------------------------------------------------------------- batches


def numbered(count, flip=False):
    """Image i holds the number i, its right-hand column 200."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 3)
    images[..., -1] = 200
    return data.Dataset("numbers", images, torch.arange(count) % 4, None, list("abcd"), flip)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 23])
def test_every_epoch_is_a_permutation(batch_size):
    batches = data.Batches(numbered(10), batch_size, seed=3)
    steps = [batches.batch(step) for step in range(math.ceil(50 / batch_size))]
    assert all(len(b["index"]) == batch_size for b in steps)
    row = torch.cat([b["index"] for b in steps])[:50].view(5, 10)
    for epoch in row:
        assert sorted(epoch.tolist()) == list(range(10))
    assert len({tuple(epoch.tolist()) for epoch in row}) == 5     # every epoch has its own order
    for b in steps:
        assert torch.equal(b["x"][:, 0, 0, 0].long(), b["index"]) and torch.equal(b["y"], b["index"] % 4)
        assert b["x"].dtype == torch.uint8 and b["y"].dtype == torch.int64


def test_resuming_needs_only_the_step():
    straight = data.Batches(numbered(10), 4, seed=1)
    row = [straight.batch(step)["index"].tolist() for step in range(20)]
    for step in (19, 0, 7, 8, 2):                                 # also backwards
        assert data.Batches(numbered(10), 4, seed=1).batch(step)["index"].tolist() == row[step]
        assert straight.batch(step)["index"].tolist() == row[step]
    other = data.Batches(numbered(10), 4, seed=2)
    assert [other.batch(step)["index"].tolist() for step in range(20)] != row


def test_rows_slice_the_global_batch():
    batches = data.Batches(numbered(10, flip=True), 8, seed=1)
    draws = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.49, 0.5, 0.0, 0.99])
    for step in range(4):
        whole = batches.batch(step, flip_draws=draws)
        parts = [batches.batch(step, slice(r * 2, r * 2 + 2), draws) for r in range(4)]
        for key in ("x", "y", "index"):
            assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])


def test_flips():
    draws = torch.tensor([0.1, 0.9, 0.49, 0.5])
    for flip in (True, False):
        batch = data.Batches(numbered(9, flip), 4).batch(0, flip_draws=draws)
        assert (batch["x"][:, 0, 0, 0] == 200).tolist() == ([True, False, True, False] if flip else [False] * 4)
    assert (data.Batches(numbered(9, True), 4).batch(0)["x"][..., -1] == 200).all()


def test_batches_refuse_nothing():
    for count, size in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="positive batch size"):
            data.Batches(numbered(count), size)


def test_float_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(every)
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32
    torch.testing.assert_close(x.double(), torch.linspace(-1, 1, 256, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(data.to_uint8(x), every)
    assert data.to_uint8(torch.tensor([-7.0, 7.0, 0.0])).tolist() == [0, 255, 128]


# ---------------------------------------------------------------- grids


def test_grid_layout(tmp_path):
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).repeat(1, 3, 4, 6) * 50
    grid = data.make_grid(images, nrow=3, pad=2)
    assert grid.shape == (2 * 4 + 3 * 2, 3 * 6 + 4 * 2, 3) and grid.dtype == np.uint8
    for i in range(5):
        top, left = 2 + i // 3 * 6, 2 + i % 3 * 8
        assert (grid[top:top + 4, left:left + 6] == 50 * i).all() and (grid[top - 1, left] == 255).all()
    assert (grid[8:12, 18:24] == 255).all()                       # the empty sixth place
    assert np.array_equal(data.make_grid(data.to_float(images), nrow=3), grid)
    assert data.make_grid(images[:, :1], nrow=3, scale=3).shape == (2 * 12 + 6, 3 * 18 + 8, 3)
    path = tmp_path / "new" / "grid.png"
    data.save_grid(images, path, nrow=3)
    assert np.array_equal(np.asarray(Image.open(path)), grid)


def test_grid_captions():
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    plain, long = (data.make_grid(images, captions=c) for c in (["a", "b", ""], ["word " * 40, "w" * 300, "猫"]))
    assert plain.shape[1] == long.shape[1] == 3 * 64 + 4 * 2      # tiles are doubled to 64 pixels
    assert plain.shape[0] > 64 + 2 * 2 and long.shape[0] < 64 + 2 * 2 + 64
    label = plain[2 + 64:-2]
    assert label[:, 2:66].min() < 128 and label[:, 2 + 66:66 + 66].min() < 128 and label[:, 2 + 132:].min() == 255
    assert (long[:, 66:68] == 255).all()                          # nothing spills into the next tile


def test_gif(tmp_path):
    frames = [np.full((10, 12, 3), v, np.uint8) for v in (0, 120, 240)]
    data.save_gif(frames, tmp_path / "deep" / "a.gif", ms=50)
    with Image.open(tmp_path / "deep" / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.size == (12, 10) and gif.info["duration"] == 50 and gif.info["loop"] == 0
        gif.seek(2)
        assert near(torch.tensor(np.asarray(gif.convert("RGB"))).permute(2, 0, 1), (240, 240, 240), 3)
