"""The plots of a sweep, with a panel for each comparison: in-domain against out-of-domain accuracy, of the trained
models and along the strength of their update, gaps of train to test accuracy, accuracy against trainable parameters,
and loss and accuracies over the steps.
"""

import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from domainbed_ext.report.methods import adaptation_of, algorithm_order, group_starts, label_of
from domainbed_ext.report.plots.differences import difference_plot
from domainbed_ext.report.plots.frontier import frontier_plot
from domainbed_ext.report.plots.labels import Labelled, place_labels
from domainbed_ext.report.plots.palette import MARKER_SIZES, Style
from domainbed_ext.report.plots.panels import Panel, Point, make_panels
from domainbed_ext.report.plots.style import (
    GREY,
    GRID,
    LEGEND_INCHES,
    LEGEND_ROWS,
    MANY,
    PANEL_INCHES,
    PANEL_OF_MANY_INCHES,
    bare,
    caption,
    figure_of,
    limits,
    short_count,
)
from domainbed_ext.report.results import Results
from domainbed_ext.report.summary import Summary
from domainbed_ext.report.trajectories import Moment, mean_trajectory

LINES = 10  # at most in a panel of one of several parts
Drawn = tuple[Point, list[Moment]]
"""A method and its mean trajectory."""


def draw_plots(results: Results, reference: str | None = None) -> dict[str, Figure]:
    """Draws every plot that the runs allow.

    Args:
        results: Figures of the runs; of leave-one-out runs, those of the main selection method are shown.
        reference: Id of the method that all others are compared with; None for no such plot.

    Returns:
        Plots by the name of their file.
    """
    shown = make_panels(results)
    drawn = {
        "plot": generalisation_plot(shown),
        "frontier": frontier_plot(results),
        "differences": None if reference is None else difference_plot(results, reference),
        "gaps": gap_plot(shown),
        "parameters": parameters_plot(shown),
        "training": training_plot(shown),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def generalisation_plot(shown: Sequence[Panel]) -> Figure:
    """Draws each method's mean in-domain against out-of-domain accuracy, with their errors over trials.

    Args:
        shown: Panels.

    Returns:
        A figure that belongs to no global state of matplotlib.
    """
    figure, axes = _scatter_figure(shown)
    for ax, panel in zip(axes, shown, strict=True):
        _draw_accuracies(ax, panel.points)
    caption(figure, shown, "in-domain accuracy (%)", "out-of-domain accuracy (%)")
    _label(figure, axes, shown, lambda point: (point.inside, point.outside))
    return figure


def gap_plot(shown: Sequence[Panel]) -> Figure | None:
    """Draws train accuracy minus in-domain and minus out-of-domain accuracy, as bars.

    Args:
        shown: Panels.

    Returns:
        A figure; None if nothing was selected.
    """
    shown = [panel for panel in shown if panel.points]
    if not shown:
        return None
    rows = [_rows(panel) for panel in shown]
    height = 0.9 + 0.42 * (1 + max(of_panel[-1] for of_panel in rows))
    figure, axes = figure_of(_titles(shown), (PANEL_INCHES[0], height))
    for ax, panel, of_panel in zip(axes, shown, rows, strict=True):
        bare(ax, "x")
        ax.spines["left"].set_visible(False)
        ax.axvline(0, color=GREY, linewidth=1)
        for row, point in zip(of_panel, panel.points, strict=True):
            _bar(ax, row - 0.19, point.gap_inside, point.style.colour, 0.4)
            _bar(ax, row + 0.19, point.gap_outside, point.style.colour, 1.0)
        ax.set_yticks(of_panel, [point.label for point in panel.points], fontsize=9)
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(of_panel[-1] + 0.5, -0.5)
        ax.margins(x=0.16)
    caption(figure, shown, "train − test accuracy (points): pale in-domain, full out-of-domain", "")
    return figure


def parameters_plot(shown: Sequence[Panel]) -> Figure | None:
    """Draws out-of-domain accuracy against the number of trainable parameters.

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
    for ax, panel in zip(axes, shown, strict=True):
        ax.set_xscale("log")
        bare(ax)
        sizes = [_parameters(point).mean for point in panel.points]
        for point in panel.points:
            _mark(ax, point.style, _parameters(point), point.outside)
        room = max((max(sizes) / min(sizes)) ** 0.15, 1.6)
        ax.set_xlim(min(sizes) / room, max(sizes) * room)
        ax.set_ylim(*limits([point.outside for point in panel.points]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    caption(figure, shown, "trainable parameters", "out-of-domain accuracy (%)")
    _label(figure, axes, shown, lambda point: (_parameters(point), point.outside))
    return figure


def training_plot(shown: Sequence[Panel]) -> Figure | None:
    """Draws loss and accuracies over the steps, the mean over a method's runs.

    Args:
        shown: Panels.

    Returns:
        A figure of a row per data set (and source), or several of them where there are many methods; None if no run was
        evaluated more than once.
    """
    drawn = [(panel.title, lines, part) for panel in shown if (lines := _lines(panel)) for part in _parts(lines)]
    if not drawn:
        return None
    figure = Figure(figsize=(12.4, 3.4 * len(drawn)), dpi=160, layout="constrained")
    grid = figure.subplots(len(drawn), 3, squeeze=False)
    columns = [("loss", "loss"), ("inside", "in-domain accuracy (%)"), ("outside", "out-of-domain accuracy (%)")]
    for axes, (title, lines, part) in zip(grid, drawn, strict=True):
        for ax, (attribute, quantity) in zip(axes, columns, strict=True):
            bare(ax)
            for _, moments in lines if len(part) < len(lines) else ():  # all others, pale, for comparison
                steps, values = [moment.step for moment in moments], [getattr(moment, attribute) for moment in moments]
                ax.plot(steps, values, color=GRID, linewidth=1, zorder=1)
            for point, moments in part:
                ax.plot(
                    [moment.step for moment in moments],
                    [getattr(moment, attribute) for moment in moments],
                    color=point.style.colour,
                    linestyle=point.style.dashes,
                    marker=point.style.marker,
                    markersize=4 if len(part) == len(lines) else 6,  # of many, markers tell them apart
                    markeredgecolor="white",
                    markeredgewidth=0.5,
                    linewidth=1.5,
                    label=label_of(point.algorithm),
                )
            ax.set_title(f"{title}: {quantity}", fontsize=10)
            ax.set_xlabel("step", fontsize=9)
        axes[-1].legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def render(figure: Figure, kind: Literal["png", "svg"], text_as_text: bool = False) -> bytes:
    """Renders a figure, to the same bytes for the same figure.

    Args:
        figure: Figure to draw.
        kind: Format of the file.
        text_as_text: Whether an SVG's text is text, in the viewer's fonts, and not outlines.

    Returns:
        Content of the file.
    """
    buffer = io.BytesIO()
    # Without a salt and with a date, an SVG would differ from one run to the next.
    with matplotlib.rc_context({"svg.hashsalt": "domainbed_ext", "svg.fonttype": "none" if text_as_text else "path"}):
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


def _lines(panel: Panel) -> list[Drawn]:
    """The mean over a method's runs at each step, of the methods that were evaluated more than once."""
    means = [(point, mean_trajectory(point.trajectories)) for point in panel.points]
    return [(point, moments) for point, moments in means if len(moments) > 1]


def _parts(lines: Sequence[Drawn]) -> list[Sequence[Drawn]]:
    """The lines in parts of few enough to tell apart: whole adaptations, as many as fit."""
    if len(lines) <= MANY:
        return [lines]
    parts: list[list[Drawn]] = [[]]
    for _, group in itertools.groupby(lines, lambda line: adaptation_of(line[0].algorithm)):
        of_adaptation = list(group)
        if parts[-1] and len(parts[-1]) + len(of_adaptation) > LINES:
            parts.append([])
        parts[-1] += of_adaptation
    return list(parts)


def _rows(panel: Panel) -> list[float]:
    """The place of each method on the y axis, adaptations with several objectives apart from the next."""
    starts = group_starts([point.algorithm for point in panel.points])
    return [row + 0.7 * sum(start <= row for start in starts) for row in range(len(panel.points))]


def _scatter_figure(shown: Sequence[Panel]) -> tuple[Figure, list[Axes]]:
    """A figure of panels in which each method is a point, with room for a legend where there are many."""
    if not _has_many(shown):
        return figure_of(_titles(shown))
    # One below the other: side by side, a page would show them too small to read.
    return figure_of(_titles(shown), PANEL_OF_MANY_INCHES, LEGEND_INCHES * _legend_columns(shown), across=1)


def _titles(shown: Sequence[Panel]) -> list[str]:
    return [panel.title for panel in shown]


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


def _draw_accuracies(axes: Axes, points: Sequence[Point]) -> None:
    """Draws the points of one panel, and the line on which both accuracies are equal."""
    bare(axes)
    if not points:
        axes.text(0.5, 0.5, "no run selected", ha="center", transform=axes.transAxes, color=GREY)
        return
    for point in points:
        _mark(axes, point.style, point.inside, point.outside)
    left, right = limits([point.inside for point in points])
    bottom, top = limits([point.outside for point in points])
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


def _mark(axes: Axes, style: Style, x: Summary, y: Summary) -> None:
    axes.errorbar(
        x.mean,
        y.mean,
        # One trial has no spread to show.
        xerr=x.err if x.trials > 1 else None,
        yerr=y.err if y.trials > 1 else None,
        elinewidth=1.2,
        **_look(style),
    )


def _look(style: Style) -> dict[str, Any]:
    """A method's marker, as keywords of matplotlib."""
    return {
        "color": style.colour,
        "marker": style.marker,
        "markersize": MARKER_SIZES.get(style.marker, 7),
        "markeredgecolor": "white",
        "markeredgewidth": 0.8,
    }


def _bar(axes: Axes, row: float, gap: Summary, shade: str, alpha: float) -> None:
    """A bar with its error and, beyond both, its number."""
    axes.barh(row, gap.mean, 0.34, color=shade, alpha=alpha, linewidth=0)
    err = gap.err if gap.trials > 1 else 0.0
    if err:
        axes.errorbar(gap.mean, row, xerr=err, color="black", elinewidth=0.8)
    side = 1 if gap.mean >= 0 else -1
    axes.annotate(
        f"{gap.mean:.1f}",
        (gap.mean + side * err, row),
        (4 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="center",
        fontsize=7.5,
    )


def _label(
    figure: Figure, axes: Sequence[Axes], shown: Sequence[Panel], place: Callable[[Point], tuple[Summary, Summary]]
) -> None:
    """Writes each method's label beside its point; of many, its number, with a legend."""
    many, numbered = _has_many(shown), _numbered(shown)
    if many:
        _add_legend(figure, shown)
    # Labels are placed by what they would cover, so the layout has to be settled before them.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for ax, panel in zip(axes, shown, strict=True):
        labelled = []
        for point in panel.points:
            x, y = place(point)
            label = str(numbered[point.algorithm][0]) if many else point.label
            labelled.append(Labelled(label, point.style.colour, (x.mean, y.mean), (x.err, y.err)))
        place_labels(ax, labelled, renderer)


def _add_legend(figure: Figure, shown: Sequence[Panel]) -> None:
    """Lists the methods by number beside the panels."""
    handles = [
        Line2D([], [], label=f"{number}  {label_of(point.algorithm)}", **_look(point.style), linestyle="none")
        for number, point in _numbered(shown).values()
    ]
    figure.legend(handles=handles, loc="outside right upper", ncols=_legend_columns(shown), frameon=False, fontsize=8.5)


def _parameters(point: Point) -> Summary:
    assert point.parameters is not None
    return point.parameters
