"""The number format that a run's matmuls are computed in."""

from contextlib import AbstractContextManager

import torch

from vitlorafa import fastest_precision


def choose(precision: str, device: torch.device) -> str:
    """What "auto" means on a device: on a GPU bf16 where it is native, on a CPU bf16 where it is clearly faster.

    Args:
        precision: One of `protocols.PRECISIONS`.
        device: Device that the run computes on.

    Returns:
        "bf16" or "float32".
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return fastest_precision()


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which a model computes.

    Args:
        precision: "bf16" or "float32".
        device: Device that the model is on.

    Returns:
        torch's autocast, switched off for float32.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
