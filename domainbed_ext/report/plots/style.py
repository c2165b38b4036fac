"""How plots look: panels, axes and what is written below them."""

from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from domainbed_ext.report.plots.panels import Panel
from domainbed_ext.report.summary import Summary

PANEL_INCHES = 5.0, 4.4
MANY = 12  # methods of a panel, above which their labels are in a legend and their points are numbered
PANEL_OF_MANY_INCHES = 7.2, 6.4
LEGEND_INCHES, LEGEND_ROWS = 2.8, 32  # width of a column of the legend, and how many methods it has at most
GREY = "#9A9A9A"
GRID = "#E6E6E6"


def figure_of(
    titles: Sequence[str], panel_inches: tuple[float, float] = PANEL_INCHES, room: float = 0.0, across: int = 3
) -> tuple[Figure, list[Axes]]:
    """Makes a figure outside matplotlib's global state, with a titled axes for each panel.

    Args:
        titles: Titles of the panels.
        panel_inches: Width and height of a panel.
        room: Width that is added for a legend, in inches.
        across: Number of panels in a row, at most.
    """
    columns = min(across, len(titles)) or 1
    rows = -(-len(titles) // columns) or 1
    width, height = panel_inches
    figure = Figure(figsize=(width * columns + room, height * rows), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[len(titles) :]:
        ax.set_axis_off()
    for ax, title in zip(axes, titles, strict=False):
        ax.set_title(title, fontweight="bold")
    return figure, axes[: len(titles)]


def bare(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """Removes the frame's upper and right side and draws a faint grid behind everything."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.6, axis=grid)
    axes.set_axisbelow(True)


def limits(values: Sequence[Summary]) -> tuple[float, float]:
    """Returns the range of an axis: all error bars, room for labels, and not so narrow that noise looks large."""
    low = min(value.mean - value.err for value in values)
    high = max(value.mean + value.err for value in values)
    margin = max(0.18 * (high - low), 1.0)
    return low - margin, high + margin


def caption(figure: Figure, shown: Sequence[Panel], x: str, y: str) -> None:
    """Writes the names of the axes, the selection methods, what error bars are, and which methods have no point."""
    notes: dict[str, str] = {}
    for panel in shown:
        bars = any(point.inside.trials > 1 for point in panel.points)
        notes.setdefault(panel.selection, "")
        if bars:
            notes[panel.selection] = f"; bars: {panel.error}"
    note = " / ".join(selection + bars for selection, bars in notes.items())
    if without := dict.fromkeys(label for panel in shown for label in panel.unmeasured):
        note += f"\nnot drawn, without in-domain accuracy: {', '.join(without)}"
    figure.supxlabel(f"{x}\n{note}", fontsize=9)
    if y:
        figure.supylabel(y, fontsize=9)


def short_count(value: float) -> str:
    """1_500_000 as 1.5M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
