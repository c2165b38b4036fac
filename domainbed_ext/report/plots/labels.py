"""Labels of a scatter plot, each near its point and covering nothing."""

import itertools
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.transforms import Bbox

LABEL_SIZE = 9
LEADER = "#9A9A9A"
WIDTH = 32  # letters in a line of a label
DISTANCES = (7, 10, 14, 18, 24, 32, 42, 54, 68)  # of a label to its point, in points of 1/72 inch
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8))
# [places, 3]: distance and direction of each possible place of a label, the nearest first.
PLACES = np.array([(distance, *direction) for distance, direction in itertools.product(DISTANCES, DIRECTIONS)])

SLIGHT = 0.03  # of covering a line, beside covering a marker or another label
NOTHING = np.empty((0, 2))


class Labelled(NamedTuple):
    """A point and its label; place and error are in the axes' units, the size of the text is in points."""

    label: str
    colour: str
    place: tuple[float, float]
    error: tuple[float, float] = (0.0, 0.0)
    size: float = LABEL_SIZE


def place_labels(
    axes: Axes, points: Sequence[Labelled], renderer: RendererAgg, obstacles: np.ndarray = NOTHING
) -> None:
    """Writes each label as near to its point as possible without covering a marker, error bar or other label.

    Args:
        axes: Panel, drawn and laid out: places depend on its size.
        points: Points drawn in it.
        renderer: Renderer of the figure's canvas.
        obstacles: Places along lines, which labels keep off too, [places, 2] in the axes' units.
    """
    pixel = renderer.dpi / 72
    frame = axes.get_window_extent(renderer)
    lines = [Bbox([place, place]).padded(pixel) for place in axes.transData.transform(obstacles)]
    taken: list[Bbox] = []
    for _, _, (x, y), (x_error, y_error), _ in points:
        for dx, dy, room in ((x_error, 0.0, 2), (0.0, y_error, 2), (0.0, 0.0, 5)):
            ends = [(x - dx, y - dy), (x + dx, y + dy)]
            taken.append(Bbox(axes.transData.transform(ends)).padded(room * pixel))
    for words, colour, place, _, font_size in points:
        label = textwrap.fill(words, WIDTH, break_long_words=False)
        measured = axes.text(0, 0, label, fontsize=font_size)
        size = np.array(measured.get_window_extent(renderer).size)
        measured.remove()
        point = axes.transData.transform(place)
        # The side or corner of the label that faces the point is at that distance.
        offsets = pixel * PLACES[:, :1] * PLACES[:, 1:] + (np.sign(PLACES[:, 1:]) - 1) / 2 * size
        corners = point + offsets
        # Areas in square pixels: any overlap worth seeing outweighs every distance.
        hidden = sum(_overlaps(corners, size, other) for other in taken) + size.prod() - _overlaps(corners, size, frame)
        hidden = hidden + SLIGHT * sum(_overlaps(corners, size, other) for other in lines)
        best = int(np.argmin(np.round(hidden) + PLACES[:, 0]))
        distance, offset, box = PLACES[best, 0], offsets[best] / pixel, Bbox([corners[best], corners[best] + size])
        leader = {"arrowstyle": "-", "color": LEADER, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5}
        axes.annotate(
            label,
            place,
            (float(offset[0]), float(offset[1])),
            textcoords="offset points",
            va="bottom",
            color=colour,
            fontsize=font_size,
            arrowprops=leader if distance > DISTANCES[1] else None,
        )
        taken.append(box)


def _overlaps(corners: np.ndarray, size: np.ndarray, other: Bbox) -> np.ndarray:
    """The areas that boxes of one size share with another box, in square pixels.

    Args:
        corners: Lower left corners, [boxes, 2].
        size: Width and height, [2].
        other: Other box.

    Returns:
        Areas, [boxes].
    """
    shared = np.minimum(corners + size, other.max) - np.maximum(corners, other.min)
    return np.fmax(shared, 0).prod(axis=1)
