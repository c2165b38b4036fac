import math

import pytest
import torch

from vitlorafa.init import INITS, RESIDUAL, initialise


def start(factor, name, rank=4, d_out=40, d_in=24, seed=0, dtype=torch.float64, scale=2.0):
    weight = torch.randn(d_out, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(dtype)
    names = (name, name) if name in RESIDUAL else (name, "zero") if factor == "A" else ("zero", name)
    A, B = initialise([names], rank, [weight], scale, torch.Generator().manual_seed(seed))
    return (A if factor == "A" else B)[0], weight


@pytest.mark.parametrize("name", INITS)
def test_shapes_dtype_and_seed(name):
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        A, _ = start("A", name, dtype=dtype)
        B, _ = start("B", name, dtype=dtype)
        assert A.shape == (4, 24) and B.shape == (40, 4)
        assert A.dtype == B.dtype == expected
        assert A.is_contiguous() and B.is_contiguous()
    assert torch.equal(start("A", name, seed=3)[0], start("A", name, seed=3)[0])
    if name not in ("zero", "singular", "singular_minor", *RESIDUAL):
        assert not torch.equal(start("A", name, seed=3)[0], start("A", name, seed=4)[0])


@pytest.mark.parametrize("rank", [1, 5, 24])
def test_orthonormal(rank):
    A, _ = start("A", "orthonormal", rank)
    B, _ = start("B", "orthonormal", rank)
    torch.testing.assert_close(A @ A.T, torch.eye(rank, dtype=A.dtype))
    torch.testing.assert_close(B.T @ B, torch.eye(rank, dtype=B.dtype))


def test_orthonormal_is_uniform():
    # Over the Haar measure each row's direction is uniform: mean 0 and covariance I/d. Without the sign fix
    # the QR of LAPACK has a first row whose first entry is always of one sign.
    frames = torch.stack([start("A", "orthonormal", 2, d_in=3, seed=seed)[0] for seed in range(2000)])
    assert frames.mean(0).abs().max() < 5 / math.sqrt(3 * 2000)
    covariance = frames[:, 0].T @ frames[:, 0] / len(frames)
    torch.testing.assert_close(covariance, torch.eye(3, dtype=covariance.dtype) / 3, atol=0.04, rtol=0)


def test_gaussian_rows_have_length_one_in_the_mean():
    A, _ = start("A", "gaussian", 400, d_in=900)
    B, _ = start("B", "gaussian", 400, d_out=900)
    assert A.std().item() == pytest.approx(1 / 30, rel=0.02)
    assert B.std().item() == pytest.approx(1 / 30, rel=0.02)


def test_kaiming_uniform_is_that_of_a_linear_layer():
    A, _ = start("A", "kaiming_uniform", 200, d_in=100)
    B, _ = start("B", "kaiming_uniform", 16, d_out=3000)
    for factor, fan_in in [(A, 100), (B, 16)]:
        assert factor.abs().max() <= fan_in**-0.5
        assert factor.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)
    linear = torch.nn.Linear(100, 200)
    assert A.std().item() == pytest.approx(linear.weight.std().item(), rel=0.03)


def test_singular_vectors_span_the_best_approximation():
    A, weight = start("A", "singular")
    B, _ = start("B", "singular")
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    best = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
    torch.testing.assert_close(weight @ A.T @ A, best)
    torch.testing.assert_close(B @ B.T @ weight, best)
    torch.testing.assert_close(A @ A.T, torch.eye(4, dtype=A.dtype))


def test_minor_singular_vectors_are_those_that_the_weight_shrinks_most():
    A, weight = start("A", "singular_minor")
    B, _ = start("B", "singular_minor")
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    least = U[:, -4:] @ torch.diag(S[-4:]) @ Vh[-4:]
    torch.testing.assert_close(weight @ A.T @ A, least)
    torch.testing.assert_close(B @ B.T @ weight, least)
    torch.testing.assert_close(B.T @ B, torch.eye(4, dtype=B.dtype))


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize(("name", "part"), [("pissa", slice(4)), ("milora", slice(-4, None))])
def test_both_factors_start_with_a_part_of_the_weight(name, part, scale):
    A, weight = start("A", name, scale=scale)
    B, _ = start("B", name, scale=scale)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(scale * B @ A, U[:, part] @ torch.diag(S[part]) @ Vh[part])
    # The singular values are shared equally.
    torch.testing.assert_close(A @ A.T, torch.diag(S[part]) / scale)
    torch.testing.assert_close(B.T @ B, torch.diag(S[part]) / scale)


def test_uniform_and_gaussian_have_one_variance():
    for factor, shape in [("A", {"d_in": 900}), ("B", {"d_out": 900})]:
        value, _ = start(factor, "uniform", 400, **({"d_out": 500, "d_in": 500} | shape))
        assert value.std().item() == pytest.approx(1 / 30, rel=0.02)
        assert 0.99 < value.abs().max().item() / (3 / 900) ** 0.5 <= 1


def test_projections_may_start_differently():
    weights = list(torch.randn(3, 40, 24, dtype=torch.float64))
    inits = [("gaussian", "zero"), ("pissa", "pissa"), ("zero", "singular")]
    A, B = initialise(inits, 4, weights, 2.0, torch.Generator().manual_seed(0))
    assert A.shape == (3, 4, 24) and B.shape == (3, 40, 4)
    assert [bool(factor.any()) for factor in (*A, *B)] == [True, True, False, False, True, True]
    for place, names in enumerate(inits[1:], start=1):
        alone = initialise([names], 4, [weights[place]], 2.0, torch.Generator().manual_seed(0))
        assert torch.equal(A[place], alone[0][0]) and torch.equal(B[place], alone[1][0])


def test_zero():
    assert not start("A", "zero")[0].any() and not start("B", "zero")[0].any()
