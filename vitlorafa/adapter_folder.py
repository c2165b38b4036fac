"""The folder of an adapter: `adapter.json` beside PEFT's files, or beside `adapter.safetensors`.

PEFT's files are the default, so that whoever gets the folder can load it, with this package or without. Where PEFT
cannot represent an adapter (`vitlorafa.peft_format.obstacle`), or the frozen factor is left out, `adapter.safetensors`
has the tensors. Of PEFT's files, the header of the tensors counts; `adapter.json` then says the same.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vitlorafa import frozen_factor, peft_format, trained
from vitlorafa.errors import AdapterError
from vitlorafa.sites import linear_sites
from vitlorafa.trained import copy_to_cpu
from vitlorafa.wrappers import plain_name

FORMAT = 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"
FORMATS = ("peft", "vitlorafa")
FILES = (peft_format.TENSORS, TENSORS, peft_format.CONFIG, DESCRIPTION)


def encode(
    description: dict[str, Any], tensors: Mapping[str, Tensor], peft_model: nn.Module | None = None
) -> dict[str, bytes]:
    """The files of an adapter.

    Args:
        description: Content of `adapter.json` but for the checksum.
        tensors: Tensors by name.
        peft_model: Adapted model, for PEFT's files; if None, the tensors are in a file of this package.

    Returns:
        File contents by file name, in the order in which to write them.

    Raises:
        AdapterError: If PEFT cannot represent the adapter.
    """
    if peft_model is None:
        name, files = TENSORS, {TENSORS: safetensors.torch.save(copy_to_cpu(tensors))}
    else:
        name, files = peft_format.TENSORS, peft_format.encode(peft_model, description, dict(tensors))
    description = description | {"sha256": hashlib.sha256(files[name]).hexdigest()}  # ties the files together
    return {**files, DESCRIPTION: (json.dumps(description, indent=2, allow_nan=False) + "\n").encode()}


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files of an adapter atomically, and removes those of the other format.

    Args:
        folder: Folder to write to; it is created if missing.
        files: File contents by file name, in the order in which to write them.

    Raises:
        AdapterError: If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if peft_format.CONFIG in files:  # has no checksum: an old one must not describe the new tensors
                (folder / peft_format.CONFIG).unlink(missing_ok=True)
            for name, data in files.items():
                _write(folder / name, data)
            for name in (name for name in FILES if name not in files):
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or str(error)
        raise AdapterError(f"cannot write the adapter to {folder} ({reason}): choose another folder") from error


def read(folder: Path, model: nn.Module | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the folder of an adapter, in either format.

    Args:
        folder: Folder to read.
        model: The timm model that the adapter belongs to, adapted or not; it is not changed. Without it, folders that
            PEFT wrote cannot be read, and names stay as earlier versions wrote them.

    Returns:
        The description, as `save_adapter` writes it, and the tensors by their names within the timm model.

    Raises:
        AdapterError: If files are missing or damaged, or use features of PEFT that an AdapterConfig cannot express.
    """
    if (folder / peft_format.CONFIG).exists():
        if (folder / TENSORS).exists():
            raise AdapterError(f"{folder} has both {TENSORS} and {peft_format.CONFIG}: delete the outdated one")
        return peft_format.read(model, folder)
    description, tensors = frozen_factor.restore(folder, *_read(folder))
    return (description, tensors) if model is None else _rename(model, description, tensors)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to the folder, so that all its files are of one save; not on Windows."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.{get_ident()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        data = (folder / TENSORS).read_bytes()
    except FileNotFoundError as error:
        lacking = f"no {Path(error.filename).name} in it" if folder.is_dir() else "no such folder"
        raise AdapterError(f"cannot read an adapter from {folder}: {lacking}; give a folder of save_adapter") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot read an adapter from {folder}: {error}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise AdapterError(f"{folder / DESCRIPTION} does not have adapter format {FORMAT}")
    missing = [key for key in ("config", "layers", "head", "sha256") if key not in description]
    if missing:
        raise AdapterError(f"{folder / DESCRIPTION} is incomplete: {', '.join(missing)} is missing")
    wrong = [key for key, is_valid in _SHAPES.items() if key in description and not is_valid(description[key])]
    if wrong:
        raise AdapterError(f"{folder / DESCRIPTION} has invalid values for {', '.join(wrong)}: save it again")
    if hashlib.sha256(data).hexdigest() != description["sha256"]:
        raise AdapterError(f"{folder / TENSORS} is damaged, or not from the same save as {DESCRIPTION}: save it again")
    try:
        return description, safetensors.torch.load(data)
    except SafetensorError as error:
        raise AdapterError(f"cannot read {folder / TENSORS}: {error}") from None


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_SHAPES: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: isinstance(value, dict),
    "layers": lambda value: isinstance(value, dict) and all(map(_are_names, value.values())),
    **dict.fromkeys(("head", "extra", "outside"), _are_names),
    **dict.fromkeys(("input", "digests", frozen_factor.ENTRY), lambda value: isinstance(value, dict)),
    "class_names": lambda value: value is None or _are_names(value),
}


def _rename(
    model: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same with names within the timm model; earlier versions saved names within the module they were called on."""
    layer_names = {site.name for site in linear_sites(model)}
    first = plain_name(next(iter(description["layers"]), ""))
    parts = first.split(".")
    cut = next((start for start in range(len(parts)) if ".".join(parts[start:]) in layer_names), 0)
    before = "".join(f"{part}." for part in parts[:cut])

    def name(written: str) -> str:
        return written if written.startswith(trained.OUTSIDE) else plain_name(written).removeprefix(before)

    layers = {name(key): projections for key, projections in description["layers"].items()}
    description = description | {"layers": layers, "head": [name(key) for key in description["head"]]}
    return description, {name(key): tensor for key, tensor in tensors.items()}
