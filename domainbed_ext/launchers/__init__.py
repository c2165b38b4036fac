"""How the runs of a sweep get executed. A new launcher is one function and a line here."""

from collections.abc import Callable, Sequence

from domainbed_ext.errors import unknown
from domainbed_ext.launchers.dummy import dummy
from domainbed_ext.launchers.local import local

__all__ = ["LAUNCHERS", "Launcher", "Progress", "get_launcher"]

Progress = Callable[[int, float], None]
"""Told a command's index and the share of it that is done; 1.0 when it ended, well or not."""

Launcher = Callable[[Sequence[str], int, Progress], list[int]]
"""Runs shell commands, at most so many at once (0: as the launcher sees fit), and returns their exit codes, a
negative one for the signal that killed it. What became of a run is read from its folder, not from here."""

LAUNCHERS: dict[str, Launcher] = {"local": local, "dummy": dummy}


def get_launcher(name: str) -> Launcher:
    """The launcher of a name.

    Raises:
        BenchmarkError: unknown; names the nearest.
    """
    if name not in LAUNCHERS:
        raise unknown("launcher", name, LAUNCHERS)
    return LAUNCHERS[name]
