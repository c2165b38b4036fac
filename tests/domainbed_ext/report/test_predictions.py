"""What the report computes from predictions, of runs that were never run."""

import numpy as np
import pytest

from domainbed_ext.report.predictions import agreement, calibration, confusion, ensembles, mistakes
from domainbed_ext.report.predictions import all as analyses
from domainbed_ext.report.predictions.tested import Decisions, ImageOutputs, RunOutputs, gather
from domainbed_ext.report.results import Results

CLASSES = ("dog", "horse", "house")
NAMES = ["A", "C", "P"]
SIZE = 10


def make_record(algorithm, trial, env, **args):
    values = {"dataset": "PACS", "algorithm": algorithm, "test_envs": [env], "trial_seed": trial, "hparams_seed": 0}
    accuracies = {f"env{i}_{split}_acc": 0.5 for i in range(3) for split in ("in", "out")}
    run = f"{algorithm}-{trial}-{env}"
    return {"args": {**values, **args}, "environments": NAMES, "step": 7, "run": run, **accuracies}


def make_outputs(predicted, sure=0.8, names=None):
    """ImageOutputs of an environment whose labels are 0, 1, 2, 0, 1, 2, ...; the first two images are in `out`."""
    probabilities = np.full((SIZE, 3), (1 - sure) / 2, np.float32)
    probabilities[np.arange(SIZE), predicted] = sure
    splits = np.array(["out"] * 2 + ["in"] * (SIZE - 2))
    return ImageOutputs(names or tuple(f"{i}.png" for i in range(SIZE)), np.arange(SIZE) % 3, probabilities, splits)


def right(*wrong, to=1):
    """Predicted classes: the labels, but for some images, which are taken for the next class but `to`."""
    predicted = np.arange(SIZE) % 3
    predicted[list(wrong)] = (predicted[list(wrong)] + to) % 3
    return predicted


def report(predicted_by, **more):
    """What is gathered of leave-one-out runs.

    Args:
        predicted_by: By (method, trial), predicted classes and maybe the confidence; the same on all environments.
        more: Arguments of the records.
    """
    records = [make_record(*key, env, **more) for key in predicted_by for env in range(3)]
    outputs = {f"{algorithm}-{trial}": given for (algorithm, trial), given in predicted_by.items()}

    def load(record):
        given = outputs[record["run"].rpartition("-")[0]]
        if given is None or record["step"] != 7:
            return None
        return RunOutputs(CLASSES, [make_outputs(*given)] * 3)

    (comparison,) = Results(records).panels
    return gather(comparison, load)


def test_accuracies_are_of_the_images_that_the_tables_are_of():
    predicted = report({("LP", 0): (right(0, 1, 3),)})  # images 0 and 1 are in `out`
    (first, *_) = predicted.by_algorithm["LP"]
    assert first.out_of_domain.is_right.mean() == 7 / 8 and first.whole.is_right.mean() == 7 / 10
    assert first.in_domain.is_right.tolist() == [False] * 4  # two images of each of two training domains
    everything = report({("LP", 0): (right(0, 1, 3),)}, test_on="in")
    assert everything.by_algorithm["LP"][0].out_of_domain.is_right.mean() == 7 / 8


def test_accuracy_by_class_and_confusions():
    predicted = report(
        {("LP", 0): (right(3),), ("LP", 1): (right(3, 6),), ("BA", 0): (right(),), ("BA", 1): (right(),)}
    )
    table = confusion.per_class_table(predicted)
    assert table.columns == ["Algorithm", "dog", "horse", "house", "All classes"]
    assert table.algorithms == ["BA", "LP"]
    # Images 3, 6 and 9 are the tested dogs: one of three is wrong in a trial, two in the other.
    assert table.rows[1][1:] == ["50.0±11.8", "100.0±0.0", "100.0±0.0", "83.3±3.9"]
    assert table.best >= {(0, 1), (0, 4)}
    assert {origin.run for origin in table.origins[1, 1]} == {f"LP-{t}-{e}" for t in (0, 1) for e in range(3)}
    confused = confusion.confusion_table(predicted)
    assert confused.columns[:2] == ["Class", "Predicted as"] and confused.texts == 2
    assert confused.rows == [["dog", "horse", "0.0±0.0", "50.0±11.8"]]
    rows = [row for row in confusion.confusion_rows(predicted) if row["algorithm"] == "LP" and row["class"] == "dog"]
    assert [(row["environment"], row["predicted"], row["images"]) for row in rows] == [
        (env, name, 3) for env in NAMES for name in ("dog", "horse")
    ]
    shares = {row["class"]: row["mean"] for row in confusion.per_class_rows(predicted) if row["algorithm"] == "LP"}
    assert shares == pytest.approx({"dog": 50.0, "horse": 100.0, "house": 100.0})


def test_of_many_classes_the_hardest_are_shown(monkeypatch):
    monkeypatch.setattr(confusion, "CLASSES", 2)
    table = confusion.per_class_table(report({("LP", 0): (right(3, 6, 4),)}))
    assert table.columns == ["Algorithm", "dog", "horse", "All classes"]
    assert table.caption.startswith("The 2 hardest of 3 classes; per_class.csv has all.")


def test_calibration_error_is_the_gap_of_confidence_and_accuracy_by_bin():
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55], np.float32)
    is_right = np.array([1, 1, 1, 0, 1, 1])
    bins = calibration.bin_by_confidence(Decisions(np.ones(6, int), is_right, confidence))
    assert bins.number.tolist() == [8, 14] and bins.images.tolist() == [2, 4]
    assert bins.error == pytest.approx((4 * abs(0.75 - 0.95) + 2 * abs(1 - 0.55)) / 6)
    predicted = report({("LP", 0): (right(2, 3), 0.9), ("BA", 0): (right(), 0.9)})
    table = calibration.calibration_table(predicted)
    assert table.rows[1] == ["LP (linear probe)", "75.0", "90.0", "15.0", "10.0"]
    assert "in 15 bins of equal width" in table.caption and "One trial only" in table.caption
    assert (0, 3) in table.best  # the lowest error is the best
    rows = [row for row in calibration.calibration_rows(predicted) if row["algorithm"] == "LP"]
    assert [(row["images_of"], row["images"], row["accuracy"]) for row in rows] == [
        ("out_of_domain", 24, 75.0),
        ("in_domain", 12, 100.0),
    ]
    assert rows[0]["low"] < 0.9 <= rows[0]["high"]


def test_agreement_is_by_trial_and_of_a_method_with_itself_between_trials():
    predicted = report({("LP", 0): (right(0),), ("LP", 1): (right(1),), ("BA", 0): (right(0, 2),)})
    pair = agreement.compare_methods(predicted, "LP", "BA")
    assert pair[:4] == pytest.approx((0.9, 0.8, 0.1, 0.0))
    table = agreement.agreement_table(predicted)
    assert [row[1:] for row in table.rows] == [["X", "90.0"], ["90.0", "80.0"]]
    rows = {(row["algorithm"], row["second"]): row for row in agreement.agreement_rows(predicted)}
    assert rows.keys() == {("BA", "LP"), ("LP", "LP")}
    assert rows["BA", "LP"]["agreement"] == pytest.approx(90.0) and 0 < rows["BA", "LP"]["kappa"] < 1
    same = report({("LP", 0): (right(),), ("LP", 1): (right(),)})
    assert agreement.compare_methods(same, "LP", "LP").kappa == 1


def test_an_ensemble_is_of_the_mean_of_probabilities():
    one, other = (right(0, 2), 0.9), (right(0, 3), 0.6)
    predicted = report({("LP", 0): one, ("LP", 1): other, ("BA", 0): one})
    (first, *rest) = ensembles.make_ensembles(predicted)["LP"]
    # The surer run decides: image 2 is wrong, image 3 is right, and 0 is wrong in both.
    assert first == (0, 2, pytest.approx(0.8), pytest.approx(0.8)) and len(rest) == 2
    table = ensembles.ensembles_table(predicted)
    assert table.rows[1] == ["LP (linear probe)", "2", "80.0", "80.0", "+0.0"] and table.rows[0][1:] == ["X"] * 4
    assert [row["ensemble"] for row in ensembles.ensembles_rows(predicted)] == pytest.approx([80.0] * 3)
    assert ensembles.ensembles_table(report({("LP", 0): one})) is None


def test_images_that_all_methods_or_one_alone_get_wrong():
    predicted = report(
        {
            ("LP", 0): (right(0, 1),),
            ("LP", 1): (right(0, 1, 5),),  # half of the trials are not most of them
            ("BA", 0): (right(0, 2),),
            ("FullFT", 0): (right(0, 2),),
        }
    )
    groups = {group.title: [each.name for each in group.images] for group in mistakes.group_mistakes(predicted)}
    assert groups == {
        "All methods get them wrong": ["0.png"] * 3,
        "linear probe alone gets them wrong": ["1.png"] * 3,
        "linear probe alone gets them right": ["2.png"] * 3,
    }
    table = mistakes.mistakes_table(predicted)
    assert {row[0]: row[1:] for row in table.rows}["LP (linear probe)"] == ["6", "3", "3"]
    assert "30 in all" in table.caption and "All methods get 3 images wrong, and none gets 21 wrong" in table.caption
    (row, *_) = mistakes.mistakes_rows(predicted)
    assert row == {
        **{"dataset": "PACS", "environment": "A", "image": "0.png", "class": "dog", "predicted": "horse"},
        **{"methods_wrong": 3, "wrong": "; ".join(predicted.algorithms), "right": ""},
    }
    assert mistakes.mistakes_table(report({("LP", 0): (right(0),)})) is None


def test_runs_without_predictions_are_counted_and_other_images_not_compared():
    predicted = report({("LP", 0): (right(),), ("BA", 0): None})
    assert predicted.algorithms == ["LP"] and predicted.left_out == 3
    for analysis in analyses.ANALYSES:
        if table := analysis.table(predicted):
            assert "Left out: 3 run(s) without predictions of the chosen step." in table.caption
    assert report({("LP", 0): None}) is None
    files = analyses.make_files([predicted])
    assert set(files) == {"per_class", "confusion", "calibration"}
