"""Image augmentation: crops, mirroring and colour jitter, on 8-bit arrays.

The distributions are those of DomainBed's `torchvision.transforms` on PIL images (domainbed/datasets.py,
`MultipleEnvironmentImageFolder`); the values differ by rounding. It is fast because colours stay in one float32 array
from the first operation to the last, where brightness and contrast hardly cost a pass and hue needs no HSV (`Colours`).

An augmentation draws all its random numbers at once, one row a sample. So a sample depends on the generator's seed and
on its place in the batch, not on the other images, and not on how many threads compute it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Pixels = NDArray[np.uint8]  # [height, width, 3], RGB; may be read-only
Augmentation = Callable[[Sequence[Pixels], tuple[int, int], np.random.Generator], Tensor]

AREA = (0.7, 1.0)  # of a crop, as a share of the image's
ASPECT = (3 / 4, 4 / 3)  # width / height of a crop, uniform in its logarithm
TRIES = 10  # at a crop that fits into the image, before a central one is taken
MIRRORED = 0.5  # share of images
GREY = 0.1  # share of images
JITTER = 0.3  # brightness, contrast and saturation by 1 ± this factor, hue by ± this part of a turn

_CROP_DRAWS = 2 * TRIES + 2
LUMA = (0.299, 0.587, 0.114)  # of R, G, B: ITU-R 601-2, as PIL's mode L


def domainbed(images: Sequence[Pixels], size: tuple[int, int], generator: np.random.Generator) -> Tensor:
    """DomainBed's training transform: a random resized crop, mirroring, colour jitter in random order, grey.

    Args:
        images: Images of any sizes.
        size: (height, width) of the result.
        generator: Generator that `len(images)` rows of random numbers are drawn from.

    Returns:
        uint8 [n, 3, height, width].
    """
    draws = generator.random((len(images), _CROP_DRAWS + 10))
    crops, mirrored, order, jitter, grey = np.split(draws, _CROP_DRAWS + np.array([0, 1, 5, 9]), axis=1)
    batch = _resized_crops(images, size, crops, mirrored[:, 0] < MIRRORED)
    jitter = np.array([1, 1, 1, 0]) + JITTER * (2 * jitter - 1)  # three factors, and the turn of the hue
    # Which place each of four independent numbers has when sorted: every order is equally likely.
    for pixels, places, amounts, is_grey in zip(
        batch, order.argsort(axis=1), jitter.tolist(), grey[:, 0] < GREY, strict=True
    ):
        colours = Colours(pixels)
        operations = (colours.brightness, colours.contrast, colours.saturation, colours.hue)
        for place in places:
            operations[place](amounts[place])
        if is_grey:
            colours.greyscale()
        colours.write(pixels)
    return batch


def crop(images: Sequence[Pixels], size: tuple[int, int], generator: np.random.Generator) -> Tensor:
    """The random resized crop alone, for images whose mirror image is another class (digits).

    Args:
        images: Images of any sizes.
        size: (height, width) of the result.
        generator: Generator that `len(images)` rows of random numbers are drawn from.

    Returns:
        uint8 [n, 3, height, width].
    """
    return _resized_crops(images, size, generator.random((len(images), _CROP_DRAWS)), np.zeros(len(images), bool))


def none(images: Sequence[Pixels], size: tuple[int, int], generator: np.random.Generator) -> Tensor:
    """DomainBed's evaluation transform: PIL's bilinear resize, with bit-identical pixels; the aspect ratio is not kept.

    Args:
        images: Images of any sizes; those of the right size are not changed.
        size: (height, width) of the result.
        generator: Generator, which is not used.

    Returns:
        uint8 [n, 3, height, width].
    """
    batch = torch.empty(len(images), 3, *size, dtype=torch.uint8)
    for planes, image in zip(batch.numpy(), images, strict=True):
        if image.shape[:2] != tuple(size):
            image = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
        planes[:] = image.transpose(2, 0, 1)
    return batch


AUGMENTATIONS: dict[str, Augmentation] = {"domainbed": domainbed, "crop": crop, "none": none}


def crop_boxes(draws: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where `torchvision.transforms.RandomResizedCrop` cuts: area and aspect are drawn until such a crop fits.

    Args:
        draws: Random numbers, uniform in [0, 1), [n, 2·TRIES + 2]: area and aspect of every try, then top and left.
        sizes: Height and width of every image, [n, 2].

    Returns:
        Top, left, height and width, [n, 4]. Where no try fits: of the largest central crop of an aspect in `ASPECT`.
    """
    area, aspect = np.moveaxis(draws[:, :-2].reshape(-1, TRIES, 2), -1, 0)
    area = sizes.prod(axis=1, keepdims=True) * (AREA[0] + (AREA[1] - AREA[0]) * area)
    aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** aspect
    shapes = np.rint(np.sqrt(np.stack((area / aspect, area * aspect), axis=-1)))
    fits = ((shapes > 0) & (shapes <= sizes[:, None])).all(axis=-1)
    found = fits.any(axis=1)[:, None]

    central = np.minimum(sizes, np.rint(sizes[:, ::-1] * ASPECT[1]))  # ASPECT[1] is 1 / ASPECT[0]
    shape = np.where(found, shapes[np.arange(len(sizes)), fits.argmax(axis=1)], central)
    room = sizes - shape
    corner = np.where(found, draws[:, -2:] * (room + 1), room / 2)
    return np.concatenate((corner, shape), axis=1).astype(np.int64)  # cuts the fractions off


def _resized_crops(
    images: Sequence[Pixels], size: tuple[int, int], draws: NDArray[np.float64], mirrored: NDArray[np.bool_]
) -> Tensor:
    """uint8 [n, 3, height, width], at most one level from PIL's."""
    batch = torch.empty(len(images), 3, *size, dtype=torch.uint8)
    sizes = np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)
    boxes = crop_boxes(draws, sizes).tolist()
    for planes, image, (top, left, height, width), mirror in zip(batch.numpy(), images, boxes, mirrored, strict=True):
        # A copy, since torch takes no read-only memory; the batch axis goes in front before the channels do, or torch
        # does not see that channels are innermost, the layout its 8-bit kernel is fast in.
        cut = torch.from_numpy(np.array(image[top : top + height, left : left + width]))[None].permute(0, 3, 1, 2)
        resized = F.interpolate(cut, size, mode="bilinear", antialias=True)[0].numpy()
        planes[:] = resized[..., ::-1] if mirror else resized
    return batch


class Colours:
    """An image whose colours change in place, in float32; its levels, 0 to 255, are `gain · planes + offset`.

    Every operation means the same for the planes as for the levels, for the map between them is one for all channels.
    So brightness and contrast need only change `gain` and `offset`, and clip where they can exceed the levels, which
    a factor up to 1 cannot. Unlike PIL, nothing is rounded until `write`.

    Args:
        pixels: Image, uint8 [3, height, width].
    """

    def __init__(self, pixels: Tensor) -> None:
        self.planes = pixels.to(torch.float32)
        self.gain, self.offset = 1.0, 0.0

    def brightness(self, factor: float) -> None:
        """Multiplies the levels by `factor`."""
        self._blend(factor, 0.0)

    def contrast(self, factor: float) -> None:
        """Multiplies the levels' distances from the image's mean grey by `factor`."""
        # torch gives each of the three sums to one thread, so their last bits do not depend on how many there are.
        means = self.planes.mean(dim=(1, 2)).tolist()
        grey = sum(weight * mean for weight, mean in zip(LUMA, means, strict=True))
        self._blend(factor, self.gain * grey + self.offset)

    def saturation(self, factor: float) -> None:
        """Multiplies the levels' distances from the pixel's grey by `factor`, which is above 0."""
        # x + (1 − factor) / factor · grey, whose common factor goes into the gain.
        self.planes.add_(self._grey(), alpha=(1 - factor) / factor)
        self.gain *= factor
        self._clip(factor)

    def hue(self, turn: float) -> None:
        """Turns the hue in HSV by `turn` turns (red to green is a third); value and chroma stay.

        Whole sextants k permute the channels, c taking what c + k has, for odd k mirrored between the pixel's least
        and greatest. The rest, r in [-½, ½] sextants, moves the middle channel by |r| of the chroma towards an end;
        where the way there is shorter, the channel that stands at that end leaves it by the difference. For each
        channel alike this reads: it moves as far as its neighbour (for r > 0 the next one, else the previous one)
        would have to in order to be |r| of the chroma away from both ends, and no further than the ends.
        """
        sextants = round(6 * turn)
        rest = 6 * turn - sextants
        least, greatest = self.planes.amin(dim=0), self.planes.amax(dim=0)
        slide = (greatest - least).mul_(abs(rest))
        short = torch.clamp(self.planes, least + slide, greatest - slide).sub_(self.planes)
        turned = torch.empty_like(self.planes)
        for channel in range(3):
            source = (channel + sextants) % 3
            neighbour = (source + (1 if rest > 0 else 2)) % 3
            torch.clamp(short[neighbour].add_(self.planes[source]), least, greatest, out=turned[channel])
        self.planes = torch.sub(least + greatest, turned, out=turned) if sextants % 2 else turned

    def greyscale(self) -> None:
        """Sets all channels to the grey of the pixel."""
        self.planes = self._grey()[None]

    def write(self, pixels: Tensor) -> None:
        """Writes the levels, rounded, to `pixels`, uint8 [3, height, width]."""
        # By way of int16, to and from which torch converts many values at once, as it does not from float to uint8.
        pixels.copy_(self.planes.mul_(self.gain).add_(self.offset + 0.5).to(torch.int16))

    def _blend(self, factor: float, grey: float) -> None:
        """Levels become `factor` · levels + (1 − `factor`) · `grey`."""
        self.gain *= factor
        self.offset = factor * self.offset + (1 - factor) * grey
        self._clip(factor)

    def _clip(self, factor: float) -> None:
        if factor > 1:
            self.planes.clamp_(-self.offset / self.gain, (255 - self.offset) / self.gain)

    def _grey(self) -> Tensor:
        red, green, blue = self.planes
        return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
