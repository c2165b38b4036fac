"""The base class of all trackers.

A tracker of your own is a class in a file of yours, which `--import` brings in:

    @register_tracker("print")
    class Print(Tracker):
        def log(self, step, values):
            print(step, values["loss"])

`--track print` uses it.
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from domainbed_ext.errors import BenchmarkError

PROJECT = "domainbed_ext"
"""Name of the project where a tracker needs one and the environment gives none."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        id: Random word that a run keeps when it resumes, and not when it starts again.
        name: Name that people read, e.g. "PACS_BOnly_test-S_trial0_hparams0".
        group: Name of the folder that the run's folder is in: that of the sweep.
        folder: Folder for files of trackers, in the run's folder. It is deleted when a run starts again.
        config: Arguments that change numbers, final hyperparameters, and versions: plain values in dicts and lists.
    """

    id: str
    name: str
    group: str
    folder: Path
    config: Mapping[str, Any]


class Tracker(ABC):
    """Receives the numbers of a run's records. If any of its methods fails, the run continues without it.

    Args:
        run: Run that is tracked.
        last_step: Step of the last record that it received in earlier attempts at this run; None if there is none.
            What it has of later steps, it received as an earlier attempt was killed, and receives again.

    Attributes:
        PACKAGE: Name of the package that it needs, which is also that of the extra; None if it needs none.
    """

    PACKAGE: ClassVar[str | None] = None

    def __init__(self, run: TrackedRun, last_step: int | None) -> None:
        self.run = run

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Receives a record. Steps ascend, and none comes twice, whether the run resumes or not.

        Args:
            step: Step of the record.
            values: Numbers by name, see `trackers.values`.
        """

    def select(self, step: int, values: Mapping[str, float]) -> None:  # noqa: B027  (optional)
        """Receives, when the run is done, the record that training-domain validation selects.

        Args:
            step: Step of the record.
            values: Numbers by name; more than `log` received, if some accuracies were measured only now.
        """

    def close(self, is_done: bool) -> None:  # noqa: B027
        """Is called when the attempt ends.

        Args:
            is_done: Whether the run is done; else it failed or was interrupted, and may resume.
        """

    @classmethod
    def check(cls, name: str) -> None:
        """Checks that its package is installed.

        Args:
            name: Name of the tracker.

        Raises:
            BenchmarkError: It is not.
        """
        if cls.PACKAGE is not None and importlib.util.find_spec(cls.PACKAGE) is None:
            raise BenchmarkError(
                f"--track {name} needs the package {cls.PACKAGE}: pip install 'vitlorafa[{cls.PACKAGE}]'"
            )
