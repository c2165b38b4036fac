"""Images that a data set contains more than once. Files that are read are counted."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from PIL import Image

from domainbed_ext import train
from domainbed_ext.data import duplicates
from domainbed_ext.data.duplicates import Place
from domainbed_ext.datasets.folders import PACS
from domainbed_ext.datasets.manifest import Manifest
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.prepare.command import main as prepare
from domainbed_ext.prepare.verify import verify
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.sweep import command as sweep
from tests.domainbed_ext.conftest import make_domains
from tests.domainbed_ext.opened_files import OPENED, settled  # noqa: F401  (a fixture)
from tests.domainbed_ext.sweep.test_check import pacs

pytestmark = pytest.mark.usefixtures("settled")
PIC = "photo/dog/pic_000.png"


def found(dataset, cache=None):
    return duplicates.find(dataset.datasets, dataset.classes, cache)


def read(folder):
    """How many images in a folder were opened since the last call."""
    count = sum(path.startswith(str(folder)) and path.endswith(".png") for path in OPENED)
    OPENED.clear()
    return count


@pytest.mark.parametrize("cached", [True, False])
def test_copies_are_found_by_their_bytes(pacs_like, tmp_path, cached):
    root, cache = pacs_like / "PACS", tmp_path / "cache" if cached else None
    assert not found(PACS(pacs_like, [0], {}), cache)
    for copy in ("photo/dog/again.png", "sketch/dog/other.png", "photo/house/third.png"):
        shutil.copy(root / PIC, root / copy)
    os.link(root / "cartoon/dog/pic_001.png", root / "cartoon/dog/linked.png")
    (root / "cartoon/house/symlink.png").symlink_to(root / "cartoon/house/pic_002.png")
    dataset = PACS(pacs_like, [0], {})
    groups = found(dataset, cache).groups
    assert [[Path(place.path).name for place in group] for group in groups] == [
        ["linked.png", "pic_001.png"],
        ["pic_002.png", "symlink.png"],
        ["again.png", "pic_000.png", "third.png", "other.png"],
    ]
    assert groups[2][2] == Place(str(root / "photo/house/third.png"), "photo", "house")
    assert str(found(dataset, cache)) == (
        "3 image(s) more than once (1 in several domains, 1 under several labels), e.g. "
        f"{groups[0][0].path} and {groups[0][1].path}; {groups[1][0].path} and {groups[1][1].path}"
    )


def test_with_a_cache_files_are_read_once_and_without_one_only_those_of_equal_size(pacs_like, tmp_path):
    root = pacs_like / "PACS"
    for number, path in enumerate(sorted(root.glob("*/*/*.png"))):  # each of another size
        path.write_bytes(path.read_bytes() + bytes(1000 * number))
    dataset = PACS(pacs_like, [0], {})
    OPENED.clear()
    assert not found(dataset) and read(root) == 0
    assert not found(dataset, tmp_path / "cache") and read(root) == 80
    assert not found(dataset, tmp_path / "cache") and read(root) == 0
    shutil.copy(root / PIC, root / "photo/dog/again.png")
    dataset = PACS(pacs_like, [0], {})
    OPENED.clear()
    assert found(dataset) and read(root) == 2


def test_files_that_cannot_be_read_are_no_duplicates(tmp_path):
    make_domains(tmp_path / "PACS", images=2)
    for name in ("pic_000.png", "pic_001.png"):
        (tmp_path / "PACS/photo/dog" / name).unlink()
        (tmp_path / "PACS/photo/dog" / name).symlink_to("nowhere.png")
    for cache in (None, tmp_path / "cache"):
        assert not found(PACS(tmp_path, [0], {}), cache)


def test_one_file_under_several_names_in_a_manifest(pacs_like, monkeypatch, tmp_path):
    monkeypatch.chdir(pacs_like)
    files = sorted((pacs_like / "PACS").glob("*/*/*.png"))
    names = [str(path.relative_to(pacs_like)) for path in files]
    first, second = names[0], names[1]
    more = [f"./{first}", str(files[1]), f"PACS/../{names[2]}"]
    table = pd.DataFrame({"path": names + more})
    table["label"] = ["dog" if "dog" in name else "house" for name in table["path"]]
    table["domain"] = [name.split("/")[-3] for name in table["path"]]
    table.to_csv(pacs_like / "list.csv", index=False)
    dataset = Manifest(pacs_like / "list.csv", [0], {})
    for cache in (None, tmp_path / "cache"):
        assert len(found(dataset, cache).groups) == 3
    assert f"e.g. {pacs_like / first} twice; {pacs_like / second} twice" in str(found(dataset))


@pytest.fixture
def twice(pacs_like):
    shutil.copy(pacs_like / "PACS" / PIC, pacs_like / "PACS/sketch/dog/again.png")
    return pacs_like


@pytest.mark.parametrize("choice", duplicates.CHOICES)
def test_a_run_warns_or_refuses_or_does_not_look(make_args, twice, tmp_path, choice, capsys):
    args = make_args(
        dataset="PACS",
        data_dir=str(twice),
        backbone="test_vit",
        weights="none",
        hparams='{"batch_size": 4, "image_size": 32}',
        algorithm="LP",
        steps=1,
        cache_dir=str(tmp_path / "cache"),
        duplicates=choice,
    )
    code = train.run(args, lambda share: None)
    folder, said = RunFolder(args.output_dir), capsys.readouterr().err
    assert folder.state is (State.FAILED if choice == "refuse" else State.DONE) and bool(code) == (choice == "refuse")
    assert ("PACS contains 1 image(s) more than once (1 in several domains, 0 under several labels)" in said) == (
        choice != "ignore"
    )


@pytest.mark.parametrize("command", ["launch", "validate"])
def test_a_sweep_refuses_before_it_starts(tmp_path, twice, command):
    argv = pacs(tmp_path, "--duplicates", "refuse", "--cache_dir", str(tmp_path / "cache"), command=command)
    with pytest.raises(BenchmarkError, match="^PACS contains 1 image.s. more than once .*: remove copies, or choose"):
        sweep.main(argv)
    assert {path.name for path in (tmp_path / "sweep").glob("*")} <= {"by_name"}


def test_a_dry_run_does_not_look(tmp_path, twice, capsys):
    assert sweep.main(pacs(tmp_path, "--duplicates", "refuse", "--dry_run", command="launch")) == 0
    assert "--duplicates refuse" in capsys.readouterr().out


def test_a_data_set_without_files_has_none():
    duplicates.search("DigitsShift", SimpleNamespace(datasets=[object()], classes=[]), "refuse", "none")


def test_prepare_tells_them(tmp_path, capsys):
    make_domains(tmp_path, domains=("a", "b"), images=2)
    shutil.copy(tmp_path / "a/dog/pic_000.png", tmp_path / "b/house/again.png")
    argv = ["ImageFolderDomains", "--data_dir", str(tmp_path), "--verify"]
    assert len(verify("ImageFolderDomains", tmp_path, decode=False, workers=1).duplicates.groups) == 1
    assert prepare(argv) == 0
    sentence = "ImageFolderDomains contains 1 image(s) more than once (1 in several domains, 1 under several labels)"
    assert sentence in capsys.readouterr().err
    with pytest.raises(BenchmarkError, match="contains 1 image.s. more than once"):
        prepare([*argv, "--duplicates", "refuse"])
    assert prepare([*argv, "--duplicates", "ignore"]) == 0
    assert "more than once" not in capsys.readouterr().err


def test_an_image_saved_twice_is_no_copy_if_its_bytes_differ(tmp_path):
    make_domains(tmp_path, domains=("a", "b"), images=1)
    with Image.open(tmp_path / "a/dog/pic_000.png") as image:
        image.save(tmp_path / "a/dog/pic_001.png", compress_level=0)
    assert not verify("ImageFolderDomains", tmp_path, decode=False, workers=1).duplicates
