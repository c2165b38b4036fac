"""The pretrained model beside the one that is trained from it."""

import copy

import torch
from torch import Tensor, nn

from vitlorafa import speed_up


class FrozenCopy:
    """A copy of a model as it is now, which later shares the memory of the weights that stayed frozen in the model.

    Args:
        model: Model, before anything of it is adapted, trained or moved.

    Attributes:
        model: The copy, in evaluation mode. It computes as `speed_up` makes the model compute.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = speed_up(copy.deepcopy(model)).eval().requires_grad_(False)
        self._originals = dict(model.named_parameters())

    def share(self, model: nn.Module) -> None:
        """Moves the copy to the model's device, and shares what the model keeps of its pretrained weights.

        Args:
            model: The model, adapted and on its device. What is frozen may be rounded to another number format.
        """
        frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.model.to(next(model.parameters()).device)
        for name, original in self._originals.items():
            owner, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if original in frozen and _is_same(getattr(module, attribute), original):
                # The memory, not the parameter, whose data may be replaced, as merging does.
                setattr(module, attribute, nn.Parameter(original.data, requires_grad=False))
        self._originals = {}


def _is_same(own: Tensor, original: Tensor) -> bool:
    return own.shape == original.shape and torch.equal(own.to(original.dtype), original)
