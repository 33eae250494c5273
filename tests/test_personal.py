"""Adapters and concepts through the one loop and the sampler, on the shipped base, end to end."""
import pathlib

import pytest
import torch
from PIL import Image

import data
import sample
import train
from weights import load_checkpoint

BASE = str(pathlib.Path(__file__).parent.parent / "assets" / "unet-scenes.pt")
SHORT = ["--batch-size", "4", "--save-every", "2", "--log-every", "1"]


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """folder:PATH of two pictures of a circle, with captions, and of two without."""
    folder = tmp_path_factory.mktemp("things")
    scene = data.load("scenes", count=40)
    for name in ("plain", "captioned"):
        (folder / name).mkdir()
        for k in range(2):
            Image.fromarray(scene.images[k].permute(1, 2, 0).numpy()).save(folder / name / f"{k}.png")
    lines = [f'{{"file_name": "{k}.png", "text": "a red circle"}}\n' for k in range(2)]
    (folder / "captioned" / "metadata.jsonl").write_text("".join(lines))
    return {name: f"folder:{folder / name}" for name in ("plain", "captioned")}


def flags_of(kind, things):
    if kind == "adapter":
        return ["--init", BASE, "--adapter", "ca_out-ffn_in", "--rank", "2", "--data", things["captioned"]]
    return ["--init", BASE, "--concept", things["plain"], "--category", "circle", "--concept", things["plain"],
            "--category", "square"]


@pytest.mark.parametrize("kind", ["adapter", "concept"])
def test_stopped_and_resumed_is_the_same_run_and_the_base_stays_apart(kind, things, tmp_path, monkeypatch):
    flags = [*flags_of(kind, things), *SHORT, "--steps", "4", "--out"]
    train.main([*flags, str(tmp_path / "whole")])
    save, calls = train.save_checkpoint, []

    def save_and_die(path, state):                      # killed after the first save, at step 2
        save(path, state)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    with pytest.raises(SystemExit):
        train.main([*flags, str(tmp_path / "parts")])
    monkeypatch.setattr(train, "save_checkpoint", lambda path, state: (save(path, state), calls.append(path)))
    train.main(["--out", str(tmp_path / "parts"), "--resume"])
    whole, parts = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "parts"))
    assert parts["step"] == 4 and whole["model"].keys() == parts["model"].keys()
    assert all(torch.equal(w, parts["model"][name]) for name, w in whole["model"].items())
    named = "adapter" if kind == "adapter" else r"attn2.to_"
    assert all(named in name or ".rows." in name for name in whole["model"])            # and not the base's own
    size = {name: (tmp_path / "whole" / name).stat().st_size for name in (f"{kind}.pt", "ckpt.pt")}
    assert all(s < 1.5e6 for s in size.values()), size


def test_an_adapter_draws_on_its_base_and_scale_0_is_the_base(things, tmp_path, capsys):
    train.main([*flags_of("adapter", things), *SHORT, "--steps", "6", "--lr", "0.02", "--out", str(tmp_path / "run")])
    adapter = str(tmp_path / "run" / "adapter.pt")

    def draw(*flags):
        sample.main([*flags, "--prompt", "a large red circle", "--steps", "4", "--out", str(tmp_path / "x.png")])
        return (tmp_path / "x.png").read_bytes()
    base, on, off = (draw(*f) for f in (["--ckpt", BASE], ["--ckpt", adapter, "--base", BASE],
                                        ["--ckpt", adapter, "--base", BASE, "--scale", "0"]))
    assert base == off != on
    for flags, words in ((["--ckpt", adapter], "--base"), (["--ckpt", str(tmp_path / "run" / "ckpt.pt")], "--resume")):
        with pytest.raises(SystemExit) as stop:
            sample.main(flags)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_concept_brings_its_words_and_leaves_other_prompts_nearly_alone(things, tmp_path):
    train.main([*flags_of("concept", things), *SHORT, "--steps", "3", "--out", str(tmp_path / "run")])
    concept = str(tmp_path / "run" / "concept.pt")
    task, model = sample.load(BASE)
    before = model.text(task.tokenizer(["a red star"]))
    with pytest.raises(ValueError, match="new1"):
        task.tokenizer(["a <new1> circle"])
    sample.add_concept(concept, task, model, "cpu")
    assert torch.equal(model.text(task.tokenizer(["a red star"])), before)
    two = model.text(task.tokenizer(["a <new1> circle", "a <new2> circle"]))
    assert not torch.equal(two[0], two[1])
    with pytest.raises(ValueError, match="learned on base"):
        sample.add_concept(concept, task, model, "cpu")


def test_a_prior_without_captions_is_known_by_its_classes(things, tmp_path, monkeypatch, capsys):
    import tasks
    mix, seen = tasks.mix, []
    monkeypatch.setattr(tasks, "mix", lambda *given: seen.append(given) or mix(*given))
    for name, gray in (("circle", 90), ("square", 160), ("flat", 30)):
        folder = tmp_path / ("flat" if name == "flat" else f"classes/{name}")
        folder.mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (32, 32), (gray, gray, gray)).save(folder / f"{k}.png")
    flags = ["--init", BASE, "--concept", things["plain"], "--category", "circle", *SHORT, "--steps", "1", "--prior"]
    for name, gray in (("classes", 90), ("flat", 30)):
        train.main([*flags, f"folder:{tmp_path / name}", "--out", str(tmp_path / f"out-{name}")])
        drawn, captions = seen[-1][1]
        assert captions == ["a circle"] * 3 and data.to_uint8(drawn).unique().tolist() == [gray]
    with pytest.raises(SystemExit):
        train.main([*flags, f"folder:{tmp_path / 'flat'}", "--concept", things["plain"], "--category", "square",
                    "--out", str(tmp_path / "two")])
    assert "with two categories the prior's pictures need them" in capsys.readouterr().err


def test_the_prior_can_be_drawn_by_the_base(things, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("tasks.DiffusionTask.sample", lambda self, model, y, **options: drawn.append(len(y)) or
                        torch.zeros(len(y), *self.shape))
    train.main(["--init", BASE, "--concept", things["plain"], "--category", "star", "--prior", "generated", *SHORT,
                "--steps", "2", "--out", str(tmp_path / "run")])
    assert sum(drawn) >= 200


@pytest.mark.parametrize("flags,words", [
    (["--adapter", "ca_out-ffn_in"], "need --init"),
    (["--init", BASE, "--adapter", "ffn_in-sa_in"], "sa_in"),
    (["--init", BASE, "--concept", "folder:x"], "one category"),
    (["--init", BASE, "--concept", "CAPTIONED", "--category", "circel"], "circle"),
    (["--init", BASE, "--concept", "folder:/nowhere", "--category", "circle"], "nowhere"),
    (["--init", "/nowhere.pt", "--concept", "folder:x", "--category", "circle"], "nowhere")])
def test_wrong_input_gets_one_line(flags, words, things, tmp_path, capsys):
    flags = [things["captioned"] if f == "CAPTIONED" else f for f in flags]
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--steps", "2", "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and words in err.splitlines()[-1] and err.splitlines()[-1].startswith("error:")
