"""DigitsShift: four environments of handwritten digits, made from images that scikit-learn includes.

The images are real: the 1797 test digits of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak
1998; UCI), 8×8 pixels with 17 grey levels, as `sklearn.datasets.load_digits` has them. The shifts between
environments are synthetic. Each digit is in exactly one environment:

    blended    the digit blended with a patch of one of scikit-learn's two sample photographs, by absolute difference
               per colour, as MNIST-M from BSDS500 (Ganin et al. 2016, section 5.2.1)
    plain      white on black, as scanned
    rotated    as plain, rotated by 30 to 60 degrees to either side; 6 and 9 stay 180 − 2·60 degrees apart
    sketched   the outline alone, dark on white paper

Every step is integer arithmetic, Pillow's (fixed point for resizing) or legacy numpy randomness, whose streams
never change, so the images do not depend on machine or thread count. A version of Pillow that rounds
differently when it decodes JPEG or rotates images may change a pixel by one grey level.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter

from domainbed_ext.datasets.base import Environment, MultipleDomainDataset
from domainbed_ext.datasets.registry import register_dataset

ENVIRONMENTS = ("blended", "plain", "rotated", "sketched")  # sorted, so that name order is index order
NUM_CLASSES = 10
SIZE = 32  # px, width and height of an image

_SEED = 20161  # of the split and of each shift; no option, so that there is one data set
_MARGIN = 1  # scan pixels around a digit, which otherwise touches the frame
_FINE = 4  # outlines are drawn this many times larger and averaged down, to be thin and smooth


class DigitsEnvironment(Environment):
    """One environment of DigitsShift, in memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.images, labels = digits_environments()[name]
        self.targets = labels.tolist()

    def load(self, index: int) -> Image.Image:
        """The image [32, 32], RGB."""
        return Image.fromarray(self.images[index])

    def content(self) -> Iterator[bytes]:
        """What the images are made from: the scans and the seed."""
        yield str(_SEED).encode()
        yield _digits()[0][digits_split()[self.name]].tobytes()


@register_dataset("DigitsShift")
class DigitsShift(MultipleDomainDataset):
    """Real handwritten digits under four synthetic shifts; needs no `--data_dir`."""

    N_STEPS = 300
    CHECKPOINT_FREQ = 100
    ENVIRONMENTS = ENVIRONMENTS
    INPUT_SHAPE = (3, SIZE, SIZE)
    AUGMENTATION = "crop"  # no mirroring: a mirrored digit is not a digit

    def __init__(self, root: Path | str | None, test_envs: Sequence[int], hparams: dict[str, Any]) -> None:
        super().__init__(root, test_envs, hparams)
        self.classes = [str(digit) for digit in range(NUM_CLASSES)]
        self.datasets = [DigitsEnvironment(name) for name in ENVIRONMENTS]


@lru_cache(maxsize=1)
def digits_split() -> dict[str, NDArray[np.int64]]:
    """Splits the 1797 digits over the environments, stratified by class.

    Returns:
        For each environment the ascending indices into `load_digits()`: disjoint, together all of them.
    """
    target = _digits()[1]
    rng = np.random.RandomState(_SEED)
    by_class = np.concatenate([rng.permutation(np.flatnonzero(target == c)) for c in range(NUM_CLASSES)])
    # Dealing continues from class to class, which evens out the sizes.
    hands = [np.sort(by_class[first :: len(ENVIRONMENTS)]) for first in range(len(ENVIRONMENTS))]
    return dict(zip(ENVIRONMENTS, hands, strict=True))


@lru_cache(maxsize=1)
def digits_environments() -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Makes the four environments (about half a second, once per process).

    Returns:
        For each environment, in the order of `ENVIRONMENTS`, the images [n, 32, 32, 3] (RGB, 0 to 255) and
        their classes [n] (0 to 9). The arrays are shared between callers and therefore read-only.
    """
    scans, target = _digits()
    environments = {}
    for name, indices in digits_split().items():
        rng = np.random.RandomState(_SEED + 1 + ENVIRONMENTS.index(name))
        ink = [_enlarge(scans[i]) for i in indices]
        images = np.stack([np.asarray(image) for image in _SHIFTS[name](ink, rng)])
        labels = target[indices].astype(np.int64)
        images.flags.writeable = labels.flags.writeable = False
        environments[name] = (images, labels)
    return environments


@lru_cache(maxsize=1)
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's scans [n, 8, 8], 0 to 255, and their classes [n]."""
    from sklearn.datasets import load_digits  # here because it takes seconds, and only this data set needs it

    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


def _enlarge(scan: NDArray[np.uint8]) -> Image.Image:
    """Enlarges a scan [8, 8] smoothly to 32 px, mode L, with a margin so that rotated digits are not cut off."""
    return Image.fromarray(np.pad(scan, _MARGIN)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _plain(ink: list[Image.Image], rng: np.random.RandomState) -> list[Image.Image]:
    return [image.convert("RGB") for image in ink]


def _rotated(ink: list[Image.Image], rng: np.random.RandomState) -> list[Image.Image]:
    angles = rng.randint(30, 61, len(ink)) * rng.choice((-1, 1), len(ink))  # degrees
    turned = [image.rotate(int(a), Image.Resampling.BICUBIC) for image, a in zip(ink, angles, strict=True)]
    return _plain(turned, rng)


def _blended(ink: list[Image.Image], rng: np.random.RandomState) -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    blended = []
    for image in ink:
        photograph = photographs[rng.randint(len(photographs))]
        side = rng.randint(SIZE, 3 * SIZE + 1)  # px: near and far, so that patches have coarse and fine detail
        left, top = (rng.randint(length - side + 1) for length in photograph.size)
        patch = photograph.resize((SIZE, SIZE), Image.Resampling.BOX, (left, top, left + side, top + side))
        blended.append(ImageChops.difference(patch, image.convert("RGB")))
    return blended


def _sketched(ink: list[Image.Image], rng: np.random.RandomState) -> list[Image.Image]:
    fine = (SIZE * _FINE, SIZE * _FINE)
    sketches = []
    for image in ink:
        shape = image.resize(fine, Image.Resampling.BICUBIC).point(lambda grey: 255 * (grey > 110))
        # A pixel is on the outline where the 5×5 around it is neither all inside nor all outside.
        paper = shape.filter(ImageFilter.BoxBlur(2)).point(lambda inside: 0 if 0 < inside < 255 else 255)
        sketches.append(paper.resize((SIZE, SIZE), Image.Resampling.BOX))
    return _plain(sketches, rng)


_SHIFTS = {"blended": _blended, "plain": _plain, "rotated": _rotated, "sketched": _sketched}
