"""The picture of a sweep: in-domain against out-of-domain accuracy, one panel a data set."""

import io
import itertools
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from domainbed_ext.scores import ALGORITHMS, Results, Summary

# Okabe and Ito's palette, which the colour-blind can tell apart; variants of an algorithm share its colour.
COLOURS = dict(zip(ALGORITHMS, ["#0072B2", "#D55E00", "#009E73", "#7A7A7A", "#CC79A7"], strict=True))
OTHER_COLOURS = ["#E69F00", "#56B4E9", "#8C6D31", "#000000"]
MARKERS = "osD^vP*X"
PANEL_INCHES = 5.0, 4.4
GREY = "#9A9A9A"
LABEL_SIZE = 9
DISTANCES = (7, 10, 14, 18, 24, 32, 42, 54, 68)  # of a label to its point, in points of 1/72 inch
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8))


class Point(NamedTuple):
    """An algorithm's place in a panel."""

    algorithm: str
    label: str
    inside: Summary
    outside: Summary


def generalisation_plot(results: Results) -> Figure:
    """Draws each algorithm's mean accuracies over test environments, with their standard errors over trials.

    Args:
        results: the figures; those of `results.main_method` are drawn.

    Returns:
        A figure that belongs to no global state of matplotlib.
    """
    method = results.main_method
    columns = min(3, len(results.environments))
    rows = -(-len(results.environments) // columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), dpi=160, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    drawn: list[tuple[Axes, list[Point]]] = []
    for axes, dataset in zip(panels, results.environments, strict=False):
        points: list[Point] = []
        for algorithm in results.algorithms:
            inside = results.summary(method, dataset, algorithm, "in_domain")
            outside = results.summary(method, dataset, algorithm, "out_of_domain")
            if inside and outside and np.isfinite([inside.mean, outside.mean]).all():
                lack = results.incomplete(method, dataset, algorithm)
                points.append(Point(algorithm, f"{algorithm} ({lack})" if lack else algorithm, inside, outside))
        axes.set_title(dataset, fontweight="bold")
        _draw(axes, points)
        drawn.append((axes, points))
    for axes in panels[len(drawn) :]:
        axes.set_axis_off()
    bars = any(point.inside.trials > 1 for _, points in drawn for point in points)
    note = f"{method.title}{'; bars: standard error over trials' if bars else ''}"
    figure.supxlabel(f"in-domain accuracy (%)\n{note}", fontsize=9)
    figure.supylabel("out-of-domain accuracy (%)", fontsize=9)
    # Labels are placed by what they would cover, so the layout has to be settled before them.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, points in drawn:
        _label(axes, points, canvas.get_renderer())
    return figure


def render(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """The file of a figure, the same bytes for the same figure.

    Args:
        figure: what to draw.
        kind: the format.

    Returns:
        The file's content.
    """
    buffer = io.BytesIO()
    # Without a salt and with a date, an SVG would differ from one run to the next.
    with matplotlib.rc_context({"svg.hashsalt": "domainbed_ext"}):
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


def colour(algorithm: str, algorithms: list[str]) -> str:
    """The colour of an algorithm among those shown, the same for its variants."""
    family = algorithm.partition("@")[0]
    if family in COLOURS:
        return COLOURS[family]
    others = list(dict.fromkeys(name.partition("@")[0] for name in algorithms))
    others = [name for name in others if name not in COLOURS]
    return OTHER_COLOURS[others.index(family) % len(OTHER_COLOURS)]


def marker(algorithm: str, algorithms: list[str]) -> str:
    """The marker of an algorithm among those shown: tells the variants of one colour apart."""
    family = algorithm.partition("@")[0]
    variants = [name for name in algorithms if name.partition("@")[0] == family]
    return MARKERS[variants.index(algorithm) % len(MARKERS)]


def _draw(axes: Axes, points: list[Point]) -> None:
    """Draws the points of one data set with the line on which nothing is lost out of domain."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    if not points:
        axes.text(0.5, 0.5, "nothing selected", ha="center", transform=axes.transAxes, color=GREY)
        return
    names = [point.algorithm for point in points]
    for name, _, inside, outside in points:
        axes.errorbar(
            inside.mean,
            outside.mean,
            # One trial has no spread to show.
            xerr=inside.err if inside.trials > 1 else None,
            yerr=outside.err if outside.trials > 1 else None,
            color=colour(name, names),
            marker=marker(name, names),
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.8,
            elinewidth=1.2,
        )
    left, right = _limits([point.inside for point in points])
    bottom, top = _limits([point.outside for point in points])
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    low, high = max(left, bottom), min(right, top)
    if low < high:
        axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            "y = x", (high, high), (-22, -2), textcoords="offset points", ha="right", va="top", color=GREY, fontsize=8
        )


def _limits(values: list[Summary]) -> tuple[float, float]:
    """The range of an axis: all error bars, room for labels, and not so narrow that noise looks large."""
    low = min(value.mean - value.err for value in values)
    high = max(value.mean + value.err for value in values)
    margin = max(0.18 * (high - low), 1.0)
    return low - margin, high + margin


def _label(axes: Axes, points: list[Point], renderer: RendererAgg) -> None:
    """Writes each label as near to its point as it covers no marker, error bar or other label."""
    pixel = renderer.dpi / 72
    frame = axes.get_window_extent(renderer)
    names = [point.algorithm for point in points]
    taken: list[Bbox] = []
    for _, _, x, y in points:
        for dx, dy, room in ((x.err, 0.0, 2), (0.0, y.err, 2), (0.0, 0.0, 5)):
            ends = [(x.mean - dx, y.mean - dy), (x.mean + dx, y.mean + dy)]
            taken.append(Bbox(axes.transData.transform(ends)).padded(room * pixel))
    for name, label, x, y in points:
        measured = axes.text(0, 0, label, fontsize=LABEL_SIZE)
        size = np.array(measured.get_window_extent(renderer).size)
        measured.remove()
        point = axes.transData.transform((x.mean, y.mean))
        options: list[tuple[float, int, np.ndarray, Bbox]] = []
        for distance, direction in itertools.product(DISTANCES, DIRECTIONS):
            # What stands at that distance is the side or corner of the label that faces the point.
            offset = pixel * distance * np.array(direction) + (np.sign(direction) - 1) / 2 * size
            box = Bbox([point + offset, point + offset + size])
            # Areas in square pixels: any overlap worth seeing outweighs every distance.
            hidden = sum(_overlap(box, other) for other in taken) + size.prod() - _overlap(box, frame)
            options.append((round(hidden) + distance, distance, offset / pixel, box))
        _, distance, offset, box = min(options, key=lambda option: option[0])
        leader = {"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5}
        axes.annotate(
            label,
            (x.mean, y.mean),
            (float(offset[0]), float(offset[1])),
            textcoords="offset points",
            va="bottom",
            color=colour(name, names),
            fontsize=LABEL_SIZE,
            arrowprops=leader if distance > DISTANCES[1] else None,
        )
        taken.append(box)


def _overlap(one: Bbox, other: Bbox) -> float:
    """The area that two boxes share, in square pixels."""
    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else float(shared.width * shared.height)
