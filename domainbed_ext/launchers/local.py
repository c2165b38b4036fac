"""Runs on this machine, in a pool of warm workers: each imports torch once, not once a run.

A worker that dies (killed, out of memory, a crash in native code) costs the run it was at and nothing else: a
fresh one takes its place.
"""

import contextlib
import multiprocessing
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

_OURS = ("-m", "domainbed_ext.train")


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    command: int | None = None  # index of what it is at


def local(commands: Sequence[str], jobs: int, progress: Callable[[int, float], None]) -> list[int]:
    """Runs commands side by side; see `domainbed_ext.launchers.Launcher`.

    Args:
        commands: `python -m domainbed_ext.train ...`, which run inside warm workers; any other command runs as a
            process of its own.
        jobs: how many at once; 0 for one a processor core, or one in all where there is a GPU to share.
        progress: told each command's index and the share of it that is done.

    Returns:
        Exit codes, in the order of the commands.
    """
    codes = [0] * len(commands)
    waiting = list(reversed(range(len(commands))))
    jobs = jobs or (1 if torch.cuda.is_available() else available_cores())
    workers = [_start() for _ in range(min(jobs, len(commands)))]
    try:
        while waiting or any(worker.command is not None for worker in workers):
            for worker in workers:
                if worker.command is None and waiting:
                    worker.command = waiting.pop()
                    with contextlib.suppress(OSError):  # it died just now: its pipe tells below
                        worker.pipe.send(commands[worker.command])
            busy = [worker for worker in workers if worker.command is not None]
            ready = wait([worker.pipe for worker in busy])
            for worker in busy:
                if worker.pipe not in ready or worker.command is None:
                    continue
                try:
                    share, code = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    share, code = 1.0, worker.process.exitcode or 1
                    workers[workers.index(worker)] = _start()
                progress(worker.command, share)
                if code is not None:
                    codes[worker.command] = code
                    worker.command = None
    finally:
        for worker in workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
    return codes


def available_cores() -> int:
    """Cores this process may use, which in a container or under Slurm are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start() -> _Worker:
    context = multiprocessing.get_context("spawn")  # a forked torch with threads or CUDA may hang
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,))
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _work(pipe: Connection) -> None:
    """A worker: takes commands, sends (share done, None) along the way and (1.0, exit code) at the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to handle
    with (
        open(os.devnull, "w") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        while True:
            try:
                words = shlex.split(pipe.recv())
            except EOFError:
                return
            if tuple(words[1:3]) == _OURS:
                from domainbed_ext import options, train
                from domainbed_ext.errors import BenchmarkError

                try:
                    args = options.make_parser().parse_args(words[3:])
                    code = train.run(args, lambda share: pipe.send((min(share, 0.999), None)))
                except BenchmarkError:
                    code = 2
            else:
                code = subprocess.call(words)
            pipe.send((1.0, code))
