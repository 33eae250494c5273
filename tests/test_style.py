"""The house rules that a machine can check: rooms, sizes, docstrings, plain words."""
import ast
import re
import sys

import pytest

from conftest import ROOT

# a file imports only from floors below its own
FLOORS = {"cli": 0, "checkpoint": 0, "worlds": 0, "folders": 0, "diffusion": 0, "text": 0,
          "optim": 0, "data": 0.5, "dit": 1, "unet": 1, "vae": 1, "udit": 2, "vqdiffusion": 2.5,
          "pretrained": 3, "tasks": 4, "models": 4.5, "train": 5, "custom_diffusion": 6,
          "adapters": 6.5, "sample": 7, "evaluate": 8, "bench": 8}
PACKAGES = {"torch", "numpy", "tqdm", "matplotlib", "pytest", "PIL"}
TEXTS = {name: (ROOT / f"{name}.py").read_text() for name in FLOORS}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
# the methods of tasks, stages and processes, explained once: in tasks.py, vae.py, diffusion.py
CONTRACT = ("forward", "draw", "loss", "check_batch", "prepare", "preview", "finish", "state",
            "inputs", "step", "encode", "decode", "objective", "standardise", "standardised",
            "shrink_mask", "latent_shape")

LONG = {"train.make_step": "the step, and all that it reads",
        "train.train": "the loop, which is read from the top to the bottom"}
WIDE = {"dit.DiT.__init__", "udit.Attention.__init__", "udit.UDiT.__init__",
        "unet.UNet.__init__", "vae.VQVAE.__init__", "vqdiffusion.VQTransformer.__init__"}
# whose class a file may ask for: to find blocks inside a network, never to choose a way
ASKED = {"unet": {"Stage", "ResBlock", "SpatialTransformer"}, "udit": {"RepMlp"},
         "adapters": {"Tapped", "Adapter", "TransformerBlock"}}
# of plain-words.md: figures of speech, and words that mean nothing to a second-language reader
BANNED = ("none of them at rest", "what .* only compares with", "before its cause", "do not know t",
          "says where to work", "learns to doubt", "your wish", "fails in its own way",
           "has to pull",
          "words are the words", "nobody trains", "given ones replace", "Source: none",
          r"pretends? that", "the whole trick", "the heart of", "under the hood", r"\bmagic\b",
          "out of the box", r"\bof course\b", r"\bsimply\b", r"\bobviously\b", "needless to say")


def functions(tree):
    """All functions and methods, also inside others, as ("Class.method", node)."""
    def walk(node, path):
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            below = [*path, child.name] if named else path
            if isinstance(child, ast.FunctionDef):
                yield ".".join(below), child
            yield from walk(child, below)
    return walk(tree, [])


def lines(node):
    return node.end_lineno - node.lineno + 1


def imports(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


# --------------------------------------------------------------------------------------------------
# rooms

def test_every_file_of_the_house_is_listed():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_imports_go_down_and_stay_within_the_packages(name):
    for module in imports(ast.walk(TREES[name])):
        if module in FLOORS:
            assert FLOORS[module] < FLOORS[name], f"{name} imports {module}"
        else:
            ours = (name, module) == ("bench", "studies")       # what it measures with is there
            assert ours or module in PACKAGES | sys.stdlib_module_names, f"{name}: {module}"


@pytest.mark.parametrize("name", FLOORS)
def test_nothing_happens_on_import(name):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in TREES[name].body:
        main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert isinstance(node, allowed) or main or docstring, f"{name}.py:{node.lineno}"


def test_no_file_asks_which_model_it_has():
    ours = {node.name for tree in TREES.values() for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)}
    for name, tree in TREES.items():
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "isinstance":
                asked = {node.id for node in ast.walk(call.args[1]) if isinstance(node, ast.Name)}
                wrong = (asked & ours) - ASKED.get(name, set())
                assert not wrong, f"{name}.py:{call.lineno} asks for {wrong}"
        if name != "models":
            assert not re.search(r"\.(model|family|kind) [!=]= \"", TEXTS[name]), name


# --------------------------------------------------------------------------------------------------
# sizes

def test_the_house_stays_small():
    total = sum(len(text.splitlines()) for text in TEXTS.values())
    assert total <= 7200, f"{total:,} lines"
    assert len(TEXTS["train"].splitlines()) <= 360
    loop = {name: lines(node) for name, node in functions(TREES["train"])}
    assert loop["make_step"] + loop["train"] <= 130


@pytest.mark.parametrize("name", FLOORS)
def test_functions_are_short(name):
    for where, node in functions(TREES[name]):
        limit = 25 if node.name == "forward" else 40
        if f"{name}.{where}" not in LONG:
            assert lines(node) <= limit, f"{name}.{where}: {lines(node)} lines"
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        given = {arg.arg for arg in args}
        if f"{name}.{where}" not in WIDE:
            assert len(given - {"self", "cls"}) <= 8, f"{name}.{where}: {len(given)} parameters"


@pytest.mark.parametrize("folder", [".", "tests", "studies"])
def test_lines_have_at_most_100_columns(folder):
    wide = [f"{path.name}:{number}" for path in sorted((ROOT / folder).glob("*.py"))
            for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
            if len(line) > 100]
    assert not wide, f"{len(wide)} lines, such as {wide[::max(1, len(wide) // 10)]}"


# --------------------------------------------------------------------------------------------------
# words

@pytest.mark.parametrize("name", FLOORS)
def test_docstrings(name):
    head = ast.get_docstring(TREES[name])
    assert head and len(head.splitlines()) <= 30, f"{name}.py: {len(head.splitlines())} lines"
    assert re.search(r"python (-m pytest )?\w+(/\w+)?\.py", head), f"{name}.py shows no command"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"
    for where, node in functions(TREES[name]):
        public = not re.search(r"(^|\.)_", where) and node.name not in CONTRACT
        nested = where.count(".") > where[0].isupper()      # a function inside a function
        if public and not nested and lines(node) > 3:       # what is shorter explains itself
            assert ast.get_docstring(node), f"{name}.{where} has no docstring"


@pytest.mark.parametrize("name", FLOORS)
def test_sources_name_a_place_in_a_paper(name):
    """Not the paper alone: a section, an equation, a figure, a table, or a named piece of code."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for source in re.findall(r"Source: ([^\n]+)", ast.get_docstring(node) or ""):
                bare = re.fullmatch(r"[A-Z]\w+ (et al\.|& \w+) \d+\.?", source)
                assert not bare, f"{name}.{node.name}: {source}"


@pytest.mark.parametrize("name", FLOORS)
def test_habits_and_plain_words(name):
    for bad in (r"\.cuda\(\)", r"weights_only=False(?!\); torch\.save)", r"except[^\n]*:\s*pass",
                r"\bTODO\b|\bFIXME\b", *BANNED):
        found = re.search(bad, TEXTS[name])
        assert not found, f"{name}.py says {found[0]!r}"
