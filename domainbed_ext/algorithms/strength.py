"""The strength of what training changed: tensors on the line from where it started to where it ended."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from domainbed_ext.errors import BenchmarkError


def check_strength(strength: float) -> None:
    """Refuses what is no strength.

    Args:
        strength: Strength, as a user gives it.

    Raises:
        BenchmarkError: It is not from 0 to 1.
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise BenchmarkError(f"strength {strength!r} should be from 0 (where training started) to 1 (what it trained)")


def between(start: Tensor, trained: Tensor, strength: float) -> Tensor:
    """Computes start + strength · (trained − start), exact at both ends.

    Args:
        start: Tensor at strength 0.
        trained: Tensor at strength 1. One of whole numbers, such as a counter, has no value between: it is this one at
            any strength above 0.
        strength: Strength, from 0 to 1.

    Returns:
        Tensor on the device and of the dtype of `trained`.
    """
    start = start.to(trained)
    if trained.is_floating_point() or trained.is_complex():
        return torch.lerp(start, trained, strength)
    return trained if strength else start


class Strength:
    """The strength of a model; below 1, with both ends of the tensors that it moves.

    Attributes:
        value: Strength, from 0 to 1.
    """

    def __init__(self) -> None:
        self.value = 1.0
        self._ends: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def set(self, strength: float, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
        """Moves tensors in place to where they are at a strength; at 1 they are the trained ones, to the last bit.

        Args:
            strength: Strength, from 0 to 1.
            tensors: Tensors by name, the same at each call.
            start: Values at strength 0 of those that move. What is given while the strength is 1 counts.
        """
        if self.value == 1:
            self._ends = {name: (before, tensors[name].detach().clone()) for name, before in start.items()}
        for name, (before, trained) in self._ends.items():
            tensors[name].copy_(trained if strength == 1 else between(before, trained, strength))
        self.value = float(strength)
        if strength == 1:
            self._ends = {}

    def check_full(self, doing: str) -> None:
        """Refuses what is for trained weights only.

        Args:
            doing: What is about to happen, as "saving".

        Raises:
            BenchmarkError: The strength is not 1.
        """
        if self.value != 1:
            raise BenchmarkError(f"{doing} is for trained weights, not for strength {self.value:g}: set strength 1")


def copies(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies tensors to the CPU, in new memory.

    Args:
        tensors: Names and tensors.
    """
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors}
