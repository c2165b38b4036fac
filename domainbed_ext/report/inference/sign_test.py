"""The exact sign test."""

from collections.abc import Iterable
from typing import NamedTuple

from scipy.special import bdtr

EQUAL = 1e-9  # differences of equal accuracies are this small: means round


class Signs(NamedTuple):
    """How many differences are above 0, below 0, and 0."""

    higher: int
    lower: int
    equal: int

    @classmethod
    def of(cls, differences: Iterable[float]) -> "Signs":
        """Counts signs.

        Args:
            differences: Differences; a NaN counts nowhere.
        """
        values = list(differences)
        higher = sum(value > EQUAL for value in values)
        lower = sum(value < -EQUAL for value in values)
        return cls(higher, lower, sum(abs(value) <= EQUAL for value in values))

    @property
    def total(self) -> int:
        """The number of differences."""
        return self.higher + self.lower + self.equal

    @property
    def p_value(self) -> float:
        """The two-sided p-value of the sign test."""
        return sign_test(self.higher, self.lower)


def sign_test(higher: int, lower: int) -> float:
    """The probability of signs at least as unequal, if either sign had probability 1/2; two-sided and exact.

    Differences of 0 are left out.

    Args:
        higher: Number of differences above 0.
        lower: Number of differences below 0.

    Returns:
        P-value; 1 without any difference.
    """
    tail = bdtr(min(higher, lower), higher + lower, 0.5)  # of the binomial distribution
    return min(1.0, 2 * float(tail))
