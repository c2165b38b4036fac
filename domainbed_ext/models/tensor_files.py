"""Safetensors files with the permissions that the umask gives any other file."""

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file. The library itself would make it readable for its owner only.

    Args:
        tensors: Tensors by name, contiguous, none in the memory of another.
        path: The file.
        metadata: Text by name, for the file's header.

    Raises:
        OSError: If it cannot be written.
        SafetensorError: If it cannot be written.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(mode)
