"""How plots look: panels, axes and what is written below them."""

import textwrap
from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from domainbed_ext.report.plots.panels import Panel

PANEL_INCHES = 5.0, 4.4
MANY = 12  # methods of a panel, above which their labels are in a legend and their points are numbered
PANEL_OF_MANY_INCHES = 7.2, 6.4
LEGEND_INCHES, LEGEND_ROWS = 2.8, 32  # width of a column of the legend, and how many methods it has at most
GREY = "#9A9A9A"
GRID = "#E6E6E6"
NOTE = "#6E6E6E"
TICK_SIZE, AXIS_SIZE, NOTE_SIZE = 8.5, 10.0, 7.5
FEW_TRIALS = 5  # at most these many are drawn one by one, and not as error bars
LEAST_SPAN = 10.0  # percentage points of an axis, so that noise does not look large


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
        ax.tick_params(labelsize=TICK_SIZE)
        if len(titles) > 1:  # the page and the caption in a paper name the only one
            ax.set_title(title, fontweight="bold", fontsize=AXIS_SIZE + 1)
    return figure, axes[: len(titles)]


def name_axes(figure: Figure, axes: Sequence[Axes], x: str, y: str = "", note: str = "") -> None:
    """Names the axes of all panels, and writes a note below the figure.

    Args:
        figure: Figure.
        axes: Its panels, row by row.
        x: Name of the x axes, with the unit; written below the lowest panel of each column.
        y: Name of the y axes, with the unit; written beside the first panel of each row.
        note: Note in small grey letters.
    """
    columns: dict[int, Axes] = {}
    for ax in axes:
        place = ax.get_subplotspec()
        assert place is not None
        columns[place.colspan.start] = ax
        if y and place.is_first_col():
            ax.set_ylabel(y, fontsize=AXIS_SIZE)
    for ax in columns.values():
        ax.set_xlabel(x, fontsize=AXIS_SIZE)
    if note:
        write_note(figure, note)


def write_note(figure: Figure, note: str) -> None:
    """Writes a note below a figure, in small grey letters.

    Args:
        figure: Figure.
        note: Sentences; lines are broken where the figure ends.
    """
    letters = int(figure.get_figwidth() * 72 / (0.52 * NOTE_SIZE))
    lines = "\n".join(textwrap.fill(line, letters) for line in note.splitlines())
    if lines:
        figure.supxlabel(lines, x=0.01, ha="left", fontsize=NOTE_SIZE, color=NOTE)


def bare(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """Removes the frame's upper and right side and draws a faint grid behind everything."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.6, axis=grid)
    axes.set_axisbelow(True)


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Returns the range of an axis: all values, room for labels, and not so narrow that noise looks large.

    Args:
        values: Values in percent.
    """
    low, high = min(values), max(values)
    margin = max(0.18 * (high - low), (LEAST_SPAN - (high - low)) / 2, 1.0)
    return low - margin, high + margin


def describe_panels(shown: Sequence[Panel]) -> str:
    """Says how steps and hyperparameters were selected, what dots and bars are, and which methods have no point.

    Args:
        shown: Panels of a figure.
    """
    counts = {len(point.trials) for panel in shown for point in panel.points}
    notes = dict.fromkeys(panel.selection for panel in shown)
    parts = [f"selection: {' / '.join(notes)}"]
    if any(drawn_by_trial(panel) for panel in shown):
        parts.append("small dots: trials")
    if any(not drawn_by_trial(panel) and len(point.trials) > 1 for panel in shown for point in panel.points):
        parts.append("bars: standard error over trials")
    if 1 in counts:
        parts.append("one trial (n = 1): the error is not known" if counts == {1} else "without dots or bars: n = 1")
    note = "; ".join(parts)
    if without := dict.fromkeys(label for panel in shown for label in panel.unmeasured):
        note += f"\nnot drawn, without in-domain accuracy: {', '.join(without)}"
    return note


def drawn_by_trial(panel: Panel) -> bool:
    """Whether each trial of a panel's methods is a dot: if there are few of both.

    Args:
        panel: Panel.
    """
    most = max((len(point.trials) for point in panel.points), default=0)
    return 1 < most <= FEW_TRIALS and len(panel.points) <= MANY


def short_count(value: float) -> str:
    """1_500_000 as 1.5M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
