"""All uses of torch's private names (torch 2.7 to 2.14), each with a fallback for versions without the name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def inside_torch_func() -> bool:
    """Whether vmap, grad, jvp or a similar transform is active; False in versions of torch without the name."""
    return _transforms_active()


def belongs_to_torch_func(tensor: Tensor) -> bool:
    """Whether vmap, grad, jvp or a similar transform made the tensor; without the name, whether one is active."""
    return inside_torch_func() if _is_wrapped is None else _is_wrapped(tensor)


def softmax_backward(g: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the scores, by torch's own fused function; without the name, by its formula in float32 or better.

    Args:
        g: Gradient of the weights, [..., N].
        weights: Softmax of the scores over the last dimension, [..., N].

    Returns:
        The gradient, [..., N].
    """
    if _softmax_backward is not None:
        return _softmax_backward(g, weights, -1, weights.dtype)
    wide = torch.promote_types(weights.dtype, torch.float32)
    g, P = g.to(wide), weights.to(wide)
    return (P * (g - (P * g).sum(-1, keepdim=True))).to(weights.dtype)


_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_is_wrapped: Any = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)
_softmax_backward: Any = getattr(torch, "_softmax_backward_data", None)
