import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import (
    LEAVE_ONE_DOMAIN_OUT,
    ORACLE,
    SELECTION_METHODS,
    TRAINING_DOMAIN,
    Group,
    best_step,
    better,
    get_selection_method,
    group_records,
    target_accuracy,
    validation_accuracy,
)
from domainbed_ext.report.results import Results

NAN = math.nan


def record(test_envs, step, ins, outs, hparams_seed=0, trial_seed=0, algorithm="BOnly", dataset="PACS"):
    """One line of results.jsonl; accuracies by environment."""
    args = {
        "dataset": dataset,
        "algorithm": algorithm,
        "test_envs": test_envs,
        "trial_seed": trial_seed,
        "hparams_seed": hparams_seed,
    }
    accuracies = {f"env{env}_in_acc": value for env, value in enumerate(ins)}
    accuracies |= {f"env{env}_out_acc": value for env, value in enumerate(outs)}
    run = f"{dataset}-{algorithm}-{'-'.join(map(str, test_envs))}-{trial_seed}-{hparams_seed}"
    return {"args": args, "hparams": {"lr": 1e-3}, "step": step, "run": run, **accuracies}


def chosen(selection):
    return selection.hparams_seed, selection.step, selection.val_acc, selection.test_acc


def test_a_pair_enters_two_groups():
    pair = record([1, 2], 0, [0] * 3, [0] * 3)
    assert group_records([pair]) == {Group(0, "PACS", "BOnly", 1): [pair], Group(0, "PACS", "BOnly", 2): [pair]}


def test_training_domain_leaves_the_test_environment_out():
    records = [
        record([0], 0, [0.10, 0, 0], [0.9, 0.5, 0.6]),  # mean of the training environments' holdouts: 0.55
        record([0], 5, [0.20, 0, 0], [0.0, 0.7, 0.6]),  # 0.65
        record([0], 9, [0.30, 0, 0], [0.9, 0.6, 0.6]),  # 0.60
    ]
    assert chosen(TRAINING_DOMAIN.select(records, 0)) == (0, 5, pytest.approx(0.65), 0.20)


def test_oracle_takes_the_last_step():
    records = [
        record([1], 0, [0, 0.9, 0], [0, 0.9, 0]),
        record([1], 5, [0, 0.3, 0], [0, 0.4, 0]),
        record([1], 5, [0, 0.2, 0], [0, 0.5, 0], hparams_seed=1),
    ]
    assert chosen(ORACLE.select(records, 1)) == (1, 5, 0.5, 0.2)


def test_leave_one_domain_out_reads_the_pair_runs():
    records = [
        record([0], 0, [0.11, 0, 0], [0] * 3),
        record([0], 5, [0.22, 0, 0], [0] * 3),
        record([0, 1], 0, [0, 0.8, 0], [0] * 3),
        record([0, 1], 5, [0, 0.4, 0], [0] * 3),
        record([0, 2], 0, [0, 0, 0.2], [0] * 3),
        record([0, 2], 5, [0, 0, 0.5], [0] * 3),
    ]
    assert chosen(LEAVE_ONE_DOMAIN_OUT.select(records, 0)) == (0, 0, 0.5, 0.11)
    # The run without a pair at step 0 leaves step 5 as the only candidate.
    assert chosen(LEAVE_ONE_DOMAIN_OUT.select(records[:2] + records[3:], 0)) == (0, 5, 0.45, 0.22)
    assert LEAVE_ONE_DOMAIN_OUT.select(records[:4], 0) is None
    assert LEAVE_ONE_DOMAIN_OUT.select(records[2:], 0) is None


@pytest.mark.parametrize("selection_method", [TRAINING_DOMAIN, ORACLE])
def test_pairs_are_never_scored_themselves(selection_method):
    assert selection_method.select([record([0, 1], 0, [1] * 3, [1] * 3)], 0) is None


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"trial_seed": "0"}, "args"),
        ({"test_envs": None}, "args"),
        ({"dataset": 3}, "args"),
        ({"hparams_seed": None}, None),
        (None, "'args'"),
    ],
)
def test_a_record_with_unusable_arguments_is_named(args, why):
    good, bad = record([0], 0, [0.1, 0], [0, 0.5]), record([0], 0, [0.2, 0], [0, 0.5])
    bad = {"run": "b", "step": 0} if args is None else {**bad, "run": "b", "args": {**bad["args"], **args}}
    if why is None:
        assert len(group_records([good, bad])) == 1
        return
    with pytest.raises(BenchmarkError, match=f"a record of run 'b' has no usable {why}$"):
        group_records([good, bad])


def test_ties_go_to_the_earliest_step_and_the_last_hparams_seed():
    records = [
        record([0], step, [test_acc, 0], [0, 0.5], hparams_seed=seed)
        for seed, step, test_acc in [(0, 0, 0.1), (0, 5, 0.2), (10, 0, 0.3), (10, 5, 0.4), (2, 0, 0.5)]
    ]
    assert chosen(TRAINING_DOMAIN.select(records, 0)) == (10, 0, 0.5, 0.3)


def test_nan_is_worse_than_any_number():
    step_nan = [record([0], 0, [0.1, 0], [0, NAN]), record([0], 5, [0.2, 0], [0, 0.0])]
    seed_nan = [record([0], 0, [0.3, 0], [0, NAN], hparams_seed=1)]
    assert chosen(TRAINING_DOMAIN.select(step_nan + seed_nan, 0)) == (0, 5, 0.0, 0.2)
    assert TRAINING_DOMAIN.select(seed_nan, 0).test_acc == 0.3  # there is nothing else


accuracies = st.sampled_from([0.0, 0.25, 0.5, NAN])  # few values: many ties


@st.composite
def sweeps(draw):
    """All runs with one and two test environments of three, some missing, two hparams_seeds, two steps."""
    return [
        record(
            test_envs,
            step,
            draw(st.lists(accuracies, min_size=3, max_size=3)),
            draw(st.lists(accuracies, min_size=3, max_size=3)),
            hparams_seed=seed,
        )
        for test_envs in ([0], [1], [2], [0, 1], [0, 2], [1, 2])
        for seed in (0, 1)
        if draw(st.integers(0, 9))
        for step in (0, 5)
    ]


@settings(deadline=None)
@given(records=sweeps(), seed=st.integers())
def test_the_order_of_records_does_not_matter(records, seed):
    shuffled = random.Random(seed).sample(records, len(records))
    groups, again = group_records(records), group_records(shuffled)
    assert list(groups) == list(again)
    for each in SELECTION_METHODS.values():
        for group, members in groups.items():
            one, other = each.select(members, group.test_env), each.select(again[group], group.test_env)
            assert (one and one.record) is (other and other.record)


@settings(deadline=None)
@given(records=sweeps())
def test_the_chosen_record_is_of_the_group_and_as_good_as_any(records):
    for group, members in group_records(records).items():
        selection = TRAINING_DOMAIN.select(members, group.test_env)
        if selection is None:
            assert all(len(member["args"]["test_envs"]) > 1 for member in members)
            continue
        assert selection.record["args"]["test_envs"] == [group.test_env]
        others = [env for env in range(3) if env != group.test_env]
        means = [
            sum(member[f"env{env}_out_acc"] for env in others) / 2
            for member in members
            if member["args"]["test_envs"] == [group.test_env]
        ]
        assert math.isnan(selection.val_acc) or selection.val_acc == max(mean for mean in means if not math.isnan(mean))


# Lean evaluation


STEPS = (0, 5, 9)


@st.composite
def runs_of_three_steps(draw):
    """Runs of three environments, one a list; single-source or with one test environment."""
    single_source = draw(st.booleans())
    options = {"test_on": draw(st.sampled_from(["in", "all"]))} | (
        {"protocol": "single_source"} if single_source else {}
    )
    runs = []
    for env in range(3):
        for hparams_seed in (0, 1):
            for trial_seed in (0, 1):
                others = [other for other in range(3) if other != env]
                values = [draw(st.lists(accuracies, min_size=6, max_size=6)) for _ in STEPS]
                run = [
                    record(others if single_source else [env], step, of[:3], of[3:], hparams_seed, trial_seed)
                    for step, of in zip(STEPS, values, strict=True)
                ]
                for each in run:
                    each["args"] |= options
                    each["split_sizes"] = {f"env{i}_{split}": 4 + i for i in range(3) for split in ("in", "out")}
                runs.append(run)
    return runs


def lean(run):
    """What a lean run would have recorded: all at the best step and at the last, else holdouts it trains beside."""
    best, records = best_step(run), []
    for each in run:
        kept = dict(each, args={**each["args"], "evaluate": "lean"})
        if each is not best and each is not run[-1]:
            needed = {f"env{env}_out_acc" for env in range(3) if env not in each["args"]["test_envs"]}
            kept = {k: v for k, v in kept.items() if not (k.endswith("_acc") and k not in needed)}
        records.append(kept)
    return records


@settings(deadline=None)
@given(runs=runs_of_three_steps())
def test_lean_evaluation_gives_the_same_tables(runs):
    whole = Results([each for run in runs for each in run])
    part = Results([each for run in runs for each in lean(run)])
    assert [each.environments for each in part.figures] == [each.environments for each in whole.figures]
    for ours, theirs in ((part.tidy(), whole.tidy()), (part.selected(), whole.selected())):
        assert len(ours) and ours.equals(theirs)


@settings(deadline=None)
@given(runs=runs_of_three_steps())
def test_the_saved_step_is_the_selected_one(runs):
    for run in runs:
        best = None
        for each in run:
            if better(validation_accuracy(each), best):
                best, saved = validation_accuracy(each), each
        assert best_step(run) is saved


def test_a_figure_that_a_lean_run_did_not_evaluate_is_missing_not_wrong():
    single = [record([0], step, [0.1, 0, 0], [0, out, out]) for step, out in ((0, 0.9), (5, 0.5), (9, 0.4))]
    for each in single:
        each["split_sizes"] = {f"env{env}_{split}": 5 for env in range(3) for split in ("in", "out")}
    pairs = [
        record([0, env], step, [value] * 3, [0] * 3) for env in (1, 2) for step, value in ((0, 0.1), (5, 0.9), (9, 0.2))
    ]
    assert LEAVE_ONE_DOMAIN_OUT.select([*single, *pairs], 0).step == 5
    kept = lean(single)
    assert "env0_in_acc" not in kept[1] and LEAVE_ONE_DOMAIN_OUT.select([*kept, *pairs], 0) is None
    del kept[0]["env0_in_acc"]  # a run under way, not yet at its last step
    assert all(method.select(kept[:2], 0) is None for method in (ORACLE, TRAINING_DOMAIN))


def test_all_of_a_test_environment_is_its_splits_by_size():
    whole = record([0], 0, [0.5, 0], [0.8, 0.3]) | {
        "env0_uda_acc": 0.2,
        "split_sizes": {"env0_in": 60, "env0_out": 20, "env0_uda": 20, "env1_in": 8, "env1_out": 2},
    }
    assert target_accuracy(whole, 0) == 0.5
    whole["args"]["test_on"] = "all"
    assert target_accuracy(whole, 0) == pytest.approx(0.6 * 0.5 + 0.2 * 0.8 + 0.2 * 0.2)
    assert TRAINING_DOMAIN.select([whole], 0).test_acc == target_accuracy(whole, 0)


def test_pairs_that_are_missing_are_named():
    names = {"environments": ["x", "y", "z"]}
    singles = [record([env], 0, [0.5] * 3, [0.5] * 3) | names for env in range(3)]
    pairs = [record([0, 1], 0, [0.5] * 3, [0.5] * 3), record([0, 2], 0, [0.5] * 3, [0.5] * 3)]

    def pairs_of(*records):
        return Results(list(records)).leave_one_out.pairs

    assert pairs_of(*singles, *pairs).missing("PACS", "BOnly") == [("y", "z")]
    assert pairs_of(*singles, *pairs).sentence("PACS") == (
        "Leave-one-domain-out cross-validation needs a run for every pair of test environments; missing on PACS: "
        "BOnly (y+z). Launch the sweep with --pairs."
    )
    assert "BOnly (all 3)" in pairs_of(*singles).sentence("PACS")
    whole = [*singles, *pairs, record([1, 2], 0, [0.5] * 3, [0.5] * 3)]
    assert pairs_of(*whole).missing("PACS", "BOnly") == [] and pairs_of(*whole).sentence("PACS") == ""
    # A pair of one trial does not serve another.
    second_trial = record([0], 0, [0.5] * 3, [0.5] * 3, trial_seed=1)
    assert len(pairs_of(*whole, second_trial).missing("PACS", "BOnly")) == 2


def test_names_and_bad_input():
    assert get_selection_method("oracle") is get_selection_method("test-domain validation set (oracle)") is ORACLE
    with pytest.raises(BenchmarkError, match="did you mean 'training-domain'"):
        get_selection_method("trainig-domain")
    incomplete = record([0], 0, [0.1, 0], [0, 0.1])
    del incomplete["env0_in_acc"]
    with pytest.raises(BenchmarkError, match="env0_in_acc at step 0"):
        TRAINING_DOMAIN.select([incomplete], 0)
    with pytest.raises(BenchmarkError, match="a record of run 'x'"):
        group_records([{"run": "x", "args": {"dataset": "PACS"}}])
