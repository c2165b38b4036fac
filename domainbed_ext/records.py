"""A run's folder: the only code that knows what lies in it.

results.jsonl    one JSON record a line, keys sorted
out.txt err.txt  what the run printed
done             the run is whole (DomainBed's marker)
failed           why it is not, as JSON: error (one sentence), log, exit_code
selected/        what was trained, at the step that training-domain validation selects
last/            the same at the last step, where that is another
"""

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

from domainbed_ext.errors import BenchmarkError


class State(str, Enum):
    """How far a run is."""

    NOT_LAUNCHED = "not launched"
    INCOMPLETE = "incomplete"
    FAILED = "failed"
    DONE = "done"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is there whole or not at all, also after a power cut.

    Args:
        path: the file.
        content: of the file; text is written as UTF-8.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def state(self) -> State:
        """Read from the folder alone."""
        if (self.path / "done").exists():
            return State.DONE
        if (self.path / "failed").exists():
            return State.FAILED
        return State.INCOMPLETE if self.path.exists() else State.NOT_LAUNCHED

    def start(self) -> None:
        """Makes the folder, empty of what an earlier attempt left.

        Raises:
            BenchmarkError: the place is not writable, or holds something that is not a run.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in ("done", "failed", "results.jsonl", "out.txt", "err.txt"):
                (self.path / name).unlink(missing_ok=True)
            for folder in (self.path / "selected", self.path / "last", *self.path.glob("step_*")):
                if folder.is_dir():
                    shutil.rmtree(folder)
            (self.path / "out.txt").touch()
        except OSError as error:
            raise not_writable(self.path, error) from error

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record to `results.jsonl`, on disk before it returns."""
        with (self.path / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """The records so far, each with the folder's name under "run".

        Raises:
            BenchmarkError: a line is not a JSON record.
        """
        path = self.path / "results.jsonl"
        records = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                record["args"]["test_envs"], record["step"]
            except (json.JSONDecodeError, TypeError, KeyError) as error:
                raise BenchmarkError(
                    f"{path} line {number} is not a record: delete the run's folder and launch the sweep again"
                ) from error
            records.append({**record, "run": self.path.name})
        return records

    def finish(self) -> None:
        """Marks the run done; everything else of it must be on disk by now."""
        write_atomically(self.path / "done", "done")

    def fail(self, error: str, exit_code: int = 1) -> None:
        """Marks the run failed.

        Args:
            error: why, in one sentence.
            exit_code: of the run; negative for the signal that killed it.
        """
        reason = {"error": error, "exit_code": exit_code, "log": str(self.path / "err.txt")}
        with contextlib.suppress(OSError):  # if nothing can be written here, that is why it failed
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "failed", json.dumps(reason, indent=2) + "\n")

    def failure(self) -> str:
        """Why the run failed, in one sentence."""
        try:
            return str(json.loads((self.path / "failed").read_text(encoding="utf-8"))["error"])
        except OSError:
            return f"cannot write to {self.path}"

    @contextlib.contextmanager
    def log(self) -> Iterator[None]:
        """Sends what is printed to `out.txt` and `err.txt` as well."""
        with (
            (self.path / "out.txt").open("a", encoding="utf-8") as out,
            (self.path / "err.txt").open("a", encoding="utf-8") as err,
            contextlib.redirect_stdout(_Tee(sys.stdout, out)),
            contextlib.redirect_stderr(_Tee(sys.stderr, err)),
        ):
            yield


class _Tee(io.TextIOBase):
    """Writes to two streams; a terminal stays one for whoever asks."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        self.stream.write(text)
        self.file.write(text)
        self.file.flush()
        return len(text)

    def flush(self) -> None:
        self.stream.flush()
        self.file.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()


def not_writable(path: Path, error: OSError) -> BenchmarkError:
    """The error for a place that cannot be written."""
    return BenchmarkError(f"cannot write to {path} ({error.strerror or error}): give another --output_dir")


def load_records(input_dir: Path | str, unfinished: bool = False) -> list[dict[str, Any]]:
    """The records of every run directly below a folder, in the order of the runs' names.

    Args:
        input_dir: a sweep's folder, ours or upstream DomainBed's.
        unfinished: take runs without a `done` file too. DomainBed always does, so that half a run can enter
            its tables.

    Returns:
        The records, each with its run's folder name under "run".

    Raises:
        BenchmarkError: no such folder, no (finished) run in it, or a line that is not a record.
    """
    root = Path(input_dir)
    if not root.is_dir():
        raise BenchmarkError(f"no folder {root}: give --input_dir the --output_dir of a sweep")
    runs = [RunFolder(path.parent) for path in sorted(root.glob("*/results.jsonl"))]
    if not runs:
        raise BenchmarkError(f"no run in {root}: launch the sweep first, or give --input_dir its --output_dir")
    wanted = [run for run in runs if unfinished or run.state is State.DONE]
    if not wanted:
        raise BenchmarkError(f"none of the {len(runs)} runs in {root} is finished: wait, or add --unfinished")
    return [record for run in wanted for record in run.records()]
