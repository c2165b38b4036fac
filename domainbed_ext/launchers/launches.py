"""What is under way in a sweep: each launch is a folder in `launches/` that says which runs wait in it.

launch.json      launcher, command, date, names of the runs' folders, the number of the last attempt at each that was
                 tried before, and whether it is detached
attempt_1.json   who launches, with a heartbeat (see `attempts`): the runs of a launch that is dead do not wait
requeued/NAME    a run that was tried in it, and that its engine starts again
cancel           somebody wants it to end; launchers look for this every second or so
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
from domainbed_ext.system.attempts import Claim, latest
from domainbed_ext.system.files import write_atomically

FOLDER = "launches"


@dataclass(frozen=True)
class Launch:
    """A launch, as a launcher is given it.

    Attributes:
        path: its folder, where a launcher may keep files of its own (scripts, logs).
        runs: names of the runs' folders, in the order of the commands.
        parallel: how many runs at once; 0 as the launcher sees fit.
        options: of the launcher, e.g. {"partition": "gpu"}.
        progress: to be told a command's index and the share of it that is done; 1.0 when it ended, well or not.
    """

    path: Path
    runs: Sequence[str] = ()
    parallel: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    progress: Callable[[int, float], None] = lambda index, share: None

    @property
    def cancelled(self) -> bool:
        """Whether somebody wants it to end."""
        return (self.path / "cancel").exists()

    def detach(self, **engine: Any) -> None:
        """Says that the runs go on waiting when this process has ended, in an engine of which something is noted."""
        path = self.path / "launch.json"
        said = json.loads(path.read_text(encoding="utf-8"))
        write_atomically(path, strict_json.dumps({**said, "detached": True, "engine": engine}, indent=2) + "\n")


def said(path: Path) -> dict[str, Any]:
    """What a launch's folder says of it; empty if it says nothing."""
    try:
        content = json.loads((path / "launch.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def begin(sweep_dir: Path, launcher: str, command: str, launch: Launch) -> Iterator[Launch]:
    """Writes a launch down while it lasts, and after that if it is detached.

    Args:
        sweep_dir: the sweep's folder.
        launcher: name.
        command: that was typed.
        launch: but for its path.

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
        "tried": {name: last.number for name in launch.runs if (last := latest(sweep_dir / name))},
        "detached": False,
    }
    write_atomically(path / "launch.json", strict_json.dumps(content, indent=2) + "\n")
    try:
        with Claim(path):
            yield replace(launch, path=path)
    finally:
        if not said(path).get("detached"):
            shutil.rmtree(path, ignore_errors=True)


def under_way(sweep_dir: Path) -> list[Path]:
    """The folders of launches whose runs wait, the oldest first."""
    root = sweep_dir / FOLDER
    paths = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    return [path for path in paths if not (path / "cancel").exists() and _waits(path)]


def _waits(path: Path) -> bool:
    attempt = latest(path)
    return bool(said(path).get("detached") or (attempt and attempt.alive()))
