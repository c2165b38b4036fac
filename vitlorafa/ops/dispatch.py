"""The public layer: checks, precision and seed, then the backend. Every adapted layer comes through here."""

import os
from importlib import import_module
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlorafa.errors import AdapterError, unknown
from vitlorafa.ops import autograd, reference
from vitlorafa.ops.linear import needs_gradient
from vitlorafa.ops.private import inside_torch_func
from vitlorafa.ops.processor import autocast_dtype


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
    seed: int | None = None,
    fold: bool = True,
    gelu: bool = False,
) -> Tensor:
    """y = x Wᵀ + b, plus s (x̃ A_jᵀ) B_jᵀ on the outputs of each projection j, with x̃ = dropout(x); or its GELU.

    LoRA (Hu et al. 2021), section 4.1, for k projections that share one linear layer. Only what training
    needs is kept for backward, as `requires_grad` of A and B tells: x Aᵀ if B trains, x if A does. Gradients
    have the dtype of their tensors, and cannot be differentiated again.

    Args:
        x: [..., d_in], any number of leading dimensions, possibly empty or not contiguous.
        weight: [d_out, d_in].
        bias: [d_out] or None.
        A: [k, r, d_in].
        B: [k, m, r].
        scale: s.
        starts: First output of each projection's slice, one of d_out/m equal parts; ascending and evenly spaced.
        dropout: Probability of dropping an element of the adapter's input; 0 when not training.
        seed: Seed of the dropout mask; drawn from torch's global generator if None, so that recomputing the
            layer under gradient checkpointing meets the same mask.
        fold: Whether to form W + s B A once, in float32 or better, and do one product with it, as long as there is
            no dropout; else the rank-r update is added apart.
        gelu: Whether GELU follows, the exact one; where no gradient is needed, by `vitlorafa.ops.linear`.

    Returns:
        y, [..., d_out], in autocast's dtype if enabled, else in x's.

    Raises:
        AdapterError: If the shapes do not fit each other.
    """
    _check(x, weight, A, B, starts)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    mask_seed = None
    if dropout:
        mask_seed = torch.randint(2**63 - 1, ()) if seed is None else torch.tensor(seed)
    # torch.func takes the definition, made of ordinary operations. So does a compiler that traces it: there B does not
    # say that it trains, and its gradient would be lost.
    if inside_torch_func():
        W, A, B = (t.to(x.dtype) for t in (weight, A, B))
        bias = None if bias is None else bias.to(x.dtype)
        y = reference.lora_linear(x, W, bias, A, B, scale, starts=starts, dropout=dropout, seed=mask_seed)
        return F.gelu(y) if gelu else y
    rows, fold = x.reshape(-1, x.shape[-1]), fold and not dropout
    within = gelu and fold and not needs_gradient(x, weight, bias, A, B)
    y = autograd.lora_linear(rows, weight, bias, A, B, scale, starts, dropout, mask_seed, fold, within, _pick(x))
    y = y.view(*x.shape[:-1], len(weight))
    return F.gelu(y) if gelu and not within else y


def use_backend(name: str) -> None:
    """Chooses what makes the layer's steps, for the whole process.

    Args:
        name: "eager", plain torch, the default on every device; or "triton", the kernels of `vitlorafa.ops.triton` on
            CUDA, which no device in `results/bench` has shown to be faster yet. They leave float64, other devices and
            compiled models to plain torch. The environment variable VITLORAFA_BACKEND sets the start.

    Raises:
        AdapterError: If there is no such backend, or Triton is not installed.
    """
    global _backend
    if name not in ("eager", "triton"):
        raise unknown("backend", name, ("eager", "triton"))
    if name == "triton" and not import_module("vitlorafa.ops.triton").AVAILABLE:
        raise AdapterError("the triton backend needs Triton: pip install triton")
    _backend = name


_backend = "eager"
use_backend(os.environ.get("VITLORAFA_BACKEND", "eager"))


def _pick(x: Tensor) -> str:
    if _backend == "eager" or not x.is_cuda or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return "eager"
    autograd.BACKENDS.setdefault("triton", import_module("vitlorafa.ops.triton"))
    return "triton"


def _check(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, starts: tuple[int, ...]) -> None:
    if A.dim() != 3 or B.dim() != 3 or A.shape[:2] != (B.shape[0], B.shape[2]) or len(starts) != len(A):
        raise AdapterError(
            f"A must be [k, r, d_in] and B [k, m, r] with {len(starts)} projections, "
            f"not {list(A.shape)} and {list(B.shape)}"
        )
    d_out, d_in = weight.shape
    if A.shape[2] != d_in or x.shape[-1] != d_in:
        raise AdapterError(f"x {list(x.shape)} and A {list(A.shape)} must end in the weight's input width {d_in}")
    m = B.shape[1]
    steps = {after - before for before, after in pairwise(starts)} or {m}
    if starts[0] < 0 or starts[-1] + m > d_out or len(steps) > 1 or min(steps) < m:
        raise AdapterError(f"slices of {m} from {starts} must be ascending, evenly spaced, and within {d_out} outputs")
    if any(n % m for n in (d_out, *starts)):
        raise AdapterError(f"the slices from {starts} must be some of equal parts of the {d_out} outputs, {m} each")
