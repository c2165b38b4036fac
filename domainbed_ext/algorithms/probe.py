"""The linear probe."""

from typing import Any

import torch
from torch import Tensor, nn

from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.models import precision
from vitlorafa import classifiers, head_parameters


class LP(Algorithm):
    """Linear probe: only the head trains.

    Its methods take features [batch, width], which `embed` returns, in place of images.
    """

    def prepare(self, backbone: nn.Module, hparams: dict[str, Any]) -> None:
        """Freezes everything but the head."""
        backbone.requires_grad_(False)
        for parameter in head_parameters(backbone).values():
            parameter.requires_grad_(True)

    @property
    def embeds(self) -> bool:
        """Whether features can replace images: the head is a single linear layer, unlike that of two-headed models."""
        heads = classifiers(self.backbone)
        return len(heads) == 1 and isinstance(heads[0], nn.Linear)

    def embed(self, images: Tensor) -> Tensor:
        """The input of the head, which no step changes: [batch, channels, height, width] → [batch, width]."""
        read: list[Tensor] = []
        head = self.backbone.get_classifier()  # type: ignore[operator]
        with head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])), torch.no_grad():
            self.predict(images)
        return read[0]

    def train(self, mode: bool = True) -> "LP":
        """Keeps everything but the head in evaluation mode: frozen features have no dropout, and fixed statistics."""
        super().train(mode)
        self.backbone.eval()
        for head in classifiers(self.backbone):
            head.train(mode)
        return self

    def logits(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width], or features [batch, width] → [batch, num_classes]."""
        return (self.backbone.get_classifier() if images.ndim == 2 else self.backbone)(images)  # type: ignore[operator]

    def predict(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width], or features [batch, width] → logits [batch, num_classes]."""
        with precision.autocast(self.precision, self.device):
            return self.logits(x.to(self.device, non_blocking=True)).float()
