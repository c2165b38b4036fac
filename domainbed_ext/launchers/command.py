"""A command of a launch, and what a launcher reads from it."""

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from domainbed_ext.errors import BenchmarkError

if TYPE_CHECKING:
    from domainbed_ext.runs.arguments import RunArguments
    from domainbed_ext.runs.folder import RunFolder

_OURS = ["-m", "domainbed_ext.train"]


@dataclass(frozen=True)
class Command:
    """A shell command; one that is a run of ours has a folder, threads and perhaps a time limit.

    What knows of runs is imported when the first of them is met, for with it comes torch, which takes seconds.

    Attributes:
        text: as it is typed.
    """

    text: str

    @cached_property
    def run_words(self) -> list[str] | None:
        """The arguments of `domainbed_ext.train`; None if it is another command."""
        try:
            words = shlex.split(self.text)
        except ValueError:  # the shell's to complain of
            return None
        return words[3:] if words[1:3] == _OURS else None

    @cached_property
    def run_args(self) -> "RunArguments | None":
        """The same, read; None also if they are wrong."""
        if self.run_words is None:
            return None
        from domainbed_ext.runs import arguments as options

        try:
            return options.parse(self.run_words)
        except BenchmarkError:
            return None

    @cached_property
    def folder(self) -> "RunFolder | None":
        """The run's."""
        if self.run_args is None:
            return None
        from domainbed_ext.runs.folder import RunFolder

        return RunFolder(self.run_args.output_dir)

    @property
    def threads(self) -> int:
        """CPU threads of the run."""
        # Not by the parser, which takes a millisecond: a launch asks all of its commands.
        given = re.search(r" --threads[ =]([1-9]\d*)", self.text) if " domainbed_ext.train " in self.text else None
        return int(given[1]) if given else 1

    @property
    def minutes(self) -> float | None:
        """The run's time limit."""
        return self.run_args.time_limit if self.run_args else None
