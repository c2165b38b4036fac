"""Evaluates the selected runs of a sweep along the strength of their update.

python -m domainbed_ext.frontier --input_dir runs/pacs --strengths 0 0.25 0.5 0.75 1
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from domainbed_ext.algorithms.names import canonical_name
from domainbed_ext.errors import BenchmarkError, print_errors, unknown
from domainbed_ext.model_selection import TRAINING_DOMAIN
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.frontier import frontier_tables
from domainbed_ext.report.tables.table import print_tables
from domainbed_ext.runs import derived, saved
from domainbed_ext.runs.along_strength import Outcome, Plan, evaluate
from domainbed_ext.runs.folder import RunFolder, load_finished, load_records
from domainbed_ext.runs.imports import load
from domainbed_ext.system import option_values
from domainbed_ext.system.command_line import CommandLine, as_command
from domainbed_ext.system.commands import format_command
from domainbed_ext.system.console import output
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.processes import several
from domainbed_ext.system.progress import bar, format_left

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
EXAMPLE = """\
example:
  python -m domainbed_ext.frontier --input_dir runs/pacs --strengths 0 0.25 0.5 0.75 1

Weights at strength a are start + a (trained - start): 1 is the trained model, 0 what it started from. A run's results
are kept in its folder (strengths.jsonl), so that the same command resumes, and collect_results adds them to the tables,
the plots and the page: a curve per method, and a row at the strength that training-domain validation selects.
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.frontier",
        description="Evaluates the selected runs of a sweep along the strength of their update, from where training "
        "started to the trained model, in domain and out of domain.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input_dir", type=option_values.path, required=True, metavar="DIR", help="folder that holds the runs' folders"
    )
    parser.add_argument(
        "--strengths",
        type=option_values.share(with_0=True, with_1=True),
        nargs="+",
        default=list(STRENGTHS),
        metavar="A",
        help=f"strengths of the update, from 0 to 1 ({' '.join(f'{strength:g}' for strength in STRENGTHS)})",
    )
    parser.add_argument(
        "--algorithms", nargs="+", metavar="NAME", help="methods that are evaluated (default: all of the sweep)"
    )
    parser.add_argument(
        "--train_splits",
        action="store_true",
        help="measure train accuracies at every strength (default: at 1 and at the selected one alone)",
    )
    parser.add_argument(
        "--jobs", type=option_values.whole(1), default=1, metavar="N", help="runs evaluated at once (%(default)s)"
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would be evaluated, and change nothing")
    saved.add_options(parser)
    return parser


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.frontier`."""
    args = make_parser().parse_args(argv)
    load(args.imports)
    moved = saved.Moved.of(args)
    plans = make_plans(args.input_dir, args.strengths, args.algorithms, args.train_splits, moved)
    waiting = [plan for plan in plans if not plan.is_done]
    output().print(_summary(plans))
    if args.dry_run:
        print("nothing is evaluated (--dry_run)")
        return ExitCode.DONE
    errors = evaluate_all(waiting, args.jobs)
    print_errors(errors, "runs")
    _remove_others(plans)
    _print_tables(args.input_dir)
    return ExitCode.FAILED if errors else ExitCode.DONE


def make_plans(
    input_dir: str | Path,
    strengths: Sequence[float] = STRENGTHS,
    algorithms: Sequence[str] | None = None,
    train_splits: bool = False,
    moved: saved.Moved = saved.Moved(),  # noqa: B008  (it is frozen)
) -> list[Plan]:
    """Plans the evaluation of the runs that training-domain validation selects.

    Args:
        input_dir: Folder of the sweep.
        strengths: Strengths of the update, in [0, 1].
        algorithms: Names of methods, in any spelling; None for all.
        train_splits: Whether train accuracies are measured at every strength.
        moved: Where data, weights and the rest are now.

    Returns:
        A plan for each run, in the order of tables.

    Raises:
        BenchmarkError: A strength is given twice or out of range, a method has no runs, or runs saved no weights.
    """
    in_order = _check_strengths(strengths)
    records = [record for record in load_finished(input_dir) if "derived" not in record]
    results = Results(records, [TRAINING_DOMAIN])
    wanted = _check_algorithms(algorithms, results.algorithms)
    chosen = dict.fromkeys(record["run"] for record in results.chosen(wanted))
    if not chosen:
        raise BenchmarkError(
            f"{input_dir} has no run that is tested on a single environment, as training-domain validation selects: "
            "launch the sweep with --single_test_envs"
        )
    root = Path(input_dir)
    plans = [Plan(root, RunFolder(root / run), in_order, train_splits, moved) for run in chosen]
    _check_saved(plans)
    return plans


def evaluate_all(plans: Sequence[Plan], jobs: int = 1) -> dict[str, int]:
    """Evaluates runs, several at once, with a line for each and the time left.

    Args:
        plans: Plans of the runs.
        jobs: Number of processes.

    Returns:
        Errors in one sentence each, and how many runs ended with it. All other runs are evaluated nevertheless.
    """
    errors: Counter[str] = Counter()
    sizes = [plan.images() for plan in plans]
    with bar("strengths", sum(sizes), "images") as progress, several(min(jobs, len(plans))) as run:
        for number, (plan, size, outcome) in enumerate(zip(plans, sizes, run(evaluate, plans), strict=True), 1):
            progress.advance(size)
            for sentence in outcome.warnings:
                print(f"warning: {sentence}", file=sys.stderr)
            if outcome.error:
                errors[outcome.error] += 1
            what, result = saved.describe_run(plan.saved.record), _result(plan, outcome)
            print(f"{number} of {len(plans)}: {what}: {result}{format_left(progress)}", flush=True)
    return errors


def _check_strengths(strengths: Sequence[float]) -> tuple[float, ...]:
    for strength, count in Counter(strengths).items():
        if not 0 <= strength <= 1:
            raise BenchmarkError(f"--strengths {strength:g} is out of range: give numbers from 0 to 1")
        if count > 1:
            raise BenchmarkError(f"--strengths has {strength:g} twice: give each strength once")
    if not strengths:
        raise BenchmarkError("--strengths is empty: give numbers from 0 to 1")
    return tuple(sorted(strength + 0.0 for strength in strengths))


def _check_algorithms(names: Sequence[str] | None, there: Sequence[str]) -> list[str]:
    """The ids of methods in the order of tables."""
    wanted = set()
    for name in there if names is None else names:
        known = name if name in there else canonical_name(name)
        if known not in there:
            raise unknown("algorithm of --algorithms", name, there)
        wanted.add(known)
    return [algorithm for algorithm in there if algorithm in wanted]


def _check_saved(plans: Sequence[Plan]) -> None:
    """Refuses runs without saved weights, before anything is evaluated."""
    errors = []
    for plan in plans:
        try:
            _ = plan.saved
        except BenchmarkError as error:
            errors.append(str(error))
    if errors:
        raise BenchmarkError(
            f"{len(errors)} of {len(plans)} selected runs cannot be evaluated, e.g. {errors[0]}; or leave their "
            "methods out with --algorithms"
        )


def _summary(plans: Sequence[Plan]) -> Table:
    """What is to be evaluated, by method."""
    table = Table("method", "selected runs", "done", "evaluations", "images", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    groups: dict[str, list[Plan]] = {}
    for plan in plans:
        groups.setdefault(_algorithm(plan), []).append(plan)
    for name, members in [*groups.items(), *([("all", list(plans))] if len(groups) > 1 else [])]:
        done, images = sum(plan.is_done for plan in members), sum(plan.images() for plan in members)
        counts = len(members), done, sum(len(plan.missing()) for plan in members), images
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def _algorithm(plan: Plan) -> str:
    return str(plan.saved.record["args"]["algorithm"])


def _result(plan: Plan, outcome: Outcome) -> str:
    return "failed" if outcome.selected is None else f"strength {outcome.selected:g} is selected"


def _remove_others(plans: Sequence[Plan]) -> None:
    """Removes derived runs of what is no longer selected."""
    rows: dict[tuple[str, str], list[derived.Derived]] = {}
    for plan in plans:
        args = plan.derived.record_args
        rows.setdefault((args["algorithm"], args["dataset"]), []).append(plan.derived)
    for (algorithm, dataset), kept in rows.items():
        derived.remove_others(plans[0].sweep_dir, algorithm, dataset, kept)


def _print_tables(input_dir: str) -> None:
    """Prints the tables of frontiers, and where the rest is."""
    results = Results(load_records(input_dir, unreadable=[]), [TRAINING_DOMAIN])
    tables = [table for each in results.panels for table in frontier_tables(each, each.title)]
    print_tables(output(), tables, results.headline)
    print(f"\n{format_command('collect_results')} --input_dir {input_dir} adds these to tables, plots and page")


if __name__ == "__main__":
    main()
