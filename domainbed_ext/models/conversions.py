"""Reports on stderr of how a backbone's weights were converted when they were loaded."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_reported: ContextVar[bool] = ContextVar("reported", default=False)


def report(source: str | Path, changes: str) -> None:
    """Prints what was done to weights, unless it is `already_reported`.

    Args:
        source: File or backbone that the weights are from.
        changes: What was done to them; nothing is printed if it is empty.
    """
    if changes and not _reported.get():
        print(f"{source}: {changes}", file=sys.stderr)


@contextmanager
def already_reported() -> Iterator[None]:
    """Loads weights without a report, since the run has loaded the same ones before."""
    token = _reported.set(True)
    try:
        yield
    finally:
        _reported.reset(token)
