"""Reloads a run's saved weights and checks that its recorded accuracies are reproduced.

python -m domainbed_ext.evaluate --run runs/one
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.table import Table

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import best_step
from domainbed_ext.runs.arguments import PLACES, RunArguments
from domainbed_ext.runs.differences import Kind, changed, differences
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.runs.imports import add_option as add_import_option
from domainbed_ext.runs.imports import find_missing, load
from domainbed_ext.system import garbage, option_values
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command
from domainbed_ext.system.console import output

if TYPE_CHECKING:
    from domainbed_ext.runs.setup import Setup


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
    step: str = "best",
    data_dir: str | None = None,
    weights: str | None = None,
    imports: Sequence[str] | None = None,
) -> tuple[dict[str, Any], list[Reproduced]]:
    """Recomputes the accuracies of a record from the saved model, in the run's precision and batches.

    Args:
        run: Folder of a finished run of this package.
        step: "best" for the step that training-domain validation selects, "last", or a number.
        data_dir: Folder that holds the data sets, if it has moved.
        weights: File of the backbone's weights, if it has moved.
        imports: Files and modules of the run's method and data set, where these are not built in. What the record
            names is not imported, since whoever wrote the record would decide what runs here.

    Returns:
        The record, and its accuracies.

    Raises:
        BenchmarkError: There is no such run, it saved nothing at the step, or its data or weights are not these.
    """
    if run.state is not State.DONE:
        raise BenchmarkError(f"{run.path} holds no finished run ({run.state.value}): give --run the folder of one")
    record, saved = _choose(run.records(), step, run)

    with garbage.loading():  # here, for these take seconds to load
        from safetensors import SafetensorError

        from domainbed_ext.runs import ways
        from domainbed_ext.runs.feed import Feed
        from domainbed_ext.runs.setup import collect_facts, compute_exactly
        from vitlorafa import AdapterError

    load(imports)
    _check_known(record, run)
    ways.pin(record)
    setup = _set_up(record, data_dir, weights, imports)
    compute_exactly(setup.args)
    algorithm = setup.make_algorithm()
    _check(record, collect_facts(setup, algorithm), run)
    try:
        algorithm.load(saved)
    except (AdapterError, SafetensorError, OSError) as error:
        raise BenchmarkError(f"cannot load what the run saved in {saved} ({error}): run it again") from error
    feed = Feed(setup, algorithm)
    now: dict[str, float] = {}
    for group in (setup.validation_splits, setup.other_splits):  # in the batches of the run
        now |= feed.accuracies(record["step"], [name for name in group if f"{name}_acc" in record])
    names = [name for name in setup.splits if f"{name}_acc" in record]
    return record, [Reproduced(name, _number(record[f"{name}_acc"]), now[f"{name}_acc"]) for name in names]


def _number(recorded: float | None) -> float:
    return math.nan if recorded is None else recorded


def _choose(records: Sequence[dict[str, Any]], step: str, run: RunFolder) -> tuple[dict[str, Any], Path]:
    """The record of `--step`, and the folder of what was trained by then."""
    if "split_sizes" not in records[-1]:
        raise BenchmarkError(f"{run.path} was not written by this version of domainbed_ext.train: run it again")
    recorded = {"best": best_step(records), "last": max(records, key=lambda record: record["step"])}
    recorded |= {str(record["step"]): record for record in records}
    saved = {
        name: (record, folder)
        for name, record in recorded.items()
        if (folder := _find_saved(records, record, run)) is not None
    }
    if step in saved:
        return saved[step]
    if not saved:
        remedy = (
            "run it again without --skip_model_save" if records[-1]["args"].get("skip_model_save") else "run it again"
        )
        raise BenchmarkError(f"{run.path} saved no model: {remedy}")
    again = ", or run it again with --save_model_every_checkpoint" if step in recorded else ""
    raise BenchmarkError(f"--step {step}: {run.path} saved {', '.join(saved)}: give one of these{again}")


def _find_saved(records: Sequence[dict[str, Any]], record: dict[str, Any], run: RunFolder) -> Path | None:
    """The folder of what was trained at a record's step; None if it was not saved."""
    folders = {f"step_{record['step']}": True, "selected": record is best_step(records), "last": record is records[-1]}
    return next((run.path / name for name, holds in folders.items() if holds and (run.path / name).is_dir()), None)


def _check_known(record: dict[str, Any], run: RunFolder) -> None:
    """Refuses a run of a method or a data set that was imported, and is not."""
    for name, imported in find_missing(record).items():
        raise BenchmarkError(f"{run.path} is of {name}, which it imported: add --import {imported}")


def _set_up(
    record: dict[str, Any], data_dir: str | None, weights: str | None, imports: Sequence[str] | None
) -> "Setup":
    """The run's parts from its record alone, so that defaults may have changed since."""
    from domainbed_ext.runs.setup import set_up

    recorded = {
        name: value for name, value in record["args"].items() if name not in PLACES or name in ("data_dir", "weights")
    }
    moved = {name: value for name, value in (("data_dir", data_dir), ("weights", weights)) if value is not None}
    # What --hparams said is in the final hyperparameters, and the test environments tell the source.
    args = RunArguments.from_mapping({**recorded, "source_envs": None, "hparams": None, "imports": imports, **moved})
    hparams = {**record["hparams"], "precision": record["precision"]}
    hparams |= {name: value for name, value in moved.items() if name == "weights"}
    return set_up(args, hparams)


def _check(record: dict[str, Any], now: dict[str, Any], run: RunFolder) -> None:
    """Refuses data and weights that are not the run's."""
    different = differences(record, now)
    if Kind.SOURCES in different:
        print(f"warning: {different[Kind.SOURCES]} since the run", file=sys.stderr)
    for kind, option in ((Kind.DATA, "--data_dir"), (Kind.WEIGHTS, "--weights")):
        if kind in different:
            raise BenchmarkError(
                f"{run.path} is of other {kind.value} than those here ({different[kind]}): give {option} those of the "
                "run"
            )


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
        default="best",
        metavar="STEP",
        help="step whose model is evaluated: best (by training-domain validation), last or a number (%(default)s)",
    )
    parser.add_argument(
        "--data_dir",
        type=option_values.path,
        metavar="DIR",
        help="folder that holds the data sets, if it has moved",
    )
    parser.add_argument(
        "--weights", type=option_values.tensors_path, metavar="FILE", help="the backbone's file, if it has moved"
    )
    add_import_option(parser)
    return parser


@as_command(START_AGAIN)
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.evaluate`."""
    args = make_parser().parse_args(argv)
    record, reproduced = evaluate(RunFolder(args.run), args.step, args.data_dir, args.weights, args.imports)
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
