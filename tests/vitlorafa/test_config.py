import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitlorafa import INITS, TARGETS, AdapterConfig, AdapterError


def test_defaults():
    config = AdapterConfig()
    assert (config.rank, config.alpha, config.scale, config.train) == (8, 16.0, 2.0, "B")
    assert (config.init_A, config.init_B, config.targets) == ("orthonormal", "zero", ("q", "v"))


@pytest.mark.parametrize(
    ("train", "inits"),
    [("B", ("orthonormal", "zero")), ("A", ("zero", "orthonormal")), ("BA", ("kaiming_uniform", "zero"))],
)
def test_start_depends_on_what_trains(train, inits):
    config = AdapterConfig(train=train)
    assert (config.init_A, config.init_B) == inits


def test_scale():
    assert AdapterConfig(rank=4, alpha=1).scale == 0.25
    assert AdapterConfig(rank=16, alpha=8, rank_stabilised=True).scale == 2.0
    assert AdapterConfig(rank=3).scale == 2.0


@pytest.mark.parametrize(
    ("given_targets", "kept"),
    [
        ("all", TARGETS),
        ("v, q", ("q", "v")),
        (["fc2", "k", "k"], ("k", "fc2")),
        (("proj",), ("proj",)),
        ({"fc1"}, ("fc1",)),
    ],
)
def test_targets_in_canonical_order(given_targets, kept):
    assert AdapterConfig(targets=given_targets).targets == kept


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdapterConfig().rank = 4  # type: ignore[misc]


@given(
    rank=st.integers(1, 64),
    alpha=st.none() | st.floats(1e-3, 1e3),
    train=st.sampled_from(["A", "B", "BA"]),
    targets=st.sets(st.sampled_from(TARGETS), min_size=1),
    dropout=st.floats(0, 0.99),
    seed=st.none() | st.integers(0, 2**40),
    rank_stabilised=st.booleans(),
)
def test_json_round_trip(**kwargs):
    config = AdapterConfig(**kwargs)
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"rank": True}, "rank must be a whole number"),
        ({"rank": "8"}, "rank must be a whole number"),
        ({"alpha": 0}, "alpha must be finite and above 0"),
        ({"alpha": math.inf}, "alpha must be finite"),
        ({"alpha": math.nan}, "alpha must be finite"),
        ({"alpha": "big"}, "alpha must be a number, not 'big'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout must be at least 0"),
        ({"dropout": None}, "dropout must be a number"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"rank_stabilised": "no"}, "rank_stabilised must be True or False"),
        ({"train": "AB"}, "unknown choice of trained factors 'AB'"),
        ({"train": "none"}, "choose from B, A, BA"),
        ({"train": []}, "unknown choice of trained factors"),
        ({"init_A": "orthogonal"}, "unknown initialisation of A 'orthogonal': did you mean 'orthonormal'"),
        ({"init_B": ["zero"]}, "unknown initialisation of B"),
        ({"targets": "q,fc3"}, "unknown target 'fc3': did you mean 'fc"),
        ({"targets": "qkv"}, "unknown target 'qkv'"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": 3}, "targets must be names or 'all', not 3"),
        ({"targets": [["q"]]}, "unknown target"),
        ({"init_A": "zero"}, "A and B both start at zero"),
        ({"init_B": "gaussian"}, "one of them must start at zero"),
        ({"train": "B", "init_A": "zero", "init_B": "gaussian"}, "A starts at zero but is frozen"),
        ({"train": "A", "init_A": "gaussian", "init_B": "zero"}, "B starts at zero but is frozen"),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(AdapterError, match=message):
        AdapterConfig(**kwargs)


def test_unknown_field_names_the_nearest():
    with pytest.raises(AdapterError, match="unknown field of AdapterConfig 'ranks': did you mean 'rank'"):
        AdapterConfig.from_dict({"ranks": 4})


@pytest.mark.parametrize("name", sorted(set(INITS) - {"zero"}))
def test_any_start_for_a_frozen_factor(name):
    assert AdapterConfig(train="B", init_A=name).init_A == name
    assert AdapterConfig(train="A", init_B=name).init_B == name
