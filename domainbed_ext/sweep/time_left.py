"""How long what is left of a sweep takes, from what its runs took so far."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from domainbed_ext.runs.folder import State
from domainbed_ext.sweep.states import Standing
from domainbed_ext.system.progress import duration

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


def left(standings: Sequence[Standing], at_once: int = 0, guess: bool = False) -> Left:
    """What is left: of the launches under way, or else of all but what failed.

    Args:
        standings: of the runs.
        at_once: how many run at once, if that is known; those that run at this moment may be fewer.
        guess: Whether kinds of which nothing is known are taken to be as long as the others are.
    """
    under_way = [standing for standing in standings if standing.state in (State.RUNNING, State.QUEUED)]
    others = (State.DONE, State.FAILED)
    missing = under_way or [standing for standing in standings if standing.state not in others]
    whole = seconds_a_run(standings)
    untold = dict.fromkeys(standing.job.kind for standing in missing if standing.job.kind not in whole)
    usual = fmean(whole.values()) if guess and whole else 0.0
    rest = [_rest(standing, whole, usual) for standing in missing]
    work, running = sum(rest), sum(standing.state is State.RUNNING for standing in missing)
    running = max(running, min(at_once, len(missing)))
    # The last run takes its time, however many there could be at once.
    seconds = max(work / running, *rest) if running and work else None
    return Left(len(missing), work, list(untold), running, seconds)


def _rest(standing: Standing, whole: Mapping[Kind, float], usual: float) -> float:
    """Seconds that the rest of a run takes; a whole run takes `usual` seconds where nothing tells."""
    if standing.attempt and standing.attempt.left is not None:
        return standing.attempt.left
    return (1 - standing.share) * whole.get(standing.job.kind, usual)


def seconds_a_run(standings: Sequence[Standing]) -> dict[Kind, float]:
    """The mean of each kind, from whole runs and from those that are far enough."""
    taken = defaultdict(list)
    for standing in standings:
        if not standing.seconds:
            continue
        if standing.attempt and standing.attempt.left is not None:  # the run itself knows better than its share does
            taken[standing.job.kind].append(standing.seconds + standing.attempt.left)
        elif standing.state is State.DONE or standing.share >= _TELLING:
            taken[standing.job.kind].append(standing.seconds / standing.share)
    return {kind: fmean(seconds) for kind, seconds in taken.items()}
