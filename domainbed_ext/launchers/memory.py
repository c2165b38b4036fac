"""How much memory processes hold: their own, not the pages of files that they map, which the system can take back.

So the images of the cache count for no process.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import psutil

ProcessGone = psutil.Error


def list_family(pid: int) -> list[psutil.Process]:
    """Lists a process and all that it started, directly or not; empty if it has ended.

    Args:
        pid: Number of the process.
    """
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except ProcessGone:
        return []


def measure_families(pids: Iterable[int]) -> dict[int, int]:
    """Measures the memory of processes, each with all that it started; what several share counts in parts.

    Args:
        pids: Numbers of the processes.

    Returns:
        Bytes by process; 0 if it has ended.
    """
    children = defaultdict(list)
    for process in psutil.process_iter(["ppid"]):  # once for all of them, since there may be many processes
        children[process.info["ppid"]].append(process.pid)

    def measure(pid: int) -> int:
        return _measure_shared(pid) + sum(measure(child) for child in children[pid])

    return {pid: measure(pid) for pid in pids}


def measure(pid: int) -> int:
    """Measures the memory of one process, in bytes; 0 if it has ended.

    Args:
        pid: Number of the process.
    """
    try:
        info = psutil.Process(pid).memory_info()
        return int(info.rss - getattr(info, "shared", 0))
    except ProcessGone:
        return 0


def _measure_shared(pid: int) -> int:
    """As `measure`, but of a page that n processes share counts an nth."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:  # it has ended, is another user's, or the system has no such file
        return measure(pid)
    kilobytes = {name: amount.split()[0] for name, _, amount in (line.partition(":") for line in lines[1:])}
    return 1024 * sum(int(kilobytes.get(name, 0)) for name in ("Pss_Anon", "Pss_Shmem"))
