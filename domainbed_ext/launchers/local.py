"""The launchers `local` and `multi_gpu`: parallel runs on this machine, in workers that stay alive.

A warm worker imports torch once, not once a run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.launch import Launch
from domainbed_ext.launchers.launcher import Launcher
from domainbed_ext.launchers.options import option
from domainbed_ext.launchers.pool import Limits, run_all
from domainbed_ext.launchers.registry import register_launcher
from domainbed_ext.launchers.slots import Slot, make_slots


@dataclass(frozen=True)
class LocalOptions(Limits):
    """Options of launcher `local`."""

    jobs_per_gpu: int = option(1, "parallel runs on each visible GPU (see CUDA_VISIBLE_DEVICES)", above=0)


@register_launcher("local")
class Local(Launcher):
    """Runs commands in parallel: on every GPU or, if there is none, as many as there are cores for them."""

    OPTIONS: ClassVar[type | None] = LocalOptions
    RUNS_HERE = True

    def run(self, commands: Sequence[Command], launch: Launch) -> list[int]:
        """Runs commands to their end; see `Launcher.run`."""
        limits = self.read_options(launch.options)
        slots = self._make_slots(commands, launch.parallel, limits)
        return run_all(commands, slots, launch.progress, lambda: launch.cancelled, limits)

    def count_runs_at_once(self, commands: Sequence[Command], parallel: int, values: Mapping[str, Any]) -> int:
        """Counts the slots."""
        return len(self._make_slots(commands, parallel, self.read_options(values)))

    def _make_slots(self, commands: Sequence[Command], parallel: int, limits: Any) -> list[Slot]:
        return make_slots(commands, parallel, limits.jobs_per_gpu)


@dataclass(frozen=True)
class MultiGpuOptions(Limits):
    """Options of launcher `multi_gpu`."""


@register_launcher("multi_gpu")
class MultiGpu(Local):
    """DomainBed's launcher of that name: `local` with one run per GPU."""

    OPTIONS = MultiGpuOptions

    def _make_slots(self, commands: Sequence[Command], parallel: int, limits: Any) -> list[Slot]:
        return make_slots(commands, parallel)
