"""How the runs of a sweep are executed: `Launcher` says what a launcher is, and `LAUNCHERS` which there are.

launcher, registry, plugins   what a launcher is, those of this package, those of others
command, launch               what a launcher is given: commands, and how they are to be run
local, ray, slurm, dummy      the launchers; slurm_task is what runs in a job of Slurm
options                       options of launchers
pool, worker, execute, slots  runs on this machine, in processes that take one after another
queue, stopping, memory       what is next, when to stop, and how much memory processes take
"""

from domainbed_ext.launchers import dummy, local, ray, slurm  # they register themselves
from domainbed_ext.launchers.launch import Launch
from domainbed_ext.launchers.launcher import Launcher
from domainbed_ext.launchers.plugins import GROUP
from domainbed_ext.launchers.registry import (
    LAUNCHERS,
    cancel_in_scheduler,
    check_options,
    get_launcher,
    register_launcher,
)

__all__ = [
    "GROUP",
    "LAUNCHERS",
    "Launch",
    "Launcher",
    "cancel_in_scheduler",
    "check_options",
    "dummy",
    "get_launcher",
    "local",
    "ray",
    "register_launcher",
    "slurm",
]
