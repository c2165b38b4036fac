"""One process at a time, on a machine whose file system has locks; elsewhere whoever relies on this must do without."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Waits until nobody else is in a context of the same path, then holds it. A process that dies gives it up.

    Args:
        path: of a file that is there only meanwhile.

    Raises:
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    while not _lock(file, path):
        file.close()
        file = path.open("w")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


def _lock(file: IO[str], path: Path) -> bool:
    """Waits for the lock; False if the file was unlinked meanwhile, by the one who had it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError):  # Windows, or a file system without locks
        return True
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
