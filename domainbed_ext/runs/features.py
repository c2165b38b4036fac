"""Features of a frozen backbone: the same at every step and in every run, so computed once and cached.

A linear probe is evaluated on them, and trained too if its images are not augmented. They are always computed in the
same batches, an environment's images in their order, so that they do not depend on what the cache has room for.
"""

import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from domainbed_ext.algorithms.probe import LP
from domainbed_ext.cache.entries import Entries
from domainbed_ext.cache.pixels import Stored
from domainbed_ext.cache.tensors import Kept, find_or_compute
from domainbed_ext.data.augmentation import AUGMENTATIONS
from domainbed_ext.data.loader import stream
from domainbed_ext.models import backbones
from domainbed_ext.models.inputs import Inputs
from domainbed_ext.runs.images import Augmented, Images
from domainbed_ext.runs.provenance import machine, rounding, versions
from domainbed_ext.system import strict_json
from domainbed_ext.system.progress import bar
from vitlorafa import tuning

_WAYS = "ways"


class Features:
    """Features in place of images.

    Args:
        features: Features [n, width] of every image of an environment.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def batch(self, keys: Sequence[int], generator: np.random.Generator) -> Tensor:
        """Returns features [len(keys), width]; draws nothing."""
        return self.features[torch.as_tensor(keys)]


def features(
    algorithm: LP,
    images: Stored,
    inputs: Inputs,
    batch_size: int,
    cache: Entries,
    stop: Callable[[], None] = lambda: None,
) -> Tensor | None:
    """Returns the features of all images of an environment, cached; those that are not are computed.

    Args:
        algorithm: Linear probe that `embeds`.
        images: Cached images at the backbone's input size.
        inputs: Size and statistics of the backbone's input.
        batch_size: Number of images that are computed at a time.
        cache: Cache that holds the features.
        stop: Function that is called between batches, and while another process computes them; may raise.

    Returns:
        Features [images, width] on the CPU; None if the cache has no room for them.
    """

    def kept() -> Kept:
        computed = {"features": compute(algorithm, images, inputs, batch_size, stop)}
        return Kept(computed, {_WAYS: strict_json.dumps(tuning.answers())})

    def read(kept: Kept) -> Tensor:
        tuning.note(json.loads(kept.texts[_WAYS]))
        return kept.tensors["features"]

    key = f"{images.folder.parent.name}/features-{_digest(algorithm, images, inputs, batch_size)}"
    width = algorithm.backbone.get_classifier().in_features  # type: ignore[operator]
    size = 4 * len(images) * int(width)
    return find_or_compute(cache, key, size, kept, read, f"features, {images.folder.name}", stop)


@torch.inference_mode()
def compute(
    algorithm: LP,
    images: Images,
    inputs: Inputs,
    batch_size: int,
    stop: Callable[[], None] = lambda: None,
    workers: int = 0,
) -> Tensor:
    """Computes the features of all images of an environment, without the cache.

    Args:
        algorithm: Linear probe that `embeds`.
        images: The environment's images, out of the cache or decoded here.
        inputs: Size and statistics of the backbone's input.
        batch_size: Number of images that are computed at a time.
        stop: Function that is called between batches; may raise.
        workers: Number of processes that read and decode images; 0 does so in this one. The result is the same.

    Returns:
        Features [images, width] on the CPU.
    """
    algorithm.eval()
    rows = []
    batches = _InOrder(Augmented(images, AUGMENTATIONS["none"], inputs.size), len(images), batch_size)
    with bar("computing features", len(images), "images") as shown:
        device = algorithm.device

        def ready(pixels: Tensor) -> Tensor:
            return pixels.to(device, non_blocking=True)

        for pixels in stream(batches, range(len(batches)), workers, ready, device):
            stop()
            rows.append(algorithm.embed(inputs.ready(pixels)))  # stays there: a copy would wait for the batch
            shown.advance(len(pixels))
    return torch.cat(rows).cpu()


class _InOrder(Dataset[Tensor]):
    """An environment's images in batches that depend on nothing but the environment."""

    def __init__(self, source: Augmented, count: int, batch_size: int) -> None:
        self.source, self.count, self.batch_size = source, count, batch_size

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __getitem__(self, batch: int) -> Tensor:
        keys = range(self.count)[batch * self.batch_size : (batch + 1) * self.batch_size]
        return self.source.batch(keys, np.random.default_rng(0))  # nothing is drawn from it


def _digest(algorithm: LP, images: Stored, inputs: Inputs, batch_size: int) -> str:
    """The digest of all that features depend on."""
    facts = {**versions(), **machine(), "backbone": algorithm.hparams["backbone"], "precision": algorithm.precision}
    facts |= {"images": images.folder.name, "inputs": repr(inputs), **rounding()}
    facts |= {"batch": batch_size, "ways": tuning.identity()}
    facts["weights"] = backbones.loaded_digest(algorithm.backbone)
    return hashlib.blake2b(strict_json.dumps(facts, sort_keys=True).encode("utf-8"), digest_size=8).hexdigest()
