"""What `--split_by concepts` holds out."""

import pytest

from domainbed_ext.data.splits import make_splits
from domainbed_ext.datasets.base import Environment, MultipleDomainDataset
from domainbed_ext.errors import BenchmarkError


class Drawn(Environment):
    def __init__(self, name, concepts):
        self.name, self.concepts, self.targets = name, concepts, [0] * len(concepts)


class Domains(MultipleDomainDataset):
    def __init__(self, *concepts):
        self.datasets = [Drawn(f"domain {i}", each) for i, each in enumerate(concepts)]


CONCEPTS = [f"concept {i}" for i in range(50)]
# In another order, twice, and only some of them.
DOMAINS = Domains(CONCEPTS, CONCEPTS[::-1], [name for name in CONCEPTS for _ in range(2)], CONCEPTS[:30])


def split(dataset=DOMAINS, trial=0, by="concepts", fraction=0.2, uda=0.0):
    return make_splits(dataset, [1], fraction, uda, trial, by)


def concepts_of(splits, name):
    return {splits[name].environment.concepts[key] for key in splits[name].keys}


def test_held_out_concepts_are_held_out_of_every_environment():
    splits = split(uda=0.25)
    held_out = concepts_of(splits, "env0_out")
    assert len(held_out) == 10
    assert concepts_of(splits, "env1_out") == concepts_of(splits, "env2_out") == held_out
    assert concepts_of(splits, "env3_out") == held_out & set(CONCEPTS[:30])
    for name in ("env0_in", "env1_in", "env1_uda", "env2_in", "env3_in"):
        assert not concepts_of(splits, name) & held_out
    for i, environment in enumerate(DOMAINS.datasets):
        keys = [key for name, each in splits.items() if name.startswith(f"env{i}_") for key in each.keys]
        assert sorted(keys) == list(range(len(environment)))  # each once


def test_trials_hold_out_other_concepts_and_a_trial_always_the_same():
    assert concepts_of(split(trial=1), "env0_out") != concepts_of(split(), "env0_out")
    assert {name: each.keys for name, each in split().items()} == {name: each.keys for name, each in split().items()}


def test_images_stay_in_the_order_of_the_seeded_shuffle():
    """A part of the `in` split, on which train accuracy is estimated, is its first images."""
    keys = split()["env0_in"].keys
    assert keys != sorted(keys)


def test_by_images_concepts_change_nothing():
    without = Domains(*([""] * len(each) for each in DOMAINS.datasets))
    for dataset in (DOMAINS, without):
        splits = split(dataset, by="images")
        assert len(splits["env2_out"]) == 20
    assert {n: s.keys for n, s in split(DOMAINS, by="images").items()} == {
        name: each.keys for name, each in split(without, by="images").items()
    }
    assert concepts_of(split(by="images"), "env0_out") != concepts_of(split(by="images"), "env1_out")


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [
        (
            Domains(CONCEPTS, ["a", "", ""]),
            "--split_by concepts: 2 of 3 images of domain 1 in Domains carry no concept",
        ),
        (Domains(CONCEPTS, CONCEPTS[:1] * 9), "environment domain 1 has 9 images of 1 concepts, too few for a holdout"),
    ],
)
def test_what_cannot_be_split_is_refused(dataset, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        split(dataset)
