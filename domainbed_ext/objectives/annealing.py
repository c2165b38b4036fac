"""What IRM and VREx share: a penalty whose weight rises after some steps."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from domainbed_ext.errors import warn_once
from domainbed_ext.objectives.base import Model, Objective


class Annealed(Objective):
    """A penalty of weight 1 in the first `…_penalty_anneal_iters` steps, and of weight `…_lambda` then.

    When the weight changes, the optimizer forgets its averages, which are of other magnitudes of gradients.
    """

    prefix: ClassVar[str]
    """Begins the names of its hyperparameters."""
    steps: Tensor

    def __init__(self, num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(num_classes, num_domains, hparams)
        self.register_buffer("steps", torch.tensor(0))  # that have begun
        self._annealed = hparams[f"{self.prefix}_penalty_anneal_iters"]

    @property
    def weight(self) -> float:
        """Weight of the penalty in the present step."""
        return float(self.hparams[f"{self.prefix}_lambda"]) if self.steps > self._annealed else 1.0

    def attach(self, backbone: nn.Module, model: Model) -> None:
        """Keeps the number of steps on the CPU: to compare it on a GPU, each step would wait for the one before."""
        self.steps = self.steps.cpu()

    def begin(self, steps: int) -> None:
        """Warns of a run that ends before the weight changes."""
        if steps <= self._annealed:
            warn_once(
                f"{self.prefix}_penalty_anneal_iters {self._annealed} is not below the {steps} steps of the run: its "
                f"penalty has weight 1 throughout, not {self.prefix}_lambda {self.hparams[f'{self.prefix}_lambda']}"
            )

    def before_step(self, optimizer: Optimizer) -> None:
        """Counts the steps, and empties the optimizer's state where the weight changes."""
        if self.steps == self._annealed:
            optimizer.state.clear()
        self.steps += 1
