"""Lists of all methods and objectives: in short for `--help`, in full for the command `methods` and the docs."""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from domainbed_ext.algorithms.hyperparameters import COMMON
from domainbed_ext.algorithms.names import canonical_name, describe, fixed_hyperparameters, in_parentheses
from domainbed_ext.algorithms.registry import METHODS, OBJECTIVE, Group, Method
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.hyperparameter import Hyperparameters
from domainbed_ext.objectives.registry import DEFAULT, OBJECTIVES
from domainbed_ext.objectives.registry import Declaration as ObjectiveDeclaration
from domainbed_ext.system import strict_json
from domainbed_ext.system.commands import PACKAGE, format_command
from domainbed_ext.system.registry import Declared

OBJECTIVES_GROUP = "objectives"
HEADINGS = {
    "PEFT": "PEFT: adapts whole layers, so that q, k or v in targets means the whole qkv layer",
    OBJECTIVES_GROUP: f"{OBJECTIVES_GROUP}, as in BOnly+CORAL",
}
"""What the heading of a group says, where that is more than its name."""
GROUPS: tuple[str, ...] = (*get_args(Group), OBJECTIVES_GROUP)
NAME_HELP = "METHOD, METHOD+OBJECTIVE or METHOD@rank=16,lr=0.001, of those listed by the command `methods`"
_WIDTH = 100


@dataclass(frozen=True)
class Entry:
    """A method or an objective as lists show it.

    Attributes:
        name: Name in commands.
        label: Name in tables and plots.
        group: Group of the list.
        explanation: What it is, in one line.
        paper: URL of the paper; empty for none.
        aliases: Other names that commands accept.
        hyperparameters: Hyperparameters by name; of an objective, those that it adds to the method's.
    """

    name: str
    label: str
    group: str
    explanation: str
    paper: str
    aliases: tuple[str, ...]
    hyperparameters: Hyperparameters

    @property
    def title(self) -> str:
        """The name, with the label if it is another one: `BOnly (LoRA-FA)`."""
        return self.name if self.label == self.name else f"{self.name} ({in_parentheses(self.label)})"

    @property
    def in_name(self) -> set[str]:
        """The hyperparameters that its name gives."""
        return {OBJECTIVE, *(key for key, _ in fixed_hyperparameters(self.name))}

    def own_defaults(self, dataset: str = "") -> dict[str, Any]:
        """The defaults of its own hyperparameters: those that not all methods have, or have another default of.

        Args:
            dataset: Name of the data set; empty for those without defaults of their own.
        """
        shared = defaults(COMMON, dataset)
        return {
            name: default
            for name, default in defaults(self.hyperparameters, dataset).items()
            if name not in self.in_name and (name not in shared or shared[name] != default)
        }


def defaults(hyperparameters: Hyperparameters, dataset: str = "") -> dict[str, Any]:
    """The defaults by name.

    Args:
        hyperparameters: Hyperparameters by name.
        dataset: Name of the data set; empty for those without defaults of their own.
    """
    return {name: each.for_dataset(dataset)[0] for name, each in hyperparameters.items()}


def list_entries() -> list[Entry]:
    """Lists all methods, then all objectives, by group and in the order of tables; imports those of entry points."""
    methods = [entry for _, method in METHODS.importable() for entry in _all_of_method(method)]
    return _in_order(methods) + [_of_objective(objective) for _, objective in OBJECTIVES.importable()]


def built_in_entries() -> list[Entry]:
    """Lists the methods and objectives of this package alone."""
    methods = [
        entry for method in METHODS.registered().values() if _is_built_in(method) for entry in _all_of_method(method)
    ]
    return _in_order(methods) + [_of_objective(each) for each in OBJECTIVES.registered().values() if _is_built_in(each)]


def find_entries(name: str) -> list[Entry]:
    """Finds the methods and objectives of a name; more than one where a method and an objective share it.

    Args:
        name: Name of a method, with or without an objective and hyperparameters, or of an objective, in any spelling.

    Raises:
        BenchmarkError: There is none.
    """
    objective = OBJECTIVES.spelled(name)
    try:
        method = canonical_name(name)
    except BenchmarkError:
        if objective:
            return [_of_objective(OBJECTIVES[objective])]
        raise
    objective = objective or method.partition("@")[0].partition("+")[2]
    return [*_of_method(describe(method)), *([_of_objective(OBJECTIVES[objective])] if objective else [])]


def format_short() -> str:
    """All names in groups, for help texts; entry points, which are not imported, by name alone."""
    methods = METHODS.registered()
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for method in sorted(methods.values(), key=lambda method: method.order):
        variants = f"@{method.selector}=NAME: {', '.join(method.variants)}" if method.variants else ""
        groups[method.group].append(f"{method.name}{variants}" if variants else _entry(method).title)
    groups["others"] += [name for name in METHODS if name not in methods]
    groups[OBJECTIVES_GROUP] = [f"{name} (default)" if name == DEFAULT else f"+{name}" for name in OBJECTIVES]
    width = max(map(len, GROUPS)) + 4
    lines = [
        textwrap.fill(
            ", ".join(names),
            _WIDTH,
            initial_indent=f"  {group:{width - 2}}",
            subsequent_indent=" " * width,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for group, names in groups.items()
        if names
    ]
    return "\n".join([f"methods and objectives ({format_command('methods')} explains them):", *lines])


def format_full(entries: list[Entry], dataset: str = "") -> str:
    """Methods and objectives with explanation, hyperparameters and paper.

    Args:
        entries: What to list.
        dataset: Name of the data set whose defaults are shown; empty for those without defaults of their own.
    """
    lines: list[str] = []
    group = ""
    for entry in entries:
        if entry.group != group:
            group = entry.group
            heading = HEADINGS.get(group, group)
            lines += ["", heading] if lines else [heading]
        lines.append(f"  {entry.title}")
        lines += [*_wrapped(entry.explanation), *_wrapped(entry.paper)]
        lines += _wrapped(f"also {', '.join(entry.aliases)}" if entry.aliases else "")
        lines += _wrapped(_settings(entry.hyperparameters, entry.own_defaults(dataset)))
    shared = _settings(COMMON, defaults(COMMON, dataset))
    lines += ["", "hyperparameters of all methods, where none is given above", *_wrapped(shared)]
    return "\n".join([*lines, "", "*: drawn at random where --hparams_seed is not 0"])


def as_json(entries: list[Entry], dataset: str = "") -> list[dict[str, Any]]:
    """Methods and objectives as plain values.

    Args:
        entries: What to list.
        dataset: Name of the data set whose defaults are given; empty for those without defaults of their own.
    """
    return [
        {
            "name": entry.name,
            "label": entry.label,
            "group": entry.group,
            "explanation": entry.explanation,
            "paper": entry.paper,
            "aliases": list(entry.aliases),
            "hyperparameters": {
                name: {
                    "default": default,
                    "random": is_random(entry.hyperparameters, name),
                    "aliases": list(entry.hyperparameters[name].aliases),
                }
                for name, default in defaults(entry.hyperparameters, dataset).items()
            },
        }
        for entry in entries
    ]


def written(value: Any) -> str:
    """A value as a method's name has it after the @, rounded: `q+v`, for a comma separates hyperparameters."""
    if isinstance(value, float) and len(repr(value)) > 8:
        return f"{value:.4g}"
    return value.replace(",", "+") if isinstance(value, str) else strict_json.dumps(value)


def is_random(hyperparameters: Hyperparameters, name: str) -> bool:
    """Whether a hyperparameter is drawn at random, on some data set at least."""
    each = hyperparameters[name]
    return each.draw is not None or any(draw is not None for _, _, draw in each.exceptions)


def _is_built_in(declared: Declared) -> bool:
    return declared.path.startswith(f"{PACKAGE}.")


def _of_method(method: Method) -> Iterator[Entry]:
    """The method, or each of its variants."""
    yield from map(_entry, method.variants.values() or [method])


def _all_of_method(method: Method) -> Iterator[Entry]:
    """The method, or each of its variants, and its settings with a name of their own."""
    yield from _of_method(method)
    for each in method.named:
        yield _entry(describe(f"{method.name}@{each.fixed}"))


def _entry(method: Method) -> Entry:
    return Entry(
        method.name,
        method.label,
        method.group,
        method.explanation,
        method.paper,
        method.aliases,
        method.hyperparameters,
    )


def _of_objective(objective: ObjectiveDeclaration) -> Entry:
    return Entry(
        objective.name,
        objective.label,
        OBJECTIVES_GROUP,
        objective.explanation,
        objective.paper,
        objective.aliases,
        objective.hyperparameters,
    )


def _in_order(entries: list[Entry]) -> list[Entry]:
    """By group, and within a group in the order of tables."""
    return sorted(entries, key=lambda entry: (GROUPS.index(entry.group), describe(entry.name).order))


def _settings(hyperparameters: Hyperparameters, values: Mapping[str, Any]) -> str:
    """Hyperparameters as a method's name has them after the @, with a star where they are drawn at random."""
    return ", ".join(
        f"{name}={written(value)}{'*' if is_random(hyperparameters, name) else ''}" for name, value in values.items()
    )


def _wrapped(text: str) -> list[str]:
    """A text as lines, indented below a title; none without text."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=" " * 6,
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )
