"""The layer as an autograd function that keeps for backward only what is needed.

| trains | kept for backward, besides the parameters |
|--------|-------------------------------------------|
| B      | x Aᵀ, [N, k·r]                            |
| A      | x, [N, d_in]                              |
| both   | both                                      |

With a frozen A, x is not needed: this is the activation memory that LoRA-FA saves (section 5 of its paper). Dropout
adds nothing, because its mask is recomputed from a seed. The gradient of x is one matmul with W + s B A; forming that
matrix costs r/N of the matmul. With `fold`, the forward pass is one matmul with it too: there is no separate rank-r
update, which would read and write all of y. Under autocast, the layer then keeps the cast of W + s B A instead of the
cast of W.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitlorafa.ops import eager
from vitlorafa.ops.linear import linear, needs_gradient
from vitlorafa.ops.quantised import QuantisedWeight, dense

# The modules that compute the layer's steps, by name, because a compiler accepts no module as an argument.
BACKENDS: dict[str, Any] = {"eager": eager}


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantisedWeight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    starts: tuple[int, ...],
    dropout: float,
    seed: Tensor | None,
    fold: bool,
    gelu: bool,
    backend: str,
) -> Tensor:
    """The layer of `vitlorafa.ops.reference.lora_linear`, with matmuls in the dtype of x.

    Args:
        x: Input, [N, d_in].
        weight: Pretrained weight, [d_out, d_in], or a quantised one.
        bias: Bias, [d_out], or None.
        A: Factors A, [k, r, d_in].
        B: Factors B, [k, m, r].
        scale: Scaling s.
        starts: First output of each of the k projections.
        dropout: Probability of dropping an element of the adapter's input.
        seed: Seed of the dropout mask, of shape [], on the CPU; None without dropout.
        fold: Whether to compute one matmul with W + s B A; not with dropout.
        gelu: Whether to apply exact GELU to the output; within the matmul with `fold` where no gradient is needed.
        backend: Name in `BACKENDS`.

    Returns:
        y, [N, d_out].
    """
    inputs = x, weight, bias, A, B, scale, starts, dropout, seed, fold, backend
    if needs_gradient(x, None if isinstance(weight, QuantisedWeight) else weight, bias, A, B):
        y = _LoRALinear.apply(*inputs)
        return F.gelu(y) if gelu else y
    # Without gradients, autograd's own work would take up to a fifth of a layer's time at few tokens.
    y, _, _ = _forward(*inputs, keep_xA=False, gelu=gelu)
    return y


def _forward(
    x: Tensor,
    weight: Tensor | QuantisedWeight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    starts: tuple[int, ...],
    dropout: float,
    seed: Tensor | None,
    fold: bool,
    backend: str,
    *,
    keep_xA: bool,
    gelu: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [N, d_out], and what was computed on the way: x̃ Aᵀ [N, k·r] and W + s B A; None if it was not."""
    steps = BACKENDS[backend]
    xA = steps.project(x, A, dropout, seed) if keep_xA or not fold else None
    if fold:
        folded = steps.fold(dense(weight, _wide(x)), A, B, scale, starts, x.dtype)
        return linear(x, folded, bias, gelu=gelu), xA, folded
    y = linear(x, dense(weight, x.dtype), bias)
    steps.add_update(y, xA, B, scale, starts)
    return F.gelu(y) if gelu else y, xA, None


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """y; the inputs are the first of `_forward`."""
        x, weight, bias, A, B, scale, starts, dropout, seed, _, backend = inputs
        need_x, need_weight, _, need_A, need_B = ctx.needs_input_grad[:5]
        y, xA, folded = _forward(*inputs, keep_xA=need_B, gelu=False)
        ctx.scale, ctx.starts, ctx.dropout, ctx.backend = scale, starts, dropout, backend
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        stored: tuple[Tensor, ...] = ()
        ctx.quantised = None
        if not need_x or isinstance(weight, QuantisedWeight) or weight.dtype == x.dtype:
            folded = None  # not needed, or recomputed at the cost of reading the weight
        if isinstance(weight, QuantisedWeight) and need_x:
            ctx.quantised, stored = weight._replace(tensors=()), weight.tensors
        ctx.save_for_backward(
            x if need_A or need_weight else None,
            xA if need_B else None,
            folded,
            weight if need_x and folded is None and isinstance(weight, Tensor) else None,
            A,
            B,
            seed,
            *stored,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, xA, folded, weight, A, B, seed, *stored = ctx.saved_tensors
        if ctx.quantised:
            weight = ctx.quantised._replace(tensors=tuple(stored))
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        scale, starts, dropout, steps = ctx.scale, ctx.starts, ctx.dropout, BACKENDS[ctx.backend]
        gx = g_weight = g_bias = gA = gB = None

        masks = need_x and seed is not None
        if need_A or need_B or masks:
            g_xA, gB = steps.backward_g(g, xA, B, scale, starts, need_A or masks)
            gB = None if gB is None else gB.to(B.dtype)
        if need_A:
            gA = steps.grad_A(g_xA, x, dropout, seed).view(A.shape).to(A.dtype)
        if masks:
            gx = steps.grad_x(g, dense(weight, g.dtype), g_xA, A, dropout, seed)
        elif need_x:
            gx = g @ (steps.fold(dense(weight, _wide(g)), A, B, scale, starts, g.dtype) if folded is None else folded)
        if need_weight:
            g_weight = (g.T @ x).to(ctx.weight_dtype)
        if need_bias:
            g_bias = g.sum(0).to(ctx.bias_dtype)
        return gx, g_weight, g_bias, gA, gB, *(None,) * 6


def _wide(x: Tensor) -> torch.dtype:
    """The dtype in which W + s B A is formed for an input: float32 or better."""
    return torch.promote_types(x.dtype, torch.float32)
