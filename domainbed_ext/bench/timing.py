"""Times things in turns, so that what a machine does beside falls on all of them alike."""

import time
from collections.abc import Callable, Mapping
from statistics import median


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Calls every function once a round.

    Args:
        functions: by name.
        rounds: that count.
        warm_up: go round once before.

    Returns:
        Of each the seconds of its calls.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(-int(warm_up), rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median over rounds of one function's time over another's."""
    return median(ours / theirs for ours, theirs in zip(seconds[name], seconds[to], strict=True))
