"""The launcher `ray`: runs as tasks of a Ray cluster, which gives each its cores and its share of a GPU.

Only Ray's core is used. The state and progress of a run are read from its folder, so all machines have to share the
file system that it is on. Ray's processes are warm: each takes one run after the other.
"""

import contextlib
import faulthandler
import itertools
import logging
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers import execute
from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.launch import Launch
from domainbed_ext.launchers.launcher import Launcher
from domainbed_ext.launchers.options import option
from domainbed_ext.launchers.queue import Queue
from domainbed_ext.launchers.registry import register_launcher
from domainbed_ext.launchers.stopping import PATIENCE, StopRequest, stop_request
from domainbed_ext.system.attempts import read_latest
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.interrupts import GRACE
from domainbed_ext.system.machine import count_available_cores

TICK = 0.5  # seconds at most from one look at Ray to the next
INTERVAL = 5.0  # seconds from one look at the runs' folders to the next
_FOLDERS = 100  # folders per look


@dataclass(frozen=True)
class RayOptions:
    """Options of launcher `ray`."""

    address: str | None = option(
        None, "address of a cluster, e.g. auto (RAY_ADDRESS, else a cluster started on this machine)"
    )
    num_gpus: float | None = option(None, "GPUs per run (1 / jobs_per_gpu if the cluster has any, else 0)", least=0)
    num_cpus: float | None = option(None, "cores per run (its --threads)", least=0)
    jobs_per_gpu: int = option(1, "parallel runs on each GPU", above=0)
    max_retries: int = option(3, "number of restarts of a run whose process or machine is lost", least=0)
    runs_per_worker: int = option(100, "number of runs after which a Ray worker is replaced", above=0)


@register_launcher("ray")
class Ray(Launcher):
    """Runs commands as tasks of a Ray cluster, at most `launch.parallel` at once."""

    OPTIONS = RayOptions

    def run(self, commands: Sequence[Command], launch: Launch) -> list[int]:
        """Runs commands to their end; see `Launcher.run`."""
        options = self.read_options(launch.options)
        queue = Queue(commands, launch.progress)
        with _connected(options.address) as (engine, is_own), stop_request(lambda: launch.cancelled) as request:
            tasks = _Tasks(engine, queue, options, launch.parallel)
            tasks.check_room(may_grow=not is_own)
            try:
                while not (queue.is_over or request):
                    tasks.submit()
                    tasks.collect()
                    tasks.look()
            finally:
                tasks.stop(request)
        return queue.results


class _Tasks:
    """The runs that Ray has.

    Args:
        engine: Module of Ray, connected to a cluster.
        queue: Queue of the launch.
        options: Options of the launcher.
        parallel: Number of tasks at once; 0 for as many as there are, so that a cluster that can grow does so.
    """

    def __init__(self, engine: Any, queue: Queue, options: RayOptions, parallel: int) -> None:
        self.engine, self.queue, self.options = engine, queue, options
        self.parallel = parallel or len(queue.commands)
        self.indices: dict[Any, int] = {}  # by Ray's reference
        self._lost: Counter[int] = Counter()
        self._next_look, self._turn = 0.0, 0
        # By default Ray starts a new process for each task that uses a GPU. Lost tasks are started again from here,
        # where a run's folder is looked at first.
        self._task = engine.remote(max_calls=options.runs_per_worker, max_retries=0)(_task)
        share = 1 / options.jobs_per_gpu if engine.cluster_resources().get("GPU") else 0.0
        self._gpus = share if options.num_gpus is None else options.num_gpus

    def check_room(self, may_grow: bool) -> None:
        """Looks for a machine that the runs fit on, for Ray would silently wait for one.

        Args:
            may_grow: Whether machines may yet come, so that a warning will do.

        Raises:
            BenchmarkError: There is none.
        """
        if self._gpus > 1 and self._gpus % 1:
            raise BenchmarkError(
                f"option num_gpus of launcher ray is {self._gpus:g}: give whole GPUs, or a part of one"
            )
        machines = [node["Resources"] for node in self.engine.nodes() if node["Alive"]]
        for cpus, gpus in {tuple(self._needs(command).values()) for command in self.queue.commands}:
            if any(machine.get("CPU", 0) >= cpus and machine.get("GPU", 0) >= gpus for machine in machines):
                continue
            sentence = f"no machine of the Ray cluster has the {cpus:g} cores and {gpus:g} GPUs of a run"
            if not may_grow:
                raise BenchmarkError(f"{sentence}: lower num_cpus or num_gpus")
            print(f"warning: {sentence}: it waits until one comes", file=sys.stderr)

    def _needs(self, command: Command) -> dict[str, float]:
        cpus = self.options.num_cpus
        return {"num_cpus": command.threads if cpus is None else cpus, "num_gpus": self._gpus}

    def submit(self) -> None:
        """Submits the commands that are next."""
        while len(self.indices) < self.parallel and (index := self.queue.take()) is not None:
            command = self.queue.commands[index]
            reference = self._task.options(**self._needs(command)).remote(command, os.getcwd())
            self.indices[reference] = index

    def collect(self) -> None:
        """Records the tasks that ended, waiting a little for the first."""
        if not self.indices:
            time.sleep(TICK)
            return
        ready, _ = self.engine.wait(list(self.indices), timeout=TICK)
        if ready:
            ready, _ = self.engine.wait(list(self.indices), num_returns=len(self.indices), timeout=0)
        for reference in ready:
            self._record(self.indices.pop(reference), reference)

    def _record(self, index: int, reference: Any) -> None:
        errors = self.engine.exceptions
        try:
            self.queue.end(index, self.engine.get(reference))
        except errors.TaskCancelledError:
            self.queue.end(index, ExitCode.INTERRUPTED)
        except errors.RayTaskError as error:  # raised in the task, e.g. since this package is not installed there
            self.queue.fail(index, f"{type(error.cause).__name__}: {error.cause}")
        except errors.RayError as error:  # the process is lost, or its machine
            self._lost[index] += 1
            if self._lost[index] <= self.options.max_retries:
                self.queue.start_again(index)
            else:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                self.queue.fail(index, f"Ray lost it {self._lost[index]} times, the last time by {reason}")

    def look(self) -> None:
        """Reports the progress that runs note in their folders; of very many runs, some at a time."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + INTERVAL
        indices = list(self.indices.values())
        start = self._turn % max(1, len(indices))
        self._turn = start + _FOLDERS
        for index in itertools.islice([*indices[start:], *indices[:start]], _FOLDERS):
            folder = self.queue.commands[index].folder
            attempt = read_latest(folder.path) if folder else None
            if attempt and attempt.share:
                self.queue.progress(index, min(attempt.share, 0.999))

    def stop(self, request: StopRequest) -> None:
        """Has every run write a checkpoint and exit, and waits for that; then kills those that have not.

        Args:
            request: Request to stop, which may become one to stop at once.
        """
        for reference in self.indices:
            self.engine.cancel(reference)
        until = time.monotonic() + PATIENCE
        left = list(self.indices)
        while left and time.monotonic() < until and not request.at_once:
            _, left = self.engine.wait(left, num_returns=len(left), timeout=TICK)
        for reference in left:
            self.engine.cancel(reference, force=True)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[tuple[Any, bool]]:
    """Connects Ray to a cluster: the one this process is connected to, the one at `address`, or one of this machine.

    Args:
        address: Address of a cluster; None for RAY_ADDRESS, else a cluster that is started here.

    Yields:
        Module of Ray, and whether the cluster was started here.
    """
    try:
        import ray as engine
    except ImportError as error:
        raise BenchmarkError("launcher ray needs Ray: pip install 'vitlorafa[ray]'") from error
    if engine.is_initialized():
        yield engine, False
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    own_cluster: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own_cluster = {"num_cpus": count_available_cores(), "include_dashboard": False, "object_store_memory": 2**27}
    before = signal.getsignal(signal.SIGTERM)
    # Ray's threads print to stdout what Ray's own processes say.
    with open(os.devnull, "w", encoding="utf-8", errors="replace") as nothing, contextlib.redirect_stdout(nothing):
        try:
            _check_reachable(address)
            engine.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own_cluster)
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise BenchmarkError(
                f"cannot connect to a Ray cluster at {address} ({reason}): start it, or give its address by option "
                "address of launcher ray"
            ) from error
        try:
            yield engine, bool(own_cluster)
        finally:
            engine.shutdown()
            signal.signal(signal.SIGTERM, before)  # Ray put its own there


def _check_reachable(address: str) -> None:
    """Checks that a machine that is named answers, for Ray would try for minutes.

    Args:
        address: Address of a cluster.

    Raises:
        OSError: It does not answer.
    """
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host, int(port)), 10).close()


_devices_of_cuda: str | None = None  # devices that this process, one of Ray's, has used


def _task(command: Command, place: str) -> int:
    """Runs a command in a process of Ray's, in its main thread, so that a run can handle signals.

    Args:
        command: The command.
        place: Working directory of the launcher.

    Returns:
        The exit code.
    """
    global _devices_of_cuda
    # Ray stops a task by SIGINT, which is ignored if a script put the launcher into the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(OSError):  # where there is none, paths may still be absolute
        os.chdir(place)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _devices_of_cuda not in (None, devices):  # Ray moved the process to another GPU, and CUDA cannot follow
        return execute.run_in_shell(command.text)
    if command.minutes:  # for native code that holds the interpreter, so that the run's own timer cannot act
        faulthandler.dump_traceback_later(60 * command.minutes + 2 * GRACE, exit=True, file=2)
    try:
        return execute.run(command)
    finally:
        faulthandler.cancel_dump_traceback_later()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            _devices_of_cuda = devices
