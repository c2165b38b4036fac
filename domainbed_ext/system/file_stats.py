"""Stats of many files: one system call per file, in parallel on network file systems."""

import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from domainbed_ext.system.threads import map_in_threads

T = TypeVar("T")

UNKNOWN = -1  # in place of a stat
THREADS = 16
_CHUNK = 256  # files
_SLOW = 1e-4  # seconds: a stat that takes longer is one of a network file system, where parallel calls are faster


def stats(paths: Sequence[str]) -> NDArray[np.int64]:
    """Size, modification time, change time and inode of each file.

    Args:
        paths: Paths of the files.

    Returns:
        int64 [files, 4], times in ns; a row of `UNKNOWN` for a missing file.
    """
    start = time.perf_counter()
    first = _stats(paths[:_CHUNK])
    slow = time.perf_counter() - start > _SLOW * len(first)
    return np.concatenate([first, *in_chunks(_stats, paths[_CHUNK:], THREADS if slow else 1)])


def in_chunks(function: Callable[[Sequence[str]], T], paths: Sequence[str], threads: int) -> list[T]:
    """Calls a function on chunks of a list.

    Args:
        function: Function of a list of paths.
        paths: All paths.
        threads: Number of threads that call it.

    Returns:
        Its results for the chunks, in order.
    """
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    return map_in_threads(function, chunks, threads)


def _stats(paths: Sequence[str]) -> NDArray[np.int64]:
    rows: list[int] = []
    for path in paths:
        try:
            found = os.stat(path)
        except OSError:
            rows += [UNKNOWN] * 4
        else:  # some file systems number their files with 64 bits and no sign
            rows += found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino & (2**63 - 1)
    return np.array(rows, np.int64).reshape(-1, 4)
