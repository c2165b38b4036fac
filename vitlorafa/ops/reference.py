"""The definition of the layer: plain torch that autograd differentiates. Tests and benchmarks share it."""

import torch
from torch import Tensor, nn


@torch.library.custom_op("vitlorafa::dropout_mask", mutates_args=())
def dropout_mask(shape: list[int], device: torch.device, dropout: float, seed: Tensor) -> Tensor:
    """Which elements the adapter sees, made from a seed so that it can be made again instead of being kept.

    Registered as an operation of its own, for a compiler cannot look into a generator.

    Args:
        shape: Shape of the adapter's input. Only its number of elements counts: rows may be flattened.
        device: Where the input is; other devices draw other masks.
        dropout: Probability of an element being dropped.
        seed: Seed of the mask: a whole number as a tensor of shape [], on the CPU.

    Returns:
        A boolean tensor, True where an element is kept; the same in every precision.
    """
    generator = torch.Generator(device).manual_seed(int(seed))
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - dropout, generator=generator)


@dropout_mask.register_fake
def _(shape: list[int], device: torch.device, dropout: float, seed: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device=device)


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
    seed: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + b, plus s (x̃ A_jᵀ) B_jᵀ on the outputs of each projection j, with x̃ = dropout(x).

    LoRA (Hu et al. 2021), section 4.1. Shapes are given in `vitlorafa.ops`.

    Args:
        x: [..., d_in].
        weight: [d_out, d_in].
        bias: [d_out] or None.
        A: [k, r, d_in].
        B: [k, m, r].
        scale: s.
        starts: First output of each of the k projections.
        dropout: Probability of dropping an element of the adapter's input.
        seed: Seed of the dropout mask, of shape [], if there is dropout.

    Returns:
        y, [..., d_out].
    """
    y = nn.functional.linear(x, weight, bias)
    if dropout:
        assert seed is not None
        x = x * dropout_mask(x.shape, x.device, dropout, seed) / (1 - dropout)
    for start, A_j, B_j in zip(starts, A, B, strict=True):
        end = start + B_j.shape[0]
        update = scale * (x @ A_j.T) @ B_j.T
        y = torch.cat((y[..., :start], y[..., start:end] + update, y[..., end:]), dim=-1)
    return y
