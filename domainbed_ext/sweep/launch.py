"""`sweep launch`: runs all that is not done, and prints the tables."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from domainbed_ext.errors import BenchmarkError, not_writable
from domainbed_ext.launchers import Launcher, check_options, get_launcher
from domainbed_ext.launchers.dummy import Dummy
from domainbed_ext.launchers.launch import Launch
from domainbed_ext.runs import launches
from domainbed_ext.runs.folder import State
from domainbed_ext.runs.provenance import provenance
from domainbed_ext.sweep.arguments import SweepArguments
from domainbed_ext.sweep.by_name import link_by_name
from domainbed_ext.sweep.check import Checked, check_duplicates, check_runs
from domainbed_ext.sweep.fill_cache import fill_cache
from domainbed_ext.sweep.finished import check_finished
from domainbed_ext.sweep.jobs import Job, make_jobs
from domainbed_ext.sweep.outcome import Outcome, launch_jobs
from domainbed_ext.sweep.states import (
    RunStatus,
    describe_states,
    format_runs,
    is_missing,
    mixed_runs_warning,
    print_states,
    read_statuses,
)
from domainbed_ext.system import strict_json
from domainbed_ext.system.console import confirm
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.files import write_atomically
from domainbed_ext.system.machine import count_available_cores


def run(args: SweepArguments) -> int:
    """The sub-command.

    Args:
        args: Arguments of the sweep.

    Returns:
        The exit code.
    """
    return launch_runs(args, make_jobs(args), is_missing, "Nothing is left to launch.")


def launch_runs(args: SweepArguments, jobs: Sequence[Job], is_wanted: Callable[[RunStatus], bool], if_none: str) -> int:
    """Runs some of a sweep's runs, and prints its tables.

    Args:
        args: Arguments of the sweep.
        jobs: Jobs of all its runs.
        is_wanted: Function that tells whether to run a run, by its status.
        if_none: What to print if there is none.

    Returns:
        The exit code.

    Raises:
        BenchmarkError: Something would stop a run.
    """
    statuses = print_states(jobs, args.output_dir)
    check_finished(statuses)
    start = time.monotonic()
    jobs = [status.job for status in statuses if is_wanted(status)]
    if not jobs:
        print(if_none, flush=True)
    launcher = Dummy("dummy") if args.dry_run else get_launcher(args.command_launcher)
    check_options(args.command_launcher, args.launcher_options)
    checked = check_runs(jobs)
    if launcher.ONLY_PRINTS:
        launcher.run([job.command for job in jobs], Launch(args.output_dir))
        return 0
    _check_writable(args.output_dir)
    if jobs and not (args.skip_confirmation or confirm(f"Launch {format_runs(len(jobs))}?")):
        print("Nothing launched.")
        return 0
    if jobs:
        _prepare_images(args, launcher, jobs, checked)
    link_by_name([status.job for status in statuses], args.output_dir)
    outcome = None
    if jobs:
        rest = [status for status in statuses if not is_wanted(status)]
        outcome = launch_jobs(jobs, args.command_launcher, args.command_line, args.jobs, args.launcher_options, rest)
        if outcome.stopped is not None:
            return _print_stopped(statuses, outcome.stopped)
    if outcome is not None:  # before the page, which shows it
        _write_provenance(args.output_dir, args.words, time.monotonic() - start)
    code = _collect(args, statuses)
    if outcome is not None:
        code = _print_outcome(outcome, args, len(statuses)) or code
    return code


def _prepare_images(
    args: SweepArguments, launcher: Launcher, jobs: Sequence[Job], checked: dict[tuple[str, str], Checked]
) -> None:
    """Looks for duplicates, and decodes what the runs share: only on this machine, which others may not share."""
    if launcher.RUNS_HERE or args.duplicates == "refuse":  # elsewhere each run warns
        check_duplicates(checked)
    if launcher.RUNS_HERE:
        fill_cache(jobs, checked, count_available_cores())


def _print_outcome(outcome: Outcome, args: SweepArguments, count: int) -> int:
    """Prints what became of a launch's runs; returns the exit code."""
    if outcome.waiting:
        print(
            f"{format_runs(len(outcome.waiting))} queued in {args.command_launcher} (launch {outcome.path.name}): "
            "`status` shows their progress, and `launch` prints the tables when all are done"
        )
    if outcome.elsewhere:
        print(f"{format_runs(len(outcome.elsewhere))} done or running in another launch: `status` shows their progress")
    if outcome.interrupted:
        print(
            f"{format_runs(len(outcome.interrupted))} interrupted: run the same command again to resume",
            file=sys.stderr,
        )
    for job, reason in outcome.failed:
        print(f"failed: {job}: {reason} (log: {job.folder.path / 'err.txt'})", file=sys.stderr)
    if outcome.failed:
        failed = f"{len(outcome.failed)} of {format_runs(count)} failed"
        print(f"{failed}; `sweep retry` runs them again", file=sys.stderr)
        return ExitCode.FAILED
    return ExitCode.INTERRUPTED if outcome.interrupted else ExitCode.DONE


def _print_stopped(statuses: Sequence[RunStatus], code: int) -> int:
    now = read_statuses([status.job for status in statuses], statuses[0].job.sweep_dir)
    how = "cancelled" if code == ExitCode.INTERRUPTED else "interrupted"
    print(f"{how}: {describe_states(now)}; run the same command again to resume", file=sys.stderr)
    return code


def _collect(args: SweepArguments, statuses: Sequence[RunStatus]) -> int:
    """Makes the tables, if any run is done; returns the exit code."""
    if not any(status.job.folder.state is State.DONE for status in statuses):
        return 0
    from domainbed_ext.collect_results import collect  # here, for plots take seconds to import

    if warning := mixed_runs_warning([status.job for status in statuses], args.output_dir):
        print(warning, file=sys.stderr)
    unreadable: list[str] = []
    try:
        collect(str(args.output_dir), unreadable=unreadable, reference=args.reference)
    except BenchmarkError as error:  # what became of the runs is still to be printed
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    return ExitCode.FAILED if unreadable else ExitCode.DONE


def _write_provenance(sweep_dir: Path, words: Sequence[str], seconds: float) -> None:
    """Appends this launch to the list of those that the tables come from."""
    path = launches.path_of(sweep_dir)
    path.parent.mkdir(exist_ok=True)  # there are no tables where every run failed
    content = [
        *launches.read_launches(sweep_dir),
        {**provenance("domainbed_ext.sweep", words), "seconds": round(seconds)},
    ]
    write_atomically(path, strict_json.dumps(content, indent=2) + "\n")


def _check_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise not_writable(path, error) from error
