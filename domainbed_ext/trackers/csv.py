"""A CSV file in the run's folder: a row for each record, a column for each number."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from domainbed_ext.system.files import write_atomically
from domainbed_ext.trackers.base import TrackedRun, Tracker
from domainbed_ext.trackers.registry import register_tracker

FILE = "values.csv"


@register_tracker("csv")
class Csv(Tracker):
    """Writes all rows again at each record, so that the file is always whole."""

    def __init__(self, run: TrackedRun, last_step: int | None) -> None:
        super().__init__(run, last_step)
        self._path = run.folder / FILE
        self._rows = {} if last_step is None else _read(self._path, last_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a row."""
        self._rows[step] = {"step": str(step), **{name: repr(value) for name, value in values.items()}}
        self._write()

    def select(self, step: int, values: Mapping[str, float]) -> None:
        """Adds what was measured since to the row, and 1 to its column `selected`."""
        self.log(step, {**values, "selected": 1})

    def _write(self) -> None:
        columns = dict.fromkeys(name for row in self._rows.values() for name in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows[step] for step in sorted(self._rows))
        write_atomically(self._path, text.getvalue())


def _read(path: Path, last_step: int) -> dict[int, dict[str, str]]:
    """The rows up to a step, by step, without empty cells."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    return {int(row["step"]): row for row in rows if int(row["step"]) <= last_step}
