"""`sweep delete_incomplete`: deletes the folders of runs that failed or were interrupted."""

import os
import shutil
from collections.abc import Sequence

from domainbed_ext.errors import not_writable
from domainbed_ext.runs.folder import State
from domainbed_ext.sweep.arguments import SweepArguments
from domainbed_ext.sweep.jobs import Job, make_jobs
from domainbed_ext.sweep.states import format_runs, is_incomplete, print_states
from domainbed_ext.system.attempts import Taken
from domainbed_ext.system.console import confirm
from domainbed_ext.system.threads import map_in_threads

_TRASH = ".deleted."  # how names begin of folders that are being deleted
_AT_ONCE = 64  # of which most wait for a sign of life of an owner on another machine


def run(args: SweepArguments) -> int:
    """The sub-command.

    Args:
        args: Arguments of the sweep.

    Returns:
        The exit code.

    Raises:
        BenchmarkError: A folder cannot be written to.
    """
    jobs = [status.job for status in print_states(make_jobs(args), args.output_dir) if is_incomplete(status)]
    if args.dry_run or not jobs:
        for job in jobs:
            print(f"would delete {job.folder.path}")
        return 0
    question = f"Delete {format_runs(len(jobs))} that failed or were interrupted?"
    if args.skip_confirmation or confirm(question):
        deleted = delete(jobs)
        spared = len(jobs) - deleted
        rest = f"; {format_runs(spared)} resumed or finished in the meantime" if spared else ""
        print(f"Deleted {format_runs(deleted)}{rest}.")
    return 0


def delete(jobs: Sequence[Job]) -> int:
    """Deletes the folders of runs, except those that a process works on or that have finished by now.

    Args:
        jobs: Jobs of the runs.

    Returns:
        How many were deleted.

    Raises:
        BenchmarkError: A folder cannot be written to.
    """
    for sweep_dir in {job.sweep_dir for job in jobs}:  # what was left when such a deletion was killed
        for trash in sweep_dir.glob(f"{_TRASH}*"):
            shutil.rmtree(trash, ignore_errors=True)
    return sum(map_in_threads(_delete, jobs, _AT_ONCE))


def _delete(job: Job) -> bool:
    folder = job.folder
    try:
        claim = folder.claim()
    except Taken:
        return False
    if folder.state is State.DONE:  # its `done` came since its state was read
        with claim:
            claim.ended = "done"
        return False
    # Gone in one step, the claim with it, so that whoever starts the run again starts it in a new folder.
    trash = folder.path.with_name(f"{_TRASH}{job.name}.{os.getpid()}")
    try:
        folder.path.rename(trash)
    except OSError as error:
        raise not_writable(folder.path, error) from error
    shutil.rmtree(trash, ignore_errors=True)  # another deletion may be at it too
    return True
