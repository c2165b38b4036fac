"""Reloads a run's saved weights and checks that its recorded accuracies are reproduced.

python -m domainbed_ext.evaluate --run runs/one

It also keeps the predictions of runs that have none: of one, or with --input_dir of all in a folder.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.table import Table

from domainbed_ext.errors import BenchmarkError, print_errors
from domainbed_ext.runs.differences import changed
from domainbed_ext.runs.folder import RunFolder, load_finished
from domainbed_ext.runs.predictions import has_predictions, save_predictions, steps_with_predictions
from domainbed_ext.runs.saved import BEST, Moved, add_options, describe_run, find_saved, finished_runs, load_run
from domainbed_ext.system import option_values
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command
from domainbed_ext.system.console import output
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.processes import several
from domainbed_ext.system.progress import bar, format_left, hide

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = """\
examples:
  python -m domainbed_ext.evaluate --run runs/pacs/0657090f9a83ff76efe083a104fde93a
  python -m domainbed_ext.evaluate --input_dir runs/pacs --predictions
"""


class Reproduced(NamedTuple):
    """One accuracy as a run recorded it, and as it is now, both in [0, 1]; NaN if the model diverged."""

    name: str
    recorded: float
    now: float

    @property
    def same(self) -> bool:
        """Whether both are the same number, or both are NaN."""
        return self.recorded == self.now or (math.isnan(self.recorded) and math.isnan(self.now))


def evaluate(
    run: RunFolder,
    step: str = BEST,
    moved: Moved = Moved(),  # noqa: B008  (it is frozen)
) -> tuple[dict[str, Any], list[Reproduced]]:
    """Recomputes the accuracies of a record from the saved model, in the run's precision and batches.

    Args:
        run: Folder of a finished run of this package.
        step: "best" for the step that training-domain validation selects, "last", or a number.
        moved: Where data, weights and the rest are now.

    Returns:
        The record, and its accuracies.

    Raises:
        BenchmarkError: There is no such run, it saved nothing at the step, or its data or weights are not these.
    """
    saved = load_run(run, step, moved)
    return saved.record, _compare(saved.record, saved.accuracies())


def keep_predictions(
    run: RunFolder,
    moved: Moved = Moved(),  # noqa: B008  (it is frozen)
) -> list[tuple[dict[str, Any], list[Reproduced]]]:
    """Evaluates a run at the selected and at the last step, and keeps what it predicts there in its folder.

    Args:
        run: Folder of a finished run of this package.
        moved: Where data, weights and the rest are now.

    Returns:
        The record of each step, and its accuracies.

    Raises:
        BenchmarkError: There is no such run, it saved nothing at a step, its data or weights are not these, or its
            folder cannot be written.
    """
    from domainbed_ext.runs.collect_predictions import collect_predictions

    evaluated = []
    for step in steps_with_predictions(run):
        saved = load_run(run, step, moved)
        logits: dict[str, Tensor] = {}
        accuracies = saved.accuracies(logits=logits)
        try:
            save_predictions(run, collect_predictions(saved.setup, saved.record["step"], step, logits))
        except OSError as error:
            raise BenchmarkError(f"cannot write to {run.path} ({error.strerror or error}): make it writable") from error
        evaluated.append((saved.record, _compare(saved.record, accuracies)))
    return evaluated


def _compare(record: dict[str, Any], accuracies: dict[str, float]) -> list[Reproduced]:
    return [Reproduced(name.removesuffix("_acc"), _number(record[name]), now) for name, now in accuracies.items()]


def _number(recorded: float | None) -> float:
    return math.nan if recorded is None else recorded


def describe_difference(record: dict[str, Any], reproduced: Sequence[Reproduced]) -> str:
    """Describes what differs from the record, and the likely reason; empty if nothing differs.

    Args:
        record: Record of the run.
        reproduced: Its accuracies.
    """
    from domainbed_ext.runs.provenance import machine, versions

    differing = [each for each in reproduced if not each.same]
    if not differing:
        return ""
    here = {**versions(), **machine()}
    there = {**record.get("versions", {}), **record.get("machine", {})}
    elsewhere = changed(there, here)
    reason = f"it ran elsewhere: {elsewhere}" if elsewhere else "the images or the weights are not the run's"
    return f"{len(differing)} of {len(reproduced)} accuracies are not as recorded ({reason})"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.evaluate",
        description="Reloads a run's saved weights and checks that its recorded accuracies are reproduced. "
        "The exit code is 1 if any differs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=option_values.tensors_path, metavar="DIR", help="folder of a finished run")
    which.add_argument(
        "--input_dir",
        type=option_values.path,
        metavar="DIR",
        help="with --predictions: folder that holds runs' folders; those that keep predictions are left as they are",
    )
    parser.add_argument(
        "--step",
        metavar="STEP",
        help="step whose model is evaluated: best (default; by training-domain validation), last or a number",
    )
    parser.add_argument(
        "--predictions",
        action="store_true",
        help="keep the logits of every image, at the selected and at the last step, in the run's folder, as runs do "
        "without --skip_predictions",
    )
    parser.add_argument(
        "--jobs", type=option_values.whole(1), default=1, metavar="N", help="runs evaluated at once (%(default)s)"
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would be evaluated, and change nothing")
    add_options(parser)
    return parser


@as_command(START_AGAIN)
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.evaluate`."""
    args = make_parser().parse_args(argv)
    if args.input_dir and not args.predictions:
        raise BenchmarkError("--input_dir needs --predictions: add it, or give --run a single run's folder")
    if args.predictions and args.step:
        raise BenchmarkError("--predictions keeps those of the selected and of the last step: leave --step out")
    moved = Moved.of(args)
    if args.input_dir:
        return _keep_all(Path(args.input_dir), moved, args.jobs, args.dry_run)
    run = RunFolder(args.run)
    if args.dry_run:
        steps = steps_with_predictions(run) if args.predictions else [args.step or BEST]
        print(
            f"would evaluate {run.path}: step {', '.join(str(find_saved(run, step).record['step']) for step in steps)}"
        )
        return ExitCode.DONE
    evaluated = keep_predictions(run, moved) if args.predictions else [evaluate(run, args.step or BEST, moved)]
    are_same = [_show(*each) for each in evaluated]
    if args.predictions:
        print(f"The predictions are kept in {run.path}.")
    return ExitCode.DONE if all(are_same) else ExitCode.FAILED


def _show(record: dict[str, Any], reproduced: Sequence[Reproduced]) -> bool:
    """Prints the accuracies of a record; returns whether they are as recorded."""
    run = record["args"]
    print(f"{run['dataset']} {run['algorithm']}, tested on {run['test_envs']}, step {record['step']}")
    table = Table("split", "recorded", "now", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for each in reproduced:
        table.add_row(each.name, f"{each.recorded:.6f}", f"{each.now:.6f}", "same" if each.same else "differs")
    output().print(table)
    if sentence := describe_difference(record, reproduced):
        print(sentence, file=sys.stderr)
        return False
    print(f"All {len(reproduced)} accuracies are as recorded.")
    return True


def _keep_all(input_dir: Path, moved: Moved, jobs: int, is_dry: bool) -> int:
    """Keeps the predictions of all finished runs of a folder that have none."""
    records = [record for record in load_finished(input_dir) if "derived" not in record]
    record_of = {record["run"]: record for record in records}
    runs = finished_runs(input_dir, records)
    waiting = [run for run in runs if not has_predictions(run)]
    print(f"{len(runs)} runs: {len(runs) - len(waiting)} keep their predictions, {len(waiting)} to evaluate")
    if is_dry:
        for run in waiting:
            print(f"would evaluate {run.path}: {describe_run(record_of[run.name])}")
        return ExitCode.DONE
    errors: Counter[str] = Counter()
    differ = 0
    work = partial(_keep, moved)
    with bar("predictions", len(waiting), "runs") as progress, several(min(jobs, len(waiting))) as run_all:
        for number, (run, (words, is_same, error)) in enumerate(zip(waiting, run_all(work, waiting), strict=True), 1):
            progress.advance()
            if error:
                errors[error] += 1
            differ += not (is_same or error)
            what = describe_run(record_of[run.name])
            print(f"{number} of {len(waiting)}: {what}: {words}{format_left(progress)}", flush=True)
    print_errors(errors, "runs")
    if differ:
        print(f"{differ} of {len(waiting)} runs have other accuracies than recorded: see above", file=sys.stderr)
    return ExitCode.FAILED if errors or differ else ExitCode.DONE


def _keep(moved: Moved, run: RunFolder) -> tuple[str, bool, str]:
    """What became of a run in words, whether its accuracies are as recorded, and the error if there is one."""
    if parent_process() is not None:
        hide()  # the other process shows its own bars
    try:
        evaluated = keep_predictions(run, moved)
    except BenchmarkError as error:
        return "failed", False, str(error)
    differences = [words for each in evaluated if (words := describe_difference(*each))]
    count = sum(len(reproduced) for _, reproduced in evaluated)
    return "; ".join(differences) or f"all {count} accuracies are as recorded", not differences, ""


if __name__ == "__main__":
    main()
