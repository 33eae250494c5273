"""What `python train.py` reaches, and what its recipe contributes

Question: how good is the default run, and what is lost when one part of its recipe is changed?
Here: the whole command with each set of flags, on one thread, first stage included; then 480
samples, 10 of each class, judged by the exact reader as `python evaluate.py` does. Right: one
object, shape and colour as asked; chance is 2 %. Legible: its outline fits the template closely.
About 150 CPU-seconds a cell.

    python -m studies.default_run
"""
import contextlib
import io
import shutil
import time

from checkpoint import load_checkpoint
from cli import one_line
from evaluate import class_accuracy, sampled
from studies.common import Table, compared, markdown, mean_se, parser, run, shown
from train import main as train_main

FLAGS = ("", "--steps 500", "--precision bfloat16", "--schedule cosine --prediction v",
         "--schedule linear", "--optimizer adamw", "--recipe paper")
ALL_SEEDS = FLAGS[:3]                                   # the others are run with seed 0 alone
TABLE = Table("default_run", ["flags", "seed"])


def run_cell(cell, out="out/studies/default_run", extra=(), samples=480):
    """The command with these flags and this seed, then the verdict on its samples -> its rows."""
    name = "-".join(cell["flags"].replace("--", "").split()) or "default"
    folder = f"{out}/{name}-{cell['seed']}"
    shutil.rmtree(folder, ignore_errors=True)           # of a cell that was stopped
    argv = [*cell["flags"].split(), "--seed", str(cell["seed"]), "--device", "cpu", "--out", folder]
    begin = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        train_main([*argv, *extra])
    seconds = time.process_time() - begin
    path = f"{folder}/ckpt.pt"
    pictures, labels, _ = sampled(path, n=samples, device="cpu")
    rates = class_accuracy(pictures, labels)
    return [{**cell, "steps": load_checkpoint(path)["step"], "cpu_s": seconds,
             "right": rates["all"][0], "legible": rates["legible"][0]}]


def report():
    """The table, and what half of the steps costs."""
    lines = []
    for flags in FLAGS:
        column = lambda key: TABLE.column(key, flags=flags)
        if column("steps"):
            lines.append([f"`python train.py {flags}`".replace(" `", "`"), len(column("seed")),
                          column("steps")[0], f"{mean_se(column('cpu_s'))[0]:.0f}",
                          shown(column("right"), 1, 100), shown(column("legible"), 1, 100)])
    if not lines:
        return ""
    text = markdown(["command", "seeds", "steps", "CPU-s", "right, %", "legible, %"], lines)
    default, *others = ({key: TABLE.by("seed", key, flags=flags) for key in ("right", "legible")}
                        for flags in ALL_SEEDS)
    for name, other in zip(("Half of the steps", "Products in bfloat16"), others):
        if min(len(default["right"]), len(other["right"])) > 1:
            text += f"\n{name} minus the default: " + ", ".join(
                f"{key} {compared(other[key], default[key], 1, 100)}" for key in default) + ".\n"
    return text


@one_line
def main(argv):
    """Command line of the study."""
    args = parser(__doc__).parse_args(argv)
    cells = [{"flags": flags, "seed": seed} for seed in range(args.seeds) for flags in FLAGS
             if seed == 0 or flags in ALL_SEEDS]
    run(args, TABLE, cells, run_cell)
    print(report())


if __name__ == "__main__":
    main()
