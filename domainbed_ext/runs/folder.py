"""The folder of a run: no other code knows its files.

results.jsonl        one JSON record per line, keys sorted; always replaced as a whole
out.txt err.txt      what the run printed, in all its attempts
done                 the run is finished (DomainBed's marker): written last, when everything else is on disk
diverged             the first step with a loss or an output that is not finite, as JSON, if there is one
failed               why it failed, as JSON: error (one sentence), log, exit_code, attempt
attempt_2.json       the process of each attempt (see `attempts`)
checkpoint_*         where it resumes (see `checkpoint`), until it is done
selected/            the trained model at the step that training-domain validation selects
last/                the trained model at the last step, if that is another
start.safetensors    where the head started, if at the linear probe (see `head_start`)
tracked/             what `--track` wrote (see `tracking`), if it was given
strengths.jsonl      accuracies along the strength of the update, evaluated after the run (see `strengths`)
predictions_selected.safetensors   predictions_last.safetensors
                     logits of every evaluated image at the selected step, and at the last if that is another (see
                     `predictions`)
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from typing import Any

from domainbed_ext.errors import BenchmarkError, not_writable
from domainbed_ext.model_selection import STRENGTHS
from domainbed_ext.runs import log as run_log
from domainbed_ext.runs import strengths
from domainbed_ext.system import strict_json
from domainbed_ext.system.attempts import Attempt, Claim, read_latest
from domainbed_ext.system.files import remove, write_atomically

RECORDS, DIVERGED = "results.jsonl", "diverged"
HEAD_START = "start.safetensors"
PREDICTIONS_SELECTED, PREDICTIONS_LAST = "predictions_selected.safetensors", "predictions_last.safetensors"
TRACKED = "tracked"
DERIVED = "derived"
"""Folder of a sweep that holds what was derived from its runs: see `runs.derived`."""

NEEDED = ("dataset", "algorithm", "test_envs", "trial_seed", "hparams_seed")  # arguments that every record has


class State(str, Enum):
    """The state of a run."""

    NOT_LAUNCHED = "not launched"
    QUEUED = "queued"  # waits in a launch (see `launches`); its folder alone does not say so
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    DONE = "done"


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def name(self) -> str:
        """The path below the folder of the sweep: the name under "run" in records that are read."""
        return f"{DERIVED}/{self.path.name}" if self.path.parent.name == DERIVED else self.path.name

    @property
    def state(self) -> State:
        """The state, read from the folder alone."""
        return self.look()[0]

    def look(self, now: float | None = None) -> tuple[State, Attempt | None]:
        """Reads the state, and the last attempt unless the run is done.

        Args:
            now: of `attempts.clock`, for whoever looks at many.
        """
        try:
            names = set(os.listdir(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return State.NOT_LAUNCHED, None
        if "done" in names:
            return State.DONE, None
        attempt = read_latest(self.path, names)
        if attempt and attempt.is_alive(now):
            return State.RUNNING, attempt
        return State.FAILED if "failed" in names else State.INTERRUPTED, attempt

    def claim(self) -> Claim:
        """Makes the folder and claims the next attempt at the run.

        Raises:
            BenchmarkError: The folder cannot be written, or is not that of a run.
            Taken: Another process has the claim.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return Claim(self.path)
        except OSError as error:
            raise not_writable(self.path, error) from error

    def start(self, lines: Sequence[str] | None = None) -> None:
        """Deletes what an earlier attempt left and a run that starts, or resumes, writes again.

        Args:
            lines: Lines of `results.jsonl` at the checkpoint that the run resumes from; None if it starts.

        Raises:
            BenchmarkError: The folder cannot be written, or is not that of a run.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in (
                "done",
                "failed",
                DIVERGED,
                strengths.FILE,
                *(path.name for path in self.path.glob(".*")),
            ):
                remove(self.path / leftover)  # what begins with a dot was being written when an attempt was killed
            if lines is not None:
                self._write_lines(lines)
                return
            _clear_checkpoints(self.path)
            for file in (RECORDS, HEAD_START, PREDICTIONS_SELECTED, PREDICTIONS_LAST):
                remove(self.path / file)
            for folder in (*map(self.path.joinpath, ("selected", "last", TRACKED)), *self.path.glob("step_*")):
                remove(folder)
        except OSError as error:
            raise not_writable(self.path, error) from error

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record to `results.jsonl`; it is on disk when this returns, and never half written."""
        self._write_lines([*self.lines(), strict_json.dumps(record, sort_keys=True)])

    def amend(self, step: int, values: Mapping[str, Any], since: Mapping[str, Any]) -> dict[str, Any]:
        """Adds values to records that are written already; on disk when this returns, as in `append`.

        Args:
            step: Step of a record.
            values: Values that are added to it.
            since: Values that are added to it and to the records of later steps.

        Returns:
            The record of the step.
        """
        records = [json.loads(line) for line in self.lines()]
        records = [record | (dict(since) if record["step"] >= step else {}) for record in records]
        records = [record | (dict(values) if record["step"] == step else {}) for record in records]
        self._write_lines([strict_json.dumps(record, sort_keys=True) for record in records])
        return next(record for record in records if record["step"] == step)

    def lines(self) -> list[str]:
        """The lines of `results.jsonl`."""
        path = self.path / RECORDS
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def _write_lines(self, lines: Sequence[str]) -> None:
        path = self.path / RECORDS
        if lines:
            write_atomically(path, "".join(f"{line}\n" for line in lines))
        else:
            remove(path)

    def records(self) -> list[dict[str, Any]]:
        """The records so far, each with the folder's `name` under "run".

        The record of a step that was evaluated along the strength of the update has these evaluations under
        "strengths".

        Raises:
            BenchmarkError: They cannot be read, or a line is not a JSON record.
        """
        try:
            lines = (self.path / RECORDS).read_bytes().splitlines()
        except OSError as error:
            raise BenchmarkError(f"the records of {self.path / RECORDS} cannot be read ({error.strerror})") from error
        records = []
        shared: dict[str, Any] = {"run": self.name}  # values that all records of a run repeat are kept once
        for number, line in enumerate(lines, 1):
            record = self._record(line, number)
            for name, value in record.items():
                if isinstance(value, (dict, list)) and shared.setdefault(name, value) == value:
                    record[name] = shared[name]
            records.append({**{sys.intern(name): value for name, value in record.items()}, "run": shared["run"]})
        for step, evaluated in strengths.read(self.path).items():
            for record in records:
                if record["step"] == step:
                    record[STRENGTHS] = evaluated
        return records

    def first_record(self) -> dict[str, Any] | None:
        """The first record; None if there is none yet.

        Raises:
            BenchmarkError: It cannot be read, or is not a record.
        """
        try:
            with (self.path / RECORDS).open("rb") as file:
                return self._record(file.readline(), 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BenchmarkError(
                f"cannot read {self.path} ({error.strerror or error}): ask its owner for access"
            ) from error

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            record["step"], [record["args"][name] for name in NEEDED], dict(record.get("hparams") or {})
        except (ValueError, TypeError, KeyError) as error:
            raise BenchmarkError(
                f"{self.path / RECORDS} line {number} is not a record: delete the run's folder and launch the "
                f"sweep again"
            ) from error
        return record

    def finish(self) -> None:
        """Marks the run done; everything else must be on disk by now."""
        write_atomically(self.path / "done", "done")
        _clear_checkpoints(self.path)

    def copy_finished(self, path: Path) -> None:
        """Copies the folder of a finished run, its `done` last: a copy that is cut short counts as interrupted.

        Args:
            path: Folder that does not exist yet.

        Raises:
            BenchmarkError: It cannot be written.
        """
        try:
            shutil.copytree(self.path, path, ignore=shutil.ignore_patterns("done"))
            shutil.copy(self.path / "done", path)
        except OSError as error:
            raise not_writable(path, error) from error

    def fail(self, error: str, exit_code: int = 1) -> None:
        """Marks the run failed.

        Args:
            error: Reason in one sentence.
            exit_code: Exit code of the run; negative for the signal that killed it.
        """
        attempt = read_latest(self.path)
        reason = {
            "error": error,
            "exit_code": exit_code,
            "log": str(self.path / "err.txt"),
            "attempt": attempt.number if attempt else 0,
        }
        with contextlib.suppress(OSError):  # if nothing can be written here, that is why it failed
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "failed", strict_json.dumps(reason, indent=2) + "\n")

    def diverge(self, step: int) -> None:
        """Notes that the run diverged, for readers of many folders."""
        write_atomically(self.path / DIVERGED, strict_json.dumps({"step": step}) + "\n")

    @property
    def diverged(self) -> bool:
        """Whether the run noted that it diverged."""
        return (self.path / DIVERGED).exists()

    def failure(self) -> str:
        """Returns why the run failed, in one sentence."""
        try:
            return str(json.loads((self.path / "failed").read_text(encoding="utf-8"))["error"])
        except (OSError, ValueError, KeyError, TypeError):
            return f"{self.path} does not say why; its log is {self.path / 'err.txt'}"

    def log(self) -> AbstractContextManager[None]:
        """Copies what is printed to `out.txt` and `err.txt`."""
        return run_log.copied(self.path / "out.txt", self.path / "err.txt")


def _clear_checkpoints(path: Path) -> None:
    from domainbed_ext.runs import checkpoint  # loads torch, which takes seconds: readers of records do without

    checkpoint.clear(path)


def load_records(
    input_dir: Path | str, unfinished: bool = False, unreadable: list[str] | None = None
) -> list[dict[str, Any]]:
    """Reads the records of every run directly below a folder, and of those derived from them, in the order of names.

    Args:
        input_dir: Folder of a sweep, ours or upstream DomainBed's.
        unfinished: Whether runs without a `done` file count too. In DomainBed they do, so that half a run can enter its
            tables.
        unreadable: List that gets a sentence about every run whose records cannot be read, which is then left out.

    Returns:
        Records, each with the name of its run's folder under "run".

    Raises:
        BenchmarkError: There is no such folder, no (finished, readable) run in it, or, if `unreadable` is None, a line
            is not a record.
    """
    root = Path(input_dir)
    if not root.is_dir():
        raise BenchmarkError(f"no folder {root}: give --input_dir the --output_dir of a sweep")
    runs = [RunFolder(path.parent) for path in sorted(root.glob(f"*/{RECORDS}"))]
    derived = [RunFolder(path.parent) for path in sorted(root.glob(f"{DERIVED}/*/{RECORDS}"))]
    if not runs and (root / RECORDS).exists():
        raise BenchmarkError(f"{root} is itself a run: give --input_dir the folder that holds it")
    if not runs:
        raise BenchmarkError(f"no run in {root}: launch the sweep first, or give --input_dir its --output_dir")
    wanted = [run for run in runs if unfinished or (run.path / "done").exists()]
    if not wanted:
        raise BenchmarkError(
            f"none of the {len(runs)} runs in {root} is finished: wait; collect_results --unfinished shows them now"
        )
    wanted += [run for run in derived if (run.path / "done").exists()]
    records = []
    for run in wanted:
        try:
            found = run.records()
            if not found and (run.path / "done").exists():
                raise BenchmarkError(
                    f"{run.path / RECORDS} is empty: delete the run's folder and launch the sweep again"
                )
            records += found
        except BenchmarkError as error:
            if unreadable is None:
                raise
            unreadable.append(str(error))
    if not records:
        raise BenchmarkError(f"no run in {root} can be read: {(unreadable or ['they hold no record'])[0]}")
    return records


def load_finished(input_dir: Path | str) -> list[dict[str, Any]]:
    """Reads the records of a sweep's finished runs, and prints warnings of the runs that are left out.

    Args:
        input_dir: Folder of the sweep.

    Raises:
        BenchmarkError: There is no finished run that can be read.
    """
    left_out: list[str] = []
    records = load_records(input_dir, unreadable=left_out)
    runs = [path.parent for path in Path(input_dir).glob(f"*/{RECORDS}")]
    if count := sum(not (run / "done").exists() for run in runs):
        left_out.append(f"{count} of {len(runs)} runs are not finished: run the same command again when they are")
    for sentence in left_out:
        print(f"warning: left out: {sentence}", file=sys.stderr)
    return records
