"""The cache of decoded images: its pixels and what tells them apart. Files that are opened are counted, not timed."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from torchvision.transforms import v2

from domainbed_ext.cache import decode, fingerprint, images, pixels
from domainbed_ext.cache.entries import Entries, NoRoom
from domainbed_ext.cache.images import open_cached
from domainbed_ext.cache.pixels import Damaged, Stored
from domainbed_ext.cache.variants import Decoded, Resized, Shorter
from domainbed_ext.datasets.folders import FileEnvironment
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.system import file_stats
from domainbed_ext.system.interrupts import Interrupted
from tests.domainbed_ext.cached_environment import cached
from tests.domainbed_ext.launched_processes import wait_for
from tests.domainbed_ext.opened_files import OPENED, settled  # noqa: F401  (a fixture)

VARIANTS = (Decoded(), Shorter(32), Resized(32, 24))
pytestmark = pytest.mark.usefixtures("settled")


@pytest.fixture
def cache(tmp_path):
    return Entries(tmp_path / "cache", 10**9)


@pytest.fixture
def environment(tmp_path):
    made = make_environment(tmp_path / "zoo")
    OPENED.clear()
    return made


def make_environment(folder: Path, name: str = "Real World") -> FileEnvironment:
    """An image of every kind that decodes in its own way, of odd sizes, one of them small and one a single pixel."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    colours = Image.fromarray(draw.integers(0, 256, (53, 37, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "colours.jpg": colours,
        "wide.png": colours.resize((101, 40)),
        "grey.jpg": colours.convert("L"),
        "one_bit.png": colours.convert("1"),
        "sixteen_bit.png": Image.fromarray(draw.integers(0, 2**16, (41, 33), dtype=np.uint16)),
        "palette.png": colours.quantize(16),
        "alpha.png": Image.fromarray(draw.integers(0, 256, (40, 51, 4), dtype=np.uint8), "RGBA"),
        "cmyk.jpg": colours.convert("CMYK"),
        "turned.tiff": colours,
        "turned.jpg": colours,
        "small.webp": colours.resize((9, 12)),
        "pixel.png": colours.resize((1, 1)),
    }
    for file, image in files.items():
        image.save(folder / file, **({"exif": turned} if file.startswith("turned") else {}))
    return FileEnvironment(name, [str(folder / file) for file in files], [0] * len(files))


def opened(folder: Path) -> list[str]:
    """Files in a folder that were opened since the last call."""
    found = [path for path in OPENED if path.startswith(f"{folder}{os.sep}")]
    OPENED.clear()
    return found


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("processes", [1, 2])
def test_pixels_are_pils_bit_for_bit(cache, environment, monkeypatch, variant, processes):
    monkeypatch.setattr(images, "_PART", 5)
    done = []
    stored = cached(environment, variant, cache, "Zoo", processes, done.append)
    resize = {"decoded": lambda image: image, "32x24": v2.Resize((32, 24)), "shorter32": v2.Resize(32)}[variant.name]
    assert len(stored) == len(environment) == sum(done)
    for index in range(len(environment)):
        image = environment.load(index)
        small = variant.name == "shorter32" and min(image.size) <= 32
        expected = np.asarray(image if small else resize(image))
        assert stored[index].dtype == np.uint8 and not stored[index].flags.writeable
        np.testing.assert_array_equal(stored[index], expected)
        assert tuple(stored.sizes[index]) == expected.shape[:2]
    if variant.name == "32x24":
        pil = environment.load(0).resize((24, 32), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(stored[0], np.asarray(pil))
    (entry,) = cache.list()
    assert entry.key.startswith("Zoo/Real_World-") and entry.key.endswith(f"-{variant.name}")
    assert entry.bytes <= pixels.count_bytes(stored.sizes)


def test_a_second_opening_reads_no_image(cache, environment, tmp_path):
    open_cached("Zoo", [environment], Decoded(), cache)
    # For its digest, its header, its pixels.
    assert sorted(opened(tmp_path / "zoo")) == sorted(3 * environment.paths)
    done = []
    open_cached("Zoo", [environment], Decoded(), cache, progress=done.append)
    assert opened(tmp_path / "zoo") == [] and done == [len(environment)]
    open_cached("Zoo", [environment], Resized(8, 8), cache)
    assert len(opened(tmp_path / "zoo")) == len(environment)  # decoded, but not read for its digest, nor its header


def test_a_copy_of_the_data_shares_its_entries(cache, environment, tmp_path):
    before = cached(environment, Decoded(), cache, "Zoo").folder
    shutil.copytree(tmp_path / "zoo", tmp_path / "copy")
    copy = FileEnvironment(
        environment.name, [path.replace("/zoo/", "/copy/") for path in environment.paths], environment.targets
    )
    assert cached(copy, Decoded(), cache, "Zoo").folder == before


def test_a_changed_image_is_another_entry(cache, environment, monkeypatch):
    first = cached(environment, Decoded(), cache, "Zoo")
    path, status = Path(environment.paths[1]), os.stat(environment.paths[1])
    content_before = path.read_bytes()
    Image.new("RGB", (101, 40), "red").save(path)
    path.write_bytes(path.read_bytes().ljust(len(content_before), b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = os.stat(path)
    assert (after.st_size, after.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    OPENED.clear()
    second = cached(environment, Decoded(), cache, "Zoo")
    assert second.folder != first.folder and (second[1] == (255, 0, 0)).all()
    np.testing.assert_array_equal(second[0], first[0])
    monkeypatch.setattr(decode, "describe_decoder", lambda: "a newer Pillow")
    assert cached(environment, Decoded(), cache, "Zoo").folder not in (first.folder, second.folder)


def test_the_digest_reads_what_changed_and_nothing_else(environment, tmp_path, monkeypatch):
    folder, zoo = tmp_path / "cache", tmp_path / "zoo"
    before = fingerprint.digest(environment.paths, folder)
    assert len(opened(zoo)) == len(environment)
    Path(environment.paths[3]).touch()
    assert fingerprint.digest(environment.paths, folder) == before and opened(zoo) == [environment.paths[3]]
    assert fingerprint.digest(environment.paths[::-1], folder) != before
    assert fingerprint.digest(environment.paths[:-1], folder) != before
    for memo in (folder / ".memos").iterdir():
        memo.write_bytes(b"torn")
    assert fingerprint.digest(environment.paths, folder) == before
    no_folder = Path(environment.paths[0])
    assert fingerprint.digest(environment.paths, no_folder) == before
    assert fingerprint.digest([*environment.paths, str(zoo / "gone")], folder) != before
    monkeypatch.setattr(file_stats, "_SLOW", -1.0)
    monkeypatch.setattr(file_stats, "_CHUNK", 2)  # as over a network, by threads
    assert fingerprint.digest(environment.paths, folder) == before


def test_images_of_this_very_moment_are_read_again(environment, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "SETTLED", 3600.0)
    for _ in range(2):
        fingerprint.digest(environment.paths, tmp_path / "cache")
        assert len(opened(tmp_path / "zoo")) == len(environment)


def test_all_bad_images_are_named_at_once(cache, tmp_path):
    domains = [make_environment(tmp_path / name, name) for name in ("a", "b", "c")]
    whole = Path(domains[0].paths[0]).read_bytes()
    bad = [domains[0].paths[0], domains[0].paths[2], domains[2].paths[5]]
    Path(bad[0]).write_bytes(whole[: len(whole) // 2])  # has a header
    Path(bad[1]).write_bytes(b"no image")
    Path(bad[2]).unlink()
    for variant in (Decoded(), Resized(8, 8)):
        with pytest.raises(BenchmarkError) as caught:
            open_cached("Zoo", domains, variant, cache)
        assert str(caught.value).startswith(f"not a readable image: {', '.join(bad)};")
    assert [entry.what for entry in cache.list()] == ["Zoo/b, 8x8", "Zoo/b, decoded"]
    assert list((cache.folder / ".unfinished").iterdir()) == []


def test_images_that_change_while_they_are_decoded_are_not_kept(cache, environment):
    def change(count):
        Path(environment.paths[0]).write_bytes(Path(environment.paths[1]).read_bytes())

    with pytest.raises(BenchmarkError, match="images of Real World changed while they were decoded: run .* again"):
        cached(environment, Decoded(), cache, "Zoo", progress=change)
    assert cache.list() == []


@pytest.mark.parametrize("processes", [1, 2])
def test_asked_to_stop_it_leaves_nothing_half_made(cache, environment, monkeypatch, processes):
    monkeypatch.setattr(images, "_PART", 5)

    def stop(count):
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        cached(environment, Decoded(), cache, "Zoo", processes, stop)
    assert cache.list() == [] and list((cache.folder / ".unfinished").iterdir()) == []


def test_stored_images_are_pickled_without_their_pixels(cache, environment):
    stored = cached(environment, Decoded(), cache, "Zoo")
    text = pickle.dumps(stored)
    assert len(text) < 1000
    again = pickle.loads(text)
    np.testing.assert_array_equal(again[-1], stored[len(stored) - 1])
    assert [image.shape for image in again[1:3]] == [image.shape for image in (stored[1], stored[2])]
    with pytest.raises(IndexError):
        again[len(stored)]


@pytest.mark.parametrize("file", ["pixels.bin", "index.safetensors"])
def test_damaged_images_are_refused_and_made_again(cache, environment, file):
    folder = cached(environment, Decoded(), cache, "Zoo").folder
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[:-1])
    with pytest.raises(Damaged, match=f"{folder}.*remove them with python -m domainbed_ext.cache remove"):
        Stored(folder)
    assert cached(environment, Decoded(), cache, "Zoo").folder == folder
    assert (folder / file).read_bytes() == whole


def test_a_folder_that_cannot_be_written_to_is_one_sentence(environment, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NoRoom, match="cannot keep Zoo/Real World, decoded in the image cache .*file .*--cache_dir"):
        cached(environment, Decoded(), Entries(file, 10**9), "Zoo")
    kept = cached(environment, Decoded(), Entries(tmp_path / "cache", 10**9), "Zoo")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    for name in ("utime", "mkdir", "rename", "replace"):  # what is there can still be read
        monkeypatch.setattr(os, name, refuse)
    assert cached(environment, Decoded(), Entries(tmp_path / "cache", 10**9), "Zoo").folder == kept.folder


def test_processes_that_decode_go_with_their_parent():
    script = """
import multiprocessing, time
from domainbed_ext.system.processes import several
with several(2) as run:
    results = run(time.sleep, [0, 0, 600, 600])
    next(results), next(results)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    next(results)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.communicate()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in children))
