"""Runs as tasks of a Ray cluster, which gives each its cores and its share of a GPU.

Of Ray, its core alone is used. What became of a run, and how far it is, is read from its folder, so all machines have
to share the file system that it is on. Ray's processes are warm: each takes one run after the other.
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
from domainbed_ext.launchers import execute as worker
from domainbed_ext.launchers import options as settings
from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.launches import Launch
from domainbed_ext.launchers.options import option
from domainbed_ext.launchers.queue import Queue
from domainbed_ext.launchers.stopping import PATIENCE, Wish, stoppable
from domainbed_ext.system.attempts import latest
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.interrupts import GRACE
from domainbed_ext.system.machine import available_cores

TICK = 0.5  # seconds at most from one look at Ray to the next
LOOK = 5.0  # seconds from one look at the runs' folders to the next
_AT_A_LOOK = 100  # folders


@dataclass(frozen=True)
class RayOptions:
    """The options of launcher `ray`."""

    address: str | None = option(None, "of a cluster, e.g. auto; else that in RAY_ADDRESS, else one of this machine")
    num_gpus: float | None = option(None, "GPUs of a run (1 / jobs_per_gpu if the cluster has any, else 0)", least=0)
    num_cpus: float | None = option(None, "cores of a run (its --threads)", least=0)
    jobs_per_gpu: int = option(1, "runs side by side on each GPU", above=0)
    max_retries: int = option(3, "times that a run whose process or machine is lost is started again", least=0)
    runs_per_worker: int = option(100, "runs after which a process of Ray's is replaced by a fresh one", above=0)


def ray(commands: Sequence[str], launch: Launch) -> list[int]:
    """Runs commands as tasks of a Ray cluster, at most `launch.parallel` at once.

    See `domainbed_ext.launchers.Launcher`; `RayOptions` are its options.
    """
    options = settings.read(RayOptions, "ray", launch.options)
    queue = Queue(commands, launch.progress)
    with _connected(options.address) as (engine, is_own), stoppable(lambda: launch.cancelled) as wish:
        tasks = _Tasks(engine, queue, options, launch.parallel)
        tasks.check_room(may_grow=not is_own)
        try:
            while not (queue.is_over or wish):
                tasks.submit()
                tasks.collect()
                tasks.look()
        finally:
            tasks.stop(wish)
    return queue.results


class _Tasks:
    """The runs that Ray has.

    Args:
        engine: Ray.
        queue: of the launch.
        options: of the launcher.
        parallel: tasks at once; 0 for as many as there are, so that a cluster that can grow knows.
    """

    def __init__(self, engine: Any, queue: Queue, options: RayOptions, parallel: int) -> None:
        self.engine, self.queue, self.options = engine, queue, options
        self.parallel = parallel or len(queue.commands)
        self.indices: dict[Any, int] = {}  # by Ray's reference
        self._lost: Counter[int] = Counter()
        self._next_look, self._turn = 0.0, 0
        # Ray would start a process anew for each task that uses a GPU. Lost ones are started again from here, where a
        # run's folder is looked at first.
        self._task = engine.remote(max_calls=options.runs_per_worker, max_retries=0)(_task)
        share = 1 / options.jobs_per_gpu if engine.cluster_resources().get("GPU") else 0.0
        self._gpus = share if options.num_gpus is None else options.num_gpus

    def check_room(self, may_grow: bool) -> None:
        """Looks for a machine that the runs fit on, as Ray silently waits for one.

        Args:
            may_grow: machines may yet come, so that it is only said.

        Raises:
            BenchmarkError: there is none.
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
            print(f"{sentence}: it waits until one comes", file=sys.stderr)

    def _needs(self, command: Command) -> dict[str, float]:
        cpus = self.options.num_cpus
        return {"num_cpus": command.threads if cpus is None else cpus, "num_gpus": self._gpus}

    def submit(self) -> None:
        """Hands over what is next."""
        while len(self.indices) < self.parallel and (index := self.queue.take()) is not None:
            command = self.queue.commands[index]
            reference = self._task.options(**self._needs(command)).remote(command.text, os.getcwd())
            self.indices[reference] = index

    def collect(self) -> None:
        """Takes note of what ended, waiting a little for the first."""
        if not self.indices:
            time.sleep(TICK)
            return
        ready, _ = self.engine.wait(list(self.indices), timeout=TICK)
        if ready:
            ready, _ = self.engine.wait(list(self.indices), num_returns=len(self.indices), timeout=0)
        for reference in ready:
            self._take_in(self.indices.pop(reference), reference)

    def _take_in(self, index: int, reference: Any) -> None:
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
                self.queue.again(index)
            else:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                self.queue.fail(index, f"Ray lost it {self._lost[index]} times, at last by {reason}")

    def look(self) -> None:
        """Tells how far runs are, as their folders have it; of very many, some at a time."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK
        indices = list(self.indices.values())
        start = self._turn % max(1, len(indices))
        self._turn = start + _AT_A_LOOK
        for index in itertools.islice([*indices[start:], *indices[:start]], _AT_A_LOOK):
            folder = self.queue.commands[index].folder
            attempt = latest(folder.path) if folder else None
            if attempt and attempt.share:
                self.queue.progress(index, min(attempt.share, 0.999))

    def stop(self, wish: Wish) -> None:
        """Has every run write a checkpoint and leave, and waits for that; then ends those that have not."""
        for reference in self.indices:
            self.engine.cancel(reference)
        until = time.monotonic() + PATIENCE
        left = list(self.indices)
        while left and time.monotonic() < until and not wish.at_once:
            _, left = self.engine.wait(left, num_returns=len(left), timeout=TICK)
        for reference in left:
            self.engine.cancel(reference, force=True)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[tuple[Any, bool]]:
    """Ray, connected to a cluster: the one this process is connected to, the one told, or one of this machine.

    Args:
        address: told.

    Yields:
        Ray, and whether the cluster was started here.
    """
    try:
        import ray as engine
    except ImportError as error:
        raise BenchmarkError("launcher ray needs Ray: pip install 'vitlorafa[ray]'") from error
    if engine.is_initialized():
        yield engine, False
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    of_its_own: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        of_its_own = {"num_cpus": available_cores(), "include_dashboard": False, "object_store_memory": 2**27}
    before = signal.getsignal(signal.SIGTERM)
    # Ray's threads print to stdout what Ray's own processes say.
    with open(os.devnull, "w", encoding="utf-8", errors="replace") as nothing, contextlib.redirect_stdout(nothing):
        try:
            _check_reachable(address)
            engine.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **of_its_own)
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise BenchmarkError(f"cannot connect to a Ray cluster at {address}: {reason}") from error
        try:
            yield engine, bool(of_its_own)
        finally:
            engine.shutdown()
            signal.signal(signal.SIGTERM, before)  # Ray put its own there


def _check_reachable(address: str) -> None:
    """Asks a machine that is named whether anybody is there, for Ray would ask for minutes.

    Args:
        address: of a cluster.

    Raises:
        OSError: nobody is.
    """
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host, int(port)), 10).close()


_devices_of_cuda: str | None = None  # those that this process, one of Ray's, has used


def _task(text: str, place: str) -> int:
    """What Ray runs in one of its processes, in the main thread: so a run hears signals there as anywhere.

    Args:
        text: a command.
        place: the launcher's working directory.

    Returns:
        The exit code.
    """
    global _devices_of_cuda
    # Ray stops a task by an interrupt, to which it is deaf if a script put the launcher into the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(OSError):  # where there is none, paths may still be absolute
        os.chdir(place)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _devices_of_cuda not in (None, devices):  # Ray moved the process to another GPU, and CUDA cannot follow
        return worker.run_apart(text)
    minutes = Command(text).minutes
    if minutes:  # for native code that does not let go of the interpreter, and so of the run's own watchdog
        faulthandler.dump_traceback_later(60 * minutes + 2 * GRACE, exit=True, file=2)
    try:
        return worker.run(text)
    finally:
        faulthandler.cancel_dump_traceback_later()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            _devices_of_cuda = devices
