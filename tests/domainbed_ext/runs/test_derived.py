"""Derived runs: written beside the runs that they are of, and read as any other."""

import json

import pytest

from domainbed_ext.algorithms.names import canonical_name, describe
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.report.methods import algorithm_order, family_of, label_of, without_objective
from domainbed_ext.report.results import Results
from domainbed_ext.runs.derived import Candidate, Derived, remove_others
from domainbed_ext.runs.folder import RunFolder, load_records
from domainbed_ext.runs.saved import find_saved
from tests.domainbed_ext.fabricated_records import left_out_run, write_runs

ACCURACIES = {f"env{env}_{split}_acc": 0.875 for env in range(4) for split in ("in", "out")}


@pytest.fixture
def sweep(tmp_path):
    """A sweep of two trials of BOnly, tested on one domain."""
    return write_runs(tmp_path, [*left_out_run("BOnly", 0, 1, 0.6), *left_out_run("BOnly", 1, 1, 0.7)])


def make(sweep, digests=("a", "b"), kind="soup(trials)", **changes):
    base = RunFolder(sweep / "BOnly-1-0").records()[-1]
    candidates = [Candidate(f"BOnly-1-{trial}", 10, digest) for trial, digest in enumerate(digests)]
    return Derived(sweep, kind, base, candidates, trials=[0, 1], **changes)


def test_a_derived_run_is_read_as_any_other(sweep):
    derived = make(sweep)
    written = derived.finish(ACCURACIES, {"BOnly-1-0": 0.5, "BOnly-1-1": 0.5}, save=lambda folder: folder.mkdir())
    records = load_records(sweep)
    assert len({record["run"] for record in records}) == 3
    (record,) = (record for record in records if record["run"].startswith("derived/"))
    assert record == json.loads(json.dumps(written))
    assert (sweep / record["run"] / "selected").is_dir()
    assert record["args"]["algorithm"] == "BOnly soup(trials)"
    assert record["derived"]["ingredients"] == ["BOnly-1-0", "BOnly-1-1"]
    results = Results(records)
    assert results.algorithms == ["BOnly", "BOnly soup(trials)"]
    (table, *_) = results.tables()
    assert [row[0] for row in table.rows] == ["BOnly (LoRA-FA)", "BOnly soup(trials) (LoRA-FA)"]
    assert table.rows[1][2] == "87.5"


def test_it_is_computed_again_only_if_what_it_is_of_has_changed(sweep):
    derived = make(sweep)
    assert derived.finished_record() is None
    written = derived.finish(ACCURACIES, {"BOnly-1-0": 0.5, "BOnly-1-1": 0.5})
    assert derived.finished_record() == json.loads(json.dumps(written))
    for other in (make(sweep, ("a", "c")), make(sweep, settings={"held_out": 20})):
        assert other.finished_record() is None and other.folder.path == derived.folder.path
    greedy = make(sweep, kind="soup(trials, greedy)")
    assert greedy.finished_record() is None and greedy.folder.path != derived.folder.path
    elsewhere = make(sweep, args={"trial_seed": 1})
    assert elsewhere.folder.path != derived.folder.path
    elsewhere.finish(ACCURACIES, {"BOnly-1-1": 1.0})
    assert remove_others(sweep, "BOnly soup(trials)", "PACS", [derived]) == [elsewhere.folder.name]
    assert remove_others(sweep, "BOnly soup(trials)", "PACS", [derived]) == []
    assert derived.finished_record() is not None


def test_it_has_no_weights_to_evaluate_again(sweep):
    derived = make(sweep)
    derived.finish(ACCURACIES, {"BOnly-1-0": 1.0})
    with pytest.raises(BenchmarkError, match=r"was not trained but derived from other runs \(BOnly soup\(trials\)\)"):
        find_saved(derived.folder)


@pytest.mark.parametrize("kind", ["soup(trials)", "soup(hparams, greedy)", "strength(selected)"])
def test_names_of_derived_runs(kind):
    name = f"BOnly+CORAL@rank=16 {kind}"
    assert canonical_name(f"LoRA-FA+coral@r=16 {kind}") == name
    assert describe(name) == describe("BOnly+CORAL@rank=16")
    assert label_of(name) == f"LoRA-FA + CORAL, rank 16, {kind}"
    assert family_of(name) == "BOnly+CORAL" and without_objective(name) == f"BOnly@rank=16 {kind}"
    names = ["BOnly", f"BOnly {kind}", "BOnly@rank=8", "BOnly@rank=16", "BOnly+CORAL@rank=16", name, "AOnly"]
    assert sorted({*names}, key=algorithm_order) == names
