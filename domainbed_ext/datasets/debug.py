"""Debug28 and Debug224: three environments of 16 random images, for tests.

DomainBed draws new images and labels in each run, from the global generator. Here they come from a separate generator
with seed 0, in DomainBed's order. Labels are therefore those of a DomainBed run with `--seed 0`; images are the same
normal values, rounded to 8-bit pixels.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from domainbed_ext.datasets.base import Environment, MultipleDomainDataset
from domainbed_ext.datasets.registry import register_dataset

SEED = 0  # of all images and labels; no option, so that there is one data set
IMAGES = 16  # an environment
_GREY, _SPREAD = 127.5, 42.5  # mean 1/2, and ±3 standard deviations fill the 8 bits


class DebugEnvironment(Environment):
    """Random images in memory.

    Args:
        name: Name of the environment.
        images: Images [n, height, width, 3], 0 to 255.
        targets: Labels of the images.
    """

    def __init__(self, name: str, images: NDArray[np.uint8], targets: Sequence[int]) -> None:
        self.name, self.images, self.targets = name, images, targets

    def load(self, index: int) -> Image.Image:
        """The image, RGB."""
        return Image.fromarray(self.images[index])

    def content(self) -> Iterator[bytes]:
        """The pixels."""
        yield self.images.tobytes()


@register_dataset("Debug28")
class Debug28(MultipleDomainDataset):
    """Random images of 28 px under random labels, 2 classes; needs no `--data_dir`."""

    ENVIRONMENTS = ("0", "1", "2")
    INPUT_SHAPE: ClassVar[tuple[int, int, int]] = (3, 28, 28)
    AUGMENTATION = "none"

    def __init__(self, root: Path | str | None, test_envs: Sequence[int], hparams: dict[str, Any]) -> None:
        import torch  # here because it takes seconds, and only this data set needs it

        super().__init__(root, test_envs, hparams)
        self.classes = ["0", "1"]
        generator = torch.Generator().manual_seed(SEED)
        self.datasets = []
        for name in self.ENVIRONMENTS:
            values = torch.randn(IMAGES, *self.INPUT_SHAPE, generator=generator)
            labels = torch.randint(0, len(self.classes), (IMAGES,), generator=generator)
            pixels = (_GREY + _SPREAD * values).round().clamp(0, 255).to(torch.uint8)
            self.datasets.append(DebugEnvironment(name, pixels.permute(0, 2, 3, 1).numpy(), labels.tolist()))


@register_dataset("Debug224")
class Debug224(Debug28):
    """As `Debug28`, but 224 px."""

    INPUT_SHAPE = (3, 224, 224)
