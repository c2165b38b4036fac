"""Products of factors: their norm, and their best approximation at a lower rank, without forming them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Approximation(NamedTuple):
    """The best approximation of a matrix M at a rank r, in the Frobenius norm (Eckart and Young 1936).

    Attributes:
        U: Left singular vectors, [m, r].
        S: Singular values, [r]; zero beyond the rank of M.
        V: Right singular vectors, as rows, [r, d].
        error: Norm of the difference.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    error: float


def approximate(left: Tensor, right: Tensor, rank: int) -> Approximation:
    """The best approximation of `left @ right` at a rank.

    QR decompositions reduce the product to a core of [K, K], of which the singular values are those of the product:
    left = Q₁R₁ and rightᵀ = Q₂R₂, so left·right = Q₁(R₁R₂ᵀ)Q₂ᵀ. This takes O((m + d)·K²) instead of O(m·d·min(m, d)).

    Args:
        left: Matrix, [m, K].
        right: Matrix, [K, d].
        rank: Rank r, at most m and d.
    """
    (Q1, R1), (Q2, R2) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(R1 @ R2.T, full_matrices=False)
    U, Vh = Q1 @ U, Vh @ Q2.T
    error = float(S[rank:].norm())
    missing = rank - len(S)
    if missing > 0:
        U, S, Vh = (
            torch.nn.functional.pad(each, pad)
            for each, pad in ((U, (0, missing)), (S, (0, missing)), (Vh, (0, 0, 0, missing)))
        )
    return Approximation(U[:, :rank], S[:rank], Vh[:rank], error)


def product_norm(left: Tensor, right: Tensor) -> float:
    """The Frobenius norm of `left @ right`, from the factors: of [m, K] and [K, d]."""
    return float((torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T).norm())
