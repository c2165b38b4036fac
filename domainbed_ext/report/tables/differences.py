"""Tables of paired differences: of all methods to a reference in brief, and of pairs of methods with tests."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from domainbed_ext.report.differences import METRICS, PairedDifference
from domainbed_ext.report.inference.power import MOST_TRIALS
from domainbed_ext.report.inference.sign_test import Signs
from domainbed_ext.report.methods import row_label_of
from domainbed_ext.report.pairs import ComparedPairs, Row, best_method
from domainbed_ext.report.tables.captions import warning, without_in_domain
from domainbed_ext.report.tables.columns import Column, make_table, origins
from domainbed_ext.report.tables.table import MISSING, NOT_RECORDED, Origin, Table
from domainbed_ext.system.commands import format_command

if TYPE_CHECKING:
    from domainbed_ext.report.figures import Comparison
    from domainbed_ext.report.scores import Metric

HEADS = ("Difference", "Trials", "p", "p (Holm)", "Higher in", "p (signs)", "Trials needed")
NAMED = 6  # methods or pairs that a sentence names at most


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
        difference = self.comparison.differences.between(algorithm, self.reference, self.metric)
        return MISSING if difference is None else str(difference)

    def origins(self, algorithm: str) -> list[Origin]:
        """The chosen records of both methods."""
        pairs = self.comparison.differences.pairs(algorithm, self.reference)
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
        difference = self.comparison.differences.between(algorithm, self.reference, "out_of_domain")
        return str(difference.trials if difference else 0)

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
    differences = {
        algorithm: difference
        for algorithm in comparison.algorithms
        if algorithm != reference
        and (difference := comparison.differences.between(algorithm, reference, "out_of_domain")) is not None
    }
    return make_table(
        f"{title}, difference to {row_label_of(reference)}",
        comparison.algorithms,
        [
            *(DifferenceColumn(header, comparison, reference, metric) for metric, header in METRICS.items()),
            PairedTrials("Trials", comparison, reference),
        ],
        f"Each method minus {reference}, in percentage points, paired by trial, with the 95 % interval of the mean. Of "
        "each trial, the mean over the test domains that both methods have. "
        f"{describe_intervals(differences, comparison)} An interval that holds 0 does not tell the two apart, and of "
        "twenty intervals one misses its mean by chance. "
        f"Selection: {comparison.selection.description}." + without_in_domain(comparison) + warning([comparison]),
        comparison.incomplete,
    )


def pairs_table(compared: ComparedPairs) -> Table:
    """The differences of pairs of methods, with tests: a row for each metric and pair.

    Args:
        compared: The pairs.

    Returns:
        The table. If all pairs have one reference, the title names it, else each row does.
    """
    comparison, rows = compared.comparison, compared.rows
    references = {row.reference for row in rows}
    several = len(references) != 1
    to = "paired differences" if several else f"difference to {row_label_of(next(iter(references)))}"
    metrics = [row.metric for row in rows]
    return Table(
        f"{comparison.title}, {to}",
        ["Metric", "Method", *(["Minus"] if several else []), *HEADS],
        [
            [
                METRICS[row.metric],
                *([row.algorithm, row.reference] if several else [row_label_of(row.algorithm)]),
                *cells(row),
            ]
            for row in rows
        ],
        caption(compared),
        texts=3 if several else 2,
        breaks={number for number, metric in enumerate(metrics) if number and metric != metrics[number - 1]},
    )


def cells(row: Row) -> list[str]:
    """A row's figures, in the order of `HEADS`.

    Args:
        row: Difference of a pair.
    """
    difference = row.difference
    return [
        str(difference),
        str(difference.trials),
        _p_value(difference.p_value),
        _p_value(row.p_holm),
        higher_in(difference.signs),
        _p_value(difference.p_signs),
        _trials_needed(difference),
    ]


def higher_in(signs: Signs) -> str:
    """In how many trials the first method is higher, as in "12 of 16" or "12 of 16, 1 equal".

    Args:
        signs: Signs of the differences, one for each trial.

    Returns:
        The numbers; "-" where nothing was measured.
    """
    if not signs.total:
        return NOT_RECORDED
    return f"{signs.higher} of {signs.total}" + (f", {signs.equal} equal" if signs.equal else "")


def describe_intervals(differences: Mapping[str, PairedDifference], comparison: "Comparison") -> str:
    """Says what intervals are over, how to have them over images too, and where there are none.

    Args:
        differences: Differences of pairs, by what the sentence calls them.
        comparison: The methods.
    """
    resampling = comparison.resampling
    over_images = {name: each.over_images for name, each in differences.items() if each.trials > 1}
    alone = [name for name, over in over_images.items() if not over]
    parts = []
    if len(alone) < len(over_images):
        parts.append(
            f"Intervals: hierarchical bootstrap over trials and images ({resampling.resamples:,} draws of images, "
            f"seed {resampling.seed})."
        )
    if alone:
        names = ", ".join(alone) if len(alone) <= NAMED else f"{len(alone)} of {len(over_images)} pairs"
        which = f"Intervals of {names}" if len(alone) < len(over_images) else "Intervals"
        parts.append(
            f"{which}: over trials alone (Student's t), without predictions of the images, which "
            f"{format_command('evaluate')} --input_dir DIR --predictions adds."
        )
    if single := sum(each.trials == 1 for each in differences.values()):
        which = "One trial" if single == len(differences) else f"{single} of {len(differences)} pairs: one common trial"
        parts.append(f"{which}, so no interval.")
    return " ".join(parts)


def csv_rows(compared: ComparedPairs) -> Iterator[dict[str, Any]]:
    """The differences in numbers, as rows of `differences.csv`: in percentage points.

    Args:
        compared: The pairs.
    """
    comparison = compared.comparison
    for row in compared.rows:
        difference = row.difference
        low, high = difference.interval or (math.nan, math.nan)
        yield {
            **comparison.key(row.algorithm),
            "reference": row.reference,
            "metric": row.metric,
            "mean": difference.mean,
            "low": low,
            "high": high,
            "trials": difference.trials,
            "deviation": difference.deviation,
            "over_images": difference.over_images,
            "shared_error": difference.shared_error,
            **difference.signs._asdict(),
            "p": difference.p_value,
            "p_holm": row.p_holm,
            "p_signs": difference.p_signs,
            "trials_needed": difference.trials_needed,
            "source": comparison.source,
            **comparison.labels(row.algorithm),
        }


def as_json(compared: ComparedPairs) -> list[dict[str, Any]]:
    """The rows of `differences.csv`, each with its differences by trial and environment.

    Args:
        compared: The pairs.
    """
    values = []
    for row, of_row in zip(compared.rows, csv_rows(compared), strict=True):
        labels = dict(compared.comparison.places(row.metric))
        by_cell = [
            {"trials": list(cell.trials), "environment": labels[cell.env], "difference": 100 * value}
            for cell, value in row.difference.cells.items()
        ]
        values.append({**of_row, "by_trial_and_environment": by_cell})
    return values


def caption(compared: ComparedPairs) -> str:
    """Says what the columns are, and what the intervals are over.

    Args:
        compared: The pairs.
    """
    comparison = compared.comparison
    names = {name for pair in compared.pairs for name in pair}
    apart = ", ".join(" and ".join(pair) for pair in compared.apart)
    out_of_domain = {
        f"{row.algorithm} minus {row.reference}": row.difference
        for row in compared.rows
        if row.metric == "out_of_domain"
    }
    return (
        "Mean over trials and 95 % interval in percentage points, paired by trial and test domain. "
        f"{describe_intervals(out_of_domain, comparison)} Gap source, gap target: train − in-domain and train − "
        "out-of-domain accuracy. p: two-sided t-test, below 0.05 where the interval does not hold 0; Holm: adjusted "
        "for the pairs of this table that have a p, in each metric. Higher in: trials with a difference above 0; p "
        "(signs): two-sided exact sign test over all trials but equal ones, for other seeds and splits of these images "
        "alone. Trials needed: trials with which the t-test would show this mean difference at 5 % with power 0.8 "
        "(noncentral t), if it is the true one; of an interval over images too, on the same images. Selection: "
        f"{comparison.selection.description}."
        + _reference_of(compared)
        + (f" No common trial: {apart}." if apart else "")
        + without_in_domain(comparison, names)
        + warning([comparison], names)
    )


def _reference_of(compared: ComparedPairs) -> str:
    """Says what follows from having chosen the reference by the accuracies that it is compared in."""
    references = {reference for _, reference in compared.pairs}
    best = best_method(compared.comparison)
    if len(compared.pairs) < 2 or references != {best}:
        return ""
    return (
        f" {best} has the best in-domain accuracy of the trained methods with all results: if chosen for that, its "
        "lead is a little overstated."
    )


def _p_value(p: float) -> str:
    if math.isnan(p):
        return NOT_RECORDED
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _trials_needed(difference: PairedDifference) -> str:
    if not math.isfinite(difference.mean) or difference.trials == 1:
        return NOT_RECORDED
    needed = difference.trials_needed
    return f">{MOST_TRIALS:,}" if needed is None else f"{needed:,}"
