import sys
import threading
from pathlib import Path

import pytest

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers.launch import Launch, begin
from domainbed_ext.runs.folder import State
from domainbed_ext.sweep import command as sweep
from domainbed_ext.sweep.delete_incomplete import delete
from domainbed_ext.system.attempts import Attempt
from domainbed_ext.system.exit_codes import ExitCode
from tests.domainbed_ext import run_states as standing
from tests.domainbed_ext.run_states import done, failed, found, interrupted, make_jobs, running, words

# delete_incomplete


def test_delete_incomplete_deletes_just_that(tmp_path, capsys):
    jobs = make_jobs(tmp_path, algorithms=["LP", "BA"])
    for make, job in zip((done, running, failed, interrupted), jobs, strict=False):
        make(job)
    with begin(tmp_path / "sweep", "slurm", "", Launch(Path(), [jobs[4].name])) as launch:
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
    with begin(tmp_path / "sweep", "other", "", Launch(Path(), [jobs[0].name])) as launch:
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
        assert delete(jobs[:2]) == 1
        assert (jobs[0].folder.path / "results.jsonl").exists() and not jobs[1].folder.path.exists()


def test_a_run_that_is_done_by_now_is_spared(tmp_path):
    job = make_jobs(tmp_path)[0]
    interrupted(job)
    (job.folder.path / "done").touch()
    assert delete([job]) == 0
    assert job.folder.state is State.DONE


def test_runs_that_died_elsewhere_are_deleted_side_by_side(tmp_path, monkeypatch):
    """Each takes half a lease to be sure of; here, until all others are asked about."""
    together = threading.Barrier(12, timeout=300)
    monkeypatch.setattr(Attempt, "is_dead", lambda attempt: together.wait() >= 0)
    jobs = make_jobs(tmp_path, "--n_trials", "3")
    for job in jobs:
        standing.attempt(job)
        standing.age(job)
    assert delete(jobs) == 12


def test_a_deletion_that_was_killed_is_finished_by_the_next(tmp_path):
    job = make_jobs(tmp_path)[0]
    failed(job)
    grave = tmp_path / "sweep" / ".deleted.something"
    grave.mkdir()
    assert delete([job]) == 1
    assert list((tmp_path / "sweep").iterdir()) == []


# cancel


def test_cancelling_nothing_says_so(tmp_path, capsys):
    assert sweep.main(words(tmp_path, command="cancel")) == 0
    assert capsys.readouterr().out == f"no launch is in progress in {tmp_path / 'sweep'}\n"


def test_cancel_asks_every_launch_to_end(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(sys.modules["domainbed_ext.launchers.slurm"], "cancel", asked.append)
    jobs = make_jobs(tmp_path)
    done(jobs[0])
    with begin(tmp_path / "sweep", "slurm", "", Launch(Path(), [job.name for job in jobs])) as in_slurm:
        in_slurm.detach(slurm=["7"])
    running(jobs[1])
    with begin(tmp_path / "sweep", "local", "", Launch(Path(), [jobs[1].name])) as local:
        assert sweep.main(words(tmp_path, "--dry_run", command="cancel")) == 0
        assert capsys.readouterr().out.count("would cancel launch") == 2 and not local.cancelled
        assert sweep.main(words(tmp_path, command="cancel")) == 0
        assert local.cancelled and in_slurm.cancelled and asked == [in_slurm.path]
    said = capsys.readouterr().out
    assert f"cancelled launch {in_slurm.path.name} (slurm; 2 runs queued, 1 running): " in said
    assert f"cancelled launch {local.path.name} (local; 0 runs queued, 1 running): " in said
    assert found(jobs) == [State.DONE, State.RUNNING, State.NOT_LAUNCHED, State.NOT_LAUNCHED]


def test_an_engine_that_is_through_is_not_cancelled(tmp_path, capsys):
    job = make_jobs(tmp_path)[0]
    with begin(tmp_path / "sweep", "slurm", "", Launch(Path(), [job.name])) as launch:
        launch.detach(slurm=["7"])
    failed(job)
    assert sweep.main(words(tmp_path, command="cancel")) == 0
    assert "no launch is in progress" in capsys.readouterr().out and not launch.cancelled


def test_an_engine_that_does_not_answer_keeps_no_other_launch_from_being_cancelled(tmp_path, capsys, monkeypatch):
    def refuse(path):
        raise BenchmarkError("there is no scancel here")

    monkeypatch.setattr(sys.modules["domainbed_ext.launchers.slurm"], "cancel", refuse)
    with begin(tmp_path / "sweep", "slurm", "", Launch(Path(), ["some run"])) as in_slurm:
        in_slurm.detach()
    with begin(tmp_path / "sweep", "local", "", Launch(Path())) as local:
        assert sweep.main(words(tmp_path, command="cancel")) == ExitCode.BAD_INPUT
        assert local.cancelled
    assert "there is no scancel here" in capsys.readouterr().err


def test_what_waits_in_an_unknown_engine_is_to_be_ended_there(tmp_path, capsys):
    with begin(tmp_path / "sweep", "another", "", Launch(Path(), ["some run"])) as launch:
        launch.detach()
    assert sweep.main(words(tmp_path, command="cancel")) == 0
    assert "in the scheduler too" in capsys.readouterr().out and launch.cancelled
