"""What users say of an adapter, as JSON can hold it."""

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

_VALUES = 10_000  # of an array; whoever has more means it for another file


def to_json(value: Any, name: str = "metadata") -> Any:
    """A value in what JSON has: numbers that are not finite become null, for which JSON has no word.

    Args:
        value: Plain values, NumPy's and torch's numbers and small arrays, paths, enums, dates, dataclasses, namespaces,
            and mappings, sequences and sets of them.
        name: What an error calls it.

    Raises:
        AdapterError: If there is anything else in it, or it contains itself.
    """
    try:
        return _to_json(value, name)
    except RecursionError:
        raise AdapterError(f"{name} contains itself, or is nested too deep for JSON") from None


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
            raise AdapterError(f"{name} has keys that are the same in JSON: {', '.join(sorted(keys)[:3])}")
        return {key: _to_json(item, f"{name}[{key!r}]") for key, item in zip(keys, value.values(), strict=True)}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    if isinstance(value, (list, tuple)):
        return [_to_json(item, f"{name}[{index}]") for index, item in enumerate(value)]
    raise AdapterError(f"{name} is a {type(value).__name__}, which JSON cannot hold: convert it, or leave it out")


def _array(value: np.ndarray | torch.Tensor, name: str) -> Any:
    size = value.numel() if isinstance(value, torch.Tensor) else value.size
    if size > _VALUES:
        raise AdapterError(f"{name} has {size:,} values, too many for JSON: save it in a file of its own")
    if isinstance(value, torch.Tensor) and value.is_meta:
        raise AdapterError(f"{name} is a tensor on the meta device, which has no values")
    return _to_json(value.tolist(), name)


def _key(key: Any, name: str) -> str:
    plain = _to_json(key, f"a key of {name}")
    if plain is None or isinstance(plain, (str, bool, int, float)):
        return plain if isinstance(plain, str) else str(plain)
    raise AdapterError(f"a key of {name} is a {type(key).__name__}: JSON's keys are text")
