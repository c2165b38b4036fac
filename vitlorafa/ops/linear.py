"""A linear layer, x Wᵀ + b, that adds the bias and applies GELU within the matmul where that is faster.

On a CPU, `F.linear` in bfloat16 writes the bias to the whole output before the matmul adds to it, and `F.gelu` reads
and writes the whole output again. oneDNN, which computes the matmul, can do both while the result is in registers.
torch offers this only to its compiler, through the operation used here. Some processors compute GELU faster after the
matmul, in place: with AMX and 900 rows in 0.75 of the time.

Time relative to `F.linear` and `F.gelu` (torch 2.14, one core of an AMD EPYC with AVX512-BF16, medians of 15 to 41
pairs) in a ViT of width 192 and 384 at 197 tokens:

| images | width | qkv  | proj | fc1  | fc1 and GELU | fc2  |
|--------|-------|------|------|------|--------------|------|
| 24     | 192   | 0.96 | 0.99 | 0.96 | 0.90         | 0.96 |
| 64     | 192   | 0.93 | 0.91 | 0.90 | 0.83         | 0.95 |
| 24     | 384   | 0.92 | 0.91 | 0.92 | 0.93         | 0.97 |
| 64     | 384   | 0.89 | 0.88 | 0.95 | 0.80         | 0.96 |

If another process uses the memory bandwidth at the same time, ratios go down to 0.74 and 0.62. Whether it is faster
elsewhere, in float32 too, is found by `vitlorafa.tuning`.
"""

from collections import deque
from functools import cache, lru_cache, partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, get_num_threads
from torch.utils.flop_counter import flop_registry, register_flop_formula

from vitlorafa.ops.processor import autocast_dtype, plain_cpu_dtype
from vitlorafa.tuning import Question, Trials, apart, choose, describe, sampler, size_class

_OPERATION: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # None if torch was built without oneDNN
WAYS = ("torch", "fused", "fused bias")  # torch's own; bias and GELU within the matmul; GELU in place after it
_FEWEST, _MOST = 2**24, 2**29  # multiplications in a problem that is timed, and in its sample
_MOST_ROWS = 2048
_COLD = 8  # inputs and outputs of a sample that are in memory


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x Wᵀ + b, or GELU(x Wᵀ + b).

    In bfloat16 and float32 on a CPU where that is faster (see `vitlorafa.tuning`), the bias is added within the matmul,
    in bfloat16 with bit-identical results. If no gradient is needed, GELU is applied within the matmul too, to x Wᵀ + b
    in float32, which `F.gelu` would get rounded. Everywhere else, in a compiler, in torch.func's transforms, and if
    torch's private operation does not work, the function is `F.linear` and `F.gelu`.

    Args:
        x: Input, [..., d_in].
        weight: Weight, [d_out, d_in], in any number format.
        bias: Bias, [d_out], in any number format, or None.
        gelu: Whether to apply exact GELU (Hendrycks and Gimpel 2016) to the output.

    Returns:
        The output, [..., d_out], in autocast's dtype if enabled, otherwise in that of x.
    """
    dtype = autocast_dtype(x) or x.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    differentiated = needs_gradient(x, weight, bias)
    way = _choose(x, weight, bias, gelu and not differentiated)
    if not differentiated:
        return _compute(way, x, weight, bias, gelu)
    y = F.linear(x, weight, bias) if way == "torch" else _Linear.apply(x, weight, bias)
    return F.gelu(y) if gelu else y


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether results computed from these tensors will be differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Linear(torch.autograd.Function):
    """The matmuls in backward are torch's own, so gradients can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        need_x, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        return _matmul(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, need_weight, need_bias = ctx.needs_input_grad
        rows = g.reshape(-1, g.shape[-1])
        gx = None if weight is None else g @ weight
        g_weight = rows.T @ x.reshape(-1, x.shape[-1]) if need_weight else None
        return gx, g_weight, rows.sum(0) if need_bias else None


def _compute(way: str, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """The layer where no gradient is needed."""
    if way == "torch":
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y
    if way == "fused" or not gelu:
        return _matmul(x, weight, bias, gelu)
    return torch.ops.aten.gelu_(_matmul(x, weight, bias))


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    activation, approximation = ("gelu", "none") if gelu else ("none", "")
    return _OPERATION(x, weight, bias, activation, [], approximation)


class _Problem(NamedTuple):
    """What the time of a linear layer without gradients depends on."""

    dtype: torch.dtype
    rows: int
    inputs: int
    outputs: int
    bias: bool
    gelu: bool
    threads: int


def _choose(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> str:
    """One of `WAYS`."""
    dtype = plain_cpu_dtype(x)
    if dtype is None or not (gelu or bias is not None) or not 0 < x.shape[-1] == weight.shape[1] or not x.numel():
        return "torch"
    rows = x.numel() // x.shape[-1]
    problem = _Problem(dtype, rows, x.shape[-1], len(weight), bias is not None, gelu, get_num_threads())
    return choose(_question(problem), partial(_trials, problem))


@lru_cache(maxsize=256)
def _question(problem: _Problem) -> Question:
    shape = (
        f"{_rows(problem)} x {problem.inputs} to {problem.outputs}"
        f"{'' if problem.bias else ', no bias'}{', GELU' * problem.gelu}"
    )
    details = describe(problem.dtype, shape, problem.threads)
    margin = 1.05 if problem.dtype == torch.float32 or problem.gelu else 1.02  # where no rounding depends on it
    matters = problem.rows * problem.inputs * problem.outputs >= _FEWEST
    ways = WAYS if can_fuse(problem.dtype) else WAYS[:1]
    return Question("linear", details, ways, margin=margin, matters=matters)


def _rows(problem: _Problem) -> int:
    return size_class(problem.rows, min(_MOST_ROWS, _MOST // (problem.inputs * problem.outputs)))


def _trials(problem: _Problem) -> Trials:
    dtype, _, inputs, outputs, has_bias, gelu, _ = problem
    draw = sampler(dtype)
    # As in a network, inputs are not in the cache, and outputs are written to memory.
    inputs_in_turn = cycle(draw(_rows(problem), inputs).repeat(_COLD, 1, 1).unbind(0))
    recent: deque[Tensor] = deque(maxlen=_COLD)
    weight, bias = draw(outputs, inputs), draw(outputs) if has_bias else None

    def compute(way: str) -> None:
        recent.append(_compute(way, next(inputs_in_turn), weight, bias, gelu))

    return {way: partial(compute, way) for way in (WAYS if gelu and has_bias else WAYS[:2])}


@cache
def can_fuse(dtype: torch.dtype) -> bool:
    """Whether torch's private operation works here; oneDNN refuses bfloat16 if it is limited to older instructions.

    Args:
        dtype: Number format, bfloat16 or float32.
    """
    return _OPERATION is not None and apart(partial(_try_operation, dtype))


def _try_operation(dtype: torch.dtype) -> bool:
    x, weight, bias = (torch.linspace(-1, 1, n, device="cpu").to(dtype) for n in (4 * 32, 8 * 32, 8))
    x, weight = x.view(4, 32), weight.view(8, 32)
    try:
        for b in (bias, None):
            y = F.linear(x.float(), weight.float(), None if b is None else b.float())
            for way in ("fused", "fused bias"):
                for gelu, expected in ((False, y), (True, F.gelu(y))):
                    found = _compute(way, x, weight, b, gelu).float()
                    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)
    except Exception:  # the operation is private: other versions of torch may have changed it
        return False
    return True


if _OPERATION is not None and _OPERATION not in flop_registry:

    @register_flop_formula(_OPERATION)
    def _operations(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        """Formula for torch's `FlopCounterMode`, which passes shapes."""
        rows = torch.Size(x[:-1]).numel()
        return 2 * rows * weight[0] * weight[1]
