"""The command `python -m vitlorafa.bench`."""

import io
import os
import sys
from collections.abc import Callable, Sequence

from vitlorafa.bench import grid, growth, methods_table, tune
from vitlorafa.bench.grid import make_parser

__all__ = ["main", "make_parser", "run_command"]

# Name of a part of the command -> function that runs it; without a name it is the grid of `step` and `memory`.
PARTS: dict[str, Callable[[Sequence[str], str], int]] = {
    "methods": methods_table.main,
    "growth": growth.main,
    "tune": tune.main,
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m vitlorafa.bench") -> int:
    """Runs the command.

    Args:
        argv: Arguments; if None, those of the process.
        prog: Name of the command in messages.

    Returns:
        The exit code: 0, 1 if a measurement failed, 2 if an argument is invalid, 130 if interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in PARTS:
        return PARTS[argv[0]](argv[1:], f"{prog} {argv[0]}")
    return grid.main(argv, prog)


def run_command(argv: Sequence[str] | None = None, prog: str = "python -m vitlorafa.bench") -> int:
    """`main` for a console: no traceback for a closed pipe or for a character that the console lacks.

    Args:
        argv: Arguments; if None, those of the process.
        prog: Name of the command in messages.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a question mark, rather than a lost measurement
    try:
        code = main(argv, prog)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe (`| head`); results are in files
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    return code


if __name__ == "__main__":
    sys.exit(run_command())
