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
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS = 120
ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")
PATIENCE = 120  # seconds; a test that waits for longer has failed


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
    """A command on a terminal of its own.

    Args:
        words: Of the command, after "python".
        out: File that its standard output goes to instead of the terminal.
        env: Variables over this process's.
    """

    def __init__(self, *words, out=None, env=None):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
        variables = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **(env or {})}
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES"):
            if name not in (env or {}):
                variables.pop(name, None)

        def take_terminal():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C goes to its processes

        with open(out, "wb") if out else contextlib.nullcontext(slave) as stdout:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                stdin=slave,
                stdout=stdout,
                stderr=slave,
                env=variables,
                preexec_fn=take_terminal,
            )
        os.close(slave)
        self._seen = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # as Linux says that nobody holds the other end any more
            while chunk := os.read(self._master, 65536):
                self._seen += chunk

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
        while not (sight() if callable(sight) else re.search(sight, self.screen)):
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise AssertionError(f"{sight} did not come: {self.screen[-3000:]}")
            time.sleep(0.02)
        return self

    def end(self):
        """Waits until it ends."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it does not end: {self.screen[-3000:]}") from None
        self._reader.join(5)  # a process that it left behind would hold the terminal
        assert not self._reader.is_alive(), "it left a process behind"
        os.close(self._master)
        return Ended(code, self.screen, self.raw)

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
