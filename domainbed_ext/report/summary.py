"""What a table's cells, rows and columns are made of: means over trials, and the order of names."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import Record, Selection, num_environments

# DomainBed's labels, for records that do not name their environments (its own), and its order of data sets.
ENVIRONMENTS = {
    "Debug28": ["0", "1", "2"],
    "Debug224": ["0", "1", "2"],
    "ColoredMNIST": ["+90%", "+80%", "-90%"],
    "RotatedMNIST": ["0", "15", "30", "45", "60", "75"],
    "VLCS": ["C", "L", "S", "V"],
    "PACS": ["A", "C", "P", "S"],
    "OfficeHome": ["A", "C", "P", "R"],
    "TerraIncognita": ["L100", "L38", "L43", "L46"],
    "DomainNet": ["clip", "info", "paint", "quick", "real", "sketch"],
}
DIVERGED = "diverged"  # for a mean of accuracies of which one is not known
ALGORITHMS = ["BA", "BOnly", "AOnly", "LP", "FullFT"]


def algorithm_order(name: str) -> tuple[object, ...]:
    """Sorts algorithms: ours first, each followed by its @variants (rank=8 before rank=16), then others."""
    family, _, variant = name.partition("@")
    place = ALGORITHMS.index(family) if family in ALGORITHMS else len(ALGORITHMS)
    natural = [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", variant)]
    return place, family, natural


def dataset_order(name: str) -> tuple[int, str]:
    """Sorts data sets as DomainBed does, those it does not know after them by name."""
    known = list(ENVIRONMENTS)
    return (known.index(name) if name in known else len(known)), name


class Summary(NamedTuple):
    """A mean over trials and its error, in percent; incomplete where a trial lacks an environment."""

    mean: float
    err: float
    trials: int
    complete: bool = True

    def __str__(self) -> str:
        return DIVERGED if np.isnan(self.mean) else f"{self.mean:.1f} +/- {self.err:.1f}"


def summarise(values: Sequence[float]) -> Summary | None:
    """Mean and standard error in percent of one accuracy per trial; None of none.

    Args:
        values: accuracies in [0, 1].

    Returns:
        The summary. One trial has error 0, as in DomainBed's tables, though its spread is not known.
    """
    if not values:
        return None
    return Summary(100 * float(np.mean(values)), 100 * float(np.std(values)) / float(np.sqrt(len(values))), len(values))


def summarise_spread(values: Sequence[float]) -> Summary | None:
    """Mean and sample standard deviation (ddof = 1) in percent of one accuracy per trial; None of none.

    Args:
        values: accuracies in [0, 1].

    Returns:
        The summary, its `err` the standard deviation: NaN of one trial.
    """
    if not values:
        return None
    spread = 100 * float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return Summary(100 * float(np.mean(values)), spread, len(values))


class Scored(Protocol):
    """What has a chosen record."""

    @property
    def selection(self) -> Selection:
        """The chosen record and what it was chosen by."""


def recorded(scores: Iterable[Scored], key: str) -> list[int]:
    """The values of a key that the chosen records may lack."""
    return [score.selection.record[key] for score in scores if score.selection.record.get(key) is not None]


def parameter_counts(scores: Sequence[Scored], trials: int) -> Iterator[tuple[str, Summary]]:
    """The mean of each count of parameters that was recorded, in numbers, which have no error."""
    for count in ("trainable_parameters", "total_parameters"):
        if values := recorded(scores, count):
            yield count, Summary(float(np.mean(values)), float("nan"), trials)


def labelled(algorithm: str, lack: str) -> str:
    """An algorithm's name with what its runs lack, if anything."""
    return f"{algorithm} ({lack})" if lack else algorithm


def by_run(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Each run's records, runs and records in the order given."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["run"], []).append(record)
    return found


def environment_names(records: Iterable[Record]) -> dict[str, list[str]]:
    """The names of each data set's environments: as recorded, else DomainBed's, else env0, env1, ...

    Args:
        records: of any number of runs.

    Returns:
        By data set, in the order of tables.

    Raises:
        BenchmarkError: two runs disagree.
    """
    named: dict[str, tuple[list[str], str]] = {}
    count: defaultdict[str, int] = defaultdict(int)
    for record in records:
        dataset = record["args"]["dataset"]
        count[dataset] = max(count[dataset], num_environments(record))
        if names := record.get("environments"):
            first, run = named.setdefault(dataset, (names, record["run"]))
            if names != first:
                raise BenchmarkError(
                    f"runs {run} and {record['run']} disagree on the environments of {dataset} "
                    f"({', '.join(first)} against {', '.join(names)}): collect them from separate folders"
                )
    environments: dict[str, list[str]] = {}
    for dataset in sorted(count, key=dataset_order):
        names = named[dataset][0] if dataset in named else ENVIRONMENTS.get(dataset, [])
        # Records of fewer or more environments than the names we know are not of the data set that we know.
        environments[dataset] = (
            list(map(_readable, names))
            if len(names) == count[dataset]
            else [f"env{env}" for env in range(count[dataset])]
        )
    return environments


def _readable(name: str) -> str:
    """A name as documents can show it: of a folder's name that is not UTF-8 some bytes are no text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
