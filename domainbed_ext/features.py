"""Features of a frozen backbone: the same at every step and in every run, so computed once and kept in the cache.

A linear probe is evaluated on them, and trained too where its images are not augmented. They are what the probe would
compute at each step, to the bit.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from domainbed_ext.algorithms import LP
from domainbed_ext.augmentation import none
from domainbed_ext.cache.entries import Entries, NoRoom
from domainbed_ext.cache.pixels import Stored
from domainbed_ext.data import EVALUATION_BATCH
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.inputs import Inputs
from domainbed_ext.provenance import machine, versions
from vitlorafa.tensor_bytes import tensor_bytes

_FILE = "features.safetensors"


def features(
    algorithm: LP, images: Stored, inputs: Inputs, cache: Entries, stop: Callable[[], None] = lambda: None
) -> Tensor | None:
    """The features of all images of an environment.

    Args:
        algorithm: that `embeds`.
        images: of the backbone's size, out of the cache.
        inputs: what the backbone is fed.
        cache: where features are kept.
        stop: called between batches, and while another process computes them; may raise.

    Returns:
        [images, width] on the CPU; None where the cache has no room for them.
    """

    def build(folder: Path) -> None:
        save_file({"features": _compute(algorithm, images, inputs, stop)}, folder / _FILE)

    digest = _digest(algorithm, images, inputs)
    key = f"{images.folder.parent.name}/features-{digest}"
    width = algorithm.backbone.get_classifier().in_features  # type: ignore[operator]
    try:
        path = cache.get(key, 4 * len(images) * int(width), build, f"features, {images.folder.name}", stop)
        return load_file(path / _FILE)["features"]
    except NoRoom:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        raise BenchmarkError(
            f"the features {key} cannot be read ({error}): remove them with python -m domainbed_ext.cache remove"
        ) from error


@torch.inference_mode()
def _compute(algorithm: LP, images: Stored, inputs: Inputs, stop: Callable[[], None]) -> Tensor:
    algorithm.eval()
    rows = []
    for start in range(0, len(images), EVALUATION_BATCH):
        stop()
        pixels = none(images[start : start + EVALUATION_BATCH], inputs.size, np.random.default_rng())
        rows.append(algorithm.embed(inputs.ready(pixels.to(algorithm.device))).cpu())
    return torch.cat(rows)


def _digest(algorithm: LP, images: Stored, inputs: Inputs) -> str:
    """Of all that features follow from."""
    head = set(map(id, algorithm.backbone.get_classifier().parameters()))  # type: ignore[operator]
    content = hashlib.blake2b(digest_size=8)
    for name, tensor in algorithm.backbone.state_dict(keep_vars=True).items():
        if id(tensor) not in head:
            content.update(name.encode("utf-8"))
            content.update(tensor_bytes(tensor))
    said = {**versions(), **machine(), "backbone": algorithm.hparams["backbone"], "precision": algorithm.precision}
    said |= {"images": images.folder.name, "inputs": repr(inputs), "threads": torch.get_num_threads()}
    content.update(json.dumps(said, sort_keys=True).encode("utf-8"))
    return content.hexdigest()
