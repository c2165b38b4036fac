"""Packages of the npm registry, which the npm client finds and checks: its settings say where the registry is."""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from domainbed_ext.prepare.downloads import Download
from domainbed_ext.prepare.fetch import DownloadError, OnProgress, accept

_UNREACHABLE = {"EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ENETUNREACH", "ENOTCACHED", "ENOTFOUND", "ETIMEDOUT"}


def pack(source: Download, path: Path, on_progress: OnProgress) -> None:
    """Downloads a package by `npm pack`, unless it is there. npm keeps what has arrived in its cache.

    Args:
        source: What to download.
        path: Path of the file.
        on_progress: Callback with the bytes that have arrived.

    Raises:
        DownloadError: There is no npm, it cannot reach the package, or the file is not the one that it should be.
        OSError: `path` cannot be written.
    """
    if path.exists():
        return
    npm = shutil.which("npm")
    if npm is None:
        raise DownloadError("npm is not installed here", unreachable=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # whose settings are none of another project
        command = [npm, "pack", source.package, "--pack-destination", folder, "--ignore-scripts", "--json"]
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        packed = sorted(Path(folder).glob("*.tgz"))
        if done.returncode or len(packed) != 1:
            raise _describe_failure(done)
        size = packed[0].stat().st_size
        on_progress(size, size)
        accept(packed[0], source, path)


def _describe_failure(done: "subprocess.CompletedProcess[str]") -> DownloadError:
    """What npm says: the error in its JSON, or else the first line of its messages."""
    try:
        error = json.loads(done.stdout)["error"]
        code, reason = str(error["code"]), str(error["summary"])
    except (ValueError, KeyError, TypeError):
        code, reason = "", done.stderr
    first = next(iter(reason.strip().splitlines()), f"it ended with exit code {done.returncode} and made no file")
    return DownloadError(f"npm pack: {first}", unreachable=code in _UNREACHABLE)
