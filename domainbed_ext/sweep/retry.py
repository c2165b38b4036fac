"""`sweep retry`: runs only what failed or was interrupted."""

from domainbed_ext.sweep.arguments import SweepArguments
from domainbed_ext.sweep.launch import launch_runs
from domainbed_ext.sweep.states import is_incomplete


def run(args: SweepArguments) -> int:
    """The sub-command.

    Args:
        args: Arguments of the sweep.

    Returns:
        The exit code.
    """
    return launch_runs(args, is_incomplete, "No run failed or was interrupted: `launch` runs what is not launched.")
