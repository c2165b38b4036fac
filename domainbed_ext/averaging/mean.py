"""The mean of tensors over steps, as exact as the plain mean of all of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Mean:
    """A running mean of named tensors. Sums are in float64, in which thousands of small changes are not lost.

    Attributes:
        count: Number of steps in the mean.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, tensors: Mapping[str, Tensor], count: int = 1) -> None:
        """Adds the tensors of a step, or the mean of several.

        Args:
            tensors: Tensors by name, each time of the same names and shapes; they are copied.
            count: Number of steps that they are the mean of.
        """
        for name, tensor in tensors.items():
            total = self._sums.get(name)
            if total is None:
                total = torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float64))
            self._sums[name] = total.to(tensor.device).add_(tensor, alpha=count)  # after a checkpoint it is on the CPU
        self.count += count

    def value(self) -> dict[str, Tensor]:
        """Returns the mean, in float64; of no steps nothing."""
        return {name: total / self.count for name, total in self._sums.items()}

    def copy(self) -> "Mean":
        """Returns a mean that can be added to without changing this one."""
        copy = Mean()
        copy.count, copy._sums = self.count, {name: total.clone() for name, total in self._sums.items()}
        return copy

    def state_dict(self) -> dict[str, Any]:
        """Returns sums and count, for a checkpoint."""
        return {"count": self.count, "sums": dict(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.count, self._sums = state["count"], dict(state["sums"])
