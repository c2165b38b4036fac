"""Types of options for argparse. Their errors say what is wrong, and which values are valid."""

import math
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from domainbed_ext.errors import BenchmarkError

T = TypeVar("T")

LARGEST_SEED = 2**32 - 1  # NumPy's


@dataclass(frozen=True, eq=False)  # argparse hashes types
class Checked(Generic[T]):
    """A type that says what its values are.

    Attributes:
        read: Function of the text that returns the value, or raises an `ArgumentTypeError`.
        schema: JSON Schema of the values in a file.
    """

    read: Callable[[str], T]
    schema: Mapping[str, Any]

    def __call__(self, text: str) -> T:
        """Reads a value."""
        return self.read(text)


def whole(least: int, most: int | None = None) -> Checked[int]:
    """The type of an option that is a whole number.

    Args:
        least: Smallest value.
        most: Largest value; None for no limit.

    Returns:
        The type. It reads "1e3" too.
    """

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = _integral(text)
        if value < least:
            raise ArgumentTypeError(f"{text} is too small, give {least} or more")
        if most is not None and value > most:
            raise ArgumentTypeError(f"{text} is too large, give {most} or less")
        return value

    return Checked(read, {"type": "integer", "minimum": least, **({} if most is None else {"maximum": most})})


seed = whole(0, LARGEST_SEED)


def number(least: float = -math.inf, above: float = -math.inf) -> Checked[float]:
    """The type of an option that is a finite number.

    Args:
        least: Smallest value.
        above: Bound that the value must exceed.

    Returns:
        The type.
    """

    def read(text: str) -> float:
        value = _finite(text)
        if value < least:
            raise ArgumentTypeError(f"{text} is too small, give {least:g} or more")
        if not value > above:
            raise ArgumentTypeError(f"{text} is too small, give a number above {above:g}")
        return value

    bounds = {"minimum": least, "exclusiveMinimum": above}
    return Checked(read, {"type": "number", **{name: each for name, each in bounds.items() if math.isfinite(each)}})


def share(with_0: bool = False, with_1: bool = False) -> Checked[float]:
    """The type of an option that is a share, from 0 to 1.

    Args:
        with_0: Whether 0 is valid.
        with_1: Whether 1 is valid.

    Returns:
        The type.
    """

    def read(text: str) -> float:
        value = _finite(text)
        if not (0 < value < 1 or (with_0 and value == 0) or (with_1 and value == 1)):
            low, high = "from 0" if with_0 else "above 0", "up to 1" if with_1 else "below 1"
            bounds = "from 0 to 1" if with_0 and with_1 else f"{low} and {high}"
            raise ArgumentTypeError(f"{text} is out of range, give a share {bounds}")
        return value

    low_name, high_name = "minimum" if with_0 else "exclusiveMinimum", "maximum" if with_1 else "exclusiveMaximum"
    return Checked(read, {"type": "number", low_name: 0, high_name: 1})


def name_or_index(text: str) -> str | int:
    """The type of an option that takes something by its name or its index: a number is an index.

    Args:
        text: Name, or a whole number from 0 on.
    """
    try:
        _finite(text)
    except ArgumentTypeError:
        return text
    return whole(0)(text)


def _device(text: str) -> str:
    if not re.fullmatch(_DEVICE, text):
        raise ArgumentTypeError(f"{text!r} is no device, give auto, cpu, cuda or cuda:N")
    return text


_DEVICE = r"auto|cpu|cuda(:[0-9]+)?"

device = Checked(_device, {"type": "string", "pattern": f"^({_DEVICE})$"})
"""The type of an option that names a device: auto, cpu, cuda or cuda:N."""


def path(text: str) -> str:
    """The type of an option that names a file or a folder: `~` and variables such as `$HOME` are expanded.

    Args:
        text: Path, or a word like "none", which has nothing to expand.

    Returns:
        The path.
    """
    if not text.startswith("~") and os.path.exists(text):  # also where its name has a $
        return text
    expanded = os.path.expandvars(text)
    if unset := re.search(r"\$(\w+|\{[^}]*\})", expanded):
        raise ArgumentTypeError(f"{text}: the variable {unset[0]} is not set")
    if not expanded:
        raise ArgumentTypeError(f"{text!r} is empty, give a path")
    if expanded.startswith("~"):
        user = expanded.split(os.sep)[0]
        expanded = os.path.expanduser(expanded)
        if expanded.startswith("~"):
            raise ArgumentTypeError(f"{text}: no home folder of {user} is known; write the path without {user}")
    return expanded


def tensors_path(text: str) -> str:
    """The type of an option that names a safetensors file or a folder of such: a `path` that the library can open.

    Args:
        text: Path, or a word like "none".

    Returns:
        The path.
    """
    found = path(text)
    try:
        found.encode("utf-8")
    except UnicodeEncodeError:
        raise ArgumentTypeError(
            f"{found} has a name that is not UTF-8, which safetensors cannot open: rename it"
        ) from None
    return found


def expand(what: str, text: str, kind: Callable[[str], str] = tensors_path) -> str:
    """Checks and expands a path that is not the value of an option, as an option's type would.

    Args:
        what: Option or place that it comes from, for the error.
        text: Path.
        kind: Type, `path` or `tensors_path`.

    Raises:
        BenchmarkError: If it is not a valid path.
    """
    try:
        return kind(text)
    except ArgumentTypeError as error:
        raise BenchmarkError(f"{what} {error}") from None


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise ArgumentTypeError(f"{text} is not a finite number")
    return value


def _integral(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value.is_integer():
        raise ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)
