"""What stands behind an index: the pixels of an image, from a file or the cache, or a frozen backbone's features."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from domainbed_ext.data.augmentation import Augmentation, Pixels
from domainbed_ext.datasets.base import Environment


class Images(Protocol):
    """Pixels by index, uint8 [height, width, 3]; of any height and width, and not to be written to."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Pixels: ...


class Source(Protocol):
    """What a model is fed, by index."""

    def batch(self, keys: Sequence[int], generator: np.random.Generator) -> Tensor:
        """Some images' tensors, on the CPU.

        Args:
            keys: indices within the environment.
            generator: of what is drawn.

        Returns:
            [len(keys), ...].
        """
        ...


class Uncached:
    """Images that are decoded each time.

    Args:
        environment: whose images.
        prepare: done to each, e.g. a resize.
    """

    def __init__(
        self, environment: Environment, prepare: Callable[[Image.Image], Image.Image] = lambda image: image
    ) -> None:
        self.environment, self.prepare = environment, prepare

    def __len__(self) -> int:
        return len(self.environment)

    def __getitem__(self, index: int) -> Pixels:
        return np.asarray(self.prepare(self.environment.load(index)))


class Augmented:
    """Images at the size that a backbone is fed.

    Args:
        images: pixels.
        augmentation: what they undergo; `AUGMENTATIONS["none"]` for plain ones.
        size: (height, width) in pixels.
    """

    def __init__(self, images: Images, augmentation: Augmentation, size: tuple[int, int]) -> None:
        self.images, self.augmentation, self.size = images, augmentation, size

    def batch(self, keys: Sequence[int], generator: np.random.Generator) -> Tensor:
        """uint8 [len(keys), 3, height, width]."""
        return self.augmentation([self.images[key] for key in keys], self.size, generator)


class Features:
    """Features that stand for the images, as they are the same at every step.

    Args:
        features: [n, width], of every image of an environment.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def batch(self, keys: Sequence[int], generator: np.random.Generator) -> Tensor:
        """[len(keys), width]; draws nothing."""
        return self.features[torch.as_tensor(keys)]
