"""Frozen weights stored in autocast's number format, so that no step casts them again."""

from typing import Any

import torch
from torch import Tensor, nn

from vitlorafa.adapted import adapter_layers
from vitlorafa.layers import FastLinear
from vitlorafa.ops import autocast_dtype


def cast_frozen(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Rounds frozen weights once to the format to which autocast would round them in every step, in place.

    Under autocast to the same format, outputs do not change. Only linear layers and convolutions of torch's own classes
    are cast. Weights under an adapter keep their format, because W + s·B·A is computed in float32 and rounded once.
    Those under PEFT's adapters do too: some of these transform W, or change the layer's output in place. To store them
    in fewer bits as well, which changes outputs, freeze and cast the model before `inject`. Outside autocast, a layer
    casts its rounded weights to the format of its input.

    Args:
        model: Model on any device, adapted or not.
        dtype: Format of autocast.

    Returns:
        The same model.
    """
    adapted: set[Any] = {layer.base for _, layer in adapter_layers(model)}
    adapted |= {module.base_layer for module in model.modules() if hasattr(module, "base_layer")}  # PEFT's
    for module in model.modules():
        if type(module) in _CLASSES and module not in adapted:
            frozen = [parameter for parameter in module.parameters(recurse=False) if not parameter.requires_grad]
            for parameter in frozen:
                parameter.data = parameter.data.to(dtype)
            if frozen:
                module.__class__ = _CLASSES[type(module)]
    return model


class FastConv2d(nn.Conv2d):
    """torch's convolution, whose weight and bias may have another number format than its input."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_channels, height, width] -> [batch, out_channels, ...], in autocast's format or the input's."""
        return self._conv_forward(x, _cast_like(self.weight, x), _cast_like(self.bias, x))


def _cast_like(parameter: Any, x: Tensor) -> Any:
    """A parameter (or None) in the format of x, or unchanged where autocast will cast both."""
    return parameter if parameter is None or autocast_dtype(x) else parameter.to(x.dtype)


_CLASSES: dict[type, type] = {nn.Linear: FastLinear, nn.Conv2d: FastConv2d}
