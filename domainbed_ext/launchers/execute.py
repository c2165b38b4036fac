"""Runs commands in this process, one after the other: what a worker of any launcher does.

A run of ours takes place right here, so that torch is imported once and not once a run; any other command is a
process of its own. Whoever sends this process SIGTERM stops what it is at: a run writes a checkpoint and leaves.
"""

import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from types import FrameType

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers.command import Command
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.interrupts import SIGNALS, handling, unignored

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


def run(command: str, progress: Callable[[float], None] = lambda share: None) -> int:
    """Runs a command to its end.

    Args:
        command: of the shell. `python -m domainbed_ext.train ...` runs in this process, if it is not done already.
        progress: told the share of a run's steps that are done. A run can do without, so nothing that it raises ends
            one.

    Returns:
        The exit code (see `ExitCode`), a negative one for the signal that ended it.
    """
    made = Command(command)
    return run_apart(command) if made.run_words is None else _run_here(made, progress)


def die_with_parent() -> None:
    """Has the kernel send this process SIGTERM when its parent ends, however that ends. Linux alone can."""
    if _LIBRARY is not None:
        _LIBRARY.prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)


def _run_here(command: Command, progress: Callable[[float], None]) -> int:
    from domainbed_ext import train
    from domainbed_ext.runs import arguments as options
    from domainbed_ext.runs.folder import State

    def tell(share: float) -> None:
        with contextlib.suppress(Exception):
            progress(share)

    folder = command.folder
    if folder is not None and folder.state is State.DONE:
        return ExitCode.DONE
    _pass_over_imports()
    _forget_the_last_run()
    with (
        open(os.devnull, "w", encoding="utf-8", errors="replace") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        try:
            return train.run(options.parse(command.run_words), tell)
        except BenchmarkError as error:
            sentence, code = str(error), ExitCode.BAD_INPUT
        except Exception as error:
            sentence, code = f"{type(error).__name__}: {error}", ExitCode.FAILED
    if folder is not None and folder.state not in (State.DONE, State.RUNNING):
        folder.fail(sentence, code)
    return code


@cache
def _pass_over_imports() -> None:
    """Spares the collector what was imported, which stays, and which to look through takes a third of a second."""
    gc.collect()
    gc.freeze()


def _forget_the_last_run() -> None:
    """Gives back the memory of a run before this one, and forgets how much that was at its height."""
    from torch import cuda

    gc.collect()
    if cuda.is_initialized():
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()


def run_apart(command: str) -> int:
    """Runs a command by the shell, in a session of its own, to all of which a wish to stop is handed on.

    Args:
        command: of the shell.

    Returns:
        The exit code, a negative one for the signal that ended it.
    """
    process: subprocess.Popen[bytes] | None = None
    wanted = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal wanted
        wanted = True
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    with handling(unignored(SIGNALS), stop):
        process = subprocess.Popen(command, shell=True, start_new_session=True, preexec_fn=die_with_parent)
        if wanted:  # while it was being made
            stop(signal.SIGTERM, None)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(1.0)  # what comes from another thread (Ray's) is heeded when this returns
