import math

import pytest
import torch

from vitlorafa.init import INITS, initialise


def start(factor, name, rank=4, d_out=40, d_in=24, seed=0, dtype=torch.float64):
    weight = torch.randn(d_out, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(dtype)
    return initialise(factor, name, rank, weight, torch.Generator().manual_seed(seed)), weight


@pytest.mark.parametrize("name", INITS)
def test_shapes_dtype_and_seed(name):
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        A, _ = start("A", name, dtype=dtype)
        B, _ = start("B", name, dtype=dtype)
        assert A.shape == (4, 24) and B.shape == (40, 4)
        assert A.dtype == B.dtype == expected
        assert A.is_contiguous() and B.is_contiguous()
    assert torch.equal(start("A", name, seed=3)[0], start("A", name, seed=3)[0])
    if name not in ("zero", "singular"):
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


def test_zero():
    assert not start("A", "zero")[0].any() and not start("B", "zero")[0].any()
