"""How much memory processes hold: their own, not the pages of files that they map, which the system takes back at will.

So the images of the cache count for nobody.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

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
        told = psutil.Process(pid).memory_info()
        return int(told.rss - getattr(told, "shared", 0))
    except Gone:
        return 0


def _held(pid: int) -> int:
    """Of a page that n processes share, an nth."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:  # gone, another's, or a system without
        return resident(pid)
    told = {name: amount.split()[0] for name, _, amount in (line.partition(":") for line in lines[1:])}
    return 1024 * sum(int(told.get(name, 0)) for name in ("Pss_Anon", "Pss_Shmem"))
