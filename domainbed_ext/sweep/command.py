"""A sweep: which runs there are, how far each is, and launching what is missing.

python -m domainbed_ext.sweep launch                       # the quickstart
python -m domainbed_ext.sweep launch --sweep FILE.yaml     # a definition, arguments overriding it
python -m domainbed_ext.sweep launch --datasets PACS --algorithms BA BOnly --data_dir D --output_dir O
python -m domainbed_ext.sweep status --sweep FILE.yaml     # also retry, validate, delete_incomplete, cancel
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from domainbed_ext.data import duplicates
from domainbed_ext.errors import BenchmarkError, not_writable
from domainbed_ext.launchers import check_options, get_launcher
from domainbed_ext.launchers.dummy import Dummy
from domainbed_ext.launchers.launch import Launch
from domainbed_ext.runs.folder import State
from domainbed_ext.runs.provenance import provenance
from domainbed_ext.sweep import cancel as cleaning
from domainbed_ext.sweep import cost, finished, status
from domainbed_ext.sweep.arguments import make_parser, parse
from domainbed_ext.sweep.check import Checked, check
from domainbed_ext.sweep.fill_cache import fill
from domainbed_ext.sweep.jobs import Job, make_jobs
from domainbed_ext.sweep.launch import Outcome, launch
from domainbed_ext.sweep.states import INCOMPLETE, Standing, count_of, look, others, summary
from domainbed_ext.system import strict_json
from domainbed_ext.system.command_line import as_command
from domainbed_ext.system.console import output
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.files import write_atomically
from domainbed_ext.system.machine import available_cores

__all__ = ["Job", "main", "make_jobs", "make_parser", "parse"]


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.sweep`."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse(words)
    if args.command == "cancel":
        return cleaning.cancel(Path(args.output_dir), args.dry_run)
    jobs = make_jobs(args)
    if args.command == "status":
        return _status(args, jobs)
    standings = look(jobs, Path(args.output_dir))
    print(f"{count_of(len(jobs))} in {args.output_dir}: {summary(standings)}", flush=True)
    if args.command == "delete_incomplete":
        return _delete(args, standings)
    _compare_finished(standings)
    if args.command == "validate":
        return _validate(args, standings)
    return _launch(args, standings, words)


def _compare_finished(standings: Sequence[Standing]) -> None:
    """Refuses finished runs on other data than what is here, and warns of what else has changed since."""
    for warning in finished.compare([standing.job for standing in standings if standing.state is State.DONE]):
        print(f"warning: {warning}", file=sys.stderr)


def _launch(args: argparse.Namespace, standings: Sequence[Standing], words: Sequence[str]) -> int:
    """`launch` and `retry`."""
    start = time.monotonic()
    wanted = _missing if args.command == "launch" else _incomplete
    jobs = [standing.job for standing in standings if wanted(standing)]
    launcher = Dummy("dummy") if args.dry_run else get_launcher(args.command_launcher)
    check_options(args.command_launcher, args.launcher_options)
    checked = check(jobs)
    if launcher.ONLY_PRINTS:
        launcher.run([job.command for job in jobs], Launch(Path(args.output_dir)))
        return 0
    _check_writable(Path(args.output_dir))
    if jobs and not _confirm(f"Launch {count_of(len(jobs))}?", args):
        print("Nothing launched.")
        return 0
    outcome = None
    if jobs:
        if launcher.RUNS_HERE or args.duplicates == "refuse":  # elsewhere each run warns
            _check_duplicates(checked)
        if launcher.RUNS_HERE:  # others may run where this cache is not seen
            fill(jobs, checked, available_cores())
        command = shlex.join(["python", "-m", "domainbed_ext.sweep", *words])
        others = [standing for standing in standings if not wanted(standing)]
        outcome = launch(jobs, args.command_launcher, command, args.jobs, args.launcher_options, others)
        if outcome.stopped is not None:
            return _say_stopped(standings, outcome.stopped)
    code = _collect(args, standings)
    if outcome is not None:
        _write_provenance(Path(args.output_dir) / "tables" / "provenance.json", words, time.monotonic() - start)
        code = _say(outcome, args, len(standings)) or code
    return code


def _missing(standing: Standing) -> bool:
    """Whether `launch` takes a run: also one that waits in another launcher, for then the two share the work."""
    in_engine = standing.waits is not None and standing.waits.detached
    return standing.state not in (State.DONE, State.RUNNING) and not in_engine


def _incomplete(standing: Standing) -> bool:
    return standing.state in INCOMPLETE


def _say(outcome: Outcome, args: argparse.Namespace, count: int) -> int:
    """Says what became of a launch; returns the exit code."""
    if outcome.waiting:
        print(
            f"{count_of(len(outcome.waiting))} waiting in {args.command_launcher} (launch {outcome.path.name}): "
            "`status` tells how far they are, and `launch` prints the tables when all are done"
        )
    if outcome.elsewhere:
        print(f"{count_of(len(outcome.elsewhere))} done or at work elsewhere: `status` tells how far they are")
    if outcome.interrupted:
        print(
            f"{count_of(len(outcome.interrupted))} interrupted: run the same command again to resume", file=sys.stderr
        )
    for job, reason in outcome.failed:
        print(f"failed: {job}: {reason} (log: {job.folder.path / 'err.txt'})", file=sys.stderr)
    if outcome.failed:
        print(f"{len(outcome.failed)} of {count_of(count)} failed; `sweep retry` runs them again", file=sys.stderr)
        return ExitCode.FAILED
    return ExitCode.INTERRUPTED if outcome.interrupted else ExitCode.DONE


def _say_stopped(standings: Sequence[Standing], code: int) -> int:
    now = look([standing.job for standing in standings], standings[0].job.sweep_dir)
    how = "cancelled" if code == ExitCode.INTERRUPTED else "interrupted"
    print(f"{how}: {summary(now)}; run the same command again to resume", file=sys.stderr)
    return code


def _collect(args: argparse.Namespace, standings: Sequence[Standing]) -> int:
    """Makes the tables, if any run is done; returns the exit code."""
    if not any(standing.job.folder.state is State.DONE for standing in standings):
        return 0
    from domainbed_ext.collect_results import collect  # here, for plots take seconds to import

    if count := others([standing.job for standing in standings], Path(args.output_dir)):
        print(_about_others(count, args.output_dir), file=sys.stderr)
    unreadable: list[str] = []
    try:
        collect(args.output_dir, unreadable=unreadable)
    except BenchmarkError as error:  # what became of the runs is still to be told
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    return ExitCode.FAILED if unreadable else ExitCode.DONE


def _about_others(count: int, output_dir: str) -> str:
    return (
        f"{output_dir} holds {count_of(count)} of other arguments too, and its tables mix them with these: give each "
        "sweep an --output_dir of its own"
    )


def _write_provenance(path: Path, argv: Sequence[str], seconds: float) -> None:
    """Appends this launch to the list of those that the tables come from."""
    path.parent.mkdir(exist_ok=True)  # there are no tables where every run failed
    launches = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    launches.append({**provenance("domainbed_ext.sweep", argv), "seconds": round(seconds)})
    write_atomically(path, strict_json.dumps(launches, indent=2) + "\n")


def _status(args: argparse.Namespace, jobs: Sequence[Job]) -> int:
    sweep_dir = Path(args.output_dir)
    if args.json:
        print(status.as_json(look(jobs, sweep_dir), sweep_dir))
    else:
        if code := status.show(lambda: look(jobs, sweep_dir), sweep_dir, args.watch):
            return code
        if count := others(jobs, sweep_dir):
            print(_about_others(count, args.output_dir))
    _compare_finished(look(jobs, sweep_dir))  # last, for it may list many files
    return 0


def _validate(args: argparse.Namespace, standings: Sequence[Standing]) -> int:
    jobs = [standing.job for standing in standings if standing.state is not State.DONE]
    check_options(args.command_launcher, args.launcher_options)
    if not jobs:
        print("Nothing is left to run.")
        return 0
    checked = check(jobs)
    if not args.dry_run:
        _check_duplicates(checked)
    print("Nothing found that would stop a run.", flush=True)
    if args.dry_run:
        return 0
    parts = cost.report(jobs, checked, cost.slots(args, jobs))
    output().print(*parts, sep="")
    return 0


def _check_duplicates(checked: Mapping[tuple[str, str], Checked]) -> None:
    """Looks for images that a data set holds more than once, in each data set once."""
    for setup in {dataset: each.setup for (dataset, _), each in checked.items()}.values():
        duplicates.check(setup.args.dataset, setup.dataset, setup.args.duplicates, setup.args.cache_dir)


def _delete(args: argparse.Namespace, standings: Sequence[Standing]) -> int:
    jobs = [standing.job for standing in standings if _incomplete(standing)]
    if args.dry_run or not jobs:
        for job in jobs:
            print(f"would delete {job.folder.path}")
        return 0
    if _confirm(f"Delete {count_of(len(jobs))} that failed or were interrupted?", args):
        deleted = cleaning.delete(jobs)
        spared = f"; {count_of(len(jobs) - deleted)} taken up or finished by now" if deleted < len(jobs) else ""
        print(f"Deleted {count_of(deleted)}{spared}.")
    return 0


def _confirm(question: str, args: argparse.Namespace) -> bool:
    """Asks, where there is somebody to answer."""
    if args.skip_confirmation or sys.stdin is None or not sys.stdin.isatty():
        return True
    print(f"{question} (y/n) ", end="", file=sys.stderr, flush=True)  # standard output may be a file
    try:
        return input().strip().lower().startswith("y")
    except EOFError:  # Ctrl-D
        print(file=sys.stderr)
        return False


def _check_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise not_writable(path, error) from error
