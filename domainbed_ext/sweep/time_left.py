"""The time that is left of a sweep, estimated from what its runs took so far."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from domainbed_ext.runs.folder import State
from domainbed_ext.sweep.states import RunStatus, format_runs
from domainbed_ext.system.progress import format_duration

Kind = tuple[str, str]
"""Data set and algorithm: runs of one kind take about as long."""

_ENOUGH = 0.05  # share of a run that is enough to tell how long the whole takes


@dataclass(frozen=True)
class TimeLeft:
    """What is left of a sweep.

    Attributes:
        count: Number of runs that are not done.
        work: Seconds that they take one after another, as far as that is known.
        unknown: Kinds of runs whose duration is unknown.
        running: Number of runs at this moment.
        seconds: Seconds until the end, with as many runs at once as now; None if that is unknown.
    """

    count: int
    work: float
    unknown: list[Kind]
    running: int
    seconds: float | None

    def __str__(self) -> str:
        if not self.count:
            return "nothing left"
        if not self.work:
            return "time left: unknown, since no run has progressed far enough"
        least = "at least " if self.unknown else ""
        kinds = ", ".join(f"{algorithm} on {dataset}" for dataset, algorithm in self.unknown)
        without = f", not counting {kinds}" if self.unknown else ""
        if self.seconds is None:
            return (
                f"time left: unknown, since nothing is running; {format_runs(self.count)} would take {least}"
                f"{format_duration(self.work)} one after another{without}"
            )
        return f"time left: {least}{format_duration(self.seconds)} with {format_runs(self.running)} at once{without}"


def estimate_time_left(statuses: Sequence[RunStatus], at_once: int = 0, guess: bool = False) -> TimeLeft:
    """Estimates what is left of the launches in progress or, if there are none, of all runs that have not failed.

    Args:
        statuses: Statuses of the runs.
        at_once: Number of runs at once, if it is known; fewer may run at this moment.
        guess: Whether kinds of unknown duration are assumed to take as long as the others.
    """
    under_way = [status for status in statuses if status.state in (State.RUNNING, State.QUEUED)]
    missing = under_way or [status for status in statuses if status.state not in (State.DONE, State.FAILED)]
    whole = seconds_per_run(statuses)
    unknown = dict.fromkeys(status.job.kind for status in missing if status.job.kind not in whole)
    usual = fmean(whole.values()) if guess and whole else 0.0
    seconds_left = [_seconds_left(status, whole, usual) for status in missing]
    work, running = sum(seconds_left), sum(status.state is State.RUNNING for status in missing)
    running = max(running, min(at_once, len(missing)))
    # The last run takes its time, however many there could be at once.
    seconds = max(work / running, *seconds_left) if running and work else None
    return TimeLeft(len(missing), work, list(unknown), running, seconds)


def _seconds_left(status: RunStatus, whole: Mapping[Kind, float], usual: float) -> float:
    """Seconds that the rest of a run takes; a whole run of an unknown kind takes `usual` seconds."""
    if status.attempt and status.attempt.left is not None:
        return status.attempt.left
    return (1 - status.share) * whole.get(status.job.kind, usual)


def seconds_per_run(statuses: Sequence[RunStatus]) -> dict[Kind, float]:
    """The mean of each kind, from done runs and from those that have progressed far enough."""
    taken = defaultdict(list)
    for status in statuses:
        if not status.seconds:
            continue
        if status.attempt and status.attempt.left is not None:  # the run itself knows best
            taken[status.job.kind].append(status.seconds + status.attempt.left)
        elif status.state is State.DONE or status.share >= _ENOUGH:
            taken[status.job.kind].append(status.seconds / status.share)
    return {kind: fmean(seconds) for kind, seconds in taken.items()}
