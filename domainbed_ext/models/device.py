"""The device that a run computes on: `--device`."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from domainbed_ext.errors import BenchmarkError

_name: ContextVar[str | None] = ContextVar("device", default=None)


def find_device(name: str | None) -> torch.device:
    """Returns a device of this machine.

    Args:
        name: Value of `--device`; None and "auto" are a GPU if torch sees one, else the CPU.

    Raises:
        BenchmarkError: Torch does not see it.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in (None, "auto"):
        return torch.device("cuda" if count else "cpu")
    device = torch.device(str(name))
    if device.type == "cuda" and (device.index or 0) >= count:
        seen = f"{count} GPU{'s' * (count > 1)}, which {'are' if count > 1 else 'is'} cuda:0" if count else "no GPU"
        last = f" to cuda:{count - 1}" if count > 1 else ""
        raise BenchmarkError(f"--device {name}: torch sees {seen}{last} here: give one that is here, cpu or auto")
    return device


@contextmanager
def using_device(name: str | None) -> Iterator[None]:
    """Makes algorithms that are built in the context compute on a device.

    Args:
        name: Value of `--device`, as in `find_device`.
    """
    token = _name.set(name)
    try:
        yield
    finally:
        _name.reset(token)


def current_device() -> torch.device:
    """Returns the device of `using_device`; outside of it that of "auto"."""
    return find_device(_name.get())
