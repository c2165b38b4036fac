"""The data sets by name. Each declares itself at its class, by `register_dataset`."""

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
    """Makes a class a data set, for `--dataset` and sweeps. What else there is to say of it are its class attributes.

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
    """The data set of a name.

    Args:
        name: Name in any spelling.

    Returns:
        Its class.

    Raises:
        BenchmarkError: Unknown, naming the nearest; or of an entry point that cannot be imported.
    """
    return DATASETS.find(name)
