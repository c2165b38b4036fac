"""From image files to pixels. All that the processes that decode load: PIL and NumPy, but not torch."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, features

from domainbed_ext.cache import pixels
from domainbed_ext.cache.pixels import Pixels
from domainbed_ext.cache.variants import Variant
from domainbed_ext.errors import BenchmarkError

UNREADABLE = (0, 0)  # in place of a size

_TELL_SIZE = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF")  # a TIFF, say, may be turned when it is decoded

Map = Callable[[Callable[..., Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Part:
    """Images that are decoded together.

    Attributes:
        paths: of the files.
        sizes: (height, width) at which each is kept; `UNREADABLE` leaves it no room.
        variant: that is kept.
        folder: see `pixels.write`.
        offset: see `pixels.write`.
    """

    paths: Sequence[str]
    sizes: NDArray[np.integer]
    variant: Variant
    folder: Path
    offset: int


def decode(part: Part) -> list[str]:
    """Decodes images and writes their pixels.

    Args:
        part: which, and where to.

    Returns:
        The paths of all that could not be decoded to the size they should have.
    """
    bad = []

    def images() -> Iterator[Pixels]:
        for path, (height, width) in zip(part.paths, part.sizes, strict=True):
            image = _load(path, part.variant)
            if image is None or image.shape != (height, width, 3):
                bad.append(path)
                image = np.zeros((height, width, 3), np.uint8)  # so that the next one is where it should be
            yield image

    pixels.write(part.folder, images(), part.offset)
    return bad


def _load(path: str, variant: Variant) -> Pixels | None:
    """An image as `FileEnvironment.load` decodes it, in the size to be kept; None if it is broken."""
    try:
        with Image.open(path) as image:
            return np.asarray(variant(image.convert("RGB")))
    except MemoryError:
        raise
    except Exception:  # whatever PIL raises, which depends on the format and on how it is broken
        return None


def sizes(paths: Sequence[str]) -> list[tuple[int, int]]:
    """(height, width) of images as decoded, from the files' headers; `UNREADABLE` for those without one.

    Args:
        paths: of the files.
    """
    found = []
    for path in paths:
        try:
            with Image.open(path) as image:
                if image.format not in _TELL_SIZE:
                    image.load()
                found.append((image.height, image.width))
        except MemoryError:
            raise
        except Exception:
            found.append(UNREADABLE)
    return found


def decoder() -> str:
    """Versions of what the decoded pixels depend on."""
    return " ".join([PIL.__version__, *(str(features.version(name)) for name in ("jpg", "libjpeg_turbo", "webp"))])


@contextlib.contextmanager
def several(processes: int) -> Iterator[Map]:
    """Some processes.

    Args:
        processes: how many; fewer than 2 are this one.

    Yields:
        `map`, done by them.

    Raises:
        BenchmarkError: one of them was killed.
    """
    if processes < 2:
        yield map
        return
    # Spawned rather than forked, for this process has threads.
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_leave_with_parent) as pool:
        try:
            yield pool.map
        except BrokenProcessPool as error:
            raise BenchmarkError(
                "a process that decodes images was killed, most likely for memory: use fewer of them"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _leave_with_parent() -> None:
    """A process whose parent is killed would wait for work for ever."""
    parent = parent_process()
    assert parent

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
