"""Axes, grids of panels and legends that several analyses share."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from domainbed_ext.report.plots.style import figure_of


def grid_of(
    rows: Sequence[str], columns: Sequence[str], panel_inches: tuple[float, float]
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """Makes a figure with a panel for each row and column, titled by both.

    Args:
        rows: Names of the rows.
        columns: Names of the columns.
        panel_inches: Width and height of a panel.
    """
    places = [(row, column) for row in rows for column in columns]
    figure, axes = figure_of([f"{row}\n{column}" for row, column in places], panel_inches, across=len(columns))
    for ax in axes:
        ax.title.set_fontsize(9)
    return figure, dict(zip(places, axes, strict=True))


def hide_others(axes: dict[tuple[str, str], Axes], drawn: Sequence[tuple[str, str]]) -> None:
    """Hides the panels of a grid that nothing was drawn in."""
    for place, ax in axes.items():
        if place not in drawn:
            ax.set_axis_off()
            ax.set_title("")


def add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Adds one legend for all panels, to their right.

    Args:
        figure: Figure, in a constrained layout.
        axes: Panels, whose lines of one label are alike.
    """
    handles = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8.5)


def depth_axis(axes: Axes, last: int) -> None:
    """Sets up an axis of blocks.

    Args:
        axes: Panel.
        last: Place of the last block, from 0.
    """
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlim(-0.5, last + 0.5)


def doubling_axis(axes: Axes) -> None:
    """Sets up an axis of numbers such as 1, 2, 4 and 8."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
