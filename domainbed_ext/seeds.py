"""DomainBed's seeds and splits: every random choice of a run follows from a few small integers."""

import hashlib
from typing import Any

import numpy as np


def seed_hash(*args: Any) -> int:
    """A seed in [0, 2³¹) from the `repr` of its arguments, as DomainBed makes it.

    Args:
        *args: plain Python values. A NumPy scalar has another `repr` than the number it stands for, and so
            another seed: convert it first.

    Returns:
        `md5(str(args)) mod 2³¹`.
    """
    return int(hashlib.md5(str(args).encode("utf-8")).hexdigest(), 16) % (2**31)


def split(keys: list[int], n: int, seed: int) -> tuple[list[int], list[int]]:
    """Shuffles `keys` and cuts the first `n` off, as DomainBed splits an environment.

    Args:
        keys: what to split, e.g. `list(range(len(environment)))`.
        n: size of the first part.
        seed: of the shuffle.

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
        size: number of samples in the environment.
        fraction: share that is held out, 0.2 in DomainBed.
        trial_seed: number of the trial.
        environment: index of the environment.

    Returns:
        Indices of `out`, `int(size * fraction)` of them, and of `in`.
    """
    return split(list(range(size)), int(size * fraction), seed_hash(trial_seed, environment))
