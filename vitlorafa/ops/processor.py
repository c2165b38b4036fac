"""The number format that a layer computes in, and the formats that the processor multiplies natively."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlorafa.ops.private import inside_torch_func
from vitlorafa.tuning import Question, Trials, choose, sampler


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes a linear layer with input x; None if autocast does not change it.

    Args:
        x: Input of the layer; autocast does not change float64.
    """
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def plain_cpu_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which a layer with input x computes, where our own kernels may be faster than torch's.

    That is on a CPU in bfloat16 and float32; None elsewhere, in a compiler, and in torch.func's transforms, which
    support torch's operations only.
    """
    dtype = autocast_dtype(x) or x.dtype
    if not x.is_cpu or dtype not in (torch.bfloat16, torch.float32):
        return None
    return None if torch.compiler.is_compiling() or inside_torch_func() else dtype


def fastest_precision() -> str:
    """The number format of matmuls that is the fastest on this CPU: "bf16", or "float32" unless bf16 is clearly faster.

    A processor without instructions for bfloat16 emulates it, many times more slowly than it computes float32.
    """
    return choose(_PRECISION, _multiply)


# Also timed where the answer cannot be kept: there is no processor on which both take about the same time.
_PRECISION = Question("precision", "matmuls", ("float32", "bf16"), margin=1.2, seconds=0.05, needs_file=False)


def _multiply() -> Trials:
    draw = sampler(torch.float32)
    x, weight = draw(256, 512), draw(512, 512)

    def sample(dtype: torch.dtype) -> Callable[[], Tensor]:
        a, b = x.to(dtype), weight.to(dtype)
        return lambda: F.linear(a, b)

    return {"float32": sample(torch.float32), "bf16": sample(torch.bfloat16)}


def cpu_has(feature: str) -> bool:
    """Whether this CPU has a feature according to torch; False if this version of torch does not report it.

    Args:
        feature: Name as in torch, such as "avx512_bf16" or "amx_tile".
    """
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()
