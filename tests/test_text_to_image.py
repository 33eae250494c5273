"""The U-Net and its text encoder in the one loop: captions go in, the vocabulary travels, prompts come out as
pictures."""
import copy

import pytest
import torch

import data
import sample
import tasks
import train
from test_train import assert_same
from weights import load_checkpoint

FLAGS = ["--model", "unet-tiny", "--batch-size", "4", "--sample-every", "0", "--log-every", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of 24 captioned scenes, an untrained first stage of it, and four steps of text to image."""
    root = tmp_path_factory.mktemp("t2i")
    scenes = data.load("scenes", count=24)
    (root / "scenes").mkdir()
    for i, caption in enumerate(scenes.captions):
        data.save_grid(scenes.images[i:i + 1], root / "scenes" / f"{i:02d}.png", nrow=1, pad=0, scale=1)
        (root / "scenes" / f"{i:02d}.txt").write_text(caption)
    common = ["--data", f"folder:{root / 'scenes'}"]
    train.main([*common, *FLAGS, "--model", "tiny-ae", "--steps", "2", "--out", str(root / "ae")])
    train.main([*common, *FLAGS, "--first-stage", str(root / "ae" / "ckpt.pt"), "--steps", "4",
                "--lr-decay", "constant", "--out", str(root / "run")])
    return root


def test_the_vocabulary_travels_in_the_checkpoint(run):
    state = load_checkpoint(run / "run" / "ckpt.pt")
    task, model = sample.load(run / "run" / "ckpt.pt")
    captions = data.load(f"folder:{run / 'scenes'}").captions
    assert task.info["examples"] == captions[:24] and state["task"] == "unet"
    assert task.tokenizer(captions).max() < task.model.text.text_model.embeddings.token_embedding.num_embeddings
    moved = {k for k, v in state["model"].items() if not torch.equal(v, tasks.TASKS["unet"](
        task.config, task.info, task.first_stage).model.state_dict()[k])}
    assert any(k.startswith("unet.input_blocks") for k in moved) and any(k.startswith("text.") for k in moved)


def test_resume_is_bit_exact(run, tmp_path):
    flags = ["--data", f"folder:{run / 'scenes'}", *FLAGS, "--first-stage", str(run / "ae" / "ckpt.pt"), "--lr-decay",
             "constant", "--out", str(tmp_path / "run")]
    train.main([*flags, "--steps", "2"])
    train.main([*flags, "--steps", "4", "--resume"])
    a, b = load_checkpoint(run / "run" / "ckpt.pt"), load_checkpoint(tmp_path / "run" / "ckpt.pt")
    for part in ("model", "ema", "opt"):
        assert_same(a[part], b[part], part)


def test_captions_are_dropped_and_the_rest_kept(run):
    task, model = sample.load(run / "run" / "ckpt.pt")
    ids = task.tokenizer(task.info["examples"][:4])
    kept = model.drop_labels(ids, torch.tensor([0.05, 0.5, 0.0999, 0.1001]))
    null = task.tokenizer([""])
    assert torch.equal(kept[[0, 2]], null.expand(2, -1)) and torch.equal(kept[[1, 3]], ids[[1, 3]])
    assert torch.equal(model.null_condition(3), null.expand(3, -1))


def draw(run, *flags):
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "save_grid", lambda images, path, captions=None, **k: drawn.append((images, captions)))
        sample.main(["--ckpt", str(run / "run" / "ckpt.pt"), "--out", str(run / "x.png"), "--steps", "2", *flags])
    return drawn[0]


def test_prompts_negative_prompts_and_defaults(run):
    first, second = data.load(f"folder:{run / 'scenes'}").captions[:2]
    images, captions = draw(run, "--prompt", f"{first} | {second}", "--n", "3")
    assert captions == [first, second, first] and images.shape == (3, 3, 32, 32)
    assert len(draw(run)[0]) == 24                                              # nothing asked: the run's own examples
    other, _ = draw(run, "--prompt", f"{first} | {second}", "--n", "3", "--negative", second)
    plain, _ = draw(run, "--prompt", f"{first} | {second}", "--n", "3", "--negative", "")
    assert torch.equal(images, plain) and not torch.equal(images[0], other[0])


def test_negative_prompt_equal_to_the_prompt_is_no_guidance(run):
    """eps_u + s (eps_c - eps_u) with u = c is eps_c, whatever s is."""
    task, model = sample.load(run / "run" / "ckpt.pt")
    ids = task.tokenizer(task.info["examples"][:2])
    noise = torch.randn(2, *task.shape, generator=torch.Generator().manual_seed(0))
    a = task.sample(model, ids, null=ids, cfg_scale=7.0, steps=2, noise=noise)
    b = task.sample(model, ids, cfg_scale=1.0, steps=2, noise=noise)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_text_encoder_is_that_of_the_model_asked(run):
    """Previews draw with the averaged weights: of the U-Net and of the text encoder too."""
    task, model = sample.load(run / "run" / "ckpt.pt")
    other = copy.deepcopy(model)
    for p in other.text.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(0))
    ids = task.tokenizer(task.info["examples"][:2])
    noise = torch.randn(2, *task.shape, generator=torch.Generator().manual_seed(0))
    a, b = (task.sample(m, ids, steps=2, noise=noise) for m in (model, other))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("flags,words", [
    (["--prompt", "a rde circle"], "red"), (["--class", "3"], "--prompt instead of --class"),
    (["--prompt", "a red circle " * 20], "words")])
def test_wrong_prompts_are_one_line(run, capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(run / "run" / "ckpt.pt"), "--out", str(run / "x.png"), *flags])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and words in err and len(err.strip().splitlines()) == 1


def test_a_model_for_captions_wants_captions(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([*FLAGS, "--data", "shapes", "--recipe", "paper", "--out", str(tmp_path / "a")])
    assert stopped.value.code == 2 and "--learn-sigma" in capsys.readouterr().err
