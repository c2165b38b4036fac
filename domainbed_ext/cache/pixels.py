"""The file format of cached images, to be mapped into memory.

`pixels.bin` holds the bytes of the images one after another, row by row, and `index.safetensors` their offsets and
sizes.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from domainbed_ext.errors import BenchmarkError

Pixels = NDArray[np.uint8]
"""An image: uint8 [height, width, 3], RGB."""

_FILE, _INDEX = "pixels.bin", "index.safetensors"


class Damaged(BenchmarkError):  # noqa: N818  (an error by its base)
    """Stored images that are incomplete, or gone."""


def count_bytes(sizes: NDArray[np.integer]) -> int:
    """Counts the bytes that images take on disk, their index included.

    Args:
        sizes: (height, width) of each image, [images, 2].
    """
    return int(_offsets(sizes)[-1]) + 16 * len(sizes) + 1024


def allocate(folder: Path, sizes: NDArray[np.integer]) -> NDArray[np.int64]:
    """Makes a file of the length that images will take, and its index.

    Args:
        folder: Folder of the files.
        sizes: (height, width) of each image, [images, 2].

    Returns:
        Offset of each image in bytes, and the end of the last: [images + 1].
    """
    offsets = _offsets(sizes)
    with (folder / _FILE).open("xb") as file:
        file.truncate(int(offsets[-1]))
    (folder / _INDEX).write_bytes(save({"offsets": offsets, "sizes": sizes.astype(np.int32)}))
    return offsets


def write(folder: Path, images: Iterable[Pixels], offset: int = 0) -> None:
    """Writes images one after another. Several processes may write to different parts of a file at once.

    Args:
        folder: Folder that was allocated for them.
        images: Images of the sizes that it was allocated for.
        offset: Offset of the first image, in bytes.

    Raises:
        OSError: E.g. the disk is full; writing to a memory map would kill the process instead.
    """
    with (folder / _FILE).open("r+b") as file:
        file.seek(offset)
        for image in images:
            file.write(np.ascontiguousarray(image).data)


class Stored(Sequence[Pixels]):
    """Images as read-only views of one memory map. Opening it reads no pixels, and pickling it copies none.

    Args:
        folder: Folder that they were written to.

    Raises:
        Damaged: They are incomplete, or not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _ = self._opened  # so that damage is found at once

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(height, width) of each image: [images, 2]."""
        return self._opened.sizes

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...

    @overload
    def __getitem__(self, index: slice) -> list[Pixels]: ...

    def __getitem__(self, index: int | slice) -> Pixels | list[Pixels]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        start, end = self._opened.offsets[index : index + 2]
        height, width = self.sizes[index]
        return self._opened.pixels[start:end].reshape(height, width, 3)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}  # another process opens the map itself, at its first image

    @cached_property
    def _opened(self) -> "_Opened":
        try:
            index = load_file(self.folder / _INDEX)
            offsets, sizes = index["offsets"], index["sizes"]
            if not len(sizes):
                return _Opened(np.empty(0, np.uint8), offsets, sizes)
            pixels = np.memmap(self.folder / _FILE, np.uint8, mode="r")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise Damaged(f"the images in {self.folder} cannot be read ({error}): {_AGAIN}") from error
        if len(pixels) != offsets[-1]:
            raise Damaged(f"{self.folder / _FILE} has {len(pixels):,} bytes instead of {offsets[-1]:,}: {_AGAIN}")
        return _Opened(np.asarray(pixels), offsets, sizes)  # views of a plain array are faster to make


_AGAIN = "remove them with python -m domainbed_ext.cache remove, and the next run decodes them again"


class _Opened(NamedTuple):
    """The map and its index."""

    pixels: Pixels
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int32]


def _offsets(sizes: NDArray[np.integer]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(3 * sizes.astype(np.int64).prod(1))]).astype(np.int64)
