"""An environment's images as they are kept: opened, or made if this is the first time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from domainbed_ext.cache import decode, pixels
from domainbed_ext.cache import fingerprint as content
from domainbed_ext.cache.entries import Entries
from domainbed_ext.cache.pixels import Damaged, Stored
from domainbed_ext.cache.variants import Variant
from domainbed_ext.datasets.image_files import unreadable
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.system.processes import Map, several
from domainbed_ext.system.progress import Bar, bar

if TYPE_CHECKING:  # it brings torch with it
    from domainbed_ext.datasets.folders import FileEnvironment

_PART = 64  # images that are decoded together

Progress = Callable[[int], object]


class _BadImages(Exception):  # noqa: N818
    """Files that do not decode, each with the reason."""

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = reasons


def cached(
    environment: FileEnvironment,
    variant: Variant,
    entries: Entries,
    dataset: str,
    processes: int = 1,
    progress: Progress | None = None,
) -> Stored:
    """The images of an environment, see `cached_all`."""
    return cached_all(dataset, [environment], variant, entries, processes, progress)[0]


def cached_all(
    dataset: str,
    environments: Sequence[FileEnvironment],
    variant: Variant,
    entries: Entries,
    processes: int = 1,
    progress: Progress | None = None,
) -> list[Stored]:
    """The images of environments, decoded now if they were not before. Copies of a data set share them.

    Args:
        dataset: its name, for people; images are told apart by their content.
        environments: of the data set.
        variant: at which size they are kept.
        entries: of the cache.
        processes: that decode; 0 and 1 are this one. The pixels are the same.
        progress: called with a number of images that are done, until all are, and with 0 while another process makes
            them; may raise, which leaves nothing half made.

    Returns:
        For each environment its images, in its order: with `Decoded`, image i is equal to `environment.load(i)`.

    Raises:
        BenchmarkError: images of any of the environments cannot be decoded; all of them are counted. The other
            environments are kept, and nothing of theirs.
        NoRoom: they cannot be kept; decode them at each use, or make room.
    """
    found: list[Stored] = []
    bad: dict[str, str] = {}
    tell = progress or (lambda count: None)
    with bar(f"decoding {dataset}, {variant.name}", sum(map(len, environments)), "images") as shown:
        for environment in environments:
            try:
                found.append(_stored(environment, variant, entries, dataset, processes, tell, shown))
            except _BadImages as error:
                bad |= error.reasons
    if bad:
        raise unreadable(bad)
    return found


def _stored(
    environment: FileEnvironment,
    variant: Variant,
    entries: Entries,
    dataset: str,
    processes: int,
    progress: Progress,
    shown: Bar,
) -> Stored:
    digest = _digest(environment, entries)
    key = f"{dataset}/{environment.name.replace('/', '_')}-{digest[:12]}-{variant.name}"
    what = f"{dataset}/{environment.name}, {variant.name}"
    done = 0

    def make() -> Path:
        def build(folder: Path) -> None:
            nonlocal done
            offsets = pixels.allocate(folder, sizes)
            parts = [
                decode.Part(environment.paths[i : i + _PART], sizes[i : i + _PART], variant, folder, int(offsets[i]))
                for i in range(0, len(environment), _PART)
            ]
            bad: dict[str, str] = {}
            for part, broken in zip(parts, run(decode.decode, parts), strict=True):
                bad |= broken
                done += len(part.paths)
                progress(len(part.paths))
                shown.advance(len(part.paths))
            if _digest(environment, entries) != digest:
                raise BenchmarkError(f"images of {environment.name} changed while they were decoded: start again")
            if bad:
                raise _BadImages(bad)

        with several(processes) as run:
            sizes = _sizes(environment.paths, variant, run)
            return entries.get(key, pixels.needed(sizes), build, what, waiting=lambda: progress(0))

    try:
        stored = Stored(entries.find(key) or make())
    except Damaged:  # or removed by another process this very moment
        with suppress(OSError):  # if it cannot be removed, it is found damaged again, and that is what is said
            entries.remove(key)
        stored = Stored(make())
    progress(len(environment) - done)
    shown.leave_out(len(environment) - done)
    return stored


def _digest(environment: FileEnvironment, entries: Entries) -> str:
    """Of what the pixels follow from: the files, and what decodes them."""
    told = f"{content.digest(environment.paths, entries.folder)} {decode.decoder()}"
    return hashlib.blake2b(told.encode("utf-8"), digest_size=16).hexdigest()


def _sizes(paths: Sequence[str], variant: Variant, run: Map) -> np.ndarray:
    """(height, width) at which each image is kept: [images, 2]."""
    if variant.fixed:
        return np.tile(variant.fixed, (len(paths), 1))
    parts = [paths[i : i + _PART] for i in range(0, len(paths), _PART)]
    found = [size for sizes in run(decode.sizes, parts) for size in sizes]
    return np.array([size if size == decode.UNREADABLE else variant.size(*size) for size in found])
