"""A data set's digest: the same wherever the data lie, another where a name, size, label or class is another."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from domainbed_ext.datasets import get_dataset_class
from domainbed_ext.datasets.base import Environment, MultipleDomainDataset
from domainbed_ext.datasets.digest import digest
from domainbed_ext.system import file_stats
from tests.domainbed_ext.conftest import make_domains


def of(root, name="ImageFolderDomains"):
    return digest(get_dataset_class(name)(root, [], {}))


@pytest.fixture
def folder(tmp_path):
    return make_domains(tmp_path / "here", ("art", "photo"), images=2, side=8)


def test_the_same_data_elsewhere_have_the_same_digest(folder, tmp_path, monkeypatch):
    before = of(folder)
    assert len(before) == 2 and before[0] != before[1] and all(len(each) == 16 for each in before)
    shutil.copytree(folder, tmp_path / "far" / "away")  # with other modification times
    for path in (tmp_path / "far").rglob("*.png"):
        os.utime(path, (1, 1))
    monkeypatch.chdir(tmp_path)
    assert of(tmp_path / "far" / "away") == of("far/away") == before


def rename(folder):
    path = folder / "photo" / "dog" / "pic_000.png"
    path.rename(path.with_name("pic_0000.png"))


def resize(folder):
    (folder / "photo" / "dog" / "pic_000.png").write_bytes(b"more bytes than there were before" * 20)


def remove(folder):
    (folder / "photo" / "dog" / "pic_000.png").unlink()


def relabel(folder):
    path = folder / "photo" / "dog" / "pic_000.png"
    path.rename(folder / "photo" / "house" / "pic_00.png")


@pytest.mark.parametrize("change", [rename, resize, remove, relabel])
def test_a_change_of_an_image_changes_the_digest_of_its_environment(folder, change):
    before = of(folder)
    change(folder)
    after = of(folder)
    assert after[0] == before[0] and after[1] != before[1]


def test_names_of_environments_and_classes_count(folder):
    before = of(folder)
    (folder / "art").rename(folder / "arts")
    assert [a == b for a, b in zip(of(folder), before, strict=True)] == [False, True]
    (folder / "arts").rename(folder / "art")
    for domain in ("art", "photo"):
        (folder / domain / "dog").rename(folder / domain / "cat")
    assert not set(of(folder)) & set(before)


def write_manifest(path, rows):
    path.write_text("path,label,domain\n" + "".join(",".join(row) + "\n" for row in rows), encoding="utf-8")


def test_of_a_manifest_what_it_lists_counts_and_not_where_it_lies(folder, tmp_path):
    rows = [
        (f"{domain}/{label}/pic_00{i}.png", label, domain)
        for domain in ("art", "photo")
        for label in ("dog", "house")
        for i in (0, 1)
    ]
    write_manifest(folder / "list.csv", rows)
    before = of(folder / "list.csv", "Manifest")
    write_manifest(tmp_path / "list.csv", [(f"{folder}/{path}", *rest) for path, *rest in rows])
    assert of(tmp_path / "list.csv", "Manifest") == before
    for changed in (rows[:-1], [*rows[:-1], (rows[-1][0], "dog", "photo")], [*rows[:4], *rows[:3:-1]]):
        write_manifest(folder / "list.csv", changed)
        after = of(folder / "list.csv", "Manifest")
        assert after[0] == before[0] and after[1] != before[1]


def test_each_file_is_looked_at_once(folder, monkeypatch):
    dataset = get_dataset_class("ImageFolderDomains")(folder, [], {})
    looked_at, stat = [], os.stat
    monkeypatch.setattr(file_stats.os, "stat", lambda path: looked_at.append(path) or stat(path))
    digest(dataset)
    assert sorted(looked_at) == sorted(path for part in dataset.datasets for path in part.paths)


@pytest.mark.parametrize("name", ["DigitsShift", "Debug28", "Debug224"])
def test_generated_data_have_a_digest_an_environment(name):
    first, second = of(None, name), of(None, name)
    assert first == second and len(set(first)) == len(first) == len(get_dataset_class(name).ENVIRONMENTS)


def test_generated_data_change_with_what_they_are_made_from(monkeypatch):
    from domainbed_ext.datasets import debug, digits

    before = of(None, "Debug28"), of(None, "DigitsShift")
    monkeypatch.setattr(debug, "SEED", 1)
    monkeypatch.setattr(digits, "_SEED", 1)
    assert not set(of(None, "Debug28")) & set(before[0])
    assert not set(of(None, "DigitsShift")) & set(before[1])


class Noise(Environment):
    name = "noise"
    targets = (0, 1)

    def load(self, index):
        return Image.fromarray(np.zeros((2, 2, 3), np.uint8))


class Own(MultipleDomainDataset):
    def __init__(self, targets):
        self.classes, self.datasets = ("a", "b"), [Noise()]
        self.datasets[0].targets = targets


def test_a_data_set_of_ones_own_is_told_by_its_labels():
    assert digest(Own([0, 1])) == digest(Own((0, 1))) == digest(Own(np.array([0, 1]))) != digest(Own([1, 0]))
