"""Which soups there are to make of finished runs."""

import json

import pytest

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.derived import Derived
from domainbed_ext.soups.plans import KINDS, OVER, Sweep
from tests.domainbed_ext.fabricated_records import left_out_run, single_source_run, write_runs


def with_hparams_seed(records, seed):
    return [
        {**each, "run": f"{each['run']}-{seed}", "args": {**each["args"], "hparams_seed": seed}} for each in records
    ]


def plans(tmp_path, records, over=OVER, kinds=("uniform",), **options):
    return Sweep(tmp_path, records).plans(over, kinds, **options)


def summary(plan):
    return plan.name, plan.test_envs, [member["run"] for member in plan.members]


def test_a_soup_over_trials_is_of_the_runs_that_validation_selects(tmp_path):
    worse, best = left_out_run("BOnly", 0, 2, 0.9, in_domain=0.7), left_out_run("BOnly", 0, 2, 0.1, in_domain=0.8)
    records = [
        *with_hparams_seed(worse, 0),
        *with_hparams_seed(best, 1),
        *with_hparams_seed(left_out_run("BOnly", 1, 2, 0.5), 0),
    ]
    over_trials, over_hparams = plans(tmp_path, records)
    assert summary(over_trials) == ("soup(trials)", (2,), ["BOnly-2-0-1", "BOnly-2-1-0"])
    assert all(member["step"] == 10 for member in over_trials.members)
    assert summary(over_hparams) == ("soup(hparams)", (2,), ["BOnly-2-0-0", "BOnly-2-0-1"])
    assert str(over_trials) == "BOnly soup(trials) on PACS, tested on P, trials 0, 1"


def test_groups_of_trials(tmp_path):
    records = [record for trial in range(5) for record in left_out_run("BOnly", trial, 2, 0.5)]
    planned = plans(tmp_path, records, ["trials"], KINDS, size=2)
    assert [summary(plan)[::2] for plan in planned] == [
        (f"soup(2 trials{greedy})", [f"BOnly-2-{trial}", f"BOnly-2-{trial + 1}"])
        for greedy in ("", ", greedy")
        for trial in (0, 2)
    ]


def test_a_soup_over_domains_is_tested_on_the_remaining_one(tmp_path):
    records = [
        record for trial in range(2) for source in range(4) for record in single_source_run("BA", trial, source=source)
    ]
    write_runs(tmp_path, records)
    for run in tmp_path.iterdir():
        (run / "last").mkdir()
    planned = plans(tmp_path, records, ["domains"])
    assert [(plan.test_envs, plan.members[0]["args"]["trial_seed"]) for plan in planned] == [
        ((env,), trial) for env in range(4) for trial in range(2)
    ]
    plan = planned[2]
    assert [record["args"]["test_envs"] for record in plan.members] == [[1, 2, 3], [0, 1, 3], [0, 1, 2]]
    args = plan.derived.record_args
    assert (args["algorithm"], args["protocol"], args["test_envs"]) == ("BA soup(domains)", "leave_one_out", [1])
    assert isinstance(plan.derived, Derived) and json.dumps(plan.derived.origin)
    without = [record for record in records if record["args"]["test_envs"] != [1, 2, 3]]
    assert [plan.test_envs for plan in plans(tmp_path, without, ["domains"])] == [(0,), (0,)]


def test_what_needs_two_runs_has_no_plan(tmp_path):
    one = left_out_run("BOnly", 0, 2, 0.5)
    assert plans(tmp_path, one) == []
    two = [*one, *left_out_run("BOnly", 1, 2, 0.5)]
    assert plans(tmp_path, two, size=3) == []
    pair = [{**each, "args": {**each["args"], "test_envs": [1, 2]}} for each in two]
    assert plans(tmp_path, pair) == []
    soup = [{**each, "derived": {}} for each in two]
    assert plans(tmp_path, soup) == []


def test_methods_are_named_in_any_spelling(tmp_path):
    records = [
        record for name in ("BOnly@rank=16", "LP") for trial in (0, 1) for record in left_out_run(name, trial, 2, 0.5)
    ]
    (plan,) = plans(tmp_path, records, algorithms=["LoRA-FA@r=16"])
    assert plan.row == ("BOnly@rank=16 soup(trials)", "PACS")
    with pytest.raises(BenchmarkError, match=r"unknown method of these runs in --algorithms: 'BA'.*'BOnly@rank=16'|LP"):
        plans(tmp_path, records, algorithms=["BA"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hparams": {"backbone": "other", "rank": 8}}, "differ in backbone (other, vit)"),
        ({"hparams": {"backbone": "vit", "rank": 16}}, "differ in rank (16, 8), so they have no mean: .* add --merged"),
        ({"backbone_digest": "2"}, "differ in their pretrained weights"),
        ({"data_digest": ["2"]}, "differ in their data"),
    ],
)
def test_runs_that_have_no_mean(tmp_path, change, words):
    first, second = (left_out_run("BA", trial, 2, 0.5) for trial in (0, 1))
    usual = {"hparams": {"backbone": "vit", "rank": 8}, "backbone_digest": "1", "data_digest": ["1"]}
    records = [*({**each, **usual} for each in first), *({**each, **usual, **change} for each in second)]
    write_runs(tmp_path, records)
    for run in tmp_path.iterdir():
        (run / "selected").mkdir()
    (plan,) = plans(tmp_path, records)
    with pytest.raises(BenchmarkError, match=words.replace("(", r"\(").replace(")", r"\)")):
        plan.check()
    merged = plans(tmp_path, records, merged=True)[0]
    if "rank" in words:
        merged.check()
    else:
        with pytest.raises(BenchmarkError):
            merged.check()
