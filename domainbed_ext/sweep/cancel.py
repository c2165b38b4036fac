"""Ends what is under way in a sweep, and deletes what came of it where that is of no use."""

import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from domainbed_ext.errors import BenchmarkError, not_writable
from domainbed_ext.launchers import cancel_in_engine
from domainbed_ext.launchers.launch import list_under_way, read_launch
from domainbed_ext.runs.folder import State
from domainbed_ext.sweep.jobs import Job
from domainbed_ext.sweep.states import count_of, look_at
from domainbed_ext.system.attempts import Taken
from domainbed_ext.system.exit_codes import ExitCode

_GRAVE = ".deleted."  # how names begin of folders that are being deleted
_AT_ONCE = 64  # of which most wait for a sign of life of an owner on another machine


def delete(jobs: Sequence[Job]) -> int:
    """Deletes the folders of runs, but for those that somebody is at or has finished by now.

    Args:
        jobs: whose runs they are.

    Returns:
        How many were deleted.

    Raises:
        BenchmarkError: a folder cannot be written to.
    """
    for sweep_dir in {job.sweep_dir for job in jobs}:  # what was left when such a deletion was killed
        for grave in sweep_dir.glob(f"{_GRAVE}*"):
            shutil.rmtree(grave, ignore_errors=True)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return sum(pool.map(_delete, jobs))


def _delete(job: Job) -> bool:
    folder = job.folder
    try:
        claim = folder.claim()
    except Taken:
        return False
    if folder.state is State.DONE:  # its `done` came since we looked
        with claim:
            claim.ended = "done"
        return False
    # Gone in one step, the claim with it, so that whoever starts the run anew starts it in a place of its own.
    grave = folder.path.with_name(f"{_GRAVE}{job.name}.{os.getpid()}")
    try:
        folder.path.rename(grave)
    except OSError as error:
        raise not_writable(folder.path, error) from error
    shutil.rmtree(grave, ignore_errors=True)  # another deletion may be at it too
    return True


def cancel(sweep_dir: Path, dry_run: bool = False) -> int:
    """Asks every launch under way in a sweep to end, and says so.

    Args:
        sweep_dir: the sweep's folder.
        dry_run: only say what would be asked.

    Returns:
        The exit code.

    Raises:
        BenchmarkError: the folder cannot be written to.
    """
    code, found = ExitCode.DONE, False
    for path in list_under_way(sweep_dir):
        content = read_launch(path)
        launcher, detached = content.get("launcher", "?"), bool(content.get("detached"))
        waiting, running = _left(path, content.get("runs", ()), sweep_dir)
        if detached and not (waiting or running):  # an engine does not say when it is through
            continue
        found = True
        what = f"launch {path.name} ({launcher}; {count_of(waiting)} waiting, {running} at work)"
        if dry_run:
            print(f"would cancel {what}")
            continue
        try:
            (path / "cancel").touch()
        except OSError as error:
            raise not_writable(path, error) from error
        try:
            print(f"cancelled {what}: {_end(path, launcher, detached)}")
        except BenchmarkError as error:  # there may be others
            print(f"error: {what}: {error}", file=sys.stderr)
            code = ExitCode.BAD_INPUT
    if not found:
        print(f"nothing is under way in {sweep_dir}")
    return code


def _left(path: Path, runs: Sequence[str], sweep_dir: Path) -> tuple[int, int]:
    """How many runs of a launch wait in it, and how many are at work."""
    seen = look_at(runs, sweep_dir)
    waiting = sum(wait is not None and wait.launch == path for _, _, wait in seen)
    return waiting, sum(state is State.RUNNING for state, _, _ in seen)


def _end(path: Path, launcher: str, detached: bool) -> str:
    """Has a launch's engine end it, if it has one; says what comes of it."""
    return cancel_in_engine(launcher, path) if detached else "its runs stop where they can resume"
