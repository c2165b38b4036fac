"""Commands that are measured, each in its own process."""

import subprocess
from argparse import Namespace
from collections.abc import Sequence

from domainbed_ext.errors import BenchmarkError

_OF_A_RUN = ("dataset", "data_dir", "algorithm", "backbone", "weights", "hparams", "steps", "cache_dir")


def arguments(args: Namespace, *words: str) -> list[str]:
    """The arguments of `domainbed_ext.train` that a measurement was given.

    Args:
        args: Arguments of `python -m domainbed_ext.bench`.
        words: Further arguments, which override those.
    """
    given = {name: value for name in _OF_A_RUN if (value := getattr(args, name, None)) is not None}
    return [*(word for name, value in given.items() for word in (f"--{name}", str(value))), *words]


def run(name: str, words: Sequence[str]) -> None:
    """Runs a command without showing its output.

    Args:
        name: Name of the measurement, for the error.
        words: Command.

    Raises:
        BenchmarkError: If it failed; the message has the last line of its standard error.
    """
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BenchmarkError(f"the run {name!r} failed ({last}): {' '.join(words)}")
