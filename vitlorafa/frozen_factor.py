"""A saved adapter without its frozen factor, which is drawn again from its seed when the adapter is read.

Half of an adapter's values are those of the frozen factor. They follow from the seed, but their last bits also depend
on torch, on the processor and on the number of threads, which decide how a QR decomposition is computed. So saving
draws the factor again and compares, and reading compares its digest with that of the factor that was trained with.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError, join_words
from vitlorafa.init import initialise
from vitlorafa.tensor_bytes import tensor_bytes

ENTRY = "frozen"  # of the description: what the factor is drawn from
_DRAWN = ("orthonormal", "gaussian", "uniform", "kaiming_uniform")  # from a seed and a shape alone
_THREADS = (1, 2, 4, 8, 16, 32, 64)  # numbers to try if the factor was drawn by another number than the current one


def leave_out(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor], order: Sequence[str], seed: int | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Leaves the frozen factor out of what is saved.

    Args:
        description: Description by `save_adapter`.
        tensors: Tensors by name.
        order: Names of the adapted layers, in the order in which their factors were drawn.
        seed: Seed that they were drawn from; None if it is not known.

    Returns:
        The description with what the factor is drawn from, and the other tensors.

    Raises:
        AdapterError: If no factor is frozen, or if it is not the one that the seed draws.
    """
    config = AdapterConfig.from_dict(description["config"])
    if config.train == "BA":
        raise AdapterError("both factors of the adapter train: save it with only_trained=False")
    factor = "A" if config.train == "B" else "B"
    starts = {name for target in config.targets for name in config.inits(target)} - {"zero"}
    if not starts <= {*_DRAWN}:
        raise AdapterError(
            f"{factor} starts as {join_words(sorted(starts))}, which is computed from the weights: save the adapter "
            "with only_trained=False"
        )
    if seed is None:
        raise AdapterError(f"the seed that drew {factor} is not known: save the adapter with only_trained=False")
    names = {layer: f"{layer}.lora_{factor}" for layer in order}
    widths = {layer: [tensors[f"{layer}.lora_B"].shape[1], tensors[f"{layer}.lora_A"].shape[2]] for layer in order}
    dtype = tensors[names[order[0]]].dtype
    frozen = {
        "factor": factor,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "widths": widths,
        "torch": torch.__version__,
    }
    kept = {name: tensors[name].detach().cpu() for name in names.values()}
    for threads in dict.fromkeys((torch.get_num_threads(), *_THREADS)):
        frozen["threads"] = threads
        drawn = _draw(config, description["layers"], frozen)
        if all(torch.equal(drawn[name], tensor) for name, tensor in kept.items()):
            break
    else:
        raise AdapterError(
            f"{factor} is not the one that seed {seed} draws here: save the adapter with only_trained=False"
        )
    frozen["digest"] = _digest(drawn)
    described = {**description, "config": {**description["config"], "seed": seed}, ENTRY: frozen}
    return described, {name: tensor for name, tensor in tensors.items() if name not in kept}


def restore(
    folder: Path, description: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Draws the factor that `leave_out` left out, if it did.

    Args:
        folder: Folder of the adapter, for messages.
        description: Description in the folder.
        tensors: Tensors in the folder.

    Returns:
        The description and the tensors, as if the whole adapter had been saved.

    Raises:
        AdapterError: If this machine draws another factor than the one that was trained with.
    """
    if ENTRY not in description:
        return description, tensors
    frozen = description[ENTRY]
    try:
        drawn = _draw(AdapterConfig.from_dict(description["config"]), description["layers"], frozen)
        factor, digest, version = frozen["factor"], frozen["digest"], frozen["torch"]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise AdapterError(
            f"{folder} does not say what its frozen factor is drawn from ({error}): save it again"
        ) from None
    if _digest(drawn) != digest:
        raise AdapterError(
            f"{folder} was saved without {factor}, and this machine (torch {torch.__version__}) draws another {factor} "
            f"from its seed than the one that it was trained with (torch {version}): save it with only_trained=False "
            "where it was trained"
        )
    return {name: value for name, value in description.items() if name != ENTRY}, tensors | drawn


def _draw(config: AdapterConfig, layers: Mapping[str, Sequence[str]], frozen: Mapping[str, Any]) -> dict[str, Tensor]:
    """The frozen factor of all layers by name, drawn as `inject` does."""
    dtype = getattr(torch, frozen["dtype"])
    place = "AB".index(frozen["factor"])
    generator = torch.Generator().manual_seed(frozen["seed"])
    # Initialisations that are drawn read the shape and the format of the weight alone.
    blank = torch.empty((), dtype=torch.promote_types(dtype, torch.float32))
    drawn = {}
    with _threads(min(frozen["threads"], 256)):  # a folder may say anything
        for name, (m, d_in) in frozen["widths"].items():
            inits = [config.inits(target) for target in layers[name]]
            weights = [blank.expand(m, d_in)] * len(inits)
            factors = initialise(inits, config.rank, weights, config.scale, generator)
            drawn[f"{name}.lora_{frozen['factor']}"] = factors[place].to(dtype)
    return drawn


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Context in which torch computes with as many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _digest(factors: Mapping[str, Tensor]) -> str:
    content = hashlib.blake2b(digest_size=16)
    for name, factor in factors.items():
        content.update(f"{name} {tuple(factor.shape)} {factor.dtype}".encode())
        content.update(tensor_bytes(factor))
    return content.hexdigest()
