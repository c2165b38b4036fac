"""Representation self-challenging (Huang et al. 2020)."""

import torch
from torch import Tensor

from domainbed_ext.objectives.base import Batch, Model, Objective, Values
from domainbed_ext.objectives.scores import of_labels


class RSC(Objective):
    """The cross-entropy without the features that predictions depend on most.

    Of each image, the features with the largest gradients of the true class's logit are set to zero, but only of the
    images whose probability of the true class falls most by that. The features are the classifier's input.
    """

    reads_features = True

    def loss(self, batch: Batch, model: Model) -> Values:
        """The cross-entropy of the challenged features."""
        features, labels = model.outputs(batch.images).features, batch.labels
        leaf = features.detach().requires_grad_()  # features do not train with every method
        logits = model.classify(leaf)
        (gradients,) = torch.autograd.grad(of_labels(logits, labels).sum(), leaf)
        kept = are_lowest(gradients, 1 - self.hparams["rsc_f_drop_factor"])
        with torch.no_grad():
            muted = model.classify(features * kept)
            falls = of_labels(logits.softmax(1), labels) - of_labels(muted.softmax(1), labels)
            unchanged = are_lowest(falls, 1 - self.hparams["rsc_b_drop_factor"])
        challenged = model.classify(features * (kept | unchanged[:, None]))
        return {"loss": self.cross_entropy(challenged, labels)}


def are_lowest(values: Tensor, share: float) -> Tensor:
    """Returns which values of each row are below its quantile at `share`, as upstream decides it.

    Args:
        values: Values [..., n].
        share: Share of the values, in [0, 1]. The quantile is interpolated linearly.
    """
    exact = values.double()
    return exact < exact.quantile(share, dim=-1, keepdim=True)
