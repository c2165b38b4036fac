"""Launchers of other packages, which name them under the entry point group `domainbed_ext.launchers`.

An entry point is a `Launcher` class; a function that takes the commands as text and the launch; or one that takes the
commands alone, as DomainBed's launchers do.
"""

import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.launch import Launch
from domainbed_ext.launchers.launcher import Launcher
from domainbed_ext.runs.folder import State
from domainbed_ext.system.exit_codes import ExitCode

GROUP = "domainbed_ext.launchers"


class FunctionLauncher(Launcher):
    """A launcher that is a plain function.

    Args:
        name: Name of the launcher.
        function: Function that takes the commands as text and the launch, and returns exit codes.
    """

    def __init__(self, name: str, function: Callable[[list[str], Launch], Sequence[int | None]]) -> None:
        super().__init__(name)
        self._function = function

    def run(self, commands: Sequence[Command], launch: Launch) -> Sequence[int | None]:
        """Calls the function."""
        return self._function([command.text for command in commands], launch)


class DomainBedLauncher(Launcher):
    """A launcher of DomainBed's kind: a function that takes the commands alone, and returns nothing.

    Args:
        name: Name of the launcher.
        function: Function that takes the commands as text.
    """

    def __init__(self, name: str, function: Callable[[list[str]], object]) -> None:
        super().__init__(name)
        self._function = function

    def run(self, commands: Sequence[Command], launch: Launch) -> list[int | None]:
        """Calls the function, and reads from the runs' folders what became of them."""
        self._function([command.text for command in commands])
        return [_read_code(command) for command in commands]


def find() -> dict[str, EntryPoint]:
    """Finds other packages' launchers, by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def load(point: EntryPoint) -> Launcher:
    """Loads the launcher that an entry point names.

    Args:
        point: One of those that `find` returns.

    Raises:
        BenchmarkError: It cannot be imported.
    """
    try:
        target = point.load()
    except Exception as error:
        package = point.dist.name if point.dist else point.value
        raise BenchmarkError(f"launcher {point.name!r} of {package} cannot be imported: {error}") from error
    if isinstance(target, type) and issubclass(target, Launcher):
        return target(point.name)
    return (DomainBedLauncher if _takes_commands_alone(target) else FunctionLauncher)(point.name, target)


def _takes_commands_alone(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind([], None)
    except TypeError:
        return True
    except ValueError:  # its signature cannot be read
        pass
    return False


def _read_code(command: Command) -> int | None:
    """Reads a run's exit code from its folder; a run that has not ended may wait in a scheduler."""
    state = command.folder.state if command.folder else None
    return {State.DONE: ExitCode.DONE, State.FAILED: ExitCode.FAILED}.get(state) if state else None
