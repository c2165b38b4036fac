import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from domainbed_ext.system import attempts
from domainbed_ext.system.attempts import Claim, Lost, Taken, read_clock, read_latest
from tests.domainbed_ext.launched_processes import wait_for


@pytest.fixture
def short_lease(monkeypatch):
    monkeypatch.setattr(attempts, "LEASE", 0.5)


@pytest.fixture
def outlive_the_lease(monkeypatch):
    """Makes an attempt's last heartbeat older than a lease, which is short from then on."""

    def outlive(path):
        monkeypatch.setattr(attempts, "LEASE", 0.5)
        then = path.stat().st_mtime - 1
        os.utime(path, (then, then))

    return outlive


def elsewhere(path):
    """Makes an attempt's owner a process of another machine."""
    told = json.loads(path.read_text())
    told["owner"]["host"] = "elsewhere"
    path.write_text(json.dumps(told))


def test_one_claims_and_the_next_waits_until_it_ends(tmp_path):
    assert read_latest(tmp_path) is None
    with Claim(tmp_path) as claim:
        assert claim.number == 1 and read_latest(tmp_path).is_alive()
        with pytest.raises(Taken, match=f"process {os.getpid()} on .* works on {tmp_path.name}"):
            Claim(tmp_path)
        claim.share, claim.ended = 0.5, "failed"
    attempt = read_latest(tmp_path)
    assert (attempt.ended, attempt.share, attempt.is_alive()) == ("failed", 0.5, False)
    with Claim(tmp_path) as claim:
        assert claim.number == 2 and claim.seconds >= attempt.seconds
    assert read_latest(tmp_path).ended == "interrupted"
    with Claim(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["attempt_2.json", "attempt_3.json"]


def test_of_many_at_once_one_gets_it(tmp_path):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom domainbed_ext.system.attempts import Claim, Taken\n"
        "folder = Path(sys.argv[1])\n"
        "while not (folder / 'go').exists(): time.sleep(0.001)\n"
        "try:\n    with Claim(folder):\n        start = time.monotonic(); time.sleep(0.5); end = time.monotonic()\n"
        "    print(start, end)\n"
        "except Taken:\n    pass\n"
    )
    crowd = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(6)]
    time.sleep(0.5)
    (tmp_path / "go").touch()
    said = [process.communicate()[0].split() for process in crowd]
    times = sorted((float(start), float(end)) for start, end in filter(None, said))
    assert times and len(times) == read_latest(tmp_path).number
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times)), "two at once"


def _hold(folder, ready):
    with Claim(folder):
        ready.set()
        time.sleep(1000)


def test_a_killed_owner_on_this_machine_is_known_to_have_exited_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(300)
    with pytest.raises(Taken, match=f"process {process.pid}"):
        Claim(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not read_latest(tmp_path).is_alive()
    with Claim(tmp_path) as claim:
        assert claim.number == 2


def test_a_later_process_of_the_same_number_is_not_the_owner(tmp_path):
    with Claim(tmp_path) as claim:
        told = json.loads(claim.path.read_text())
        told["owner"]["began"] = "1"
        claim.path.write_text(json.dumps(told))
        assert not read_latest(tmp_path).is_alive()


def test_an_owner_elsewhere_lives_by_its_heartbeat(tmp_path, outlive_the_lease):
    with Claim(tmp_path) as claim:
        pass
    told = {**json.loads(claim.path.read_text()), "ended": None}
    claim.path.write_text(json.dumps(told))
    elsewhere(claim.path)
    assert read_latest(tmp_path).is_alive()
    with pytest.raises(Taken, match="on elsewhere works on"):
        Claim(tmp_path)
    outlive_the_lease(claim.path)
    assert not read_latest(tmp_path).is_alive()
    with Claim(tmp_path) as later:
        assert later.number == 2


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_jumps_expires_no_claim_and_keeps_none_that_expired(tmp_path, short_lease, monkeypatch, jump):
    """Owner elsewhere; the clock that stamps files jumps between its heartbeat and our look."""
    with Claim(tmp_path) as claim:
        pass
    told = {**json.loads(claim.path.read_text()), "ended": None}
    claim.path.write_text(json.dumps(told))
    elsewhere(claim.path)
    monkeypatch.setattr(attempts, "read_clock", lambda folder: read_clock(folder) + jump)
    beating = [True]
    stamps = attempts._stamp
    monkeypatch.setattr(attempts, "_stamp", lambda path: (time.monotonic_ns(), 0) if beating[0] else stamps(path))
    with pytest.raises(Taken):
        Claim(tmp_path)
    beating[0] = False
    with Claim(tmp_path) as later:
        assert later.number == 2


def test_an_owner_whose_claim_expired_learns_it_before_it_writes(tmp_path):
    with Claim(tmp_path) as slow:
        slow.check()
        (tmp_path / "attempt_2.json").write_text("{}")
        with pytest.raises(Lost, match="expired, and another process has it"):
            slow.check()


def test_an_attempt_whose_file_is_torn_expires_after_its_lease(tmp_path, outlive_the_lease):
    (tmp_path / "attempt_4.json").write_text('{"owner": {"ho')
    assert read_latest(tmp_path).is_alive()
    with pytest.raises(Taken, match="another process works on"):
        Claim(tmp_path)
    outlive_the_lease(tmp_path / "attempt_4.json")
    with Claim(tmp_path) as claim:
        assert claim.number == 5


def test_heartbeats_continue_and_a_deleted_folder_does_not_come_back(tmp_path, short_lease):
    folder = tmp_path / "run"
    folder.mkdir()
    with Claim(folder) as claim:
        before = claim.path.stat().st_mtime_ns
        claim.share = 0.25
        wait_for(lambda: read_latest(folder).share == 0.25)
        assert claim.path.stat().st_mtime_ns > before
        claim.path.unlink()
        folder.rmdir()
    assert not folder.exists()


def test_a_heartbeat_on_a_full_disk_still_counts(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    with Claim(tmp_path) as claim:
        os.utime(claim.path, (0, 0))
        monkeypatch.setattr(attempts, "write_atomically", full)
        claim.beat()
        assert claim.path.stat().st_mtime > 1e9
