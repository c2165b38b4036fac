"""Size, hash and decodability of image files. Imports little, for every worker process loads it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from domainbed_ext.datasets.image_files import UnusableImage, read
from domainbed_ext.system.processes import several

_FEW = 2000  # images that one process examines before others have started


@dataclass(frozen=True)
class Examined:
    """What was found of a file.

    Attributes:
        size: Bytes.
        sha256: Hash of the content; empty if it cannot be read.
        problem: Why it cannot be read, or does not decode; empty if it does, or if that was not tried.
    """

    size: int
    sha256: str
    problem: str = ""


def examine(path: str, decode: bool) -> Examined:
    """Examines a file.

    Args:
        path: Path of the file.
        decode: Whether to decode the whole image, too.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return Examined(0, "", error.strerror or str(error))
    return Examined(len(content), hashlib.sha256(content).hexdigest(), _problem(path) if decode else "")


def _problem(path: str) -> str:
    try:
        read(path)
    except UnusableImage as reason:
        return str(reason)
    return ""


def examine_all(paths: Sequence[str], decode: bool, workers: int, advance: Callable[[], None]) -> list[Examined]:
    """Examines files, several at once.

    Args:
        paths: Paths of the files.
        decode: Whether to decode them, too.
        workers: Number of processes.
        advance: Callback for each file.

    Returns:
        The findings, in the order of `paths`.
    """
    results = []
    with several(workers if len(paths) >= _FEW else 1, at_once=64) as run:
        for result in run(partial(examine, decode=decode), paths):
            results.append(result)
            advance()
    return results
