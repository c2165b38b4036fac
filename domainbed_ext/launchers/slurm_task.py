"""A job of a Slurm array: executes its runs side by side, and has itself requeued for those that need more time.

Its runs stop at a checkpoint when Slurm warns that the time is nearly up (SIGUSR2), and when the job is cancelled or
preempted (SIGTERM). After a warning the job asks Slurm to start it again; after a SIGTERM it asks whether Slurm will.
Runs that are to resume are noted in the launch's folder, in `requeued/`, until they do.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.execute import describe_exit
from domainbed_ext.launchers.launch import Launch
from domainbed_ext.launchers.local import LocalOptions
from domainbed_ext.launchers.options import read
from domainbed_ext.launchers.pool import run_all
from domainbed_ext.launchers.slots import make_slots
from domainbed_ext.launchers.slurm import FOLDER
from domainbed_ext.runs import arguments
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.system.command_line import as_command
from domainbed_ext.system.exit_codes import ExitCode

_WARNING, _END = signal.SIGUSR2, signal.SIGTERM


class Task:
    """The job, in one of its starts.

    Args:
        path: Folder of the launch.
        number: Number of the job in `jobs.json`.
        read_signals: Callback that tells which signals have come.
    """

    def __init__(self, path: Path, number: int, read_signals: Callable[[], set[int]]) -> None:
        content = json.loads((path / FOLDER / "jobs.json").read_text(encoding="utf-8"))
        self.launch, self.read_signals = Launch(path), read_signals
        self.slots, self.most = content["slots"], content["most"] or None
        self.options = read(LocalOptions, "local", content["local"])
        self.starts_before = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.name = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        self.commands = [_read_command(each) for each in content["jobs"][number]]
        self.has_progressed = False

    def work(self) -> ExitCode:
        """Executes the runs until all have ended, or the job has to stop.

        Returns:
            Exit code of the job.
        """
        self.commands = [each for each in self.commands if not self._is_elsewhere(each.folder)]
        slots = make_slots(self.commands, self.slots, self.options.jobs_per_gpu)[: self.most]
        try:
            codes = run_all(self.commands, slots, self._progress, self._has_to_stop, self.options)
        except KeyboardInterrupt:
            self._stop()
            return ExitCode.INTERRUPTED
        for command, code in zip(self.commands, codes, strict=True):
            self._report(command, code)
        return ExitCode.FAILED if any(codes) else ExitCode.DONE

    def _is_elsewhere(self, folder: RunFolder | None) -> bool:
        """Whether another process works on a run; waiting for it would waste the allocation."""
        if self.starts_before:  # the process may be this job's own, whose last heartbeat is not old enough yet
            return False
        if folder is None or folder.state is not State.RUNNING:
            return False
        print(f"{folder.path.name}: another process works on it")
        return True

    def _has_to_stop(self) -> bool:
        return self.launch.cancelled or bool(self.read_signals())

    def _progress(self, index: int, share: float) -> None:
        self.has_progressed |= share < 1
        if folder := self.commands[index].folder:
            self._note(folder).unlink(missing_ok=True)

    def _report(self, command: Command, code: int) -> None:
        """Prints how a run ended, and notes it in the run's folder if the run could not."""
        folder = command.folder
        print(f"{folder.path.name if folder else command.text}: exit code {code}")
        if folder is None or code == ExitCode.DONE:
            return
        state, attempt = folder.look()
        if state in (State.INTERRUPTED, State.NOT_LAUNCHED) and not (attempt and attempt.ended):
            folder.fail(describe_exit(code), code)

    def _stop(self) -> None:
        """Has the job requeued, if its runs are to resume in it, and notes these runs."""
        for number in (_WARNING, _END):  # requeueing signals everything in the job, also the scontrol that asks for it
            signal.signal(number, signal.SIG_IGN)
        if _WARNING in self.read_signals() and _END not in self.read_signals() and not self.launch.cancelled:
            if self.has_progressed:
                subprocess.run(["scontrol", "requeue", self.name], check=False)
            else:
                print("the time of this job is too short for a single step")
        starts_again = self._starts_again()
        folders = [command.folder for command in self.commands if command.folder]
        begun = [folder for folder in folders if folder.state is State.INTERRUPTED]
        for folder in folders:
            if not starts_again:
                self._note(folder).unlink(missing_ok=True)
            elif folder in begun:
                self._note(folder).parent.mkdir(exist_ok=True)
                self._note(folder).touch()
        when = "this job is started again" if starts_again else "they are launched again"
        print(f"{len(begun)} runs stopped, and resume when {when}")

    def _note(self, folder: RunFolder) -> Path:
        return self.launch.path / "requeued" / folder.path.name

    def _starts_again(self) -> bool:
        shown = subprocess.run(["scontrol", "show", "job", self.name], capture_output=True, text=True, check=False)
        starts = re.search(r"\bRestarts=(\d+)", shown.stdout)  # counted as soon as it is decided
        return starts is not None and int(starts[1]) > self.starts_before


def _read_command(content: dict[str, Any] | str) -> Command:
    """Reads a command from jobs.json, where launches of version 0.1.0 have its text alone."""
    if not isinstance(content, str):
        return Command(**content)
    words = shlex.split(content)
    if words[1:3] != ["-m", "domainbed_ext.train"]:
        return Command(content)
    args = arguments.parse(words[3:])
    return Command(content, words[3:], args.output_dir, args.threads or 1, args.time_limit)


@contextlib.contextmanager
def record_signals() -> Iterator[Callable[[], set[int]]]:
    """Records the signals that come, whatever handles them.

    Yields:
        Callback that tells which signals have come so far.
    """
    receiver, sender = socket.socketpair()
    numbers: set[int] = set()

    def read_signals() -> set[int]:
        with contextlib.suppress(BlockingIOError):
            numbers.update(receiver.recv(1024))
        return numbers

    with receiver, sender:
        receiver.setblocking(False)
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.fileno())
        for number in (_WARNING, _END):  # from now on they end nothing
            signal.signal(number, lambda *_: None)
        try:
            yield read_signals
        finally:
            signal.set_wakeup_fd(-1)


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `job.sh` ends with."""
    parser = argparse.ArgumentParser(prog="python -m domainbed_ext.launchers.slurm_task", description=__doc__)
    parser.add_argument("launch", type=Path, help="folder of the launch")
    parser.add_argument("number", type=int, help="number of the job in its jobs.json")
    args = parser.parse_args(argv)
    # Where Slurm does not bind processes to cores, all cores of the machine seem to be the job's.
    os.environ.setdefault("LOKY_MAX_CPU_COUNT", os.environ["SLURM_CPUS_ON_NODE"])
    with record_signals() as read_signals:
        return Task(args.launch, args.number, read_signals).work()


if __name__ == "__main__":
    main()
