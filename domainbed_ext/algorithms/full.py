"""Full fine-tuning."""

from typing import Any

import torch
from torch import nn

from domainbed_ext.algorithms.base import Algorithm


class FullFT(Algorithm):
    """Full fine-tuning: every weight trains."""

    def prepare(self, backbone: nn.Module, hparams: dict[str, Any]) -> None:
        """Leaves everything trainable."""


class ERM(FullFT):
    """DomainBed's ERM: full fine-tuning by Adam, at DomainBed's hyperparameters."""

    def make_optimizer(self, parameters: list[nn.Parameter], hparams: dict[str, Any]) -> torch.optim.Optimizer:
        """Adam, whose weight decay is an L2 penalty."""
        return torch.optim.Adam(parameters, lr=hparams["lr"], weight_decay=hparams["weight_decay"])
