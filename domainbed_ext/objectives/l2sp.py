"""L2-SP: an L2 penalty on how far weights move from their pretrained values (Li et al. 2018)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from domainbed_ext.objectives.base import Batch, Model, Objective, Values
from vitlorafa import head_parameters


class L2SP(Objective):
    """The mean cross-entropy + α/2·‖w − w₀‖² + β/2·‖v‖², of the backbone's weights w and the classifier's v.

    w₀ is the start of w. The weight of an adapted layer is what the adapter makes of it, so that ‖w − w₀‖ is the norm
    of the update s·B·A.
    """

    shapes_features = True

    def attach(self, backbone: nn.Module, model: Model) -> None:
        """Notes where the weights start."""
        self._head = [parameter for parameter in head_parameters(backbone).values() if parameter.requires_grad]
        self._start = {name: start for name, start in _copies(model.weights()) if start.any()}

    def loss(self, batch: Batch, model: Model) -> Values:
        """The mean cross-entropy and both penalties."""
        moved = squared_distance(model.weights(), self._start)
        penalty = (self.hparams["l2sp_alpha"] * moved + self.hparams["l2sp_beta"] * squared_norm(self._head)) / 2
        nll = self.cross_entropy(model.logits(batch.images), batch.labels)
        return {"loss": nll + penalty, "nll": nll.detach(), "penalty": penalty.detach()}


def squared_distance(weights: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
    """The sum of the squared differences.

    Args:
        weights: Weights by name.
        start: Where they started; zero for those that are not there.
    """
    return squared_norm([weight - start[name] if name in start else weight for name, weight in weights.items()])


def squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of the squares of all elements."""
    return sum((tensor.square().sum() for tensor in tensors), torch.zeros(()))


def _copies(weights: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    return ((name, weight.detach().clone()) for name, weight in weights.items())
