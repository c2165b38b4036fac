"""The small line charts of a run's page entry: lines, as SVG wants them, and the few numbers on the axes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 300.0, 120.0  # of the space that the lines fill, in units of the SVG


class Line(NamedTuple):
    """A line: its kind, which is also its CSS class, its name, and the points of a polyline."""

    kind: str
    name: str
    points: list[tuple[float, float]]

    @property
    def path(self) -> str:
        """For the attribute `points`."""
        return " ".join(f"{x:g},{y:g}" for x, y in self.points)


class Chart(NamedTuple):
    """What a chart shows.

    Attributes:
        title: what the lines measure.
        lines: those that have a number at all.
        low: the number at the bottom.
        high: the number at the top.
        last: the last step, at the right.
        chosen: where on the x axis each selected step stands.
    """

    title: str
    lines: list[Line]
    low: str
    high: str
    last: int
    chosen: list[float]


def chart(
    title: str,
    steps: Sequence[int],
    series: Sequence[tuple[str, str, Sequence[float]]],
    chosen: Sequence[int] = (),
) -> Chart | None:
    """Lays a chart out.

    Args:
        title: what the lines measure.
        steps: ascending.
        series: kind, name and a value per step each; a NaN is left out.
        chosen: the steps that were selected.

    Returns:
        The chart; None if there are not two points to join.
    """
    known = [value for _, _, values in series for value in values if math.isfinite(value)]
    if len(steps) < 2 or len(known) < 2:
        return None
    low, high = min(known), max(known)
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
    return Chart(title, lines, f"{min(known):.3g}", f"{max(known):.3g}", steps[-1], sorted({*map(across, chosen)}))
