"""Which file of the unpacked archives goes where, as DomainBed lays data sets out.

A plan is a list of (file, its place below the data set's folder). Making a plan writes nothing; following it makes hard
links, or copies where there can be none, so the sources stay whole and can be used again.
"""

import gzip
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from domainbed_ext.datasets.listing import is_hidden, is_image
from domainbed_ext.errors import BenchmarkError

Plan = list[tuple[Path, str]]


@dataclass(frozen=True)
class Root:
    """Where to look for files.

    Attributes:
        name: Name of the archive or folder, as the user knows it.
        path: Folder that it was unpacked to, or itself if it is a folder or a single file.
    """

    name: str
    path: Path

    def walk(self) -> Iterator[tuple[Path, list[str], list[str]]]:
        """Yields every folder with its folders and files, sorted, none hidden; of a single file, its folder with it."""
        if self.path.is_file():
            yield self.path.parent, [], [self.path.name]
            return
        for folder, folders, files in os.walk(self.path):
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            yield Path(folder), list(folders), sorted(name for name in files if not is_hidden(name))


def find_files(roots: Sequence[Root], names: Sequence[str]) -> dict[str, Path]:
    """Finds the first file of each name.

    Args:
        roots: Where to look.
        names: Names of the files.

    Returns:
        The files by name, of those that exist.
    """
    wanted = set(names)
    files: dict[str, Path] = {}
    for root in roots:
        for folder, _, names_here in root.walk():
            for name in wanted.intersection(names_here):
                files.setdefault(name, folder / name)
    return files


def find_domain_folders(dataset: str, roots: Sequence[Root], domains: Sequence[str]) -> dict[str, Path]:
    """Finds the folder of each domain, however deep it lies and whatever is around it.

    A domain's folder has its name (case, spaces and underscores do not matter) and holds folders of images. An archive
    or folder given by the user may be the domain itself, if it has the domain's name.

    Args:
        dataset: Name of the data set, for the error.
        roots: Where to look.
        domains: Names of the domains.

    Returns:
        The folders by domain.

    Raises:
        BenchmarkError: A domain is missing, or there in two places.
    """
    wanted = {_plain(domain): domain for domain in domains}
    candidates: dict[str, list[Path]] = {domain: [] for domain in domains}
    for root in roots:
        for folder, folders, _ in root.walk():
            name = re.split(r"\.(?:zip|tar|tgz)\b", root.name)[0] if folder == root.path else folder.name
            domain = wanted.get(_plain(name))
            if domain and any(list_images(folder / child) for child in folders):
                candidates[domain].append(folder)
    missing = [domain for domain, places in candidates.items() if not places]
    if missing:
        names = ", ".join(root.name for root in roots) or "nothing"
        raise BenchmarkError(
            f"{dataset}: no folder {', '.join(missing)} with folders of images in {names}: "
            f"give the archive that holds {'it' if len(missing) == 1 else 'them'} by --archive, too"
        )
    for domain, places in candidates.items():
        if len(places) > 1:
            raise BenchmarkError(
                f"{dataset}: {domain} is there twice, as {places[0]} and {places[1]}: give only the right one by "
                "--archive"
            )
    return {domain: places[0] for domain, places in candidates.items()}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def list_images(folder: Path) -> list[str]:
    """Lists the names of a folder's image files, sorted, without hidden ones.

    Args:
        folder: The folder.
    """
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if is_image(entry.name) and not is_hidden(entry.name) and entry.is_file()
    )


def plan_folders(dataset: str, roots: Sequence[Root], domains: Sequence[str]) -> Plan:
    """Plans the images of every domain and class: `<domain>/<class>/<image>`. Other files are left out.

    Args:
        dataset: Name of the data set, for the error.
        roots: Where to look.
        domains: Names of the domains.
    """
    plan = []
    for domain, folder in find_domain_folders(dataset, roots, domains).items():
        for child in sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)):
            plan += [(child / name, f"{domain}/{child.name}/{name}") for name in list_images(child)]
    return plan


def plan_mnist(roots: Sequence[Root], archives: Sequence[str]) -> Plan:
    """Plans MNIST's four files, `raw/<name>`, from their .gz files if need be.

    Args:
        roots: Where to look.
        archives: Names of the four .gz files.

    Raises:
        BenchmarkError: One is missing.
    """
    plan, missing = [], []
    for packed in archives:
        name = packed.removesuffix(".gz")
        files = find_files(roots, [name, packed])
        if not files:
            missing.append(packed)
        plan += [(files[key], f"raw/{name}") for key in (name, packed) if key in files][:1]
    if missing:
        raise BenchmarkError(f"MNIST: no {', '.join(missing)} in the archives: give them by --archive, too")
    return plan


def follow(plan: Plan, folder: Path, advance: Callable[[], None]) -> None:
    """Puts files in their places.

    Args:
        plan: Files and their places.
        folder: Folder of the data set; an old one is removed.
        advance: Callback for each file.

    Raises:
        BenchmarkError: A packed file is broken.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    parents: set[Path] = set()
    for source, place in plan:
        target = folder / place
        if target.parent not in parents:
            target.parent.mkdir(parents=True, exist_ok=True)
            parents.add(target.parent)
        if source.suffix == ".gz":
            _gunzip(source, target)
        else:
            _link(source, target)
        advance()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(os.path.realpath(source) if source.is_symlink() else source, target)
    except OSError:  # another disk, no such thing as a hard link there, or not this user's file
        shutil.copyfile(source, target)


def _gunzip(source: Path, target: Path) -> None:
    try:
        with gzip.open(source) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file)
    except (EOFError, gzip.BadGzipFile) as error:
        raise BenchmarkError(f"{source} is a broken archive ({error}): download it again") from error
