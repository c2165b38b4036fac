"""Tensors in the cache of images, in a safetensors file each: what runs on the same images would compute again."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from domainbed_ext.cache.entries import Entries, NoRoom
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models.tensor_files import save_tensors

T = TypeVar("T")


class Kept(NamedTuple):
    """What an entry holds.

    Attributes:
        tensors: Tensors by name.
        texts: Text by name.
    """

    tensors: Mapping[str, Tensor]
    texts: Mapping[str, str]


def find_or_compute(
    cache: Entries,
    key: str,
    size: int,
    compute: Callable[[], Kept],
    read: Callable[[Kept], T],
    what: str,
    stop: Callable[[], None],
) -> T | None:
    """Reads tensors from the cache; if they are not there, computes them and keeps them there first.

    Args:
        cache: The cache.
        key: Key of the entry, "FOLDER/KIND-DIGEST".
        size: Bytes of the tensors.
        compute: Function that computes them.
        read: Function that makes the result of what is there, on the CPU.
        what: Description of the tensors.
        stop: Function that is called while another process computes them; may raise.

    Returns:
        The result; None if the cache has no room for the tensors.

    Raises:
        BenchmarkError: The entry cannot be read.
    """
    file_name = f"{key.rpartition('/')[2].partition('-')[0]}.safetensors"

    def build(folder: Path) -> None:
        tensors, texts = compute()
        save_tensors(tensors, folder / file_name, texts)

    try:
        path = cache.get(key, size, build, what, stop)
        with safe_open(path / file_name, framework="pt") as file:
            return read(Kept({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}))  # noqa: SIM118
    except NoRoom:
        return None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BenchmarkError(
            f"{what}: {key} cannot be read ({error}): remove it with python -m domainbed_ext.cache remove"
        ) from error
