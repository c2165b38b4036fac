import json
import os
from pathlib import Path

import pytest

from domainbed_ext import launchers
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers.launch import Launch, begin, list_under_way, read_launch
from domainbed_ext.launchers.local import Local
from domainbed_ext.runs.folder import State
from domainbed_ext.sweep import command as sweep
from domainbed_ext.sweep import launch, launch_progress, outcome
from domainbed_ext.sweep.launch_progress import LaunchProgress
from domainbed_ext.system import progress
from domainbed_ext.system.exit_codes import ExitCode
from tests.domainbed_ext import run_states as standing
from tests.domainbed_ext.run_states import done, failed, found, interrupted, make_jobs, running, words

CODES = {State.DONE: ExitCode.DONE, State.FAILED: ExitCode.FAILED, State.INTERRUPTED: ExitCode.INTERRUPTED}


class Engine(Local):
    """A launcher that does to each run what it was told to, and notes what it was given."""

    def __init__(self):
        super().__init__("local")
        self.calls, self.acts = [], {}

    def run(self, commands, launch):
        self.calls.append(launch)
        self.commands = list(commands)
        codes = []
        for index, name in enumerate(launch.runs):
            job = self.jobs[name]
            code = self.acts.get(name, done)(job)
            codes.append(CODES.get(job.folder.state, ExitCode.FAILED) if code is None else code)
            launch.progress(index, 1.0)
        return [None if code == "waits" else code for code in codes]

    def given(self):
        return [self.jobs[name] for name in self.calls[-1].runs]


@pytest.fixture
def engine(monkeypatch):
    """Stands for the launcher "local"; nothing is checked before, and no table made after."""
    engine = Engine()
    monkeypatch.setitem(launchers.LAUNCHERS, "local", engine)
    monkeypatch.setattr(launch, "check_runs", lambda jobs: {})
    monkeypatch.setattr(launch, "fill_cache", lambda *_: None)
    monkeypatch.setattr("domainbed_ext.collect_results.collect", lambda folder, **_: engine.collected.append(folder))
    launch_jobs = launch.launch_jobs

    def note_and_launch(jobs, *rest):
        engine.jobs = {job.name: job for job in jobs}
        return launch_jobs(jobs, *rest)

    monkeypatch.setattr(launch, "launch_jobs", note_and_launch)
    engine.collected = []
    return engine


def test_launch_takes_what_is_not_done(tmp_path, engine, capsys):
    jobs = make_jobs(tmp_path, algorithms=["LP", "BA"])
    for make, job in zip((done, running, failed, interrupted), jobs, strict=False):
        make(job)
    assert sweep.main(words(tmp_path, algorithms=["LP", "BA"])) == 0
    assert [str(job) for job in engine.given()] == [str(job) for job in jobs[2:]]
    assert found(jobs) == [State.DONE, State.RUNNING, *[State.DONE] * 6]
    said = capsys.readouterr()
    assert "8 runs in" in said.out and "4 not launched, 1 running, 1 interrupted, 1 failed, 1 done" in said.out
    assert said.err == ""  # a pipe gets no progress bar
    assert engine.collected == [str(tmp_path / "sweep")]
    links = {os.readlink(path) for path in (tmp_path / "sweep" / "by_name").iterdir()}
    assert links == {f"../{job.name}" for job in jobs}


def test_a_launcher_is_told_all_that_concerns_it(tmp_path, engine):
    options = ["--launcher_options", '{"partition": "gpu"}', "--jobs_per_gpu", "2", "--jobs", "3"]
    with pytest.raises(BenchmarkError, match="unknown option of launcher local: 'partition'"):
        sweep.main(words(tmp_path, *options))
    options[1] = '{"memory_gb": 4}'
    assert sweep.main(words(tmp_path, *options)) == 0
    launch = engine.calls[0]
    assert (launch.parallel, launch.options) == (3, {"memory_gb": 4, "jobs_per_gpu": 2})
    assert launch.path.parent == tmp_path / "sweep" / "launches"
    assert engine.commands == [job.command for job in engine.given()]


def test_a_launch_is_under_way_while_it_lasts(tmp_path, engine):
    jobs, seen = make_jobs(tmp_path), []

    def look_and_finish(job):
        seen.append(found(jobs))
        launch = read_launch(engine.calls[0].path)
        assert launch["launcher"] == "local" and launch["command"].startswith("python -m domainbed_ext.sweep launch --")
        done(job)

    engine.acts = dict.fromkeys([job.name for job in jobs], look_and_finish)
    assert sweep.main(words(tmp_path)) == 0
    assert seen == [[State.DONE] * number + [State.QUEUED] * (4 - number) for number in range(4)]
    assert list_under_way(tmp_path / "sweep") == []


def test_retry_takes_what_failed_or_was_interrupted(tmp_path, engine, capsys):
    jobs = make_jobs(tmp_path)
    for make, job in zip((done, failed, interrupted), jobs, strict=False):
        make(job)
    assert sweep.main(words(tmp_path, command="retry")) == 0
    assert [str(job) for job in engine.given()] == [str(job) for job in jobs[1:3]]
    assert found(jobs)[3] is State.NOT_LAUNCHED
    assert "`launch`" not in capsys.readouterr().out
    assert sweep.main(words(tmp_path, command="retry")) == 0
    assert len(engine.calls) == 1 and "`launch` runs what is not launched" in capsys.readouterr().out


def test_runs_that_wait_in_an_engine_are_left_to_it(tmp_path, engine, capsys):
    jobs = make_jobs(tmp_path)
    with begin(tmp_path / "sweep", "slurm", "", Launch(Path(), [job.name for job in jobs[:3]])) as launch:
        launch.detach(slurm=["7"])
    assert sweep.main(words(tmp_path)) == 0
    assert [job.name for job in engine.given()] == [jobs[3].name]
    assert "3 queued" in capsys.readouterr().out


def test_runs_that_wait_in_another_launcher_are_shared_with_it(tmp_path, engine):
    jobs = make_jobs(tmp_path)
    with begin(tmp_path / "sweep", "local", "", Launch(Path(), [job.name for job in jobs])):
        assert sweep.main(words(tmp_path)) == 0
    assert len(engine.given()) == 4


def test_a_run_that_another_process_is_at_is_left_alone(tmp_path, engine, capsys):
    jobs = make_jobs(tmp_path)
    with standing.claimed_by_another_process(jobs[0]):
        assert found(jobs)[0] is State.RUNNING
        engine.acts[jobs[1].name] = lambda job: (running(job), ExitCode.TAKEN)[1]
        assert sweep.main(words(tmp_path)) == 0
        assert [job.name for job in engine.given()] == [job.name for job in jobs[1:]]
        assert "1 run done or running in another launch" in capsys.readouterr().out
    assert found(jobs)[0] is State.INTERRUPTED


def test_runs_that_wait_are_said_to(tmp_path, engine, capsys):
    jobs = make_jobs(tmp_path)

    def wait(job):
        engine.calls[0].detach(slurm=["1"])
        return "waits"

    engine.acts = {job.name: wait for job in jobs}
    assert sweep.main(words(tmp_path)) == 0
    name = engine.calls[0].path.name
    assert f"4 runs queued in local (launch {name}): " in capsys.readouterr().out
    assert found(jobs) == [State.QUEUED] * 4
    assert engine.collected == []  # there is nothing yet


def test_a_failed_run_is_named_with_its_reason(tmp_path, engine, capsys):
    jobs = make_jobs(tmp_path)
    engine.acts[jobs[2].name] = lambda job: failed(job, "the disk is full")
    assert sweep.main(words(tmp_path)) == 1
    said = capsys.readouterr().err
    assert f"failed: {jobs[2]}: the disk is full (log: {jobs[2].folder.path / 'err.txt'})" in said
    assert "1 of 4 runs failed" in said
    assert engine.collected  # the others have their tables


def killed(job):
    standing.attempt(job)
    standing.age(job)
    return -9


def killed_at_once(job):
    return -9


def broken(job):
    return 1


def broken_when_it_should_go_on(job):
    assert job.folder.state is State.INTERRUPTED
    return 1


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        (killed, "the run was killed by signal 9, and left no message"),
        (killed_at_once, "the run was killed by signal 9, and left no message"),
        (broken, "the run ended with exit code 1, and left no message"),
        (broken_when_it_should_go_on, "the run ended with exit code 1, and left no message"),
    ],
)
def test_a_run_that_died_without_a_word_is_failed(tmp_path, engine, end, sentence):
    job = make_jobs(tmp_path)[0]
    if end is broken_when_it_should_go_on:
        interrupted(job)
    engine.jobs, engine.acts = {job.name: job}, {job.name: end}
    ended = outcome.launch_jobs([job], "local", "")
    assert ended.failed == [(job, sentence)]
    assert job.folder.state is State.FAILED and job.folder.failure() == sentence


def test_an_old_reason_is_not_told_of_a_run_that_died_since(tmp_path, engine):
    job = make_jobs(tmp_path)[0]
    failed(job, "an old reason")
    engine.jobs, engine.acts = {job.name: job}, {job.name: lambda job: -11}
    ended = outcome.launch_jobs([job], "local", "")
    assert ended.failed == [(job, "the run was killed by signal 11, and left no message")]


@pytest.mark.parametrize("code", [ExitCode.INTERRUPTED, -15])
def test_an_interrupted_run_has_not_failed(tmp_path, engine, capsys, code):
    job = make_jobs(tmp_path)[0]
    engine.acts[job.name] = lambda job: (interrupted(job), code)[1]
    assert sweep.main(words(tmp_path)) == ExitCode.INTERRUPTED
    assert "1 run interrupted: run the same command again to resume" in capsys.readouterr().err
    assert job.folder.state is State.INTERRUPTED


@pytest.mark.parametrize(("cancelled", "how", "code"), [(False, "interrupted", 130), (True, "cancelled", 75)])
def test_a_launch_that_is_stopped_says_how_to_go_on(tmp_path, engine, capsys, cancelled, how, code):
    jobs = make_jobs(tmp_path)

    def stop(job):
        interrupted(job)
        if cancelled:
            assert sweep.main(words(tmp_path, command="cancel")) == 0
            assert engine.calls[0].cancelled
        raise KeyboardInterrupt

    engine.acts[jobs[1].name] = stop
    assert sweep.main(words(tmp_path)) == code
    said = capsys.readouterr()
    sentence = "2 not launched, 1 interrupted, 1 done; run the same command again to resume"
    assert said.err == f"{how}: {sentence}\n"
    assert engine.collected == [] and list_under_way(tmp_path / "sweep") == []
    engine.acts = {}
    assert sweep.main(words(tmp_path)) == 0
    assert found(jobs) == [State.DONE] * 4


def test_tables_that_cannot_be_made_hide_no_failure(tmp_path, engine, capsys, monkeypatch):
    def collect(folder, unreadable, reference):
        raise BenchmarkError("no run can be read")

    monkeypatch.setattr("domainbed_ext.collect_results.collect", collect)
    assert sweep.main(words(tmp_path)) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err == "error: no run can be read\n"
    engine.acts = {job.name: failed for job in make_jobs(tmp_path, "--n_trials", "2")}
    assert sweep.main(words(tmp_path, "--n_trials", "2")) == ExitCode.FAILED


def test_a_run_that_the_tables_leave_out_is_a_failure(tmp_path, engine, monkeypatch):
    leave_out = lambda folder, unreadable, reference: unreadable.append("run x cannot be read")  # noqa: E731
    monkeypatch.setattr("domainbed_ext.collect_results.collect", leave_out)
    assert sweep.main(words(tmp_path)) == ExitCode.FAILED


def test_provenance_is_of_all_launches(tmp_path, engine):
    jobs = make_jobs(tmp_path)
    for _ in range(2):
        sweep.main(words(tmp_path))
        (jobs[0].folder.path / "done").unlink()
    told = json.loads((tmp_path / "sweep" / "tables" / "provenance.json").read_text())
    assert [launch["command"].split()[:4] for launch in told] == [["python", "-m", "domainbed_ext.sweep", "launch"]] * 2


@pytest.mark.usefixtures("warm_workers")
def test_a_sweep_runs_ends_in_tables_and_goes_on_with_what_is_missing(tmp_path, capsys):
    argv = words(tmp_path, "--jobs", "1")
    assert sweep.main(argv) == 0
    out = capsys.readouterr().out
    jobs = make_jobs(tmp_path)
    assert found(jobs) == [State.DONE] * 4
    assert "training-domain validation set" in out and "plot.png" in out
    assert (tmp_path / "sweep" / "tables" / "results.tex").exists()

    times = {job.folder.path: (job.folder.path / "done").stat().st_mtime_ns for job in jobs}
    (jobs[3].folder.path / "done").unlink()
    assert sweep.main([*argv, "--data_dir", str(tmp_path / "moved")]) == 0
    again = {job.folder.path: (job.folder.path / "done").stat().st_mtime_ns for job in jobs}
    assert [path for path in times if times[path] != again[path]] == [jobs[3].folder.path]
    assert "3 done" in capsys.readouterr().out


def test_moved_data_run_nothing_again(tmp_path, engine, capsys):
    for job in make_jobs(tmp_path, "--data_dir", "here"):
        done(job)
    assert sweep.main(words(tmp_path, "--data_dir", "there", "--workers", "2")) == 0
    assert engine.calls == [] and "4 runs in" in capsys.readouterr().out


def test_a_file_in_a_runs_place_fails_that_run_alone(tmp_path, engine, capsys):
    jobs = make_jobs(tmp_path)
    jobs[1].folder.path.parent.mkdir()
    jobs[1].folder.path.write_text("a file where the run's folder should be")
    engine.acts[jobs[1].name] = lambda job: ExitCode.BAD_INPUT
    assert sweep.main(words(tmp_path)) == 1
    assert "the run ended with exit code 2, and left no message" in capsys.readouterr().err


def test_a_line_for_each_run_that_ended_says_which_and_how(tmp_path, engine, capsys):
    jobs = make_jobs(tmp_path)

    def tested(job):
        accuracies = {f"env{env}_{split}_acc": 0.5 + 0.1 * env for env in range(4) for split in ("in", "out")}
        record = {"args": job.train_args, "step": 7, "environments": ["A", "C", "P", "S"], **accuracies}
        done(job)
        job.folder.append(record)

    engine.acts = {
        **{jobs[0].name: tested, jobs[1].name: lambda job: failed(job, "the disk is full")},
        **{jobs[2].name: killed_at_once, jobs[3].name: done},
    }
    assert sweep.main(words(tmp_path)) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if " of 4 runs: " in line]
    log = jobs[1].folder.path / "err.txt"
    assert lines[0] == f"1 of 4 runs: {jobs[0]}: done in 10 s, tested on A: 50.0 % at step 7"
    assert lines[1] == f"2 of 4 runs: {jobs[1]}: failed: the disk is full (log: {log})"
    assert lines[2] == f"3 of 4 runs: {jobs[2]}: not launched"
    assert lines[3].startswith(f"4 of 4 runs: {jobs[3]}: done in 10 s, but its records cannot be read (")


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def __call__(self):
        return self.now


def test_the_time_left_of_a_launch_is_sane_from_its_first_run_on(tmp_path, monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(launch_progress.time, "monotonic", clock)
    jobs = make_jobs(tmp_path, "--n_trials", "2")
    shown = progress.Bar(None, "sweep", len(jobs), "runs")
    told = LaunchProgress(jobs, [], shown)
    with begin(tmp_path / "sweep", "local", "", Launch(Path(), [job.name for job in jobs])):
        running(jobs[0], 0.01, 20.0)
        running(jobs[1], 0.01, 20.0)
        told(0, 0.01)
        assert shown.seconds_left is None  # rather than a hundredth of a run's 2,000 seconds
        running(jobs[0], 0.1, 30.0, left=30.0)  # the run itself knows
        told(0, 0.1)
        assert shown.seconds_left is None  # looked at again only after a while
        clock.now += 10
        told(0, 0.2)
        assert shown.seconds_left == pytest.approx((30.0 + 0.99 * 60 + 6 * 60) / 2)
        done(jobs[0], 60.0)  # one of the two that run has ended, and nothing has taken its place yet
        clock.now += 10
        told(0, 1.0)
        assert shown.seconds_left == pytest.approx((0.99 * 60 + 6 * 60) / 2)
    assert shown.done == 1.0
    assert capsys.readouterr().out.endswith("; 3 min left\n")


def test_a_launch_has_no_rate_before_it_has_a_time_left(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(launch_progress.time, "monotonic", clock)
    jobs = make_jobs(tmp_path)
    shown = progress.Bar(None, "sweep", len(jobs), "runs")
    shown.pace = progress.Pace(clock)
    told = LaunchProgress(jobs, [], shown)
    with begin(tmp_path / "sweep", "local", "", Launch(Path(), [job.name for job in jobs])):
        running(jobs[0], 0.001, 9.0)
        clock.now += 9
        told(0, 0.001)  # one step of a thousand after setting up and evaluating
        clock.now += 4
        told(0, 0.002)
        assert shown.pace.rate is None  # rather than "1 h 48 min each"
        running(jobs[0], 0.1, 15.0, left=45.0)
        clock.now += 4
        told(0, 0.1)
        clock.now += 6
        told(0, 0.2)
        assert shown.done == 0.2
        assert shown.pace.rate == pytest.approx((0.2 - 0.002) / 10)


def test_kinds_of_runs_that_have_not_begun_are_guessed(tmp_path):
    jobs = make_jobs(tmp_path, algorithms=["LP", "BA"])
    shown = progress.Bar(None, "sweep", len(jobs), "runs")
    with begin(tmp_path / "sweep", "local", "", Launch(Path(), [job.name for job in jobs])):
        done(jobs[0], 60.0)
        running(jobs[1], 0.5, 30.0, left=30.0)
        LaunchProgress(jobs, [], shown)(1, 0.5)
    assert shown.seconds_left == pytest.approx(30 + 6 * 60)


def test_what_runs_took_before_tells_of_a_launch_that_resumes(tmp_path):
    jobs = make_jobs(tmp_path)
    for job in jobs[:2]:
        done(job, 100.0)
    shown = progress.Bar(None, "sweep", 2, "runs")
    with begin(tmp_path / "sweep", "local", "", Launch(Path(), [job.name for job in jobs[2:]])):
        running(jobs[2], 0.01, 1.0)
        LaunchProgress(jobs[2:], standing.look(jobs)[:2], shown)(0, 0.01)
    assert shown.seconds_left == pytest.approx(0.99 * 100 + 100)
