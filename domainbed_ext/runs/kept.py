"""The trained model of a step, kept in memory until it is evaluated on the splits that selection does not need."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import checkpoint
from domainbed_ext.runs.feed import Feed


@dataclass(frozen=True)
class Kept:
    """What an algorithm predicted with after a step.

    Attributes:
        step: Index of the step.
        state: Its `Algorithm.prediction_state`, copied to the CPU.
        outputs: Logits of some images; None if the run has resumed since, maybe on a machine that rounds differently.
    """

    step: int
    state: dict[str, Any]
    outputs: Tensor | None = None

    @classmethod
    def after(cls, step: int, feed: Feed) -> "Kept":
        """Copies what an algorithm predicts with now.

        Args:
            step: Index of the step that it has done last.
            feed: Feed of the algorithm.
        """
        return cls(step, checkpoint.copied(feed.algorithm.prediction_state()), feed.sample_outputs())

    @contextmanager
    def loaded_into(self, feed: Feed) -> Iterator[None]:
        """Lets an algorithm predict as it did after the step, as long as the context lasts.

        Args:
            feed: Feed of the algorithm, which does not train meanwhile.

        Raises:
            BenchmarkError: It does not predict as it did.
        """
        algorithm = feed.algorithm
        now = checkpoint.copied(algorithm.prediction_state())
        algorithm.load_training_state(self.state)
        try:
            self._check(feed)
            yield
        finally:
            algorithm.load_training_state(now)

    def _check(self, feed: Feed) -> None:
        """Refuses a method that predicts with more than its state; one that predicts at random cannot be checked."""
        if self.outputs is None or _same(self.outputs, outputs := feed.sample_outputs()):
            return
        if _same(outputs, feed.sample_outputs()):
            raise BenchmarkError(
                f"{type(feed.algorithm).__name__} predicts with something that its training_state does not hold, so "
                f"step {self.step} cannot be evaluated now: add that to training_state and load_training_state, or run "
                "it with --evaluate all"
            )


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
