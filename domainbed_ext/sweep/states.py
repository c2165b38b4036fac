"""How far the runs of a sweep are: read from their folders and from the launches under way, never from an engine."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers.launch import list_under_way, read_launch
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.sweep.jobs import Job, names_in
from domainbed_ext.system import attempts
from domainbed_ext.system.attempts import Attempt

_NAME = re.compile("[0-9a-f]{32}")  # of a run's folder, by us or DomainBed

INCOMPLETE = (State.FAILED, State.INTERRUPTED)  # what DomainBed calls so, of runs that nobody is at


class Wait(NamedTuple):
    """A run's place in a launch.

    Attributes:
        launch: folder of the launch.
        detached: whether an engine starts the run by itself, or a launcher that lives.
        tried: number of the last attempt before the launch.
    """

    launch: Path
    detached: bool
    tried: int


@dataclass(frozen=True)
class Standing:
    """How far a run is.

    Attributes:
        job: whose run it is.
        state: of it.
        attempt: the last, unless the run is done; None if there was none.
        waits: where, if it is queued.
    """

    job: Job
    state: State
    attempt: Attempt | None = None
    waits: Wait | None = None

    @property
    def share(self) -> float:
        """Of the run that is done, in [0, 1]."""
        return 1.0 if self.state is State.DONE else self.attempt.share if self.attempt else 0.0

    @cached_property
    def diverged(self) -> bool:
        """Whether a loss or an output of it was not finite."""
        return self.state is not State.NOT_LAUNCHED and self.job.folder.diverged

    @cached_property
    def seconds(self) -> float | None:
        """That all attempts at it took so far; None where nobody noted it, as in upstream's runs."""
        attempt = self.attempt or (attempts.latest(self.job.folder.path) if self.state is State.DONE else None)
        return attempt.seconds if attempt and attempt.owner else None


def look(jobs: Sequence[Job], sweep_dir: Path) -> list[Standing]:
    """How far each run of a sweep is; see `look_at`."""
    seen = look_at([job.name for job in jobs], sweep_dir)
    return [Standing(job, *sight) for job, sight in zip(jobs, seen, strict=True)]


def look_at(runs: Sequence[str], sweep_dir: Path) -> list[tuple[State, Attempt | None, Wait | None]]:
    """How far runs are, in a few system calls each.

    Args:
        runs: names of their folders.
        sweep_dir: where these are.

    Returns:
        The state of each, the last attempt (unless it is done), and where it waits (if it is queued).

    Raises:
        BenchmarkError: a folder cannot be read.
    """
    names, waits, now = names_in(sweep_dir), _waits(sweep_dir), attempts.clock(sweep_dir)
    seen = []
    for run in runs:
        folder = RunFolder(sweep_dir / run)
        try:
            state, attempt = folder.look(now) if run in names else (State.NOT_LAUNCHED, None)
        except OSError as error:
            raise BenchmarkError(f"cannot read {folder.path} ({error.strerror}): have its owner let you") from error
        waiting = [wait for wait in waits.get(run, ()) if _is_waiting(run, state, attempt, wait)]
        # In doubt in an engine, which starts it without being asked.
        wait = max(waiting, key=lambda wait: wait.detached, default=None)
        seen.append((State.QUEUED if wait else state, attempt, wait))
    return seen


def count_of(runs: int) -> str:
    """A number of runs, in words."""
    return f"{runs} run" if runs == 1 else f"{runs} runs"


def summary(standings: Iterable[Standing]) -> str:
    """How many runs are in which state, in words."""
    counts = Counter(standing.state for standing in standings)
    return ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])


def others(jobs: Sequence[Job], sweep_dir: Path) -> int:
    """How many runs lie in a sweep's folder that are not of its jobs."""
    known = {job.name for job in jobs}
    return sum(_NAME.fullmatch(name) is not None for name in names_in(sweep_dir) - known)


def _waits(sweep_dir: Path) -> dict[str, list[Wait]]:
    """The launches under way that each run is listed in."""
    waits = defaultdict(list)
    for path in list_under_way(sweep_dir):
        content = read_launch(path)
        for name in content.get("runs", ()):
            waits[name].append(Wait(path, bool(content.get("detached")), content.get("tried", {}).get(name, 0)))
    return waits


def _is_waiting(name: str, state: State, attempt: Attempt | None, wait: Wait) -> bool:
    """Whether a launch is yet to come to a run, or will come back to it. Attempts are counted, for clocks differ."""
    if state in (State.DONE, State.RUNNING):
        return False
    if attempt is None:
        return state is not State.FAILED  # refused before it was tried
    if attempt.number <= wait.tried:
        return True
    return state is State.INTERRUPTED and (wait.launch / "requeued" / name).exists()
