"""A method declares itself in one place, and is found by every name that people type."""

import pytest

from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.hyperparameters import Hyperparameter, choice
from domainbed_ext.algorithms.lora import BOnly
from domainbed_ext.algorithms.names import canonical_name, describe, find_among, get_algorithm_class, parse_name
from domainbed_ext.algorithms.registry import ALGORITHMS, METHODS, register_algorithm
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.hparams_registry import resolve
from domainbed_ext.report.methods import adaptation_of, label_of, row_label_of
from domainbed_ext.report.plots.palette import styles_of

LABELS = {
    "BA": "LoRA",
    "LoRAPro": "LoRA-Pro",
    "BOnly": "LoRA-FA",
    "AOnly": "LoRA-FB",
    "LP": "linear probe",
    "FullFT": "full fine-tuning",
    "BitFit": "BitFit",
    "NormTuning": "norm tuning",
    "LastBlocks": "last blocks",
    "Peft": "PEFT",
    "ERM": "DomainBed ERM",
}


pytestmark = pytest.mark.usefixtures("registries")


def test_the_built_in_ones_are_all_declared_and_are_what_they_say():
    assert {name: method.label for name, method in METHODS.registered().items()} == LABELS
    for name, method in METHODS.registered().items():
        assert method.name == name and method.load().__name__ == name and method.explanation
        assert method.trains == getattr(method.load(), "TRAIN", None)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("BOnly", "BOnly"),
        ("LoRA", "BA"),
        ("lora", "BA"),
        ("LoRA-FA", "BOnly"),
        ("lora_fa@r=16", "BOnly@rank=16"),
        ("LoRA-FB@lora_alpha=8,learning_rate=1e-3", "AOnly@alpha=8,lr=1e-3"),
        ("BOnly@target_modules=q+v,wd=0.1", "BOnly@targets=q+v,weight_decay=0.1"),
        ("Linear probe", "LP"),
        ("fullft", "FullFT"),
    ],
)
def test_a_name_has_one_spelling(typed, name):
    assert canonical_name(typed) == name
    assert parse_name(typed) == parse_name(name)
    assert get_algorithm_class(typed) is get_algorithm_class(name)
    assert resolve(typed, "PACS") == resolve(name, "PACS")


@pytest.mark.parametrize("name", ["BOnly@r=8,rank=16", "BOnly@rank=8,rank=16"])
def test_a_hyperparameter_is_given_once(name):
    with pytest.raises(BenchmarkError, match="gives rank twice"):
        parse_name(name)


def test_a_class_becomes_a_method():
    paper = "https://openreview.net/forum?id=lQdXeXDoWtI"

    @register_algorithm(
        "Mine", label="my method", order=3, colour="#123456", aliases=("M",), hyperparameters={"k": 2}, paper=paper
    )
    class Mine(Algorithm):
        """Does something.

        And more of it.
        """

    assert ALGORITHMS["Mine"] is Mine and "Mine" in ALGORITHMS and list(ALGORITHMS)[-1] == "Mine"
    assert canonical_name("m@k=3") == canonical_name("My-Method@k=3") == "Mine@k=3"
    method = describe("Mine@k=3")
    assert (method.label, method.order, method.colour, method.paper) == ("my method", 3, "#123456", paper)
    assert method.explanation == "Does something." and method.trains is None
    # DomainBed's hyperparameters, and its own.
    erm = resolve("ERM", "PACS", 1)
    assert resolve("Mine", "PACS", 1) == {name: erm[name] for name in resolve("Mine", "PACS") if name in erm} | {"k": 2}


def test_a_method_inherits_hyperparameters_of_the_method_that_it_is_a_kind_of():
    @register_algorithm("Kind", hyperparameters={"rank": Hyperparameter(2, choice(2)), "depth": 3})
    class Kind(BOnly):
        """Another."""

    @register_algorithm("Kinder")
    class Kinder(Kind):
        """Yet another."""

    expected = {**resolve("BOnly", "PACS", 1), "rank": 2, "depth": 3}
    assert resolve("Kind", "PACS", 1) == resolve("Kinder", "PACS", 1) == expected
    assert describe("Kinder").trains == "B"
    assert canonical_name("Kinder@r=4") == "Kinder@rank=4"


def test_an_assignment_registers_as_it_did(monkeypatch):
    class Mine(BOnly):
        """Without a word on hyperparameters, it has DomainBed's."""

    monkeypatch.setitem(ALGORITHMS, "Mine", Mine)
    assert ALGORITHMS["Mine"] is Mine and resolve("Mine", "PACS").keys() < resolve("ERM", "PACS").keys()
    monkeypatch.setitem(ALGORITHMS, "BA", Mine)
    assert ALGORITHMS["BA"] is Mine and "rank" in resolve("BA", "PACS") and describe("BA").label == "LoRA"
    monkeypatch.undo()
    assert "Mine" not in ALGORITHMS and ALGORITHMS["BA"].__name__ == "BA"


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        (
            "BOnly",
            {},
            r"'BOnly' is an algorithm already, BOnly \(domainbed_ext.algorithms.lora:BOnly\): give .*Mine an",
        ),
        ("lora-fa", {}, "'lora-fa' is an algorithm already, BOnly"),
        ("Mine", {"aliases": ("LoRA",)}, "'LoRA' is an algorithm already, BA"),
        ("Mine@rank=2", {}, "'Mine@rank=2' cannot name an algorithm"),
        ("Mine", {"colour": "red"}, "colour 'red' of Mine"),
    ],
)
def test_a_name_that_is_taken_or_none_gets_a_sentence(name, options, sentence):
    with pytest.raises(BenchmarkError, match=sentence):

        @register_algorithm(name, **options)
        class Mine(Algorithm):
            pass


def test_the_same_class_may_be_registered_again():
    for label in ("one", "two"):

        @register_algorithm("Mine", label=label)
        class Mine(Algorithm):
            pass

    assert describe("Mine").label == "two"


def test_a_method_of_a_record_that_is_not_known_here_is_described_by_its_name():
    assert describe("CORAL@x=1").label == "CORAL" and describe("CORAL").order > describe("FullFT").order


class Point:
    """An entry point."""

    dist = None

    def __init__(self, name, load):
        self.name, self.load, self.value = name, load, f"package.{name}:Class"


def test_entry_points_bring_methods_and_a_broken_one_is_a_warning(monkeypatch, capsys):
    class Theirs(Algorithm):
        pass

    def module():
        register_algorithm("Inside", label="within")(type("Inside", (Algorithm,), {}))

    def broken():
        raise ImportError("no such thing")

    points = {name: Point(name, load) for name, load in [("T", lambda: Theirs), ("m", module), ("Bad", broken)]}
    monkeypatch.setattr(METHODS, "_points", points)
    assert list(METHODS)[-3:] == ["T", "m", "Bad"]  # by name, without a look inside
    assert ALGORITHMS["T"] is Theirs
    with pytest.raises(
        BenchmarkError, match=r"algorithm 'Bad' of the package package.Bad:Class cannot be imported \(Im"
    ):
        ALGORITHMS["Bad"]
    assert canonical_name("within") == "Inside"
    assert "warning: algorithm 'Bad' of the package" in capsys.readouterr().err
    with pytest.raises(BenchmarkError, match="unknown algorithm 'Insyde': did you mean 'Inside'"):
        parse_name("Insyde")


@pytest.mark.parametrize(
    ("name", "label", "row"),
    [
        ("BA@quantise=nf4", "QLoRA", "QLoRA"),
        ("BA+CORAL@quantise=nf4,rank=4", "QLoRA + CORAL, rank 4", "QLoRA + CORAL"),
        ("BA@quantise=int8", "LoRA, int8 base", "LoRA"),
        ("BOnly@quantise=nf4", "LoRA-FA, nf4 base", "LoRA-FA"),
        ("BA@lr_B_ratio=16", "LoRA+, ratio 16", "LoRA+"),
        ("BA@lr_B_ratio=4.0,lr=0.001", "LoRA+, ratio 4.0, lr 0.001", "LoRA+"),
        ("BA@lr_B_ratio=1", "LoRA, ratio 1", "LoRA"),
        ("BA@init_A=pissa", "PiSSA", "PiSSA"),
        ("BA@init_A=milora,quantise=int8", "MiLoRA, int8 base", "MiLoRA"),
        ("BA@init_A=gaussian", "LoRA, init A gaussian", "LoRA"),
        ("BA@rank_stabilised=true,quantise=nf4", "rsLoRA, QLoRA", "rsLoRA, QLoRA"),
        ("BA@rank_stabilised=false", "LoRA, rank stabilised false", "LoRA"),
        ("BA@targets=q+v", "LoRA, q,v", "LoRA"),
    ],
)
def test_settings_with_a_name_of_their_own_are_in_the_label(name, label, row):
    assert (canonical_name(name), label_of(name)) == (name, label)
    assert row_label_of(name) == f"{name} ({row})"


def test_named_settings_are_adaptations_of_their_own():
    names = ["BA", "BA@rank=4", "BA@quantise=nf4", "BA+CORAL@quantise=nf4"]
    assert [adaptation_of(name) for name in names] == ["LoRA", "LoRA", "QLoRA", "QLoRA"]
    assert describe("BA@quantise=nf4").paper == "https://arxiv.org/abs/2305.14314" != describe("BA").paper
    assert describe("BA@quantise=nf4").trains == "BA" and describe("BA@quantise=nf4").colour is None
    colours = [style.colour for style in styles_of(names).values()]
    assert colours[0] == colours[1] != colours[2] == colours[3]


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("QLoRA", "BA@quantise=nf4"),
        ("qlora+coral@r=4", "BA+CORAL@quantise=nf4,rank=4"),
        ("LoRA+", "BA@lr_B_ratio=16"),
        ("LoRA++CORAL", "BA+CORAL@lr_B_ratio=16"),
        ("LoRA+CORAL", "BA+CORAL"),
        ("PiSSA@rank=2", "BA@init_A=pissa,rank=2"),
        ("DoRA", "Peft@method=dora"),
        ("IA3+IRM@lr=0.01", "Peft+IRM@method=ia3,lr=0.01"),
        ("Peft@method=pissa", "Peft@method=pissa"),
    ],
)
def test_a_setting_or_a_variant_with_a_name_of_its_own_can_be_typed(typed, name):
    assert canonical_name(typed) == name


def test_a_name_without_settings_stands_for_the_only_one_that_has_any():
    names = ["BA@rank=8", "BA@rank=16", "BOnly@head_start=probe", "BOnly@head_start=probe soup(trials)", "LP"]
    assert find_among("LoRA-FA", names) == "BOnly@head_start=probe"
    assert find_among("BOnly@head_start=probe soup(trials)", names) == "BOnly@head_start=probe soup(trials)"
    assert find_among("linear probing", names) == "LP"
    assert find_among("BA", names) is None  # which of two
    assert find_among("FullFT", names) is None
