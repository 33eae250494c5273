"""A run's file: written whole or not at all, read without running code, checked before use.

The idea. A checkpoint is a dict of tensors and plain values, saved by torch.save.
  write  into a second file, which replaces the old one when complete: a crash changes nothing.
  read   with torch's restricted unpickler (weights_only), which runs nothing. The zip file's
         checksums are compared first: a flipped bit would otherwise load as a wrong number.
  check  keys and types against FORMS, names and shapes against the model, before any is used.

    python -m pytest tests/test_checkpoint.py"""
import contextlib
import hashlib
import json
import mmap
import os
import pathlib
import pickle
import re
import sys
import zipfile

import torch

FORMAT = 2                              # of our own files; 1 was the first edition's
# what trainers save of Python's own: a run's flags, folders, bytes. The rest may be an attack
HARMLESS = ("argparse.", "pathlib.", "types.SimpleNamespace", "_codecs.encode")

# the types of what our files may hold, all kinds of them; what is inside them, built_from finds out
FORMS = {str: "task base data note first_stage_hash", int: "step", list: "opt concepts", dict:
         "info config settings options sizes spec tensors model ema adapter modifiers first_stage"}


def save_checkpoint(path, state):
    """Write the dict `state`, with "format": 2, whole or not at all. Raises ValueError."""
    with written_whole(path) as file:
        torch.save({**state, "format": FORMAT}, file)


def load_checkpoint(path, *needed):
    """A file of save_checkpoint as it was saved; an official file as {"model", "ema"}, the same.
    needed: keys that must be there. Raises ValueError, also if it is not as FORMS says."""
    if not pathlib.Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}: train first (python train.py)")
    state = read_torch(path)
    if not isinstance(state, dict) or "format" not in state:
        state = dict.fromkeys(("model", "ema"), named_tensors(state, path))
    elif str(state["format"]) != str(FORMAT):
        raise ValueError(f"{path} has format {str(state['format'])[:20]}, expected 2: train again")
    wrong = [key for key in needed if key not in state]
    wrong += [key for kind, keys in FORMS.items() for key in keys.split()
              if key in state and not isinstance(state[key], kind)]
    if wrong:
        raise ValueError(f"{path} is damaged or of another kind: no good {', '.join(wrong)} in it")
    if known := state.pop("first_stage_hash", None):    # of --keep: the rest is in ckpt.pt
        run = pathlib.Path(path).with_name("ckpt.pt")
        with built_from(run):
            state["first_stage"] = read_torch(run).get("first_stage", {}) if run.is_file() else {}
            if fingerprint(state["first_stage"].get("model", {})) != known:
                raise ValueError(f"{path} needs the first stage in {run}: none or another is there")
    return state


def fingerprint(tensors):
    """SHA-256 of {name: tensor}: names, shapes, values in half precision, as exports have them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        value = tensor.half() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def built_from(source):
    """While something is built by the file `source`, "" for none: a ValueError if that fails."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        if not source or "memory" in str(error):    # the program's fault, or this machine's
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:100]
        raise ValueError(f"nothing can be built by {source} ({reason}): damaged or old?") from error


def load_weights(model, weights, path):
    """Copy a state_dict, read from `path`, into model. Raises ValueError if it does not fit."""
    with built_from(path):              # what is no table of tensors
        check_tensors(model.state_dict(), weights, f"{path} does not fit this model,")
    model.load_state_dict(weights)


def check_tensors(have, given, what):
    """Raise ValueError, `what` and five differences, unless {name: tensor} of a file have names and
    shapes of a model's, and are finite numbers of their kind (of any precision)."""
    a, b = ({name: tuple(tensor.shape) for name, tensor in x.items()} for x in (have, given))
    wrong = [f"{name}: file {b.get(name, 'has none')}, model {a.get(name, 'has none')}"
             for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    wrong = wrong or [f"{name}: dtype {tensor.dtype}, or not finite"
                      for name, tensor in given.items() if have[name].is_floating_point()
                      and not (tensor.is_floating_point() and tensor.isfinite().all())]
    if wrong:
        raise ValueError(f"{what} {len(wrong)} tensors differ: {'; '.join(wrong[:5])}")


@contextlib.contextmanager
def written_whole(path):
    """A binary file to write to, which takes the place of `path` if the block ends without error;
    else nothing changes and nothing is left behind. Raises ValueError for a failed write."""
    part = pathlib.Path(f"{path}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())     # on the disk before the old file goes
        os.replace(part, path)
    except (OSError, RuntimeError) as error:        # torch reports a failed write as RuntimeError
        reason = str(error).splitlines()[0]
        raise ValueError(f"could not write {path} ({reason}); the old one is intact") from error
    finally:
        with contextlib.suppress(OSError):          # it was moved, or never made
            part.unlink()


def read_torch(path):
    """What torch.save wrote, mapped if it can be. Raises ValueError if damaged or unsafe."""
    try:
        zipped = zipfile.is_zipfile(path)           # since torch 1.6
        if zipped and zipfile.ZipFile(path).testzip() is not None:
            raise ValueError("a checksum inside it does not match")
        # torch reads any path that ends so as safetensors, but not an open file
        mapped = zipped and pathlib.Path(path).suffix != ".safetensors"
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else ()
        inert = [(Inert, name) for name in unsafe if name.startswith(HARMLESS)
                 or name.partition(".")[0] not in sys.stdlib_module_names]
        with open(path, "rb") as file, torch.serialization.safe_globals(inert):
            return torch.load(path if mapped else file, "cpu", weights_only=True, mmap=mapped)
    except Exception as error:                      # a damaged file may fail in any way
        # "operand": bytes that are no pickle; what else the unpickler refuses is code or a class
        refused = isinstance(error, pickle.UnpicklingError)
        if refused and "Unsupported operand" not in str(error):
            raise ValueError(f"{path} holds more than tensors, may run code: take its .safetensors"
                             " edition, or if you trust it, x = torch.load(path, "
                             "weights_only=False); torch.save({k: x[k] for k in x if k in "
                             "('ema', 'model', 'state_dict')}, new)") from error
        reason = type(error).__name__ if refused else str(error).partition("\n")[0][:120]
        raise ValueError(f"{path} is damaged, truncated or no torch file ({reason})") from error


class Inert:
    """While a file is read, in place of a class or function of a trainer: it does nothing."""
    __init__ = lambda self, *given: None
    __setstate__ = lambda self, state: vars(self).update(state if isinstance(state, dict) else {})


def named_tensors(state, path):
    """The state_dict in what a file held, without the prefixes of DDP and compile; of several, the
    first of "ema", "model" and "state_dict". Raises ValueError if there is none."""
    state = state if isinstance(state, dict) else {}
    wrapped = [state[key] for key in ("ema", "model", "state_dict") if key in state]
    if len(wrapped) > 1 and any(str(name)[:14] == "content_codec." for name in wrapped[1]):
        wrapped = [wrapped[1] | {f"transformer.{k}": w for k, w in wrapped[0].items()}]
    state = _flat(next((inner for inner in wrapped if isinstance(inner, dict)), state))
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): w for name, w in state.items()}
    if not state:
        raise ValueError(f"{path} holds no named tensors: it is no file of weights")
    return state


def _flat(content, before=""):
    """{dotted name: tensor} of nested dicts, and of what stands for torch's ParameterDict."""
    content = getattr(content, "_parameters", content)
    if torch.is_tensor(content):
        return {before[:-1]: content}
    items = content.items() if isinstance(content, dict) and len(before) < 1000 else ()
    return {key: tensor for name, value in items if isinstance(name, str)
            for key, tensor in _flat(value, f"{before}{name}.").items()}


# ---- files. safetensors: 8 bytes, a JSON's length; JSON {name: {dtype, shape, data_offsets}}; data
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, mapped: writing to a tensor leaves the file as it is.
    Raises ValueError for any other file. Source: github.com/huggingface/safetensors, "Format"."""
    try:
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(buffer[:8], "little")        # the first byte of the data
        header, data, last, tensors = json.loads(buffer[8:start]), memoryview(buffer)[start:], 0, {}
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
            if begin != last:
                raise ValueError(f"{name!r} begins at byte {begin}, not at {last}")
            # a storage for each tensor, so saving one does not save the file; not aligned: a copy
            part = data[begin:end] if (start + begin) % dtype.itemsize == 0 else (
                bytearray(data[begin:end]))
            numbers = torch.frombuffer(part, dtype=dtype) if part else torch.empty(0, dtype=dtype)
            tensors[name], last = numbers.view(entry["shape"]), end     # fails unless it fits
        if last != len(data):
            raise ValueError(f"the tensors take {last} bytes, and there are {len(data)}")
        return tensors
    except Exception as error:                  # a damaged file may fail in any way
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"{path} is missing, truncated, damaged or no safetensors file "
                         f"({type(error).__name__}: {reason})") from error


def write_safetensors(file, tensors, about):
    """Write {name: tensor} and about, {key: text}, to an open file: the largest numbers first, so
    that all are aligned. Source: github.com/huggingface/safetensors, "Format"."""
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header, end = {"__metadata__": about}, 0
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    for name, w in order:
        begin, end = end, end + w.numel() * w.dtype.itemsize
        header[name] = dict(dtype=kinds[w.dtype], shape=[*w.shape], data_offsets=[begin, end])
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    file.write(len(head).to_bytes(8, "little") + head)
    for _, w in order:
        file.write(w.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
