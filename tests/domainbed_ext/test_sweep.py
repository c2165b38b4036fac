import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from domainbed_ext import cleaning, launchers, launches, launching, resources, states, sweep
from domainbed_ext.errors import BenchmarkError, ExitCode
from domainbed_ext.launches import Launch
from domainbed_ext.records import State
from tests.domainbed_ext import standing
from tests.domainbed_ext.standing import done, failed, interrupted, make_jobs, running, words

CODES = {State.DONE: ExitCode.DONE, State.FAILED: ExitCode.FAILED, State.INTERRUPTED: ExitCode.INTERRUPTED}


class Engine:
    """A launcher that does to each run what it was told to, and notes what it was given."""

    def __init__(self):
        self.calls, self.acts = [], {}

    def __call__(self, commands, launch):
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
    monkeypatch.setattr(sweep, "check", lambda jobs: None)
    monkeypatch.setattr(sweep, "fill", lambda *_: None)
    monkeypatch.setattr("domainbed_ext.collect_results.collect", lambda folder, **_: engine.collected.append(folder))
    make = sweep.make_jobs

    def make_and_note(args):
        jobs = make(args)
        engine.jobs = {job.name: job for job in jobs}
        return jobs

    monkeypatch.setattr(sweep, "make_jobs", make_and_note)
    engine.collected = []
    return engine


def found(jobs):
    return [standing.state for standing in states.look(jobs, jobs[0].sweep_dir)]


# launch and retry


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
        launch = launches.said(engine.calls[0].path)
        assert launch["launcher"] == "local" and launch["command"].startswith("python -m domainbed_ext.sweep launch --")
        done(job)

    engine.acts = dict.fromkeys([job.name for job in jobs], look_and_finish)
    assert sweep.main(words(tmp_path)) == 0
    assert seen == [[State.DONE] * number + [State.QUEUED] * (4 - number) for number in range(4)]
    assert launches.under_way(tmp_path / "sweep") == []


def test_retry_takes_what_failed_or_was_interrupted(tmp_path, engine):
    jobs = make_jobs(tmp_path)
    for make, job in zip((done, failed, interrupted), jobs, strict=False):
        make(job)
    assert sweep.main(words(tmp_path, command="retry")) == 0
    assert [str(job) for job in engine.given()] == [str(job) for job in jobs[1:3]]
    assert found(jobs)[3] is State.NOT_LAUNCHED
    assert sweep.main(words(tmp_path, command="retry")) == 0
    assert len(engine.calls) == 1  # nothing is left to retry


def test_runs_that_wait_in_an_engine_are_left_to_it(tmp_path, engine, capsys):
    jobs = make_jobs(tmp_path)
    with launches.begin(tmp_path / "sweep", "slurm", "", Launch(Path(), [job.name for job in jobs[:3]])) as launch:
        launch.detach(slurm=["7"])
    assert sweep.main(words(tmp_path)) == 0
    assert [job.name for job in engine.given()] == [jobs[3].name]
    assert "3 queued" in capsys.readouterr().out


def test_runs_that_wait_in_another_launcher_are_shared_with_it(tmp_path, engine):
    jobs = make_jobs(tmp_path)
    with launches.begin(tmp_path / "sweep", "local", "", Launch(Path(), [job.name for job in jobs])):
        assert sweep.main(words(tmp_path)) == 0
    assert len(engine.given()) == 4


def test_a_run_that_another_process_is_at_is_left_alone(tmp_path, engine, capsys):
    jobs = make_jobs(tmp_path)
    with standing.claimed_by_another_process(jobs[0]):
        assert found(jobs)[0] is State.RUNNING
        engine.acts[jobs[1].name] = lambda job: (running(job), ExitCode.TAKEN)[1]
        assert sweep.main(words(tmp_path)) == 0
        assert [job.name for job in engine.given()] == [job.name for job in jobs[1:]]
        assert "1 run done or at work elsewhere" in capsys.readouterr().out
    assert found(jobs)[0] is State.INTERRUPTED


def test_runs_that_wait_are_said_to(tmp_path, engine, capsys):
    jobs = make_jobs(tmp_path)

    def wait(job):
        engine.calls[0].detach(slurm=["1"])
        return "waits"

    engine.acts = {job.name: wait for job in jobs}
    assert sweep.main(words(tmp_path)) == 0
    name = engine.calls[0].path.name
    assert f"4 runs waiting in local (launch {name}): `status` tells how far they are" in capsys.readouterr().out
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
        (killed, "the run was killed by signal 9 without a word"),
        (killed_at_once, "the run was killed by signal 9 without a word"),
        (broken, "the run ended with exit code 1 without a word"),
        (broken_when_it_should_go_on, "the run ended with exit code 1 without a word"),
    ],
)
def test_a_run_that_died_without_a_word_is_failed(tmp_path, engine, end, sentence):
    job = make_jobs(tmp_path)[0]
    if end is broken_when_it_should_go_on:
        interrupted(job)
    engine.jobs, engine.acts = {job.name: job}, {job.name: end}
    outcome = launching.launch([job], "local", "", Console(stderr=True))
    assert outcome.failed == [(job, sentence)]
    assert job.folder.state is State.FAILED and job.folder.failure() == sentence


def test_an_old_reason_is_not_told_of_a_run_that_died_since(tmp_path, engine):
    job = make_jobs(tmp_path)[0]
    failed(job, "an old reason")
    engine.jobs, engine.acts = {job.name: job}, {job.name: lambda job: -11}
    outcome = launching.launch([job], "local", "", Console(stderr=True))
    assert outcome.failed == [(job, "the run was killed by signal 11 without a word")]


@pytest.mark.parametrize("code", [ExitCode.INTERRUPTED, -15])
def test_an_interrupted_run_has_not_failed(tmp_path, engine, capsys, code):
    job = make_jobs(tmp_path)[0]
    engine.acts[job.name] = lambda job: (interrupted(job), code)[1]
    assert sweep.main(words(tmp_path)) == ExitCode.INTERRUPTED
    assert "1 run interrupted: the same command goes on" in capsys.readouterr().err
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
    sentence = "2 not launched, 1 interrupted, 1 done; the same command goes on with what is missing"
    assert said.err == f"{how}: {sentence}\n"
    assert engine.collected == [] and launches.under_way(tmp_path / "sweep") == []
    engine.acts = {}
    assert sweep.main(words(tmp_path)) == 0
    assert found(jobs) == [State.DONE] * 4


def test_tables_that_cannot_be_made_hide_no_failure(tmp_path, engine, capsys, monkeypatch):
    def collect(folder, unreadable):
        raise BenchmarkError("no run can be read")

    monkeypatch.setattr("domainbed_ext.collect_results.collect", collect)
    assert sweep.main(words(tmp_path)) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err == "error: no run can be read\n"
    engine.acts = {job.name: failed for job in make_jobs(tmp_path, "--n_trials", "2")}
    assert sweep.main(words(tmp_path, "--n_trials", "2")) == ExitCode.FAILED


def test_a_run_that_the_tables_leave_out_is_a_failure(tmp_path, engine, monkeypatch):
    leave_out = lambda folder, unreadable: unreadable.append("run x cannot be read")  # noqa: E731
    monkeypatch.setattr("domainbed_ext.collect_results.collect", leave_out)
    assert sweep.main(words(tmp_path)) == ExitCode.FAILED


def test_provenance_is_of_all_launches(tmp_path, engine):
    jobs = make_jobs(tmp_path)
    for _ in range(2):
        sweep.main(words(tmp_path))
        (jobs[0].folder.path / "done").unlink()
    told = json.loads((tmp_path / "sweep" / "tables" / "provenance.json").read_text())
    assert [launch["command"].split()[:4] for launch in told] == [["python", "-m", "domainbed_ext.sweep", "launch"]] * 2


@pytest.mark.slow
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
    assert "the run ended with exit code 2 without a word" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["launch", "retry", "status", "validate", "delete_incomplete", "cancel"])
def test_a_dry_run_leaves_no_trace(tmp_path, command, capsys):
    assert sweep.main(words(tmp_path, "--dry_run", command=command)) == 0
    assert list(tmp_path.iterdir()) == []
    job = make_jobs(tmp_path)[0]
    failed(job)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert sweep.main(words(tmp_path, "--dry_run", command=command)) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    printed = capsys.readouterr().out
    assert printed.count("-m domainbed_ext.train") == {"launch": 4, "retry": 1}.get(command, 0)


def test_the_launcher_dummy_leaves_no_trace_either(tmp_path, capsys):
    assert sweep.main(words(tmp_path, "--command_launcher", "dummy")) == 0
    assert capsys.readouterr().out.count("-m domainbed_ext.train") == 4
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_gets_a_progress_bar(tmp_path, engine):
    screen, jobs = io.StringIO(), make_jobs(tmp_path)
    engine.jobs = {job.name: job for job in jobs}
    launching.launch(jobs, "local", "", Console(file=screen, force_terminal=True, no_color=True, width=120))
    assert "4/4 runs, " in screen.getvalue() and "a minute" in screen.getvalue()


# delete_incomplete


def test_delete_incomplete_deletes_just_that(tmp_path, capsys):
    jobs = make_jobs(tmp_path, algorithms=["LP", "BA"])
    for make, job in zip((done, running, failed, interrupted), jobs, strict=False):
        make(job)
    with launches.begin(tmp_path / "sweep", "slurm", "", Launch(Path(), [jobs[4].name])) as launch:
        launch.detach()
    assert sweep.main(words(tmp_path, command="delete_incomplete", algorithms=["LP", "BA"])) == 0
    assert found(jobs) == [
        *(State.DONE, State.RUNNING, State.NOT_LAUNCHED, State.NOT_LAUNCHED, State.QUEUED),
        *[State.NOT_LAUNCHED] * 3,
    ]
    assert "Deleted 2 runs." in capsys.readouterr().out
    left = {path.name for path in (tmp_path / "sweep").iterdir()}
    assert left == {jobs[0].name, jobs[1].name, "launches"}


def test_what_waits_in_an_engine_is_deleted_only_when_that_is_cancelled(tmp_path):
    jobs = make_jobs(tmp_path)
    failed(jobs[0])
    with launches.begin(tmp_path / "sweep", "other", "", Launch(Path(), [jobs[0].name])) as launch:
        launch.detach()
    sweep.main(words(tmp_path, command="delete_incomplete"))
    assert jobs[0].folder.path.exists()
    sweep.main(words(tmp_path, command="cancel"))
    sweep.main(words(tmp_path, command="delete_incomplete"))
    assert not jobs[0].folder.path.exists()


@pytest.mark.parametrize("whose", ["ours", "another process's"])
def test_a_run_that_somebody_takes_up_meanwhile_is_spared(tmp_path, whose):
    jobs = make_jobs(tmp_path)
    for job in jobs[:2]:
        interrupted(job)
        (job.folder.path / "results.jsonl").touch()
    holding = jobs[0].folder.claim() if whose == "ours" else standing.claimed_by_another_process(jobs[0])
    with holding:
        assert cleaning.delete(jobs[:2]) == 1
        assert (jobs[0].folder.path / "results.jsonl").exists() and not jobs[1].folder.path.exists()


def test_a_run_that_is_done_by_now_is_spared(tmp_path):
    job = make_jobs(tmp_path)[0]
    interrupted(job)
    (job.folder.path / "done").touch()
    assert cleaning.delete([job]) == 0
    assert job.folder.state is State.DONE


def test_runs_that_died_elsewhere_are_deleted_side_by_side(tmp_path, monkeypatch):
    """Each takes half a lease to be sure of."""
    monkeypatch.setattr("domainbed_ext.attempts.LEASE", 1.0)
    jobs = make_jobs(tmp_path, "--n_trials", "3")
    for job in jobs:
        standing.attempt(job)
        standing.age(job)
    start = sweep.time.monotonic()
    assert cleaning.delete(jobs) == 12
    assert sweep.time.monotonic() - start < 12 * 0.5


def test_a_deletion_that_was_killed_is_finished_by_the_next(tmp_path):
    job = make_jobs(tmp_path)[0]
    failed(job)
    grave = tmp_path / "sweep" / ".deleted.something"
    grave.mkdir()
    assert cleaning.delete([job]) == 1
    assert list((tmp_path / "sweep").iterdir()) == []


# cancel


def test_cancelling_nothing_says_so(tmp_path, capsys):
    assert sweep.main(words(tmp_path, command="cancel")) == 0
    assert capsys.readouterr().out == f"nothing is under way in {tmp_path / 'sweep'}\n"


def test_cancel_asks_every_launch_to_end(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(sys.modules["domainbed_ext.launchers.slurm"], "cancel", asked.append)
    jobs = make_jobs(tmp_path)
    done(jobs[0])
    with launches.begin(tmp_path / "sweep", "slurm", "", Launch(Path(), [job.name for job in jobs])) as in_slurm:
        in_slurm.detach(slurm=["7"])
    running(jobs[1])
    with launches.begin(tmp_path / "sweep", "local", "", Launch(Path(), [jobs[1].name])) as local:
        assert sweep.main(words(tmp_path, "--dry_run", command="cancel")) == 0
        assert capsys.readouterr().out.count("would cancel launch") == 2 and not local.cancelled
        assert sweep.main(words(tmp_path, command="cancel")) == 0
        assert local.cancelled and in_slurm.cancelled and asked == [in_slurm.path]
    said = capsys.readouterr().out
    assert f"cancelled launch {in_slurm.path.name} (slurm; 2 runs waiting, 1 at work): what runs stops" in said
    assert f"cancelled launch {local.path.name} (local; 0 runs waiting, 1 at work): its runs stop where" in said
    assert found(jobs) == [State.DONE, State.RUNNING, State.NOT_LAUNCHED, State.NOT_LAUNCHED]


def test_an_engine_that_is_through_is_not_cancelled(tmp_path, capsys):
    job = make_jobs(tmp_path)[0]
    with launches.begin(tmp_path / "sweep", "slurm", "", Launch(Path(), [job.name])) as launch:
        launch.detach(slurm=["7"])
    failed(job)
    assert sweep.main(words(tmp_path, command="cancel")) == 0
    assert "nothing is under way" in capsys.readouterr().out and not launch.cancelled


def test_an_engine_that_does_not_answer_keeps_no_other_launch_from_being_cancelled(tmp_path, capsys, monkeypatch):
    def refuse(path):
        raise BenchmarkError("there is no scancel here")

    monkeypatch.setattr(sys.modules["domainbed_ext.launchers.slurm"], "cancel", refuse)
    with launches.begin(tmp_path / "sweep", "slurm", "", Launch(Path(), ["some run"])) as in_slurm:
        in_slurm.detach()
    with launches.begin(tmp_path / "sweep", "local", "", Launch(Path())) as local:
        assert sweep.main(words(tmp_path, command="cancel")) == ExitCode.BAD_INPUT
        assert local.cancelled
    assert "there is no scancel here" in capsys.readouterr().err


def test_what_waits_in_an_unknown_engine_is_to_be_ended_there(tmp_path, capsys):
    with launches.begin(tmp_path / "sweep", "another", "", Launch(Path(), ["some run"])) as launch:
        launch.detach()
    assert sweep.main(words(tmp_path, command="cancel")) == 0
    assert "end it in its engine too" in capsys.readouterr().out and launch.cancelled


# The command line and definitions


def test_pairs_can_be_asked_for_over_the_definition(tmp_path):
    definition = write(tmp_path, "{datasets: [PACS], algorithms: [BA], output_dir: o, single_test_envs: true}")
    words = ["launch", "--sweep", str(definition), "--n_hparams", "1", "--n_trials", "1"]
    assert len(sweep.make_jobs(sweep.parse(words))) == 4
    assert len(sweep.make_jobs(sweep.parse([*words, "--pairs"]))) == 10
    definition.write_text("{datasets: [PACS], algorithms: [BA], output_dir: o, pairs: true}")
    assert len(sweep.make_jobs(sweep.parse(words))) == 10
    assert len(sweep.make_jobs(sweep.parse([*words, "--single_test_envs"]))) == 4


def test_arguments_override_the_definition(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"datasets": "PACS", "algorithms": ["LP"], "steps": 10, "n_trials": 2,
                                    "output_dir": "o", "hparams": {"lr": 0.1}}))  # fmt: skip
    args = sweep.parse(["launch", "--sweep", str(path), "--steps", "20"])
    assert (args.datasets, args.steps, args.n_trials, json.loads(args.hparams)) == (["PACS"], 20, 2, {"lr": 0.1})


def test_a_definition_may_hold_a_launchers_options(tmp_path):
    path = write(
        tmp_path,
        "{datasets: [PACS], algorithms: [BA], output_dir: launch, command_launcher: slurm, jobs_per_gpu: 2, "
        "launcher_options: {partition: gpu, time: '4:00:00'}, save_minutes: 2}",
    )
    args = sweep.parse(["launch", "--sweep", str(path)])
    assert args.launcher_options == {"partition": "gpu", "time": "4:00:00", "jobs_per_gpu": 2}
    assert (args.command, args.output_dir, args.save_minutes) == ("launch", "launch", 2.0)
    args = sweep.parse(["--output_dir", "status", "--launcher_options", "{}", "status", "--sweep", str(path)])
    assert (args.command, args.output_dir, args.launcher_options) == ("status", "status", {"jobs_per_gpu": 2})


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--launcher_options", "{partition: gpu}"], "--launcher_options is not JSON"),
        (["--launcher_options", "3"], "--launcher_options is not a JSON object but 3"),
        (["--jobs_per_gpu", "0"], "--jobs_per_gpu 0: it starts at 1"),
        (["--jobs", "-1"], "--jobs -1: it starts at 0"),
    ],
)
def test_malformed_launching_gets_a_sentence(tmp_path, more, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        sweep.parse(words(tmp_path, *more))


def test_help_has_an_example_of_each_command(capsys):
    with pytest.raises(SystemExit):
        sweep.parse(["--help"])
    said = capsys.readouterr().out
    commands = ("launch", "retry", "status", "validate", "delete_incomplete", "cancel")
    assert all(f"python -m domainbed_ext.sweep {command} " in said for command in commands)
    assert all(name in said for name in launchers.LAUNCHERS) and launchers.GROUP in said


def test_no_argument_is_the_quickstart():
    args = sweep.parse(["launch"])
    assert args.datasets == ["DigitsShift"] and set(args.algorithms) == {"BA", "BOnly", "AOnly", "LP", "FullFT"}
    assert sweep.parse(["launch", "--steps", "7"]).steps == 7


@pytest.mark.parametrize("path", sorted(resources.sweeps().glob("*.yaml")), ids=lambda path: path.name)
def test_every_packaged_sweep_is_whole_and_opens_with_its_command(path):
    args = sweep.parse(["launch", "--sweep", path.name, "--data_dir", "d"])
    assert sweep.make_jobs(args)
    head = path.read_text().split("\ndatasets")[0]
    assert "python -m domainbed_ext.sweep launch" in head and "Cost" in head


def write(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("datasets: [PACS\nsteps: 3", "bad.yaml line 2 is not YAML"),
        ("- PACS", "is not a list of `argument: value` lines"),
        ("dataset: PACS", "unknown argument in .*'dataset': did you mean 'datasets'"),
        ("datasets: [PACS]", "--algorithms is missing"),
        ("{datasets: [PACS], algorithms: [BA]}", "--output_dir is missing"),
        ("{datasets: [PACS], algorithms: [BA], output_dir: o, n_hparams: 0}", "this sweep has no run"),
        ("steps: many", "argument --steps: invalid int value: 'many'; see python -m domainbed_ext.sweep --help"),
        ("n_trials: 2.5", "argument --n_trials: invalid int value: '2.5'"),
        ("steps: [1, 2]", "unrecognized arguments: 2"),
    ],
)
def test_a_malformed_definition_gets_a_sentence(tmp_path, text, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        sweep.parse(["launch", "--sweep", str(write(tmp_path, text))])


def test_an_unknown_definition_lists_the_packaged_ones():
    with pytest.raises(BenchmarkError, match=r"no sweep definition nothing: .*quickstart.yaml"):
        sweep.parse(["launch", "--sweep", "nothing"])


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--algorithms", "BOnyl"], "unknown algorithm 'BOnyl': did you mean 'BOnly'?"),
        (["--datasets", "PCAS"], "unknown data set 'PCAS': did you mean 'PACS'?"),
        (["--datasets", "PACS"], "PACS needs its images: add --data_dir"),
        (["--datasets", "PACS", "--data_dir", "nowhere"], "PACS: no folder nowhere/PACS"),
        (["--backbone", "vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'?"),
        (["--weights", "none.safetensors"], "no weights file none.safetensors"),
        (["--hparams", "{rank: 8}"], "--hparams is not JSON"),
        (["--hparams", '{"batch_size": 4000}'], "batch_size 4000 is larger than the"),
        (["--algorithms", "BOnly@rank=0"], "rank must be a whole number of at least 1"),
        (["--algorithms", "BOnly@rank=999"], "rank 999 is over"),
        (["--protocol", "single_sauce"], "argument --protocol: invalid choice: 'single_sauce'"),
        (["--source_envs", "plain"], "--source_envs is of --protocol single_source: add that, or leave it out"),
        (["--protocol", "single_source", "--source_envs", "plian"], "did you mean 'plain'?"),
        (["--pairs", "--evaluate", "lean"], "--evaluate lean leaves out what leave-one-domain-out"),
        (["--command_launcher", "locale"], "unknown launcher 'locale': did you mean 'local'?"),
    ],
)
def test_bad_input_is_told_before_anything_runs(tmp_path, more, sentence):
    with pytest.raises(BenchmarkError) as error:
        sweep.main(words(tmp_path, *more))
    assert sentence in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_an_unwritable_output_dir_gets_a_sentence(tmp_path):
    (tmp_path / "sweep").write_text("a file")
    with pytest.raises(BenchmarkError, match="cannot write to .* give another --output_dir"):
        sweep.main(words(tmp_path))


def test_the_command_line_prints_one_line_and_exits_with_2(tmp_path):
    argv = [sys.executable, "-m", "domainbed_ext.sweep", *words(tmp_path, algorithms=["BOnyl"])]
    process = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert process.returncode == 2
    assert process.stderr == "error: unknown algorithm 'BOnyl': did you mean 'BOnly'?\n"
