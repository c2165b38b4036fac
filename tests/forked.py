"""Commands in processes that are forked from a server which has imported everything once.

An interpreter of its own spends four seconds of processor time on importing torch, torchvision and timm.
"""

import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from domainbed_ext.system import processes

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"),
        *("sklearn.linear_model", "timm", "torchvision.datasets", "torchvision.transforms.v2"),
        *(f"domainbed_ext.{name}.command" for name in ("analyse", "cache", "prepare", "sweep")),
        *(
            f"domainbed_ext.{name}"
            for name in (
                "bench.__main__",
                "collect_results",
                "compare",
                "evaluate",
                "frontier",
                "predict",
                "pretrain",
                "soup",
            )
        ),
        *("domainbed_ext.launchers.pool", "vitlorafa.bench.__main__"),
        *("tests.terminal", "tests.domainbed_ext.fault_injection"),
    ]
)


def run(words, *, env=None, cwd=None, text=False, check=False, timeout=300, capture_output=True):
    """As `subprocess.run` with `capture_output`, of a module, a script or code that this interpreter is to run.

    Args:
        words: Command, of which the first is this interpreter and has no options.
        env: Variables in place of this process's. Those that are read while torch is imported have no effect.
        cwd: Folder that it runs in.
        text: Whether its output is text.
        check: Whether an exit code other than 0 is an error.
        timeout: Seconds.
        capture_output: True.
    """
    assert words[0] == sys.executable and capture_output
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "out"), Path(folder, "err")
        variables = dict(os.environ if env is None else env)
        arguments = ([str(word) for word in words[1:]], variables, str(cwd or os.getcwd()), outputs)
        process = CONTEXT.Process(target=_work, args=arguments)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        out, err = (path.read_text() if text else path.read_bytes() for path in outputs)
    assert not check or process.exitcode == 0, err
    return subprocess.CompletedProcess(words, process.exitcode, out, err)


class Helper(ForkServerProcess):
    """What `HELPERS.Process` is (`domainbed_ext.system.processes`), forked from the server."""

    def start(self):
        self.variables = dict(os.environ)
        super().start()

    def run(self):
        os.environ.clear()
        os.environ.update(self.variables)
        multiprocessing.set_start_method(None, force=True)
        parent = multiprocessing.parent_process().pid
        os.getppid = lambda: parent  # which a helper asks whether that one still lives
        processes.be_deaf()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        super().run()


def _work(words, variables, folder, outputs):
    encoding = variables.get("PYTHONIOENCODING", "utf-8")
    for number, (name, path) in enumerate(zip(("stdout", "stderr"), outputs, strict=True), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding))
    os.chdir(folder)
    become(words, variables)


def become(words, variables):
    """Runs in this process what `python WORDS...` would run in its own.

    Args:
        words: A module after "-m", code after "-c", or a script; and arguments.
        variables: Its environment.
    """
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # what blocked signals when it started the server has left it so
    multiprocessing.set_start_method(None, force=True)  # a forked process has the server's, a new one the system's
    how, *rest = words
    if how == "-m":
        name, *arguments = rest
        sys.argv = ["-m", *arguments]
        is_package = hasattr(sys.modules.get(name), "__path__")
        sys.modules.pop(f"{name}.__main__" if is_package else name, None)  # or runpy warns that it is there
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif how == "-c":
        code, *arguments = rest
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(how).parent))
        runpy.run_path(how, run_name="__main__")
