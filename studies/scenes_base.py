"""The base of the personalising studies: what it draws, and how it varies

Question: does the text-to-image model on `scenes` draw what a caption names, and is it as various
as the world in what it leaves out, such as the part inside an object, which no caption names?
Here: a first stage of 2,000 steps with 12 latent channels, then unet-tiny, with six shape-colour
pairs kept out of training; judged by the exact reader, 25 Euler steps. The base is written to
assets/unet-scenes.pt after its text states were centred, which changes no picture. Variety: the
total variation, 0 = alike, 1 = disjoint, between 480 pictures of "a circle" and all circles that
stand alone in the training pictures; beside it that of 480 real ones, which is chance. About 50
CPU-minutes.

    python -m studies.scenes_base
"""
import pathlib

import torch

import data
import sample
import worlds
from checkpoint import load_checkpoint, save_checkpoint
from cli import one_line
from evaluate import prompt_accuracy, read_shapes
from models import load_first_stage, task_from
from studies.common import Table, markdown, parser
from train import main as train_main
from unet import TransformerBlock

OUT, ASSET = pathlib.Path("out/studies/scenes-base"), "assets/unet-scenes.pt"
FIRST = ["--model", "tiny-ae", "--latent-channels", "12", "--latent-noise", "0.2"]
FIRST += ["--steps", "2000"]
BASE = ["--model", "unet-tiny", "--steps", "4500", "--ema", "0.998"]
TABLE = Table("scenes_base", ["what", "guidance", "measure"])
SILENT = ("color", "size", "place", "background", "part", "part_color")


def trained(flags, out, on=("--device", "cpu")):
    """A run of train.py, or what is left of it, to its last step or further -> its checkpoint."""
    path, last = out / "ckpt.pt", int(flags[flags.index("--steps") + 1])
    if not (path.is_file() and load_checkpoint(path)["step"] >= last):
        train_main([*flags, "--data", "scenes", "--hold-out", *on, "--sample-every", "1500",
                    "--out", str(out), *(["--resume"] if path.is_file() else [])])
    return str(path)


@torch.no_grad()
def centre(task):
    """Take the mean state mu of the training captions' words out of the text encoder, and give each
    cross-attention what it did: W_k mu is the same for all rows, so the softmax does not see it,
    and W_v mu is added to the output, whose bias takes it up."""
    captions = data.load("scenes", count=2000, hold_out=True).captions
    states, words = states_of(task, captions)
    mu = states[words].mean(0)                                                          # (D,)
    task.model.text.text_model.final_layer_norm.bias -= mu
    for block in task.model.denoiser.modules():
        if isinstance(block, TransformerBlock):
            out = block.attn2.to_out[0]
            out.bias += out.weight @ (block.attn2.to_v.weight @ mu)


@torch.no_grad()
def states_of(task, captions):
    """States (N, L, D) of captions, and which of them are words: no start, end or padding."""
    ids = task.tokenizer(captions)
    return task.model.text(ids), ids > task.tokenizer.END


def first_stage(path):
    """PSNR in dB over the pixels of parts, of 1,000 test pictures."""
    plan, stage = worlds.plan_world("scenes", "test", 1000), load_first_stage(path)
    x = data.to_float(worlds.draw_scene(plan))
    with torch.no_grad():
        error = (stage.decode(stage.encode(x)).clamp(-1, 1) - x).square().mean(1)       # (N, H, W)
    cy = plan["cy"] + worlds.PART_DROP[plan["shape"]] * plan["r"]                       # (N, 2)
    for name, rows in (("large", plan["r"] > 7), ("small", plan["r"] < 7), ("all", cy > 0)):
        part = torch.where(rows, plan["part"], -1)
        mask = sum(worlds.shape_coverage(part[:, k], plan["cx"][:, k], cy[:, k],
                                         plan["part_r"][:, k]) for k in range(2))       # (N, H, W)
        db = 10 * torch.log10(4 * mask.sum() / (mask * error).sum())
        yield f"dB in parts of {name} objects", db.item(), (part >= 0).sum().item()
    yield "dB in the whole picture", 10 * torch.log10(4 / error.mean()).item(), 1000


def drawn(task, captions, guidance):
    """A picture of each caption, uint8."""
    return sample.sample_all(task, task.model, task.tokenizer(captions), cfg_scale=guidance,
                             steps=25)[1]


def named(task, guidance):
    """Rates of what captions name: 500 test captions of one object, 300 of two."""
    two = [[], []]
    for caption in data.load("scenes", split="test").captions:
        two["relation" in worlds.parse_caption(caption)].append(caption)
    asked = two[0][:500] + two[1][:300]
    for axis, (rate, count) in prompt_accuracy(drawn(task, asked, guidance), asked).items():
        yield axis, rate, count


def variety(task, guidance, count=480):
    """Total variation between pictures of "a circle" and the world's; guidance 0: of real ones."""
    plan = worlds.plan_world("scenes", count=200_000, hold_out=True)
    alone = (plan["shape"][:, 0] == 0) & (plan["shape"][:, 1] < 0)
    pick = lambda table, key: table[key] if table[key].dim() == 1 else table[key][:, 0]
    world = {key: pick(plan, key)[alone] for key in SILENT}
    if guidance:
        read = read_shapes(drawn(task, ["a circle"] * count, guidance))
        circles = (read["shape"][:, 0] == 0) & (read["count"] == 1)
        yield "one circle", circles.float().mean().item(), count
        seen = {key: pick(read, key)[circles] for key in SILENT}
    else:
        seen = {key: world[key][:count] for key in SILENT}
    for key in SILENT:
        a, b = (torch.bincount(v + 1, minlength=9) / len(v) for v in (seen[key], world[key]))
        yield f"total variation of {key}", (a - b).abs().sum().item() / 2, len(seen[key])
    yield "share with a part", (seen["part"] >= 0).float().mean().item(), len(seen["part"])


def states(task):
    """How alike the text states of words are, and the condition of C_reg^T C_reg, but for its
    flattest direction: after a LayerNorm the rows lie in a plane, which centring moves to 0."""
    rows, words = states_of(task, data.load("scenes", count=1000, hold_out=True).captions)
    table = torch.unique(rows[words], dim=0)[:3000].double()
    for name, x in (("mean cosine", table), ("centred cosine", table - table.mean(0))):
        unit = torch.nn.functional.normalize(x, dim=1)
        total = (unit @ unit.T).sum().item() - len(unit)
        yield name, total / (len(unit) * (len(unit) - 1)), len(unit)
    sizes = torch.linalg.eigvalsh(table.T @ table)
    yield "condition of C_reg^T C_reg", (sizes[-1] / sizes[1]).item(), len(table)


def run_cell(what, guidance, first, task):
    """The rows of one cell."""
    made = (first_stage(first) if what == "first stage" else states(task) if what[:4] == "text"
            else {"named": named, "variety": variety}[what](task, guidance))
    return [{"what": what, "guidance": guidance, "measure": measure, "value": value, "of": count}
            for measure, value, count in made]


CELLS = [("first stage", 0), ("text states", 0), ("text states, centred", 0), ("named", 3),
         ("variety", 0), ("variety", 1), ("variety", 3)]


def report():
    """One table a question."""
    text, rows = "", TABLE.rows()
    for what in dict.fromkeys(row["what"] for row in rows):
        value = {(row["measure"], row["guidance"]): f"{row['value']:.4g}"
                 for row in rows if row["what"] == what}
        levels = sorted({level for _, level in value})
        lines = [[measure, *(value.get((measure, level), "") for level in levels)]
                 for measure in dict.fromkeys(measure for measure, _ in value)]
        heads = ["real" if what == "variety" and not k else f"guidance {k}" for k in levels]
        text += f"\n**{what.capitalize()}**\n\n" + markdown(["", *heads], lines)
    return text


@one_line
def main(argv):
    """Command line of the study."""
    args = parser(__doc__, ("summary", "threads")).parse_args(argv)
    if not args.summary:
        torch.set_num_threads(args.threads)
        first = trained(FIRST, OUT / "first_stage")
        path = trained([*BASE, "--first-stage", first], OUT / "base")
        task, state = task_from(load_checkpoint(path), path), load_checkpoint(path)
        task.model.eval()
        for what, guidance in CELLS:
            if what.endswith("centred"):
                centre(task)
            if {"what": what, "guidance": guidance} not in Table(TABLE.name, TABLE.keys[:2]):
                TABLE.add(*run_cell(what, guidance, first, task))
        state["config"]["out"], state["ema"] = "", task.model.state_dict()
        state["settings"] |= {"first_stage": "new", "latent_channels": 12,
                              "first_stage_steps": 2000}
        save_checkpoint(OUT / "centred.pt", state)
        named = TABLE.column("value", what="named", guidance=3, measure="one object: all")[0]
        sample.export(OUT / "centred.pt", ASSET, "python -m studies.scenes_base; of 500 test "
                      f"captions of one object at guidance 3 all right: {100 * named:.1f} %")
    print(report())


if __name__ == "__main__":
    main()
