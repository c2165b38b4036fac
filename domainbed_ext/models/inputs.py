"""The backbone's input: image size, and the statistics that images are normalised with."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Inputs:
    """The backbone's input size and input statistics.

    Attributes:
        size: Height and width in pixels.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (len(self.mean), *self.size)

    def to_timm(self) -> dict[str, Any]:
        """The same as entries of timm's `pretrained_cfg`; images are resized bilinearly."""
        return {"input_size": self.shape, "mean": self.mean, "std": self.std, "interpolation": "bilinear"}

    def ready(self, images: Tensor) -> Tensor:
        """Normalises images on their device; features and other inputs that are not bytes are returned unchanged.

        Args:
            images: Images, uint8 [n, channels, height, width], or a tensor of another dtype.

        Returns:
            For bytes float32 of the same shape: values in [0, 1], minus the mean, divided by the standard deviation.
        """
        if images.dtype != torch.uint8:
            return images
        numbers = F.to_dtype(images, torch.float32, scale=True)
        return numbers.sub_(_by_channel(self.mean, images.device)).div_(_by_channel(self.std, images.device))


@cache  # copying a number to a GPU waits for its queue, so it is done once and not in each batch
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A number for each channel, [channels, 1, 1]."""
    with torch.inference_mode(False):  # training uses it too
        return torch.tensor(values, device=device)[:, None, None]
