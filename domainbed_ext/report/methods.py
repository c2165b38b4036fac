"""How a method is shown: label, place in tables and colour, its variants (`BOnly@rank=16`) included."""

import re
from collections.abc import Iterable
from typing import NamedTuple


class _Method(NamedTuple):
    label: str
    colour: str


# Okabe and Ito's palette, which the colour-blind can tell apart; variants of a method share its colour.
_METHODS = {
    "BA": _Method("LoRA", "#0072B2"),
    "BOnly": _Method("LoRA-FA", "#D55E00"),
    "AOnly": _Method("LoRA-FB", "#009E73"),
    "LP": _Method("linear probe", "#7A7A7A"),
    "FullFT": _Method("full fine-tuning", "#CC79A7"),
    "ERM": _Method("DomainBed ERM", "#E69F00"),
}
_OTHER_COLOURS = ["#E69F00", "#56B4E9", "#8C6D31", "#000000"]


def family_of(algorithm: str) -> str:
    """The method's name without the hyperparameters of a variant."""
    return algorithm.partition("@")[0]


def algorithm_order(algorithm: str) -> tuple[object, ...]:
    """Sort key of algorithms: those that declare a place first, variants in order (rank=8 before rank=16)."""
    family, _, variant = algorithm.partition("@")
    order = list(_METHODS)
    place = order.index(family) if family in order else len(order)
    natural = [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", variant)]
    return place, family, natural


def label(algorithm: str) -> str:
    """The label in plots: `LoRA-FA, rank 16` of `BOnly@rank=16`; a method without a label keeps its name."""
    family, _, variant = algorithm.partition("@")
    if family not in _METHODS:
        return algorithm
    return ", ".join([_METHODS[family].label, *_settings(variant)])


def row_label(algorithm: str, lack: str = "") -> str:
    """The name in tables: the id, with the method's label and what its runs lack in parentheses.

    Args:
        algorithm: Id, as in commands and records.
        lack: What its runs lack; empty if nothing.

    Returns:
        `BOnly@rank=16 (LoRA-FA)`, or `LP (linear probe; 5 of 6 results)`.
    """
    family = family_of(algorithm)
    notes = [note for note in (_METHODS[family].label if family in _METHODS else "", lack) if note]
    return f"{algorithm} ({'; '.join(notes)})" if notes else algorithm


def colour(algorithm: str, shown: Iterable[str]) -> str:
    """The colour in all figures: the method's own, else one of a few for methods that declare none.

    Args:
        algorithm: Id.
        shown: Ids of all algorithms of the figure, which share out the colours of those without their own.
    """
    family = family_of(algorithm)
    if family in _METHODS:
        return _METHODS[family].colour
    others = [name for name in dict.fromkeys(map(family_of, shown)) if name not in _METHODS]
    return _OTHER_COLOURS[others.index(family) % len(_OTHER_COLOURS)]


def _settings(variant: str) -> list[str]:
    """`rank=16,targets="q,v"` as ["rank 16", "targets q,v"]."""
    parts = re.split(r",(?=\w+=)", variant) if variant else []
    return [part.replace("=", " ", 1).replace("_", " ").replace('"', "").replace("+", ",") for part in parts]
