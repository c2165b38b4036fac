"""How the runs of a sweep get executed. A launcher is one function.

Others' own are found by the entry point group `domainbed_ext.launchers`; a function that takes the list of commands
alone, as DomainBed's do, is one too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from domainbed_ext.errors import unknown
from domainbed_ext.launchers import plugins as others
from domainbed_ext.launchers.dummy import DummyOptions, dummy
from domainbed_ext.launchers.launches import Launch
from domainbed_ext.launchers.local import LocalOptions, MultiGpuOptions, local, multi_gpu
from domainbed_ext.launchers.options import read, table
from domainbed_ext.launchers.ray import RayOptions, ray
from domainbed_ext.launchers.slurm import SlurmOptions, read_options, slurm

__all__ = ["GROUP", "HERE", "LAUNCHERS", "OPTIONS", "Launcher", "check_options", "get_launcher", "table"]

GROUP = others.GROUP

Launcher = Callable[[Sequence[str], Launch], Sequence[int | None]]
"""Runs shell commands and returns their exit codes (see `ExitCode`), a negative one for the signal that killed it; None
for one that waits in an engine and runs later. What became of a run is read from its folder, not from here.
On Ctrl-C, and when the launch is cancelled, it has every run stop at a checkpoint (SIGTERM) and raises
KeyboardInterrupt."""

LAUNCHERS: dict[str, Launcher] = {
    "local": local,
    "multi_gpu": multi_gpu,
    "slurm": slurm,
    "ray": ray,
    "dummy": dummy,
}

HERE = ("local", "multi_gpu")
"""Those whose runs are on this machine."""

OPTIONS: dict[str, type] = {
    "local": LocalOptions,
    "multi_gpu": MultiGpuOptions,
    "slurm": SlurmOptions,
    "ray": RayOptions,
    "dummy": DummyOptions,
}
"""Each launcher's options; `table` tells of them."""


def get_launcher(name: str) -> Launcher:
    """The launcher of a name.

    Raises:
        BenchmarkError: unknown, naming the nearest; or another package's that cannot be imported.
    """
    if name in LAUNCHERS:
        return LAUNCHERS[name]
    found = others.found()
    if name not in found:
        raise unknown("launcher", name, {*LAUNCHERS, *found})
    return others.load(found[name])


def check_options(name: str, given: Mapping[str, Any]) -> None:
    """Checks a launcher's options before anything is launched; those of others' launchers are theirs to check.

    Args:
        name: of the launcher.
        given: its options.

    Raises:
        BenchmarkError: it has no such option, or the value is not of its type.
    """
    if name == "slurm":
        read_options(given)
    elif name in OPTIONS:
        read(OPTIONS[name], name, given)
