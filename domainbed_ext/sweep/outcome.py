"""Runs jobs by a launcher, and tells what became of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domainbed_ext.launchers import get_launcher
from domainbed_ext.launchers.execute import describe_exit
from domainbed_ext.launchers.launch import Launch, begin, read_launch
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.sweep.jobs import Job
from domainbed_ext.sweep.launch_progress import LaunchProgress
from domainbed_ext.sweep.states import RunStatus
from domainbed_ext.system.exit_codes import STOPPED, ExitCode
from domainbed_ext.system.progress import bar


@dataclass
class Outcome:
    """What became of a launch.

    Attributes:
        path: Folder of the launch.
        failed: Jobs that failed, each with the reason in one sentence.
        interrupted: Jobs that stopped at a checkpoint.
        elsewhere: Jobs that another process works on.
        waiting: Jobs that are queued in a scheduler.
        stopped: Exit code, if the launch was stopped or cancelled; its jobs are in no list then.
    """

    path: Path
    failed: list[tuple[Job, str]] = field(default_factory=list)
    interrupted: list[Job] = field(default_factory=list)
    elsewhere: list[Job] = field(default_factory=list)
    waiting: list[Job] = field(default_factory=list)
    stopped: int | None = None


def launch_jobs(
    jobs: Sequence[Job],
    launcher: str,
    command: str,
    parallel: int = 0,
    options: Mapping[str, Any] | None = None,
    rest: Sequence[RunStatus] = (),
) -> Outcome:
    """Runs jobs, and marks those that died and left no message as failed.

    Args:
        jobs: Jobs to run; at least one.
        launcher: Name of the launcher.
        command: Command that was typed.
        parallel: Number of runs at once; 0 leaves it to the launcher.
        options: Options of the launcher.
        rest: All other runs of the sweep, whose times tell how long these will take.

    Returns:
        What became of them.
    """
    sweep_dir = jobs[0].sweep_dir
    earlier = {job.name: _failure_stamp(job.folder) for job in jobs}
    tried: dict[str, int] = {}
    codes: Sequence[int | None] = ()
    with bar("sweep", len(jobs), "runs") as shown:
        progress = LaunchProgress(jobs, rest, shown)
        wanted = Launch(sweep_dir, [job.name for job in jobs], parallel, dict(options or {}), progress)
        with begin(sweep_dir, launcher, command, wanted) as begun:
            outcome, tried = Outcome(begun.path), read_launch(begun.path)["tried"]
            try:
                codes = get_launcher(launcher).run([job.command for job in jobs], begun)
            except KeyboardInterrupt:
                outcome.stopped = ExitCode.INTERRUPTED if begun.cancelled else STOPPED
                return outcome
    for job, code in zip(jobs, codes, strict=True):
        _sort(job, code, earlier[job.name], tried.get(job.name, 0), outcome)
    return outcome


def _sort(job: Job, code: int | None, earlier: object, tried: int, outcome: Outcome) -> None:
    """Puts a job where it belongs: by its folder, and by its exit code where the run could not write there itself.

    Args:
        job: Job of the launch.
        code: Its exit code.
        earlier: Stamp of its `failed` before the launch.
        tried: Number of the last attempt at it before the launch.
        outcome: Outcome to which it is added.
    """
    if code is None:
        outcome.waiting.append(job)
        return
    if code == ExitCode.DONE:
        return
    state, attempt = job.folder.look()
    stopped = attempt is not None and attempt.number > tried and attempt.ended == "interrupted"
    if state is State.DONE:
        return
    if state is State.RUNNING:
        outcome.elsewhere.append(job)
    elif state is State.FAILED and _failure_stamp(job.folder) != earlier:
        outcome.failed.append((job, job.folder.failure()))
    elif state is State.INTERRUPTED and stopped:
        outcome.interrupted.append(job)
    elif code == ExitCode.TAKEN:
        outcome.elsewhere.append(job)
    else:
        sentence = describe_exit(code)
        job.folder.fail(sentence, code)
        outcome.failed.append((job, sentence))


def _failure_stamp(folder: RunFolder) -> tuple[int, int] | None:
    """What tells a `failed` from one before it: a run that was killed early leaves the old one in place."""
    try:
        status = (folder.path / "failed").stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
