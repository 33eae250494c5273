"""What a person may get wrong at the command line: exit code 2, one clear line, nothing lost."""
import dataclasses
import importlib
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch

import adapters
import cli
import custom_diffusion
import train
from checkpoint import load_checkpoint
from cli import flag, in_one_line, one_line, parse, resolve_device
from conftest import ONE_THREAD, ROOT, fewer_drawn


def refuse(capsys, *argv, main=train.main):
    """main must refuse argv with code 2; returns its words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ")
    return err


@pytest.fixture
def small(pictures, short_previews):
    """Flags of a run that takes a second."""
    return ["--data", f"folder:{pictures}", "--image-size", "8", "--batch-size", "4", "--model",
            "DiT-32x1/4", "--steps", "2", "--sample-every", "0"]


# --------------------------------------------------------------------------------------------------
# cli.py itself

# for new processes that need no tensors: torch takes a second
NO_TORCH = "import sys, types; sys.modules['torch'] = types.ModuleType('torch')\n"


@dataclasses.dataclass
class Options:
    """a group"""
    count: int = flag(3, "a number", "[1, 5)")
    share: float = flag(None, "another, in %%", "(0, 1]")
    names: tuple = flag(("a",), "some names")
    on: bool = flag(False, "on or off")
    kind: str = flag("x", "which", "", ["x", "y"])
    steps: int = flag(None, "how many")
    out: str = flag(None, "where to")
    words: str = flag(None, "what", "text", needs="out !share")


def test_a_dataclass_becomes_flags(capsys):
    read = lambda *argv, **how: parse(argv, "words", Options, **how)[0]
    assert read() == Options(3, None, ("a",), False, "x")
    given = read("--count=4", "--share", "1", "--names", "b", "c", "--names", "d", "--on",
                 "--kind", "y")
    assert (given.count, given.share, list(given.names)) == (4, 1.0, ["b", "c", "d"])
    assert given.on is True and given.kind == "y" and read("--on", "--no-on").on is False
    seen = []
    preset = lambda given: seen.append(dict(given)) or {"count": 2, "share": 0.5}
    assert read("--count", "1", presets=preset) == Options(1, 0.5)      # what is given wins
    assert seen == [{"count": 1}]
    for argv in (["--count", "5"], ["--count", "0"], ["--share", "0"], ["--share", "nan"],
                 ["--kind", "z"], ["--count", "x"], ["--coun", "3"], ["word"]):
        with pytest.raises(ValueError):
            read(*argv)
    with pytest.raises(ValueError, match="unknown argument '--cuont': did you mean --count"):
        read("--cuont", "3")
    with pytest.raises(ValueError, match="read by others"):
        read("--cuont", "3", other={"--cuont": "read by others"}.get)
    with pytest.raises(SystemExit):
        read("--help")
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("words", "a group", "in %", "(default: 3)"))


@pytest.mark.parametrize("argv,words", [
    (["--count=1000000000000000000000"], "--count 10000000000000000000: give a number in [1, 5)"),
    (["--count=1" + 400 * "0"], "--count 1000"), (["--count="], "invalid int value: ''"),
    (["--count", "1e3"], "invalid int value: '1e3'"), (["--steps", "1" + 15 * "0"], "--steps 1000"),
    (["--steps", "9" * 5000], "invalid int"), (["--out="], "--out is empty"),
    (["--out", ""], "leave it out"), (["--words", "x"], "--words needs --out"),
    (["--words=", "--out", "x", "--share", "1"], "--words is not read beside --share"),
    (["--num-inference-steps", "3"], "argument '--num-inference-steps': here it is --steps"),
    (["--output_dir=x"], "unknown argument '--output-dir': here it is --out"),
    (["--guidance-scale", "3"], "see --help"),                  # this command has no --cfg-scale
    (["--dtype", "bf16"], "cuda computes in bfloat16"), (["--num-workers", "4"], "in memory"),
    (["--" + "x" * 50_000], "unknown argument '--xxx")])
def test_values_and_flags_that_are_refused(argv, words):
    with pytest.raises(ValueError) as error:
        parse(argv, "words", Options)
    assert words in str(error.value)


def test_values_that_are_right():
    read = lambda *argv: parse(argv, "words", Options)[0]
    assert read("--steps", "1_000").steps == 1000 and read("--count=٣").count == 3
    assert read("--count", "1", "--count", "2").count == 2              # the last one counts
    assert read("--out", "x", "--words", "").words == ""


ALIASES = ("learning-rate train-batch-size max-train-steps gradient-accumulation-steps resolution "
           "num-sampling-steps num-inference-steps guidance-scale cfg global-seed results-dir "
           "output-dir mixed-precision dtype checkpointing-steps resume-from-checkpoint "
           "num-workers report-to data-path batchsize epochs num-samples").split()


@pytest.mark.parametrize("name", ["train", "sample", "evaluate", "bench"])
def test_flags_of_other_tools_find_ours_and_only_those_that_are_there(capsys, name):
    main = importlib.import_module(name).main
    with pytest.raises(SystemExit):
        main(["--help"])
    flags = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    found = 0
    for alias in ALIASES:
        if f"--{alias}" not in flags:
            said = refuse(capsys, f"--{alias}", "1", main=main).partition(": ")[2]
            named = re.findall(r"(?:here it is|did you mean) (--[a-z-]+)", said)
            assert set(named) <= flags, (alias, said)
            found += bool(named)
    assert found >= {"train": 10, "sample": 9, "evaluate": 6, "bench": 4}[name]


SHORT = ("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
         "memory: you tried to allocate 12288 bytes.\nError code 12 (Cannot allocate memory)")


@pytest.mark.parametrize("error,code,words", [
    (ValueError("x"), 2, "x"), (ValueError("a\nb\x1b[31m\u2028c"), 2, "a b [31m c"),
    (FileNotFoundError(2, "No such file", "a.pt"), 2, "No such file: 'a.pt'"),
    (OSError(28, "No space left on device"), 2, "No space left on device, while writing log.csv"),
    (OSError(28, "No space left on device", "a.pt"), 2, "No space left on device: 'a.pt'\n"),
    (BrokenPipeError(32, "Broken pipe"), 2, "Broken pipe, while writing log.csv or what is print"),
    (KeyboardInterrupt(), 130, "stopped"),
    (MemoryError(), 2, "not enough memory: "), (RuntimeError(SHORT), 2, "for 12288 bytes: "),
    (RuntimeError("Storage size calculation overflowed with sizes=[9]"), 2, "not enough memory: "),
    (MemoryError("Unable to allocate 7.28 TiB for an array"), 2, "for 7.28 TiB: "),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), 2, "not enough memory")])
def test_what_the_user_can_mend_is_one_line(capsys, error, code, words):
    @one_line
    def main(argv):
        raise error
    with pytest.raises(SystemExit) as stopped:
        main([])
    said = capsys.readouterr().err
    assert stopped.value.code == code and words in said and len(said.splitlines()) == 1
    assert not words.startswith("not enough") or "take fewer or smaller pictures" in said


@pytest.mark.parametrize("error,said", [(ValueError("x"), ""), (OSError("x"), "error: x\n"),
                                        (MemoryError("x"), "error: not enough memory")])
def test_of_many_processes_the_first_says_what_is_wrong_with_the_command(
        capsys, monkeypatch, error, said):
    """The others do not repeat it; what one of them alone may meet, such as no memory, is said."""
    @one_line
    def main(argv):
        raise error
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    for rank, words in (("0", "error: "), ("3", said)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            main([])
        found = capsys.readouterr().err
        assert stopped.value.code == 2 and found.startswith(words) and bool(found) == bool(words)


def test_what_was_asked_for_is_said_where_it_is_known():
    assert in_one_line(RuntimeError(SHORT)) == (
        "not enough memory for 12288 bytes: take fewer or smaller pictures at once")
    assert in_one_line(MemoryError()).startswith("not enough memory: take fewer")


def test_a_long_message_keeps_its_beginning_and_its_cure(capsys):
    @one_line
    def main(argv):
        raise ValueError("wrong " + 5000 * "x" + " say --right")
    with pytest.raises(SystemExit):
        main([])
    said = capsys.readouterr().err
    assert len(said) < 420 and said.startswith("error: wrong x") and said.endswith("say --right\n")


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("x"), AttributeError("x"),
                                   RuntimeError("shape mismatch"), NotImplementedError("x")])
def test_faults_of_the_program_are_not_hidden(error):
    @one_line
    def main(argv):
        raise error
    with pytest.raises(type(error)):
        main([])


def test_a_signal_stops_in_one_line_and_a_second_one_at_once(tmp_path):
    code = (NO_TORCH + "import time, signal; from cli import one_line\n"
            "def main(argv):\n"
            "    try:\n        print('ready', flush=True); time.sleep(60)\n"
            "    finally:\n        print('undone', flush=True); time.sleep(float(argv[0]))\n"
            "one_line(main)()")
    for name, number, linger in (("SIGINT", 130, 0), ("SIGTERM", 143, 0), ("SIGINT", -2, 60)):
        run = subprocess.Popen([sys.executable, "-c", code, str(linger)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=ONE_THREAD, cwd=tmp_path)
        assert run.stdout.readline() == "ready\n"
        run.send_signal(getattr(signal, name))
        assert run.stdout.readline() == "undone\n"
        if linger:
            run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=20)[1]
        assert run.returncode == number and said == ("" if linger else "stopped\n")


def test_signals_are_given_back(capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    one_line(lambda argv: None)([])
    with pytest.raises(SystemExit):
        one_line(lambda argv: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(9))([])
    assert capsys.readouterr().err == "stopped\n"
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
def test_words_that_cannot_be_written_are_one_line(tmp_path):
    code = NO_TORCH + "from cli import one_line; one_line(lambda argv: print('done'))()"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE,
                              text=True, env=ONE_THREAD, cwd=tmp_path)
    assert done.returncode == 2 and "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


# --------------------------------------------------------------------------------------------------
# flags of train.py

@pytest.mark.parametrize("argv,words", [
    (["--stesp", "3"], "did you mean --steps"), (["--batchsize", "3"], "did you mean --batch-size"),
    (["--batch_sise", "3"], "did you mean --batch-size"), (["--steps", "many"], "invalid int"),
    (["--recipe", "nature"], "fast"), (["--data", "shape"], "shapes"),
    (["--data", "cifar"], "cifar10"), (["--model", "DiT-S/3"], "did you mean DiT-S"),
    (["--model", "dit-xl/2"], "DiT-XL/2"), (["--model", "vq-tinny"], "vq-tiny"),
    (["--learning-rate", "1"], "--lr"), (["--resolution", "64"], "--image-size"),
    (["--epochs", "3"], "--steps"), (["--mixed-precision", "bf16"], "--precision"),
    (["--num-classes", "3"], "counted from --data"),
    (["--model", "vq-tiny", "--schedule", "cosine"], "families dit, udit, unet alone"),
    (["--model", "vq-tiny", "--flow-shift", "3"], "families dit, udit, unet alone"),
    (["--model", "udit-tiny", "--conditioning", "adaln"], "families dit alone"),
    (["--model", "unet-tiny", "--learn-sigma"], "families dit, udit alone"),
    (["--model", "unet-tiny", "--no-qk-norm"], "families dit alone"),
    (["--codes", "8"], "families vq, vq-vae alone"), (["--aux_weight", "1"], "families vq alone"),
    (["--model", "tiny-ae", "--cfg-scale", "2"], "families dit, udit, unet, vq alone"),
    (["--first-stage", "nowhere.pt"], "nowhere.pt"), (["--init", "nowhere.pt"], "nowhere.pt"),
    (["--resume"], "no checkpoint"), (["--data", "folder:/does/not/exist"], "/does/not/exist")])
def test_wrong_flags(capsys, tmp_path, argv, words, monkeypatch):
    fewer_drawn(monkeypatch, 48)
    assert words in refuse(capsys, *argv, "--out", str(tmp_path / "run"))
    assert not list(tmp_path.rglob("ckpt.pt"))


@pytest.mark.parametrize("name,values", [
    ("lr", "inf nan 0 -1"), ("muon-lr", "nan 0"), ("weight-decay", "1e300 -1"), ("ema", "nan -3 1"),
    ("grad-clip", "-1 nan inf"), ("flow-shift", "inf 0"), ("latent-noise", "nan -1"),
    ("class-dropout", "1 -0.1"), ("cfg-scale", "-2"), ("batch-size", "0"), ("steps", "0"),
    ("accum", "0"), ("warmup", "-1"), ("log-every", "0"), ("seed", "-1"), ("image-size", "0")])
def test_numbers_out_of_range(capsys, tmp_path, name, values):
    for value in values.split():
        words = refuse(capsys, f"--{name}={value}", "--out", str(tmp_path / "run"))
        assert f"--{name} " in words and "give a number in" in words


@pytest.mark.parametrize("argv,words", [
    (["--model", "DiT-64x2/3"], "multiple of patch_size 3"),
    (["--batch-size", "10", "--accum", "3"], "does not split"),
    (["--learn-sigma"], "Gaussian schedule"), (["--prediction", "v"], "Gaussian schedule"),
    (["--schedule", "cosine", "--flow-shift", "3"], "--schedule flow"),
    (["--model", "unet-tiny"], "captions"),
    (["--model", "vq-tiny", "--codes", "600"], "fewer --codes"),
    (["--model", "vq-vae", "--codes", "65"], "fewer --codes")])
def test_sizes_that_clash_are_refused_before_a_first_stage_is_trained(
        capsys, tmp_path, small, argv, words):
    stage = [] if "vq-vae" in argv else ["--first-stage", "new"]
    flags = [*small, *stage, "--factor", "2", *argv]
    assert words in refuse(capsys, *flags, "--out", str(tmp_path / "run"))
    assert not list(tmp_path.rglob("*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_asked_for_but_absent(capsys, tmp_path):
    assert "--device cpu" in refuse(capsys, "--device", "cuda", "--out", str(tmp_path / "run"))


def test_on_cuda_float32_products_are_in_tf32_and_elsewhere_nothing_changes(monkeypatch):
    said = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("cpu") == "cpu" and not said
    assert resolve_device("auto") == resolve_device("cuda") == "cuda" and said == ["high"] * 2


def test_checkpointing_is_for_models_with_blocks(capsys):
    assert "--checkpointing True is for models with blocks" in refuse(
        capsys, "--model", "tiny-ae", "--checkpointing")


# --------------------------------------------------------------------------------------------------
# folders and checkpoints

def test_a_run_stopped_in_its_first_stage_resumes(tmp_path, small):
    out, stage = tmp_path / "run", tmp_path / "run" / "first_stage"
    train.main([*small, "--model", "tiny-ae", "--out", str(stage)])
    train.main([*small, "--first-stage", "new", "--first-stage-steps", "4", "--model", "DiT-32x1/1",
                "--out", str(out), "--resume"])
    assert load_checkpoint(stage / "ckpt.pt")["step"] == 4
    assert load_checkpoint(out / "ckpt.pt")["step"] == 2


def test_a_used_folder_is_refused_and_kept(capsys, tmp_path, small):
    (tmp_path / "precious.txt").write_text("mine")
    assert "--resume" in refuse(capsys, *small, "--out", str(tmp_path))
    assert (tmp_path / "precious.txt").read_text() == "mine"
    begun = tmp_path / "begun"                          # stopped before its first checkpoint
    begun.mkdir()
    (begun / "lock").touch()                            # which every run makes first
    (begun / "config.json").write_text("{}")
    (begun / "log.csv").write_text("step,loss\n1,0.5\n")
    train.main([*small, "--out", str(begun)])
    assert load_checkpoint(begun / "ckpt.pt")["step"] == 2


def test_bad_pictures_are_named(capsys, tmp_path, small):
    (tmp_path / "mine").mkdir()
    for file in sorted(pathlib.Path(small[1].partition(":")[2]).rglob("*.png"))[:12]:
        (tmp_path / "mine" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "mine" / "broken.png").write_bytes(b"not a picture")
    flags = [*small, "--data", f"folder:{tmp_path / 'mine'}", "--out", str(tmp_path / "run")]
    assert "broken.png" in refuse(capsys, *flags)
    train.main([*flags, "--skip-bad"])
    assert "1 unreadable" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    flags[flags.index("--out") - 1] = f"folder:{tmp_path / 'empty'}"
    assert "empty" in refuse(capsys, *flags[:-1], str(tmp_path / "run2"))


def test_checkpoints_that_do_not_fit_do_not_resume(capsys, tmp_path, small):
    flags = [*small, "--out", str(tmp_path / "run"), "--first-stage", "none"]
    train.main(flags)
    more = [*flags, "--steps", "6", "--resume"]
    ckpt = tmp_path / "run" / "ckpt.pt"
    whole = ckpt.read_bytes()
    words = refuse(capsys, *more, "--model", "DiT-64x1/4")
    assert "--model DiT-64x1/4" in words and "DiT-32x1/4" in words
    assert "--optimizer" in refuse(capsys, *more, "--optimizer", "adamw")
    assert ckpt.read_bytes() == whole
    ckpt.write_bytes(whole[:-1000])
    assert "damaged" in refuse(capsys, *more)


# --------------------------------------------------------------------------------------------------
# --help, and what happens on import

COMMANDS = [("train",), ("sample",), ("evaluate",), ("bench",), ("adapters", "learn"),
            *(("custom_diffusion", command) for command in ("learn", "merge", "compress"))]


def show_help(capsys, name, *words):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main([*words, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name,words", [(name, words) for name, *words in COMMANDS],
                         ids=" ".join)
def test_help_shows_examples_and_groups(capsys, name, words):
    shown = show_help(capsys, name, *words)
    assert " ".join(["python", f"{name}.py", *words]) in shown and "(default: " in shown


def test_help_shows_the_flags_of_the_model(capsys):
    shown = show_help(capsys, "train")
    assert "flags of the loop" in shown and "--qk-norm" in shown and "--codes" not in shown
    shown = show_help(capsys, "train", "--model", "unet-tiny")
    assert "unet-tiny, unet-small and their like:" in shown and "--latent-channels" in shown
    assert "--qk-norm" not in shown and "--learn-sigma" not in shown


def test_commands_name_their_parts(capsys):
    assert "learn" in refuse(capsys, main=adapters.main)
    for argv in ([], ["compose"]):
        assert "learn, merge or compress" in refuse(capsys, *argv, main=custom_diffusion.main)


@pytest.mark.parametrize("name", ["train", "sample", "evaluate", "bench", "adapters",
                                  "custom_diffusion"])
def test_a_file_that_is_run_is_its_command(name, capsys, monkeypatch, tmp_path):
    """As python NAME.py --devise x, in this process."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    wrong = ["learn"] * (name in ("adapters", "custom_diffusion")) + ["--devise", "x"]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *wrong])
    try:
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert stop.value.code == 2 and "did you mean --device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_importing_does_nothing(tmp_path):
    """No file prints, seeds, reads arguments or writes when it is imported."""
    names = sorted(path.stem for path in ROOT.glob("*.py"))
    code = ("import sys, torch; before = torch.get_rng_state().clone(); sys.argv = None; import "
            + ", ".join(names) + "; assert torch.equal(before, torch.get_rng_state())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=tmp_path, env=ONE_THREAD)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
