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

HERE = pathlib.Path(__file__).parent
HEAD = """# Claims of the papers, in miniature

Written by `python -m studies.report` from the tables in `studies/results`; do not edit by hand.

Numbers are means over seeds ± the standard error of the mean. A difference is paired: mean of the
differences ± standard error, and t = mean / error; it is bold where the t-test gives p < 0.05, as
one comparison in twenty is by chance alone. With three seeds this needs |t| > 4.3. CPU seconds are
of one thread of a shared 2-core machine, and scatter by a tenth and more. Every study can be
stopped and goes on with the same command.
All studies train with `train.make_step`: seed k is the run of `train.py --seed k`.
"""
STUDIES = ("default_run", "dit_conditioning", "dit_scaling", "udit_ablation", "udit_speed",
           "vq_base", "vq_parts", "vq_chain", "vq_autoregressive", "vq_speed", "scenes_base",
           "adapter_sweep", "custom_concepts", "custom_merge", "merge_speed", "speed", "gpu_proof")
FIGURES = {"vq_chain": "vq_mask"}                       # where study and figure differ in name


# --------------------------------------------------------------------------------------------------
# the document

def section(name):
    """One study as text, "" if it has no results."""
    module = HERE / f"{name}.py"
    body = importlib.import_module(f"studies.{name}").report()
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
    common.parser(__doc__, ()).parse_args(argv)
    (HERE / "README.md").write_text(document())
    print(f"wrote {HERE / 'README.md'}")


if __name__ == "__main__":
    main()
