import os
import shlex
import signal
import sys
import threading
import time

import pytest

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers import get_launcher
from domainbed_ext.records import RunFolder, State

FAST = "--steps 2 --checkpoint_freq 0 --train_eval_share 0.1 --weights none --skip_model_save"


def train_command(folder, *words):
    return shlex.join([sys.executable, "-m", "domainbed_ext.train", *FAST.split(), "--output_dir", str(folder), *words])


def test_runs_go_side_by_side_and_a_failure_costs_only_itself(tmp_path):
    commands = [
        train_command(tmp_path / "0"),
        train_command(tmp_path / "1", "--algorithm", "nonsense"),
        train_command(tmp_path / "2", "--algorithm", "LP"),
    ]
    told = []
    codes = get_launcher("local")(commands, 2, lambda index, share: told.append((index, share)))
    assert codes == [0, 2, 0]
    states = [RunFolder(tmp_path / str(i)).state for i in range(3)]
    assert states == [State.DONE, State.FAILED, State.DONE]
    assert {index for index, share in told if share == 1.0} == {0, 1, 2}
    assert any(0 < share < 1 for _, share in told)


def test_a_killed_worker_is_replaced(tmp_path):
    kill = shlex.join([sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"])
    touch = shlex.join([sys.executable, "-c", f"open({str(tmp_path / 'after')!r}, 'w')"])
    codes = get_launcher("local")([kill, touch], 1, lambda index, share: None)
    assert codes == [-signal.SIGKILL, 0]
    assert (tmp_path / "after").exists()


def test_an_interrupt_stops_the_workers(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    started, after = tmp_path / "started", tmp_path / "after"
    code = f"import time; open({str(started)!r}, 'w'); time.sleep(3); open({str(after)!r}, 'w')"
    sleep = shlex.join([sys.executable, "-c", code])

    def interrupt():
        while not started.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            get_launcher("local")([sleep, sleep], 1, lambda index, share: None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not after.exists()


def test_dummy_prints_and_leaves_no_trace(tmp_path, capsys):
    command = train_command(tmp_path / "0")
    assert get_launcher("dummy")([command], 0, lambda index, share: None) == [0]
    assert capsys.readouterr().out == command + "\n"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_launcher_gets_the_nearest_name():
    with pytest.raises(BenchmarkError, match="unknown launcher 'lokal': did you mean 'local'"):
        get_launcher("lokal")
