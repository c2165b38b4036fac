"""Stops a run at the next place from which it can resume: on a signal, or when its time is up."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
GRACE = 60.0  # seconds that a run has to reach such a place after its time limit; then it counts as hanging


class Interrupted(Exception):  # noqa: N818  (not an error: the run can be resumed)
    """The run was asked to stop."""


class OutOfTime(Interrupted):
    """The run's time limit has passed."""


class Stop:
    """A stop request, if there is one: calling this raises it.

    Attributes:
        at_once: Whether the first Ctrl-C interrupts at once: there is nothing to save yet.
    """

    def __init__(self) -> None:
        self.request: Interrupted | None = None
        self.at_once = False

    def __call__(self) -> None:
        """Raises the stop request, if there is one.

        Raises:
            Interrupted: If a signal came, or the time limit passed (`OutOfTime`).
        """
        if self.request is not None:
            raise self.request


@contextlib.contextmanager
def handling(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handles signals while the context lasts. Only the main thread can: in any other it has no effect.

    Args:
        numbers: Numbers of the signals.
        handler: Handler of all of them.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers} if is_main else {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def unignored(numbers: Iterable[int]) -> list[int]:
    """Those signals that this process does not ignore: a background job, or one under nohup, keeps ignoring them."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def stoppable(minutes: float | None = None, on_hang: Callable[[OutOfTime], None] | None = None) -> Iterator[Stop]:
    """Turns signals and a time limit into stop requests, which the code inside checks where it can stop.

    SIGTERM is what launchers send, SIGUSR2 what Slurm sends before a job's time is up; a second Ctrl-C interrupts at
    once, as ever.

    Args:
        minutes: Time limit; None for none.
        on_hang: Function that is called, in its own thread, if the code inside does not stop within `GRACE` seconds
            after the limit; then the process exits with code 1.

    Yields:
        The `Stop` to call wherever stopping is possible.
    """
    stop = Stop()

    def request(number: int, frame: FrameType | None) -> None:
        stop.request = Interrupted(f"stopped by {signal.Signals(number).name}")
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            if stop.at_once:
                raise KeyboardInterrupt

    def time_is_up() -> None:
        stop.request = OutOfTime(f"it took longer than its time limit of {minutes:g} minutes")
        if not finished.wait(GRACE):
            if on_hang is not None:
                on_hang(stop.request)
            sys.stderr.flush()
            os._exit(1)  # a thread cannot stop another, nor unwind it

    finished = threading.Event()
    timer = threading.Timer(60 * (minutes or 0), time_is_up)
    timer.daemon = True
    # A launcher's worker ignores Ctrl-C, and keeps doing so.
    with handling([signal.SIGTERM, signal.SIGUSR2, *unignored([signal.SIGINT])], request):
        try:
            if minutes:
                timer.start()
            yield stop
        finally:
            finished.set()
            timer.cancel()
