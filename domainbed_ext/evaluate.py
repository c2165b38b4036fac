"""Reloads a run's saved weights and checks that its recorded accuracies are reproduced.

python -m domainbed_ext.evaluate --run runs/one
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from domainbed_ext.runs.differences import changed
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.saved import BEST, Moved, add_options, load_run
from domainbed_ext.system import option_values
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command
from domainbed_ext.system.console import output


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
    reproduced = [
        Reproduced(name.removesuffix("_acc"), _number(saved.record[name]), now)
        for name, now in saved.accuracies().items()
    ]
    return saved.record, reproduced


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
        epilog="example:\n  python -m domainbed_ext.evaluate --run runs/pacs/0657090f9a83ff76efe083a104fde93a",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run", type=option_values.tensors_path, required=True, metavar="DIR", help="folder of a finished run"
    )
    parser.add_argument(
        "--step",
        default=BEST,
        metavar="STEP",
        help="step whose model is evaluated: best (by training-domain validation), last or a number (%(default)s)",
    )
    add_options(parser)
    return parser


@as_command(START_AGAIN)
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.evaluate`."""
    args = make_parser().parse_args(argv)
    record, reproduced = evaluate(RunFolder(args.run), args.step, Moved.of(args))
    run = record["args"]
    print(f"{run['dataset']} {run['algorithm']}, tested on {run['test_envs']}, step {record['step']}")
    table = Table("split", "recorded", "now", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for each in reproduced:
        table.add_row(each.name, f"{each.recorded:.6f}", f"{each.now:.6f}", "same" if each.same else "differs")
    output().print(table)
    if sentence := describe_difference(record, reproduced):
        print(sentence, file=sys.stderr)
        return 1
    print(f"All {len(reproduced)} accuracies are as recorded.")
    return 0


if __name__ == "__main__":
    main()
