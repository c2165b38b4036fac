import os
import signal
import subprocess
import sys

import pytest

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers.command import Command
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.system.attempts import read_latest
from tests.domainbed_ext.launched_processes import ENDLESS, execute, launch, stop, train_command, when

launcher = sys.modules["domainbed_ext.launchers.ray"]

# Without Ray


def test_without_ray_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BenchmarkError, match=r"pip install 'vitlorafa\[ray\]'"):
        execute("ray", ["true"], launch(tmp_path))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"adress": "auto"}, "unknown option of launcher ray: 'adress': did you mean 'address'"),
        ({"num_gpus": -0.5}, "option num_gpus of launcher ray is -0.5: give a number of at least 0$"),
        ({"max_retries": "many"}, "option max_retries of launcher ray is 'many': give a whole number$"),
    ],
)
def test_a_wrong_option_is_told_before_ray_starts(tmp_path, options, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        execute("ray", ["true"], launch(tmp_path, **options))


def test_a_process_that_was_moved_to_another_gpu_leaves_the_run_to_a_new_one(tmp_path, monkeypatch):
    """CUDA stays on the GPU it was started on."""
    monkeypatch.setattr(launcher.execute, "run", lambda command: "here")
    monkeypatch.setattr(launcher, "_devices_of_cuda", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert launcher._task(Command("true"), ".") == "here"
    monkeypatch.setattr(launcher, "_devices_of_cuda", "1")
    assert launcher._task(Command("true"), ".") == "here"
    monkeypatch.setattr(launcher, "_devices_of_cuda", "0")
    assert launcher._task(Command("exit 4"), ".") == 4


def test_it_says_so_where_no_machine_has_room(capsys):
    class Engine:
        exceptions = None

        def remote(self, **_):
            return lambda function: function

        def cluster_resources(self):
            return {"CPU": 16.0, "GPU": 2.0}

        def nodes(self):
            return [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}] * 2

    def check(may_grow=False, **options):
        queue = launcher.Queue([Command("true")], lambda index, share: None)
        launcher._Tasks(Engine(), queue, launcher.RayOptions(**options), 0).check_room(may_grow)

    check(jobs_per_gpu=3)
    check(num_cpus=8, num_gpus=0)
    with pytest.raises(BenchmarkError, match="has the 1 cores and 2 GPUs of a run: lower num_cpus or num_gpus"):
        check(num_gpus=2)
    check(may_grow=True, num_gpus=2)
    assert "it waits until one comes" in capsys.readouterr().err
    with pytest.raises(BenchmarkError, match="num_gpus of launcher ray is 1.5: give whole GPUs, or a part of one"):
        check(num_gpus=1.5)


# With Ray: one machine of two cores, and of two GPUs that Ray believes in


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a job that a script put into the background
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=2,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    signal.signal(signal.SIGINT, before)
    yield ray
    ray.shutdown()


@pytest.mark.ray
def test_codes_come_in_order_and_devices_are_shared_out(tmp_path, cluster):
    show = "echo $CUDA_VISIBLE_DEVICES >> {}; test -s {}"
    mine, other = tmp_path / "mine", tmp_path / "other"
    meet = " && until test -s {}; do sleep 0.05; done"
    commands = [show.format(mine, mine) + meet.format(other), "exit 3", show.format(other, other) + meet.format(mine)]
    told = []
    codes = execute("ray", commands, launch(tmp_path, 0, progress=lambda *word: told.append(word)))
    assert codes == [0, 3, 0]
    assert {mine.read_text().strip(), other.read_text().strip()} == {"0", "1"}
    assert sorted(told) == [(0, 1.0), (1, 1.0), (2, 1.0)]


@pytest.mark.ray
def test_a_gpu_may_be_shared(tmp_path, cluster):
    meet = f"until test $(ls {tmp_path}/ready | wc -l) = 4; do sleep 0.05; done"
    (tmp_path / "ready").mkdir()
    commands = [f"touch {tmp_path}/ready/{i}; {meet}" for i in range(4)]
    assert execute("ray", commands, launch(tmp_path, 0, jobs_per_gpu=2, num_cpus=0.5)) == [0] * 4


@pytest.mark.ray
def test_a_run_whose_process_is_killed_resumes_and_its_process_is_warm(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(launcher, "INTERVAL", 0.2)
    first, second = tmp_path / "first", tmp_path / "second"

    def kill():
        os.kill(read_latest(first).owner["pid"], signal.SIGKILL)

    when(lambda: list(first.glob("checkpoint_*")), kill)
    commands = [train_command(first, "--steps", "60"), train_command(second)]
    assert execute("ray", commands, launch(tmp_path, 1, num_gpus=0)) == [0, 0]
    assert read_latest(first).number == 2 and read_latest(second).number == 1
    assert "resumes after" in (first / "out.txt").read_text()
    assert read_latest(first).owner["pid"] == read_latest(second).owner["pid"]
    assert execute("ray", commands, launch(tmp_path)) == [0, 0]
    assert read_latest(first).number == 2


@pytest.mark.ray
def test_what_dies_again_and_again_has_failed_and_what_fails_is_not_tried_again(tmp_path, cluster, capfd):
    commands = [f"echo >> {tmp_path}/dies; kill -9 $PPID", f"echo >> {tmp_path}/fails; exit 1"]
    assert execute("ray", commands, launch(tmp_path, 1, max_retries=1)) == [1, 1]
    assert len((tmp_path / "dies").read_text().splitlines()) == 2
    assert len((tmp_path / "fails").read_text().splitlines()) == 1
    assert "Ray lost it 2 times, the last time by WorkerCrashedError" in capfd.readouterr().err


@pytest.fixture
def sigint():
    """A background job starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.ray
def test_an_interrupt_waits_for_the_checkpoints(tmp_path, cluster, sigint):
    run, one = tmp_path / "run", launch(tmp_path, 0)
    when(lambda: list(run.glob("checkpoint_*")), lambda: stop(one, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        execute("ray", [train_command(run, *ENDLESS), f"touch {tmp_path}/after"], launch(tmp_path))
    assert RunFolder(run).state is State.INTERRUPTED and read_latest(run).ended == "interrupted"
    assert not (tmp_path / "after").exists()


@pytest.mark.ray
@pytest.mark.parametrize("how", [signal.SIGTERM, "cancel"])
def test_asked_to_stop_it_stops_every_command(tmp_path, cluster, how):
    ready, one = [tmp_path / "ready0", tmp_path / "ready1"], launch(tmp_path, 0)
    commands = [f"trap 'touch {path}.stopped; exit 0' TERM; touch {path}; sleep 1000 & wait" for path in ready]
    when(lambda: all(path.exists() for path in ready), lambda: stop(one, how))
    with pytest.raises(KeyboardInterrupt):
        execute("ray", [*commands, f"touch {tmp_path}/after"], one)
    assert {path.name for path in tmp_path.glob("*.stopped")} == {"ready0.stopped", "ready1.stopped"}
    assert not (tmp_path / "after").exists()


OWN = """
import sys
from pathlib import Path
from domainbed_ext.launchers import get_launcher
from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.launch import Launch

if __name__ == "__main__":
    print(get_launcher("ray").run([Command("true"), Command("exit 5")], Launch(Path(sys.argv[1]))))
"""


@pytest.mark.ray
def test_it_starts_a_cluster_of_its_own_and_says_nothing(tmp_path):
    pytest.importorskip("ray")
    script = tmp_path / "own.py"
    script.write_text(OWN)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert (done.stdout, done.stderr) == ("[0, 5]\n", "")
