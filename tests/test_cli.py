"""What a person may get wrong at the command line: exit code 2, one clear line, no traceback, nothing lost."""
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch

import train
import weights
from test_train import ONE_THREAD, ROOT, pictures  # noqa: F401  (the fixture)


def refuse(capsys, *argv):
    """train.py must refuse argv with code 2; returns its words."""
    with pytest.raises(SystemExit) as stopped:
        train.main(list(argv))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and len(err.strip().splitlines()) <= 3 and "Traceback" not in err, err
    return err


@pytest.mark.parametrize("argv,words", [
    (["--stesp", "3"], "did you mean --steps"),
    (["--batchsize", "3"], "did you mean --batch-size"),
    (["--steps", "many"], "invalid int value"),
    (["--recipe", "nature"], "fast"),
    (["--model", "DiT-S/3"], "Did you mean DiT-S"),
    (["--model", "dit-xl/2"], "DiT-XL/2"),
    (["--data", "shape"], "shapes"),
    (["--data", "cifar"], "cifar10"),
    (["--model", "DiT-64x2/3"], "divisible by its patch size 3"),
    (["--data", "mnist", "--model", "DiT-S/8", "--image-size", "28"], "divisible by its patch size 8"),
    (["--batch-size", "0"], "positive"),
    (["--batch-size", "10", "--accum", "3", "--first-stage", "none"], "does not split"),
    (["--class-dropout", "1"], "--class-dropout"),
    (["--learn-sigma", "--first-stage", "none"], "Gaussian schedule"),
    (["--resume"], "no checkpoint"),
    (["--init", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    (["--first-stage", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    (["--data", "folder:/does/not/exist"], "/does/not/exist")])
def test_wrong_flags(capsys, tmp_path, argv, words):
    assert words in refuse(capsys, *argv, "--out", str(tmp_path / "run"))
    assert not list(tmp_path.rglob("ckpt.pt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_asked_for_but_absent(capsys, tmp_path):
    assert "--device cpu" in refuse(capsys, "--device", "cuda", "--out", str(tmp_path / "run"))


def test_a_run_stopped_in_its_first_stage_resumes(tmp_path, pictures):  # noqa: F811
    flags = ["--data", f"folder:{pictures}", "--image-size", "8", "--batch-size", "4", "--sample-every", "0"]
    train.main([*flags, "--model", "tiny-ae", "--steps", "2", "--out", str(tmp_path / "run" / "first_stage")])
    train.main([*flags, "--model", "DiT-32x1/1", "--first-stage", "tiny", "--first-stage-steps", "4", "--steps", "3",
                "--out", str(tmp_path / "run"), "--resume"])
    assert weights.load_checkpoint(tmp_path / "run" / "first_stage" / "ckpt.pt")["step"] == 4
    assert weights.load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 3


def test_a_used_folder_is_refused_and_kept(capsys, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    assert "--resume" in refuse(capsys, "--out", str(tmp_path))
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_bad_pictures_are_named(capsys, tmp_path, pictures):  # noqa: F811
    import shutil
    shutil.copytree(pictures, tmp_path / "mine")
    (tmp_path / "mine" / "pear" / "broken.png").write_bytes(b"not a picture")
    flags = ["--data", f"folder:{tmp_path / 'mine'}", "--image-size", "8", "--model", "DiT-32x1/4", "--batch-size", "4",
             "--steps", "2", "--sample-every", "0", "--out", str(tmp_path / "run")]
    assert "broken.png" in refuse(capsys, *flags)
    train.main([*flags, "--skip-bad"])
    assert "skipped 1" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert "empty" in refuse(capsys, "--data", f"folder:{tmp_path / 'empty'}", "--out", str(tmp_path / "run2"))


def test_damaged_checkpoints_do_not_resume(capsys, tmp_path, pictures):  # noqa: F811
    flags = ["--data", f"folder:{pictures}", "--image-size", "8", "--model", "DiT-32x1/4", "--batch-size", "4",
             "--steps", "3", "--out", str(tmp_path / "run")]
    train.main(flags)
    whole = (tmp_path / "run" / "ckpt.pt").read_bytes()
    (tmp_path / "run" / "ckpt.pt").write_bytes(whole[:-1000])
    assert "not readable" in refuse(capsys, *flags, "--steps", "6", "--resume")
    (tmp_path / "run" / "ckpt.pt").write_bytes(whole)
    # tensors differ, names are listed
    words = refuse(capsys, *flags, "--steps", "6", "--resume", "--model", "DiT-64x1/4")
    assert "does not fit" in words and "blocks.0" in words


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_help_teaches_and_is_quick(script):
    start = time.time()
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True,
                          env=ONE_THREAD)
    assert done.returncode == 0 and ("--ckpt" in done.stdout or "--steps" in done.stdout)
    assert "python " + script in done.stdout                                    # examples, not only flags
    assert time.time() - start < 20                                             # most of it is importing torch


def test_a_real_process_leaves_code_two_and_no_traceback(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--modle", "x"], capture_output=True, text=True,
                          env=ONE_THREAD, cwd=tmp_path)
    assert done.returncode == 2 and "--model" in done.stderr and "Traceback" not in done.stderr
    assert not list(pathlib.Path(tmp_path).iterdir())


def test_importing_does_nothing(tmp_path):
    """No file prints, seeds, parses or writes on import, and none needs another package than the five."""
    for name in ("diffusion", "data", "vae", "dit", "train", "sample", "evaluate"):
        code = (f"import sys, torch; before = torch.get_rng_state().clone(); import {name}; "
                "assert torch.equal(before, torch.get_rng_state()); assert not sys.argv[1:]")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0 and not done.stdout and not done.stderr, (name, done.stderr)
        assert not list(tmp_path.iterdir())
