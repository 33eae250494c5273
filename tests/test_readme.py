"""README.md: its commands run in their order from a clone, and have their flags; its links lead
somewhere; the pictures that it names are those of a thing."""
import importlib
import json
import pathlib
import re
import shlex

import pytest
import torch

import data
import tasks
import train
from conftest import ROOT, fewer_drawn
from studies.things import photographs
from tasks import DiffusionTask

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^(?:# |## )(.+?)\n(.*?)(?=^## |\Z)", README, re.M | re.S))
LINES = [(title, line) for title, text in SECTIONS.items()
         for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
# what cannot be shipped, by a word after its "#": weights of others, and more than one GPU
ABSENT = ("needs 8 GPUs", "needs the file")


def commands(line):
    """(module, arguments) of every command of ours in a line; pip, venv and pytest are not."""
    for command in line.split("&&"):
        words = shlex.split(command, comments=True)
        for i, word in enumerate(words):
            if word.endswith(".py"):
                yield word.removesuffix(".py"), words[i + 1:]


def runs(title, line):
    """Whether the test can run a line: the section of official weights is all files of others."""
    return title != "Official weights" and not any(what in line for what in ABSENT)


def test_there_are_commands_and_each_says_how_long_it_takes():
    assert len([line for title, line in LINES if runs(title, line)]) >= 17
    for title, line in LINES:
        if any(commands(line)) and title in ("Your pictures", "A thing of your own"):
            assert re.search(r"# \d+ (seconds|minutes?)", line), line
        if "big" in line:
            assert "# needs" in line, line          # and is run here with another folder


@pytest.mark.parametrize("line", [line for _, line in LINES if any(commands(line))])
def test_command_has_its_flags(line, capsys):
    for module, rest in commands(line):
        sub = rest[:1] if module in ("adapters", "custom_diffusion") else []
        model = rest[rest.index("--model"):][:2] if "--model" in rest else []
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(module).main([*sub, *model, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        for flag in (word for word in rest if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), f"{module} has no {flag}"


@pytest.fixture
def clone(tmp_path, monkeypatch, scenes, short_previews):
    """A folder like a clone, with `big` beside; all runs are of two steps, and samples of two."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "big").symlink_to(scenes)
    monkeypatch.chdir(tmp_path)
    fewer_drawn(monkeypatch, 300)
    whole, sample = train.train, DiffusionTask.sample

    def short(config, *given):
        config.steps, config.batch_size = min(config.steps, 2 + config.resume), 8
        return whole(config, *given)
    monkeypatch.setattr(train, "train", short)
    monkeypatch.setattr(tasks, "macs", lambda task: 0)
    monkeypatch.setattr(DiffusionTask, "sample", lambda *given, steps=None, **how: sample(
        *given, steps=2, **how))
    return tmp_path


@pytest.mark.slow
def test_every_command_runs_in_its_order(clone):
    short = {"--npz": "4", "--image-size": "32"}
    for line in [line for title, line in LINES if runs(title, line)]:
        for module, words in commands(line):
            words = [short.get(before, word) for before, word in zip(["", *words], words)]
            importlib.import_module(module).main(words)
            made = [clone / word for flag, word in zip(words, words[1:])
                    if flag in ("--out", "--export", "--save-latents")]
            assert all(path.exists() for path in made), line
    for name in ("samples.png", "samples-strip.png", "samples.gif"):
        assert (clone / "out/mine" / name).is_file()


def test_readme_is_short_and_its_links_and_pictures_exist():
    assert len(README.splitlines()) <= 170
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
    assert all(f"notebooks/{path.name}" in README for path in (ROOT / "notebooks").glob("*.ipynb"))
    tested = next(line for line in README.splitlines() if "-m pytest" in line)
    assert tested.startswith("python3 -m venv")             # .ci/run runs this line


def test_every_row_of_the_table_is_said_in_korean():
    rows = re.findall(r"^\| \[?`.+", SECTIONS["What is here"], re.M)
    assert len(rows) >= 16 and "in Korean" in SECTIONS["What is here"]
    assert all(re.search(r"<br>\*[^*]*[가-힣][^*]*\*", row) for row in rows)
    named = {name for row in rows for name in re.findall(r"`(\w+\.py)`", row.split(" | ")[0])}
    assert named == {path.name for path in ROOT.glob("*.py")}


def test_words_are_explained_before_they_are_used():
    words = SECTIONS["Words"]
    assert len(words.splitlines()) <= 20 and README.index("## Words") < README.index("## What is")
    for word in ("guidance", "ema", "euler", "eps", "legible", "ridge"):
        assert word in words.lower(), word


@pytest.mark.parametrize("folder,name", [("my_thing", "target circle"),
                                         ("my_other_thing", "eye square")])
def test_pictures_of_a_thing_are_those_of_the_studies(folder, name):
    pictures, captions = photographs(name, 6)
    got = data.load(f"folder:{ROOT / 'assets' / folder}")
    assert torch.equal(got.images, pictures)
    assert got.captions == [text.replace("<new1> ", "") for text in captions]
    assert all(json.loads(line)["file_name"] for line in
               pathlib.Path(ROOT, "assets", folder, "metadata.jsonl").read_text().splitlines())
