"""The progress of a launch: a bar on a terminal, and a line for each run that has ended."""

import time
from collections.abc import Sequence

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.folder import State
from domainbed_ext.runs.formatting import format_result
from domainbed_ext.sweep.jobs import Job
from domainbed_ext.sweep.states import RunStatus, format_runs, read_statuses
from domainbed_ext.sweep.time_left import estimate_time_left
from domainbed_ext.system.progress import Bar, format_duration

REFRESH = 3.0  # seconds at least from one reading of all runs to the next
SHARE = 20  # at most 1/SHARE of the time is spent on reading them


class LaunchProgress:
    """Shows the progress of each run, as the launcher reports it.

    Args:
        jobs: Jobs of the launch.
        rest: All other runs of the sweep, whose times tell how long these will take.
        bar: Bar of the launch.
    """

    def __init__(self, jobs: Sequence[Job], rest: Sequence[RunStatus], bar: Bar) -> None:
        self.jobs, self.rest, self.bar = jobs, rest, bar
        self._shares = [0.0] * len(jobs)
        self._ended = 0
        self._left = ""
        self._at_once = 0
        self._next_reading = 0.0

    def __call__(self, index: int, share: float) -> None:
        """Notes the progress of a run.

        Args:
            index: Number of its job.
            share: Share of it that is done; 1.0 when it ended, also if it failed.
        """
        self._shares[index] = share
        self._estimate()
        done = sum(self._shares)
        if self.bar.seconds_left is None:  # set-up and first evaluations tell nothing of the rate
            self.bar.start_from(done)
        else:
            self.bar.reach(done)
        if share >= 1.0:
            self._ended += 1
            rest = f"; {self._left}" if self._left and self._ended < len(self.jobs) else ""
            print(
                f"{self._ended} of {format_runs(len(self.jobs))}: {describe_end(self.jobs[index])}{rest}",
                flush=True,
            )

    def _estimate(self) -> None:
        """Estimates the time left from the runs' folders, seldom enough to cost nothing."""
        now = time.monotonic()
        if now < self._next_reading:
            return
        statuses = read_statuses(self.jobs, self.jobs[0].sweep_dir)
        # A run that ended a moment ago has no successor yet.
        self._at_once = max(self._at_once, sum(status.state is State.RUNNING for status in statuses))
        left = estimate_time_left([*self.rest, *statuses], self._at_once, guess=True)
        self.bar.seconds_left = left.seconds
        self._left = ""
        if left.seconds:
            self._left = f"{'about ' if left.unknown else ''}{format_duration(left.seconds)} left"
        self._next_reading = time.monotonic() + max(REFRESH, SHARE * (time.monotonic() - now))


def describe_end(job: Job) -> str:
    """How a run ended, in words: its result, or why there is none.

    Args:
        job: Job of the run.
    """
    folder = job.folder
    state, _ = folder.look()
    seconds = RunStatus(job, state).seconds
    took = f" in {format_duration(seconds)}" if seconds else ""
    if state is State.DONE:
        try:
            return f"{job}: done{took}, {format_result(folder.records())}"
        except (BenchmarkError, OSError) as error:
            return f"{job}: done{took}, but its records cannot be read ({error})"
    if state is State.FAILED:
        return f"{job}: failed: {folder.failure()} (log: {folder.path / 'err.txt'})"
    return f"{job}: {state.value}"
