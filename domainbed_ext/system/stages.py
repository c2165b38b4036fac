"""The stages of a run, for `train --profile`: who measures them is passed down as a `Stage`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Stage = Callable[[str], AbstractContextManager[None]]
"""Opened around a stage of a run, by its name; within another, that one's clock stands still."""


def unmeasured(name: str) -> AbstractContextManager[None]:
    """The stage of a run that nobody profiles."""
    return nullcontext()
