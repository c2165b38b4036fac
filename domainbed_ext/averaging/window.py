"""The steps of an average, for records and logs."""

from collections.abc import Sequence
from typing import Any


def describe_window(steps: Sequence[int]) -> dict[str, Any]:
    """Returns what a record says of the steps of an average.

    Args:
        steps: Indices of the steps in order; none if nothing is averaged.
    """
    return {"start": steps[0] if steps else None, "end": steps[-1] if steps else None, "steps": len(steps)}


def summarise_window(steps: Sequence[int]) -> str:
    """Returns the same for a log; empty if nothing is averaged.

    Args:
        steps: Indices of the steps in order.
    """
    return f"averaged the weights of {len(steps)} steps, from {steps[0]} to {steps[-1]}" if steps else ""
