"""Cells and groups of rows that several analyses share."""

import math
from collections.abc import Sequence

from domainbed_ext.report.tables.table import NOT_RECORDED, Origin


def ratio(value: float, interval: tuple[float, float] | None = None) -> str:
    """A cell of a number near 1, with its interval: "0.42 (0.40 to 0.44)"; "-" for NaN.

    Args:
        value: Number.
        interval: Its interval; None or NaN for none.
    """
    if math.isnan(value):
        return NOT_RECORDED
    if interval is None or any(map(math.isnan, interval)):
        return f"{value:.3f}"
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def with_spread(value: float, spread: float) -> str:
    """A cell of a number and its standard deviation: "0.420 ± 0.013"; "-" for NaN.

    Args:
        value: Number.
        spread: Standard deviation; NaN where it is not known.
    """
    return ratio(value) if math.isnan(spread) else f"{ratio(value)} ± {spread:.3f}"


def start_breaks(keys: Sequence[object]) -> set[int]:
    """The rows that begin a group.

    Args:
        keys: What the rows of a group share, by row.
    """
    return {number for number in range(1, len(keys)) if keys[number] != keys[number - 1]}


def origins_of(runs: Sequence[Sequence[object]]) -> list[Origin]:
    """The records behind a cell.

    Args:
        runs: Names of runs, each with a step.
    """
    return [Origin(str(run), int(str(step))) for run, step in dict.fromkeys(map(tuple, runs))]
