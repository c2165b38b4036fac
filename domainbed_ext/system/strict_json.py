"""JSON that every reader accepts: numbers that are not finite, which JSON lacks, become null."""

import json
import math
from typing import Any


def dumps(value: Any, *, indent: int | None = None, sort_keys: bool = False, ensure_ascii: bool = True) -> str:
    """Writes plain values as JSON.

    Args:
        value: Dicts, lists, tuples, text, numbers, booleans and None, nested to any depth.
        indent: Spaces per level; None for one line.
        sort_keys: Whether keys are in alphabetical order.
        ensure_ascii: Whether other characters than ASCII's are escaped.

    Returns:
        JSON.
    """
    return json.dumps(_finite(value), indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
