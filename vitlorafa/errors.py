"""The one exception and the one warning of the package."""

import sys
import warnings
from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class AdapterError(ValueError):
    """Something about an adapter cannot be done; one sentence says what, where and what to do instead."""


class AdapterWarning(UserWarning):
    """Something about an adapter is likely not as meant; one sentence says what, and what happens instead."""


def warn(sentence: str) -> None:
    """Warns, with the place in the user's code that called this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "vitlorafa":
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, AdapterWarning, stacklevel=level)


def unknown(what: str, name: object, choices: Iterable[str]) -> AdapterError:
    """An error for a name that is not among the `choices`, suggesting the nearest one.

    Args:
        what: What the name stands for, as in "initialisation".
        name: The name that was given.
        choices: The names that exist.

    Returns:
        The error, for the caller to raise.
    """
    choices = list(choices)
    near = get_close_matches(str(name), choices, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "choose from " + ", ".join(choices)
    return AdapterError(f"unknown {what} {name!r}: {hint}")


def some(names: Sequence[str]) -> str:
    """The first few of some names, for a sentence."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
