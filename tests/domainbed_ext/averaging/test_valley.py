"""SWAD's criteria. The golden case is what the published code computes of loss curves: numbers alone.

"added" are the segments that it adds to its average, in order: some more than once.
"""

import json
import math
from pathlib import Path

import pytest

from domainbed_ext.averaging.valley import LossValley

PUBLISHED = json.loads((Path(__file__).parent / "swad_published.json").read_text())


def follow(losses, optimum_patience=3, overfit_patience=6, tolerance=1.3):
    """The valley after losses; all that it asks for is undecided before."""
    valley = LossValley(optimum_patience, overfit_patience, tolerance)
    for number, loss in enumerate(losses):
        kept = valley.undecided | {number}
        assert len(kept) <= max(optimum_patience, overfit_patience) + 2
        assert set(valley.add(loss)) <= kept
        assert set(valley.segments) - valley._inside <= valley.undecided
    return valley


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case["name"])
def test_the_window_is_that_of_the_published_code(case):
    valley = follow(case["losses"], *(case[name] for name in ("optimum_patience", "overfit_patience", "tolerance")))
    assert valley.is_found == case["converged"]
    if not case["converged"]:
        assert valley.segments == []
        return
    assert valley.threshold == pytest.approx(case["threshold"], rel=1e-12)
    assert valley.segments == sorted(set(case["added"])) == list(range(valley.segments[0], case["end"] + 1))
    # The published code reports as the start what it adds first, also where it adds earlier segments later.
    assert case["start"] == case["added"][0]
    assert valley.segments[0] == case["start"] or min(case["added"][1:]) < case["start"]
    assert valley.has_ended == (case["ended_after"] is not None)
    assert len(valley.losses) == (len(case["losses"]) if case["ended_after"] is None else case["ended_after"] + 1)


def test_the_golden_case_has_every_kind_of_curve():
    assert {(case["converged"], case["ended_after"] is not None) for case in PUBLISHED} == {
        (False, False),
        (True, False),
        (True, True),
    }
    compared = [case["overfit_patience"] - case["optimum_patience"] for case in PUBLISHED]
    assert min(compared) < 0 < max(compared) and 0 in compared


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_in_no_valley(bad):
    assert not follow([bad] * 9).is_found
    assert not follow([1.0, bad, 1.0, bad, 1.0]).is_found
    valley = follow([3.0, 1.0, 1.1, 1.2, *[bad] * 9])
    assert valley.has_ended and max(valley.segments) == 3
