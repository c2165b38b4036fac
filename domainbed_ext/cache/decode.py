"""From image files to pixels. Processes that decode load only this: PIL and NumPy, but not torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from domainbed_ext.cache import pixels
from domainbed_ext.cache.pixels import Pixels
from domainbed_ext.cache.variants import Variant
from domainbed_ext.datasets.image_files import RULES, UnusableImage, read, size

UNREADABLE = (0, 0)  # in place of a size


@dataclass(frozen=True)
class Part:
    """Images that are decoded together.

    Attributes:
        paths: Paths of the files.
        sizes: (height, width) of each in the cache; no space is reserved for `UNREADABLE`.
        variant: Variant that is cached.
        folder: Folder of the pixels, see `pixels.write`.
        offset: Offset of the first image, see `pixels.write`.
    """

    paths: Sequence[str]
    sizes: NDArray[np.integer]
    variant: Variant
    folder: Path
    offset: int


def decode(part: Part) -> dict[str, str]:
    """Decodes images and writes their pixels.

    Args:
        part: Images, and where their pixels are written.

    Returns:
        Reasons by path, for images that could not be decoded or whose size differs from the expected one.
    """
    bad = {}

    def images() -> Iterator[Pixels]:
        for path, (height, width) in zip(part.paths, part.sizes, strict=True):
            try:
                image = np.asarray(part.variant(read(path)))
                if image.shape != (height, width, 3):
                    bad[path] = "its size when decoded differs from its header"
            except UnusableImage as reason:
                bad[path] = str(reason)
            # A bad image is black, so that the next one is at its offset.
            yield np.zeros((height, width, 3), np.uint8) if path in bad else image

    pixels.write(part.folder, images(), part.offset)
    return bad


def read_sizes(paths: Sequence[str]) -> list[tuple[int, int]]:
    """Reads the (height, width) of images as decoded; `UNREADABLE` for those that cannot be.

    Args:
        paths: Paths of the files.
    """
    sizes = []
    for path in paths:
        try:
            sizes.append(size(path))
        except UnusableImage:
            sizes.append(UNREADABLE)
    return sizes


def describe_decoder() -> str:
    """Describes what the pixels of a file depend on: this package's rules, and versions of the decoders."""
    codecs = ("jpg", "libjpeg_turbo", "webp", "littlecms2")
    return " ".join([f"rules {RULES}", PIL.__version__, *(str(features.version(name)) for name in codecs)])
