"""Which command of a launch is next, and what became of those that ended.

Several launches may work on the same sweep. A run that another process works on goes to the end of the queue. It is
looked at again every few seconds until that process has ended it, or has left it for this launch to resume.
"""

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from signal import SIGTERM

from domainbed_ext.launchers.command import Command
from domainbed_ext.runs.folder import State
from domainbed_ext.system.exit_codes import ExitCode

INTERVAL = 5.0  # seconds from one look at a run that another process works on to the next
RESTARTS = 5  # of a run that is stopped from outside though the launch was not cancelled


class Queue:
    """The commands of a launch.

    Args:
        commands: Commands of the launch.
        progress: Callback that takes a command's index and the share of it that is done.

    Attributes:
        codes: Exit code of each command that has ended, by index.
    """

    def __init__(self, commands: Sequence[Command], progress: Callable[[int, float], None]) -> None:
        self.commands = commands
        self.codes: dict[int, int] = {}
        self.progress = progress
        self._waiting = deque(range(len(commands)))
        self._later: deque[tuple[float, int]] = deque()  # when, and which
        self._taken: set[int] = set()
        self._unseen: set[int] = set()
        self._restarts: Counter[int] = Counter()

    @property
    def is_over(self) -> bool:
        """Whether every command has ended."""
        return len(self.codes) == len(self.commands)

    @property
    def results(self) -> list[int]:
        """The exit codes in the order of the commands, once it is over."""
        return [self.codes[index] for index in range(len(self.commands))]

    def take(self) -> int | None:
        """Takes the next command.

        Returns:
            Its index; None if there is none to start, now or ever again.
        """
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            self._waiting.append(self._later.popleft()[1])
        while self._waiting:
            index = self._waiting.popleft()
            if self._can_start(index):
                return index
        return None

    def _can_start(self, index: int) -> bool:
        """Whether a command is to be started, by the state of its folder now."""
        folder = self.commands[index].folder
        if folder is None:
            return True
        state, attempt = folder.look()
        if state is State.DONE:
            self._settle(index, ExitCode.DONE)
        elif state is State.RUNNING:
            self._postpone(index)
            self._taken.add(index)
            self.progress(index, attempt.share if attempt else 0.0)
        elif state is State.FAILED and index in self._taken:
            self._settle(index, ExitCode.FAILED)
        elif index in self._unseen:
            folder.fail("it finished, but not in this folder: give an --output_dir that all machines share")
            self._settle(index, ExitCode.FAILED)
        else:
            return True
        return False

    def end(self, index: int, code: int) -> None:
        """Records how a command ended; it may have to be started again.

        Args:
            index: Index of the command.
            code: Exit code of the command.
        """
        folder = self.commands[index].folder
        if folder is None:
            self._settle(index, code)
            return
        if folder.state is State.DONE:  # whatever became of the process after that
            self._settle(index, ExitCode.DONE)
        elif code == ExitCode.DONE:  # a shared file system may take a moment to show it
            self._unseen.add(index)
            self._postpone(index)
        elif code == ExitCode.TAKEN:
            self._taken.add(index)
            self._postpone(index)
        elif code in (ExitCode.INTERRUPTED, -SIGTERM) and self._restarts[index] < RESTARTS:
            self._restarts[index] += 1
            self.start_again(index)
        else:
            self._settle(index, code)

    def start_again(self, index: int) -> None:
        """Puts a command at the end of the queue.

        Args:
            index: Index of the command.
        """
        self._waiting.append(index)

    def fail(self, index: int, reason: str) -> None:
        """Ends a command as failed.

        Args:
            index: Index of the command.
            reason: Reason, in one sentence.
        """
        folder = self.commands[index].folder
        if folder is not None:
            folder.fail(reason)
        else:
            print(f"{self.commands[index].text}: {reason}", file=sys.stderr)
        self._settle(index, ExitCode.FAILED)

    def _postpone(self, index: int) -> None:
        self._later.append((time.monotonic() + INTERVAL, index))

    def _settle(self, index: int, code: int) -> None:
        self.codes[index] = int(code)
        self.progress(index, 1.0)
