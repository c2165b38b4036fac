"""Mutual information regularisation with an oracle, MIRO (Cha et al. 2022)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_ext.models import backbones
from domainbed_ext.models.blocks import recorded, transformer_blocks
from domainbed_ext.models.frozen_copy import FrozenCopy
from domainbed_ext.objectives.base import Batch, Model, Objective, Values

_START, _EPS = 0.1, 1e-5  # of a variance


class MIRO(Objective):
    """The mean cross-entropy + λ·Σₗ of a lower bound of how much features tell of the pretrained model's.

    Features are the tokens before the first transformer block and after each one; of the last block, those that the
    head reads. Those of the pretrained model have the mean of the trained model's features and a variance that trains,
    one number a channel and layer, at a learning rate of its own.
    """

    reads_images = True
    shapes_features = True

    def prepare(self, backbone: nn.Module) -> None:
        """Copies the pretrained backbone, and starts the variances."""
        self._pretrained = FrozenCopy(backbone)  # no module, so no part of the objective's state
        self._targets_of = transformer_blocks(self._pretrained.model)
        shape = backbones.inputs(self.hparams["backbone"], self.hparams["image_size"]).shape
        with torch.no_grad(), recorded(self._targets_of) as features:
            self._pretrained.model(torch.zeros(1, *shape))
        start = torch.tensor(_START - _EPS).expm1().log().item()  # whose softplus is the variance
        self.variances = nn.ParameterList([torch.full((each.shape[-1],), start) for each in features])

    def attach(self, backbone: nn.Module, model: Model) -> None:
        """Shares memory of weights that do not train."""
        self._features_of = transformer_blocks(backbone)
        self._pretrained.share(backbone)

    def optimizer_options(self) -> dict[str, Any]:
        """The learning rate of the variances."""
        return {"lr": self.hparams["lr"] * self.hparams["miro_lr_multiplier"]}

    def loss(self, batch: Batch, model: Model) -> Values:
        """The mean cross-entropy and the regularisation, in a forward pass of each model."""
        with recorded(self._features_of) as features:
            logits = model.logits(batch.images)
        with torch.no_grad(), model.autocast(), recorded(self._targets_of) as targets:
            self._pretrained.model(batch.images)
        layers = zip(features, targets, self.variances, strict=True)
        penalty = torch.stack([gap(own, target, F.softplus(v) + _EPS) for own, target, v in layers]).sum()
        nll = self.cross_entropy(logits, batch.labels)
        loss = nll + self.hparams["miro_lambda"] * penalty
        return {"loss": loss, "nll": nll.detach(), "penalty": penalty.detach()}


def gap(features: Tensor, targets: Tensor, variance: Tensor) -> Tensor:
    """The mean of ½·((targets − features)² / variance + log variance), a Gaussian's −log p without its constant.

    Args:
        features: Mean [..., channels].
        targets: Values [..., channels].
        variance: Variance [channels].
    """
    return ((targets.float() - features.float()).square() / variance + variance.log()).mean() / 2
