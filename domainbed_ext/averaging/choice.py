"""The average that the hyperparameters of a run choose."""

from collections.abc import Mapping
from typing import Any

from domainbed_ext.averaging.base import Average
from domainbed_ext.averaging.hyperparameters import MA, NONE, SWAD
from domainbed_ext.averaging.moving_average import MovingAverage
from domainbed_ext.averaging.swad import Swad
from domainbed_ext.averaging.valley import LossValley
from domainbed_ext.errors import BenchmarkError

_PUBLISHED_START = 100
_SHORTEST = 5  # warm-ups: a run of fewer has a shorter one


def make_average(hparams: Mapping[str, Any], steps: int, evaluations: int) -> Average:
    """Makes the average of a run.

    Args:
        hparams: Hyperparameters of the run; records of earlier versions have no average.
        steps: Number of training steps.
        evaluations: Number of evaluations; 1 is that of the last step alone.

    Raises:
        BenchmarkError: The run is too short for the average, or has too few evaluations.
    """
    chosen = hparams.get("average", NONE)
    if chosen == MA:
        return MovingAverage(_start(hparams["ma_start"], steps))
    if chosen == SWAD:
        patience = hparams["swad_optimum_patience"]
        _check_evaluations(max(2, patience), steps, evaluations)
        return Swad(LossValley(patience, hparams["swad_overfit_patience"], hparams["swad_tolerance"]))
    return Average()


def _start(chosen: float | None, steps: int) -> int:
    """The first step of a moving average."""
    if chosen is None:
        return min(_PUBLISHED_START, steps // _SHORTEST)
    start = round(chosen * steps) if chosen < 1 else int(chosen)
    if start >= steps:
        raise BenchmarkError(f"ma_start {chosen:g} leaves none of the run's {steps} steps to average: lower it")
    return start


def _check_evaluations(needed: int, steps: int, evaluations: int) -> None:
    """Refuses a run that is evaluated too rarely for SWAD to find a valley."""
    if evaluations >= needed:
        return
    highest = (steps - 1) // (needed - 1)
    remedy = (
        f"give a --checkpoint_freq from 1 to {highest}, or --evaluations {needed}"
        if highest
        else f"give at least {needed} --steps"
    )
    raise BenchmarkError(
        f"average=swad needs the validation losses of at least {needed} evaluations, and this run of {steps} steps has "
        f"{evaluations}: {remedy}"
    )
