"""A frozen linear layer whose weight is stored in 8 or 4 bits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitlorafa.errors import unknown
from vitlorafa.ops.quantised import (
    QuantisedWeight,
    Unpack,
    bitsandbytes,
    quantise_int8,
    quantise_nf4,
    quantised_linear,
    unpack_int8,
    unpack_nf4,
)
from vitlorafa.wrappers import named_modules


class _Format(NamedTuple):
    """A format of quantised weights: names and number formats of its tensors, and how to make and read them."""

    tensors: dict[str, torch.dtype]
    pack: Callable[[Tensor], tuple[Tensor, ...]]
    unpack: Unpack


_FORMATS = {
    "int8": _Format({"codes": torch.int8, "scales": torch.float32}, quantise_int8, unpack_int8),
    "nf4": _Format(
        {
            "codes": torch.uint8,
            "scales": torch.uint8,
            **dict.fromkeys(("group_scales", "mean_scale", "scale_values"), torch.float32),
        },
        quantise_nf4,
        unpack_nf4,
    ),
}
FORMATS = tuple(_FORMATS)


class QuantisedLinear(nn.Module):
    """A linear layer with a frozen weight in 8 or 4 bits.

    Codes and scales are parameters that cannot train, so that the layer is moved, copied, saved and sharded like any
    other. They are stored as integers, float32 scales as their bytes: `half()`, `bfloat16()` and mixed precision do not
    round them.

    Args:
        source: Layer to quantise; it is not changed. Its bias is shared, in its number format.
        format: "int8" or "nf4", see `vitlorafa.ops.quantised`.

    Attributes:
        in_features: Input width d_in.
        out_features: Output width d_out.
        format: Format of the weight.
        dtype: Number format that the weight had.
        bias: Bias, [d_out], or None.

    Raises:
        AdapterError: If the format is unknown, or bitsandbytes is not installed.
    """

    def __init__(self, source: nn.Linear, format: str) -> None:
        super().__init__()
        if format not in _FORMATS:
            raise unknown("format of quantised weights", format, FORMATS)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.format, self.dtype = format, source.weight.dtype
        tensors = _FORMATS[format].pack(source.weight)
        for name, tensor in zip(_FORMATS[format].tensors, tensors, strict=True):
            stored = _to_stored(tensor).to(source.weight.device, copy=True)  # codes' values are shared by all layers
            self.register_parameter(name, nn.Parameter(stored, requires_grad=False))
        self.bias = source.bias
        self.train(source.training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        bitsandbytes()  # also where the layer was not quantised, such as in another process
        super().__setstate__(state)

    @property
    def quantised_weight(self) -> QuantisedWeight:
        """The stored weight."""
        format = _FORMATS[self.format]
        tensors = tuple(_from_stored(getattr(self, name), dtype) for name, dtype in format.tensors.items())
        return QuantisedWeight(tensors, (self.out_features, self.in_features), self.dtype, format.unpack)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight, [d_out, d_in], a new tensor."""
        return self.quantised_weight.dequantise()

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out], in autocast's format or the input's."""
        return quantised_linear(x, self.quantised_weight, self.bias)

    def extra_repr(self) -> str:
        """The layer's text in `print(model)`."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, format={self.format}"


def dequantise(model: nn.Module) -> nn.Module:
    """Replaces each `QuantisedLinear` by a linear layer with the dequantised weight, in place.

    The weight has the number format that it had before it was quantised, and stays frozen. Layers under an adapter are
    replaced too; results stay the same up to rounding.

    Args:
        model: Model, adapted or not.

    Returns:
        The same model.
    """
    for _, module in list(named_modules(model)):
        for name, child in module.named_children():
            if isinstance(child, QuantisedLinear):
                setattr(module, name, float_linear(child, child.weight))
    return model


def float_linear(layer: Any, weight: Tensor) -> nn.Linear:
    """A linear layer with a given frozen weight and the bias of another layer.

    Args:
        layer: Layer with the attributes of a linear layer.
        weight: Weight, [d_out, d_in].
    """
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)


def _to_stored(tensor: Tensor) -> Tensor:
    """Integers as they are, and floating point numbers as bytes, [..., bytes of each]."""
    return tensor.unsqueeze(-1).view(torch.uint8) if tensor.is_floating_point() else tensor


def _from_stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_to_stored`, as a view."""
    return tensor.view(dtype).squeeze(-1) if dtype.is_floating_point else tensor
