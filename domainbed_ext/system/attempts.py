"""Claims on runs: one process at a time, of many on one machine or on many that share a file system.

Each attempt at a run is a file in its folder, `attempt_3.json`, made by exclusive creation: of several processes that
want to make the next attempt, one gets it. While it lasts its owner rewrites the file every few seconds. A claim
expires when its owner has exited: on the owner's machine the process table tells, elsewhere a heartbeat that fails to
come. An owner looks for a later attempt before it writes anything, and exits if there is one.

No machine's wall clock is trusted. A heartbeat's age is measured by the clock of the file system, which stamps both the
heartbeat and the file that it is compared with. Where a claim seems to have expired, several heartbeats are waited for
by a clock that cannot jump.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from domainbed_ext.system import strict_json
from domainbed_ext.system.files import write_atomically

LEASE = 60.0  # seconds without a heartbeat after which the claim of an owner on another machine expires
BEATS = 5  # heartbeats per lease

_FIELDS = ("owner", "seconds", "set_up", "share", "ended")
_NEW_FIELDS = ("left",)  # that files of earlier versions lack
_NAME = re.compile(r"attempt_(\d+)\.json")


class Taken(Exception):  # noqa: N818  (not an error: another process does the work)
    """Another process works on the run."""


class Lost(Exception):  # noqa: N818
    """This process's claim expired and another process has the run; nothing may be written any more."""


@dataclass(frozen=True)
class Attempt:
    """An attempt, as read from its file.

    Attributes:
        path: Path of the file.
        number: Number of the attempt, from 1.
        owner: Process that makes it, see `identify_process`; empty if the file cannot be read.
        seconds: Seconds that this attempt and those before it took so far.
        set_up: Seconds of this attempt before its first step.
        share: Share of the run that is done, in [0, 1].
        ended: "done", "failed" or "interrupted"; None if it has not ended, or was killed.
        left: Seconds left, as the run itself estimates; None if it does not know yet.
    """

    path: Path
    number: int
    owner: dict[str, Any]
    seconds: float = 0.0
    set_up: float = 0.0
    share: float = 0.0
    ended: str | None = None
    left: float | None = None

    def is_alive(self, now: float | None = None) -> bool:
        """Whether its owner runs, as far as can be seen at once; in doubt it does not.

        Args:
            now: Time by the file system's clock, from `read_clock`; None reads it.
        """
        if self.ended:
            return False
        if _is_here(self.owner):
            return self.owner.get("began") == _read_start(int(self.owner.get("pid", 0)))
        try:
            age = (read_clock(self.path.parent) if now is None else now) - self.path.stat().st_mtime
        except OSError:
            return False
        return -1.0 < age < LEASE

    def is_dead(self) -> bool:
        """Whether its owner has exited for sure; waits for some heartbeats where only they can tell."""
        if self.ended:
            return True
        if self.is_alive():
            return False
        if _is_here(self.owner):
            return True
        seen, start = _stamp(self.path), time.monotonic()
        while time.monotonic() - start < 2.5 * LEASE / BEATS:
            time.sleep(LEASE / BEATS / 10)
            if _stamp(self.path) != seen:
                return False
        return True


def read_latest(folder: Path, names: Iterable[str] | None = None) -> Attempt | None:
    """Reads the last attempt at a run.

    Args:
        folder: Folder of the run.
        names: Names of the files in it; None lists them.

    Returns:
        The attempt; None if there was none.
    """
    with contextlib.suppress(OSError):
        names = os.listdir(folder) if names is None else names
    numbers = [int(match[1]) for name in names or () if (match := _NAME.fullmatch(name))]
    if not numbers:
        return None
    path = folder / f"attempt_{max(numbers)}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        new = {name: content.get(name) for name in _NEW_FIELDS}
        return Attempt(path, max(numbers), **{name: content[name] for name in _FIELDS}, **new)
    except (OSError, ValueError, KeyError, TypeError):  # it is being written just now, or the disk was full
        return Attempt(path, max(numbers), {})


class Claim:
    """The right to work on a run, held while the context lasts.

    Args:
        folder: Folder of the run; it exists.

    Raises:
        Taken: Another process works on it.
        OSError: The folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        before = read_latest(folder)
        if before and not before.is_dead():
            owner = before.owner
            where = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
            raise Taken(f"{where} works on {folder.name}")
        self.number = before.number + 1 if before else 1
        self.path = folder / f"attempt_{self.number}.json"
        self.set_up = 0.0
        self.share = 0.0
        self.left: float | None = None
        self.ended: str | None = None
        self._seconds_before = before.seconds if before else 0.0
        self._start = time.monotonic()
        self._date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._stop = threading.Event()
        self._writing = threading.Lock()
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(self._content())
        except FileExistsError as error:
            raise Taken(f"another process works on {folder.name}") from error
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        try:
            self.check()  # a slow process may have made a number that is out of date by now
        except Lost as lost:
            self.path.unlink(missing_ok=True)
            raise Taken(str(lost)) from lost
        for number in range(1, self.number - 1):  # the one before is kept, to find out what happened
            (folder / f"attempt_{number}.json").unlink(missing_ok=True)

    @property
    def seconds(self) -> float:
        """Seconds that this attempt and those before it took so far."""
        return self._seconds_before + time.monotonic() - self._start

    def begin_steps(self) -> None:
        """Notes that the set-up before the first step is done."""
        self.set_up = time.monotonic() - self._start

    def check(self) -> None:
        """Checks that the claim still holds; to be called before anything is written.

        Raises:
            Lost: There is a later attempt.
        """
        newest = read_latest(self.path.parent)
        if newest is None or newest.number != self.number:
            raise Lost(f"the claim on {self.path.parent.name} expired, and another process has it now")

    def beat(self) -> None:
        """Writes a heartbeat: that the owner runs, and its progress."""
        with self._writing:
            if self.path.exists():  # else the folder was deleted, and must not come back
                try:
                    write_atomically(self.path, self._content())
                except OSError:  # a full disk still takes a time stamp
                    with contextlib.suppress(OSError):
                        os.utime(self.path)

    def _content(self) -> str:
        content = {
            "owner": identify_process(),
            "started": self._date,
            "seconds": round(self.seconds, 3),
            "set_up": round(self.set_up, 3),
            "share": round(self.share, 4),
            "left": None if self.left is None else round(self.left, 1),
            "ended": self.ended,
        }
        return strict_json.dumps(content, indent=2) + "\n"

    def __enter__(self) -> "Claim":
        self._thread = threading.Thread(target=self._beat_on, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.ended = self.ended or "interrupted"
        self.beat()

    def _beat_on(self) -> None:
        while not self._stop.wait(LEASE / BEATS):
            self.beat()


def identify_process() -> dict[str, Any]:
    """Identifies this process for others: machine, its start, space of process numbers, number and start."""
    return _identify(os.getpid())


def _is_here(owner: dict[str, Any]) -> bool:
    """Whether an owner is, or was, a process of this machine."""
    return all(name in owner and owner[name] == identify_process()[name] for name in ("host", "boot", "pids"))


@cache
def _identify(pid: int) -> dict[str, Any]:
    # Containers may share a host's name and its start, but then number their processes apart.
    boot, pids = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text(encoding="utf-8").strip() if boot.exists() else None,
        "pids": os.readlink(pids) if pids.exists() else None,
        "pid": pid,
        "began": _read_start(pid),
    }


def _read_start(pid: int) -> str | None:
    """Reads when a process began, in the kernel's ticks, which tells it from a later one of the same number.

    Returns:
        The ticks; None if there is no such process, or it is a zombie; "?" where the system does not tell.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "?"
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def read_clock(folder: Path) -> float:
    """Reads the clock that stamps files in a folder, in seconds.

    Args:
        folder: The folder.
    """
    probe = folder / f".clock.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # no permission to write: this machine's clock has to do
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
