"""The layer's backends and Triton's tiles, to compare them: for `python -m domainbed_ext.bench questions`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from vitlorafa.ops import triton as kernels
from vitlorafa.ops import use_backend


class Tiles(NamedTuple):
    """How Triton's kernels are launched.

    Attributes:
        rows: Rows of a tile.
        warps: Warps of a program.
        stages: Stages of its loop that are in flight.
    """

    rows: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.warps} warps, {self.stages} stages"


TILES = tuple(Tiles(*sizes) for sizes in ((64, 4, 2), (128, 4, 2), (64, 8, 2), (128, 8, 2), (64, 4, 3), (128, 8, 3)))
"""What is compared."""


@contextmanager
def using_backend(name: str) -> Iterator[None]:
    """Computes adapted layers with a backend, and with "eager" again at the end.

    Args:
        name: Name of the backend, as in `vitlorafa.ops.use_backend`.

    Raises:
        AdapterError: There is no such backend.
    """
    use_backend(name)
    try:
        yield
    finally:
        use_backend("eager")


@contextmanager
def using_tiles(tiles: Tiles) -> Iterator[None]:
    """Launches Triton's kernels with other tiles.

    Args:
        tiles: Sizes.
    """
    before = kernels.BLOCK_N, kernels.BLOCK_N_ONCE, kernels.WARPS, kernels.STAGES
    kernels.BLOCK_N, kernels.BLOCK_N_ONCE, kernels.WARPS, kernels.STAGES = (
        tiles.rows,
        max(tiles.rows, 128),
        tiles.warps,
        tiles.stages,
    )
    try:
        yield
    finally:
        kernels.BLOCK_N, kernels.BLOCK_N_ONCE, kernels.WARPS, kernels.STAGES = before


def kernel_calls(rows: int, width: int, rank: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Makes a call of each of Triton's kernels, in bfloat16.

    Args:
        rows: Rows of the layer's input, tokens of all images.
        width: Width of its input and output.
        rank: Rank of the adapter.
        device: Device of the kernels.

    Returns:
        Calls by the name of the kernel.
    """
    x, g = (torch.randn(rows, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    A, B = torch.randn(1, rank, width, device=device), torch.randn(1, width, rank, device=device)
    xA = kernels.project(x, A)
    return {
        "project": lambda: kernels.project(x, A),
        "add_update": lambda: kernels.add_update(g, xA, B, 1e-3, (0,)),
        "backward_g": lambda: kernels.backward_g(g, xA, B, 1.0, (0,)),
        "grad_A": lambda: kernels.grad_A(xA, x),
    }
