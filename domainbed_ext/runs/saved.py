"""A finished run, reloaded: its record, its parts, and its algorithm with the weights that it saved.

What evaluates runs again, or other weights in their place, begins here. Torch is imported only to load a run.
"""

import argparse
import hashlib
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import best_step
from domainbed_ext.models import conversions
from domainbed_ext.runs.arguments import PLACES, RunArguments
from domainbed_ext.runs.differences import Kind, differences
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.runs.imports import add_option as add_import_option
from domainbed_ext.runs.imports import find_missing, load
from domainbed_ext.system import garbage, option_values

if TYPE_CHECKING:
    from torch import Tensor

    from domainbed_ext.algorithms.base import Algorithm
    from domainbed_ext.runs.feed import Feed
    from domainbed_ext.runs.setup import Setup

BEST, LAST = "best", "last"


@dataclass(frozen=True)
class Moved:
    """Where things are now that a run's record names elsewhere; None for where the record says.

    Attributes:
        data_dir: Folder that holds the data sets.
        weights: File of the backbone's weights.
        cache_dir: Folder of the cache of decoded images; None for the default.
        imports: Files and modules of the run's method and data set, where these are not built in. What a record names
            is not imported, since whoever wrote the record would decide what runs here.
    """

    data_dir: str | None = None
    weights: str | None = None
    cache_dir: str | None = None
    imports: Sequence[str] | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Moved":
        """Returns what the options of `add_options` say."""
        return cls(args.data_dir, args.weights, args.cache_dir, args.imports)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `Moved` is made of."""
    parser.add_argument(
        "--data_dir",
        type=option_values.path,
        metavar="DIR",
        help="folder that holds the data sets, if it has moved",
    )
    parser.add_argument(
        "--weights", type=option_values.tensors_path, metavar="FILE", help="the backbone's file, if it has moved"
    )
    parser.add_argument(
        "--cache_dir",
        type=option_values.tensors_path,
        metavar="DIR",
        help="folder of the cache of decoded images (default: that of runs)",
    )
    add_import_option(parser)


class Saved(NamedTuple):
    """A record of a run, and the folder of what was trained by its step."""

    record: dict[str, Any]
    folder: Path

    @property
    def digest(self) -> str:
        """The digest of the saved files."""
        digest = hashlib.blake2b(digest_size=8)
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            digest.update(path.relative_to(self.folder).as_posix().encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()


def find_saved(run: RunFolder, step: str = BEST) -> Saved:
    """Finds what a finished run saved.

    Args:
        run: Folder of the run.
        step: "best" for the step that training-domain validation selects, "last", or a number.

    Raises:
        BenchmarkError: The run is not finished, or saved nothing at the step.
    """
    if run.state is not State.DONE:
        raise BenchmarkError(f"{run.path} holds no finished run ({run.state.value}): give the folder of one")
    records = read_records(run)
    if "derived" in records[-1]:
        raise BenchmarkError(
            f"{run.path} was not trained but derived from other runs ({records[-1]['args']['algorithm']}): evaluate "
            "these, which its record lists under derived"
        )
    if any(name not in records[-1] for name in ("split_sizes", "environments", "hparams")):
        raise BenchmarkError(f"{run.path} was not written by this version of domainbed_ext.train: run it again")
    recorded = {BEST: best_step(records), LAST: max(records, key=lambda record: record["step"])}
    recorded |= {str(record["step"]): record for record in records}
    saved = {
        name: Saved(record, folder)
        for name, record in recorded.items()
        if (folder := _find_folder(records, record, run)) is not None
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


def read_records(run: RunFolder) -> list[dict[str, Any]]:
    """Reads the records of a finished run, of which there is at least one.

    Args:
        run: Folder of the run.

    Raises:
        BenchmarkError: They cannot be read, or there are none.
    """
    records = run.records()
    if not records:
        raise BenchmarkError(f"{run.path} has no records: run it again")
    return records


def _find_folder(records: Sequence[dict[str, Any]], record: dict[str, Any], run: RunFolder) -> Path | None:
    """The folder of what was trained at a record's step; None if it was not saved."""
    folders = {f"step_{record['step']}": True, "selected": record is best_step(records), "last": record is records[-1]}
    return next((run.path / name for name, holds in folders.items() if holds and (run.path / name).is_dir()), None)


@dataclass(frozen=True)
class SavedRun:
    """A finished run, reloaded.

    Attributes:
        run: Folder of the run.
        record: Record of the step whose weights are loaded.
        folder: Folder of these weights, which `algorithm.load` reads.
        setup: Parts of the run.
        algorithm: Algorithm with the weights.
        feed: Feed of the algorithm, in the run's precision and batches.
    """

    run: RunFolder
    record: dict[str, Any]
    folder: Path
    setup: "Setup"
    algorithm: "Algorithm"
    feed: "Feed"

    @property
    def recorded_splits(self) -> list[str]:
        """Names of the splits that the record has accuracies on."""
        return [name for name in self.setup.splits if f"{name}_acc" in self.record]

    def accuracies(
        self, names: Collection[str] | None = None, logits: "dict[str, Tensor] | None" = None
    ) -> dict[str, float]:
        """Computes accuracies with the weights that the algorithm has now.

        Args:
            names: Names of splits, e.g. "env0_in"; None for those that the record has.
            logits: Dict that takes the logits of each split, as in `Feed.accuracies`; None to keep none.

        Returns:
            Accuracy in [0, 1] by "env0_in_acc" and so on; NaN where logits are not finite. With the run's own weights,
            these are the recorded ones, as long as `names` holds all splits that were evaluated together.
        """
        wanted = self.recorded_splits if names is None else names
        now: dict[str, float] = {}
        for group in (self.setup.validation_splits, self.setup.other_splits):  # in the batches of the run
            now |= self.feed.accuracies(self.record["step"], [name for name in group if name in wanted], logits)
        return {f"{name}_acc": now[f"{name}_acc"] for name in self.setup.splits if f"{name}_acc" in now}

    def load(self, folder: Path) -> None:
        """Loads trained weights into the algorithm.

        Args:
            folder: Folder that `Algorithm.save` of the same method wrote.

        Raises:
            BenchmarkError: They cannot be loaded.
        """
        load_weights(self.algorithm, folder)


def load_run(run: RunFolder, step: str = BEST, moved: Moved = Moved(), with_start: bool = False) -> SavedRun:
    """Reloads a finished run.

    Args:
        run: Folder of the run.
        step: "best" for the step that training-domain validation selects, "last", or a number.
        moved: Where data, weights and the rest are now.
        with_start: Whether to keep the weights that the run started from too, for `Algorithm.set_strength`.

    Raises:
        BenchmarkError: There is no such run, it saved nothing at the step, or its data or weights are not these.
    """
    record, folder = find_saved(run, step)
    with garbage.loading():  # here, for these take seconds to load
        from domainbed_ext.runs import ways
        from domainbed_ext.runs.feed import Feed
        from domainbed_ext.runs.head_start import restore_start
        from domainbed_ext.runs.setup import collect_facts, set_up_process

    load(moved.imports)
    check_known(record, run)
    ways.pin(record)
    setup = set_up_again(record, moved)
    set_up_process(setup.args)
    with conversions.already_reported():  # by the run itself
        algorithm = setup.make_algorithm()
    check_same(record, collect_facts(setup, algorithm), run)
    if with_start:
        restore_start(algorithm, run)
    load_weights(algorithm, folder)
    return SavedRun(run, record, folder, setup, algorithm, Feed(setup, algorithm))


def load_weights(algorithm: "Algorithm", folder: Path) -> None:
    """Loads trained weights.

    Args:
        algorithm: Algorithm that takes them.
        folder: Folder that `Algorithm.save` of the same method wrote.

    Raises:
        BenchmarkError: They cannot be loaded.
    """
    from safetensors import SafetensorError

    from vitlorafa import AdapterError

    try:
        algorithm.load(folder)
    except (AdapterError, SafetensorError, OSError) as error:
        raise BenchmarkError(f"cannot load what the run saved in {folder} ({error}): run it again") from error


def set_up_again(record: Mapping[str, Any], moved: Moved = Moved(), **changes: Any) -> "Setup":
    """Makes a run's parts from its record alone, so that defaults may have changed since.

    Args:
        record: Record of the run.
        moved: Where data, weights and the rest are now.
        **changes: Arguments that are not the record's.
    """
    from domainbed_ext.runs.setup import set_up

    return set_up(*recorded_arguments(record, moved, **changes))


def recorded_arguments(
    record: Mapping[str, Any], moved: Moved = Moved(), **changes: Any
) -> tuple[RunArguments, dict[str, Any]]:
    """A run's arguments and final hyperparameters, from its record alone.

    Args:
        record: Record of the run.
        moved: Where data, weights and the rest are now.
        **changes: Arguments that are not the record's.
    """
    recorded = {
        name: value for name, value in record["args"].items() if name not in PLACES or name in ("data_dir", "weights")
    }
    places = {name: getattr(moved, name) for name in ("data_dir", "weights", "cache_dir")}
    places = {name: value for name, value in places.items() if value is not None}
    # What --hparams said is in the final hyperparameters, and the test environments tell the source.
    values = {**recorded, "source_envs": None, "hparams": None, "imports": moved.imports, **places, **changes}
    hparams = {**record["hparams"], "precision": record["precision"]}
    hparams |= {name: value for name, value in places.items() if name == "weights"}
    return RunArguments.from_mapping(values), hparams


def check_known(record: Mapping[str, Any], run: RunFolder) -> None:
    """Refuses a run of a method or a data set that was imported, and is not.

    Args:
        record: Record of the run.
        run: Folder of the run.

    Raises:
        BenchmarkError: It is one.
    """
    for name, imported in find_missing(record).items():
        raise BenchmarkError(f"{run.path} is of {name}, which it imported: add --import {imported}")


def check_same(record: Mapping[str, Any], now: Mapping[str, Any], run: RunFolder) -> None:
    """Refuses data and weights that are not the run's; warns of source files that have changed.

    Args:
        record: Record of the run.
        now: Facts of a run that is made of its record, see `setup.collect_facts`, or a part of them.
        run: Folder of the run.

    Raises:
        BenchmarkError: They are not the run's.
    """
    different = differences(record, now)
    if Kind.SOURCES in different:
        print(f"warning: {different[Kind.SOURCES]} since the run", file=sys.stderr)
    for kind, option in ((Kind.DATA, "--data_dir"), (Kind.WEIGHTS, "--weights")):
        if kind in different:
            raise BenchmarkError(
                f"{run.path} is of other {kind.value} than those here ({different[kind]}): give {option} those of the "
                "run"
            )


def describe_run(record: Mapping[str, Any]) -> str:
    """Names a run: data set, method, test environments and trial.

    Args:
        record: Record of the run.
    """
    args, names = record["args"], record.get("environments")  # upstream's records have none
    tested = "+".join(names[env] if names else f"env{env}" for env in args["test_envs"])
    return f"{args['dataset']} {args['algorithm']}, tested on {tested}, trial {args['trial_seed']}"


def finished_runs(input_dir: Path, records: Iterable[Mapping[str, Any]]) -> list[RunFolder]:
    """The folders of the runs that records are of, in their order.

    Args:
        input_dir: Folder of the sweep.
        records: Records as `load_records` returns them.
    """
    return [RunFolder(input_dir / name) for name in dict.fromkeys(str(record["run"]) for record in records)]
