"""Where numbers come from: versions, machine, command and date."""

import contextlib
import inspect
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import safetensors
import timm
import torch
import torchvision

import domainbed_ext
from domainbed_ext.datasets.image_files import RULES
from domainbed_ext.runs.imports import source_digest


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that numbers depend on, and of the rules for reading image files."""
    packages = (domainbed_ext, torch, torchvision, timm, np, safetensors, PIL)
    installed = {package.__name__: package.__version__ for package in packages}
    return {"python": platform.python_version(), **installed, "image rules": str(RULES)}


def own_sources(kind: type, base: type) -> dict[str, str]:
    """Digests of the source files of a user's class and its bases, without those of this package.

    Args:
        kind: Class of a method or a data set.
        base: Base class of all such classes.

    Returns:
        Digest by class name; without classes whose source is not in a file.
    """
    digests = {}
    for each in kind.__mro__:
        if issubclass(each, base) and each.__module__.partition(".")[0] != domainbed_ext.__name__:
            with contextlib.suppress(OSError, TypeError):  # typed at a prompt, say
                digests[each.__name__] = source_digest(Path(inspect.getsourcefile(each) or "").read_bytes())
    return digests


def machine() -> dict[str, Any]:
    """Processor, what torch uses of its instructions, cores and GPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": models[0] if models else platform.processor() or "unknown",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def rounding() -> dict[str, Any]:
    """What sets in this process how sums round, beside versions and machine: threads, and limits on instructions."""
    limits = {name: value for name, value in os.environ.items() if name.startswith(_LIMITS)}
    instructions = dict(getattr(torch.cpu, "get_capabilities", dict)())  # torch 2.6 has no word for them
    precision = torch.get_float32_matmul_precision()
    return {"threads": torch.get_num_threads(), "limits": limits, "has": instructions, "matmul": precision}


# Environment variables of torch, oneDNN, MKL and OpenMP that say what instructions and threads may be used.
_LIMITS = ("ATEN_", "DNNL_", "MKL_", "ONEDNN_", "OMP_DYNAMIC", "OMP_THREAD_LIMIT")


def provenance(module: str, argv: Sequence[str]) -> dict[str, Any]:
    """All of it, for a JSON file beside results.

    Args:
        module: Module that was run with `python -m`.
        argv: Command-line arguments.

    Returns:
        "command", "date" (UTC, to the second), "machine", "versions" and, of a checkout, "commit".
    """
    at = commit()
    return {
        "command": shlex.join(["python", "-m", module, *argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        **({"commit": at} if at else {}),
    }


def commit() -> str:
    """The commit of the checkout that this package is imported from, with a + if its files were changed since.

    Returns:
        Short hash; empty if the package is not tracked by git, or git is not installed.
    """
    folder = Path(domainbed_ext.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # a repository around an installed package is not ours
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
