"""The names of a data set's environments."""

from collections.abc import Sequence

from domainbed_ext.datasets.base import MultipleDomainDataset
from domainbed_ext.datasets.registry import DATASETS


def environment_names(dataset: MultipleDomainDataset) -> list[list[str]]:
    """Returns the names of each environment of a data set: its label, and its folder's name."""
    return [[label, part.name] for label, part in zip(dataset.environments, dataset.datasets, strict=True)]


def names_in_dataset(dataset: str, data_dir: str | None) -> Sequence[Sequence[str]]:
    """Returns the names of a data set's environments; images are needed only if its class does not list them.

    Args:
        dataset: Name of the data set.
        data_dir: Folder that holds the data sets.
    """
    kind = DATASETS[dataset]
    labels, folders = kind.ENVIRONMENTS, getattr(kind, "DOMAINS", ())
    if labels:
        return list(zip(labels, folders or labels, strict=True))
    return environment_names(kind(data_dir, [], {}))
