"""How a method is named in tables and plots, its variants (`BOnly@rank=16`) included; what a method declares counts."""

import re

from domainbed_ext.algorithms.registry import describe


def family_of(algorithm: str) -> str:
    """The method's name without the hyperparameters of a variant."""
    return algorithm.partition("@")[0]


def algorithm_order(algorithm: str) -> tuple[object, ...]:
    """Sort key of algorithms: by the method's place, then by name; variants in order (rank=8 before rank=16)."""
    family, _, variant = algorithm.partition("@")
    natural = [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", variant)]
    return describe(family).order, family, natural


def label_of(algorithm: str) -> str:
    """The label in plots: `LoRA-FA, rank 16` of `BOnly@rank=16`; a method without a label keeps its name."""
    family, _, variant = algorithm.partition("@")
    parts = re.split(r",(?=\w+=)", variant) if variant else []
    settings = [part.replace("=", " ", 1).replace("_", " ").replace('"', "").replace("+", ",") for part in parts]
    return ", ".join([describe(family).label, *settings])


def row_label_of(algorithm: str, lack: str = "") -> str:
    """The name in tables: the id, with the method's label and what its runs lack in parentheses.

    Args:
        algorithm: Id, as in commands and records.
        lack: What its runs lack; empty if nothing.

    Returns:
        `BOnly@rank=16 (LoRA-FA)`, or `LP (linear probe; 5 of 6 results)`.
    """
    family = family_of(algorithm)
    notes = [note for note in (describe(family).label, lack) if note and note != family]
    return f"{algorithm} ({'; '.join(notes)})" if notes else algorithm
