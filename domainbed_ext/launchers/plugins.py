"""Launchers of other packages, which name them under the entry point group `domainbed_ext.launchers`."""

import functools
import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.launches import Launch
from domainbed_ext.system.exit_codes import ExitCode

GROUP = "domainbed_ext.launchers"


def found() -> dict[str, EntryPoint]:
    """Other packages' launchers by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def load(point: EntryPoint) -> Callable[[Sequence[str], Launch], Sequence[int | None]]:
    """The launcher that an entry point names.

    Args:
        point: one of `found`.

    Returns:
        It, or if it takes the list of commands alone, as DomainBed's do, what calls it so.

    Raises:
        BenchmarkError: it cannot be imported.
    """
    try:
        function = point.load()
    except Exception as error:
        whose = point.dist.name if point.dist else point.value
        raise BenchmarkError(f"launcher {point.name!r} of {whose} cannot be imported: {error}") from error
    return _of_commands_alone(function) if _takes_one(function) else function


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind([], None)
    except TypeError:
        return True
    except ValueError:  # it does not tell
        pass
    return False


def _of_commands_alone(function: Callable[[list[str]], Any]) -> Callable[[Sequence[str], Launch], list[int | None]]:
    @functools.wraps(function)
    def launcher(commands: Sequence[str], launch: Launch) -> list[int | None]:
        function(list(commands))
        return [_code(Command(text)) for text in commands]

    return launcher


def _code(command: Command) -> int | None:
    """What a run's folder says of it; a run that has not ended may wait in an engine."""
    from domainbed_ext.runs.folder import State

    state = command.folder.state if command.folder else None
    return {State.DONE: ExitCode.DONE, State.FAILED: ExitCode.FAILED}.get(state) if state else None
