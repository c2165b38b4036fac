"""The layer as an autograd function for every device, which keeps for backward only what it must.

| trains | kept for backward, besides the parameters |
|--------|-------------------------------------------|
| B      | x Aᵀ, [N, k·r]                            |
| A      | x, [N, d_in]                              |
| both   | both                                      |

That a frozen A needs no x is the activation memory saved by LoRA-FA (section 5 of its paper). Dropout adds
nothing: its mask is made again from a seed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vitlorafa.ops.reference import dropout_mask


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    starts: tuple[int, ...] = (0,),
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """The layer of `vitlorafa.ops.reference.lora_linear`, for tensors of one dtype.

    Args:
        x: [..., d_in].
        weight: [d_out, d_in].
        bias: [d_out] or None.
        A: [k, r, d_in].
        B: [k, m, r].
        scale: s.
        starts: First output of each of the k projections.
        dropout: Probability of dropping an element of the adapter's input.
        seed: Seed of the dropout mask.

    Returns:
        y, [..., d_out].
    """
    rows = x.reshape(-1, x.shape[-1])
    y, _ = _LoRALinear.apply(rows, weight, bias, A, B, scale, starts, dropout, seed)
    return y.view(*x.shape[:-1], weight.shape[0])


class _LoRALinear(torch.autograd.Function):
    """N rows through the layer. x Aᵀ is a second output, for only inputs and outputs can be kept.

    Projections are taken one by one: a batched product over slices of the output does not take the fast bf16
    path on a CPU, and is up to a hundred times slower.
    """

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
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        if dropout:
            xA = (x * dropout_mask(x.shape, x.device, dropout, seed)) @ A.flatten(0, 1).T
            xA /= 1 - dropout
        else:
            xA = x @ A.flatten(0, 1).T
        y = nn.functional.linear(x, weight, bias)
        for y_j, xA_j, B_j in zip(_slices(y, starts, B), xA.chunk(len(A), 1), B, strict=True):
            y_j.addmm_(xA_j, B_j.T, alpha=scale)
        return y, xA

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, A, B, ctx.scale, ctx.starts, ctx.dropout, ctx.seed = inputs
        _, xA = output
        ctx.x_shape = x.shape
        ctx.mark_non_differentiable(xA)
        ctx.set_materialize_grads(False)
        need_x, need_weight, _, need_A, need_B = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if need_A or need_weight else None,
            xA if need_B else None,
            weight if need_x else None,
            A if need_x else None,
            B,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 9
        x, xA, weight, A, B = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        scale, starts, dropout = ctx.scale, ctx.starts, ctx.dropout
        gx = g_weight = g_bias = gA = gB = mask = None
        slices = _slices(g, starts, B)

        if need_B:  # (xAᵀ g)ᵀ and not gᵀ xA, which a CPU takes ten times as long for
            gB = torch.stack([(xA_j.T @ g_j).T for g_j, xA_j in zip(slices, xA.chunk(len(B), 1), strict=True)])
            gB *= scale
        if need_A or (need_x and dropout):  # the gradient at x Aᵀ, [N, k·r]
            g_xA = torch.cat([g_j @ B_j for g_j, B_j in zip(slices, B, strict=True)], dim=1)
            g_xA *= scale / (1 - dropout)
            if dropout:
                mask = dropout_mask(ctx.x_shape, g.device, dropout, ctx.seed)
        if need_A:
            gA = (g_xA.T @ (x if mask is None else x * mask)).unflatten(0, (len(B), -1))
        if need_x and mask is None:
            # One product with W + s B A, which costs r/N of that product to form.
            effective = weight.clone()
            for rows, A_j, B_j in zip(_slices(effective.T, starts, B), A, B, strict=True):
                rows.T.addmm_(B_j, A_j, alpha=scale)
            gx = g @ effective
        elif need_x:
            gx = (g_xA @ A.flatten(0, 1)).mul_(mask).addmm_(g, weight)
        if need_weight:
            g_weight = g.T @ x
        if need_bias:
            g_bias = g.sum(0)
        return gx, g_weight, g_bias, gA, gB, None, None, None, None


def _slices(y: Tensor, starts: tuple[int, ...], B: Tensor) -> list[Tensor]:
    """View the m columns of y [N, d_out] that each projection adds to."""
    return [y[:, start : start + B.shape[1]] for start in starts]
