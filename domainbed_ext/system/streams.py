"""Standard output and error that printing cannot fail on: any encoding, a closed pipe (`| head`), a full disk.

Results are files: a console that cannot show a character, or a pipe that nobody reads, must not lose them.
"""

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

_SPELLED = {"±": "+/-", "−": "-", "–": "-", "×": "x", "→": "->", "≥": ">=", "…": "...", "━": "-", "█": "#", "░": "."}
_ERRORS = "domainbed_ext.spelled"


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replaces characters that an encoding lacks; bytes in file names that are not text are kept."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    parts = error.object[error.start : error.end]
    written = (bytes([ord(c) - 0xDC00]) if "\udc80" <= c <= "\udcff" else _SPELLED.get(c, "?").encode() for c in parts)
    return b"".join(written), error.end


codecs.register_error(_ERRORS, _spelled)


class Unwritten(Exception):  # noqa: N818  (what was computed is not in error)
    """Standard output could not be written."""


class _Sink(io.RawIOBase):
    """A file descriptor whose errors are stored instead of raised; after the first, nothing more is written.

    Args:
        descriptor: Open for writing.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any, /) -> int:
        if self.error is None:
            try:
                return os.write(self._descriptor, data)
            except OSError as error:
                self.error = error
        return len(data)


@contextlib.contextmanager
def unfailing() -> Iterator[None]:
    """Lets printing succeed while the context lasts, whatever happens to the streams.

    Raises:
        Unwritten: At the end, if standard output could not be written for another reason than a closed pipe.
    """
    kept = sys.stdout, sys.stderr
    sinks = [_replace("stdout"), _replace("stderr")]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = kept
    error = sinks[0].error if sinks[0] else None
    if error is not None and error.errno != errno.EPIPE:
        raise Unwritten(
            f"standard output could not be written ({error.strerror}); the files that were named have been written"
        )


def _replace(name: str) -> _Sink | None:
    """Replaces a standard stream by one that cannot fail."""
    stream: IO[str] | None = getattr(sys, name)
    if stream is None:  # closed by the parent process
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        return None
    if not isinstance(stream, io.TextIOWrapper):  # a caller's own
        return None
    try:
        descriptor = stream.fileno()
    except OSError:
        stream.reconfigure(errors=_ERRORS)
        return None
    with contextlib.suppress(OSError):
        stream.flush()
    sink = _Sink(descriptor)
    buffered = io.BufferedWriter(sink)
    wrapper = io.TextIOWrapper(
        buffered,
        encoding=stream.encoding,
        errors=_ERRORS,
        line_buffering=stream.line_buffering or stream.write_through,  # PYTHONUNBUFFERED: not kept in the buffer below
        write_through=stream.write_through,
    )
    setattr(sys, name, wrapper)
    return sink
