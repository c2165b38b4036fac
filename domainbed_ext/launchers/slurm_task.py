"""A job of a Slurm array: works on its runs side by side, and comes again for those that its time was too short for.

Its runs stop at a checkpoint when Slurm warns that the time is nearly up (SIGUSR2), and when the job is cancelled or
has to make room (SIGTERM). Warned, the job has Slurm start it again; whether it comes again after a SIGTERM, Slurm
tells. Runs that do are noted in the launch's folder, in `requeued/`, until they are begun again.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.launches import Launch
from domainbed_ext.launchers.local import LocalOptions
from domainbed_ext.launchers.options import read
from domainbed_ext.launchers.pool import run_all
from domainbed_ext.launchers.slots import slots_here
from domainbed_ext.launchers.slurm import FOLDER
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.system.command_line import as_command
from domainbed_ext.system.exit_codes import ExitCode

_WARNING, _END = signal.SIGUSR2, signal.SIGTERM


class Task:
    """The job, in one of its starts.

    Args:
        path: of the launch's folder.
        number: of the job, in `jobs.json`.
        came: tells which signals have come.
    """

    def __init__(self, path: Path, number: int, came: Callable[[], set[int]]) -> None:
        content = json.loads((path / FOLDER / "jobs.json").read_text(encoding="utf-8"))
        self.launch, self.came = Launch(path), came
        self.slots, self.most = content["slots"], content["most"] or None
        self.options = read(LocalOptions, "local", content["local"])
        self.starts_before = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.name = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"  # no other job's
        self.commands = [Command(text) for text in content["jobs"][number]]
        self.moved = False  # whether a run got any further

    def work(self) -> ExitCode:
        """Has the runs done, as far as Slurm lets it.

        Returns:
            What became of them.
        """
        self.commands = [each for each in self.commands if not self._is_elsewhere(each.folder)]
        texts = [each.text for each in self.commands]
        slots = slots_here(texts, self.slots, self.options.jobs_per_gpu)[: self.most]
        try:
            codes = run_all(texts, slots, self._progress, self._has_to_stop, self.options)
        except KeyboardInterrupt:
            self._leave()
            return ExitCode.INTERRUPTED
        for command, code in zip(self.commands, codes, strict=True):
            self._tell(command, code)
        return ExitCode.FAILED if any(codes) else ExitCode.DONE

    def _is_elsewhere(self, folder: RunFolder | None) -> bool:
        """Whether another process is at a run, for whose end nobody should wait in an allocation."""
        if self.starts_before:  # the process may be this job's own, whose last heartbeat is not old enough yet
            return False
        if folder is None or folder.state is not State.RUNNING:
            return False
        print(f"{folder.path.name}: another process is at it")
        return True

    def _has_to_stop(self) -> bool:
        return self.launch.cancelled or bool(self.came())

    def _progress(self, index: int, share: float) -> None:
        self.moved |= share < 1
        if folder := self.commands[index].folder:
            self._note(folder).unlink(missing_ok=True)

    def _tell(self, command: Command, code: int) -> None:
        """Says in the log how a run ended, and in its folder if it died without a word."""
        folder = command.folder
        print(f"{folder.path.name if folder else command.text}: exit code {code}")
        if folder is None or code == ExitCode.DONE:
            return
        state, attempt = folder.look()
        if state in (State.INTERRUPTED, State.NOT_LAUNCHED) and not (attempt and attempt.ended):
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            folder.fail(f"the run {how} without a word", code)

    def _leave(self) -> None:
        """Sees to it that the runs come again, if they are to."""
        for number in (_WARNING, _END):  # requeueing ends all that is in the job, also what this is about to ask
            signal.signal(number, signal.SIG_IGN)
        if _WARNING in self.came() and _END not in self.came() and not self.launch.cancelled:
            if self.moved:
                subprocess.run(["scontrol", "requeue", self.name], check=False)
            else:
                print("the time of this job is too short for a single step")
        again = self._comes_again()
        folders = [command.folder for command in self.commands if command.folder]
        begun = [folder for folder in folders if folder.state is State.INTERRUPTED]
        for folder in folders:
            if not again:
                self._note(folder).unlink(missing_ok=True)
            elif folder in begun:
                self._note(folder).parent.mkdir(exist_ok=True)
                self._note(folder).touch()
        how = "this job is started again" if again else "they are launched again"
        print(f"{len(begun)} runs stopped, and go on when {how}")

    def _note(self, folder: RunFolder) -> Path:
        return self.launch.path / "requeued" / folder.path.name

    def _comes_again(self) -> bool:
        told = subprocess.run(["scontrol", "show", "job", self.name], capture_output=True, text=True, check=False)
        starts = re.search(r"\bRestarts=(\d+)", told.stdout)  # counted as soon as it is decided
        return starts is not None and int(starts[1]) > self.starts_before


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], set[int]]]:
    """Hears the signals that come, whoever handles them.

    Yields:
        What tells which ones came so far.
    """
    ours, theirs = socket.socketpair()
    heard: set[int] = set()

    def came() -> set[int]:
        with contextlib.suppress(BlockingIOError):
            heard.update(ours.recv(1024))
        return heard

    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno())
        for number in (_WARNING, _END):  # from now on they end nothing
            signal.signal(number, lambda *_: None)
        try:
            yield came
        finally:
            signal.set_wakeup_fd(-1)


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """The command that `job.sh` ends with."""
    parser = argparse.ArgumentParser(prog="python -m domainbed_ext.launchers.slurm_task", description=__doc__)
    parser.add_argument("launch", type=Path, help="the launch's folder")
    parser.add_argument("number", type=int, help="of the job in its jobs.json")
    args = parser.parse_args(argv)
    # Where Slurm does not bind processes to cores, all of the machine's seem to be theirs.
    os.environ.setdefault("LOKY_MAX_CPU_COUNT", os.environ["SLURM_CPUS_ON_NODE"])
    with signals() as came:
        return Task(args.launch, args.number, came).work()


if __name__ == "__main__":
    main()
