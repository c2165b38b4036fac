"""What a user did wrong, said in one sentence: what, where, and what to do."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from functools import cache, wraps
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

from domainbed_ext.system.streams import Unwritten, unfailing

STOPPED = 130  # exit code of what Ctrl-C ended, as shells have it
RESUME = "run the same command again to resume"
START_AGAIN = "run the same command again"  # of what keeps nothing of what it has done


class ExitCode(IntEnum):
    """What the exit code of a run says; any other is a crash's."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    TAKEN = 69  # sysexits' EX_UNAVAILABLE: another process is at it
    INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: it stopped where it can go on, so come again


class BenchmarkError(Exception):
    """A mistake in the input. Its message is one sentence for the user; the command line prints no traceback."""


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are sentences like all others, without the usage before them.

    A word that begins with a dash and a digit, such as -1e-3 or DomainBed's environment -90%, is a value.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d|-(inf|nan)$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        """Raises a `BenchmarkError`."""
        raise BenchmarkError(f"{message}; see {self.prog} --help")


def unknown(kind: str, name: str, known: Iterable[str]) -> BenchmarkError:
    """The error for a name that is not in a registry, with the nearest right one.

    Args:
        kind: what the name should be, e.g. "algorithm".
        name: the name given.
        known: the right names.

    Returns:
        The error, to be raised by the caller.
    """
    names = sorted(known)
    by_lower = {candidate.lower(): candidate for candidate in names}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.4)
    hint = f"did you mean {by_lower[near[0]]!r}?" if near else f"choose one of {', '.join(names[:20])}."
    return BenchmarkError(f"unknown {kind} {name!r}: {hint}")


def not_writable(path: Path, error: OSError) -> BenchmarkError:
    """The error for a place that cannot be written."""
    return BenchmarkError(f"cannot write to {path} ({error.strerror or error}): give another --output_dir")


@cache
def warn_once(sentence: str) -> None:
    """Prints a warning to stderr, unless this process has done so before.

    Args:
        sentence: What is wrong, and what happens instead.
    """
    print(f"warning: {sentence}", file=sys.stderr)


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
        main: the command; its return value is the exit code (None is 0).
        interrupted: what to do after Ctrl-C, for which the exit code is 130.
    """
    code = 0
    try:
        with unfailing():
            try:
                code = main() or 0
            except BenchmarkError as error:
                print(f"error: {error}", file=sys.stderr)
                code = 2
            except KeyboardInterrupt:
                print(f"interrupted: {interrupted}", file=sys.stderr)
                code = STOPPED
    except Unwritten as error:
        print(f"error: {error}", file=sys.stderr)
        code = code or 1
    sys.exit(code)
