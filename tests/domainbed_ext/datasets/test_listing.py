"""Which files of a folder count: torchvision's, in its order, but for what is hidden or a system's own."""

import os
import shutil

import pytest
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from domainbed_ext.datasets.folders import ImageFolderDomains
from domainbed_ext.datasets.listing import IMAGE_ENDINGS, is_hidden, list_images
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.prepare.verify import verify
from tests.domainbed_ext.conftest import make_domains

SYSTEM = (
    ".ipynb_checkpoints",
    "@eaDir",
    "__MACOSX",
    ".Trash-1000",
    "$RECYCLE.BIN",
    "System Volume Information",
    "#recycle",
)


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_image_endings_are_torchvisions():
    assert IMAGE_ENDINGS == IMG_EXTENSIONS


def test_a_clean_folder_is_listed_as_torchvision_lists_it(tmp_path):
    domain = tmp_path / "domain"
    names = ("b.PNG", "a.jpeg", "A.Tif", "notes.txt", "sub/z.webp", "sub b/y.bmp", "sub/deep/x.pgm", "x.png/inside.ppm")
    touch(*(domain / label / name for label in ("dog", "Cat", "zebra 1") for name in names), domain / "beside.png")
    touch(tmp_path / "elsewhere" / "linked.png")
    (domain / "dog" / "link").symlink_to(tmp_path / "elsewhere")
    (domain / "dog" / "link.png").symlink_to(tmp_path / "elsewhere" / "linked.png")
    (domain / "linked class").symlink_to(tmp_path / "elsewhere")
    ours, torchvisions = list_images(domain), ImageFolder(str(domain))
    assert list(zip(ours.files, ours.targets, strict=True)) == torchvisions.samples
    assert ours.classes == torchvisions.classes and ours.hidden == []
    assert len(ours.files) == 3 * 7 + 3


def test_hidden_and_system_files_and_folders_are_ignored_at_every_level(tmp_path, capsys):
    make_domains(tmp_path / "clean", domains=("a", "b"), images=3)
    shutil.copytree(tmp_path / "clean", tmp_path / "mine")
    count = 0
    for name in SYSTEM:
        for folder in ("", "a", "a/dog", "a/dog/deeper"):
            touch(tmp_path / "mine" / folder / name / "0.png", tmp_path / "mine" / folder / name / "notes.txt")
            count += 1
    touch(tmp_path / "mine/b/dog/._0.png", tmp_path / "mine/b/dog/.DS_Store", tmp_path / "mine/b/dog/Thumbs.db")
    clean, mine = (ImageFolderDomains(tmp_path / name, [0], {}) for name in ("clean", "mine"))
    ImageFolderDomains(tmp_path / "mine", [0], {})  # which says it no second time
    for one, other in zip(clean.datasets, mine.datasets, strict=True):
        assert [path.replace("/clean/", "/mine/") for path in one.paths] == other.paths
        assert list(one.targets) == list(other.targets)
    assert (mine.environments, mine.classes) == (clean.environments, clean.classes)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"warning: ImageFolderDomains: {count + 1} image(s) ignored, hidden or in hidden or system folders: " in said
    assert said.endswith(", ...\n")


def test_images_that_torchvision_does_not_list_are_said_to_be_unused(tmp_path, capsys):
    make_domains(tmp_path, domains=("a", "b"), images=1)
    touch(
        tmp_path / "a/beside.png",
        tmp_path / "b/dog/photo.GIF",
        tmp_path / "b/dog/deep/photo.heic",
        tmp_path / "b/x.txt",
    )
    assert [len(environment) for environment in ImageFolderDomains(tmp_path, [0], {}).datasets] == [2, 2]
    assert capsys.readouterr().err == (
        "warning: ImageFolderDomains: 3 image(s) not used, beside class folders or of other endings: a/beside.png, "
        "b/dog/deep/photo.heic, b/dog/photo.GIF\n"
    )


def test_hidden_folders_without_images_are_not_worth_a_word(tmp_path, capsys):
    make_domains(tmp_path / "mine", domains=("a", "b"), images=1)
    touch(tmp_path / "mine/.git/config", tmp_path / "mine/a/.cache/notes.txt")
    ImageFolderDomains(tmp_path / "mine", [0], {})
    assert capsys.readouterr().err == ""


def test_a_data_set_below_a_hidden_folder_is_not_hidden(tmp_path):
    make_domains(tmp_path / ".data" / "mine", domains=("a", "b"), images=1)
    assert len(ImageFolderDomains(tmp_path / ".data" / "mine", [0], {})[0]) == 2


@pytest.mark.parametrize("name", ["dog", "tmp", "recycle", "MACOSX", "eaDir", "Trash", "_x", "#1", "@home"])
def test_names_like_those_of_systems_are_names(name):
    assert not is_hidden(name)


def test_a_class_of_hidden_images_has_none(tmp_path):
    make_domains(tmp_path, domains=("a", "b"), images=1)
    os.rename(tmp_path / "b/dog/pic_000.png", tmp_path / "b/dog/.pic_000.png")
    with pytest.raises(BenchmarkError, match=r"no image in class folder.s. dog of .*b: it should be"):
        ImageFolderDomains(tmp_path, [0], {})


def test_prepare_leaves_them_out_too(tmp_path):
    make_domains(tmp_path, domains=("a", "b"), images=2)
    touch(tmp_path / "a/dog/@eaDir/pic_000.png")
    report = verify("ImageFolderDomains", tmp_path, decode=True, workers=1)
    assert report.images == 8 and report.problems == []
    assert "@eaDir" not in (tmp_path / "manifest.csv").read_text()


@pytest.mark.parametrize("link", ["a/dog/again", "a/dog/deep/er/again"])
def test_a_link_back_is_a_sentence(tmp_path, link):
    make_domains(tmp_path, domains=("a", "b"), images=1)
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "a/dog")
    with pytest.raises(BenchmarkError, match=f"{link} is a link to a folder above it: remove it"):
        ImageFolderDomains(tmp_path, [0], {})


def test_a_folder_that_cannot_be_read_is_a_sentence(tmp_path, monkeypatch):
    make_domains(tmp_path, domains=("a", "b"), images=1)
    scan = os.scandir

    def refuse(folder):
        if str(folder).endswith("b/dog"):
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BenchmarkError, match=r"cannot read the folder .*b/dog \(Permission denied\): ask its owner"):
        ImageFolderDomains(tmp_path, [0], {})


def test_what_is_no_file_is_no_image(tmp_path):
    make_domains(tmp_path, domains=("a", "b"), images=1)
    os.mkfifo(tmp_path / "a/dog/pipe.png")  # to open it would wait for ever
    assert len(ImageFolderDomains(tmp_path, [0], {})[0]) == 2
