"""Tensors in files that the umask says who may read, as any other file."""

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, which safetensors itself lets nobody but the owner read.

    Args:
        tensors: Tensors by name, contiguous, none in the memory of another.
        path: The file.
        metadata: Text by name, for the file's header.

    Raises:
        OSError: It cannot be written.
        SafetensorError: Likewise.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(mode)
