"""What this process may use of the machine."""

import joblib


def available_cores() -> int:
    """Cores this process may use, which in a container or under Slurm are fewer than the machine has."""
    return int(joblib.cpu_count())
