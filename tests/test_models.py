"""models.py: names are found or explained, what clashes is refused, bases are known again."""
import dataclasses

import pytest
import torch

import data
import models
import tasks
from checkpoint import save_checkpoint
from diffusion import GaussianDiffusion, RectifiedFlow
from models import (FAMILIES, FLAGS, PRESETS, base_flags, base_task, build_task, describe,
                    find_model, make_task, process_of, readers_of,
                    resolve_first_stage, settings_class)
from tasks import fingerprint
from train import Config
from vae import VQVAE, Pixels, TinyAutoencoder

PICTURES = torch.arange(4 * 3 * 8 * 8).view(4, 3, 8, 8).remainder(251).to(torch.uint8)
TOY = data.Dataset("toy", PICTURES, torch.tensor([0, 1, 1, 0]), None, ["cat", "dog"], True)
SPOKEN = dataclasses.replace(TOY, flip=False,
                             captions=["a red cat", "a blue dog", "a dog", "a cat"])


# --------------------------------------------------------------------------------------------------
# names and flags

def test_a_name_is_found_in_one_family_or_the_nearest_is_named():
    names = [name for row in FAMILIES.values() for name in row.sizes]
    assert len(set(names)) == len(names)                                # no name means two models
    for family, row in FAMILIES.items():
        for name, sizes in row.sizes.items():
            assert find_model(name) == (family, sizes)
    assert find_model("DiT-96x5/4") == (
        "dit", dict(hidden_size=96, depth=5, num_heads=3, patch_size=4))
    find_model("udit-tiny")[1]["num_heads"] = 77                        # a copy: the table stays
    assert find_model("udit-tiny")[1]["num_heads"] != 77
    for wrong, near in (("DiT-S/3", "DiT-S"), ("unet-tinny", "unet-tiny"), ("u-dit-s", "U-DiT-S"),
                        ("DiT-33x2/2", "DiT-"), ("DiT-96x0/1", "DiT-"), ("dit", "DiT-"),
                        ("zzz", "DiT-WxD/p")):
        with pytest.raises(ValueError, match=f"unknown model '{wrong}'.*{near}"):
            find_model(wrong)


def test_presets_name_models_and_flags_that_exist():
    loop = {field.name for field in dataclasses.fields(Config)}
    for name, preset in PRESETS.items():
        flags = FAMILIES[find_model(name)[0]].flags
        assert preset.keys() <= loop | set(flags), name
        settings_class(find_model(name)[0])(**{k: v for k, v in preset.items() if k in flags})
    assert models.PAPER.keys() <= loop | FLAGS.keys()


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_has_a_reader_and_says_what_it_does(name):
    readers = [family for family, row in FAMILIES.items() if name in row.flags]
    kind, field = FLAGS[name]
    said = readers_of("--" + name.replace("_", "-"))
    assert readers and all(family in said for family in readers)
    assert len(field.metadata["help"]) > 10
    assert said == readers_of("--no-" + name.replace("_", "-"))
    assert field.default is None or isinstance(field.default, kind)
    assert readers_of("--nobody-reads-this") is None


def test_settings_are_the_flags_of_the_family():
    for family, row in FAMILIES.items():
        settings = settings_class(family)()
        assert tuple(vars(settings)) == row.flags
        assert all(getattr(settings, name) == FLAGS[name][1].default for name in row.flags)


def test_a_flag_that_the_schedule_ignores_is_refused():
    dit = settings_class("dit")
    flow = process_of(dit(flow_shift=2.5))
    assert isinstance(flow, RectifiedFlow) and flow.shift == 2.5
    assert process_of(dit()).shift == 1.0 and not process_of(dit()).logit_normal
    assert process_of(dit(logit_normal=True)).logit_normal
    assert process_of(dit(schedule="linear", min_snr=5.0)).min_snr == 5.0
    process = process_of(dit(schedule="cosine", prediction="v", learn_sigma=True))
    assert isinstance(process, GaussianDiffusion)
    assert process.prediction == "v" and process.learn_sigma
    assert torch.equal(process.betas, GaussianDiffusion(schedule="cosine").betas)
    assert process_of(dit(schedule="linear")).prediction == "eps"
    with pytest.raises(ValueError, match="--prediction.*--schedule linear"):
        process_of(dit(prediction="v"))
    with pytest.raises(ValueError, match="--learn-sigma.*--schedule linear"):
        process_of(dit(learn_sigma=True))
    with pytest.raises(ValueError, match="--flow-shift.*cosine"):
        process_of(dit(schedule="cosine", flow_shift=2.0))
    with pytest.raises(ValueError, match="--logit-normal needs --schedule flow, not linear"):
        process_of(dit(schedule="linear", logit_normal=True))
    with pytest.raises(ValueError, match="--min-snr needs a Gaussian schedule.*not flow"):
        process_of(dit(min_snr=5.0))


# --------------------------------------------------------------------------------------------------
# what fits together

def test_describe_says_what_a_model_needs_of_its_data():
    info = describe(TOY, "udit-tiny", Pixels())
    assert info == {"name": "toy", "class_names": ["cat", "dog"], "channels": 3, "image_size": 8}
    assert describe(SPOKEN, "udit-tiny", Pixels()) == info              # classes alone are read
    spoken = describe(SPOKEN, "unet-tiny", Pixels())
    assert spoken["vocabulary"]["words"] == ["a", "blue", "cat", "dog", "red"]
    assert spoken["examples"] == SPOKEN.captions
    assert "vocabulary" in describe(SPOKEN, "vq-tiny", Pixels())        # used where there are any
    assert "vocabulary" not in describe(TOY, "vq-tiny", Pixels())
    bare = dataclasses.replace(SPOKEN, class_names=[], labels=0 * SPOKEN.labels)
    for data, asked, used in ((SPOKEN, True, True), (bare, None, True), (bare, False, False)):
        assert ("vocabulary" in describe(data, "DiT-32x1/2", Pixels(), asked)) == used
    with pytest.raises(ValueError, match="udit-tiny wants captions, and toy has none"):
        describe(TOY, "udit-tiny", Pixels(), True)
    with pytest.raises(ValueError, match="unet-tiny wants captions, and toy has none"):
        describe(TOY, "unet-tiny", Pixels())


def test_a_grid_of_tokens_has_as_many_rows_and_columns_of_positions():
    """Not the 32 of the released ImageNet model, which give its tokens wrong places."""
    stage = VQVAE(image_size=8, num_codes=6, factor=2)
    settings = settings_class("vq")()
    model = build_task("vq-tiny", settings, describe(TOY, "vq-tiny", stage), stage).model
    tables = model.content_emb.height_emb, model.content_emb.width_emb
    assert [len(table.weight) for table in tables] == [4, 4]


def test_examples_come_from_the_whole_of_a_sorted_data_set():
    captions = 240 * ["a cat"] + 240 * ["a dog"]
    x, y = torch.zeros(480, 3, 8, 8).byte(), torch.zeros(480, dtype=torch.int64)
    spoken = data.Dataset("sorted", x, y, captions, [], flip=False)
    examples = describe(spoken, "unet-tiny", Pixels())["examples"]
    assert examples == 12 * ["a cat"] + 12 * ["a dog"]


def test_latents_are_described_as_the_pictures_that_they_are_of():
    latents = dataclasses.replace(TOY, images=torch.randn(4, 6, 4, 4), flip=False)
    stage = TinyAutoencoder(3, 6, factor=2)
    info = describe(latents, "udit-tiny", stage)
    assert (info["channels"], info["image_size"]) == (3, 8)
    for other in (TinyAutoencoder(3, 5, factor=2), VQVAE(8, 3, 4, 2)):
        with pytest.raises(ValueError, match=r"toy holds \(6, 4, 4\), the first stage makes"):
            describe(latents, "udit-tiny", other)
    info = describe(latents, "udit-tiny", Pixels())                     # nothing decodes them
    assert (info["channels"], info["image_size"]) == (6, 4)
    few = dataclasses.replace(latents, images=latents.images[:, :3])        # as pictures have
    with pytest.raises(ValueError, match="of 3 channels need their --first-stage"):
        describe(few, "udit-tiny", Pixels())
    with pytest.raises(ValueError, match="tiny-ae learns from pictures, and toy holds latents"):
        describe(few, "tiny-ae", Pixels())
    info = describe(latents, "udit-tiny", TinyAutoencoder(1, 6, factor=2))      # of grey pictures
    assert (info["channels"], info["image_size"]) == (1, 8)


def test_a_first_stage_of_the_other_kind_is_refused():
    info = describe(TOY, "udit-tiny", Pixels())
    with pytest.raises(ValueError, match="vq-tiny works on tokens, from a vq-vae.*--first-stage"):
        build_task("vq-tiny", settings_class("vq")(), info, Pixels())
    with pytest.raises(ValueError, match="udit-tiny works on numbers, from a tiny-ae"):
        build_task("udit-tiny", settings_class("udit")(), info, VQVAE(8, 3, 4, 2))
    with pytest.raises(ValueError, match="sides divisible by 3"):
        build_task("udit-tiny", settings_class("udit")(), info, TinyAutoencoder(3, 4, factor=3))
    task = build_task("DiT-32x1/2", settings_class("dit")(), info, TinyAutoencoder(3, 5, factor=2))
    assert task.family == "dit" and task.shape == (5, 4, 4) and task.model.num_classes == 2


def test_auto_is_new_for_drawn_worlds_and_models_that_need_latents_else_none():
    for model, of, expected in (("DiT-S/2", "shapes", "new"), ("DiT-S/2", "cifar10", "none"),
                                ("unet-tiny", "folder:x", "new"), ("DiT-S/2", "folder:x", "new"),
                                ("unet-tiny", "latents:x", "none"),
                                ("vq-tiny", "npz:x", "new"), ("DiT-S/2", "npz:x", "none")):
        settings = settings_class(find_model(model)[0])()
        resolve_first_stage(Config(model=model, data=of), settings)
        assert settings.first_stage == expected, (model, of)
    settings = settings_class("dit")()          # few pixels need no first stage
    resolve_first_stage(Config(model="DiT-S/2", data="folder:x", image_size=31), settings)
    assert settings.first_stage == "none"
    settings = settings_class("dit")(first_stage="none")
    resolve_first_stage(Config(model="DiT-S/2", data="shapes"), settings)
    assert settings.first_stage == "none"                               # what is given stays


def test_equal_flags_are_equal_weights_and_another_seed_is_another_model():
    make = lambda seed: make_task(Config(model="DiT-32x1/2", seed=seed), settings_class("dit")(
        first_stage="new", factor=2), TOY)
    one, two, other = make(0), make(0), make(1)
    for part in ("model", "first_stage"):
        a, b, c = (fingerprint(getattr(task, part).state_dict()) for task in (one, two, other))
        assert a == b != c
    assert not any(p.requires_grad for p in one.first_stage.parameters())


# --------------------------------------------------------------------------------------------------
# bases

def test_a_fingerprint_knows_names_shapes_and_values_but_not_precision():
    tensors = {"a": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
               "n": torch.arange(3)}
    one = fingerprint(tensors)
    halved = {"n": tensors["n"], "a": tensors["a"].half()}              # another order as well
    assert fingerprint(halved) == fingerprint({"a": halved["a"].float(), "n": tensors["n"]}) == one
    a = tensors["a"]
    for name, value in (("a", a + 0.1), ("a", a.view(2, 3)), ("a", -a), ("n", tensors["n"] + 1),
                        ("b", a)):
        assert fingerprint({**tensors, name: value}) != one


def test_a_base_must_read_captions_and_hands_its_flags_over(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    config = {"model": "unet-tiny", "data": "npz:x", "image_size": 8, "lr": 7.0, "out": "there"}
    info = describe(SPOKEN, "unet-tiny", Pixels())
    settings = settings_class("unet")(first_stage="none")
    task = build_task("unet-tiny", settings, info, Pixels())
    raw = {k: v + 1 if v.is_floating_point() else v for k, v in task.model.state_dict().items()}
    state = {"task": "unet", "config": config, "settings": vars(settings), "info": info,
             "model": raw, "ema": task.model.state_dict()}
    save_checkpoint(path, state)
    assert base_flags({"base": "/nowhere.pt", "out": "x"}, {}, {}) == {}    # for --help alone
    with pytest.raises(ValueError, match="no checkpoint at /nowhere.pt"):
        base_flags({"base": "/nowhere.pt", "out": "x", "steps": 2}, {}, {})
    flags = base_flags({"base": path, "out": "x"}, {"lr": 1}, {"lr": 2})
    assert flags.items() >= {"model": "unet-tiny", "data": "npz:x", "image_size": 8}.items()
    assert flags["lr"] == 1 and flags["out"] == "x"
    save_checkpoint(path, {**state, "config": {**config, "data": "latents:x", "image_size": 32}})
    flags = base_flags({"base": path, "out": "x"}, {}, {})
    assert flags["image_size"] == 8                         # of the pictures, which info knows
    with pytest.raises(ValueError, match="--lr is not read here .--part none."):    # but word_lr
        base_flags({"base": path, "out": "x", "part": "none", "lr": 1.0}, {}, {})
    with pytest.raises(ValueError, match="torchrun is for train.py alone"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        base_flags({"base": path, "out": "x"}, {}, {})
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(models, "is_official", lambda path: True)
    with pytest.raises(ValueError, match="say with --data or --concept what to learn from"):
        base_flags({"base": path, "out": "x"}, {}, {"lr": 2})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="--bpe is for Stable Diffusion"):
        base_task(path, "no file of merges")
    base = base_task(path)
    assert fingerprint(base.model.state_dict()) == fingerprint(task.model.state_dict())
    assert base.family == "unet"
    assert torch.equal(base.tokenizer(["a red dog"]), task.tokenizer(["a red dog"]))
    assert torch.equal(next(models.task_from(state, path, "model").model.parameters()),
                       next(task.model.parameters()) + 1)
    with pytest.raises(ValueError, match="averaged weights alone"):
        models.task_from({k: v for k, v in state.items() if k != "model"}, path, "model")
    info = describe(TOY, "udit-tiny", Pixels())
    settings = settings_class("udit")(first_stage="none")
    other = build_task("udit-tiny", settings, info, Pixels()).model.state_dict()
    save_checkpoint(path, {"task": "udit", "config": {"model": "udit-tiny"}, "info": info,
                           "settings": vars(settings), "model": other, "ema": other})
    with pytest.raises(ValueError, match="does not read captions: try assets"):
        base_task(path)


# --------------------------------------------------------------------------------------------------
# what belongs together

IDENTITY = {"name": "a", "class_names": ["x", "y"], "words": ["red", "blue"], "image_size": 8,
            "channels": 3, "base": None, "data": None, "first_stage": "none"}
OTHERS = {"name": "b", "class_names": ["x", "z"], "words": ["red", "navy"], "image_size": 9,
          "channels": 1, "base": "ff", "data": "folder:b", "first_stage": "ee"}


@pytest.mark.parametrize("key", tasks.IDENTITY)
def test_a_difference_is_named_with_both_values_and_the_cure(key):
    tasks.check_same(IDENTITY, dict(IDENTITY), "f.pt", "do this")
    other = {**IDENTITY, key: OTHERS[key]}
    named = key.replace("_", " ")
    with pytest.raises(ValueError, match=f"^f.pt .*{named} is .*; do this$") as said:
        tasks.check_same(IDENTITY, other, "f.pt", "do this")
    one, two = ("y", "z") if key == "class_names" else (
        ("blue", "navy") if key == "words" else (str(IDENTITY[key]), str(OTHERS[key])))
    assert one in str(said.value) and two in str(said.value)
    rest = [k for k in tasks.IDENTITY if k != key]
    tasks.check_same(IDENTITY, other, "f.pt", "", rest)                 # only what was asked for


def test_an_order_is_a_difference():
    with pytest.raises(ValueError, match=r"\['x', 'y'\], and here it is \['y', 'x'\]"):
        tasks.check_same(IDENTITY, {**IDENTITY, "class_names": ["y", "x"]}, "f.pt", "")


def test_an_identity_knows_the_first_stage_and_the_base():
    info, stage = describe(SPOKEN, "unet-tiny", Pixels()), TinyAutoencoder(3, 4, factor=2)
    saved = {"kind": "tiny-ae", "sizes": {}, "model": stage.state_dict()}
    one = tasks.identity(info, {"first_stage": saved})
    half = {name: value.half() for name, value in stage.state_dict().items()}
    assert one == tasks.identity(info, {"first_stage": {**saved, "model": half}})
    stage.mean += 1
    assert one != tasks.identity(info, {"first_stage": saved}) != tasks.identity(info, {})
    assert tasks.identity(info, {"base": "x", "data": "y"}).items() >= {
        "base": "x", "data": "y", "words": ["a", "blue", "cat", "dog", "red"]}.items()


@pytest.mark.parametrize("name", [name for row in FAMILIES.values() for name in row.sizes])
def test_a_published_size_fits_its_own_defaults(name):
    """Sizes of VQ models are compared with their first stage's: real weights would not fit here."""
    from train import read_flags
    config, settings = read_flags(["--model", name, "--data", "npz:x", "--first-stage", "new"] if (
        "first_stage" in FAMILIES[find_model(name)[0]].flags) else ["--model", name])
    info = {"channels": 3, "image_size": config.image_size}
    row, sizes = FAMILIES[find_model(name)[0]], find_model(name)[1]
    if row.axes == 1:
        stage = models.NEW_STAGES["vq-vae"](settings, info)
        assert stage.grid == sizes.get("grid", stage.grid)
        assert stage.num_codes == sizes.get("num_codes", stage.num_codes)
        return
    pictures = torch.zeros(4, 3, config.image_size, config.image_size, dtype=torch.uint8)
    with torch.device("meta"):
        task = make_task(config, settings, dataclasses.replace(SPOKEN, images=pictures))
    assert sum(p.numel() for p in task.model.parameters()) > 1000
