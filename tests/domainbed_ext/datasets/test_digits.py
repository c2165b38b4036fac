"""DigitsShift: which digit is where, and what an image of each environment looks like."""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from domainbed_ext.datasets.digits import ENVIRONMENTS, NUM_CLASSES, SIZE, digits_environments, digits_split

LABELS_SHA256 = "ca53482c6f137cb812d739750125967279cc2cfbf3e6fd4f2ef71df71ce620e3"
MEANS = {"blended": 98.14, "plain": 51.03, "rotated": 50.51, "sketched": 227.14}  # grey levels


def _correlations(a, b):
    """Pearson correlation of each row of a with each row of b."""
    a, b = ((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (a, b))
    return a @ b.T / a.shape[1]


def test_names_are_sorted_so_that_order_is_index():
    assert list(digits_environments()) == list(digits_split()) == list(ENVIRONMENTS) == sorted(ENVIRONMENTS)


def test_each_digit_is_in_exactly_one_environment():
    indices = np.concatenate(list(digits_split().values()))
    assert sorted(indices) == list(range(len(load_digits().target)))


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_shapes_types_and_balance(name):
    images, labels = digits_environments()[name]
    assert images.shape == (len(labels), SIZE, SIZE, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and len(labels) in (449, 450)
    counts, overall = np.bincount(labels, minlength=NUM_CLASSES), np.bincount(load_digits().target)
    assert np.abs(counts - overall / len(ENVIRONMENTS)).max() <= 1
    assert not images.flags.writeable and not labels.flags.writeable


def test_labels_are_the_sources():
    for name, (_, labels) in digits_environments().items():
        np.testing.assert_array_equal(labels, load_digits().target[digits_split()[name]])


def test_plain_images_trace_back_to_their_scans():
    images, _ = digits_environments()["plain"]
    ink = 0.8 * SIZE  # px of the 8×8 scan within its margin
    centres = np.rint((SIZE - ink) / 2 + (np.arange(8) + 0.5) * ink / 8 - 0.5).astype(int)
    small = images[:, centres][:, :, centres, 0].reshape(len(images), -1).astype(float)
    found = _correlations(small, load_digits().images.reshape(-1, 64)).argmax(1)
    assert np.mean(found == digits_split()["plain"]) > 0.98


def test_environments_look_as_their_names_say():
    environments = {name: images.astype(float) for name, (images, _) in digits_environments().items()}
    grey = {name for name, images in environments.items() if (images == images[..., :1]).all()}
    assert grey == {"plain", "rotated", "sketched"}  # only photographs have colour
    assert np.median(environments["sketched"]) == 255 and np.median(environments["plain"]) < 10
    assert environments["plain"][:, 0].max() < 10 and environments["rotated"][:, 0, :4].max() < 10  # margins
    # A digit on a photograph is still there: the middle differs from the frame more than on the bare patch.
    assert environments["blended"].std((1, 2)).mean() > 40


def test_the_same_everywhere():
    labels = np.concatenate([labels for _, labels in digits_environments().values()])
    assert hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest() == LABELS_SHA256
    for name, (images, _) in digits_environments().items():
        assert images.mean() == pytest.approx(MEANS[name], abs=0.05), name


def test_making_them_again_gives_the_same():
    first = digits_environments()
    digits_environments.cache_clear()
    for name, (images, labels) in digits_environments().items():
        np.testing.assert_array_equal(images, first[name][0])
        np.testing.assert_array_equal(labels, first[name][1])
