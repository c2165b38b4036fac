import shutil

import numpy as np
import pytest
from PIL import Image

from domainbed_ext.datasets import DATASETS, get_dataset_class
from domainbed_ext.datasets.folders import PACS, ImageFolderDomains
from domainbed_ext.errors import BenchmarkError
from tests.domainbed_ext.conftest import make_domains


def test_environments_and_classes_are_in_domainbeds_order(pacs_like):
    dataset = PACS(pacs_like, [0], {})
    assert [environment.name for environment in dataset.datasets] == ["art_painting", "cartoon", "photo", "sketch"]
    assert dataset.environments == ("A", "C", "P", "S")
    assert (len(dataset), dataset.num_classes, dataset.input_shape) == (4, 2, (3, 224, 224))
    image, label = dataset[2][19]
    assert (image.mode, image.size, label) == ("RGB", (40, 40), 1)
    assert dataset[2].targets == [0] * 10 + [1] * 10


def test_the_table_of_data_sets_is_domainbeds():
    folders = {name: getattr(DATASETS[name], "FOLDER", None) for name in DATASETS}
    assert folders["TerraIncognita"] == "terra_incognita"
    assert DATASETS["TerraIncognita"].DOMAINS[1] == "location_38"  # the paper's source is index 1
    assert folders["OfficeHome"] == "office_home"
    assert folders["DomainNet"] == "domain_net"
    assert DATASETS["DomainNet"].CHECKPOINT_FREQ == 1000
    for dataset in DATASETS.values():
        domains = getattr(dataset, "DOMAINS", ())
        assert list(domains) == sorted(domains)
        assert not domains or len(domains) == len(dataset.ENVIRONMENTS)


def test_any_folder_of_domains(tmp_path):
    make_domains(tmp_path / "mine", domains=("winter", "summer"), classes=("a", "b", "c"))
    (tmp_path / "mine" / ".cache").mkdir()
    dataset = ImageFolderDomains(tmp_path / "mine", [0], {})
    assert dataset.environments == ("summer", "winter")
    assert dataset.num_classes == 3


def test_a_grey_png_is_opened_as_rgb(pacs_like):
    path = pacs_like / "PACS" / "sketch" / "dog" / "pic_000.png"
    Image.fromarray(np.full((40, 40), 7, np.uint8)).save(path)
    image, _ = PACS(pacs_like, [0], {})[3][0]
    assert image.getpixel((0, 0)) == (7, 7, 7)


def test_verify_names_every_broken_image(pacs_like):
    broken = [pacs_like / "PACS" / "photo" / "dog" / f"pic_00{i}.png" for i in (3, 7)]
    for path in broken:
        path.write_text("not an image")
    dataset = PACS(pacs_like, [0], {})
    assert list(dataset[2].verify()) == [str(path) for path in broken]
    assert dataset[1].verify() == {}


def remove(path):
    shutil.rmtree(path)


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


def text_as_image(path):
    (path / "dog" / "aaa.jpg").write_text("hello")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda pacs: remove(pacs), "PACS: no folder .*; --data_dir should hold PACS/<domain>/<class>/<image>"),
        (lambda pacs: remove(pacs / "sketch"), "missing domain folder.s. sketch in"),
        (lambda pacs: empty(pacs / "sketch"), "no image in domain folder .*sketch"),
        (lambda pacs: empty(pacs / "sketch" / "dog"), "no image in class folder.s. dog of .*sketch"),
        (lambda pacs: remove(pacs / "sketch" / "dog"), "classes differ between domains .dog only in art_painting."),
        (lambda pacs: (pacs / "splits").mkdir(), "unexpected folder.s. splits in"),
    ],
)
def test_a_spoilt_folder_gets_a_sentence(pacs_like, spoil, sentence):
    spoil(pacs_like / "PACS")
    with pytest.raises(BenchmarkError, match=sentence):
        PACS(pacs_like, [0], {})


def test_a_data_set_given_in_place_of_the_folder_that_holds_it_gets_that_folder(pacs_like):
    with pytest.raises(BenchmarkError, match=f"PACS: no folder .*did you mean --data_dir {pacs_like}[?]"):
        PACS(pacs_like / "PACS", [0], {})
    with pytest.raises(BenchmarkError) as error:
        PACS.check_data_dir(pacs_like / "PACS" / "sketch")
    assert "did you mean" not in str(error.value)


def test_a_text_file_named_jpg_gets_a_sentence(pacs_like):
    text_as_image(pacs_like / "PACS" / "cartoon")
    with pytest.raises(BenchmarkError, match=r"not a readable image: .*cartoon/dog/aaa.jpg"):
        PACS(pacs_like, [0], {})[1][0]


def test_a_missing_data_dir_gets_a_sentence():
    with pytest.raises(BenchmarkError, match="PACS needs its images: add --data_dir"):
        PACS(None, [0], {})


def test_one_domain_is_too_few(tmp_path):
    make_domains(tmp_path, domains=("only",))
    with pytest.raises(BenchmarkError, match="holds 1 domain folder.*at least two"):
        ImageFolderDomains(tmp_path, [0], {})


def test_an_unknown_data_set_gets_the_nearest_name():
    with pytest.raises(BenchmarkError, match="unknown data set 'pcas': did you mean 'PACS'"):
        get_dataset_class("pcas")
