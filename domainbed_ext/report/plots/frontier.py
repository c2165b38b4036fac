"""The plot of frontiers: in-domain against out-of-domain accuracy along the strength of each method's update."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from domainbed_ext.model_selection import FULL_STRENGTH
from domainbed_ext.report.figures import Comparison
from domainbed_ext.report.frontier import curves
from domainbed_ext.report.methods import label_of
from domainbed_ext.report.plots.labels import Labelled, place_labels
from domainbed_ext.report.plots.palette import MARKER_SIZES, Style, styles_of
from domainbed_ext.report.plots.style import GREY, MANY, PANEL_OF_MANY_INCHES, bare, figure_of, name_axes
from domainbed_ext.report.results import Results
from domainbed_ext.report.summary import Estimate

SAME = 0.1  # percentage points; points that are nearer than this in both directions are drawn as one
STRENGTH_SIZE = 7.5  # of the numbers at points
APART = 16.0  # points of 1/72 inch at least between two points of a method that are both labelled
_SAMPLES = 24  # places on a line between two points that labels keep off


class _Point(NamedTuple):
    strength: float
    inside: Estimate
    outside: Estimate

    @property
    def place(self) -> tuple[float, float]:
        return self.inside.mean, self.outside.mean


@dataclass(frozen=True)
class _Line:
    """A method's points, in the order of their strengths."""

    label: str
    style: Style
    points: list[_Point]

    @property
    def places(self) -> np.ndarray:
        """[points, 2]."""
        return np.array([point.place for point in self.points])

    @property
    def name(self) -> str:
        """The label of its last point."""
        last = self.points[-1].strength
        return self.label if last == FULL_STRENGTH else f"{self.label}, {last:g}"


def frontier_plot(results: Results) -> Figure | None:
    """Draws the mean accuracies of each method at each strength of its update, joined by a line.

    Args:
        results: Figures of the runs; of leave-one-out runs, those of the main selection method are shown.

    Returns:
        A figure with a panel for each comparison; None if no run was evaluated along the strength of its update.
    """
    styles = styles_of(results.algorithms)
    shown = [(each.title, lines) for each in results.panels if (lines := _lines(each, styles))]
    if not shown:
        return None
    figure, axes = figure_of([title for title, _ in shown], PANEL_OF_MANY_INCHES, across=2)
    for ax, (_, lines) in zip(axes, shown, strict=True):
        _draw(ax, lines)
    bars = any(point.inside.interval for _, lines in shown for line in lines for point in line.points)
    start = any(_start(lines) for _, lines in shown)
    notes = [
        *(["bars: 95 % intervals over trials"] if bars else []),
        *(["dashed: the common start, at strength 0"] if start else []),
    ]
    points = "numbers: strength of the update; names: strength 1"
    note = "; ".join([points, *notes])
    name_axes(figure, axes, "in-domain accuracy (%)", "out-of-domain accuracy (%)", note)
    # Labels are placed by what they would cover, so the layout has to be settled before them.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for ax, (_, lines) in zip(axes, shown, strict=True):
        place_labels(ax, _labels(ax, lines), renderer, _obstacles(lines))
    return figure


def _lines(comparison: Comparison, styles: dict[str, Style]) -> list[_Line]:
    lines = []
    for curve in curves(comparison):
        points = [
            _Point(strength, inside, outside)
            for strength in curve.strengths
            if (inside := curve.estimate(strength, "in_domain"))
            and (outside := curve.estimate(strength, "out_of_domain"))
            and np.isfinite([inside.mean, outside.mean]).all()
        ]
        if points:
            label = label_of(curve.algorithm) + (f" ({curve.lack})" if curve.lack else "")
            lines.append(_Line(label, styles[curve.algorithm], points))
    return lines


def _draw(axes: Axes, lines: Sequence[_Line]) -> None:
    bare(axes)
    if start := _start(lines):
        axes.axvline(start[0], color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.axhline(start[1], color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for line in lines:
        colour, marker = line.style.colour, line.style.marker
        for point in line.points:
            axes.errorbar(
                *point.place,
                xerr=_half(point.inside),
                yerr=_half(point.outside),
                color=colour,
                elinewidth=1,
                alpha=0.3,
                zorder=2,
            )
        axes.plot(
            *line.places.T,
            color=colour,
            linestyle=line.style.dashes,
            linewidth=1.6,
            marker=marker,
            markersize=MARKER_SIZES.get(marker, 7) - 1.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            zorder=3,
        )
    axes.margins(0.08)


def _start(lines: Sequence[_Line]) -> tuple[float, float] | None:
    """The place of strength 0, if it is the same for several methods: then they start from one probe."""
    places = [line.points[0].place for line in lines if line.points[0].strength == 0]
    if len(places) < 2 or not all(_near(place, places[0]) for place in places):
        return None
    return places[0]


def _near(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) < SAME


def _half(estimate: Estimate) -> float | None:
    return estimate.interval[1] - estimate.mean if estimate.interval else None


def _labels(axes: Axes, lines: Sequence[_Line]) -> list[Labelled]:
    """The labels of all points, names first; of points at one place, such as a common start, one is labelled.

    Args:
        axes: Panel, laid out.
        lines: Methods drawn in it.
    """
    start = _start(lines)
    labels = [Labelled(line.name, line.style.colour, line.points[-1].place) for line in lines]
    if start is not None:
        labels.append(Labelled("0", GREY, start, size=STRENGTH_SIZE))
    for line in lines if len(lines) <= MANY else ():
        labelled = [line.points[-1].place, *([start] if start is not None else [])]
        for point in reversed(line.points[:-1]):
            if all(_distance(axes, point.place, other) > APART for other in labelled):
                labelled.append(point.place)
                labels.append(Labelled(f"{point.strength:g}", line.style.colour, point.place, size=STRENGTH_SIZE))
    return labels


def _distance(axes: Axes, one: tuple[float, float], other: tuple[float, float]) -> float:
    """The distance of two places in points of 1/72 inch."""
    (x, y), (other_x, other_y) = axes.transData.transform([one, other])
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return float(np.hypot(x - other_x, y - other_y)) / figure.dpi * 72


def _obstacles(lines: Sequence[_Line]) -> np.ndarray:
    """Places along the lines, [places, 2]."""
    shares = np.linspace(0, 1, _SAMPLES, endpoint=False)[:, None]
    parts = [a + shares * (b - a) for line in lines for a, b in zip(line.places, line.places[1:], strict=False)]
    return np.concatenate([*(line.places for line in lines), *parts])
