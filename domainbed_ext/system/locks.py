"""One process at a time, on a machine whose file system has locks; elsewhere whoever relies on this must do without."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

_PAUSE = 0.1  # seconds between two looks at a lock that somebody has


@contextlib.contextmanager
def alone(path: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Waits until nobody else is in a context of the same path, then holds it. A process that dies gives it up.

    Args:
        path: of a file that is there only meanwhile.
        waiting: called ten times a second while somebody else is; may raise, which ends the wait.

    Raises:
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while (file := _locked(path)) is None:
        waiting()
        time.sleep(_PAUSE)
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _locked(path: Path) -> IO[str] | None:
    """The file, locked; None if somebody else has it, or had it just now and unlinked it."""
    file = path.open("w", encoding="utf-8")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except (ImportError, OSError):  # Windows, or a file system without locks
        return file
    file.close()
    return None
