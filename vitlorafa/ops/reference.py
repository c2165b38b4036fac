"""The definition of the adapted layer in plain PyTorch, differentiated by autograd; tests compare with it."""

import torch
from torch import Tensor, nn


@torch.library.custom_op("vitlorafa::dropout_mask", mutates_args=())
def dropout_mask(shape: list[int], device: torch.device, dropout: float, seed: Tensor) -> Tensor:
    """The mask of the elements that the adapter sees; drawn from a seed, so that it can be recomputed, not kept.

    Registered as a custom operation, because a compiler cannot trace a generator.

    Args:
        shape: Shape of the adapter's input. Only its number of elements counts: rows may be flattened.
        device: Device of the input; other devices draw other masks.
        dropout: Probability of dropping an element.
        seed: Seed of the mask, an integer tensor of shape [] on the CPU.

    Returns:
        A boolean tensor, True where an element is kept; the same for inputs of every precision.
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

    LoRA (Hu et al. 2021), section 4.1. `vitlorafa.ops` explains the shapes.

    Args:
        x: Input, [..., d_in].
        weight: Pretrained weight, [d_out, d_in].
        bias: Bias, [d_out], or None.
        A: Factors A, [k, r, d_in].
        B: Factors B, [k, m, r].
        scale: Scaling s.
        starts: First output of each of the k projections.
        dropout: Probability of dropping an element of the adapter's input.
        seed: Seed of the dropout mask, of shape []; None without dropout.

    Returns:
        The output y, [..., d_out].
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
