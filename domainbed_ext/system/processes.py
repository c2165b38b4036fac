"""Helper processes, which leave Ctrl-C and the closing of a terminal to the process that started them.

A terminal sends these to every process of a command. A helper that they ended would print a traceback, and the command
could not stop in order.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from domainbed_ext.errors import BenchmarkError

Map = Callable[[Callable[..., Any], Iterable[Any]], Iterable[Any]]

_DEAF_TO = {signal.SIGINT, signal.SIGHUP}


def be_deaf(*_: object) -> None:
    """Makes this process ignore the signals that the other one handles."""
    for number in _DEAF_TO:
        signal.signal(number, signal.SIG_IGN)


class _Helper(SpawnProcess):
    def start(self) -> None:
        with _held_back():  # until the helper ignores them itself
            super().start()

    def run(self) -> None:
        be_deaf()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _DEAF_TO)
        super().run()


class _Context(SpawnContext):
    Process = _Helper


HELPERS = _Context()
"""Starts helpers. They are spawned rather than forked: a forked torch with threads or CUDA may hang."""


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Keeps the signals from processes that start in this context, and from interrupting their start halfway.

    A process inherits what its thread blocks. But another thread may receive a signal that this one blocks, and Python
    runs its handler in the main thread: without the arguments that it waits for, the new process would end with a
    traceback. So signals that come meanwhile are sent again at the end.
    """
    came: list[int] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _DEAF_TO}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _DEAF_TO)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in came:
            signal.raise_signal(number)


@contextlib.contextmanager
def several(processes: int, at_once: int = 1) -> Iterator[Map]:
    """Processes that share work. If an exception leaves the context, their current work is not waited for.

    Args:
        processes: Number of processes; with fewer than 2 this process does the work.
        at_once: Number of items that a process receives at once.

    Yields:
        A `map` that they execute.

    Raises:
        BenchmarkError: If one of them was killed.
    """
    if processes < 2:
        yield map
        return
    ours, theirs = HELPERS.Pipe()
    with ours, theirs, ProcessPoolExecutor(processes, HELPERS, initializer=_leave_with, initargs=(theirs,)) as pool:

        def begin(function: Callable[..., Any], items: Iterable[Any]) -> Iterable[Any]:
            # Each task that is submitted may start a process, which the pool does not know of before it has started.
            with _held_back():
                return pool.map(function, items, chunksize=at_once)

        try:
            yield begin
        except BrokenProcessPool as error:
            raise BenchmarkError(
                "a helper process was killed, most likely because memory ran out: use fewer of them"
            ) from error
        except BaseException:
            ours.send(None)
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _leave_with(pipe: Connection) -> None:
    """Ends this process when the one that started it ends or asks for it; otherwise it would wait for work forever."""
    parent = parent_process()
    assert parent

    def leave() -> None:
        wait([parent.sentinel, pipe])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
