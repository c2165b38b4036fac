"""`sweep cancel`: stops launches in progress. Running runs stop at a checkpoint, queued runs do not start."""

import sys
from collections.abc import Sequence
from pathlib import Path

from domainbed_ext.errors import BenchmarkError, not_writable
from domainbed_ext.launchers import cancel_in_scheduler
from domainbed_ext.launchers.launch import list_under_way, read_launch
from domainbed_ext.runs.folder import State
from domainbed_ext.sweep.arguments import SweepArguments
from domainbed_ext.sweep.states import format_runs, read_states
from domainbed_ext.system.exit_codes import ExitCode


def run(args: SweepArguments) -> int:
    """The sub-command.

    Args:
        args: Arguments of the sweep.

    Returns:
        The exit code.

    Raises:
        BenchmarkError: The sweep's folder cannot be written to.
    """
    sweep_dir, code, any_under_way = args.output_dir, ExitCode.DONE, False
    for path in list_under_way(sweep_dir):
        content = read_launch(path)
        launcher, detached = content.get("launcher", "?"), bool(content.get("detached"))
        queued, running = _count_unfinished(path, content.get("runs", ()), sweep_dir)
        if detached and not (queued or running):  # a scheduler does not tell when it has finished
            continue
        any_under_way = True
        what = f"launch {path.name} ({launcher}; {format_runs(queued)} queued, {running} running)"
        if args.dry_run:
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
    if not any_under_way:
        print(f"no launch is in progress in {sweep_dir}")
    return code


def _count_unfinished(path: Path, runs: Sequence[str], sweep_dir: Path) -> tuple[int, int]:
    """How many runs of a launch are queued in it, and how many are running."""
    states = read_states(runs, sweep_dir)
    queued = sum(wait is not None and wait.launch == path for _, _, wait in states)
    return queued, sum(state is State.RUNNING for state, _, _ in states)


def _end(path: Path, launcher: str, detached: bool) -> str:
    """Has a launch's scheduler end it, if it has one; returns what happens to its runs."""
    return cancel_in_scheduler(launcher, path) if detached else "its runs stop at their next checkpoint"
