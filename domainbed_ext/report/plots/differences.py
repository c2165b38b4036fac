"""The plot of paired differences: how far each method is from a reference, with an interval over trials."""

import math
import textwrap
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from domainbed_ext.report.differences import PairedDifference
from domainbed_ext.report.figures import Comparison
from domainbed_ext.report.methods import group_starts, label_of
from domainbed_ext.report.plots.palette import MARKER_SIZES, Style, styles_of
from domainbed_ext.report.plots.style import GREY, PANEL_INCHES, bare, figure_of, name_axes
from domainbed_ext.report.results import Results

NAME_LETTERS = 36  # in a line of the name of the x axis, beside which long names of methods leave little room


class _Compared(NamedTuple):
    """The methods of one comparison that share trials with the reference, without the reference."""

    title: str
    points: list[tuple[str, PairedDifference]]

    @property
    def rows(self) -> list[float]:
        """The place of each method on the y axis, adaptations with several objectives apart from the next."""
        starts = group_starts([algorithm for algorithm, _ in self.points])
        return [row + 0.5 * sum(start <= row for start in starts) for row in range(len(self.points))]


def difference_plot(results: Results, reference: str) -> Figure | None:
    """Draws each method's difference to the reference in out-of-domain accuracy.

    Args:
        results: Figures of the runs.
        reference: Id of the method that all others are compared with.

    Returns:
        A figure with a panel for each comparison; None if nothing can be compared.
    """
    shown = [compared for comparison in results.panels if (compared := _compare(comparison, reference)).points]
    if not shown:
        return None
    styles = styles_of(results.algorithms)
    height = 0.9 + 0.28 * (1 + max(compared.rows[-1] for compared in shown))
    figure, axes = figure_of([compared.title for compared in shown], (PANEL_INCHES[0] + 1, max(height, 2.0)))
    for ax, compared in zip(axes, shown, strict=True):
        bare(ax, "x")
        ax.spines["left"].set_visible(False)
        ax.axvline(0, color=GREY, linewidth=1)
        for row, (algorithm, difference) in zip(compared.rows, compared.points, strict=True):
            _draw(ax, row, difference, styles[algorithm])
        ax.set_yticks(compared.rows, [label_of(algorithm) for algorithm, _ in compared.points], fontsize=9)
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(compared.rows[-1] + 0.6, -0.6)
    name_axes(
        figure,
        axes,
        textwrap.fill(f"out-of-domain accuracy minus that of {label_of(reference)} (percentage points)", NAME_LETTERS),
        note="paired by trial; bars: 95 % intervals, filled where 0 is outside; no bar: of one result, not known",
    )
    return figure


def _compare(comparison: Comparison, reference: str) -> _Compared:
    differences = [
        (algorithm, comparison.differences.between(algorithm, reference, "out_of_domain"))
        for algorithm in comparison.algorithms
        if algorithm != reference
    ]
    return _Compared(
        comparison.title,
        [(algorithm, each) for algorithm, each in differences if each is not None and each.mean == each.mean],
    )


def _draw(axes: Axes, row: float, difference: PairedDifference, style: Style) -> None:
    low, high = difference.interval or (-math.inf, math.inf)  # of one result it is not known
    axes.errorbar(
        difference.mean,
        row,
        xerr=[[difference.mean - low], [high - difference.mean]] if difference.interval else None,
        color=style.colour,
        marker=style.marker,
        markersize=MARKER_SIZES.get(style.marker, 7) - 1,
        markerfacecolor=style.colour if low > 0 or high < 0 else "white",
        elinewidth=1.4,
    )
