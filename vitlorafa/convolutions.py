"""Faster versions of torch's convolution."""

from typing import Any

from torch import Tensor, nn

from vitlorafa.ops import autocast_dtype
from vitlorafa.ops.patches import convolve_patches


class FastConv2d(nn.Conv2d):
    """torch's convolution, whose weight and bias may have another number format than its input."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_channels, height, width] -> [batch, out_channels, ...], in autocast's format or the input's."""
        return self._conv_forward(x, _cast_like(self.weight, x), _cast_like(self.bias, x))


class PatchConv2d(FastConv2d):
    """A convolution whose patches do not overlap, by `vitlorafa.ops.patches`."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_channels, height, width] -> [batch, out_channels, ...], in autocast's format or the input's."""
        return convolve_patches(x, _cast_like(self.weight, x), _cast_like(self.bias, x))


def cuts_patches(layer: nn.Module) -> bool:
    """Whether a layer is a convolution whose patches cover an image without overlap, so that it can be `PatchConv2d`.

    Args:
        layer: Layer of a model; only torch's own class and `FastConv2d` qualify.
    """
    if not isinstance(layer, nn.Conv2d) or type(layer) not in (nn.Conv2d, FastConv2d):
        return False
    return (
        layer.kernel_size == layer.stride
        and layer.padding in ((0, 0), "valid")
        and layer.dilation == (1, 1)
        and layer.groups == 1
    )


def _cast_like(parameter: Any, x: Tensor) -> Any:
    """A parameter (or None) in the format of x, or unchanged where autocast will cast both."""
    return parameter if parameter is None or autocast_dtype(x) else parameter.to(x.dtype)
