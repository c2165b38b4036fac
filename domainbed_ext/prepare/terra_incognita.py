"""TerraIncognita out of the Caltech Camera Traps' 20-location set (Beery et al., 2018), as DomainBed does it.

Five lists, COCO-style, say which image was taken where and what is on it. Of four locations and ten categories,
each image goes to `location_<location>/<category>/<file name>`; one with animals of several categories goes to each.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.prepare.layout import Plan, Root, find_files

LISTS = tuple(f"{name}_annotations.json" for name in ("cis_test", "cis_val", "train", "trans_test", "trans_val"))
LOCATIONS = ("100", "38", "43", "46")
CATEGORIES = (
    "bird",
    "bobcat",
    "cat",
    "coyote",
    "dog",
    "empty",
    "opossum",
    "rabbit",
    "raccoon",
    "squirrel",
)


def has_lists(roots: Sequence[Root]) -> bool:
    """Whether any of the five lists is there.

    Args:
        roots: Where to look.
    """
    return bool(find_files(roots, LISTS))


def plan(roots: Sequence[Root]) -> Plan:
    """Plans which image goes where.

    Args:
        roots: Where the lists and images are.

    Returns:
        The plan; each place once.

    Raises:
        BenchmarkError: A list or an image is missing, or a list is broken.
    """
    lists = find_files(roots, LISTS)
    missing = [name for name in LISTS if name not in lists]
    if missing:
        raise BenchmarkError(
            f"TerraIncognita: no {', '.join(missing)} in the archives: give eccv_18_annotations.tar.gz by --archive"
        )
    categories: dict[Any, str] = {}
    pictures: dict[Any, tuple[str, str]] = {}  # image id to location and file name
    seen: dict[Any, set[Any]] = defaultdict(set)  # image id to category ids; an image may be in several lists
    for name in LISTS:
        try:
            content = json.loads(lists[name].read_text(encoding="utf-8"))
            categories.update({category["id"]: str(category["name"]) for category in content["categories"]})
            for picture in content["images"]:
                if str(picture["location"]) in LOCATIONS:
                    pictures[picture["id"]] = str(picture["location"]), _file_name(lists[name], picture["file_name"])
            for annotation in content["annotations"]:
                seen[annotation["image_id"]].add(annotation["category_id"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BenchmarkError(f"{lists[name]} is no annotation list of CCT20: download it again") from error
    places = {}
    for key, (location, file) in pictures.items():
        for category in {categories.get(category) for category in seen[key]}.intersection(CATEGORIES):
            places[f"location_{location}/{category}/{file}"] = file
    files = find_files(roots, list(set(places.values())))
    absent = sorted(set(places.values()) - set(files))
    if absent:
        raise BenchmarkError(
            f"TerraIncognita: {len(absent)} image(s) of the annotation lists are not there, {absent[0]} first: "
            f"give eccv_18_all_images_sm.tar.gz, whole, by --archive"
        )
    return [(files[file], place) for place, file in sorted(places.items())]


def _file_name(path: Path, name: Any) -> str:
    if not isinstance(name, str) or not name or any(part in name for part in ("/", "\\", "\0")) or name.startswith("."):
        raise BenchmarkError(f"{path} names a file {name!r}, which could lie anywhere: do not use it")
    return name
