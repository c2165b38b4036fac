"""Data sets that are folders: `<root>/<data set>/<environment>/<class>/<image>`.

Environments and classes are the sorted sub-folders, as in DomainBed. Unlike DomainBed, an unexpected folder is
an error and not an environment, and so are classes that differ between environments: either would shift every
index silently. Files and folders that are hidden, or of operating systems, are ignored.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from domainbed_ext.datasets.base import Environment, MultipleDomainDataset
from domainbed_ext.datasets.digest import content_of_files
from domainbed_ext.datasets.image_files import UnusableImage, check, read, unreadable
from domainbed_ext.datasets.listing import count_images, list_images, split_folders
from domainbed_ext.datasets.registry import register_dataset
from domainbed_ext.errors import BenchmarkError, warn_once


class FileEnvironment(Environment):
    """Image files with their labels.

    Args:
        name: Name of the domain.
        paths: Paths of the files.
        targets: Labels of the images.
        concepts: Concepts of the images; empty where they carry none.
    """

    def __init__(self, name: str, paths: Sequence[str], targets: Sequence[int], concepts: Sequence[str] = ()) -> None:
        self.name, self.paths, self.targets, self.concepts = name, paths, targets, concepts

    def load(self, index: int) -> Image.Image:
        """Decodes an image file to RGB."""
        path = self.paths[index]
        try:
            return read(path)
        except UnusableImage as reason:
            raise unreadable({path: str(reason)}) from reason

    def image_names(self) -> list[str]:
        """Paths below the folder that all the files are in, e.g. "dog/056_0001.jpg"."""
        paths = [os.path.abspath(path) for path in self.paths]
        folder = os.path.join(os.path.commonpath([os.path.dirname(path) for path in paths]), "")
        return [path.removeprefix(folder).replace(os.sep, "/") for path in paths]

    def content(self) -> Iterator[bytes]:
        """Names and sizes of the files."""
        return content_of_files(self.paths)

    def verify(self) -> dict[str, str]:
        """Images that cannot be read: the reason by path. Those of 8 bits are checked without decoding their pixels."""
        broken = {}
        for path in self.paths:
            try:
                check(path)
            except UnusableImage as reason:
                broken[path] = str(reason)
        return broken


class FolderEnvironment(FileEnvironment):
    """The images of one folder, by class. Listed as torchvision's `ImageFolder` lists them, so that index i is
    DomainBed's index i; what is hidden is left out.

    Args:
        path: Folder of the domain.
        names_are_concepts: Whether the name of a file, without its ending, is the image's concept.

    Attributes:
        classes: Names of the class folders.
        hidden: Paths of what is ignored because of its name.
        unused: Paths of images that are ignored since they lie beside the class folders, or have another ending.
    """

    def __init__(self, path: Path, names_are_concepts: bool = False) -> None:
        listing = list_images(path)
        empty = [name for label, name in enumerate(listing.classes) if label not in set(listing.targets)]
        if empty or not listing.classes:
            where = f"class folder(s) {', '.join(empty)} of {path}" if empty else f"domain folder {path}"
            raise BenchmarkError(f"no image in {where}: it should be <domain>/<class>/<image>; put the images there")
        concepts = [Path(file).stem for file in listing.files] if names_are_concepts else []
        super().__init__(path.name, listing.files, listing.targets, concepts)
        self.classes, self.hidden, self.unused = listing.classes, listing.hidden, listing.unused


@register_dataset("ImageFolderDomains")
class ImageFolderDomains(MultipleDomainDataset):
    """Any folder of domains: `--dataset ImageFolderDomains --data_dir FOLDER`, with
    `FOLDER/<environment>/<class>/<image>`.

    Raises:
        BenchmarkError: The folder is missing, it has fewer than two domains, one is empty, or classes differ.
    """

    CHECKPOINT_FREQ: ClassVar[int] = 300
    FOLDER: ClassVar[str] = ""
    DOMAINS: ClassVar[tuple[str, ...]] = ()
    NAMES_ARE_CONCEPTS: ClassVar[bool] = False  # of files, without their endings

    def __init__(self, root: Path | str | None, test_envs: Sequence[int], hparams: dict[str, Any]) -> None:
        super().__init__(root, test_envs, hparams)
        name, folder = type(self).__name__, self._folder(root)
        domains, hidden = split_folders(folder)
        if self.DOMAINS:
            missing = [domain for domain in self.DOMAINS if domain not in domains]
            unexpected = [domain for domain in domains if domain not in self.DOMAINS]
            if missing:
                raise BenchmarkError(f"{name}: missing domain folder(s) {', '.join(missing)} in {folder}; add them")
            if unexpected:
                raise BenchmarkError(
                    f"{name}: unexpected folder(s) {', '.join(unexpected)} in {folder} would be domains; move them away"
                )
        elif len(domains) < 2:
            raise BenchmarkError(f"{name}: {folder} holds {len(domains)} domain folder(s), but it takes at least two")
        self.domains = domains
        self.datasets: list[FolderEnvironment] = [
            FolderEnvironment(folder / domain, self.NAMES_ARE_CONCEPTS) for domain in domains
        ]
        self.classes = self.datasets[0].classes
        for environment in self.datasets[1:]:
            _check_same_classes(name, self.datasets[0], environment)
        _warn_of_unused(name, folder, [path for environment in self.datasets for path in environment.unused])
        _warn_of_hidden(name, folder, hidden + [path for environment in self.datasets for path in environment.hidden])

    @classmethod
    def check_data_dir(cls, root: Path | str | None) -> None:
        """Refuses a `--data_dir` in which there is no folder of the data set."""
        cls._folder(root)

    @classmethod
    def _folder(cls, root: Path | str | None) -> Path:
        """The folder of the domains."""
        name = cls.__name__
        if root is None:
            raise BenchmarkError(f"{name} needs its images: add --data_dir with the folder that holds {cls.layout()}")
        folder = Path(root).expanduser() / cls.FOLDER
        if not folder.is_dir():
            given = Path(root).expanduser().absolute()
            is_data_set = bool(cls.DOMAINS) and given.name == cls.FOLDER and (given / cls.DOMAINS[0]).is_dir()
            hint = f": did you mean --data_dir {given.parent}?" if is_data_set else ""
            raise BenchmarkError(f"{name}: no folder {folder}; --data_dir should hold {cls.layout()}{hint}")
        return folder

    @classmethod
    def layout(cls) -> str:
        """Returns the expected layout of the folders."""
        return "/".join(part for part in (cls.FOLDER, "<domain>", "<class>", "<image>") if part)

    @property
    def environments(self) -> tuple[str, ...]:
        """DomainBed's short labels, or the folders' names where there are none."""
        return self.ENVIRONMENTS or tuple(self.domains)


def _check_same_classes(dataset: str, first: FolderEnvironment, other: FolderEnvironment) -> None:
    if first.classes == other.classes:
        return
    differing = []
    for here, there in ((first, other), (other, first)):
        only = sorted(set(here.classes) - set(there.classes))
        if only:
            differing.append(f"{', '.join(only)} only in {here.name}")
    raise BenchmarkError(
        f"{dataset}: classes differ between domains ({'; '.join(differing)}): give every domain the same class folders"
    )


def _warn_of_hidden(dataset: str, folder: Path, hidden: Sequence[str]) -> None:
    counts = {path: count for path in hidden if (count := count_images(path))}
    if total := sum(counts.values()):
        examples = _examples(folder, list(counts))
        warn_once(f"{dataset}: {total} image(s) ignored, hidden or in hidden or system folders: {examples}")


def _warn_of_unused(dataset: str, folder: Path, unused: Sequence[str]) -> None:
    if unused:
        examples = _examples(folder, unused)
        warn_once(f"{dataset}: {len(unused)} image(s) not used, beside class folders or of other endings: {examples}")


def _examples(folder: Path, paths: Sequence[str]) -> str:
    return ", ".join([*(os.path.relpath(path, folder) for path in paths[:3]), *(["..."] if len(paths) > 3 else [])])


@register_dataset("VLCS")
class VLCS(ImageFolderDomains):
    """VLCS (Fang et al., 2013): photographs from four data sets, 5 classes."""

    ENVIRONMENTS = ("C", "L", "S", "V")
    FOLDER = "VLCS"
    DOMAINS = ("Caltech101", "LabelMe", "SUN09", "VOC2007")


@register_dataset("PACS")
class PACS(ImageFolderDomains):
    """PACS (Li et al., 2017): art, cartoons, photographs and sketches, 7 classes."""

    ENVIRONMENTS = ("A", "C", "P", "S")
    FOLDER = "PACS"
    DOMAINS = ("art_painting", "cartoon", "photo", "sketch")


@register_dataset("OfficeHome")
class OfficeHome(ImageFolderDomains):
    """OfficeHome (Venkateswara et al., 2017): art, clipart, product shots and photographs, 65 classes."""

    ENVIRONMENTS = ("A", "C", "P", "R")
    FOLDER = "office_home"
    DOMAINS = ("Art", "Clipart", "Product", "Real World")


@register_dataset("TerraIncognita")
class TerraIncognita(ImageFolderDomains):
    """TerraIncognita (Beery et al., 2018): camera traps at four locations, 10 classes."""

    ENVIRONMENTS = ("L100", "L38", "L43", "L46")
    FOLDER = "terra_incognita"
    DOMAINS = ("location_100", "location_38", "location_43", "location_46")


@register_dataset("DomainNet")
class DomainNet(ImageFolderDomains):
    """DomainNet (Peng et al., 2019): six styles, 345 classes."""

    CHECKPOINT_FREQ = 1000
    ENVIRONMENTS = ("clip", "info", "paint", "quick", "real", "sketch")
    FOLDER = "domain_net"
    DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


@register_dataset("EmojiStyles")
class EmojiStyles(ImageFolderDomains):
    """EmojiStyles: the same 1,234 emoji as five artists draw them, 7 classes. `prepare` draws it."""

    ENVIRONMENTS = ("F", "I", "N", "O", "T")
    FOLDER = "emoji_styles"
    DOMAINS = ("fluent", "ink", "noto", "openmoji", "twemoji")
    NAMES_ARE_CONCEPTS = True
