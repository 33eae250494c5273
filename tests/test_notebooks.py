"""Every notebook runs from top to bottom at small scale; README's commands have their flags."""
import importlib
import json
import pathlib
import re
import shlex

import matplotlib
import pytest

from conftest import fewer_drawn
from tasks import DiffusionTask

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
COMMANDS = [line for line in SHELL.splitlines() if re.search(r"\w\.py", line)]


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


@pytest.mark.parametrize("line", COMMANDS)
def test_readme_command_has_its_flags(line, capsys):
    for command in line.split("&&"):
        words = shlex.split(command, comments=True)
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if not scripts:
            continue
        script, rest = pathlib.Path(words[scripts[0]]), words[scripts[0] + 1:]
        assert (ROOT / script).is_file()
        sub = rest[:1] if script.stem in ("adapters", "custom_diffusion") else []
        model = rest[rest.index("--model"):][:2] if "--model" in rest else []
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(script.stem).main([*sub, *model, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        for flag in (word for word in rest if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), f"{script} has no {flag}"


def test_readme_is_short_and_its_links_and_pictures_exist():
    assert len(README.splitlines()) <= 170 and COMMANDS
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
    assert all(f"notebooks/{path.name}" in README for path in NOTEBOOKS)
    tested = next(line for line in README.splitlines() if "-m pytest" in line)
    assert tested.startswith("python3 -m venv")             # .ci/run runs this line
