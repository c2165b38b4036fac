"""A colour for each method and a marker for each of its variants, the same in all figures of a report."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from domainbed_ext.algorithms.registry import describe
from domainbed_ext.report.methods import family_of

# Of Okabe and Ito's palette, for methods that declare no colour.
FREE_COLOURS = ["#E69F00", "#56B4E9", "#8C6D31", "#000000"]
MARKERS = "osD^vP*X"
DASHES: list[tuple[int, tuple[float, ...]]] = [(0, ()), (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]


class Style(NamedTuple):
    """How a method is drawn.

    Attributes:
        colour: Colour of the method, as "#RRGGBB".
        marker: Marker that tells its variants apart.
        dashes: The same for lines.
    """

    colour: str
    marker: str
    dashes: tuple[int, tuple[float, ...]]


def styles_of(algorithms: Sequence[str]) -> dict[str, Style]:
    """The styles of all algorithms of a report.

    Args:
        algorithms: Ids in the order of tables; variants of a method share its colour.

    Returns:
        Style by id.
    """
    families = list(dict.fromkeys(map(family_of, algorithms)))
    free = [family for family in families if describe(family).colour is None]
    colours = {
        family: describe(family).colour or FREE_COLOURS[free.index(family) % len(FREE_COLOURS)] for family in families
    }
    variants: defaultdict[str, int] = defaultdict(int)
    styles = {}
    for algorithm in algorithms:
        family = family_of(algorithm)
        number = variants[family]
        variants[family] += 1
        styles[algorithm] = Style(colours[family], MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)])
    return styles
