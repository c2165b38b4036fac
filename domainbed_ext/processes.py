"""Processes that leave Ctrl-C, and the end of a terminal, to the one that started them.

A terminal sends these to every process of a command. One that only helps would end with a traceback of its own, and
the command could no longer end in order.
"""

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing.context import SpawnContext, SpawnProcess

_DEAF_TO = {signal.SIGINT, signal.SIGHUP}


def be_deaf(*_: object) -> None:
    """Has this process ignore what is the other's to handle."""
    for number in _DEAF_TO:
        signal.signal(number, signal.SIG_IGN)


class _Helper(SpawnProcess):
    def start(self) -> None:
        with _blocked():  # until it can say so itself
            super().start()

    def run(self) -> None:
        be_deaf()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _DEAF_TO)
        super().run()


class _Context(SpawnContext):
    Process = _Helper


HELPERS = _Context()
"""What starts them: spawned rather than forked, for a forked torch with threads or CUDA may hang."""


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _DEAF_TO)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
