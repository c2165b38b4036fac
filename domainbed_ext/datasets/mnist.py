"""RotatedMNIST and ColoredMNIST: environments made of MNIST's 70,000 digits, each digit in one of them.

The digits, train and test together, are shuffled and dealt to the environments in turn. DomainBed draws the order, and
the flips of ColoredMNIST, from torch's global generator under the run's `--seed`. Its sweeps give every algorithm
another seed, so each is trained and tested on other images. Here the draws, in DomainBed's order, come from a separate
generator with seed 0: one data set for all, which is that of a DomainBed run with `--seed 0`.

Nothing is downloaded. The IDX files are where torchvision puts them, in `<data_dir>/MNIST/raw`;
`python -m domainbed_ext.prepare MNIST` puts them there. No images are augmented, as in DomainBed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from domainbed_ext.datasets.base import Environment, MultipleDomainDataset
from domainbed_ext.datasets.registry import register_dataset
from domainbed_ext.errors import BenchmarkError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SEED = 0  # of the order and the flips; no option, so that there is one data set of each name
_LABEL_FLIPS = 0.25  # share of ColoredMNIST's labels that are wrong, so that colour predicts them better than shape


def read_mnist(root: Path | str | None, train: bool) -> "tuple[Tensor, Tensor]":
    """Reads MNIST's IDX files.

    Args:
        root: Folder that holds `MNIST/raw`.
        train: Whether to read the training digits; otherwise the test digits.

    Returns:
        Images [n, 28, 28] (uint8) and digits [n] (int64).

    Raises:
        BenchmarkError: Files are missing or broken.
    """
    # Imported here because torch takes seconds to import, and only these data sets need it.
    from torchvision.datasets import MNIST

    get_them = "get them by: python -m domainbed_ext.prepare MNIST --data_dir DIR"
    if root is None:
        raise BenchmarkError(f"MNIST: add --data_dir with the folder that holds MNIST/raw; {get_them}")
    folder = Path(root).expanduser()
    files = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    missing = [name for name in files if not (folder / "MNIST" / "raw" / name).is_file()]
    if missing:
        raise BenchmarkError(f"no {' and '.join(missing)} in {folder / 'MNIST' / 'raw'}: {get_them}")
    try:
        digits = MNIST(str(folder), train=train, download=False)
        images, labels = digits.data, digits.targets
        whole = images.ndim == 3 and len(images) == len(labels) > 0
    except (OSError, RuntimeError, ValueError, AssertionError, LookupError, TypeError):  # torchvision's reader
        whole = False
    if not whole:
        broken = " or ".join(files[:2] if train else files[2:])
        raise BenchmarkError(f"{broken} in {folder / 'MNIST' / 'raw'} is broken: delete both and {get_them}")
    return images, labels


class RotatedEnvironment(Environment):
    """Digits rotated by an angle.

    Args:
        name: Angle in degrees.
        images: Images [n, 28, 28], 0 to 255.
        targets: Digits of the images.
    """

    def __init__(self, name: str, images: NDArray[np.uint8], targets: Sequence[int]) -> None:
        self.name, self.images, self.targets = name, images, targets

    def load(self, index: int) -> Image.Image:
        """The image [28, 28], RGB with three equal channels."""
        rotated = Image.fromarray(self.images[index]).rotate(int(self.name), Image.Resampling.BILINEAR)
        return rotated.convert("RGB")

    def content(self) -> Iterator[bytes]:
        """The pixels before rotation."""
        yield self.images.tobytes()


class ColoredEnvironment(Environment):
    """Digits in red or green.

    Args:
        name: Name of the environment.
        images: Images [n, 28, 28], 0 to 255.
        targets: Labels of the images.
        colours: Colours of the images, 0 for red and 1 for green.
    """

    def __init__(self, name: str, images: NDArray[np.uint8], targets: Sequence[int], colours: Sequence[int]) -> None:
        self.name, self.images, self.targets, self.colours = name, images, targets, colours

    def load(self, index: int) -> Image.Image:
        """The image [28, 28], RGB: DomainBed's two channels are red and green, and blue is empty."""
        image = np.zeros((*self.images[index].shape, 3), np.uint8)
        image[..., self.colours[index]] = self.images[index]
        return Image.fromarray(image)

    def content(self) -> Iterator[bytes]:
        """The pixels that are coloured, and their colours."""
        yield self.images.tobytes()
        yield np.asarray(self.colours, "<i8").tobytes()


class _DealtMNIST(MultipleDomainDataset):
    """MNIST, shuffled and dealt to the environments. Subclasses make an environment of its digits.

    Raises:
        BenchmarkError: `--data_dir` is not given, or files are missing or broken.
    """

    AUGMENTATION = "none"

    def __init__(self, root: Path | str | None, test_envs: Sequence[int], hparams: dict[str, Any]) -> None:
        import torch

        super().__init__(root, test_envs, hparams)
        parts = [read_mnist(root, train=True), read_mnist(root, train=False)]
        images, digits = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        generator = torch.Generator().manual_seed(SEED)
        order = torch.randperm(len(images), generator=generator)
        count = len(self.ENVIRONMENTS)
        self.datasets = []
        for i in range(count):
            hand = order[i::count]
            self.datasets.append(self.make_environment(i, images[hand].numpy(), digits[hand], generator))

    def make_environment(
        self, index: int, images: NDArray[np.uint8], digits: "Tensor", generator: "torch.Generator"
    ) -> Environment:
        """Makes an environment of the digits dealt to it; `generator` is drawn from in DomainBed's order."""
        raise NotImplementedError


@register_dataset("RotatedMNIST")
class RotatedMNIST(_DealtMNIST):
    """Rotated MNIST (Ghifary et al., 2015): digits rotated by 0 to 75 degrees, 10 classes."""

    ENVIRONMENTS = ("0", "15", "30", "45", "60", "75")
    INPUT_SHAPE = (1, 28, 28)
    classes = tuple(str(digit) for digit in range(10))

    def make_environment(
        self, index: int, images: NDArray[np.uint8], digits: "Tensor", generator: "torch.Generator"
    ) -> Environment:
        """Digits that are rotated by the environment's angle when they are loaded."""
        return RotatedEnvironment(self.ENVIRONMENTS[index], images, digits.tolist())


@register_dataset("ColoredMNIST")
class ColoredMNIST(_DealtMNIST):
    """Coloured MNIST (Arjovsky et al., 2019): 2 classes, digits below 5 and the others. The colour predicts the class,
    but misleads in the last environment."""

    ENVIRONMENTS = ("+90%", "+80%", "-90%")
    INPUT_SHAPE = (2, 28, 28)
    COLOUR_FLIPS: ClassVar[tuple[float, ...]] = (0.1, 0.2, 0.9)  # share of images whose colour is not their label's
    classes = ("5 to 9", "0 to 4")

    def make_environment(
        self, index: int, images: NDArray[np.uint8], digits: "Tensor", generator: "torch.Generator"
    ) -> Environment:
        """Labels from digits, colours from labels, each with its share of flips."""
        import torch

        labels = (digits < 5) ^ (torch.rand(len(digits), generator=generator) < _LABEL_FLIPS)
        colours = labels ^ (torch.rand(len(digits), generator=generator) < self.COLOUR_FLIPS[index])
        return ColoredEnvironment(self.ENVIRONMENTS[index], images, labels.int().tolist(), colours.int().tolist())
