"""A linear layer, x Wᵀ + b, that adds the bias and applies GELU within the matmul where that is faster.

In bfloat16 on a CPU, `F.linear` writes the bias to the whole output before the matmul adds to it, and `F.gelu` reads
and writes the whole output again. oneDNN, which computes the matmul, can do both while the result is in registers.
torch offers this only to its compiler, through the operation used here.

Time relative to `F.linear` and `F.gelu` (torch 2.14, one core of an AMD EPYC with AVX512-BF16, medians of 15 to 41
pairs) in a ViT of width 192 and 384 at 197 tokens:

| images | width | qkv  | proj | fc1  | fc1 and GELU | fc2  |
|--------|-------|------|------|------|--------------|------|
| 24     | 192   | 0.96 | 0.99 | 0.96 | 0.90         | 0.96 |
| 64     | 192   | 0.93 | 0.91 | 0.90 | 0.83         | 0.95 |
| 24     | 384   | 0.92 | 0.91 | 0.92 | 0.93         | 0.97 |
| 64     | 384   | 0.89 | 0.88 | 0.95 | 0.80         | 0.96 |

If another process uses the memory bandwidth at the same time, ratios go down to 0.74 and 0.62.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from vitlorafa.ops.processor import autocast_dtype, cpu_has, is_plain_bfloat16_on_cpu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x Wᵀ + b, or GELU(x Wᵀ + b).

    In bfloat16 on a CPU that multiplies it natively, the bias is added within the matmul, with bit-identical results.
    If no gradient is needed, GELU is applied within the matmul too, to x Wᵀ + b in float32, which `F.gelu` would get
    rounded. Everywhere else, in a compiler, in torch.func's transforms, and if torch's private operation does not work,
    the function is `F.linear` and `F.gelu`.

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
    if not (is_plain_bfloat16_on_cpu(x) and fuses_bias()) or not 0 < x.shape[-1] == weight.shape[1]:
        y = F.linear(x, weight, bias)
    elif not needs_gradient(x, weight, bias):
        return _matmul(x, weight, bias, gelu)
    else:
        y = _Linear.apply(x, weight, bias)
    return F.gelu(y) if gelu else y


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether results computed from these tensors will be differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Linear(torch.autograd.Function):
    """The matmuls in backward are torch's own, so gradients can be differentiated again."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _matmul(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        need_x, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, need_weight, need_bias = ctx.needs_input_grad
        rows = g.reshape(-1, g.shape[-1])
        gx = None if weight is None else g @ weight
        g_weight = rows.T @ x.reshape(-1, x.shape[-1]) if need_weight else None
        return gx, g_weight, rows.sum(0) if need_bias else None


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    activation, approximation = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], approximation)


def fuses_bias() -> bool:
    """Whether bias and GELU are computed within the matmul in bfloat16 on this CPU."""
    return _CAN_FUSE and _operation_works()


# That torch was built with oneDNN is not enough: without these instructions it is no faster.
_CAN_FUSE = cpu_has("avx512_bf16") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _operation_works() -> bool:
    """Tries the private operation once per process; oneDNN refuses it if it is limited to older instructions.

    Runs in a separate thread, so that the caller's autocast and operation counters do not see the trial.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_try_operation).result()


def _try_operation() -> bool:
    x, weight, bias = (torch.linspace(-1, 1, n, device="cpu").bfloat16() for n in (4 * 32, 8 * 32, 8))
    x, weight = x.view(4, 32), weight.view(8, 32)
    try:
        for b in (bias, None):
            y = F.linear(x.float(), weight.float(), None if b is None else b.float())
            for gelu, expected in ((False, y), (True, F.gelu(y))):
                torch.testing.assert_close(_matmul(x, weight, b, gelu).float(), expected, rtol=0.02, atol=0.05)
    except Exception:  # the operation is private: other versions of torch may have changed it
        return False
    return True


if _CAN_FUSE and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _operations(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        """Formula for torch's `FlopCounterMode`, which passes shapes."""
        rows = torch.Size(x[:-1]).numel()
        return 2 * rows * weight[0] * weight[1]
