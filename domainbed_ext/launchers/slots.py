"""Where runs go side by side on this machine: a slot is what one of them has to itself."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from domainbed_ext.launchers.command import Command
from domainbed_ext.system.machine import available_cores


@dataclass(frozen=True)
class Slot:
    """Room for one run at a time.

    Attributes:
        environment: variables of the processes in it, e.g. CUDA_VISIBLE_DEVICES.
    """

    environment: Mapping[str, str] = field(default_factory=dict)


def slots_here(commands: Sequence[str], parallel: int = 0, jobs_per_gpu: int = 1) -> list[Slot]:
    """The slots of this machine: `jobs_per_gpu` on each visible GPU; without one, as many as the cores have room for.

    Args:
        commands: what is to run; the one with the most threads says how many cores a slot needs.
        parallel: number of slots; 0 as above. With GPUs, the slots go round them.
        jobs_per_gpu: runs side by side on a GPU.

    Returns:
        No more slots than commands.
    """
    devices = visible_devices()
    if devices:
        count = parallel or len(devices) * jobs_per_gpu
        slots = [Slot({"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]}) for i in range(count)]
    else:
        slots = [Slot()] * (parallel or max(1, available_cores() // threads(commands)))
    return slots[: len(commands)]


def threads(commands: Sequence[str]) -> int:
    """CPU threads of the widest of some runs."""
    return max((Command(text).threads for text in commands), default=1)


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: by number or by UUID."""
    from torch import cuda

    count = cuda.device_count()  # asks the driver's NVML, so that CUDA stays untouched in this process
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return (named if any(named) else [str(number) for number in range(count)])[:count]
