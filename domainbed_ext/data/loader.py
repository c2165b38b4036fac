"""From an environment to batches: training minibatches, and batches of the splits that are evaluated.

Every random draw is a function of (seed, environment, step), not of a generator's history. So a batch is the
same whichever process draws it, and a run can resume from any step.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from domainbed_ext.data.splits import Split
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.seeds import seed_hash
from domainbed_ext.system.processes import be_deaf
from domainbed_ext.system.stages import Stage, unmeasured

_CPU = torch.device("cpu")

Minibatch = tuple[Tensor, Tensor]
T = TypeVar("T")
R = TypeVar("R")


class Source(Protocol):
    """The model's inputs, by index."""

    def batch(self, keys: Sequence[int], generator: np.random.Generator) -> Tensor:
        """Some images' tensors, on the CPU.

        Args:
            keys: Indices within the environment.
            generator: Generator of random augmentations.

        Returns:
            [len(keys), ...].
        """
        ...


class Minibatches(Dataset[list[Minibatch]]):
    """Step t's minibatches, one a training environment, as a pure function of (seed, t).

    Args:
        splits: The `in` split of every training environment, in index order.
        sources: The inputs of each training environment.
        batch_size: Images per environment and step.
        seed: Seed of the run.
        balanced: Whether every class of an environment is drawn equally often (`class_balanced`).
        sampling: "replacement" draws independently, as in DomainBed; "epochs" takes every image once, in random
            order, before any again. Balanced epochs are those of each class: the classes take turns in random order.
        stage: Timer of the stages of a run.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        sources: Sequence[Source],
        batch_size: int,
        seed: int,
        balanced: bool = False,
        sampling: str = "replacement",
        stage: Stage = unmeasured,
    ) -> None:
        self.splits, self.sources, self.batch_size, self.seed = splits, sources, batch_size, seed
        self.sampling, self.stage = sampling, stage
        self.classes = [_classes(split) if balanced else [np.arange(len(split))] for split in splits]
        self.weights = [_balanced_weights(classes) if balanced else None for classes in self.classes]

    def __getitem__(self, step: int) -> list[Minibatch]:
        return [self._draw(step, place) for place in range(len(self.splits))]

    def _draw(self, step: int, place: int) -> Minibatch:
        split = self.splits[place]
        draws = self._replacement(step, place) if self.sampling == "replacement" else self._epochs(step, place)
        keys = [split.keys[draw] for draw in draws]
        generator = np.random.default_rng(seed_hash(self.seed, "augment", step, place))
        with self.stage("augment"):
            return self.sources[place].batch(keys, generator), split.labels(keys)

    def _replacement(self, step: int, place: int) -> Sequence[int]:
        split, weights = self.splits[place], self.weights[place]
        generator = np.random.default_rng(seed_hash(self.seed, "minibatch", step, place))
        return generator.choice(len(split), self.batch_size, p=weights).tolist()

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


def draw_probabilities(split: Split, balanced: bool) -> np.ndarray:
    """The probability of each image of a split to be drawn into a minibatch.

    Args:
        split: Split that is trained on.
        balanced: Whether every class is drawn equally often.

    Returns:
        [len(split)], which sum to 1.
    """
    return _balanced_weights(_classes(split) if balanced else [np.arange(len(split))])


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


class Evaluated(NamedTuple):
    """A split that is evaluated.

    Attributes:
        split: Images that are evaluated.
        source: Inputs made of them.
        seed: Seed of random augmentations; None if there are none.
    """

    split: Split
    source: Source
    seed: int | None = None


class EvaluationBatches(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """The images of several splits as one sequence of batches, of which only the last may be short.

    Items are (images, labels, the index of the split of each image).

    Args:
        parts: The splits, in order.
        batch_size: Images per batch.
    """

    def __init__(self, parts: Sequence[Evaluated], batch_size: int) -> None:
        self.parts, self.batch_size = parts, batch_size
        self.starts = np.cumsum([0, *(len(part.split) for part in parts)]).tolist()

    def __len__(self) -> int:
        return -(-self.starts[-1] // self.batch_size)

    def __getitem__(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        first, end = batch * self.batch_size, min((batch + 1) * self.batch_size, self.starts[-1])
        images, labels, numbers = [], [], []
        for number, (split, source, seed) in enumerate(self.parts):
            start = max(0, first - self.starts[number])
            keys = split.keys[start : max(0, end - self.starts[number])]
            if not keys:
                continue
            images.append(source.batch(keys, np.random.default_rng(seed_hash(seed, start))))
            labels.append(split.labels(keys))
            numbers.append(torch.full((len(keys),), number))
        return torch.cat(images), torch.cat(labels), torch.cat(numbers)


def stream(
    batches: Dataset[T],
    order: Sequence[int],
    workers: int,
    ready: Callable[[T], R],
    device: torch.device = _CPU,
    stage: Stage = unmeasured,
) -> Iterator[R]:
    """Batches in order.

    Args:
        batches: Data set whose items are batches.
        order: Indices of the batches, e.g. `range(0, 300)`.
        workers: Number of processes that prepare batches, for all environments together and at most one a batch; 0
            prepares them in this process. The result is the same.
        ready: Function that is applied to each batch in this process, e.g. one that copies it to a device.
        device: Device that batches are for. Those for a GPU are in pinned memory, from which it copies by itself.
        stage: Timer of the stages of a run.

    Returns:
        An iterator over the results of `ready`.

    Raises:
        BenchmarkError: If a worker raised one; the message is the same.
    """
    loaded = DataLoader(
        batches,
        batch_size=None,
        sampler=order,
        num_workers=min(workers, len(order)),
        pin_memory=device.type == "cuda",
        worker_init_fn=be_deaf,  # the run handles Ctrl-C: workers that it ended would make it fail
    )
    loader = iter(loaded)
    for _ in order:
        try:
            with stage("data wait"):
                batch = next(loader)
        except BenchmarkError as error:
            # A worker's error arrives with its traceback as text; its sentence is the last line.
            sentence = str(error).strip().splitlines()[-1]
            raise BenchmarkError(sentence.removeprefix(f"{BenchmarkError.__module__}.BenchmarkError: ")) from error
        with stage("augment"):
            prepared = ready(batch)
        yield prepared
