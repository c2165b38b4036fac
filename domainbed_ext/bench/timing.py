"""Times things in turns, so that what a machine does beside falls on all of them alike."""

import time
from collections.abc import Callable, Mapping
from statistics import median

from domainbed_ext.system.progress import bar


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: bool = True,
    after: Callable[[dict[str, list[float]]], object] = lambda seconds: None,
) -> dict[str, list[float]]:
    """Calls every function once a round.

    Args:
        functions: by name.
        rounds: that count.
        warm_up: go round once before.
        after: told what is known after each round that counts, to keep it if the next is not finished.

    Returns:
        Of each the seconds of its calls.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with bar("measuring", (rounds + warm_up) * len(functions), "calls") as shown:
        for number in range(-int(warm_up), rounds):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - start)
                shown.advance()
            if number >= 0:
                after(seconds)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median over rounds of one function's time over another's."""
    return median(ours / theirs for ours, theirs in zip(seconds[name], seconds[to], strict=True))
