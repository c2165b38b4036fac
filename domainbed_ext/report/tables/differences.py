"""Differences of methods to a reference, paired by trial, with confidence intervals.

Runs of one trial share their splits, so a difference within a trial varies less than one across trials.
Intervals are those of Student's t over trials: of three trials, a difference has to be 4.3 standard errors from zero.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from domainbed_ext.report.methods import row_label_of
from domainbed_ext.report.summary import Estimate, estimate
from domainbed_ext.report.tables.captions import warning, without_in_domain
from domainbed_ext.report.tables.columns import Column, make_table, origins
from domainbed_ext.report.tables.table import MISSING, NOT_RECORDED, Origin, Table, signed

if TYPE_CHECKING:
    from domainbed_ext.report.figures import Comparison, Metric, Score

METRICS: Mapping["Metric", str] = {
    "out_of_domain": "Out-of-domain",
    "in_domain": "In-domain",
    "gap_target": "Gap target",
}


class Difference(Estimate):
    """A mean difference over trials, in percentage points."""

    def __str__(self) -> str:
        """The mean with its interval, as "+1.2 (-2.9 to +5.3)"."""
        if math.isnan(self.mean):
            return NOT_RECORDED
        if self.interval is None:
            return signed(self.mean)
        return f"{signed(self.mean)} ({' to '.join(map(signed, self.interval))})"


def difference_over_trials(values: Sequence[float]) -> Difference | None:
    """Mean and 95 % interval, in percentage points, of one difference per trial.

    Args:
        values: Differences in [-1, 1].

    Returns:
        The difference; None of no values.
    """
    over_trials = estimate(values)
    return over_trials and Difference(*over_trials)


def paired_difference(comparison: "Comparison", algorithm: str, reference: str, metric: "Metric") -> Difference | None:
    """The difference of two methods, paired by trial; of each trial the mean over the test domains that both have.

    What stands for several trials, as a soup over trials, is paired with the mean over these.

    Args:
        comparison: The methods under one selection method.
        algorithm: Id of the method.
        reference: Id of the method that is subtracted.
        metric: Accuracy or gap.

    Returns:
        The difference; None where no trial has both.
    """
    by_trial: defaultdict[tuple[int, ...], list[float]] = defaultdict(list)
    for one, other in _pairs(comparison, algorithm, reference):
        by_trial[_trials(one, other)].append(one.value(metric) - other.value(metric))
    return difference_over_trials([sum(values) / len(values) for values in by_trial.values()])


@dataclass(frozen=True)
class DifferenceColumn(Column):
    """The paired difference of a metric.

    Attributes:
        header: Head of the column.
        comparison: The methods under one selection method.
        reference: Id of the method that is subtracted.
        metric: Accuracy or gap.
    """

    header: str
    comparison: "Comparison"
    reference: str
    metric: "Metric"

    def text(self, algorithm: str) -> str:
        """Mean and interval; "-" in the reference's own row."""
        if algorithm == self.reference:
            return NOT_RECORDED
        difference = paired_difference(self.comparison, algorithm, self.reference, self.metric)
        return MISSING if difference is None else str(difference)

    def origins(self, algorithm: str) -> list[Origin]:
        """The chosen records of both methods."""
        pairs = list(_pairs(self.comparison, algorithm, self.reference))
        return origins(score.record for scores in zip(*pairs, strict=True) for score in scores)


@dataclass(frozen=True)
class PairedTrials(Column):
    """How many trials both methods have.

    Attributes:
        header: Head of the column.
        comparison: The methods under one selection method.
        reference: Id of the method that is subtracted.
    """

    header: str
    comparison: "Comparison"
    reference: str

    def text(self, algorithm: str) -> str:
        """The number."""
        return str(len({_trials(*pair) for pair in _pairs(self.comparison, algorithm, self.reference)}))

    def origins(self, algorithm: str) -> list[Origin]:
        """No record in particular."""
        return []


def difference_table(comparison: "Comparison", reference: str, title: str) -> Table:
    """Each method's difference to the reference.

    Args:
        comparison: The methods under one selection method.
        reference: Id of the method that is subtracted.
        title: What the methods were run on.
    """
    return make_table(
        f"{title}, difference to {row_label_of(reference)}",
        comparison.algorithms,
        [
            *(DifferenceColumn(header, comparison, reference, metric) for metric, header in METRICS.items()),
            PairedTrials("Trials", comparison, reference),
        ],
        f"Each method minus {reference}, in percentage points, paired by trial, with the 95 % interval of the mean by "
        "Student's t over trials. Of each trial, the mean over the test domains that both methods have. An interval "
        "that holds 0 does not tell the two apart, and of twenty intervals one misses its mean by chance. Selection: "
        f"{comparison.selection.description}." + without_in_domain(comparison) + warning([comparison]),
        comparison.incomplete,
    )


def difference_rows(comparison: "Comparison", reference: str) -> Iterator[dict[str, Any]]:
    """The differences of all methods as rows of `differences.csv`.

    Args:
        comparison: The methods under one selection method.
        reference: Id of the method that is subtracted.
    """
    for algorithm in comparison.algorithms:
        for metric in METRICS:
            difference = paired_difference(comparison, algorithm, reference, metric)
            if algorithm != reference and difference is not None:
                low, high = difference.interval or (math.nan, math.nan)
                yield {
                    **comparison.key(algorithm),
                    "reference": reference,
                    "metric": metric,
                    "mean": difference.mean,
                    "low": low,
                    "high": high,
                    "trials": difference.trials,
                    "source": comparison.source,
                    **comparison.labels(algorithm),
                }


def _pairs(comparison: "Comparison", algorithm: str, reference: str) -> Iterator[tuple["Score", "Score"]]:
    """The scores of both methods on the same test domains in the same trials."""
    of_reference: defaultdict[tuple[int, ...], list[Score]] = defaultdict(list)
    for score in comparison.scores(reference):
        of_reference[tuple(score.test_envs)].append(score)
    for score in comparison.scores(algorithm):
        for other in of_reference[tuple(score.test_envs)]:
            if not set(score.trials).isdisjoint(other.trials):
                yield score, other


def _trials(one: "Score", other: "Score") -> tuple[int, ...]:
    """The trials that a pair is of: those of the score that stands for more."""
    return max(one.trials, other.trials, key=len)
