"""Verifies a data set: counts, hashes, decoding, and the manifest."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import numpy as np
from rich.table import Table

from domainbed_ext.data.duplicates import Duplicates, Place, group
from domainbed_ext.datasets.folders import ImageFolderDomains
from domainbed_ext.datasets.manifest_file import COLUMNS, CONCEPT
from domainbed_ext.datasets.mnist import read_mnist
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.prepare.downloads import CLASSES, KNOWN, Counts, count_images
from domainbed_ext.prepare.examine import examine_all
from domainbed_ext.system.files import write_atomically
from domainbed_ext.system.progress import bar
from domainbed_ext.system.sizes import format_size

MANIFEST = "manifest.csv"
_COLUMNS = (*COLUMNS, "bytes", "sha256", CONCEPT)
_SHA256 = _COLUMNS.index("sha256")


@dataclass
class Verification:
    """What verifying found.

    Attributes:
        name: Name of the data set.
        counts: Number of images by domain and class.
        expected: What the counts should be, in the nearest version; None for the user's own data set.
        sizes: Bytes by domain.
        problems: Problems in words; empty if there are none.
        unreadable: Reason by path, of images that do not decode.
        duplicates: Images that are there more than once.
    """

    name: str
    counts: dict[str, dict[str, int]]
    expected: Counts | None
    sizes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    duplicates: Duplicates = field(default_factory=Duplicates)

    @property
    def images(self) -> int:
        """Number of all images."""
        return sum(sum(classes.values()) for classes in self.counts.values())

    def make_table(self) -> Table:
        """Makes a table of domains with their counts, the expected counts, and their sizes."""
        table = Table(title=self.name)
        for column in ("Domain", "Images", "Expected", "Classes", "Smallest", "Largest", "Size"):
            table.add_column(column, justify="left" if column == "Domain" else "right")
        for domain, classes in self.counts.items():
            expected = f"{count_images(self.expected, domain):,}" if self.expected else ""
            least, most = min(classes.values()), max(classes.values())
            images, size = sum(classes.values()), format_size(self.sizes[domain])
            table.add_row(domain, f"{images:,}", expected, f"{len(classes)}", f"{least:,}", f"{most:,}", size)
        expected = f"{sum(count_images(self.expected, domain) for domain in self.expected):,}" if self.expected else ""
        table.add_section()
        table.add_row("all", f"{self.images:,}", expected, "", "", "", format_size(sum(self.sizes.values())))
        return table


def verify(name: str, data_dir: Path, decode: bool, workers: int) -> Verification:
    """Counts and hashes a data set's images and compares them with published counts and with its manifest.

    Writes the manifest, `manifest.csv`, unless there is one that differs.

    Args:
        name: Name of a data set of folders, or MNIST.
        data_dir: Folder that holds it.
        decode: Whether to decode every image, too.
        workers: Number of processes that read images.

    Returns:
        The findings.

    Raises:
        BenchmarkError: The data set cannot be loaded at all.
    """
    if name == "MNIST":
        return _verify_mnist(data_dir)
    dataset = DATASETS[name](data_dir, [], {})
    assert isinstance(dataset, ImageFolderDomains)
    folder = data_dir / dataset.FOLDER
    rows = [
        (path, environment.classes[label], environment.name)
        for environment in dataset.datasets
        for path, label in zip(environment.paths, environment.targets, strict=True)
    ]
    counts: dict[str, dict[str, int]] = {}
    for environment in dataset.datasets:
        counts[environment.name] = dict(Counter(environment.classes[label] for label in environment.targets))
    verification = Verification(name, counts, _nearest(name, counts), problems=_miscounts(name, counts))
    with bar("reading", len(rows), "images") as shown:
        examined = examine_all([path for path, _, _ in rows], decode, workers, shown.advance)
    verification.duplicates = group(
        [bytes.fromhex(result.sha256) for result in examined], lambda i: Place(rows[i][0], rows[i][2], rows[i][1])
    )
    concepts = [[concept] for environment in dataset.datasets for concept in environment.concepts]
    table: list[tuple[str, ...]] = []
    for (path, label, domain), result, concept in zip(rows, examined, concepts or repeat([], len(rows)), strict=True):
        verification.sizes[domain] = verification.sizes.get(domain, 0) + result.size
        if result.problem:
            verification.unreadable[path] = result.problem
        place = Path(path).relative_to(folder).as_posix()
        table.append((place, label, domain, str(result.size), result.sha256, *concept))
    if verification.unreadable:
        verification.problems.append(f"{len(verification.unreadable)} image(s) do not decode: replace or delete them")
    changes = _changes(folder / MANIFEST, table)
    if changes:
        verification.problems.append(changes)
    elif odd := [name for name, *_ in table if not _is_utf8(name)]:
        verification.problems.append(
            f"{len(odd)} image name(s) are not UTF-8, {odd[0]!a} first, so the manifest cannot list them: rename them"
        )
    elif all(result.sha256 for result in examined):
        _write_manifest(folder / MANIFEST, table)
    return verification


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:  # surrogates, which stand for bytes that are no text
        return False
    return True


def _verify_mnist(data_dir: Path) -> Verification:
    counts, sizes = {}, {}
    for part in ("train", "test"):
        images, digits = read_mnist(data_dir, train=part == "train")
        values = np.unique(digits.numpy(), return_counts=True)
        counts[part] = {str(digit): int(count) for digit, count in zip(*values, strict=True)}
        sizes[part] = images.numel()
    return Verification("MNIST", counts, _nearest("MNIST", counts), sizes, _miscounts("MNIST", counts))


def _nearest(name: str, counts: dict[str, dict[str, int]]) -> Counts | None:
    versions = KNOWN.get(name, ())
    return min(versions, key=lambda expected: _distance(expected, counts)) if versions else None


def _distance(expected: Counts, counts: dict[str, dict[str, int]]) -> int:
    return sum(
        sum(abs(count - counts[domain].get(name, 0)) for name, count in images.items())
        if isinstance(images, dict)
        else abs(images - sum(counts[domain].values()))
        for domain, images in expected.items()
    )


def _miscounts(name: str, counts: dict[str, dict[str, int]]) -> list[str]:
    """Describes where the counts are not the expected ones."""
    expected = _nearest(name, counts)
    if expected is None:
        return []
    problems = []
    for domain, images in expected.items():
        actual = counts[domain]
        if len(actual) != CLASSES[name]:
            problems.append(f"{domain} has {len(actual)} classes instead of {CLASSES[name]}")
        if isinstance(images, dict):
            names = sorted(images.keys() | actual.keys())
            pairs = [(f"{domain}/{label}", actual.get(label, 0), images.get(label, 0)) for label in names]
        else:
            pairs = [(domain, sum(actual.values()), images)]
        problems += [
            f"{place} has {count:,} images instead of {right:,}" for place, count, right in pairs if count != right
        ]
        if name == "DomainNet" and sum(actual.values()) > count_images(expected, domain):
            problems.append(
                f"{domain} has duplicates (delete it, and give {domain}_train.txt and {domain}_test.txt too)"
            )
    return problems


def _changes(path: Path, table: Sequence[tuple[str, ...]]) -> str | None:
    """Describes how files differ from those in a manifest; None if they do not, or it has no hashes."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        before = {row.get("path", ""): row.get("sha256", "") for row in csv.DictReader(file)}
    if not all(before.values()):
        return None
    now = {row[0]: row[_SHA256] for row in table}
    changed = [name for name in now if name in before and now[name] != before[name]]
    gone = [name for name in before if name not in now]
    new = [name for name in now if name not in before]
    lists = {"changed": changed, "gone": gone, "new": new}
    words = [f"{len(names)} image(s) are {kind} ({names[0]} first)" for kind, names in lists.items() if names]
    if not words:
        return None
    return f"{', '.join(words)} since {path} was written: restore them, or delete that file to accept them as they are"


def _write_manifest(path: Path, table: Sequence[tuple[str, ...]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS[: len(table[0])])  # concepts where there are any
    writer.writerows(table)
    write_atomically(path, text.getvalue())
