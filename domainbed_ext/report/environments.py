"""The environments of data sets: their names in tables, and the order of data sets."""

from collections import defaultdict
from collections.abc import Iterable

from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import Record, num_environments

# DomainBed's labels, for records that do not name their environments (its own), and its order of data sets.
UPSTREAM_LABELS = {
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


def dataset_order(name: str) -> tuple[int, str]:
    """Sort key of data sets: DomainBed's in its order, then all others by name."""
    in_order = list(UPSTREAM_LABELS)
    return (in_order.index(name) if name in in_order else len(in_order)), name


def environment_labels(records: Iterable[Record]) -> dict[str, list[str]]:
    """Returns the labels of each data set's environments: as recorded, else DomainBed's, else env0, env1, ...

    Args:
        records: Records of any number of runs.

    Returns:
        Labels by data set, in the order of tables.

    Raises:
        BenchmarkError: Two runs disagree.
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
    labels: dict[str, list[str]] = {}
    for dataset in sorted(count, key=dataset_order):
        names = named[dataset][0] if dataset in named else UPSTREAM_LABELS.get(dataset, [])
        # With fewer or more environments than labels, it is another data set of the same name.
        labels[dataset] = (
            list(map(_readable, names))
            if len(names) == count[dataset]
            else [f"env{env}" for env in range(count[dataset])]
        )
    return labels


def _readable(name: str) -> str:
    """A name as documents can show it: a folder's name that is not UTF-8 has bytes that are no text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def full_names(dataset: str) -> dict[str, str]:
    """Returns what the short labels of a data set's environments stand for, as `sketch` for `S` of PACS.

    Args:
        dataset: Name of the data set.

    Returns:
        Name by label, of labels that differ from the name; none of a data set that is not declared here.
    """
    try:
        kind = DATASETS[dataset]
    except (KeyError, BenchmarkError):  # not declared, or by an entry point that cannot be imported
        return {}
    pairs = zip(kind.ENVIRONMENTS, getattr(kind, "DOMAINS", ()), strict=False)
    return {label: name for label, name in pairs if name != label}
