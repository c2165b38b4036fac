"""The number format that a run's matmuls are computed in."""

from contextlib import AbstractContextManager
from functools import cache

import torch
import torch.nn.functional as F

from domainbed_ext.errors import BenchmarkError
from vitlorafa import fastest_precision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
"""The number formats by name."""


def choose(precision: str, device: torch.device) -> str:
    """What "auto" means on a device: on a GPU bf16 where it is native, on a CPU bf16 where it is clearly faster.

    Args:
        precision: One of `protocols.PRECISIONS`.
        device: Device that the run computes on.

    Returns:
        A key of `DTYPES`.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return fastest_precision()


def check(precision: str, device: torch.device) -> None:
    """Checks that a device computes in a precision.

    Args:
        precision: A key of `DTYPES`.
        device: Device that the run computes on.

    Raises:
        BenchmarkError: It does not.
    """
    if precision == "fp16" and (reason := _try_half(device)):
        raise BenchmarkError(
            f"--precision fp16: torch {torch.__version__} does not train in it on this {device.type} ({reason}): use "
            "bf16 or float32"
        )


@cache
def _try_half(device: torch.device) -> str:
    """Why a device does not compute in fp16; empty if it does."""
    weight, images = (torch.ones(8, 8, device=device, requires_grad=True) for _ in range(2))
    try:
        with autocast("fp16", device):
            outputs = F.layer_norm(F.gelu(F.linear(images, weight)), (8,))
        outputs.float().sum().backward()
    except (RuntimeError, TypeError) as error:
        return str(error).splitlines()[0]
    return "" if outputs.isfinite().all() else "its results are not finite"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which a model computes.

    Args:
        precision: A key of `DTYPES`.
        device: Device that the model is on.

    Returns:
        torch's autocast, switched off for float32.
    """
    is_low = precision != "float32"
    return torch.autocast(device.type, dtype=DTYPES[precision] if is_low else torch.bfloat16, enabled=is_low)
