"""The base classes of data sets, which are lists of environments with common classes."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image


class Environment:
    """One domain's labelled images. Items are `(image, label)`: an RGB PIL image and an int.

    A data set in torch's sense, without torch.

    Attributes:
        name: Name of the domain, e.g. "sketch".
        targets: Labels of the images, in order.
        concepts: Name of what each image shows, whatever its domain, in order; empty where images carry none.
    """

    name: str
    targets: Sequence[int]
    concepts: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.load(index), int(self.targets[index])

    def load(self, index: int) -> Image.Image:
        """Decodes an image.

        Args:
            index: Index of the image, below `len(self)`.

        Returns:
            The image, in RGB.

        Raises:
            BenchmarkError: The file is not a readable image.
        """
        raise TypeError(f"{type(self).__name__} has no method load, which gives an image")

    def image_names(self) -> list[str]:
        """Names by which people and other runs find the images, each once, in order; their indices by default."""
        return [str(index) for index in range(len(self))]

    def content(self) -> Iterable[bytes]:
        """Bytes by which `digest` tells its images from others; none by default."""
        return ()

    def verify(self) -> dict[str, str]:
        """Images that cannot be read: the reason by path. Most are checked without decoding their pixels."""
        return {}


class MultipleDomainDataset:
    """A data set of several environments, by DomainBed's names.

    A new one needs `ENVIRONMENTS`, a constructor of this signature that sets `datasets` and `classes`, and a name, by
    `register_dataset`.

    Args:
        root: Folder of `--data_dir`; None if it is not given.
        test_envs: Indices of the environments that are held out.
        hparams: Hyperparameters of the run.

    Attributes:
        N_STEPS: Default of `--steps`.
        CHECKPOINT_FREQ: Default of `--checkpoint_freq`.
        ENVIRONMENTS: Short labels, in index order.
        INPUT_SHAPE: (channels, height, width) in DomainBed; a backbone may take another size.
        AUGMENTATION: Name in `domainbed_ext.data.augmentation.AUGMENTATIONS`.
        datasets: Environments, in index order.
        classes: Names of the classes, in label order.
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

    @classmethod
    def check_data_dir(cls, root: Path | str | None) -> None:
        """Refuses a `--data_dir` that cannot hold the images, before anything is read or loaded.

        Args:
            root: Value of `--data_dir`; None if it is not given.

        Raises:
            BenchmarkError: The images are not there.
        """

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def environments(self) -> tuple[str, ...]:
        """Short labels of the environments that there are."""
        return self.ENVIRONMENTS

    def __getitem__(self, index: int) -> Environment:
        return self.datasets[index]

    def __len__(self) -> int:
        return len(self.datasets)
