"""Checkpoints: what a run needs to resume after it was stopped, in files that are complete or absent.

A checkpoint is one file, `checkpoint_00000120.safetensors`: the tensors, and everything else as JSON in the file's
metadata, with a digest of both. The last two are kept, in case the newest cannot be read.
"""

import contextlib
import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from domainbed_ext.models.tensor_files import save_tensors
from domainbed_ext.system import strict_json
from domainbed_ext.system.files import replace_atomically
from vitlorafa import tensor_bytes

KEPT = 2
_COMPLEX = (torch.complex32, torch.complex128)  # types that safetensors lacks: saved as pairs of real numbers


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Writes a checkpoint and deletes those that are no longer needed.

    Args:
        folder: Folder of the run.
        step: Number of steps that are done.
        state: Tensors, NumPy arrays and plain values in dicts, lists and tuples, nested to any depth.

    Raises:
        OSError: It cannot be written, e.g. on a full disk; earlier checkpoints are kept.
    """
    tensors: dict[str, Tensor] = {}
    text = strict_json.dumps(_encode(state, tensors))
    metadata = {"state": text, "digest": _digest(text, tensors)}

    def write(path: Path) -> None:
        try:
            save_tensors(tensors, path, metadata)
        except SafetensorError as error:  # what a full disk ends in
            raise OSError(f"cannot write a checkpoint ({error})") from error

    replace_atomically(folder / f"checkpoint_{step:08d}.safetensors", write)
    for path in _paths(folder)[KEPT:]:
        path.unlink(missing_ok=True)


def load(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Reads the newest checkpoint that is complete, and deletes those that are not.

    Args:
        folder: Folder of the run.

    Returns:
        The state that was saved, with tensors on the CPU, or None if there is none; and a warning for each broken file.
    """
    warnings: list[str] = []
    for path in _paths(folder):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            if metadata["digest"] != _digest(metadata["state"], tensors):
                raise ValueError("its content has changed")
            return _decode(json.loads(metadata["state"]), tensors), warnings
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            warnings.append(f"{path.name} cannot be read ({error}): it is skipped")
            with contextlib.suppress(OSError):
                path.unlink()
    return None, warnings


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """Copies a state that a checkpoint can hold; its tensors are on the CPU then."""
    tensors: dict[str, Tensor] = {}
    copy: dict[str, Any] = _decode(_encode(state, tensors), tensors)
    return copy


def clear(folder: Path) -> None:
    """Deletes all checkpoints of a run."""
    for path in _paths(folder):
        path.unlink(missing_ok=True)


def random_states() -> dict[str, Any]:
    """Returns the states of all random generators of this process."""
    # A run on the CPU beside a GPU has no use for it, and must not start it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """Sets all random generators of this process to states that `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _paths(folder: Path) -> list[Path]:
    """The files of all checkpoints, the newest first."""
    return sorted(folder.glob("checkpoint_*.safetensors"), reverse=True)


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode("utf-8"))
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON can hold it, with tuples and any keys; tensors move to `tensors` and leave their number."""
    if isinstance(value, Tensor):
        if value.dtype in _COMPLEX:
            return {"complex": _encode(torch.view_as_real(value.detach().resolve_conj()), tensors)}
        # A copy, since tensors that share memory cannot be saved.
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        return {"array": _encode(value.tolist(), tensors), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return _encode(value.item(), tensors)
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_encode(item, tensors) for item in value]
    if isinstance(value, dict):
        return {"dict": [[_encode(key, tensors), _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, float) and not math.isfinite(value):  # which JSON does not have
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "complex" in value:
        return torch.view_as_complex(_decode(value["complex"], tensors))
    if "float" in value:
        return float(value["float"])
    if "array" in value:
        return np.array(_decode(value["array"], tensors), dtype=value["dtype"])
    if "tuple" in value:
        return tuple(_decode(item, tensors) for item in value["tuple"])
    return {_decode(key, tensors): _decode(item, tensors) for key, item in value["dict"]}
