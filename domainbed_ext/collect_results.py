"""Tables, plots and an HTML page from a folder of runs: `python -m domainbed_ext.collect_results --input_dir DIR`.

Prints DomainBed's tables, a table of generalisation gaps and the tables of single-source runs, and writes them as text,
Markdown, CSV, LaTeX and one HTML page.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from domainbed_ext.algorithms.names import find_among
from domainbed_ext.analyse import stored
from domainbed_ext.errors import BenchmarkError, not_writable
from domainbed_ext.model_selection import SELECTION_METHODS, get_selection_method
from domainbed_ext.models.adapted_shapes import adapted_shapes
from domainbed_ext.report.page import page
from domainbed_ext.report.paper import claims
from domainbed_ext.report.paper import tables as paper_tables
from domainbed_ext.report.plots import plots
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.table import Table, print_tables, render_latex, render_markdown
from domainbed_ext.runs import imports, mixture
from domainbed_ext.runs.folder import load_records
from domainbed_ext.system import option_values
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command
from domainbed_ext.system.console import output, plain
from domainbed_ext.system.files import write_atomically

DESCRIPTION = "Prints the result tables of a folder of runs and writes them, with plots and an HTML page, to files."
EXAMPLE = """\
example:
  python -m domainbed_ext.collect_results --input_dir runs/pacs --selection training-domain oracle

writes to OUTPUT_DIR:
  results.txt   results.md   results.tex   the tables
  results.csv    every number: a row per data set, algorithm, selection method, metric and environment
  selected.csv   the run, step and hyperparameters behind each number
  index.html     one page of all results: sortable tables, plots, and the runs behind each number
  plot.png   plot.svg   in-domain against out-of-domain accuracy
  gaps.svg   parameters.svg   training.svg   the other plots, if the runs have the data for them
  frontier.csv   frontier.svg   after domainbed_ext.frontier: accuracy along the strength of the update
  differences.csv   differences.svg   with --reference: each method's paired difference to it
  NAME.svg       after domainbed_ext.analyse NAME: similarity, lemmas, inits or energy
  paper.csv      with --paper: the numbers of these runs and of Zhu et al. 2024
"""


def collect(
    input_dir: Path | str,
    output_dir: Path | str | None = None,
    selections: Sequence[str] | None = None,
    unfinished: bool = False,
    console: Console | None = None,
    paper: bool = False,
    unreadable: list[str] | None = None,
    reference: str | None = None,
) -> list[Path]:
    """Prints the tables of a folder of runs, writes them to files, and prints the files' paths.

    A run whose records cannot be read is left out with a warning.

    Args:
        input_dir: Folder that holds the runs' folders.
        output_dir: Folder of the files; None for `input_dir/tables`.
        selections: Names of selection methods; None for all, leave-one-domain-out only where there are runs for it.
        unfinished: Whether unfinished runs count too.
        console: Console to print on; None for standard output.
        paper: Whether to compare single-source runs with the tables and claims of Zhu et al. 2024.
        unreadable: List that takes a sentence for each run that is left out.
        reference: Name of the method that a table of paired differences compares all others with; None for no table.

    Returns:
        Paths of the files written.

    Raises:
        BenchmarkError: No records, runs of one data set's name on different data, an unknown selection method, no
            single-source runs for `paper`, no run of the `reference`, or a folder that cannot be written.
    """
    # A method named twice is one method.
    methods = list(dict.fromkeys(map(get_selection_method, selections))) if selections else None
    left_out = [] if unreadable is None else unreadable
    records = load_records(input_dir, unfinished, left_out)
    for sentence in left_out:
        print(f"warning: left out: {sentence}", file=sys.stderr)
    missing = {name: words for record in records for name, words in imports.find_missing(record).items()}
    for name, words in missing.items():
        print(f"warning: {name} is shown without its label and colour: add --import {words}", file=sys.stderr)
    for warning in mixture.check(records, input_dir):
        print(f"warning: {warning}", file=sys.stderr)
    results = Results(records, methods, adapted_shapes)
    extra: dict[str, bytes] = {}
    if reference is not None:
        reference = _find_reference(reference, results)
        extra["differences.csv"] = _text(results.differences(reference).to_csv(index=False))
    if not (frontier := results.frontier()).empty:
        extra["frontier.csv"] = _text(frontier.to_csv(index=False))
    tables = results.tables(reference)
    if paper:
        compared, of_paper = _beside_the_paper(results)
        tables += compared
        extra |= of_paper
    analyses = stored.read_all(Path(input_dir), results.trained_runs)
    tables += [table for each in analyses for table in each.tables()]
    text = io.StringIO()
    print_tables(plain(text), tables, results.headline, results.duplicates())
    figures = plots.draw_plots(results, reference)
    figures |= {each.analysis.name: figure for each in analyses if (figure := each.figure()) is not None}
    titles = page.PICTURES | {each.analysis.name: each.analysis.title for each in analyses}
    contents = {
        "results.txt": _text(text.getvalue()),
        "results.md": _text(render_markdown(tables, results.duplicates())),
        "results.tex": _text(render_latex(tables)),
        "results.csv": _text(results.tidy().to_csv(index=False)),
        "selected.csv": _text(results.selected().to_csv(index=False)),
        "index.html": _text(page.render_page(results, tables, figures, titles)),
        "plot.png": plots.render(figures["plot"], "png"),
        **{f"{name}.svg": plots.render(figure, "svg") for name, figure in figures.items()},
        **extra,
    }
    # Written before anything is printed: no console costs results.
    paths = _write(Path(input_dir) / "tables" if output_dir is None else Path(output_dir), contents)
    console = console or output()
    print_tables(console, tables, results.headline, results.duplicates())
    console.print("\nwritten:", *paths, sep="\n  ", highlight=False, markup=False, soft_wrap=True)
    return paths


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.collect_results",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input_dir", type=option_values.path, required=True, help="folder that holds the runs' folders"
    )
    parser.add_argument("--output_dir", type=option_values.path, help="folder of the files (default: INPUT_DIR/tables)")
    parser.add_argument(
        "--selection",
        nargs="+",
        metavar="NAME",
        help=f"model selection methods: {', '.join(SELECTION_METHODS)} (default: all; "
        "leave-one-domain-out only if there are runs with two test environments, which it needs)",
    )
    imports.add_option(parser)
    parser.add_argument(
        "--unfinished",
        action="store_true",
        help="include unfinished runs; those with --evaluate lean have no test accuracy yet",
    )
    parser.add_argument(
        "--reference",
        metavar="NAME",
        help="add a table of every method's difference to this one, paired by trial, with 95 %% intervals (none)",
    )
    parser.add_argument(
        "--paper",
        action="store_true",
        help="compare single-source runs with the tables and claims of Zhu et al. 2024",
    )
    parser.add_argument("--latex", action="store_true", help="print the tables as a LaTeX document")
    return parser


@as_command(START_AGAIN)
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: Arguments of the command line; None for the process's.

    Returns:
        Exit code: 1 if runs were left out of what was written.
    """
    args = make_parser().parse_args(arguments)
    imports.load(args.imports)
    console = Console(quiet=True) if args.latex else None
    left_out: list[str] = []
    paths = collect(
        args.input_dir,
        args.output_dir,
        args.selection,
        args.unfinished,
        console,
        args.paper,
        left_out,
        args.reference,
    )
    if args.latex:
        print(next(path for path in paths if path.suffix == ".tex").read_text(encoding="utf-8"), end="")
        # Not on standard output, which is the document.
        print("written:", *paths, sep="\n  ", file=sys.stderr)
    return 1 if left_out else 0


def _find_reference(name: str, results: Results) -> str:
    """Returns the id of the reference as records have it, whatever its spelling."""
    found = find_among(name, results.algorithms)
    if found is None:
        raise BenchmarkError(
            f"--reference {name}: there are no runs of it: choose one of {', '.join(results.algorithms)}"
        )
    return found


def _beside_the_paper(results: Results) -> tuple[list[Table], dict[str, bytes]]:
    """Returns the tables of `--paper`, and its file."""
    judged = claims.claims_table(results)
    if judged is None:
        raise BenchmarkError(
            "--paper compares single-source runs, and there are none: sweep with --protocol single_source"
        )
    return [*paper_tables.paper_tables(results), judged], {
        "paper.csv": _text(paper_tables.tidy(results).to_csv(index=False))
    }


def _text(document: str) -> bytes:
    """Encodes as UTF-8, whatever bytes a path in the document has."""
    return document.encode("utf-8", "replace")


def _write(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    """Writes files so that a reader sees each either as it was or complete."""
    paths = [folder / name for name in contents]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, contents.values(), strict=True):
            write_atomically(path, content)
    except OSError as error:
        raise not_writable(folder, error) from error
    return paths


if __name__ == "__main__":
    main()
