"""Accuracy by class, and which classes are taken for which others."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from domainbed_ext.report.methods import row_label_of
from domainbed_ext.report.predictions.analysis import Analysis
from domainbed_ext.report.predictions.tested import Measured, Predicted, Tested, records_behind
from domainbed_ext.report.tables.columns import make_table, narrow
from domainbed_ext.report.tables.table import Table

CLASSES = 12  # columns of a table
PAIRS = 12  # rows of a table


def _share(label: int, predicted: int, tested: Tested) -> float:
    """The share of a class's images that are taken for a class; NaN if there are none."""
    row = tested.confusions[label]
    return float(row[predicted] / row.sum()) if row.sum() else float("nan")


def _mean_over_classes(tested: Tested) -> float:
    shares = [_share(label, label, tested) for label in range(tested.num_classes)]
    return float(np.nanmean(shares))


def per_class_table(predicted: Predicted) -> Table:
    """Makes the table of accuracies by class, with a row per method.

    Args:
        predicted: What the runs predict.
    """
    classes = len(predicted.classes)
    shown = list(range(classes))
    if classes > CLASSES:
        hardest = {label: _mean_share(predicted, label, label) for label in shown}
        shown = sorted(sorted(shown, key=lambda label: hardest[label])[:CLASSES])
    part = f"The {len(shown)} hardest of {classes} classes; per_class.csv has all. " if len(shown) < classes else ""
    columns = [Measured(predicted.classes[label], predicted, partial(_share, label, label), best=1) for label in shown]
    every = Measured("All classes", predicted, _mean_over_classes, best=1)
    return make_table(
        f"{predicted.title}, accuracy by class",
        predicted.algorithms,
        [*columns, every],
        f"{part}Accuracy on the images of each class of the test domains in %, mean over trials of each trial's mean "
        f"over test domains ± {predicted.comparison.error}. All classes: each counts alike.{predicted.caveat}",
    )


def per_class_rows(predicted: Predicted) -> Iterator[dict[str, Any]]:
    """Makes the rows of per_class.csv.

    Args:
        predicted: What the runs predict.
    """
    for algorithm, each in predicted.by_algorithm.items():
        for label, name in enumerate(predicted.classes):
            if (summary := predicted.summary(algorithm, partial(_share, label, label))) is not None:
                images = sum(int(tested.confusions[label].sum()) for tested in each)
                yield {**predicted.comparison.key(algorithm), "class": name, "images": images, **summary._asdict()}


def confusion_table(predicted: Predicted) -> Table | None:
    """Makes the table of the most frequent confusions, with a column per method.

    Args:
        predicted: What the runs predict.
    """
    classes = len(predicted.classes)
    counts = sum(tested.confusions for each in predicted.by_algorithm.values() for tested in each)
    wrong = np.argwhere(np.asarray(counts) * (1 - np.eye(classes)) > 0).tolist()
    shares = {(label, other): _mean_share(predicted, label, other) for label, other in wrong}
    pairs = sorted(shares, key=lambda pair: -shares[pair])[:PAIRS]
    if not pairs:
        return None
    return Table(
        f"{predicted.title}, most frequent confusions",
        ["Class", "Predicted as", *(row_label_of(algorithm) for algorithm in predicted.algorithms)],
        [
            [
                predicted.classes[label],
                predicted.classes[other],
                *(
                    narrow(predicted.summary(algorithm, partial(_share, label, other)))
                    for algorithm in predicted.algorithms
                ),
            ]
            for label, other in pairs
        ],
        "Images of a class of the test domains that are predicted as another class, in % of the class's images; mean "
        f"over trials of each trial's mean over test domains ± {predicted.comparison.error}. Rows: the {len(pairs)} "
        f"pairs with the highest mean over methods; confusion.csv has all.{predicted.caveat}",
        origins={
            (row, column): records_behind(each)
            for row in range(len(pairs))
            for column, each in enumerate(predicted.by_algorithm.values(), 2)
        },
        texts=2,
    )


def confusion_rows(predicted: Predicted) -> Iterator[dict[str, Any]]:
    """Makes the rows of confusion.csv: counts over all trials, by test domain.

    Args:
        predicted: What the runs predict.
    """
    classes, labels = predicted.classes, predicted.comparison.environments
    for algorithm, each in predicted.by_algorithm.items():
        for env in sorted({tested.env for tested in each}):
            counts = sum(tested.confusions for tested in each if tested.env == env)
            for label, other in np.argwhere(counts).tolist():
                yield {
                    **predicted.comparison.key(algorithm),
                    "environment": labels[env],
                    "class": classes[label],
                    "predicted": classes[other],
                    "images": int(np.asarray(counts)[label, other]),
                }


def _mean_share(predicted: Predicted, label: int, other: int) -> float:
    """The mean over methods of the share of a class's images that are taken for a class, in percent."""
    share = partial(_share, label, other)
    summaries = [predicted.summary(algorithm, share) for algorithm in predicted.algorithms]
    return float(np.mean([summary.mean for summary in summaries if summary is not None]))


PER_CLASS = Analysis("per_class", per_class_table, per_class_rows)
CONFUSION = Analysis("confusion", confusion_table, confusion_rows)
