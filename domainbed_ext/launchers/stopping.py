"""How a launch is asked to stop: by a signal to its process, or by a file in its folder."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

from domainbed_ext.system import interrupts

# Ctrl-C, what engines send, and what a terminal sends when it is closed.
SIGNALS = {*interrupts.SIGNALS, signal.SIGHUP}
PATIENCE = 60.0  # seconds that runs have to write their checkpoints
_LOOK_AGAIN = 1.0  # seconds from one look for the file to the next


class Wish:
    """True once the launch is to stop.

    Args:
        cancelled: tells whether somebody cancelled it.
    """

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled
        self._stop = False
        self._interrupts = 0
        self._next_look = 0.0

    def __bool__(self) -> bool:
        if not self._stop and time.monotonic() >= self._next_look:
            self._stop = self._cancelled()
            self._next_look = time.monotonic() + _LOOK_AGAIN
        return self._stop

    @property
    def at_once(self) -> bool:
        """Whether Ctrl-C came a second time, so that nothing is waited for."""
        return self._interrupts > 1

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        self._stop = True
        self._interrupts += number == signal.SIGINT


@contextlib.contextmanager
def stoppable(cancelled: Callable[[], bool]) -> Iterator[Wish]:
    """Turns what asks a launch to stop into a wish that the code inside looks at, and ends by.

    Args:
        cancelled: tells whether somebody cancelled the launch.

    Yields:
        The wish.

    Raises:
        KeyboardInterrupt: afterwards, if the launch was asked to stop.
    """
    wish = Wish(cancelled)
    with interrupts.handling(interrupts.unignored(SIGNALS), wish.take):
        yield wish
    if wish:
        raise KeyboardInterrupt
