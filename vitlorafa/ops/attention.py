"""Multi-head attention, softmax(s q kᵀ) v, by batched matmuls where they are faster than torch's fused attention.

Their time relative to `F.scaled_dot_product_attention`, from the output of `qkv` to the input of `proj` (torch 2.14,
one core of an AMD EPYC with AVX512-BF16; 3 heads of width 64; 24 images at 17 to 257 tokens, 8 at 577 and 4 at 785):

| tokens                                     | 17   | 50   | 197  | 257  | 577  | 785  |
|--------------------------------------------|------|------|------|------|------|------|
| bfloat16, forward                          | 1.15 | 0.80 | 0.64 | 0.59 | 0.63 | 0.68 |
| bfloat16, forward and backward             | 0.28 | 0.22 | 0.39 | 0.43 | 0.51 | 0.56 |
| bfloat16, forward and backward, recomputed | 0.26 | 0.27 | 0.49 | 0.49 | 0.58 | 0.70 |
| float32, forward                           | 1.43 | 1.20 | 1.22 | 1.19 | 1.17 | 1.29 |
| float32, forward and backward              | 1.18 | 0.98 | 0.98 | 1.00 | 0.97 | 1.06 |

So bfloat16 uses them at every length, float32 at none. At 197 tokens in bfloat16, plain
`((q * s) @ k.mT).softmax(-1) @ v` takes 1.2 times as long. What else was tried there:

| variant                                                               | time relative to this code |
|-----------------------------------------------------------------------|----------------------------|
| all heads at once, whose scores need new memory pages in every call   | 1.2                        |
| one image at a time                                                   | 1.2                        |
| strided q, k and v, without copies                                    | 1.2 to 1.3 for each matmul |
| scores with aligned rows of 208 or 224 elements                       | 1.0 to 1.5 for each matmul |
| softmax in float32, with its casts                                    | 1.0 for the softmax        |
| the three gradients in one tensor, so that `unbind` does not stack    | 0.96                       |
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitlorafa.errors import AdapterError
from vitlorafa.ops.private import softmax_backward
from vitlorafa.ops.processor import cpu_has, is_plain_bfloat16_on_cpu

# Bytes of scores at a time: a core's L2 cache. Twice or half as many make no difference; 100 times takes 1.2 as long.
_SCORES = 2**20


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, recompute: bool = False) -> Tensor:
    """softmax(s q kᵀ) v, without mask or dropout.

    Computes `attention_by_matmuls` in bfloat16 on a CPU that multiplies it natively but not by AMX, outside a compiler
    and torch.func's transforms; everywhere else `F.scaled_dot_product_attention`.

    Args:
        q: Queries, [B, H, M, D]: H heads of M queries.
        k: Keys, [B, H, N, D].
        v: Values, [B, H, N, D].
        scale: Scaling s; if None, 1/√D.
        recompute: Whether `attention_by_matmuls` recomputes P in backward instead of keeping it.

    Returns:
        The output, [B, H, M, D], in autocast's dtype if enabled, otherwise in q's.

    Raises:
        AdapterError: If the shapes do not match.
    """
    if q.dim() != 4 or k.shape != v.shape or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], *k.shape[3:]):
        raise AdapterError(
            f"q must be [B, H, M, D] and k and v [B, H, N, D], not {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if _MEASURED_CPU and is_plain_bfloat16_on_cpu(q):
        return attention_by_matmuls(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale, recompute=recompute)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def attention_by_matmuls(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, recompute: bool = False
) -> Tensor:
    """`attention` by batched matmuls, on every device and in every dtype.

    Keeps q, k and v, contiguous, and the weights P = softmax(s q kᵀ) for backward: B·H·(M·D + 2·N·D + M·N) elements.
    With `recompute`, P is not kept; that is less than torch's fused attention keeps, which includes the output.
    Gradients cannot be differentiated a second time.

    Args:
        q: Queries, [B, H, M, D].
        k: Keys, [B, H, N, D].
        v: Values, [B, H, N, D].
        scale: Scaling s; if None, 1/√D.
        recompute: Whether P is recomputed in backward instead of being kept. The gradients are bit-identical.

    Returns:
        The output, [B, H, M, D].
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    heads = [t.flatten(0, 1).contiguous() for t in (q, k, v)]
    keep = not recompute and any(t.requires_grad for t in heads)  # False under no_grad
    y, _ = _Attention.apply(*heads, scale, keep)
    return y.unflatten(0, q.shape[:2])


class _Attention(torch.autograd.Function):
    """For q [B·H, M, D], k and v [B·H, N, D]. P is an output too, because only inputs and outputs can be kept."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, keep: bool) -> tuple[Tensor, Tensor | None]:
        y = torch.empty_like(q)
        P = q.new_empty(*q.shape[:2], k.shape[1]) if keep else None
        for part in _parts(q, k):
            weights = _weights(q[part], k[part], scale, out=None if P is None else P[part])
            torch.bmm(weights, v[part], out=y[part])
        return y, P

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        q, k, v, ctx.scale, _ = inputs
        _, P = output
        if P is not None:
            ctx.mark_non_differentiable(P)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 5
        q, k, v, P = ctx.saved_tensors
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        gq = torch.empty_like(q) if need_q else None
        gk = torch.empty_like(k) if need_k else None
        gv = torch.empty_like(v) if need_v else None
        for part in _parts(q, k):
            weights = _weights(q[part], k[part], ctx.scale) if P is None else P[part]
            if gv is not None:
                torch.bmm(weights.mT, g[part], out=gv[part])
            if gq is None and gk is None:
                continue
            g_weights = torch.bmm(g[part], v[part].mT)
            g_scores = softmax_backward(g_weights, weights)
            if gq is not None:
                gq[part].baddbmm_(g_scores, k[part], beta=0, alpha=ctx.scale)
            if gk is not None:
                gk[part].baddbmm_(g_scores.mT, q[part], beta=0, alpha=ctx.scale)
        return gq, gk, gv, None, None


def _weights(q: Tensor, k: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """softmax(s q kᵀ), [n, M, N], for q [n, M, D] and k [n, N, D]."""
    scores = q.new_empty(*q.shape[:2], k.shape[1]).baddbmm_(q, k.mT, beta=0, alpha=scale)
    return torch.softmax(scores, -1, out=out)


def _parts(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Slices of the B·H heads, whose scores take about `_SCORES` bytes."""
    heads = max(1, _SCORES // max(1, q.shape[1] * k.shape[1] * q.element_size()))
    return (slice(start, start + heads) for start in range(0, len(q), heads))


# CPUs like the one in the table above. With AMX, torch's fused attention differs, and it has not been measured.
_MEASURED_CPU = cpu_has("avx512_bf16") and not cpu_has("amx_tile")
