"""Tests, intervals and power, against formulas and brute force."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from domainbed_ext.report.inference.bootstrap import Images, resample_accuracies, shared_error
from domainbed_ext.report.inference.holm import holm
from domainbed_ext.report.inference.power import MOST_TRIALS, power, trials_needed
from domainbed_ext.report.inference.sign_test import Signs, sign_test
from domainbed_ext.report.inference.student import t_test
from domainbed_ext.report.summary import estimate


@pytest.mark.parametrize(
    ("higher", "lower", "p"),
    [
        (9, 1, 2 * 11 / 2**10),
        (1, 9, 2 * 11 / 2**10),
        (5, 0, 2 / 2**5),
        (7, 3, 2 * (1 + 10 + 45 + 120) / 2**10),
        (3, 3, 1),
        (0, 0, 1),
    ],
)
def test_the_sign_test_counts_outcomes(higher, lower, p):
    assert sign_test(higher, lower) == pytest.approx(p, rel=1e-12)


def test_signs_of_what_rounds_are_equal():
    signs = Signs.of([0.1 + 0.2 - 0.3, 0.01, -0.02, 0.03, math.nan])
    assert signs == (2, 1, 1) and signs.total == 4 and signs.p_value == sign_test(2, 1)


def test_holm_by_hand():
    # 4 × 0.005, 3 × 0.01, then 2 × 0.03; 1 × 0.04 is not below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1] and holm([]) == [] and holm([0.02]) == [0.02]
    adjusted = holm([0.01, math.nan, 0.2])
    assert math.isnan(adjusted[1]) and [adjusted[0], adjusted[2]] == pytest.approx([0.02, 0.2])


def power_by_integration(effect, trials):
    """P(|T| > limit), T = (Z + √n effect) / √(V / (n − 1)), by the midpoint rule over V, which is χ² distributed."""
    freedom = trials - 1
    # The 97.5 % quantile of Student's t, from the half-width of an interval of values with mean 0.
    values = [-1.0, 1.0] * (trials // 2) if trials % 2 == 0 else [0.0, *[-1.0, 1.0] * (freedom // 2)]
    limit = estimate(values).interval[1] / 100 / (np.std(values, ddof=1) / math.sqrt(trials))
    edges = np.linspace(0, freedom + 40 * math.sqrt(2 * freedom), 400_001)
    v = (edges[1:] + edges[:-1]) / 2
    log_density = (freedom / 2 - 1) * np.log(v) - v / 2 - freedom / 2 * math.log(2) - math.lgamma(freedom / 2)
    weights = np.exp(log_density) * (edges[1] - edges[0])
    cut = limit * np.sqrt(v / freedom)
    shift = math.sqrt(trials) * effect
    above = np.array([math.erfc((c - shift) / math.sqrt(2)) / 2 for c in cut[::20]])
    below = np.array([math.erfc((c + shift) / math.sqrt(2)) / 2 for c in cut[::20]])
    return float(np.interp(v, v[::20], above + below) @ weights)


@pytest.mark.parametrize(("effect", "trials"), [(1.0, 10), (0.5, 34), (0.3, 6), (2.5, 4)])
def test_power_is_the_integral(effect, trials):
    assert power(effect * math.sqrt(trials), trials) == pytest.approx(power_by_integration(effect, trials), abs=1e-4)


def test_the_number_of_trials_is_the_one_of_power_tables():
    # Cohen's tables: a paired t-test at 5 % with power 0.8.
    assert [trials_needed(effect, 1.0) for effect in (0.2, 0.5, 0.8, 1.0)] == [199, 34, 15, 10]
    assert trials_needed(-1.5, 3.0) == trials_needed(0.5, 1.0)
    assert power(0.5 * math.sqrt(33), 33) < 0.8 <= power(0.5 * math.sqrt(34), 34)


def test_what_trials_share_takes_more_of_them_or_cannot_be_shown():
    # 2.8 standard errors are what a normal test takes, so a difference of less is never shown.
    assert trials_needed(1.0, 1.0) == 10 < trials_needed(1.0, 1.0, shared=0.3) < 100
    assert trials_needed(1.0, 1.0, shared=0.4) is None
    needed = trials_needed(1.0, 1.0, shared=0.3)
    errors = [math.hypot(1 / math.sqrt(trials), 0.3) for trials in (needed - 1, needed)]
    assert power(1 / errors[0], needed - 1) < 0.8 <= power(1 / errors[1], needed)


@pytest.mark.parametrize("trials", [2, 3, 20])
def test_p_is_that_of_scipy_and_below_5_percent_where_the_interval_is_off_zero(trials):
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.normal(0.01, 0.02, trials)
        interval = estimate(list(values), 0.0).interval
        p = t_test(np.mean(values), np.std(values, ddof=1) / math.sqrt(trials), trials)
        assert p == pytest.approx(ttest_1samp(values, 0).pvalue, rel=1e-9)
        assert (p < 0.05) == (not interval[0] <= 0 <= interval[1])


def test_p_without_an_error_or_a_mean():
    assert t_test(0.0, 0.0, 3) == 1.0 == t_test(0.0, 1.0, 3)
    assert t_test(2.0, 0.0, 3) == 0.0
    assert math.isnan(t_test(2.0, 1.0, 1)) and math.isnan(t_test(math.nan, 1.0, 3))


def test_numbers_of_trials_that_there_are_none_of():
    assert trials_needed(1.0, 0.0) == 2 == trials_needed(100.0, 1.0)
    for mean, deviation in ((0.0, 1.0), (1e-17, 3e-17), (0.0, 0.0), (math.nan, 1.0), (1.0, math.nan), (0.01, 1.0)):
        assert trials_needed(mean, deviation) is None
    assert power(0.01 * math.sqrt(MOST_TRIALS), MOST_TRIALS) < 0.8


def drawn_images(rng, count=12):
    """Accuracies of two runs on all images, and of one on some."""
    names = [f"image{number}" for number in range(count)]
    right = rng.random((3, count)) < 0.6
    some = rng.permutation(count)[: count // 3]
    return {
        "a": Images(names, right[0]),
        "b": Images(names, right[1]),
        "c": Images([names[place] for place in some], right[2, some]),
    }


def naive_accuracies(images, stream, resamples):
    """Draws one image after the other."""
    names = sorted({name for each in images.values() for name in each.names})
    random = np.random.default_rng(stream)
    accuracies = {key: [] for key in images}
    for _ in range(resamples):
        drawn = [names[place] for place in random.integers(0, len(names), len(names))]
        for key, (own, is_right) in images.items():
            known = dict(zip(own, is_right, strict=True))
            answers = [known[name] for name in drawn if name in known]
            accuracies[key].append(np.mean(answers) if answers else np.mean(is_right))
    return accuracies


def test_images_are_drawn_once_for_all_runs():
    images = drawn_images(np.random.default_rng(0))
    drawn, naive = resample_accuracies(images, (7, 1), 40), naive_accuracies(images, (7, 1), 40)
    for key in images:
        assert drawn[key] == pytest.approx(naive[key], abs=1e-6)
    backwards = resample_accuracies(dict(reversed(images.items())), (7, 1), 40)
    assert all((backwards[key] == drawn[key]).all() for key in images)
    assert (resample_accuracies(images, (8, 1), 40)["a"] != drawn["a"]).any()


def test_draws_do_not_depend_on_how_many_fit_at_once(monkeypatch):
    images = drawn_images(np.random.default_rng(0))
    drawn = resample_accuracies(images, (7,), 40)
    monkeypatch.setattr("domainbed_ext.report.inference.bootstrap._ROOM", 30)
    again = resample_accuracies(images, (7,), 40)
    assert all((drawn[key] == again[key]).all() for key in images)


def test_of_no_drawn_image_an_accuracy_is_as_observed():
    images = {"one": Images(["a"], np.array([True])), "all": Images(list("abcdefgh"), np.arange(8) < 4)}
    drawn = resample_accuracies(images, (0,), 50)
    assert (drawn["one"] == 1).all() and drawn["all"].std() > 0


def test_the_shared_error_is_the_covariance_of_trials():
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(50, 4)) + rng.normal(size=(50, 1))
    pairs = [np.cov(drawn[:, one], drawn[:, other])[0, 1] for one, other in itertools.combinations(range(4), 2)]
    assert shared_error(drawn) == pytest.approx(math.sqrt(np.mean(pairs)))
    opposite = np.stack([drawn[:, 0], -drawn[:, 0]], axis=1)  # trials share nothing
    assert shared_error(opposite) == 0
    half = 3.182446 * math.hypot(100 * np.std([0.1, 0.2, 0.4, 0.9], ddof=1) / 2, 3)
    assert estimate([0.1, 0.2, 0.4, 0.9], shared=3).interval == pytest.approx((40 - half, 40 + half), abs=1e-4)


@pytest.mark.parametrize("shared", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("held_out", [20, 60])
def test_the_error_is_the_deviation_of_means_over_new_trials_and_images(shared, held_out):
    rng, trials, images = np.random.default_rng(1), 4, 60
    names = [str(number) for number in range(images)]
    means, errors = [], []
    for _ in range(600):
        values = shared * rng.normal(size=images) + rng.normal(size=(trials, images)) + rng.normal(size=(trials, 1)) / 8
        kept = {
            trial: Images([names[place] for place in places], values[trial, places])
            for trial, places in enumerate(rng.permuted(np.tile(np.arange(images), (trials, 1)), axis=1)[:, :held_out])
        }
        drawn = resample_accuracies(kept, (0,), 200)
        by_trial = [float(np.mean(each.is_right)) for each in kept.values()]
        means.append(np.mean(by_trial))
        shared_by_trials = shared_error(np.stack([drawn[trial] for trial in range(trials)], axis=1))
        errors.append(math.hypot(np.std(by_trial, ddof=1) / math.sqrt(trials), shared_by_trials))
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.12)


def simulate(rng, trials, over_trials, over_images, images=150, runs=300):
    """How many of the 95 % intervals of simulated experiments hold the true difference, which is 0.

    Each trial has an effect of its own, and so has each image: both methods answer images of the same names.
    """
    held = 0
    names = [str(number) for number in range(images)]
    for experiment in range(runs):
        easier = rng.normal(0, over_images, images)
        answers = {}
        for trial in range(trials):
            edge = rng.normal(0, over_trials) + easier
            answers[trial, "a"] = Images(names, rng.random(images) < 0.5 + edge / 2)
            answers[trial, "b"] = Images(names, rng.random(images) < 0.5 - edge / 2)
        drawn = resample_accuracies(answers, (experiment,), 200)
        differences = np.stack([drawn[trial, "a"] - drawn[trial, "b"] for trial in range(trials)], axis=1)
        observed = [
            answers[trial, "a"].is_right.mean() - answers[trial, "b"].is_right.mean() for trial in range(trials)
        ]
        low, high = estimate(observed, 100 * shared_error(differences)).interval
        held += low <= 0 <= high
    return held / runs


def test_intervals_hold_the_truth_where_trials_differ():
    # Intervals over images alone would hold it in less than half of the experiments.
    held = simulate(np.random.default_rng(0), trials=4, over_trials=0.3, over_images=0)
    assert held == pytest.approx(0.95, abs=0.04)


def test_intervals_hold_the_truth_where_images_differ():
    # Intervals over trials alone would hold it in 61 % of the experiments.
    held = simulate(np.random.default_rng(0), trials=8, over_trials=0.01, over_images=0.6)
    assert 0.92 <= held <= 1
