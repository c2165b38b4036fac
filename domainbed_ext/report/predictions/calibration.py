"""Whether a model is right as often as it is sure: calibration error, and the bins of a reliability diagram."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from domainbed_ext.report.predictions.analysis import Analysis
from domainbed_ext.report.predictions.tested import Decisions, Measured, Predicted
from domainbed_ext.report.tables.columns import make_table
from domainbed_ext.report.tables.table import Table

BINS = 15
"""Number of bins of equal width from 0 to 1, as Guo et al. (2017) have them."""


class Bins(NamedTuple):
    """The bins that hold an image, by ascending confidence.

    Attributes:
        number: Number of the bin, from 0.
        images: Number of images.
        confidence: Mean confidence.
        accuracy: Share of images that are classified correctly.
    """

    number: NDArray[np.int64]
    images: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The expected calibration error: the mean over images of the bin's |accuracy - confidence|."""
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.images))


def bin_by_confidence(decisions: Decisions) -> Bins:
    """Sorts images into bins by the probability of their predicted class.

    Args:
        decisions: What was predicted, of at least one image.
    """
    from sklearn.calibration import calibration_curve  # takes a second to import

    accuracy, confidence = calibration_curve(decisions.is_right, decisions.confidence, n_bins=BINS)
    inner = np.linspace(0, 1, BINS + 1)[1:-1]
    counts = np.bincount(np.searchsorted(inner, decisions.confidence), minlength=BINS)
    return Bins(np.flatnonzero(counts), counts[counts > 0], confidence, accuracy)


def calibration_table(predicted: Predicted) -> Table:
    """Makes the table of accuracy, confidence and calibration error, with a row per method.

    Args:
        predicted: What the runs predict.
    """
    return make_table(
        f"{predicted.title}, calibration",
        predicted.algorithms,
        [
            Measured("Accuracy", predicted, lambda tested: float(tested.out_of_domain.is_right.mean()), best=1),
            Measured("Confidence", predicted, lambda tested: float(tested.out_of_domain.confidence.mean())),
            Measured("ECE", predicted, lambda tested: bin_by_confidence(tested.out_of_domain).error, best=-1),
            Measured("ECE in-domain", predicted, lambda tested: bin_by_confidence(tested.in_domain).error),
        ],
        "Accuracy, confidence (mean probability of the predicted class) and ECE on the test domains in %; in-domain: "
        "on the held-out images of the training domains. ECE: expected calibration error, the mean over images of "
        f"the absolute difference of accuracy and confidence in their bin, in {BINS} bins of equal width, of each run "
        "and test domain; mean over "
        f"trials of each trial's mean over test domains ± {predicted.comparison.error}. It is the larger the fewer "
        f"images there are.{predicted.caveat}",
    )


def reliability(predicted: Predicted, algorithm: str) -> dict[str, Bins]:
    """Sorts the images of all runs of a method into bins, out of domain and in domain.

    Args:
        predicted: What the runs predict.
        algorithm: Id of the method.
    """
    each = predicted.by_algorithm[algorithm]
    of_runs = {tested.record["run"]: tested.in_domain for tested in each}
    return {
        "out_of_domain": bin_by_confidence(Decisions.pooled([tested.out_of_domain for tested in each])),
        "in_domain": bin_by_confidence(Decisions.pooled(list(of_runs.values()))),
    }


def calibration_rows(predicted: Predicted) -> Iterator[dict[str, Any]]:
    """Makes the rows of calibration.csv: the bins of reliability diagrams, over all trials and test domains.

    Args:
        predicted: What the runs predict.
    """
    for algorithm in predicted.algorithms:
        for domain, bins in reliability(predicted, algorithm).items():
            for number, images, confidence, accuracy in zip(*bins, strict=True):
                yield {
                    **predicted.comparison.key(algorithm),
                    "images_of": domain,
                    "low": number / BINS,
                    "high": (number + 1) / BINS,
                    "images": int(images),
                    "confidence": 100 * confidence,
                    "accuracy": 100 * accuracy,
                }


CALIBRATION = Analysis("calibration", calibration_table, calibration_rows)
