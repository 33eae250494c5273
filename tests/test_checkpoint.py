"""checkpoint.py: files are written whole or not at all, run nothing, and are checked before use."""
import argparse
import os
import pathlib
import pickle
import re
import zipfile

import pytest
import torch

from checkpoint import (built_from, check_tensors, load_checkpoint, load_weights, named_tensors,
                        read_torch, save_checkpoint, written_whole)


# --------------------------------------------------------------------------------------------------
# writing

def test_a_file_comes_back_as_it_was_saved(tmp_path):
    state = {"step": 3, "config": {"words": ["a", "b"], "none": None, "size": (1, 2.5)},
             "model": {"w": torch.randn(4, 3), "half": torch.ones(2).half(), "n": torch.arange(3)}}
    save_checkpoint(tmp_path / "ckpt.pt", state)
    back = load_checkpoint(tmp_path / "ckpt.pt")
    assert back.pop("format") == 2 and "format" not in state and os.listdir(tmp_path) == ["ckpt.pt"]
    for name, tensor in state.pop("model").items():
        again = back["model"][name]
        assert torch.equal(again, tensor) and again.dtype == tensor.dtype
    assert len(back.pop("model")) == 3 and back == state


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, {"x": torch.ones(3)})

    def half(state, file):
        file.write(b"x" * 100)
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(ValueError, match="could not write .*ckpt.pt .*No space left"):
        save_checkpoint(path, {"x": torch.zeros(3)})
    assert torch.equal(load_checkpoint(path)["x"], torch.ones(3))
    assert os.listdir(tmp_path) == ["ckpt.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_really_full_device_is_one_line(tmp_path):
    (tmp_path / "ckpt.pt.part").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="could not write"):
        save_checkpoint(tmp_path / "ckpt.pt", {"x": torch.zeros(100_000)})
    assert not os.listdir(tmp_path)


def test_a_file_stopped_half_way_keeps_the_old_one(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    for stop in (KeyboardInterrupt, TypeError):
        with pytest.raises(stop):
            with written_whole(path) as file:
                file.write(b"new")
                raise stop
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]
    with written_whole(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"              # until the block ends
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.bin"]
    save_checkpoint(tmp_path / "new" / "ckpt.pt", {})   # a folder is made
    with pytest.raises(ValueError, match="could not write .*new"):
        save_checkpoint(tmp_path / "new", {})


# --------------------------------------------------------------------------------------------------
# reading

def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 500


def test_damaged_files_are_refused(tmp_path):
    good = tmp_path / "good.pt"
    save_checkpoint(good, {"x": torch.randn(10_000)})
    raw = good.read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 1     # a bit inside the tensor: torch does not check it
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    other = (tmp_path / "other.zip").read_bytes()
    for content in (b"", b"hello", b"garbage", raw[:len(raw) // 2], raw[:-300], raw[2000:],
                    bytes(flipped), other):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ValueError, match="bad.pt is damaged, truncated or no torch") as error:
            load_checkpoint(tmp_path / "bad.pt")
        assert one_line(error)
    with pytest.raises(ValueError, match="train first"):
        load_checkpoint(tmp_path / "ckpt.pt")


class Evil:
    """Unpickling this would make a folder, as the callbacks inside sd-v1-4.ckpt would run code."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": Evil()}, "a.ckpt",
               _use_new_zipfile_serialization=zipped)
    torch.save({"ema": {"w": torch.ones(2)}, "args": argparse.Namespace(a=1)}, "dit.pt",
               _use_new_zipfile_serialization=zipped)
    for name in ("a.ckpt", "dit.pt")[:1 if zipped else 2]:      # a Namespace does nothing
        with pytest.raises(ValueError, match=f"{name} holds more than tensors.*torch.save") as err:
            load_checkpoint(name)
        assert one_line(err)
    assert not zipped or load_checkpoint("dit.pt")["ema"]["w"].tolist() == [1, 1]
    pathlib.Path("evil.pkl").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError):
        load_checkpoint("evil.pkl")
    assert not os.path.exists("executed")


@pytest.mark.parametrize("found", [1, 3])
def test_files_of_other_formats_are_refused(tmp_path, found):
    torch.save({"format": found, "model": {}}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=f"has format {found}, expected 2.*train again") as error:
        load_checkpoint(tmp_path / "old.pt")
    assert one_line(error)


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s},
    lambda s: {"model": {k: 0 * v for k, v in s.items()}, "ema": s, "opt": {0: {}}}])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "_orig_mod."])
@pytest.mark.parametrize("zipped", [True, False])       # False: before torch 1.6
def test_official_files_are_unwrapped_and_prefixes_stripped(tmp_path, wrap, prefix, zipped):
    want = {"a.weight": torch.randn(3, 2), "b.module.c": torch.arange(3)}
    held = {prefix + name: tensor for name, tensor in want.items()}
    torch.save(wrap({**held, "step": 5}), tmp_path / "x", _use_new_zipfile_serialization=zipped)
    state = load_checkpoint(tmp_path / "x")
    assert state.keys() == {"model", "ema"}
    for given in state.values():
        assert given.keys() == want.keys()
        assert all(torch.equal(given[name], want[name]) for name in want)


def test_files_without_weights_are_named(tmp_path):
    for nothing in ([torch.ones(2)], torch.ones(2), {"state_dict": {}}, {"epoch": 3}):
        torch.save(nothing, tmp_path / "e.ckpt")
        with pytest.raises(ValueError, match="e.ckpt holds no named tensors"):
            load_checkpoint(tmp_path / "e.ckpt")
        with pytest.raises(ValueError, match="e.ckpt holds no named tensors"):
            named_tensors(read_torch(tmp_path / "e.ckpt"), "e.ckpt")


# --------------------------------------------------------------------------------------------------
# into a model

def test_weights_that_do_not_fit_are_listed_and_nothing_is_copied():
    model = torch.nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ones = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    load = lambda **change: load_weights(model, {**ones, **change}, "f.pt")
    with pytest.raises(ValueError, match=r"f.pt .* 1 .*: weight: file \(2, 4\), model \(2, 3\)$"):
        load(weight=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"extra: file \(1,\), model has none"):
        load(extra=torch.zeros(1))
    with pytest.raises(ValueError, match=r"bias: file has none, model \(2,\)"):
        load_weights(model, {"weight": ones["weight"]}, "f.pt")
    with pytest.raises(ValueError, match="7 tensors differ: x0.*; x1.*; x2.*; x3.*; x4[^;]*$"):
        load(**{f"x{i}": torch.ones(1) for i in range(7)})                  # the first five
    for weights in ({1: torch.ones(2)}, {**ones, 1: torch.ones(2)}, {**ones, "bias": "x"}, {"": 3}):
        with pytest.raises(ValueError, match="built by f.pt .*damaged or old|f.pt does not fit"):
            load_weights(model, weights, "f.pt")
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    load()
    assert all(torch.equal(model.state_dict()[name], ones[name]) for name in before)


def test_tensors_of_a_file_have_names_shapes_and_finite_numbers_of_the_models_kind():
    have = {"b": torch.ones(2), "a": torch.ones(3, 1), "c": torch.tensor(5)}
    same = {"c": torch.tensor(7), "a": torch.zeros(3, 1).half(), "b": torch.zeros(2)}
    check_tensors(have, same, "f:")
    other = {"a": torch.ones(1, 3), "c": torch.tensor(7), "d": torch.ones(4)}
    with pytest.raises(ValueError, match=re.escape(
            "f: 3 tensors differ: a: file (1, 3), model (3, 1); b: file has none, model (2,); "
            "d: file (4,), model has none")):
        check_tensors(have, other, "f:")
    for bad in (torch.tensor([1, 2]), torch.tensor([0.0, float("inf")])):
        with pytest.raises(ValueError, match=f"^f: 1 .*: b: dtype {bad.dtype}, or not finite$"):
            check_tensors(have, {**same, "b": bad}, "f:")


# --------------------------------------------------------------------------------------------------
# values

RUN = {"task": "dit", "step": 3, "config": {}, "settings": {}, "model": {"w": torch.ones(2)},
       "info": {"name": "x", "class_names": ["a"], "channels": 3, "image_size": 8,
                "vocabulary": {"words": ["a"], "reserved": 8, "max_length": 9}},
       "opt": [{"state": {0: {"step": torch.ones(())}}, "param_groups": [{"params": [0]}]}],
       "first_stage": {"kind": "none", "sizes": {}, "model": {}}}
WRONG_VALUES = {"task": [3, None], "step": ["x", 1.0, None], "config": [[], None],
                "settings": [[]], "model": [[], None], "info": [[], None], "opt": [{}],
                "first_stage": [None, []]}


@pytest.mark.parametrize("key", WRONG_VALUES)
def test_a_value_of_another_form_is_refused_with_its_key(tmp_path, key):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, RUN)
    assert load_checkpoint(path, *RUN).keys() == {*RUN, "format"}
    for value in WRONG_VALUES[key]:
        save_checkpoint(path, {**RUN, key: value})
        with pytest.raises(ValueError, match=f"ckpt.pt is damaged.* no good {key} in it$") as error:
            load_checkpoint(path)
        assert one_line(error)
    save_checkpoint(path, {k: v for k, v in RUN.items() if k != key})
    load_checkpoint(path)                               # not every kind of file has all keys
    with pytest.raises(ValueError, match=f"no good {key} in it"):
        load_checkpoint(path, "format", key)


@pytest.mark.parametrize("found", [torch.ones(2), [2], "3", None])
def test_a_format_of_any_type_is_refused(tmp_path, found):
    torch.save({"format": found}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="has format .*expected 2"):
        load_checkpoint(tmp_path / "x.pt")


def test_what_a_file_builds_fails_in_one_line():
    for error in (KeyError("kind"), TypeError("a\nb"), ZeroDivisionError(), AttributeError("x"),
                  IndexError(3), RuntimeError("Storage size calculation overflowed")):
        with pytest.raises(ValueError, match=rf"built by x.pt \({type(error).__name__}") as found:
            with built_from("x.pt"):
                raise error
        assert one_line(found)
    for error in (ValueError("said already"), KeyboardInterrupt(), torch.OutOfMemoryError("memory"),
                  RuntimeError("can't allocate memory")):
        with pytest.raises(type(error)) as found:       # these are not the file's fault
            with built_from("x.pt"):
                raise error
        assert found.value is error
