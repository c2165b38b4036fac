"""The sizes at which images are kept."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from PIL import Image


class Variant(ABC):
    """The size at which images are kept; resizing is bilinear with antialiasing, as `PIL.Image.resize` does it."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in the key of an entry, e.g. "224x224"."""

    @property
    def fixed(self) -> tuple[int, int] | None:
        """(height, width) of every image, if the images' own sizes do not matter."""
        return None

    @abstractmethod
    def size(self, height: int, width: int) -> tuple[int, int]:
        """Computes the (height, width), in pixels, at which an image is kept.

        Args:
            height: Height of the image as decoded.
            width: Width of the image as decoded.
        """

    def __call__(self, image: Image.Image) -> Image.Image:
        """Resizes an image.

        Args:
            image: Image as decoded, in RGB.
        """
        height, width = self.size(image.height, image.width)
        if (width, height) == image.size:
            return image
        return image.resize((width, height), Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class Decoded(Variant):
    """Images at their own size."""

    name = "decoded"

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width)."""
        return height, width


@dataclass(frozen=True)
class Shorter(Variant):
    """Images scaled down, as torchvision's `v2.Resize(side)` does it, so that their shorter side is `side` pixels.
    No image is scaled up."""

    side: int

    @property
    def name(self) -> str:
        """E.g. "shorter256"."""
        return f"shorter{self.side}"

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) with the aspect of the image; a fraction of a pixel is cut off, as torchvision does."""
        shorter, longer = min(height, width), max(height, width)
        if shorter <= self.side:
            return height, width
        longer = int(self.side * longer / shorter)
        return (self.side, longer) if height < width else (longer, self.side)


@dataclass(frozen=True)
class Resized(Variant):
    """Images of one size, whatever their aspect, as torchvision's `v2.Resize((height, width))` does it."""

    height: int
    width: int

    @property
    def name(self) -> str:
        """E.g. "224x224"."""
        return f"{self.height}x{self.width}"

    @property
    def fixed(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    def size(self, height: int, width: int) -> tuple[int, int]:
        """`fixed`."""
        return self.fixed


def find_side_for_crops(side: int) -> int:
    """Computes the shorter side of images from which crops of `side` pixels are taken: 256 for 224, as usual.

    Crops of 70 % of the area are then enlarged by at most 4 % in each direction.

    Args:
        side: Side of the crops in pixels.
    """
    return math.ceil(side * 8 / 7)
