"""Student's t-test of a mean."""

import math

from scipy.special import stdtr

from domainbed_ext.report.inference.sign_test import EQUAL


def t_test(mean: float, error: float, trials: int) -> float:
    """The probability of a mean at least as far from 0, if the true one were 0; two-sided.

    It is below 5 % where the 95 % interval by Student's t does not hold 0.

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
