"""A data set that is a list of files: a CSV or Parquet table with the columns path, label and domain.

`python -m domainbed_ext.prepare` writes such lists. Unlike a folder of domains, a list can name images that lie
anywhere, and hold a part of a data set.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from domainbed_ext.datasets.base import MultipleDomainDataset
from domainbed_ext.datasets.folders import FileEnvironment
from domainbed_ext.errors import BenchmarkError

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("path", "label", "domain")


class Manifest(MultipleDomainDataset):
    """The images that a file lists: `--dataset Manifest --data_dir FILE.csv`, or `.parquet`.

    Paths are relative to the file. Domains are sorted by name; so are classes, unless every label is a whole
    number, which sorts them by value. Within a domain images stay in the file's order.

    Raises:
        BenchmarkError: no such file, not a table with these columns, an empty cell, a path listed twice, a missing
            image, fewer than two domains, or classes that differ between them.
    """

    CHECKPOINT_FREQ: ClassVar[int] = 300

    def __init__(self, root: Path | str | None, test_envs: Sequence[int], hparams: dict[str, Any]) -> None:
        super().__init__(root, test_envs, hparams)
        if root is None:
            raise BenchmarkError(
                f"Manifest needs its list of images: add --data_dir with a .csv or .parquet file of the columns "
                f"{', '.join(COLUMNS)}"
            )
        path = Path(root).expanduser()
        table = read_manifest(path)
        self.domains = sorted(table["domain"].unique())
        if len(self.domains) < 2:
            raise BenchmarkError(f"{path} lists one domain, {self.domains[0]}: it takes at least two")
        self.classes = sort_labels(table["label"].unique())
        index = {label: i for i, label in enumerate(self.classes)}
        self.datasets: list[FileEnvironment] = []
        for domain, rows in table.groupby("domain", sort=True):
            absent = sorted(set(self.classes) - set(rows["label"]))
            if absent:
                raise BenchmarkError(
                    f"{path}: domain {domain} has no image of {', '.join(absent[:5])}: "
                    f"give every domain the same classes"
                )
            files = [str(path.parent / file) for file in rows["path"]]
            self.datasets.append(FileEnvironment(str(domain), files, [index[label] for label in rows["label"]]))
        missing = [file for environment in self.datasets for file in environment.paths if not Path(file).is_file()]
        if missing:
            raise BenchmarkError(
                f"{path} lists {len(missing)} image(s) that are not there, {missing[0]} first: paths are relative to "
                f"the file; put the images there or take the lines out"
            )

    @property
    def environments(self) -> tuple[str, ...]:
        """The domains' names."""
        return tuple(self.domains)


def read_manifest(path: Path) -> pd.DataFrame:
    """Reads a list of images.

    Args:
        path: a `.csv` or `.parquet` file.

    Returns:
        A table with the columns in `COLUMNS`, all text, in the file's order.

    Raises:
        BenchmarkError: no such file, not a table with these columns, an empty cell, or a path listed twice.
    """
    import pandas as pd  # here, for it takes seconds that a run on another data set need not wait

    if not path.is_file():
        raise BenchmarkError(f"no file {path}: Manifest takes a .csv or .parquet file as --data_dir")
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise BenchmarkError(f"{path} ends in {suffix or 'nothing'}: a manifest is a .csv or a .parquet file")
    try:
        # As text, so that a class may be called 007, NA or None.
        table = (
            pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
            if suffix == ".csv"
            else pd.read_parquet(path)
        )
    except ImportError as error:
        raise BenchmarkError(
            f"{path}: reading Parquet takes pyarrow: pip install pyarrow, or save the manifest as .csv"
        ) from error
    except (OSError, ValueError) as error:  # pandas' and Arrow's own kinds are ValueErrors
        raise BenchmarkError(f"{path} is no readable {suffix[1:]} table: write it anew") from error
    lacking = [column for column in COLUMNS if column not in table.columns]
    if lacking:
        raise BenchmarkError(f"{path} has no column {', '.join(lacking)}: name its columns {', '.join(COLUMNS)}")
    table = table[list(COLUMNS)]
    empty = table.isna().any(axis=1) | (table.astype(str) == "").any(axis=1)
    if empty.any():
        row = int(empty.to_numpy().argmax()) + 1
        raise BenchmarkError(f"{path}: row {row} has an empty cell: fill it or take it out")
    table = table.astype(str)
    if table.empty:
        raise BenchmarkError(f"{path} lists no image: give it a line for each")
    twice = table["path"].duplicated()
    if twice.any():
        raise BenchmarkError(
            f"{path} lists {table['path'][twice].iloc[0]} twice: it could be trained on and held out at once; "
            f"take one line out"
        )
    return table


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Labels in class order: by value if each is a whole number, else by name."""
    names = sorted(labels)
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        names.sort(key=int)
    return names
