"""The splits of an environment, as DomainBed makes them: `in`, `out` (the holdout) and, of test environments, `uda`."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from domainbed_ext.datasets.base import Environment, MultipleDomainDataset
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.seeds import seed_hash


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


def split(keys: list[int], n: int, seed: int) -> tuple[list[int], list[int]]:
    """Shuffles `keys` and cuts the first `n` off, as DomainBed splits an environment.

    Args:
        keys: Indices to split, e.g. `list(range(len(environment)))`.
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


def split_environment(
    size: int, holdout_fraction: float, uda_holdout_fraction: float | None, trial_seed: int, environment: int
) -> dict[str, list[int]]:
    """The splits of one environment.

    Args:
        size: Number of samples in the environment.
        holdout_fraction: Share that is its `out` split.
        uda_holdout_fraction: Share of the rest that is the `uda` split; None of a training environment.
        trial_seed: Number of the trial.
        environment: Index of the environment.

    Returns:
        Indices of "in", "out" and "uda".
    """
    held_out, kept = holdout_split(size, holdout_fraction, trial_seed, environment)
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
) -> dict[str, Split]:
    """The splits of every environment of a data set.

    Args:
        dataset: Data set with all its environments.
        test_envs: Indices of the test environments; these alone have a `uda` split.
        holdout_fraction: Share of each environment that is its `out` split.
        uda_holdout_fraction: Share of the rest that is the `uda` split.
        trial_seed: Number of the trial.

    Returns:
        "env0_in", "env0_out", "env0_uda", ... to the samples; an empty split is left out.

    Raises:
        BenchmarkError: An environment has too few images for a holdout.
    """
    splits = {}
    for i, environment in enumerate(dataset.datasets):
        uda_fraction = uda_holdout_fraction if i in test_envs else None
        named = split_environment(len(environment), holdout_fraction, uda_fraction, trial_seed, i)
        splits.update({f"env{i}_{name}": Split(environment, keys) for name, keys in named.items() if keys})
        if not (named["in"] and named["out"]):
            raise BenchmarkError(
                f"environment {environment.name} has {len(environment)} images, too few for a holdout of "
                f"{holdout_fraction}: add images or change --holdout_fraction"
            )
    return splits


def environment_of(split: str) -> int:
    """The index of a split's environment: 0 for "env0_in"."""
    return int(split.removeprefix("env").partition("_")[0])
