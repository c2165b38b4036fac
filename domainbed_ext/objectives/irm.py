"""IRM (Arjovsky et al. 2019): one classifier that is optimal in every domain."""

import torch
from torch import Tensor

from domainbed_ext.objectives.annealing import Annealed
from domainbed_ext.objectives.base import Batch, Model, Values
from domainbed_ext.objectives.scores import of_labels


class IRM(Annealed):
    """Mean cross-entropy, plus the squared gradient of each domain's by a factor of the logits (IRMv1).

    The square is the product of the gradients of two halves of a minibatch, an unbiased estimate.
    """

    prefix = "irm"
    least_images = 2

    def loss(self, batch: Batch, model: Model) -> Values:
        """The mean of the domains' cross-entropies, and of their penalties."""
        logits = model.logits(batch.images)
        nll = batch.cross_entropies(logits, self.cross_entropy).mean()
        domains = zip(batch.split(logits), batch.split(batch.labels), strict=True)
        penalty = torch.stack([_penalty(z, y, self.label_smoothing) for z, y in domains]).mean()
        return {"loss": nll + self.weight * penalty, "nll": nll.detach(), "penalty": penalty.detach()}


def _penalty(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return _gradient(logits[::2], labels[::2], smoothing) * _gradient(logits[1::2], labels[1::2], smoothing)


def _gradient(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The gradient of the mean cross-entropy of w·logits by w, at w = 1, with labels that are smoothed."""
    expected = (logits.softmax(1) * logits).sum(1)
    wanted = of_labels(logits, labels)
    if smoothing:
        wanted = torch.lerp(wanted, logits.mean(1), smoothing)
    return (expected - wanted).mean()
