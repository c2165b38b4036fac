"""What the processor multiplies natively, and the number format that a layer computes in."""

import torch
from torch import Tensor

from vitlorafa.ops.private import inside_torch_func


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes a linear layer of x in, None where it leaves x alone.

    Args:
        x: The layer's input. As everywhere in torch, autocast leaves float64 alone.
    """
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def is_plain_bfloat16_on_cpu(x: Tensor) -> bool:
    """Whether a layer of x computes in bfloat16 on the CPU, where ways of our own may be faster than torch's.

    Not so under a compiler or torch.func's transforms, which know torch's operations, not ours.
    """
    in_bfloat16 = x.is_cpu and (autocast_dtype(x) or x.dtype) == torch.bfloat16
    return in_bfloat16 and not torch.compiler.is_compiling() and not inside_torch_func()


def cpu_has(feature: str) -> bool:
    """Whether torch says that this CPU has it; no in a torch that has no word for it."""
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()
