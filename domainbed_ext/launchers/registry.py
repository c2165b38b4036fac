"""The launchers by name: those of this package register themselves, and other packages' are found as entry points."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.launchers import plugins
from domainbed_ext.launchers.launcher import END_IT_YOURSELF, Launcher

T = TypeVar("T", bound=type[Launcher])

LAUNCHERS: dict[str, Launcher] = {}
"""The launchers of this package."""


def register_launcher(name: str) -> Callable[[T], T]:
    """Registers a launcher: `@register_launcher("mine")` above its class.

    Args:
        name: Value of --command_launcher that chooses it.
    """

    def register(kind: T) -> T:
        LAUNCHERS[name] = kind(name)
        return kind

    return register


def get_launcher(name: str) -> Launcher:
    """Returns the launcher of a name.

    Args:
        name: A key of `LAUNCHERS`, or an entry point of another package.

    Raises:
        BenchmarkError: The name is unknown (names the nearest), or another package's launcher cannot be imported.
    """
    if name in LAUNCHERS:
        return LAUNCHERS[name]
    points = plugins.find()
    if name not in points:
        raise unknown("launcher", name, {*LAUNCHERS, *points})
    return plugins.load(points[name])


def check_options(name: str, values: Mapping[str, Any]) -> None:
    """Checks a launcher's options before anything is launched.

    Args:
        name: Name of the launcher.
        values: Values of --launcher_options by name.

    Raises:
        BenchmarkError: It has no such option, or the value is not of its type.
    """
    get_launcher(name).read_options(values)


def cancel_in_scheduler(name: str, path: Path) -> str:
    """Has a launcher end what a launch left in its scheduler.

    Args:
        name: Name of the launcher; it may be of a package that is not installed here.
        path: Folder of the launch.

    Returns:
        What becomes of its runs, in words.

    Raises:
        BenchmarkError: The scheduler refuses.
    """
    try:
        launcher = get_launcher(name)
    except BenchmarkError:
        return END_IT_YOURSELF
    return launcher.cancel(path)
