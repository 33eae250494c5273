"""Every notebook runs from top to bottom at small scale, straight from its JSON, and keeps to its size."""
import json
import pathlib

import matplotlib
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.setenv("SCALE", "0.05")
    monkeypatch.chdir(path.parent)                          # where Jupyter starts it
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    names = {}
    for cell in code:
        exec(compile("".join(cell["source"]), f"{path.name}, cell {cell['execution_count']}", "exec"), names)
    matplotlib.pyplot.close("all")
    assert 12 <= len(cells) <= 25 and path.stat().st_size <= 500_000
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in out.get("data", {}) for cell in code for out in cell["outputs"])
    assert "xercises" in "".join(cells[-1]["source"])
