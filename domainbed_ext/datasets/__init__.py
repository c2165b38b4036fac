"""Data sets in DomainBed's form: environments of labelled images.

base                    the base classes of data sets and environments
folders                 PACS, VLCS and others whose environments are folders of image files
manifest                a data set listed in a file
digits, mnist, debug    data sets in memory
listing, image_files    how folders and files are read
digest                  digests, which show whether a data set has changed
environment_names       the names of a data set's environments
registry                all data sets by name; `register_dataset` adds one
"""

from typing import TYPE_CHECKING

from domainbed_ext.system import lazy

if TYPE_CHECKING:
    from domainbed_ext.datasets.base import Environment, MultipleDomainDataset
    from domainbed_ext.datasets.folders import ImageFolderDomains
    from domainbed_ext.datasets.registry import DATASETS, get_dataset_class, register_dataset

__all__ = [
    "DATASETS",
    "Environment",
    "ImageFolderDomains",
    "MultipleDomainDataset",
    "get_dataset_class",
    "register_dataset",
]
__getattr__ = lazy.attributes(
    __name__,
    {
        "DATASETS": "domainbed_ext.datasets.registry",
        "get_dataset_class": "domainbed_ext.datasets.registry",
        "register_dataset": "domainbed_ext.datasets.registry",
        "Environment": "domainbed_ext.datasets.base",
        "MultipleDomainDataset": "domainbed_ext.datasets.base",
        "ImageFolderDomains": "domainbed_ext.datasets.folders",
    },
)
