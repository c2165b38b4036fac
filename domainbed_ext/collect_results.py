"""Tables, plots and an HTML page from a folder of runs: `python -m domainbed_ext.collect_results --input_dir DIR`.

Prints DomainBed's tables, a table of generalisation gaps and the tables of single-source runs, and writes them as text,
Markdown, CSV, LaTeX and one HTML page.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from domainbed_ext.analyse import stored
from domainbed_ext.datasets.thumbnails import Thumbnails
from domainbed_ext.errors import BenchmarkError, warn_once
from domainbed_ext.model_selection import SELECTION_METHODS, SPLITS, Record, get_selection_method
from domainbed_ext.models.adapted_shapes import adapted_shapes
from domainbed_ext.report.difference_files import difference_files
from domainbed_ext.report.differences import Resampling
from domainbed_ext.report.files import encode, write_files
from domainbed_ext.report.page import page
from domainbed_ext.report.page.gallery import make_galleries
from domainbed_ext.report.pairs import against, find_row
from domainbed_ext.report.paper import claims
from domainbed_ext.report.paper import tables as paper_tables
from domainbed_ext.report.plots import plots
from domainbed_ext.report.plots.reliability import reliability_plot
from domainbed_ext.report.predictions.all import gather_all, make_files, make_tables
from domainbed_ext.report.predictions.tested import ImageOutputs, RunOutputs
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.latex import render_document, render_fragment
from domainbed_ext.report.tables.table import Table, print_tables, render_markdown
from domainbed_ext.runs import imports, predicted_images
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.launches import read_launches
from domainbed_ext.runs.predicted_images import PredictedImages, Use
from domainbed_ext.runs.predictions import Part, load_step
from domainbed_ext.runs.reading import read_records
from domainbed_ext.runs.run_commands import run_commands
from domainbed_ext.system import option_values
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command
from domainbed_ext.system.console import output, plain

DESCRIPTION = "Prints the result tables of a folder of runs and writes them, with plots and an HTML page, to files."
EXAMPLE = """\
example:
  python -m domainbed_ext.collect_results --input_dir runs/pacs --selection training-domain oracle

writes to OUTPUT_DIR:
  results.txt   results.md   results.tex   the tables
  results_tables.tex   the tables in LaTeX, for \\input in a paper
  results.csv    every number: a row per data set, algorithm, selection method, metric and environment
  selected.csv   the run, step and hyperparameters behind each number
  index.html     one page of all results: sortable tables, plots, and the runs behind each number
  plot.png   plot.svg   in-domain against out-of-domain accuracy; every plot is in both formats
  gaps   parameters   training   the other plots, if the runs have the data for them
  frontier.csv   frontier   after domainbed_ext.frontier: accuracy along the strength of the update
  differences.csv   .md   .tex   .json   paired differences to the best method or --reference, as of compare
  differences.svg   with --reference: the differences to it
  per_class.csv   confusion.csv   calibration.csv   reliability.svg   agreement.csv   ensembles.csv   mistakes.csv
                 what follows from the predictions that runs keep
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
    images: Use = "auto",
    pictures: bool = True,
) -> list[Path]:
    """Prints the tables of a folder of runs, writes them to files, and prints the files' paths.

    Of the tables that follow from predictions and of those of analyses only the titles are printed. A run whose records
    cannot be read is left out with a warning.

    Args:
        input_dir: Folder that holds the runs' folders.
        output_dir: Folder of the files; None for `input_dir/tables`.
        selections: Names of selection methods; None for all, leave-one-domain-out only where there are runs for it.
        unfinished: Whether unfinished runs count too.
        console: Console to print on; None for standard output.
        paper: Whether to compare single-source runs with the tables and claims of Zhu et al. 2024.
        unreadable: List that takes a sentence for each run that is left out.
        reference: Name of the method that a table of paired differences compares all others with; None for no table.
        images: Whether intervals of differences are over images too, for which runs keep predictions.
        pictures: Whether the page shows images that methods get wrong, and not only their names.

    Returns:
        Paths of the files written.

    Raises:
        BenchmarkError: No records, runs of one data set's name on different data, an unknown selection method, no
            single-source runs for `paper`, no run of the `reference`, or a folder that cannot be written.
    """
    folder = Path(input_dir) / "tables" if output_dir is None else Path(output_dir)
    # A method named twice is one method.
    methods = list(dict.fromkeys(map(get_selection_method, selections))) if selections else None
    records = read_records(input_dir, unfinished, unreadable)
    predicted = PredictedImages(input_dir, images)
    results = Results(records, methods, adapted_shapes, Resampling(predicted))
    if reference is not None:
        reference = find_row(f"--reference {reference}", reference, results.algorithms)
    predicted.load(
        record for each in results.panels for algorithm in each.algorithms for record in each.records(algorithm)
    )
    extra = difference_files(results.compare(against(reference)))
    if not (frontier := results.frontier()).empty:
        extra["frontier.csv"] = encode(frontier.to_csv(index=False))
    printed = results.tables(reference)
    gathered = gather_all(results, partial(_read_outputs, Path(input_dir)))
    analyses = stored.read_all(Path(input_dir), results.trained_runs)
    further = make_tables(gathered) + [table for each in analyses for table in each.tables()]
    for table in further:
        table.shown = "folded"
    extra |= {f"{name}.csv": encode(file.to_csv(index=False)) for name, file in make_files(gathered).items()}
    if paper:
        compared, of_paper = _beside_the_paper(results)
        printed += compared
        extra |= of_paper
    tables = printed + further
    text = io.StringIO()
    print_tables(plain(text), tables, results.headline, results.duplicates())
    figures = plots.draw_plots(results, reference)
    if (reliability := reliability_plot(gathered)) is not None:
        figures["reliability"] = reliability
    figures |= {each.analysis.name: figure for each in analyses if (figure := each.figure()) is not None}
    titles = page.PICTURES | {each.analysis.name: each.analysis.title for each in analyses}
    galleries = make_galleries(gathered, Thumbnails().make if pictures else None)
    context = page.Context(read_launches(input_dir), partial(run_commands, input_dir))
    contents = {
        "results.txt": encode(text.getvalue()),
        "results.md": encode(render_markdown(tables, results.duplicates())),
        "results.tex": encode(render_document(tables)),
        "results_tables.tex": encode(render_fragment(tables)),
        "results.csv": encode(results.tidy().to_csv(index=False)),
        "selected.csv": encode(results.selected().to_csv(index=False)),
        "index.html": encode(page.render_page(results, tables, figures, titles, galleries, context)),
        **{f"{name}.{kind}": plots.render(figure, kind) for name, figure in figures.items() for kind in plots.KINDS},
        **extra,
    }
    # Written before anything is printed: no console costs results.
    paths = write_files(folder, contents)
    console = console or output()
    print_tables(console, printed, results.headline, results.duplicates())
    if further:
        titles_only = (f"  {table.title}" for table in further)
        console.print("\nalso in the files:", *titles_only, sep="\n", highlight=False, markup=False, soft_wrap=True)
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
        help="add a table and a plot of every method's difference to this one, paired by trial, with 95 %% intervals "
        "(none)",
    )
    predicted_images.add_option(parser)
    parser.add_argument(
        "--paper",
        action="store_true",
        help="compare single-source runs with the tables and claims of Zhu et al. 2024",
    )
    parser.add_argument(
        "--no_pictures",
        action="store_true",
        help="keep images of the data set out of the page, which then only names those that methods get wrong",
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
        args.images,
        not args.no_pictures,
    )
    if args.latex:
        print(next(path for path in paths if path.suffix == ".tex").read_text(encoding="utf-8"), end="")
        # Not on standard output, which is the document.
        print("written:", *paths, sep="\n  ", file=sys.stderr)
    return 1 if left_out else 0


def _read_outputs(input_dir: Path, record: Record) -> RunOutputs | None:
    """Reads what a run predicts after the step of a record; None if it does not keep that."""
    try:
        predictions = load_step(RunFolder(input_dir / record["run"]), record["step"])
    except BenchmarkError as error:
        warn_once(f"left out of what follows from predictions: {error}")
        return None
    if predictions is None:
        return None
    return RunOutputs(predictions.classes, [_outputs(part) for part in predictions.parts.values()])


def _outputs(part: Part) -> ImageOutputs:
    splits = np.full(len(part), "in", dtype=f"<U{max(map(len, SPLITS))}")
    for split in SPLITS:
        splits[part.of_split(split).numpy()] = split
    return ImageOutputs(part.names, part.labels.numpy(), part.logits.softmax(1).numpy(), splits)


def _beside_the_paper(results: Results) -> tuple[list[Table], dict[str, bytes]]:
    """Returns the tables of `--paper`, and its file."""
    judged = claims.claims_table(results)
    if judged is None:
        raise BenchmarkError(
            "--paper compares single-source runs, and there are none: sweep with --protocol single_source"
        )
    return [*paper_tables.paper_tables(results), judged], {
        "paper.csv": encode(paper_tables.tidy(results).to_csv(index=False))
    }


if __name__ == "__main__":
    main()
