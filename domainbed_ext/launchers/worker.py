"""A warm worker: a process that runs one command after the other, as its launcher sends them."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from domainbed_ext.launchers import execute as worker
from domainbed_ext.launchers import memory
from domainbed_ext.system.processes import HELPERS

TELL = 0.5  # seconds at least from one word of a run's progress to the next


class Worker:
    """A worker, seen from its launcher.

    Args:
        environment: variables that are its own.

    Attributes:
        pipe: by which it tells of the share that is done, and of its exit code (None till then).
        index: of the command it is at.
        since: when it began with that, by `time.monotonic`.
        done: number of commands that it has run.
        verdict: why what it is at is ended before its time.
        kill_at: when it is killed, if it has not ended that by then.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.index: int | None = None
        self.since = 0.0
        self.done = 0
        self.verdict: str | None = None
        self.kill_at: float | None = None
        self._first_size = 0
        self.pipe, theirs = HELPERS.Pipe()  # Ctrl-C is the launcher's to handle, who hands it on as SIGTERM
        self.process: BaseProcess = HELPERS.Process(target=_work, args=(theirs,))
        with theirs, _environment(environment):
            self.process.start()

    @property
    def pid(self) -> int:
        """Its number."""
        return self.process.pid or 0

    @property
    def is_dead(self) -> bool:
        """Whether it has ended."""
        return self.process.exitcode is not None

    @property
    def told_to_stop(self) -> bool:
        """Whether what it is at is ended before its time."""
        return self.kill_at is not None

    def begin(self, index: int, command: str) -> bool:
        """Hands a command over; False if it is dead."""
        with contextlib.suppress(OSError):
            if self.is_dead:
                return False
            self.pipe.send(command)
            self.index, self.since = index, time.monotonic()
            return True
        return False

    def rest(self) -> None:
        """It is at nothing now."""
        self.index = self.verdict = self.kill_at = None
        self.done += 1
        self._first_size = self._first_size or memory.resident(self.pid)

    def growth(self) -> int:
        """Bytes by which it has grown since its first command."""
        return memory.resident(self.pid) - self._first_size if self.done > 1 else 0

    def stop(self, verdict: str | None = None, patience: float = 0.0) -> None:
        """Asks it to end what it is at.

        Args:
            verdict: why.
            patience: seconds until it is to be killed.
        """
        self.verdict, self.kill_at = verdict, time.monotonic() + patience
        self.process.terminate()

    def kill(self) -> None:
        """Ends it and all that it started, at once."""
        for process in memory.family(self.pid):
            with contextlib.suppress(memory.Gone):
                process.kill()

    def bury(self) -> int:
        """Sees it end, at once if it is at nothing; returns its exit code."""
        self.pipe.close()
        self.process.terminate()
        self.process.join(5)
        if not self.is_dead:
            self.kill()
            self.process.join()
        code = self.process.exitcode
        self.process.close()
        return 1 if code is None else code


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for the processes that are started inside: before they import anything, which may read them."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(pipe: Connection) -> None:
    """What the process does."""
    worker.die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # it died before that
        return
    told = 0.0

    def tell(share: float) -> None:
        nonlocal told
        if time.monotonic() - told < TELL:
            return
        told = time.monotonic()
        try:
            pipe.send((min(share, 0.999), None))  # it is whole when the exit code says so
        except OSError:  # the launcher is gone
            os.kill(os.getpid(), signal.SIGTERM)

    while True:
        try:
            command = pipe.recv()
            told = 0.0
            pipe.send((1.0, worker.run(command, tell)))
        except (EOFError, OSError):  # the launcher is gone, or wants no more of it
            return
