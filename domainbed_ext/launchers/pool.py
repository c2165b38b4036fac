"""A pool of warm workers on this machine, one in each slot.

A worker that dies (killed, out of memory, a crash in native code) costs the run it was at and nothing else: a fresh one
takes its place. A worker gives way to a fresh one too when it has done its share of runs or has grown too large, so
that a sweep of thousands of runs grows neither memory nor open files.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait

from domainbed_ext.launchers import memory
from domainbed_ext.launchers.options import option
from domainbed_ext.launchers.queue import Queue
from domainbed_ext.launchers.slots import Slot
from domainbed_ext.launchers.stopping import PATIENCE, Wish, stoppable
from domainbed_ext.launchers.worker import Worker
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.interrupts import GRACE

TICK = 0.5  # seconds at most from one look at everything to the next
TO_CHECKPOINT = 30.0  # seconds that a run has which takes too much memory
_GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """What a worker may take; options of every launcher that has workers on its machine."""

    memory_gb: float | None = option(None, "GiB that a run may take, all its processes together", above=0)
    runs_per_worker: int = option(100, "runs after which a worker is replaced by a fresh one", above=0)
    growth_gb: float = option(2.0, "GiB by which a worker may grow over its runs before it is replaced", above=0)


def run_all(
    commands: Sequence[str],
    slots: Sequence[Slot],
    progress: Callable[[int, float], None] = lambda index, share: None,
    cancelled: Callable[[], bool] = lambda: False,
    limits: Limits | None = None,
) -> list[int]:
    """Runs commands, as many at once as there are slots.

    A run that another launch is at is waited for, and gone on with if that leaves it. SIGINT, SIGTERM, SIGHUP and
    SIGUSR2 to this process, and cancelling, stop every run at a checkpoint; a second Ctrl-C does so at once.

    Args:
        commands: see `worker.run`.
        slots: where they run; at least one.
        progress: told a command's index and the share of it that is done; 1.0 when it ended, well or not.
        cancelled: asked every second whether to stop.
        limits: of the workers; None for the usual ones.

    Returns:
        Exit codes, in the order of the commands.

    Raises:
        KeyboardInterrupt: it was asked to stop. No worker is left.
    """
    queue = Queue(commands, progress)
    pool = _Pool(queue, slots, limits or Limits())
    with stoppable(cancelled) as wish:
        try:
            while not (queue.is_over or wish):
                pool.fill()
                pool.listen()
                pool.watch()
            pool.stop(wish)
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
        """The workers that are at a command."""
        return {number: worker for number, worker in self.workers.items() if worker.index is not None}

    def fill(self) -> None:
        """Gives everyone who is at nothing the next command."""
        busy = self.busy
        for number, slot in enumerate(self.slots):
            if number in busy:
                continue
            index = self.queue.take()
            if index is None:
                return
            while number not in self.workers or not self.workers[number].begin(index, self.queue.commands[index].text):
                self._bury(number)  # one that died at nothing costs no run
                self.workers[number] = Worker(slot.environment)

    def listen(self) -> None:
        """Hears what workers say, waiting a little for the first word."""
        busy = self.busy
        ready = wait([worker.pipe for worker in busy.values()], TICK)
        for number, worker in busy.items():
            # A process that a dead worker left behind keeps its pipe open.
            if worker.pipe in ready or worker.is_dead:
                self._hear(number, worker)

    def _hear(self, number: int, worker: Worker) -> None:
        index, verdict, told_to_stop = worker.index or 0, worker.verdict, worker.told_to_stop
        try:
            if worker.is_dead and not worker.pipe.poll():
                raise EOFError
            share, code = worker.pipe.recv()
            if code is None:
                self.queue.progress(index, share)
                return
            worker.rest()
            limits = self.limits
            if told_to_stop or worker.done >= limits.runs_per_worker or worker.growth() > limits.growth_gb * _GIB:
                self._bury(number)
        except (EOFError, OSError):
            code = self._bury(number) or ExitCode.FAILED
        cut_short = told_to_stop and (code < 0 or code == ExitCode.INTERRUPTED)
        if cut_short and verdict is not None:
            self.queue.fail(index, verdict)
        else:
            self.queue.end(index, ExitCode.INTERRUPTED if cut_short else code)

    def watch(self) -> None:
        """Ends what takes too long or too much memory."""
        now = time.monotonic()
        for worker in self.busy.values():
            minutes = self.queue.commands[worker.index or 0].minutes
            late = minutes and now > worker.since + 60 * minutes + 2 * GRACE  # native code hears no watchdog of its own
            if late and not worker.told_to_stop:
                worker.stop(f"it took longer than its time limit of {minutes:g} minutes and did not stop")
            if worker.kill_at is not None and now > worker.kill_at:
                worker.kill()
        if self.limits.memory_gb is not None and now > self._next_weighing:
            self._weigh(self.limits.memory_gb)
            took = time.monotonic() - now
            self._next_weighing = now + max(1.0, 20 * took)  # where there are many processes, less often

    def _weigh(self, limit: float) -> None:
        workers = {worker.pid: worker for worker in self.busy.values() if not worker.told_to_stop}
        for pid, held in memory.held(workers).items():
            if held > limit * _GIB:
                sentence = f"it took {held / _GIB:.2f} GiB of memory, above memory_gb={limit:g}: raise that limit"
                # What runs before it left behind in the worker is not its fault: it gets a fresh one then.
                worker = workers[pid]
                blameless = worker.done and self.queue.commands[worker.index or 0].folder is not None
                worker.stop(None if blameless else sentence, TO_CHECKPOINT)

    def stop(self, wish: Wish) -> None:
        """Has every run write a checkpoint and leave, and waits for that."""
        for worker in self.busy.values():
            worker.stop()
        until = time.monotonic() + PATIENCE
        while self.busy and time.monotonic() < until and not wish.at_once:
            self.listen()

    def close(self) -> None:
        """Ends all workers, those that are at something by force."""
        for worker in self.busy.values():
            worker.kill()
        for number in list(self.workers):
            self._bury(number)

    def _bury(self, number: int) -> int:
        worker = self.workers.pop(number, None)
        return 0 if worker is None else worker.bury()
