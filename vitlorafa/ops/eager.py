"""The layer's steps in plain PyTorch, for every device.

Each step computes all k projections together, as batched matmuls over views of the k slices. x Aᵀ is computed as the
transpose of A xᵀ: on a CPU, oneDNN's low-precision matmuls over the N rows then read memory in order, which is up to
four times as fast at small ranks.
"""

import torch
from torch import Tensor

from vitlorafa.ops.reference import dropout_mask


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
        slices = _slices(weight, starts, m, dim=0).to(wide)
        folded = weight.to(dtype, copy=True)
        _slices(folded, starts, m, dim=0).copy_(torch.baddbmm(slices, B.to(wide), A.to(wide), alpha=scale))
        return folded


def project(x: Tensor, A: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """x̃ Aᵀ, [N, k·r], for x [N, d_in] and A [k, r, d_in], with x̃ = dropout(x) if there is a seed."""
    xA = (A.flatten(0, 1).to(x.dtype) @ _masked(x, dropout, seed).T).T
    return xA if seed is None else xA.div_(1 - dropout)


def add_update(y: Tensor, xA: Tensor, B: Tensor, scale: float, starts: tuple[int, ...]) -> None:
    """y_j += s xA_j B_jᵀ, in place, for y [N, d_out], xA [N, k·r] and B [k, m, r]."""
    k, m, _ = B.shape
    B = B.to(y.dtype)
    if m == y.shape[1]:
        y.addmm_(xA, B[0].T, alpha=scale)
    else:  # not baddbmm_, which is a hundred times slower on slices in low precision on a CPU
        _slices(y, starts, m, dim=1).add_(torch.bmm(_parts(xA, k), B.mT), alpha=scale)


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
    k, m, _ = B.shape
    g_slices = _slices(g, starts, m, dim=1)
    g_xA = (B.to(g.dtype).mT @ g_slices.mT).flatten(0, 1).T * scale if need_g_xA else None
    gB = None if xA is None else torch.bmm(_parts(xA, k).mT, g_slices).mT * scale
    return g_xA, gB


def grad_A(g_xA: Tensor, x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """The gradient of A, g_xAᵀ x̃, as [k·r, d_in], for g_xA [N, k·r] and x [N, d_in]."""
    return (g_xA.T @ _masked(x, dropout, seed)) / (1 - dropout)


def add_masked(gx: Tensor, g_xA: Tensor, A: Tensor, dropout: float, seed: Tensor) -> None:
    """gx += mask ∘ (g_xA A)/(1 − p), in place: the part of x's gradient that comes from the adapter.

    Not with add_'s alpha: gx is the result of a matmul, and Inductor (torch 2.14) fuses both and drops alpha.
    """
    gx.add_(_masked(g_xA / (1 - dropout) @ A.flatten(0, 1).to(gx.dtype), dropout, seed))


def _masked(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """mask ∘ x, or x if there is no seed."""
    return x if seed is None else _drop(x, dropout, seed)


@torch.library.custom_op("vitlorafa::drop", mutates_args=())
def _drop(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """mask ∘ x as one operation for a compiler, which would otherwise draw the mask once and keep it for backward."""
    return x * dropout_mask(list(x.shape), x.device, dropout, seed)


@_drop.register_fake
def _(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    return x * torch.empty(x.shape, dtype=torch.bool, device=x.device)  # has the strides of the result


def _slices(tensor: Tensor, starts: tuple[int, ...], m: int, dim: int) -> Tensor:
    """View the k slices of m from `starts` on along `dim` of a matrix: [k, m, d_in] for dim 0, [k, N, m] for dim 1.

    Not with `unfold` or `as_strided`, because writing to these views fails in a compiled graph (torch 2.14).
    """
    slices = tensor.unflatten(dim, (-1, m)).movedim(dim, 0)
    step = (starts[1] - starts[0]) // m if len(starts) > 1 else 1
    return slices[starts[0] // m :: step][: len(starts)]


def _parts(xA: Tensor, k: int) -> Tensor:
    """View xA [N, k·r] as [k, N, r]."""
    return xA.unflatten(1, (k, -1)).transpose(0, 1)
