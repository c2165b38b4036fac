import json

import pytest

from domainbed_ext import hparams_registry
from domainbed_ext.algorithms import ALGORITHMS, get_hparams
from domainbed_ext.datasets import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.seeds import seed_hash


def test_random_values_are_domainbeds():
    """Golden values measured from facebookresearch/DomainBed @ b93c22a."""
    first = hparams_registry.random_hparams("ERM", "PACS", seed_hash(1, 0))
    assert first["lr"] == 2.7028930742148706e-05
    assert first["weight_decay"] == 0.00044832883881609976
    assert (first["batch_size"], first["resnet_dropout"], first["vit_dropout"]) == (39, 0.5, 0.1)
    second = hparams_registry.random_hparams("ERM", "PACS", seed_hash(2, 1))
    assert second["lr"] == 0.0002692684204277505
    assert second["weight_decay"] == 3.539788355410888e-06
    assert (second["batch_size"], second["resnet_dropout"], second["vit_dropout"]) == (18, 0.5, 0.1)


def test_default_values_of_erm_are_domainbeds():
    large = hparams_registry.default_hparams("ERM", "PACS")
    assert (large["lr"], large["weight_decay"], large["batch_size"]) == (5e-5, 0.0, 32)
    small = hparams_registry.default_hparams("ERM", "RotatedMNIST")
    assert (small["lr"], small["weight_decay"], small["batch_size"]) == (1e-3, 0.0, 64)


def test_random_values_of_ours_stay_what_they_were():
    drawn = hparams_registry.random_hparams("BOnly", "PACS", seed_hash(1, 0))
    assert (drawn["lr"], drawn["rank"], drawn["batch_size"]) == (0.0008547298386413518, 8, 39)


@pytest.mark.parametrize("hparams_seed", range(3))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_correction_is_off_unless_asked_for_and_needs_a_frozen_factor(algorithm, hparams_seed):
    hparams = get_hparams(algorithm, "PACS", hparams_seed)
    if algorithm in ("BOnly", "AOnly"):
        assert hparams["gradient_correction"] is False
        name = f"{algorithm}@gradient_correction=true"
        assert get_hparams(name, "PACS", hparams_seed) == {**hparams, "gradient_correction": True}
    else:
        assert "gradient_correction" not in hparams


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_value_is_plain_python_and_valid(algorithm, dataset):
    for hparams_seed in range(4):
        hparams = get_hparams(algorithm, dataset, hparams_seed)
        assert json.loads(json.dumps(hparams)) == hparams
        hparams_registry.check(hparams)


def test_a_name_fixes_hyperparameters():
    hparams = get_hparams("BOnly@rank=16,lr=0.01,targets=q+v", "PACS")
    assert (hparams["rank"], hparams["lr"], hparams["targets"]) == (16, 0.01, "q,v")
    assert get_hparams("BOnly@rank=16", "PACS", hparams_seed=3)["rank"] == 16


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("BOnyl", "unknown algorithm 'BOnyl': did you mean 'BOnly'"),
        ("BOnly@rnk=16", "unknown hyperparameter.*'rnk': did you mean 'rank'"),
        ("BOnly@16", "'16' is not hyperparameter=value"),
        ("BOnly@rank=many", "rank in the name .* should be of type int, not 'many'"),
        ("LP@rank=8", "unknown hyperparameter"),
        ("BA@gradient_correction=true", "unknown hyperparameter"),
        ("BOnly@gradient_correction=1", "gradient_correction in the name .* should be of type bool, not 1"),
    ],
)
def test_a_wrong_name_gets_a_sentence(name, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        get_hparams(name, "PACS")


@pytest.mark.parametrize("text", ["{rank: 16}", "[1]", "16", "{"])
def test_malformed_hparams_get_a_sentence(text):
    with pytest.raises(BenchmarkError, match="--hparams is not"):
        hparams_registry.parse_hparams(text)


@pytest.mark.parametrize(
    ("name", "value"), [("image_size", 0), ("batch_size", 0), ("batch_size", 2.5), ("lr", 0), ("weight_decay", -1)]
)
def test_values_out_of_range_get_a_sentence(name, value):
    hparams = {**get_hparams("LP", "PACS"), name: value}
    with pytest.raises(BenchmarkError, match=f"{name} {value} should be"):
        hparams_registry.check(hparams)


def test_one_hparams_serves_algorithms_that_differ():
    others = hparams_registry.names("PACS")
    for algorithm, rank in (("LP", None), ("BA", 4)):
        hparams = get_hparams(algorithm, "PACS")
        hparams_registry.apply(hparams, {"rank": 4, "lr": 0.5}, "--hparams", others)
        assert (hparams.get("rank"), hparams["lr"]) == (rank, 0.5)
    with pytest.raises(BenchmarkError, match="unknown hyperparameter in --hparams: 'rnak': did you mean 'rank'"):
        hparams_registry.apply(get_hparams("LP", "PACS"), {"rnak": 4}, "--hparams", others)


def test_an_unknown_precision_gets_the_nearest():
    with pytest.raises(BenchmarkError, match="unknown precision 'fp32': did you mean 'float32'"):
        hparams_registry.check({**get_hparams("LP", "PACS"), "precision": "fp32"})
