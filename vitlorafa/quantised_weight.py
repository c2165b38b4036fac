"""The stored weight of a quantised layer: of `QuantisedLinear`, and of layers that other packages quantised."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitlorafa.ops.quantised import QuantisedWeight, unpack_4bit, unpack_int8
from vitlorafa.quantised_linear import QuantisedLinear


def frozen_weight(layer: Any) -> Tensor | QuantisedWeight:
    """The weight of a linear layer, [d_out, d_in], as it is stored.

    Args:
        layer: Linear layer, quantised or not.
    """
    quantised = quantised_weight(layer)
    weight: Tensor | QuantisedWeight = layer.weight if quantised is None else quantised
    return weight


def quantised_weight(layer: nn.Module) -> QuantisedWeight | None:
    """The stored weight of a quantised linear layer; None for other layers.

    Quantised layers are `QuantisedLinear`, bitsandbytes' `Linear4bit` and `Linear8bitLt`, which quantise when they are
    first moved to a device, and linear layers whose weight is a tensor of torchao or of another package with a method
    `dequantize` of its own.

    Args:
        layer: Any module.
    """
    if isinstance(layer, QuantisedLinear):
        return layer.quantised_weight
    if not isinstance(layer, nn.Linear) or type(layer.weight) is nn.Parameter:
        return None
    weight: Any = layer.weight
    shape = (layer.out_features, layer.in_features)
    if (state := getattr(weight, "quant_state", None)) is not None:
        return _of_linear_4bit(weight.data, state, shape)
    rows = getattr(weight, "SCB", None)
    if rows is None:
        rows = getattr(getattr(layer, "state", None), "SCB", None)
    if weight.dtype == torch.int8 and rows is not None:
        return QuantisedWeight((weight.data, rows), shape, torch.float32, unpack_int8)
    if type(weight).dequantize is not Tensor.dequantize:
        return QuantisedWeight((weight.detach(),), shape, weight.dtype, _dequantize)
    return None


def _of_linear_4bit(codes: Tensor, state: Any, shape: tuple[int, int]) -> QuantisedWeight:
    """The weight of bitsandbytes' `Linear4bit`, with its `QuantState`."""
    nested = state.state2 if state.nested else None
    extra = () if nested is None else (nested.absmax, state.offset.view(1), nested.code)
    group = 0 if nested is None else nested.blocksize
    unpack = partial(unpack_4bit, block=state.blocksize, kind=state.quant_type, group=group)
    return QuantisedWeight((codes, state.absmax, *extra), shape, state.dtype, unpack)


def _dequantize(tensors: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return tensors[0].dequantize().to(dtype)
