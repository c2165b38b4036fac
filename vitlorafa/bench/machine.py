"""The machine and the versions that a measurement ran on."""

import os
import platform
import re
import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch

import vitlorafa


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
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": versions,
    }


def device_name(device: str) -> str:
    """The name of the GPU, or that of the processor with its number of cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {os.cpu_count()} cores"


def file_name(device: str) -> str:
    """The device's name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown processor"
