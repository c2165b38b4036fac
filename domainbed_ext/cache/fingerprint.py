"""Fingerprints of lists of image files: digests of their content, read again only where a file's stat changed.

The memo of a list holds each file's stat and the digest of its content then. The kernel sets a file's change time, so
a file that changed differs in it even where its size and its modification time were put back.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from domainbed_ext.system import file_stats
from domainbed_ext.system.file_stats import THREADS, UNKNOWN, in_chunks
from domainbed_ext.system.files import write_atomically

SETTLED = 2.0  # seconds after a change in which another may get the same time stamp, on the coarsest file systems

_MEMOS = ".memos"
_DIGEST = 16  # bytes


def digest(paths: Sequence[str], folder: Path) -> str:
    """Computes the digest of the files' contents in their order; their names and places do not count.

    Args:
        paths: Paths of the files. One that cannot be read counts as a content of its own.
        folder: Folder of the cache, see `digest_each`.

    Returns:
        32 hexadecimal digits.
    """
    return hashlib.blake2b(_look_up(paths, folder).data, digest_size=_DIGEST).hexdigest()


def digest_each(paths: Sequence[str], folder: Path) -> list[bytes]:
    """Computes the digest of each file's content; empty for a file that cannot be read.

    Args:
        paths: Paths of the files.
        folder: Folder of the cache, which keeps the memo. If it cannot be written to, every file is read each time.
    """
    return _as_bytes(_look_up(paths, folder))


def read_digests(paths: Sequence[str]) -> list[bytes]:
    """Computes what `digest_each` returns, from the files and without a memo.

    Args:
        paths: Paths of the files.
    """
    return _as_bytes(_read(paths))


def _as_bytes(digests: NDArray[np.uint8]) -> list[bytes]:
    return [digest.tobytes() if digest.any() else b"" for digest in digests]


def _read(paths: Sequence[str]) -> NDArray[np.uint8]:
    contents = in_chunks(_digests, paths, THREADS)
    return np.frombuffer(b"".join(contents), np.uint8).reshape(-1, _DIGEST)


def _look_up(paths: Sequence[str], folder: Path) -> NDArray[np.uint8]:
    """Looks digests [files, 16] up in the memo, and computes those of files that changed since."""
    names = "\0".join([*map(os.path.abspath, paths[:1]), *paths]).encode("utf-8", "surrogateescape")
    memo = folder / _MEMOS / f"{hashlib.blake2b(names, digest_size=_DIGEST).hexdigest()}.safetensors"
    now = time.time_ns()
    stats = file_stats.stats(paths)
    old_stats, digests = _read_memo(memo, len(paths))
    stale = np.flatnonzero((stats != old_stats).any(1) | (stats == UNKNOWN).all(1)).tolist()
    if stale:
        digests[stale] = _read([paths[i] for i in stale])
        # A file that changed a moment ago may change again and look the same, so it is read once more next time.
        unsettled = (stats[:, 2] > now - SETTLED * 1e9) | (digests == 0).all(1)
        stats[unsettled] = UNKNOWN
        if (stats != old_stats).any():
            _write_memo(memo, stats, digests)
    return digests


def remove_memos(folder: Path) -> None:
    """Removes all memos.

    Args:
        folder: Folder of the cache.
    """
    for memo in (folder / _MEMOS).glob("*.safetensors"):
        memo.unlink(missing_ok=True)


def _digests(paths: Sequence[str]) -> bytes:
    """The digest of each file's content, one after another; zeros for a file that cannot be read."""
    contents = []
    for path in paths:
        try:
            contents.append(hashlib.blake2b(Path(path).read_bytes(), digest_size=_DIGEST).digest())
        except OSError:
            contents.append(bytes(_DIGEST))
    return b"".join(contents)


def _read_memo(memo: Path, count: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Reads the stats [files, 4] and digests [files, 16] of a memo; unknown ones if it is missing or broken."""
    try:
        content = load_file(memo)
        stats, digests = content["stats"], content["digests"]
        if stats.shape == (count, 4) and digests.shape == (count, _DIGEST):
            return stats.copy(), digests.copy()
    except (OSError, SafetensorError, KeyError):
        pass
    return np.full((count, 4), UNKNOWN, np.int64), np.zeros((count, _DIGEST), np.uint8)


def _write_memo(memo: Path, stats: NDArray[np.int64], digests: NDArray[np.uint8]) -> None:
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memo, save({"stats": stats, "digests": digests}))
