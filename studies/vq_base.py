"""Text to image on tokens: what the shipped model draws, and what its tokens can show

Question: does VQ-Diffusion draw what a caption names, also where it names two objects? And do its
tokens show it: are real pictures still read right after the VQ-VAE? Here: a VQ-VAE of 1,024 codes
for cells of 4x4 pixels, 4,000 steps of 32, then vq-tiny on the 8x8 tokens, 6,000 steps of 32 and
then on to 14,000, with six shape-colour pairs kept out of training; guidance 3, 25 calls, judged by
the exact reader: 300 test captions of one object and 300 of two. The model of seed 0 is written to
assets/vq-scenes.pt. An hour and a quarter of CPU a seed; this study and the others of tokens use a
GPU if there is one (column `device`).

    python -m studies.vq_base --seeds 1     # the shipped model
    python -m studies.vq_base               # three seeds, which studies.vq_autoregressive reads
"""
import pathlib

import torch

import data
import sample
import worlds
from cli import one_line, resolve_device
from evaluate import prompt_accuracy
from pretrained import load_first_stage
from studies.common import Table, markdown, parser, run, shown
from studies.scenes_base import trained

OUT, ASSET = pathlib.Path("out/studies/scenes-vq"), "assets/vq-scenes.pt"
STEPS, BATCH, DEVICE = (6000, 14000), 32, resolve_device("auto")
ON = ("--device", DEVICE, "--precision", "float32", "--compile", "off")     # as on a CPU
FIRST = ["--model", "vq-vae", "--codes", "1024", "--steps", "4000"]
BASE = ["--model", "vq-tiny", "--batch-size", str(BATCH), "--ema", "0.998"]
TRUNCATIONS = (1.0, 0.86)
TABLE = Table("vq_base", ["what", "seed"])
AXES = ("shape", "color", "relation", "all", "legible")


def first_stage():
    """The VQ-VAE that all models of the VQ studies share, trained once -> its checkpoint."""
    return trained(FIRST, OUT / "first_stage", ON)


def base(seed):
    """(task, averaged model) of the full run with this seed, trained if it is not there yet. A run
    of STEPS[0] steps goes on to STEPS[1]: its learning rate rises once more, and falls again."""
    flags = [*BASE, "--first-stage", first_stage(), "--seed", str(seed)]
    for last in STEPS:
        path = trained([*flags, "--steps", str(last)], OUT / f"seed-{seed}", ON)
    return sample.load(path, DEVICE)


def captions_of(one=300, two=300):
    """Test captions: so many of one object, then so many of two."""
    said = [[], []]
    for caption in data.load("scenes", split="test", count=2000).captions:
        said["relation" in worlds.parse_caption(caption)].append(caption)
    return said[0][:one] + said[1][:two]


def accuracy(task, model, captions, seed=0, **options):
    """{axis: rate} of pictures sampled for captions, and the device; "two" and "one" are `all` of
    two and of one object, "apart" is `all` of captions that name a pair that was held out."""
    ids = task.tokenizer(captions).to(DEVICE)
    return {"device": DEVICE,
            **rates_of(sample.sample_all(task, model, ids, seed, **options)[1], captions)}


def rates_of(pictures, captions):
    """The same of given pictures."""
    rates = {axis: rate for axis, (rate, count) in prompt_accuracy(pictures, captions).items()
             if count}
    names = {"two": "two objects: all", "one": "one object: all", "apart": "held-out pair: all"}
    return {"captions": len(captions), **{axis: rates.get(axis, "") for axis in AXES},
            **{short: rates.get(name, "") for short, name in names.items()}}


def through_tokens(count=1000):
    """The columns of `accuracy` for real test pictures that went through the VQ-VAE."""
    world, stage = data.load("scenes", split="test", count=count), load_first_stage(first_stage())
    with torch.no_grad():
        pictures = [stage.decode(stage.encode(data.to_float(some))).clamp(-1, 1)
                    for some in world.images.split(100)]
    return rates_of(data.to_uint8(torch.cat(pictures)), world.captions)


def run_cell(cell):
    """The rows of one cell: the tokens, or the model of a seed with each truncation."""
    if cell["what"] == "tokens":
        return [{**cell, "truncation": "", "device": "cpu", **through_tokens()}]
    task, model = base(cell["seed"])
    return [{**cell, "truncation": r, **accuracy(task, model, captions_of(), truncation=r)}
            for r in TRUNCATIONS]


def export():
    """Seed 0 -> the asset, in half precision, with its command and scores."""
    path = OUT / "seed-0" / "ckpt.pt"
    found = [f"{name} {100 * TABLE.column(key, what='model', seed=0, truncation=r)[0]:.1f} %"
             for key, name, r in (("one", "one object", 0.86), ("two", "two objects", 0.86),
                                  ("apart", "held-out pairs", 0.86), ("two", "uncut", 1))]
    sample.export(path, ASSET, "python -m studies.vq_base; of 600 test captions at guidance 3, "
                  f"truncation 0.86, 25 calls, all right: {', '.join(found)} (two objects)")
    print(f"{ASSET}: {pathlib.Path(ASSET).stat().st_size / 1e6:.1f} MB")


def report():
    """Rates of the tokens and of the model."""
    columns, lines = ("one", "two", "apart", *AXES), []
    for what, r in (("tokens", ""), *(("model", r) for r in TRUNCATIONS)):
        if TABLE.column("captions", what=what, truncation=r):
            lines.append([what, r, len(TABLE.column("captions", what=what, truncation=r)),
                          *(shown(TABLE.column(c, what=what, truncation=r), 1, 100)
                            for c in columns)])
    heads = ["one object", "two objects", "held-out pairs", *AXES]
    return "" if not lines else (
        "Per cent right; the first three columns: everything that the caption names.\n\n"
        + markdown(["", "truncation", "seeds", *heads], lines))


@one_line
def main(argv):
    """Command line of the study."""
    args = parser(__doc__).parse_args(argv)
    cells = [{"what": "tokens", "seed": 0}, *({"what": "model", "seed": seed}
                                              for seed in range(args.seeds))]
    run(args, TABLE, cells, run_cell)
    if not args.summary and {"what": "model", "seed": 0} in TABLE:
        export()
    print(report())


if __name__ == "__main__":
    main()
