"""Processes that leave Ctrl-C, and the end of a terminal, to the one that started them.

A terminal sends these to every process of a command. One that only helps would end with a traceback of its own, and
the command could no longer end in order.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from domainbed_ext.errors import BenchmarkError

Map = Callable[[Callable[..., Any], Iterable[Any]], Iterable[Any]]

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


@contextlib.contextmanager
def several(processes: int, at_once: int = 1) -> Iterator[Map]:
    """Some processes that read images. What they are at is not waited for where the context is left by an exception.

    Args:
        processes: How many; fewer than 2 are this one.
        at_once: Number of things that one is given at once.

    Yields:
        `map`, done by them.

    Raises:
        BenchmarkError: One of them was killed.
    """
    if processes < 2:
        yield map
        return
    ours, theirs = HELPERS.Pipe()
    with ours, theirs, ProcessPoolExecutor(processes, HELPERS, initializer=_leave_with, initargs=(theirs,)) as pool:
        try:
            yield partial(pool.map, chunksize=at_once)
        except BrokenProcessPool as error:
            raise BenchmarkError(
                "a process that reads images was killed, most likely for memory: use fewer of them"
            ) from error
        except BaseException:
            ours.send(None)
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _leave_with(pipe: Connection) -> None:
    """Ends this process when the one that started it ends or asks for it; else it would wait for work for ever."""
    parent = parent_process()
    assert parent

    def leave() -> None:
        wait([parent.sentinel, pipe])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
