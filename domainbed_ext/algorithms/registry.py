"""The registry of methods: the declaration of each, and where its class is. Only a method's class loads torch.

A method is declared once, by `register_algorithm` on its class. Those of this package are declared in `methods`, so
that tables, plots and `--help` know their labels without loading them.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from domainbed_ext.algorithms.hyperparameters import COMMON
from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.hyperparameter import Hyperparameter, Hyperparameters, merge
from domainbed_ext.objectives.registry import DEFAULT, OBJECTIVES
from domainbed_ext.objectives.registry import Declaration as ObjectiveDeclaration
from domainbed_ext.system import strict_json
from domainbed_ext.system.registry import Declared, Registry

if TYPE_CHECKING:
    from domainbed_ext.algorithms.base import Algorithm

A = TypeVar("A", bound=type)

GROUP = "domainbed_ext.algorithms"
LAST = 100
OBJECTIVE = "objective"
"""Hyperparameter of a method with an objective: the objective's name."""

Factors = Literal["BA", "B", "A"]
Group = Literal["adapters", "partial tuning", "PEFT", "full fine-tuning", "others"]


@dataclass(frozen=True)
class NamedSetting:
    """A method with a fixed hyperparameter that has a name of its own, as LoRA on a base in 4 bits is QLoRA.

    Attributes:
        hyperparameter: Name of the hyperparameter.
        value: Its value.
        label: Label of the method with this value.
        explanation: What it is, in one line.
        paper: URL of the paper.
        others: Whether other values than the default have the label too; labels then show the value.
    """

    hyperparameter: str
    value: Any
    label: str
    explanation: str
    paper: str
    others: bool = False

    @property
    def fixed(self) -> str:
        """The setting as a method's name has it after the @."""
        return f"{self.hyperparameter}={self.value if isinstance(self.value, str) else strict_json.dumps(self.value)}"


@dataclass(frozen=True)
class Method(Declared):
    """The declaration of a method.

    Attributes:
        name: Name in commands and records.
        implementation: Class, or "module:Class" to import it from.
        label: Name in plots, and in tables beside `name`.
        explanation: What it is, in one line.
        order: Position in tables; methods of one position are sorted by name.
        colour: Colour in plots, as "#RRGGBB"; None for the next free one.
        trains: Factors of its adapters that train; None for a method without adapters.
        aliases: Other names that commands accept. Case, hyphens and spaces do not count.
        hyperparameters: Hyperparameters by name.
        paper: URL of the paper, on arXiv or OpenReview; empty for none.
        group: Group that lists of methods show it in.
        selector: Hyperparameter that chooses one of `variants` in the method's name; empty for a method without any.
        variants: Declarations by the value of the selector, each named as in `Peft@method=dora`.
        named: Settings of its hyperparameters that have a name of their own.
    """

    name: str
    implementation: "str | type[Algorithm]"
    label: str
    explanation: str = ""
    order: int = LAST
    colour: str | None = None
    trains: Factors | None = None
    aliases: tuple[str, ...] = ()
    hyperparameters: Hyperparameters = field(default_factory=lambda: COMMON)
    paper: str = ""
    group: Group = "others"
    selector: str = ""
    variants: "Mapping[str, Method]" = field(default_factory=dict)
    named: tuple[NamedSetting, ...] = ()

    def __post_init__(self) -> None:
        if self.colour is not None and not re.fullmatch("#[0-9A-Fa-f]{6}", self.colour):
            raise BenchmarkError(f"colour {self.colour!r} of {self.name} is not of the form '#0072B2'")

    def variant(self, chosen: str) -> "Method":
        """Returns one of the variants.

        Args:
            chosen: How a name chooses it, as in `method=dora`.

        Raises:
            BenchmarkError: There is no such variant.
        """
        selector, _, value = chosen.partition("=")
        if selector != self.selector or value not in self.variants:
            labels = {method.label: name for name, method in self.variants.items()}
            raise unknown(f"{self.selector} of {self.name}", value, self.variants, labels)
        return self.variants[value]

    def named_setting(self, hyperparameter: str, value: str) -> NamedSetting | None:
        """Returns the setting with a name of its own that a fixed hyperparameter is; None if it has none.

        Args:
            hyperparameter: Canonical name.
            value: Value as written in a method's name.
        """
        read = read_value(value)
        for each in self.named:
            if each.hyperparameter == hyperparameter and (
                read == each.value or (each.others and read != self.hyperparameters[hyperparameter].default)
            ):
                return each
        return None

    def with_settings(self, fixed: Iterable[tuple[str, str]]) -> "Method":
        """Returns the declaration of the method with fixed hyperparameters: itself, but for those with a name.

        Args:
            fixed: Names and values, as written in a method's name.
        """
        named = [(key, value, each) for key, value in fixed if (each := self.named_setting(key, value))]
        if not named:
            return self
        return replace(
            self,
            name=f"{self.name}@{','.join(f'{key}={value}' for key, value, _ in named)}",
            label=", ".join(each.label for *_, each in named),
            explanation="; ".join(each.explanation for *_, each in named),
            colour=None,
            aliases=(),
            paper=named[0][-1].paper,
        )

    def canonical_hyperparameter(self, name: str) -> str:
        """Returns the hyperparameter of an alias; other names are returned unchanged."""
        if name in self.hyperparameters:
            return name
        return next((each for each, kind in self.hyperparameters.items() if name in kind.aliases), name)


def read_value(value: str) -> Any:
    """Reads the value of a hyperparameter as written in a method's name.

    Args:
        value: JSON, or text with "+" for commas.
    """
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value.replace("+", ",")  # targets=q+v: a comma separates hyperparameters


def _spellings(method: Method) -> tuple[str, ...]:
    return method.label, *method.aliases


def _make(name: str, implementation: "type[Algorithm]") -> Method:
    """A class without a declaration has that of its name, or else DomainBed's hyperparameters."""
    declared = METHODS.registered().get(name)
    return replace(declared, implementation=implementation) if declared else Method(name, implementation, name)


class _Methods(Registry[Method]):
    """The methods by name, also composed of a method and an objective, such as `BOnly+CORAL`; `BOnly+ERM` is `BOnly`.

    Of a method with variants, each has a name, such as `Peft@method=dora` and `Peft+CORAL@method=dora`.
    """

    def canonical(self, name: str) -> str:
        family, at, chosen = name.partition("@")
        if at:
            family = self.canonical(family)
            self[family].variant(chosen)
            return family + at + chosen
        base, plus, objective = name.partition("+")
        if not plus:
            alone = None if self.spelled(name) else OBJECTIVES.spelled(name)
            method = OBJECTIVES[alone].method if alone else None
            return f"{method}+{alone}" if method else self._canonical_method(name)
        if not base or not objective or "+" in objective:
            raise BenchmarkError(f"{name!r} is not METHOD+OBJECTIVE, as in BOnly+CORAL: give one of each")
        method, objective = self._canonical_method(base), OBJECTIVES.canonical(objective)
        return method if objective == DEFAULT else f"{method}+{objective}"

    def find(self, name: str) -> Method:
        return self[self.canonical(name)]

    def __getitem__(self, name: str) -> Method:
        family, at, chosen = name.partition("@")
        base, plus, objective = family.partition("+")
        method = super().__getitem__(base)
        method = method.variant(chosen) if at else method
        return compose(method, OBJECTIVES[objective]) if plus else method

    def __contains__(self, name: object) -> bool:
        family, at, chosen = str(name).partition("@")
        base, plus, objective = family.partition("+")
        if not super().__contains__(base) or (plus and objective not in OBJECTIVES):
            return False
        selector, _, value = chosen.partition("=")
        return not at or (selector == self[base].selector and value in self[base].variants)

    def _canonical_method(self, name: str) -> str:
        try:
            return super().canonical(name)
        except BenchmarkError:
            if objective := OBJECTIVES.spelled(name):
                raise BenchmarkError(
                    f"{name!r} is an objective: write it after a method, as in BOnly+{objective} or FullFT+{objective}"
                ) from None
            raise


def compose(method: Method, objective: ObjectiveDeclaration) -> Method:
    """Returns the declaration of a method with an objective, which has the hyperparameters of both.

    Args:
        method: Declaration of the method.
        objective: Declaration of the objective.

    Raises:
        BenchmarkError: Both have a hyperparameter of one name.
    """
    for name in objective.hyperparameters:
        if (both := method.canonical_hyperparameter(name)) in method.hyperparameters:
            raise BenchmarkError(
                f"{method.name} and {objective.name} both have the hyperparameter {both}: rename that of the objective"
            )
    base, at, chosen = method.name.partition("@")
    return replace(
        method,
        name=f"{base}+{objective.name}{at}{chosen}",
        label=f"{method.label} + {objective.label}",
        explanation=f"{method.explanation}, with the objective: {objective.explanation}",
        colour=None,
        aliases=(),
        hyperparameters={
            **method.hyperparameters,
            OBJECTIVE: Hyperparameter(objective.name),
            **objective.hyperparameters,
        },
    )


METHODS = _Methods("algorithm", GROUP, ("domainbed_ext.algorithms.methods",), _make, _spellings, separators="+")


class _Classes(MutableMapping[str, "type[Algorithm]"]):
    """The classes of the methods by name, each imported when it is looked up."""

    def __getitem__(self, name: str) -> "type[Algorithm]":
        return METHODS[name].load()

    def __setitem__(self, name: str, implementation: "type[Algorithm]") -> None:
        METHODS[name] = implementation

    def __delitem__(self, name: str) -> None:
        del METHODS[name]

    def __contains__(self, name: object) -> bool:
        return name in METHODS

    def __iter__(self) -> Iterator[str]:
        return iter(METHODS)

    def __len__(self) -> int:
        return len(METHODS)


ALGORITHMS: MutableMapping[str, "type[Algorithm]"] = _Classes()


def declare(method: Method) -> None:
    """Adds a method.

    Args:
        method: Declaration.

    Raises:
        BenchmarkError: The name, the label or an alias is taken.
    """
    METHODS.register(method.name, method, method.path)


def register_algorithm(
    name: str,
    *,
    label: str | None = None,
    explanation: str | None = None,
    order: int = LAST,
    colour: str | None = None,
    trains: Factors | None = None,
    aliases: tuple[str, ...] = (),
    hyperparameters: Mapping[str, Any] | None = None,
    paper: str = "",
) -> Callable[[A], A]:
    """Registers a class as a method, for `--algorithm`, sweeps, tables and plots.

    Args:
        name: Name in commands and records.
        label: Name in plots, and in tables beside `name`; by default `name`.
        explanation: What it is, in one line; by default the first line of the class's docstring.
        order: Position in tables; by default after the methods of this package.
        colour: Colour in plots, as "#RRGGBB"; by default the next free one.
        trains: Factors of its adapters that train; by default those of the method it inherits from.
        aliases: Other names that commands accept.
        hyperparameters: Hyperparameters over the inherited ones: each a `Hyperparameter`, or a value, which is then
            the default and every draw. A subclass of a method inherits those of the method, others DomainBed's.
        paper: URL of the paper, on arXiv or OpenReview.

    Returns:
        Decorator of a subclass of `Algorithm`.
    """
    if not isinstance(name, str):
        raise BenchmarkError('register_algorithm takes a name: write @register_algorithm("Name")')

    def decorate(implementation: A) -> A:
        base = METHODS.base_of(implementation)
        inherited = base.hyperparameters if base else COMMON
        declare(
            Method(
                name,
                implementation,
                label or name,
                explanation or (implementation.__doc__ or "").strip().partition("\n")[0],
                order,
                colour,
                trains or (base.trains if base else None),
                aliases,
                merge(inherited, hyperparameters or {}),
                paper,
            )
        )
        return implementation

    return decorate
