"""EmojiStyles: the emoji that five packages of icons all have, drawn as images of one size.

The packages hold vector graphics in Iconify's JSON, under Unicode's names. A concept is a name that all five have, in a
category of Unicode that is a class here. The categories "People & Body" and "Flags" are none: with them all variants of
skin tone and gender are left out, which are in no other.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.prepare.downloads import DOWNLOADS, Download
from domainbed_ext.prepare.layout import Plan, Root, find_files
from domainbed_ext.system import strict_json
from domainbed_ext.system.files import write_atomically
from domainbed_ext.system.processes import several
from domainbed_ext.system.progress import bar

SIZE = 224  # px, width and height of an image
BACKGROUND = "#ffffff"
DOMAINS = {  # the package of each, without Iconify's scope
    "fluent": "fluent-emoji",
    "ink": "fluent-emoji-high-contrast",
    "noto": "noto",
    "openmoji": "openmoji",
    "twemoji": "twemoji",
}
CATEGORIES = {  # Unicode's, and the class that each is
    "Activities": "activities",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Objects": "objects",
    "Smileys & Emotion": "smileys",
    "Symbols": "symbols",
    "Travel & Places": "travel",
}
SORTED_BY = "noto"  # domain whose package says of which category a concept is; those of the others differ on twelve

ATTRIBUTION = "ATTRIBUTION.txt"
ATTRIBUTION_JSON = "attribution.json"
_RENDERER = "resvg_py"
_AT_ONCE = 16  # images that a process draws before it is given others


@dataclass(frozen=True)
class IconSet:
    """One of the packages.

    Attributes:
        source: Where it comes from.
        files: Its files by name.
    """

    source: Download
    files: Mapping[str, Path]

    @cached_property
    def _content(self) -> Any:
        return _read(self.files["icons.json"])

    @property
    def icons(self) -> dict[str, Any]:
        """Its icons by name; names that stand for other icons are not among them."""
        return self._content["icons"]

    @cached_property
    def info(self) -> dict[str, Any]:
        """Its name, author and licence."""
        return _read(self.files["info.json"])

    @cached_property
    def categories(self) -> dict[str, list[str]]:
        """The names of the icons of each category."""
        return _read(self.files["metadata.json"])["categories"]

    def make_svg(self, name: str) -> str:
        """Makes the SVG of an icon, as large as an image: one that is not square is centred.

        Args:
            name: Name of the icon.
        """
        icon = self.icons[name]
        default = {"left": 0, "top": 0, "width": 16, "height": 16}
        box = (icon.get(key, self._content.get(key, value)) for key, value in default.items())
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000000" '
            f'width="{SIZE}" height="{SIZE}" viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
        )


@dataclass(frozen=True)
class _Drawing:
    """An image to draw."""

    svg: str
    path: Path
    what: str


def check_renderer() -> None:
    """Refuses to begin without the package that draws.

    Raises:
        BenchmarkError: It is not installed.
    """
    if importlib.util.find_spec(_RENDERER) is None:
        raise BenchmarkError("EmojiStyles is drawn by resvg-py, which is not installed: pip install 'resvg-py>=0.5'")


def plan(roots: Sequence[Root], folder: Path, workers: int) -> Plan:
    """Draws the images, those that are not there yet, and plans which goes where.

    Args:
        roots: Where the packages are, by the names of their files.
        folder: Folder for the images. What an earlier start drew there with the same packages and renderer is used.
        workers: Number of processes that draw.

    Returns:
        The plan of the images, and of two files that say whose work they are.

    Raises:
        BenchmarkError: A package is missing, or an image cannot be drawn.
    """
    sets = find_sets(roots)
    concepts = find_concepts(sets)
    drawn = folder / _key(sets)
    places = {(domain, name): f"{domain}/{label}/{name}.png" for domain in DOMAINS for name, label in concepts.items()}
    missing = {key: place for key, place in places.items() if not (drawn / place).exists()}
    for parent in {(drawn / place).parent for place in missing.values()}:
        parent.mkdir(parents=True, exist_ok=True)
    drawings = (
        _Drawing(sets[domain].make_svg(name), drawn / place, f"{name} of {sets[domain].source.package}")
        for (domain, name), place in missing.items()
    )
    with bar("drawing", len(places), "images") as shown, several(workers, _AT_ONCE) as run:
        shown.start_from(len(places) - len(missing))
        for _ in run(_draw, drawings):
            shown.advance()
    facts = describe(sets, concepts)
    write_atomically(drawn / ATTRIBUTION_JSON, strict_json.dumps(facts, indent=2) + "\n")
    write_atomically(drawn / ATTRIBUTION, "\n".join(format_attribution(facts)) + "\n")
    return [(drawn / place, place) for place in (*places.values(), ATTRIBUTION, ATTRIBUTION_JSON)]


def find_sets(roots: Sequence[Root]) -> dict[str, IconSet]:
    """Finds the packages.

    Args:
        roots: Where they are, by the names of their files.

    Returns:
        The package of each domain.

    Raises:
        BenchmarkError: One is missing.
    """
    by_name = {root.name: root for root in reversed(roots)}
    sources = {domain: _source(package) for domain, package in DOMAINS.items()}
    missing = [source for source in sources.values() if source.name not in by_name]
    if missing:
        names = ", ".join(source.name for source in missing)
        given = ", ".join(root.name for root in roots) or "nothing"
        raise BenchmarkError(
            f"EmojiStyles: no {names} in {given}: give the files that npm pack "
            f"{' '.join(source.package for source in missing)} makes by --archive, too"
        )
    names_of_files = ("icons.json", "info.json", "metadata.json")
    return {
        domain: IconSet(source, find_files([by_name[source.name]], names_of_files))
        for domain, source in sources.items()
    }


def _source(package: str) -> Download:
    (source,) = (each for each in DOWNLOADS["EmojiStyles"] if each.package.startswith(f"@iconify-json/{package}@"))
    return source


def find_concepts(sets: Mapping[str, IconSet]) -> dict[str, str]:
    """Finds the concepts: the names of icons that all packages have, in a category that is a class.

    Args:
        sets: Package of each domain.

    Returns:
        The class of each concept, sorted by concept.
    """
    label_of = {
        name: CATEGORIES[category]
        for category, names in sets[SORTED_BY].categories.items()
        if category in CATEGORIES
        for name in names
    }
    common = set.intersection(*(set(icons.icons) for icons in sets.values()))
    return {name: label_of[name] for name in sorted(common & label_of.keys())}


def _key(sets: Mapping[str, IconSet]) -> str:
    """What the images follow from, as the name of a folder."""
    facts = [[icons.source.integrity for icons in sets.values()], _renderer(), SIZE, BACKGROUND]
    return hashlib.sha256(strict_json.dumps(facts).encode()).hexdigest()[:12]


def _renderer() -> str:
    return f"resvg-py {importlib.metadata.version(_RENDERER)}"


def _draw(drawing: _Drawing) -> None:
    import resvg_py  # here, for only this data set needs it

    try:
        image = resvg_py.svg_to_bytes(svg_string=drawing.svg, background=BACKGROUND, skip_system_fonts=True)
    except ValueError as error:
        raise BenchmarkError(
            f"EmojiStyles: {drawing.what} cannot be drawn ({error}): install another version of resvg-py"
        ) from error
    write_atomically(drawing.path, bytes(image))


def describe(sets: Mapping[str, IconSet], concepts: Mapping[str, str]) -> dict[str, Any]:
    """Describes what the images are, how many, and whose work.

    Args:
        sets: Package of each domain.
        concepts: Class of each concept.
    """
    counts = dict(sorted(Counter(concepts.values()).items()))
    return {
        "dataset": "EmojiStyles",
        "images": len(concepts) * len(sets),
        "concepts": len(concepts),
        "rule": "names of emoji that all packages have, in a category of Unicode that is a class; the categories "
        "People & Body and Flags are none, and with them all variants of skin tone and gender are left out",
        "classes": {label: category for category, label in CATEGORIES.items()},
        "categories_of": sets[SORTED_BY].source.package,
        "width": SIZE,
        "height": SIZE,
        "background": BACKGROUND,
        "renderer": _renderer(),
        "domains": {domain: _describe_set(icons, counts) for domain, icons in sets.items()},
    }


def _describe_set(icons: IconSet, counts: Mapping[str, int]) -> dict[str, Any]:
    author, licence = icons.info["author"], icons.info["license"]
    return {
        "title": icons.info["name"],
        "author": author["name"],
        "source": author.get("url", ""),
        "licence": licence.get("spdx") or licence["title"],
        "licence_url": licence.get("url", ""),
        "package": icons.source.package,
        "integrity": icons.source.integrity,
        "images": sum(counts.values()),
        "classes": dict(counts),
    }


def format_attribution(facts: Mapping[str, Any]) -> Iterator[str]:
    """Says in words whose work the images are.

    Args:
        facts: What `describe` returns.

    Yields:
        Lines of text.
    """
    yield f"EmojiStyles: {facts['images']:,} images of {facts['concepts']:,} concepts, drawn by several artists"
    yield ""
    yield (
        f"Each artist's vector graphics were drawn at {facts['width']} x {facts['height']} px on {facts['background']} "
        f"by {facts['renderer']}; nothing else was changed."
    )
    yield f"Concepts: {facts['rule']}."
    yield "The images of a domain may be used under the licence of its artist's work, which asks for this attribution."
    for domain, each in facts["domains"].items():
        yield ""
        yield f"{domain}/"
        yield f"  {each['title']} by {each['author']}, {each['source']}"
        yield f"  licence: {each['licence']}, {each['licence_url']}"
        yield f"  package: {each['package']}, {each['integrity']}"
        counts = ", ".join(f"{label} {count:,}" for label, count in each["classes"].items())
        yield f"  images: {each['images']:,} ({counts})"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
