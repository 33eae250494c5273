"""Tests of folders.py: every kind of picture file, every layout, and what goes wrong in them."""
import io
import json
import os
import re
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from folders import choose, read_folder, read_image


def put(path, color=(10, 120, 240), size=(32, 32), mode="RGB", **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **save)
    return path


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return path


def red(images):
    """The first value of each picture, by which the tests know it."""
    return images[:, 0, 0, 0].tolist()


def near(image, color, tolerance=1):
    return (image.float() - torch.tensor(color).view(3, 1, 1)).abs().max() <= tolerance


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---------------------------------------------------------------- picture files


@pytest.mark.parametrize("mode, color, want", [
    ("RGBA", (200, 100, 0, 255), (200, 100, 0)), ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
    ("RGBA", (0, 100, 200, 51), (204, 224, 244)), ("LA", (0, 0), (255, 255, 255)),
    ("LA", (100, 255), (100, 100, 100)), ("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255)),
    ("I;16", 25700, (100, 100, 100)), ("I;16", 65535, (255, 255, 255))])
def test_png_modes(tmp_path, mode, color, want):
    assert near(read_image(put(tmp_path / "a.png", color, mode=mode), 32), want)


@pytest.mark.parametrize("value", [128, 129, 385, 386, 25_828, 25_829, 65_406, 65_407])
def test_16_bit_grey_is_rounded_to_the_nearest_of_256(tmp_path, value):
    """65,535 / 257 = 255, so the border between k and k + 1 is at 257 k + 128.5."""
    image = read_image(put(tmp_path / "a.png", value, mode="I;16"), 32)
    assert image.unique().tolist() == [(value + 128) // 257]


def test_a_process_that_has_opened_no_picture_yet_finds_them(tmp_path, monkeypatch):
    """Pillow's table Image.OPEN is empty until a picture is opened or its endings are asked for."""
    put(tmp_path / "a.png")
    opened, endings = dict(Image.OPEN), dict(Image.registered_extensions())
    monkeypatch.setattr(Image, "OPEN", table := {})
    monkeypatch.setattr(Image, "registered_extensions", lambda: table.update(opened) or endings)
    assert len(read_folder(tmp_path)[0]) == 1


def test_palette_cmyk_and_the_first_frame(tmp_path):
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 250, 20, 60])
    image.paste(0, (0, 0, 16, 32))
    image.save(tmp_path / "a.png", transparency=0)     # the left half is transparent black
    got = read_image(tmp_path / "a.png", 32)
    assert near(got[:, :, :16], (255, 255, 255)) and near(got[:, :, 16:], (250, 20, 60))
    assert near(read_image(tmp_path / "a.png", 32, background="black")[:, :, :16], (0, 0, 0))
    put(tmp_path / "a.jpg", (0, 255, 255, 0), mode="CMYK", quality=95)
    assert near(read_image(tmp_path / "a.jpg", 32), (255, 0, 0), 3)
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert near(read_image(tmp_path / "a.gif", 32), (255, 0, 0))


def test_pixels_come_back_as_written(tmp_path):
    """Lossless files of every kind that Pillow writes, rectangular, in natural order."""
    pixels, endings = noise(20, 32), ("png", "tif", "tiff", "bmp", "webp", "ppm", "tga", "PNG")
    for i, ending in enumerate(endings):
        Image.fromarray(np.roll(pixels, i, 0)).save(tmp_path / f"{i}.{ending}", lossless=True)
    images, labels, captions, class_names, left_out = read_folder(tmp_path, 20)
    for i, image in enumerate(images):
        assert np.array_equal(image.permute(1, 2, 0), np.roll(pixels, i, 0)[:, 6:26]), endings[i]
    assert labels.tolist() == [0] * 8 and captions is None and class_names == [] and left_out == ""


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(tmp_path, orientation):
    """The stored picture is turned so that the tag undoes it."""
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
            6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    upright, exif = Image.fromarray(noise(16, 16)), Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(Image.Transpose[undo[orientation]]) if orientation > 1 else upright
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png", 16).permute(1, 2, 0), upright)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (31, 33), (100, 70), (300, 200)])
def test_any_size_becomes_square(tmp_path, size):
    path = put(tmp_path / "a.png", size=size)
    for side in (16, 32):
        image = read_image(path, side)
        assert image.shape == (3, side, side) and near(image, (10, 120, 240))


def test_the_centre_is_cut_then_halved_with_a_box(tmp_path):
    """Means of 2 x 2 (4 x 4) blocks of the centre square; bicubic would be sharper."""
    pixels = noise(64, 96)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for size in (32, 16):
        blocks = pixels[:, 16:80].reshape(size, 64 // size, size, 64 // size, 3)
        got = read_image(tmp_path / "a.png", size).permute(1, 2, 0).numpy()
        assert abs(got - blocks.astype(float).mean((1, 3))).max() <= 2          # four roundings
    centre = Image.fromarray(pixels[:, 16:80]).resize((50, 50), Image.Resampling.BICUBIC)
    assert np.array_equal(read_image(tmp_path / "a.png", 50).permute(1, 2, 0), centre)


def damaged(folder):
    """One good picture and every kind of bad one."""
    put(folder / "good.png")
    for kind in ("png", "jpeg"):
        buffer = io.BytesIO()
        Image.fromarray(noise(64, 64)).save(buffer, kind)
        (folder / f"cut.{kind}").write_bytes(buffer.getvalue()[:len(buffer.getvalue()) // 2])
    (folder / "empty.png").write_bytes(b"")
    write(folder / "text.png", "this is no picture")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    return ["cut.png", "cut.jpeg", "empty.png", "text.png", "link.png"]


def test_damaged_images(tmp_path):
    for name in damaged(tmp_path / "all"):
        folder = tmp_path / f"only {name}"
        put(folder / "good.png")
        (tmp_path / "all" / name).rename(folder / name)
        with pytest.raises(ValueError, match=re.escape(str(folder / name)) + ".*skip-bad"):
            read_folder(folder)
        with pytest.raises(ValueError, match=re.escape(str(folder / name))) as alone:
            read_image(folder / name, 8)            # sample.py --init, which has no --skip-bad
        assert "skip-bad" not in str(alone.value) and "give another" in str(alone.value)
    damaged(tmp_path / "again")
    images, *_, left_out = read_folder(tmp_path / "again", skip_bad=True)
    assert len(images) == 1 and left_out == "5 unreadable"
    (tmp_path / "again" / "good.png").unlink()
    with pytest.raises(ValueError, match="no images in .*5 unreadable"):
        read_folder(tmp_path / "again", skip_bad=True)


def test_skip_bad_keeps_labels_and_captions_aligned(tmp_path):
    for i in range(6):
        put(tmp_path / f"c{i % 3}" / f"{i}.png", (40 * i, 0, 0))
        write(tmp_path / f"c{i % 3}" / f"{i}.txt", f"number {i}\n")
    (tmp_path / "c2" / "2.png").write_bytes(b"")
    images, labels, captions, *_ = read_folder(tmp_path, skip_bad=True)
    numbers = [value // 40 for value in red(images)]
    assert sorted(numbers) == [0, 1, 3, 4, 5]
    assert captions == [f"number {i}" for i in numbers]
    assert labels.tolist() == [i % 3 for i in numbers]


# ---------------------------------------------------------------- layouts


def test_class_folders(tmp_path):
    for i, name in enumerate(("12", "10", "2", "1", "b/deep", "a")):
        put(tmp_path / name / "x.png", (10 * i, 0, 0))
    put(tmp_path / "b" / ".hidden.png"), put(tmp_path / ".ipynb_checkpoints" / "x.png")
    put(tmp_path / "a" / ".cache" / "x.png")
    put(tmp_path / "a" / "folder.png" / "y.png", (60, 0, 0))
    write(tmp_path / "notes" / "README.md", "no images: no class")
    for i in range(3):
        (tmp_path / "a" / f"{i}.heic").write_bytes(b"?")
    images, labels, captions, class_names, left_out = read_folder(tmp_path)
    assert class_names == ["1", "2", "10", "12", "a", "b"] and captions is None
    assert sorted(zip(labels.tolist(), red(images))) == [
        (0, 30), (1, 20), (2, 10), (3, 0), (4, 50), (4, 60), (5, 40)]
    assert left_out == "3 .heic, 1 .md"
    put(tmp_path / "stray.png")
    with pytest.raises(ValueError, match="images beside the folder 1"):
        read_folder(tmp_path)


def test_empty_missing_and_linked(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.heic").write_bytes(b"?")
    with pytest.raises(ValueError, match="no images in .*left out: 1 .heic"):
        read_folder(tmp_path / "empty")
    with pytest.raises(ValueError, match="there is no folder"):
        read_folder(tmp_path / "nowhere")
    put(tmp_path / "real" / "a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "real")
    assert read_folder(tmp_path / "set")[3] == ["cat", "dog"]


@pytest.mark.parametrize("test", ["test", "val", "Valid", "validation", "TEST"])
def test_splits(tmp_path, test):
    for folder, names in (("Train", "ac"), (test, "bc")):
        for name in names:
            put(tmp_path / folder / name / "x.png", (ord(name), len(folder) == len(test), 0))
    put(tmp_path / "other" / "x.png"), put(tmp_path / "x.png")
    for split, names, labels in (("train", "ac", [0, 2]), ("test", "bc", [1, 2])):
        got = read_folder(tmp_path, split=split)
        assert got[1].tolist() == labels and got[3] == ["a", "b", "c"]
        assert red(got[0]) == [ord(name) for name in names]
        assert got[4] == "2 outside train/ and test/"


def test_a_train_folder_alone_is_no_class(tmp_path):
    put(tmp_path / "train" / "cat" / "x.png"), put(tmp_path / "train" / "dog" / "x.png")
    for split in ("train", "test"):
        images, _, _, class_names, _ = read_folder(tmp_path, split=split)
        assert class_names == ["cat", "dog"] and len(images) == 2
    for name in ("car", "train"):
        put(tmp_path / "vehicles" / name / "x.png")
    assert read_folder(tmp_path / "vehicles")[3] == ["car", "train"]    # no other split: a class


def test_the_split_that_nobody_made(tmp_path):
    for i in range(240):
        put(tmp_path / f"{i}.png", (i, 0, 0), size=(4, 4))

    def values(split, **options):
        return red(read_folder(tmp_path, 4, split, **options)[0])

    train, test = values("train"), values("test")
    assert len(test) == 12 and sorted(train + test) == list(range(240))
    assert values("test", seed=5) == test                   # the split does not move with the seed
    few = values("train", count=30)
    assert len(few) == 30 and set(few) <= set(train) and values("train", count=30, seed=1) != few


def test_fewer_than_200_are_not_split():
    assert [len(choose(n, "test", None, 0)) for n in (199, 200, 219, 220)] == [199, 10, 10, 11]
    assert [len(choose(n, "train", None, 0)) for n in (199, 200, 219, 220)] == [199, 190, 209, 209]


def test_captions_beside_the_pictures(tmp_path):
    """kohya's layout, at any depth; a byte order mark; letters of any language."""
    for i, (place, ending) in enumerate((("10_sks dog", "txt"), ("2_cat/deep", "caption"))):
        put(tmp_path / place / "b.png", (10 * i, 0, 0))
        put(tmp_path / place / "a.png", (10 * i + 1, 0, 0))
        write(tmp_path / place / f"b.{ending}", f"강아지 {i}\u2028b\n", "utf-8-sig")
        write(tmp_path / place / f"a.{ending}", f"Hündchen {i}")
    images, labels, captions, class_names, left_out = read_folder(tmp_path)
    assert class_names == ["cat", "sks dog"] and left_out == ""
    assert dict(zip(red(images), zip(labels.tolist(), captions))) == {
        0: (1, "강아지 0\u2028b"), 1: (1, "Hündchen 0"),
        10: (0, "강아지 1\u2028b"), 11: (0, "Hündchen 1")}
    (tmp_path / "2_cat" / "deep" / "b.caption").unlink()
    with pytest.raises(ValueError, match="1 of 4 images .*no caption.*b.png"):
        read_folder(tmp_path)
    write(tmp_path / "2_cat" / "deep" / "b.txt", "first\nзеница", "cp1251")
    with pytest.raises(ValueError, match="b.txt line 2: expected UTF-8"):
        read_folder(tmp_path)


def test_captioned_pictures_may_lie_anywhere(tmp_path):
    for name in ("a", "deep/b"):
        put(tmp_path / f"{name}.png")
        write(tmp_path / f"{name}.txt", name)
    images, labels, captions, class_names, _ = read_folder(tmp_path)
    assert captions == ["a", "deep/b"] and labels.tolist() == [0, 0] and class_names == []


def table(path, rows, kind):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if kind == "csv":
        lines = ["file_name,text", *(f'{row["file_name"]},"{row["text"]}"' for row in rows)]
    return write(path / f"metadata.{kind}", "\n".join(lines) + "\n\n", "utf-8-sig")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("place", ["", "train", "elsewhere"])
def test_captions_by_metadata(tmp_path, kind, place):
    """In the root or in train/; a relative root; U+2028 is not the end of a line."""
    put(tmp_path / "train" / "in" / "x.png", (1, 0, 0))
    put(tmp_path / "train" / "y.png", (2, 0, 0))
    below = "" if place == "train" else "train/" if place == "" else "../train/"
    rows = [{"file_name": f"{below}y.png", "text": "why,\u2028여우"},
            {"file_name": f"{below}in/x.png", "text": "ex"}]
    table(tmp_path / place, rows, kind)
    images, labels, captions, class_names, left_out = read_folder(os.path.relpath(tmp_path))
    assert dict(zip(red(images), captions)) == {1: "ex", 2: "why,\u2028여우"}
    assert class_names == [] and labels.tolist() == [0, 0] and left_out == ""
    put(tmp_path / "train" / "unlisted.png")
    with pytest.raises(ValueError, match="1 of 3 images .*no caption.*unlisted.png"):
        read_folder(tmp_path)


def test_a_picture_with_two_captions_comes_twice(tmp_path):
    put(tmp_path / "a.png")
    rows = [{"file_name": "a.png", "text": text} for text in ("one", "two", "one")]
    table(tmp_path, rows, "jsonl"), table(tmp_path, rows[:1], "csv")
    assert read_folder(tmp_path)[2] == ["one", "two"]


def test_captions_of_a_picture_stay_in_one_split(tmp_path):
    """Else a held-out picture would be one that was trained on."""
    rows = [{"file_name": f"{i}.png", "text": f"{i} {word}"} for i in range(200) for word in "ab"]
    for i in range(200):
        put(tmp_path / f"{i}.png", size=(2, 2))
    table(tmp_path, rows, "jsonl")
    shown = {split: Counter(text.split()[0] for text in read_folder(tmp_path, 2, split)[2])
             for split in ("train", "test")}
    assert {*shown["train"].values(), *shown["test"].values()} == {2}
    assert len(shown["test"]) == 10 and not shown["train"].keys() & shown["test"].keys()


def test_without_captions_a_number_belongs_to_the_name_of_a_class(tmp_path):
    """Kohya's "10_sks dog" says how often; 1_cat and 2_cat are two classes."""
    put(tmp_path / "1_cat" / "x.png"), put(tmp_path / "2_cat" / "x.png")
    assert read_folder(tmp_path)[3] == ["1_cat", "2_cat"]


@pytest.mark.parametrize("line, message", [
    ('{"file_name": "a.png"', "line 2: expected"), ('{"file_name": "a.png"}', "line 2: expected"),
    ('["a.png", "t"]', "line 2: expected"), ('{"file_name": "a.png", "text": null}', "line 2: exp"),
    ('{"file_name": "gone.png", "text": "t"}', "line 2: .*gone.png")])
def test_wrong_rows_are_named(tmp_path, line, message):
    put(tmp_path / "a.png")
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "t"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


def test_wrong_tables_are_named(tmp_path):
    put(tmp_path / "a.png")
    write(tmp_path / "metadata.csv", "name,text\na.png,one\n")
    with pytest.raises(ValueError, match="metadata.csv line 2: expected .*file_name"):
        read_folder(tmp_path)
    write(tmp_path / "metadata.csv", "file_name,text\na.png,고양이\n", "cp949")
    with pytest.raises(ValueError, match="metadata.csv line 2: expected UTF-8"):
        read_folder(tmp_path)


@pytest.mark.parametrize("name, text, line", [
    ("csv", "file_name,text\na.png,a red circle, large\n", 2),          # a comma without quotes
    ("csv", 'file_name,text\na.png,"first\nsecond"\ngone.png,x\n', 4),  # the line, not the row
    ("csv", 'file_name,text\na.png,"never closed\na.png,two\n', 1),
    ("csv", "file_name;text\na.png;x\n", 2), ("csv", "file_name,text\na.png\n", 2),
    ("csv", f"file_name,text\na.png,{'x' * 140_000}\n", 1),
    ("jsonl", '\n\n{"file_name": "a.png", "text": 3}\n', 3), ("jsonl", "[" * 100_000, 1),
    ("jsonl", '{"file_name": "a.png", "text": "a \\ud800"}', 1),        # half a letter
    ("jsonl", '{"file_name": "../out.png", "text": "x"}', 1),
    ("jsonl", '{"file_name": "/out.png", "text": "x"}', 1), ("jsonl", "null\n", 1),
    ("jsonl", '{"file_name": "a.png\\u0000", "text": "x"}', 1)])
def test_odd_tables_are_named_with_their_line(tmp_path, name, text, line):
    put(tmp_path / "out.png"), put(tmp_path / "set" / "a.png")
    write(tmp_path / "set" / f"metadata.{name}", text)
    with pytest.raises(ValueError, match=f"metadata.{name} line {line}: expected") as error:
        read_folder(tmp_path / "set")
    assert "\n" not in str(error.value)


def test_an_empty_caption_is_none(tmp_path):
    """Such a picture would train as if nothing were asked for."""
    for name in "ab":
        put(tmp_path / f"{name}.png")
        write(tmp_path / f"{name}.txt", f" {name}\n" if name == "a" else "\n")
    with pytest.raises(ValueError, match="1 of 2 images .*no caption.*b.png"):
        read_folder(tmp_path)
    write(tmp_path / "a.txt", "")
    assert read_folder(tmp_path)[2] is None


def test_a_text_belongs_to_all_pictures_of_its_name(tmp_path):
    for name in ("a.png", "a.jpg", "B.PNG"):
        put(tmp_path / "img" / "10_sks dog" / name)
    write(tmp_path / "img" / "10_sks dog" / "a.txt", "one")
    write(tmp_path / "img" / "10_sks dog" / "B.TXT", "two")
    _, labels, captions, class_names, left_out = read_folder(tmp_path)
    assert sorted(captions) == ["one", "one", "two"] and left_out == ""
    assert class_names == ["sks dog"] and labels.tolist() == [0, 0, 0]  # not "img"
    put(tmp_path / "img" / "10_sks dog" / "c.png")
    with pytest.raises(ValueError, match="1 of 4 images .*no caption.*c.png"):
        read_folder(tmp_path)


@pytest.mark.parametrize("folders, has_train", [
    (("test",), False), (("val", "TEST"), False), (("train",), True), (("Train", "Valid"), True)])
def test_split_folders_are_no_classes(tmp_path, folders, has_train):
    for folder in folders:
        put(tmp_path / folder / "cat" / "x.png"), put(tmp_path / folder / "dog" / "x.png")
    assert read_folder(tmp_path, split="test")[3] == ["cat", "dog"]
    if has_train:
        return
    with pytest.raises(ValueError, match="no images in .* to train"):
        read_folder(tmp_path)
    for name in ("bus", "car"):                             # beside others they are classes
        put(tmp_path / name / "x.png")
    assert read_folder(tmp_path)[3] == sorted(["bus", "car", *folders])


def test_links_in_a_circle_end(tmp_path):
    put(tmp_path / "a" / "x.png"), put(tmp_path / "b" / "y.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "itself").symlink_to(tmp_path / "b" / "itself")
    images, labels, *_, left_out = read_folder(tmp_path, 8)
    assert labels.tolist() == [0, 0, 1, 1] and left_out == "2 itself"   # a/b/, b/a/ once each


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "metadata.csv", "b.png"])
def test_what_is_no_plain_file_is_not_waited_for(tmp_path, name):
    put(tmp_path / "a.png")
    os.mkfifo(tmp_path / name)
    if name == "b.png":
        with pytest.raises(ValueError, match="cannot read image .*b.png.*skip-bad"):
            read_folder(tmp_path)
    images, _, captions, _, left_out = read_folder(tmp_path, skip_bad=True)
    assert len(images) == 1 and captions is None
    assert left_out == ("1 unreadable" if name == "b.png" else f"1 {name[name.index('.'):]}")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    for name in ("a", "locked", ".h"):
        put(tmp_path / name / "x.png")
    scandir = os.scandir

    def locked(path):
        if os.path.basename(path) in ("locked", ".h"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(ValueError, match="no folder .*locked that can be read: Permission denied"):
        read_folder(tmp_path)
    (tmp_path / "locked").rename(tmp_path / "open")
    assert read_folder(tmp_path)[3] == ["a", "open"]        # a hidden folder is not looked into


def test_huge_pictures_and_formats_without_pixels(tmp_path):
    """A few bytes that announce 10^10 pixels; files that Pillow knows by name alone."""
    chunk = lambda kind, body: (len(body).to_bytes(4, "big") + kind + body
                                + zlib.crc32(kind + body).to_bytes(4, "big"))
    size = (100_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    put(tmp_path / "a.png")
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(
        b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match="huge.png .*too large"):
        read_folder(tmp_path)
    (tmp_path / "huge.png").unlink()
    for ending in ("mpg", "h5", "eps", "pdf"):
        (tmp_path / f"x.{ending}").write_bytes(b"?")
    assert read_folder(tmp_path)[4] == "1 .eps, 1 .h5, 1 .mpg, 1 .pdf"


def test_names_that_are_not_utf8(tmp_path):
    """They can be read, and what is said about them can be printed."""
    put(tmp_path / "a.png"), put(tmp_path / "new\nline.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    write(tmp_path / "new\nline.txt", "x"), write(tmp_path / "\udcff.txt", "y")
    open(os.fsencode(tmp_path) + b"/x.\xfe", "wb").close()
    _, _, captions, _, left_out = read_folder(tmp_path)
    assert sorted(captions) == ["x", "y"] and left_out.encode() == rb"1 .\udcfe"
