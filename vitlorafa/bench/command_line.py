"""What the commands of the benchmark share: their parser, checks of options, and exit codes."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import torch

from vitlorafa import AdapterError
from vitlorafa.errors import unknown

T = TypeVar("T")


class CommandLine(argparse.ArgumentParser):
    """A parser that raises its errors as `AdapterError`."""

    def error(self, message: str) -> NoReturn:
        """Raises an `AdapterError`."""
        raise AdapterError(f"{message}; see {self.prog} --help")


def expand_path(text: str) -> str:
    """A path with the user's folder and variables in it replaced, as a shell does."""
    return os.path.expanduser(os.path.expandvars(text))


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuses values below 1; options that were not given are not checked.

    Args:
        args: Arguments.
        names: Names of options with a number or a list of numbers.

    Raises:
        AdapterError: If a value is below 1.
    """
    for name in names:
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [1 if values is None else values]:
            if value < 1:
                raise AdapterError(f"--{name} must be at least 1, not {value}")


def find_device(name: str | None) -> str:
    """The device that a user named, or a GPU if there is one.

    Raises:
        AdapterError: If it does not exist or cannot be measured.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("device", name, ("cpu", "cuda")) from None
    if device.type not in ("cpu", "cuda"):
        raise AdapterError(f"--device {name} cannot be measured: choose cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise AdapterError(f"--device {name} does not exist on this machine: choose cpu")
    return name


def run_part(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    prepare: Callable[[argparse.Namespace], T],
    measure: Callable[[argparse.Namespace, Sequence[str], T], None],
) -> int:
    """Checks options, then measures; an error is one sentence on stderr, and torch's number of threads is restored.

    Args:
        parser: Parser with the options `--threads` and `--output_dir`.
        argv: Arguments.
        prepare: Function that checks the options and returns what to measure.
        measure: Function of the options, the arguments and what `prepare` returned.

    Returns:
        The exit code: 0, 1 if a measurement failed, 2 if an argument is invalid, 130 if interrupted.
    """
    threads = torch.get_num_threads()
    try:
        args = parser.parse_args(argv)
        work = prepare(args)
    except (AdapterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        measure(args, argv, work)
    except BrokenPipeError:
        raise
    except (AdapterError, RuntimeError, OSError) as error:  # out of memory is a RuntimeError
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: finished measurements are in {args.output_dir}", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
    return 0
