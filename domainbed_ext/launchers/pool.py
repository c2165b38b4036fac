"""A pool of warm workers on this machine, one in each slot.

A worker that dies (killed, out of memory, a crash in native code) costs the run that it was executing and nothing else:
a new worker takes its place. A worker is also replaced after a number of runs, or when it has grown too large, so that
a sweep of thousands of runs grows neither memory nor open files.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait

from domainbed_ext.launchers import memory
from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.options import option
from domainbed_ext.launchers.queue import Queue
from domainbed_ext.launchers.slots import Slot
from domainbed_ext.launchers.stopping import PATIENCE, StopRequest, stop_request
from domainbed_ext.launchers.worker import Worker
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.interrupts import GRACE
from domainbed_ext.system.sizes import GB, format_size

TICK = 0.5  # seconds at most from one look at everything to the next
TO_CHECKPOINT = 30.0  # seconds to write a checkpoint for a run that takes too much memory


@dataclass(frozen=True)
class Limits:
    """What a worker may take; options of every launcher that has workers on its machine."""

    memory_gb: float | None = option(None, "memory limit of a run in GB, all its processes together", above=0)
    runs_per_worker: int = option(100, "number of runs after which a worker is replaced", above=0)
    growth_gb: float = option(2.0, "growth of a worker's memory in GB after which it is replaced", above=0)


def run_all(
    commands: Sequence[Command],
    slots: Sequence[Slot],
    progress: Callable[[int, float], None] = lambda index, share: None,
    cancelled: Callable[[], bool] = lambda: False,
    limits: Limits | None = None,
) -> list[int]:
    """Runs commands, as many at once as there are slots.

    It waits for a run that another launch works on, and resumes the run if that launch leaves it. SIGINT, SIGTERM,
    SIGHUP and SIGUSR2 to this process, and cancelling, stop every run at a checkpoint; a second Ctrl-C stops at once.

    Args:
        commands: Commands, see `execute.run`.
        slots: Where they run; at least one.
        progress: Callback that takes a command's index and the share of it that is done; 1.0 when it ended, whether or
            not it failed.
        cancelled: Callback that tells whether to stop; called every second.
        limits: Limits of the workers; None for the defaults.

    Returns:
        Exit codes, in the order of the commands.

    Raises:
        KeyboardInterrupt: It was asked to stop. No worker is left.
    """
    queue = Queue(commands, progress)
    pool = _Pool(queue, slots, limits or Limits())
    with stop_request(cancelled) as request:
        try:
            while not (queue.is_over or request):
                pool.fill()
                pool.listen()
                pool.watch()
            pool.stop(request)
        finally:
            pool.close()
    return queue.results


class _Pool:
    def __init__(self, queue: Queue, slots: Sequence[Slot], limits: Limits) -> None:
        self.queue, self.slots, self.limits = queue, slots, limits
        self.workers: dict[int, Worker] = {}  # by number of the slot
        self._next_weighing = 0.0

    @property
    def busy(self) -> dict[int, Worker]:
        """The workers that execute a command."""
        return {number: worker for number, worker in self.workers.items() if worker.index is not None}

    def fill(self) -> None:
        """Gives each idle worker the next command."""
        busy = self.busy
        for number, slot in enumerate(self.slots):
            if number in busy:
                continue
            index = self.queue.take()
            if index is None:
                return
            while number not in self.workers or not self.workers[number].begin(index, self.queue.commands[index]):
                self._wait_for_exit(number)  # one that died while idle costs no run
                self.workers[number] = Worker(slot.environment)

    def listen(self) -> None:
        """Receives what workers report, waiting a little for the first report."""
        busy = self.busy
        ready = wait([worker.pipe for worker in busy.values()], TICK)
        for number, worker in busy.items():
            # A process that an exited worker left behind keeps its pipe open.
            if worker.pipe in ready or worker.has_exited:
                self._receive(number, worker)

    def _receive(self, number: int, worker: Worker) -> None:
        index, verdict, is_stopping = worker.index or 0, worker.verdict, worker.is_stopping
        try:
            if worker.has_exited and not worker.pipe.poll():
                raise EOFError
            share, code = worker.pipe.recv()
            if code is None:
                self.queue.progress(index, share)
                return
            worker.become_idle()
            limits = self.limits
            if is_stopping or worker.done >= limits.runs_per_worker or worker.measure_growth() > limits.growth_gb * GB:
                self._wait_for_exit(number)
        except (EOFError, OSError):
            code = self._wait_for_exit(number) or ExitCode.FAILED
        cut_short = is_stopping and (code < 0 or code == ExitCode.INTERRUPTED)
        if cut_short and verdict is not None:
            self.queue.fail(index, verdict)
        else:
            self.queue.end(index, ExitCode.INTERRUPTED if cut_short else code)

    def watch(self) -> None:
        """Stops commands that take too long or too much memory."""
        now = time.monotonic()
        for worker in self.busy.values():
            minutes = self.queue.commands[worker.index or 0].minutes
            late = minutes and now > worker.since + 60 * minutes + 2 * GRACE  # the run's own timer needs Python to run
            if late and not worker.is_stopping:
                worker.stop(f"it took longer than its time limit of {minutes:g} minutes and did not stop")
            if worker.kill_at is not None and now > worker.kill_at:
                worker.kill()
        if self.limits.memory_gb is not None and now > self._next_weighing:
            self._weigh(self.limits.memory_gb)
            took = time.monotonic() - now
            self._next_weighing = now + max(1.0, 20 * took)  # where there are many processes, less often

    def _weigh(self, limit: float) -> None:
        workers = {worker.pid: worker for worker in self.busy.values() if not worker.is_stopping}
        for pid, size in memory.measure_families(workers).items():
            if size > limit * GB:
                reason = f"it took {format_size(size)} of memory, above memory_gb={limit:g}: raise that limit"
                # Earlier runs may have left memory behind in the worker: the run gets a second chance in a new one.
                worker = workers[pid]
                blameless = worker.done and self.queue.commands[worker.index or 0].folder is not None
                worker.stop(None if blameless else reason, TO_CHECKPOINT)

    def stop(self, request: StopRequest) -> None:
        """Has every run write a checkpoint and exit, and waits for that.

        Args:
            request: Request to stop, which may become one to stop at once.
        """
        for worker in self.busy.values():
            worker.stop()
        until = time.monotonic() + PATIENCE
        while self.busy and time.monotonic() < until and not request.at_once:
            self.listen()

    def close(self) -> None:
        """Ends all workers; kills those that are busy."""
        for worker in self.busy.values():
            worker.kill()
        for number in list(self.workers):
            self._wait_for_exit(number)

    def _wait_for_exit(self, number: int) -> int:
        worker = self.workers.pop(number, None)
        return 0 if worker is None else worker.wait_for_exit()
