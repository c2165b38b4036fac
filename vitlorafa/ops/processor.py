"""The number format that a layer computes in, and the formats that the processor multiplies natively."""

import torch
from torch import Tensor

from vitlorafa.ops.private import inside_torch_func


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes a linear layer with input x; None if autocast does not change it.

    Args:
        x: Input of the layer; autocast does not change float64.
    """
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def is_plain_bfloat16_on_cpu(x: Tensor) -> bool:
    """Whether a layer with input x computes in bfloat16 on the CPU, where our own kernels may be faster than torch's.

    False in a compiler and in torch.func's transforms, which support torch's operations only.
    """
    in_bfloat16 = x.is_cpu and (autocast_dtype(x) or x.dtype) == torch.bfloat16
    return in_bfloat16 and not torch.compiler.is_compiling() and not inside_torch_func()


def cpu_has(feature: str) -> bool:
    """Whether this CPU has a feature according to torch; False if this version of torch does not report it.

    Args:
        feature: Name as in torch, such as "avx512_bf16" or "amx_tile".
    """
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()
