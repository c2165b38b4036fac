"""From an environment to a batch: transforms, training minibatches and evaluation batches.

Every random draw is a function of (seed, environment, step), not of a generator's history. So a batch is the
same whoever makes it, in this process or in a worker, and a run can go on from any step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
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

    Args:
        splits: the `in` split of every training environment, in index order.
        transform: of an image.
        batch_size: images an environment and step.
        seed: of the run.
        balanced: draw every class of an environment equally often (`class_balanced`).
        sampling: "replacement" draws independently, as in DomainBed; "epochs" takes every image once, in random
            order, before any again. Balanced epochs are those of each class: the classes take turns in random order.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        transform: Transform,
        batch_size: int,
        seed: int,
        balanced: bool = False,
        sampling: str = "replacement",
    ) -> None:
        self.splits, self.transform, self.batch_size, self.seed = splits, transform, batch_size, seed
        self.sampling = sampling
        self.classes = [_classes(split) if balanced else [np.arange(len(split))] for split in splits]
        self.weights = [_balanced_weights(classes) if balanced else None for classes in self.classes]

    def __getitem__(self, step: int) -> list[Minibatch]:
        return [self._draw(step, place) for place in range(len(self.splits))]

    def _draw(self, step: int, place: int) -> Minibatch:
        split = self.splits[place]
        seed = seed_hash(self.seed, "minibatch", step, place)
        draws = self._replacement(seed, place) if self.sampling == "replacement" else self._epochs(step, place)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(seed)
            samples = [split.environment[split.keys[draw]] for draw in draws]
            images = torch.stack([self.transform(image) for image, _ in samples])
        return images, torch.tensor([label for _, label in samples])

    def _replacement(self, seed: int, place: int) -> Sequence[int]:
        split, weights = self.splits[place], self.weights[place]
        return np.random.default_rng(seed).choice(len(split), self.batch_size, p=weights).tolist()

    def _epochs(self, step: int, place: int) -> list[int]:
        """The step's part of an endless row of draws: rounds, in which each class has one turn, in random order; a
        class's turns go through its images, epoch after epoch."""
        classes = self.classes[place]

        @cache  # for this step alone: the permutations of a large environment would fill the memory
        def shuffled(size: int, *key: object) -> np.ndarray:
            return np.random.default_rng(seed_hash(self.seed, "epochs", place, *key)).permutation(size)

        draws = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            turn, place_in_round = divmod(position, len(classes))
            chosen = int(shuffled(len(classes), "round", turn)[place_in_round])
            epoch, place_in_epoch = divmod(turn, len(classes[chosen]))
            draws.append(int(classes[chosen][shuffled(len(classes[chosen]), "epoch", chosen, epoch)[place_in_epoch]]))
        return draws


def _classes(split: Split) -> list[np.ndarray]:
    """Where in a split the images of each class are that it has any of."""
    labels = np.asarray(split.environment.targets)[np.asarray(split.keys)]
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def _balanced_weights(classes: Sequence[np.ndarray]) -> np.ndarray:
    """Of each image, so that every class is drawn equally often."""
    weights = np.empty(sum(map(len, classes)))
    for members in classes:
        weights[members] = 1.0 / (len(members) * len(classes))
    return weights


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

    def __init__(self, split: Split, transform: Transform, batch_size: int, seed: int | None) -> None:
        self.split, self.transform, self.batch_size, self.seed = split, transform, batch_size, seed

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __getitem__(self, batch: int) -> Minibatch:
        keys = self.split.keys[batch * self.batch_size : (batch + 1) * self.batch_size]
        with torch.random.fork_rng(devices=[]):
            if self.seed is not None:
                torch.manual_seed(seed_hash(self.seed, batch))
            samples = [self.split.environment[key] for key in keys]
            return torch.stack([self.transform(image) for image, _ in samples]), torch.tensor([y for _, y in samples])


def evaluation_stream(
    split: Split, transform: Transform, batch_size: int, workers: int, seed: int | None = None
) -> Iterator[Minibatch]:
    """Every image of a split once, in the split's order.

    Args:
        split: which images.
        transform: of an image.
        batch_size: the last batch may be smaller.
        workers: processes that prepare the batches; the result is the same.
        seed: of a transform that draws.

    Returns:
        An iterator over (images [batch, 3, height, width], labels [batch]).
    """
    batches = _Evaluated(split, transform, batch_size, seed)
    return _stream(batches, range(len(batches)), workers)


def _stream(batches: Dataset[T], order: Sequence[int], workers: int) -> Iterator[T]:
    try:
        yield from DataLoader(batches, batch_size=None, sampler=order, num_workers=workers)
    except BenchmarkError as error:
        # A worker's error arrives with its traceback as text; its sentence is the last line.
        sentence = str(error).strip().splitlines()[-1]
        raise BenchmarkError(sentence.removeprefix(f"{BenchmarkError.__module__}.BenchmarkError: ")) from error
