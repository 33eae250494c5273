"""The command line: a dataclass becomes flags, and what the user can mend is one line.

    options, = parse(argv, __doc__, Options)            # python sample.py --steps 10"""
import argparse
import dataclasses
import difflib
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch

# per flag of ours, or thing to say: its names in kohya's scripts, diffusers, DiT, nanoGPT
ELSEWHERE = Path(__file__).parent / "assets/elsewhere.txt"


def flag(default, help, within="(-inf, inf)", choices=None, needs=""):
    """A dataclass field that becomes a flag; numbers must lie `within`, "text" may be empty. needs:
    flags without which this one is not read, or with "!", beside which. "%" of help is "%%"."""
    metadata = dict(help=help, within=within, choices=choices, needs=needs)
    return dataclasses.field(default=default, metadata=metadata)


def check(options):
    """`options`, if numbers are in the range that each field states, and all would be read."""
    for field in dataclasses.fields(options):
        value, within = getattr(options, field.name), field.metadata["within"]
        kinds = {float: (int, float), tuple: (tuple, list)}.get(field.type, field.type)
        if not isinstance(value, kinds) and not (value is None and field.default is None):
            raise ValueError(f"--{field.name} is {value!r:.40}, not {field.type.__name__}")
        if type(value) in (int, float):
            low, high = map(float, within[1:-1].split(","))
            ends = [low] * (within[0] == "[") + [high] * (within[-1] == "]")
            if not (abs(value) < 1e15 and (low < value < high or value in ends)):
                within = within.replace("inf", "1e15")
                refuse(options, field.name, f"{value!s:.20}: give a number in {within}")
        for other in field.metadata["needs"].split():
            how, other = "is not read beside" if other[0] == "!" else "needs", other.strip("!")
            if (getattr(options, other) is None) == (how == "needs"):
                refuse(options, field.name, f"{how} --{other.replace('_', '-')}")
    return options


def refuse(options, names, why):
    """Raise ValueError, "--name why", for the first of the options `names` that was given."""
    for name in names.split():
        if getattr(options, name) not in (None, ()):
            raise ValueError(f"--{name.replace('_', '-')} {why}")


def parse(argv, description, *classes, presets=lambda given: {}, other=lambda flag: None):
    """Command line -> one object per dataclass; each class is a group of --help.
    presets(given) -> {field: default}, where `given` is {field: value}, which wins; other(flag):
    what to say of a flag that no class has. Raises ValueError for unknown flags and values."""
    def error(message):
        raise ValueError(f"{message} (see --help)")
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = error
    told = presets({}) if {"-h", "--help"} & {*argv} else {}        # defaults of this model or base
    for cls in classes:
        group = parser.add_argument_group(cls.__doc__.splitlines()[0])
        for f in dataclasses.fields(cls):
            how = {bool: dict(action=argparse.BooleanOptionalAction),
                   tuple: dict(action="extend", nargs="+")}.get(f.type) or dict(
                       type=f.type, choices=f.metadata["choices"])
            known = told.get(f.name, f.default)
            shown = f"{f.metadata['help']}{f' (default: {known})' * (known not in (None, '', ()))}"
            group.add_argument("--" + f.name.replace("_", "-"), help=shown, **how)
    dashed = [re.sub(r"^--[^=]*", lambda m: m[0].replace("_", "-"), word) for word in argv]
    given, left = parser.parse_known_args(dashed)
    if left:
        name, known = left[0].split("=")[0][:60], parser._option_string_actions
        rows = [line.split(": ") for line in ELSEWHERE.read_text().splitlines()]
        said = [ours if " " in ours else f"here it is --{ours}" for ours, names in rows
                if name[2:] in names.split() and (" " in ours or f"--{ours}" in known)]
        near = [f"did you mean {near}?" for near in difflib.get_close_matches(name, known, 1)]
        hint = other(name) or [*said, *near, "see --help"][0]
        raise ValueError(f"unknown argument {name!r}: {hint}")
    for f in [f for cls in classes for f in dataclasses.fields(cls)]:
        if getattr(given, f.name, None) == "" and f.metadata["within"] != "text":
            refuse(given, f.name, "is empty: give a value, or leave it out")
    values = {**presets(vars(given)), **vars(given)}
    return [check(cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)
                         if f.name in values})) for cls in classes]


def resolve_device(name):
    """auto -> cuda, mps or cpu, the first that is there. Raises ValueError if `name` is not."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if name not in ("auto", "cpu", *there):
        raise ValueError(f"--device {name}: not here, or not in this torch; say --device cpu")
    if (device := [*there, "cpu"][0] if name == "auto" else name) == "cuda":
        torch.set_float32_matmul_precision("high")        # float32 products in TF32
    return device


def one_line(main):
    """Decorate main(argv): what the user can mend is one line and exit code 2. Ctrl-C and SIGTERM:
    "stopped", 130 and 143; the second ends at once. Faults of the program stay tracebacks."""
    def stop(number, frame):
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt(number)
    def wrapped(argv=None):
        before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            main(sys.argv[1:] if argv is None else list(argv))
            return sys.stdout.flush()                           # a full disk or a closed pipe
        except KeyboardInterrupt as error:
            words, code = "stopped", 128 + (error.args or [signal.SIGINT])[0]
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            words, code = f"error: {in_one_line(error)}", 2
            if isinstance(error, ValueError) and int(os.environ.get("LOCAL_RANK", 0)):
                signal.signal(signal.SIGTERM, lambda *_: os._exit(2)), time.sleep(30)
                raise SystemExit(2) from error      # the first one says it, then torchrun ends all
            if isinstance(error, OSError) and sys.stdout is sys.__stdout__:
                sys.stdout = open(os.devnull, "w")              # else Python would flush it again
        finally:
            for number, handler in before.items() if argv is not None else ():
                signal.signal(number, handler)
        print(words, file=sys.stderr)
        raise SystemExit(code)
    return wrapped


def in_one_line(error):
    """An error in at most 400 characters. A RuntimeError, if not of memory, is raised again."""
    words = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    short = re.search("(?i)out of memory|can.t allocate|size calculation overflowed", words)
    if isinstance(error, RuntimeError) and not short:
        raise error
    if isinstance(error, (RuntimeError, MemoryError)):
        asked = re.search(r"(?i)allocate (\d[\d.]* \w+)", words)
        words = (f"not enough memory{f' for {asked[1]}' if asked else ''}: "
                 "take fewer or smaller pictures at once")
    if type(error) in (OSError, BrokenPipeError) and error.errno and not error.filename:
        words += ", while writing log.csv or what is printed"       # all else is written_whole
    return words if len(words) <= 400 else f"{words[:200]} ... {words[-195:]}"
