"""Refuses what a run asks for and its method ignores, as a method with an `update` of its own may."""

from collections.abc import Mapping
from typing import Any

from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.hyperparameters import is_changed
from domainbed_ext.algorithms.registry import OBJECTIVE
from domainbed_ext.errors import BenchmarkError

_IN_UPDATE = ("accumulate", "clip_grad")  # what `Algorithm.update` does


def check_ignored(algorithm: Algorithm, hparams: Mapping[str, Any]) -> None:
    """Checks after a step that it did what was asked for.

    Args:
        algorithm: Algorithm that has taken the step.
        hparams: Hyperparameters of the run.

    Raises:
        BenchmarkError: The method ignores the objective or a hyperparameter.
    """
    method, objective = type(algorithm).__name__, getattr(algorithm, "objective", None)
    if hparams.get(OBJECTIVE) and not getattr(objective, "asked", False):
        raise BenchmarkError(
            f"{method} has an update of its own, which does not minimise {hparams[OBJECTIVE]}: leave the objective "
            "out, or call super().update() or self.objective in it"
        )
    ignored = [name for name in _IN_UPDATE if is_changed(name, hparams)]
    if ignored and not algorithm.updated:
        raise BenchmarkError(
            f"{method} has an update of its own, which ignores {' and '.join(ignored)}: leave that out, or call "
            "super().update() in it"
        )
    if algorithm.scaler is not None and not algorithm.updated:
        raise BenchmarkError(
            f"{method} has an update of its own, which does not scale the loss as --precision fp16 needs: use bf16 or "
            "float32, or call super().update() in it"
        )
    if is_changed("label_smoothing", hparams) and not getattr(objective, "smoothed", False):
        loss = type(objective).__name__ if getattr(objective, "asked", False) else method
        raise BenchmarkError(
            f"{loss} has a loss of its own, which ignores label_smoothing: leave that out, or compute the loss by "
            "the objective's cross_entropy"
        )
