"""`sweep status`: shows the progress of the runs, failures with their reasons, and the time left."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.live import Live

from domainbed_ext.runs.folder import State
from domainbed_ext.sweep import by_name
from domainbed_ext.sweep.arguments import SweepArguments
from domainbed_ext.sweep.jobs import make_jobs
from domainbed_ext.sweep.states import RunStatus, mixed_runs_warning, read_statuses
from domainbed_ext.sweep.status_view import as_json, render
from domainbed_ext.system.console import output
from domainbed_ext.system.exit_codes import STOPPED

REFRESH = 3.0  # seconds


def run(args: SweepArguments) -> int:
    """The sub-command.

    Args:
        args: Arguments of the sweep.

    Returns:
        The exit code: that of Ctrl-C, if this ended the watch.

    Raises:
        BenchmarkError: Finished runs are of other data than what is here.
    """
    jobs, sweep_dir = make_jobs(args), args.output_dir
    if args.json:
        print(as_json(read_statuses(jobs, sweep_dir), sweep_dir))
    else:
        if code := show(lambda: read_statuses(jobs, sweep_dir), sweep_dir, args.watch):
            return code
        if (sweep_dir / by_name.FOLDER).is_dir():
            print(f"runs by readable names: {sweep_dir / by_name.FOLDER}")
        if warning := mixed_runs_warning(jobs, sweep_dir):
            print(warning)
    statuses = read_statuses(jobs, sweep_dir)
    if any(status.state is State.DONE for status in statuses):
        from domainbed_ext.sweep.finished import check_finished  # here because it imports torch, which takes seconds

        check_finished(statuses)  # last, since it may list many files
    return 0


def show(read: Callable[[], Sequence[RunStatus]], sweep_dir: Path, watch: bool = False) -> int:
    """Prints the progress of a sweep.

    Args:
        read: Function that reads the runs' statuses.
        sweep_dir: Folder of the sweep.
        watch: Whether to refresh it, on a terminal, until all is done or Ctrl-C.

    Returns:
        The exit code: that of Ctrl-C, if this ended the watch.
    """
    console = output()
    if not (watch and console.is_terminal):
        console.print(render(read(), sweep_dir, console.encoding))
        return 0
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                start = time.process_time()
                statuses = read()
                live.update(render(statuses, sweep_dir, console.encoding), refresh=True)
                if all(status.state is State.DONE for status in statuses):
                    return 0
                time.sleep(max(REFRESH, 20 * (time.process_time() - start)))  # a twentieth of a core at most
    except KeyboardInterrupt:
        print("stopped watching: the runs continue", file=sys.stderr)
        return STOPPED
