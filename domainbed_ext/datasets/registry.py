"""The data sets by name. A new one is a class and a line here."""

from domainbed_ext.datasets.base import MultipleDomainDataset
from domainbed_ext.datasets.debug import Debug28, Debug224
from domainbed_ext.datasets.digits import DigitsShift
from domainbed_ext.datasets.folders import (
    PACS,
    VLCS,
    DomainNet,
    ImageFolderDomains,
    OfficeHome,
    TerraIncognita,
)
from domainbed_ext.datasets.manifest import Manifest
from domainbed_ext.datasets.mnist import ColoredMNIST, RotatedMNIST
from domainbed_ext.errors import unknown

DATASETS: dict[str, type[MultipleDomainDataset]] = {
    "DigitsShift": DigitsShift,
    "Debug28": Debug28,
    "Debug224": Debug224,
    "RotatedMNIST": RotatedMNIST,
    "ColoredMNIST": ColoredMNIST,
    "VLCS": VLCS,
    "PACS": PACS,
    "OfficeHome": OfficeHome,
    "TerraIncognita": TerraIncognita,
    "DomainNet": DomainNet,
    "ImageFolderDomains": ImageFolderDomains,
    "Manifest": Manifest,
}


def get_dataset_class(name: str) -> type[MultipleDomainDataset]:
    """The data set of a name.

    Args:
        name: a key of `DATASETS`.

    Returns:
        Its class.

    Raises:
        BenchmarkError: unknown; names the nearest.
    """
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    return DATASETS[name]
