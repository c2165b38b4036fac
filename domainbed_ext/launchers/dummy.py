"""The launcher `dummy`: prints commands instead of running them, as DomainBed's launcher of that name."""

from collections.abc import Sequence
from dataclasses import dataclass

from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.launch import Launch
from domainbed_ext.launchers.launcher import Launcher
from domainbed_ext.launchers.registry import register_launcher


@dataclass(frozen=True)
class DummyOptions:
    """Options of launcher `dummy`: none."""


@register_launcher("dummy")
class Dummy(Launcher):
    """Prints each command."""

    OPTIONS = DummyOptions
    ONLY_PRINTS = True

    def run(self, commands: Sequence[Command], launch: Launch) -> list[int]:
        """Prints commands; see `Launcher.run`."""
        self.read_options(launch.options)
        for command in commands:
            print(command.text)
        return [0] * len(commands)
