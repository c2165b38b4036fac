"""A bounded folder of entries. Each is a folder that is there whole or not at all, and never changes.

Several processes may build at once, on one machine or on many that share the file system. An entry is made in a folder
of its own under `.unfinished`, and a rename puts it in place; whoever comes second keeps the first one's. The claim
beside it (`domainbed_ext.system.attempts`) tells the next builder whether its owner still runs.
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
from domainbed_ext.system.attempts import LEASE, Claim, clock, latest
from domainbed_ext.system.files import replace_atomically
from domainbed_ext.system.locks import alone
from domainbed_ext.system.option_values import expanded
from domainbed_ext.system.sizes import GB, format_size

RECORD = "entry.json"
KEPT = 3600.0  # seconds from an entry's last use in which it stays: a run may be about to map it
SPARE = GB  # bytes of the disk that are left to others

NONE = "none"  # in place of a folder
DEFAULT_GB = 32.0
VARIABLE = "DOMAINBED_EXT_CACHE"

_UNFINISHED, _LOCKS = ".unfinished", ".locks"


def default_folder() -> Path:
    """The folder that the environment variable DOMAINBED_EXT_CACHE names, else one among the user's caches."""
    if named := os.environ.get(VARIABLE):
        return Path(expanded(VARIABLE, named))
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(caches) if caches else Path.home() / ".cache") / "domainbed_ext"
    except RuntimeError as error:
        raise BenchmarkError(
            f"no home folder is known, so no place for the image cache: give --cache_dir DIR (none: decode each time), "
            f"or set {VARIABLE}"
        ) from error


def chosen_folder(cache_dir: str | None) -> Path | None:
    """The folder that `--cache_dir` chooses; None if it says that there should be none.

    Args:
        cache_dir: Value of the option; None if it was not given.
    """
    if cache_dir == NONE:
        return None
    return Path(cache_dir) if cache_dir else default_folder()


class NoRoom(BenchmarkError):  # noqa: N818  (an error by its base)
    """An entry cannot be kept: too little room, or a folder that cannot be written to."""


@dataclass(frozen=True)
class Entry:
    """What there is.

    Attributes:
        key: by which it is asked for.
        path: of its folder.
        what: it is, in words.
        bytes: on disk.
        used: last, in seconds of the file system's clock.
    """

    key: str
    path: Path
    what: str
    bytes: int
    used: float


class Entries:
    """The entries of a folder.

    Args:
        folder: made when the first entry is.
        limit: bytes that all entries together may take.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def find(self, key: str) -> Path | None:
        """An entry that is there, which counts as its use.

        Args:
            key: of the entry.

        Returns:
            Its folder; None if there is none.
        """
        path = self._path(key)
        with contextlib.suppress(OSError):  # not ours to write to: it is found all the same
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
        """An entry, made if it is missing. On one machine a second builder waits for the first.

        Args:
            key: of the entry, e.g. "PACS/sketch-0123456789ab-224x224". Characters that file systems may not take
                become "_".
            size: bytes that it will take. The least recently used entries make room for it, but none that was used
                within the last hour.
            build: fills the folder that it is given.
            what: it is, in words.
            waiting: called while another builds it, see `alone`.

        Returns:
            The entry's folder.

        Raises:
            NoRoom: it does not fit, the disk has less than a GB to spare, or the folder cannot be written to.
        """
        if path := self.find(key):
            return path
        what = what or key
        try:
            name = self._path(key).relative_to(self.folder).as_posix().replace("/", "~")
            with alone(self.folder / _LOCKS / name, waiting):
                return self.find(key) or self._make(key, size, build, what)
        except OSError as error:
            raise NoRoom(
                f"cannot keep {what} in the image cache {self.folder} ({error.strerror or error}): make it a folder "
                f"that can be written to, or give --cache_dir another"
            ) from error

    def remove(self, key: str) -> None:
        """Removes an entry, if it is there. Whoever has it mapped can go on reading.

        Args:
            key: of the entry.

        Raises:
            OSError: the folder cannot be written to.
        """
        grave = self.folder / _UNFINISHED / f"0-{uuid.uuid4().hex}"
        grave.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._path(key).rename(grave)  # so that nobody sees half of it
            shutil.rmtree(grave)

    def list(self) -> Sequence[Entry]:
        """All entries, by key."""
        found = []
        for place, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if RECORD in files:
                with contextlib.suppress(FileNotFoundError):  # removed just now
                    found.append(self._read(Path(place)))
        return found

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

    def _make(self, key: str, size: int, build: Callable[[Path], object], what: str) -> Path:
        def write(folder: Path) -> None:
            folder.mkdir()
            build(folder)
            taken = sum(file.stat().st_size for file in folder.iterdir())
            made = datetime.now(timezone.utc).isoformat(timespec="seconds")
            record = {"key": key, "what": what, "bytes": taken, "made": made}
            (folder / RECORD).write_text(strict_json.dumps(record, indent=2) + "\n", encoding="utf-8")

        path = self._path(key)
        with self._unfinished(size, what) as workshop:
            replace_atomically(workshop / "entry", write)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not (path / RECORD).exists():
                self.remove(key)  # no entry, but what somebody left of one
            try:
                (workshop / "entry").rename(path)
            except OSError:
                if not self.find(key):  # else another was first, and readers may have theirs mapped
                    raise
        return path

    @contextlib.contextmanager
    def _unfinished(self, size: int, what: str) -> Iterator[Path]:
        """A folder to build in, whose name tells the bytes that it will come to take."""
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
        """Removes what dead builders left."""
        for workshop in self._workshops():
            claim = latest(workshop)
            with contextlib.suppress(FileNotFoundError):  # done just now
                # One without a claim was made a moment ago, or its builder died in that moment.
                if claim.dead() if claim else clock(self.folder) - workshop.stat().st_mtime > LEASE:
                    shutil.rmtree(workshop)

    def _make_room(self, size: int, what: str) -> None:
        entries = sorted(self.list(), key=lambda entry: entry.used)
        promised = sum(int(workshop.name.partition("-")[0]) for workshop in self._workshops())
        held = sum(entry.bytes for entry in entries) + promised
        free = shutil.disk_usage(self.folder).free
        excess = max(held + size - self.limit, size + SPARE - free)
        now, dropped, freed = clock(self.folder), [], 0
        for entry in entries:
            if freed < excess and now - entry.used > KEPT:
                dropped.append(entry)
                freed += entry.bytes
        if held + size - freed > self.limit:
            raise NoRoom(
                f"{what} takes {format_size(size)}, but of the {format_size(self.limit)} that the image cache {self.folder} "
                f"may take, {format_size(held - freed)} are in use: give it more with --cache_gb, or remove what nobody "
                f"needs with python -m domainbed_ext.cache remove"
            )
        if freed < excess:
            raise NoRoom(
                f"{what} takes {format_size(size)}, but the disk of the image cache {self.folder} has only "
                f"{format_size(free)} free, of which {format_size(SPARE)} stay so: make room, or give --cache_dir another disk"
            )
        for entry in dropped:
            self.remove(entry.key)

    def _workshops(self) -> Sequence[Path]:
        try:
            return list((self.folder / _UNFINISHED).iterdir())
        except FileNotFoundError:
            return []
