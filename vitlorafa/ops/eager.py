"""The layer's steps in plain PyTorch, for every device.

x Aᵀ is computed as the transpose of A xᵀ: on a CPU, matmuls over the N rows then read memory in order, which is up to
four times as fast at small ranks.

Matmuls with B are one for each projection, on views of its slice of y. As one batched matmul over the slices, the
gradient of x Aᵀ takes up to 15 times as long in bfloat16 on a CPU, and the update of y twice as long.
"""

import torch
from torch import Tensor

from vitlorafa.ops.dropout import drop_, dropped_blocks


def fold(weight: Tensor, A: Tensor, B: Tensor, scale: float, starts: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """W + s B A, formed in float32 or better and rounded once.

    Args:
        weight: Pretrained weight W, [d_out, d_in].
        A: Factors A, [k, r, d_in].
        B: Factors B, [k, m, r].
        scale: Scaling s.
        starts: First row of each projection's slice.
        dtype: Dtype of the result.

    Returns:
        A new tensor, [d_out, d_in].
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    k, m, _ = B.shape
    with torch.autocast(weight.device.type, enabled=False):
        if k * m == len(weight):  # every row is adapted
            rows = weight.to(wide).view(k, m, -1)
            return torch.baddbmm(rows, B.to(wide), A.to(wide), alpha=scale).view_as(weight).to(dtype)
        slices = _slices(weight, starts, m).to(wide)
        folded = weight.to(dtype, copy=True)
        _slices(folded, starts, m).copy_(torch.baddbmm(slices, B.to(wide), A.to(wide), alpha=scale))
        return folded


def project(x: Tensor, A: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """x̃ Aᵀ, [N, k·r], for x [N, d_in] and A [k, r, d_in], with x̃ = dropout(x) if there is a seed."""
    A = A.flatten(0, 1).to(x.dtype)
    if seed is None:
        return (A @ x.T).T
    return torch.cat([A @ part.T for _, part in dropped_blocks(x, dropout, seed)], dim=1).T.div_(1 - dropout)


def add_update(y: Tensor, xA: Tensor, B: Tensor, scale: float, starts: tuple[int, ...]) -> None:
    """y_j += s xA_j B_jᵀ, in place, for y [N, d_out], xA [N, k·r] and B [k, m, r]."""
    # Not addmm_'s alpha, with which it takes up to twice as long in bfloat16 on a CPU.
    parts = zip(_columns(y, starts, B), xA.split(B.shape[2], dim=1), (B * scale).to(y.dtype), strict=True)
    for y_j, xA_j, B_j in parts:
        y_j.addmm_(xA_j, B_j.T)


def backward_g(
    g: Tensor, xA: Tensor | None, B: Tensor, scale: float, starts: tuple[int, ...], need_g_xA: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x̃ Aᵀ and of B.

    Args:
        g: Gradient of y, [N, d_out].
        xA: x̃ Aᵀ, [N, k·r]; None if B does not train.
        B: Factors B, [k, m, r].
        scale: Scaling s.
        starts: First output of each projection.
        need_g_xA: Whether to compute the gradient of x̃ Aᵀ.

    Returns:
        The gradient of x̃ Aᵀ, s g_j B_j, as [N, k·r], and that of B, s g_jᵀ xA_j, as [k, m, r]; None for a gradient
        that is not needed.
    """
    parts = _columns(g, starts, B)
    g_xA = gB = None
    if need_g_xA:
        g_xA = torch.cat([B_j.T @ g_j.T for B_j, g_j in zip((B * scale).to(g.dtype), parts, strict=True)]).T
    if xA is not None:
        gB = torch.stack([xA_j.T @ g_j for xA_j, g_j in zip(xA.split(B.shape[2], 1), parts, strict=True)]).mT * scale
    return g_xA, gB


def grad_A(g_xA: Tensor, x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """The gradient of A, g_xAᵀ x̃, as [k·r, d_in], for g_xA [N, k·r] and x [N, d_in]."""
    if seed is None:
        return g_xA.T @ x
    wide = torch.promote_types(x.dtype, torch.float32)
    gA = torch.zeros(g_xA.shape[1], x.shape[1], dtype=wide, device=x.device)
    for rows, part in dropped_blocks(x, dropout, seed):
        gA += g_xA[rows].T @ part
    return gA.div_(1 - dropout)


def grad_x(g: Tensor, weight: Tensor, g_xA: Tensor, A: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """The gradient of x with dropout, g W + mask ∘ (g_xA A)/(1 − p), for g [N, d_out] and g_xA [N, k·r]."""
    g_xA, A = g_xA / (1 - dropout), A.flatten(0, 1).to(g.dtype)
    return drop_(g_xA @ A, dropout, seed).addmm_(g, weight.to(g.dtype))


def _columns(y: Tensor, starts: tuple[int, ...], B: Tensor) -> list[Tensor]:
    """View the outputs of each projection in y [N, d_out]: k matrices [N, m]."""
    return [y[:, start : start + B.shape[1]] for start in starts]


def _slices(weight: Tensor, starts: tuple[int, ...], m: int) -> Tensor:
    """View the k slices of m rows from `starts` on: [k, m, d_in].

    Not with `unfold` or `as_strided`, because writing to these views fails in a compiled graph (torch 2.14).
    """
    step = (starts[1] - starts[0]) // m if len(starts) > 1 else 1
    return weight.unflatten(0, (-1, m))[starts[0] // m :: step][: len(starts)]
