"""Images that a data set contains more than once: files of the same bytes, or one file under several names.

One copy may be trained on while another is held out. Files are compared by the digests of their content, which the
image cache stores, so that a file is read again only after it changed. Without a cache, files of equal size are read.
"""

from argparse import _ActionsContainer
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from domainbed_ext.cache import fingerprint
from domainbed_ext.cache.entries import choose_folder
from domainbed_ext.datasets.base import MultipleDomainDataset
from domainbed_ext.datasets.folders import FileEnvironment
from domainbed_ext.errors import BenchmarkError, warn_once
from domainbed_ext.system import file_stats

CHOICES = ("warn", "refuse", "ignore")

_EXAMPLES = 2


@dataclass(frozen=True)
class Place:
    """Where an image is.

    Attributes:
        path: Path of the file.
        domain: Name of its domain.
        label: Name of its class.
    """

    path: str
    domain: str
    label: str


@dataclass(frozen=True)
class Duplicates:
    """Images that are contained more than once. False if there are none; `str` describes them for a message.

    Attributes:
        groups: The places of each such image.
    """

    groups: Sequence[Sequence[Place]] = ()

    def __bool__(self) -> bool:
        return bool(self.groups)

    def __str__(self) -> str:
        domains = sum(len({place.domain for place in group}) > 1 for group in self.groups)
        labels = sum(len({place.label for place in group}) > 1 for group in self.groups)
        spread = f"{domains} in several domains, {labels} under several labels"
        examples = "; ".join(_pair(*group[:2]) for group in self.groups[:_EXAMPLES])
        return f"{len(self.groups)} image(s) more than once ({spread}), e.g. {examples}"


def add_option(parser: _ActionsContainer) -> None:
    """Adds `--duplicates`.

    Args:
        parser: Command line, or a group of its options.
    """
    parser.add_argument(
        "--duplicates",
        choices=CHOICES,
        default="warn",
        help="what to do if a data set contains an image more than once (default: %(default)s)",
    )


def search(name: str, dataset: MultipleDomainDataset, choice: str, cache_dir: str | None) -> None:
    """Warns of the duplicates in a data set, or refuses them, unless `--duplicates` is "ignore".

    Args:
        name: Name of the data set.
        dataset: Data set.
        choice: One of `CHOICES`.
        cache_dir: Value of `--cache_dir`.

    Raises:
        BenchmarkError: If there are some and they are refused.
    """
    environments = [each for each in dataset.datasets if isinstance(each, FileEnvironment)]
    if choice != "ignore" and environments:
        warn_or_refuse(name, find(environments, dataset.classes, choose_folder(cache_dir)), choice)


def warn_or_refuse(name: str, duplicates: Duplicates, choice: str) -> None:
    """Warns of duplicates, or refuses them.

    Args:
        name: Name of the data set.
        duplicates: Its duplicates.
        choice: One of `CHOICES`.

    Raises:
        BenchmarkError: If there are some and they are refused.
    """
    if duplicates and choice == "refuse":
        raise BenchmarkError(f"{name} contains {duplicates}: remove copies, or choose --duplicates warn")
    if duplicates and choice == "warn":
        warn_once(
            f"{name} contains {duplicates}: one copy may be trained on while another is held out; remove copies, or "
            "choose --duplicates refuse, or ignore"
        )


def find(environments: Sequence[FileEnvironment], classes: Sequence[str], cache: Path | None) -> Duplicates:
    """Finds the duplicates among the images of a data set.

    Args:
        environments: Environments of the data set.
        classes: Names of its classes.
        cache: Folder of the image cache, which keeps digests; None if there is no cache.
    """
    paths = [path for each in environments for path in each.paths]
    domains = [each.name for each in environments for _ in each.paths]
    labels = [classes[target] for each in environments for target in each.targets]
    if cache is None:
        digests = _of_equal_size(paths)
    else:
        digests = [digest for each in environments for digest in fingerprint.digest_each(each.paths, cache)]
    return group(digests, lambda i: Place(paths[i], domains[i], labels[i]))


def group(digests: Sequence[bytes], place: Callable[[int], Place]) -> Duplicates:
    """Groups images by their content.

    Args:
        digests: Digest of the content of each image; empty where it is not known.
        place: Function that returns the place of an image, given its index.
    """
    first: dict[bytes, int] = {}
    groups: dict[bytes, list[Place]] = {}
    for index, digest in enumerate(digests):
        earlier = first.setdefault(digest, index)
        if earlier != index and digest:
            groups.setdefault(digest, [place(earlier)]).append(place(index))
    return Duplicates(list(groups.values()))


def _of_equal_size(paths: Sequence[str]) -> list[bytes]:
    """The digests of files whose size another has; empty for all others."""
    sizes = file_stats.stats(paths)[:, 0]
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    alike = np.flatnonzero((counts[inverse] > 1) & (sizes != file_stats.UNKNOWN)).tolist()
    digests = [b""] * len(paths)
    for index, digest in zip(alike, fingerprint.read_digests([paths[i] for i in alike]), strict=True):
        digests[index] = digest
    return digests


def _pair(one: Place, other: Place) -> str:
    return f"{one.path} twice" if one.path == other.path else f"{one.path} and {other.path}"
