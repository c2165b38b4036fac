"""The registry of objectives: the declaration of each, and where its class is. Only an objective's class loads torch.

An objective is declared once, by `register_objective` on its class. Those of this package are declared in
`declarations`, so that names, tables, plots and `--help` need not load them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from domainbed_ext.errors import BenchmarkError, warn_once
from domainbed_ext.hyperparameter import Hyperparameters, merge
from domainbed_ext.system.registry import Declared, Registry

if TYPE_CHECKING:
    from domainbed_ext.objectives.base import Objective

C = TypeVar("C", bound=type)

GROUP = "domainbed_ext.objectives"
LAST = 100
DEFAULT = "ERM"
"""Objective of a method whose name has none."""


@dataclass(frozen=True)
class Declaration(Declared):
    """The declaration of an objective.

    Attributes:
        name: Name after the `+` of a method's name, in commands and records.
        implementation: Class, or "module:Class" to import it from.
        label: Name in plots, after that of the method.
        explanation: What it is, in one line.
        paper: URL of the paper.
        order: Position in tables; objectives of one position are sorted by name.
        aliases: Other names that commands accept. Case, hyphens and spaces do not count.
        hyperparameters: Hyperparameters that it adds to those of the method, by name.
        method: Method that is meant where the objective's name stands alone; None if it needs one.
    """

    name: str
    implementation: "str | type[Objective]"
    label: str
    explanation: str = ""
    paper: str = ""
    order: int = LAST
    aliases: tuple[str, ...] = ()
    hyperparameters: Hyperparameters = field(default_factory=dict)
    method: str | None = None


def _spellings(objective: Declaration) -> tuple[str, ...]:
    return objective.label, *objective.aliases


def _make(name: str, implementation: "type[Objective]") -> Declaration:
    declared = OBJECTIVES.registered().get(name)
    return replace(declared, implementation=implementation) if declared else Declaration(name, implementation, name)


OBJECTIVES: Registry[Declaration] = Registry(
    "objective", GROUP, ("domainbed_ext.objectives.declarations",), _make, _spellings, separators="+"
)


def describe_objective(name: str) -> Declaration:
    """Returns the declaration of an objective, for tables and plots.

    Args:
        name: Name in a record, after the `+`. One that is not registered has its name as its label.
    """
    try:
        return OBJECTIVES[name]
    except KeyError:
        pass
    except BenchmarkError as error:  # of an entry point
        warn_once(str(error))
    return Declaration(name, "", name)


def declare(objective: Declaration) -> None:
    """Adds an objective.

    Args:
        objective: Declaration.

    Raises:
        BenchmarkError: The name, the label or an alias is taken.
    """
    OBJECTIVES.register(objective.name, objective, objective.path)


def register_objective(
    name: str,
    *,
    label: str | None = None,
    explanation: str | None = None,
    paper: str = "",
    order: int = LAST,
    aliases: tuple[str, ...] = (),
    hyperparameters: Mapping[str, Any] | None = None,
) -> Callable[[C], C]:
    """Registers a class as an objective, for names of methods such as `BOnly+NAME`.

    Args:
        name: Name after the `+`, in commands and records.
        label: Name in plots, after that of the method; by default `name`.
        explanation: What it is, in one line; by default the first line of the class's docstring.
        paper: URL of the paper.
        order: Position in tables; by default after the objectives of this package.
        aliases: Other names that commands accept.
        hyperparameters: Hyperparameters over those of the objective that it inherits from: each a `Hyperparameter`, or
            a value, which is then the default and every draw.

    Returns:
        Decorator of a subclass of `Objective`.
    """

    def decorate(implementation: C) -> C:
        base = OBJECTIVES.base_of(implementation)
        declare(
            Declaration(
                name,
                implementation,
                label or name,
                explanation or (implementation.__doc__ or "").strip().partition("\n")[0],
                paper,
                order,
                aliases,
                merge(base.hyperparameters if base else {}, hyperparameters or {}),
            )
        )
        return implementation

    return decorate
