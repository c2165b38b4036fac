"""Compares methods pair by pair: differences with intervals, tests, and how many trials would show them.

python -m domainbed_ext.compare --input_dir runs/pacs --pairs BOnly:BA
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import SELECTION_METHODS, TRAINING_DOMAIN, get_selection_method
from domainbed_ext.report.difference_files import difference_files
from domainbed_ext.report.differences import Resampling
from domainbed_ext.report.files import write_files
from domainbed_ext.report.inference.bootstrap import RESAMPLES
from domainbed_ext.report.pairs import ComparedPairs, Pair, against, parse_pairs
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.differences import pairs_table
from domainbed_ext.report.tables.table import print_tables
from domainbed_ext.runs import imports, predicted_images
from domainbed_ext.runs.predicted_images import PredictedImages
from domainbed_ext.runs.reading import read_records
from domainbed_ext.system import option_values
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command
from domainbed_ext.system.commands import format_command
from domainbed_ext.system.console import output
from domainbed_ext.system.exit_codes import ExitCode

EXAMPLE = """\
example:
  python -m domainbed_ext.compare --input_dir runs/pacs --pairs LoRA-FA:LoRA LoRA-FA:LoRA-FB

Prints a table for each data set (and source): differences in in-domain and out-of-domain accuracy and in the gaps,
paired by trial and test domain, with 95 % intervals, tests, and the number of trials that would show each. Writes
it to OUTPUT_DIR as pairs.csv, pairs.md, pairs.json, pairs.tex (a document) and pairs_tables.tex (for \\input); without
--pairs, as differences.csv and so on. The page of collect_results has the differences of all pairs.
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.compare",
        description="Compares methods pair by pair: differences with 95 % intervals, t-tests with Holm's "
        "correction, sign tests, and the number of trials that would show them.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input_dir", type=option_values.path, required=True, metavar="DIR", help="folder that holds the runs' folders"
    )
    parser.add_argument("--output_dir", type=option_values.path, help="folder of the files (default: INPUT_DIR/tables)")
    parser.add_argument(
        "--pairs",
        nargs="+",
        metavar="A:B",
        help="rows of the tables to compare, A minus B (default: all against the row with the best in-domain accuracy)",
    )
    parser.add_argument(
        "--selection",
        default=TRAINING_DOMAIN.name,
        metavar="NAME",
        help=f"model selection method of leave-one-out runs: {', '.join(SELECTION_METHODS)} (%(default)s)",
    )
    predicted_images.add_option(parser)
    parser.add_argument(
        "--resamples",
        type=option_values.whole(100, 1_000_000),
        default=RESAMPLES,
        metavar="N",
        help="number of draws of images (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=option_values.seed, default=0, metavar="N", help="seed of the draws (%(default)s)"
    )
    parser.add_argument("--unfinished", action="store_true", help="include unfinished runs")
    imports.add_option(parser)
    return parser


@as_command(START_AGAIN)
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.compare`."""
    args = make_parser().parse_args(argv)
    imports.load(args.imports)
    left_out: list[str] = []
    records = read_records(args.input_dir, args.unfinished, left_out)
    images = PredictedImages(args.input_dir, args.images)
    results = Results(
        records, [get_selection_method(args.selection)], resampling=Resampling(images, args.seed, args.resamples)
    )
    compared = compare(results, args.pairs, images)
    folder = Path(args.input_dir) / "tables" if args.output_dir is None else Path(args.output_dir)
    paths = write_files(folder, difference_files(compared, "pairs" if args.pairs else "differences"))
    console = output()
    print_tables(console, map(pairs_table, compared), results.headline, results.duplicates())
    console.print("\nwritten:", *paths, sep="\n  ", highlight=False, markup=False, soft_wrap=True)
    print(f"all pairs, on the page: {format_command('collect_results')} --input_dir {args.input_dir}")
    return ExitCode.FAILED if left_out else ExitCode.DONE


def compare(results: Results, words: Sequence[str] | None, images: PredictedImages) -> list[ComparedPairs]:
    """Compares pairs of methods in each comparison that has them.

    Args:
        results: Figures of the runs.
        words: Pairs as on the command line; None for all methods against the best.
        images: Images of the runs, of which those that are needed are loaded.

    Returns:
        Differences by comparison.

    Raises:
        BenchmarkError: A pair is none, names no row, or has no trial in common; there is nothing to compare.
    """
    if words is None:
        if len(results.algorithms) < 2:
            raise BenchmarkError(f"there is nothing to compare {results.algorithms[0]} with: two rows are needed")
        pairs_of = against()
    else:
        pairs = parse_pairs(words, results.algorithms)
        for pair in pairs:
            _check_common(results, pair)
        pairs_of = lambda comparison: pairs  # noqa: E731
    for comparison in results.panels:
        wanted = dict.fromkeys(name for pair in pairs_of(comparison) for name in pair)
        images.load(record for name in wanted for record in comparison.records(name))
    if not (compared := results.compare(pairs_of)):
        raise BenchmarkError("no two rows have a trial on the same test domains in common: there is nothing to compare")
    return compared


def _check_common(results: Results, pair: Pair) -> None:
    """Refuses a pair that nothing can be said about."""
    if any(comparison.differences.pairs(*pair) for comparison in results.panels):
        return
    first, second = (f"{name}: {_describe_trials(results, name)}" for name in pair)
    raise BenchmarkError(
        f"--pairs {':'.join(pair)}: the rows have no trial on the same test domains in common ({first}; {second})"
    )


def _describe_trials(results: Results, algorithm: str) -> str:
    """The trials of a row and where they were tested."""
    scores = [(comparison, score) for comparison in results.panels for score in comparison.scores(algorithm)]
    if not scores:
        return "no results"
    trials = sorted({trial for _, score in scores for trial in score.trials})
    where = dict.fromkeys(
        f"{comparison.dataset} {comparison.environments[env]}"
        for comparison, score in scores
        for env in score.test_envs
    )
    return f"trial{'s' if len(trials) > 1 else ''} {', '.join(map(str, trials))} on {', '.join(where)}"


if __name__ == "__main__":
    main()
