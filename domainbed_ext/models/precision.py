"""The number format that a run's matmuls are computed in."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from vitlorafa import cpu_has


def choose(precision: str, device: torch.device) -> str:
    """What "auto" means on a device: bf16 where it multiplies bf16 natively, else float32.

    A CPU without AVX512-BF16 or AMX emulates bf16 more slowly than it computes float32.

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
    return "bf16" if _cpu_has_bf16() else "float32"


def _cpu_has_bf16() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities:
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return cpu_has("avx512_bf16")  # torch 2.6 and older cannot tell


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which a model computes.

    Args:
        precision: "bf16" or "float32".
        device: Device that the model is on.

    Returns:
        torch's autocast, switched off for float32.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
