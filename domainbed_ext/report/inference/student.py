"""Student's t of a mean over trials: its standard error, its interval, and the test that rejects what is outside of it.

Source: Student, The Probable Error of a Mean (Biometrika, 1908).
"""

import math

from scipy.special import stdtr, stdtrit

from domainbed_ext.report.inference.sign_test import EQUAL

CONFIDENCE = 0.95


def standard_error(deviation: float, trials: int, shared: float = 0.0) -> float:
    """The standard error of a mean over trials.

    Args:
        deviation: Sample standard deviation (ddof = 1) over trials.
        trials: Number of trials.
        shared: The part that more trials do not lower (`bootstrap.shared_error`), in the same unit.

    Returns:
        √(deviation² / trials + shared²).
    """
    return math.hypot(deviation / math.sqrt(trials), shared)


def student_interval(mean: float, error: float, trials: int) -> tuple[float, float]:
    """The 95 % interval of a mean over trials.

    Args:
        mean: The mean.
        error: Its standard error.
        trials: Number of trials, at least two.
    """
    half = float(stdtrit(trials - 1, (1 + CONFIDENCE) / 2) * error)
    return mean - half, mean + half


def t_test(mean: float, error: float, trials: int) -> float:
    """The probability of a mean at least as far from 0, if the true one were 0; two-sided.

    It is below 5 % where `student_interval` does not hold 0.

    Args:
        mean: Mean over trials.
        error: Its standard error, in the same unit.
        trials: Number of trials.

    Returns:
        P-value; NaN of one trial, or if the mean is.
    """
    if trials < 2 or math.isnan(mean):
        return math.nan
    if abs(mean) <= EQUAL:
        return 1.0
    return 2 * float(stdtr(trials - 1, -abs(mean) / error)) if error else 0.0
