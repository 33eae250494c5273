"""Every notebook runs from top to bottom at small scale."""
import json
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

import matplotlib
import pytest
from matplotlib import animation

from conftest import fewer_drawn
from models import FAMILIES
from tasks import DiffusionTask

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells_of(path):
    """All cells of a notebook."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code_of(path):
    """The code cells of a notebook."""
    return [cell for cell in cells_of(path) if cell["cell_type"] == "code"]


def solutions_of(path):
    """The programs in the collapsed answers of the last cell."""
    return re.findall(r"```python\n(.*?)```", "".join(cells_of(path)[-1]["source"]), re.S)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.setenv("SCALE", "0.02")
    fewer_drawn(monkeypatch, 500)
    sample = DiffusionTask.sample                           # two calls for each picture
    monkeypatch.setattr(DiffusionTask, "sample", lambda *given, steps=None, **how: sample(
        *given, steps=2 if steps is None else min(steps, 2), **how))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(    # Jupyter's, for films
        HTML=str, display=lambda page: None))
    monkeypatch.setattr(animation.HTMLWriter, "grab_frame", lambda *given, **how: None)     # slow
    monkeypatch.chdir(path.parent)                          # where Jupyter starts it
    names, programs = {}, ["".join(cell["source"]) for cell in code_of(path)]
    solutions = solutions_of(path)                          # the first runs; others take longer
    codes = [compile(program, f"{path.name}, code cell {number}", "exec")
             for number, program in enumerate([*programs, *solutions], 1)]
    with patch.dict(FAMILIES):                              # a lecture adds models to the table
        for code in codes[:len(programs) + bool(solutions)]:
            exec(code, names)
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_file(path):
    code, cells = code_of(path), cells_of(path)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert 12 <= len(cells) <= 45 and path.stat().st_size <= 500_000
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}  # no error
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "## Exercises" in "".join(cells[-1]["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_films_small_and_every_exercise_has_its_answer(path):
    for number, cell in enumerate(code_of(path), 1):
        assert len(cell["source"]) <= 10, f"code cell {number}: {len(cell['source'])} lines"
    films = ["".join(output["data"]["text/html"]) for cell in code_of(path)
             for output in cell["outputs"] if "text/html" in output.get("data", {})]
    assert films and max(map(len, films)) <= 150_000
    exercises = "".join(cells_of(path)[-1]["source"])
    assert len(re.findall(r"^\d\. ", exercises, re.M)) == exercises.count("<details>") == 3
    assert len(solutions_of(path)) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_cell_clones_one_address_or_says_where_to_put_it(path, tmp_path, monkeypatch):
    """As in Colab, where the page is alone."""
    first, commands = "".join(code_of(path)[0]["source"]), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match="REPOSITORY, in the first line"):
        exec(first, {})
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command)
                        or (tmp_path / "code").mkdir())
    exec(re.sub('^REPOSITORY = ""', 'REPOSITORY = "https://host/us"', first), {})
    assert [[*c[:2], *c[-2:]] for c in commands] == [["git", "clone", "https://host/us", "code"]]
    assert pathlib.Path.cwd() == tmp_path / "code" and sys.path[0] == str(tmp_path / "code")
