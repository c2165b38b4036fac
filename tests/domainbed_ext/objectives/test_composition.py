"""Names such as BOnly+CORAL: how they are spelled, what they have, and what is refused."""

import pytest

from domainbed_ext.algorithms.names import (
    canonical_name,
    describe,
    get_algorithm_class,
    get_objective_class,
    parse_name,
)
from domainbed_ext.algorithms.registry import METHODS, register_algorithm
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.hparams_registry import resolve
from domainbed_ext.hyperparameter import Hyperparameter, choice
from domainbed_ext.objectives import OBJECTIVES, Objective, register_objective
from domainbed_ext.runs import identity
from domainbed_ext.runs.arguments import RunArguments
from domainbed_ext.runs.imports import find_missing

pytestmark = pytest.mark.usefixtures("registries")


@pytest.fixture(autouse=True)
def smoothed(registries):
    """An objective of a user's."""

    @register_objective("Smoothed", label="smoothed", aliases=("LS",), hyperparameters={"smoothing": 0.1})
    class Smoothed(Objective):
        """Label smoothing."""

    return Smoothed


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("BOnly+Smoothed", "BOnly+Smoothed"),
        ("lora-fa+ls", "BOnly+Smoothed"),
        ("LoRA-FA+smoothed@r=4,smoothing=0.2", "BOnly+Smoothed@rank=4,smoothing=0.2"),
        ("BOnly@objective=ls", "BOnly+Smoothed"),
        ("BOnly@rank=4,objective=smoothed,smoothing=0.2", "BOnly+Smoothed@rank=4,smoothing=0.2"),
        ("BOnly+erm", "BOnly"),
        ("BOnly@objective=erm,r=4", "BOnly@rank=4"),
    ],
)
def test_each_spelling_has_one_name_in_records(spelling, canonical):
    assert canonical_name(spelling) == canonical == canonical_name(canonical)
    assert parse_name(spelling) == parse_name(canonical)
    assert resolve(spelling, "PACS", 3) == resolve(canonical, "PACS", 3)


def test_a_composed_method_has_the_hyperparameters_of_both(smoothed):
    plain, composed = resolve("BOnly", "PACS", 5), resolve("BOnly+Smoothed", "PACS", 5)
    assert composed == plain | {"objective": "Smoothed", "smoothing": 0.1}
    assert resolve("BOnly+Smoothed", "PACS", hparams='{"smoothing": 0.3, "rank": 2}')["smoothing"] == 0.3
    assert "smoothing" not in resolve("BOnly", "PACS", hparams='{"smoothing": 0.3}')  # one --hparams for a sweep
    assert get_algorithm_class("BOnly+Smoothed") is get_algorithm_class("BOnly")
    assert get_objective_class("BOnly+LS") is smoothed and get_objective_class("BOnly").__name__ == "ERM"


def test_a_composed_method_is_described_by_both():
    both = describe("BOnly+Smoothed@rank=4")
    assert (both.label, both.trains, both.order) == ("LoRA-FA + smoothed", "B", describe("BOnly").order)
    assert "Label smoothing." in both.explanation and both.explanation.startswith(describe("BOnly").explanation)
    assert "BOnly+Smoothed" in METHODS and "BOnly+Unknown" not in METHODS and "BOnly+Smoothed" not in list(METHODS)
    assert describe("Theirs+Smoothed").label == "Theirs+Smoothed"  # of a record; the method is not registered here


def test_an_objective_changes_the_identity_of_a_run_and_erm_does_not(tmp_path):
    def folder(algorithm):
        return identity.name(
            identity.Computations().of(RunArguments(algorithm=algorithm, dataset="DigitsShift", test_envs=[0]))
        )

    assert folder("BOnly") == folder(canonical_name("BOnly+ERM")) != folder("BOnly+Smoothed")


def test_an_objective_of_a_record_that_was_imported_is_missed_where_it_is_not():
    def missing(algorithm):
        return find_missing({"args": {"imports": ["mine.py"], "algorithm": algorithm, "dataset": "DigitsShift"}})

    assert missing("BOnly+Smoothed@rank=4") == {}
    assert missing("BOnly+Theirs@rank=4") == {"BOnly+Theirs": "mine.py"}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("BOnly+Smothed", "unknown objective 'Smothed': did you mean 'Smoothed'"),
        ("BOnli+Smoothed", "unknown algorithm 'BOnli': did you mean 'BOnly'"),
        ("BOnly+LS+ERM", r"'BOnly\+LS\+ERM' is not METHOD\+OBJECTIVE, as in BOnly\+CORAL"),
        ("BOnly+LS@objective=erm", r"is not METHOD\+OBJECTIVE"),
        ("BOnly+", r"'BOnly\+' is not METHOD\+OBJECTIVE"),
        ("+LS", r"'\+LS' is not METHOD\+OBJECTIVE"),
        ("ls", r"'ls' is an objective: write it after a method, as in BOnly\+Smoothed or FullFT\+Smoothed"),
        ("BOnly@lr=0.1,rank=4+LS", r"after the @: write BOnly\+Smoothed@lr=0.1,rank=4$"),
        ("BOnly@targets=q+v+LS,rank=4", r"after the @: write BOnly\+Smoothed@targets=q\+v,rank=4$"),
    ],
)
def test_a_name_that_is_none_gets_a_sentence(name, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        resolve(canonical_name(name), "PACS")


def test_hyperparameters_of_other_objectives_and_the_objective_itself_are_refused():
    with pytest.raises(BenchmarkError, match="'smoothing' belongs to Smoothed: leave it out"):
        resolve("BOnly@smoothing=0.2", "PACS")
    with pytest.raises(BenchmarkError, match=r"--hparams gives the objective: write it in the method's name"):
        resolve("BOnly", "PACS", hparams='{"objective": "Smoothed"}')


@pytest.mark.parametrize("name", ["rank", "r"])
def test_a_hyperparameter_of_both_is_refused(name):
    register_objective("Clash", hyperparameters={name: 2})(type("Clash", (Objective,), {}))
    with pytest.raises(BenchmarkError, match="BOnly and Clash both have the hyperparameter rank: rename"):
        resolve("BOnly+Clash", "PACS")
    assert name in resolve("LP+Clash", "PACS")


def test_an_objective_inherits_hyperparameters():
    smoothed = OBJECTIVES["Smoothed"].load()

    @register_objective("Smoother", hyperparameters={"smoothing": Hyperparameter(0.4, choice(0.5)), "depth": 3})
    class Smoother(smoothed):
        """Another."""

    assert {"smoothing": 0.5, "depth": 3}.items() <= resolve("LP+Smoother", "PACS", 1).items()


@pytest.mark.parametrize("register", [register_algorithm, register_objective])
def test_a_plus_joins_a_method_and_an_objective_and_is_in_no_name(register):
    with pytest.raises(BenchmarkError, match=r"'A\+B' cannot name an .*: give a word without spaces, .* \+ and @"):
        register("A+B")(type("A", (), {}))
