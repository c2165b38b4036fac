"""Mixup between domains: images and labels of two domains are blended (Wang et al. 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_ext.objectives.base import Batch, CrossEntropy, Model, Objective, Values
from domainbed_ext.objectives.cycle import draw_cycle


class Mixup(Objective):
    """The loss on blends λ·x + (1 − λ)·x′ of images of two domains: λ·CE(y) + (1 − λ)·CE(y′), λ ~ Beta(α, α).

    The domains are paired in a random cycle, and λ is drawn for each pair. With a single training domain, each image is
    blended with its neighbour in the minibatch, whose order is random.
    """

    reads_images = True

    def loss(self, batch: Batch, model: Model) -> Values:
        """The mean over the pairs, in one forward pass of all blends."""
        images, labels = batch.split(batch.images), batch.split(batch.labels)
        alpha = torch.tensor(float(self.hparams["mixup_alpha"]))
        beta = torch.distributions.Beta(alpha, alpha)
        blends: list[tuple[Tensor, Tensor, Tensor, float]] = []
        for i, j in draw_cycle(len(batch.sizes)):
            count, shift = min(batch.sizes[i], batch.sizes[j]), int(i == j)
            others = [whole[j].roll(shift, 0)[:count] for whole in (images, labels)]
            share = beta.sample().item()
            blends.append((torch.lerp(others[0], images[i][:count], share), labels[i][:count], others[1], share))
        logits = model.logits(torch.cat([blend[0] for blend in blends]))
        parts = logits.split([len(blend[1]) for blend in blends])
        losses = [
            mixed_cross_entropy(part, *blend[1:], self.cross_entropy) for part, blend in zip(parts, blends, strict=True)
        ]
        return {"loss": torch.stack(losses).mean()}


def mixed_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    other_labels: Tensor,
    share: float,
    cross_entropy: CrossEntropy = F.cross_entropy,
) -> Tensor:
    """The cross-entropy of blends.

    Args:
        logits: Logits [n, classes] of the blends.
        labels: Labels [n] of the first images.
        other_labels: Labels [n] of the second images.
        share: Share of the first images in the blends, in [0, 1].
        cross_entropy: Function of logits and labels.
    """
    return share * cross_entropy(logits, labels) + (1 - share) * cross_entropy(logits, other_labels)
