"""`prepare` on small archives in the shapes of the real ones; the files beside this have the rest."""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from domainbed_ext.datasets import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.prepare import archives, assemble
from domainbed_ext.prepare.command import main
from domainbed_ext.prepare.downloads import CLASSES, DOWNLOADS, KNOWN, count_images
from domainbed_ext.system.locks import alone
from tests import forked
from tests.domainbed_ext.conftest import make_domains
from tests.domainbed_ext.datasets.test_mnist import write_mnist
from tests.domainbed_ext.small_archives import (
    PACS,
    TWO,
    know,
    know_small_pacs,
    listing,
    picture,
    prepare,
    tree,
    write_folder,
    write_tar,
    write_zip,
)


@pytest.fixture
def small(monkeypatch):
    know_small_pacs(monkeypatch)


SHAPES = {
    "kfold.zip": lambda path: write_zip(path, tree(PACS, top="kfold/") | {"kfold/readme.txt": b"hello"}),
    "nested.tar.gz": lambda path: write_tar(path, tree(PACS, top="./a/b/PACS/")),
    "flat.tar": lambda path: write_tar(path, tree(PACS)),
    "folder": lambda path: write_folder(path, tree(PACS, top="raw/kfold/")),
    "mac.zip": lambda path: write_zip(
        path, tree(PACS, top="kfold/") | tree(PACS, top="__MACOSX/kfold/") | {"kfold/photo/dog/._pic_0.png": b"\0"}
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_pacs_in_any_shape(small, tmp_path, name, capsys):
    archive = SHAPES[name](tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    assert prepare("PACS", tmp_path / "data", archive) == 0
    assert listing(tmp_path / "data" / "PACS") == sorted(tree(PACS))
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["PACS"]  # nothing is left behind
    assert [path for path in sorted(tmp_path.rglob("*")) if tmp_path / "data" not in (path, *path.parents)] == before
    out = capsys.readouterr().out
    assert "art_painting" in out and "24" in out and "manifest.csv" in out
    record = json.loads((tmp_path / "data" / "PACS" / "prepared.json").read_text())
    assert record["sources"][0]["name"] == name


def test_four_archives_named_by_their_domains(small, tmp_path):
    files = tree(("",))
    given = [write_zip(tmp_path / f"{domain}.zip", {n.lstrip("/"): c for n, c in files.items()}) for domain in PACS]
    assert prepare("PACS", tmp_path / "data", *given) == 0
    assert listing(tmp_path / "data" / "PACS") == sorted(tree(PACS))


def test_office_home_loses_its_top_folder_and_its_lists(monkeypatch, tmp_path):
    domains = DATASETS["OfficeHome"].DOMAINS
    know(monkeypatch, "OfficeHome", dict.fromkeys(domains, 6))
    files = tree(domains, top="OfficeHomeDataset_10072016/") | {"OfficeHomeDataset_10072016/imagelist.txt": b"x"}
    assert prepare("OfficeHome", tmp_path / "data", write_zip(tmp_path / "o.zip", files)) == 0
    assert listing(tmp_path / "data" / "office_home") == sorted(tree(domains))
    renamed = {name.replace("Real World", "RealWorld"): content for name, content in tree(domains).items()}
    assert prepare("OfficeHome", tmp_path / "again", write_folder(tmp_path / "mine", renamed)) == 0
    assert listing(tmp_path / "again" / "office_home") == sorted(tree(domains))


def test_vlcs(monkeypatch, tmp_path):
    domains = DATASETS["VLCS"].DOMAINS
    know(monkeypatch, "VLCS", {domain: dict.fromkeys(TWO, 3) for domain in domains})
    assert prepare("VLCS", tmp_path, write_tar(tmp_path / "VLCS.tar.gz", tree(domains, top="VLCS/"))) == 0
    assert listing(tmp_path / "VLCS") == sorted(tree(domains))


def test_domain_net_keeps_what_its_lists_name(monkeypatch, tmp_path):
    domains = DATASETS["DomainNet"].DOMAINS
    know(monkeypatch, "DomainNet", dict.fromkeys(domains, 4))
    zips = tmp_path / "zips"
    zips.mkdir()
    for domain in domains:
        write_zip(zips / f"{domain}.zip", tree((domain,)))
        for split, number in (("train", 0), ("test", 2)):
            lines = [f"{domain}/{label}/pic_{number}.png {i}\n" for i, label in enumerate(TWO)]
            (zips / f"{domain}_{split}.txt").write_text("".join(lines))
    assert prepare("DomainNet", tmp_path, zips) == 0
    kept = [name for name in tree(domains) if "pic_1" not in name]
    assert listing(tmp_path / "domain_net") == sorted(kept)
    # The archives alone, under other names: all images, and the counts say that there are too many.
    unlisted = [(zips / f"{domain}.zip").rename(tmp_path / f"my_{domain}.zip") for domain in domains]
    with pytest.raises(BenchmarkError, match=r"clipart has 6 images instead of 4; clipart has duplicates \(delete it"):
        prepare("DomainNet", tmp_path / "all", *unlisted)
    with pytest.raises(BenchmarkError, match="no sketch_test.txt: give both"):
        prepare("DomainNet", tmp_path / "half", *unlisted, zips / "sketch_train.txt")
    (zips / "sketch_test.txt").write_text("sketch/dog/gone.png 0\n")
    with pytest.raises(BenchmarkError, match=r"1 image\(s\) of the lists of sketch are not there, sketch/dog/gone.png"):
        prepare("DomainNet", tmp_path / "gone", *unlisted, zips / "sketch_train.txt", zips / "sketch_test.txt")


@pytest.mark.parametrize("packed", [False, True])
def test_mnist(monkeypatch, tmp_path, packed, capsys):
    _, digits = write_mnist(tmp_path / "mine" / "x", packed)
    know(monkeypatch, "MNIST", {"train": 180, "test": 61}, classes=10)
    assert prepare("RotatedMNIST", tmp_path / "data", tmp_path / "mine") == 0
    assert sum(map(len, DATASETS["ColoredMNIST"](tmp_path / "data", [0], {}).datasets)) == len(digits)
    assert "241" in capsys.readouterr().out
    if packed:
        name = "t10k-labels-idx1-ubyte.gz"
        whole = (tmp_path / "mine" / "x" / name).read_bytes()
        assert gzip.decompress(whole)
        (tmp_path / "mine" / "x" / name).write_bytes(whole[:-9])
        with pytest.raises(BenchmarkError, match="t10k-labels-idx1-ubyte.gz is a broken archive"):
            prepare("MNIST", tmp_path / "2", tmp_path / "mine")
        (tmp_path / "mine" / "x" / name).unlink()
        with pytest.raises(BenchmarkError, match="MNIST: no t10k-labels-idx1-ubyte.gz in .*--archive"):
            prepare("MNIST", tmp_path / "3", tmp_path / "mine")


def stop(*args):
    raise KeyboardInterrupt


def test_a_start_that_was_interrupted_leaves_nothing_that_counts_and_resumes(small, tmp_path, monkeypatch):
    first = write_zip(tmp_path / "a.zip", tree(PACS[:2]))
    second = write_zip(tmp_path / "b.zip", tree(PACS[2:]))
    unpack = archives.unpack
    unpacked = []

    def spy(archive, folder, advance):
        unpacked.append(archive.name)
        unpack(archive, folder, advance if len(unpacked) != 2 else stop)  # in the midst of the second

    monkeypatch.setattr(assemble, "unpack", spy)
    with pytest.raises(KeyboardInterrupt):
        prepare("PACS", tmp_path / "data", first, second)
    assert not (tmp_path / "data" / "PACS").exists()
    follow = assemble.follow
    monkeypatch.setattr(assemble, "follow", lambda plan, folder, advance: follow(plan, folder, stop))
    with pytest.raises(KeyboardInterrupt):
        prepare("PACS", tmp_path / "data", first, second)
    assert not (tmp_path / "data" / "PACS").exists()
    monkeypatch.setattr(assemble, "follow", follow)
    assert prepare("PACS", tmp_path / "data", first, second) == 0
    assert unpacked == ["a.zip", "b.zip", "b.zip"]  # what was done is not done again
    assert listing(tmp_path / "data" / "PACS") == sorted(tree(PACS))


def test_what_is_there_is_only_verified(small, tmp_path, capsys):
    archive = write_zip(tmp_path / "a.zip", tree(PACS))
    prepare("PACS", tmp_path, archive)
    archive.write_text("gone")
    assert prepare("PACS", tmp_path, archive) == 0
    assert "is there already and is only verified" in capsys.readouterr().out
    assert prepare("PACS", tmp_path, options=["--verify", "--decode"]) == 0


def test_a_data_set_that_another_process_prepares_is_refused(small, tmp_path):
    archive = write_zip(tmp_path / "a.zip", tree(PACS))
    with (
        alone(tmp_path / "data" / ".prepare-PACS.lock"),
        pytest.raises(BenchmarkError, match="PACS is being prepared in .*data already: wait for it"),
    ):
        prepare("PACS", tmp_path / "data", archive)
    assert prepare("PACS", tmp_path / "data", archive) == 0


def test_a_folder_that_is_not_all_of_it_is_left_alone(small, tmp_path):
    write_folder(tmp_path / "PACS", tree(PACS[:3]))
    with pytest.raises(BenchmarkError, match="PACS is there, but is not all of PACS: move it away"):
        prepare("PACS", tmp_path, write_zip(tmp_path / "a.zip", tree(PACS)))
    assert listing(tmp_path / "PACS") == sorted(tree(PACS[:3]))


def test_images_are_linked_where_they_can_be_and_copied_where_not(small, tmp_path, monkeypatch):
    mine = write_folder(tmp_path / "mine", tree(PACS))
    prepare("PACS", tmp_path / "1", mine)
    name = "PACS/photo/dog/pic_1.png"
    assert os.path.samefile(tmp_path / "1" / name, mine / "photo/dog/pic_1.png")

    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    prepare("PACS", tmp_path / "2", mine)
    assert (tmp_path / "2" / name).read_bytes() == tree(PACS)["photo/dog/pic_1.png"]
    assert not os.path.samefile(tmp_path / "2" / name, mine / "photo/dog/pic_1.png")


def test_wrong_counts_are_told_by_class(small, tmp_path):
    files = tree(PACS)
    del files["photo/dog/pic_1.png"]
    with pytest.raises(BenchmarkError, match="PACS is not as it should be: photo/dog has 2 images instead of 3"):
        prepare("PACS", tmp_path, write_zip(tmp_path / "a.zip", files))
    with pytest.raises(BenchmarkError, match="art_painting has 1 classes instead of 2"):
        prepare("PACS", tmp_path / "b", write_zip(tmp_path / "b.zip", tree(PACS, classes=TWO[:1])))


def test_every_image_that_does_not_decode_is_named(small, tmp_path, capsys, monkeypatch):
    files = tree(PACS)
    bad = ["cartoon/dog/pic_0.png", "sketch/house/pic_2.png"]
    files |= {bad[0]: b"hello", bad[1]: files[bad[1]][:-60]}
    prepare("PACS", tmp_path, write_zip(tmp_path / "a.zip", files))  # without --decode nobody looks
    monkeypatch.setattr("domainbed_ext.prepare.examine._FEW", 5)  # in worker processes
    with pytest.raises(BenchmarkError, match=r"2 image\(s\) do not decode"):
        prepare("PACS", tmp_path, options=["--verify", "--decode", "--workers", "2"])
    named = [line for line in capsys.readouterr().out.splitlines() if line.startswith("does not decode")]
    assert [f"{name} (" in line for line, name in zip(named, bad, strict=True)] == [True, True]


def test_an_image_that_cannot_be_opened_is_named_and_no_manifest_is_written(tmp_path, capsys):
    make_domains(tmp_path, domains=("a", "b"), images=1)
    (tmp_path / "a/dog/pic_000.png").unlink()
    (tmp_path / "a/dog/pic_000.png").symlink_to("gone.png")
    with pytest.raises(BenchmarkError, match=r"1 image\(s\) do not decode"):
        main(["ImageFolderDomains", "--data_dir", str(tmp_path), "--verify"])
    assert f"does not decode: {tmp_path}/a/dog/pic_000.png (No such file or directory)" in capsys.readouterr().out
    assert not (tmp_path / "manifest.csv").exists()


def test_names_that_a_manifest_cannot_hold_are_told(tmp_path):
    make_domains(tmp_path, domains=("a", "b"), images=1)
    try:
        os.rename(tmp_path / "a/dog/pic_000.png", os.fsencode(tmp_path / "a/dog") + b"/\xe9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    with pytest.raises(BenchmarkError, match=r"1 image name.s. are not UTF-8, 'a/dog/.udce9.png' first, .*: rename"):
        main(["ImageFolderDomains", "--data_dir", str(tmp_path), "--verify"])
    assert not (tmp_path / "manifest.csv").exists()


def test_the_manifest_is_a_data_set_and_tells_what_changed(small, tmp_path):
    prepare("PACS", tmp_path, write_zip(tmp_path / "a.zip", tree(PACS)))
    path = tmp_path / "PACS" / "manifest.csv"
    manifest, pacs = DATASETS["Manifest"](path, [0], {}), DATASETS["PACS"](tmp_path, [0], {})
    for ours, theirs in zip(manifest.datasets, pacs.datasets, strict=True):
        assert [Path(a) for a in ours.paths] == [Path(b) for b in theirs.paths]
        assert list(ours.targets) == list(theirs.targets)
    before = path.read_text()
    (tmp_path / "PACS" / "photo" / "dog" / "pic_0.png").write_bytes(picture(99))
    with pytest.raises(BenchmarkError, match=r"1 image\(s\) are changed \(photo/dog/pic_0.png first\) since"):
        prepare("PACS", tmp_path, options=["--verify"])
    assert path.read_text() == before
    path.unlink()
    assert prepare("PACS", tmp_path, options=["--verify"]) == 0
    assert path.read_text() != before


def test_a_folder_of_domains_of_ones_own_can_be_verified(tmp_path):
    write_folder(tmp_path, tree(("winter", "summer")))
    assert prepare("ImageFolderDomains", tmp_path, options=["--verify", "--decode"]) == 0
    assert len(DATASETS["Manifest"](tmp_path / "manifest.csv", [0], {})) == 2


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["PCAS", "--data_dir", "d"], "unknown data set 'PCAS': did you mean 'PACS'"),
        (["DigitsShift", "--data_dir", "d"], "DigitsShift needs no files"),
        (["ImageFolderDomains", "--data_dir", "d"], "add --verify"),
        (["PACS"], "required: --data_dir; see python -m domainbed_ext.prepare --help"),
        (["PACS", "--data_dir", "d", "--archive", "nothing.zip"], "no file or folder nothing.zip"),
        (["PACS", "--data_dir", "d", "--archive", "a.zip", "--verify"], "leave out --archive"),
        (["PACS", "--data_dir", "d", "--verify"], "PACS: no folder d/PACS"),
        (["PACS", "--data_dir", "d", "--workers", "0"], "--workers: 0 is too small, give 1 or more"),
    ],
)
def test_a_mistake_gets_a_sentence(argv, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BenchmarkError, match=sentence):
        main(argv)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_does_nothing(tmp_path, capsys):
    assert prepare("DomainNet", tmp_path, options=["--dry_run"]) == 0
    out = capsys.readouterr().out
    assert out.count("would download") == 18 and "clipart_train.txt" in out and "would lay out" in out
    assert list(tmp_path.iterdir()) == []
    given = write_zip(tmp_path / "eccv_18_annotations.tar.gz", {})
    assert prepare("TerraIncognita", tmp_path, given, options=["--dry_run"]) == 0
    out = capsys.readouterr().out
    assert str(given) in out and out.count("would download") == 1 and "6.5 GB" in out


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "PACS --data_dir data --archive PACS.zip" in out and "TerraIncognita" in out


def test_the_command_ends_in_one_line(tmp_path):
    (tmp_path / "PACS.zip").write_text("hello")
    command = [sys.executable, "-m", "domainbed_ext.prepare", "PACS", "--data_dir", "d", "--archive", "PACS.zip"]
    done = forked.run(command, cwd=tmp_path, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: PACS.zip is no zip or tar archive, or is cut off: download it again\n"


def test_the_known_counts_add_up_to_the_published_ones():
    totals = {
        name: [sum(count_images(version, domain) for domain in version) for version in versions]
        for name, versions in KNOWN.items()
    }
    assert totals["OfficeHome"] == [15588] and totals["DomainNet"] == [586575]
    assert totals["TerraIncognita"] == [24330, 24788]
    for version in KNOWN["PACS"]:
        assert [count_images(version, domain) for domain in PACS] == [2048, 2344, 1670, 3929]
    for version in KNOWN["VLCS"]:
        assert [count_images(version, domain) for domain in DATASETS["VLCS"].DOMAINS] == [1415, 2656, 3282, 3376]
    for name, versions in KNOWN.items():
        assert name in DOWNLOADS and CLASSES[name]
        assert all(name == "MNIST" or tuple(version) == DATASETS[name].DOMAINS for version in versions)


@pytest.mark.pacs
def test_the_real_pacs(shared_data, tmp_path, capsys):
    archives = sorted((shared_data / "pacs").glob("*.zip"))
    if len(archives) != 4:
        pytest.skip("needs the four archives of PACS")
    assert prepare("PACS", tmp_path, *archives) == 0
    assert "9,991" in capsys.readouterr().out
    dataset = DATASETS["PACS"](tmp_path, [0], {})
    assert [len(environment) for environment in dataset.datasets] == [2048, 2344, 1670, 3929]
    assert dataset.num_classes == 7
