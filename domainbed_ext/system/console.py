"""The console: tables fit a terminal's width, files and pipes get them whole and without codes; and questions."""

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


def confirm(question: str) -> bool:
    """Asks a question, if there is a terminal to ask on.

    Args:
        question: Question to answer with yes or no.

    Returns:
        Whether the answer is yes; True without a terminal.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        return True
    print(f"{question} (y/n) ", end="", file=sys.stderr, flush=True)  # standard output may be a file
    try:
        return input().strip().lower().startswith("y")
    except EOFError:  # Ctrl-D
        print(file=sys.stderr)
        return False
