"""Golden values measured from facebookresearch/DomainBed @ b93c22a."""

import pytest

from domainbed_ext.seeds import holdout_split, seed_hash, split


@pytest.mark.parametrize(
    ("trial", "seeds"),
    [
        (0, [894182419, 1514274641, 1325548499, 1796103049]),
        (1, [785910682, 1442673865, 1981683110, 1739848239]),
        (2, [472130416, 181139023, 248334461, 1709828778]),
    ],
)
def test_seed_hash_of_a_split(trial, seeds):
    assert [seed_hash(trial, environment) for environment in range(4)] == seeds


def test_seed_hash_of_a_job():
    assert seed_hash("VLCS", "ERM", [0], 0, 0) == 1721972278
    assert seed_hash("VLCS", "ERM", [1, 2], 1, 0) == 360234358


def test_split_shuffles_as_domainbed():
    first, rest = split(list(range(10)), 4, 894182419)
    assert first + rest == [2, 3, 8, 1, 4, 5, 0, 9, 6, 7]
    assert len(first) == 4


def test_holdout_is_the_floor_of_its_share_and_disjoint():
    held_out, kept = holdout_split(2048, 0.2, trial_seed=0, environment=0)
    assert len(held_out) == 409
    assert sorted(held_out + kept) == list(range(2048))
    assert held_out != holdout_split(2048, 0.2, trial_seed=1, environment=0)[0]
