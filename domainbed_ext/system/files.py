"""Writes files and folders atomically: they are there whole or not at all, also after a power cut."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file; a process that reads it meanwhile sees the old one or the new one.

    Args:
        path: Path of the file.
        content: Content of the file; text is written as UTF-8, and surrogate escapes as the bytes that they stand for.

    Raises:
        OSError: It cannot be written; what was there stays.
    """
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    replace_atomically(path, lambda partial: partial.write_bytes(data))


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file or a folder by what `write` makes.

    Between an old folder and the new one there is none for a moment.

    Args:
        path: Path of the file or folder.
        write: Callback that makes it at the path that it is given.

    Raises:
        OSError: It cannot be written; what was there stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    remove(partial)
    try:
        write(partial)
        for file in [partial, *partial.rglob("*")] if partial.is_dir() else [partial]:
            _flush(file)
        if path.is_dir():
            remove(path)
        partial.replace(path)
    except BaseException:
        remove(partial)
        raise
    _flush(path.parent)


def remove(path: Path) -> None:
    """Removes a file or a folder, if there is one.

    Args:
        path: Path of the file or folder.
    """
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a system that does not open folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
