"""The machine and the versions that a measurement ran on."""

import os
import platform
import re
import shlex
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import timm
import torch

import vitlorafa
from vitlorafa.machine import cpu_name, device_name, instruction_limits

__all__ = ["collect_provenance", "device_name", "file_name", "matmul_rate"]


def collect_provenance(argv: Sequence[str], device: str) -> dict[str, Any]:
    """Command, date, machine and versions, for the JSON file next to the tables.

    Args:
        argv: Arguments of the command.
        device: Device that it ran on.
    """
    packages = (vitlorafa, torch, timm)
    versions = {"python": platform.python_version(), **{module.__name__: module.__version__ for module in packages}}
    try:
        versions["peft"] = version("peft")  # without importing it, which takes seconds
    except PackageNotFoundError:
        versions["peft"] = "not installed"
    return {
        "command": shlex.join(["python", "-m", "vitlorafa.bench", *argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "device": device_name(device),
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": cpu_name(),
            "limits": instruction_limits(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": versions,
    }


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Operations per second of a large square matmul, the fastest of some.

    Args:
        dtype: Number format.
        device: "cpu" or "cuda".
    """
    size, tries = (8192, 20) if torch.device(device).type == "cuda" else (2048, 5)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    seconds = []
    for _ in range(tries):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def file_name(device: str) -> str:
    """The device's name as a part of a file's name, with the instructions of a processor that is limited to them."""
    limited = torch.device(device).type == "cpu" and instruction_limits()
    instructions = [torch.backends.cpu.get_cpu_capability()] if limited else []
    return re.sub(r"[^a-z0-9]+", "_", "_".join([device_name(device), *instructions]).lower()).strip("_")
