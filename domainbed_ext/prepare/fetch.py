"""A download that resumes where it was cut off, and is checked when it ends."""

import base64
import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from domainbed_ext.prepare.downloads import Download

CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte
ATTEMPTS = 4  # in a row that bring nothing
PAUSE = 2.0  # seconds before the second attempt; doubled for each further one
_BUSY = (408, 429, 500, 502, 503, 504)  # HTTP codes that may pass

OnProgress = Callable[[int, int | None], None]
"""Takes the bytes that have arrived, and all that are expected (None if that is not known)."""


class DownloadError(Exception):
    """A file cannot be downloaded. The message says why, in a few words; the caller adds what to do.

    Attributes:
        unreachable: Whether there was no connection at all, so that the same host need not be asked again.
    """

    def __init__(self, reason: str, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable


class _PassingError(Exception):
    """An attempt that failed for a reason that may pass."""


class _ConnectionError(_PassingError):
    """No connection, or one that timed out."""


class _RangeError(Exception):
    """A server that does not continue the part that is there."""


def download(source: Download, path: Path, on_progress: OnProgress) -> None:
    """Downloads a file, unless it is there.

    What has arrived is kept beside it in a `.part` file, from which another call resumes. A file that does not have the
    right size or MD5 is kept as `<path>.rejected`.

    Args:
        source: What to download.
        path: Path of the file.
        on_progress: Callback with the bytes that have arrived.

    Raises:
        DownloadError: None of its addresses has it.
        OSError: `path` cannot be written.
    """
    if path.exists():
        return
    arrived = path.with_name(path.name + ".download")
    for url in source.urls:
        try:
            _fetch(url, arrived, on_progress)
            break
        except DownloadError:
            if url == source.urls[-1]:
                raise
    accept(arrived, source, path)


def accept(arrived: Path, source: Download, path: Path) -> None:
    """Puts a file that has arrived in its place, if it is what it should be.

    Args:
        arrived: Path of the file as it arrived; a wrong one is kept as `<path>.rejected`.
        source: What it should be.
        path: Path of the file.

    Raises:
        DownloadError: It is not.
    """
    if problem := find_problem(arrived, source):
        rejected = path.with_name(path.name + ".rejected")
        arrived.replace(rejected)
        raise DownloadError(f"{problem}; what came is kept as {rejected}")
    arrived.replace(path)


def find_problem(path: Path, source: Download) -> str | None:
    """Describes why a file is not what it should be; None if it is.

    Args:
        path: Path of the file.
        source: What it should be.
    """
    if path.stat().st_size == 0:
        return "the file is empty"
    if is_html(path):
        return "a web page came instead of the file"
    if source.size is not None and path.stat().st_size != source.size:
        return f"it has {path.stat().st_size:,} bytes instead of {source.size:,}"
    if source.md5 is not None:
        with path.open("rb") as file:
            md5 = compute_digest(file, "md5")
        if md5 != source.md5:
            return f"its MD5 is {md5} instead of {source.md5}"
    if source.integrity is not None and (integrity := compute_integrity(path)) != source.integrity:
        return f"its digest is {integrity} instead of {source.integrity}"
    return None


def compute_digest(file: Any, algorithm: str) -> str:
    """Computes the hash of a file, in hexadecimal.

    Args:
        file: File that is open for reading bytes.
        algorithm: Name of the hash, as `hashlib` has it.
    """
    digest = hashlib.new(algorithm, usedforsecurity=False)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def compute_integrity(path: Path) -> str:
    """Computes the SHA-512 of a file as npm writes it: "sha512-" and the digest in base 64.

    Args:
        path: Path of the file.
    """
    with path.open("rb") as file:
        digest = bytes.fromhex(compute_digest(file, "sha512"))
    return f"sha512-{base64.b64encode(digest).decode('ascii')}"


def is_html(path: Path) -> bool:
    """Whether a file starts as a web page does.

    Args:
        path: Path of the file.
    """
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html"))


def _fetch(url: str, path: Path, on_progress: OnProgress) -> None:
    """Downloads a file, in as many attempts as it takes as long as they bring something."""
    done, fruitless, has_restarted = 0, 0, False

    def advance(arrived: int, total: int | None) -> None:
        nonlocal done
        done = arrived
        on_progress(arrived, total)

    while True:
        before = done
        try:
            return _attempt(url, path, advance)
        except _RangeError as error:
            if has_restarted:
                raise DownloadError(str(error)) from error
            has_restarted, done = True, 0
            for part in path.parent.glob(f"{path.name}*.part"):  # of another file, or the server cannot resume
                part.unlink()
        except _PassingError as error:
            if isinstance(error, _ConnectionError) and done == before:
                raise DownloadError(f"no connection: {error}", unreachable=not done) from error
            fruitless = 0 if done > before else fruitless + 1
            if fruitless >= ATTEMPTS:
                raise DownloadError(
                    f"{error}, {done:,} bytes are there: run the same command again to resume"
                ) from error
            time.sleep(PAUSE * 2 ** max(0, fruitless - 1))


def _attempt(url: str, path: Path, on_progress: OnProgress) -> None:
    """Downloads a file by gdown, which resumes, and answers Google Drive's question before large files.

    Raises:
        DownloadError: It cannot be downloaded.
        _PassingError: It may be later.
        _RangeError: What is there cannot be continued.
    """
    # Imported here because it takes long, and is needed only for downloads.
    import gdown
    from gdown.exceptions import DownloadError as CutError
    from gdown.exceptions import FileURLRetrievalError
    from requests import RequestException

    try:
        gdown.download(
            url, str(path), quiet=True, use_cookies=False, resume=True, timeout=TIMEOUT, progress=on_progress
        )
    except FileURLRetrievalError as error:
        raise DownloadError(
            "Google Drive does not give it out: it was downloaded too often today, or is not public"
        ) from error
    except CutError as error:
        if "byte range" in str(error):
            raise _RangeError("the server sends another part than it is asked for") from error
        raise _PassingError("the connection is cut again and again") from error
    except RequestException as error:
        if error.response is not None:
            answer = f"the server answers {error.response.status_code} {error.response.reason}"
            raise (_PassingError if error.response.status_code in _BUSY else DownloadError)(answer) from error
        raise _ConnectionError(_describe(error)) from error


def _describe(error: Exception) -> str:
    """Finds the system's reason in an error of requests, whose text has those of all layers."""
    match = re.search(r"\[Errno -?\d+\] ([^'\")>]+)", str(error))
    return match[1] if match else type(error).__name__
