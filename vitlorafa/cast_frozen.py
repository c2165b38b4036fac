"""Frozen weights stored in autocast's number format, so that no step casts them again."""

from typing import Any

import torch
from torch import nn

from vitlorafa.adapted import adapter_layers
from vitlorafa.convolutions import FastConv2d, PatchConv2d
from vitlorafa.layers import FastLinear


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


_CLASSES: dict[type, type] = {nn.Linear: FastLinear, nn.Conv2d: FastConv2d, PatchConv2d: PatchConv2d}
