"""A data set declares itself at its class."""

import pytest

import domainbed_ext
from domainbed_ext.datasets.folders import ImageFolderDomains
from domainbed_ext.datasets.registry import DATASETS, get_dataset_class, register_dataset
from domainbed_ext.errors import BenchmarkError

BUILT_IN = {
    *("DigitsShift", "Debug28", "Debug224", "RotatedMNIST", "ColoredMNIST", "VLCS", "PACS", "OfficeHome"),
    *("TerraIncognita", "DomainNet", "EmojiStyles", "ImageFolderDomains", "Manifest"),
}


pytestmark = pytest.mark.usefixtures("registries")


def test_the_built_in_ones_are_there():
    assert set(DATASETS) == BUILT_IN
    assert all(kind.__name__ == name for name, kind in DATASETS.items())


def test_built_in_ones_are_listed_alike_whichever_was_imported_first():  # here it was ImageFolderDomains
    assert list(DATASETS)[:3] == ["DigitsShift", "Debug28", "Debug224"] and list(DATASETS)[-1] == "Manifest"


def test_a_class_becomes_a_data_set():
    @register_dataset("Seasons")
    class Seasons(ImageFolderDomains):
        """Street scenes."""

    assert DATASETS["Seasons"] is get_dataset_class("seasons") is Seasons and list(DATASETS)[-1] == "Seasons"


def test_a_name_has_one_spelling():
    assert DATASETS.canonical("pacs") == "PACS" and DATASETS.canonical("office_home") == "OfficeHome"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("PACS", r"'PACS' is a data set already, PACS \(domainbed_ext.datasets.folders:PACS\)"),
        ("My data", "'My data' cannot name a data set"),
        (ImageFolderDomains, "takes a name: write @register_dataset"),
    ],
)
def test_a_name_that_is_taken_or_none_gets_a_sentence(name, sentence):
    with pytest.raises(BenchmarkError, match=sentence):

        @register_dataset(name)
        class Mine(ImageFolderDomains):
            pass


def test_an_assignment_registers_too(monkeypatch):
    monkeypatch.setitem(DATASETS, "Mine", ImageFolderDomains)
    assert DATASETS["Mine"] is ImageFolderDomains
    monkeypatch.undo()
    assert "Mine" not in DATASETS


def test_the_package_has_what_users_register_with():
    for name in ("ALGORITHMS", "Algorithm", "register_algorithm", "DATASETS", "register_dataset"):
        assert hasattr(domainbed_ext, name)
    assert domainbed_ext.DATASETS is DATASETS
