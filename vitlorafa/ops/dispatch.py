"""The public function of the adapted layer: checks shapes, chooses precision, seed and backend."""

import os
from importlib import import_module
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlorafa.errors import AdapterError, unknown
from vitlorafa.ops import autograd, reference
from vitlorafa.ops.dropout import rounded
from vitlorafa.ops.private import inside_torch_func
from vitlorafa.ops.processor import autocast_dtype
from vitlorafa.ops.quantised import QuantisedWeight, dense
from vitlorafa.ops.stacked import stacked_lora_linear


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantisedWeight,
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
    adapter: Tensor | int | None = None,
) -> Tensor:
    """y = x Wᵀ + b, plus s (x̃ A_jᵀ) B_jᵀ on the outputs of each projection j, with x̃ = dropout(x); or its GELU.

    LoRA (Hu et al. 2021), section 4.1, for k projections that share one linear layer. Only what training needs is kept
    for backward, depending on `requires_grad` of A and B: x Aᵀ if B trains, x if A trains. Gradients have the dtype of
    their tensors and cannot be differentiated a second time.

    With `adapter`, B stacks the factors of several adapters over one A, and each sample has its own: x Aᵀ is one matmul
    for all samples. One number for all is the same as a call with that adapter's B. Gradients of x, A and B, B that of
    all adapters at once, can then be differentiated again.

    Args:
        x: Input, [..., d_in], with any number of leading dimensions; it may be empty or not contiguous. With an
            `adapter` for each sample, the first one is the batch or a multiple of it, such as windows of each image in
            the order of images.
        weight: Pretrained weight, [d_out, d_in], or a quantised one, which is dequantised in forward and in backward.
        bias: Bias, [d_out], or None.
        A: Factors A, [k, r, d_in].
        B: Factors B, [k, m, r]; with `adapter` those of n adapters, [n, k, m, r].
        scale: Scaling s.
        starts: First output of each projection, which is one of d_out/m equal parts; ascending and evenly spaced.
        dropout: Probability of dropping an element of the adapter's input, rounded to a multiple of 1/65536; 0 outside
            training.
        seed: Seed of the dropout mask. If None, drawn from torch's global generator, so that gradient checkpointing
            recomputes the layer with the same mask.
        fold: Whether to form W + s B A once, in float32 or better, and to compute one matmul with it. With dropout, or
            if False, the rank-r update is added separately; so it is with an `adapter` for each sample.
        gelu: Whether to apply exact GELU to the output; where no gradient is needed, `vitlorafa.ops.linear` does both.
        adapter: Index into the n adapters of B: whole numbers [batch], one for each sample, or one number for all.

    Returns:
        The output y, [..., d_out], in autocast's dtype if enabled, otherwise in that of x.

    Raises:
        AdapterError: If the shapes do not match.
    """
    if adapter is not None:
        _check_adapter(x, B, adapter)
    if isinstance(adapter, int):
        B, adapter = B[adapter], None
    _check(x, weight, A, B if adapter is None else B[0], starts)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    mask_seed, dropout = None, rounded(dropout)
    if dropout:
        mask_seed = torch.randint(2**63 - 1, (), device="cpu") if seed is None else torch.tensor(seed, device="cpu")
    if adapter is not None:
        y = stacked_lora_linear(x, weight, bias, A, B, adapter, scale, starts, dropout, mask_seed)
        return F.gelu(y) if gelu else y
    # torch.func needs the definition, which consists of ordinary operations. So does a compiler that traces torch.func:
    # there, B does not show that it trains, and its gradient would be lost.
    if inside_torch_func():
        W, A, B = (t.to(x.dtype) for t in (dense(weight), A, B))
        bias = None if bias is None else bias.to(x.dtype)
        y = reference.lora_linear(x, W, bias, A, B, scale, starts=starts, dropout=dropout, seed=mask_seed)
        return F.gelu(y) if gelu else y
    rows, fold = x.reshape(-1, x.shape[-1]), fold and not dropout
    y = autograd.lora_linear(
        rows, weight, bias, A, B, scale, starts, dropout, mask_seed, fold, gelu, _choose_backend(x)
    )
    return y.view(*x.shape[:-1], weight.shape[0])


def use_backend(name: str) -> None:
    """Chooses the backend of all adapted layers in this process.

    Args:
        name: "eager" (default on every device) for plain PyTorch, or "triton" for the kernels of `vitlorafa.ops.triton`
            on CUDA, which have not been benchmarked yet. For float64, other devices and compiled models, plain PyTorch
            is used with both. The environment variable VITLORAFA_BACKEND sets the backend at import.

    Raises:
        AdapterError: If there is no such backend, or Triton is not installed.
    """
    global _backend
    if name not in ("eager", "triton"):
        raise unknown("backend", name, ("eager", "triton"))
    if name == "triton" and not import_module("vitlorafa.ops.triton").AVAILABLE:
        raise AdapterError("backend 'triton' needs Triton: pip install triton")
    _backend = name


_backend = "eager"
use_backend(os.environ.get("VITLORAFA_BACKEND", "eager"))


def _choose_backend(x: Tensor) -> str:
    if _backend == "eager" or not x.is_cuda or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return "eager"
    autograd.BACKENDS.setdefault("triton", import_module("vitlorafa.ops.triton"))
    return "triton"


def _check_adapter(x: Tensor, B: Tensor, adapter: Tensor | int) -> None:
    if B.dim() != 4 or not len(B):
        raise AdapterError(f"with adapter=, B must be [n, k, m, r], the factors of n adapters, not {list(B.shape)}")
    if isinstance(adapter, int):
        if not -len(B) <= adapter < len(B):
            raise AdapterError(f"adapter is {adapter}, but B has {len(B)} adapters")
    elif adapter.dim() != 1 or adapter.dtype not in (torch.int64, torch.int32):
        raise AdapterError(f"adapter must be whole numbers [batch], not {list(adapter.shape)} of {adapter.dtype}")
    elif x.dim() < 2 or (len(x) % len(adapter) if len(adapter) else len(x)):
        raise AdapterError(f"x {list(x.shape)} must begin with the batch of the {len(adapter)} indices in adapter")


def _check(x: Tensor, weight: Tensor | QuantisedWeight, A: Tensor, B: Tensor, starts: tuple[int, ...]) -> None:
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
