"""JSON that every reader takes: a number that is not finite, which JSON does not have, is null."""

import json
import math
from typing import Any


def dumps(value: Any, *, indent: int | None = None, sort_keys: bool = False, ensure_ascii: bool = True) -> str:
    """Plain values as JSON.

    Args:
        value: Dicts, lists, tuples, text, numbers, booleans and None, as deep as they may be.
        indent: Spaces by level; None for one line.
        sort_keys: Whether keys are in alphabetical order.
        ensure_ascii: Whether other characters are written by their number.

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
