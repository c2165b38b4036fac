"""The linear algebra of the analyses, against definitions written out in float64."""

import numpy as np
import pytest
from scipy.linalg import subspace_angles

from domainbed_ext.analyse import matrices
from domainbed_ext.analyse.averages import pair_intervals

D_OUT, D_IN, RANK, SAMPLES = 7, 9, 3, 40


@pytest.fixture
def draw():
    return np.random.default_rng(0)


@pytest.fixture
def layer(draw):
    """Inputs of a layer, not centred and of unequal directions, their moments, and a change of its weight."""
    x = draw.standard_normal((SAMPLES, D_IN)) * np.geomspace(3, 0.1, D_IN) + draw.standard_normal(D_IN)
    sigma = x.T @ x / SAMPLES
    return x, sigma, matrices.square_root(sigma), draw.standard_normal((D_OUT, D_IN))


def relative(error, of):
    return np.square(error).sum() / np.square(of).sum()


def test_the_similarity_is_the_mean_squared_cosine_of_the_principal_angles(draw):
    X, Y = draw.standard_normal((20, 4)), draw.standard_normal((20, 3))
    similarity = matrices.cca_similarity(matrices.column_basis(X), matrices.column_basis(Y))
    assert similarity == pytest.approx(np.mean(np.cos(subspace_angles(X, Y)) ** 2))
    # Goodness of fit: how much of an orthonormal basis of the smaller span a regression on the other explains.
    basis = np.linalg.qr(Y)[0]
    fitted = X @ np.linalg.lstsq(X, basis, rcond=None)[0]
    assert similarity == pytest.approx(1 - relative(basis - fitted, basis))


def test_the_similarity_sees_nothing_of_a_change_of_basis(draw):
    B, A, other_B = draw.standard_normal((8, 3)), draw.standard_normal((3, 6)), draw.standard_normal((8, 3))
    C = draw.standard_normal((3, 3))
    changed_B, changed_A = B @ C, np.linalg.inv(C) @ A
    assert changed_B @ changed_A == pytest.approx(B @ A)
    bases = [matrices.column_basis(each) for each in (B, changed_B, other_B)]
    assert matrices.cca_similarity(bases[0], bases[1]) == pytest.approx(1)
    assert matrices.cca_similarity(bases[0], bases[2]) == pytest.approx(matrices.cca_similarity(bases[1], bases[2]))
    assert matrices.cca_similarity(bases[0], bases[2]) < 0.9
    assert matrices.cca_similarity(matrices.row_basis(A), matrices.row_basis(changed_A)) == pytest.approx(1)


def test_spans_have_the_rank_of_their_matrix(draw):
    column = draw.standard_normal((6, 1))
    assert matrices.column_basis(np.hstack([column, 2 * column])).shape == (6, 1)
    nothing = matrices.column_basis(np.zeros((6, 2)))
    assert nothing.shape == (6, 0) and np.isnan(matrices.cca_similarity(nothing, column))
    first, last = np.eye(6)[:, :2], np.eye(6)[:, 3:]
    assert matrices.cca_similarity(first, last) == 0 and matrices.cca_similarity(first, np.eye(6)) == 1


def test_random_rows_are_orthonormal_and_uniform(draw):
    rows = [matrices.random_orthonormal(2, 5, draw) for _ in range(4000)]
    assert rows[0] @ rows[0].T == pytest.approx(np.eye(2))
    assert np.mean([Q.T @ Q for Q in rows], axis=0) == pytest.approx(2 / 5 * np.eye(5), abs=0.02)
    assert np.mean(rows, axis=0) == pytest.approx(np.zeros((2, 5)), abs=0.03)


def test_the_root_squares_to_the_moments_and_measures_outputs(layer):
    x, sigma, root, change = layer
    assert root @ root == pytest.approx(sigma) and root == pytest.approx(root.T)
    assert np.square(change @ root).sum() == pytest.approx(np.square(x @ change.T).sum(1).mean())


def test_the_best_B_is_a_regression_on_projected_inputs(layer, draw):
    x, sigma, root, change = layer
    A = draw.standard_normal((RANK, D_IN))
    loss = matrices.loss_of_best_B(change @ root, A, root)
    y, projected = x @ change.T, x @ A.T
    fitted = projected @ np.linalg.lstsq(projected, y, rcond=None)[0]
    assert loss == pytest.approx(relative(y - fitted, y))
    Q = np.linalg.qr(A.T)[0].T  # lemma 4.1 has orthonormal rows
    explained = Q @ sigma @ change.T @ change @ sigma @ Q.T @ np.linalg.inv(Q @ sigma @ Q.T)
    assert loss == pytest.approx(1 - np.trace(explained) / np.trace(change @ sigma @ change.T))
    best = change @ sigma @ Q.T @ np.linalg.inv(Q @ sigma @ Q.T)
    assert loss == pytest.approx(relative(y - x @ (best @ Q).T, y))


def test_the_best_A_is_a_projection_of_the_change(layer, draw):
    x, sigma, root, change = layer
    B = draw.standard_normal((D_OUT, RANK))
    loss = matrices.loss_of_best_A(change @ root, B)
    y = x @ change.T
    # ‖y − x Aᵀ Bᵀ‖ is a least squares problem in the entries of A.
    design = np.einsum("ni,or->nori", x, B).reshape(SAMPLES * D_OUT, RANK * D_IN)
    entries = np.linalg.lstsq(design, y.ravel(), rcond=None)[0]
    assert loss == pytest.approx(relative(y - x @ (B @ entries.reshape(RANK, D_IN)).T, y))
    U = np.linalg.qr(B)[0]  # lemma 4.2 has orthonormal columns
    explained = np.trace(U.T @ change @ sigma @ change.T @ U)
    assert loss == pytest.approx(1 - explained / np.trace(change @ sigma @ change.T))
    assert loss == pytest.approx(relative(y - x @ (U @ (U.T @ change)).T, y))


def test_alternating_regressions_reach_the_best_product(layer, draw):
    x, _, root, change = layer
    values = matrices.singular_values(change @ root)
    best = matrices.losses_of_best_product(values, [RANK])[0]
    B, A = draw.standard_normal((D_OUT, RANK)), draw.standard_normal((RANK, D_IN))
    y = x @ change.T
    for _ in range(300):  # each factor's regression in turn
        B = np.linalg.lstsq(x @ A.T, y, rcond=None)[0].T
        A = np.linalg.lstsq(B, change, rcond=None)[0]
    assert relative(y - x @ (B @ A).T, y) == pytest.approx(best, rel=1e-3)
    assert matrices.losses_of_best_product(values, [D_OUT]) == pytest.approx([0])
    assert best < matrices.loss_of_best_B(change @ root, draw.standard_normal((RANK, D_IN)), root)


@pytest.mark.parametrize("rank_of_inputs", [D_IN, 2])
def test_losses_of_several_ranks_are_those_of_each(layer, draw, rank_of_inputs):
    x, _, _, change = layer
    some = x[:, :rank_of_inputs] @ draw.standard_normal((rank_of_inputs, D_IN))
    root = matrices.square_root(some.T @ some / SAMPLES)
    A, U = matrices.random_orthonormal(5, D_IN, draw), matrices.random_orthonormal(5, D_OUT, draw).T
    target, ranks = change @ root, [1, 2, 5]
    expected = [matrices.loss_of_best_B(target, A[:rank], root) for rank in ranks]
    assert matrices.losses_of_best_B(target, A, root, ranks) == pytest.approx(expected, abs=1e-6)
    assert (expected[1] < 1e-6) is (rank_of_inputs == 2)  # all that the inputs span
    expected = [matrices.loss_of_best_A(target, U[:, :rank]) for rank in ranks]
    assert matrices.losses_of_best_A(target, U, ranks) == pytest.approx(expected)


def test_inputs_of_few_directions_favour_a_random_A(draw):
    """Theorem 4.3: with equal directions neither has an advantage; expectations are 1 − r/d."""
    change = draw.standard_normal((30, 30))
    losses = {}
    for name, sizes in (("equal", np.ones(30)), ("few", np.geomspace(1, 1e-4, 30))):
        root = np.diag(np.sqrt(sizes))
        A = [matrices.random_orthonormal(6, 30, draw) for _ in range(40)]
        losses[name] = (
            np.mean([matrices.loss_of_best_B(change @ root, Q, root) for Q in A]),
            np.mean([matrices.loss_of_best_A(change @ root, Q.T) for Q in A]),
        )
    assert losses["equal"] == pytest.approx((0.8, 0.8), abs=0.03)
    assert losses["few"][0] < 0.4 and losses["few"][1] == pytest.approx(0.8, abs=0.1)


def test_the_loss_of_an_update_is_measured_on_outputs(layer, draw):
    x, _, root, change = layer
    update = change + draw.standard_normal((D_OUT, D_IN))
    reached, scaled = matrices.loss_of_update(change @ root, update, root)
    y, ours = x @ change.T, x @ update.T
    assert reached == pytest.approx(relative(y - ours, y))
    best = (y * ours).sum() / np.square(ours).sum()
    assert scaled == pytest.approx(relative(y - best * ours, y)) and scaled <= reached
    assert matrices.loss_of_update(change @ root, 3 * change, root) == pytest.approx((4, 0))
    assert matrices.loss_of_update(change @ root, 0 * change, root) == pytest.approx((1, 1))
    assert np.isnan(matrices.loss_of_update(0 * change, change, root)).all()


def test_the_residual_in_another_A_is_that_of_the_nearest_product(layer, draw):
    x, _, root, _ = layer
    B, A, other = (draw.standard_normal(shape) for shape in ((D_OUT, RANK), (RANK, D_IN), (RANK, D_IN)))
    nearest = np.linalg.lstsq(other.T, (B @ A).T, rcond=None)[0].T
    expected = np.linalg.norm(B @ A - nearest @ other) / np.linalg.norm(B @ A)
    assert matrices.residual_in(B, A, other) == pytest.approx(expected)
    outputs = x @ (B @ A).T
    fitted = x @ other.T @ np.linalg.lstsq(x @ other.T, outputs, rcond=None)[0]
    assert matrices.residual_in(B, A, other, root) == pytest.approx(np.sqrt(relative(outputs - fitted, outputs)))
    assert matrices.residual_in(B, A, draw.standard_normal((RANK, RANK)) @ A) == pytest.approx(0, abs=1e-6)


def test_energies_are_shares_of_the_squared_norm(draw):
    left, right = draw.standard_normal((12, 4)), draw.standard_normal((4, 9))
    values = np.linalg.svd(left @ right, compute_uv=False)[:4]
    assert matrices.singular_values_of_product(left, right) == pytest.approx(values)
    shares = matrices.energy_shares(values, [1, 2, 4])
    assert shares == pytest.approx([np.square(values[:k]).sum() / np.square(values).sum() for k in (1, 2, 4)])
    assert np.isnan(matrices.energy_shares(np.zeros(3), [1])).all()
    change = draw.standard_normal((12, 20))
    bases = [matrices.random_orthonormal(5, 20, draw).T for _ in range(300)]
    expected = np.square(change @ bases[0] @ bases[0].T).sum() / np.square(change).sum()
    assert matrices.update_energy(change, bases[0]) == pytest.approx(expected)
    assert np.mean([matrices.update_energy(change, basis) for basis in bases]) == pytest.approx(5 / 20, abs=0.01)


def test_intervals_are_over_runs_and_not_over_the_pairs_that_share_them(draw):
    runs = 12
    pairs = [(i, j) for i in range(runs) for j in range(i)]
    quality = draw.standard_normal(runs)  # all pairs of a run share its own
    values = np.array([[quality[i] + quality[j]] for i, j in pairs])
    means, low, high = pair_intervals(values, pairs)
    assert means == pytest.approx(values.mean(0)) and low < means < high
    of_pairs = 2 * 1.96 * values.std() / np.sqrt(len(pairs))
    assert (high - low)[0] > 2 * of_pairs
    assert [each.tolist() for each in pair_intervals(values, pairs)] == [each.tolist() for each in (means, low, high)]
    means, low, high = pair_intervals(values[:1], pairs[:1])
    assert means == values[0] and np.isnan([low, high]).all()
