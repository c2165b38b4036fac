"""A command of a launch, and what launchers need to know about it."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from domainbed_ext.runs.folder import RunFolder


@dataclass(frozen=True)
class Command:
    """A shell command; `for_run` makes the command of a run.

    Attributes:
        text: The command as it is typed.
        argv: Arguments of `domainbed_ext.train`; None if the command is not a run.
        output_dir: Folder of the run; None if the command is not a run.
        threads: CPU threads that it uses.
        minutes: Time limit in minutes; None for none.
    """

    text: str
    argv: Sequence[str] | None = None
    output_dir: str | None = None
    threads: int = 1
    minutes: float | None = None

    @classmethod
    def for_run(
        cls, argv: Sequence[str], output_dir: Path, threads: int = 1, minutes: float | None = None
    ) -> "Command":
        """The command of a run.

        Args:
            argv: Arguments of `domainbed_ext.train`.
            output_dir: Folder of the run, as in `argv`.
            threads: CPU threads of the run, as in `argv`.
            minutes: Time limit of the run in minutes, as in `argv`; None for none.
        """
        text = shlex.join([sys.executable, "-m", "domainbed_ext.train", *argv])
        return cls(text, argv, str(output_dir), threads, minutes)

    @property
    def is_on_cpu(self) -> bool:
        """Whether it is a run that leaves GPUs alone."""
        words = list(self.argv or ())
        return "--device" in words and words[words.index("--device") + 1] == "cpu"

    @property
    def folder(self) -> RunFolder | None:
        """The run's folder; None if the command is not a run."""
        return None if self.output_dir is None else RunFolder(self.output_dir)
