"""The names of a data set's environments."""

from collections.abc import Sequence

from domainbed_ext.datasets.base import MultipleDomainDataset
from domainbed_ext.datasets.registry import DATASETS


def list_environments(dataset: str, data_dir: str | None) -> Sequence[Sequence[str]]:
    """Lists what a data set's environments may be called; reads its files only where its class does not say.

    Args:
        dataset: Name of the data set.
        data_dir: Folder that holds the data sets.

    Returns:
        In index order, the names of each environment.
    """
    return declared_environments(dataset) or names_in(DATASETS[dataset](data_dir, [], {}))


def declared_environments(dataset: str) -> list[tuple[str, ...]]:
    """The names that a data set's class declares, a label and the folder's name; empty if its folders decide.

    Args:
        dataset: Name of the data set.
    """
    kind = DATASETS[dataset]
    return list(zip(kind.ENVIRONMENTS, getattr(kind, "DOMAINS", ()) or kind.ENVIRONMENTS, strict=True))


def names_in(dataset: MultipleDomainDataset) -> list[list[str]]:
    """The names of the environments that there are: the label of each, and its folder's name.

    Args:
        dataset: Data set.
    """
    return [[label, part.name] for label, part in zip(dataset.environments, dataset.datasets, strict=True)]
