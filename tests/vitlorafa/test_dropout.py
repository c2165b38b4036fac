"""The mask of adapter dropout on a CPU: which bits, and how random."""

import itertools

import numpy as np
import pytest
import torch

from vitlorafa.ops import dropout, lora_linear
from vitlorafa.ops.dropout import drop_, dropout_mask, dropped_blocks, rounded

pytestmark = pytest.mark.numbers

CPU = torch.device("cpu")
SEEDS = [0, 1, 2, 2**32, 2**40 + 5, 2**63 - 2]
GROUP = 2048


def mask(shape, p, seed):
    return dropout_mask(list(shape), CPU, p, torch.tensor(seed, device=CPU))


def standardised(shape, p, seed):
    """The mask with mean 0 and variance 1."""
    kept = 1 - rounded(p)
    return (mask(shape, p, seed).double() - kept) / (kept * (1 - kept)) ** 0.5


def mix(x):
    """SplitMix64's finaliser, in Python's integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def integers(n, seed):
    numbers = (mix((seed + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(1, n // 2 + 1))
    return [half for number in numbers for half in (number % 2**32, number >> 32)]


def sample(position, seed, tables=integers(4096, -1)):  # noqa: B008  (computed once)
    """The signed sample of 16 bits of an element, as the module's docstring defines it."""
    group, within = divmod(position, GROUP)
    pair, half = divmod(within, 2)
    U, U2, V, V2 = (tables[pair + i * GROUP // 2] for i in range(4))
    K, K2 = integers(2 * group + 2, seed)[-2:]
    pair_hash = (U + K * (V | 1)) * ((U2 | 1) + 2 * K2 * V2) % 2**32
    return (pair_hash >> 16 * half) % 2**16


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_is_the_documented_hash(seed):
    p, shape = 0.3, (3, 1001)
    flat = mask(shape, p, seed).flatten()
    for position in (0, 1, 2, 77, 1000, 1001, 2047, 2048, 2049, 3002):
        signed = (sample(position, seed) + 2**15) % 2**16  # order of signed integers
        assert flat[position] == (signed >= round(p * 2**16))


def test_some_bits():
    bits = [np.packbits(mask((2, 32), 0.5, seed).numpy()).tobytes().hex() for seed in (0, 1, 2**32)]
    assert bits == ["2d5ea35b0868160e", "a19b8f71b7aab23b", "e1ef11395df943e7"]


@pytest.mark.parametrize("shape", [(700, 63), (1, 5000), (5000, 1), (3, 4096), (33, 2048), (0, 7), (7,), (2, 5, 9)])
def test_mask_depends_on_neither_blocks_nor_threads_nor_shape(shape, monkeypatch):
    whole = mask(shape, 0.3, 5)
    assert whole.shape == shape
    assert torch.equal(whole.flatten(), mask((whole.numel(),), 0.3, 5))
    threads = torch.get_num_threads()
    try:
        for block, count in ((1, 1), (1000, 1), (2**13, 2)):
            monkeypatch.setattr(dropout, "_BLOCK", block)
            torch.set_num_threads(count)
            assert torch.equal(mask(shape, 0.3, 5), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("block", [2**19, 700])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_drops_by_the_mask_in_every_precision(dtype, layout, block, monkeypatch):
    monkeypatch.setattr(dropout, "_BLOCK", block)
    x = torch.randn(101, 37).to(dtype)
    if layout == "transposed":
        x = x.T.contiguous().T
    elif layout == "strided":
        x = torch.stack((x, x), -1)[..., 0]
    seed, expected = torch.tensor(3), torch.where(mask(x.shape, 0.3, 3), x, 0)
    blocks = [(rows, part.clone()) for rows, part in dropped_blocks(x, 0.3, seed)]
    assert torch.equal(torch.cat([part for _, part in blocks]), expected)
    assert torch.equal(torch.cat([x[rows] for rows, _ in blocks]), x)
    assert (len(blocks) > 1) == (block == 700)
    assert torch.equal(torch.ops.vitlorafa.drop(x, 0.3, seed), expected)
    out = drop_(x, 0.3, seed)
    assert out is x and torch.equal(x, expected)


def test_first_mask_may_be_drawn_in_inference_mode_and_with_another_default_device():
    dropout._tables.cache_clear()
    dropout._keys.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        first = mask((50, 60), 0.3, 8)
    x = torch.randn(50, 60, requires_grad=True)
    A, B = torch.randn(1, 2, 60), torch.randn(1, 40, 2, requires_grad=True)
    lora_linear(x, torch.zeros(40, 60), None, A, B, 1, dropout=0.3, seed=8).sum().backward()
    assert torch.equal(x.grad != 0, first)


def test_a_dropped_infinity_is_zero():
    x = torch.full((2, 50), torch.inf)
    assert set(drop_(x, 0.5, torch.tensor(1)).flatten().tolist()) == {0.0, torch.inf}


def test_probabilities():
    assert rounded(0.25) == 0.25 and rounded(0) == 0 and rounded(1) == 1 - 2**-16
    assert abs(rounded(0.1) - 0.1) <= 2**-17 and rounded(rounded(0.1)) == rounded(0.1)
    assert mask((50, 60), 0, 1).all()
    assert mask((400, 600), 1, 1).sum() < 30


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", SEEDS)
def test_share_of_kept_elements(p, seed):
    values = standardised((2**18,), p, seed)
    for part in (values, values[::2], values[1::2], values[:GROUP]):
        assert abs(part.sum()) < 4.5 * len(part) ** 0.5


@pytest.mark.parametrize("width", [64, 192, 384, 1023])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rows_and_columns_are_independent(p, width):
    values = standardised((1024, width), p, 7)
    bound = 4.5 * values.numel() ** 0.5
    for rows, columns in [(0, 1), (0, 2), (0, 5), (1, 0), (2, 0), (1, 1), (3, 1), (32, 0), (256, 0)]:
        assert abs((values[rows:, columns:] * values[: 1024 - rows, : width - columns]).sum()) < bound
    for axis in (0, 1):  # as many kept in each as chance has it: a chi-square test
        n = values.shape[1 - axis]
        chi_square = values.sum(axis).square().sum() / values.shape[axis]
        assert abs(chi_square - n) < 4.5 * (2 * n) ** 0.5


@pytest.mark.parametrize("lag", [GROUP, 2 * GROUP, 5 * GROUP, GROUP + 1])
def test_groups_with_the_same_tables_are_independent(lag):
    values = standardised((2**19,), 0.5, 11)
    pairs = values[lag:] * values[:-lag]
    squares = pairs[1:] * pairs[:-1]  # four elements: two neighbours in two groups
    for products in (pairs, squares):
        assert abs(products.sum()) < 4.5 * len(products) ** 0.5


def test_masks_of_seeds_are_independent():
    values = {seed: standardised((2**17,), 0.1, seed) for seed in [*SEEDS, 3, 4, 2**32 + 1]}
    for one, other in itertools.combinations(values.values(), 2):
        for shift in (0, 1, GROUP):
            assert abs((one[shift:] * other[: len(other) - shift]).sum()) < 4.5 * (2**17 - shift) ** 0.5


@pytest.mark.parametrize("step", [1, 2, GROUP])
def test_patterns_of_eight_elements_are_equally_frequent(step):
    bits = mask((2**19,), 0.5, 13).view(-1, 8, step).movedim(1, 2).reshape(-1, 8)
    counts = torch.bincount((bits * 2 ** torch.arange(8)).sum(1), minlength=256)
    expected = len(bits) / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < 4.5 * (2 * 255) ** 0.5


def test_no_row_repeats():
    rows = mask((2**14, 128), 0.5, 17)
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_each_element_is_kept_by_as_many_seeds():
    counts = sum(standardised((4096,), 0.1, seed) for seed in range(500))
    assert abs(counts.square().sum() / 500 - 4096) < 4.5 * (2 * 4096) ** 0.5
    assert counts.abs().max() < 6 * 500**0.5
