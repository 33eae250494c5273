"""The command line: a dataclass becomes flags, and what the user can mend is one line.

    options, = parse(argv, __doc__, Options)            # python sample.py --steps 10
"""
import argparse
import dataclasses
import difflib
import functools
import math
import re
import sys

import torch

# flags of other tools -> what to say here
ELSEWHERE = {"learning-rate": "here it is --lr", "resolution": "here it is --image-size",
             "epochs": "give --steps, the number of optimizer steps",
             "num-classes": "there is no such flag, classes are counted from --data",
             "mixed-precision": "there is no such flag: cuda uses bfloat16, all else float32"}


def flag(default, help, within="(-inf, inf)", choices=None):
    """A dataclass field that becomes a flag; numbers must lie `within`. "%" of help is "%%"."""
    metadata = dict(help=help, within=within, choices=choices)
    return dataclasses.field(default=default, metadata=metadata)


def check(options):
    """`options`, if its numbers are finite and in the range that each field states."""
    for field in dataclasses.fields(options):
        value, within = getattr(options, field.name), field.metadata["within"]
        if type(value) in (int, float):
            low, high = map(float, within[1:-1].split(","))
            ends = [low] * (within[0] == "[") + [high] * (within[-1] == "]")
            if not (math.isfinite(value) and (low < value < high or value in ends)):
                name = field.name.replace("_", "-")
                raise ValueError(f"--{name} {value:g}: give a number in {within}")
    return options


def parse(argv, description, *classes, presets=lambda given: {}, other=lambda flag: None):
    """Command line -> one object per dataclass; each class is a group of --help.
    presets(given) -> {field: default}, where `given` is {field: value}, which wins; other(flag):
    what to say of a flag that no class has. Raises ValueError for unknown flags and values."""
    def error(message):
        raise ValueError(f"{message} (see --help)")
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = error
    for cls in classes:
        group = parser.add_argument_group(cls.__doc__.splitlines()[0])
        for f in dataclasses.fields(cls):
            how = {bool: dict(action=argparse.BooleanOptionalAction),
                   tuple: dict(action="extend", nargs="+")}.get(f.type) or dict(
                       type=f.type, choices=f.metadata["choices"])
            shown = "" if f.default in (None, "", ()) else f" (default: {f.default})"
            group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                               help=f.metadata["help"] + shown, **how)
    dashed = [re.sub(r"^--[^=]*", lambda m: m[0].replace("_", "-"), word) for word in argv]
    given, left = parser.parse_known_args(dashed)
    if left:
        name = left[0].split("=")[0]
        near = difflib.get_close_matches(name, parser._option_string_actions, 1)
        hint = other(name) or ELSEWHERE.get(name[2:]) or (near and f"did you mean {near[0]}?")
        raise ValueError(f"unknown argument {name!r}: {hint or 'see --help'}")
    values = {**presets(vars(given)), **vars(given)}
    names = [{f.name for f in dataclasses.fields(cls)} & values.keys() for cls in classes]
    return [check(cls(**{k: values[k] for k in known})) for cls, known in zip(classes, names)]


def resolve_device(name):
    """auto -> cuda, mps or cpu, the first that is there. Raises ValueError if `name` is not."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if name not in ("auto", "cpu", *there):
        raise ValueError(f"--device {name}: not on this machine, or not in this build of torch; "
                         "leave the flag out, or say --device cpu")
    return [*there, "cpu"][0] if name == "auto" else name


def one_line(main):
    """Decorate main(argv): what the user can mend is one line and exit code 2; Ctrl-C is 130."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(sys.argv[1:] if argv is None else list(argv))
        except (ValueError, OSError, KeyboardInterrupt) as error:
            stopped = isinstance(error, KeyboardInterrupt)
            print("stopped" if stopped else f"error: {error}", file=sys.stderr)
            raise SystemExit(130 if stopped else 2) from None
    return wrapped
