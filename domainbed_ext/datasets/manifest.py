"""A data set that is a list of files: a CSV, TSV or Parquet table with the columns path, label and domain, and with
the concepts of the images if it has a column concept.

`python -m domainbed_ext.prepare` writes such lists. Unlike a folder of domains, a list can name images that lie
anywhere, and hold a part of a data set.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from domainbed_ext.datasets.base import MultipleDomainDataset
from domainbed_ext.datasets.folders import FileEnvironment
from domainbed_ext.datasets.manifest_file import COLUMNS, KINDS, Row, read_manifest
from domainbed_ext.datasets.registry import register_dataset
from domainbed_ext.errors import BenchmarkError


@register_dataset("Manifest")
class Manifest(MultipleDomainDataset):
    """The images that a file lists: `--dataset Manifest --data_dir FILE.csv`, or `.tsv`, or `.parquet`.

    Paths are relative to the file. Domains are sorted by name; so are classes, unless every label is a whole
    number, which sorts them by value. Within a domain images stay in the file's order.

    Raises:
        BenchmarkError: A file that `read_manifest` refuses, a missing image, fewer than two domains, or classes that
            differ between them.
    """

    CHECKPOINT_FREQ: ClassVar[int] = 300

    def __init__(self, root: Path | str | None, test_envs: Sequence[int], hparams: dict[str, Any]) -> None:
        super().__init__(root, test_envs, hparams)
        path = self._file(root)
        rows = read_manifest(path)
        rows_of: dict[str, list[Row]] = {}
        for row in rows:
            rows_of.setdefault(row.domain, []).append(row)
        self.domains = sorted(rows_of)
        if len(self.domains) < 2:
            raise BenchmarkError(f"{path} lists one domain, {self.domains[0]}: it takes at least two")
        self.classes = sort_labels({row.label for row in rows})
        index = {label: i for i, label in enumerate(self.classes)}
        self.datasets: list[FileEnvironment] = []
        missing: list[str] = []
        for domain in self.domains:
            if absent := sorted(set(self.classes) - {row.label for row in rows_of[domain]}):
                raise BenchmarkError(
                    f"{path}: domain {domain} has no image of {', '.join(absent[:5])}: "
                    f"give every domain the same classes"
                )
            files = [_locate(path.parent, row.path, missing) for row in rows_of[domain]]
            targets = [index[row.label] for row in rows_of[domain]]
            concepts = [row.concept for row in rows_of[domain]]
            self.datasets.append(FileEnvironment(domain, files, targets, concepts if any(concepts) else ()))
        if missing:
            raise _not_there(path, missing)

    @classmethod
    def check_data_dir(cls, root: Path | str | None) -> None:
        """Refuses a missing `--data_dir`."""
        cls._file(root)

    @staticmethod
    def _file(root: Path | str | None) -> Path:
        if root is None:
            raise BenchmarkError(
                f"Manifest needs its list of images: add --data_dir with a {KINDS} of the columns {', '.join(COLUMNS)}"
            )
        return Path(root).expanduser()

    @property
    def environments(self) -> tuple[str, ...]:
        """The domains' names."""
        return tuple(self.domains)


def _locate(folder: Path, written: str, missing: list[str]) -> str:
    """The file that a path of a list means; adds the path to `missing` if there is none."""
    for spelling in _spellings(written):
        file = str(folder / spelling)
        if os.path.isfile(file):
            return file
    missing.append(str(folder / written))
    return missing[-1]


def _spellings(written: str) -> Iterator[str]:
    """A path as it is written, else as a shell reads it, else one of Windows."""
    yield written
    yield (expanded := os.path.expandvars(os.path.expanduser(written.strip())))
    yield expanded.replace("\\", "/")


def _not_there(path: Path, missing: Sequence[str]) -> BenchmarkError:
    windows = "a path of another machine; " if re.search(r"(^|/)[A-Za-z]:[\\/]", missing[0]) else ""
    return BenchmarkError(
        f"{path} lists {len(missing)} image(s) that are not there, {missing[0]} first: {windows}paths are relative to "
        "the file; put the images there or take the lines out"
    )


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Labels in class order: by value if each is a whole number, else by name."""
    names = sorted(labels)
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        names.sort(key=int)
    return names
