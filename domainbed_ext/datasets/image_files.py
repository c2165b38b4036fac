"""From an image file to an RGB image. All code that reads images uses this. Loads PIL and NumPy, but not torch.

docs/benchmark.md lists what becomes of each kind of image.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from domainbed_ext.errors import BenchmarkError

RULES = 2
"""Counts up whenever the pixels of any file change, so that what was cached before is decoded again."""

_TELL_SIZE = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "PPM", "GIF")  # headers of other formats may have another size
_PNG_MARKS = b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp"  # one of them is in every PNG that has an orientation

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
_QUARTER_TURNS = (5, 6, 7, 8)

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


class UnusableImage(Exception):  # noqa: N818  (the caller names the file, and makes an error of it)
    """An image file that cannot be read; the message is the reason, without the file's name."""


def read(path: str) -> Image.Image:
    """Decodes an image file.

    Args:
        path: The file.

    Returns:
        Its first frame or page, upright, in RGB.

    Raises:
        UnusableImage: It is broken, or of a kind whose brightest value is unknown.
        BenchmarkError: There is not enough memory for it.
    """
    with _opened(path) as image:
        image.load()
        turn = _TURNS.get(_orientation(image))
        rgb = _grey(image).convert("RGB") if _is_deep(image) else image.convert("RGB")
        return rgb if turn is None else rgb.transpose(turn)


def size(path: str) -> tuple[int, int]:
    """The (height, width) of an image as `read` returns it, from the file's header where that tells it.

    Args:
        path: The file.

    Raises:
        UnusableImage: See `read`.
        BenchmarkError: See `read`.
    """
    with _opened(path) as image:
        if image.format not in _TELL_SIZE:
            image.load()
        # Pillow decodes a whole PNG to look for EXIF data behind its pixels.
        turned = (image.format != "PNG" or _has_png_marks(image.fp)) and _orientation(image) in _QUARTER_TURNS
        return (image.width, image.height) if turned else (image.height, image.width)


def check(path: str) -> None:
    """Looks for damage, as far as that shows without decoding an image of 8 bits.

    Args:
        path: The file.

    Raises:
        UnusableImage: See `read`.
        BenchmarkError: See `read`.
    """
    with _opened(path) as image:
        deep = _is_deep(image)
        image.verify()
    if deep:
        read(path)


def unreadable(reasons: dict[str, str]) -> BenchmarkError:
    """The error for image files that cannot be read, so that all of them can be fixed in one go.

    Args:
        reasons: By path, why.

    Returns:
        The error, to be raised by the caller: all files, and an example of each reason.
    """
    examples: dict[str, str] = {}
    for path, reason in reasons.items():
        examples.setdefault(reason, os.path.basename(path))
    listed = "; ".join(f"{name}: {reason}" for reason, name in examples.items())
    return BenchmarkError(f"not a readable image: {', '.join(reasons)}; replace or delete such files ({listed})")


@contextmanager
def _opened(path: str) -> Iterator[ImageFile.ImageFile]:
    """An image before it is decoded. Whatever Pillow raises while the context lasts becomes an `UnusableImage`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, about alpha, odd EXIF data and large images
            # Not by its path: Pillow would map an uncompressed TIFF into memory, and garble it if it is turned.
            with open(path, "rb") as file, Image.open(file) as image:
                yield image
    except UnusableImage:
        raise
    except MemoryError as error:
        raise BenchmarkError(
            f"not enough memory to decode {path}: scale it down, or let fewer processes decode (--workers)"
        ) from error
    except Exception as error:  # what Pillow raises depends on the format, and on how the file is broken
        raise UnusableImage(_reason(path, error)) from error


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"more than the {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels that Pillow decodes: scale it down"
    if isinstance(error, UnidentifiedImageError):
        return "of no kind that Pillow reads" if os.path.getsize(path) else "an empty file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def _has_png_marks(file: IO[bytes] | None) -> bool:
    assert file is not None
    place = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(place)
    return any(mark in content for mark in _PNG_MARKS)


def _orientation(image: Image.Image) -> int:
    """By EXIF; 1, upright, if it says none, also where Pillow has turned the image already, as it does with TIFF."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken EXIF data are no reason to refuse an image
        return 1
    return orientation if isinstance(orientation, int) else 1


def _is_deep(image: Image.Image) -> bool:
    """Whether its values are no bytes: 16 or 32 bits, whole numbers or floating-point ones, always grey."""
    return image.mode == "F" or image.mode.startswith("I")


def _grey(image: Image.Image) -> Image.Image:
    """The image with a byte for each value: the format's range becomes that from 0 to 255."""
    values = np.asarray(image)
    if image.mode == "F":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # also where one is NaN
            raise UnusableImage(
                f"floating-point values from {low:g} to {high:g}, of which only those from 0 to 1 have a known range: "
                "save it with 8 or 16 bits"
            )
        grey = np.rint(255 * values)
    else:
        most = _largest(image)
        grey = (255 * values.astype(np.int64) + most // 2) // most
    if _tag(image, _PHOTOMETRIC, None) == _WHITE_IS_ZERO:  # Pillow inverts such images with 8 bits and no others
        grey = 255 - grey
    return Image.fromarray(grey.astype(np.uint8))


def _largest(image: Image.Image) -> int:
    """The largest whole number that the format of an image can hold."""
    bits = 16
    if image.format == "TIFF":
        bits = int(_tag(image, _BITS_PER_SAMPLE, (1,))[0])
        if _tag(image, _SAMPLE_FORMAT, (_UNSIGNED,))[0] != _UNSIGNED:
            raise UnusableImage(
                f"signed {bits}-bit numbers, whose range is unknown: save it with 8 or 16 bits, unsigned"
            )
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # which have 16 bits at most
        bits = 32
    if bits > 16:
        raise UnusableImage(f"{bits}-bit numbers, whose range is hardly ever used: save it with 8 or 16 bits")
    return 2**bits - 1


def _tag(image: Image.Image, number: int, default: Any) -> Any:
    return getattr(image, "tag_v2", {}).get(number, default)
