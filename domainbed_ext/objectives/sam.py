"""Sharpness-aware minimisation (Foret et al. 2021)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from domainbed_ext.models import running_statistics
from domainbed_ext.objectives.base import Batch, Model, Objective, Values


class SAM(Objective):
    """The mean cross-entropy, minimised by its gradients at w + ρ·g/‖g‖ in place of those at w.

    g is the gradient at w, over all trained parameters w. Both passes draw the same random numbers, as for dropout;
    statistics such as BatchNorm's are those of the first.
    """

    def attach(self, backbone: nn.Module, model: Model) -> None:
        """Notes the layers whose statistics the second pass must not move."""
        self._norms = running_statistics.norms(backbone)

    def loss(self, batch: Batch, model: Model) -> Values:
        """The mean cross-entropy of all domains' images."""
        return {"loss": self.cross_entropy(model.logits(batch.images), batch.labels)}

    def gradients(self, compute: Callable[[], Values], parameters: Sequence[nn.Parameter]) -> Values:
        """Leaves the gradients at w + ρ·g/‖g‖, and w as it was; records the loss at w."""
        devices = {parameter.device for parameter in parameters if parameter.device.type != "cpu"}
        with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
            values = compute()
        statistics = [buffer for norm in self._norms for buffer in norm.buffers()]
        with unmoved(statistics), climbed(parameters, self.hparams["sam_rho"]):
            compute()
        return values


@contextmanager
def climbed(parameters: Sequence[nn.Parameter], radius: float) -> Iterator[None]:
    """The context in which parameters are moved along their gradients, all together by a length; then exactly restored.

    Args:
        parameters: Parameters; those without a gradient are not moved.
        radius: Length of the move. Without any slope, there is none.
    """
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    with unmoved(moved):
        if moved:
            gradients = [parameter.grad for parameter in moved]
            with torch.no_grad():
                norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in gradients]))
                for parameter, gradient in zip(moved, gradients, strict=True):
                    parameter.add_(gradient * (radius / (norm + 1e-12)))
        yield


@contextmanager
def unmoved(tensors: Sequence[Tensor]) -> Iterator[None]:
    """The context after which tensors have the values that they had before."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
