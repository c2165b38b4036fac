"""Means over trials and their errors, in percent."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DIVERGED = "diverged"  # for a mean of accuracies of which one is NaN


class Summary(NamedTuple):
    """A mean over trials and its error, in percent.

    Attributes:
        mean: Mean over trials.
        err: Standard error or standard deviation; NaN if not known.
        trials: Number of trials.
        complete: Whether every trial has all of the environments that are averaged.
    """

    mean: float
    err: float
    trials: int
    complete: bool = True

    def __str__(self) -> str:
        """DomainBed's form."""
        return DIVERGED if np.isnan(self.mean) else f"{self.mean:.1f} +/- {self.err:.1f}"


def summarise(values: Sequence[float]) -> Summary | None:
    """Mean and standard error (ddof = 0) in percent of one accuracy per trial.

    Args:
        values: Accuracies in [0, 1].

    Returns:
        Summary; None of no values. One trial has error 0, as in DomainBed's tables, though its spread is not known.
    """
    if not values:
        return None
    return Summary(100 * float(np.mean(values)), 100 * float(np.std(values)) / float(np.sqrt(len(values))), len(values))


def summarise_spread(values: Sequence[float]) -> Summary | None:
    """Mean and sample standard deviation (ddof = 1) in percent of one accuracy per trial.

    Args:
        values: Accuracies in [0, 1].

    Returns:
        Summary, its `err` the standard deviation: NaN of one trial. None of no values.
    """
    if not values:
        return None
    spread = 100 * float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return Summary(100 * float(np.mean(values)), spread, len(values))
