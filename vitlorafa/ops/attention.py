"""Multi-head attention, softmax(s q kᵀ) v, by batched products where these are faster than torch's fused one.

Their time over that of `F.scaled_dot_product_attention` (torch 2.14, one core of an AMD EPYC with AVX512-BF16), for 24
images at 17 to 257 tokens, 8 at 577 and 4 at 785, with 3 heads of width 64, between `qkv`'s output and `proj`'s input:

| tokens                                     | 17   | 50   | 197  | 257  | 577  | 785  |
|--------------------------------------------|------|------|------|------|------|------|
| bfloat16, forward                          | 1.15 | 0.80 | 0.64 | 0.59 | 0.63 | 0.68 |
| bfloat16, forward and backward             | 0.28 | 0.22 | 0.39 | 0.43 | 0.51 | 0.56 |
| bfloat16, forward and backward, recomputed | 0.26 | 0.27 | 0.49 | 0.49 | 0.58 | 0.70 |
| float32, forward                           | 1.43 | 1.20 | 1.22 | 1.19 | 1.17 | 1.29 |
| float32, forward and backward              | 1.18 | 0.98 | 0.98 | 1.00 | 0.97 | 1.06 |

So bfloat16 takes them at every length, and float32 at none. At 197 tokens in bfloat16, plain
`((q * s) @ k.mT).softmax(-1) @ v` takes 1.2 times as long as they do. What else was tried there:

| what                                                                  | time over what is here     |
|-----------------------------------------------------------------------|----------------------------|
| all heads at once, whose scores are fresh pages at every call         | 1.2                        |
| one image at a time                                                   | 1.2                        |
| strided q, k and v, without copies                                    | 1.2 to 1.3 of each product |
| scores with rows of 208 or 224 elements, to be aligned                | 1.0 to 1.5 of each product |
| softmax in float32, with its casts                                    | 1.0 of it                  |
| the three gradients in one tensor, which `unbind` then need not stack | 0.96                       |
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

# Bytes of scores at a time, a core's L2 cache. Twice or half as many make no difference, 100 times take 1.2 as long.
_SCORES = 2**20


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, recompute: bool = False) -> Tensor:
    """softmax(s q kᵀ) v, without mask or dropout.

    As `F.scaled_dot_product_attention`, which it is but in bfloat16 on a CPU that multiplies it natively, not by AMX,
    outside of a compiler and of torch.func's transforms. There it is `by_products`.

    Args:
        q: [B, H, M, D], H heads of M queries.
        k: [B, H, N, D].
        v: [B, H, N, D].
        scale: s; 1/√D if None.
        recompute: Whether `by_products` makes P again in backward instead of keeping it.

    Returns:
        [B, H, M, D], in autocast's dtype if enabled, else in q's.

    Raises:
        AdapterError: If the shapes do not fit each other.
    """
    if q.dim() != 4 or k.shape != v.shape or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], *k.shape[3:]):
        raise AdapterError(
            f"q must be [B, H, M, D] and k and v [B, H, N, D], not {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if _MEASURED_CPU and is_plain_bfloat16_on_cpu(q):
        return by_products(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale, recompute=recompute)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def by_products(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, recompute: bool = False) -> Tensor:
    """`attention` by batched products, on every device and in every dtype.

    For backward it keeps q, k, v, contiguous, and the weights P = softmax(s q kᵀ): B·H·(M·D + 2·N·D + M·N) elements.
    With `recompute`, not P, which is less than torch's fused attention keeps, for it keeps the output too. Gradients
    cannot be differentiated again.

    Args:
        q: [B, H, M, D].
        k: [B, H, N, D].
        v: [B, H, N, D].
        scale: s; 1/√D if None.
        recompute: Whether to make P again in backward instead of keeping it. The gradients are the same bit for bit.

    Returns:
        [B, H, M, D].
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    heads = [t.flatten(0, 1).contiguous() for t in (q, k, v)]
    keep = not recompute and any(t.requires_grad for t in heads)  # which no_grad switches off
    y, _ = _Attention.apply(*heads, scale, keep)
    return y.unflatten(0, q.shape[:2])


class _Attention(torch.autograd.Function):
    """For q [B·H, M, D], k and v [B·H, N, D]. P is an output too, for only inputs and outputs can be kept."""

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


# The kind of CPU of the table above. AMX makes torch's fused attention another one, which nobody has measured here.
_MEASURED_CPU = cpu_has("avx512_bf16") and not cpu_has("amx_tile")
