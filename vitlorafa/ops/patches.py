"""A convolution whose patches do not overlap, as in the first layer of a vision transformer, by a matmul where faster.

Each patch is a row of the matmul's input: one copy of the images. Time relative to `F.conv2d` with the copy that makes
its output a sequence of tokens, in bfloat16 (torch 2.14, one core of an Intel Xeon with AMX; patches of 16 x 16):

| images | pixels  | width | forward | forward and backward of a trained weight |
|--------|---------|-------|---------|------------------------------------------|
| 24     | 96 x 96 | 192   | 0.56    | 0.23                                     |
| 64     | 96 x 96 | 192   | 0.41    | 0.15                                     |
| 64     | 224²    | 192   | 0.60    | 0.33                                     |
| 24     | 224²    | 384   | 0.57    | 0.28                                     |

Whether it is faster elsewhere is found by `vitlorafa.tuning`.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, get_num_threads

from vitlorafa.ops.linear import linear, needs_gradient
from vitlorafa.ops.processor import plain_cpu_dtype
from vitlorafa.tuning import Question, Trials, choose, describe, sampler, size_class

_FEWEST, _MOST = 2**24, 2**29  # multiplications in a problem that is timed, and in its sample


def convolve_patches(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.conv2d(x, weight, bias, stride=(p, q))` for kernels of p × q pixels, without padding.

    Computed as a matmul in bfloat16 and float32 on a CPU where that is faster (see `vitlorafa.tuning`), with the same
    result up to rounding. Everywhere else, in a compiler, and in torch.func's transforms, it is torch's convolution.

    Args:
        x: Images, [B, C, H, W]. Rows and columns that fill no patch are left out.
        weight: Kernels, [d, C, p, q].
        bias: Bias, [d], or None.

    Returns:
        [B, d, H/p, W/q], in autocast's dtype if enabled, otherwise in that of x.
    """
    problem = _describe(x, weight, bias)
    if problem is None or choose(_question(problem), partial(_trials, problem)) == "torch":
        return F.conv2d(x, weight, bias, stride=weight.shape[2:])
    return _multiply(x.to(problem.dtype), weight, bias)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    B = len(x)
    d, C, p, q = weight.shape
    h, w = x.shape[2] // p, x.shape[3] // q
    patches = x[:, :, : h * p, : w * q].unflatten(3, (w, q)).unflatten(2, (h, p)).permute(0, 2, 4, 1, 3, 5)
    y = linear(patches.reshape(B, h * w, C * p * q), weight.flatten(1), bias)
    return y.view(B, h, w, d).permute(0, 3, 1, 2)


class _Problem(NamedTuple):
    """What the time depends on; the shapes of `convolve_patches`, with h x w patches in an image."""

    dtype: torch.dtype
    B: int
    h: int
    w: int
    C: int
    p: int
    q: int
    d: int
    differentiated: bool
    threads: int

    @property
    def per_image(self) -> int:
        """Multiplications for an image."""
        return self.h * self.w * self.C * self.p * self.q * self.d


def _describe(x: Tensor, weight: Tensor, bias: Tensor | None) -> _Problem | None:
    """The problem; None where only torch's convolution will do."""
    dtype = plain_cpu_dtype(x)
    if dtype is None or x.dim() != 4 or x.shape[1] != weight.shape[1]:
        return None
    (d, C, p, q), (B, _, H, W) = weight.shape, x.shape
    if not B or p > H or q > W:
        return None
    return _Problem(dtype, B, H // p, W // q, C, p, q, d, needs_gradient(x, weight, bias), get_num_threads())


@lru_cache(maxsize=64)
def _question(problem: _Problem) -> Question:
    shape = (
        f"forward{' and backward' * problem.differentiated}, {_images(problem)} images, {problem.h} x {problem.w} "
        f"patches of {problem.C} x {problem.p} x {problem.q} to {problem.d}"
    )
    details = describe(problem.dtype, shape, problem.threads)
    matters = problem.B * problem.per_image >= _FEWEST
    return Question("patches", details, ("torch", "matmul"), matters=matters)


def _images(problem: _Problem) -> int:
    return size_class(problem.B, max(1, _MOST // problem.per_image))


def _trials(problem: _Problem) -> Trials:
    """From images to a sequence of tokens, and back to the weight."""
    dtype, _, h, w, C, p, q, d, differentiated, _ = problem
    draw = sampler(dtype)
    x, weight, bias = draw(_images(problem), C, h * p, w * q), draw(d, C, p, q), draw(d)
    weight.requires_grad_(differentiated)

    def compute(way: str) -> None:
        y = _multiply(x, weight, bias) if way == "matmul" else F.conv2d(x, weight, bias, stride=(p, q))
        tokens = y.flatten(2).mT.contiguous()
        if differentiated:
            torch.autograd.grad(tokens, weight, tokens.detach())

    compute("matmul")  # answers the question of its linear layer first
    return {way: partial(compute, way) for way in ("torch", "matmul")}
