"""The cached images of environments: opened, or decoded if this is the first time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from domainbed_ext.cache import decode, fingerprint, pixels
from domainbed_ext.cache.entries import Entries
from domainbed_ext.cache.pixels import Damaged, Stored
from domainbed_ext.cache.variants import Variant
from domainbed_ext.datasets.image_files import unreadable
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.system.processes import Map, several
from domainbed_ext.system.progress import Bar, bar

if TYPE_CHECKING:  # only for types
    from domainbed_ext.datasets.folders import FileEnvironment

_PART = 64  # images that are decoded together

Advance = Callable[[int], object]
"""Takes a number of images that are done; may raise, which ends the work."""


class _BadImages(Exception):  # noqa: N818
    """Files that do not decode, with the reasons."""

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = reasons


def open_cached(
    dataset: str,
    environments: Sequence[FileEnvironment],
    variant: Variant,
    entries: Entries,
    processes: int = 1,
    progress: Advance | None = None,
) -> list[Stored]:
    """Opens the images of environments, and decodes those that are not in the cache. Copies of a data set share them.

    Args:
        dataset: Name of the data set, for people; images are identified by their content.
        environments: Environments of the data set.
        variant: Size at which they are kept.
        entries: Entries of the cache.
        processes: Number of processes that decode; 0 and 1 are this one. The pixels are the same.
        progress: Callback that takes a number of images that are done, until all are, and 0 while another process
            decodes them; may raise, which leaves nothing unfinished.

    Returns:
        The images of each environment, in its order: with `Decoded`, image i is equal to `environment.load(i)`.

    Raises:
        BenchmarkError: Images of some environments cannot be decoded; all such images are counted. Of these
            environments nothing is kept; the others are.
        NoRoom: They cannot be kept; decode them at each use, or make room.
    """
    opened: list[Stored] = []
    bad: dict[str, str] = {}
    tell = progress or (lambda count: None)
    with bar(f"decoding {dataset}, {variant.name}", sum(map(len, environments)), "images") as shown:
        for environment in environments:
            try:
                opened.append(_open(environment, variant, entries, dataset, processes, tell, shown))
            except _BadImages as error:
                bad |= error.reasons
    if bad:
        raise unreadable(bad)
    return opened


def _open(
    environment: FileEnvironment,
    variant: Variant,
    entries: Entries,
    dataset: str,
    processes: int,
    progress: Advance,
    shown: Bar,
) -> Stored:
    digest = _digest(environment, entries)
    key = f"{dataset}/{environment.name.replace('/', '_')}-{digest[:12]}-{variant.name}"
    what = f"{dataset}/{environment.name}, {variant.name}"
    done = 0

    def decode_all() -> Path:
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
                raise BenchmarkError(
                    f"images of {environment.name} changed while they were decoded: run the same command again"
                )
            if bad:
                raise _BadImages(bad)

        with several(processes) as run:
            sizes = _find_sizes(environment.paths, variant, run)
            return entries.get(key, pixels.count_bytes(sizes), build, what, waiting=lambda: progress(0))

    try:
        stored = Stored(entries.find(key) or decode_all())
    except Damaged:  # or removed by another process at this moment
        with suppress(OSError):  # if it cannot be removed, it is found damaged again, and that error is shown
            entries.remove(key)
        stored = Stored(decode_all())
    progress(len(environment) - done)
    shown.leave_out(len(environment) - done)
    return stored


def _digest(environment: FileEnvironment, entries: Entries) -> str:
    """Computes the digest of what the pixels depend on: the files, and the decoders."""
    text = f"{fingerprint.digest(environment.paths, entries.folder)} {decode.describe_decoder()}"
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def _find_sizes(paths: Sequence[str], variant: Variant, run: Map) -> np.ndarray:
    """Finds the (height, width) at which each image is kept: [images, 2]."""
    if variant.fixed:
        return np.tile(variant.fixed, (len(paths), 1))
    parts = [paths[i : i + _PART] for i in range(0, len(paths), _PART)]
    decoded = [size for sizes in run(decode.read_sizes, parts) for size in sizes]
    return np.array([size if size == decode.UNREADABLE else variant.size(*size) for size in decoded])
