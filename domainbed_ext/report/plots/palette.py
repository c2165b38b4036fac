"""A colour for each adaptation and a marker for each objective or variant, the same in all figures of a report."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from domainbed_ext.algorithms.names import describe
from domainbed_ext.report.methods import adaptation_of, objective_of, objectives_of, without_objective

# For methods that declare no colour: of Okabe and Ito's palette, then of Tol's and of darker tones for many methods.
FREE_COLOURS = [
    *("#E69F00", "#56B4E9", "#8C6D31", "#000000"),
    *("#882255", "#117733", "#332288", "#AA4499", "#44AA99", "#999933", "#CC6677", "#6699CC"),
    *("#7B4B2A", "#4F7F00", "#B5651D", "#5B5EA6", "#A0522D", "#2F6F73", "#C71585", "#556B2F"),
]
MARKERS = "osD^vP*X<>phd8H"
MARKER_SIZES = {"*": 11, "P": 8, "X": 8}  # of those that look smaller than others of their size
DASHES: list[tuple[int, tuple[float, ...]]] = [(0, ()), (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]


class Style(NamedTuple):
    """How a method is drawn.

    Attributes:
        colour: Colour of its adaptation, as "#RRGGBB".
        marker: Marker of its objective or, where there is one alone, of the variant.
        dashes: The same for lines.
    """

    colour: str
    marker: str
    dashes: tuple[int, tuple[float, ...]]


def styles_of(algorithms: Sequence[str]) -> dict[str, Style]:
    """The styles of all algorithms of a report.

    Args:
        algorithms: Ids in the order of tables.

    Returns:
        Style by id. Variants and objectives of an adaptation share its colour; the same objective has the same marker
        throughout, and variants that share an objective differ in theirs.
    """
    colours = _colours(algorithms)
    objectives = ["", *objectives_of(algorithms)]  # of upstream's algorithms it is not known
    variants: defaultdict[tuple[str, str], int] = defaultdict(int)
    places: dict[str, tuple[int, int]] = {}
    for algorithm in algorithms:
        objective = objective_of(algorithm)
        shared = adaptation_of(algorithm), objective
        places[algorithm] = variants[shared], max(objectives.index(objective), 1)
        variants[shared] += 1
    in_order = sorted(set(places.values()))
    numbers = {place: number for number, place in enumerate(in_order)}
    return {
        algorithm: Style(
            colours[adaptation_of(algorithm)],
            MARKERS[numbers[place] % len(MARKERS)],
            DASHES[numbers[place] % len(DASHES)],
        )
        for algorithm, place in places.items()
    }


def _colours(algorithms: Sequence[str]) -> dict[str, str]:
    """The colour of each adaptation: the one it declares, or else the next that no other has."""
    declared: dict[str, str | None] = {}
    for algorithm in algorithms:
        adaptation = adaptation_of(algorithm)
        colour = describe(without_objective(algorithm)).colour
        # Several adaptations may be of one method, which declares one colour.
        declared[adaptation] = declared.get(adaptation) or (colour if colour not in declared.values() else None)
    free = itertools.cycle([colour for colour in FREE_COLOURS if colour not in declared.values()] or FREE_COLOURS)
    return {adaptation: colour or next(free) for adaptation, colour in declared.items()}
