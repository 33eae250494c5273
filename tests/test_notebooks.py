"""Every notebook runs from top to bottom at small scale."""
import json
import pathlib

import matplotlib
import pytest

from conftest import fewer_drawn
from tasks import DiffusionTask

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_of(path):
    """The code cells of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.setenv("SCALE", "0.02")
    fewer_drawn(monkeypatch, 500)
    sample = DiffusionTask.sample                           # two calls for each picture
    monkeypatch.setattr(DiffusionTask, "sample", lambda *given, steps=None, **how: sample(
        *given, steps=2 if steps is None else min(steps, 2), **how))
    monkeypatch.chdir(path.parent)                          # where Jupyter starts it
    names = {}
    for number, cell in enumerate(code_of(path), 1):
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), names)
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_file(path):
    code = code_of(path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert 12 <= len(cells) <= 25 and path.stat().st_size <= 500_000
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}  # no error
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "## Exercises" in "".join(cells[-1]["source"])
