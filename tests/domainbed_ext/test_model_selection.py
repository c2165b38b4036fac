import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import (
    LEAVE_ONE_DOMAIN_OUT,
    ORACLE,
    SELECTION_METHODS,
    TRAINING_DOMAIN,
    Group,
    group_records,
    method,
)

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


@given(records=sweeps(), seed=st.integers())
def test_the_order_of_records_does_not_matter(records, seed):
    shuffled = random.Random(seed).sample(records, len(records))
    groups, again = group_records(records), group_records(shuffled)
    assert list(groups) == list(again)
    for each in SELECTION_METHODS.values():
        for group, members in groups.items():
            one, other = each.select(members, group.test_env), each.select(again[group], group.test_env)
            assert (one and one.record) is (other and other.record)


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


def test_names_and_bad_input():
    assert method("oracle") is method("test-domain validation set (oracle)") is ORACLE
    with pytest.raises(BenchmarkError, match="did you mean 'training-domain'"):
        method("trainig-domain")
    incomplete = record([0], 0, [0.1, 0], [0, 0.1])
    del incomplete["env0_in_acc"]
    with pytest.raises(BenchmarkError, match="env0_in_acc at step 0"):
        TRAINING_DOMAIN.select([incomplete], 0)
    with pytest.raises(BenchmarkError, match="a record of run 'x'"):
        group_records([{"run": "x", "args": {"dataset": "PACS"}}])
