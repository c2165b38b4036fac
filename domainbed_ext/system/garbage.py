"""Garbage collection, left out where it takes seconds and finds nothing."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Pauses collection while modules are loaded, and leaves out what they hold from then on.

    Python looks for garbage again and again as objects are made. Those of torch and timm, half a million, are none,
    and to look through them takes a third of the time of loading them.
    """
    if not gc.isenabled():
        yield
        return
    before = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:  # else what is new may be garbage
            gc.freeze()
        gc.enable()


def leave_to_exit() -> None:
    """Leaves out all that there is when the process ends, which frees it anyway."""
    gc.freeze()
