"""Launches that are in progress in a sweep: each is a folder in `launches/` that says which runs wait in it.

launch.json      launcher, command, date, names of the runs' folders, the number of the last attempt at each run that
                 was tried before, and whether the launch is detached
attempt_1.json   the process that launches, with a heartbeat (see `attempts`): the runs of a launch whose process has
                 exited do not wait
requeued/NAME    a run that was tried in it, and that its scheduler starts again
cancel           asks the launch to end; launchers look for this file every second or so
"""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from domainbed_ext.system import strict_json
from domainbed_ext.system.attempts import Claim, read_latest
from domainbed_ext.system.files import write_atomically

FOLDER = "launches"


@dataclass(frozen=True)
class Launch:
    """A launch, as a launcher is given it.

    Attributes:
        path: Folder of the launch, where a launcher may keep files of its own (scripts, logs).
        runs: Names of the runs' folders, in the order of the commands.
        parallel: Number of runs at once; 0 as the launcher sees fit.
        options: Options of the launcher, e.g. {"partition": "gpu"}.
        progress: Callback that takes a command's index and the share of it that is done, in [0, 1]; 1.0 when it ended,
            whether or not it failed.
    """

    path: Path
    runs: Sequence[str] = ()
    parallel: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    progress: Callable[[int, float], None] = lambda index, share: None

    @property
    def cancelled(self) -> bool:
        """Whether it was asked to end."""
        return (self.path / "cancel").exists()

    def detach(self, **engine: Any) -> None:
        """Notes that the runs wait in a scheduler when this process has ended.

        Args:
            **engine: What the launcher needs to find them there.
        """
        path = self.path / "launch.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        write_atomically(path, strict_json.dumps({**content, "detached": True, "engine": engine}, indent=2) + "\n")


def read_launch(path: Path) -> dict[str, Any]:
    """Reads the launch.json of a launch; empty if there is none.

    Args:
        path: Folder of the launch.
    """
    try:
        content = json.loads((path / "launch.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def begin(sweep_dir: Path, launcher: str, command: str, launch: Launch) -> Iterator[Launch]:
    """Records a launch while it lasts, and after that if it is detached.

    Args:
        sweep_dir: Folder of the sweep.
        launcher: Name of the launcher.
        command: Command as it was typed.
        launch: The launch, without its path.

    Yields:
        The launch, with its path.
    """
    now = datetime.now(timezone.utc)
    path = sweep_dir / FOLDER / f"{now:%Y%m%dT%H%M%S.%f}_{socket.gethostname()}_{os.getpid()}"
    path.mkdir(parents=True)
    content = {
        "launcher": launcher,
        "command": command,
        "date": now.isoformat(timespec="seconds"),
        "runs": list(launch.runs),
        "tried": {name: last.number for name in launch.runs if (last := read_latest(sweep_dir / name))},
        "detached": False,
    }
    write_atomically(path / "launch.json", strict_json.dumps(content, indent=2) + "\n")
    try:
        with Claim(path):
            yield replace(launch, path=path)
    finally:
        if not read_launch(path).get("detached"):
            shutil.rmtree(path, ignore_errors=True)


def list_under_way(sweep_dir: Path) -> list[Path]:
    """Lists the folders of launches whose runs wait, the oldest first.

    Args:
        sweep_dir: Folder of the sweep.
    """
    root = sweep_dir / FOLDER
    paths = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    return [path for path in paths if not (path / "cancel").exists() and _is_under_way(path)]


def _is_under_way(path: Path) -> bool:
    attempt = read_latest(path)
    return bool(read_launch(path).get("detached") or (attempt and attempt.is_alive()))
