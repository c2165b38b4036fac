"""Lists of methods and objectives, in short and in full."""

import json
import re
from dataclasses import replace

import pytest

from domainbed_ext import __main__ as package
from domainbed_ext import register_algorithm
from domainbed_ext.algorithms import listing
from domainbed_ext.algorithms.registry import METHODS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.methods import main
from domainbed_ext.objectives.registry import OBJECTIVES
from domainbed_ext.runs.arguments import make_parser
from domainbed_ext.sweep import options

# What is in several lists of its own.
EVERY = [*METHODS.registered(), *OBJECTIVES.registered()]


def words_of(text):
    return set(re.split(r"[\s,+@]+", text))


def test_every_help_lists_all_in_groups(capsys):
    assert package.main(["--help"]) == 0
    texts = [capsys.readouterr().out, make_parser().format_help(), options.make_parser("launch").format_help()]
    for text in texts:
        assert set(EVERY) <= words_of(text)
        places = [
            text.index(f"\n  {group}") for group in ("adapters", "partial tuning", "full fine-tuning", "objectives")
        ]
        assert places == sorted(places)
        assert max(map(len, listing.format_short().splitlines())) <= 100


def test_the_whole_list_says_what_each_is(capsys):
    main([])
    text = capsys.readouterr().out
    methods = [each for method in METHODS.registered().values() for each in method.variants.values() or [method]]
    for declared in [*methods, *OBJECTIVES.registered().values()]:
        assert f"\n  {declared.name}" in text and declared.paper in text
        assert " ".join(declared.explanation.split()) in " ".join(text.split())
    assert "rank=8*" in text and "targets=q+v" in text and "batch_size=32*" in text


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["lora-fa", "coral"], ["BOnly", "CORAL"]),
        (["lora-fa+coral@r=16"], ["BOnly+CORAL", "CORAL"]),
        (["ERM"], ["ERM", "ERM"]),  # a method and an objective
    ],
)
def test_names_in_any_spelling(capsys, names, found):
    main([*names, "--json"])
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == found


def test_json_has_all_there_is(capsys):
    main(["--json"])
    entries = json.loads(capsys.readouterr().out)
    by_name = {(entry["name"], entry["group"] == "objectives"): entry for entry in entries}
    assert len(by_name) == len(entries) >= len(EVERY)
    bonly = by_name["BOnly", False]
    assert (bonly["label"], bonly["group"], bonly["paper"]) == ("LoRA-FA", "adapters", METHODS["BOnly"].paper)
    assert bonly["hyperparameters"]["rank"] == {"default": 8, "random": True, "aliases": ["r", "lora_rank", "lora_r"]}
    assert bonly["hyperparameters"]["alpha"]["default"] is None
    assert by_name["CORAL", True]["hyperparameters"].keys() == OBJECTIVES["CORAL"].hyperparameters.keys()


def test_defaults_of_a_data_set(capsys):
    defaults = []
    for words in ([], ["--dataset", "digitsshift"]):
        main(["BOnly", "--json", *words])
        defaults.append(json.loads(capsys.readouterr().out)[0]["hyperparameters"]["targets"]["default"])
    assert defaults == ["q,v", "all"]


def test_unknown_names_are_refused():
    with pytest.raises(BenchmarkError, match="unknown algorithm 'CORALL'"):
        main(["CORALL"])


def test_variants_are_entries_of_their_own(capsys):
    variants = METHODS["Peft"].variants
    assert f"Peft@method=NAME: {', '.join(list(variants)[:3])}" in " ".join(listing.format_short().split())
    main(["peft@method=dora"])
    text = capsys.readouterr().out
    assert variants["dora"].paper in text and "(DoRA, PEFT)" in text and "method=dora," not in text
    assert [entry.name for entry in listing.find_entries("Peft")] == ["Peft@method=lora"]  # the default
    names = [entry.name for entry in listing.list_entries() if entry.group == "PEFT"]
    assert names == [f"Peft@method={name}" for name in variants]


def test_settings_with_a_name_are_entries_of_their_own(capsys):
    main([])
    text = capsys.readouterr().out
    assert "  BA@quantise=nf4 (QLoRA)\n" in text and "https://arxiv.org/abs/2305.14314" in text
    assert text.count("q, k or v in targets means the whole qkv layer") == 1
    (entry,) = listing.find_entries("LoRA@quantize=nf4,r=4")
    assert (entry.title, "quantise" in entry.own_defaults()) == ("BA@quantise=nf4 (QLoRA)", False)
    assert [entry.title for entry in listing.find_entries("BA")] == ["BA (LoRA)"]


@pytest.mark.usefixtures("registries")
def test_methods_of_the_users_own_are_in_the_lists(capsys):
    @register_algorithm("Mine", explanation="a method of mine", hyperparameters={"depth": 3})
    class Mine:
        pass

    main([])
    assert "\nothers\n  Mine\n      a method of mine\n      depth=3\n" in capsys.readouterr().out
    assert "  others            Mine" in listing.format_short()
    assert "Mine" not in {entry.name for entry in listing.built_in_entries()}  # which are the docs'


def test_a_method_that_draws_on_some_data_sets_alone_has_a_star():
    (entry,) = listing.find_entries("BA")
    rank = replace(entry.hyperparameters["rank"], draw=None)
    assert not listing.is_random({"rank": rank}, "rank")
    assert listing.is_random({"rank": rank.on(["PACS"], 4, lambda generator: 4)}, "rank")
