"""The layer as an autograd function, which keeps for backward only what it must.

| trains | kept for backward, besides the parameters |
|--------|-------------------------------------------|
| B      | x Aᵀ, [N, k·r]                            |
| A      | x, [N, d_in]                              |
| both   | both                                      |

That a frozen A needs no x is the activation memory saved by LoRA-FA (section 5 of its paper). Dropout adds nothing: its
mask is made again from a seed. The gradient at x is one product with W + s B A, which costs r/N of that product to
form. With `fold`, so is the forward: the rank-r update, which would read and write all of y, is gone, and what a
layer under autocast keeps, a cast of its weight, is here the cast of W + s B A.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitlorafa.ops import eager
from vitlorafa.ops.linear import linear, needs_gradient

# The modules that make the layer's steps, by name: a compiler takes no module as an argument.
BACKENDS: dict[str, Any] = {"eager": eager}


def lora_linear(
    x: Tensor,
    weight: Tensor,
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
    """The layer of `vitlorafa.ops.reference.lora_linear`, with products in x's dtype whatever the others' is.

    Args:
        x: [N, d_in].
        weight: [d_out, d_in].
        bias: [d_out] or None.
        A: [k, r, d_in].
        B: [k, m, r].
        scale: s.
        starts: First output of each of the k projections.
        dropout: Probability of dropping an element of the adapter's input.
        seed: Seed of the dropout mask, of shape [], on the CPU; None without dropout.
        fold: Whether to do one product with W + s B A; not with dropout.
        gelu: Whether to give GELU(y); only with `fold` and without gradients.
        backend: A name of `BACKENDS`.

    Returns:
        y, [N, d_out].
    """
    # Without gradients nothing inside tells whether B trains.
    keep_xA = needs_gradient(B)
    y, *_ = _LoRALinear.apply(x, weight, bias, A, B, scale, starts, dropout, seed, fold, gelu, keep_xA, backend)
    return y


class _LoRALinear(torch.autograd.Function):
    """x̃ Aᵀ and the folded weight are outputs too, for only inputs and outputs can be kept."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        starts: tuple[int, ...],
        dropout: float,
        seed: Tensor | None,
        fold: bool,
        gelu: bool,
        keep_xA: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        steps = BACKENDS[backend]
        xA = steps.project(x, A, dropout, seed) if keep_xA or not fold else None
        if fold:
            folded = steps.fold(weight, A, B, scale, starts, x.dtype)
            return linear(x, folded, bias, gelu=gelu), xA, folded
        y = linear(x, weight, bias)
        steps.add_update(y, xA, B, scale, starts)
        return y, xA, None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        x, weight, bias, A, B, ctx.scale, ctx.starts, ctx.dropout, seed, _, _, _, ctx.backend = inputs
        _, xA, folded = output
        ctx.mark_non_differentiable(*(t for t in (xA, folded) if t is not None))
        ctx.set_materialize_grads(False)
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        need_x, need_weight, _, need_A, need_B = ctx.needs_input_grad[:5]
        if not need_x or weight.dtype == x.dtype:
            folded = None  # not needed, or made again for the price of reading the weight
        ctx.save_for_backward(
            x if need_A or need_weight else None,
            xA if need_B else None,
            folded,
            weight if need_x and folded is None else None,
            A,
            B,
            seed,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 13
        x, xA, folded, weight, A, B, seed = ctx.saved_tensors
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
            gx = g @ weight.to(g.dtype)
            steps.add_masked(gx, g_xA, A, dropout, seed)
        elif need_x:
            gx = g @ (steps.fold(weight, A, B, scale, starts, g.dtype) if folded is None else folded)
        if need_weight:
            g_weight = (g.T @ x).to(ctx.weight_dtype)
        if need_bias:
            g_bias = g.sum(0).to(ctx.bias_dtype)
        return gx, g_weight, g_bias, gA, gB, *(None,) * 8
