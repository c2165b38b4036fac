"""The states of a sweep's runs: read from their folders and from launches in progress, never from a scheduler."""

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
from domainbed_ext.sweep.jobs import Job, list_names
from domainbed_ext.system import attempts
from domainbed_ext.system.attempts import Attempt

_NAME = re.compile("[0-9a-f]{32}")  # of a run's folder, here and in DomainBed


class Wait(NamedTuple):
    """A run's place in a launch.

    Attributes:
        launch: Folder of the launch.
        detached: Whether a scheduler starts the run by itself, without a launcher that lives.
        tried: Number of the last attempt before the launch.
    """

    launch: Path
    detached: bool
    tried: int


@dataclass(frozen=True)
class RunStatus:
    """The state and the progress of a run.

    Attributes:
        job: Job whose run it is.
        state: State of the run.
        attempt: The last attempt, unless the run is done; None if there was none.
        wait: Its place in a launch, if it is queued.
    """

    job: Job
    state: State
    attempt: Attempt | None = None
    wait: Wait | None = None

    @property
    def share(self) -> float:
        """The share of the run that is done, in [0, 1]."""
        return 1.0 if self.state is State.DONE else self.attempt.share if self.attempt else 0.0

    @cached_property
    def diverged(self) -> bool:
        """Whether a loss or an output of it was not finite."""
        return self.state is not State.NOT_LAUNCHED and self.job.folder.diverged

    @cached_property
    def seconds(self) -> float | None:
        """Seconds that all attempts at it took so far; None where nobody noted it, as in upstream's runs."""
        attempt = self.attempt or (attempts.read_latest(self.job.folder.path) if self.state is State.DONE else None)
        return attempt.seconds if attempt and attempt.owner else None


def read_statuses(jobs: Sequence[Job], sweep_dir: Path) -> list[RunStatus]:
    """Reads the status of each run of a sweep; see `read_states`."""
    states = read_states([job.name for job in jobs], sweep_dir)
    return [RunStatus(job, *state) for job, state in zip(jobs, states, strict=True)]


def read_states(runs: Sequence[str], sweep_dir: Path) -> list[tuple[State, Attempt | None, Wait | None]]:
    """Reads the states of runs, in a few system calls each.

    Args:
        runs: Names of their folders.
        sweep_dir: Folder that holds these.

    Returns:
        The state of each, the last attempt (unless it is done), and where it waits (if it is queued).

    Raises:
        BenchmarkError: A folder cannot be read.
    """
    names, waits, now = list_names(sweep_dir), _waits(sweep_dir), attempts.read_clock(sweep_dir)
    states = []
    for run in runs:
        folder = RunFolder(sweep_dir / run)
        try:
            state, attempt = folder.look(now) if run in names else (State.NOT_LAUNCHED, None)
        except OSError as error:
            raise BenchmarkError(f"cannot read {folder.path} ({error.strerror}): ask its owner for access") from error
        waiting = [wait for wait in waits.get(run, ()) if _is_waiting(run, state, attempt, wait)]
        # In doubt in a scheduler, which starts it without being asked.
        wait = max(waiting, key=lambda wait: wait.detached, default=None)
        states.append((State.QUEUED if wait else state, attempt, wait))
    return states


def is_missing(status: RunStatus) -> bool:
    """Whether `launch` takes a run: also one that waits in another launcher, for then the two share the work."""
    in_scheduler = status.wait is not None and status.wait.detached
    return status.state not in (State.DONE, State.RUNNING) and not in_scheduler


def is_incomplete(status: RunStatus) -> bool:
    """Whether a run failed or was interrupted, and no process works on it: what DomainBed calls incomplete."""
    return status.state in (State.FAILED, State.INTERRUPTED)


def print_states(jobs: Sequence[Job], sweep_dir: Path) -> list[RunStatus]:
    """Prints how many runs of a sweep are in which state.

    Args:
        jobs: Jobs of the sweep.
        sweep_dir: Folder of the sweep.

    Returns:
        Their statuses.
    """
    statuses = read_statuses(jobs, sweep_dir)
    print(f"{format_runs(len(jobs))} in {sweep_dir}: {describe_states(statuses)}", flush=True)
    return statuses


def format_runs(runs: int) -> str:
    """A number of runs, in words."""
    return f"{runs} run" if runs == 1 else f"{runs} runs"


def describe_states(statuses: Iterable[RunStatus]) -> str:
    """How many runs are in which state, in words."""
    counts = Counter(status.state for status in statuses)
    return ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])


def mixed_runs_warning(jobs: Sequence[Job], sweep_dir: Path) -> str | None:
    """Why a sweep's tables hold runs of another sweep.

    Args:
        jobs: Jobs of the sweep.
        sweep_dir: Folder of the sweep.

    Returns:
        A sentence; None if its folder holds runs of these jobs only.
    """
    own_names = {job.name for job in jobs}
    count = sum(_NAME.fullmatch(name) is not None for name in list_names(sweep_dir) - own_names)
    if not count:
        return None
    return (
        f"{sweep_dir} also holds {format_runs(count)} of other arguments, and its tables mix them with these: give "
        "each sweep its own --output_dir"
    )


def _waits(sweep_dir: Path) -> dict[str, list[Wait]]:
    """The launches in progress that each run is listed in."""
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
