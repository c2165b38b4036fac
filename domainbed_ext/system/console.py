"""Where tables are printed: a terminal at its own width, and anything else whole and without codes."""

import sys
from typing import TextIO

from rich.console import Console

UNLIMITED_WIDTH = 10_000  # wider than any table


def output() -> Console:
    """Standard output."""
    return Console() if sys.stdout.isatty() else plain(sys.stdout)


def plain(file: TextIO) -> Console:
    """Of a file or a pipe: neither wrapped, nor cut off, nor coloured, also where variables ask for colour.

    Args:
        file: Open for writing.
    """
    return Console(file=file, width=UNLIMITED_WIDTH, force_terminal=False)
