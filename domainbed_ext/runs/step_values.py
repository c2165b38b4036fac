"""What steps compute, until it is read: on a GPU, reading a number waits for all work before it."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

MOST = 25  # steps that wait to be read: one wait in so many costs little, and a run that diverged is soon noticed

Number = float | Tensor
"""A number, or a tensor of shape [] that will be one."""


Value = TypeVar("Value")


@dataclass
class StepValues(Generic[Value]):
    """What a step computed.

    Attributes:
        step: Index of the step.
        update: What the algorithm's update returned.
        losses: Loss of each environment.
        seconds: Time of the step, once they are read with the wait for them.
    """

    step: int
    update: Mapping[str, Value]
    losses: Mapping[str, Value]
    seconds: float

    @property
    def all(self) -> list[Value]:
        """All values, those of the update first."""
        return [*self.update.values(), *self.losses.values()]


@dataclass
class UnreadValues:
    """The values of the last steps that were not read yet."""

    _steps: list[StepValues[Number]] = field(default_factory=list)
    _on_device: bool = False

    def add(self, step: int, update: Mapping[str, Number], losses: Mapping[str, Number], seconds: float) -> None:
        """Adds a step's values.

        Args:
            step: Index of the step.
            update: What the algorithm's update returned.
            losses: Loss of each environment.
            seconds: Time of the step so far.
        """
        self._steps.append(StepValues(step, update, losses, seconds))
        self._on_device = self._on_device or any(isinstance(each, Tensor) for each in self._steps[-1].all)

    @property
    def are_due(self) -> bool:
        """Whether they are to be read now: at once unless that means to wait for a device."""
        return not self._on_device or len(self._steps) >= MOST

    def read(self) -> Iterator[StepValues[float]]:
        """Reads and forgets the values, step by step; the wait for them is part of the last step's time."""
        start = time.perf_counter()
        steps, self._steps, on_device, self._on_device = self._steps, [], self._on_device, False
        numbers = iter(_read_at_once([each for step in steps for each in step.all if isinstance(each, Tensor)]))
        waited = time.perf_counter() - start if on_device else 0.0
        for position, step in enumerate(steps, 1):
            update, losses = (_numbers(values, numbers) for values in (step.update, step.losses))
            yield StepValues(step.step, update, losses, step.seconds + waited * (position == len(steps)))


def _numbers(values: Mapping[str, Number], read: Iterator[float]) -> dict[str, float]:
    return {name: next(read) if isinstance(value, Tensor) else value for name, value in values.items()}


def _read_at_once(tensors: list[Tensor]) -> list[float]:
    """The numbers of tensors of shape [], by one copy from each device, in their order."""
    numbers: dict[int, float] = {}
    for device in {tensor.device for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        together = torch.cat([tensors[place].detach().double().reshape(1) for place in places])
        numbers |= dict(zip(places, together.tolist(), strict=True))
    return [numbers[place] for place in range(len(tensors))]
