"""The dropout mask of an adapter's input: recomputed wherever it is needed, never kept.

On a CPU, a hash of (seed, position) decides whether an element is kept. It consists of integer operations, so a mask is
the same on every processor, for any number of threads, any size of blocks and inputs of any precision. Other devices
draw the mask by torch's generator, which is fast there.

Elements are counted row by row and hashed in pairs. The hash of pair j in group i, of 2048 elements, is

    (U_j + K_i V_j) (U'_j + 2 K'_i V'_j) mod 2³²,

whose halves are a sample of 16 bits for each of the two. The tables U, V, U', V' are fixed random integers, with V and
U' odd; the keys K, K' are random integers from the seed. Keys are few, so that a mask costs three operations for two
elements, vectorised over blocks that stay in the cache. Samples of 16 bits make probabilities multiples of 1/65536.
"""

import math
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

_LEVELS = 2**16
_GROUP = 2**11  # elements with the same keys; the tables take 8 bytes for each and stay in the L1 cache
# Elements of a block, about, for each thread. Their hashes take 4 bytes for each. In smaller blocks, calling the
# operations takes as long as computing them; larger ones gain nothing.
_BLOCK = 2**19


def rounded(dropout: float) -> float:
    """The dropout probability as a multiple of 1/65536, below 1.

    Args:
        dropout: Probability of dropping an element.
    """
    return min(round(dropout * _LEVELS), _LEVELS - 1) / _LEVELS


@torch.library.custom_op("vitlorafa::dropout_mask", mutates_args=())
def dropout_mask(shape: list[int], device: torch.device, dropout: float, seed: Tensor) -> Tensor:
    """The mask of the elements that the adapter sees.

    Registered as a custom operation, because a compiler cannot trace a generator.

    Args:
        shape: Shape of the adapter's input, [..., d_in]. Only its number of elements counts: rows may be flattened.
        device: Device of the input; other devices than a CPU draw other masks.
        dropout: Probability of dropping an element.
        seed: Seed of the mask, an integer tensor of shape [] on the CPU.

    Returns:
        A boolean tensor, True where an element is kept; the same for inputs of every precision.
    """
    mask = torch.empty(shape, dtype=torch.bool, device=device)
    if device.type != "cpu":
        return mask.bernoulli_(1 - rounded(dropout), generator=torch.Generator(device).manual_seed(int(seed)))
    matrix = mask.view(math.prod(shape[:-1]), shape[-1])
    for rows, kept in _blocks(matrix.shape, dropout, seed):
        matrix[rows] = kept
    return mask


@dropout_mask.register_fake
def _(shape: list[int], device: torch.device, dropout: float, seed: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device=device)


def dropped_blocks(x: Tensor, dropout: float, seed: Tensor) -> Iterable[tuple[slice, Tensor]]:
    """mask ∘ x in blocks of rows, which stay in the cache; on other devices than a CPU, and in a compiler, as a whole.

    Args:
        x: Matrix, [N, d_in].
        dropout: Probability of dropping an element.
        seed: Seed of the mask, of shape [], on the CPU.

    Returns:
        Pairs of a range of rows, and mask ∘ x in these rows, which the next block may overwrite.
    """
    if not _draws_in_blocks(x):
        return [(slice(None), _drop(x, dropout, seed))]
    return ((rows, _times(kept, x[rows])) for rows, kept in _blocks(x.shape, dropout, seed))


def drop_(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """mask ∘ x, in place where that is possible.

    Args:
        x: Matrix, [N, d_in], which may be overwritten.
        dropout: Probability of dropping an element.
        seed: Seed of the mask, of shape [], on the CPU.
    """
    if not _draws_in_blocks(x):
        return _drop(x, dropout, seed)
    for rows, kept in _blocks(x.shape, dropout, seed):
        x.view(_integer(x))[rows].mul_(kept)
    return x


@torch.library.custom_op("vitlorafa::drop", mutates_args=())
def _drop(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """mask ∘ x as one operation for a compiler, which would otherwise draw the mask once and keep it for backward."""
    if not _draws_in_blocks(x):
        return x * dropout_mask(list(x.shape), x.device, dropout, seed)
    return drop_(x.clone(), dropout, seed)


@_drop.register_fake
def _(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x)


def _draws_in_blocks(x: Tensor) -> bool:
    """Whether x is masked block by block; not by a compiler, which would unroll it, nor if it is not a plain tensor."""
    return x.is_cpu and type(x) is Tensor and not torch.compiler.is_compiling()


def _times(kept: Tensor, x: Tensor) -> Tensor:
    """x where `kept` is 1, else 0; overwrites `kept` if both have 2 bytes an element."""
    return kept.to(_integer(x)).mul_(x.view(_integer(x))).view(x.dtype)


def _integer(x: Tensor) -> torch.dtype:
    """The integers with as many bytes as x: multiplying them by 0 or 1 is several times as fast as in bfloat16."""
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]


def _blocks(shape: torch.Size, dropout: float, seed: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The mask of a matrix on a CPU, in blocks of rows.

    Yields:
        A range of rows, and their mask as int16, 1 where an element is kept, in memory that the next block overwrites.
    """
    N, width = shape
    U, U2, V, V2 = _tables()
    K, K2 = _keys(-(-N * width // _GROUP), int(seed))
    threshold = torch.tensor([round(rounded(dropout) * _LEVELS) - _LEVELS // 2], dtype=torch.int16, device="cpu")
    blocks = max(1, round(N * width / (_BLOCK * torch.get_num_threads())))
    height = max(1, -(-N // blocks))
    left, right = torch.empty(2, height * width // _GROUP + 2, _GROUP // 2, dtype=torch.int32, device="cpu")
    samples = left.view(torch.int16).view(-1)
    for row in range(0, max(N, 1), height):
        rows = min(height, N - row)
        first, end = row * width, (row + rows) * width  # elements
        start, stop = first // _GROUP, -(-end // _GROUP)  # groups
        hashes = torch.addcmul(U, K[start:stop], V, out=left[: stop - start])
        hashes.mul_(torch.addcmul(U2, K2[start:stop], V2, value=2, out=right[: stop - start]))
        kept = samples[first - start * _GROUP : end - start * _GROUP].ge_(threshold)
        yield slice(row, row + rows), kept.view(rows, width)


@cache
def _tables() -> Tensor:
    """U, U', V and V', of integers for each pair in a group."""
    tables = _random_integers(4 * _GROUP // 2, -1).view(4, -1)  # seeds are not negative
    tables[1:3] |= 1
    return tables


@lru_cache(maxsize=128)  # for backward: they are 8 bytes for 2048 elements, but take a tenth of the time of a mask
def _keys(groups: int, seed: int) -> tuple[Tensor, ...]:
    """K and K' of each group, [groups, 1]."""
    return _random_integers(2 * groups, seed).view(groups, 2, 1).unbind(1)


def _random_integers(n: int, seed: int) -> Tensor:
    """n random integers of 32 bits, n even, by SplitMix64 (Steele et al. 2014), which hashes seed and position."""
    x = np.arange(1, n // 2 + 1, dtype=np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(seed % 2**64)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return torch.from_numpy(x.view(np.int32))
