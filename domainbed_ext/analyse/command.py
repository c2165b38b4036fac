"""The command line: `python -m domainbed_ext.analyse similarity|lemmas|inits|energy --input_dir DIR`."""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from domainbed_ext.analyse import stored
from domainbed_ext.analyse.analysis import Analysis
from domainbed_ext.analyse.registry import ANALYSES
from domainbed_ext.analyse.runs import Sweep
from domainbed_ext.analyse.stored import Stored
from domainbed_ext.report.plots import plots
from domainbed_ext.report.tables.table import print_tables, render_markdown
from domainbed_ext.runs import saved
from domainbed_ext.runs.imports import load
from domainbed_ext.system import option_values
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command
from domainbed_ext.system.commands import format_command
from domainbed_ext.system.console import output, plain
from domainbed_ext.system.exit_codes import ExitCode

DESCRIPTION = "Analyses the selected runs of a sweep as Zhu et al. 2024 and LoRA-FA analyse theirs."
EXAMPLE = """\
examples:
  python -m domainbed_ext.analyse similarity --input_dir runs/pacs
  python -m domainbed_ext.analyse lemmas --input_dir runs/pacs --draws 20

writes NAME.json, NAME.txt, NAME.md and NAME.svg to INPUT_DIR/analyses; collect_results adds table and plot to its page.
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.analyse",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="analysis", required=True, metavar="|".join(ANALYSES))
    for analysis in ANALYSES.values():
        _add_options(commands.add_parser(analysis.name, help=analysis.summary, description=analysis.summary), analysis)
    return parser


def _add_options(parser: argparse.ArgumentParser, analysis: Analysis) -> None:
    parser.add_argument(
        "--input_dir",
        type=option_values.tensors_path,
        required=True,
        metavar="DIR",
        help="folder that holds the runs' folders",
    )
    parser.add_argument(
        "--algorithms", nargs="+", metavar="NAME", help="methods that are analysed (default: all of the sweep)"
    )
    parser.add_argument(
        "--step",
        default=saved.BEST,
        metavar="STEP",
        help="step whose weights are analysed: best (by training-domain validation), last or a number (%(default)s)",
    )
    analysis.add_options(parser)
    parser.add_argument(
        "--dry_run", action="store_true", help="print which runs would be analysed, and compute nothing"
    )
    saved.add_options(parser)


@as_command(START_AGAIN)
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.analyse`."""
    args = make_parser().parse_args(argv)
    load(args.imports)
    analysis, input_dir = ANALYSES[args.analysis], Path(args.input_dir)
    sweep = Sweep(input_dir, args.algorithms, args.step, saved.Moved.of(args))
    if args.dry_run:
        runs = sweep.adapted()
        print(f"would analyse {len(runs)} runs with adapters: {', '.join(each.run.name for each in runs)}")
        return ExitCode.DONE
    rows = analysis.compute(sweep, args)
    options = {name: getattr(args, name) for name in ("algorithms", "step", *analysis.options)}
    content = Stored(analysis, sweep.results.trained_runs, options, rows).to_json()
    result = stored.parse(content)  # so that tables and plot are those that the file gives again
    tables, figure, text = result.tables(), result.figure(), io.StringIO()
    headline = f"{analysis.summary}: {sweep.results.headline}"
    print_tables(plain(text), tables, headline)
    contents: dict[str, str | bytes] = {
        f"{analysis.name}.json": content,
        f"{analysis.name}.txt": text.getvalue(),
        f"{analysis.name}.md": render_markdown(tables),
    }
    if figure is not None:
        contents[f"{analysis.name}.svg"] = plots.render(figure, "svg")
    # Written before anything is printed: no console costs results.
    paths = stored.write(input_dir, contents)
    console = output()
    print_tables(console, tables, headline)
    console.print("\nwritten:", *paths, sep="\n  ", highlight=False, markup=False, soft_wrap=True)
    print(f"{format_command('collect_results')} --input_dir {args.input_dir} adds this to tables, plots and page")
    return ExitCode.DONE
