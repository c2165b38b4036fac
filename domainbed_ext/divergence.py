"""Runs that diverged, which is to say that a loss or an output of theirs was not a finite number.

A record made since then has "diverged": true and "first_nonfinite_step"; its numbers that are not finite are null.
Records of upstream DomainBed, and ours from before, have a bare NaN instead, and are told by that.
"""

import math
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from domainbed_ext.errors import BenchmarkError

Key = TypeVar("Key", bound=Hashable)


class Diverged(BenchmarkError):  # noqa: N818  (an error by its base)
    """The run was told to end where a number is not finite."""


class Watch:
    """Looks at a run's numbers as they come.

    Args:
        stop: Whether the run ends where one is not finite.

    Attributes:
        step: First step with such a number; None as long as all are finite.
    """

    def __init__(self, stop: bool) -> None:
        self._stop = stop
        self.step: int | None = None
        self._what = "a number"

    def look(self, step: int, values: Mapping[str, float]) -> bool:
        """Looks at the numbers of a step, and warns of the first that is not finite.

        Args:
            step: Index of the step.
            values: Losses or accuracies by name.

        Returns:
            Whether the run diverged just now.
        """
        wrong = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if wrong is None or self.step is not None:
            return False
        self.step, self._what = step, f"{wrong} is {float(values[wrong])}"
        if not self._stop:
            print(
                f"warning: the run diverged at step {step}: {self._what}; it continues, its records say diverged, and "
                "--stop_on_nan would end it here",
                file=sys.stderr,
            )
        return True

    def check(self) -> None:
        """Ends a run that has diverged, if it is to.

        Raises:
            Diverged: It is.
        """
        if self._stop and self.step is not None:
            raise Diverged(f"the run diverged at step {self.step}: {self._what} (--stop_on_nan); lower its lr")

    @property
    def fields(self) -> dict[str, Any]:
        """What a record says of it."""
        return {} if self.step is None else {"diverged": True, "first_nonfinite_step": self.step}


class Count(NamedTuple):
    """How many runs diverged, of how many."""

    diverged: int
    runs: int


def is_diverged(record: Mapping[str, Any]) -> bool:
    """Whether a record, ours or upstream DomainBed's, is of a run that had diverged by then."""
    # Accuracies apart: of a record that a lean run made there are fewer, and whoever has one that is NaN has the flag.
    return bool(record.get("diverged")) or any(
        isinstance(value, float) and not math.isfinite(value)
        for name, value in record.items()
        if not name.endswith("_acc")
    )


def count(records: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], Key]) -> dict[Key, Count]:
    """Counts the runs that diverged.

    Args:
        records: Of any number of runs, each with its run's name under "run".
        key: What runs are counted by.

    Returns:
        By key, the count.
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
    """What a caption says of rows whose runs diverged, as a sentence to append; empty if none did.

    Args:
        counts: By the row's name.
    """
    rows = [f"{name} ({each.diverged} of {each.runs} runs)" for name, each in counts.items() if each.diverged]
    return f" Diverged: {', '.join(rows)}; accuracies that are not known rank last." if rows else ""
