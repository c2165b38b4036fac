"""The same arguments give the same numbers, on a GPU too: algorithms that add in a fixed order."""

import os

import torch

from domainbed_ext.errors import warn_once

VARIABLE = "DOMAINBED_EXT_DETERMINISTIC"
"""Environment variable that allows other algorithms, by the value off."""
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def is_wanted() -> bool:
    """Returns whether runs are to be reproducible on a GPU too: unless the environment variable says off."""
    return os.environ.get(VARIABLE, "").lower() != "off"


def compute_reproducibly(device: torch.device) -> None:
    """Chooses algorithms for this process that give the same result each time, and float32 that is not shortened.

    Gradients of attention are what differs otherwise: torch's kernels add them in the order in which blocks finish.

    Args:
        device: Device of the run.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    # Without it cuBLAS may add in any order. It is read at the first matmul on a GPU, which may be that of a later run.
    if not torch.cuda.is_initialized():
        os.environ.setdefault(_WORKSPACE, ":4096:8")
    if device.type != "cuda":
        return
    is_late = _WORKSPACE not in os.environ
    if is_late and is_wanted():
        warn_once(
            "this process used the GPU before, so runs of the same seed can differ by rounding: set "
            f"{_WORKSPACE}=:4096:8 before it starts"
        )
    # Convolutions alone would compute float32 as TF32, with 10 bits, and differ from matmuls and from a CPU.
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(is_wanted() and not is_late)
    # Nothing reads memory before it is written, so filling it would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
