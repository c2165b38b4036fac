import gc
import sys

import pytest

from domainbed_ext.system import garbage
from domainbed_ext.system.command_line import exit_cleanly


@pytest.fixture(autouse=True)
def unfrozen():
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.enable()


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A module that makes objects enough for many collections."""
    (tmp_path / "many_objects.py").write_text("objects = [[] for _ in range(100_000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("many_objects", None)


def collections():
    return sum(generation["collections"] for generation in gc.get_stats())


def test_nothing_is_collected_while_modules_are_loaded_nor_is_what_they_hold_examined_later(modules):
    before = collections()
    with garbage.loading():
        import many_objects  # noqa: F401
    assert gc.isenabled() and collections() - before <= 1
    assert gc.get_freeze_count() > 100_000


def test_without_new_modules_garbage_remains_garbage():
    with garbage.loading():
        import json  # noqa: F401
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_process_without_collections_stays_so(modules):
    gc.disable()
    with garbage.loading():
        import many_objects  # noqa: F401
    assert not gc.isenabled() and gc.get_freeze_count() == 0


def test_a_command_examines_nothing_when_it_ends():
    with pytest.raises(SystemExit) as ended:
        exit_cleanly(lambda: 3)
    assert ended.value.code == 3 and gc.get_freeze_count() > 1000
