"""The linear algebra of the analyses, in float64.

Matrices are named as in the papers: A [r, d_in], B [d_out, r], Δ [d_out, d_in] for the change of a weight, and Σ
[d_in, d_in] for the second moments of a layer's inputs x. `root` is the symmetric square root of Σ: the mean of ‖M x‖²
is ‖M root‖² for any M.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

_ROUNDING = float(np.finfo(np.float32).eps)  # trained factors are float32


def column_basis(matrix: Matrix) -> Matrix:
    """An orthonormal basis of the span of a matrix's columns.

    Args:
        matrix: Matrix, [n, r].

    Returns:
        [n, rank]; directions that are rounding errors of float32 do not count.
    """
    U, S, _ = np.linalg.svd(matrix, full_matrices=False)
    least = max(matrix.shape) * _ROUNDING * S.max(initial=0.0)
    return U[:, least < S]


def row_basis(matrix: Matrix) -> Matrix:
    """An orthonormal basis of the span of a matrix's rows, [n, rank], of a matrix [r, n]."""
    return column_basis(matrix.T)


def cca_similarity(X: Matrix, Y: Matrix) -> float:
    """The goodness of fit of canonical correlation analysis: ‖YᵀX‖² / min(rank), in [0, 1].

    It is the mean squared cosine of the principal angles between two subspaces (Ramsay et al. 1984; Zhu et al. 2024,
    appendix D), so it does not change when B becomes BC and A becomes C⁻¹A.

    Args:
        X: Orthonormal basis, [n, r₁].
        Y: Orthonormal basis, [n, r₂].

    Returns:
        Similarity; NaN if a subspace is zero.
    """
    rank = min(X.shape[1], Y.shape[1])
    return float(np.square(Y.T @ X).sum() / rank) if rank else float("nan")


def square_root(sigma: Matrix) -> Matrix:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(sigma)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def random_orthonormal(rows: int, width: int, generator: np.random.Generator) -> Matrix:
    """Orthonormal rows [rows, width], uniform on their Stiefel manifold; so are the first k of them for any k."""
    Q, R = np.linalg.qr(generator.standard_normal((width, rows)))
    return (Q * np.sign(np.diagonal(R))).T


def loss_of_best_B(target: Matrix, A: Matrix, root: Matrix) -> float:
    """What the best B leaves of a change (Zhu et al. 2024, lemma 4.1), as a share of the loss without an update.

    The best B is the regression of Δx on Ax: B* = ΔΣAᵀ(AΣAᵀ)⁻¹.

    Args:
        target: Δ root, [d_out, d_in].
        A: Fixed factor, [r, d_in].
        root: Square root of Σ, [d_in, d_in].

    Returns:
        The mean of ‖Δx − B*Ax‖² over that of ‖Δx‖², in [0, 1]; NaN if Δ is zero.
    """
    return _share_outside(target, column_basis((A @ root).T))


def losses_of_best_B(target: Matrix, A: Matrix, root: Matrix, ranks: Sequence[int]) -> list[float]:
    """`loss_of_best_B` for the first k rows of a random A, for several k at once."""
    # Where the first columns span all that Δ sees of x, further ones are arbitrary, but hold nothing of the target.
    return _shares_outside(target, np.linalg.qr((A @ root).T)[0], ranks)


def losses_of_best_A(target: Matrix, B: Matrix, ranks: Sequence[int]) -> list[float]:
    """`loss_of_best_A` for the first k columns of an orthonormal B, for several k at once."""
    return _shares_outside(target.T, B, ranks)


def loss_of_best_A(target: Matrix, B: Matrix) -> float:
    """What the best A leaves of a change (Zhu et al. 2024, lemma 4.2), as a share of the loss without an update.

    The best A is that of the projected change, A* = UᵀΔ for an orthonormal basis U of B, whatever Σ is.

    Args:
        target: Δ root, [d_out, d_in].
        B: Fixed factor, [d_out, r].

    Returns:
        The mean of ‖Δx − BA*x‖² over that of ‖Δx‖², in [0, 1]; NaN if Δ is zero.
    """
    return _share_outside(target.T, column_basis(B))


def losses_of_best_product(values: Matrix, ranks: Sequence[int]) -> list[float]:
    """What the best BA leaves of a change at some ranks, as a share of the loss without an update.

    Args:
        values: Singular values of Δ root, descending.
        ranks: Ranks.
    """
    return [max(0.0, 1 - share) for share in energy_shares(values, ranks)]


def loss_of_update(target: Matrix, update: Matrix, root: Matrix) -> tuple[float, float]:
    """What a trained update D leaves of a change, as a share of the loss without an update.

    Args:
        target: Δ root, [d_out, d_in].
        update: D, [d_out, d_in].
        root: Square root of Σ, [d_in, d_in].

    Returns:
        The mean of ‖Δx − Dx‖² over that of ‖Δx‖², which is above 1 where no update is nearer; and the same of cD with
        the best number c, which is 1 − cos² of the angle between Δ and D.
    """
    reached = update @ root
    size, length = float(np.square(target).sum()), float(np.square(reached).sum())
    if not size:
        return float("nan"), float("nan")
    common = float((target * reached).sum())
    return (size - 2 * common + length) / size, 1 - common**2 / (size * length) if length else 1.0


def residual_in(B: Matrix, A: Matrix, other: Matrix, root: Matrix | None = None) -> float:
    """The relative residual of re-expressing BA in another A (LoRA-FA, theorem 3.1).

    Args:
        B: Trained factor, [d_out, r].
        A: Trained factor, [r, d_in].
        other: The other A, [k, d_in].
        root: Square root of Σ, for the norm that the layer's outputs see; None for the plain Frobenius norm.

    Returns:
        The minimum over B' of ‖(BA − B'·other) root‖ over ‖BA root‖, in [0, 1]; NaN if BA is zero.
    """
    weighted, directions = (A, other) if root is None else (A @ root, other @ root)
    return float(np.sqrt(_share_outside(B @ weighted, column_basis(directions.T))))


def singular_values(matrix: Matrix) -> Matrix:
    """The singular values of a matrix, descending."""
    return np.asarray(np.linalg.svd(matrix, compute_uv=False), dtype=np.float64)


def singular_values_of_product(left: Matrix, right: Matrix) -> Matrix:
    """The singular values of `left @ right`, of [m, r] and [r, d], without forming it."""
    return singular_values(np.linalg.qr(left)[1] @ np.linalg.qr(right.T)[1].T)


def energy_shares(values: Matrix, counts: Sequence[int]) -> list[float]:
    """The shares of a matrix's squared norm that its first k singular directions hold; NaN if it is zero.

    Args:
        values: Singular values, descending.
        counts: The numbers k.
    """
    energies = np.square(values)
    total = float(energies.sum())
    return [float(energies[:k].sum() / total) if total else float("nan") for k in counts]


def update_energy(change: Matrix, basis: Matrix) -> float:
    """The share ‖MP‖²/‖M‖² of a matrix's squared norm that lies in a subspace of its inputs, with P its projector.

    LoRA-FA calls ‖GP‖² the update energy of a gradient G (appendix E.3). A random subspace holds r/d in expectation.

    Args:
        change: M, [m, d].
        basis: Orthonormal basis of the subspace, [d, r].
    """
    return 1 - _share_outside(change, basis)


def _shares_outside(matrix: Matrix, basis: Matrix, counts: Sequence[int]) -> list[float]:
    """`_share_outside` for the first k columns of an orthonormal basis, for several k."""
    total = float(np.square(matrix).sum())
    inside = np.square(matrix @ basis).sum(0).cumsum()
    return [max(0.0, 1 - float(inside[k - 1]) / total) if total else float("nan") for k in counts]


def _share_outside(matrix: Matrix, basis: Matrix) -> float:
    """The share of the squared norm of [m, d] that is outside the span of a basis [d, r]; NaN of zero."""
    total = float(np.square(matrix).sum())
    return max(0.0, 1 - float(np.square(matrix @ basis).sum()) / total) if total else float("nan")
