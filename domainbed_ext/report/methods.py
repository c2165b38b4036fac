"""How a method is named in tables and plots, its variants (`BOnly@rank=16`) included; what a method declares counts."""

import itertools
import re
from collections.abc import Container, Iterable, Sequence

from domainbed_ext.algorithms.derived_names import join_derived, split_derived
from domainbed_ext.algorithms.hyperparameters import COMMON
from domainbed_ext.algorithms.names import describe, fixed_hyperparameters, in_parentheses
from domainbed_ext.algorithms.registry import Method, NamedSetting
from domainbed_ext.hyperparameter import Hyperparameter
from domainbed_ext.objectives.registry import DEFAULT, describe_objective


def family_of(algorithm: str) -> str:
    """The method's name without the hyperparameters of a variant, and without what was derived from its runs."""
    return split_derived(algorithm)[0].partition("@")[0]


def adaptation_of(algorithm: str) -> str:
    """The label of what trains, whatever the objective: `LoRA-FA` of `BOnly+CORAL@rank=16`."""
    return describe(without_objective(algorithm)).label


def objective_of(algorithm: str) -> str:
    """The label of what is minimised: `CORAL` of `BOnly+CORAL`, `ERM` of `BOnly`.

    Empty where it is not known: of a method that is not registered, such as one of upstream's.
    """
    _, plus, name = family_of(algorithm).partition("+")
    if plus:
        return describe_objective(name).label
    return describe_objective(DEFAULT).label if describe(algorithm).path else ""


def objectives_of(algorithms: Iterable[str]) -> list[str]:
    """The labels of all objectives of some methods that are known, in the order of tables."""
    names = {family_of(algorithm).partition("+")[2] or DEFAULT for algorithm in algorithms if objective_of(algorithm)}
    return list(dict.fromkeys(describe_objective(name).label for name in sorted(names, key=_objective_order)))


def has_objectives(algorithms: Iterable[str]) -> bool:
    """Whether any method has another objective than the default: tables and plots then show objectives."""
    return any("+" in family_of(algorithm) for algorithm in algorithms)


def group_starts(algorithms: Sequence[str]) -> set[int]:
    """The rows that are set apart from those above: each begins an adaptation with several rows, or follows one.

    Args:
        algorithms: Ids in the order of tables.

    Returns:
        Indices; none where all methods have the default objective.
    """
    if not has_objectives(algorithms):
        return set()
    sizes = [len(list(group)) for _, group in itertools.groupby(algorithms, adaptation_of)]
    starts = itertools.accumulate(sizes)
    return {
        start for start, (before, size) in zip(starts, itertools.pairwise(sizes), strict=False) if max(before, size) > 1
    }


def algorithm_order(algorithm: str) -> tuple[object, ...]:
    """Sort key of algorithms: by what trains, then by objective; variants by the numbers in their names.

    So rank=8 is before rank=16, and lr=0.003 before lr=0.01. What is derived from a method's runs follows the method.
    """
    name, derived = split_derived(algorithm)
    family, _, variant = name.partition("@")
    method, _, objective = family.partition("+")
    # split returns what is around the numbers at even places, the numbers at odd ones
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", variant)
    natural = [float(part) if place % 2 else part for place, part in enumerate(parts)]
    adaptation = describe(without_objective(algorithm))
    return adaptation.order, method, adaptation.label, _objective_order(objective or DEFAULT), natural, name, derived


def _objective_order(name: str) -> tuple[object, ...]:
    """Sort key of objectives' names: by their place, then by name."""
    return describe_objective(name).order, name


def label_of(algorithm: str) -> str:
    """The label in plots: `LoRA-FA, rank 16` of `BOnly@rank=16`; a method without a label keeps its name."""
    return ", ".join([describe(algorithm).label, *settings_of(algorithm)])


def settings_of(algorithm: str, but: Container[str] = ()) -> list[str]:
    """The fixed hyperparameters of a variant in words, and what was derived: `rank 16` of `BOnly@rank=16`.

    Args:
        algorithm: Id, as in commands and records.
        but: Names of hyperparameters that are left out.
    """
    method = describe(family_of(algorithm))
    fixed = [
        (key, value)
        for key, value in fixed_hyperparameters(algorithm)
        if key not in but and key != method.selector and not _is_in_label(method.named_setting(key, value))
    ]
    derived = split_derived(algorithm)[1]
    words = [_in_words(method, key, value.replace('"', "").replace("+", ",")) for key, value in fixed]
    return [*words, derived] if derived else words


def _is_in_label(setting: NamedSetting | None) -> bool:
    return setting is not None and not setting.others


def _in_words(method: Method, key: str, value: str) -> str:
    kind = method.hyperparameters.get(key, Hyperparameter(None))
    words = kind.words.format(value) if kind.words else f"{key} {value}".replace("_", " ")
    return kind.labels.get(value, words)


def adaptation_settings_of(algorithm: str) -> list[str]:
    """The settings that say what trains, without those of the objective and of training, such as the learning rate."""
    objective = family_of(algorithm).partition("+")[2] or DEFAULT
    return settings_of(algorithm, {*COMMON, *describe_objective(objective).hyperparameters})


def row_label_of(algorithm: str, lack: str = "") -> str:
    """The name in tables: the id, with the method's label and what its runs lack in parentheses.

    Args:
        algorithm: Id, as in commands and records.
        lack: What its runs lack; empty if nothing.

    Returns:
        `BOnly@rank=16 (LoRA-FA)`, or `LP (linear probe; 5 of 6 results)`.
    """
    label = in_parentheses(describe(algorithm).label)
    notes = [note for note in (label, lack) if note and note != family_of(algorithm)]
    return f"{algorithm} ({'; '.join(notes)})" if notes else algorithm


def id_of(algorithm: str, lack: str = "") -> str:
    """The id, with what its runs lack in parentheses, for tables that have the labels in columns of their own.

    Args:
        algorithm: Id, as in commands and records.
        lack: What its runs lack; empty if nothing.
    """
    return f"{algorithm} ({lack})" if lack else algorithm


def without_objective(algorithm: str) -> str:
    """`BOnly@rank=16` of `BOnly+CORAL@rank=16`."""
    name, derived = split_derived(algorithm)
    family, at, variant = name.partition("@")
    return join_derived(family.partition("+")[0] + at + variant, derived)
