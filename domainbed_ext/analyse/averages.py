"""Means over pairs of runs with intervals, and over trials."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from domainbed_ext.report.inference.student import CONFIDENCE
from domainbed_ext.seeds import seed_hash

_DRAWS = 2000


def pair_intervals(
    values: NDArray[np.float64], pairs: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Means over pairs of runs, and their intervals.

    Pairs that share a run are alike, so the bootstrap draws runs, not pairs: each draw has the pairs of the runs drawn.

    Args:
        values: A row of values for each pair, [pairs, n].
        pairs: Indices of the two runs of each pair.

    Returns:
        Means, lower and upper ends of their 95 % intervals, [n] each; the ends are NaN where fewer than three runs have
        pairs. The same values have the same intervals.
    """
    first, second = np.asarray(pairs).T
    runs, places = np.unique(np.concatenate([first, second]), return_inverse=True)
    first, second = places[: len(pairs)], places[len(pairs) :]
    means = values.mean(0)
    if len(runs) < 3:
        nothing = np.full_like(means, np.nan)
        return means, nothing, nothing
    generator = np.random.default_rng(seed_hash("pair_intervals", len(runs), len(pairs)))
    counts = generator.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=_DRAWS)
    weights = (counts[:, first] * counts[:, second]).astype(np.float64)
    drawn = weights[weights.any(1)]  # a draw may have no pair
    of_draws = drawn @ values / drawn.sum(1, keepdims=True)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(of_draws, [tail, 100 - tail], axis=0)
    return means, low, high


def mean_of(values: Sequence[float]) -> float:
    """The mean of the numbers among some values; NaN if there are none."""
    numbers = [value for value in values if value == value]
    return float(np.mean(numbers)) if numbers else float("nan")


def spread_of(values: Sequence[float]) -> float:
    """The sample standard deviation of the numbers among some values; NaN of fewer than two."""
    numbers = [value for value in values if value == value]
    return float(np.std(numbers, ddof=1)) if len(numbers) > 1 else float("nan")
