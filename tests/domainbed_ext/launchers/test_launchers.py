import collections
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from domainbed_ext import launchers
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers import get_launcher, memory, options, slots
from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.launch import Launch
from domainbed_ext.launchers.local import Local
from domainbed_ext.launchers.pool import Limits, run_all
from domainbed_ext.launchers.queue import RESTARTS, Queue
from domainbed_ext.launchers.slots import Slot, make_slots
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.system.attempts import read_latest
from domainbed_ext.system.exit_codes import ExitCode
from tests.domainbed_ext.launched_processes import (
    ENDLESS,
    as_commands,
    execute,
    launch,
    stop,
    train_command,
    wait_for,
    when,
)

pool, queue = sys.modules["domainbed_ext.launchers.pool"], sys.modules["domainbed_ext.launchers.queue"]


@pytest.fixture
def unignored():
    """Ctrl-C and a hangup work, which a background job and nohup start with ignored."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def none_left():
    return not multiprocessing.active_children()


# Runs


@pytest.mark.usefixtures("warm_workers")
def test_runs_go_side_by_side_and_a_failure_costs_only_itself(tmp_path):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "done").touch()
    commands = [
        train_command(tmp_path / "0"),
        train_command(tmp_path / "1", "--algorithm", "nonsense"),
        train_command(tmp_path / "2", "--nonsense"),
        train_command(tmp_path / "3"),
        train_command(tmp_path / "4"),
    ]
    told = []
    codes = execute("local", commands, launch(tmp_path, 2, lambda index, share: told.append((index, share))))
    assert codes == [0, 2, 2, 0, 0]
    states = [RunFolder(tmp_path / str(i)).state for i in range(5)]
    assert states == [State.DONE, State.FAILED, State.FAILED, State.DONE, State.DONE]
    assert "--nonsense" in RunFolder(tmp_path / "2").failure()
    assert {index for index, share in told if share == 1.0} == set(range(5))
    assert any(0 < share < 1 for _, share in told)
    assert len(list((tmp_path / "3").iterdir())) == 1, "what is done is left alone"
    assert none_left()


def test_any_other_command_goes_to_the_shell(tmp_path):
    commands = [f"cd {tmp_path} && echo $0 $$ | wc -w > words; exit 3", "no_such_program 2> /dev/null"]
    assert execute("local", commands, launch(tmp_path)) == [3, 127]
    assert (tmp_path / "words").read_text().strip() == "2"


@pytest.mark.usefixtures("warm_workers")
def test_a_run_whose_worker_alone_is_asked_to_stop_resumes(tmp_path):
    stopped = []

    def stop_once(index, share):
        if 0 < share < 1 and not stopped:
            stopped.append(share)
            multiprocessing.active_children()[0].terminate()

    command = train_command(tmp_path / "run", "--steps", "40")
    assert execute("local", [command], launch(tmp_path, 1, stop_once)) == [0]
    assert stopped and "resumes after" in (tmp_path / "run" / "out.txt").read_text()
    assert read_latest(tmp_path / "run").number == 2


@pytest.mark.usefixtures("warm_workers")
def test_two_launches_share_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "INTERVAL", 0.2)
    commands = [train_command(tmp_path / str(i)) for i in range(4)]
    codes = [None, None]

    def one(number):
        codes[number] = execute("local", commands, launch(tmp_path))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [[0] * 4] * 2
    assert [read_latest(tmp_path / str(i)).number for i in range(4)] == [1] * 4
    owners = {read_latest(tmp_path / str(i)).owner["pid"] for i in range(4)}
    assert len(owners) == 2


# The queue


@pytest.fixture
def one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "INTERVAL", 0.0)
    return Queue(as_commands([train_command(tmp_path / "run"), "true"]), lambda index, share: None), RunFolder(
        tmp_path / "run"
    )


def test_a_run_that_another_process_works_on_waits_until_that_one_ends_it(one_run):
    runs, folder = one_run
    with folder.claim() as claim:
        assert [runs.take(), runs.take()] == [1, None]
        runs.end(1, 0)
        assert runs.take() is None and not runs.is_over
        folder.finish()
        claim.ended = "done"
    assert runs.take() is None and runs.codes == {0: 0, 1: 0}


def test_a_run_that_another_left_is_resumed_and_one_that_failed_there_has_failed(one_run):
    runs, folder = one_run
    with folder.claim():
        assert [runs.take(), runs.take()] == [1, None]
    assert runs.take() == 0
    runs.end(0, ExitCode.TAKEN)
    folder.fail("for a reason")
    assert runs.take() is None and runs.codes == {0: 1}


def test_a_run_that_failed_before_is_tried_again(one_run):
    runs, folder = one_run
    folder.fail("for a reason")
    assert runs.take() == 0


@pytest.mark.parametrize("code", [ExitCode.INTERRUPTED, -signal.SIGTERM])
def test_a_run_is_not_started_again_for_ever(one_run, code):
    runs, _ = one_run
    runs.end(runs.take(), code)
    assert runs.take() == 1
    for _ in range(RESTARTS):
        runs.end(runs.take(), code)
    assert runs.codes == {0: code}


def test_a_run_that_ended_well_elsewhere_has_failed(one_run):
    """As on a cluster whose machines do not share the folder."""
    runs, folder = one_run
    runs.end(runs.take(), 0)
    assert [runs.take(), runs.take()] == [1, None]
    assert runs.codes == {0: 1} and "share" in folder.failure()


def test_a_process_that_dies_after_its_run_is_done_costs_nothing(one_run):
    runs, folder = one_run
    folder.claim()
    folder.finish()
    runs.end(0, -signal.SIGKILL)
    assert runs.codes == {0: 0}


# Faults


def test_a_killed_worker_is_replaced_and_what_it_was_at_is_ended(tmp_path):
    first, after = tmp_path / "first", tmp_path / "after"
    commands = [f"echo $$ > {first}; kill -9 $PPID; exec sleep 1000", f"touch {after}"]
    assert execute("local", commands, launch(tmp_path)) == [-signal.SIGKILL, 0]
    assert after.exists()
    wait_for(lambda: not psutil.pid_exists(int(first.read_text())))


def test_a_worker_that_dies_between_runs_costs_none(tmp_path):
    def kill(index, share):
        if index == 0 and share == 1:
            (worker,) = multiprocessing.active_children()
            worker.kill()
            wait_for(lambda: not worker.is_alive())

    assert execute("local", ["true", "true"], launch(tmp_path, 1, kill)) == [0, 0]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, "cancel"])
def test_asked_to_stop_it_stops_every_command(tmp_path, unignored, how):
    one = launch(tmp_path, 2)
    ready = [tmp_path / "ready0", tmp_path / "ready1"]
    commands = [f"trap 'touch {path}.stopped; exit 0' TERM; touch {path}; sleep 1000 & wait" for path in ready]

    when(lambda: all(path.exists() for path in ready), lambda: stop(one, how))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        execute("local", [*commands, f"touch {tmp_path / 'after'}"], one)
    assert {path.name for path in tmp_path.glob("*.stopped")} == {"ready0.stopped", "ready1.stopped"}
    assert not (tmp_path / "after").exists() and none_left()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_second_interrupt_waits_for_nothing(tmp_path, unignored):
    ready, asked = tmp_path / "ready", tmp_path / "asked"
    deaf = f"trap 'touch {asked}' TERM; echo $$ > {ready}.part; mv {ready}.part {ready}; while true; do sleep 0.1; done"

    def interrupt_twice():
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(asked.exists)
        os.kill(os.getpid(), signal.SIGINT)

    when(ready.exists, interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        execute("local", [deaf], launch(tmp_path))
    wait_for(lambda: not psutil.pid_exists(int(ready.read_text())))


LAUNCHER = """
import sys
from pathlib import Path
from domainbed_ext.launchers import get_launcher
from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.launch import Launch

if __name__ == "__main__":
    path = Path(sys.argv[1])
    commands = [Command.for_run(sys.argv[3:], path / "run"), Command(sys.argv[2])]
    get_launcher("local").run(commands, Launch(path, parallel=2, progress=lambda i, share: (path / str(i)).touch()))
"""


@pytest.mark.slow
def test_when_the_launcher_is_killed_its_runs_leave_with_a_checkpoint(tmp_path):
    script, other, run = tmp_path / "launcher.py", tmp_path / "other", tmp_path / "run"
    script.write_text(LAUNCHER)
    commands = [f"echo $$ > {other}; exec sleep 1000", *train_command(run, *ENDLESS).argv]
    launcher = subprocess.Popen([sys.executable, script, tmp_path, *commands], start_new_session=True)
    try:
        wait_for(lambda: (tmp_path / "0").exists() and other.exists())
    finally:
        launcher.kill()
    assert launcher.wait(60) == -signal.SIGKILL
    wait_for(lambda: RunFolder(run).state is State.INTERRUPTED)
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in (read_latest(run).owner["pid"], int(other.read_text()))))
    assert read_latest(run).ended == "interrupted"
    assert list(run.glob("checkpoint_*"))


@pytest.mark.usefixtures("warm_workers")
def test_an_interrupt_waits_for_the_checkpoints(tmp_path, unignored):
    run = tmp_path / "run"

    def progress(index, share):
        if 0 < share < 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        execute("local", [train_command(run, *ENDLESS, "--save_steps", "0")], launch(tmp_path, 1, progress))
    assert read_latest(run).ended == "interrupted" and none_left()
    assert list(run.glob("checkpoint_*"))


# Bounds


def test_a_command_that_takes_too_much_memory_is_stopped_and_said_so(tmp_path, capfd):
    big = shlex.join([sys.executable, "-c", "import time; x = b'1' * 400_000_000; time.sleep(1000)"])
    assert execute("local", ["true", big, "true"], launch(tmp_path, memory_gb=0.3)) == [0, 1, 0]
    assert "MB of memory, above memory_gb=0.3" in capfd.readouterr().err


@pytest.mark.usefixtures("warm_workers")
def test_a_run_that_takes_too_much_memory_has_failed_and_can_resume(tmp_path, monkeypatch):
    """It is asked to stop after its first step, in a worker that is not fresh, and again in one that is."""
    run = tmp_path / "run"
    monkeypatch.setattr(
        pool.memory, "measure_families", lambda pids: {p: 2_000_000_000 if has_begun() else 0 for p in pids}
    )

    def has_begun():
        attempt = read_latest(run)
        return attempt and attempt.number == began[-1] and attempt.is_alive()

    began = []

    def progress(index, share):
        if index == 1 and 0 < share < 1:
            began.append(read_latest(run).number)

    began.append(0)
    commands = ["true", train_command(run, *ENDLESS)]
    assert execute("local", commands, launch(tmp_path, 1, progress, memory_gb=1)) == [0, 1]
    assert RunFolder(run).state is State.FAILED
    assert RunFolder(run).failure() == "it took 2.0 GB of memory, above memory_gb=1: raise that limit"
    assert read_latest(run).number == 2 and read_latest(run).ended == "interrupted"
    assert list(run.glob("checkpoint_*"))


def test_a_run_that_does_not_heed_its_time_limit_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "GRACE", 0.1)  # so that it is past already while it imports torch
    commands = [train_command(tmp_path / "run", "--time_limit", "0.001", minutes=0.001), f"touch {tmp_path / 'after'}"]
    assert execute("local", commands, launch(tmp_path)) == [1, 0]
    assert RunFolder(tmp_path / "run").failure().startswith("it took longer than its time limit of 0.001 minutes")
    assert (tmp_path / "after").exists()


def test_what_is_deaf_to_its_time_limit_and_to_signals_is_killed(tmp_path, monkeypatch, capfd):
    pid = tmp_path / "pid"
    monkeypatch.setattr(pool, "GRACE", 0.5)
    deaf = f"trap '' TERM; echo $$ > {pid}.part; mv {pid}.part {pid}; exec sleep 1000"
    assert execute("local", [Command(deaf, minutes=0.001)], launch(tmp_path)) == [1]
    assert "time limit of 0.001 minutes and did not stop" in capfd.readouterr().err
    wait_for(lambda: not psutil.pid_exists(int(pid.read_text())))


def test_a_long_sweep_leaves_nothing_open_and_replaces_its_workers(tmp_path):
    open_files = psutil.Process().num_fds
    execute("local", ["true"], launch(tmp_path))  # starts what all launches share
    before, workers = open_files(), tmp_path / "workers"
    assert execute("local", [f"echo $PPID >> {workers}"] * 220, launch(tmp_path, runs_per_worker=55)) == [0] * 220
    assert open_files() == before and none_left()
    assert list(collections.Counter(workers.read_text().split()).values()) == [55] * 4


def test_a_worker_does_not_keep_files_open(tmp_path):
    """Counted between its commands: while it starts one, it holds both ends of a pipe to it for a moment."""
    counts = []

    def count(index, share):
        (worker,) = multiprocessing.active_children()
        counts.append(psutil.Process(worker.pid).num_fds())

    execute("local", ["true"] * 60, launch(tmp_path, progress=count))
    assert len(counts) == 60 and len(set(counts)) == 1


def test_a_worker_that_has_grown_is_replaced(tmp_path, monkeypatch):
    sizes = iter([10**9, 10**9, 4 * 10**9, 10**9, 10**9])
    monkeypatch.setattr(pool.memory, "measure", lambda pid: next(sizes))
    execute("local", [f"echo $PPID >> {tmp_path / 'workers'}"] * 4, launch(tmp_path, growth_gb=1))
    assert list(collections.Counter((tmp_path / "workers").read_text().split()).values()) == [3, 1]


# Slots


def test_each_slot_has_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8d0c, GPU-41fe")
    commands = [f"echo $CUDA_VISIBLE_DEVICES > {tmp_path}/{i}" for i in range(2)]
    assert execute("multi_gpu", commands, launch(tmp_path, 0)) == [0, 0]
    assert [(tmp_path / str(i)).read_text().strip() for i in range(2)] == ["GPU-8d0c", "GPU-41fe"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-8d0c, GPU-41fe"


@pytest.mark.parametrize(
    ("visible", "count", "parallel", "jobs_per_gpu", "devices"),
    [
        (None, 2, 0, 1, ["0", "1"]),
        ("2,5", 2, 0, 2, ["2", "5", "2", "5"]),
        ("2,5", 2, 3, 1, ["2", "5", "2"]),
        ("GPU-a,GPU-b", 2, 1, 4, ["GPU-a"]),
        ("3,99", 1, 0, 1, ["3"]),  # there is no GPU 99
    ],
)
def test_slots_go_round_the_visible_gpus(monkeypatch, visible, count, parallel, jobs_per_gpu, devices):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = make_slots([Command("true")] * 10, parallel, jobs_per_gpu)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in found] == devices


def test_without_a_gpu_slots_share_the_cores(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(slots, "count_available_cores", lambda: 8)
    narrow, wide = train_command("run"), train_command("run", threads=3)
    assert len(make_slots([narrow] * 10)) == 8
    assert len(make_slots([narrow, wide] * 10)) == 2
    assert len(make_slots([narrow] * 10, parallel=5)) == 5
    assert make_slots([narrow]) == [Slot()]


# Which launchers there are


def test_dummy_prints_and_leaves_no_trace(tmp_path, capsys):
    command = train_command(tmp_path / "0")
    assert execute("dummy", [command], Launch(tmp_path / "launch")) == [0]
    assert capsys.readouterr().out == command.text + "\n"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_launcher_gets_the_nearest_name():
    with pytest.raises(BenchmarkError, match="unknown launcher 'lokal': did you mean 'local'"):
        get_launcher("lokal")


@pytest.fixture
def others(tmp_path, monkeypatch):
    """A package with launchers, as pip would have installed it."""
    site = tmp_path / "site"
    (site / "engines-1.0.dist-info").mkdir(parents=True)
    (site / "engines-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: engines\nVersion: 1.0\n")
    (site / "engines-1.0.dist-info" / "entry_points.txt").write_text(
        "[domainbed_ext.launchers]\nnew = engines:new\nmine = engines:Mine\nold = engines:old\n"
        "broken = engines:nothing\n"
    )
    (site / "engines.py").write_text(
        "def new(commands, launch):\n    assert type(commands[0]) is str\n"
        "    return [launch.parallel] * len(commands)\n\n"
        "def old(commands):\n    assert type(commands) is list\n    print(*commands)\n\n"
        "from dataclasses import dataclass\n"
        "from domainbed_ext.launchers import Launcher\nfrom domainbed_ext.launchers.options import option\n"
        "@dataclass\nclass Options:\n    nodes: int = option(1, 'number of nodes', above=0)\n\n"
        "class Mine(Launcher):\n    OPTIONS = Options\n"
        "    def run(self, commands, launch):\n"
        "        return [command.threads * self.read_options(launch.options).nodes for command in commands]\n"
    )
    monkeypatch.syspath_prepend(site)


def test_another_packages_launcher_is_found(tmp_path, others):
    assert execute("new", ["a", "b"], launch(tmp_path, 3)) == [3, 3]
    with pytest.raises(BenchmarkError, match="unknown launcher 'neww': did you mean 'new'"):
        get_launcher("neww")
    with pytest.raises(BenchmarkError, match="launcher 'broken' of engines cannot be imported: .*nothing"):
        get_launcher("broken")


def test_another_packages_launcher_may_be_an_object_with_options_of_its_own(tmp_path, others):
    mine = get_launcher("mine")
    assert (mine.name, mine.RUNS_HERE, mine.list_options()) == ("mine", False, [("nodes", "1", "number of nodes")])
    assert execute("mine", [Command("a", threads=3)], launch(tmp_path, nodes="2")) == [6]
    with pytest.raises(BenchmarkError, match="unknown option of launcher mine: 'node': did you mean 'nodes'"):
        launchers.check_options("mine", {"node": 2})
    assert "in the scheduler too" in launchers.cancel_in_scheduler("mine", tmp_path)


def test_a_launcher_is_registered_by_its_class_alone(monkeypatch):
    monkeypatch.setattr(launchers.registry, "LAUNCHERS", registered := dict(launchers.LAUNCHERS))

    @launchers.register_launcher("again")
    class Again(Local):
        pass

    assert isinstance(get_launcher("again"), Again) and registered["again"].name == "again"
    assert get_launcher("again").count_runs_at_once([Command("true")] * 5, 3, {}) == 3
    with pytest.raises(BenchmarkError, match="option jobs_per_gpu of launcher again is 0"):
        launchers.check_options("again", {"jobs_per_gpu": 0})


def test_domainbeds_launchers_take_the_commands_alone(tmp_path, others, capsys):
    commands = [train_command(tmp_path / name) for name in ("done", "failed", "waits")]
    for name in ("done", "failed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert execute("old", [*commands, "true"], launch(tmp_path)) == [0, 1, None, None]
    assert capsys.readouterr().out == " ".join([*(command.text for command in commands), "true"]) + "\n"


@pytest.mark.parametrize(
    ("launcher", "options", "sentence"),
    [
        ("local", {"memory": 3}, "unknown option of launcher local: 'memory': did you mean 'memory_gb'"),
        ("local", {"memory_gb": "much"}, "option memory_gb of launcher local is 'much': give a number$"),
        ("local", {"memory_gb": float("nan")}, "option memory_gb of launcher local is nan: give a number above 0$"),
        ("local", {"runs_per_worker": 1.5}, "option runs_per_worker of launcher local is 1.5: give a whole number$"),
        ("local", {"jobs_per_gpu": 0}, "option jobs_per_gpu of launcher local is 0: give a number above 0$"),
        ("multi_gpu", {"jobs_per_gpu": 2}, "unknown option of launcher multi_gpu: 'jobs_per_gpu'"),
        ("dummy", {"memory_gb": 2}, "launcher dummy has no options: leave 'memory_gb' out"),
    ],
)
def test_a_wrong_option_is_told_before_anything_runs(tmp_path, launcher, options, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        launchers.check_options(launcher, options)
    with pytest.raises(BenchmarkError, match=sentence):
        execute(launcher, [f"touch {tmp_path / 'ran'}"], launch(tmp_path, **options))
    assert not (tmp_path / "ran").exists()


def test_options_may_be_words_of_a_command_line():
    read = options.read(Limits, "local", {"memory_gb": "2.5", "runs_per_worker": "7", "growth_gb": None})
    assert read == Limits(2.5, 7, 2.0)
    assert [row[:2] for row in get_launcher("local").list_options()] == [
        *(("memory_gb", ""), ("runs_per_worker", "100"), ("growth_gb", "2.0"), ("jobs_per_gpu", "1"))
    ]
    assert run_all([], []) == []


@pytest.mark.parametrize(
    ("holds", "counts"), [("bytearray(2**27)", True), ("mmap.mmap(file.fileno(), 0, access=1)", False)]
)
def test_memory_is_a_processs_own_and_not_the_files_that_it_maps(tmp_path, holds, counts):
    (tmp_path / "pixels").write_bytes(bytes(2**27))
    code = f"import mmap; file = open('pixels', 'rb'); held = {holds}; sum(held[::4096]); print(flush=True); input()"
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert (memory.measure_families([process.pid])[process.pid] > 2**27) == counts
        assert (memory.measure(process.pid) > 2**27) == counts
        process.communicate(b"\n")
    assert memory.measure_families([process.pid]) == {process.pid: 0}
