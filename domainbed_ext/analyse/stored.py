"""The results of analyses in the folder of a sweep, `analyses/NAME.json`: tables, plots and page are made of them."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from domainbed_ext.analyse.analysis import Analysis
from domainbed_ext.analyse.registry import ANALYSES
from domainbed_ext.errors import BenchmarkError, not_writable
from domainbed_ext.report.tables.table import Table
from domainbed_ext.system import strict_json
from domainbed_ext.system.commands import format_command
from domainbed_ext.system.files import write_atomically

FOLDER = "analyses"


@dataclass(frozen=True)
class Stored:
    """The results of an analysis.

    Attributes:
        analysis: The analysis.
        finished_runs: How many runs of the sweep were finished when it was made.
        options: Options that it was made with.
        rows: Its rows.
    """

    analysis: Analysis[Any]
    finished_runs: int
    options: Mapping[str, Any]
    rows: Sequence[Any]

    def tables(self) -> list[Table]:
        """Its tables."""
        return self.analysis.tables(self.rows)

    def figure(self) -> Figure | None:
        """Its plot; None if there is nothing to draw."""
        return self.analysis.figure(self.rows)

    def to_json(self) -> str:
        """The content of its file: a line for each row, of seven digits, without what has its default."""
        head = {
            "analysis": self.analysis.name,
            "finished_runs": self.finished_runs,
            "options": dict(self.options),
        }
        rows = ",\n".join(strict_json.dumps(_to_entry(row), ensure_ascii=False) for row in self.rows)
        return f'{strict_json.dumps(head)[:-1]}, "rows": [\n{rows}\n]}}\n'


def _to_entry(row: Any) -> dict[str, Any]:
    entry = {each.name: (_shorten(getattr(row, each.name)), each) for each in fields(row)}
    return {
        name: value
        for name, (value, each) in entry.items()
        if repr(value) != repr(each.default if each.default_factory is MISSING else each.default_factory())
    }


def _shorten(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_shorten, value))
    return float(f"{value:.7g}") if isinstance(value, float) else value


def path_of(input_dir: Path, name: str) -> Path:
    """The path of an analysis's results.

    Args:
        input_dir: Folder of the sweep.
        name: Name of the analysis.
    """
    return input_dir / FOLDER / f"{name}.json"


def write(input_dir: Path, contents: Mapping[str, str | bytes]) -> list[Path]:
    """Writes files into the sweep's folder of analyses.

    Args:
        input_dir: Folder of the sweep.
        contents: Contents by name.

    Returns:
        Paths of the files.

    Raises:
        BenchmarkError: They cannot be written.
    """
    folder = input_dir / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            write_atomically(folder / name, content)
    except OSError as error:
        raise not_writable(folder, error) from error
    return [folder / name for name in contents]


def read_all(input_dir: Path, finished_runs: int) -> list[Stored]:
    """Reads the results of all analyses that were made of a sweep; warns of those that are older than its runs.

    A file that cannot be read is left out with a warning.

    Args:
        input_dir: Folder of the sweep.
        finished_runs: Number of its runs that are finished now.
    """
    found = []
    for name in ANALYSES:
        if not (path := path_of(input_dir, name)).exists():
            continue
        again = f"{format_command('analyse')} {name} --input_dir {input_dir}"
        try:
            stored = read(path)
        except BenchmarkError as error:
            print(f"warning: left out: {error}: run {again}", file=sys.stderr)
            continue
        if stored.finished_runs != finished_runs:
            print(
                f"warning: {path} was made of {stored.finished_runs} finished runs, and now there are {finished_runs}: "
                f"run {again}",
                file=sys.stderr,
            )
        found.append(stored)
    return found


def read(path: Path) -> Stored:
    """Reads the results of an analysis.

    Args:
        path: Path of the file.

    Raises:
        BenchmarkError: It holds no results of a known analysis.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BenchmarkError(f"{path} holds no results of an analysis") from error


def parse(text: str) -> Stored:
    """Reads what `Stored.to_json` wrote."""
    content = json.loads(text)
    analysis = ANALYSES[content["analysis"]]
    return Stored(analysis, content["finished_runs"], content["options"], analysis.parse(content["rows"]))
