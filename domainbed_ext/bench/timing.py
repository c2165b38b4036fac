"""Interleaved timing, so that other load on the machine affects all functions alike."""

import time
from collections.abc import Callable, Mapping
from statistics import median

from domainbed_ext.system.progress import bar


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: bool = True,
    after: Callable[[dict[str, list[float]]], object] = lambda seconds: None,
    unit: str = "calls",
) -> dict[str, list[float]]:
    """Calls every function once per round.

    Args:
        functions: Functions by name.
        rounds: Number of timed rounds.
        warm_up: Whether an untimed round comes first.
        after: Function that receives the results so far after each timed call, e.g. to save them.
        unit: What the progress bar counts.

    Returns:
        The seconds of each function's calls.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with bar("measuring", (rounds + warm_up) * len(functions), unit) as shown:
        for number in range(-int(warm_up), rounds):
            for name, function in functions.items():
                shown.note(f"{name}, {f'round {number + 1} of {rounds}' if number >= 0 else 'warming up'}")
                start = time.perf_counter()
                function()
                took = time.perf_counter() - start
                shown.advance()
                if number >= 0:
                    seconds[name].append(took)
                    after(seconds)
        shown.note("")
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median of one function's time over another's, over the rounds that both have been called in."""
    return median(ours / theirs for ours, theirs in zip(seconds[name], seconds[to], strict=False))
