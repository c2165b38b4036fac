"""Evaluates a finished run along the strength of its update, and derives the run at the strength that is selected.

A strength is selected as steps are, by the accuracy on the held-out images of the training environments. So the derived
run uses nothing of the test environments. Torch is imported only to evaluate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from domainbed_ext.algorithms.derived_names import SELECTED_STRENGTH
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import (
    FULL_STRENGTH,
    STRENGTHS,
    along_strength,
    select_strength,
    training_environments,
)
from domainbed_ext.runs import strengths
from domainbed_ext.runs.derived import Candidate, Derived
from domainbed_ext.runs.differences import changed
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.saved import Moved, Saved, SavedRun, find_saved, load_run
from domainbed_ext.runs.strengths import Evaluation
from domainbed_ext.system import progress

TOLERANCE = 0.01  # of accuracies at strength 1 on another processor, which rounds differently; at least one image


@dataclass(frozen=True)
class Plan:
    """A run, and the strengths that it is to be evaluated at.

    Attributes:
        sweep_dir: Folder of the sweep.
        run: Folder of the run.
        strengths: Strengths, ascending.
        train_splits: Whether train accuracies are evaluated at every strength, or at 1 and the selected one alone.
        moved: Where data, weights and the rest are now.
    """

    sweep_dir: Path
    run: RunFolder
    strengths: tuple[float, ...]
    train_splits: bool = False
    moved: Moved = Moved()  # noqa: RUF009  (it is frozen)

    @cached_property
    def saved(self) -> Saved:
        """The record of the selected step, and what was saved then.

        Raises:
            BenchmarkError: Nothing was saved.
        """
        return find_saved(self.run)

    @cached_property
    def candidate(self) -> Candidate:
        """The run, its step and the digest of its saved weights."""
        return Candidate.of(self.saved)

    @property
    def derived(self) -> Derived:
        """The run at the selected strength."""
        settings = {STRENGTHS: list(self.strengths)}
        return Derived(self.sweep_dir, SELECTED_STRENGTH, self.saved.record, [self.candidate], settings=settings)

    def sizes(self) -> dict[str, int]:
        """Number of images that each recorded accuracy is of, by the name of the split."""
        record = self.saved.record
        share = record["args"].get("train_eval_share") or 1.0
        trained_on = {f"env{env}_in" for env in training_environments(record)}
        return {
            name: max(1, round(size * share)) if name in trained_on else size
            for name, size in record["split_sizes"].items()
            if f"{name}_acc" in record
        }

    def evaluations(self) -> dict[float, Evaluation]:
        """What was evaluated of these weights, by strength."""
        there = strengths.of_weights(self.run.path, self.candidate.step, self.candidate.digest)
        return {each["strength"]: each for each in there}

    def missing(self) -> dict[float, list[str]]:
        """The splits that are to be evaluated by strength; 1 is the first, so that a wrong model is found at once."""
        in_order = sorted(self.strengths, key=lambda strength: (strength != FULL_STRENGTH, strength))
        there, train = self.evaluations(), self._train_splits()
        missing = {}
        for strength in in_order:
            # All at 1: together with the others they are in the batches of the run, which the record has to equal.
            wanted = [
                name for name in self.sizes() if self.train_splits or strength == FULL_STRENGTH or name not in train
            ]
            if lacking := [name for name in wanted if f"{name}_acc" not in there.get(strength, {})]:
                missing[strength] = wanted if strength == FULL_STRENGTH else lacking
        return missing

    def images(self) -> int:
        """Number of images that are to be evaluated, each at as many strengths as it is missing at."""
        sizes = self.sizes()
        return sum(sizes[name] for names in self.missing().values() for name in names)

    @property
    def is_done(self) -> bool:
        """Whether nothing is to be evaluated or derived."""
        return not self.missing() and self.derived.finished_record() is not None

    def _train_splits(self) -> set[str]:
        return {f"env{env}_in" for env in training_environments(self.saved.record)}


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        selected: Selected strength; None if the run could not be evaluated.
        error: Why it could not be, in a sentence.
        warnings: What differs from the record, in sentences.
    """

    selected: float | None
    error: str = ""
    warnings: tuple[str, ...] = ()


def evaluate(plan: Plan) -> Outcome:
    """Evaluates what is missing, and derives the run at the selected strength.

    Args:
        plan: Run and strengths. Each strength is on disk before the next is evaluated.
    """
    if parent_process() is not None:
        progress.hide()  # the other process shows its own
    try:
        return _Evaluation(plan).finish()
    except BenchmarkError as error:
        return Outcome(None, str(error))


class _Evaluation:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.warnings: list[str] = []

    @cached_property
    def loaded(self) -> SavedRun:
        return load_run(self.plan.run, moved=self.plan.moved, with_start=True)

    def finish(self) -> Outcome:
        for strength, names in self.plan.missing().items():
            self._evaluate(strength, names)
        record = self.plan.saved.record
        there = self.plan.evaluations()
        along = along_strength({**record, STRENGTHS: [there[strength] for strength in self.plan.strengths]})
        selected = select_strength(along)
        if lacking := [name for name in self.plan.sizes() if f"{name}_acc" not in there[selected]]:
            self._evaluate(selected, lacking)
        accuracies = strengths.accuracies(self.plan.evaluations()[selected])
        self.plan.derived.finish(accuracies, {record["run"]: 1.0}, selected)
        return Outcome(selected, warnings=tuple(self.warnings))

    def _evaluate(self, strength: float, names: list[str]) -> None:
        from domainbed_ext.runs.provenance import machine, versions
        from vitlorafa import AdapterError

        try:
            self.loaded.algorithm.set_strength(strength)
        except AdapterError as error:
            raise BenchmarkError(f"{self.plan.run.path}: {error}") from error
        accuracies = self.loaded.accuracies(names)
        if strength == FULL_STRENGTH:
            self._compare(accuracies)
        strengths.add(
            self.plan.run.path,
            {
                "strength": strength,
                "step": self.plan.candidate.step,
                "weights": self.plan.candidate.digest,
                **accuracies,
                "precision": self.loaded.record["precision"],
                "versions": versions(),
                "machine": machine(),
            },
        )

    def _compare(self, now: Mapping[str, float]) -> None:
        """Compares with the record: equal where the run was trained, else within `TOLERANCE`."""
        from domainbed_ext.runs.provenance import machine, versions

        record, sizes, path = self.plan.saved.record, self.plan.sizes(), self.plan.run.path
        then = {name: _number(record[name]) for name in now}
        differing = [name for name in now if not _same(then[name], now[name])]
        if not differing:
            return
        there = {**record.get("versions", {}), **record.get("machine", {})}
        elsewhere = changed(there, {**versions(), **machine()})
        bounds = {name: max(TOLERANCE, 1.5 / sizes[name.removesuffix("_acc")]) for name in differing}
        worst = max(differing, key=lambda name: _distance(then[name], now[name]))
        words = (
            f"{len(differing)} of {len(now)} accuracies at strength 1 are not as recorded (e.g. {worst}: "
            f"{then[worst]:.4f} then, {now[worst]:.4f} now)"
        )
        if not elsewhere or any(_distance(then[name], now[name]) > bounds[name] for name in differing):
            reason = f"it ran elsewhere: {elsewhere}; and " if elsewhere else ""
            raise BenchmarkError(
                f"{path}: {words}: {reason}the images or the weights are not the run's; run it again, or compare with "
                f"python -m domainbed_ext.evaluate --run {path}"
            )
        self.warnings.append(f"{path}: {words}, which is rounding: it ran elsewhere ({elsewhere})")


def _number(recorded: Any) -> float:
    return math.nan if recorded is None else float(recorded)


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def _distance(one: float, other: float) -> float:
    """The difference; infinite if one of them alone is NaN."""
    return math.inf if math.isnan(one - other) else abs(one - other)
