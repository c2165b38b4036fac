"""The error for an unknown name suggests what was meant."""

import pytest

from domainbed_ext.errors import unknown


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("BOnyl", "did you mean 'BOnly'?"),
        ("bonly", "did you mean 'BOnly'?"),
        ("XOnly", "did you mean 'AOnly', 'BOnly' or 'COnly'?"),
        ("Bonny", "did you mean 'BOnly'?"),
        ("LoRA-FA", "did you mean 'BOnly'?"),
        ("lora_fa", "did you mean 'BOnly'?"),
        ("other", "choose one of AOnly, BOnly, COnly, DOnly."),
    ],
)
def test_an_unknown_name_suggests_the_nearest_names_and_those_whose_synonyms_are_near(name, hint):
    synonyms = {"LoRA-FA": "BOnly", "other": "not a valid name"}
    error = unknown("algorithm", name, ["BOnly", "AOnly", "COnly", "DOnly"], synonyms)
    assert str(error) == f"unknown algorithm {name!r}: {hint}"


def test_a_long_list_of_names_says_how_many_are_left_out():
    assert str(unknown("backbone", "x", (f"name{i:02}" for i in range(25)))).endswith("name18, name19 and 5 more.")
