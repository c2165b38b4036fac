"""What this process may use of the machine: its cores."""

import joblib


def count_available_cores() -> int:
    """Counts the cores that this process may use; in a container or under Slurm the machine has more."""
    return int(joblib.cpu_count())
