"""The average of a run, as its training uses it; this one averages nothing."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from domainbed_ext.averaging.mean import Mean

Moving = Callable[[], Mapping[str, Tensor]]
"""Function that returns the tensors of a model that training moves, by name: `Algorithm.moving`."""


class Average:
    """The average `none`: the weights of a step are those that are evaluated, selected and saved.

    Attributes:
        judges: Whether evaluations before the last compute the validation loss alone, so that there is a record of the
            last step alone.
    """

    judges: ClassVar[bool] = False

    def add(self, step: int, moving: Moving) -> None:
        """Is called after each step.

        Args:
            step: Index of the step.
            moving: Function that returns the moved tensors.
        """

    def judge(self, loss: float) -> None:
        """Takes the mean validation loss of the weights of the last step; only if it `judges`."""

    @property
    def is_judged(self) -> bool:
        """Whether there is no step since the last loss."""
        return True

    @property
    def is_complete(self) -> bool:
        """Whether no later step can change the average, so that the run may end."""
        return False

    def mean(self) -> Mean | None:
        """Returns the average of the steps so far; None where the present weights stand for it."""
        return None

    @property
    def copies(self) -> int:
        """The most bytes that its state takes, relative to those of the moved tensors."""
        return 0

    @property
    def fields(self) -> dict[str, Any]:
        """What a record says of the average."""
        return {}

    @property
    def summary(self) -> str:
        """What was averaged, for the log of a run that ends; empty if nothing."""
        return ""

    @property
    def warning(self) -> str:
        """What a user has to know of the average of a run that ends; empty if nothing."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Returns what a run needs to resume: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""

    @contextmanager
    def applied(self, moving: Moving) -> Iterator[None]:
        """Lets a model compute with the average, as long as the context lasts.

        Args:
            moving: Function that returns the model's moved tensors, which do not train meanwhile.
        """
        if (mean := self.mean()) is None:
            yield
            return
        tensors = moving()
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        _copy(mean.value(), tensors)
        try:
            yield
        finally:
            _copy(own, tensors)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        places[name].copy_(value)
