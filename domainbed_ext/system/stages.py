"""Timing of the stages of a run, for `train --profile`: functions receive the timer as a `Stage`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Stage = Callable[[str], AbstractContextManager[None]]
"""Context around a stage of a run, by its name; the clock of an outer stage stops meanwhile."""


def unmeasured(name: str) -> AbstractContextManager[None]:
    """The `Stage` of a run that is not profiled."""
    return nullcontext()
