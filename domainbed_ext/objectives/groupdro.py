"""GroupDRO (Sagawa et al. 2020): the loss of the domain with the highest."""

from typing import Any

import torch
from torch import Tensor

from domainbed_ext.objectives.base import Batch, Model, Objective, Values


class GroupDRO(Objective):
    """Weighted mean of the domains' cross-entropies; the weights follow the losses by exponentiated gradient ascent."""

    compares_domains = True
    weights: Tensor

    def __init__(self, num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(num_classes, num_domains, hparams)
        self.register_buffer("weights", torch.full((num_domains,), 1 / num_domains))

    def loss(self, batch: Batch, model: Model) -> Values:
        """The weighted mean, after a step of the weights."""
        losses = batch.cross_entropies(model.logits(batch.images), self.cross_entropy)
        raised = self.weights * torch.exp(self.hparams["groupdro_eta"] * losses.detach())
        self.weights.copy_(raised / raised.sum())
        return {"loss": self.weights.clone() @ losses, "nll": losses.mean().detach(), "worst": losses.max().detach()}
