"""The launcher `slurm`: what it sends to a fake Slurm, what a job does when told, and all of it in a real one."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers import get_launcher, slurm, slurm_task
from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.launch import Launch, begin, list_under_way, read_launch
from domainbed_ext.launchers.slurm import cancel, is_waiting, split_into_arrays
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.sweep import command as sweep
from domainbed_ext.system.attempts import read_latest
from domainbed_ext.system.exit_codes import ExitCode
from tests.domainbed_ext.fake_slurm import CONFIG, FakeSlurm
from tests.domainbed_ext.fault_injection import SHORT, Run, outcome
from tests.domainbed_ext.launched_processes import as_commands
from tests.domainbed_ext.one_node_slurm import LONGEST_ARRAY, OneNodeSlurm, is_possible, wait_for

BRIEF = "--steps 2 --checkpoint_freq 0 --train_eval_share 0.1 --weights none"
LONG = "--steps 100000 --checkpoint_freq 0 --save_steps 1 --train_eval_share 0.1 --skip_model_save"


def launch_in_slurm(sweep_dir, commands, runs=(), parallel=0, **options):
    """Launches and returns the launch's folder."""
    with begin(sweep_dir, "slurm", "", Launch(sweep_dir, runs, parallel, options)) as launch:
        assert get_launcher("slurm").run(as_commands(commands), launch) == [None] * len(commands)
    return launch.path


def train_command(folder, words, **facts):
    return Command.for_run([*shlex.split(words), "--output_dir", str(folder)], folder, **facts)


def write_command(path):
    return shlex.join([sys.executable, "-S", "-c", f"open({str(path)!r}, 'x')"])


def log(launch):
    return "".join(path.read_text() for path in sorted((launch / "slurm").glob("*.log")))


# What is sent.


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", fake.path)
    return fake


def test_the_script_says_all_that_slurm_is_asked(tmp_path, fake):
    options = {
        **{"partition": "gpu", "account": "vision", "qos": "long", "time": "4:00:00", "gres": "gpu:2"},
        **{"constraint": "a100|h100", "cpus_per_task": 8, "mem": "16G", "exclude": ["node3", "node4"]},
        **{"sbatch": {"mail_type": "END", "exclusive": True, "nice": False}, "setup": ["module load cuda", "cd ."]},
        **{"runs_per_job": 2, "jobs_per_gpu": 3},
    }
    launch = launch_in_slurm(tmp_path / "my sweep", ["a", "b", "c"], **options)
    assert (launch / "slurm" / "job.sh").read_text().splitlines() == [
        "#!/bin/bash",
        '#SBATCH "--job-name=my sweep"',
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks=1",
        f"#SBATCH --chdir={Path.cwd()}",
        f'#SBATCH "--output={launch}/slurm/%A_%a.log"',
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR2@90",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=vision",
        "#SBATCH --qos=long",
        "#SBATCH --time=4:00:00",
        "#SBATCH --gres=gpu:2",
        '#SBATCH "--constraint=a100|h100"',
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=16G",
        "#SBATCH --exclude=node3,node4",
        "#SBATCH --mail-type=END --exclusive",
        "",
        "module load cuda",
        "cd .",
        "",
        "# exec: Slurm warns this process alone (B:).",
        f"exec {sys.executable} -u -m domainbed_ext.launchers.slurm_task '{launch}' \"$(($1 + SLURM_ARRAY_TASK_ID))\"",
    ]
    content = json.loads((launch / "slurm" / "jobs.json").read_text())
    assert [[command["text"] for command in job] for job in content["jobs"]] == [["a", "b"], ["c"]]
    assert content["slots"] == 0 and content["local"]["jobs_per_gpu"] == 3
    assert fake.asked("sbatch") == [["--parsable", "--array=0-1", str(launch / "slurm" / "job.sh"), "0"]]
    assert read_launch(launch)["detached"] and read_launch(launch)["engine"] == {"slurm": ["100"]}


def test_more_runs_than_an_array_takes_are_several_arrays(tmp_path, fake):
    launch = launch_in_slurm(tmp_path, ["true"] * 2500)
    assert [(words[1], words[-1]) for words in fake.asked("sbatch")] == [
        ("--array=0-833", "0"),
        ("--array=0-832", "834"),
        ("--array=0-832", "1667"),
    ]
    assert read_launch(launch)["engine"] == {"slurm": ["100", "101", "102"]}


def test_a_shorter_limit_of_the_scheduler_counts_too(tmp_path, fake):
    fake.says("config", CONFIG.replace("(null)", "bf_window=5,max_array_tasks=100"))
    launch_in_slurm(tmp_path, ["true"] * 150)
    assert [words[1] for words in fake.asked("sbatch")] == ["--array=0-74"] * 2


def test_runs_at_once_count_over_arrays_and_within_jobs(tmp_path, fake):
    launch = launch_in_slurm(tmp_path, ["true"] * 4000, parallel=7, runs_per_job=2)
    assert [words[1] for words in fake.asked("sbatch")] == ["--array=0-999%2", "--array=0-999%1"]
    assert json.loads((launch / "slurm" / "jobs.json").read_text())["most"] == 7
    fake.says("config", CONFIG.replace("1001", "10"))
    launch_in_slurm(tmp_path, ["true"] * 30, parallel=2)
    assert [words[1:-2] for words in fake.asked("sbatch")[2:]] == [
        ["--array=0-9%1"],
        ["--array=0-9%1"],
        ["--array=0-9%1", "--dependency=afterany:102"],
    ]


@given(st.integers(1, 5000), st.integers(1, 1500), st.integers(0, 50))
def test_arrays_hold_each_job_once_and_keep_to_both_limits(jobs, longest, at_once):
    arrays = list(split_into_arrays(jobs, longest, at_once))
    assert [number for array in arrays for number in range(array.first, array.first + array.size)] == list(range(jobs))
    assert all(0 < array.size <= longest for array in arrays)
    assert max(array.size for array in arrays) - min(array.size for array in arrays) <= 1
    if at_once:  # at any time, of those that wait for each other one runs
        lanes = {}
        for index, array in enumerate(arrays):
            assert array.at_once > 0
            lanes[index] = lanes.pop(array.after) if array.after is not None else []
            lanes[index] = [*lanes[index], array.at_once]
        assert sum(map(max, lanes.values())) <= at_once


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"partion": "gpu"}, "unknown option of launcher slurm: 'partion': did you mean 'partition'?"),
        ({"time": 14400}, "option time of launcher slurm is 14400: give it in quotes, as '4:00:00'"),
        ({"cpus_per_task": "many"}, "option cpus_per_task of launcher slurm is 'many': give a whole number"),
        ({"runs_per_job": 0}, "option runs_per_job of launcher slurm is 0: give a number above 0"),
        ({"mem": {"cpu": "4G"}}, "option mem of launcher slurm is {'cpu': '4G'}: give a text"),
        ({"sbatch": {"array": "0-3"}}, "option sbatch of launcher slurm has --array=0-3, which the launcher sets"),
        ({"sbatch": "--comment='mine"}, "option sbatch of launcher slurm is .* .No closing quotation.: fix its quotes"),
    ],
)
def test_a_wrong_option_is_one_sentence(options, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        get_launcher("slurm").read_options(options)


def test_other_options_come_as_slurm_takes_them():
    words = ["--mail-type=END", "--comment=a b"]
    for given_words in ({"mail-type": "END", "comment": "a b"}, words, shlex.join(words)):
        assert shlex.split(get_launcher("slurm").read_options({"sbatch": given_words, "qos": None}).sbatch) == words


def test_without_slurm_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchmarkError, match="there is no scontrol here: launch where Slurm's commands are"):
        launch_in_slurm(tmp_path, ["true"])
    assert list_under_way(tmp_path) == []


def test_what_slurm_refuses_is_quoted_and_nothing_stays_in_it(tmp_path, fake):
    fake.refuses("sbatch", 1, "sbatch: error: too many jobs\nsbatch: error: Batch job submission failed: Too many\n")
    quoted = "sbatch refuses the jobs .too many jobs; Batch job submission failed: Too many.: fix --launcher_options"
    with pytest.raises(BenchmarkError, match=quoted):
        launch_in_slurm(tmp_path, ["true"] * 2500)
    assert fake.asked("scancel") == [["--quiet", "100"]]
    assert list_under_way(tmp_path) == []


UNREACHABLE = "Unable to contact slurm controller (connect failure)"


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("scontrol", f"slurm_load_ctl_conf error: {UNREACHABLE}"),
        ("sbatch", f"sbatch: error: Batch job submission failed: {UNREACHABLE}"),
        ("sbatch", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"),
    ],
)
def test_a_controller_that_is_down_is_not_blamed_on_the_options(tmp_path, fake, command, error):
    fake.refuses(command, 0, f"{error}\n")
    with pytest.raises(BenchmarkError, match=f"controller does not answer .{command}: .*scontrol ping") as caught:
        launch_in_slurm(tmp_path, ["true"])
    assert "launcher_options" not in str(caught.value)
    assert list_under_way(tmp_path) == []


def test_what_other_commands_refuse_is_not_blamed_on_the_options(tmp_path, fake):
    launch = launch_in_slurm(tmp_path, ["true"])
    fake.refuses("scancel", 0, "scancel: error: Kill job error on job id 100: Access/permission denied\n")
    with pytest.raises(BenchmarkError, match="scancel fails .*permission denied.: .*administrator") as caught:
        cancel(launch)
    assert "launcher_options" not in str(caught.value)


def test_cancelling_names_the_arrays_and_the_queue_says_whether_any_is_left(tmp_path, fake):
    launch = launch_in_slurm(tmp_path, ["true"] * 1500)
    fake.says("queue", "99\n101\n101\n")
    assert is_waiting(launch)
    cancel(launch)
    assert fake.asked("scancel") == [["--quiet", "100", "101"]]
    fake.says("queue", "99\n")
    assert not is_waiting(launch)
    cancel(tmp_path)  # which is no launch
    assert len(fake.asked("scancel")) == 1


# What a job does: its script, started as Slurm starts it.


class Job:
    """A job of a launch, in one of its starts."""

    def __init__(self, launch, starts_before=0):
        told = {"SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": "0", "SLURM_CPUS_ON_NODE": "1"}
        restarts = {"SLURM_RESTART_COUNT": str(starts_before)} if starts_before else {}
        self.process = subprocess.Popen(
            ["bash", str(launch / "slurm" / "job.sh"), "0"],
            env={**os.environ, **told, **restarts},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def told(self, number):
        """Sends it a signal; returns what it printed."""
        self.process.send_signal(number)
        return self.end()

    def end(self):
        return self.process.communicate(timeout=300)[0]


def has_begun(folder):
    return lambda: folder.state is State.RUNNING and any(folder.path.glob("checkpoint_*"))


@pytest.mark.slow
def test_a_job_works_on_its_runs_and_says_how_each_ended(tmp_path, fake):
    killed, short, elsewhere = (RunFolder(tmp_path / name) for name in ("killed", "short", "elsewhere"))
    commands = [train_command(killed.path, LONG), *(train_command(run.path, BRIEF) for run in (short, elsewhere))]
    launch = launch_in_slurm(tmp_path, [*commands, write_command(tmp_path / "file"), "exit 3"], runs_per_job=5)
    with elsewhere.claim():  # by this very process
        job = Job(launch)
        wait_for(has_begun(killed), "it does not begin")
        os.kill(read_latest(killed.path).owner["pid"], signal.SIGKILL)
        lines = job.end().splitlines()
    assert lines[:3] == ["elsewhere: another process works on it", "killed: exit code -9", "short: exit code 0"]
    assert lines[3].endswith(": exit code 0") and lines[4] == "exit 3: exit code 3" and len(lines) == 5
    assert job.process.returncode == ExitCode.FAILED
    assert killed.state is State.FAILED and killed.failure() == "the run was killed by signal 9, and left no message"
    assert short.state is State.DONE and (tmp_path / "file").exists()
    assert not (elsewhere.path / "results.jsonl").exists()


@pytest.mark.slow
def test_warned_that_its_time_is_up_a_job_comes_again(tmp_path, fake):
    folder = RunFolder(tmp_path / "run")
    launch = launch_in_slurm(tmp_path, [train_command(folder.path, LONG)])
    job, note = Job(launch), launch / "requeued" / "run"
    wait_for(has_begun(folder), "it does not begin")
    fake.says("job", "JobState=COMPLETING Restarts=1")
    assert "1 runs stopped, and resume when this job is started again" in job.told(signal.SIGUSR2)
    assert job.process.returncode == ExitCode.INTERRUPTED and folder.state is State.INTERRUPTED
    assert ["requeue", "100_0"] in fake.asked("scontrol") and note.exists()

    job = Job(launch, starts_before=1)
    wait_for(lambda: not note.exists(), "the note stays")
    assert folder.state is State.RUNNING
    assert "resume when they are launched again" in job.told(signal.SIGTERM)  # as scancel does
    assert folder.state is State.INTERRUPTED and not note.exists()
    assert fake.asked("scontrol").count(["requeue", "100_0"]) == 1


def test_jobs_of_version_0_1_0_whose_commands_are_text_are_read(tmp_path, fake, monkeypatch):
    words = f"{BRIEF} --threads 2 --time_limit 5"
    run, plain = train_command(tmp_path / "a", words, threads=2, minutes=5), train_command(tmp_path / "b", BRIEF)
    launch = launch_in_slurm(tmp_path, [run, plain, "true"])
    jobs = launch / "slurm" / "jobs.json"
    content = json.loads(jobs.read_text())
    jobs.write_text(json.dumps({**content, "jobs": [[pack[0]["text"]] for pack in content["jobs"]]}))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "100")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert [vars(slurm_task.Task(launch, i, set).commands[0]) for i in range(3)] == [
        pack[0] for pack in content["jobs"]
    ]


def test_a_job_of_a_cancelled_launch_does_nothing(tmp_path, fake):
    launch = launch_in_slurm(tmp_path, [train_command(tmp_path / "run", LONG)])
    (launch / "cancel").touch()
    job = Job(launch)
    assert "0 runs stopped" in job.end() and job.process.returncode == ExitCode.INTERRUPTED
    assert not (tmp_path / "run").exists()


# A real Slurm.


@pytest.fixture(scope="session")
def real_slurm(tmp_path_factory):
    """One that keeps no accounts, and an sacct that tells if it is asked all the same."""
    if not is_possible():
        pytest.skip("needs root, and Debian's slurmctld, slurmd, slurm-client and munge")
    folder = tmp_path_factory.mktemp("bin")
    (folder / "sacct").write_text(f"#!/bin/sh\ntouch {folder}/asked\nexit 1\n")
    (folder / "sacct").chmod(0o755)
    with OneNodeSlurm() as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(running.configuration))
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        yield
        assert not (folder / "asked").exists()


def ask(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def processes(job):
    """Of a job, on this node."""
    listed = subprocess.run(["scontrol", "listpids", job], capture_output=True, text=True, check=False).stdout
    return [int(line.split()[0]) for line in listed.splitlines()[1:] if line.split()[0] != "-1"]


@pytest.fixture
def launched(tmp_path):
    """Launches that are cancelled in the end."""
    paths = []

    def launch(commands, **options):
        paths.append(launch_in_slurm(tmp_path / "a sweep", commands, **options))
        return paths[-1]

    yield launch
    for path in paths:
        cancel(path)
        wait_for(lambda path=path: not is_waiting(path), "its jobs do not end")


@pytest.mark.slurm
def test_arrays_no_longer_than_slurm_takes_do_all_there_is_to_do(tmp_path, real_slurm, launched):
    files, jobs = [tmp_path / str(i) for i in range(2 * LONGEST_ARRAY + 1)], LONGEST_ARRAY + 1
    launch = launched([write_command(file) for file in files], runs_per_job=2, setup="echo set up")
    wait_for(lambda: not is_waiting(launch), "it does not end")
    assert all(file.exists() for file in files), log(launch)
    assert len(read_launch(launch)["engine"]["slurm"]) == 2
    assert log(launch).count("set up") == jobs and log(launch).count(": exit code 0") == len(files)


@pytest.mark.slurm
def test_a_sweep_has_the_results_that_it_has_anywhere(tmp_path, real_slurm):
    words = f"launch --datasets DigitsShift --algorithms LP BOnly --n_hparams 1 --n_trials 1 {BRIEF}".split()
    words += ["--protocol", "single_source", "--source_envs", "plain"]
    assert sweep.main([*words, "--output_dir", str(tmp_path / "local")]) == 0
    options = json.dumps({"runs_per_job": 2, "time": "0:10:00"})
    words += ["--output_dir", str(tmp_path / "slurm"), "--command_launcher", "slurm", "--launcher_options", options]
    assert sweep.main(words) == 0
    [launch] = list_under_way(tmp_path / "slurm")
    wait_for(lambda: not is_waiting(launch), "it does not end")
    runs = sorted(read_launch(launch)["runs"])
    assert len(runs) == 2, log(launch)
    assert [outcome(tmp_path / "slurm" / run) for run in runs] == [outcome(tmp_path / "local" / run) for run in runs]


@pytest.mark.slurm
def test_warned_and_killed_a_run_ends_as_if_nothing_had_happened(tmp_path, real_slurm, launched):
    words = f"{SHORT} --steps 80 --checkpoint_freq 40"
    undisturbed = Run(tmp_path / "undisturbed", *shlex.split(words))
    folder = RunFolder(tmp_path / "a sweep" / "run")
    launch = launched([train_command(folder.path, words)])
    note, job = launch / "requeued" / "run", read_launch(launch)["engine"]["slurm"][0]
    wait_for(has_begun(folder), "it does not begin")
    ask("scancel", "--batch", "--signal=USR2", f"{job}_0")
    wait_for(note.exists, "it is not noted")
    wait_for(lambda: not note.exists() and has_begun(folder)(), "it does not come again")
    for pid in [*processes(job), read_latest(folder.path).owner["pid"]]:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_waiting(launch), "Slurm does not notice")
    wait_for(lambda: folder.state is State.INTERRUPTED, "it does not die")
    ask("scontrol", "requeue", f"{job}_0")
    wait_for(lambda: folder.state is State.DONE, "it does not go on")
    assert re.search(
        "resumes after .*attempt 2.*resumes after .*attempt 3", (folder.path / "out.txt").read_text(), re.S
    )
    assert undisturbed.end() == 0
    assert outcome(folder.path)[:2] == outcome(tmp_path / "undisturbed")[:2]


@pytest.mark.slurm
def test_a_run_comes_again_when_its_time_is_up_or_it_makes_room_and_not_when_it_is_cancelled(
    tmp_path, real_slurm, launched
):
    folder = RunFolder(tmp_path / "a sweep" / "run")
    launch = launched([train_command(folder.path, LONG)], time="1:00:00", cpus_per_task=2)
    note, job = launch / "requeued" / "run", f"JobId={read_launch(launch)['engine']['slurm'][0]}_0"
    wait_for(has_begun(folder), "it does not begin")
    ask("scontrol", "update", job, "TimeLimit=0:02:00")
    wait_for(note.exists, "Slurm does not warn it")
    assert folder.state is State.INTERRUPTED

    ask("scontrol", "update", job, "TimeLimit=1:00:00")
    wait_for(lambda: not note.exists(), "it does not come again")
    assert folder.state is State.RUNNING
    ask("sbatch", "--partition=urgent", "--cpus-per-task=2", f"--output={tmp_path / 'urgent.log'}", "--wrap=true")
    wait_for(note.exists, "it does not make room")
    assert folder.state is State.INTERRUPTED

    wait_for(lambda: not note.exists(), "it does not come again")
    cancel(launch)
    wait_for(lambda: not is_waiting(launch), "it does not end")
    assert folder.state is State.INTERRUPTED and not note.exists()
    assert read_latest(folder.path).number == 3 and read_latest(folder.path).ended == "interrupted", log(launch)


@pytest.mark.slurm
def test_a_real_controller_that_is_down_is_not_blamed_on_the_options(tmp_path, real_slurm, monkeypatch):
    configuration = tmp_path / "slurm.conf"
    text = Path(os.environ["SLURM_CONF"]).read_text()
    configuration.write_text(re.sub(r"(?m)^SlurmctldPort=.*", "SlurmctldPort=1\nMessageTimeout=1", text))
    monkeypatch.setenv("SLURM_CONF", str(configuration))
    with pytest.raises(BenchmarkError, match="controller does not answer .scontrol: "):
        launch_in_slurm(tmp_path, ["true"])
    with pytest.raises(BenchmarkError, match="controller does not answer .sbatch: "):
        slurm._ask("sbatch", "--wrap=true")


@pytest.mark.slurm
def test_what_a_real_slurm_refuses_is_quoted(tmp_path, real_slurm):
    with pytest.raises(
        BenchmarkError,
        match="sbatch refuses the jobs .invalid partition specified: nowhere; .*: fix --launcher_options",
    ):
        launch_in_slurm(tmp_path, ["true"], partition="nowhere")
    assert list_under_way(tmp_path) == []
