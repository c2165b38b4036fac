"""TerraIncognita out of CCT20's annotation lists."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.prepare.terra_incognita import CATEGORIES, LISTS, LOCATIONS
from tests.domainbed_ext.small_archives import know, listing, picture, prepare, write_folder, write_tar


def cct20():
    """Five lists that overlap, with pictures of other places and animals, and pictures of several animals."""
    draw = np.random.default_rng(3)
    names = [*CATEGORIES, "car", "deer"]
    lists = [{"categories": [], "images": [], "annotations": []} for _ in LISTS]
    for content in lists:
        content["categories"] = [{"id": 7 * i, "name": name} for i, name in enumerate(names)]
    number = 0
    for location in (*map(int, LOCATIONS), 1, 381):
        for i in range(len(names)):
            for _ in range(2):
                number += 1
                image = {"id": f"id-{number}", "file_name": f"{number}.jpg", "location": location}
                for place in draw.choice(len(lists), draw.integers(1, 3), replace=False):
                    lists[place]["images"].append(image)
                    lists[place]["annotations"].append({"image_id": image["id"], "category_id": 7 * i})
                if number % 5 == 0:  # another animal, told in a list of its own choice
                    other = int(draw.integers(len(names)))
                    lists[draw.integers(5)]["annotations"].append({"image_id": image["id"], "category_id": 7 * other})
    return dict(zip(LISTS, lists, strict=True)), number


def naively(lists):
    """DomainBed's nested scan, in words of its protocol."""
    every = {key: [row for content in lists.values() for row in content[key]] for key in ("images", "annotations")}
    names = {row["id"]: row["name"] for content in lists.values() for row in content["categories"]}
    return {
        f"location_{image['location']}/{names[annotation['category_id']]}/{image['file_name']}"
        for image in every["images"]
        for annotation in every["annotations"]
        if annotation["image_id"] == image["id"]
        and str(image["location"]) in ("38", "46", "100", "43")
        and names[annotation["category_id"]] in CATEGORIES
    }


def test_terra_incognita_from_cct20(monkeypatch, tmp_path):
    lists, number = cct20()
    expected = naively(lists)
    assert max(Counter(Path(place).name for place in expected).values()) == 2  # some pictures are in two categories
    counts = defaultdict(int)
    for place in expected:
        counts[place.split("/")[0]] += 1
    know(monkeypatch, "TerraIncognita", dict(counts), dict.fromkeys(counts, 1), classes=10)
    pictures = {f"eccv_18_all_images_sm/{n + 1}.jpg": picture(n) for n in range(number)}
    notes = {f"eccv_18_annotation_files/{name}": json.dumps(content).encode() for name, content in lists.items()}
    a = write_tar(tmp_path / "eccv_18_all_images_sm.tar.gz", pictures)
    b = write_tar(tmp_path / "eccv_18_annotations.tar.gz", notes)
    assert prepare("TerraIncognita", tmp_path, a, b) == 0
    assert listing(tmp_path / "terra_incognita") == sorted(expected)
    # Unpacked, and laid out already, it is the same.
    one = write_folder(tmp_path / "one", pictures | notes)
    assert prepare("TerraIncognita", tmp_path / "2", one) == 0
    assert prepare("TerraIncognita", tmp_path / "3", tmp_path / "2" / "terra_incognita") == 0
    assert listing(tmp_path / "3" / "terra_incognita") == sorted(expected)
    (one / "eccv_18_annotation_files" / LISTS[2]).unlink()
    with pytest.raises(BenchmarkError, match="no train_annotations.json in .*: give eccv_18_annotations"):
        prepare("TerraIncognita", tmp_path / "4", one)
    some = write_folder(tmp_path / "some", dict(list(pictures.items())[1:]) | notes)
    with pytest.raises(BenchmarkError, match=r"1 image\(s\) of the annotation lists are not there, 1.jpg first"):
        prepare("TerraIncognita", tmp_path / "5", some)
    (some / "eccv_18_annotation_files" / LISTS[0]).write_text('{"images": [{"id": 1}]}')
    with pytest.raises(BenchmarkError, match="cis_test_annotations.json is no annotation list"):
        prepare("TerraIncognita", tmp_path / "6", some)


def test_an_annotation_cannot_place_a_file_elsewhere(tmp_path):
    lists, _ = cct20()
    lists[LISTS[0]]["images"].append({"id": 1, "file_name": "../../../evil.jpg", "location": 38})
    notes = write_folder(tmp_path / "a", {name: json.dumps(content).encode() for name, content in lists.items()})
    with pytest.raises(BenchmarkError, match="names a file '../../../evil.jpg', which could lie anywhere"):
        prepare("TerraIncognita", tmp_path / "data", notes)
