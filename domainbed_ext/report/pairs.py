"""Which methods are compared with which, and their differences with tests over all pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from domainbed_ext.algorithms.derived_names import split_derived
from domainbed_ext.algorithms.names import find_among
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.report.differences import METRICS, PairedDifference
from domainbed_ext.report.inference.holm import holm
from domainbed_ext.report.summary import Summary

if TYPE_CHECKING:
    from domainbed_ext.report.figures import Comparison
    from domainbed_ext.report.scores import Metric

Pair = tuple[str, str]
"""Ids of a method and of the one that is subtracted from it."""

PairsOf = Callable[["Comparison"], list[Pair]]
"""Function of a comparison that returns the pairs to compare."""


@dataclass(frozen=True)
class Row:
    """A difference among those of several pairs.

    Attributes:
        algorithm: Id of the method.
        reference: Id of the method that is subtracted.
        metric: Accuracy or gap.
        difference: Their difference.
        p_holm: P-value of the t-test, adjusted for the pairs that are compared in this metric.
    """

    algorithm: str
    reference: str
    metric: "Metric"
    difference: PairedDifference
    p_holm: float


@dataclass(frozen=True)
class ComparedPairs:
    """Pairs of methods on one data set under one selection method.

    Attributes:
        comparison: The methods.
        rows: Differences by metric, then by pair.
        apart: Pairs without a common trial on the same test domains.
    """

    comparison: "Comparison"
    rows: list[Row]
    apart: list[Pair]

    @property
    def pairs(self) -> list[Pair]:
        """The pairs that were compared."""
        return list(dict.fromkeys((row.algorithm, row.reference) for row in self.rows))


def compare_pairs(comparison: "Comparison", pairs: Sequence[Pair]) -> ComparedPairs:
    """Compares pairs of methods in all metrics.

    Args:
        comparison: The methods.
        pairs: Pairs; those with a method that has no scores here are left out.
    """
    there = [pair for pair in pairs if all(map(comparison.scores, pair))]
    apart = [pair for pair in there if not comparison.differences.pairs(*pair)]
    rows: list[Row] = []
    for metric in METRICS:
        differences = [
            (pair, difference)
            for pair in there
            if (difference := comparison.differences.between(*pair, metric)) is not None
        ]
        adjusted = holm([difference.p_value for _, difference in differences])
        rows += [
            Row(*pair, metric, difference, p_holm)
            for (pair, difference), p_holm in zip(differences, adjusted, strict=True)
        ]
    return ComparedPairs(comparison, rows, apart)


def best_method(comparison: "Comparison") -> str | None:
    """The id of the method with the best in-domain accuracy, by which training-domain validation selects.

    Args:
        comparison: The methods.

    Returns:
        Id: of methods with all results if there are any, and of trained runs; of equals the first. None without scores.
    """
    scored = [each for each in comparison.algorithms if comparison.scores(each)]
    trained = [each for each in scored if not split_derived(each)[1]] or scored

    def rank(algorithm: str) -> tuple[bool, float]:
        summary: Summary | None = comparison.comparable(algorithm, comparison.summary(algorithm, "in_domain"))
        if summary is None or summary.mean != summary.mean:
            return False, -1.0
        return summary.complete, summary.mean

    return max(trained, key=rank, default=None)


def against(reference: str | None = None) -> PairsOf:
    """All methods against one.

    Args:
        reference: Id of the method that is subtracted; None for the best one of each comparison.
    """

    def pairs_of(comparison: "Comparison") -> list[Pair]:
        chosen = best_method(comparison) if reference is None else reference
        return [(each, chosen) for each in comparison.algorithms if chosen is not None and each != chosen]

    return pairs_of


def all_pairs(comparison: "Comparison") -> list[Pair]:
    """Every pair once, the method that tables list first minus the other.

    Args:
        comparison: The methods.
    """
    names = comparison.algorithms
    return [(first, second) for place, first in enumerate(names) for second in names[place + 1 :]]


def find_row(where: str, name: str, algorithms: Sequence[str]) -> str:
    """Finds the row that a name on the command line means.

    Args:
        where: Option with its value, for the error.
        name: Name in any spelling.
        algorithms: Ids of all rows.

    Raises:
        BenchmarkError: There is no such row, or there are several.
    """
    try:
        found = find_among(name, algorithms)
    except BenchmarkError:  # not the name of any method
        found = None
    if found is None:
        raise BenchmarkError(f"{where}: there are no runs of {name}: choose one of {', '.join(algorithms)}")
    return found


def parse_pairs(words: Sequence[str], algorithms: Sequence[str]) -> list[Pair]:
    """Reads the values of `--pairs`.

    Args:
        words: Two names with a colon between, each.
        algorithms: Ids of all rows.

    Raises:
        BenchmarkError: A word is not two names, a name is of no row, or both are of the same row.
    """
    return list(dict.fromkeys(_parse_pair(word, algorithms) for word in words))


def _parse_pair(word: str, algorithms: Sequence[str]) -> Pair:
    where = f"--pairs {word}"
    halves = [(word[:place], word[place + 1 :]) for place, letter in enumerate(word) if letter == ":"]
    halves = [half for half in halves if all(half)]
    if not halves:
        raise BenchmarkError(f"{where} is not two rows: give two names with a colon between, as in BOnly:BA")
    for number, half in enumerate(halves, 1):  # a name may have a colon
        try:
            first, second = (find_row(where, name, algorithms) for name in half)
            break
        except BenchmarkError:
            if number == len(halves):
                raise
    if first == second:
        raise BenchmarkError(f"{where} compares {first} with itself: give two rows")
    return first, second
