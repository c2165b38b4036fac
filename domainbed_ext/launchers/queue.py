"""Which command of a launch is next, and what became of those that ended.

Several launches may be at the same sweep. A run that another process is at goes to the end, and is looked at again
every few seconds until that process has ended it, or has left it for us to go on with.
"""

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from signal import SIGTERM

from domainbed_ext.launchers.command import Command
from domainbed_ext.system.exit_codes import ExitCode

LOOK_AGAIN = 5.0  # seconds
RESTARTS = 5  # of a run that somebody stops though nobody cancelled the launch


class Queue:
    """The commands of a launch.

    Args:
        commands: of the launch.
        progress: told a command's index and the share of it that is done.

    Attributes:
        commands: the same, read.
        codes: the exit code of each that has ended.
    """

    def __init__(self, commands: Sequence[str], progress: Callable[[int, float], None]) -> None:
        self.commands = [Command(text) for text in commands]
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
        """Index of a command to start now; None if there is none, now or ever again."""
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            self._waiting.append(self._later.popleft()[1])
        while self._waiting:
            index = self._waiting.popleft()
            if self._is_ours(index):
                return index
        return None

    def _is_ours(self, index: int) -> bool:
        """Whether a command is to be started, as its folder has it now."""
        folder = self.commands[index].folder
        if folder is None:
            return True
        from domainbed_ext.runs.folder import State

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
            folder.fail("it ended well, but not in this folder: give an --output_dir that all machines share")
            self._settle(index, ExitCode.FAILED)
        else:
            return True
        return False

    def end(self, index: int, code: int) -> None:
        """Takes note of how a command ended; it may have to be started again.

        Args:
            index: of the command.
            code: its exit code.
        """
        folder = self.commands[index].folder
        if folder is None:
            self._settle(index, code)
            return
        from domainbed_ext.runs.folder import State

        if folder.state is State.DONE:  # whatever came of the process after that
            self._settle(index, ExitCode.DONE)
        elif code == ExitCode.DONE:  # a shared file system may take a moment to show it
            self._unseen.add(index)
            self._postpone(index)
        elif code == ExitCode.TAKEN:
            self._taken.add(index)
            self._postpone(index)
        elif code in (ExitCode.INTERRUPTED, -SIGTERM) and self._restarts[index] < RESTARTS:
            self._restarts[index] += 1
            self.again(index)
        else:
            self._settle(index, code)

    def again(self, index: int) -> None:
        """Has a command started again, after all that wait now.

        Args:
            index: of the command.
        """
        self._waiting.append(index)

    def fail(self, index: int, sentence: str) -> None:
        """Ends a command as failed.

        Args:
            index: of the command.
            sentence: why.
        """
        folder = self.commands[index].folder
        if folder is not None:
            folder.fail(sentence)
        else:
            print(f"{self.commands[index].text}: {sentence}", file=sys.stderr)
        self._settle(index, ExitCode.FAILED)

    def _postpone(self, index: int) -> None:
        self._later.append((time.monotonic() + LOOK_AGAIN, index))

    def _settle(self, index: int, code: int) -> None:
        self.codes[index] = int(code)
        self.progress(index, 1.0)
