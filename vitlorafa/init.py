"""Initialisations of the factors A [r, d_in] and B [d_out, r].

Each initialisation is written once, for a matrix with r rows and the width of a weight's input. B is initialised like A
on the transposed weight, then transposed. All are drawn on the CPU in float32 or better, so that a seed gives the same
factors on every device and for every precision of the model.
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

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


def kaiming_uniform(rank: int, weight: Tensor, fan_in: int, generator: Generator) -> Tensor:
    """Uniform in ±1/√fan_in, like `nn.Linear` (Kaiming with a = √5) and like A in PEFT's LoRA."""
    entries = torch.rand(rank, weight.shape[1], dtype=_dtype(weight), device="cpu", generator=generator)
    return (2 * entries - 1) / math.sqrt(fan_in)


def singular(rank: int, weight: Tensor, fan_in: int, generator: Generator) -> Tensor:
    """The leading singular vectors of the weight: right ones for A, left ones for B."""
    return torch.linalg.svd(weight.detach().to("cpu", _dtype(weight)), full_matrices=False).Vh[:rank]


def zero(rank: int, weight: Tensor, fan_in: int, generator: Generator) -> Tensor:
    """All zero, so that the update starts at zero."""
    return torch.zeros(rank, weight.shape[1], dtype=_dtype(weight), device="cpu")


INITS: dict[str, Init] = {
    function.__name__: function for function in (orthonormal, gaussian, kaiming_uniform, singular, zero)
}


def initialise(factor: str, name: str, rank: int, weight: Tensor, generator: Generator) -> Tensor:
    """The initial value of one factor.

    Args:
        factor: "A" or "B".
        name: Name in `INITS`.
        rank: Rank r, at most d_in and d_out.
        weight: Pretrained weight, [d_out, d_in].
        generator: Generator on the CPU.

    Returns:
        A, [r, d_in], or B, [d_out, r], on the weight's device.
    """
    if factor == "A":
        value = INITS[name](rank, weight, weight.shape[1], generator)
    else:
        value = INITS[name](rank, weight.T, rank, generator).T
    return value.contiguous().to(weight.device)


def _dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
