"""The ways in which a run computes what has several exact ways, such as attention: see `vitlorafa.tuning`.

They are found by timing and differ between machines, which changes rounding. So records and checkpoints name them under
"ways", and a run that resumes or is evaluated again uses its own.
"""

from collections.abc import Mapping
from typing import Any

from vitlorafa import tuning

_BEFORE = {"evaluation_batch": "64"}  # what runs used that record no ways
_LATER = {"patches": "torch"}  # what runs used that record ways, but were made before there was this question


def pin(facts: Mapping[str, Any] | None) -> None:
    """Fixes the ways of this process, before a model computes anything.

    Args:
        facts: Record or checkpoint of the run; None for a run that starts, which uses the fastest ways.
    """
    ways = {} if facts is None else facts.get("ways", _BEFORE)
    asked = {name.partition(":")[0] for name in ways}
    tuning.pin(ways if facts is None else {kind: way for kind, way in _LATER.items() if kind not in asked} | ways)


def used() -> dict[str, dict[str, str]]:
    """The ways that the run has used so far, by question, as records and checkpoints hold them: under "ways"."""
    return {"ways": tuning.answers()}
