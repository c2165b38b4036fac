"""Threads that share work: their results, and Ctrl-C meanwhile."""

import os
import signal
import sys
import threading

import pytest

from domainbed_ext.system.threads import map_in_threads


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_results_are_in_order(threads):
    assert map_in_threads(lambda item: item**2, range(50), threads) == [item**2 for item in range(50)]


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_is_raised(threads):
    with pytest.raises(ZeroDivisionError):
        map_in_threads(lambda item: 1 / item, [1, 0, 2], threads)


@pytest.fixture
def interrupts():
    """Has Ctrl-C do what it does by default, and puts back what it did before."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="a signal to the own process ends it")
def test_ctrl_c_waits_for_the_calls_that_have_begun_and_no_more_begin(interrupts):
    begun, ended, threads = [], [], threading.active_count()

    def call(item):
        begun.append(item)
        if item == 5:
            send_ctrl_c()
        ended.append(item)

    with pytest.raises(KeyboardInterrupt):
        map_in_threads(call, range(5_000), 3)
    assert sorted(begun) == sorted(ended) and 5 < len(begun) < 5_000
    assert threading.active_count() == threads
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(sys.platform == "win32", reason="a signal to the own process ends it")
def test_ctrl_c_is_not_raised_inside_the_pool(interrupts):
    """A pool that it interrupts at the wrong place never ends; so many tries meet such a place."""
    for at in range(100):
        threads = threading.active_count()

        def call(item, at=at):
            if item == at % 16:
                send_ctrl_c()

        with pytest.raises(KeyboardInterrupt) as raised:
            map_in_threads(call, range(16), 16)
        assert "futures" not in str(raised.traceback[-2].path)
        assert threading.active_count() == threads


@pytest.mark.skipif(sys.platform == "win32", reason="a signal to the own process ends it")
def test_a_handler_that_does_not_raise_ends_nothing(interrupts):
    came = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    assert map_in_threads(lambda item: send_ctrl_c() if item == 2 else item, range(9), 3) == [0, 1, None, *range(3, 9)]
    assert came == [signal.SIGINT]
