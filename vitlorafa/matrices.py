"""The trained factors as matrices, for optimizers that need two-dimensional parameters, such as Muon.

A layer stacks the factors of its k projections, [k, r, d_in] and [k, m, r], so that its kernel computes them together.
An optimizer that orthogonalises updates needs each factor on its own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vitlorafa.adapted import adapted_state, adapter_layers
from vitlorafa.errors import AdapterError


class Matrix(nn.Parameter):
    """One factor of one projection: a view of the layer's parameter, whose gradient is a slice of that parameter's.

    Attributes:
        factor: The layer's parameter, [k, ...].
        part: Index of the projection among the k.
    """

    factor: nn.Parameter
    part: int

    def __new__(cls, factor: nn.Parameter, part: int) -> "Matrix":
        """The matrix `factor[part]`.

        Args:
            factor: The layer's parameter, [k, ...].
            part: Index of the projection.
        """
        matrix = super().__new__(cls, factor.detach()[part], requires_grad=True)
        matrix.factor, matrix.part = factor, part
        return matrix

    def __init__(self, factor: nn.Parameter, part: int) -> None:
        super().__init__()

    @property
    def grad(self) -> Tensor | None:
        """The slice of the factor's gradient; None if it has none. Setting None clears the whole factor's gradient."""
        current = self.factor.detach()[self.part]
        if current.data_ptr() != self.data_ptr() or current.dtype != self.dtype:  # the model was moved or converted
            self.data = current
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
        """Raises: a copy would not share memory with the model."""
        raise AdapterError("matrices(model) cannot be copied or saved: save the model and call matrices(model) again")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Matrix":
        """The same matrix of the copied factor; raises if the factor is not copied along."""
        factor = memo.get(id(self.factor))
        return self.__reduce_ex__(4) if factor is None else Matrix(factor, self.part)


def matrices(model: nn.Module) -> list[Matrix]:
    """The trained factors as one two-dimensional parameter for each projection.

    They share memory with the model: `torch.optim.Muon(matrices(model))` trains the model. They also share gradients
    with `model.parameters()`, so gradient clipping, scaling and DDP work as usual. Save the model,
    not these matrices.

    Args:
        model: Adapted model.

    Returns:
        The trained factors B [m, r] and A [r, d_in] of every adapted projection, in the model's order. Other trained
        parameters, such as the head's, need another optimizer.

    Raises:
        AdapterError: If the model is not adapted or no factor trains.
    """
    adapted_state(model)
    factors = [factor for _, layer in adapter_layers(model) for factor in (layer.lora_A, layer.lora_B)]
    trained = [Matrix(factor, part) for factor in factors if factor.requires_grad for part in range(len(factor))]
    if not trained:
        raise AdapterError("no factor of this model trains: set requires_grad of lora_A or lora_B")
    return trained
