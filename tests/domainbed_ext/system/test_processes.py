"""Helpers and the signals that a terminal sends to every process of a command."""

import os
import signal
import threading
import time
from multiprocessing.context import SpawnProcess

import pytest

from domainbed_ext.system.processes import HELPERS, several


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_waits_until_a_helper_has_started(monkeypatch, number):
    came = []
    start = SpawnProcess.start

    def slow(helper):
        os.kill(os.getpid(), number)
        time.sleep(0.05)  # in which the other thread receives it
        start(helper)
        came.append("started")

    monkeypatch.setattr(SpawnProcess, "start", slow)
    before = signal.signal(number, lambda *_: came.append("signal"))
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        helper = HELPERS.Process(target=print)
        helper.start()
        helper.join()
    finally:
        over.set()
        thread.join()
        signal.signal(number, before)
    assert came == ["started", "signal"]
    assert helper.exitcode == 0


def test_an_interruption_waits_until_the_pool_knows_all_its_helpers(monkeypatch):
    start = SpawnProcess.start
    started = []

    def interrupted(helper):
        start(helper)
        if not started:
            os.kill(os.getpid(), signal.SIGINT)
        started.append(helper)

    monkeypatch.setattr(SpawnProcess, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), several(2) as over:
        list(over(abs, [-1, -2]))
    assert len(started) == 2 and not any(helper.is_alive() for helper in started)
