"""Golden values measured from facebookresearch/DomainBed @ b93c22a."""

import hashlib
import json

import pytest

from domainbed_ext.data.splits import holdout_split, split
from domainbed_ext.seeds import seed_hash


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
    assert seed_hash("PACS", "BOnly@rank=16", [3], 2, 1) == 2073209754


def test_seed_hash_of_other_values():
    assert [seed_hash(0), seed_hash("a", None, 0.5, True)] == [1003224347, 336944578]


def test_split_shuffles_as_domainbed():
    first, rest = split(list(range(10)), 4, 894182419)
    assert first + rest == [2, 3, 8, 1, 4, 5, 0, 9, 6, 7]
    assert len(first) == 4


def test_holdout_is_the_floor_of_its_share_and_disjoint():
    held_out, kept = holdout_split(2048, 0.2, trial_seed=0, environment=0)
    assert len(held_out) == 409
    assert sorted(held_out + kept) == list(range(2048))
    assert held_out != holdout_split(2048, 0.2, trial_seed=1, environment=0)[0]


@pytest.mark.parametrize(
    ("sizes", "firsts", "digest"),
    [
        pytest.param(
            (1415, 2656, 3282, 3376),
            [(283, 222, 508), (531, 87, 2095), (656, 1126, 1820), (675, 354, 2044)],
            "8d6c78ae3bdd55ab014ea2fd74bfe487",
            id="VLCS",
        ),
        pytest.param(
            (2048, 2344, 1670, 3929),
            [(409, 548, 895), (468, 1488, 1129), (334, 1441, 764), (785, 2743, 2874)],
            "d3f788fd20bc2da418a2f4afbf8cb004",
            id="PACS",
        ),
        pytest.param(
            (2427, 4365, 4439, 4357),
            [(485, 822, 2104), (873, 2980, 2442), (887, 3805, 4057), (871, 3129, 592)],
            "67058f9150ddea6e2f1dfefb82765162",
            id="OfficeHome",
        ),
        pytest.param(
            (4741, 9736, 3970, 5883),
            [(948, 3653, 3298), (1947, 9096, 2147), (794, 153, 816), (1176, 5286, 3645)],
            "5cf6456656a1456424853c3639f88d6f",
            id="TerraIncognita",
        ),
    ],
)
def test_splits_of_the_data_sets(sizes, firsts, digest):
    """By trial 0: the size of `out`, its first sample and that of `in`. By all of three trials: a digest."""
    splits = [holdout_split(size, 0.2, trial, env) for trial in range(3) for env, size in enumerate(sizes)]
    assert [(len(out), out[0], kept[0]) for out, kept in splits[:4]] == firsts
    text = "".join(json.dumps([out, kept]) for out, kept in splits)
    assert hashlib.md5(text.encode()).hexdigest() == digest


def test_the_split_for_adaptation_is_of_the_in_split_by_the_same_seed():
    _, kept = holdout_split(2048, 0.2, trial_seed=0, environment=0)
    uda, rest = split(kept, int(len(kept) * 0.25), seed_hash(0, 0))
    assert (len(uda), uda[:5]) == (409, [701, 718, 2, 645, 733])
    assert (len(rest), rest[:5]) == (1230, [603, 1748, 166, 942, 1823])
