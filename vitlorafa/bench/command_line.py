"""The parser of the benchmark's commands."""

import argparse
from typing import NoReturn

from vitlorafa import AdapterError


class CommandLine(argparse.ArgumentParser):
    """A parser that raises its errors as `AdapterError`."""

    def error(self, message: str) -> NoReturn:
        """Raises an `AdapterError`."""
        raise AdapterError(f"{message}; see {self.prog} --help")


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
