"""The machine and the versions that a measurement ran on."""

import os
import platform
import re
import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import timm
import torch

import vitlorafa
from vitlorafa.machine import cpu_name, device_name

__all__ = ["collect_provenance", "device_name", "file_name"]


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
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": versions,
    }


def file_name(device: str) -> str:
    """The device's name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")
