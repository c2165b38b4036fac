"""The mean of the updates of several adapters, as an adapter.

With the same frozen A in all of them, Σ wᵢ·s·Bᵢ·A = s·(Σ wᵢ·Bᵢ)·A: the mean of the trained factors is the adapter of
the mean update, exactly and at the same rank. The same holds for one B. If both factors differ, the mean of both is
not: (Σ wᵢ·Bᵢ)·(Σ wᵢ·Aᵢ) also contains products of factors of different adapters, and the mean update of k adapters has
a rank up to k·r. Its best approximation at a lower rank is then computed by singular values.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError, abbreviate
from vitlorafa.init import RESIDUAL
from vitlorafa.low_rank import approximate, product_norm
from vitlorafa.saved import Factors, SavedAdapter, are_same, check_same_size


class MeanUpdate(NamedTuple):
    """The adapter of a mean update.

    Attributes:
        config: Configuration.
        layers: Factors by layer.
        residual: Relative residual over all layers in the Frobenius norm.
        residuals: The same for each layer.
    """

    config: AdapterConfig
    layers: dict[str, Factors]
    residual: float
    residuals: dict[str, float]


def mean_update(adapters: Sequence[SavedAdapter], shares: Sequence[float], rank: int | None) -> MeanUpdate:
    """The adapter whose update is the mean of the updates, exactly in each layer where this is possible.

    Args:
        adapters: Adapters of one model with the same projections.
        shares: Weight of each adapter; their sum is 1.
        rank: Rank of the result; if None, the adapters' own, at which it has to be exact.

    Raises:
        AdapterError: If the rank is None and the mean is not exact, or if the rank is too large.
    """
    first = adapters[0].config
    parts = {name: [each.layers[name] for each in adapters] for name in adapters[0].layers}
    is_same_size = all((each.config.rank, each.config.scale) == (rank or first.rank, first.scale) for each in adapters)
    keeps_start = is_same_size and all(map(_starts_are_same, parts.values()))
    exact = {name: _exact(each, shares, keeps_start) if is_same_size else None for name, each in parts.items()}
    if rank is None:
        _check_exact(adapters, [name for name, factors in exact.items() if factors is None])
    config = _config(first, rank or first.rank, keeps_start)
    weights = [share * each.config.scale / config.scale for share, each in zip(shares, adapters, strict=True)]
    layers, lost, norms = {}, {}, {}
    for name, each in parts.items():
        factors = exact[name]
        if factors is None:
            _check_width(name, each[0], config.rank)
            factors, lost[name] = _approximate(each, weights, config, keeps_start)
        layers[name] = factors
        norms[name] = _norm(each, weights)
    residuals = {name: lost.get(name, 0.0) / norm if norm else 0.0 for name, norm in norms.items()}
    total = math.hypot(*norms.values())
    return MeanUpdate(config, layers, math.hypot(*lost.values()) / total if total else 0.0, residuals)


def mean_of(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted mean, summed in float64; rounded to whole numbers where the tensors hold these.

    Args:
        tensors: Tensors of one shape.
        shares: Weight of each tensor; their sum is 1.
    """
    dtype = _common_dtype(tensors)
    mean = sum(share * tensor.double() for share, tensor in zip(shares, tensors, strict=True))
    assert isinstance(mean, Tensor)
    return (mean if dtype.is_floating_point else mean.round()).to(dtype)


def _exact(parts: Sequence[Factors], shares: Sequence[float], keeps_start: bool) -> Factors | None:
    """The mean of the factor that differs; None if both do, or if the start has to go."""
    first = parts[0]
    if not keeps_start and first.start_A is not None:
        return None
    if are_same([each.A for each in parts]):
        return first._replace(B=mean_of([each.B for each in parts], shares))
    if are_same([each.B for each in parts]):
        return first._replace(A=mean_of([each.A for each in parts], shares))
    return None


def _approximate(
    parts: Sequence[Factors], weights: Sequence[float], config: AdapterConfig, keeps_start: bool
) -> tuple[Factors, float]:
    """The factors of the best approximation, and the norm of what is lost.

    A start that all adapters share is kept: the update B·A − B₀·A₀ is small beside B₀·A₀, and B·A near its rank.
    """
    first = parts[0]
    products = [_product(parts, weights, j, not keeps_start) for j in range(len(first.A))]
    best = [approximate(left, right, config.rank) for left, right in products]
    frozen_B = config.train == "A"  # the frozen factor is orthonormal, as at a start
    A = torch.stack([each.S[:, None] * each.V if frozen_B else each.V for each in best])
    B = torch.stack([each.U if frozen_B else each.U * each.S for each in best])
    dtype = _common_dtype([factor for each in parts for factor in (each.A, each.B)])
    start = (first.start_A, first.start_B) if keeps_start else (None, None)
    return Factors(A.to(dtype), B.to(dtype), *start), math.hypot(*(each.error for each in best))


def _norm(parts: Sequence[Factors], weights: Sequence[float]) -> float:
    """The norm of the mean update of a layer, relative to the scale."""
    return math.hypot(*(product_norm(*_product(parts, weights, j, True)) for j in range(len(parts[0].A))))


def _product(
    parts: Sequence[Factors], weights: Sequence[float], projection: int, with_start: bool
) -> tuple[Tensor, Tensor]:
    """Factors [m, K] and [K, d_in], in float64, of the weighted sum of a projection's B·A, or of its B·A − B₀·A₀."""
    lefts, rights = [], []
    for part, weight in zip(parts, weights, strict=True):
        lefts.append(weight * part.B[projection].double())
        rights.append(part.A[projection].double())
        if with_start and part.start_A is not None and part.start_B is not None:
            lefts.append(-weight * part.start_B[projection].double())
            rights.append(part.start_A[projection].double())
    return torch.cat(lefts, dim=1), torch.cat(rights)


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _starts_are_same(parts: Sequence[Factors]) -> bool:
    return are_same([each.start_A for each in parts]) and are_same([each.start_B for each in parts])


def _check_exact(adapters: Sequence[SavedAdapter], inexact: Sequence[str]) -> None:
    remedy = "pass rank= for the best approximation of their mean"
    check_same_size(adapters, remedy)
    if inexact:
        raise AdapterError(
            f"the adapters share neither A nor B in {abbreviate(inexact)}, so their mean has a higher rank than "
            f"{adapters[0].config.rank}: train them with one seed and one frozen factor, or {remedy}"
        )


def _check_width(name: str, factors: Factors, rank: int) -> None:
    width = min(factors.A.shape[2], factors.B.shape[1])
    if rank > width:
        raise AdapterError(f"rank {rank} is larger than the width {width} of {name}: choose a smaller rank")


def _config(config: AdapterConfig, rank: int, keeps_start: bool) -> AdapterConfig:
    """The config with another rank and the same scale; without a start at a part of the weight, if it is not kept."""
    values = config.to_dict()
    if rank != config.rank:
        values |= {"rank": rank, "alpha": config.scale * (math.sqrt(rank) if config.rank_stabilised else rank)}
    if not keeps_start and any(name in RESIDUAL for target in config.targets for name in config.inits(target)):
        values |= {"init_A": None, "init_B": None}
    return AdapterConfig.from_dict(values)
