"""A data set's archives, downloaded or given by the user, unpacked and laid out.

Everything happens in `<data_dir>/.prepare-<NAME>`, on the disk of the data set's folder, which it becomes at last by
one renaming. What is finished there (a download, an unpacked archive) is not done again by a second start.
"""

import contextlib
import hashlib
import shlex
import shutil
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domainbed_ext.datasets.folders import ImageFolderDomains
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.prepare import domain_net
from domainbed_ext.prepare import terra_incognita as cct20
from domainbed_ext.prepare.archives import is_archive, unpack
from domainbed_ext.prepare.downloads import DOWNLOADS, Download
from domainbed_ext.prepare.fetch import DownloadError, compute_digest, download
from domainbed_ext.prepare.layout import Plan, Root, folder_plan, follow, mnist_plan
from domainbed_ext.system import strict_json
from domainbed_ext.system.files import write_atomically
from domainbed_ext.system.progress import BYTES, bar

_PLAIN = (".txt", ".json", "-ubyte", "-ubyte.gz")  # endings of files that are used as they are


class Place:
    """Where a data set is, and where it is made.

    Args:
        name: of the data set.
        data_dir: the folder that holds data sets.
    """

    def __init__(self, name: str, data_dir: Path) -> None:
        self.name = name
        self.data_dir = data_dir
        self.target = data_dir / ("MNIST" if name == "MNIST" else _class(name).FOLDER)
        self.staging = data_dir / f".prepare-{name}"
        self.downloads = self.staging / "downloads"

    def ready(self) -> bool:
        """Whether the data set's folder has all its parts."""
        if self.name == "MNIST":
            parts = [Path("raw") / source.name.removesuffix(".gz") for source in DOWNLOADS["MNIST"]]
        else:
            parts = [Path(domain) for domain in _class(self.name).DOMAINS] or [Path()]
        return all((self.target / part).exists() for part in parts)


def _class(name: str) -> type[ImageFolderDomains]:
    dataset = DATASETS[name]
    assert issubclass(dataset, ImageFolderDomains)
    return dataset


def to_fetch(place: Place, given: Sequence[Path]) -> list[Download]:
    """What is to be downloaded.

    Args:
        place: of the data set.
        given: the user's archives and folders. One with the name of a source stands in for it; any other is taken
            to be the whole data set.

    Returns:
        The sources that are neither given nor downloaded already.
    """
    if not _all_named(place.name, given):
        return []
    names = {path.name for path in given}
    missing = [source for source in DOWNLOADS[place.name] if source.name not in names]
    return [source for source in missing if not (place.downloads / source.name).exists()]


def expand(name: str, archives: Sequence[str]) -> list[Path]:
    """The user's archives; a folder of a data set's archives counts as those.

    Args:
        name: of the data set.
        archives: as given.

    Raises:
        BenchmarkError: there is no such file.
    """
    names = {source.name for source in DOWNLOADS[name]}
    given = []
    for archive in archives:
        path = Path(archive).expanduser()
        if not path.exists():
            raise BenchmarkError(f"no file or folder {path}: give --archive what you have of {name}")
        inside = sorted(child for child in path.iterdir() if child.name in names) if path.is_dir() else []
        given += [child for child in inside if child.is_file()] or [path]
    return given


def lay_out(place: Place, given: Sequence[Path]) -> None:
    """Makes a data set's folder.

    Args:
        place: of the data set.
        given: the user's archives and folders.

    Raises:
        BenchmarkError: something cannot be downloaded, is broken, or is missing; says what to do.
        OSError: the disk is full, or not writable.
    """
    _fetch(place, to_fetch(place, given), given)
    names = {path.name for path in given}
    fetched = [place.downloads / source.name for source in DOWNLOADS[place.name] if source.name not in names]
    files = [*given, *(path for path in fetched if path.exists() and _all_named(place.name, given))]
    roots = [_unpacked(place, path) for path in files]
    plan = _plan(place.name, roots)
    layout = place.staging / "layout"
    with bar("laying out", len(plan), "files") as shown:
        follow(plan, layout, shown.advance)
    record = {"dataset": place.name, "sources": [_describe(path) for path in files]}
    write_atomically(layout / "prepared.json", strict_json.dumps(record, indent=2) + "\n")
    if place.target.is_dir() and not any(place.target.iterdir()):
        place.target.rmdir()
    layout.rename(place.target)


def _all_named(name: str, given: Sequence[Path]) -> bool:
    return {path.name for path in given} <= {source.name for source in DOWNLOADS[name]}


def _fetch(place: Place, sources: Sequence[Download], given: Sequence[Path]) -> None:
    failed: dict[Download, str] = {}
    dead: dict[str, str] = {}  # host to why
    place.downloads.mkdir(parents=True, exist_ok=True)
    for source in sources:
        hosts = {urllib.parse.urlsplit(url).netloc for url in source.urls}
        if hosts <= dead.keys():
            failed[source] = dead[min(hosts)]
            continue
        try:
            with bar(source.name, unit=BYTES) as shown:
                download(source, place.downloads / source.name, shown.follow)
        except DownloadError as error:
            failed[source] = str(error)
            if error.unreachable:
                dead.update(dict.fromkeys(hosts, str(error)))
    if failed:
        for folder in (place.downloads, place.staging):
            with contextlib.suppress(OSError):  # holds something to go on from
                folder.rmdir()
        raise BenchmarkError(_what_to_get(place, failed, given))


def _what_to_get(place: Place, failed: dict[Download, str], given: Sequence[Path]) -> str:
    by_place: dict[str, list[str]] = {}
    for source in failed:
        where = source.where if source.page else source.where.removesuffix(source.name)
        by_place.setdefault(where, []).append(source.name)
    get = ", ".join(f"{' '.join(names)} from {where}" for where, names in by_place.items())
    archives = [*(str(path) for path in given), *(source.name for source in failed)]
    command = ["python", "-m", "domainbed_ext.prepare", place.name, "--data_dir", str(place.data_dir), "--archive"]
    reasons = "; ".join(dict.fromkeys(failed.values()))
    return f"cannot download ({reasons}): get {get} and go on with: {shlex.join(command + archives)}"


def _unpacked(place: Place, path: Path) -> Root:
    if path.is_dir() or (path.name.endswith(_PLAIN) and not is_archive(path)):
        return Root(path.resolve().name, path)
    # What was unpacked is this archive's only as long as it is the same file.
    state = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = place.staging / "unpacked" / key
    if not folder.exists():
        with bar(f"unpacking {path.name}", unit="files") as shown:
            unpack(path, folder, shown.advance)
    return Root(path.name, folder)


def _plan(name: str, roots: Sequence[Root]) -> Plan:
    if name == "MNIST":
        return mnist_plan(roots, [source.name for source in DOWNLOADS[name]])
    domains = _class(name).DOMAINS
    if name == "TerraIncognita" and cct20.has_lists(roots):
        return cct20.plan(roots)
    if name == "DomainNet":
        return domain_net.plan(roots, domains)
    return folder_plan(name, roots, domains)


def _describe(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return {"name": path.resolve().name, "folder": True}
    with path.open("rb") as file:
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": compute_digest(file, "sha256")}


def clean_up(place: Place) -> None:
    """Removes what making the folder needed."""
    shutil.rmtree(place.staging, ignore_errors=True)
