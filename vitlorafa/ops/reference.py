"""The definition of the adapted layer in plain PyTorch, differentiated by autograd; tests compare with it."""

import torch
from torch import Tensor, nn

from vitlorafa.ops.dropout import dropout_mask, rounded


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
    adapter: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + b, plus s (x̃ A_jᵀ) B_jᵀ on the outputs of each projection j, with x̃ = dropout(x).

    LoRA (Hu et al. 2021), section 4.1. `vitlorafa.ops` explains the shapes.

    Args:
        x: Input, [..., d_in].
        weight: Pretrained weight, [d_out, d_in].
        bias: Bias, [d_out], or None.
        A: Factors A, [k, r, d_in].
        B: Factors B, [k, m, r]; of n adapters with `adapter`, [n, k, m, r].
        scale: Scaling s.
        starts: First output of each of the k projections.
        dropout: Probability of dropping an element of the adapter's input; rounded as by `lora_linear`.
        seed: Seed of the dropout mask, of shape []; None without dropout.
        adapter: Index into B of each sample, [batch], for x [N, ..., d_in]; N/batch consecutive parts of x belong to a
            sample.

    Returns:
        The output y, [..., d_out].
    """
    y = nn.functional.linear(x, weight, bias)
    dropout = rounded(dropout)
    if dropout:
        assert seed is not None
        x = x * dropout_mask(x.shape, x.device, dropout, seed) / (1 - dropout)
    if adapter is not None:
        B = B[adapter].repeat_interleave(len(x) // max(len(adapter), 1), dim=0).transpose(0, 1)  # [k, N, m, r]
    for start, A_j, B_j in zip(starts, A, B, strict=True):
        end = start + B_j.shape[-2]
        xA = scale * (x @ A_j.T)
        update = xA @ B_j.T if adapter is None else torch.einsum("n...r,nmr->n...m", xA, B_j)
        y = torch.cat((y[..., :start], y[..., start:end] + update, y[..., end:]), dim=-1)
    return y
