"""The registry of data sets. Each registers itself at its class, by `register_dataset`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.system.registry import Registry, path_of

if TYPE_CHECKING:  # it is registered here
    from domainbed_ext.datasets.base import MultipleDomainDataset

D = TypeVar("D", bound=type)

GROUP = "domainbed_ext.datasets"

DATASETS: "Registry[type[MultipleDomainDataset]]" = Registry(
    "data set",
    GROUP,
    [f"domainbed_ext.datasets.{module}" for module in ("digits", "debug", "mnist", "folders", "manifest")],
    make=lambda name, dataset: dataset,
)


def register_dataset(name: str) -> Callable[[D], D]:
    """Registers a class as a data set, for `--dataset` and sweeps. Its class attributes say the rest.

    Args:
        name: Name in commands and records.

    Returns:
        Decorator of a subclass of `MultipleDomainDataset`.

    Raises:
        BenchmarkError: The name is taken.
    """
    if not isinstance(name, str):
        raise BenchmarkError('register_dataset takes a name: write @register_dataset("Name")')

    def decorate(dataset: D) -> D:
        DATASETS.register(name, dataset, path_of(dataset))
        return dataset

    return decorate


def get_dataset_class(name: str) -> "type[MultipleDomainDataset]":
    """Returns the class of a data set.

    Args:
        name: Name in any spelling.

    Raises:
        BenchmarkError: The name is unknown, or of an entry point that cannot be imported.
    """
    return DATASETS.find(name)
