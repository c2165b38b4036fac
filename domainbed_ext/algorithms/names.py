"""Names of methods as users write them, as records have them, and what they stand for: `BOnly+CORAL@rank=16`."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from domainbed_ext.algorithms.derived_names import join_derived, split_derived
from domainbed_ext.algorithms.registry import METHODS, OBJECTIVE, Method, compose, read_value
from domainbed_ext.errors import BenchmarkError, warn_once
from domainbed_ext.objectives.registry import DEFAULT, OBJECTIVES, describe_objective

if TYPE_CHECKING:
    from domainbed_ext.algorithms.base import Algorithm
    from domainbed_ext.objectives.base import Objective


def describe(name: str) -> Method:
    """Returns the declaration of a method, for tables and plots.

    Args:
        name: Name in a record, with or without fixed hyperparameters; a derived run is described as its method. A
            method that is not registered, such as one of upstream's, has its name as its label.
    """
    name = split_derived(name)[0]
    family = name.partition("@")[0]
    base, plus, objective = family.partition("+")
    fixed = fixed_hyperparameters(name)
    try:
        method = METHODS[base]
        chosen = [f"{key}={value}" for key, value in fixed if key == method.selector]
        method = method.variant(chosen[0]) if chosen else method.with_settings(fixed)
        return compose(method, OBJECTIVES[objective]) if plus else method
    except KeyError:
        pass
    except BenchmarkError as error:  # of an entry point
        warn_once(str(error))
    return Method(family, "", family)


def fixed_hyperparameters(name: str) -> list[tuple[str, str]]:
    """Returns the fixed hyperparameters of a name in a record, with values as written there.

    Args:
        name: Name of a method; those of earlier versions may have commas in values.
    """
    fixed = split_derived(name)[0].partition("@")[2]
    parts = re.split(r",(?=\w+=)", fixed) if fixed else []
    return [(key, value) for key, _, value in (part.partition("=") for part in parts)]


def in_parentheses(label: str) -> str:
    """Returns a label as it stands within parentheses: `DoRA, PEFT` of `DoRA (PEFT)`."""
    return re.sub(r" \(([^()]*)\)", r", \1", label)


def parse_name(name: str) -> tuple[str, dict[str, Any]]:
    """Splits `BOnly+CORAL@rank=16,lr=0.001`.

    Args:
        name: Name of a method in any spelling, with or without an objective and fixed hyperparameters.

    Returns:
        The registered name, with objective and variant, and the other fixed hyperparameters by their canonical names.

    Raises:
        BenchmarkError: The algorithm is unknown, a part is not `hyperparameter=value`, or one is there twice.
    """
    base, parts = _split(name)
    hparams: dict[str, Any] = {}
    for key, value in parts:
        if key in hparams:
            raise BenchmarkError(f"{name!r} gives {key} twice: give it once")
        hparams[key] = read_value(value)
    return base, hparams


def canonical_name(name: str) -> str:
    """Returns the spelling of a method's name in records and folder names: `BOnly@rank=16` for `LoRA-FA@r=16`.

    Args:
        name: Name of a method in any spelling, with fixed hyperparameters or none, or of a derived run.

    Raises:
        BenchmarkError: See `parse_name`.
    """
    method, derived = split_derived(name)
    base, parts = _split(method)
    fixed = ",".join(f"{key}={value}" for key, value in parts)
    return join_derived(f"{base}{',' if '@' in base else '@'}{fixed}" if fixed else base, derived)


def _split(name: str) -> tuple[str, list[tuple[str, str]]]:
    """The registered name, and the fixed hyperparameters by their canonical names, with values as written."""
    base, _, fixed = _spell_out(name).partition("@")
    parts = []
    for part in fixed.split(",") if fixed else ():
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise BenchmarkError(f"{name!r}: {part!r} is not hyperparameter=value, as in {base}@rank=16")
        before, plus, last = part.rpartition("+")
        if plus and (objective := OBJECTIVES.spelled(last)):
            right = f"{base}+{objective}@{fixed.replace(part, before)}"
            raise BenchmarkError(f"{name!r} names the objective after the @: write {right}")
        parts.append((key, value))
    objectives = [value for key, value in parts if key == OBJECTIVE]  # BOnly@objective=coral is BOnly+CORAL
    method = METHODS.find("+".join([base, *objectives]))
    apart = {OBJECTIVE}
    if method.variants:  # without a choice, it is the first
        chosen, *more = [value for key, value in parts if key == method.selector] or [next(iter(method.variants))]
        if more:
            raise BenchmarkError(f"{name!r} gives {method.selector} twice: give it once")
        apart.add(method.selector)
        method = METHODS.find(f"{method.name}@{method.selector}={chosen}")
    return method.name, [(method.canonical_hyperparameter(key), value) for key, value in parts if key not in apart]


def _spell_out(name: str) -> str:
    """Returns a name by the method behind it: `BA+CORAL@quantise=nf4,rank=4` of `QLoRA+CORAL@rank=4`.

    Settings and variants may stand for themselves, as QLoRA and DoRA do. Names of methods come first, then settings.
    """
    base, _, fixed = name.partition("@")
    if METHODS.spelled(base):
        return name
    methods = METHODS.registered().values()
    names = [(each.label, method.name, each.fixed) for method in methods for each in method.named]
    names += [
        (value, each.name, f"{each.selector}={value}")
        for each in methods
        for value in each.variants
        if not METHODS.spelled(value)
    ]
    for spelling, method, setting in names:
        start, rest = base[: len(spelling)], base[len(spelling) :]
        if start.casefold() == spelling.casefold() and (not rest or (rest[0] == "+" and rest[1:])):
            return f"{method}{rest}@{','.join(filter(None, (setting, fixed)))}"
    return name


def without_objective(name: str) -> str:
    """Returns the name of the method that an objective is added to: `BOnly@rank=4` for `BOnly+SAM@rank=4,sam_rho=0.1`.

    Args:
        name: Canonical name of a method.
    """
    method, _, objective = name.partition("@")[0].partition("+")
    theirs = describe_objective(objective or DEFAULT).hyperparameters
    kept = ",".join(f"{key}={value}" for key, value in fixed_hyperparameters(name) if key not in theirs)
    return f"{method}@{kept}" if kept else method


def find_among(name: str, names: Sequence[str]) -> str | None:
    """Returns which of some canonical names is meant: the name itself, or the only one of its method and objective.

    Args:
        name: Name in any spelling; without fixed hyperparameters it stands for the only name that has any.
        names: Canonical names.
    """
    if name in names:
        return name
    if (canonical := canonical_name(name)) in names:
        return canonical
    alike = [each for each in names if each.startswith(f"{canonical}@") and " " not in each]
    return alike[0] if len(alike) == 1 else None


def get_algorithm_class(name: str) -> "type[Algorithm]":
    """Returns the class of a method.

    Args:
        name: Name of a method in any spelling, with fixed hyperparameters or none.

    Raises:
        BenchmarkError: The algorithm is unknown.
    """
    implementation: type[Algorithm] = METHODS.find(parse_name(name)[0]).load()
    return implementation


def get_objective_class(name: str) -> "type[Objective]":
    """Returns the class of the objective in a method's name.

    Args:
        name: Name of a method in any spelling, with or without an objective and fixed hyperparameters.

    Raises:
        BenchmarkError: The algorithm or the objective is unknown.
    """
    implementation: type[Objective] = OBJECTIVES.find(parse_name(name)[0].partition("+")[2] or DEFAULT).load()
    return implementation
