"""Loads what a run saved and gives its recorded accuracies again.

python -m domainbed_ext.evaluate --run runs/one
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from safetensors import SafetensorError

from domainbed_ext.algorithms.registry import ALGORITHMS
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import best_step
from domainbed_ext.runs.arguments import PLACES, RunArguments
from domainbed_ext.runs.differences import Kind, changed, differences
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.runs.imports import add_option as add_import_option
from domainbed_ext.runs.imports import load
from domainbed_ext.runs.provenance import machine, versions
from domainbed_ext.runs.setup import Setup, compute_exactly, facts, set_up
from domainbed_ext.system import option_values
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command
from domainbed_ext.system.console import output
from vitlorafa import AdapterError


class Reproduced(NamedTuple):
    """One accuracy as a run recorded it, and as it is now, both in [0, 1]; NaN of a model that diverged."""

    name: str
    recorded: float
    now: float

    @property
    def same(self) -> bool:
        """Whether both are the same number, or neither is known."""
        return self.recorded == self.now or (math.isnan(self.recorded) and math.isnan(self.now))


def evaluate(
    run: RunFolder,
    step: str = "best",
    data_dir: str | None = None,
    weights: str | None = None,
    imports: Sequence[str] | None = None,
) -> tuple[dict[str, Any], list[Reproduced]]:
    """Computes the accuracies of a record again, from the saved adapter, in the run's precision and batches.

    Args:
        run: finished, by this package.
        step: "best" for the one that training-domain validation selects, "last", or a number.
        data_dir: where the images are now, if not where they were.
        weights: where the backbone's file is now, likewise.
        imports: Files and modules of the run's method and data set, where these are not built in. What the record
            names is not imported, since whoever wrote the record would decide what runs here.

    Returns:
        The record, and its accuracies.

    Raises:
        BenchmarkError: no such run or step, nothing saved at it, or other data than the run's.
    """
    if run.state is not State.DONE:
        raise BenchmarkError(f"{run.path} holds no finished run ({run.state.value}): give --run the folder of one")
    records = run.records()
    record = _choose(records, step, run)
    saved = _saved(records, record, run)
    load(imports)
    _check_known(record, run)
    setup = _set_up(record, data_dir, weights, imports)
    compute_exactly(setup.args)
    algorithm = setup.make_algorithm()
    _check(record, facts(setup, algorithm), run)
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


def _choose(records: Sequence[dict[str, Any]], step: str, run: RunFolder) -> dict[str, Any]:
    if "split_sizes" not in records[-1]:
        raise BenchmarkError(f"{run.path} was not written by this version of domainbed_ext.train: run it again")
    if step == "best":
        return best_step(records)
    if step == "last":
        return max(records, key=lambda record: record["step"])
    steps = {str(record["step"]): record for record in records}
    if step not in steps:
        raise BenchmarkError(f"--step {step}: this run has best, last, {', '.join(steps)}")
    return steps[step]


def _saved(records: Sequence[dict[str, Any]], record: dict[str, Any], run: RunFolder) -> Path:
    """The folder of what was trained at a record's step."""
    places = {f"step_{record['step']}": True, "selected": record is best_step(records), "last": record is records[-1]}
    for place, right in places.items():
        if right and (run.path / place).is_dir():
            return run.path / place
    if record["args"].get("skip_model_save"):
        raise BenchmarkError(f"{run.path} saved nothing: run it again without --skip_model_save")
    raise BenchmarkError(
        f"{run.path} saved nothing at step {record['step']}: give --step best or last, or run it again with "
        "--save_model_every_checkpoint"
    )


def _check_known(record: dict[str, Any], run: RunFolder) -> None:
    """Refuses a run of a method or a data set that was imported, and is not."""
    imported = record["args"].get("imports")
    algorithm, dataset = record["args"]["algorithm"].partition("@")[0], record["args"]["dataset"]
    for name, registry in ((algorithm, ALGORITHMS), (dataset, DATASETS)):
        if imported and name not in registry:
            raise BenchmarkError(f"{run.path} is of {name}, which it imported: add --import {' '.join(imported)}")


def _set_up(record: dict[str, Any], data_dir: str | None, weights: str | None, imports: Sequence[str] | None) -> Setup:
    """The run's parts from its record alone, so that defaults may have changed since."""
    said = {
        name: value for name, value in record["args"].items() if name not in PLACES or name in ("data_dir", "weights")
    }
    moved = {name: value for name, value in (("data_dir", data_dir), ("weights", weights)) if value is not None}
    # What --hparams said is in the final hyperparameters, and the test environments tell the source.
    args = RunArguments.from_mapping({**said, "source_envs": None, "hparams": None, "imports": imports, **moved})
    hparams = {**record["hparams"], "precision": record["precision"]}
    hparams |= {name: value for name, value in moved.items() if name == "weights"}
    return set_up(args, hparams)


def _check(record: dict[str, Any], now: dict[str, Any], run: RunFolder) -> None:
    """Refuses data and weights that are not the run's."""
    found = differences(record, now)
    if Kind.SOURCES in found:
        print(f"warning: {found[Kind.SOURCES]} since the run", file=sys.stderr)
    for kind, option in ((Kind.DATA, "--data_dir"), (Kind.WEIGHTS, "--weights")):
        if kind in found:
            raise BenchmarkError(
                f"{run.path} is of other {kind.value} than those here ({found[kind]}): give {option} those of the run"
            )


def difference(record: dict[str, Any], reproduced: Sequence[Reproduced]) -> str:
    """Says in one sentence what is not as recorded, and what may be why; empty if all is.

    Args:
        record: of the run.
        reproduced: its accuracies.
    """
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
        description="Loads what a run saved and computes its recorded accuracies again. Exit code 1 if any differs.",
        epilog="example:\n  python -m domainbed_ext.evaluate --run runs/pacs/0657090f9a83ff76efe083a104fde93a",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run", type=option_values.tensors_path, required=True, metavar="DIR", help="folder of a finished run"
    )
    parser.add_argument("--step", default="best", metavar="STEP", help="best, last or a number (%(default)s)")
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
    if sentence := difference(record, reproduced):
        print(sentence, file=sys.stderr)
        return 1
    print(f"All {len(reproduced)} accuracies are as recorded.")
    return 0


if __name__ == "__main__":
    main()
