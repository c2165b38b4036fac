"""A terminal for commands: a pseudo-terminal on which each runs as a person would have it, and what that one sees."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

from tests.forked import CONTEXT, become

ROOT = Path(__file__).parents[1]
COLUMNS = 120
ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")
PATIENCE = 120  # seconds; a test that waits for longer has failed


def sit_down(tty, module, words, out, variables):
    """Makes this process the one that a terminal is of, and runs a command in it."""
    os.setsid()
    terminal = os.open(tty, os.O_RDWR)  # so Ctrl-C goes to this process and those that it starts
    screen = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if out else terminal
    for number, file in enumerate((terminal, screen, terminal)):
        os.dup2(file, number)
    os.closerange(terminal, terminal + 1)
    sys.stdin, sys.stdout, sys.stderr = map(_opened, range(3), "rww")
    become(["-m", module, *words], variables)


def _take_terminal():
    """Makes its standard input the terminal of this process, and of those that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells have commands in the background ignore it
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _opened(number, mode):
    return open(number, mode, buffering=1, encoding="utf-8", closefd=False)


@dataclass
class Ended:
    """What became of a command.

    Attributes:
        code: Exit code; negative for the signal that ended it.
        screen: All that came to the terminal, without what moves the cursor or colours.
        raw: The same as it came.
    """

    code: int
    screen: str
    raw: str


class Terminal:
    """A command on a terminal of its own: `python -m MODULE WORDS...`.

    Its process is forked from a server that has imported everything once: an import of torch costs seconds.

    Args:
        module: Name of the command's module.
        words: Its arguments.
        out: File that its standard output goes to instead of the terminal.
        env: Variables over this process's.
        fresh: Whether it is an interpreter of its own instead.
    """

    def __init__(self, module, *words, out=None, env=None, fresh=False):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
        variables = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **(env or {})}
        for name in {"NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES"} - set(env or {}):
            variables.pop(name, None)
        words = [str(word) for word in words]
        if fresh:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                **dict.fromkeys(("stdin", "stdout", "stderr"), slave),
                env=variables,
                preexec_fn=_take_terminal,
            )
        else:
            arguments = (os.ttyname(slave), module, words, str(out) if out else None, variables)
            self.process = CONTEXT.Process(target=sit_down, args=arguments)
            self.process.start()
        os.close(slave)
        self._seen = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        while True:
            try:
                chunk = os.read(self._master, 65536)
            except OSError:  # nobody holds the other end: not yet, or no more
                if self._seen or self._has_ended():
                    return
            else:
                self._seen += chunk

    def _has_ended(self):
        """Looks without fetching the exit code: of a forked process only one thread can have that."""
        if isinstance(self.process, subprocess.Popen):
            return self._code(0.02) is not None
        return bool(connection.wait([self.process.sentinel], 0.02))

    @property
    def raw(self):
        return self._seen.decode("utf-8", "replace")

    @property
    def screen(self):
        return ESCAPE.sub("", self.raw).replace("\r\n", "\n")

    def type(self, text):
        """Sends keys: "\\x03" is Ctrl-C."""
        os.write(self._master, text.encode())

    def wait_for(self, sight):
        """Until the pattern is on the screen, or the condition holds; returns the terminal."""
        until = time.monotonic() + PATIENCE
        while not (sight(self) if callable(sight) else re.search(sight, self.screen)):
            if self._code(0.02) is not None or time.monotonic() > until:
                self.kill()
                raise AssertionError(f"{sight} did not come: {self.screen[-3000:]}")
        return self

    def wait(self, seconds):
        """Waits until it ends, so long at most."""
        self._code(seconds)

    def end(self):
        """Waits until it ends."""
        code = self._code(PATIENCE)
        if code is None:
            self.kill()
            raise AssertionError(f"it does not end: {self.screen[-3000:]}")
        self._reader.join(5)  # a process that it left behind would hold the terminal
        assert not self._reader.is_alive(), "it left a process behind"
        os.close(self._master)
        return Ended(code, self.screen, self.raw)

    def _code(self, seconds):
        """Its exit code, waiting so long for it; None if it has not ended."""
        if isinstance(self.process, subprocess.Popen):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(seconds)
            return None
        self.process.join(seconds)
        return self.process.exitcode

    def kill(self):
        """Ends it and all of its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def run(*words, **options):
    """Runs a command to its end."""
    return Terminal(*words, **options).end()


def interrupted(*words, at, **options):
    """Runs a command until a sight or condition, and types Ctrl-C."""
    terminal = Terminal(*words, **options).wait_for(at)
    terminal.type("\x03")
    return terminal.end()


def assert_clean(*paths):
    """Files have neither escape codes nor carriage returns."""
    for path in paths:
        text = Path(path).read_text(encoding="utf-8")
        assert "\x1b" not in text and "\r" not in text, (path, text)
