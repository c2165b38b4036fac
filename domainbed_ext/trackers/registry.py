"""The registry of trackers. Each registers itself at its class, by `register_tracker`."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from domainbed_ext.system.registry import Registry, path_of
from domainbed_ext.trackers.base import Tracker

T = TypeVar("T", bound=type[Tracker])

GROUP = "domainbed_ext.trackers"

TRACKERS: Registry[type[Tracker]] = Registry(
    "tracker",
    GROUP,
    [f"domainbed_ext.trackers.{module}" for module in ("tensorboard", "wandb", "trackio", "csv")],
    make=lambda name, tracker: tracker,
)


def register_tracker(name: str) -> Callable[[T], T]:
    """Registers a class as a tracker: `@register_tracker("mine")` above it.

    Args:
        name: Value of `--track` that chooses it.

    Returns:
        Decorator of a subclass of `Tracker`.
    """

    def decorate(tracker: T) -> T:
        TRACKERS.register(name, tracker, path_of(tracker))
        return tracker

    return decorate


def check_trackers(names: Iterable[str] | None) -> None:
    """Checks values of `--track`.

    Args:
        names: Names of trackers; None for none.

    Raises:
        BenchmarkError: There is no such tracker, or its package is not installed.
    """
    for name in names or ():
        TRACKERS.find(name).check(name)
