"""The command line: a parser whose errors are one sentence, and the exit of a command."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from types import TracebackType
from typing import Any, NoReturn, Protocol

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.system import garbage
from domainbed_ext.system.commands import rename_program
from domainbed_ext.system.exit_codes import STOPPED, ExitCode
from domainbed_ext.system.streams import Unwritten, unfailing

RESUME = "run the same command again to resume"
START_AGAIN = "run the same command again"  # of a command that saves nothing until it is done


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are sentences like all others, without the usage before them.

    Its program has the name by which the process was started. A word that begins with a dash and a digit, such as -1e-3
    or DomainBed's environment -90%, is a value.
    """

    def __init__(self, prog: str | None = None, **kwargs: Any) -> None:
        super().__init__(None if prog is None else rename_program(prog), **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d|-(inf|nan)$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        """Raises a `BenchmarkError`."""
        raise BenchmarkError(f"{message}; see {self.prog} --help")


class Command(Protocol):
    """A command's `main`."""

    def __call__(self, argv: Sequence[str] | None = None, /) -> int:
        """Runs it with these arguments; None for those of the process, which then ends."""


def as_command(interrupted: str = RESUME) -> Callable[[Callable[[Sequence[str] | None], int | None]], Command]:
    """Makes a function the `main` of a command, so that a script that ends in `main()` has the right exit code.

    Args:
        interrupted: What to do after Ctrl-C.

    Returns:
        Decorator of a function of the arguments, None for the process's, which returns the exit code (None is 0). With
        arguments it stays that function; without, it ends the process as `exit_cleanly` does.
    """

    def decorate(main: Callable[[Sequence[str] | None], int | None]) -> Command:
        @wraps(main)
        def run(argv: Sequence[str] | None = None, /) -> int:
            if argv is None:
                exit_cleanly(lambda: main(None), interrupted)
            return main(argv) or 0

        return run

    return decorate


def interrupt_quietly() -> None:
    """Has Ctrl-C that nobody handles end this process with a sentence instead of a traceback."""
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(f"interrupted: {START_AGAIN}", file=sys.stderr)
        else:
            usual(kind, error, trace)

    sys.excepthook = hook


def exit_cleanly(main: Callable[[], int | None], interrupted: str = RESUME) -> NoReturn:
    """Runs a command's `main` and exits: a `BenchmarkError` becomes one line on stderr and exit code 2.

    Args:
        main: The command; its return value is the exit code (None is 0).
        interrupted: What to do after Ctrl-C, for which the exit code is 130.
    """
    code = 0
    try:
        with unfailing():
            try:
                code = main() or 0
            except BenchmarkError as error:
                print(f"error: {error}", file=sys.stderr)
                code = ExitCode.BAD_INPUT
            except KeyboardInterrupt:
                print(f"interrupted: {interrupted}", file=sys.stderr)
                code = STOPPED
    except Unwritten as error:
        print(f"error: {error}", file=sys.stderr)
        code = code or ExitCode.FAILED
    garbage.leave_to_exit()
    sys.exit(code)
