"""The methods: what each says of itself, and where its class is. Loads no torch; a method's class does.

A method is declared once, by `register_algorithm` on its class. Those of this package are declared in `methods`, so
that tables, plots and `--help` know their labels without loading them.
"""

import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from domainbed_ext.algorithms.hyperparameters import COMMON, Hyperparameter, Hyperparameters
from domainbed_ext.errors import BenchmarkError, warn_once
from domainbed_ext.system.registry import Registry, path_of

if TYPE_CHECKING:
    from domainbed_ext.algorithms.base import Algorithm

A = TypeVar("A", bound=type)

GROUP = "domainbed_ext.algorithms"
LAST = 100

Factors = Literal["BA", "B", "A"]


@dataclass(frozen=True)
class Method:
    """All that a method says of itself.

    Attributes:
        name: Its name in commands and records.
        implementation: Its class, as "module:Class" or itself.
        label: Its name in plots, and in tables beside the other.
        explanation: What it is, in a line.
        order: Its place in tables; methods of one place are sorted by name.
        colour: Its colour in plots, as "#RRGGBB"; None for the next one that is free.
        trains: Factors of its adapters that train; None for a method without adapters.
        aliases: Other names that commands accept for it. Case, hyphens and spaces do not count.
        hyperparameters: Its hyperparameters by name.
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

    def __post_init__(self) -> None:
        if self.colour is not None and not re.fullmatch("#[0-9A-Fa-f]{6}", self.colour):
            raise BenchmarkError(f"colour {self.colour!r} of {self.name} is not of the form '#0072B2': write it so")

    @property
    def path(self) -> str:
        """Where its class is, as "module:Class"."""
        return self.implementation if isinstance(self.implementation, str) else path_of(self.implementation)

    def load(self) -> "type[Algorithm]":
        """Its class, imported if it is not yet."""
        if not isinstance(self.implementation, str):
            return self.implementation
        module, _, name = self.implementation.partition(":")
        found: type[Algorithm] = getattr(importlib.import_module(module), name)
        return found

    def hyperparameter(self, name: str) -> str:
        """The name of a hyperparameter that may be given by an alias; as it is if the method has none of that name."""
        if name in self.hyperparameters:
            return name
        return next((each for each, kind in self.hyperparameters.items() if name in kind.aliases), name)


def _spellings(method: Method) -> tuple[str, ...]:
    return method.label, *method.aliases


def _make(name: str, implementation: "type[Algorithm]") -> Method:
    """A class that says nothing of itself has DomainBed's hyperparameters; one of another's name has the other's."""
    known = METHODS.registered().get(name)
    return replace(known, implementation=implementation) if known else Method(name, implementation, name)


METHODS: Registry[Method] = Registry("algorithm", GROUP, ("domainbed_ext.algorithms.methods",), _make, _spellings)


class _Classes(MutableMapping[str, "type[Algorithm]"]):
    """The methods' classes by name, each loaded when it is looked up."""

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
        method: What it says of itself.

    Raises:
        BenchmarkError: Its name, its label or an alias is taken.
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
) -> Callable[[A], A]:
    """Makes a class a method, for `--algorithm`, sweeps, tables and plots.

    Args:
        name: Name in commands and records.
        label: Name in plots, and in tables beside the other; the name by default.
        explanation: What it is, in a line; by default the first of the class's docstring.
        order: Place in tables; by default behind the methods of this package.
        colour: Colour in plots, as "#RRGGBB"; by default the next one that is free.
        trains: Factors of its adapters that train; by default those of the method that it inherits from.
        aliases: Other names that commands accept for it.
        hyperparameters: Those over what it inherits: each a `Hyperparameter`, or a value, which is then the default
            and every random draw. It inherits those of the method that its class inherits from, else DomainBed's.

    Returns:
        Decorator of a subclass of `Algorithm`.
    """
    if not isinstance(name, str):
        raise BenchmarkError('register_algorithm takes a name: write @register_algorithm("Name")')

    def decorate(implementation: A) -> A:
        base = _base(implementation)
        inherited = base.hyperparameters if base else COMMON
        own = {each: _over(inherited.get(each), value) for each, value in (hyperparameters or {}).items()}
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
                {**inherited, **own},
            )
        )
        return implementation

    return decorate


def _over(inherited: Hyperparameter | None, value: Any) -> Hyperparameter:
    """A hyperparameter as it is declared, by a default alone or in full, with the aliases that it inherits."""
    declared = value if isinstance(value, Hyperparameter) else Hyperparameter(value)
    return replace(declared, aliases=declared.aliases or inherited.aliases) if inherited else declared


def _base(implementation: type) -> Method | None:
    """The method that a class inherits from."""
    by_path = {method.path: method for method in METHODS.registered().values()}
    return next((by_path[path] for path in map(path_of, implementation.__mro__[1:]) if path in by_path), None)


def describe(name: str) -> Method:
    """What a method says of itself, for tables and plots.

    Args:
        name: Name in a record, with or without fixed hyperparameters. Of a method that is not known here, such as
            upstream's, the name is all there is.
    """
    base = name.partition("@")[0]
    try:
        return METHODS[base]
    except KeyError:
        pass
    except BenchmarkError as error:  # of an entry point
        warn_once(str(error))
    return Method(base, "", base)


def parse_name(name: str) -> tuple[str, dict[str, Any]]:
    """Takes `BOnly@rank=16,targets="q,v"` apart.

    Args:
        name: Name of a method in any spelling, with fixed hyperparameters or none.

    Returns:
        The registered name, and the fixed hyperparameters by their own names.

    Raises:
        BenchmarkError: Unknown algorithm, a part that is not `hyperparameter=value`, or one that is there twice.
    """
    base, parts = _split(name)
    hparams: dict[str, Any] = {}
    for key, value in parts:
        if key in hparams:
            raise BenchmarkError(f"{name!r} gives {key} twice: give it once")
        try:
            hparams[key] = json.loads(value)
        except json.JSONDecodeError:
            hparams[key] = value.replace("+", ",")  # targets=q+v: a comma parts hyperparameters
    return base, hparams


def canonical_name(name: str) -> str:
    """The one spelling of a method's name that records and folders have: `BOnly@rank=16` of `LoRA-FA@r=16`.

    Args:
        name: Name of a method in any spelling, with fixed hyperparameters or none.

    Raises:
        BenchmarkError: See `parse_name`.
    """
    base, parts = _split(name)
    return "@".join([base, *([",".join(f"{key}={value}" for key, value in parts)] if parts else [])])


def _split(name: str) -> tuple[str, list[tuple[str, str]]]:
    """The registered name, and the fixed hyperparameters by their own names, with values as they are written."""
    base, _, fixed = name.partition("@")
    method = METHODS.find(base)
    parts = []
    for part in fixed.split(",") if fixed else ():
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise BenchmarkError(f"{name!r}: {part!r} is not hyperparameter=value, as in {base}@rank=16")
        parts.append((method.hyperparameter(key), value))
    return method.name, parts


def get_algorithm_class(name: str) -> "type[Algorithm]":
    """The class behind a name.

    Args:
        name: Name of a method in any spelling, with fixed hyperparameters or none.

    Raises:
        BenchmarkError: Unknown algorithm, naming the nearest.
    """
    return METHODS.find(name.partition("@")[0]).load()
