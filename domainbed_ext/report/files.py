"""Writing the files of a report."""

from collections.abc import Mapping
from pathlib import Path

from domainbed_ext.errors import not_writable
from domainbed_ext.system.files import write_atomically


def encode(document: str) -> bytes:
    """Encodes as UTF-8, whatever bytes a path in the document has.

    Args:
        document: Text.
    """
    return document.encode("utf-8", "replace")


def write_files(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Writes files so that a reader sees each either as it was or complete.

    Args:
        folder: Folder of the files, which is made if it is missing.
        contents: Contents by name.

    Returns:
        Paths of the files.

    Raises:
        BenchmarkError: The folder cannot be written.
    """
    paths = [folder / name for name in contents]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, contents.values(), strict=True):
            write_atomically(path, content)
    except OSError as error:
        raise not_writable(folder, error) from error
    return paths
