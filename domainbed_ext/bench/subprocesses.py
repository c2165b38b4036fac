"""Commands that are measured, each a process of its own."""

import subprocess
from argparse import Namespace
from collections.abc import Sequence

from domainbed_ext.errors import BenchmarkError

_OF_A_RUN = ("dataset", "data_dir", "algorithm", "backbone", "weights", "hparams", "steps", "cache_dir")


def arguments(args: Namespace, *words: str) -> list[str]:
    """The arguments of `domainbed_ext.train` that a measurement was given.

    Args:
        args: of `python -m domainbed_ext.bench`.
        words: further ones, which override those.
    """
    given = {name: value for name in _OF_A_RUN if (value := getattr(args, name, None)) is not None}
    return [*(word for name, value in given.items() for word in (f"--{name}", str(value))), *words]


def run(name: str, words: Sequence[str]) -> None:
    """Runs a command, silently.

    Args:
        name: of what is measured.
        words: of the command.

    Raises:
        BenchmarkError: it failed; tells its last word.
    """
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise BenchmarkError(f"the run {name!r} failed ({last}): {' '.join(words)}")
