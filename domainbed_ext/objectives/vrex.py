"""VREx (Krueger et al. 2021): equal losses of the domains."""

from domainbed_ext.objectives.annealing import Annealed
from domainbed_ext.objectives.base import Batch, Model, Values


class VREx(Annealed):
    """Mean of the domains' cross-entropies, plus their variance."""

    prefix = "vrex"
    compares_domains = True

    def loss(self, batch: Batch, model: Model) -> Values:
        """The mean of the domains' cross-entropies, and their variance."""
        losses = batch.cross_entropies(model.logits(batch.images), self.cross_entropy)
        nll, penalty = losses.mean(), losses.var(correction=0)
        return {"loss": nll + self.weight * penalty, "nll": nll.detach(), "penalty": penalty.detach()}
