import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from domainbed_ext.launchers.launch import FOLDER, Launch, begin
from domainbed_ext.runs.folder import State
from domainbed_ext.sweep import command as sweep
from domainbed_ext.sweep import status, status_view
from domainbed_ext.sweep import time_left as estimate
from domainbed_ext.system import progress
from tests.domainbed_ext import run_states as standing
from tests.domainbed_ext.run_states import done, failed, found, interrupted, look, make_jobs, running, words


def begin_launch(jobs, launcher="local"):
    return begin(jobs[0].sweep_dir, launcher, "", Launch(Path(), [job.name for job in jobs]))


def detached(jobs):
    """A launch whose runs wait in a scheduler though its process has ended."""
    with begin_launch(jobs, "slurm") as launch:
        launch.detach(slurm=["7"])
    return launch.path


def test_states_are_read_from_the_runs_folders(tmp_path):
    jobs = make_jobs(tmp_path, algorithms=["LP", "BA"])
    for make, job in zip((done, running, failed, interrupted), jobs, strict=False):
        make(job)
    jobs[4].folder.path.mkdir()  # upstream's, stopped; it notes no attempts
    jobs[5].folder.path.write_text("a file where the run's folder should be")
    assert found(jobs) == [
        *(State.DONE, State.RUNNING, State.FAILED, State.INTERRUPTED, State.INTERRUPTED),
        *[State.NOT_LAUNCHED] * 3,
    ]
    standing.age(jobs[1])
    assert look(jobs)[1].state is State.INTERRUPTED


def test_runs_of_a_launch_that_lives_wait(tmp_path):
    jobs = make_jobs(tmp_path)
    done(jobs[0])
    failed(jobs[1])
    with begin_launch(jobs[:3]) as launch:
        assert found(jobs) == [State.DONE, State.QUEUED, State.QUEUED, State.NOT_LAUNCHED]
        assert look(jobs)[2].wait == (launch.path, False, 0)
        failed(jobs[1], number=2)  # so it was tried in this launch
        failed(jobs[2])
        assert found(jobs) == [State.DONE, State.FAILED, State.FAILED, State.NOT_LAUNCHED]
        (launch.path / "cancel").touch()
        interrupted(jobs[3])
    assert found(jobs) == [State.DONE, State.FAILED, State.FAILED, State.INTERRUPTED]


def test_runs_of_a_launch_that_died_do_not_wait(tmp_path):
    jobs = make_jobs(tmp_path)
    path = jobs[0].sweep_dir / FOLDER / "dead"
    path.mkdir(parents=True)
    (path / "launch.json").write_text(json.dumps({"runs": [job.name for job in jobs], "detached": False}))
    told = {"owner": standing.ELSEWHERE, "seconds": 0, "set_up": 0, "share": 0, "ended": None}
    (path / "attempt_1.json").write_text(json.dumps(told))
    assert set(found(jobs)) == {State.QUEUED}
    os.utime(path / "attempt_1.json", (1, 1))
    assert set(found(jobs)) == {State.NOT_LAUNCHED}


def test_runs_in_an_engine_wait_until_they_are_tried_or_cancelled(tmp_path):
    jobs = make_jobs(tmp_path)
    interrupted(jobs[0], number=3)
    path = detached(jobs)
    assert set(found(jobs)) == {State.QUEUED} and look(jobs)[0].wait.detached
    interrupted(jobs[0], number=4)
    interrupted(jobs[1])
    failed(jobs[2])
    assert found(jobs) == [State.INTERRUPTED, State.INTERRUPTED, State.FAILED, State.QUEUED]
    (path / "requeued").mkdir()
    (path / "requeued" / jobs[0].name).touch()
    assert found(jobs) == [State.QUEUED, State.INTERRUPTED, State.FAILED, State.QUEUED]
    (path / "cancel").touch()
    assert found(jobs) == [State.INTERRUPTED, State.INTERRUPTED, State.FAILED, State.NOT_LAUNCHED]


def test_a_run_in_two_launches_is_the_engines(tmp_path):
    jobs = make_jobs(tmp_path)
    path = detached(jobs)
    with begin_launch(jobs):
        assert {standing.wait.launch for standing in look(jobs)} == {path}


class Calls:
    """Counts what is asked of the file system."""

    def __init__(self, monkeypatch):
        self.count = 0
        for module, name in ((os, "listdir"), (os, "scandir"), (os, "stat"), (os, "lstat"), (io, "open")):
            monkeypatch.setattr(module, name, self.counting(getattr(module, name)))

    def counting(self, function):
        def counted(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        return counted


@pytest.mark.parametrize(
    ("make", "most"),
    [(lambda job: None, 0), (done, 1), (interrupted, 2), (failed, 2), (running, 3), (standing.attempt, 3)],
    ids=["not launched", "done", "interrupted", "failed", "running", "killed"],
)
def test_looking_costs_as_little_for_each_run_however_many_there_are(tmp_path, monkeypatch, make, most):
    jobs = make_jobs(tmp_path, "--n_trials", "10")
    for job in jobs:
        make(job)
    calls, counts = Calls(monkeypatch), []
    look(jobs[:1])  # what a process reads once
    for number in (20, 40):
        before = calls.count
        look(jobs[:number])
        counts.append(calls.count - before)
    assert counts[1] - counts[0] == most * 20
    assert counts[0] <= most * 20 + 10


# What is shown.


def a_sweep(tmp_path):
    jobs = make_jobs(tmp_path, algorithms=["LP", "BA"])
    done(jobs[0], 100)
    done(jobs[1], 300)
    running(jobs[2], 0.25, 50)
    failed(jobs[3], "the disk is full")
    running(jobs[4], 0.5, 600)
    interrupted(jobs[5], 0.5, 500)
    return jobs


def test_the_time_left_is_what_runs_of_a_kind_took(tmp_path):
    jobs = a_sweep(tmp_path)
    left = estimate.estimate_time_left(look(jobs))
    # LP: 100, 300 and 50/0.25 seconds a run; BA: 600/0.5 and 500/0.5.
    assert estimate.seconds_per_run(look(jobs)) == {jobs[0].kind: 200.0, jobs[4].kind: 1100.0}
    assert (left.count, left.running, left.unknown) == (2, 2, [])  # nobody has launched the others
    assert left.work == pytest.approx(0.75 * 200 + 0.5 * 1100)
    assert left.seconds == pytest.approx(0.5 * 1100)  # the longest, for there is one slot each
    with begin_launch(jobs[5:]):
        left = estimate.estimate_time_left(look(jobs))
        assert left.count == 5
        assert left.seconds == pytest.approx((0.75 * 200 + (0.5 + 0.5 + 2) * 1100) / 2)
    assert str(left) == "time left: 29 min with 2 runs at once"


@pytest.mark.parametrize(
    ("makes", "sentence"),
    [
        ({}, "time left: unknown, since no run has progressed far enough"),
        ({0: running}, "time left: 10 s with 1 run at once"),
        ({0: lambda job: running(job, 0.01)}, "time left: unknown, since no run has progressed far enough"),
        (
            {0: lambda job: done(job, 3600)},
            "time left: unknown, since nothing is running; 7 runs would take at least 3 h 00 min one after another, "
            "not counting BA on DigitsShift",
        ),
        (dict.fromkeys(range(8), done), "nothing left"),
        (dict.fromkeys(range(8), lambda job: (job.folder.path.mkdir(), done(job, 0))), "nothing left"),
    ],
)
def test_what_is_not_known_is_said_to_be_unknown(tmp_path, makes, sentence):
    jobs = make_jobs(tmp_path, algorithms=["LP", "BA"])
    jobs[0].sweep_dir.mkdir()
    for number, make in makes.items():
        make(jobs[number])
    assert str(estimate.estimate_time_left(look(jobs))) == sentence


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3599, "1 h 00 min"), (7500, "2 h 05 min"), (360_000, "4 d 4 h")],
)
def test_durations_read_well(seconds, words):
    assert progress.format_duration(seconds) == words


def test_status_is_plain_text_where_nobody_watches(tmp_path, capsys):
    jobs = a_sweep(tmp_path)
    assert sweep.main(words(tmp_path, "--watch", command="status", algorithms=["LP", "BA"])) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\r" not in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == (f"8 runs in {tmp_path / 'sweep'}: 2 not launched, 2 running, 1 interrupted, 1 failed, 2 done")
    assert "DigitsShift LP ██████░░░░░░ 56.2 % 2 1 - 1 - 4" in lines
    assert "DigitsShift BA ███░░░░░░░░░ 25.0 % - 1 1 - 2 4" in lines
    assert "all ████░░░░░░░░ 40.6 % 2 2 1 1 2 8" in lines
    assert "time left: 9 min with 2 runs at once" in lines
    assert f"{jobs[4]} 50 % 10 min far {jobs[4].name}" in lines
    assert f"{jobs[3]}: the disk is full (log: {jobs[3].folder.path / 'err.txt'})" in lines
    assert "slowest of 2 done, which took 7 min together" in lines
    assert f"{jobs[1]} 5 min {jobs[1].name}" in lines


def test_status_tells_where_runs_have_readable_names(tmp_path, capsys):
    for name_is_there in (False, True):
        assert sweep.main(words(tmp_path, command="status")) == 0
        assert (f"runs by readable names: {tmp_path / 'sweep' / 'by_name'}" in capsys.readouterr().out) == name_is_there
        (tmp_path / "sweep" / "by_name").mkdir(parents=True, exist_ok=True)


def test_bars_can_be_written_in_any_encoding(tmp_path):
    jobs = a_sweep(tmp_path)
    console = Console(file=io.StringIO(), width=200)
    console.print(status_view.render(look(jobs), tmp_path, "ascii"))
    assert "######......  56.2 %" in console.file.getvalue()


def test_long_lists_are_cut(tmp_path):
    jobs = make_jobs(tmp_path, "--n_trials", "4")
    for job in jobs:
        failed(job)
    console = Console(file=io.StringIO(), width=200)
    console.print(status_view.render(look(jobs), tmp_path))
    assert "failed (10 of 16; --json has all)" in console.file.getvalue()
    assert console.file.getvalue().count("err.txt") == 10


def test_status_for_scripts(tmp_path, capsys):
    jobs = a_sweep(tmp_path)
    with begin_launch([jobs[6]]) as launch:
        assert sweep.main(words(tmp_path, "--json", command="status", algorithms=["LP", "BA"])) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["counts"] == {
        "done": 2, "running": 2, "queued": 1, "interrupted": 1, "failed": 1, "not launched": 1
    }  # fmt: skip
    assert told["output_dir"] == str(tmp_path / "sweep") and told["seconds_left"] == 1100.0
    runs = told["runs"]
    assert [run["run"] for run in runs] == [job.name for job in jobs]
    assert runs[0]["state"] == "done" and (runs[0]["share"], runs[0]["seconds"]) == (1.0, 100.0)
    assert runs[3]["error"] == "the disk is full" and runs[3]["log"].endswith("err.txt")
    assert (runs[4]["host"], runs[4]["attempts"], runs[4]["test_envs"]) == ("far", 1, [0])
    assert runs[0]["name"] == "DigitsShift_LP_test-blended_trial0_hparams0"
    assert runs[6]["launch"] == str(launch.path) and runs[7]["launch"] is None


def test_a_run_of_which_nobody_noted_the_time_has_none(tmp_path):
    jobs = make_jobs(tmp_path)
    jobs[0].folder.path.mkdir(parents=True)
    (jobs[0].folder.path / "done").touch()
    assert look(jobs)[0].seconds is None
    assert "slowest" not in shown(jobs)


def shown(jobs):
    console = Console(file=io.StringIO(), width=200)
    console.print(status_view.render(look(jobs), jobs[0].sweep_dir))
    return console.file.getvalue()


def test_status_of_nothing_leaves_no_trace(tmp_path, capsys):
    assert sweep.main(words(tmp_path, command="status")) == 0
    assert "4 not launched" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_status_needs_no_right_to_write(tmp_path, capsys, monkeypatch):
    a_sweep(tmp_path)
    touch = Path.touch

    def refuse(path, *args, **kwargs):  # for root may do all
        if tmp_path in path.parents:
            raise PermissionError(13, "Permission denied")
        touch(path, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", refuse)
    before = sorted(tmp_path.rglob("*"))
    assert sweep.main(words(tmp_path, command="status", algorithms=["LP", "BA"])) == 0
    assert "2 running" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_of_other_arguments_are_pointed_out(tmp_path, capsys):
    for job in make_jobs(tmp_path, "--steps", "3"):
        done(job)
    sweep.main(words(tmp_path, command="status"))
    assert f"{tmp_path / 'sweep'} also holds 4 runs of other arguments" in capsys.readouterr().out


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(status, "output", lambda: Console(file=screen, force_terminal=True, width=150, height=40))
    monkeypatch.setattr(status, "REFRESH", 0.0)
    return screen


def test_watching_ends_when_all_is_done(tmp_path, terminal):
    jobs = make_jobs(tmp_path)
    left = list(jobs)

    def look_on():
        if left:
            done(left.pop())
        return look(jobs)

    status.show(look_on, tmp_path, watch=True)
    assert not left and "\x1b" in terminal.getvalue()
    assert "1 done" in terminal.getvalue() and "4 done" in terminal.getvalue()


def test_watching_ends_with_ctrl_c(tmp_path, terminal):
    jobs, looks = make_jobs(tmp_path), []

    def look_on():
        looks.append(1)
        if len(looks) == 3:
            raise KeyboardInterrupt
        return look(jobs)

    status.show(look_on, tmp_path, watch=True)
    assert len(looks) == 3
