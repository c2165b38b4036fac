"""The layer with one of several B for each sample: y_i = x_i Wᵀ + b + s (x_i A_jᵀ) B_{c(i), j}ᵀ.

x Wᵀ and x Aᵀ are one matmul each for the whole batch, whatever the samples' B. The update is a batched matmul with the
gathered B of each sample. Processor time of the forward pass relative to the layer with one adapter, computed
separately (torch 2.14, one core of an AMD EPYC with AVX512-BF16, medians of 5; 16 images of 197 tokens, width 192,
rank 8):

| format   | layer    | adapters | gathered B | sample by sample | adapter by adapter | x Aᵀ one-hot in n·r columns |
|----------|----------|----------|------------|------------------|--------------------|-----------------------------|
| float32  | q, v     | 3        | 1.08       | 0.98             | 1.48               | 1.15                        |
| float32  | q, v     | 32       | 1.12       | 1.16             | 1.72               | 1.92                        |
| float32  | fc1      | 3        | 1.01       | 0.98             | 1.21               | 1.14                        |
| float32  | fc1      | 32       | 1.04       | 1.03             | 1.12               | 1.92                        |
| bfloat16 | q, v     | 3        | 1.06       | 1.22             | 2.23               | 1.15                        |
| bfloat16 | q, v     | 32       | 1.04       | 1.24             | 3.93               | 2.45                        |
| bfloat16 | fc1      | 3        | 1.01       | 1.04             | 1.13               | 1.01                        |
| bfloat16 | fc1      | 32       | 1.02       | 1.10             | 1.34               | 2.24                        |

It consists of torch's operations, so gradients of any order, torch.func and a compiler work. Triton's kernels have one
B for all rows, so plain PyTorch is used with them too.
"""

import torch
from torch import Tensor

from vitlorafa.ops.dropout import dropout_mask
from vitlorafa.ops.linear import linear, needs_gradient
from vitlorafa.ops.private import inside_torch_func
from vitlorafa.ops.quantised import QuantisedWeight, quantised_linear


def stacked_lora_linear(
    x: Tensor,
    weight: Tensor | QuantisedWeight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    adapter: Tensor,
    scale: float,
    starts: tuple[int, ...],
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """The layer of `vitlorafa.ops.reference.lora_linear` with an adapter for each sample, in the dtype of x.

    Args:
        x: Input, [N, ..., d_in], with N a multiple of the batch.
        weight: Pretrained weight, [d_out, d_in], or a quantised one.
        bias: Bias, [d_out], or None.
        A: Factors A, [k, r, d_in].
        B: Factors B of n adapters, [n, k, m, r].
        adapter: Index into B of each sample, [batch].
        scale: Scaling s.
        starts: First output of each of the k projections.
        dropout: Probability of dropping an element of the adapter's input.
        seed: Seed of the dropout mask, of shape [], on the CPU; None without dropout.

    Returns:
        y, [N, ..., d_out].
    """
    y = linear(x, weight, bias) if isinstance(weight, Tensor) else quantised_linear(x, weight, bias)
    if seed is not None:
        x = x * dropout_mask(list(x.shape), x.device, dropout, seed) / (1 - dropout)
    batch, rows = len(adapter), x.numel() // x.shape[-1]
    samples = batch, rows // max(batch, 1)  # and the rows of each
    xA = (A.flatten(0, 1).to(x.dtype) @ x.reshape(rows, x.shape[-1]).T).T  # see `vitlorafa.ops.eager`
    parts = xA.unflatten(0, samples).split(B.shape[-1], dim=-1)
    # Gathered before they are rounded, so that the gradient of B is summed over samples in B's dtype.
    chosen = (B[adapter] * scale).to(x.dtype).unbind(1)
    return _add_updates(y.reshape(*samples, y.shape[-1]), parts, chosen, starts).view(y.shape)


def _add_updates(y: Tensor, xA: tuple[Tensor, ...], B: tuple[Tensor, ...], starts: tuple[int, ...]) -> Tensor:
    """y_j + xA_j B_jᵀ for y [batch, T, d_out], xA_j [batch, T, r] and B_j [batch, m, r]; in place without gradients."""
    m = B[0].shape[1]
    if not (needs_gradient(y, *xA, *B) or inside_torch_func()):
        for start, xA_j, B_j in zip(starts, xA, B, strict=True):
            y[..., start : start + m].baddbmm_(xA_j, B_j.mT)
        return y
    pieces, end = [], 0
    for start, xA_j, B_j in zip(starts, xA, B, strict=True):
        pieces += [y[..., end:start], torch.baddbmm(y[..., start : start + m], xA_j, B_j.mT)]
        end = start + m
    return torch.cat([*pieces, y[..., end:]], dim=-1)
