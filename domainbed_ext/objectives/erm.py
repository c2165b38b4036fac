"""Empirical risk minimisation."""

from domainbed_ext.objectives.base import Batch, Model, Objective, Values


class ERM(Objective):
    """The mean cross-entropy of all domains' images."""

    def loss(self, batch: Batch, model: Model) -> Values:
        """The mean cross-entropy, in one forward pass of all images."""
        return {"loss": self.cross_entropy(model.logits(batch.images), batch.labels)}
