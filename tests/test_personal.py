"""Adapters and concepts through the one loop and the sampler, on the shipped base, end to end."""
import pathlib
import shutil
import types

import pytest
import torch
from PIL import Image

import adapters
import custom_diffusion as cd
import data
import sample
import train
from checkpoint import load_checkpoint, save_checkpoint
from conftest import fewer_drawn
from models import base_task
from tasks import DiffusionTask

BASE = str(pathlib.Path(__file__).parent.parent / "assets" / "unet-scenes.pt")
SHORT = ["--base", BASE, "--batch-size", "4", "--save-every", "2", "--log-every", "1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A preview samples for seconds, and 48,000 scenes are drawn for one; tested elsewhere."""
    monkeypatch.setattr(DiffusionTask, "preview", lambda *given: None)
    fewer_drawn(monkeypatch, 3000)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """folder:PATH of two pictures without captions, with captions, and with <new1> in one."""
    folder = tmp_path_factory.mktemp("things")
    scene = data.load("scenes", count=40)
    texts = {"plain": (), "captioned": ("a red circle", "a circle on gray"),
             "marked": ("a red circle", "a <new1> circle on gray")}
    for name, said in texts.items():
        (folder / name).mkdir()
        for k in range(2):
            picture = Image.fromarray(scene.images[k].permute(1, 2, 0).numpy())
            picture.save(folder / name / f"{k}.png")
        lines = [f'{{"file_name": "{k}.png", "text": "{text}"}}\n' for k, text in enumerate(said)]
        if lines:
            (folder / name / "metadata.jsonl").write_text("".join(lines))
    return {name: f"folder:{folder / name}" for name in texts}


def flags_of(kind, things):
    if kind == "adapter":
        return ["learn", "--adapter", "ca_out-ffn_in", "--rank", "2", "--data", things["captioned"]]
    plain = things["plain"]
    return ["learn", "--concept", plain, plain, "--category", "circle", "square"]


def concept_task(things, *flags, seed=0):
    """(task, config, dataset) as `learn` makes them."""
    options, config = cd.read_flags([*flags_of("concept", things)[1:], *SHORT, "--seed", str(seed),
                                     "--device", "cpu", *flags])
    dataset = train.load_data(config)
    return cd.ConceptTask(base_task(BASE, ""), dataset, options, config), config, dataset


@pytest.mark.parametrize("kind", ["adapter", "concept"])
def test_a_resumed_run_is_the_same_and_the_base_stays_apart(kind, things, tmp_path, monkeypatch):
    main = (adapters if kind == "adapter" else cd).main
    flags = [*flags_of(kind, things), *SHORT, "--steps", "4", "--out"]
    main([*flags, str(tmp_path / "whole")])
    save = train.save

    def save_and_die(*given):                           # killed after the first save, at step 2
        save(*given)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "save", save_and_die)
    with pytest.raises(SystemExit):
        main([*flags, str(tmp_path / "parts")])
    monkeypatch.setattr(train, "save", save)
    main(["learn", "--out", str(tmp_path / "parts"), "--resume"])
    whole, parts = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "parts"))
    assert parts["step"] == 4 and whole["model"].keys() == parts["model"].keys()
    assert all(torch.equal(w, parts["model"][name]) for name, w in whole["model"].items())
    named = "adapter" if kind == "adapter" else r"attn2.to_"
    assert all(named in name or ".rows." in name for name in whole["model"])    # and no base
    for name in (f"{kind}.pt", "ckpt.pt"):
        assert (tmp_path / "whole" / name).stat().st_size < 1.5e6


def test_an_adapter_samples_on_its_base_and_scale_0_is_the_base(things, tmp_path, capsys):
    adapters.main([*flags_of("adapter", things), *SHORT, "--steps", "6", "--lr", "0.02", "--out",
                   str(tmp_path / "run")])
    adapter = str(tmp_path / "run" / "adapter.pt")

    def grid(*flags):
        sample.main([*flags, "--prompt", "a large red circle", "--steps", "4", "--out",
                     str(tmp_path / "x.png")])
        return (tmp_path / "x.png").read_bytes()
    base, on, off = (grid(*flags) for flags in (
        ["--ckpt", BASE], ["--ckpt", adapter, "--base", BASE],
        ["--ckpt", adapter, "--base", BASE, "--scale", "0"]))
    assert base == off != on
    for flags, words in ((["--ckpt", adapter], "--base"),
                         (["--ckpt", str(tmp_path / "run" / "ckpt.pt")], "adapter.pt")):
        with pytest.raises(SystemExit) as stop:
            sample.main(flags)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_concept_brings_its_words_and_leaves_other_prompts_alone(things, tmp_path, capsys):
    cd.main([*flags_of("concept", things), *SHORT, "--steps", "3", "--out", str(tmp_path / "run")])
    concept = str(tmp_path / "run" / "concept.pt")
    task, model = sample.load(BASE)
    before = model.text(task.tokenizer(["a red star"]))
    W, rows, concepts = cd.load_concept(concept, model.denoiser.state_dict())
    assert concepts == ["<new1> circle", "<new2> square"]
    cd.apply_concept(model, task.tokenizer, W, rows)
    assert torch.equal(model.text(task.tokenizer(["a red star"])), before)
    one, two = model.text(task.tokenizer(["a <new1> circle", "a <new2> circle"]))
    assert not torch.equal(one, two)
    with pytest.raises(ValueError, match="another base"):
        cd.load_concept(concept, model.denoiser.state_dict())
    sample.main(["--ckpt", BASE, "--concept", concept, "--prompt", "a <new2> square", "--steps",
                 "2", "--out", str(tmp_path / "x.png")])
    assert "<new2> square" in capsys.readouterr().out


def test_the_new_word_is_put_before_the_category_and_learns(things):
    task, config, dataset = concept_task(things, "--concept", things["captioned"], "--category",
                                         "circle", "--prior", "none", "--steps", "2")
    assert task.pictures[2][1] == ["a red <new3> circle", "a <new3> circle on gray"]
    named = task.photographs(things["marked"], "circle", "<new1>")[1]
    assert named == ["a red <new1> circle", "a <new1> circle on gray"]  # where it stands already
    with pytest.raises(ValueError, match="a red circle.*no square"):
        task.photographs(things["captioned"], "square", "<new1>")
    before = [row.detach().clone() for row in task.model.text.rows]
    step = train.make_step(config, dataset, task)
    for s in range(2):                                              # all 8 pictures
        step(s)
    for row, old in zip(task.model.text.rows, before, strict=True):
        assert (row - old).abs().max() > 1e-3                       # the learning rate is 1e-2


def test_a_word_begins_as_one_that_is_rare_and_pictures_are_not_mirrored(things):
    """The base's own captions use it least. Captions may say left and right."""
    task = concept_task(things, "--prior", "none", "--steps", "1")[0]
    used = " ".join(load_checkpoint(BASE)["info"]["examples"]).split()
    counts = sorted(used.count(word) for word in task.tokenizer.words if word.isalpha())
    assert [used.count(rare) for rare in task.words.values()] == counts[:2] and counts[-1] > 9
    assert not task.prepare(None, "cpu").flip


def test_half_the_prior_says_the_bare_category_and_seeds_differ_in_noise(things):
    tasks = [concept_task(things, "--steps", "2", seed=seed) for seed in (0, 1)]
    for task, *_ in tasks:
        pictures, captions = task.prior
        words = [{"circle", "square"} & set(text.split()) for text in captions]
        assert all(words) and set().union(*words) == {"circle", "square"}
        bare = [text in task.bare for text in captions]
        assert all(bare[::2]) and sum(bare[1::2]) < 0.1 * len(bare) and len(pictures) == len(bare)
    one, two = (train.make_step(config, dataset, task)(0)[0]["loss"]
                for task, config, dataset in tasks)
    assert one != two


def test_only_the_valid_cells_of_a_shrunk_picture_are_learned_from(things):
    task = concept_task(things, "--augment", "--steps", "30")[0]
    held = task.prepare(None, "cpu")
    shrunk = int((task.mask.mean((1, 2, 3)) < 0.5).nonzero()[0])
    index = torch.tensor([shrunk])
    draws = task.draw(1, torch.Generator().manual_seed(0), "cpu")
    draws.pop("flip")
    loss = lambda x: task.loss(lambda xt, t, y: 0 * xt, x, held.labels[index], index, **draws)[0]
    x = held.images[index]
    outside = x + (1 - task.mask[index])                # other numbers in cells that do not count
    assert torch.equal(loss(x), loss(outside)) and loss(x) != loss(x + 1)


def test_a_run_prepares_as_many_pictures_as_its_steps_read(things):
    """3 steps of 5 read 15: 8 targets with as many of the prior, or 15 targets alone."""
    count = lambda *flags: len(concept_task(things, "--steps", "3", "--batch-size", "5", *flags)[0]
                               .prepare(None, "cpu"))
    assert (count(), count("--prior", "none")) == (16, 15)


def test_a_prior_without_captions_is_known_by_its_classes(things, tmp_path):
    for name, gray in (("circle", 90), ("square", 160), ("flat", 30)):
        folder = tmp_path / ("flat" if name == "flat" else f"classes/{name}")
        folder.mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (32, 32), (gray, gray, gray)).save(folder / f"{k}.png")
    task = concept_task(things, "--prior", f"folder:{tmp_path / 'classes'}")[0]
    shown = [(int(x.mean() * 127.5 + 128), text.split()[1]) for x, text in zip(*task.prior)]
    assert set(shown) == {(90, "circle"), (160, "square")} and len(shown) == 6
    with pytest.raises(ValueError, match="nothing in .* names square"):
        concept_task(things, "--prior", f"folder:{tmp_path / 'flat'}")
    for k, text in enumerate(("A red Circle.", "a ring on black, a SQUARE", "a star")):
        (tmp_path / "flat" / f"{k}.txt").write_text(text)       # known as the tokenizer knows them
    assert len(concept_task(things, "--prior", f"folder:{tmp_path / 'flat'}")[0].prior[1]) == 2


def test_the_prior_can_be_sampled_from_the_base(things, monkeypatch):
    asked = []
    monkeypatch.setattr(DiffusionTask, "sample", lambda self, model, y, **options: asked.append(y)
                        or torch.zeros(len(y), *self.shape))
    task = concept_task(things, "--prior", "generated")[0]
    assert torch.equal(torch.cat(asked), task.tokenizer(task.prior[1]))
    assert len(task.prior[0]) == 200


@pytest.mark.parametrize("flags,words", [
    (["--concept", "folder:x"], "one --category"),
    ([], "one --category"),
    (["--data", "scenes"], "--prior"),
    (["--concept", "CAPTIONED", "--category", "circel"], "circle"),
    (["--concept", "folder:/nowhere", "--category", "circle"], "nowhere"),
    (["--base", "/nowhere.pt", "--concept", "folder:x", "--category", "circle"], "nowhere")])
def test_wrong_input_gets_one_line(flags, words, things, tmp_path, capsys):
    flags = [things["captioned"] if flag == "CAPTIONED" else flag for flag in flags]
    with pytest.raises(SystemExit) as stop:
        cd.main(["learn", *flags, "--steps", "2", "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and words in err and err.startswith("error:")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("flags, words", [
    (["--model", "unet-small"], "--model is not read"), (["--init", BASE], "--init is not read"),
    (["--recipe", "fast"], "--recipe is not read"), (["--flip", "on"], "--flip is not read"),
    (["--image-size", "64"], "--image-size is not read"),
    (["--save-latents", "x"], "--save-latents is not read"),
    (["--muon-lr", "0.1"], "--muon-lr is not read"),
    (["--part", "none", "--lr", "1"], "--lr is not read here (--part none)"),
    (["--prior", "latents:x"], "latents:x holds no pictures"),
    (["--bpe", "list.gz"], "--bpe is for Stable Diffusion"), (["--rank", "2"], "unknown argument"),
    (["--base", BASE.replace("unet", "vq")], "no cross-attention"),
    (["--prior", "nothing"], "unknown data set"), (["--part", "half"], "--part"),
    (["--concept", "folder:UNKNOWN", "--category", "circle"], "unknown word 'zebra'"),
    (["--concept", "folder:LONG", "--category", "circle"], "words, expected at most")])
def test_what_nobody_reads_or_cannot_be_is_refused_at_the_start(flags, words, things, tmp_path,
                                                                capsys, monkeypatch):
    for name, text in (("UNKNOWN", "a zebra circle"), ("LONG", "a red circle on " + "gray " * 40)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / name / "a.png")
        (tmp_path / name / "a.txt").write_text(text)
    flags = [flag.replace("folder:", f"folder:{tmp_path}/") for flag in flags]
    monkeypatch.setattr(DiffusionTask, "sample", lambda *given, **more: pytest.fail("it samples"))
    prior = "generated" if "vq-" in "".join(flags) else "none"
    with pytest.raises(SystemExit) as stop:
        cd.main([*flags_of("concept", things), *SHORT, "--prior", prior, *flags, "--steps", "2",
                 "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and words in err and err.startswith("error: ")
    assert len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_concept_run_says_to_which_base_and_pictures_it_belongs(things):
    """So that it goes on with those alone."""
    said = [concept_task(things, "--steps", "2", *flags)[0].state() for flags in (
        [], [], ["--concept", things["captioned"], "--category", "circle"])]
    assert said[0]["base"] == said[1]["base"] == said[2]["base"]
    assert said[0]["data"] == said[1]["data"] != said[2]["data"]
    task = base_task(BASE)
    task.model.text.text_model.final_layer_norm.bias.data[0] += 1
    options, config = cd.read_flags([*flags_of("concept", things)[1:], *SHORT, "--steps", "2"])
    other = cd.ConceptTask(task, train.load_data(config), options, config).state()
    assert other["base"] != said[0]["base"] and other["data"] == said[0]["data"]


@pytest.mark.parametrize("kind", ["adapter", "concept"])
def test_a_run_that_ended_before_its_first_save_starts_again(kind, things, tmp_path, monkeypatch):
    main, make_step = (adapters if kind == "adapter" else cd).main, train.make_step
    flags = [*flags_of(kind, things), *SHORT, "--steps", "2", "--out", str(tmp_path / "run")]

    def interrupted(*given):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "make_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 130 and not (tmp_path / "run" / "ckpt.pt").exists()
    monkeypatch.setattr(train, "make_step", make_step)
    main(flags)
    assert load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 2


@pytest.mark.parametrize("kind", ["adapter", "concept"])
def test_rates_of_a_resumed_run_are_those_of_the_flags(kind, things, tmp_path):
    main, out = (adapters if kind == "adapter" else cd).main, str(tmp_path / "run")
    main([*flags_of(kind, things), *SHORT, "--steps", "2", "--out", out])
    before = load_checkpoint(f"{out}/ckpt.pt")
    main(["learn", "--out", out, "--resume", "--steps", "3", "--lr", "1e-9", "--weight-decay", "0",
          *["--word-lr", "0"] * (kind == "concept")])
    after = load_checkpoint(f"{out}/ckpt.pt")
    assert after["step"] == 3 and after["config"]["lr"] == 1e-9
    for name, w in before["model"].items():             # it was 5e-3 and 3e-3 until then
        assert (after["model"][name] - w).abs().max() < 1e-7, name


@pytest.mark.parametrize("kind", ["adapter", "concept"])
def test_a_run_goes_on_with_its_own_base_and_pictures_alone(kind, things, tmp_path, capsys):
    main, out = (adapters if kind == "adapter" else cd).main, str(tmp_path / "run")
    folder = tmp_path / "mine"
    shutil.copytree(things["captioned"].removeprefix("folder:"), folder)
    what = (["--data", f"folder:{folder}", "--rank", "2"] if kind == "adapter" else
            ["--concept", f"folder:{folder}", "--category", "circle", "--prior", "none"])
    main(["learn", *what, *SHORT, "--steps", "2", "--out", out])
    state = load_checkpoint(BASE)
    state["ema"]["denoiser.out.2.bias"] += 0.5
    save_checkpoint(tmp_path / "other.pt", state)
    other = ([["--data", things["captioned"]], ["--rank", "4"], ["--adapter", "ca_c-ca_c"]]
             if kind == "adapter" else
             [["--concept", things["captioned"]], ["--category", "red"], ["--part", "all"],
              ["--prior", "generated"], ["--augment"]])
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()

    def refused(flags):
        with pytest.raises(SystemExit) as stop:
            main(["learn", "--out", out, "--resume", "--steps", "3", *flags])
        err = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and err[-1].startswith("error: ") and "run/ckpt.pt" in err[-1]
        assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before

    for flags in (["--base", str(tmp_path / "other.pt")], *other):
        refused(flags)
    (folder / "0.png").write_bytes((folder / "1.png").read_bytes())
    refused([])


@pytest.mark.parametrize("flag", [["--skip-bad"], ["--data-dir", "elsewhere"]])
def test_what_only_other_data_need_is_refused(flag, things, tmp_path, capsys):
    """The drawn data of the base have no files; a folder has pictures that may be unreadable."""
    for main, more in ((adapters.main, []), (cd.main, ["--concept", "npz:x", "--category", "dog"])):
        with pytest.raises(SystemExit) as stop:
            main(["learn", *SHORT, *more, *flag, "--out", str(tmp_path / "run")])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and f"{flag[0]} is not read here" in err
    assert not (tmp_path / "run").exists()


def test_every_thing_has_a_prior_in_data_sorted_by_class(things, monkeypatch):
    captions = ["a circle"] * 2500 + ["a square"] * 2500
    sorted_by_class = data.Dataset("sorted", torch.zeros(5000, 3, 32, 32).byte(),
                                   torch.zeros(5000).long(), captions, [], False)
    task = concept_task(things, "--steps", "2")[0]
    task.options.category = ("circle", "square")
    said = task.select(sorted_by_class)[1]
    circles = said.count("a circle")
    assert len(said) <= 2000 and abs(2 * circles - len(said)) <= 1 and circles > 800


def test_learning_and_merging_ask_a_style_by_the_same_prompt():
    """As the official code does; and a second thing replaces the word of a first one."""
    open_tokenizer = types.SimpleNamespace(open=True, ids={})
    for what in ("<new1> art", "<new1> dog"):
        seen = []
        monkey = lambda text, tokenizer, prompts, lead: seen.extend(prompts) or [torch.zeros(1, 2)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cd, "caption_rows", monkey)
            cd.prompt_rows(None, open_tokenizer, what)
        assert seen == [what, cd.lead(what) + what]
    assert cd.lead("<new1> art") == "painting in the style of "


def test_a_word_of_an_earlier_run_is_replaced(things):
    task = concept_task(things, "--concept", things["marked"], things["plain"], "--category",
                        "circle", "square", "--steps", "2")[0]
    assert task.photographs(things["marked"], "circle", "<new2>")[1] == [
        "a red <new2> circle", "a <new2> circle on gray"]


@pytest.mark.parametrize("main, argv, lines", [
    (train.main, ["--model", "vq-tiny"], ("optimizer steps (default: 3000)",)),
    (cd.main, ["learn"], ("learning rate of AdamW (default: 0.01)", "steps (default: 500)")),
    (adapters.main, ["learn"], ("learning rate of AdamW (default: 0.005)",))])
def test_help_shows_the_defaults_of_this_model_and_base(main, argv, lines, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main([*argv, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(line in said for line in lines), said
