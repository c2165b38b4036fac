"""The image cache: a bounded folder of entries. Each is a folder that is there whole or not at all, and never changes.

Several processes may build at once, on one machine or on many that share the file system. An entry is built in a folder
of its own under `.unfinished`, and a rename puts it in place; a process that comes second uses the first one's. The
claim beside it (`domainbed_ext.system.attempts`) tells the next builder whether its owner still runs.
"""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.system import strict_json
from domainbed_ext.system.attempts import LEASE, Claim, read_clock, read_latest
from domainbed_ext.system.files import replace_atomically
from domainbed_ext.system.locks import alone
from domainbed_ext.system.option_values import expand
from domainbed_ext.system.sizes import GB, format_size

RECORD = "entry.json"
KEPT = 3600.0  # seconds after its last use in which an entry is not removed: a run may be about to map it
SPARE = GB  # bytes of the disk that are left free

NONE = "none"  # given instead of a folder
DEFAULT_GB = 32.0
VARIABLE = "DOMAINBED_EXT_CACHE"

_UNFINISHED, _LOCKS = ".unfinished", ".locks"


def find_default_folder() -> Path:
    """Returns the folder that DOMAINBED_EXT_CACHE names, else one in the user's cache folder."""
    if named := os.environ.get(VARIABLE):
        return Path(expand(VARIABLE, named))
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(caches) if caches else Path.home() / ".cache") / "domainbed_ext"
    except RuntimeError as error:
        raise BenchmarkError(
            f"the user has no home folder for the image cache: give --cache_dir DIR (none: decode images each time), "
            f"or set {VARIABLE}"
        ) from error


def choose_folder(cache_dir: str | None) -> Path | None:
    """Returns the folder that `--cache_dir` chooses; None if it asks for none.

    Args:
        cache_dir: Value of the option; None if it was not given.
    """
    if cache_dir == NONE:
        return None
    return Path(cache_dir) if cache_dir else find_default_folder()


class NoRoom(BenchmarkError):  # noqa: N818  (an error by its base)
    """An entry cannot be kept: too little room, or a folder that is not writable."""


@dataclass(frozen=True)
class Entry:
    """An entry of the cache.

    Attributes:
        key: Key of the entry.
        path: Path of its folder.
        what: Description of its content.
        bytes: Size on disk.
        used: Time of its last use, in seconds of the file system's clock.
    """

    key: str
    path: Path
    what: str
    bytes: int
    used: float


class Entries:
    """The entries of a folder.

    Args:
        folder: Folder of the cache, made with the first entry.
        limit: Bytes that all entries together may take.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def find(self, key: str) -> Path | None:
        """Finds an entry, which counts as its use.

        Args:
            key: Key of the entry.

        Returns:
            Its folder; None if there is none.
        """
        path = self._path(key)
        with contextlib.suppress(OSError):  # without permission to write, it is found all the same
            os.utime(path / RECORD)
        return path if os.path.isfile(path / RECORD) else None

    def get(
        self,
        key: str,
        size: int,
        build: Callable[[Path], object],
        what: str = "",
        waiting: Callable[[], object] = lambda: None,
    ) -> Path:
        """Finds an entry, or builds it. A second builder waits for the first.

        Args:
            key: Key of the entry, e.g. "PACS/sketch-0123456789ab-224x224". Characters that file systems may not take
                become "_".
            size: Bytes that it will take. The least recently used entries are removed to make room, but none that was
                used within the last hour.
            build: Callback that fills the folder that it is given.
            what: Description of its content; the key if empty.
            waiting: Callback while another process builds it, see `alone`.

        Returns:
            The entry's folder.

        Raises:
            NoRoom: It does not fit, the disk would have less than a GB left, or the folder is not writable.
        """
        if path := self.find(key):
            return path
        what = what or key
        try:
            name = self._path(key).relative_to(self.folder).as_posix().replace("/", "~")
            with alone(self.folder / _LOCKS / name, waiting):
                return self.find(key) or self._build(key, size, build, what)
        except OSError as error:
            raise NoRoom(
                f"cannot keep {what} in the image cache {self.folder} ({error.strerror or error}): make that folder "
                f"writable, or give another by --cache_dir"
            ) from error

    def remove(self, key: str) -> None:
        """Removes an entry, if it is there. A process that has it mapped can still read it.

        Args:
            key: Key of the entry.

        Raises:
            OSError: The folder is not writable.
        """
        trash = self.folder / _UNFINISHED / f"0-{uuid.uuid4().hex}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._path(key).rename(trash)  # so that no process sees half of it
            shutil.rmtree(trash)

    def list(self) -> Sequence[Entry]:
        """Lists all entries, by key."""
        entries = []
        for place, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if RECORD in files:
                with contextlib.suppress(FileNotFoundError):  # removed just now
                    entries.append(self._read(Path(place)))
        return entries

    def _path(self, key: str) -> Path:
        parts = [re.sub(r"[^\w.-]+", "_", part)[:60].lstrip(".") or "_" for part in key.split("/")]
        return self.folder.joinpath(*parts)

    def _read(self, path: Path) -> Entry:
        size = sum(file.stat().st_size for file in path.iterdir())
        try:
            what = str(json.loads((path / RECORD).read_text(encoding="utf-8"))["what"])
        except (ValueError, KeyError, TypeError):
            what = "?"
        used = (path / RECORD).stat().st_mtime
        return Entry(path.relative_to(self.folder).as_posix(), path, what, size, used)

    def _build(self, key: str, size: int, build: Callable[[Path], object], what: str) -> Path:
        def write(folder: Path) -> None:
            folder.mkdir()
            build(folder)
            taken = sum(file.stat().st_size for file in folder.iterdir())
            date = datetime.now(timezone.utc).isoformat(timespec="seconds")
            record = {"key": key, "what": what, "bytes": taken, "made": date}
            (folder / RECORD).write_text(strict_json.dumps(record, indent=2) + "\n", encoding="utf-8")

        path = self._path(key)
        with self._unfinished(size, what) as workshop:
            replace_atomically(workshop / "entry", write)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not (path / RECORD).exists():
                self.remove(key)  # no entry, but what is left of one
            try:
                (workshop / "entry").rename(path)
            except OSError:
                if not self.find(key):  # else another process was first, and its entry may be mapped
                    raise
        return path

    @contextlib.contextmanager
    def _unfinished(self, size: int, what: str) -> Iterator[Path]:
        """Makes a folder to build in, whose name holds the bytes that it will take."""
        workshop = self.folder / _UNFINISHED / f"{size}-{uuid.uuid4().hex}"
        with alone(self.folder / _LOCKS / "room"):
            self._clean_up()
            self._make_room(size, what)
            workshop.mkdir(parents=True)
        try:
            with Claim(workshop):
                yield workshop
        finally:
            shutil.rmtree(workshop, ignore_errors=True)

    def _clean_up(self) -> None:
        """Removes what builders left that have exited."""
        for workshop in self._workshops():
            claim = read_latest(workshop)
            with contextlib.suppress(FileNotFoundError):  # done just now
                # One without a claim was made a moment ago, or its builder was killed at that moment.
                if claim.is_dead() if claim else read_clock(self.folder) - workshop.stat().st_mtime > LEASE:
                    shutil.rmtree(workshop)

    def _make_room(self, size: int, what: str) -> None:
        entries = sorted(self.list(), key=lambda entry: entry.used)
        promised = sum(int(workshop.name.partition("-")[0]) for workshop in self._workshops())
        held = sum(entry.bytes for entry in entries) + promised
        free = shutil.disk_usage(self.folder).free
        excess = max(held + size - self.limit, size + SPARE - free)
        now, dropped, freed = read_clock(self.folder), [], 0
        for entry in entries:
            if freed < excess and now - entry.used > KEPT:
                dropped.append(entry)
                freed += entry.bytes
        if held + size - freed > self.limit:
            raise NoRoom(
                f"{what} takes {format_size(size)}, but {format_size(held - freed)} of the image cache {self.folder} "
                f"are in use and its limit is {format_size(self.limit)}: raise --cache_gb, or remove entries with "
                f"python -m domainbed_ext.cache remove"
            )
        if freed < excess:
            raise NoRoom(
                f"{what} takes {format_size(size)}, but the disk of the image cache {self.folder} has only "
                f"{format_size(free)} free, and {format_size(SPARE)} are to stay free: make room, or give a "
                f"--cache_dir on another disk"
            )
        for entry in dropped:
            self.remove(entry.key)

    def _workshops(self) -> Sequence[Path]:
        try:
            return list((self.folder / _UNFINISHED).iterdir())
        except FileNotFoundError:
            return []
