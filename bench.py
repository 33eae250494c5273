"""How fast is it, and does it learn at all? Measured against what this machine can do.

    python bench.py --models DiT-S/2 unet-tiny --steps 20       # default: one model of each kind
    python bench.py --overfit --steps 200 --models udit-tiny    # self-check: one batch, same noise
    python bench.py --proof DIR                 # what one GPU has to show, in nine minutes

The limit is the rate of a large matrix product by the fastest way that this machine has, see
studies/meters.py. Columns: other, the share of a step outside forward, backward and optimizers;
sample, one picture and one step of the default sampler, guided (first stages: encode and decode);
GiB, peak of the process, on cuda of the device."""
import dataclasses

import data
from cli import flag, one_line, parse, resolve_device
from models import FAMILIES, find_model, make_task
from studies.meters import measure, overfit
from train import read_flags

DEFAULT = ("DiT-128x4/2", "udit-tiny", "unet-tiny", "vq-tiny", "tiny-ae", "vq-vae")


@dataclasses.dataclass
class Options:
    """what to measure"""
    models: tuple = flag(None, "names of models, see train.py (default: one of each kind)")
    steps: int = flag(None, "steps to time (default: 10), or to --overfit (200)", "[1, inf)")
    batch_size: int = flag(None, "pictures per step (default: as in training)", "[1, 1e9]")
    image_size: int = flag(None, "side of the pictures (default: as in training)", "[1, 65536]")
    overfit: bool = flag(None, "train on one batch: its loss must fall below 5 %%")
    device: str = flag("auto", "where to run", "", ["auto", "cpu", "cuda", "mps"])
    compile: str = flag(None, "torch.compile (default: auto, on cuda)", "", ["auto", "on", "off"])
    proof: str = flag(None, "folder for the proof; on a CPU tiny",
                      needs="!models !steps !batch_size !image_size !compile !overfit")


def run_of(model, options, *flags):
    """(config, task, data set) of a model as train.py trains it, on an untrained first stage."""
    world = "scenes" if FAMILIES[find_model(model)[0]].captions else "shapes"
    given = [f"--{name}={value}" for name in ("batch_size", "image_size", "device", "compile")
             if (value := getattr(options, name))]
    config, settings = read_flags(["--model", model, "--data", world, *flags, *given])
    config.device = resolve_device(config.device)
    dataset = data.load(config.data, config.image_size, count=max(512, config.batch_size))
    return config, make_task(config, settings, dataset), dataset


@one_line
def main(argv):
    """The command. --overfit exits with 1 if a model did not learn its batch."""
    (options,), failed = parse(argv, __doc__, Options), 0
    if options.proof:
        from studies.gpu_proof import from_bench    # not at the top: it imports this file
        return from_bench(options)
    options.steps = options.steps or (200 if options.overfit else 10)
    models = options.models or DEFAULT
    for model in models:                    # what is wrong with the last is said before the first
        run_of(model, options)
    for model in models:
        if options.overfit:
            constant = "--warmup", "0", "--lr-decay", "constant"
            first, last = overfit(*run_of(model, options, *constant), options.steps)
            failed += not (learned := last < 0.05 * first)              # False for nan too
            print(f"{model}: loss {first:.4f} -> {last:.4f} ({last / first:.1%}), "
                  f"{'ok' if learned else 'NOT ok'}")
            continue
        row, rates = measure(*run_of(model, options), options.steps)
        if model == models[0]:
            print("limit in TFLOP/s: " + ", ".join(f"{w} {rate:.3g}" for w, rate in rates.items()))
            print(f"{'model':14}" + "".join(f"{name:>12}" for name in row))
        print(f"{model:14}" + "".join(f"{value:12.3g}" for value in row.values()))
    raise SystemExit(int(failed > 0))


if __name__ == "__main__":
    main()
