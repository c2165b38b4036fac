"""Soups of a sweep's finished runs: means of their weights, evaluated and tabled as rows of their own.

python -m domainbed_ext.soup --input_dir runs/pacs
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from domainbed_ext.errors import BenchmarkError, print_errors
from domainbed_ext.model_selection import Record, target_accuracy
from domainbed_ext.runs import saved
from domainbed_ext.runs.derived import remove_others
from domainbed_ext.runs.folder import load_finished
from domainbed_ext.runs.imports import load
from domainbed_ext.soups.gains import gains_table
from domainbed_ext.soups.plans import KINDS, OVER, Plan, Sweep, nothing_to_do
from domainbed_ext.system import garbage, option_values
from domainbed_ext.system.command_line import CommandLine, as_command
from domainbed_ext.system.commands import format_command
from domainbed_ext.system.console import output
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.progress import bar, format_duration

EXAMPLE = """\
example:
  python -m domainbed_ext.soup --input_dir runs/pacs --over trials --trials_per_soup 2

A soup is the mean of the weights of several runs of one method. Its ingredients are those runs that training-domain
validation selects; nothing is chosen by the test domains. Soups are written to INPUT_DIR/derived, so that the same
command resumes, and collect_results adds them to tables, plots and page as rows such as `BOnly soup(trials)`.
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.soup",
        description="Averages the weights of a sweep's finished runs and evaluates the means.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input_dir", type=option_values.path, required=True, metavar="DIR", help="folder that holds the runs' folders"
    )
    parser.add_argument(
        "--over",
        nargs="+",
        choices=OVER,
        help="what the averaged runs differ in: trials; hparams, which are hyperparameter seeds and values of "
        "--hparams, within a trial; domains, which are the sources of single-source runs of a trial, tested on the "
        "remaining domain (default: those that there are runs for)",
    )
    parser.add_argument(
        "--kind",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="uniform: the mean of all; greedy: runs are added in the order of their validation accuracy, and kept if "
        "they do not lower that of the soup (both)",
    )
    parser.add_argument(
        "--trials_per_soup",
        type=option_values.whole(2),
        metavar="N",
        help="trials of each soup over trials, so that many trials give several soups and an interval; trials "
        "that are left over are in none (all)",
    )
    parser.add_argument(
        "--algorithms", nargs="+", metavar="NAME", help="methods whose runs are averaged (default: all of the sweep)"
    )
    parser.add_argument(
        "--merged",
        action="store_true",
        help="average adapters with a frozen factor as merged weights too, also where the factor differs; the soup is "
        "then a whole model, as it always is of methods that train both factors",
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would be averaged, and change nothing")
    saved.add_options(parser)
    return parser


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.soup`."""
    args = make_parser().parse_args(argv)
    load(args.imports)
    sweep_dir = Path(args.input_dir)
    sweep = Sweep(sweep_dir, load_finished(sweep_dir))
    moved = saved.Moved.of(args)
    over = list(dict.fromkeys(args.over or OVER))
    kinds = list(dict.fromkeys(args.kind))
    planned = sweep.plans(over, kinds, args.algorithms, args.trials_per_soup, args.merged, moved)
    lacking = [each for each in over if not any(plan.over == each for plan in planned)]
    if lacking and (args.over or len(lacking) == len(over)):
        raise nothing_to_do(lacking, args.trials_per_soup)
    able, errors = _check(planned)
    plans = _without_impossible(able)
    waiting = [plan for plan in plans if plan.derived.finished_record() is None]
    print(f"{len(plans)} soups: {len(plans) - len(waiting)} are there, {len(waiting)} to make")
    if args.dry_run:
        for plan in waiting:
            print(f"would make {plan}: of {', '.join(member['run'] for member in plan.members)}")
    else:
        errors += _make_all(waiting)
        _remove_outdated(planned)
    print_errors(errors, "soups")
    records = [record for plan in plans if (record := plan.derived.finished_record()) is not None]
    if records and not args.dry_run:
        output().print(gains_table(records, {member["run"]: member for plan in plans for member in plan.members}))
        print(f"rows of tables, plots and page: {format_command('collect_results')} --input_dir {args.input_dir}")
    return (ExitCode.FAILED if records else ExitCode.BAD_INPUT) if errors else ExitCode.DONE


def _without_impossible(plans: Sequence[Plan]) -> list[Plan]:
    """The plans without greedy soups that too few images are left to choose by, with a line about these."""
    with garbage.loading():  # here, for it takes seconds to load
        from domainbed_ext.soups.make import why_not_greedy

    reasons = {plan: reason for plan in plans if plan.kind == "greedy" and (reason := why_not_greedy(plan))}
    if reasons and len(reasons) == len(plans):  # and so nothing else was asked for
        raise BenchmarkError(f"there is no soup to make: {next(iter(reasons.values()))}; use --kind uniform")
    for reason in dict.fromkeys(reasons.values()):
        rows = dict.fromkeys(plan.row[0] for plan, each in reasons.items() if each == reason)
        print(f"left out: {', '.join(rows)}: {reason}")
    return [plan for plan in plans if plan not in reasons]


def _check(plans: Sequence[Plan]) -> tuple[list[Plan], Counter[str]]:
    """The plans whose runs can be averaged, and the errors of the others with their counts."""
    able, errors = [], Counter[str]()
    for plan in plans:
        try:
            plan.check()
            able.append(plan)
        except BenchmarkError as error:
            errors[str(error)] += 1
    return able, errors


def _make_all(plans: Sequence[Plan]) -> Counter[str]:
    """Makes soups, with a line for each and the time left; returns the errors with their counts."""
    from domainbed_ext.soups.make import count_images, make

    errors = Counter[str]()
    sizes = {plan: count_images(plan) for plan in plans}
    with bar("soups", sum(sizes.values()), "images") as done:
        for number, plan in enumerate(plans, 1):
            try:
                record = make(plan)
            except BenchmarkError as error:
                errors[str(error)] += 1
                done.advance(sizes[plan])
                continue
            done.advance(sizes[plan])
            left = "" if done.seconds_left is None else f", {format_duration(done.seconds_left)} left"
            print(f"{plan}: {_result(record)} ({number} of {len(plans)}{left})")
    return errors


def _result(record: Record) -> str:
    """The test accuracy, and of a greedy soup how many runs it is of."""
    accuracies = [target_accuracy(record, env) for env in record["args"]["test_envs"]]
    derived: Mapping[str, object] = record["derived"]
    chosen, candidates = (len(derived[name]) for name in ("ingredients", "candidates"))  # type: ignore[arg-type]
    of = f"{chosen} of {candidates} runs" if chosen < candidates else f"{chosen} runs"
    return f"{', '.join(f'{100 * value:.1f} %' for value in accuracies)} with {of}"


def _remove_outdated(plans: Sequence[Plan]) -> None:
    """Removes soups of the planned rows that are none of the plans: their runs are gone, or in other soups."""
    sweep_dirs = {plan.row: plan.sweep_dir for plan in plans}
    for (algorithm, dataset), sweep_dir in sweep_dirs.items():
        kept = [plan.place for plan in plans if plan.row == (algorithm, dataset)]
        for name in remove_others(sweep_dir, algorithm, dataset, kept):
            print(f"removed {sweep_dir / name}: its runs are in other soups now")


if __name__ == "__main__":
    main()
