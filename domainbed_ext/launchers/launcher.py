"""What a launcher is: one object that says everything about it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from domainbed_ext.launchers import options
from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.launch import Launch

END_IT_YOURSELF = "its runs no longer count as queued; cancel them in the scheduler too"


class Launcher(ABC):
    """Executes the runs of a sweep: on this machine, or by handing them to a scheduler.

    Args:
        name: Name that it is registered under.

    Attributes:
        OPTIONS: Dataclass of its options, whose fields are made by `options.option`; None passes whatever is given on
            unchecked.
        RUNS_HERE: Whether its runs are on this machine.
        ONLY_PRINTS: Whether it starts nothing.
    """

    OPTIONS: ClassVar[type | None] = None
    RUNS_HERE: ClassVar[bool] = False
    ONLY_PRINTS: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def run(self, commands: Sequence[Command], launch: Launch) -> Sequence[int | None]:
        """Runs commands. What became of a run is read from its folder, not from here.

        Args:
            commands: Commands of the launch.
            launch: Launch, which says how to run them and receives their progress.

        Returns:
            Exit codes (see `ExitCode`) in the order of the commands: a negative one for the signal that killed
            a command, None for one that waits in a scheduler and runs later.

        Raises:
            BenchmarkError: The options are wrong, or the scheduler refuses.
            KeyboardInterrupt: After Ctrl-C, or when the launch was cancelled; every run has stopped at a checkpoint.
        """

    def read_options(self, values: Mapping[str, Any]) -> Any:
        """Checks options.

        Args:
            values: Values of --launcher_options by name.

        Returns:
            An instance of `OPTIONS`; the values themselves if it has none.

        Raises:
            BenchmarkError: There is no such option, or the value is not of its type.
        """
        return values if self.OPTIONS is None else options.read(self.OPTIONS, self.name, values)

    def list_options(self) -> list[tuple[str, str, str]]:
        """Lists name, default and meaning of each option."""
        return [] if self.OPTIONS is None else options.list_options(self.OPTIONS)

    def count_runs_at_once(self, commands: Sequence[Command], parallel: int, values: Mapping[str, Any]) -> int | None:
        """Tells how many runs go at once.

        Args:
            commands: Commands of the launch.
            parallel: Value of --jobs; 0 as the launcher sees fit.
            values: Values of --launcher_options by name.

        Returns:
            Their number; None where a scheduler decides.
        """
        return parallel or None

    def cancel(self, path: Path) -> str:
        """Ends what a launch left in the scheduler; the launch's `cancel` file is there already.

        Args:
            path: Folder of the launch.

        Returns:
            What becomes of its runs, in words.

        Raises:
            BenchmarkError: The scheduler refuses.
        """
        return END_IT_YOURSELF
