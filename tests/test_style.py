"""The house rules that a machine can check: who imports whom, which packages, docstrings, nothing at import time."""
import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# a file may import only from floors below its own
FLOORS = {"diffusion": 0, "data": 0, "text": 0, "vae": 1, "dit": 1, "unet": 1, "vqdiffusion": 2, "adapters": 2,
          "udit": 2, "weights": 2, "custom_diffusion": 2.5, "tasks": 3, "train": 4, "sample": 5, "evaluate": 5}
PACKAGES = {"torch", "numpy", "tqdm", "matplotlib", "pytest", "PIL", "fontTools"}
# every public function there names its paper
PAPER_FILES = ("diffusion", "dit", "vae", "unet", "text", "udit", "vqdiffusion", "adapters", "weights",
               "custom_diffusion")
NO_PAPER = ("diffusion.randn",)                            # except these: no paper fits
# the contract's methods, told once in the file's docstring
CONTRACT = ("forward", "draw", "loss", "prepare", "preview", "finish", "state", "error", "catch", "restore", "row")
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text()) for name in FLOORS}


def imports(tree, top_level_only=False):
    for node in (tree.body if top_level_only else ast.walk(tree)):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def public(tree):
    """Public functions, classes and methods, as (name, node)."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                methods = (m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_"))
                yield from ((f"{node.name}.{m.name}", m) for m in methods)


def test_every_file_of_the_house_is_listed():
    assert {p.stem for p in ROOT.glob("*.py")} == set(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_imports_go_down_and_stay_within_the_five_packages(name):
    for module in imports(TREES[name], top_level_only=True):
        if module in FLOORS:
            assert FLOORS[module] < FLOORS[name], f"{name} imports {module}"
    for module in imports(TREES[name]):
        assert module in FLOORS or module in PACKAGES or module in sys.stdlib_module_names, f"{name} imports {module}"


@pytest.mark.parametrize("name", FLOORS)
def test_nothing_happens_on_import(name):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in TREES[name].body:
        main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert isinstance(node, allowed) or main or docstring, f"{name}.py:{node.lineno} runs on import"


@pytest.mark.parametrize("name", FLOORS)
def test_docstrings(name):
    head = ast.get_docstring(TREES[name])
    assert head and "    python " in head, f"{name}.py: the docstring shows no command"
    for where, node in public(TREES[name]):
        words = ast.get_docstring(node)
        if "." in where and where.split(".")[-1] in CONTRACT:
            continue
        assert words, f"{name}.{where} has no docstring"
        if name in PAPER_FILES and f"{name}.{where}" not in NO_PAPER:
            assert "Source:" in words, f"{name}.{where} names no source"


@pytest.mark.parametrize("name", FLOORS)
def test_habits(name):
    text = (ROOT / f"{name}.py").read_text()
    for bad in (r"\.cuda\(\)", r"weights_only=False(?!\); torch\.save)", r"except[^\n]*:\s*pass",
                r"\bTODO\b|\bFIXME\b"):
        assert not re.search(bad, text), f"{name}.py contains {bad}"
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("path", sorted([*ROOT.glob("tests/*.py"), *ROOT.glob("studies/*.py")]), ids=lambda p: p.stem)
def test_lines_of_tests_and_studies_fit_too(path):
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120
