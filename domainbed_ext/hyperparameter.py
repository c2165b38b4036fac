"""A hyperparameter of a method or an objective: its default and its random draw, which may differ between data sets."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.random import RandomState

Draw = Callable[[RandomState], Any]


@dataclass(frozen=True)
class Allowed:
    """The values that a hyperparameter may have.

    Attributes:
        words: What a value should be, for the error.
        holds: Function that says whether a value is one of them.
    """

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Hyperparameter:
    """A hyperparameter of a method: its default and its random draw.

    Attributes:
        default: Value for `hparams_seed` 0. Other values must have its type, unless it is None.
        draw: Function that draws a random value, for all other seeds; None for the default.
        aliases: Other names that `--hparams` and the `@` in a method's name accept for it.
        read: Function that brings a value into its canonical spelling.
        exceptions: Data sets with their own default and draw, added by `on`; the last one counts.
        later: Whether the method has runs from before the hyperparameter: its default does what they did, and is left
            out of the names of run folders, so that these stay.
        allowed: Values that it may have, of a hyperparameter of all methods, of adapters or of an objective; None for
            all.
        words: Words of labels for a value, as "{} base"; empty for the name, then the value.
        labels: Labels of single values, as "SWAD" of "swad", which have no other words.
    """

    default: Any
    draw: Draw | None = None
    aliases: tuple[str, ...] = ()
    read: Callable[[Any], Any] = field(default=lambda value: value)
    exceptions: tuple[tuple[frozenset[str], Any, Draw | None], ...] = ()
    later: bool = False
    allowed: Allowed | None = None
    words: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def on(self, datasets: Collection[str], default: Any, draw: Draw | None = None) -> "Hyperparameter":
        """Returns the hyperparameter with another default and draw on some data sets.

        Args:
            datasets: Names of the data sets.
            default: Default on these.
            draw: Draw on these; None for the default.
        """
        return replace(self, exceptions=(*self.exceptions, (frozenset(datasets), default, draw)))

    def for_dataset(self, dataset: str) -> tuple[Any, Draw]:
        """Returns default and draw on a data set.

        Args:
            dataset: Name.
        """
        default, draw = self.default, self.draw
        for datasets, its_default, its_draw in self.exceptions:
            if dataset in datasets:
                default, draw = its_default, its_draw
        return default, draw or (lambda generator: default)


Hyperparameters = Mapping[str, Hyperparameter]
"""Hyperparameters of a method, by name."""


ABOVE_0 = Allowed("above 0", lambda value: value > 0)
NOT_BELOW_0 = Allowed("0 or more", lambda value: value >= 0)
A_SHARE = Allowed("from 0 to 1", lambda value: 0 <= value <= 1)
NOT_BELOW_0_AND_BELOW_1 = Allowed("0 or more, and below 1", lambda value: 0 <= value < 1)
A_COUNT = Allowed("a whole number from 1 on", lambda value: type(value) is int and value >= 1)


def one_of(*options: str) -> Allowed:
    """Returns the values that are one of several words.

    Args:
        options: Words.
    """
    *others, last = options
    return Allowed(f"{', '.join(others)} or {last}", lambda value: value in options)


def choice(*options: Any) -> Draw:
    """Returns a draw of one of several values."""
    return lambda generator: generator.choice(options)


def uniform(low: float, high: float) -> Draw:
    """Returns a draw from `low` to `high`."""
    return lambda generator: generator.uniform(low, high)


def log_uniform(low: float, high: float) -> Draw:
    """Returns a draw from 10^low to 10^high, uniform in the exponent."""
    return lambda generator: 10 ** generator.uniform(low, high)


def power_of_two(low: float, high: float) -> Draw:
    """Returns a draw of a whole number from 2^low to 2^high, uniform in the exponent."""
    return lambda generator: int(2 ** generator.uniform(low, high))


def merge(inherited: Hyperparameters, own: Mapping[str, Any]) -> Hyperparameters:
    """Returns hyperparameters with others over them.

    Args:
        inherited: Hyperparameters of the base class.
        own: Each a `Hyperparameter`, or a value, which is then the default and every draw. One without aliases has
            those of the inherited one.
    """
    return {**inherited, **{name: _over(inherited.get(name), value) for name, value in own.items()}}


def _over(inherited: Hyperparameter | None, value: Any) -> Hyperparameter:
    declared = value if isinstance(value, Hyperparameter) else Hyperparameter(value)
    return replace(declared, aliases=declared.aliases or inherited.aliases) if inherited else declared
