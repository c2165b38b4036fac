"""The names of this machine's processor and GPU, and what limits the processor's instructions."""

import os
import platform
from pathlib import Path

import torch


def device_name(device: torch.device | str) -> str:
    """The name of the GPU, or that of the processor with its number of cores.

    Args:
        device: Device of this machine.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {os.cpu_count()} cores"


def instruction_limits() -> str:
    """The environment variables that limit the processor's instructions, as a shell takes them; empty for none."""
    kinds = ("_ISA", "_CAPABILITY", "_INSTRUCTIONS")
    owners = ("ATEN_", "DNNL_", "MKL_", "ONEDNN_")
    names = sorted(name for name in os.environ if name.startswith(owners) and name.endswith(kinds))
    return " ".join(f"{name}={os.environ[name]}" for name in names)


def cpu_name() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown processor"
