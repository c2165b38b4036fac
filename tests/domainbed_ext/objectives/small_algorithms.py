"""Algorithms with an objective on the small backbone, and minibatches of three domains."""

import torch

from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.names import get_algorithm_class
from domainbed_ext.hparams_registry import resolve

SHAPE, CLASSES, DOMAINS = (3, 32, 32), 10, 3


def make(name: str, **hparams) -> Algorithm:
    """The algorithm of a method's name, from random weights; keywords override hyperparameters."""
    torch.manual_seed(0)
    settings = {**resolve(name, "DigitsShift"), "weights": "none", "precision": "float32", **hparams}
    return get_algorithm_class(name)(SHAPE, CLASSES, DOMAINS, settings)


def batches(seed: int = 0, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A minibatch of each domain, each with statistics of its own."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, *SHAPE, generator=draw) + domain, torch.randint(CLASSES, (size,), generator=draw))
        for domain in range(DOMAINS)
    ]
