"""U-Net and text encoder in the loop: the vocabulary travels, prompts come out as pictures."""
import copy

import pytest
import torch

import data
import sample
import train
from checkpoint import load_checkpoint, read_safetensors
from conftest import ROOT, assert_same, fill_by_recipe, write_safetensors
from evaluate import prompt_accuracy
from text import CLIPTokenizer, TextEncoder

MERGES = str(ROOT / "tests/tiny_merges.txt")
FLAGS = ["--batch-size", "4", "--sample-every", "0", "--log-every", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, scenes, short_previews):
    """An autoencoder of two steps, and four steps of text to image in its latents."""
    root, on = tmp_path_factory.mktemp("t2i"), ["--data", f"folder:{scenes}", *FLAGS]
    train.main([*on, "--model", "tiny-ae", "--steps", "2", "--out", str(root / "ae")])
    train.main([*on, "--model", "unet-tiny", "--first-stage", str(root / "ae" / "ckpt.pt"),
                "--steps", "4", "--lr-decay", "constant", "--out", str(root / "run")])
    return root


def test_the_vocabulary_travels_in_the_checkpoint(run, scenes):
    state = load_checkpoint(run / "run" / "ckpt.pt")
    task, model = sample.load(run / "run" / "ckpt.pt")
    captions = data.load(f"folder:{scenes}").captions
    assert task.info["examples"] == captions and state["task"] == "unet"
    ids, table = task.tokenizer(captions), model.text.text_model.embeddings.token_embedding
    assert ids.max() < table.num_embeddings
    assert_same(dict(model.state_dict()), state["ema"])


def test_resume_is_bit_exact(run, scenes, tmp_path):
    out = tmp_path / "run"
    train.main(["--data", f"folder:{scenes}", *FLAGS, "--model", "unet-tiny", "--first-stage",
                str(run / "ae" / "ckpt.pt"), "--steps", "2", "--lr-decay", "constant", "--out",
                str(out)])
    before = load_checkpoint(out / "ckpt.pt")
    before = copy.deepcopy({key: before[key] for key in ("model", "ema")})
    train.main(["--steps", "4", "--resume", "--out", str(out)])
    a, b = (load_checkpoint(path / "ckpt.pt") for path in (run / "run", out))
    for part in ("model", "ema", "opt", "info", "first_stage"):
        assert_same(a[part], b[part], part)
    for part in ("denoiser.", "text."):             # both networks learn, in weights and average
        for net in before:
            assert any(not torch.equal(w, b[net][name]) for name, w in before[net].items()
                       if name.startswith(part))


def test_captions_are_dropped_and_the_rest_kept(run):
    task, model = sample.load(run / "run" / "ckpt.pt")
    ids = task.tokenizer(task.info["examples"][:4])
    kept = model.drop_labels(ids, torch.tensor([0.05, 0.5, 0.0999, 0.1001]))
    null = task.tokenizer([""])
    assert torch.equal(kept[[0, 2]], null.expand(2, -1))
    assert torch.equal(kept[[1, 3]], ids[[1, 3]])
    assert torch.equal(model.null_condition(3), null.expand(3, -1))


def test_the_loss_hides_the_captions_that_the_draws_name(run):
    task, model = sample.load(run / "run" / "ckpt.pt")
    draws = task.draw(2, torch.Generator().manual_seed(0), "cpu")
    del draws["flip"], draws["drop"]
    x = torch.randn(2, *task.shape, generator=torch.Generator().manual_seed(1))
    ids, null = task.tokenizer(task.info["examples"][:2]), task.tokenizer(["", ""])
    loss = lambda y, drop: task.loss(model, x, y, None, drop=torch.full((2,), drop), **draws)[0]
    assert loss(ids, 0.0) == loss(null, 1.0) != loss(ids, 1.0)


def grid(run, *flags):
    """(pictures, captions) that sample.py would save."""
    saved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "save_grid",
                      lambda images, path, captions=None, **how: saved.append((images, captions)))
        sample.main(["--ckpt", str(run / "run" / "ckpt.pt"), "--out", str(run / "x.png"),
                     "--steps", "2", *flags])
    return saved[0]


def test_prompts_negative_prompts_and_defaults(run, scenes):
    first, second = data.load(f"folder:{scenes}").captions[:2]
    both = ["--prompt", f"{first} | {second}", "--n", "3"]
    images, captions = grid(run, *both)
    assert captions == [first, second, first] and images.shape == (3, 3, 32, 32)
    assert len(grid(run)[0]) == 24                      # nothing asked for: the run's own examples
    assert grid(run, "--prompt", "")[1] == [""]         # asked for nothing: the empty prompt
    plain, other = (grid(run, *both, "--negative", text)[0] for text in ("", second))
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
    """Previews sample with the averaged weights: of the U-Net and of the text encoder too."""
    task, model = sample.load(run / "run" / "ckpt.pt")
    other = copy.deepcopy(model)
    for p in other.text.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(0))
    ids = task.tokenizer(task.info["examples"][:2])
    noise = torch.randn(2, *task.shape, generator=torch.Generator().manual_seed(0))
    a, b = (task.sample(m, ids, steps=2, noise=noise) for m in (model, other))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("flags,words", [
    (["--prompt", "a rde circle"], "red"), (["--class", "3"], "say --prompt, not --class"),
    (["--prompt", "a red circle " * 20], "words")])
def test_wrong_prompts_are_one_line(run, capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(run / "run" / "ckpt.pt"), "--out", str(run / "x.png"), *flags])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and words in err and len(err.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small text encoder under CLIP's names, in half precision as Stable Diffusion has it."""
    path = tmp_path_factory.mktemp("clip") / "model.safetensors"
    encoder = fill_by_recipe(TextEncoder(CLIPTokenizer(MERGES).vocab_size, 77, 96, 2, 1))
    write_safetensors(path, {name: w.half() for name, w in encoder.state_dict().items()})
    return path


@pytest.mark.parametrize("model", ["DiT-32x2/2", "udit-tiny", "unet-tiny", "vq-tiny"])
def test_a_frozen_text_encoder_from_a_file(run, scenes, clip, tmp_path, short_previews, model):
    """It does not learn, and reads any words; once the run has begun, nobody needs the file."""
    file = tmp_path / "encoder.safetensors"
    file.write_bytes(clip.read_bytes())
    stage = "new" if model == "vq-tiny" else str(run / "ae" / "ckpt.pt")
    flags = ["--first-stage-steps", "2"] * (stage == "new") + ["--captions"] * ("-t" not in model)
    flags = flags if model != "udit-tiny" else ["--captions"]
    out = ["--out", str(tmp_path / "run")]
    train.main(["--data", f"folder:{scenes}", *FLAGS, "--model", model, "--first-stage", stage,
                "--steps", "2", "--text-encoder", str(file), "--bpe", MERGES, *flags, *out])
    file.unlink()
    with pytest.raises(SystemExit):         # the list of merges is in the checkpoint
        train.main(["--steps", "3", "--resume", "--bpe", MERGES, *out])
    train.main(["--steps", "3", "--resume", *out])
    state = load_checkpoint(tmp_path / "run" / "ckpt.pt")
    for name, w in read_safetensors(clip).items():
        assert torch.equal(state["ema"][f"text.{name}"], w.float())
        assert torch.equal(state["model"][f"text.{name}"], w.float())
    task, net = sample.load(tmp_path / "run" / "ckpt.pt")
    prompts = ["zebras, xylophones & <tags>", "a red circle"]
    ids, want = task.tokenizer(prompts), CLIPTokenizer(MERGES)(prompts)
    assert torch.equal(ids, want) and ids.shape == (2, 77) and task.tokenizer.open
    states, single = net.text(ids), TextEncoder(ids.max() + 1, 77, 96, 2, 1)
    single.load_state_dict(read_safetensors(clip))
    assert torch.equal(states, single(ids)) and not net.text.training
    assert task.sample(net, ids, steps=2).isfinite().all()
    if model == "unet-tiny":        # a flow, without a kl-ae: parts, and no StableDiffusionPipeline
        sample.main(["--ckpt", str(tmp_path / "run" / "ckpt.pt"), "--export",
                     str(tmp_path / "parts"), "--diffusers"])
        assert (tmp_path / "parts" / "tokenizer" / "merges.txt").is_file()
        assert not (tmp_path / "parts" / "model_index.json").exists()


def test_a_text_encoder_is_refused_where_nothing_reads_it(run, scenes, clip, tmp_path, capsys):
    spoken, out = ["--data", f"folder:{scenes}"], ["--out", str(tmp_path / "x")]
    begun = ["--init", str(run / "run" / "ckpt.pt")]
    for flags, words in ((["--data", "shapes", "--model", "DiT-32x2/2"], "say --captions"),
                         ([*spoken, *begun], "has one already: leave it out"),
                         ([*spoken, "--model", "tiny-ae"], "read by the families"),
                         ([*spoken, "--model", "vq-tiny", "--learned-null"], "--learned-null")):
        with pytest.raises(SystemExit) as stopped:
            train.main([*flags, *FLAGS, *out, "--text-encoder", str(clip),
                        *["--bpe", MERGES] * (begun[1] not in flags)])
        assert stopped.value.code == 2 and words in (said := capsys.readouterr().err), said
    with pytest.raises(SystemExit):
        train.main([*spoken, *FLAGS, *out, "--model", "unet-tiny", "--bpe", MERGES])
    assert "needs --text-encoder" in capsys.readouterr().err
    other = tmp_path / "merges.txt"
    other.write_text("\n".join(open(MERGES).read().splitlines()[:-1]))
    with pytest.raises(SystemExit):
        train.main([*spoken, *FLAGS, *out, "--model", "unet-tiny", "--text-encoder", str(clip),
                    "--bpe", str(other)])
    assert "give the full list" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_shipped_model_draws_what_one_asks():
    captions = [f"a large {color} {shape} in the middle on navy" for shape in ("circle", "square")
                for color in ("red", "green", "yellow", "white")]
    task, model = sample.load(str(ROOT / "assets" / "unet-scenes.pt"))
    _, pictures, _ = sample.sample_all(task, model, task.tokenizer(captions), steps=10)
    right = prompt_accuracy(pictures, captions)
    assert right["color"][0] >= 7 / 8 and right["shape"][0] >= 6 / 8
