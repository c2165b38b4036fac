"""Scores of the true class."""

from torch import Tensor
from torch.nn import functional as F


def of_labels(scores: Tensor, labels: Tensor) -> Tensor:
    """The score of each image's label.

    The backward pass of `gather` adds in a fixed order only by a detour for which the host waits for a GPU. This one
    writes each gradient once.

    Args:
        scores: Scores of the classes [n, classes].
        labels: Labels [n].

    Returns:
        [n].
    """
    return -F.nll_loss(scores, labels, reduction="none")
