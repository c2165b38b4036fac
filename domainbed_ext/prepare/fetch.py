"""A download that goes on where it was cut off, and is what it should be when it ends."""

import hashlib
import http.client
import http.cookiejar
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from domainbed_ext.prepare.downloads import Source

CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte
ATTEMPTS = 4  # in a row that bring nothing
PAUSE = 2.0  # seconds before the second attempt; doubled for each further one
_BUSY = (408, 429, 500, 502, 503, 504)  # HTTP codes that may pass
_NETWORK = (OSError, http.client.HTTPException)  # URLError and timeouts are OSErrors

Progress = Callable[[int, int | None], None]  # told the bytes that are there, and all that are expected


class DownloadError(Exception):
    """A file cannot be had. Its message says why, in a few words; the caller adds what to do.

    Attributes:
        unreachable: there was no connection at all, so that the same host need not be asked again.
    """

    def __init__(self, reason: str, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable


class _CutError(Exception):
    """A connection that ended early; the download can go on."""


def download(source: Source, path: Path, progress: Progress) -> None:
    """Downloads a file, unless it is there.

    What has arrived is kept in `<path>.part`, from where another call goes on. A file that does not have the known
    size or MD5 is kept as `<path>.rejected`.

    Args:
        source: what.
        path: where to.
        progress: told how far it is.

    Raises:
        DownloadError: from none of its addresses.
        OSError: `path` cannot be written.
    """
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    for url in source.urls:
        try:
            _fetch(url, part, progress)
            break
        except DownloadError:
            if url == source.urls[-1]:
                raise
    reason = _wrong(part, source)
    if reason:
        rejected = path.with_name(path.name + ".rejected")
        part.replace(rejected)
        raise DownloadError(f"{reason}; what came is kept as {rejected}")
    part.replace(path)


def _wrong(path: Path, source: Source) -> str | None:
    """Why a file is not what it should be."""
    if path.stat().st_size == 0:
        return "the file is empty"
    if is_html(path):
        return "a web page came instead of the file"
    if source.size is not None and path.stat().st_size != source.size:
        return f"it has {path.stat().st_size} bytes instead of {source.size}"
    if source.md5 is not None:
        with path.open("rb") as file:
            found = file_digest(file, "md5")
        if found != source.md5:
            return f"its MD5 is {found} instead of {source.md5}"
    return None


def file_digest(file: Any, algorithm: str) -> str:
    """The hash of a file opened for reading bytes, in hexadecimal."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def is_html(path: Path) -> bool:
    """Whether a file starts as a web page does."""
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html"))


def _fetch(url: str, part: Path, progress: Progress) -> None:
    """Brings `part` to its full length."""
    # Google Drive's question before a large file sets a cookie that its answer needs.
    cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
    opener = urllib.request.build_opener(cookies)
    fruitless, asked = 0, False
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            response = _open(opener, url, before)
            if response is None:
                return  # the server has no more than is there
            with response:
                if response.headers.get_content_type() == "text/html":
                    answer = None if asked else _confirmation(response.read(CHUNK), response.url)
                    if answer is None:
                        raise DownloadError("a web page came instead of the file")
                    url, asked = answer, True
                    continue
                total = _receive(response, part, before, progress)
        except _CutError as cut:
            arrived = part.stat().st_size if part.exists() else 0
            fruitless = 0 if arrived > before else fruitless + 1
            if fruitless >= ATTEMPTS:
                raise DownloadError(
                    f"{cut}, {arrived:,} bytes are there: run the same command again to resume"
                ) from cut
            time.sleep(PAUSE * 2 ** max(0, fruitless - 1))
            continue
        if total is not None and part.stat().st_size > total:
            part.unlink()
            raise DownloadError("more bytes came than the server announced")
        return


def _open(opener: urllib.request.OpenerDirector, url: str, start: int) -> Any:
    """Asks for a file from byte `start` on; None if there is nothing from there on."""
    headers = {"User-Agent": "Mozilla/5.0 (domainbed_ext.prepare)", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if error.code == 416 and total == str(start):
            return None
        if error.code == 416:
            return _open(opener, url, 0)  # what is there is from another file
        if error.code in _BUSY:
            raise _CutError(f"the server answers {error.code} {error.reason}") from error
        raise DownloadError(f"the server answers {error.code} {error.reason}") from error
    except _NETWORK as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError) and start:
            raise _CutError("the server does not answer") from error
        raise DownloadError(
            f"no connection: {getattr(reason, 'strerror', None) or reason}", unreachable=True
        ) from error


def _receive(response: Any, part: Path, start: int, progress: Progress) -> int | None:
    """Writes what a response brings; the full length, where the server tells it."""
    length = response.headers.get("Content-Length")
    resumed = response.status == 206 and _range_start(response) == start
    if not resumed:
        start = 0
    total = start + int(length) if length is not None else None
    progress(start, total)
    done = start
    with part.open("ab" if resumed else "wb") as file:
        for chunk in _chunks(response):
            file.write(chunk)
            done += len(chunk)
            progress(done, total)
    if total is not None and done < total:
        raise _CutError(f"the connection is cut again and again after {done:,} of {total:,} bytes")
    return total


def _range_start(response: Any) -> int | None:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return int(match[1]) if match else None


def _chunks(response: Any) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read1(CHUNK)
        except _NETWORK as error:
            raise _CutError("the connection is cut again and again") from error
        if not chunk:
            return
        yield chunk


class _Confirmation(HTMLParser):
    """Finds where Google Drive's question whether to download a file that it could not scan leads."""

    def __init__(self) -> None:
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}
        self.link: str | None = None
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form" and given.get("id") in ("download-form", "downloadForm"):
            self.action, self._inside = given.get("action", ""), True
        elif tag == "input" and self._inside and given.get("name"):
            self.fields[given["name"]] = given.get("value", "")
        elif tag == "a" and "confirm=" in given.get("href", ""):
            self.link = given["href"]

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._inside = False


def _confirmation(page: bytes, url: str) -> str | None:
    """The address behind a download question, or None if the page asks nothing.

    Args:
        page: HTML.
        url: of the page.

    Raises:
        DownloadError: the page says that the file's quota is used up.
    """
    text = page.decode("utf-8", errors="replace")
    parser = _Confirmation()
    parser.feed(text)
    if parser.action is not None:
        action = urllib.parse.urlsplit(urllib.parse.urljoin(url, parser.action))
        query = dict(urllib.parse.parse_qsl(action.query)) | parser.fields
        return action._replace(query=urllib.parse.urlencode(query)).geturl()
    if parser.link is not None:
        return urllib.parse.urljoin(url, parser.link)
    if "quota" in text.lower() or "too many users" in text.lower():
        raise DownloadError("Google Drive says that the file was downloaded too often today")
    return None
