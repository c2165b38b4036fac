"""Holm's correction for several tests.

Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure (Scandinavian Journal of Statistics, 1979).
"""

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values, so that all of them below a level are wrong together with at most that probability.

    Args:
        p_values: P-values of all tests of a family; a NaN is of no test.

    Returns:
        Adjusted p-values in the same order: the smallest of m times m, the next times m − 1 and so on; none is below
        one before it, and none above 1.
    """
    in_order = sorted((p, place) for place, p in enumerate(p_values) if p == p)
    adjusted, largest = list(p_values), 0.0
    for rank, (p, place) in enumerate(in_order):
        largest = max(largest, min(1.0, (len(in_order) - rank) * p))
        adjusted[place] = largest
    return adjusted
