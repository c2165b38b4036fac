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

Other processors differ, so `vitlorafa.tuning` times both, once for each shape. At 197 tokens in bfloat16, plain
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
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, get_num_threads
from torch.autograd.function import once_differentiable

from vitlorafa.errors import AdapterError
from vitlorafa.ops.linear import needs_gradient
from vitlorafa.ops.private import softmax_backward
from vitlorafa.ops.processor import plain_cpu_dtype
from vitlorafa.tuning import Question, Trials, choose, describe, sampler, size_class

# Ways with the bytes of scores that they compute at a time, which should fit a core's L2 cache: 1 MiB on most
# processors, 2 MiB on some. 100 MiB take 1.2 times as long.
_SCORES = {"matmuls 1 MiB": 2**20, "matmuls 2 MiB": 2**21}
WAYS = ("torch", *_SCORES)
_FEWEST, _MOST = 2**18, 2**22  # elements of q, k, v and the scores in a problem that is timed, and in its sample


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, recompute: bool = False) -> Tensor:
    """softmax(s q kᵀ) v, without mask or dropout.

    Computes `attention_by_matmuls` in bfloat16 and float32 on a CPU where that is faster (see `vitlorafa.tuning`);
    everywhere else, in a compiler, and in torch.func's transforms `F.scaled_dot_product_attention`.

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
    dtype = plain_cpu_dtype(q)
    if dtype is None or not q.numel() or not k.numel():
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    (B, H, M, D), N, differentiated = q.shape, k.shape[2], needs_gradient(q, k, v)
    problem = _Problem(dtype, B, H, M, D, N, differentiated, differentiated and recompute, get_num_threads())
    way = choose(_question(problem), partial(_trials, problem))
    return _compute(way, q.to(dtype), k.to(dtype), v.to(dtype), scale, recompute)


class _Problem(NamedTuple):
    """What the time of attention depends on: shapes as in `attention`, and whether gradients are computed."""

    dtype: torch.dtype
    B: int
    H: int
    M: int
    D: int
    N: int
    differentiated: bool
    recompute: bool
    threads: int

    @property
    def elements_per_image(self) -> int:
        """Elements of q, k, v and the scores."""
        return self.H * (self.M * self.N + (self.M + 2 * self.N) * self.D)


@lru_cache(maxsize=256)
def _question(problem: _Problem) -> Question:
    shape = (
        f"forward{' and backward' * problem.differentiated}{', recomputed' * problem.recompute}, "
        f"{_images(problem)} images, {problem.H} heads of {problem.D}, {problem.M} x {problem.N} tokens"
    )
    details = describe(problem.dtype, shape, problem.threads)
    return Question("attention", details, WAYS, matters=problem.B * problem.elements_per_image >= _FEWEST)


def _images(problem: _Problem) -> int:
    return size_class(problem.B, _MOST // problem.elements_per_image)


def _trials(problem: _Problem) -> Trials:
    """From the output of `qkv` to the input of `proj`, and back."""
    dtype, _, H, M, D, N, differentiated, recompute, _ = problem
    qkv = sampler(dtype)(_images(problem), max(M, N), 3, H, D).requires_grad_(differentiated)

    def compute(way: str) -> None:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = _compute(way, q[:, :, :M], k[:, :, :N], v[:, :, :N], None, recompute).transpose(1, 2).flatten(2)
        if differentiated:
            torch.autograd.grad(y, qkv, y.detach())

    return {way: partial(compute, way) for way in WAYS}


def _compute(way: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, recompute: bool) -> Tensor:
    if way == "torch":
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return attention_by_matmuls(q, k, v, scale, recompute=recompute, scores=_SCORES[way])


def attention_by_matmuls(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, recompute: bool = False, scores: int = 2**20
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
        scores: Bytes of scores that are computed at a time; results do not depend on it.

    Returns:
        The output, [B, H, M, D].
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    shape = q.shape[:2]
    q, k, v = (t.flatten(0, 1).contiguous() for t in (q, k, v))
    if needs_gradient(q, k, v):
        y = _Attention.apply(q, k, v, scale, recompute, scores)
    else:
        y = _forward(q, k, v, scale, scores, None)
    return y.unflatten(0, shape)


class _Attention(torch.autograd.Function):
    """For q [B·H, M, D], k and v [B·H, N, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, recompute: bool, scores: int) -> Tensor:
        P = None if recompute else q.new_empty(*q.shape[:2], k.shape[1])
        y = _forward(q, k, v, scale, scores, P)
        ctx.scale, ctx.scores = scale, scores
        ctx.save_for_backward(q, k, v, P)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, P = ctx.saved_tensors
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        gq = torch.empty_like(q) if need_q else None
        gk = torch.empty_like(k) if need_k else None
        gv = torch.empty_like(v) if need_v else None
        for part in _parts(q, k, ctx.scores):
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
        return gq, gk, gv, None, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, scores: int, P: Tensor | None) -> Tensor:
    """The output, [B·H, M, D]; P, if given, is filled with the weights."""
    y = torch.empty_like(q)
    for part in _parts(q, k, scores):
        weights = _weights(q[part], k[part], scale, out=None if P is None else P[part])
        torch.bmm(weights, v[part], out=y[part])
    return y


def _weights(q: Tensor, k: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """softmax(s q kᵀ), [n, M, N], for q [n, M, D] and k [n, N, D]."""
    scores = q.new_empty(*q.shape[:2], k.shape[1]).baddbmm_(q, k.mT, beta=0, alpha=scale)
    return torch.softmax(scores, -1, out=out)


def _parts(q: Tensor, k: Tensor, scores: int) -> Iterator[slice]:
    """Slices of the B·H heads, whose scores take about this many bytes."""
    heads = max(1, scores // max(1, q.shape[1] * k.shape[1] * q.element_size()))
    return (slice(start, start + heads) for start in range(0, len(q), heads))
