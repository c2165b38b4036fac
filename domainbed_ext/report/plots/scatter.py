"""Plots in which each method is a point: in-domain against out-of-domain accuracy, and accuracy against parameters."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from domainbed_ext.report.methods import (
    adaptation_of,
    algorithm_order,
    family_of,
    label_of,
    objective_of,
    settings_of,
)
from domainbed_ext.report.plots.labels import Labelled, place_labels
from domainbed_ext.report.plots.palette import MARKER_SIZES, Style
from domainbed_ext.report.plots.panels import Panel, Point
from domainbed_ext.report.plots.style import (
    GREY,
    LEGEND_INCHES,
    LEGEND_ROWS,
    MANY,
    PANEL_OF_MANY_INCHES,
    bare,
    describe_panels,
    drawn_by_trial,
    figure_of,
    limits,
    name_axes,
    short_count,
)

SAMPLES = 120  # places on a line that labels keep off
APART = 0.035  # of the axis, between methods with the same number of parameters


class Placed(NamedTuple):
    """A method at its place in a panel.

    Attributes:
        point: Figures of the method.
        x: Place of the mean.
        x_error: Its error on the x axis.
        across: Place of each trial on the x axis.
    """

    point: Point
    x: float
    x_error: float
    across: list[float]

    @property
    def place(self) -> tuple[float, float]:
        """Place of the mean on both axes."""
        return self.x, self.point.outside.mean

    @property
    def trials(self) -> list[tuple[float, float]]:
        """Places of the trials on both axes."""
        return [(x, trial.outside) for x, trial in zip(self.across, self.point.trials, strict=True)]


def generalisation_plot(shown: Sequence[Panel]) -> Figure:
    """Draws each method's mean in-domain against out-of-domain accuracy, with its trials or errors over them.

    Args:
        shown: Panels.

    Returns:
        A figure that belongs to no global state of matplotlib.
    """
    figure, axes = _scatter_figure(shown)
    drawn = [
        [
            Placed(point, point.inside.mean, point.inside.err, [trial.inside for trial in point.trials])
            for point in panel.points
        ]
        for panel in shown
    ]
    for ax, panel, placed in zip(axes, shown, drawn, strict=True):
        _draw_accuracies(ax, panel, placed)
    name_axes(figure, axes, "in-domain accuracy (%)", "out-of-domain accuracy (%)", _note(shown))
    _label(figure, axes, shown, drawn)
    return figure


def parameters_plot(shown: Sequence[Panel]) -> Figure | None:
    """Draws out-of-domain accuracy against the number of trainable parameters; the ranks of a method are joined.

    Args:
        shown: Panels.

    Returns:
        A figure; None if no run recorded its parameters.
    """
    shown = [panel.having(lambda point: point.parameters is not None) for panel in shown]
    shown = [panel for panel in shown if panel.points]
    if not shown:
        return None
    figure, axes = _scatter_figure(shown)
    drawn = []
    for ax, panel in zip(axes, shown, strict=True):
        ax.set_xscale("log")
        bare(ax)
        sizes = {point.algorithm: point.parameters.mean for point in panel.points if point.parameters is not None}
        left, right = min(sizes.values()), max(sizes.values())
        room = max((right / left) ** 0.15, 1.6)
        ax.set_xlim(left / room, right * room)
        places = side_by_side(sizes, room**2 * right / left)
        placed = [Placed(point, (x := places[point.algorithm]), 0.0, [x] * len(point.trials)) for point in panel.points]
        _join_ranks(ax, placed)
        for each in placed:
            _mark(ax, panel, each)
        _draw_probe(ax, panel)
        ax.set_ylim(*limits(_extent(panel, placed)[1]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        ax.xaxis.set_minor_formatter(NullFormatter())
        drawn.append(placed)
    name_axes(figure, axes, "trainable parameters (number)", "out-of-domain accuracy (%)", _note(shown))
    _label(figure, axes, shown, drawn)
    return figure


def side_by_side(sizes: Mapping[str, float], span: float) -> dict[str, float]:
    """Moves methods of one size apart, so that none covers another.

    Args:
        sizes: Number of parameters by method.
        span: Largest number of the axis by its smallest; the axis is logarithmic.

    Returns:
        Places on the axis by method.
    """
    clusters: list[list[str]] = []
    for name in sorted(sizes, key=lambda name: sizes[name]):
        if clusters and sizes[name] <= sizes[clusters[-1][0]] * span**APART:
            clusters[-1].append(name)
        else:
            clusters.append([name])
    return {
        name: sizes[name] * span ** (APART * (place - (len(cluster) - 1) / 2))
        for cluster in clusters
        for place, name in enumerate(cluster)
    }


def _scatter_figure(shown: Sequence[Panel]) -> tuple[Figure, list[Axes]]:
    """A figure of panels in which each method is a point, with room for a legend where there are many."""
    titles = [panel.title for panel in shown]
    if not _has_many(shown):
        return figure_of(titles)
    # One below the other: side by side, a page would show them too small to read.
    return figure_of(titles, PANEL_OF_MANY_INCHES, LEGEND_INCHES * _legend_columns(shown), across=1)


def _has_many(shown: Sequence[Panel]) -> bool:
    return max((len(panel.points) for panel in shown), default=0) > MANY


def _legend_columns(shown: Sequence[Panel]) -> int:
    return -(-len(_numbered(shown)) // (LEGEND_ROWS * len(shown)))


def _numbered(shown: Sequence[Panel]) -> dict[str, tuple[int, Point]]:
    """A number for each method, the same in all panels, in the order of tables."""
    points = {point.algorithm: point for panel in shown for point in panel.points}
    return {
        algorithm: (number, points[algorithm])
        for number, algorithm in enumerate(sorted(points, key=algorithm_order), 1)
    }


def _note(shown: Sequence[Panel]) -> str:
    """The note below the figure."""
    return describe_panels(shown) + ("; dotted: linear probe" if any(map(_probe, shown)) else "")


def _draw_accuracies(axes: Axes, panel: Panel, placed: Sequence[Placed]) -> None:
    """Draws the points of one panel, and the line on which both accuracies are equal."""
    bare(axes)
    if not placed:
        axes.text(0.5, 0.5, "no run selected", ha="center", transform=axes.transAxes, color=GREY)
        return
    for each in placed:
        _mark(axes, panel, each)
    _draw_probe(axes, panel)
    (left, right), (bottom, top) = map(limits, _extent(panel, placed))
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    low, high = max(left, bottom), min(right, top)
    if low < high:
        axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        # Where only a corner of the line is in view, its name would lie on the frame.
        axes.annotate(
            "y = x" if high - low > 0.2 * (right - left) else "",
            (high, high),
            (-22, -2),
            textcoords="offset points",
            ha="right",
            va="top",
            color=GREY,
            fontsize=8,
        )


def _probe(panel: Panel) -> Point | None:
    """The linear probe, which the other methods are held against."""
    return next((point for point in panel.points if family_of(point.algorithm) == "LP" and len(panel.points) > 1), None)


def _draw_probe(axes: Axes, panel: Panel) -> None:
    if probe := _probe(panel):
        axes.axhline(probe.outside.mean, color=GREY, linewidth=1, linestyle=(0, (1, 2)), zorder=1)


def _extent(panel: Panel, placed: Sequence[Placed]) -> tuple[list[float], list[float]]:
    """The values that the axes hold: of all trials, or the ends of error bars."""
    if drawn_by_trial(panel):
        across, up = zip(*(trial for each in placed for trial in each.trials), strict=True)
        return list(across), list(up)
    outside = [each.point.outside for each in placed]
    return (
        [each.x + sign * each.x_error for each in placed for sign in (-1, 1)],
        [summary.mean + sign * summary.err for summary in outside for sign in (-1, 1)],
    )


def _mark(axes: Axes, panel: Panel, placed: Placed) -> None:
    """Draws a method's mean and, joined to it, its trials; of many trials, error bars."""
    style = placed.point.style
    if drawn_by_trial(panel):
        for x, y in placed.trials:
            axes.plot([placed.x, x], [placed.place[1], y], color=style.colour, linewidth=0.8, alpha=0.45, zorder=1.5)
            axes.plot(x, y, "o", color=style.colour, markersize=3, alpha=0.75, zorder=1.6)
        axes.plot(*placed.place, **_look(style), linestyle="none")
        return
    several = len(placed.point.trials) > 1  # one trial has no spread to show
    axes.errorbar(
        *placed.place,
        xerr=placed.x_error if several and placed.x_error else None,
        yerr=placed.point.outside.err if several else None,
        elinewidth=1.2,
        **_look(style),
    )


def _join_ranks(axes: Axes, placed: Sequence[Placed]) -> None:
    """Joins the points of methods that differ in rank alone."""
    groups: defaultdict[tuple[str, ...], list[Placed]] = defaultdict(list)
    for each in placed:
        name = each.point.algorithm
        but_rank = (adaptation_of(name), objective_of(name), *settings_of(name, {"rank"}))
        groups[but_rank].append(each)
    for group in groups.values():
        if len(group) > 1:
            across, up = zip(*sorted(each.place for each in group), strict=True)
            axes.plot(across, up, color=group[0].point.style.colour, linewidth=1.2, alpha=0.6, zorder=1.4)


def _look(style: Style) -> dict[str, Any]:
    """A method's marker, as keywords of matplotlib."""
    return {
        "color": style.colour,
        "marker": style.marker,
        "markersize": MARKER_SIZES.get(style.marker, 7),
        "markeredgecolor": "white",
        "markeredgewidth": 0.8,
    }


def _label(figure: Figure, axes: Sequence[Axes], shown: Sequence[Panel], drawn: Sequence[Sequence[Placed]]) -> None:
    """Writes each method's label beside its point; of many, its number, with a legend."""
    many, numbered = _has_many(shown), _numbered(shown)
    if many:
        _add_legend(figure, shown)
    # Labels are placed by what they would cover, so the layout has to be settled before them.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for ax, panel, placed in zip(axes, shown, drawn, strict=True):
        by_trial = drawn_by_trial(panel)
        labelled = [
            Labelled(
                str(numbered[each.point.algorithm][0]) if many else each.point.label,
                each.point.style.colour,
                each.place,
                (0.0, 0.0) if by_trial else (each.x_error, each.point.outside.err),
            )
            for each in placed
        ]
        lines = [_probe_line(ax, panel), *([_trial_lines(placed)] if by_trial else [])]
        place_labels(ax, labelled, renderer, np.concatenate(lines))


def _probe_line(axes: Axes, panel: Panel) -> np.ndarray:
    """Places along the line of the linear probe, which labels keep off, [places, 2]."""
    probe = _probe(panel)
    low, high = axes.transAxes.transform([(0, 0), (1, 0)])[:, 0]
    across = axes.transData.inverted().transform([(x, 0) for x in np.linspace(low, high, SAMPLES)])[:, 0]
    return np.array([(x, probe.outside.mean) for x in across]) if probe else np.empty((0, 2))


def _trial_lines(placed: Sequence[Placed]) -> np.ndarray:
    """Places along the lines from means to trials, which labels keep off, [places, 2]."""
    means = np.array([each.place for each in placed for _ in each.trials])
    trials = np.array([trial for each in placed for trial in each.trials])
    return np.concatenate([means + share * (trials - means) for share in (0.4, 0.7, 1.0)])


def _add_legend(figure: Figure, shown: Sequence[Panel]) -> None:
    """Lists the methods by number beside the panels."""
    handles = [
        Line2D([], [], label=f"{number}  {label_of(point.algorithm)}", **_look(point.style), linestyle="none")
        for number, point in _numbered(shown).values()
    ]
    figure.legend(handles=handles, loc="outside right upper", ncols=_legend_columns(shown), frameon=False, fontsize=8.5)
