"""The hierarchical bootstrap of differences between methods: over trials, and over images.

A mean over T trials has two errors: other trials would have had other splits, starts and batches, and other images of
the same domains would have been easier for the one method or the other. Images are drawn with replacement from those of
an environment, by name: an image that several runs were evaluated on is drawn equally often for all of them, so that
differences stay paired, and what is common to all trials is not averaged away. Where an accuracy is of some of the
images, such as those held out, it is of those that were drawn. Trials are drawn one fewer than there are, without which
the bootstrap's error would be too small by a factor of √(1 − 1/T) (Hesterberg, Unbiasing the Bootstrap, 2004). The
variance of the means of such draws is s²/T, with s² the sample variance over trials, so trials need no random numbers.

s²/T holds what differs between trials, which includes the noise of each trial's images. It lacks what trials share: an
image that is easier for one of the methods in all trials. That is the covariance of two trials under draws of images,
and the standard error is

    √(s²/T + max(0, mean covariance of two trials)).

With V a trial's variance under draws of images and C the covariance, the expectation of s²/T is (σ² + V − C)/T, and the
variance of the mean is (σ² + V)/T + (1 − 1/T) C, their sum. (The variance over draws of images and trials together
would count V three times: Owen, The Pigeonhole Bootstrap, Annals of Applied Statistics, 2007.)

Without images, this is the usual standard error over trials. A 95 % interval is the mean ± the 97.5 % quantile of
Student's t with T − 1 degrees of freedom times the standard error. (The percentiles of a bootstrap over three trials,
which are its ends, hold the true mean in 75 % of cases.)
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

RESAMPLES = 2000
_ROOM = 4_000_000  # numbers that are drawn at once

Key = TypeVar("Key", bound=Hashable)


class Images(NamedTuple):
    """The images that an accuracy is of.

    Attributes:
        names: Their names, which tell the images of an environment apart.
        is_right: Whether each is classified correctly.
    """

    names: Sequence[str]
    is_right: np.ndarray


def resample_accuracies(
    images: Mapping[Key, Images], stream: Sequence[int], resamples: int = RESAMPLES
) -> dict[Key, np.ndarray]:
    """Draws the images of an environment, and computes accuracies of what was drawn.

    Args:
        images: Images of each accuracy, all of one environment.
        stream: Seed, as a sequence of whole numbers. With the same images the same are drawn.
        resamples: Number of draws.

    Returns:
        Accuracy in each draw [resamples], float32 in [0, 1]. Where none of its images is drawn, it is as observed.
    """
    places = _places(images.values())
    columns: list[np.ndarray] = []  # of numbers per image: 1 where it counts
    column_of: dict[bytes, int] = {}  # runs of one trial have the same images in a split: counted once
    pairs: dict[Key, tuple[int, int]] = {}
    for key, (names, is_right) in images.items():
        where = np.fromiter((places[name] for name in names), np.intp, len(names))
        right, present = np.zeros((2, len(places)), np.float32)
        present[where] = 1
        right[where] = is_right
        pairs[key] = (_column(right, columns, column_of), _column(present, columns, column_of))
    matrix = np.stack(columns, axis=1)
    # Sums of whole numbers in float32 are exact up to 2²⁴, in whatever order they are summed.
    sums = np.concatenate([counts @ matrix for counts in _draw(len(places), stream, resamples)])
    accuracies = {}
    for key, (column, column_present) in pairs.items():
        observed = float(np.mean(images[key].is_right))
        drawn = sums[:, column_present]
        shares = sums[:, column] / np.maximum(drawn, 1)
        accuracies[key] = np.where(drawn > 0, shares, np.float32(observed))
    return accuracies


def shared_error(drawn: np.ndarray) -> float:
    """The part of a mean's standard error that more trials do not lower, see the module.

    Args:
        drawn: Values under draws of images [draws, trials], of at least two trials.

    Returns:
        √(max(0, mean covariance of two trials)).
    """
    trials = drawn.shape[1]
    covariances = np.cov(drawn, rowvar=False)
    covariance = (covariances.sum() - np.trace(covariances)) / (trials * (trials - 1))
    return math.sqrt(max(0.0, float(covariance)))


def _places(images: Iterable[Images]) -> dict[str, int]:
    """The place of each image in the order of names, which does not depend on the order of runs."""
    alike = {tuple(each.names) for each in images}
    return {name: place for place, name in enumerate(sorted(set().union(*alike)))}


def _column(values: np.ndarray, columns: list[np.ndarray], column_of: dict[bytes, int]) -> int:
    """The number of the column with these values, which is added if there is none."""
    number = column_of.setdefault(values.tobytes(), len(columns))
    if number == len(columns):
        columns.append(values)
    return number


def _draw(count: int, stream: Sequence[int], resamples: int) -> Iterator[np.ndarray]:
    """How often each of some images is drawn, some draws at a time [draws, images]."""
    random = np.random.default_rng(stream)
    most = max(1, _ROOM // count)
    for start in range(0, resamples, most):
        draws = min(most, resamples - start)
        drawn = random.integers(0, count, (draws, count)) + count * np.arange(draws)[:, None]
        yield np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count).astype(np.float32)
