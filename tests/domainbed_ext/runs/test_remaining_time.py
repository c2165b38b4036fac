import pytest

from domainbed_ext.runs import setup as run_setup
from domainbed_ext.runs.remaining_time import FORWARD, RemainingTime

VALIDATION, OTHERS = 267, 90 + 360 + 3 * 36  # images of DigitsShift: `out` of three, and all else at a tenth


@pytest.fixture
def time(make_args):
    setup = run_setup.set_up(make_args(steps=100, checkpoint_freq=20, hparams='{"batch_size": 10}', evaluate="lean"))
    return RemainingTime(setup)


def test_nothing_is_known_before_a_step_that_does_not_warm_up(time):
    assert (time.validation, time.others) == (VALIDATION, OTHERS)
    assert time.estimate(0) is None
    time.note_step(50.0)
    time.note_evaluation(0.1)
    assert time.estimate(1) is None


def test_steps_and_evaluations_that_are_to_come_are_counted_by_their_own_times(time):
    time.note_step(50.0)
    time.note_step(2.0)
    time.note_step(4.0)
    time.note_evaluation(0.1)
    # Evaluates after steps 0, 20, 40, 60, 80 and 99; then all of it, at the best of them and at the last.
    assert time.estimate(3) == pytest.approx(97 * 3.0 + 0.1 * (5 * VALIDATION + 2 * OTHERS))
    assert time.estimate(20) == pytest.approx(80 * 3.0 + 0.1 * (5 * VALIDATION + 2 * OTHERS))
    assert time.estimate(21) == pytest.approx(79 * 3.0 + 0.1 * (4 * VALIDATION + 2 * OTHERS))
    assert time.estimate(99) == pytest.approx(3.0 + 0.1 * (VALIDATION + 2 * OTHERS))
    assert time.estimate(100) == 0


def test_before_the_first_evaluation_a_step_tells_about_one(time):
    time.note_step(50.0)
    time.note_step(3.0)
    image = 3.0 / 30 * FORWARD
    assert time.estimate(2) == pytest.approx(98 * 3.0 + image * (5 * VALIDATION + 2 * OTHERS))


def test_a_step_of_several_minibatches_has_the_images_of_all(make_args):
    hparams = '{"batch_size": 5, "accumulate": 4}'
    time = RemainingTime(run_setup.set_up(make_args(steps=100, checkpoint_freq=20, evaluate="lean", hparams=hparams)))
    time.note_step(50.0)
    time.note_step(3.0)
    image = 3.0 / 60 * FORWARD
    assert time.estimate_evaluation(2) == pytest.approx(image * (5 * VALIDATION + 2 * OTHERS))


def test_a_run_that_is_evaluated_once_takes_all_splits_once(make_args):
    setup = run_setup.set_up(make_args(steps=100, checkpoint_freq=0))
    assert RemainingTime(setup).count_images(0) == VALIDATION + OTHERS
