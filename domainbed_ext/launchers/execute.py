"""Runs commands in this process, one after the other: what a worker of any launcher does.

A run takes place in this process, so that torch is imported once and not once per run; any other command is a process
of its own. SIGTERM to this process stops its command: a run writes a checkpoint and exits.
"""

import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers.command import Command
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.system import garbage
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.interrupts import SIGNALS, handling, unignored

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


def run(command: Command, progress: Callable[[float], None] = lambda share: None) -> int:
    """Runs a command to its end.

    Args:
        command: The command; a run takes place in this process, unless it is done already.
        progress: Callback that takes the share of a run's steps that are done. A run can do without it, so whatever it
            raises is ignored.

    Returns:
        The exit code (see `ExitCode`), a negative one for the signal that ended it.
    """
    if command.argv is None or command.folder is None:
        return run_in_shell(command.text)
    return _run_here(command.argv, command.folder, progress)


def die_with_parent() -> None:
    """Has the kernel send this process SIGTERM when its parent ends, however that ends. Only Linux can."""
    if _LIBRARY is not None:
        _LIBRARY.prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)


def _run_here(argv: Sequence[str], folder: RunFolder, progress: Callable[[float], None]) -> int:
    with garbage.loading():
        from domainbed_ext import train
        from domainbed_ext.runs import arguments
        from domainbed_ext.runs import training as _  # noqa: F401  (torch and all that a run takes)

    def report(share: float) -> None:
        with contextlib.suppress(Exception):
            progress(share)

    if folder.state is State.DONE:
        return ExitCode.DONE
    _free_memory()
    with (
        open(os.devnull, "w", encoding="utf-8", errors="replace") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        try:
            return train.run(arguments.parse(argv), report)
        except BenchmarkError as error:
            sentence, code = str(error), ExitCode.BAD_INPUT
        except Exception as error:
            sentence, code = f"{type(error).__name__}: {error}", ExitCode.FAILED
    if folder.state not in (State.DONE, State.RUNNING):
        folder.fail(sentence, code)
    return code


def _free_memory() -> None:
    """Frees the memory of the run before this one, and resets its peak."""
    from torch import cuda

    gc.collect()
    if cuda.is_initialized():
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()


def describe_exit(code: int) -> str:
    """Describes how a run ended that left no message, as a reason for its failure.

    Args:
        code: Exit code, a negative one for the signal that ended it.
    """
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"the run {how}, and left no message"


def run_in_shell(text: str) -> int:
    """Runs a command by the shell, in a session of its own, to all of which a request to stop is passed on.

    Args:
        text: Command of the shell.

    Returns:
        The exit code, a negative one for the signal that ended it.
    """
    process: subprocess.Popen[bytes] | None = None
    is_stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        is_stopping = True
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    with handling(unignored(SIGNALS), stop):
        process = subprocess.Popen(text, shell=True, start_new_session=True, preexec_fn=die_with_parent)
        if is_stopping:  # the signal came while the process was being started
            stop(signal.SIGTERM, None)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(1.0)  # a signal from another thread (Ray's) is handled when this returns
