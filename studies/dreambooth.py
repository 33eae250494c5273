"""Two real subjects, DreamBooth's photographs of a dog and a cat, on a base of CIFAR-10's alone.

Nothing is measured: the base is small, and the pictures have 32 x 32 pixels. But one can see what
is learned of the subject (colours and ground, not the animal), whether other dogs and cats stay
what they were (they do), and what is left of two subjects in a merged model (of both as much as
of each alone: colours and ground).
Its dogs and cats get captions, "a photo of a dog"; every second one says how light or how warm the
photograph is, "a dark photo of a dog", which can then be asked of a subject whose photographs do
not show it. The base takes about forty minutes of one core, a subject about a minute.

    python -m studies.dreambooth --cifar folder:PATH --subjects PATH    # -> results/dreambooth.png

--cifar: folder:PATH of CIFAR-10, a sub-folder per class, or cifar10; --subjects: the folder that
holds dog6 and cat2 of github.com/google/dreambooth.
"""
import json
import pathlib

import torch
from matplotlib.figure import Figure
from PIL import Image

import custom_diffusion
import data
import sample
import train
from checkpoint import load_checkpoint
from cli import one_line
from studies.common import RESULTS, parser

OUT = pathlib.Path("out/studies/dreambooth")
SUBJECTS = {"dog6": "dog", "cat2": "cat"}
TONES = (("dark", "bright"), ("cold", "warm"))
BASE = ["--model", "unet-tiny", "--latent-channels", "12", "--latent-noise", "0.1",
        "--first-stage", "new", "--first-stage-steps", "1500", "--flow-shift", "1",
        "--steps", "4000", "--ema", "0.999"]
LEARN = ["--steps", "400"]
METHODS = {"K/V and word": [], "all weights": ["--part", "all", "--lr", "5e-4"]}


def captioned(name):
    """The dogs and cats of CIFAR-10 as a folder of pictures with captions -> folder:PATH."""
    folder = OUT / "captioned"
    if not (folder / "metadata.jsonl").is_file():
        photos = data.load(name)
        labels = [photos.class_names.index(category) for category in SUBJECTS.values()]
        chosen = torch.isin(photos.labels, torch.tensor(labels))
        images, labels = photos.images[chosen], photos.labels[chosen]
        folder.mkdir(parents=True, exist_ok=True)
        mean = images.float().mean((2, 3))                                      # (N, 3)
        tones = torch.stack([mean.mean(1), mean[:, 0] - mean[:, 2]])          # (2, N) light, warmth
        low, high = tones.quantile(torch.tensor([1 / 3, 2 / 3]), dim=1)         # (2,) each
        lines = []
        for i, (picture, label) in enumerate(zip(images, labels.tolist())):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
            which = i // 2 % 2                                  # light and warmth in turn
            tone = int(tones[which, i] > high[which]) - int(tones[which, i] < low[which])
            word = TONES[which][tone > 0] + " " if i % 2 and tone else ""
            text = f"a {word}photo of a {photos.class_names[label]}"
            lines.append(json.dumps({"file_name": f"{i}.png", "text": text}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines))
    return f"folder:{folder}"


def photographs(folder):
    """The pictures of a subject. Raises ValueError if there is none."""
    files = sorted([*folder.glob("*.png"), *folder.glob("*.jpg")])
    if not files:
        raise ValueError(f"--subjects: there is no .png or .jpg in {folder}")
    return files


def subject(folder, category):
    """A subject's photographs with captions -> folder:PATH."""
    mine, text, files = OUT / folder.name, f"a photo of a {category}", photographs(folder)
    mine.mkdir(parents=True, exist_ok=True)
    for path in files:
        (mine / path.name).unlink(missing_ok=True)
        (mine / path.name).symlink_to(path.resolve())
    lines = [json.dumps({"file_name": path.name, "text": text}) + "\n" for path in files]
    (mine / "metadata.jsonl").write_text("".join(lines))
    return f"folder:{mine}"


def run(command, name, *flags):
    """A run in OUT/name, which goes on where it was stopped -> its folder."""
    out = OUT / name
    state = load_checkpoint(out / "ckpt.pt") if (out / "ckpt.pt").is_file() else None
    if state is None or state["step"] < state["config"]["steps"]:
        begun = state is not None or (out / "first_stage" / "ckpt.pt").is_file()
        command([*flags, "--out", str(out), *(["--resume"] if begun else [])])
    return out


def learn(flags):
    custom_diffusion.main(["learn", *flags])


def sampled(base, file, prompts):
    """Six pictures of each prompt by the base, with the concept in `file` -> {prompt: pictures}."""
    task, model = sample.load(base)
    if file:
        sample.add_concept(str(file), task)
    return {prompt: sample.sample_all(task, model, task.tokenizer([prompt] * 6), seed=0)[1]
            for prompt in prompts}


def show(columns):
    """columns: {subject: {line of text: pictures}} -> studies/results/dreambooth.png."""
    fig = Figure(figsize=(12.5, 6), dpi=80)
    for axes, (name, lines) in zip(fig.subplots(1, len(columns)), columns.items()):
        blank = torch.full((6, *next(iter(lines.values())).shape[1:]), 255, dtype=torch.uint8)
        rows = [torch.cat([pictures[:6], blank])[:6] for pictures in lines.values()]
        grid = data.make_grid(torch.cat(rows), nrow=6, scale=1)
        axes.imshow(grid, interpolation="nearest")
        places = [len(grid) * (k + 0.5) / len(rows) for k in range(len(rows))]
        axes.set_yticks(places, list(lines), fontsize=8)
        axes.set(xticks=(), title=name)
    fig.tight_layout()
    fig.savefig(RESULTS / "dreambooth.png")


@one_line
def main(argv):
    """Command line of the study."""
    p = parser(__doc__, ["threads"])
    p.add_argument("--cifar", default="cifar10", help="cifar10, or folder:PATH of its classes")
    p.add_argument("--subjects", default="dreambooth128", help="folder with dog6 and cat2")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    folders = {name: pathlib.Path(args.subjects) / name for name in SUBJECTS}
    for folder in folders.values():
        photographs(folder)                     # raises, before a folder is made
    classes = captioned(args.cifar)
    concepts = {name: subject(folders[name], category) for name, category in SUBJECTS.items()}
    out, files = run(train.main, "base", "--data", classes, *BASE), {}
    base = str(out / "ckpt.pt")
    for name, category in SUBJECTS.items():
        given = ["--base", base, "--concept", concepts[name],
                 "--category", category, *LEARN]
        for method, flags in METHODS.items():
            out = run(learn, f"{name}-{method.replace('/', '')}", *given, *flags)
            files[name, method] = out / "concept.pt"
    merged = OUT / "merged.pt"
    merged.unlink(missing_ok=True)
    custom_diffusion.main(["merge", *(str(files[name, "K/V and word"]) for name in SUBJECTS),
                           "--base", base, "--out", str(merged)])
    columns = {}
    for k, (name, category) in enumerate(SUBJECTS.items(), 1):
        photos = data.load(f"folder:{OUT / name}").images
        bare, new = f"a photo of a {category}", f"a photo of a <new1> {category}"
        lines = {"photographs": photos, f"base\n{bare}": sampled(base, None, [bare])[bare]}
        for method in METHODS:
            asked = [new, new.replace("a photo", "a dark photo"), bare]
            pictures = sampled(base, files[name, method], asked)
            lines |= {f"{method}\n{prompt}": x for prompt, x in pictures.items()}
        both = sampled(base, merged, [new.replace("<new1>", f"<new{k}>"), bare])
        columns[name] = lines | {f"merged\n{prompt}": x for prompt, x in both.items()}
    show(columns)


if __name__ == "__main__":
    main()
