"""Slots for parallel runs on this machine: a slot is the share of the machine that one run has to itself."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from domainbed_ext.launchers.command import Command
from domainbed_ext.system.machine import count_available_cores


@dataclass(frozen=True)
class Slot:
    """Room for one run at a time.

    Attributes:
        environment: Environment variables of the processes in it, e.g. CUDA_VISIBLE_DEVICES.
    """

    environment: Mapping[str, str] = field(default_factory=dict)


def make_slots(commands: Sequence[Command], parallel: int = 0, jobs_per_gpu: int = 1) -> list[Slot]:
    """Divides this machine: `jobs_per_gpu` slots on each visible GPU; without one, as many as the cores have room for.

    Runs on the CPU alone are divided as without a GPU.

    Args:
        commands: Commands that are to run; the one with the most threads says how many cores a slot needs.
        parallel: Number of slots; 0 as above. With GPUs, the slots go round them.
        jobs_per_gpu: Number of parallel runs on a GPU.

    Returns:
        The slots, no more than commands.
    """
    devices = [] if commands and all(command.is_on_cpu for command in commands) else list_visible_devices()
    if devices:
        count = parallel or len(devices) * jobs_per_gpu
        slots = [Slot({"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]}) for i in range(count)]
    else:
        threads = max((command.threads for command in commands), default=1)
        slots = [Slot()] * (parallel or max(1, count_available_cores() // threads))
    return slots[: len(commands)]


def list_visible_devices() -> list[str]:
    """Lists the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: by number or by UUID."""
    from torch import cuda

    count = cuda.device_count()  # asks the driver's NVML, so that CUDA stays untouched in this process
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return (names if any(names) else [str(number) for number in range(count)])[:count]
