"""What CORAL and MMD share: a penalty on the distance between the features of any two domains."""

from itertools import combinations

import torch
from torch import Tensor

from domainbed_ext.objectives.base import Batch, Model, Objective, Values


class FeatureMatching(Objective):
    """Mean cross-entropy, plus `mmd_gamma` times the mean distance between the features of two domains."""

    reads_features = True
    shapes_features = True
    compares_domains = True

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The distance between features [n, width] and [m, width] of two domains, a number."""
        raise TypeError(f"{type(self).__name__} has no method distance")

    def loss(self, batch: Batch, model: Model) -> Values:
        """The mean of the domains' cross-entropies, and the penalty."""
        outputs = model.outputs(batch.images)
        nll = batch.cross_entropies(outputs.logits, self.cross_entropy).mean()
        pairs = [self.distance(x, y) for x, y in combinations(batch.split(outputs.features), 2)]
        penalty = torch.stack(pairs).mean() if pairs else torch.zeros_like(nll)
        return {"loss": nll + self.hparams["mmd_gamma"] * penalty, "nll": nll.detach(), "penalty": penalty.detach()}
