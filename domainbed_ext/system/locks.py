"""One process at a time, where the file system has locks; elsewhere whoever relies on this must do without."""

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_PAUSE = 0.1  # seconds between two attempts at a lock that another process holds
_WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def alone(path: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Waits until no other process is in a context of the same path, then holds it.

    filelock locks with flock, or on Windows with msvcrt. The kernel releases the lock of a process that exits, however
    it exits; network file systems with flock (NFS, Lustre, GPFS) hold it across machines. Where there are no such
    locks, filelock would fall back to a file that exists or not, and one left by a process that was killed on another
    machine would block all others for ever. So the fallback is off, and the context is entered without a lock.

    Args:
        path: Path of a file that exists only while a process is in the context.
        waiting: Callback ten times a second while another process is; may raise, which ends the wait.

    Raises:
        OSError: The file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, fallback_to_soft=False)
    while not _acquire(lock):
        waiting()
        time.sleep(_PAUSE)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file; filelock does so itself there
            path.unlink()  # before the lock is released: filelock takes no lock on a file that is gone
        lock.release()


def _acquire(lock: FileLock) -> bool:
    """Whether the lock is held now, or there is none to be had on this file system."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    return True
