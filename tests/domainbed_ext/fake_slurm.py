"""Commands of Slurm's that do nothing but note what they are asked, and answer what they are told to."""

import os
from pathlib import Path

CONFIG = """Configuration data as of now
MaxArraySize            = 1001
MaxJobCount             = 10000
SchedulerParameters     = (null)
"""

_COMMAND = """#!/bin/sh
name=$(basename "$0")
number=$(ls "{folder}" | grep -c "^$name[.]")
for word in "$@"; do printf '%s\\n' "$word"; done > "{folder}/$name.$number"
if [ -e "{folder}/refusal.$name.$number" ]; then cat "{folder}/refusal.$name.$number" >&2; exit 1; fi
case "$name $*" in
    sbatch*) echo $((100 + number)) ;;
    "scontrol show config") cat "{folder}/config" ;;
    "scontrol show job"*) cat "{folder}/job" ;;
    squeue*) cat "{folder}/queue" ;;
esac
"""


class FakeSlurm:
    """Slurm's commands in a folder.

    Args:
        folder: new.

    Attributes:
        path: what PATH has to be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "asked"
        self.folder.mkdir(parents=True)
        (folder / "bin").mkdir()
        for name in ("sbatch", "scancel", "scontrol", "squeue"):
            command = folder / "bin" / name
            command.write_text(_COMMAND.format(folder=self.folder))
            command.chmod(0o755)
        self.path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.says("config", CONFIG)
        self.says("job", "JobState=RUNNING Restarts=0")
        self.says("queue", "")

    def says(self, what: str, text: str) -> None:
        """Has it answer: "config", "job" (of `scontrol show`), or "queue"."""
        (self.folder / what).write_text(text)

    def refuses(self, command: str, number: int, text: str) -> None:
        """Has a command fail at its n-th call, counted from 0."""
        (self.folder / f"refusal.{command}.{number}").write_text(text)

    def asked(self, command: str) -> list[list[str]]:
        """The arguments of each call of a command."""
        calls = sorted(self.folder.glob(f"{command}.*"), key=lambda path: int(path.suffix[1:]))
        return [path.read_text().splitlines() for path in calls]
