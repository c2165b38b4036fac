"""Derived runs: what is computed of finished runs without training, such as the mean of their weights.

A derived run has a folder `derived/<id>` in the folder of the sweep, with a record in the form of a run's, so that
tables, plots and page show it as they show any run. Its record says under "derived" what it comes from:

kind          what was made, as in its name: "soup(trials)" of `BOnly soup(trials)`
candidates    the runs that it could be made of: run, step, and digest of the saved weights
ingredients   names of those that it is made of
weights       weight of each ingredient
strength      strength that its weights have, if that is not 1
trials        seeds of the trials that the record stands for
settings      what else it follows from
unmeasured    why accuracies are missing, if some are
saved_as      method whose weights are in `selected/`, if it is not that of the runs

The id is a hash of the row and the place in it (method, data set, environments, seeds), so what was derived of earlier
runs is replaced. The weights, if they are saved, are in `selected/`.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from domainbed_ext.algorithms.derived_names import join_derived
from domainbed_ext.errors import BenchmarkError, not_writable
from domainbed_ext.runs.folder import DERIVED, RunFolder, State
from domainbed_ext.runs.saved import Saved
from domainbed_ext.system import strict_json
from domainbed_ext.system.files import remove, replace_atomically

_PLACE = ("dataset", "algorithm", "protocol", "test_envs", "trial_seed", "hparams_seed")  # arguments that the id is of
# What a record says of its whole run, and a derived one says of its first ingredient.
_FACTS = (
    *("hparams", "environments", "data_digest", "split_sizes", "precision", "weights_digest", "backbone_digest"),
    *("trainable_parameters", "total_parameters", "imports", "sources"),
)


@dataclass(frozen=True)
class Candidate:
    """A run that a derived run may be made of.

    Attributes:
        run: Name of its folder.
        step: Step whose weights are used.
        digest: Digest of these weights.
    """

    run: str
    step: int
    digest: str

    @classmethod
    def of(cls, saved: Saved) -> "Candidate":
        """Returns the candidate that a run's saved weights are."""
        return cls(str(saved.record["run"]), int(saved.record["step"]), saved.digest)


@dataclass(frozen=True)
class Derived:
    """What a derived run is computed from; its result follows from this alone, but for versions and machine.

    Attributes:
        sweep_dir: Folder of the sweep.
        kind: What is made of the runs, e.g. "soup(trials)".
        base: Record of one of the candidates, whose facts the record repeats.
        candidates: Runs that it may be made of.
        args: Arguments of the record that are not those of `base`; the method's name follows from `kind`.
        trials: Seeds of the trials that it stands for; empty for the one of `base`.
        settings: What else it follows from, as JSON values.
    """

    sweep_dir: Path
    kind: str
    base: Mapping[str, Any]
    candidates: Sequence[Candidate]
    args: Mapping[str, Any] = field(default_factory=dict)
    trials: Sequence[int] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def record_args(self) -> dict[str, Any]:
        """The arguments as the record has them."""
        args = {**self.base["args"], **self.args}
        return {**args, "algorithm": join_derived(args["algorithm"], self.kind)}

    @property
    def folder(self) -> RunFolder:
        """The folder of the derived run."""
        args = self.record_args
        place = strict_json.dumps({name: args.get(name) for name in _PLACE}, sort_keys=True)
        name = hashlib.blake2b(place.encode("utf-8"), digest_size=16).hexdigest()
        return RunFolder(self.sweep_dir / DERIVED / name)

    @property
    def origin(self) -> dict[str, Any]:
        """The part of the record's "derived" that is known before anything is computed."""
        return {
            "kind": self.kind,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "trials": list(self.trials) or [self.record_args["trial_seed"]],
            "settings": dict(self.settings),
        }

    def finished_record(self) -> dict[str, Any] | None:
        """The record, if it is there and was computed from the same; None if it is to be computed."""
        if self.folder.state is not State.DONE:
            return None
        try:
            record = self.folder.first_record()
        except BenchmarkError:  # it is replaced
            return None
        derived = (record or {}).get("derived") or {}
        same = all(derived.get(name) == value for name, value in self.origin.items())
        return {**record, "run": self.folder.name} if record and same else None

    def finish(
        self,
        accuracies: Mapping[str, float],
        weights: Mapping[str, float],
        strength: float | None = None,
        facts: Mapping[str, Any] | None = None,
        save: Callable[[Path], object] | None = None,
        unmeasured: str = "",
        saved_as: str | None = None,
    ) -> dict[str, Any]:
        """Writes the derived run; it is done when this returns.

        Args:
            accuracies: Accuracy by name, e.g. "env0_in_acc"; without those that could not be measured.
            weights: Weight of each ingredient, by the name of the run.
            strength: Strength of the weights; None where it was not changed.
            facts: Values of the record that are not those of `base`, such as "split_sizes".
            save: Function that writes the weights into the folder that it is given; None to save none.
            unmeasured: Why accuracies are missing, in a sentence; empty if none is.
            saved_as: Method whose weights `save` writes, if it is not that of the runs.

        Returns:
            The record, with the name of the folder under "run".

        Raises:
            BenchmarkError: The folder cannot be written.
        """
        from domainbed_ext.runs import ways
        from domainbed_ext.runs.provenance import machine, versions

        derived = {**self.origin, "ingredients": list(weights), "weights": list(weights.values())}
        derived |= {} if strength is None else {"strength": strength}
        derived |= {"unmeasured": unmeasured} if unmeasured else {}
        derived |= {"saved_as": saved_as} if saved_as else {}
        record = {
            **{name: self.base[name] for name in _FACTS if name in self.base},
            **(facts or {}),
            **accuracies,
            **ways.used(),
            "args": self.record_args,
            "versions": versions(),
            "machine": machine(),
            "step": int(self.base["step"]),
            "derived": derived,
        }
        folder = self.folder
        try:
            folder.start()
            if save is not None:
                replace_atomically(folder.path / "selected", save)
            folder.append(record)
            folder.finish()
        except OSError as error:
            raise not_writable(folder.path, error) from error
        return {**record, "run": folder.name}


def remove_others(sweep_dir: Path, algorithm: str, dataset: str, kept: Iterable[Derived]) -> list[str]:
    """Removes the derived runs of a row that are not of its runs as they are now.

    Args:
        sweep_dir: Folder of the sweep.
        algorithm: Name of the row, e.g. "BOnly soup(trials)".
        dataset: Data set of the row.
        kept: Derived runs that stay.

    Returns:
        Names of the folders that were removed.
    """
    names = {derived.folder.path.name for derived in kept}
    removed = []
    for path in sorted((sweep_dir / DERIVED).glob("*/results.jsonl")):
        folder = RunFolder(path.parent)
        if folder.path.name in names:
            continue
        try:
            args = (folder.first_record() or {}).get("args", {})
        except BenchmarkError:
            continue
        if (args.get("algorithm"), args.get("dataset")) == (algorithm, dataset):
            remove(folder.path)
            removed.append(folder.name)
    return removed
