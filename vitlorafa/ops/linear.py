"""A linear layer, x Wᵀ + b, whose bias, and GELU behind it, are made in its product where that is faster.

In bfloat16 on a CPU `F.linear` writes the bias into all of the output before the product adds to it, and `F.gelu`
reads and writes all of it again. oneDNN, which makes the product, can do both to what it has in its registers; torch
lets only its compiler ask for that, by the operation used here.

Time over that of `F.linear` and `F.gelu` (torch 2.14, one core of an AMD EPYC with AVX512-BF16, medians of 15 to 41
pairs) in a ViT of width 192 and 384 at 197 tokens:

| images | width | qkv  | proj | fc1  | fc1 and GELU | fc2  |
|--------|-------|------|------|------|--------------|------|
| 24     | 192   | 0.96 | 0.99 | 0.96 | 0.90         | 0.96 |
| 64     | 192   | 0.93 | 0.91 | 0.90 | 0.83         | 0.95 |
| 24     | 384   | 0.92 | 0.91 | 0.92 | 0.93         | 0.97 |
| 64     | 384   | 0.89 | 0.88 | 0.95 | 0.80         | 0.96 |

While another process uses the memory, which they spare, down to 0.74 and 0.62.
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

    `F.linear` and `F.gelu`, but in bfloat16 on a CPU that multiplies it natively, outside of a compiler and of
    torch.func's transforms, as long as torch's private operation works there. There the bias comes with the product,
    with the same bits; so does GELU where no gradient is needed, of x Wᵀ + b in float32 then, which the former rounds
    before.

    Args:
        x: [..., d_in].
        weight: [d_out, d_in], in any format.
        bias: [d_out] or None, in any format.
        gelu: Whether GELU follows, the exact one (Hendrycks and Gimpel 2016).

    Returns:
        [..., d_out], in autocast's dtype if enabled, else in x's.
    """
    dtype = autocast_dtype(x) or x.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if not (is_plain_bfloat16_on_cpu(x) and in_one_pass()) or not 0 < x.shape[-1] == weight.shape[1]:
        y = F.linear(x, weight, bias)
    elif not needs_gradient(x, weight, bias):
        return _product(x, weight, bias, gelu)
    else:
        y = _Linear.apply(x, weight, bias)
    return F.gelu(y) if gelu else y


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether what is made of them will be differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Linear(torch.autograd.Function):
    """The products of backward are torch's own, so it can be differentiated again."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

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


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    what, how = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, what, [], how)


def in_one_pass() -> bool:
    """Whether bfloat16 on this CPU gets bias and GELU with the product."""
    return _ONE_PASS and _works_here()


# Torch's own word for whether oneDNN is built in is not enough: without the instructions it is no faster.
_ONE_PASS = cpu_has("avx512_bf16") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _works_here() -> bool:
    """Tries the private operation, once a process: a oneDNN that is limited to older instructions refuses it.

    In a thread of its own, where no autocast and no counter of operations of the caller's sees the trial.
    """
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(_try).result()


def _try() -> bool:
    x, weight, bias = (torch.linspace(-1, 1, n, device="cpu").bfloat16() for n in (4 * 32, 8 * 32, 8))
    x, weight = x.view(4, 32), weight.view(8, 32)
    try:
        for b in (bias, None):
            y = F.linear(x.float(), weight.float(), None if b is None else b.float())
            for gelu, expected in ((False, y), (True, F.gelu(y))):
                torch.testing.assert_close(_product(x, weight, b, gelu).float(), expected, rtol=0.02, atol=0.05)
    except Exception:  # it is private: another torch may have given it other arguments or another meaning
        return False
    return True


if _ONE_PASS and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _operations(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        """For torch's `FlopCounterMode`, which gives shapes."""
        rows = torch.Size(x[:-1]).numel()
        return 2 * rows * weight[0] * weight[1]
