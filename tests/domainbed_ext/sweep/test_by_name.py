"""Runs are found by names that people read; nothing else reads these."""

import csv
import os
from pathlib import Path

import pytest

from domainbed_ext.errors import warn_once
from domainbed_ext.runs.folder import load_records
from domainbed_ext.sweep.by_name import FOLDER, INDEX, link_by_name, readable_name
from domainbed_ext.sweep.states import mixed_runs_warning
from tests.domainbed_ext.run_states import done, make_jobs


def linked(sweep_dir):
    """Each link's name, and the folder that it leads to from there."""
    return {path.name: os.readlink(path) for path in (sweep_dir / FOLDER).iterdir()}


@pytest.fixture
def sweep(tmp_path):
    """The jobs of a sweep, two of which are done."""
    jobs = make_jobs(tmp_path, algorithms=["LP", "BOnly@rank=2"])
    for job in jobs[:2]:
        done(job)
        (job.folder.path / "results.jsonl").write_text(
            '{"step": 1, "hparams": {}, "args": {"dataset": "DigitsShift", "algorithm": "LP", "test_envs": [0], '
            '"trial_seed": 0, "hparams_seed": 0}}\n'
        )
    return jobs


def test_a_link_leads_to_each_run_by_data_set_method_environments_and_seeds(sweep):
    link_by_name(sweep, sweep[0].sweep_dir)
    links = linked(sweep[0].sweep_dir)
    assert links["DigitsShift_LP_test-blended_trial0_hparams0"] == f"../{sweep[0].name}"
    assert links["DigitsShift_BOnly@rank=2_test-blended_trial0_hparams0"] == f"../{sweep[4].name}"
    assert sorted(links.values()) == sorted(f"../{job.name}" for job in sweep)
    (path,) = (sweep[0].sweep_dir / FOLDER).glob("*LP_test-blended*/done")
    assert path.samefile(sweep[0].folder.path / "done")


def test_pairs_of_environments_and_seeds_are_in_the_name(tmp_path):
    jobs = make_jobs(tmp_path, "--pairs", "--n_trials", "2", "--n_hparams", "2", "--datasets", "PACS")
    names = [readable_name(job) for job in jobs]
    assert len(set(names)) == len(jobs) == 40
    assert "PACS_LP_test-cartoon+sketch_trial1_hparams1" in names


@pytest.mark.parametrize("name", ["LP@backbone=a/b c", "LP@backbone=" + "long" * 60])
def test_any_run_has_a_name_that_can_be_a_files(tmp_path, name):
    (job,) = [job for job in make_jobs(tmp_path) if job.train_args["test_envs"] == [0]]
    job.train_args["algorithm"] = name
    (tmp_path / readable_name(job)).touch()
    assert readable_name(job).endswith("_trial0_hparams0")


def test_readers_of_the_sweep_do_not_see_the_links(sweep):
    sweep_dir = sweep[0].sweep_dir
    before = load_records(sweep_dir)
    link_by_name(sweep, sweep_dir)
    assert load_records(sweep_dir) == before and len(before) == 2
    assert mixed_runs_warning(sweep, sweep_dir) is None
    assert make_jobs(sweep_dir.parent, algorithms=["LP", "BOnly@rank=2"]) == sweep


def test_links_that_are_there_stay_and_a_few_calls_a_run_are_enough(sweep, monkeypatch):
    made = []
    symlink_to = Path.symlink_to
    monkeypatch.setattr(Path, "symlink_to", lambda path, target: made.append(path) or symlink_to(path, target))
    link_by_name(sweep[:4], sweep[0].sweep_dir)
    first = linked(sweep[0].sweep_dir)
    assert len(made) == 4
    link_by_name(sweep, sweep[0].sweep_dir)
    assert len(made) == 4 + 8 and first.items() <= linked(sweep[0].sweep_dir).items()


def test_runs_of_other_arguments_have_links_beside_these(tmp_path, sweep):
    others = make_jobs(tmp_path, "--steps", "7")
    for job in others[:2]:
        done(job)
    sweep_dir = sweep[0].sweep_dir
    for _ in range(2):
        for jobs in (sweep, others[:2]):
            link_by_name(jobs, sweep_dir)
    links = linked(sweep_dir)
    assert sorted(links.values()) == sorted(f"../{job.name}" for job in (*sweep, *others[:2]))
    assert links[f"{readable_name(others[0])}_{others[0].name[:8]}"] == f"../{others[0].name}"


def test_the_name_of_a_run_that_was_deleted_is_free_again(tmp_path, sweep):
    sweep_dir = sweep[0].sweep_dir
    link_by_name(make_jobs(tmp_path, "--steps", "7"), sweep_dir)  # of which none has a folder
    link_by_name(sweep, sweep_dir)
    assert sorted(linked(sweep_dir).values()) == sorted(f"../{job.name}" for job in sweep)


def test_where_links_cannot_be_made_an_index_lists_the_runs(tmp_path, sweep, monkeypatch, capsys):
    def refuse(path, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    sweep_dir = sweep[0].sweep_dir
    link_by_name(sweep[:3], sweep_dir)
    link_by_name(sweep, sweep_dir)
    with (sweep_dir / INDEX).open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"name": readable_name(job), "folder": job.name} for job in sweep]
    assert len(load_records(sweep_dir)) == 2
    (sweep_dir / INDEX).unlink()
    (sweep_dir / INDEX).mkdir()  # what cannot be written keeps no run from being launched
    (sweep_dir / INDEX / "x").touch()
    warn_once.cache_clear()
    link_by_name(sweep, sweep_dir)
    assert f"cannot write {sweep_dir / INDEX}" in capsys.readouterr().err
