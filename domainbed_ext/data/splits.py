"""The splits of an environment, as DomainBed makes them: `in`, `out` (the holdout) and, of test environments, `uda`.

With `--split_by concepts`, the holdout is drawn from the concepts of all environments, and has the images of the same
concepts in each: what is held out was trained on in no style.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from domainbed_ext.datasets.base import Environment, MultipleDomainDataset
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.protocols import CONCEPTS, IMAGES
from domainbed_ext.seeds import seed_hash

T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """Part of an environment: an `in` or an `out` split."""

    environment: Environment
    keys: Sequence[int]

    def __len__(self) -> int:
        return len(self.keys)

    def labels(self, keys: Sequence[int]) -> Tensor:
        """The classes of some images of the environment, int64."""
        return torch.tensor([int(self.environment.targets[key]) for key in keys])


def split(keys: list[T], n: int, seed: int) -> tuple[list[T], list[T]]:
    """Shuffles `keys` and cuts the first `n` off, as DomainBed splits an environment.

    Args:
        keys: What to split, e.g. the indices `list(range(len(environment)))`.
        n: Size of the first part.
        seed: Seed of the shuffle.

    Returns:
        The first `n` shuffled keys, and the rest.
    """
    order = list(range(len(keys)))
    np.random.RandomState(seed).shuffle(order)
    shuffled = [keys[i] for i in order]
    return shuffled[:n], shuffled[n:]


def holdout_split(size: int, fraction: float, trial_seed: int, environment: int) -> tuple[list[int], list[int]]:
    """The `out` (holdout) and `in` splits of one environment.

    Args:
        size: Number of samples in the environment.
        fraction: Share that is held out, 0.2 in DomainBed.
        trial_seed: Number of the trial.
        environment: Index of the environment.

    Returns:
        Indices of `out`, `int(size * fraction)` of them, and of `in`.
    """
    return split(list(range(size)), int(size * fraction), seed_hash(trial_seed, environment))


def held_out_concepts(concepts: Sequence[Sequence[str]], fraction: float, trial_seed: int) -> list[set[int]]:
    """Draws the concepts that a trial holds out of every environment.

    Args:
        concepts: Of each environment, the concept of each image.
        fraction: Share of all concepts that is held out.
        trial_seed: Number of the trial.

    Returns:
        Of each environment, the indices of the images of these concepts.
    """
    names = sorted({name for of_images in concepts for name in of_images})
    chosen = set(split(names, int(len(names) * fraction), seed_hash(trial_seed, CONCEPTS))[0])
    return [{key for key, name in enumerate(of_images) if name in chosen} for of_images in concepts]


def split_environment(
    size: int,
    holdout_fraction: float,
    uda_holdout_fraction: float | None,
    trial_seed: int,
    environment: int,
    out: Collection[int] | None = None,
) -> dict[str, list[int]]:
    """The splits of one environment.

    Args:
        size: Number of samples in the environment.
        holdout_fraction: Share that is its `out` split.
        uda_holdout_fraction: Share of the rest that is the `uda` split; None of a training environment.
        trial_seed: Number of the trial.
        environment: Index of the environment.
        out: Indices of its `out` split, as `held_out_concepts` draws them; None draws images.

    Returns:
        Indices of "in", "out" and "uda".
    """
    held_out, kept = holdout_split(size, holdout_fraction, trial_seed, environment)
    if out is not None:
        shuffled = held_out + kept
        held_out, kept = [key for key in shuffled if key in out], [key for key in shuffled if key not in out]
    uda: list[int] = []
    if uda_holdout_fraction is not None:
        uda, kept = split(kept, int(len(kept) * uda_holdout_fraction), seed_hash(trial_seed, environment))
    return {"in": kept, "out": held_out, "uda": uda}


def make_splits(
    dataset: MultipleDomainDataset,
    test_envs: Collection[int],
    holdout_fraction: float,
    uda_holdout_fraction: float,
    trial_seed: int,
    split_by: str = IMAGES,
) -> dict[str, Split]:
    """The splits of every environment of a data set.

    Args:
        dataset: Data set with all its environments.
        test_envs: Indices of the test environments; these alone have a `uda` split.
        holdout_fraction: Share of each environment that is its `out` split.
        uda_holdout_fraction: Share of the rest that is the `uda` split.
        trial_seed: Number of the trial.
        split_by: Value of `--split_by`: what is held out, images of each environment or concepts of all.

    Returns:
        "env0_in", "env0_out", "env0_uda", ... to the samples; an empty split is left out.

    Raises:
        BenchmarkError: An environment has too few images for a holdout, or images without a concept.
    """
    out: Sequence[set[int] | None] = [None] * len(dataset.datasets)
    if split_by == CONCEPTS:
        out = held_out_concepts(_concepts(dataset), holdout_fraction, trial_seed)
    splits = {}
    for i, environment in enumerate(dataset.datasets):
        uda_fraction = uda_holdout_fraction if i in test_envs else None
        named = split_environment(len(environment), holdout_fraction, uda_fraction, trial_seed, i, out[i])
        splits.update({f"env{i}_{name}": Split(environment, keys) for name, keys in named.items() if keys})
        if not (named["in"] and named["out"]):
            raise BenchmarkError(
                f"environment {environment.name} has {len(environment)} images{_of_concepts(environment, split_by)}, "
                f"too few for a holdout of {holdout_fraction}: add images or change --holdout_fraction"
            )
    return splits


def _concepts(dataset: MultipleDomainDataset) -> list[Sequence[str]]:
    """The concepts of each environment; refuses images that carry none."""
    for environment in dataset.datasets:
        named = sum(map(bool, environment.concepts))
        if named < len(environment):
            raise BenchmarkError(
                f"--split_by {CONCEPTS}: {len(environment) - named} of {len(environment)} images of {environment.name} "
                f"in {type(dataset).__name__} carry no concept: leave it out, or name the concepts in the column "
                "`concept` of a Manifest"
            )
    return [environment.concepts for environment in dataset.datasets]


def _of_concepts(environment: Environment, split_by: str) -> str:
    return f" of {len(set(environment.concepts))} concepts" if split_by == CONCEPTS else ""


def split_of(name: str) -> str:
    """The split that a name means: "in" for "env0_in"."""
    return name.partition("_")[2]


def environment_of(split: str) -> int:
    """The index of a split's environment: 0 for "env0_in"."""
    return int(split.removeprefix("env").partition("_")[0])
