"""Prints commands instead of running them, as DomainBed's launcher of that name."""

from collections.abc import Sequence
from dataclasses import dataclass

from domainbed_ext.launchers import options as settings
from domainbed_ext.launchers.launches import Launch


@dataclass(frozen=True)
class DummyOptions:
    """The options of launcher `dummy`: none."""


def dummy(commands: Sequence[str], launch: Launch) -> list[int]:
    """Prints each command; see `domainbed_ext.launchers.Launcher`."""
    settings.read(DummyOptions, "dummy", launch.options)
    for command in commands:
        print(command)
    return [0] * len(commands)
