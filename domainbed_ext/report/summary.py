"""Means over trials and their errors or intervals, in percent."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from domainbed_ext.report.inference.student import standard_error, student_interval

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
        """DomainBed's form; the mean alone of one trial, whose error is not known."""
        if math.isnan(self.mean):
            return DIVERGED
        return f"{self.mean:.1f} +/- {self.err:.1f}" if self.trials > 1 else f"{self.mean:.1f}"


def summarise(values: Sequence[float]) -> Summary | None:
    """Mean and standard error (ddof = 0) in percent of one accuracy per trial.

    Args:
        values: Accuracies in [0, 1].

    Returns:
        Summary; None of no values. `err` is 0 of one trial, as in DomainBed's tables, though its spread is not known.
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


class Estimate(NamedTuple):
    """A mean over trials and its 95 % interval by Student's t, in percent or percentage points.

    Attributes:
        mean: Mean over trials.
        interval: Confidence interval of the mean; None of one trial.
        trials: Number of trials.
    """

    mean: float
    interval: tuple[float, float] | None
    trials: int

    def __str__(self) -> str:
        """The mean with its interval, as "71.2 (68.0 to 74.4)"."""
        if math.isnan(self.mean):
            return DIVERGED
        if self.interval is None:
            return f"{self.mean:.1f}"
        low, high = self.interval
        return f"{self.mean:.1f} ({low:.1f} to {high:.1f})"


def estimate(values: Sequence[float], shared: float = 0.0) -> Estimate | None:
    """Mean and 95 % interval, in percent, of one value per trial.

    Args:
        values: Accuracies in [0, 1], or differences in [-1, 1].
        shared: The part of the standard error of their mean that values do not show, in percent.

    Returns:
        The estimate; None of no values.
    """
    if not values:
        return None
    points = 100 * np.asarray(values, dtype=float)
    mean, trials = float(points.mean()), len(points)
    if trials == 1:
        return Estimate(mean, None, 1)
    error = standard_error(float(points.std(ddof=1)), trials, shared)
    return Estimate(mean, student_interval(mean, error, trials), trials)
