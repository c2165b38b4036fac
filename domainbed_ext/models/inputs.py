"""What a backbone is fed: the size of its images and the statistics they are normalised by."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Inputs:
    """What a backbone is fed.

    Attributes:
        size: (height, width) in pixels.
        mean: per channel, of values in [0, 1].
        std: per channel.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (len(self.mean), *self.size)

    def to_timm(self) -> dict[str, Any]:
        """The same in the words of timm's `pretrained_cfg`; images are resized bilinearly."""
        return {"input_size": self.shape, "mean": self.mean, "std": self.std, "interpolation": "bilinear"}

    def ready(self, images: Tensor) -> Tensor:
        """Takes images from bytes to numbers, on their device; what is no image any more, such as features, stays.

        Args:
            images: uint8 [n, channels, height, width], or of another dtype.

        Returns:
            float32 of the same shape, from bytes: values in [0, 1], less the mean, over the standard deviation.
        """
        if images.dtype != torch.uint8:
            return images
        numbers = F.to_dtype(images, torch.float32, scale=True)
        return F.normalize(numbers, list(self.mean), list(self.std), inplace=True)
