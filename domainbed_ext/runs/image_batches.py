"""Batches of image files as a run evaluates images, whatever data set they are of."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from domainbed_ext.cache.variants import Resized
from domainbed_ext.data.augmentation import AUGMENTATIONS
from domainbed_ext.datasets.image_files import UnusableImage, read


class FileBatch(NamedTuple):
    """A batch of image files.

    Attributes:
        files: Paths of the files that could be read.
        images: Their pixels at the input size, uint8 [n, 3, height, width].
        reasons: By path of each other file, why it could not be read.
    """

    files: list[str]
    images: Tensor
    reasons: dict[str, str]


class FileBatches(Dataset[FileBatch]):
    """Image files in batches, decoded and resized as an evaluated image is.

    Args:
        files: Paths of the files.
        batch_size: Number of files in a batch.
        size: Input size, (height, width) in pixels.
    """

    def __init__(self, files: Sequence[str], batch_size: int, size: tuple[int, int]) -> None:
        self.files, self.batch_size, self.size = files, batch_size, size

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def __getitem__(self, batch: int) -> FileBatch:
        resize, generator = Resized(*self.size), np.random.default_rng(0)  # nothing is drawn from it
        files, pixels, reasons = [], [], {}
        for file in self.files[batch * self.batch_size : (batch + 1) * self.batch_size]:
            try:
                pixels.append(np.asarray(resize(read(file))))
                files.append(file)
            except UnusableImage as reason:
                reasons[file] = str(reason)
        return FileBatch(files, AUGMENTATIONS["none"](pixels, self.size, generator), reasons)
