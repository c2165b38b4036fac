"""The launches that a sweep's tables come from: `tables/provenance.json` in its folder."""

import json
from pathlib import Path
from typing import Any


def path_of(sweep_dir: Path | str) -> Path:
    """The path of the list.

    Args:
        sweep_dir: Folder of the sweep.
    """
    return Path(sweep_dir) / "tables" / "provenance.json"


def read_launches(sweep_dir: Path | str) -> list[dict[str, Any]]:
    """Reads what each launch of a sweep recorded: command, date, machine, versions, commit and seconds.

    Args:
        sweep_dir: Folder of the sweep.

    Returns:
        Launches in order; none where the runs were not launched as a sweep, or the file is no such list.
    """
    path = path_of(sweep_dir)
    if not path.exists():
        return []
    try:
        launches = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [launch for launch in launches if isinstance(launch, dict)] if isinstance(launches, list) else []
