"""The plot of generalisation gaps: train accuracy minus in-domain and minus out-of-domain accuracy, as bars."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from domainbed_ext.report.methods import group_starts
from domainbed_ext.report.plots.panels import Panel
from domainbed_ext.report.plots.style import (
    GREY,
    PANEL_INCHES,
    TICK_SIZE,
    bare,
    describe_panels,
    drawn_by_trial,
    figure_of,
    name_axes,
)
from domainbed_ext.report.summary import Summary
from domainbed_ext.report.tables.table import minus

PALE = 0.4  # opacity of what is in-domain


def gap_plot(shown: Sequence[Panel]) -> Figure | None:
    """Draws the gaps of each method, with its trials or errors over them.

    Args:
        shown: Panels.

    Returns:
        A figure; None if nothing was selected.
    """
    shown = [panel for panel in shown if panel.points]
    if not shown:
        return None
    rows = [_rows(panel) for panel in shown]
    height = 1.3 + 0.42 * (1 + max(of_panel[-1] for of_panel in rows))
    figure, axes = figure_of([panel.title for panel in shown], (PANEL_INCHES[0], height))
    for ax, panel, of_panel in zip(axes, shown, rows, strict=True):
        bare(ax, "x")
        ax.spines["left"].set_visible(False)
        ax.axvline(0, color=GREY, linewidth=1)
        for row, point in zip(of_panel, panel.points, strict=True):
            trials = point.trials if drawn_by_trial(panel) else []
            _bar(ax, row - 0.19, point.gap_inside, [trial.gap_inside for trial in trials], point.style.colour, PALE)
            _bar(ax, row + 0.19, point.gap_outside, [trial.gap_outside for trial in trials], point.style.colour, 1.0)
        ax.set_yticks(of_panel, [point.label for point in panel.points], fontsize=TICK_SIZE + 0.5)
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(of_panel[-1] + 0.65, -0.65)
        ax.margins(x=0.16)
    patches = [
        Patch(color=GREY, alpha=alpha, label=name) for name, alpha in (("in-domain", PALE), ("out-of-domain", 1))
    ]
    figure.legend(handles=patches, loc="outside upper left", ncols=2, frameon=False, fontsize=TICK_SIZE)
    name_axes(figure, axes, "train accuracy − accuracy (percentage points)", note=describe_panels(shown))
    return figure


def _rows(panel: Panel) -> list[float]:
    """The place of each method on the y axis, adaptations with several objectives apart from the next."""
    starts = group_starts([point.algorithm for point in panel.points])
    return [row + 0.7 * sum(start <= row for start in starts) for row in range(len(panel.points))]


def _bar(axes: Axes, row: float, gap: Summary, trials: Sequence[float], shade: str, alpha: float) -> None:
    """A bar with its trials or its error and, beyond all, its number."""
    axes.barh(row, gap.mean, 0.34, color=shade, alpha=alpha, linewidth=0)
    ends = [gap.mean, *trials]
    if trials:
        axes.plot(trials, [row] * len(trials), "o", color="black", markersize=2.2, alpha=0.7, linestyle="none")
    elif gap.trials > 1 and gap.err:
        axes.errorbar(gap.mean, row, xerr=gap.err, color="black", elinewidth=0.8)
        ends += [gap.mean - gap.err, gap.mean + gap.err]
    side = 1 if gap.mean >= 0 else -1
    axes.annotate(
        minus(f"{gap.mean:.1f}"),
        (max(ends) if side > 0 else min(ends), row),
        (4 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="center",
        fontsize=7.5,
    )
