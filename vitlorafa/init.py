"""Initialisations of the factors A [r, d_in] and B [d_out, r].

Each initialisation of one factor is written once, for a matrix with r rows and the width of a weight's input. B is
initialised like A on the transposed weight, then transposed. Others start both factors with a part of the weight, which
the update then starts without. All are drawn on the CPU in float32 or better, so that a seed gives the same
factors on every device and for every precision of the model.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from vitlorafa.errors import AdapterError

# (rank, weight [*, width], fan_in, generator) -> [rank, width]
Init = Callable[[int, Tensor, int, Generator], Tensor]


def orthonormal(rank: int, weight: Tensor, fan_in: int, generator: Generator) -> Tensor:
    """Orthonormal rows, drawn uniformly: A Aᵀ = I, Bᵀ B = I.

    The Q of a Gaussian matrix's QR decomposition is uniform (Haar) only after R's diagonal is made positive (Mezzadri
    2007, "How to generate random matrices from the classical compact groups").
    """
    frame, triangle = torch.linalg.qr(gaussian(rank, weight, fan_in, generator).T)
    return (frame * triangle.diagonal().sign()).T


def gaussian(rank: int, weight: Tensor, fan_in: int, generator: Generator) -> Tensor:
    """Independent normal entries with standard deviation 1/√width, so that rows have about length one."""
    width = weight.shape[1]
    return torch.randn(rank, width, dtype=_dtype(weight), device="cpu", generator=generator) / math.sqrt(width)


def uniform(rank: int, weight: Tensor, fan_in: int, generator: Generator) -> Tensor:
    """Independent uniform entries with the variance of `gaussian`, so that the two differ in the distribution alone."""
    width = weight.shape[1]
    entries = torch.rand(rank, width, dtype=_dtype(weight), device="cpu", generator=generator)
    return (2 * entries - 1) * math.sqrt(3 / width)


def kaiming_uniform(rank: int, weight: Tensor, fan_in: int, generator: Generator) -> Tensor:
    """Uniform in ±1/√fan_in, like `nn.Linear` (Kaiming with a = √5) and like A in PEFT's LoRA."""
    entries = torch.rand(rank, weight.shape[1], dtype=_dtype(weight), device="cpu", generator=generator)
    return (2 * entries - 1) / math.sqrt(fan_in)


def singular(rank: int, weight: Tensor, fan_in: int, generator: Generator) -> Tensor:
    """The leading singular vectors of the weight: right ones for A, left ones for B."""
    return _svd(weight)[2][:rank]


def singular_minor(rank: int, weight: Tensor, fan_in: int, generator: Generator) -> Tensor:
    """The singular vectors of the smallest singular values: right ones for A, left ones for B."""
    return _svd(weight)[2][-rank:]


def zero(rank: int, weight: Tensor, fan_in: int, generator: Generator) -> Tensor:
    """All zero, so that the update starts at zero."""
    return torch.zeros(rank, weight.shape[1], dtype=_dtype(weight), device="cpu")


def pissa(rank: int, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The leading singular values and vectors: s·B·A is the best approximation of the weight (Meng et al. 2024)."""
    return _factorise(_svd(weight), slice(rank), scale)


def milora(rank: int, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The smallest singular values and their vectors (MiLoRA, Wang et al. 2024)."""
    return _factorise(_svd(weight), slice(-rank, None), scale)


_SINGLE: dict[str, Init] = {
    function.__name__: function
    for function in (orthonormal, gaussian, uniform, kaiming_uniform, singular, singular_minor, zero)
}
# Those of both factors, whose update starts at s·B·A: the frozen weight becomes the residual W - s·B·A.
RESIDUAL: dict[str, Callable[[int, Tensor, float], tuple[Tensor, Tensor]]] = {
    function.__name__: function for function in (pissa, milora)
}
INITS: tuple[str, ...] = (*_SINGLE, *RESIDUAL)


def initialise(
    inits: Sequence[tuple[str, str]], rank: int, weights: Sequence[Tensor], scale: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """The initial values of the factors of a layer's projections.

    Args:
        inits: Names in `INITS` of A and B, for each projection; those in `RESIDUAL` are of both.
        rank: Rank r, at most d_in and m.
        weights: Pretrained weights of the projections, [m, d_in] each.
        scale: Scaling s.
        generator: Generator on the CPU.

    Returns:
        A, [k, r, d_in], and B, [k, m, r], on the weights' device.
    """
    pairs = [RESIDUAL[a](rank, W, scale) if a in RESIDUAL else None for (a, _), W in zip(inits, weights, strict=True)]

    def factor(place: int) -> Tensor:
        parts = [
            pair[place] if pair else _initialise(place, names[place], rank, W, generator)
            for pair, names, W in zip(pairs, inits, weights, strict=True)
        ]
        return torch.stack(parts).contiguous().to(weights[0].device)

    return factor(0), factor(1)


def blank_factors(rank: int, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Factors of zeros, for values that are loaded: singular values of large weights take long.

    Args:
        rank: Rank r.
        weights: Pretrained weights of the projections, [m, d_in] each.

    Returns:
        A, [k, r, d_in], and B, [k, m, r], on the weights' device.
    """
    (m, d_in), k, dtype = weights[0].shape, len(weights), _dtype(weights[0])
    return weights[0].new_zeros(k, rank, d_in, dtype=dtype), weights[0].new_zeros(k, m, rank, dtype=dtype)


def _initialise(place: int, name: str, rank: int, weight: Tensor, generator: Generator) -> Tensor:
    """A if `place` is 0, B if it is 1."""
    if place == 0:
        return _SINGLE[name](rank, weight, weight.shape[1], generator)
    return _SINGLE[name](rank, weight.T, rank, generator).T


def _svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if weight.is_meta:
        raise AdapterError("a start at singular vectors needs a weight with values, and this one is on the meta device")
    U, S, Vh = torch.linalg.svd(weight.detach().to("cpu", _dtype(weight)), full_matrices=False)
    return U, S, Vh


def _factorise(svd: tuple[Tensor, Tensor, Tensor], part: slice, scale: float) -> tuple[Tensor, Tensor]:
    """A and B with s·B·A = U S Vᵀ of a part of the singular values."""
    U, S, Vh = svd
    root = (S[part] / scale).sqrt()
    return root[:, None] * Vh[part], U[:, part] * root


def _dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
