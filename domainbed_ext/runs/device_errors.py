"""What a GPU refuses, as a sentence: memory that it does not have, and operations that round in no fixed order."""

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from domainbed_ext.errors import BenchmarkError

if TYPE_CHECKING:
    from domainbed_ext.algorithms.base import Algorithm
    from domainbed_ext.data.loader import Minibatch


class OutOfMemory(BenchmarkError):  # noqa: N818  (an error by its base)
    """A step did not fit into the memory of the GPU."""


def explain(error: BaseException) -> str | None:
    """Explains an error of a GPU.

    Args:
        error: Error of a run.

    Returns:
        What is wrong, and what to do; None for other errors.
    """
    from domainbed_ext.models.determinism import VARIABLE  # torch, which an error of a GPU has loaded

    if type(error).__name__ == "OutOfMemoryError" or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
        return (
            "the GPU has no memory left outside of training steps: end what else uses it, lower jobs_per_gpu, or "
            "choose a smaller --backbone or image_size"
        )
    if found := re.match(r"(\S+) does not have a deterministic implementation", str(error)):
        return (
            f"{found[1]} has no algorithm for a GPU that gives the same result each time: give --device cpu, or set "
            f"{VARIABLE}=off, with which runs of the same seed can differ"
        )
    return None


def out_of_memory(algorithm: "Algorithm", batches: "Sequence[Minibatch]", hparams: Mapping[str, Any]) -> OutOfMemory:
    """Finds a batch size with which a step fits, by trying; the algorithm is of no use after it.

    Args:
        algorithm: Algorithm whose step did not fit.
        batches: Images and labels of the step, by environment.
        hparams: Hyperparameters of the run.

    Returns:
        The error to raise, which names that size.
    """
    accumulate = int(hparams.get("accumulate", 1))

    def fits(size: int) -> bool:
        return _fits(
            algorithm, [(images[: size * accumulate], labels[: size * accumulate]) for images, labels in batches]
        )

    batch_size = int(hparams["batch_size"])
    size = find_batch_size(fits, batch_size, algorithm.objective.least_images)
    problem = f"a step of batch_size {batch_size} does not fit into the memory of the GPU"
    if size is None:
        return OutOfMemory(f"{problem}, nor does a smaller one: choose a smaller --backbone, image_size or rank")
    parts = -(-batch_size * accumulate // size)
    return OutOfMemory(
        f"{problem}, and {size} fits: give --hparams batch_size={size}; with accumulate={parts} a step has as many "
        "images as now"
    )


def find_batch_size(fits: Callable[[int], bool], batch_size: int, least: int = 1) -> int | None:
    """Finds a smaller batch size that fits, by halving.

    Args:
        fits: Function that tries a size.
        batch_size: Size that does not fit.
        least: Smallest size.

    Returns:
        The size; None if not even the smallest fits.
    """
    while (batch_size := batch_size // 2) >= least:
        if fits(batch_size):
            return batch_size
    return None


def _fits(algorithm: "Algorithm", batches: "Sequence[Minibatch]") -> bool:
    import torch

    algorithm.zero_grad(set_to_none=True)
    gc.collect()
    if algorithm.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        values = algorithm.update(list(batches))
        [float(value) for value in values.values()]  # memory can run out late, since work is queued
    except torch.OutOfMemoryError:
        return False
    return True
