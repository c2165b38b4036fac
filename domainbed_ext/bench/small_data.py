"""A part of an image data set, as links to its files: for measurements that would take too long on all of it."""

from pathlib import Path

from domainbed_ext.datasets.folders import FolderEnvironment, ImageFolderDomains
from domainbed_ext.datasets.registry import get_dataset_class
from domainbed_ext.errors import BenchmarkError


def link_part(dataset: str, data_dir: str, per_class: int, folder: Path) -> Path:
    """Links the first images of every class and domain.

    Args:
        dataset: Name of a data set of image folders.
        data_dir: Folder that contains it.
        per_class: Number of images of each class in each domain; 0 for all.
        folder: Folder for the links.

    Returns:
        The `--data_dir` of the links.

    Raises:
        BenchmarkError: If there is no such data set, or it does not consist of image folders.
    """
    known = get_dataset_class(dataset)
    if not issubclass(known, ImageFolderDomains):
        raise BenchmarkError(f"{dataset} does not consist of image folders: choose a data set that does, e.g. PACS")
    for environment in known(data_dir, [], {}).datasets:
        assert isinstance(environment, FolderEnvironment)
        taken: dict[int, int] = {}
        for path, label in zip(map(Path, environment.paths), environment.targets, strict=True):
            taken[label] = taken.get(label, 0) + 1
            if not per_class or taken[label] <= per_class:
                link = folder / known.FOLDER / environment.name / path.parent.name / path.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
    return folder


def how_many(per_class: int) -> str:
    """What `link_part` links, in words."""
    return f"{per_class} images of each class and domain" if per_class else "all"
