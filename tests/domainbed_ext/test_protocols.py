"""What a protocol chooses, and which environments it trains and tests on."""

import pytest

from domainbed_ext import protocols
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models.backbones import INPUT_STATS
from domainbed_ext.runs import arguments as options

PACS = [["A", "art_painting"], ["C", "cartoon"], ["P", "photo"], ["S", "sketch"]]
VLCS = [["C", "Caltech101"], ["L", "LabelMe"], ["S", "SUN09"], ["V", "VOC2007"]]
TOY = [["x", "x"], ["y", "y"], ["z", "z"]]


def resolved(*words):
    return options.parse(words).complete()


def test_the_defaults_are_ours_and_domainbeds_are_upstreams():
    ours = resolved()
    assert (ours.protocol, ours.validation_images, ours.input_stats) == ("leave_one_out", "plain", "backbone")
    assert (ours.sampling, ours.test_on, ours.evaluate, ours.precision) == ("replacement", "in", "lean", None)
    assert resolved("--test_envs", "0", "1").evaluate == "all"
    upstream = resolved("--protocol", "domainbed")
    assert (upstream.validation_images, upstream.input_stats, upstream.precision) == (
        "augmented",
        "imagenet",
        "float32",
    )
    assert (upstream.sampling, upstream.test_on, upstream.evaluate) == ("replacement", "in", "all")
    assert upstream.train_eval_share == 1.0


def test_an_option_given_wins_over_the_protocol():
    args = resolved("--protocol", "domainbed", "--precision", "bf16", "--validation_images", "plain")
    assert (args.precision, args.validation_images, args.input_stats) == ("bf16", "plain", "imagenet")


def test_every_choice_is_an_option_that_enters_a_runs_identity():
    assert set(protocols.CHOICES) | {"protocol", "precision"} <= set(options.NUMBERS)
    assert protocols.CHOICES["input_stats"] == INPUT_STATS
    for chosen in protocols.PROTOCOLS.values():
        assert all(chosen[name] in values for name, values in protocols.CHOICES.items())


def test_sources_are_the_papers_or_each_in_turn():
    assert protocols.source_environments(None, {"PACS": PACS, "VLCS": VLCS, "Toy": TOY}) == {
        "PACS": [1],
        "VLCS": [1],
        "Toy": [0, 1, 2],
    }


def test_sources_go_by_label_name_or_index():
    find = protocols.source_environments
    assert find(["sketch", "C", "0"], {"PACS": PACS}) == {"PACS": [0, 1, 3]}
    assert find(["LabelMe", "Cartoon"], {"PACS": PACS, "VLCS": VLCS}) == {"PACS": [1], "VLCS": [1]}
    # A label that is a number comes before an index.
    assert find(["15"], {"RotatedMNIST": [["0"], ["15"], ["30"]]}) == {"RotatedMNIST": [1]}


def run(names=PACS, **given):
    return protocols.environments_of_a_run(**{"protocol": "single_source", "dataset": "PACS", **given}, names=names)


def test_the_environments_of_a_run():
    assert run(source_envs=["cartoon"]) == ([0, 2, 3], [1])
    assert run(test_envs=[0, 1, 3]) == ([0, 1, 3], [2])
    assert run(source_envs=["S"], test_envs=[0, 1, 2]) == ([0, 1, 2], [3])
    assert run() == ([0, 2, 3], [1])
    assert run(protocol="leave_one_out") == ([0], None)
    assert run(protocol="domainbed", test_envs=[1, 2]) == ([1, 2], None)


def test_test_environments_go_by_label_name_or_index():
    assert run(protocol="leave_one_out", test_envs=["sketch"]) == ([3], None)
    assert run(protocol="leave_one_out", test_envs=["P", "Art_Painting", 1]) == ([2, 0, 1], None)
    assert run(test_envs=["photo", "sketch", "C"]) == ([1, 2, 3], [0])  # of single_source
    # A number is an index, as in DomainBed, and never a label.
    rotated = [["0"], ["1"], ["15"]]
    assert run(rotated, protocol="leave_one_out", test_envs=options.parse(["--test_envs", "1"]).test_envs) == (
        [1],
        None,
    )
    with pytest.raises(
        BenchmarkError, match="--test_envs 15: PACS has no such environment: choose from 0 0, 1 1, 2 15"
    ):
        run(rotated, protocol="leave_one_out", test_envs=options.parse(["--test_envs", "15"]).test_envs)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"source_envs": ["cartoons"]}, "unknown environment of PACS in --source_envs: 'cartoons': did you mean 'cart"),
        ({"source_envs": ["7"]}, "unknown environment of PACS in --source_envs: '7'"),
        ({"source_envs": ["A", "C"]}, r"trains on one environment of PACS, not on 2 \(A, C\): give one"),
        ({"source_envs": ["C"], "test_envs": [0]}, "--source_envs C and --test_envs A contradict each other"),
        ({"test_envs": [0]}, r"trains on one environment of PACS, not on 3 \(C, P, S\)"),
        ({"dataset": "Toy", "names": TOY}, "trains on one environment of Toy, not on 3"),
        (
            {"source_envs": ["A"], "test_envs": [0, 1, 2]},
            "--source_envs A and --test_envs A, C, P contradict each other",
        ),
        ({"test_envs": [0, 1, 2, 3]}, "--test_envs names all 4 environments"),
        ({"test_envs": [9]}, "--test_envs 9: PACS has no such environment: choose from 0 A or art_painting, 1 C or c"),
        (
            {"test_envs": ["sketsch"]},
            "--test_envs sketsch: PACS has no such environment: choose from 0 A or .* 3 S or sk",
        ),
        ({"test_envs": [3, "sketch"]}, "--test_envs names environment 3 S twice"),
        ({"names": TOY[:1], "source_envs": ["x"]}, "has 1 environment.s., and --protocol single_source takes at least"),
        (
            {"protocol": "leave_one_out", "source_envs": ["A"]},
            "--source_envs is an option of --protocol single_source: add that",
        ),
    ],
)
def test_environments_that_make_no_run_get_a_sentence(given, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        run(**given)


def test_a_data_set_without_a_source_gets_a_sentence():
    with pytest.raises(BenchmarkError, match="--source_envs names no environment of VLCS: add one of C, L, S, V"):
        protocols.source_environments(["cartoon"], {"PACS": PACS, "VLCS": VLCS})


def test_lean_and_pairs_do_not_go_together():
    protocols.check_evaluate("lean", pairs=False)
    protocols.check_evaluate("all", pairs=True)
    with pytest.raises(BenchmarkError, match="--evaluate lean leaves out .* add --single_test_envs"):
        protocols.check_evaluate("lean", pairs=True)
