"""How long what is left of a sweep takes, from what its runs took so far."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from domainbed_ext.records import State
from domainbed_ext.states import Standing

Kind = tuple[str, str]
"""Data set and algorithm: runs of one kind take about as long."""

_TELLING = 0.05  # the share of a run from which on its own time says how long the whole takes


@dataclass(frozen=True)
class Left:
    """What is left of a sweep.

    Attributes:
        count: number of runs that are not whole.
        work: seconds that they take one after another, of those of which that can be told.
        untold: the kinds of which nothing is known.
        running: number of runs at this moment.
        seconds: until the end, at as many at once as there are now; None where nothing says.
    """

    count: int
    work: float
    untold: list[Kind]
    running: int
    seconds: float | None

    def __str__(self) -> str:
        if not self.count:
            return "nothing left"
        if not self.work:
            return "time left: unknown, for no run has gone far enough"
        least = "at least " if self.untold else ""
        unknown = ", ".join(f"{algorithm} on {dataset}" for dataset, algorithm in self.untold)
        unknown = f"; nothing is known yet of {unknown}" if unknown else ""
        if self.seconds is None:
            return (
                f"time left: unknown, for nothing is running; {self.count} runs take {least}{duration(self.work)} one "
                f"after another{unknown}"
            )
        return f"time left: {least}{duration(self.seconds)} at {self.running} at once{unknown}"


def left(standings: Sequence[Standing]) -> Left:
    """What is left: of the launches under way, or else of all but what failed."""
    under_way = [standing for standing in standings if standing.state in (State.RUNNING, State.QUEUED)]
    others = (State.DONE, State.FAILED)
    missing = under_way or [standing for standing in standings if standing.state not in others]
    whole = seconds_a_run(standings)
    untold = dict.fromkeys(standing.job.kind for standing in missing if standing.job.kind not in whole)
    rest = [(1 - standing.share) * whole.get(standing.job.kind, 0.0) for standing in missing]
    work, running = sum(rest), sum(standing.state is State.RUNNING for standing in missing)
    # The last run takes its time, however many there could be at once.
    seconds = max(work / running, *rest) if running and work else None
    return Left(len(missing), work, list(untold), running, seconds)


def seconds_a_run(standings: Sequence[Standing]) -> dict[Kind, float]:
    """The mean of each kind, from whole runs and from those that are far enough."""
    taken = defaultdict(list)
    for standing in standings:
        if (standing.state is State.DONE or standing.share >= _TELLING) and standing.seconds:
            taken[standing.job.kind].append(standing.seconds / standing.share)
    return {kind: fmean(seconds) for kind, seconds in taken.items()}


def duration(seconds: float) -> str:
    """In words, to two figures or so: "40 s", "7 min", "2 h 05 min", "3 d 4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
