"""Tables and a plot from a folder of runs: `python -m domainbed_ext.collect_results --input_dir DIR`.

Prints DomainBed's tables and one of generalisation, and writes them as text, Markdown, CSV and LaTeX.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from domainbed_ext import plots, tables
from domainbed_ext.errors import CommandLine, exit_cleanly
from domainbed_ext.model_selection import SELECTION_METHODS, method
from domainbed_ext.records import load_records, not_writable, write_atomically
from domainbed_ext.scores import Results

# Wider than any table: what is piped or written to a file must be neither wrapped nor cut off.
UNLIMITED_WIDTH = 10_000

DESCRIPTION = "Prints the result tables of a folder of runs and writes them, with a plot, to files."
EXAMPLE = """\
example:
  python -m domainbed_ext.collect_results --input_dir runs/pacs --selection training-domain oracle

writes to <output_dir>:
  results.txt   results.md   results.tex   the tables
  results.csv    every figure: a row per data set, algorithm, selection, metric and environment
  selected.csv   where each figure comes from: run, step and hyperparameters
  plot.png   plot.svg   in-domain against out-of-domain accuracy
"""


def collect(
    input_dir: Path | str,
    output_dir: Path | str | None = None,
    selections: Sequence[str] | None = None,
    unfinished: bool = False,
    console: Console | None = None,
) -> list[Path]:
    """Prints the tables of a folder of runs, writes them to files, and prints the files' paths.

    Args:
        input_dir: the folder that holds the runs' folders.
        output_dir: where the files go; by default `input_dir/tables`.
        selections: names of selection methods; by default all, leave-one-domain-out only where there are runs
            for it.
        unfinished: whether runs that are not done count too.
        console: where to print; by default standard output.

    Returns:
        The paths of the files written.

    Raises:
        BenchmarkError: no records, an unknown selection method, or a folder that cannot be written.
    """
    # A method named twice is one method.
    methods = list(dict.fromkeys(method(name) for name in selections)) if selections else None
    results = Results(load_records(input_dir, unfinished), methods)
    shown = tables.all_tables(results)
    console = console or _standard_output()
    tables.show(console, results, shown)
    text = io.StringIO()
    tables.show(Console(file=text, width=UNLIMITED_WIDTH), results, shown)
    figure = plots.generalisation_plot(results)
    contents = {
        "results.txt": text.getvalue().encode(),
        "results.md": tables.markdown(results, shown).encode(),
        "results.tex": tables.latex(shown).encode(),
        "results.csv": results.tidy().to_csv(index=False).encode(),
        "selected.csv": results.selected().to_csv(index=False).encode(),
        "plot.png": plots.render(figure, "png"),
        "plot.svg": plots.render(figure, "svg"),
    }
    paths = _write(Path(input_dir) / "tables" if output_dir is None else Path(output_dir), contents)
    console.print("\nwritten:", *paths, sep="\n  ", highlight=False, markup=False, soft_wrap=True)
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """The command.

    Args:
        arguments: the command line; by default the process's.
    """
    parser = CommandLine(
        prog="python -m domainbed_ext.collect_results",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input_dir", type=Path, required=True, help="the folder that holds the runs' folders")
    parser.add_argument("--output_dir", type=Path, help="where the files go (default: INPUT_DIR/tables)")
    parser.add_argument(
        "--selection",
        nargs="+",
        metavar="NAME",
        help=f"model selection methods, of {', '.join(SELECTION_METHODS)} (default: all, the "
        "second only where there are runs with two test environments, which it needs)",
    )
    parser.add_argument("--unfinished", action="store_true", help="count runs that are not done too")
    parser.add_argument("--latex", action="store_true", help="print the tables as a LaTeX document instead")
    args = parser.parse_args(arguments)
    console = Console(quiet=True) if args.latex else None
    paths = collect(args.input_dir, args.output_dir, args.selection, args.unfinished, console)
    if args.latex:
        print(next(path for path in paths if path.suffix == ".tex").read_text(), end="")
        # Not on standard output, which is the document.
        print("written:", *paths, sep="\n  ", file=sys.stderr)


def _standard_output() -> Console:
    """The terminal at its own width, anything else as wide as it takes."""
    console = Console()
    return console if console.is_terminal else Console(width=UNLIMITED_WIDTH)


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
    exit_cleanly(main)
