"""What only torch's private names tell or do (torch 2.7 to 2.14), and what happens in a torch that has lost one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def inside_torch_func() -> bool:
    """Whether vmap, grad, jvp or the like is at work; no in a torch without the name."""
    return _transforms_active()


def is_of_torch_func(tensor: Tensor) -> bool:
    """Whether vmap, grad, jvp or the like has made the tensor; in a torch without the name, whether one is at work."""
    return inside_torch_func() if _is_wrapped is None else _is_wrapped(tensor)


def softmax_backward(g: Tensor, weights: Tensor) -> Tensor:
    """The gradient at the scores.

    Args:
        g: The gradient at the weights, [..., N].
        weights: softmax of the scores over their last dimension, [..., N].

    Returns:
        [..., N], by one pass of torch's own; in a torch without the name, as written down in float32 or better.
    """
    if _softmax_backward is not None:
        return _softmax_backward(g, weights, -1, weights.dtype)
    wide = torch.promote_types(weights.dtype, torch.float32)
    g, P = g.to(wide), weights.to(wide)
    return (P * (g - (P * g).sum(-1, keepdim=True))).to(weights.dtype)


_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_is_wrapped: Any = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)
_softmax_backward: Any = getattr(torch, "_softmax_backward_data", None)
