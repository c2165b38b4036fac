"""Unpacking archives that may be broken, or made to write elsewhere.

Only plain files and folders are unpacked, and only into the given folder. Links are refused: no data set has any, and
without them no name can lead out of the folder.
"""

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.prepare.fetch import is_html

# What the standard library raises on archives that are truncated, corrupt, encrypted or of an unknown compression.
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    RuntimeError,
    NotImplementedError,
)
_Member = tuple[str, bool, Callable[[], IO[bytes] | None]]  # name, whether a file, its content


def is_archive(path: Path) -> bool:
    """Whether a file is a zip or a tar, compressed or not, whatever its name.

    Args:
        path: Path of the file.
    """
    return zipfile.is_zipfile(path) or _is_tar(path)


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except _BROKEN:  # a compressed file that ends within its first block
        return False
    except OSError:
        return False


def unpack(archive: Path, folder: Path, advance: Callable[[], None]) -> None:
    """Unpacks an archive into a folder that is there whole or not at all.

    Args:
        archive: Path of a zip or a tar, compressed or not.
        folder: Folder to make; it must not exist.
        advance: Callback for each file.

    Raises:
        BenchmarkError: The archive is broken, no archive, or holds a name or link that could lead out of `folder`.
    """
    if not is_archive(archive):
        raise _not_an_archive(archive)
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        for name, is_file, content in _members(archive):
            target = partial / _safe(archive, name)
            if not is_file:
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            source = content()
            if source is not None:
                with source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
            advance()
    except _BROKEN as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it ends too early"
        raise BenchmarkError(f"{archive} is a broken archive ({reason}): download it again") from error
    except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise BenchmarkError(f"{archive} has a file and a folder of one name: download it again") from error
    except OSError as error:
        if error.errno is None:  # gzip's and bzip2's own errors; those of the disk have a number
            raise BenchmarkError(f"{archive} is a broken archive ({error}): download it again") from error
        raise
    partial.replace(folder)


def _not_an_archive(path: Path) -> BenchmarkError:
    if is_html(path):
        return BenchmarkError(f"{path} is a web page, not an archive: download the file itself, in a browser")
    return BenchmarkError(f"{path} is no zip or tar archive, or is cut off: download it again")


def _members(archive: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise _link(archive, info.filename)
                yield info.filename, not info.is_dir(), lambda info=info: file.open(info)  # type: ignore[misc]
        return
    with tarfile.open(archive, tarinfo=_WholeTarInfo) as tar:
        for member in tar:
            if not (member.isreg() or member.isdir()):
                raise _link(archive, member.name)
            yield member.name, member.isreg(), lambda member=member: tar.extractfile(member)  # type: ignore[misc]
        while tar.fileobj and tar.fileobj.read(1 << 20):  # the checksum of a compressed tar comes after its end
            pass


class _WholeTarInfo(tarfile.TarInfo):
    """Accepts only an end mark as the end of a tar; tarfile itself accepts damage, too."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_WholeTarInfo":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError("it is damaged, or ends too early") from error


def _safe(archive: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in (path.parts or ("",))[0] or "\0" in name:
        raise BenchmarkError(f"{archive} would write outside its folder ({name!r}): do not use it")
    return path


def _link(archive: Path, name: str) -> BenchmarkError:
    return BenchmarkError(f"{archive} holds {name!r}, which is a link or a device: pack it without such files")
