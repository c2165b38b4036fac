"""Runs commands that are measured, each a process of its own."""

import subprocess
from collections.abc import Sequence

from domainbed_ext.errors import BenchmarkError


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
