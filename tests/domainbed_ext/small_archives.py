"""Archives in the shapes of the real ones, and `prepare` on them."""

import io
import tarfile
import zipfile

import numpy as np
from PIL import Image

from domainbed_ext.datasets import DATASETS
from domainbed_ext.prepare.command import main
from domainbed_ext.prepare.downloads import CLASSES, KNOWN

PACS = DATASETS["PACS"].DOMAINS
TWO = ("dog", "house")


def picture(number=0):
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def tree(domains, classes=TWO, images=3, top=""):
    """Names and contents of an archive's files, each of which is another picture."""
    names = [f"{top}{domain}/{label}/pic_{n}.png" for domain in domains for label in classes for n in range(images)]
    return {name: picture(number) for number, name in enumerate(names)}


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, files, members=()):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in members:
            archive.addfile(member)
    return path


def know(monkeypatch, name, *counts, classes=2):
    monkeypatch.setitem(KNOWN, name, counts)
    monkeypatch.setitem(CLASSES, name, classes)


def know_small_pacs(monkeypatch):
    """PACS is known to have 4 × 2 × 3 images."""
    know(monkeypatch, "PACS", {domain: dict.fromkeys(TWO, 3) for domain in PACS})


def prepare(name, data_dir, *archive, options=()):
    given = ["--archive", *map(str, archive)] if archive else []
    return main([name, "--data_dir", str(data_dir), *given, *options])


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.parent != folder)
