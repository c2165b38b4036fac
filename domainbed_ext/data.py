"""From an environment to a batch: transforms, training minibatches and evaluation batches.

Every random draw is a function of (seed, environment, step), not of a generator's history. So a batch is the
same whoever makes it, in this process or in a worker, and a run can go on from any step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from domainbed_ext.datasets.base import Environment
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.seeds import seed_hash

Transform = Callable[[Image.Image], Tensor]
Minibatch = tuple[Tensor, Tensor]
T = TypeVar("T")

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


def _domainbed(inputs: Inputs) -> list[v2.Transform]:
    return [
        v2.RandomResizedCrop(inputs.size, scale=(0.7, 1.0)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.3, 0.3, 0.3, 0.3),
        v2.RandomGrayscale(p=0.1),
    ]


def _crop(inputs: Inputs) -> list[v2.Transform]:
    return [v2.RandomResizedCrop(inputs.size, scale=(0.7, 1.0))]


def _resize(inputs: Inputs) -> list[v2.Transform]:
    return [v2.Resize(inputs.size)]


# DomainBed's for photographs; crops alone where a mirror image is another class (digits); none.
AUGMENTATIONS: dict[str, Callable[[Inputs], list[v2.Transform]]] = {
    "domainbed": _domainbed,
    "crop": _crop,
    "none": _resize,
}


def transform(inputs: Inputs, augmentation: str = "none") -> Transform:
    """Turns an RGB image into a normalised tensor.

    Args:
        inputs: size and statistics.
        augmentation: name in `AUGMENTATIONS`. "none" is DomainBed's evaluation transform: a bilinear resize to
            `inputs.size` that does not keep the aspect.

    Returns:
        A function from an image to float32 [3, height, width].
    """
    return v2.Compose(
        [
            *AUGMENTATIONS[augmentation](inputs),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(inputs.mean, inputs.std),
        ]
    )


@dataclass(frozen=True)
class Split:
    """Part of an environment: an `in` or an `out` split."""

    environment: Environment
    keys: Sequence[int]

    def __len__(self) -> int:
        return len(self.keys)


class Minibatches(Dataset[list[Minibatch]]):
    """Step t's minibatches, one a training environment, as a pure function of (seed, t).

    Samples are drawn with replacement, as in DomainBed.

    Args:
        splits: the `in` split of every training environment, in index order.
        transform: of an image.
        batch_size: images an environment and step.
        seed: of the run.
        balanced: draw every class of an environment equally often (`class_balanced`).
    """

    def __init__(
        self,
        splits: Sequence[Split],
        transform: Transform,
        batch_size: int,
        seed: int,
        balanced: bool = False,
    ) -> None:
        self.splits, self.transform, self.batch_size, self.seed = splits, transform, batch_size, seed
        self.weights = [_balanced_weights(split) if balanced else None for split in splits]

    def __getitem__(self, step: int) -> list[Minibatch]:
        return [self._draw(step, place) for place in range(len(self.splits))]

    def _draw(self, step: int, place: int) -> Minibatch:
        split = self.splits[place]
        seed = seed_hash(self.seed, "minibatch", step, place)
        draws = np.random.default_rng(seed).choice(len(split), self.batch_size, p=self.weights[place])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(seed)
            samples = [split.environment[split.keys[draw]] for draw in draws]
            images = torch.stack([self.transform(image) for image, _ in samples])
        return images, torch.tensor([label for _, label in samples])


def _balanced_weights(split: Split) -> np.ndarray:
    labels = np.asarray(split.environment.targets)[np.asarray(split.keys)]
    counts = np.bincount(labels)
    return 1.0 / (counts[labels] * np.count_nonzero(counts))


def training_stream(minibatches: Minibatches, steps: range, workers: int) -> Iterator[list[Minibatch]]:
    """The minibatches of the given steps, in order.

    Args:
        minibatches: where they come from.
        steps: which, e.g. `range(0, 300)`.
        workers: processes that prepare them, all environments together; 0 prepares them in this one. The result
            is the same.

    Returns:
        An iterator over the steps' lists of (images [batch_size, 3, height, width], labels [batch_size]).
    """
    return _stream(minibatches, steps, workers)


class _Evaluated(Dataset[Minibatch]):
    """Batch b of the splits' images, one after another."""

    def __init__(self, split: Split, transform: Transform, batch_size: int) -> None:
        self.split, self.transform, self.batch_size = split, transform, batch_size

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __getitem__(self, batch: int) -> Minibatch:
        keys = self.split.keys[batch * self.batch_size : (batch + 1) * self.batch_size]
        samples = [self.split.environment[key] for key in keys]
        return torch.stack([self.transform(image) for image, _ in samples]), torch.tensor([y for _, y in samples])


def evaluation_stream(split: Split, transform: Transform, batch_size: int, workers: int) -> Iterator[Minibatch]:
    """Every image of a split once, in the split's order.

    Args:
        split: which images.
        transform: of an image.
        batch_size: the last batch may be smaller.
        workers: processes that prepare the batches; the result is the same.

    Returns:
        An iterator over (images [batch, 3, height, width], labels [batch]).
    """
    batches = _Evaluated(split, transform, batch_size)
    return _stream(batches, range(len(batches)), workers)


def _stream(batches: Dataset[T], order: Sequence[int], workers: int) -> Iterator[T]:
    try:
        yield from DataLoader(batches, batch_size=None, sampler=order, num_workers=workers)
    except BenchmarkError as error:
        # A worker's error arrives with its traceback as text; its sentence is the last line.
        sentence = str(error).strip().splitlines()[-1]
        raise BenchmarkError(sentence.removeprefix(f"{BenchmarkError.__module__}.BenchmarkError: ")) from error
