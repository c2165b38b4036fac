"""Single-source figures, by hand."""

import math
import statistics

import pytest

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.report.results import Results

ENVIRONMENTS = ["A", "C", "P"]
SIZES = {"in": 80, "out": 20}


def record(source, step, ins, outs, trial_seed=0, hparams_seed=0, algorithm="BOnly", run=None, **args):
    args = {
        "dataset": "Toy",
        "algorithm": algorithm,
        "test_envs": [env for env in range(len(ins)) if env != source],
        "trial_seed": trial_seed,
        "hparams_seed": hparams_seed,
        "protocol": "single_source",
        **args,
    }
    accuracies = {f"env{env}_in_acc": value for env, value in enumerate(ins)}
    accuracies |= {f"env{env}_out_acc": value for env, value in enumerate(outs)}
    sizes = {f"env{env}_{split}": size for env in range(len(ins)) for split, size in SIZES.items()}
    run = run or f"{algorithm}-{source}-{trial_seed}-{hparams_seed}"
    facts = {"environments": ENVIRONMENTS, "split_sizes": sizes, "trainable_parameters": 10 + trial_seed}
    return {"args": args, "hparams": {"lr": 0.1}, "step": step, "run": run, **facts, **accuracies}


def left_out(algorithm="BA"):
    return record(1, 0, [0.9, 0.5, 0.9], [0.8, 0.5, 0.8], algorithm=algorithm, protocol="leave_one_out", test_envs=[1])


def two_trials():
    """Source 1. Trial 0 selects step 5 of hparams_seed 2, trial 1 its only record."""
    return [
        record(1, 0, [0.1, 0.9, 0.1], [0.9, 0.6, 0.9]),  # a better holdout elsewhere does not count
        record(1, 5, [0.2, 0.9, 0.2], [0.0, 0.7, 0.0]),
        record(1, 0, [0.3, 0.9, 0.3], [0.0, 0.5, 0.0], hparams_seed=2),
        record(1, 5, [0.50, 0.95, 0.30], [0.60, 0.70, 0.80], hparams_seed=2),  # ties with hparams_seed 0: the last
        record(1, 9, [0.6, 0.9, 0.6], [0.0, 0.70, 0.0], hparams_seed=2),  # ties with step 5: the earliest
        record(1, 5, [0.60, 0.85, 0.40], [0.70, 0.80, 0.90], trial_seed=1),
    ]


def comparison(records, source=1):
    return Results(records).single_source.comparison("Toy", source)


def test_selection_is_by_the_sources_holdout():
    single = Results(two_trials()).single_source
    first, second = single.comparison("Toy", 1).scores("BOnly")
    assert (first.trial_seed, first.record["step"], first.record["args"]["hparams_seed"]) == (0, 5, 2)
    assert (first.selection.val_acc, first.value("in_domain")) == (0.7, 0.7)
    assert (first.value("out_of_domain", 0), first.value("out_of_domain", 2)) == (0.5, 0.3)
    assert (first.value("train"), first.value("out_of_domain")) == (0.95, 0.4)
    gaps = first.value("gap_source"), first.value("gap_target", 0), first.value("gap_target")
    assert gaps == pytest.approx((0.25, 0.45, 0.55))
    assert (second.trial_seed, second.value("out_of_domain")) == (1, 0.5)
    assert (single.environments, single.sources, single.algorithms) == ({"Toy": ENVIRONMENTS}, {"Toy": [1]}, ["BOnly"])


def test_nan_loses_and_other_sources_are_apart():
    records = [
        record(0, 0, [0.9, 0.1, 0.1], [math.nan, 0, 0]),
        record(0, 1, [0.9, 0.2, 0.2], [0.0, 0, 0]),
        record(2, 0, [0.3, 0.3, 0.9], [0, 0, 0.9], algorithm="AOnly"),
    ]
    single = Results(records).single_source
    assert single.sources == {"Toy": [0, 2]} and single.algorithms == ["BOnly", "AOnly"]
    assert [score.record["step"] for score in single.comparison("Toy", 0).scores("BOnly")] == [1]
    assert single.comparison("Toy", 2).scores("BOnly") == [] and single.comparison("Toy", 2).algorithms == ["AOnly"]


def test_summaries_are_means_and_sample_standard_deviations_in_percent():
    trials = comparison(two_trials())
    summary = trials.summary("BOnly", "out_of_domain")  # 40 and 50
    assert (summary.mean, summary.err, summary.trials) == pytest.approx((45, statistics.stdev([40, 50]), 2))
    inside = trials.summary("BOnly", "in_domain")  # 70 and 80
    assert (inside.mean, inside.err) == pytest.approx((75, 50**0.5))
    assert trials.summary("BOnly", "gap_target").mean == pytest.approx((55 + 35) / 2)
    assert trials.summary("BOnly", "gap_target", 2).mean == pytest.approx((65 + 45) / 2)
    assert trials.summary("BOnly", "train").mean == pytest.approx(90)
    assert math.isnan(comparison(two_trials()[:1]).summary("BOnly", "train").err)
    assert trials.summary("BA", "train") is None


def test_what_is_incomplete_is_said():
    trials = comparison([*two_trials(), record(1, 0, [0.5] * 3, [0.5] * 3, algorithm="BA")])
    assert trials.incomplete("BA") == "1 of 2 trials"
    assert trials.incomplete("BOnly") == trials.incomplete("AOnly") == ""


def test_test_on_all_weighs_the_splits_by_their_sizes():
    (score,) = comparison([record(1, 0, [0.5, 0.9, 0.3], [0.6, 0.7, 0.8], test_on="all")]).scores("BOnly")
    assert score.value("out_of_domain", 0) == pytest.approx(0.8 * 0.5 + 0.2 * 0.6)
    assert score.value("out_of_domain", 2) == pytest.approx(0.8 * 0.3 + 0.2 * 0.8)
    assert (score.value("in_domain"), score.value("train")) == (0.7, 0.9)  # the source's splits stay what they are


def test_both_protocols_in_one_folder_stay_apart():
    results = Results([*two_trials(), left_out()])
    assert results.leave_one_out.algorithms == ["BA"] and results.single_source.algorithms == ["BOnly"]
    assert results.algorithms == ["BA", "BOnly"]
    assert results.leave_one_out.environments == results.single_source.environments == {"Toy": ENVIRONMENTS}
    assert Results([left_out()]).single_source is None
    alone = Results(two_trials())
    assert (alone.leave_one_out, alone.duplicates(), len(alone.records)) == (None, "", 6)


def test_of_two_environments_both_protocols_have_the_same_test_envs():
    single = record(0, 0, [0.9, 0.5], [0.8, 0.5], run="a") | {"environments": ["x", "y"]}
    other = {**single, "run": "b", "args": {**single["args"], "protocol": "leave_one_out"}}
    results = Results([single, other])
    assert not results.duplicates()
    assert results.leave_one_out.algorithms == results.single_source.algorithms == ["BOnly"]


def test_tidy_and_selected_name_protocol_and_source():
    results = Results([*two_trials(), left_out()])
    tidy = results.tidy()
    assert set(tidy["protocol"]) == {"leave_one_out", "single_source"}
    rows = tidy[tidy["protocol"] == "single_source"].set_index(["metric", "environment"])
    assert set(rows["source"]) == {"C"} and set(rows["selection"]) == {"source-holdout"}
    assert set(tidy[tidy["protocol"] == "leave_one_out"]["source"]) == {""}
    assert {env for metric, env in rows.index if metric == "gap_target"} == {"A", "P", "Avg"}
    assert rows.loc[("out_of_domain", "Avg"), "mean"] == pytest.approx(45)
    assert rows.loc[("in_domain", "C"), "mean"] == pytest.approx(75)
    assert rows.loc[("gap_source", "C"), "mean"] == pytest.approx(15)
    assert rows.loc[("trainable_parameters", "Avg"), "mean"] == 10.5
    selected = results.selected()
    rows = selected[selected["protocol"] == "single_source"]
    assert list(rows["run"]) == ["BOnly-1-0-2", "BOnly-1-1-0"]
    assert list(rows["gap_target"]) == pytest.approx([0.55, 0.35])
    assert set(rows["label"]) == {"LoRA-FA"} and set(tidy["label"]) == {"LoRA", "LoRA-FA"}


def test_a_record_that_is_no_single_source_is_refused():
    with pytest.raises(BenchmarkError, match="run x is called single_source but was trained on 2 environments"):
        Results([record(1, 0, [0.5] * 3, [0.5] * 3, test_envs=[0], run="x")])
    without = record(1, 0, [0.5] * 3, [0.5] * 3, test_on="all", run="x")
    del without["split_sizes"]
    with pytest.raises(BenchmarkError, match="--test_on all. but records no split_sizes"):
        Results([without])
