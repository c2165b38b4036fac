"""DigitsShift as a data set of the benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from domainbed_ext.datasets.base import Environment, MultipleDomainDataset
from domainbed_ext.datasets.digits import ENVIRONMENTS, NUM_CLASSES, SIZE, digits_environments


class DigitsEnvironment(Environment):
    """One environment of DigitsShift, in memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.images, labels = digits_environments()[name]
        self.targets = labels.tolist()

    def load(self, index: int) -> Image.Image:
        """The image [32, 32], RGB."""
        return Image.fromarray(self.images[index])


class DigitsShift(MultipleDomainDataset):
    """Real handwritten digits under four synthetic shifts; needs no `--data_dir`."""

    N_STEPS = 300
    CHECKPOINT_FREQ = 100
    ENVIRONMENTS = ENVIRONMENTS
    INPUT_SHAPE = (3, SIZE, SIZE)
    AUGMENTATION = "crop"  # a mirrored digit is none

    def __init__(self, root: Path | str | None, test_envs: Sequence[int], hparams: dict[str, Any]) -> None:
        super().__init__(root, test_envs, hparams)
        self.classes = [str(digit) for digit in range(NUM_CLASSES)]
        self.datasets = [DigitsEnvironment(name) for name in ENVIRONMENTS]
