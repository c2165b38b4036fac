"""Tables of what `domainbed_ext.frontier` evaluates: accuracy at each strength of the update and the selected one."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from domainbed_ext.algorithms.derived_names import SELECTED_STRENGTH, split_derived
from domainbed_ext.model_selection import FULL_STRENGTH
from domainbed_ext.report.frontier import Curve, curves
from domainbed_ext.report.methods import row_label_of
from domainbed_ext.report.tables.captions import warning
from domainbed_ext.report.tables.columns import Column, Figure, make_table, origins
from domainbed_ext.report.tables.differences import DifferenceColumn, PairedTrials
from domainbed_ext.report.tables.table import NOT_RECORDED, Origin, Table

if TYPE_CHECKING:
    from domainbed_ext.report.figures import Comparison
    from domainbed_ext.report.scores import Metric

_METRICS: tuple["Metric", ...] = ("in_domain", "out_of_domain")


def frontier_tables(comparison: "Comparison", title: str) -> list[Table]:
    """The table of selected strengths, and that of all strengths.

    Args:
        comparison: The methods under one selection method.
        title: What the methods were run on.

    Returns:
        Tables; none of a sweep whose runs were not evaluated along the strength of their update.
    """
    selected = [each for each in comparison.algorithms if split_derived(each)[1] == SELECTED_STRENGTH]
    tables = [_selected_table(comparison, selected, title)] if any(map(comparison.scores, selected)) else []
    if made := curves(comparison):
        tables.append(_curves_table(comparison, made, title))
    return tables


@dataclass(frozen=True)
class _MeanStrength(Column):
    """The mean of the strengths that were selected, with the smallest and the largest."""

    header: str
    comparison: "Comparison"

    def text(self, algorithm: str) -> str:
        """The mean and, where they differ, the range."""
        strengths = [record["derived"]["strength"] for record in self.comparison.records(algorithm)]
        if not strengths:
            return NOT_RECORDED
        mean, low, high = np.mean(strengths), min(strengths), max(strengths)
        return f"{mean:.2f}" + (f" ({low:g} to {high:g})" if low < high else "")

    def origins(self, algorithm: str) -> list[Origin]:
        """All selected records."""
        return origins(self.comparison.records(algorithm))


@dataclass(frozen=True)
class _ToMethod(Column):
    """A column that compares each row with its own method, whose strength is 1.

    Attributes:
        header: Head of the column.
        column: Function that returns the column that compares with a method.
    """

    header: str
    column: Callable[[str], Column]

    def text(self, algorithm: str) -> str:
        """The cell of the column that compares with the row's method."""
        return self.column(split_derived(algorithm)[0]).text(algorithm)

    def origins(self, algorithm: str) -> list[Origin]:
        """What that cell comes from."""
        return self.column(split_derived(algorithm)[0]).origins(algorithm)


def _selected_table(comparison: "Comparison", selected: list[str], title: str) -> Table:
    def difference(metric: "Metric") -> Callable[[str], Column]:
        return lambda method: DifferenceColumn("", comparison, method, metric)

    return make_table(
        f"{title}, selected strength of the update",
        selected,
        [
            _MeanStrength("Strength", comparison),
            Figure("In-domain", comparison, "in_domain", ranked=True),
            Figure("Out-of-domain", comparison, "out_of_domain", ranked=True),
            _ToMethod("In-domain vs strength 1", difference("in_domain")),
            _ToMethod("Out-of-domain vs strength 1", difference("out_of_domain")),
            _ToMethod("Trials", lambda method: PairedTrials("", comparison, method)),
        ],
        "Strength: mean over runs of the strength of the update with the best accuracy on the held-out images of the "
        "training domains (of equals the largest), with its range; nothing of the test domain is used. Weights at "
        "strength a: start + a·(trained − start). In-domain, out-of-domain: accuracy at that strength in %, mean ± "
        f"{comparison.error}. Vs strength 1: the difference to the trained weights in percentage points, paired by "
        "trial, with the 95 % interval of the mean by Student's t over trials." + warning([comparison]),
        comparison.incomplete,
    )


def _curves_table(comparison: "Comparison", made: list[Curve], title: str) -> Table:
    columns: list[tuple[str, Callable[[Curve, float], object]]] = [
        ("In-domain", lambda curve, strength: curve.estimate(strength, "in_domain")),
        ("Out-of-domain", lambda curve, strength: curve.estimate(strength, "out_of_domain")),
        ("Out-of-domain vs strength 1", _to_trained),
    ]
    rows = [(curve, strength) for curve in made for strength in curve.strengths]
    return Table(
        f"{title}, accuracy along the strength of the update",
        ["Algorithm", "Strength", *(header for header, _ in columns)],
        [
            [
                row_label_of(curve.algorithm, curve.lack),
                f"{strength:g}",
                *(str(cell(curve, strength)) for _, cell in columns),
            ]
            for curve, strength in rows
        ],
        "Weights at strength a: start + a·(trained − start). Strength 1 is the trained model; strength 0 is the start, "
        "under the trained head unless the head started from a probe (`head_start`). In-domain: accuracy in % on the "
        "held-out images of the training domains; out-of-domain: on the test domain; mean over trials of each trial's "
        "mean over test domains, with the 95 % interval by Student's t. Vs strength 1: the difference in percentage "
        f"points, paired by trial. Selection of the runs: {comparison.selection.description}.",
        origins={
            (row, column): origins(curve.records(strength))
            for row, (curve, strength) in enumerate(rows)
            for column in range(1, 2 + len(columns))
        },
        texts=1,
        algorithms=[curve.algorithm for curve, _ in rows],
        breaks={row for row, (curve, strength) in enumerate(rows) if row and strength == curve.strengths[0]},
    )


def _to_trained(curve: Curve, strength: float) -> object:
    difference = None if strength == FULL_STRENGTH else curve.difference(strength, "out_of_domain")
    return NOT_RECORDED if difference is None else difference


def frontier_rows(comparison: "Comparison") -> Iterator[dict[str, Any]]:
    """All estimates as rows of `frontier.csv`.

    Args:
        comparison: The methods under one selection method.
    """
    for curve in curves(comparison):
        for strength in curve.strengths:
            for metric in _METRICS:
                estimate, difference = curve.estimate(strength, metric), curve.difference(strength, metric)
                assert estimate is not None
                low, high = estimate.interval or (math.nan, math.nan)
                row = {"mean": estimate.mean, "low": low, "high": high, "trials": estimate.trials}
                if difference is not None:
                    low, high = difference.interval or (math.nan, math.nan)
                    row |= {"difference": difference.mean, "difference_low": low, "difference_high": high}
                yield {
                    **comparison.key(curve.algorithm),
                    "strength": strength,
                    "metric": metric,
                    **row,
                    "source": comparison.source,
                    **comparison.labels(curve.algorithm),
                }
