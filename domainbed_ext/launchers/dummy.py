"""Prints commands instead of running them, as DomainBed's launcher of that name."""

from collections.abc import Callable, Sequence


def dummy(commands: Sequence[str], jobs: int, progress: Callable[[int, float], None]) -> list[int]:
    """Prints each command; see `domainbed_ext.launchers.Launcher`."""
    for command in commands:
        print(command)
    return [0] * len(commands)
