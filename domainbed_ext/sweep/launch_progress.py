"""How far a launch is, for whoever watches: a bar on a terminal, and a line for each run that has ended."""

import time
from collections.abc import Sequence

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.folder import State
from domainbed_ext.runs.messages import result
from domainbed_ext.sweep.jobs import Job
from domainbed_ext.sweep.states import Standing, count_of, look
from domainbed_ext.sweep.time_left import left
from domainbed_ext.system.progress import Bar, duration

REFRESH = 3.0  # seconds at least from one look at all runs to the next
SHARE = 20  # of the time between two looks at most 1/SHARE is spent on them


class LaunchProgress:
    """Told by a launcher how far each run is; shows it.

    Args:
        jobs: Those of the launch.
        others: All others of the sweep, whose times tell how long these will take.
        bar: Where it is shown.
    """

    def __init__(self, jobs: Sequence[Job], others: Sequence[Standing], bar: Bar) -> None:
        self.jobs, self.others, self.bar = jobs, others, bar
        self._shares = [0.0] * len(jobs)
        self._ended = 0
        self._left = ""
        self._at_once = 0
        self._next_look = 0.0

    def __call__(self, index: int, share: float) -> None:
        """Takes note of how far a run is.

        Args:
            index: Number of its job.
            share: Share of it that is done; 1.0 when it ended, well or not.
        """
        self._shares[index] = share
        self._look()
        done = sum(self._shares)
        if self.bar.seconds_left is None:  # set-up and first evaluations tell no more of the rate than of the time left
            self.bar.start_from(done)
        else:
            self.bar.reach(done)
        if share >= 1.0:
            self._ended += 1
            rest = f"; {self._left}" if self._left and self._ended < len(self.jobs) else ""
            print(f"{self._ended} of {count_of(len(self.jobs))}: {ending(self.jobs[index])}{rest}", flush=True)

    def _look(self) -> None:
        """Estimates the time left from the runs' folders, seldom enough to cost nothing."""
        now = time.monotonic()
        if now < self._next_look:
            return
        seen = look(self.jobs, self.jobs[0].sweep_dir)
        # A run that ended a moment ago has no successor yet.
        self._at_once = max(self._at_once, sum(standing.state is State.RUNNING for standing in seen))
        rest = left([*self.others, *seen], self._at_once, guess=True)
        self.bar.seconds_left = rest.seconds
        self._left = ""
        if rest.seconds:
            self._left = f"{'about ' if rest.untold else ''}{duration(rest.seconds)} left"
        self._next_look = time.monotonic() + max(REFRESH, SHARE * (time.monotonic() - now))


def ending(job: Job) -> str:
    """How a run ended, in words: its result, or why there is none.

    Args:
        job: Whose run it is.
    """
    folder = job.folder
    state, _ = folder.look()
    seconds = Standing(job, state).seconds
    took = f" in {duration(seconds)}" if seconds else ""
    if state is State.DONE:
        try:
            return f"{job}: done{took}, {result(folder.records())}"
        except (BenchmarkError, OSError) as error:
            return f"{job}: done{took}, but its records cannot be read ({error})"
    if state is State.FAILED:
        return f"{job}: failed: {folder.failure()} (log: {folder.path / 'err.txt'})"
    return f"{job}: {state.value}"
