"""Full fine-tuning."""

from typing import Any

import torch
from torch import nn

from domainbed_ext.algorithms.base import Algorithm


class FullFT(Algorithm):
    """Full fine-tuning: everything trains."""

    def prepare(self, backbone: nn.Module, hparams: dict[str, Any]) -> None:
        """Leaves all parameters trainable."""


class ERM(FullFT):
    """DomainBed's ERM: full fine-tuning with DomainBed's optimizer and hyperparameters."""

    def make_optimizer(self, parameters: list[nn.Parameter], hparams: dict[str, Any]) -> torch.optim.Optimizer:
        """Adam, whose weight decay is an L2 penalty."""
        return torch.optim.Adam(parameters, lr=hparams["lr"], weight_decay=hparams["weight_decay"])
