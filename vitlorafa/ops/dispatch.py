"""The public layer: checks, precision and seed, then the backend. Every adapted layer comes through here."""

from itertools import pairwise

import torch
from torch import Tensor

from vitlorafa.errors import AdapterError
from vitlorafa.ops import eager


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes a linear layer of x in, None where it leaves x alone.

    Args:
        x: The layer's input. As everywhere in torch, autocast leaves float64 alone.
    """
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    starts: tuple[int, ...] = (0,),
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """y = x Wᵀ + b, plus s (x̃ A_jᵀ) B_jᵀ on the outputs of each projection j, with x̃ = dropout(x).

    LoRA (Hu et al. 2021), section 4.1, for k projections that share one linear layer. Only what training
    needs is kept for backward, as `requires_grad` of A and B tells: x Aᵀ if B trains, x if A does. Gradients
    have the dtype of their tensors, and cannot be differentiated again.

    Args:
        x: [..., d_in], any number of leading dimensions, possibly empty or not contiguous.
        weight: [d_out, d_in].
        bias: [d_out] or None.
        A: [k, r, d_in].
        B: [k, m, r].
        scale: s.
        starts: First output of each projection, ascending, at distances of at least m.
        dropout: Probability of dropping an element of the adapter's input; 0 when not training.
        seed: Seed of the dropout mask; drawn from torch's global generator if None, so that recomputing the
            layer under gradient checkpointing meets the same mask.

    Returns:
        y, [..., d_out], in autocast's dtype if enabled, else in x's.

    Raises:
        AdapterError: If the shapes do not fit each other.
    """
    _check(x, weight, A, B, starts)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if dropout and seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    return eager.lora_linear(
        x,
        weight,
        bias,
        A.to(x.dtype),
        B.to(x.dtype),
        scale,
        starts=starts,
        dropout=dropout,
        seed=seed or 0,
    )


def _check(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, starts: tuple[int, ...]) -> None:
    if A.dim() != 3 or B.dim() != 3 or A.shape[:2] != (B.shape[0], B.shape[2]) or len(starts) != len(A):
        raise AdapterError(
            f"A must be [k, r, d_in] and B [k, m, r] with {len(starts)} projections, "
            f"not {list(A.shape)} and {list(B.shape)}"
        )
    d_out, d_in = weight.shape
    if A.shape[2] != d_in or x.shape[-1] != d_in:
        raise AdapterError(f"x {list(x.shape)} and A {list(A.shape)} must end in the weight's input width {d_in}")
    m = B.shape[1]
    if starts[0] < 0 or starts[-1] + m > d_out or any(after - before < m for before, after in pairwise(starts)):
        raise AdapterError(f"slices of {m} outputs from {starts} must be ascending, apart, and within {d_out}")
