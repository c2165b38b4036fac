"""How much memory processes hold."""

from collections import defaultdict
from collections.abc import Iterable

import psutil

Gone = psutil.Error


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started, directly or not; nothing if it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except Gone:
        return []


def held(pids: Iterable[int]) -> dict[int, int]:
    """Bytes that some processes hold, each with all that it started; what several share counts in parts.

    Args:
        pids: of the processes.

    Returns:
        Bytes of each; 0 if it is gone.
    """
    children = defaultdict(list)
    for process in psutil.process_iter(["ppid"]):  # once for all of them, for there may be many processes
        children[process.info["ppid"]].append(process.pid)

    def of_all(pid: int) -> int:
        return _held(pid) + sum(of_all(child) for child in children[pid])

    return {pid: of_all(pid) for pid in pids}


def resident(pid: int) -> int:
    """Bytes of a process that are in memory; 0 if it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except Gone:
        return 0


def _held(pid: int) -> int:
    try:
        told = psutil.Process(pid).memory_full_info()
        return int(getattr(told, "pss", told.rss))  # of a page that n processes share, an nth
    except Gone:
        return 0
