"""What a data set is to the benchmark: a list of environments that share their classes."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch.utils.data import Dataset


class Environment(Dataset[tuple[Image.Image, int]]):
    """One domain's labelled images. Items are `(image, label)`: an RGB PIL image and an int.

    Attributes:
        name: of the domain, e.g. "sketch".
        targets: the label of every image.
    """

    name: str
    targets: Sequence[int]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.load(index), int(self.targets[index])

    def load(self, index: int) -> Image.Image:
        """Decodes an image.

        Args:
            index: of the image, below `len(self)`.

        Returns:
            It, in RGB.

        Raises:
            BenchmarkError: the file is no readable image.
        """
        raise TypeError(f"{type(self).__name__} does not say how to load an image")

    def content(self) -> Iterable[bytes]:
        """What tells its images from others, for `digest`; nothing where a class does not say."""
        return ()

    def verify(self) -> dict[str, str]:
        """By path, why an image cannot be read; most are checked without decoding their pixels."""
        return {}


class MultipleDomainDataset:
    """A data set of several environments, by DomainBed's names.

    A new one needs `ENVIRONMENTS`, a constructor of this signature that sets `datasets` and `classes`, and a
    line in the registry.

    Attributes:
        N_STEPS: training steps of a run, unless told.
        CHECKPOINT_FREQ: steps from one evaluation to the next, unless told.
        ENVIRONMENTS: short labels, in index order.
        INPUT_SHAPE: (channels, height, width) that DomainBed feeds; a backbone may want another size.
        AUGMENTATION: name in `domainbed_ext.data.augmentation.AUGMENTATIONS`.
        datasets: the environments.
        classes: names of the classes, in label order.
    """

    N_STEPS: ClassVar[int] = 5001
    CHECKPOINT_FREQ: ClassVar[int] = 100
    ENVIRONMENTS: ClassVar[tuple[str, ...]] = ()
    INPUT_SHAPE: ClassVar[tuple[int, int, int]] = (3, 224, 224)
    AUGMENTATION: ClassVar[str] = "domainbed"

    datasets: Sequence[Environment]
    classes: Sequence[str]

    def __init__(self, root: Path | str | None, test_envs: Sequence[int], hparams: dict[str, Any]) -> None:
        self.input_shape = self.INPUT_SHAPE

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def environments(self) -> tuple[str, ...]:
        """Short labels of the environments at hand."""
        return self.ENVIRONMENTS

    def __getitem__(self, index: int) -> Environment:
        return self.datasets[index]

    def __len__(self) -> int:
        return len(self.datasets)
