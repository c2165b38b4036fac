"""The second moments of layers' inputs, in one pass over images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from domainbed_ext.analyse.matrices import Matrix
from domainbed_ext.analyse.runs import to_matrix

if TYPE_CHECKING:
    from torch import Tensor, nn

    from domainbed_ext.algorithms.base import Algorithm
    from domainbed_ext.runs.feed import Feed


class Moments:
    """The mean of x xᵀ over all inputs x of some linear layers, each token's alone; only these sums are kept.

    Args:
        model: Model that holds the layers.
        modules: Names of the layers.

    The sums are of inputs that pass while the context lasts, in the layer's own precision, as float32 within a batch
    and as float64 over batches.
    """

    def __init__(self, model: "nn.Module", modules: Sequence[str]) -> None:
        self._layers = {name: model.get_submodule(name) for name in modules}
        self._sums: dict[str, Matrix] = {}
        self._counts = dict.fromkeys(modules, 0)

    def __enter__(self) -> "Moments":
        self._hooks = [
            layer.register_forward_pre_hook(lambda layer, inputs, name=name: self._add(name, inputs[0]))
            for name, layer in self._layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def of(self, module: str) -> Matrix:
        """The second moments of a layer's inputs, [d_in, d_in].

        Args:
            module: Name of the layer.
        """
        return self._sums[module] / self._counts[module]

    def _add(self, name: str, inputs: "Tensor") -> None:
        vectors = inputs.detach().float().flatten(0, -2)
        outer = to_matrix(vectors.T @ vectors)
        self._sums[name] = self._sums.get(name, np.zeros_like(outer)) + outer
        self._counts[name] += len(vectors)


def input_moments(algorithm: "Algorithm", feed: "Feed", modules: Sequence[str], images: int) -> Moments:
    """Computes the second moments of layers' inputs on training images, with the weights that an algorithm has now.

    Args:
        algorithm: Algorithm whose backbone has the layers.
        feed: Feed of the run.
        modules: Names of the layers.
        images: Number of training images, evenly over the training environments.
    """
    import torch

    algorithm.eval()
    with Moments(algorithm.backbone, modules) as moments, torch.inference_mode():
        for batch in feed.training_images(images):
            algorithm.predict(batch)
    return moments
