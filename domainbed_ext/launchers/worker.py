"""A warm worker: a process that runs one command after the other, as its launcher sends them."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from domainbed_ext.launchers import execute, memory
from domainbed_ext.launchers.command import Command
from domainbed_ext.system.processes import HELPERS

INTERVAL = 0.5  # seconds at least from one report of a run's progress to the next


class Worker:
    """A worker, seen from its launcher.

    Args:
        environment: Environment variables of its own.

    Attributes:
        pipe: Pipe by which it reports the share that is done, and the exit code (None until then).
        index: Index of the command that it executes; None if it is idle.
        since: When it began with that, by `time.monotonic`.
        done: Number of commands that it has run.
        verdict: Reason why its command is stopped early; None if there is none.
        kill_at: When it is killed if the command has not ended by then; None for never.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.index: int | None = None
        self.since = 0.0
        self.done = 0
        self.verdict: str | None = None
        self.kill_at: float | None = None
        self._first_size = 0
        self.pipe, remote = HELPERS.Pipe()  # the launcher handles Ctrl-C, and passes it on as SIGTERM
        self.process: BaseProcess = HELPERS.Process(target=_work, args=(remote,))
        with remote, _environment(environment):
            self.process.start()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self.process.pid or 0

    @property
    def has_exited(self) -> bool:
        """Whether the process has ended."""
        return self.process.exitcode is not None

    @property
    def is_stopping(self) -> bool:
        """Whether its command is being stopped early."""
        return self.kill_at is not None

    def begin(self, index: int, command: Command) -> bool:
        """Sends a command.

        Args:
            index: Index of the command.
            command: The command.

        Returns:
            Whether the worker took it; False if it has exited.
        """
        with contextlib.suppress(OSError):
            if self.has_exited:
                return False
            self.pipe.send(command)
            self.index, self.since = index, time.monotonic()
            return True
        return False

    def become_idle(self) -> None:
        """Marks its command as ended."""
        self.index = self.verdict = self.kill_at = None
        self.done += 1
        self._first_size = self._first_size or memory.measure(self.pid)

    def measure_growth(self) -> int:
        """Measures the bytes by which it has grown since its first command."""
        return memory.measure(self.pid) - self._first_size if self.done > 1 else 0

    def stop(self, verdict: str | None = None, patience: float = 0.0) -> None:
        """Asks it to stop its command.

        Args:
            verdict: Reason; None if the run is not to blame.
            patience: Seconds until it is killed.
        """
        self.verdict, self.kill_at = verdict, time.monotonic() + patience
        self.process.terminate()

    def kill(self) -> None:
        """Kills it and all that it started."""
        for process in memory.list_family(self.pid):
            with contextlib.suppress(memory.ProcessGone):
                process.kill()

    def wait_for_exit(self) -> int:
        """Ends it, at once if it is idle.

        Returns:
            Its exit code.
        """
        self.pipe.close()
        self.process.terminate()
        self.process.join(5)
        if not self.has_exited:
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
    """Main function of the process."""
    execute.die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # it died before that
        return
    last_report = 0.0

    def report(share: float) -> None:
        nonlocal last_report
        if time.monotonic() - last_report < INTERVAL:
            return
        last_report = time.monotonic()
        try:
            pipe.send((min(share, 0.999), None))  # 1.0 comes with the exit code
        except OSError:  # the launcher has exited
            os.kill(os.getpid(), signal.SIGTERM)

    while True:
        try:
            command = pipe.recv()
            last_report = 0.0
            pipe.send((1.0, execute.run(command, report)))
        except (EOFError, OSError):  # the launcher has exited, or ends this worker
            return
