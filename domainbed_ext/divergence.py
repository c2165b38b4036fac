"""Diverged runs: those with a loss or an output that is not a finite number.

A record of such a run has "diverged": true and "first_nonfinite_step", and null for numbers that are not finite.
Records of upstream DomainBed, and older ones of ours, have a bare NaN instead.
"""

import math
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from domainbed_ext.errors import BenchmarkError

Key = TypeVar("Key", bound=Hashable)


class Diverged(BenchmarkError):  # noqa: N818  (an error by its base)
    """The run ends because a number is not finite, as `--stop_on_nan` asks."""


class Watch:
    """Watches a run's numbers.

    Args:
        stop: Whether the run ends where a number is not finite.

    Attributes:
        step: First step with a number that is not finite; None as long as all are finite.
    """

    def __init__(self, stop: bool) -> None:
        self._stop = stop
        self.step: int | None = None
        self._what = "a number"

    def look(self, step: int, values: Mapping[str, float]) -> bool:
        """Checks the numbers of a step, and warns of the first that is not finite.

        Args:
            step: Index of the step; an earlier one than before where numbers of it follow later.
            values: Losses or accuracies by name.

        Returns:
            Whether the run diverged at this step.
        """
        wrong = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if wrong is None or (self.step is not None and self.step <= step):
            return False
        self.step, self._what = step, f"{wrong} is {float(values[wrong])}"
        if not self._stop:
            print(
                f"warning: the run diverged at step {step}: {self._what}; it continues, its records say diverged; "
                "--stop_on_nan ends such a run",
                file=sys.stderr,
            )
        return True

    def check(self) -> None:
        """Ends a run that has diverged, if `stop` is set.

        Raises:
            Diverged: The run has diverged and `stop` is set.
        """
        if self._stop and self.step is not None:
            raise Diverged(f"the run diverged at step {self.step}: {self._what} (--stop_on_nan); lower its lr")

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a record that say so; none as long as all numbers are finite."""
        return {} if self.step is None else {"diverged": True, "first_nonfinite_step": self.step}


class Count(NamedTuple):
    """How many runs diverged, of how many."""

    diverged: int
    runs: int


def is_diverged(record: Mapping[str, Any]) -> bool:
    """Whether a record, ours or upstream DomainBed's, is of a run that had diverged by its step."""
    # Not by accuracies: a lean run has fewer of them, and a record with one that is NaN has the flag too.
    return bool(record.get("diverged")) or any(
        isinstance(value, float) and not math.isfinite(value)
        for name, value in record.items()
        if not name.endswith("_acc")
    )


def count(records: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], Key]) -> dict[Key, Count]:
    """Counts the runs that diverged.

    Args:
        records: Records of any number of runs, each with its run's name under "run".
        key: Function of a record that runs are counted by.

    Returns:
        Counts by key.
    """
    runs: dict[Key, set[str]] = {}
    diverged: dict[Key, set[str]] = {}
    for record in records:
        place = key(record)
        runs.setdefault(place, set()).add(record["run"])
        if is_diverged(record):
            diverged.setdefault(place, set()).add(record["run"])
    return {place: Count(len(diverged.get(place, ())), len(names)) for place, names in runs.items()}


def sentence(counts: Mapping[str, Count]) -> str:
    """A sentence for captions on rows whose runs diverged; empty if none did.

    Args:
        counts: Counts by the row's name.
    """
    rows = [f"{name} ({each.diverged} of {each.runs} runs)" for name, each in counts.items() if each.diverged]
    return f" Diverged: {', '.join(rows)}; accuracies that are not known rank last." if rows else ""
