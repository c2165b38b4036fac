"""Warnings of the hub's client: without a network it warns at each of a dozen attempts."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _FirstWarning(logging.Filter):
    """Lets the first warning through, and every error."""

    def __init__(self) -> None:
        super().__init__()
        self._seen = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        is_first, self._seen = not self._seen, True
        return is_first


@contextmanager
def one_warning() -> Iterator[None]:
    """Prints no more than the first warning of the hub's client."""
    handlers, first = list(logging.getLogger("huggingface_hub").handlers), _FirstWarning()
    for handler in handlers:
        handler.addFilter(first)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(first)
