"""Lists the images of a folder as torchvision's `ImageFolder` does, in the same order, but without hidden files and
those of operating systems."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from domainbed_ext.errors import BenchmarkError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
_PREFIXES = (".", "__MACOSX", "@eaDir")
_SYSTEM = {  # folders that operating systems and network storage create beside the user's files
    *("$recycle.bin", "system volume information", "lost+found"),
    *("#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "~snapshot"),
}

_OTHER_ENDINGS = (
    ".gif",
    ".jfif",
    ".jpe",
    ".heic",
    ".heif",
    ".avif",
    ".jp2",
    ".tga",
    ".svg",
)  # unsupported image formats, which are ignored with a warning


@dataclass(frozen=True)
class Listing:
    """The images of a folder of classes.

    Attributes:
        classes: Names of the class folders, sorted.
        files: Paths of the images, class by class.
        targets: Labels of the images.
        hidden: Paths of what was ignored because of its name.
        unused: Paths of images that were ignored since they lie beside the class folders, or have another ending.
    """

    classes: list[str]
    files: list[str]
    targets: list[int]
    hidden: list[str]
    unused: list[str]


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or an operating system's own."""
    return name.startswith(_PREFIXES) or name.lower() in _SYSTEM


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's does."""
    return name.lower().endswith(IMAGE_ENDINGS)


def split_folders(folder: Path) -> tuple[list[str], list[str]]:
    """The folders in a folder.

    Args:
        folder: Folder that is searched.

    Returns:
        Names of the folders that are not hidden, sorted, and paths of the hidden ones.

    Raises:
        BenchmarkError: The folder cannot be read.
    """
    names = [entry.name for entry in _scan(str(folder)) if entry.is_dir()]
    hidden = [os.path.join(folder, name) for name in sorted(filter(is_hidden, names))]
    return sorted(name for name in names if not is_hidden(name)), hidden


def list_images(folder: Path) -> Listing:
    """Lists the images in the class folders of a folder.

    Args:
        folder: Folder of a domain.

    Raises:
        BenchmarkError: A folder cannot be read, or it contains a link to a folder above it.
    """
    classes, hidden = split_folders(folder)
    unused = [entry.path for entry in _scan(str(folder)) if _is_image_file(entry) and not is_hidden(entry.name)]
    files: list[str] = []
    targets: list[int] = []
    for label, name in enumerate(classes):
        # Torchvision sorts folders by their whole path, and files within each.
        for _, names in sorted(_walk(os.path.join(folder, name), hidden, unused)):
            files += names
            targets += [label] * len(names)
    return Listing(classes, files, targets, hidden, unused)


def list_images_below(folder: str) -> tuple[list[str], list[str]]:
    """Lists the images in a folder at any depth, sorted by folder and name.

    Args:
        folder: Folder that is searched; what is hidden in it is left out.

    Returns:
        Paths of the images, and of images that have another ending.

    Raises:
        BenchmarkError: A folder cannot be read, or it contains a link to a folder above it.
    """
    unused: list[str] = []
    return [file for _, files in sorted(_walk(folder, [], unused)) for file in files], unused


def count_images(path: str) -> int:
    """Counts the images in a folder, at any depth; 1 for a file.

    Args:
        path: Folder or file.
    """
    if not os.path.isdir(path):
        return 1
    return sum(is_image(name) for _, _, names in os.walk(path) for name in names)


def _walk(
    folder: str, hidden: list[str], unused: list[str], above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, list[str]]]:
    """A folder and those below it, each with its images; adds to `hidden` and `unused` what is ignored."""
    status = os.stat(folder)
    here = above | {(status.st_dev, status.st_ino)}
    if here == above:
        raise BenchmarkError(f"{folder} is a link to a folder above it: remove it")
    images: list[str] = []
    for entry in sorted(_scan(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            if is_hidden(entry.name):
                hidden.append(entry.path)
            else:
                yield from _walk(entry.path, hidden, unused, here)
        elif _is_image_file(entry):
            (hidden if is_hidden(entry.name) else images).append(entry.path)
        elif entry.name.lower().endswith(_OTHER_ENDINGS) and not is_hidden(entry.name):
            unused.append(entry.path)
    yield folder, images


def _is_image_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is an image file; dead links count, and are reported with all other files that cannot be read."""
    return is_image(entry.name) and (entry.is_file() or entry.is_symlink())


def _scan(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise BenchmarkError(f"cannot read the folder {folder} ({error.strerror}): ask its owner for access") from error
