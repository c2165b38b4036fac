import copy
import dataclasses
import inspect
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
        ("qkv", ("q", "k", "v")),
        (["proj", "qkv"], ("q", "k", "v", "proj")),
        ("all-linear", TARGETS),
        (["all"], TARGETS),
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
    blocks=st.none() | st.sets(st.integers(-40, 40), min_size=1),
)
def test_json_round_trip(**kwargs):
    config = AdapterConfig(**kwargs)
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"rank": 0}, ["rank", "at least 1", "0"]),
        ({"rank": 2.5}, ["rank", "whole number", "2.5"]),
        ({"rank": True}, ["rank", "whole number", "True"]),
        ({"rank": "8"}, ["rank", "whole number", "'8'"]),
        ({"alpha": 0}, ["alpha", "above 0", "0"]),
        ({"alpha": math.inf}, ["alpha", "finite", "inf"]),
        ({"alpha": math.nan}, ["alpha", "finite", "nan"]),
        ({"alpha": "big"}, ["alpha", "number", "'big'"]),
        ({"dropout": 1.0}, ["dropout", "below 1", "1.0"]),
        ({"dropout": -0.1}, ["dropout", "at least 0", "-0.1"]),
        ({"dropout": None}, ["dropout", "number", "None"]),
        ({"seed": -1}, ["seed", "whole number", "-1"]),
        ({"rank_stabilised": "no"}, ["rank_stabilised", "True or False", "'no'"]),
        ({"train": "ABC"}, ["trained factors", "'ABC'"]),
        ({"train": "none"}, ["'none'", "B, A, BA", "LoRA-FA"]),
        ({"train": "LoRA-FC"}, ["'LoRA-FC'", "'LoRA-F"]),
        ({"train": []}, ["trained factors", "[]"]),
        ({"init_A": "orthogonal"}, ["initialisation of A", "'orthogonal'", "'orthonormal'"]),
        ({"init_A": "svd"}, ["'svd'", "'singular'"]),
        ({"init_B": ["zero"]}, ["initialisation of B", "['zero']"]),
        ({"targets": "q,fc3"}, ["target", "'fc3'", "'fc1'", "'fc2'"]),
        ({"targets": "query"}, ["target", "'query'", "'q'"]),
        ({"targets": ()}, ["targets", "empty", "'all'"]),
        ({"targets": 3}, ["targets", "'all'", "3"]),
        ({"targets": [["q"]]}, ["target", "['q']"]),
        ({"compute": "merged"}, ["'merged'", "'folded'"]),
        ({"init_A": "zero"}, ["A and B", "zero", "init_A", "init_B"]),
        ({"init_B": "gaussian"}, ["init_B", "'gaussian'", "'zero'"]),
        ({"train": "B", "init_A": "zero", "init_B": "gaussian"}, ["A starts at zero", "frozen", "init_A"]),
        ({"train": "A", "init_A": "gaussian", "init_B": "zero"}, ["B starts at zero", "frozen", "init_B"]),
        ({"init_A": "orthonormal,q=gausian"}, ["initialisation of A", "'gausian'", "'gaussian'"]),
        ({"init_A": {"w": "gaussian"}}, ["target", "'w'"]),
        ({"init_A": {"fc2": "gaussian"}}, ["init_A", "fc2", "add it to targets", "q, v"]),
        ({"init_A": "q=zero"}, ["A and B", "zero"]),
        ({"init_A": "pissa", "init_B": "zero"}, ["'pissa'", "'zero'", "both factors"]),
        ({"init_A": "pissa", "init_B": "milora"}, ["'pissa'", "'milora'", "both factors"]),
        ({"init_A": "q=pissa,v=gaussian", "init_B": "pissa"}, ["'pissa'", "'gaussian'", "both factors"]),
        ({"blocks": "0-5,x"}, ["blocks", "'x'", "'last4'"]),
        ({"blocks": "5-0"}, ["blocks", "'5-0'", "no block"]),
        ({"blocks": "last0"}, ["blocks", "'last0'", "no block"]),
        ({"blocks": ()}, ["blocks", "empty"]),
        ({"blocks": ""}, ["blocks", "''"]),
        ({"blocks": [0, True]}, ["blocks", "True"]),
        ({"blocks": 1.5}, ["blocks", "1.5"]),
        ({"blocks": [0], "layers_to_transform": [0]}, ["blocks and layers_to_transform"]),
        ({"ranks": 4}, ["AdapterConfig", "'ranks'", "'rank'"]),
        ({"init_lora_weights": "gaussian"}, ["'init_lora_weights'", "'init_A'"]),
        ({"lora_alfa": 8}, ["'lora_alfa'", "'lora_alpha'"]),
        ({"rank": 4, "r": 8}, ["rank and r", "AdapterConfig"]),
        ({"lora_alpha": 4, "alpha": 4}, ["lora_alpha and alpha"]),
    ],
)
def test_an_error_names_the_field_the_value_and_the_remedy(kwargs, named):
    for construct in (AdapterConfig, lambda **values: AdapterConfig.from_dict(values)):
        with pytest.raises(AdapterError) as error:
            construct(**kwargs)
        assert [word for word in named if word not in str(error.value)] == []


def test_pefts_names_are_the_same_config_and_one_spelling_is_kept():
    config = AdapterConfig(r=4, lora_alpha=6, lora_dropout=0.1, target_modules="all-linear", use_rslora=True)
    assert config == AdapterConfig(rank=4, alpha=6, dropout=0.1, targets="all", rank_stabilised=True)
    assert config.to_dict().keys() == {field.name for field in dataclasses.fields(AdapterConfig)}
    assert dataclasses.replace(config, rank=2).rank == 2 and copy.deepcopy(config) == config
    assert list(inspect.signature(AdapterConfig).parameters) == list(config.to_dict())


@pytest.mark.parametrize(
    ("name", "train"),
    [
        ("LoRA", "BA"),
        ("LoRA-FA", "B"),
        ("LoRA-FB", "A"),
        ("lora_fa", "B"),
        ("lora fb", "A"),
        ("BOnly", "B"),
        ("AB", "BA"),
    ],
)
def test_names_of_methods_say_which_factors_train(name, train):
    assert AdapterConfig(train=name) == AdapterConfig(train=train)
    assert AdapterConfig(train=name).to_dict()["train"] == train


@pytest.mark.parametrize("name", sorted(set(INITS) - {"zero"}))
def test_any_start_for_a_frozen_factor(name):
    assert AdapterConfig(train="B", init_A=name).init_A == name
    assert AdapterConfig(train="A", init_B=name).init_B == name


@pytest.mark.parametrize(
    ("given", "kept", "by_target"),
    [
        ("uniform", "uniform", {"q": "uniform", "fc2": "uniform"}),
        ("uniform,fc2=gaussian", "q=uniform,v=uniform,fc2=gaussian", {"q": "uniform", "fc2": "gaussian"}),
        ({"all": "uniform", "fc2": "gaussian"}, "q=uniform,v=uniform,fc2=gaussian", {"fc2": "gaussian"}),
        ("qkv=singular", "q=singular,v=singular,fc2=orthonormal", {"v": "singular", "fc2": "orthonormal"}),
        ("fc2=gaussian, all=uniform", "uniform", {"fc2": "uniform"}),  # the last one counts
    ],
)
def test_an_initialisation_by_target(given, kept, by_target):
    config = AdapterConfig(targets="q,v,fc2", init_A=given)
    assert config.init_A == kept and config.init_B == "zero"
    assert {target: config.inits(target) for target in by_target} == {
        t: (name, "zero") for t, name in by_target.items()
    }
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert AdapterConfig(targets="q,v,fc2", init_A=kept) == config and hash(config) == hash(config)


@pytest.mark.parametrize("train", ["B", "A", "BA"])
@pytest.mark.parametrize("name", ["pissa", "milora"])
def test_a_start_of_both_factors_is_given_once(name, train):
    one = AdapterConfig(train=train, init_A=name)
    assert one == AdapterConfig(train=train, init_B=name) == AdapterConfig(train=train, init_A=name, init_B=name)
    mixed = AdapterConfig(train=train, init_B=f"v={name}")
    assert mixed.inits("v") == (name, name) and mixed.inits("q") == AdapterConfig(train=train).inits("q")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("0-5", (0, 1, 2, 3, 4, 5)),
        ("last4", (-4, -3, -2, -1)),
        ("first2, -1", (0, 1, -1)),
        ("0,2,4-6,5", (0, 2, 4, 5, 6)),
        ("-3--1", (-3, -2, -1)),
        ([3, -1], (3, -1)),
        (range(2), (0, 1)),
        (2, (2,)),
        (None, None),
    ],
)
def test_blocks(given, kept):
    config = AdapterConfig(blocks=given)
    assert config.blocks == kept == AdapterConfig(layers_to_transform=given).blocks
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
