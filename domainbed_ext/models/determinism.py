"""The same arguments give the same numbers, on a GPU too: algorithms that add in a fixed order."""

import os

import torch

VARIABLE = "DOMAINBED_EXT_DETERMINISTIC"
"""Environment variable that allows other algorithms, by the value off."""


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
    if device.type != "cuda":
        return
    # Convolutions alone would compute float32 as TF32, with 10 bits, and differ from matmuls and from a CPU.
    torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it for this, and reads it when it starts
    torch.use_deterministic_algorithms(is_wanted())
    # Nothing reads memory before it is written, so filling it would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
