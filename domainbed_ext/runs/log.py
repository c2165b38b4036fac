"""Copies what a run prints to its log files, as a terminal would show it in the end: whole lines, no escape codes."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")


@contextlib.contextmanager
def copied(out: Path, err: Path) -> Iterator[None]:
    """Copies what is printed to files while the context lasts.

    Args:
        out: File that standard output is added to.
        err: The same for standard error.
    """
    with (
        _LogFile(out) as out_file,
        _LogFile(err) as err_file,
        contextlib.redirect_stdout(_Tee(sys.stdout, out_file)),
        contextlib.redirect_stderr(_Tee(sys.stderr, err_file)),
    ):
        yield


def plain(line: str) -> str:
    """Returns a line without escape codes, with only the last of the texts that carriage returns overwrite.

    Args:
        line: Text without its newline.
    """
    return _ESCAPE.sub("", line).rstrip("\r").rpartition("\r")[2]


class _LogFile:
    """A file of whole lines; the last is held back until it is whole, or the file is closed."""

    def __init__(self, path: Path) -> None:
        # Names of files may hold characters that no encoding has.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        self._rest = ""

    def write(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        self._put("".join(f"{plain(line)}\n" for line in lines))
        self._rest = self._rest[self._rest.rstrip("\r").rfind("\r") + 1 :]  # a bar writes no newline for hours

    def _put(self, text: str) -> None:
        if text:
            self._file.write(text)
            self._file.flush()

    def __enter__(self) -> "_LogFile":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError), self._file:
            self._put(f"{plain(self._rest)}\n" if self._rest else "")


class _Tee(io.TextIOBase):
    """Writes to two streams; a terminal stays one for whoever asks."""

    def __init__(self, stream: TextIO, file: _LogFile) -> None:
        self.stream, self.file = stream, file

    @property
    def rich_proxied_file(self) -> TextIO:
        """The stream below, where a rich console that is made meanwhile draws. Else the two would call each other."""
        return getattr(self.stream, "rich_proxied_file", self.stream)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the stream below."""
        return self.stream.encoding

    def write(self, text: str) -> int:
        # Neither a log that cannot be written nor a console that cannot show the text may end the run.
        with contextlib.suppress(OSError):
            self.file.write(text)
        with contextlib.suppress(OSError, UnicodeEncodeError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()
