"""Users' metadata of an adapter, converted to JSON values."""

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import date, time
from enum import Enum
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch

from vitlorafa.errors import AdapterError

_VALUES = 10_000  # of an array; larger ones belong in a file of their own


def to_json(value: Any, name: str = "metadata") -> Any:
    """Converts a value to JSON values. Numbers that are not finite, which JSON does not have, become null.

    Args:
        value: Plain values, numbers and small arrays of NumPy and torch, paths, enums, dates, dataclasses, namespaces,
            and mappings, sequences and sets of these.
        name: Name of the value in error messages.

    Raises:
        AdapterError: If the value contains anything else, or itself.
    """
    try:
        return _to_json(value, name)
    except RecursionError:
        raise AdapterError(f"{name} contains itself, or is nested too deeply for JSON: save plain values") from None


def to_json_entries(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Converts the metadata of an adapter to JSON values.

    Args:
        metadata: Values by name; None stands for no values.

    Raises:
        AdapterError: If JSON cannot hold them, or they have no names.
    """
    entries = to_json({} if metadata is None else metadata)
    if not isinstance(entries, dict):
        raise AdapterError("metadata must be a dict with names as keys")
    return entries


def _to_json(value: Any, name: str) -> Any:
    if isinstance(value, Enum):
        return _to_json(value.value, name)
    if value is None or isinstance(value, (bool, np.bool_)):
        return None if value is None else bool(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return _array(value, name)
    if isinstance(value, PathLike):
        return _to_json(fspath(value), name)
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        keys = [_key(key, name) for key in value]
        if len(set(keys)) < len(keys):
            raise AdapterError(f"{name} has keys that are equal in JSON ({', '.join(sorted(keys)[:3])}): rename one")
        return {key: _to_json(item, f"{name}[{key!r}]") for key, item in zip(keys, value.values(), strict=True)}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    if isinstance(value, (list, tuple)):
        return [_to_json(item, f"{name}[{index}]") for index, item in enumerate(value)]
    raise AdapterError(f"{name} has type {type(value).__name__}, which JSON cannot hold: convert it or leave it out")


def _array(value: np.ndarray | torch.Tensor, name: str) -> Any:
    size = value.numel() if isinstance(value, torch.Tensor) else value.size
    if size > _VALUES:
        raise AdapterError(f"{name} has {size:,} values, too many for JSON: save it in a separate file")
    if isinstance(value, torch.Tensor) and value.is_meta:
        raise AdapterError(f"{name} is a tensor on the meta device and has no values: leave it out")
    return _to_json(value.tolist(), name)


def _key(key: Any, name: str) -> str:
    plain = _to_json(key, f"a key of {name}")
    if plain is None or isinstance(plain, (str, bool, int, float)):
        return plain if isinstance(plain, str) else str(plain)
    raise AdapterError(f"a key of {name} has type {type(key).__name__}: use a string")
