"""What has changed between two runs, in words."""

import pytest

from domainbed_ext.runs.differences import Kind, differences

THEN = {"imports": {"mine.py": "a", "their.py": "b"}, "sources": {"Mine": "a"}}


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (THEN, None),
        ({"imports": {"mine.py": "x"}, "sources": {"Mine": "x"}}, "the source file of Mine has changed"),
        ({"imports": {"their.py": "x"}, "sources": {"Mine": "a"}}, "their.py has changed"),
        ({"imports": {"other.py": "x"}, "sources": {}}, None),
        (
            {"imports": {"mine.py": "x", "their.py": "y"}, "sources": {"Mine": "x"}},
            "the source file of Mine has changed; their.py has changed",
        ),
    ],
)
def test_changed_files_of_an_own_method_are_named_once(now, words):
    assert differences(THEN, now).get(Kind.SOURCES) == words


def test_files_of_others_do_not_matter_to_a_built_in_method():
    assert differences({"imports": {"mine.py": "a"}, "sources": {}}, {"imports": {"mine.py": "x"}, "sources": {}}) == {}


def test_other_ways_to_compute_the_same_are_no_difference():
    assert differences({**THEN, "ways": {"attention: a": "torch"}}, {**THEN, "ways": {"attention: a": "other"}}) == {}


@pytest.mark.parametrize(
    ("later", "words"),
    [
        ({}, None),
        ({"average": "none", "head_start": "random", "swad_tolerance": 1.2}, None),
        ({"average": "ma"}, "average none then, ma now"),
        ({"head_start": "probe"}, "head_start random then, probe now"),
    ],
)
def test_a_checkpoint_of_an_earlier_version_is_of_the_defaults_of_later_hyperparameters(later, words):
    then = {"args": {"algorithm": "BOnly", "dataset": "VLCS"}, "hparams": {"rank": 8}}
    assert differences(then, then | {"hparams": {"rank": 8} | later}).get(Kind.ARGUMENTS) == words
