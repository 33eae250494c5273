"""Write studies/README.md from the tables in studies/results: every number in it is computed here.

A section is a study: its docstring (the question, the setting, the command), then what its report()
makes of its CSV, and its figure. A study without a CSV is not shown.

    python -m studies.report
"""
import ast
import importlib
import pathlib

from cli import one_line
from studies import common
from studies.common import Table, compared, markdown, notice, shown

HERE = pathlib.Path(__file__).parent
HEAD = """# Claims of the papers, in miniature

Written by `python -m studies.report` from the tables in `studies/results`; do not edit by hand.

Numbers are means over seeds ± the standard error of the mean. A difference is paired: mean of the
differences ± standard error, and t = mean / error; it is bold where the t-test gives p < 0.05, as
one comparison in twenty is by chance alone. With three seeds this needs |t| > 4.3. CPU seconds are
of one thread of a shared 2-core machine, and scatter by a tenth and more. Every study can be
stopped and goes on with the same command.

**Two editions.** The tables marked "first edition" were measured when the studies had a training
step of their own, which gave the three seeds of a variant the same timesteps, noise and hidden
labels; only their weights and the order of the data differed, so the errors are too small. Now all
studies train with `train.make_step`, and seed k is the run of `train.py --seed k`. To measure
again, remove the CSV and run the command.
"""
STUDIES = ("default_run", "dit_conditioning", "dit_scaling", "udit_ablation", "udit_speed",
           "vq_chain", "vq_autoregressive", "vq_speed", "adapter_sweep", "custom_concepts",
           "merge_speed")
FIGURES = {"vq_chain": "vq_mask"}                       # where study and figure differ in name


# --------------------------------------------------------------------------------------------------
# Custom Diffusion: units are things, and pairs of things

def personal(table, unit, key, baseline, columns):
    """A table of methods, units' means ± standard error over units, and the gaps to a baseline."""
    names = list(dict.fromkeys(table.column(key)))
    by = lambda name, column: table.by(unit, column, **{key: name})
    units = len(by(baseline, columns[0]))
    text = markdown([key, *columns], [[name, *(shown(by(name, column).values())
                                               for column in columns)] for name in names])
    text += f"\nMinus {baseline}, paired ({units} units):\n\n"
    return text + markdown([key, *columns], [
        [name, *(compared(by(name, column), by(baseline, column), 2) for column in columns)]
        for name in names if name != baseline])


def custom_concepts():
    """Tables of single things, of pairs, of compressed changes, of how far layers move."""
    single, pairs = Table("custom_concepts", ["thing"]), Table("custom_pairs", ["pair"])
    small, moved = Table("custom_compression", ["thing"]), Table("custom_change", ["thing"])
    if not all(table.rows() for table in (single, pairs, small, moved)):
        return ""
    columns = ["alignment", "text", "leak", "category", "kid", "plain"]
    text = notice(single) + notice(single, (
        "Alignment compares colour and outline and hardly sees the inner part: real pictures of "
        "the thing without its part pass as hits. So `alignment`, `leak` and `both` measure "
        "whether colour and outline arrived. A new run should measure the part by itself."))
    text += "**One thing**; units are things, each the mean of its seeds\n\n" + personal(
        single, "thing", "method", "K/V and word", columns)
    text += "\n**Two things**; units are pairs\n\n" + personal(
        pairs, "pair", "how", "average", ["alignment", "text", "leak", "both", "plain"])
    ratios = sorted(set(small.column("ratio")), reverse=True)
    lines = [[ratio, *(shown(small.column(c, ratio=ratio)) for c in
                       ("kb", "alignment", "text", "leak"))] for ratio in ratios]
    text += (f"\n**Compressed**; {len(set(small.column('thing')))} things, one seed. Kept: the "
             "share of the sum of singular values of the change of keys and values\n\n"
             + markdown(["kept", "kB", "alignment", "text", "leak"], lines))
    kinds = ("cross-attention", "self-attention", "other")
    return text + ("\n**How far weights move** when all learn, ||W - W0|| / ||W0||; units are "
                   "things: " + ", ".join(
                       f"{kind} {shown(moved.by('thing', kind).values(), 4)}" for kind in kinds)
                   + ".\n")


def merge_speed():
    """Seconds of a merge at Stable Diffusion's size."""
    rows = Table("merge_speed", ["how"]).rows()
    return markdown(["how", "threads", "seconds, median", "best", "constraint missed by"],
                    [[r["how"], r["threads"], r["median_s"], r["best_s"], r["constraint"]]
                     for r in rows]) if rows else ""


# --------------------------------------------------------------------------------------------------
# the document

def section(name):
    """One study as text, "" if it has no results."""
    module = HERE / f"{name}.py"
    body = globals()[name]() if name in globals() else importlib.import_module(
        f"studies.{name}").report()
    if not body:
        return ""
    title, _, text = ast.get_docstring(ast.parse(module.read_text())).partition("\n")
    figure = FIGURES.get(name, name)
    if (common.RESULTS / f"{figure}.png").is_file():
        body += f"\n![{title}](results/{figure}.png)\n"
    return f"\n## {title.rstrip('.')}\n{text.rstrip()}\n\n{body}"


def document():
    """The whole of studies/README.md."""
    return HEAD + "".join(section(name) for name in STUDIES)


@one_line
def main(argv):
    """Write the file."""
    (HERE / "README.md").write_text(document())
    print(f"wrote {HERE / 'README.md'}")


if __name__ == "__main__":
    main()
