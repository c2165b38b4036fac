import pytest

from domainbed_ext import hparams_registry
from domainbed_ext.algorithms.names import canonical_name
from domainbed_ext.averaging.choice import make_average
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.report.methods import label_of
from domainbed_ext.runs.remaining_time import RemainingTime
from domainbed_ext.runs.setup import set_up
from domainbed_ext.sweep.check import count_records


def hparams(dataset="PACS", **changes):
    return {**hparams_registry.default_hparams("BOnly", dataset), **changes}


@pytest.mark.parametrize(
    ("chosen", "steps", "start"),
    [(None, 5001, 100), (None, 300, 60), (None, 1, 0), (0, 10, 0), (7, 10, 7), (0.25, 300, 75), (0.0, 300, 0)],
)
def test_a_moving_average_starts_after_steps_or_a_share_of_them(chosen, steps, start):
    assert make_average(hparams(average="ma", ma_start=chosen), steps, 1).start == start


@pytest.mark.parametrize(
    ("changes", "steps", "evaluations", "sentence"),
    [
        ({"average": "ma", "ma_start": 300}, 300, 1, "ma_start 300 leaves none of the run's 300 steps"),
        ({"average": "swad"}, 301, 1, "needs the validation losses of at least 3 .* a --checkpoint_freq from 1 to 150"),
        ({"average": "swad", "swad_optimum_patience": 1}, 301, 1, "at least 2 evaluations"),
        ({"average": "swad"}, 2, 2, "give at least 3 --steps"),
    ],
)
def test_a_run_that_is_too_short_is_refused(changes, steps, evaluations, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        make_average(hparams(**changes), steps, evaluations)


@pytest.mark.parametrize("checkpoint_freq", [1, 7, 149, 150])
def test_the_frequencies_that_the_sentence_names_are_enough(make_args, checkpoint_freq):
    args = make_args(algorithm="BOnly@average=swad", steps=301, checkpoint_freq=checkpoint_freq)
    assert set_up(args).make_average().judges


def test_swad_without_evaluations_is_refused_before_the_run(make_args):
    with pytest.raises(BenchmarkError, match="--checkpoint_freq from 1 to"):
        set_up(make_args(algorithm="BOnly@average=swad", steps=10, checkpoint_freq=0))


@pytest.mark.parametrize(
    "changes",
    [
        {"average": "ema"},
        {"ma_start": -1},
        {"ma_start": 1.5},
        {"ma_start": "late"},
        {"swad_optimum_patience": 0},
        {"swad_overfit_patience": 2.5},
        {"swad_tolerance": 0.9},
    ],
)
def test_values_out_of_range_are_refused(changes):
    (name,) = changes
    with pytest.raises(BenchmarkError, match=f"^{name} .* should be"):
        hparams_registry.check(hparams(**changes))


def test_defaults_are_the_published_ones():
    names = ("swad_optimum_patience", "swad_overfit_patience", "swad_tolerance")
    assert [hparams("PACS")[name] for name in names] == [3, 6, 1.3]
    assert [hparams("VLCS")[name] for name in names] == [3, 6, 1.2]


def test_labels_name_the_average():
    name = canonical_name("BOnly@average=swad")
    assert label_of(name) == "LoRA-FA, SWAD"
    assert label_of("FullFT@average=ma,ma_start=50") == "full fine-tuning, moving average, start 50"


def test_evaluations_of_the_loss_alone_are_counted_as_such(make_args):
    words = {"steps": 100, "checkpoint_freq": 20, "hparams": '{"batch_size": 10}'}
    plain, swad = (set_up(make_args(**words, algorithm=name)) for name in ("LP", "LP@average=swad"))
    times = [RemainingTime(setup) for setup in (plain, swad)]
    validation, others = times[0].validation, times[0].others
    assert [time.count_images(0) for time in times] == [6 * validation + 2 * others, 7 * validation + others]
    assert [time.count_images(100) for time in times] == [0, 0]
    assert [count_records(setup) for setup in (plain, swad)] == [6, 1]
