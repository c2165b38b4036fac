"""Fidelity, measured against upstream's own code. Without a checkout of it, all but one is skipped."""

import re
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from domainbed_ext import train, upstream
from domainbed_ext.collect_results import collect
from domainbed_ext.model_selection import SELECTION_METHODS
from domainbed_ext.sweep import jobs as sweep_jobs
from domainbed_ext.sweep.arguments import parse
from tests.compat import compare

# Upstream's scripts are run, and imported, in one process.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
TINY = ["--hparams", '{"backbone": "vit_pico_patch8_32", "weights": "none", "batch_size": 4}']


def test_a_difference_is_reported():
    report = compare.Report()
    report.check("tables", "a cell", 0.5, 0.5 + 1e-8)
    report.check("tables", "a cell", "X", None, "nan")
    report.check("tables", "a cell", float("nan"), float("nan"))
    assert report.differences == ["tables: a cell: upstream 0.5, here 0.50000001"]
    assert (report.equal["tables"], report.deliberate["tables"]["nan"], report.different["tables"]) == (1, 1, 1)


@pytest.mark.slow
def test_every_number_is_upstreams_but_for_what_differs_on_purpose(checkout):
    report = compare.compare(checkout, sweeps=12, seed=1)
    assert report.differences == []
    assert report.equal["model selection"] > 1000 and report.equal["tables"] > 500 and report.equal["jobs"] > 5000
    assert set(report.deliberate["model selection"]) | set(report.deliberate["tables"]) == {"nan", "diverged"}
    assert not report.deliberate["seed_hash"] + report.deliberate["splits"] + report.deliberate["images"]


def upstream_cells(text):
    """(selection method, data set or "Averages", algorithm) → a row's cells, from what upstream prints."""
    titles = {method.title: name for name, method in SELECTION_METHODS.items()}
    cells, place = {}, ()
    for line in text.splitlines():
        if match := re.match(r"-{8} (?:Dataset: )?(\w+), model selection method: (.*)", line):
            place = titles[match[2]], match[1]
        elif place and line.strip() and not line.startswith("Algorithm"):
            algorithm, *row = re.split(r"\s{2,}", line.strip())
            cells[(*place, algorithm)] = row
    return cells


def our_cells(folder):
    """The same, from our results.csv, of one data set."""
    figures = pd.read_csv(folder / "results.csv")
    cells = {}
    for (method, dataset, algorithm), rows in figures[figures["metric"] == "out_of_domain"].groupby(
        ["selection", "dataset", "algorithm"]
    ):
        *row, average = [f"{mean:.1f} +/- {err:.1f}" for mean, err in zip(rows["mean"], rows["err"], strict=True)]
        cells[method, dataset, algorithm] = [*row, f"{rows['mean'].iloc[:-1].mean():.1f}"]
        cells[method, "Averages", algorithm] = [average, f"{rows['mean'].iloc[-1]:.1f}"]
    return cells


def collected_here(folder, tmp_path):
    collect(folder, tmp_path / "tables", console=Console(quiet=True))
    return our_cells(tmp_path / "tables")


def collected_upstream(folder, capsys):
    capsys.readouterr()
    upstream.run("collect_results", ["--input_dir", str(folder)])
    return upstream_cells(capsys.readouterr().out)


def test_our_tables_of_the_sweep_that_upstream_ships_are_its_own(checkout, tmp_path):
    data = checkout / "domainbed" / "misc"
    theirs = upstream_cells((data / "test_sweep_results.txt").read_text())
    assert len(theirs) == 6
    assert collected_here(data / "test_sweep_data", tmp_path) == theirs


@pytest.mark.slow
def test_upstreams_sweep_runs_our_algorithms_and_both_collect_it(checkout, tmp_path, capsys, monkeypatch):
    launched = []
    again = [sys.executable, "-m", "domainbed_ext.upstream", "--checkout", str(checkout), "--workers", "0", "train"]

    def inline(commands):
        for command in commands:
            words = shlex.split(command)
            assert words[: len(again)] == again
            upstream.run("train", words[len(again) :])
        launched.extend(commands)

    registry = compare.domainbed("command_launchers").REGISTRY
    monkeypatch.setitem(registry, "inline", inline)
    words = shlex.split(
        "--workers 0 sweep launch --datasets Debug28 --algorithms ERM BOnly@rank=4 --n_hparams 1 --n_trials 2 "
        f"--steps 2 --single_test_envs --skip_confirmation --command_launcher inline --data_dir 'no where' "
        f"""--output_dir {tmp_path}/sweep --hparams '{{"batch_size": 4}}'"""
    )
    for _ in range(2):  # launched again, there is nothing to do
        assert upstream.main(words) == 0
        assert len(launched) == 12
    assert registry["inline"] is inline
    theirs, ours = collected_upstream(tmp_path / "sweep", capsys), collected_here(tmp_path / "sweep", tmp_path)
    assert {algorithm for _, _, algorithm in ours} == {"ERM", "BOnly@rank=4"}
    # Here, leave-one-domain-out is left out where it would be a field of X.
    assert ours == {key: row for key, row in theirs.items() if key[0] != "leave-one-domain-out"}


@pytest.mark.slow
def test_upstreams_own_launcher_starts_runs_that_know_our_algorithms(checkout, tmp_path):
    script = compare.domainbed("scripts.sweep")
    listed = script.make_args_list(
        1, ["Debug28"], ["AOnly"], 0, 1, 2, "none", "domain_generalization", 0.2, True, TINY[1]
    )
    folders = [Path(script.Job(train_args, str(tmp_path)).output_dir) for train_args in listed]
    for folder in folders[1:]:  # upstream launches only what has no folder, and a process takes its time
        folder.mkdir()
    words = shlex.split(
        "--workers 0 sweep launch --datasets Debug28 --algorithms AOnly --n_hparams 1 --n_trials 1 --data_dir none "
        f"--output_dir {tmp_path} --steps 2 --command_launcher local --single_test_envs --skip_confirmation"
    )
    assert upstream.main(["--checkout", str(checkout), *words, *TINY]) == 0
    assert (folders[0] / "done").exists()


@pytest.mark.slow
def test_upstream_collects_our_sweep(checkout, tmp_path, capsys):
    compare.make_pacs(tmp_path)
    words = shlex.split(
        "launch --datasets PACS --algorithms LP --n_hparams 1 --n_trials 1 --steps 2 "
        f"--data_dir {tmp_path} --output_dir {tmp_path}/sweep"
    )
    for job in sweep_jobs.make_jobs(parse([*words, *TINY])):
        assert train.main(job.argv) == 0
    theirs, ours = collected_upstream(tmp_path / "sweep", capsys), collected_here(tmp_path / "sweep", tmp_path)
    assert len(ours) == 6 and ours == theirs
