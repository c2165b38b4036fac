"""The registry of methods: the declaration of each, and where its class is. Only a method's class loads torch.

A method is declared once, by `register_algorithm` on its class. Those of this package are declared in `methods`, so
that tables, plots and `--help` know their labels without loading them.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from domainbed_ext.algorithms.derived_names import join_derived, split_derived
from domainbed_ext.algorithms.hyperparameters import COMMON
from domainbed_ext.errors import BenchmarkError, unknown, warn_once
from domainbed_ext.hyperparameter import Hyperparameter, Hyperparameters, merge
from domainbed_ext.objectives.registry import DEFAULT, OBJECTIVES
from domainbed_ext.objectives.registry import Declaration as ObjectiveDeclaration
from domainbed_ext.system import strict_json
from domainbed_ext.system.registry import Declared, Registry

if TYPE_CHECKING:
    from domainbed_ext.algorithms.base import Algorithm
    from domainbed_ext.objectives.base import Objective

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
        read = _read_value(value)
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
        hparams[key] = _read_value(value)
    return base, hparams


def _read_value(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value.replace("+", ",")  # targets=q+v: a comma separates hyperparameters


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
