"""`sweep validate`: checks everything, estimates the cost, and runs nothing."""

from domainbed_ext.launchers import check_options
from domainbed_ext.runs.folder import State
from domainbed_ext.sweep import cost
from domainbed_ext.sweep.arguments import SweepArguments
from domainbed_ext.sweep.check import check_duplicates, check_runs
from domainbed_ext.sweep.finished import check_finished
from domainbed_ext.sweep.jobs import make_jobs
from domainbed_ext.sweep.states import print_states
from domainbed_ext.system.console import output


def run(args: SweepArguments) -> int:
    """The sub-command.

    Args:
        args: Arguments of the sweep.

    Returns:
        The exit code.

    Raises:
        BenchmarkError: Something would stop a run.
    """
    statuses = print_states(make_jobs(args), args.output_dir)
    check_finished(statuses)
    jobs = [status.job for status in statuses if status.state is not State.DONE]
    check_options(args.command_launcher, args.launcher_options)
    if not jobs:
        print("Nothing is left to run.")
        return 0
    checked = check_runs(jobs)
    if not args.dry_run:
        check_duplicates(checked)
    print("Nothing found that would stop a run.", flush=True)
    if args.dry_run:
        return 0
    output().print(*cost.estimate_cost(jobs, checked, cost.count_runs_at_once(args, jobs)), sep="")
    return 0
