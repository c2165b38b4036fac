"""Every command as a person types it: on a terminal, it ends, shows how far it is, and hears Ctrl-C."""

import os
import signal

import pytest

from tests import terminal
from tests.domainbed_ext.launched import ENDLESS, FAST
from tests.terminal import Terminal, assert_clean, interrupted, run

pytestmark = pytest.mark.slow

TRAIN = ("-m", "domainbed_ext.train", *FAST.split())
RESUME = "interrupted[^\n]*: run the same command again to resume\n"


def assert_stopped(ended, code, sentence):
    """One sentence, the exit code, no traceback, and the cursor is there again."""
    assert ended.code == code, ended.screen[-3000:]
    assert "Traceback" not in ended.screen and "KeyboardInterrupt" not in ended.screen, ended.screen[-3000:]
    assert len(terminal.re.findall(sentence, ended.screen)) == 1, ended.screen[-3000:]
    assert ended.raw.count("\x1b[?25l") == ended.raw.count("\x1b[?25h")


def test_train_ends_and_leaves_clean_logs(tmp_path):
    ended = run(*TRAIN, "--output_dir", tmp_path / "run", "--workers", "1")
    assert ended.code == 0
    assert "setting up" in ended.screen and "2/2 steps" in ended.screen and "evaluating" in ended.screen
    out, err = tmp_path / "run" / "out.txt", tmp_path / "run" / "err.txt"
    assert_clean(out, err)
    lines = out.read_text().splitlines()
    assert lines[0] == "DigitsShift: tests on blended; trains on plain, rotated, sketched"
    assert [line.split("  ")[0] for line in lines[4:-1]] == ["step 1"] and "blended (test) in 0." in lines[4]
    assert lines[-1].startswith("done: tested on blended: ") and lines[-1].endswith("the model was not saved")
    assert err.read_text() == ""
    assert "evaluating" not in out.read_text() and lines[0] in ended.screen


@pytest.mark.parametrize("workers", ["0", "1"])
def test_train_hears_ctrl_c_between_two_steps(tmp_path, workers):
    words = (*TRAIN, "--output_dir", tmp_path / "run", *ENDLESS, "--workers", workers)
    ended = interrupted(*words, at=r"[1-9]\d*/1,000,000 steps")
    assert_stopped(ended, 75, RESUME)
    assert list((tmp_path / "run").glob("checkpoint_*")) and not (tmp_path / "run" / "failed").exists()
    assert_clean(tmp_path / "run" / "out.txt", tmp_path / "run" / "err.txt")


def test_train_hears_sigterm_on_a_terminal(tmp_path):
    words = (*TRAIN, "--output_dir", tmp_path / "run", *ENDLESS)
    started = Terminal(*words, out=tmp_path / "piped").wait_for(r"[1-9]\d*/1,000,000 steps")
    os.kill(started.process.pid, signal.SIGTERM)
    assert_stopped(started.end(), 75, RESUME)
    assert_clean(tmp_path / "piped")  # what is piped stays piped, whatever the terminal shows
    assert (tmp_path / "piped").read_text() == (tmp_path / "run" / "out.txt").read_text() != ""
