import multiprocessing
import os
import signal

import pytest

from domainbed_ext.system.locks import alone


def _hold(path, ready):
    with alone(path):
        ready.set()
        signal.pause()


@pytest.fixture
def held(tmp_path):
    """A lock that another process holds."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "lock", ready))
    process.start()
    assert ready.wait(300)
    yield tmp_path / "lock", process
    process.kill()
    process.join()


class RefusedError(Exception):
    pass


def refuse():
    raise RefusedError


def test_a_wait_can_be_refused_and_the_holder_keeps_its_lock(held):
    path, process = held
    for _ in range(2):
        with pytest.raises(RefusedError), alone(path, refuse):
            pytest.fail("two at once")
    assert process.is_alive() and path.exists()


def test_a_holder_that_is_killed_gives_its_lock_up(held):
    path, process = held
    waits = []

    def kill():
        waits.append(1)
        os.kill(process.pid, signal.SIGKILL)

    with alone(path, kill):
        assert waits
        with pytest.raises(RefusedError), alone(path, refuse):
            pytest.fail("two at once")
    assert not path.exists()


def test_a_lock_that_is_released_is_free_again(tmp_path):
    for _ in range(2):
        with alone(tmp_path / "lock", refuse):
            assert (tmp_path / "lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), alone(tmp_path / "file" / "lock"):
        pytest.fail("entered")
