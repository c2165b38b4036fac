"""Stops a run at the next place from which it can resume: on a signal, or when its time is up."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
GRACE = 60.0  # seconds a run has to reach such a place when its time is up; then it is taken to hang


class Interrupted(Exception):  # noqa: N818  (not an error: the run goes on another time)
    """The run was asked to stop."""


class OutOfTime(Interrupted):
    """The run's time limit has passed."""


class Stop:
    """Calling it raises what has been asked for, if anything has.

    Attributes:
        at_once: Whether Ctrl-C interrupts at once, the first time too, for there is nothing yet to save.
    """

    def __init__(self) -> None:
        self.wish: Interrupted | None = None
        self.at_once = False

    def __call__(self) -> None:
        """Raises what has been asked for.

        Raises:
            Interrupted: a signal came, or the time limit passed (`OutOfTime`).
        """
        if self.wish is not None:
            raise self.wish


@contextlib.contextmanager
def handling(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Has signals handled while the context lasts; in a thread other than the main one, which cannot, nothing.

    Args:
        numbers: of the signals.
        handler: of all of them.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers} if is_main else {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def unignored(numbers: Iterable[int]) -> list[int]:
    """Those signals that this process does not ignore: a background job, or nohup, goes on ignoring what it does."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def stoppable(minutes: float | None = None, on_hang: Callable[[OutOfTime], None] | None = None) -> Iterator[Stop]:
    """Turns signals and a time limit into wishes that the code inside meets where it can.

    SIGTERM is what launchers send, SIGUSR2 what Slurm sends before a job's time is up; a second Ctrl-C interrupts at
    once, as ever.

    Args:
        minutes: the time limit; None for none.
        on_hang: called, in a thread of its own, if the code inside does not stop within `GRACE` seconds after it; then
            the process exits with code 1.

    Yields:
        What to call at each place where stopping is possible.
    """
    stop = Stop()

    def wish(number: int, frame: FrameType | None) -> None:
        stop.wish = Interrupted(f"stopped by {signal.Signals(number).name}")
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            if stop.at_once:
                raise KeyboardInterrupt

    def time_is_up() -> None:
        stop.wish = OutOfTime(f"it took longer than its time limit of {minutes:g} minutes")
        if not finished.wait(GRACE):
            if on_hang is not None:
                on_hang(stop.wish)
            sys.stderr.flush()
            os._exit(1)  # a thread cannot stop another, nor unwind it

    finished = threading.Event()
    timer = threading.Timer(60 * (minutes or 0), time_is_up)
    timer.daemon = True
    # A launcher's worker is deaf to Ctrl-C, and stays so.
    with handling([signal.SIGTERM, signal.SIGUSR2, *unignored([signal.SIGINT])], wish):
        try:
            if minutes:
                timer.start()
            yield stop
        finally:
            finished.set()
            timer.cancel()
