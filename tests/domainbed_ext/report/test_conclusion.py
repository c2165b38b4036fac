"""What the page says first."""

import pytest

from domainbed_ext.report.conclusion import conclude
from domainbed_ext.report.results import Results
from tests.domainbed_ext.fabricated_records import left_out_run


def conclusion_of(accuracies, trials=3):
    """Of methods with the out-of-domain accuracies given, by trial, on each of four domains."""
    records = [
        record
        for name, of_trials in accuracies.items()
        for trial, accuracy in enumerate(of_trials[:trials])
        for env in range(4)
        for record in left_out_run(name, trial, env, accuracy)
    ]
    (comparison,) = Results(records).panels
    return conclude(comparison), comparison


def test_a_difference_that_is_more_than_chance():
    found, comparison = conclusion_of({"BA": (0.6, 0.62, 0.64), "BOnly": (0.5, 0.521, 0.539), "LP": (0.4, 0.42, 0.441)})
    assert found.best == "LoRA" and found.ranking == ["BA", "BOnly", "LP"]
    assert found.result == "62.0 ± 0.9\u00a0% (mean ± standard error over 3 trials); in domain it has 80.0\u00a0%"
    difference = comparison.differences.between("BA", "BOnly", "out_of_domain")
    low, high = (f"+{end:.1f}" for end in difference.interval)
    assert f"Its difference to the next best, LoRA-FA, is +10.0 points (95 % interval {low} to {high})" in found.against
    assert ": more than chance." in found.against
    assert "Of the 2 other methods, 2 are lower by more than chance: LoRA-FA by 10.0" in found.against
    assert "not adjusted for choosing the best of 3 methods" in found.note and "Student's t" in found.note


def test_a_difference_that_may_be_chance():
    found, _ = conclusion_of({"BA": (0.6, 0.5, 0.64), "BOnly": (0.5, 0.6, 0.6), "LP": (0.5, 0.6, 0.59)})
    assert "it may be chance" in found.against and "−" in found.against
    assert "None of the 2 other methods is lower by more than chance." in found.against


def test_one_trial_has_no_interval():
    found, _ = conclusion_of({"BA": (0.6,), "BOnly": (0.5,), "LP": (0.4,)})
    assert found.result == "60.0\u00a0% (one trial); in domain it has 80.0\u00a0%"
    assert found.against == "It is +10.0 points from the next best, LoRA-FA: of one trial, this may be chance."
    assert found.note == ""


def test_one_method_is_compared_with_nothing():
    found, _ = conclusion_of({"BA": (0.6, 0.7)})
    assert found.against == "There is no other method to compare it with."


def test_what_lacks_results_is_not_ranked():
    records = [record for env in range(4) for record in left_out_run("BA", 0, env, 0.5)]
    (comparison,) = Results([*records, *left_out_run("LP", 0, 0, 0.9)]).panels
    found = conclude(comparison)
    assert found.ranking == ["BA"]
    assert "Not ranked, as results are missing: linear probe (1 of 4 environments)." in found.against
    (nothing,) = Results(left_out_run("LP", 0, 0, 0.9)).panels
    assert conclude(nothing) is None


@pytest.mark.parametrize("count", [3, 12])
def test_many_methods_are_counted(count):
    worse = {f"BOnly@rank={rank}": (0.5, 0.501, 0.502) for rank in range(1, count)}
    found, _ = conclusion_of({"BA": (0.6, 0.601, 0.603), **worse})
    assert f"Of the {count - 1} other methods, {count - 1} are lower" in found.against
    assert ("more." in found.against) == (count > 7)
