"""The trained factors as matrices, for optimizers that want them, such as Muon.

A layer stacks the factors of its k projections, [k, r, d_in] and [k, m, r], for its kernel computes them together. To
orthogonalise an update, an optimizer needs each for itself.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vitlorafa.errors import AdapterError
from vitlorafa.inject import adapted_state, adapter_layers


class Matrix(nn.Parameter):
    """One factor of one projection, in the memory of the layer's parameter; its gradient is that parameter's slice.

    Attributes:
        factor: The layer's parameter, [k, ...].
        part: Which of the k.
    """

    factor: nn.Parameter
    part: int

    def __new__(cls, factor: nn.Parameter, part: int) -> "Matrix":
        """The matrix `factor[part]`."""
        matrix = super().__new__(cls, factor.detach()[part], requires_grad=True)
        matrix.factor, matrix.part = factor, part
        return matrix

    def __init__(self, factor: nn.Parameter, part: int) -> None:
        super().__init__()

    @property
    def grad(self) -> Tensor | None:
        """The slice of the factor's gradient, None if that has none. Setting None clears the whole factor's."""
        now = self.factor.detach()[self.part]
        if now.data_ptr() != self.data_ptr() or now.dtype != self.dtype:  # the model was moved or converted since
            self.data = now
        return None if self.factor.grad is None else self.factor.grad[self.part]

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is None:
            self.factor.grad = None
            return
        if self.factor.grad is None:
            self.factor.grad = torch.zeros_like(self.factor)
        self.factor.grad[self.part] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses: a copy would be of other memory than the model's."""
        raise AdapterError("matrices of a model cannot be copied or saved: save the model, and take them from it again")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Matrix":
        """The same matrix of a factor that is copied along with it, else refuses."""
        factor = memo.get(id(self.factor))
        return self.__reduce_ex__(4) if factor is None else Matrix(factor, self.part)


def matrices(model: nn.Module) -> list[Matrix]:
    """The trained factors, one parameter of two dimensions for each projection.

    They are what the model trains, not copies: `torch.optim.Muon(matrices(model))` moves the model. The gradients are
    those of `model.parameters()`, so clipping, scaling and DDP work as ever. Save the model's state, not theirs.

    Args:
        model: An adapted model.

    Returns:
        B [m, r] or A [r, d_in] of every adapted projection, in the model's order, of the factors that train. Whatever
        else trains, such as the head, is for another optimizer.

    Raises:
        AdapterError: If the model is not adapted, or no factor of it trains.
    """
    adapted_state(model)
    factors = [factor for _, layer in adapter_layers(model) for factor in (layer.lora_A, layer.lora_B)]
    found = [Matrix(factor, part) for factor in factors if factor.requires_grad for part in range(len(factor))]
    if not found:
        raise AdapterError("no factor of this model trains: set requires_grad of lora_A or lora_B")
    return found
