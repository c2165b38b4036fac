"""Threads that share work, of which Ctrl-C leaves none behind."""

import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import TypeVar

from domainbed_ext.system.interrupts import handling

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> list[Result]:
    """Calls a function on each item.

    If Ctrl-C is to end the work, it does so after the calls that have begun. Raised at once, its exception could come
    while this thread holds a lock of the pool, and the pool's threads would wait for that lock forever.

    Args:
        function: Function of an item.
        items: The items.
        threads: Number of threads that call it; with fewer than 2 this thread does.

    Returns:
        Its results, in order.
    """
    if threads < 2:
        return [function(item) for item in items]
    raised: list[BaseException] = []
    before = signal.getsignal(signal.SIGINT)

    def keep(number: int, frame: FrameType | None) -> None:
        try:
            if callable(before):
                before(number, frame)
        except BaseException as error:
            raised.append(error)

    def call(item: Item) -> Result:
        if raised:
            raise raised[0]
        return function(item)

    try:
        with handling([signal.SIGINT] if callable(before) else [], keep):
            return _map(call, items, threads)  # a call, so that the pool is gone while exceptions are still kept
    finally:
        if raised:
            raise raised[0]


def _map(call: Callable[[Item], Result], items: Iterable[Item], threads: int) -> list[Result]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(call, items))
