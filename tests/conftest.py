"""What several tests share: golden cases, two small folders of pictures, exact comparison."""
import json
import os
import pathlib
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import tasks
import train
import worlds
from tasks import DiffusionTask

GOLDEN = pathlib.Path(__file__).parent / "golden"
ROOT = pathlib.Path(__file__).parent.parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}    # of subprocesses


@pytest.fixture(scope="session", autouse=True)
def equal_models_are_counted_once():
    """Every run counts its operations, in 0.2 s: here once for all models that print the same."""
    count, known = tasks.macs, {}

    def remembered(task):
        key = f"{task.model} {task.info['channels']} {task.info['image_size']}"
        known[key] = known.get(key) or count(task)
        return known[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "macs", remembered)
        yield


@pytest.fixture(scope="session", autouse=True)
def losses_are_not_plotted():
    """A plot takes 0.2 s, and every run makes one: real ones are in test_tasks.py, and in the whole
    process of test_train.py."""
    def plot_loss(table, path):
        if len(pathlib.Path(table).read_text().splitlines()) > 1:
            Image.new("L", (1, 1)).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "plot_loss", plot_loss)
        yield


def golden_case(name):
    """(description dict, arrays as tensors) of one golden case, made with the official code."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        tensors = {k: torch.from_numpy(arrays[k].copy()) for k in arrays.files}
    return json.loads((GOLDEN / f"{name}.json").read_text()), tensors


def by_recipe(name, shape):
    """The values of the golden recipe for the tensor of this name (tests/golden/README.md)."""
    random = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    n = random.standard_normal(tuple(shape)).astype("float32")
    if n.ndim <= 1:
        n = 0.1 * n + (1.0 if name.endswith("weight") else 0.0)
    else:
        n = n / np.sqrt(np.prod(n.shape[1:]))
    return torch.from_numpy(np.asarray(n, dtype="float32"))


def fill_by_recipe(model, computed=()):
    """Give every tensor of a state_dict the values of the golden recipe (tests/golden/README.md).

    Names in `computed` keep theirs.
    """
    state = model.state_dict()
    for name, tensor in state.items():
        if name not in computed:
            state[name] = by_recipe(name, tensor.shape)
    model.load_state_dict(state, strict=True)
    return model


def assert_same(a, b, where=""):
    """Equal to the last bit, through dicts and lists."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}/{i}")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two threads on a busy machine run five to eight times slower than one."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


@pytest.fixture(scope="module")
def short_previews():
    """Previews of two pictures instead of up to 48."""
    examples = DiffusionTask.examples

    def two(task):
        y, names = examples(task)
        return y[:2], names and names[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionTask, "examples", two)
        yield


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 2 x 12 noise pictures of 8 x 8 in two classes."""
    root, gen = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for name in ("apple", "pear"):
        for i in range(12):
            picture = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8, generator=gen)
            data.save_grid(picture, root / name / f"{i}.png", nrow=1, pad=0, scale=1)
    return root


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder of 24 captioned scenes of 32 x 32."""
    root, world = tmp_path_factory.mktemp("scenes"), data.load("scenes", count=24)
    for i, caption in enumerate(world.captions):
        data.save_grid(world.images[i:i + 1], root / f"{i:02d}.png", nrow=1, pad=0, scale=1)
        (root / f"{i:02d}.txt").write_text(caption)
    return root


def fewer_drawn(patch, most):
    """What data.load draws of the worlds is at most so many pictures; others draw all they want."""
    whole = worlds.plan_world
    fewer = lambda name, split, count, *more: whole(name, split, min(count or most, most), *more)
    patch.setattr(data, "worlds", SimpleNamespace(**{**vars(worlds), "plan_world": fewer}))


def write_safetensors(path, tensors):
    """Write {name: tensor} as https://github.com/huggingface/safetensors describes the format."""
    kinds = {dtype: kind for kind, dtype in checkpoint.DTYPES.items()}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = dict(dtype=kinds[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[len(data), len(data) + len(flat)])
        data += flat
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    pathlib.Path(path).write_bytes(len(head).to_bytes(8, "little") + head + data)
