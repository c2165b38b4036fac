"""`sweep retry`: runs only what failed or was interrupted."""

from domainbed_ext.sweep.arguments import SweepArguments
from domainbed_ext.sweep.jobs import make_jobs
from domainbed_ext.sweep.launch import launch_runs
from domainbed_ext.sweep.states import is_incomplete


def run(args: SweepArguments) -> int:
    """The sub-command.

    Args:
        args: Arguments of the sweep.

    Returns:
        The exit code.
    """
    if_none = "No run failed or was interrupted: `launch` runs what is not launched."
    return launch_runs(args, make_jobs(args), is_incomplete, if_none)
