"""What several tests share: one thread, and the golden cases (inputs and outputs of the official implementations)."""
import json
import pathlib
import zlib

import numpy as np
import pytest
import torch

GOLDEN = pathlib.Path(__file__).parent / "golden"


def golden_case(name):
    """(description dict, arrays as tensors) of one golden case."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        tensors = {k: torch.from_numpy(arrays[k].copy()) for k in arrays.files}
    return json.loads((GOLDEN / f"{name}.json").read_text()), tensors


def fill_by_recipe(model, computed=()):
    """Give every tensor of a state_dict the values of the golden recipe (tests/golden/README.md).

    Names in `computed` keep theirs.
    """
    state = model.state_dict()
    for name, tensor in state.items():
        if name in computed:
            continue
        random = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
        n = random.standard_normal(tuple(tensor.shape)).astype("float32")
        n = 0.1 * n + (1.0 if name.endswith("weight") else 0.0) if n.ndim <= 1 else n / np.sqrt(np.prod(n.shape[1:]))
        state[name] = torch.from_numpy(np.asarray(n, dtype="float32"))
    model.load_state_dict(state, strict=True)
    return model


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two threads on a busy machine run five to eight times slower than one."""
    torch.set_num_threads(1)
