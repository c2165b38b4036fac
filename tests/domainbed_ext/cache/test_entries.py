"""The cache's folder: what makes room, who builds, and what others do meanwhile."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from domainbed_ext.cache import entries
from domainbed_ext.cache.entries import Entries, NoRoom
from domainbed_ext.system.interrupts import Interrupted, stoppable
from tests.domainbed_ext.launched_processes import wait_for, when


@pytest.fixture
def cache(tmp_path):
    return Entries(tmp_path / "cache", 10**9)


def make_entry(cache: Entries, key: str, size: int = 1000, hours_ago: float = 0.0) -> Path:
    path = cache.get(key, size, lambda folder: (folder / "data").write_bytes(bytes(size)))
    used = time.time() - 3600 * hours_ago
    os.utime(path / "entry.json", (used, used))
    return path


def test_the_least_recently_used_make_room(tmp_path):
    cache = Entries(tmp_path, 3500)
    for key, hours in (("a/1", 3), ("a/2", 5), ("b/3", 0.5)):
        make_entry(cache, key, 800, hours)
    assert cache.find("a/2")  # which is a use
    assert json.loads((tmp_path / "a" / "1" / "entry.json").read_text())["key"] == "a/1"
    mapped = (tmp_path / "a" / "1" / "data").open("rb")
    make_entry(cache, "c/4", 1200)
    assert [entry.key for entry in cache.list()] == ["a/2", "b/3", "c/4"]
    assert mapped.read() == bytes(800)
    with pytest.raises(
        NoRoom, match=r"c/5 takes 2.0 kB, but 3.* of the image cache .* its limit is 3.5 kB: .*--cache_gb"
    ):
        make_entry(cache, "c/5", 2000)  # all others were used within the hour
    assert len(cache.list()) == 3 and list((tmp_path / ".unfinished").iterdir()) == []


def test_a_full_disk_is_refused_before_and_while_building(cache, monkeypatch):
    usage = shutil.disk_usage(cache.folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9 + 999))
    with pytest.raises(
        NoRoom,
        match="a takes 1.0 kB, but the disk of .* has only 1.0 GB free, and 1.0 GB .* stay free: .*--cache_dir",
    ):
        make_entry(cache, "a")
    make_entry(cache, "b", 999, hours_ago=2)
    make_entry(cache, "c", 500)
    with pytest.raises(NoRoom):
        make_entry(cache, "d", 2**20)
    assert [entry.key for entry in cache.list()] == ["b", "c"]  # nothing is removed in vain

    def fill(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(NoRoom, match="cannot keep my images in the image cache .*No space left on device.*--cache_dir"):
        cache.get("e", 1, fill, "my images")
    assert len(cache.list()) == 2 and list((cache.folder / ".unfinished").iterdir()) == []


def test_what_is_no_entry_is_replaced_and_names_are_made_safe(cache):
    (cache.folder / "a" / "b").mkdir(parents=True)
    (cache.folder / "a" / "b" / "data").touch()
    assert cache.list() == [] and cache.find("a/b") is None
    assert make_entry(cache, "a/b") == cache.folder / "a" / "b"
    assert make_entry(cache, "../x y/.z*") == cache.folder / "_" / "x_y" / "z_"
    (cache.folder / "a" / "b" / "entry.json").write_text("torn")
    assert [(entry.key, entry.what) for entry in cache.list()] == [("_/x_y/z_", "../x y/.z*"), ("a/b", "?")]


BUILDER = """
import sys, time
from pathlib import Path
from domainbed_ext.cache.entries import Entries
folder, me = Path(sys.argv[1]), sys.argv[2]
def build(path):
    (path / "data").write_text(me)
    (folder / f"building_{me}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
(folder / f"asking_{me}").touch()
print(Entries(folder / "cache", 10**9).get("a/b", 10, build))
"""


def start(script: str, *args: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", script, *map(str, args)], stdout=subprocess.PIPE, text=True)


WITHOUT_LOCKS = """
import errno, fcntl
def flock(*_):
    raise OSError(errno.{}, "no locks here")
fcntl.flock = flock
"""


@pytest.mark.parametrize("error", [None, "ENOSYS", "ENOLCK"])
def test_two_builders_make_one_entry(tmp_path, error):
    locks = error is None
    script = BUILDER if locks else WITHOUT_LOCKS.format(error) + BUILDER
    first = start(script, tmp_path, "first")
    wait_for((tmp_path / "building_first").exists)
    second = start(script, tmp_path, "second")
    wait_for((tmp_path / ("asking_second" if locks else "building_second")).exists)
    (tmp_path / "go").touch()
    told = {process.communicate(timeout=300)[0].strip() for process in (first, second)}
    assert told == {str(tmp_path / "cache" / "a" / "b")} and first.returncode == second.returncode == 0
    assert (tmp_path / "building_second").exists() == (not locks)
    assert len(Entries(tmp_path / "cache", 10**9).list()) == 1
    assert [path for name in (".unfinished", ".locks") for path in (tmp_path / "cache" / name).iterdir()] == []


def test_who_waits_for_a_builder_can_be_stopped(tmp_path, cache):
    working = start(BUILDER, tmp_path, "first")
    wait_for((tmp_path / "building_first").exists)
    waited = []
    with stoppable() as stop, pytest.raises(Interrupted, match="stopped by SIGTERM"):
        when(lambda: waited, lambda: os.kill(os.getpid(), signal.SIGTERM))
        cache.get("a/b", 10, lambda folder: pytest.fail("built"), waiting=lambda: (waited.append(1), stop()))
    (tmp_path / "go").touch()
    assert working.communicate(timeout=300)[0].strip() == str(cache.find("a/b"))
    assert list((cache.folder / ".locks").iterdir()) == []


def test_a_killed_builder_leaves_nothing_that_counts(tmp_path, cache):
    killed = start(BUILDER, tmp_path, "first")
    wait_for((tmp_path / "building_first").exists)
    killed.kill()
    killed.communicate()
    assert cache.list() == [] and cache.find("a/b") is None
    assert len(list((cache.folder / ".unfinished").iterdir())) == 1
    make_entry(cache, "c/d")
    assert [entry.key for entry in cache.list()] == ["c/d"] and list((cache.folder / ".unfinished").iterdir()) == []
    make_entry(cache, "a/b")
    assert (cache.folder / "a" / "b" / "data").read_bytes() == bytes(1000)


def test_the_room_that_builders_at_work_will_take_counts(tmp_path, monkeypatch):
    working = start(BUILDER, tmp_path, "first")
    wait_for((tmp_path / "building_first").exists)
    monkeypatch.setattr(entries, "SPARE", 0)
    cache = Entries(tmp_path / "cache", 1009)
    with pytest.raises(NoRoom, match="but 10 bytes of .* are in use"):
        make_entry(cache, "c/d")
    (tmp_path / "go").touch()
    assert working.wait(30) == 0
    working.communicate()
    assert cache.find("a/b")
