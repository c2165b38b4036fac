"""How many trials would show a difference."""

import math

import numpy as np
from scipy.special import nctdtr, stdtrit

from domainbed_ext.report.inference.sign_test import EQUAL
from domainbed_ext.report.inference.student import standard_error

LEVEL = 0.05
POWER = 0.8
MOST_TRIALS = 10_000  # more than anyone runs


def trials_needed(mean: float, deviation: float, shared: float = 0.0) -> int | None:
    """The number of trials at which a paired t-test would show a difference, at 5 % with power 0.8.

    This is the smallest number n ≥ 2 for which the two-sided test at level 0.05 rejects "no difference" with
    probability 0.8 or more, if trials differ from each other as they did: if their differences are normal with this
    mean and this standard deviation. The test's statistic is taken to have a noncentral t distribution with n − 1
    degrees of freedom and noncentrality mean / √(deviation² / n + shared²), and the test's power is its probability
    outside of ± the 97.5 % quantile of Student's t. The observed mean is taken as the true one, so the number is as
    uncertain as the mean is.

    Args:
        mean: Mean difference over trials.
        deviation: Sample standard deviation (ddof = 1) of the difference over trials, in the same unit.
        shared: The part of the mean's standard error that more trials do not lower, in the same unit.

    Returns:
        Number of trials; None if it is above `MOST_TRIALS` or unknown, as of one trial.
    """
    if not (math.isfinite(mean) and math.isfinite(deviation)) or abs(mean) <= EQUAL:
        return None
    if deviation == 0 == shared:
        return 2

    def enough_power(trials: int) -> bool:
        return power(abs(mean) / standard_error(deviation, trials, shared), trials) >= POWER

    if not enough_power(MOST_TRIALS):
        return None
    few, enough = 1, MOST_TRIALS  # power rises with the number of trials
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if enough_power(middle) else (middle, enough)
    return enough


def power(shift: float, trials: int) -> float:
    """The probability that a two-sided paired t-test at 5 % shows a difference.

    Args:
        shift: Mean difference in standard errors of the mean, at least 0.
        trials: Number of trials, at least 2.
    """
    freedom = trials - 1
    limit = stdtrit(freedom, 1 - LEVEL / 2)
    # SciPy gives NaN far out in a tail, where the probability is 0.
    below, far_below = np.nan_to_num([nctdtr(freedom, shift, limit), nctdtr(freedom, shift, -limit)])
    return float(1 - below + far_below)
