"""Archives that are broken, or made to write elsewhere."""

import tarfile
import zipfile

import pytest

from domainbed_ext.errors import BenchmarkError
from tests.domainbed_ext.small_archives import PACS, know_small_pacs, prepare, tree, write_tar, write_zip


@pytest.fixture
def small(monkeypatch):
    know_small_pacs(monkeypatch)


def link(name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def zip_link(path):
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("kfold/photo")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc")


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def corrupt(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)


BROKEN = {
    "up.zip": (lambda path: write_zip(path, {"../evil.png": b"x"}), "write outside its folder"),
    "abs.zip": (lambda path: write_zip(path, {"/tmp/evil.png": b"x"}), "write outside its folder"),
    "drive.zip": (lambda path: write_zip(path, {"C:\\evil.png": b"x"}), "write outside its folder"),
    "back.zip": (lambda path: write_zip(path, {"a\\..\\..\\evil.png": b"x"}), "write outside its folder"),
    "up.tar": (lambda path: write_tar(path, {"a/../../evil.png": b"x"}), "write outside its folder"),
    "abs.tar.gz": (lambda path: write_tar(path, {"/tmp/evil.png": b"x"}), "write outside its folder"),
    "link.tar": (lambda path: write_tar(path, {}, [link("kfold", "/etc")]), "is a link or a device"),
    "out.tar": (lambda path: write_tar(path, {}, [link("a", "../.."), link("a/b", "c")]), "is a link or a device"),
    "hard.tar": (lambda path: write_tar(path, {}, [link("a", "/etc/passwd", tarfile.LNKTYPE)]), "is a link"),
    "pipe.tar": (lambda path: write_tar(path, {}, [link("a", "", tarfile.FIFOTYPE)]), "is a link or a device"),
    "link.zip": (zip_link, "is a link or a device"),
    "both.zip": (lambda path: write_zip(path, {"a": b"x", "a/b": b"x"}), "a file and a folder of one name"),
    "cut.zip": (lambda path: cut(write_zip(path, tree(PACS)), 0.5), "no zip or tar archive, or is cut off"),
    "cut.tar.gz": (lambda path: cut(write_tar(path, tree(PACS)), 0.5), "is a broken archive"),
    "cut.tar": (lambda path: cut(write_tar(path, tree(PACS)), 0.51), "is a broken archive"),
    "start.tar.gz": (lambda path: cut(write_tar(path, tree(PACS)), 0.01), "no zip or tar archive, or is cut off"),
    "corrupt.zip": (lambda path: corrupt(write_zip(path, {"a/b.png": bytes(5000)})), "broken archive .*CRC"),
    "corrupt.tar.gz": (lambda path: corrupt(write_tar(path, tree(PACS))), "is a broken archive"),
    "page.zip": (lambda path: path.write_text("\n <!DOCTYPE html><html>"), "is a web page, not an archive"),
    "empty.zip": (lambda path: path.touch(), "no zip or tar archive"),
    "text.zip": (lambda path: path.write_text("hello"), "no zip or tar archive"),
    "other.zip": (lambda path: write_zip(path, tree(("a", "b"))), "no folder art_painting, .*sketch with folders of"),
    "less.zip": (lambda path: write_zip(path, tree(PACS[:3])), "no folder sketch .*: give .* holds it by --archive"),
    "twice.zip": (lambda path: write_zip(path, tree(PACS) | tree(PACS[:1], top="b/")), "art_painting is there twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_hostile_archive_gets_a_sentence_and_leaves_nothing(small, tmp_path, name):
    make, sentence = BROKEN[name]
    home = tmp_path / "home"
    home.mkdir()
    make(home / name)
    with pytest.raises(BenchmarkError, match=sentence):
        prepare("PACS", home / "data", home / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
    assert sorted(path.name for path in home.iterdir()) == sorted(["data", name])
    assert not (home / "data" / "PACS").exists() and not list(tmp_path.rglob("evil*"))
