"""The file of this machine in which the fastest ways to compute something are kept: see `vitlorafa.tuning`."""

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from vitlorafa.machine import cpu_name

_LIMITS = ("ATEN_", "DNNL_", "MKL_", "ONEDNN_", "OMP_DYNAMIC", "OMP_THREAD_LIMIT")
_VERSION = 2  # of the ways: a higher one where a way has become faster, so that all are timed again
_PATIENCE = 60.0  # seconds to wait for another process, which times a question in less than one


@dataclass(frozen=True)
class Answer:
    """The way that was chosen, as it is kept in the file.

    Attributes:
        way: Name of the way.
        seconds: Shortest time of each way that was timed, the default first; empty if that took too long.
    """

    way: str
    seconds: dict[str, float] = field(default_factory=dict)


class MachineFile:
    """The answers of this machine, as JSON.

    Args:
        path: Path of the file.
        facts: What the answers hold for: processor, limits on its instructions, and versions.

    Attributes:
        token: Random name of the answers, new whenever the file is.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, Any]) -> None:
        self.path, self.facts = path, dict(facts)
        self.token: str | None = None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other process is in this context.

        Raises:
            OSError: If there is no folder to write to, or its file system has no locks.
            Timeout: If another process takes too long.
        """
        if self.path is None:
            raise OSError("the user has no home folder")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", timeout=_PATIENCE, fallback_to_soft=False):
            yield

    def read(self) -> dict[str, Answer]:
        """The answers by question; none if the file is missing, damaged or of another machine."""
        self.token = None
        try:
            content = json.loads(self.path.read_text(encoding="utf-8") if self.path else "")
            if content["facts"] != self.facts:
                return {}
            found = {name: Answer(str(each["way"]), dict(each["seconds"])) for name, each in content["answers"].items()}
            self.token = str(content["token"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}
        return found

    def write(self, found: Mapping[str, Answer]) -> None:
        """Replaces the file, which other processes see whole or not at all.

        Args:
            found: Answers by question.

        Raises:
            OSError: If it cannot be written.
        """
        if self.path is None:
            raise OSError("the user has no home folder")
        token = self.token or uuid.uuid4().hex
        kept = {name: {"way": each.way, "seconds": each.seconds} for name, each in sorted(found.items())}
        text = json.dumps({"facts": self.facts, "token": token, "answers": kept}, indent=1, ensure_ascii=False)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            partial.write_text(f"{text}\n", encoding="utf-8")
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)
        self.token = token

    def forget(self) -> None:
        """Deletes the file, so that everything is timed again.

        Raises:
            OSError: If it cannot be deleted.
        """
        with self.alone():
            if self.path is not None:
                self.path.unlink(missing_ok=True)
            self.token = None


@cache
def machine_file(device: str = "cpu") -> MachineFile:
    """The file of this machine's processor, or of its GPU.

    Args:
        device: "cpu" or "cuda".
    """
    limits = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_LIMITS) and not name.endswith("_NUM_THREADS")
    }
    name = cpu_name() if device == "cpu" else torch.cuda.get_device_name(device)
    facts = {"device": name, "limits": limits, "torch": torch.__version__, "version": _VERSION}
    digest = hashlib.blake2b(json.dumps(facts).encode("utf-8"), digest_size=4).hexdigest()
    readable = re.sub(r"[^a-z0-9.]+", "_", f"{name} torch {torch.__version__}".lower()).strip("_")
    folder = os.environ.get("VITLORAFA_CACHE")
    try:
        parent = Path(folder).expanduser() if folder else Path.home() / ".cache" / "vitlorafa"
    except RuntimeError:  # the user has no home folder
        return MachineFile(None, facts)
    return MachineFile(parent / f"{readable}_{digest}.json", facts)
