"""Digests that tell data sets of one name apart: cheap enough for every run, and independent of the data's place.

Of image files it takes names, sizes and labels, but not their content: a file that is replaced by another of the same
size is not noticed.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from domainbed_ext.system import strict_json
from domainbed_ext.system.file_stats import stats

if TYPE_CHECKING:  # it has its file environments' content from here
    from domainbed_ext.datasets.base import MultipleDomainDataset

_BYTES = 8  # an environment


def digest(dataset: "MultipleDomainDataset") -> list[str]:
    """The digest of each environment, in index order.

    It follows from the environment's name, the names of the classes, and the labels and the content of the images in
    their order.

    Args:
        dataset: Data set with its environments.

    Returns:
        16 hexadecimal digits an environment.
    """
    digests = []
    for environment in dataset.datasets:
        names = strict_json.dumps([environment.name, list(map(str, dataset.classes))])
        content = hashlib.blake2b(names.encode("utf-8"), digest_size=_BYTES)
        content.update(np.asarray(environment.targets).astype("<i8").tobytes())
        for part in environment.content():
            content.update(part)
        digests.append(content.hexdigest())
    return digests


def content_of_files(paths: Sequence[str]) -> Iterator[bytes]:
    """Bytes that tell files from others: their paths below the deepest common folder, and their sizes.

    Args:
        paths: Paths of the files; at least one.

    Yields:
        Bytes for a digest.
    """
    absolute = list(map(os.path.abspath, paths))
    ends = {os.path.dirname(path) for path in (min(absolute), max(absolute))}  # all between begin as these two do
    folder = os.path.commonpath(ends)
    start = len(folder.rstrip(os.sep)) + 1
    names = "\0".join(path[start:] for path in absolute).replace(os.sep, "/")
    yield names.encode("utf-8", "surrogateescape")
    yield stats(paths)[:, 0].astype("<i8").tobytes()
