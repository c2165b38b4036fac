"""The names of what is adapted: projections, patterns of layer names, and mappings from patterns to projections."""

import re
from collections.abc import Iterable
from typing import Any

from vitlorafa.errors import AdapterError, is_synonym, unknown

TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")

_SEVERAL = {"qkv": ("q", "k", "v"), "all": TARGETS, "all-linear": TARGETS}  # names of several projections
_SPECIAL = re.compile(r"[.^$*+?{}\[\]|()\\]")  # what patterns have and names of projections lack


def is_pattern(targets: Any) -> bool:
    """Whether targets are a pattern of layer names, as `re.fullmatch` takes it, instead of names of projections.

    Args:
        targets: What the user gave.
    """
    return isinstance(targets, str) and bool(_SPECIAL.search(targets)) and not is_synonym(targets)


def parse_targets(targets: str | Iterable[str]) -> tuple[str, ...]:
    """The targets as a tuple of names of projections, in the order of `TARGETS`, or of one pattern.

    Args:
        targets: Names, a string of names that are separated by commas, or a pattern.

    Raises:
        AdapterError: If a name is unknown, there is none, or the pattern is invalid.
    """
    if not isinstance(targets, Iterable):
        raise AdapterError(f"targets must be names or 'all', not {targets!r}")
    if isinstance(targets, str):
        names: list[Any] = [targets] if is_pattern(targets) else [name.strip() for name in targets.split(",")]
    else:
        names = list(targets)
    if any(map(is_pattern, names)):
        if len(names) > 1:
            raise AdapterError(f"targets has a pattern among {len(names)} values: give one pattern alone, as with a|b")
        return (_check_pattern("targets", names[0]),)
    chosen: set[str] = set()
    for name in names:
        several = _SEVERAL.get(name) if isinstance(name, str) else None
        if several is None and name not in TARGETS:
            raise unknown("target", name, [*TARGETS, "qkv", "all"])
        chosen.update(several or (name,))
    if not chosen:
        raise AdapterError(f"targets is empty: choose from {', '.join(TARGETS)}, or 'all'")
    return tuple(name for name in TARGETS if name in chosen)


def parse_sites(sites: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """A mapping from patterns of layer names to the projections that these layers compute, as pairs.

    Args:
        sites: Mapping from patterns to names of projections, or such pairs.

    Raises:
        AdapterError: If it is not such a mapping, a pattern is invalid, or a projection is unknown.
    """
    try:
        pairs = [(pattern, targets) for pattern, targets in dict(sites).items()]
    except (TypeError, ValueError):
        pairs = []
    if not pairs:
        raise AdapterError(
            f"sites must map patterns of layer names to projections, such as {{r'layers\\.\\d+\\.fc1': 'fc1'}}, not "
            f"{sites!r}"
        )
    checked = []
    for pattern, targets in pairs:
        names = parse_targets(targets)
        if is_pattern(names[0]):
            raise AdapterError(f"sites maps {pattern!r} to {names[0]!r}: choose from {', '.join(TARGETS)}")
        # The layer stacks its outputs in the order that the user gives; `parse_targets` has another one.
        given = [name.strip() for name in targets.split(",")] if isinstance(targets, str) else list(targets)
        stacked = [name for each in given for name in _SEVERAL.get(each, (each,))]
        checked.append((_check_pattern("sites", pattern), tuple(dict.fromkeys(stacked))))
    return tuple(checked)


def _check_pattern(field: str, pattern: Any) -> str:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise AdapterError(f"{field} has {pattern!r}, which is no regular expression ({error}): correct it") from None
    return str(pattern)
