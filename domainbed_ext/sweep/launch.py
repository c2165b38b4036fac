"""Runs jobs by a launcher, and says what became of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domainbed_ext.launchers import get_launcher
from domainbed_ext.launchers.execute import describe_exit
from domainbed_ext.launchers.launch import Launch, begin, read_launch
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.sweep.jobs import Job
from domainbed_ext.sweep.launch_progress import LaunchProgress
from domainbed_ext.sweep.states import Standing
from domainbed_ext.system.exit_codes import STOPPED, ExitCode
from domainbed_ext.system.progress import bar


@dataclass
class Outcome:
    """What became of a launch.

    Attributes:
        path: of the launch.
        failed: the jobs that did, each with the reason in one sentence.
        interrupted: those that stopped where they can go on.
        elsewhere: those that another process is at.
        waiting: those that wait in an engine.
        stopped: the exit code, if the launch was stopped or cancelled; of its jobs nothing is said then.
    """

    path: Path
    failed: list[tuple[Job, str]] = field(default_factory=list)
    interrupted: list[Job] = field(default_factory=list)
    elsewhere: list[Job] = field(default_factory=list)
    waiting: list[Job] = field(default_factory=list)
    stopped: int | None = None


def launch(
    jobs: Sequence[Job],
    launcher: str,
    command: str,
    parallel: int = 0,
    options: dict[str, Any] | None = None,
    others: Sequence[Standing] = (),
) -> Outcome:
    """Runs jobs, and marks those that died and left no message as failed.

    Args:
        jobs: what is to run; at least one.
        launcher: a name that `get_launcher` takes.
        command: that was typed.
        parallel: how many at once; 0 leaves it to the launcher.
        options: of the launcher.
        others: all other runs of the sweep, whose times tell how long these will take.

    Returns:
        What became of them.
    """
    sweep_dir = jobs[0].sweep_dir
    words = {job.name: _last_word(job.folder) for job in jobs}
    tried: dict[str, int] = {}
    codes: Sequence[int | None] = ()
    with bar("sweep", len(jobs), "runs") as shown:
        progress = LaunchProgress(jobs, others, shown)
        wanted = Launch(sweep_dir, [job.name for job in jobs], parallel, options or {}, progress)
        with begin(sweep_dir, launcher, command, wanted) as begun:
            outcome, tried = Outcome(begun.path), read_launch(begun.path)["tried"]
            try:
                codes = get_launcher(launcher).run([job.command for job in jobs], begun)
            except KeyboardInterrupt:
                outcome.stopped = ExitCode.INTERRUPTED if begun.cancelled else STOPPED
                return outcome
    for job, code in zip(jobs, codes, strict=True):
        _sort(job, code, words[job.name], tried.get(job.name, 0), outcome)
    return outcome


def _sort(job: Job, code: int | None, word: object, tried: int, outcome: Outcome) -> None:
    """Puts a job where it belongs. Its folder says what became of it; the exit code, what it could not say itself.

    Args:
        job: of the launch.
        code: its exit code.
        word: the last that it had said before.
        tried: number of the last attempt at it before.
        outcome: to which it is added.
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
    elif state is State.FAILED and _last_word(job.folder) != word:
        outcome.failed.append((job, job.folder.failure()))
    elif state is State.INTERRUPTED and stopped:
        outcome.interrupted.append(job)
    elif code == ExitCode.TAKEN:
        outcome.elsewhere.append(job)
    else:
        sentence = describe_exit(code)
        job.folder.fail(sentence, code)
        outcome.failed.append((job, sentence))


def _last_word(folder: RunFolder) -> tuple[int, int] | None:
    """What tells a `failed` from one before it, for one that was killed early leaves the old one standing."""
    try:
        status = (folder.path / "failed").stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
