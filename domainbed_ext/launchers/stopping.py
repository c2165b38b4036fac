"""How a launch is asked to stop: by a signal to its process, or by a file in its folder."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

from domainbed_ext.system import interrupts

# Ctrl-C, what schedulers send, and what a terminal sends when it is closed.
SIGNALS = {*interrupts.SIGNALS, signal.SIGHUP}
PATIENCE = 60.0  # seconds that runs have to write their checkpoints
_INTERVAL = 1.0  # seconds from one look for the file to the next


class StopRequest:
    """A request to stop: true once there is one.

    Args:
        cancelled: Callback that tells whether the launch was cancelled.
    """

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled
        self._stop = False
        self._interrupts = 0
        self._next_look = 0.0

    def __bool__(self) -> bool:
        if not self._stop and time.monotonic() >= self._next_look:
            self._stop = self._cancelled()
            self._next_look = time.monotonic() + _INTERVAL
        return self._stop

    @property
    def at_once(self) -> bool:
        """Whether Ctrl-C came a second time, so that nothing is waited for."""
        return self._interrupts > 1

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal.

        Args:
            number: Number of the signal.
            frame: Frame that was interrupted.
        """
        self._stop = True
        self._interrupts += number == signal.SIGINT


@contextlib.contextmanager
def stop_request(cancelled: Callable[[], bool]) -> Iterator[StopRequest]:
    """Turns signals and cancelling into a request that the code inside looks at, and ends by.

    Args:
        cancelled: Callback that tells whether the launch was cancelled.

    Yields:
        The request.

    Raises:
        KeyboardInterrupt: Afterwards, if the launch was asked to stop.
    """
    request = StopRequest(cancelled)
    with interrupts.handling(interrupts.unignored(SIGNALS), request.receive):
        yield request
    if request:
        raise KeyboardInterrupt
