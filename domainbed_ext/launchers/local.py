"""Runs on this machine, side by side, in warm workers: each imports torch once, not once a run."""

from collections.abc import Sequence
from dataclasses import dataclass

from domainbed_ext.launchers import options as settings
from domainbed_ext.launchers.launches import Launch
from domainbed_ext.launchers.options import option
from domainbed_ext.launchers.pool import Limits, run_all
from domainbed_ext.launchers.slots import slots_here


@dataclass(frozen=True)
class LocalOptions(Limits):
    """The options of launcher `local`."""

    jobs_per_gpu: int = option(1, "runs side by side on each GPU that CUDA_VISIBLE_DEVICES leaves visible", above=0)


@dataclass(frozen=True)
class MultiGpuOptions(Limits):
    """The options of launcher `multi_gpu`."""


def local(commands: Sequence[str], launch: Launch) -> list[int]:
    """Runs commands side by side: on every GPU, or where there is none, as many as the cores have room for.

    See `domainbed_ext.launchers.Launcher`; `LocalOptions` are its options.
    """
    options = settings.read(LocalOptions, "local", launch.options)
    slots = slots_here(commands, launch.parallel, options.jobs_per_gpu)
    return run_all(commands, slots, launch.progress, lambda: launch.cancelled, options)


def multi_gpu(commands: Sequence[str], launch: Launch) -> list[int]:
    """DomainBed's launcher of that name: `local` with one run a GPU."""
    options = settings.read(MultiGpuOptions, "multi_gpu", launch.options)
    return run_all(commands, slots_here(commands, launch.parallel), launch.progress, lambda: launch.cancelled, options)
