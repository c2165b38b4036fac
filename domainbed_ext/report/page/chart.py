"""The small line charts in a run's entry of the page: polylines for SVG, and the few numbers on the axes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 300.0, 120.0  # of the area of the lines, in units of the SVG


class Line(NamedTuple):
    """A line: its kind, which is also its CSS class, its name, and the points of a polyline."""

    kind: str
    name: str
    points: list[tuple[float, float]]

    @property
    def path(self) -> str:
        """Value of the attribute `points`."""
        return " ".join(f"{x:g},{y:g}" for x, y in self.points)


class Chart(NamedTuple):
    """A laid-out chart.

    Attributes:
        title: What the lines measure.
        lines: Lines that have a number at all.
        low: Number at the bottom.
        high: Number at the top.
        last: Last step, at the right.
        chosen: Place of each selected step on the x axis.
    """

    title: str
    lines: list[Line]
    low: str
    high: str
    last: int
    chosen: list[float]


def lay_out_chart(
    title: str,
    steps: Sequence[int],
    series: Sequence[tuple[str, str, Sequence[float]]],
    chosen: Sequence[int] = (),
) -> Chart | None:
    """Lays a chart out.

    Args:
        title: What the lines measure.
        steps: Steps in ascending order.
        series: Kind, name and values by step of each line; a NaN is left out.
        chosen: Steps that were selected.

    Returns:
        Chart; None if there are not two points to join.
    """
    finite = [value for _, _, values in series for value in values if math.isfinite(value)]
    if len(steps) < 2 or len(finite) < 2:
        return None
    low, high = min(finite), max(finite)
    room = (high - low) or abs(high) or 1.0
    low, high = low - 0.06 * room, high + 0.06 * room

    def across(step: int) -> float:
        return round(WIDTH * (step - steps[0]) / (steps[-1] - steps[0]), 1)

    lines = []
    for kind, name, values in series:
        points = [
            (across(step), round(HEIGHT * (high - value) / (high - low), 1))
            for step, value in zip(steps, values, strict=True)
            if math.isfinite(value)
        ]
        if points:
            lines.append(Line(kind, name, points))
    return Chart(title, lines, f"{min(finite):.3g}", f"{max(finite):.3g}", steps[-1], sorted({*map(across, chosen)}))
