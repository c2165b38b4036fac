"""SWAD on weights of one number, with checkpoints at every place."""

import itertools

import pytest
import torch

from domainbed_ext.averaging.swad import Swad
from domainbed_ext.averaging.valley import LossValley

LOSSES = {0: 3.0, 2: 1.0, 4: 0.5, 6: 0.6, 8: 0.7, 10: 2.0}  # by the step after which each is measured


def make():
    return Swad(LossValley(2, 2, 0.3))


def follow(interrupted=lambda step, is_judged: False):
    """The average of all steps, which starts anew from its own state wherever it is interrupted."""
    average = make()
    for step in range(max(LOSSES) + 1):
        if average.is_complete:
            break
        average.add(step, lambda step=step: {"weight": torch.tensor(float(step))})
        for is_judged in (False, True):
            if is_judged and step in LOSSES:
                average.judge(LOSSES[step])
            if interrupted(step, is_judged):
                average, state = make(), average.state_dict()
                average.load_state_dict(state)
    return average


@pytest.mark.parametrize(("at", "judged"), list(itertools.product((0, 1, 4, 5), (False, True))))
def test_a_checkpoint_before_or_after_a_loss_changes_nothing(at, judged):
    whole, resumed = follow(), follow(lambda step, is_judged: (step, is_judged) == (at, judged))
    losses = whole.fields["average"]["validation_losses"]
    assert losses == [list(pair) for pair in LOSSES.items()][: len(losses)] and len(losses) > 4
    assert resumed.fields == whole.fields
    assert whole.valley.is_found
    assert resumed.mean().value() == whole.mean().value()
