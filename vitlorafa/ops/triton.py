"""The layer's parts on CUDA: Triton kernels for what would otherwise be extra passes over memory.

Products of full width (x Wᵀ, g W, g W') are left to cuBLAS. All else is small next to them in operations, but reads
or writes whole activations, and costs their bytes. Four of `vitlorafa.ops.kernels` cover it, for V_j [N, w] the wide
slice of an activation, U_j [N, r] its narrow counterpart and M_j [r, w] a factor, j = 1..k in one launch:

| kernel          | algebra                            | functions                                 |
|-----------------|------------------------------------|-------------------------------------------|
| `v_mt`          | U_j = c mask(V_j) M_jᵀ             | `project`; `backward_g` for g_xA alone    |
| `v_plus_u_m`    | V_j += c mask(U_j M_j)             | `add_update`, `add_masked`                |
| `ut_v`          | M_j = c U_jᵀ mask(V_j)             | `grad_A`; `backward_g` for gB alone       |
| `v_mt_and_ut_v` | both products with V_j in one pass | `backward_g`                              |

with M = A and V = x or its gradient for A, k·r wide and stacked as one; M_j = B_jᵀ and V_j = y_j or g_j for B. `fold`
makes W' = W + s B A. Shapes are those of `vitlorafa.ops`, with x [N, d_in], y and g [N, d_out] of any strides, and
`starts` evenly spaced, as slices of a fused qkv are. Factors may have another dtype than activations (float32 ones
beside bf16, say): they are rounded in registers, so that no cast copy is made. Sums are taken in float32, in an order
that shapes alone decide: results repeat bit for bit.

Dropout's mask is never stored. It is drawn in registers from Philox, keyed by the seed and counting by (column // 4,
row), so that every pass over x meets the same mask whatever its tiling.

Nothing is compiled and no device is touched on import, and the module imports without Triton, which its functions
then ask for.
"""

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vitlorafa.errors import AdapterError
from vitlorafa.ops import kernels

Seed = Tensor | int | None
AVAILABLE = kernels.AVAILABLE

# Starting points, UNTUNED: no GPU has measured them yet.
BLOCK_N = 64  # rows of an activation a program holds at a time
BLOCK_N_ONCE = 128  # the same in the one pass over g: the more, the fewer partial sums
BLOCK_W = 64  # its columns; a multiple of 4, for one draw of Philox makes 4 columns of the mask
MAX_BLOCK_R = 64  # columns of a narrow matrix; tl.dot wants at least 16, so smaller ranks are padded
PROGRAMS = 512  # into how many a sum over N is split at most, about four to a multiprocessor
WARPS = 4
STAGES = 2  # of loads ahead of use: more take more shared memory than a smaller GPU has


def fold(
    weight: Tensor, A: Tensor, B: Tensor, scale: float, starts: tuple[int, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """W' = W + s B_j A_j on the rows of each projection j, W elsewhere, formed in float32 and rounded once.

    Moves one read of W and one write of W'. Plain torch moves W again for each of: a float32 copy, k updates of its
    slices (read and write), and the cast.

    Args:
        weight: W, [d_out, d_in], in float32 or less.
        A: [k, r, d_in].
        B: [k, m, r].
        scale: s.
        starts: First output of each projection.
        dtype: What to compute the layer in; W's if None.

    Returns:
        W', [d_out, d_in], contiguous, in `dtype`.
    """
    (d_out, d_in), (k, m, r) = weight.shape, B.shape
    out = torch.empty(d_out, d_in, dtype=dtype or weight.dtype, device=weight.device)
    start, step = _spacing(starts, m)
    _launch(
        kernels.fold,
        (_blocks(d_out, BLOCK_N), _blocks(d_in, BLOCK_W)),
        (out, weight, *weight.stride(), A, *A.stride(), B, *B.stride()),
        (d_out, d_in, m, k, start, step, scale),
        RANK=r,
        BLOCK_N=BLOCK_N,
    )
    return out


def project(x: Tensor, A: Tensor, dropout: float = 0.0, seed: Seed = None) -> Tensor:
    """x̃ A_jᵀ for all projections, with x̃ = mask · x / (1 − p).

    Moves one read of x. Under dropout plain torch moves 3.5 times as much: it reads x, writes x̃ and the mask's bytes,
    and reads x̃; and it keeps both for backward.

    Args:
        x: [N, d_in].
        A: [k, r, d_in].
        dropout: p.
        seed: Seed of the mask, a whole number or a tensor of one on the CPU.

    Returns:
        x A, [N, k·r], in x's dtype.
    """
    N, d_in = x.shape
    M = A.flatten(0, 1)
    xA = x.new_empty(N, len(M))
    _narrow(xA, x, M, (0, *M.stride()), 1, d_in, len(M), (0, 0), 1 / (1 - dropout), dropout, seed)
    return xA


def add_update(y: Tensor, xA: Tensor, B: Tensor, scale: float, starts: tuple[int, ...]) -> Tensor:
    """y_j += s (x A)_j B_jᵀ in place, for all projections at once.

    Moves one read and one write of the adapted slices of y: what k calls of `addmm_` do, in one launch.

    Args:
        y: [N, d_out].
        xA: [N, k·r].
        B: [k, m, r].
        scale: s.
        starts: First output of each projection.

    Returns:
        y.
    """
    k, m, r = B.shape
    _widen(y, xA, B, (B.stride(0), B.stride(2), B.stride(1)), k, m, r, _spacing(starts, m), scale)
    return y


def backward_g(
    g: Tensor, xA: Tensor | None, B: Tensor, scale: float, starts: tuple[int, ...], need_g_xA: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """(s g_j B_j, s g_jᵀ (x A)_j): the gradients of x A and of B, from one pass over the adapted slices of g.

    Plain torch reads each slice twice, in 2k launches. For both gradients at once a block of rows leaves partial sums
    of gB: N / 128 · m · r floats for each projection, written and read. A rank at which these outweigh another read
    of g takes two launches.

    Args:
        g: Gradient of y, [N, d_out].
        xA: What `project` made, [N, k·r]; None if B needs no gradient.
        B: [k, m, r].
        scale: s.
        starts: First output of each projection.
        need_g_xA: Whether to make the gradient of x A.

    Returns:
        The gradient of x A, [N, k·r], in g's dtype, and that of B, [k, m, r], in float32; None what is not needed.
    """
    N, (k, m, r) = len(g), B.shape
    spacing = _spacing(starts, m)
    M_strides = (B.stride(0), B.stride(2), B.stride(1))
    g_xA = g.new_empty(N, k * r) if need_g_xA else None
    gB = None
    if g_xA is not None and xA is not None and 2 * r * 4 < BLOCK_N_ONCE * g.element_size():
        block_r = _block_r(r)
        blocks = _blocks(N, BLOCK_N_ONCE)
        partial_gB = g.new_empty(blocks, k, m, r, dtype=torch.float32)
        _launch(
            kernels.v_mt_and_ut_v,
            (blocks, k * _blocks(r, block_r)),
            (g_xA, xA, *xA.stride(), g, *g.stride(), B, *M_strides, partial_gB),
            (N, m, *spacing, scale),
            RANK=r,
            BLOCK_N=BLOCK_N_ONCE,
            PRECISION=_precision(),
        )
        gB = partial_gB.sum(0)
    else:
        if g_xA is not None:
            _narrow(g_xA, g, B, M_strides, k, m, r, spacing, scale)
        if xA is not None:
            gB = _contract(xA, g, k, m, r, spacing, scale).transpose(1, 2)
    return g_xA, gB


def grad_A(g_xA: Tensor, x: Tensor, dropout: float = 0.0, seed: Seed = None) -> Tensor:
    """g_xAᵀ x̃, the gradient of A, with x̃ = mask · x / (1 − p) of the same mask as in `project`.

    Moves one read of x. Under dropout plain torch does no better, but for an x̃ kept since the forward pass.

    Args:
        g_xA: Gradient of x A, s included, [N, k·r].
        x: [N, d_in].
        dropout: p.
        seed: Seed of the mask.

    Returns:
        The stacked gradients, [k·r, d_in], in float32.
    """
    kr, d_in = g_xA.shape[1], x.shape[1]
    return _contract(g_xA, x, 1, d_in, kr, (0, 0), 1 / (1 - dropout), dropout, seed)[0]


def add_masked(gx: Tensor, g_xA: Tensor, A: Tensor, dropout: float, seed: Seed) -> Tensor:
    """gx += mask · (g_xA A) / (1 − p) in place: the adapter's share of the gradient of x.

    Moves one read and one write of gx. Plain torch moves more than three times as much: it writes the product, reads
    and writes it to mask it, then reads both to write the sum.

    Args:
        gx: Gradient of x, [N, d_in].
        g_xA: Gradient of x A, s included, [N, k·r].
        A: [k, r, d_in].
        dropout: p.
        seed: Seed of the mask.

    Returns:
        gx.
    """
    M = A.flatten(0, 1)
    kr, d_in = M.shape
    _widen(gx, g_xA, M, (0, *M.stride()), 1, d_in, kr, (0, 0), 1 / (1 - dropout), dropout, seed)
    return gx


def dropout_mask(shape: torch.Size, device: torch.device, dropout: float, seed: Seed) -> Tensor:
    """The mask that the other functions draw in registers, for tests and to compare with the definition.

    Args:
        shape: Shape of the adapter's input, [..., d_in].
        device: Where to make it. Every device makes the same.
        dropout: p, met to 2⁻³².
        seed: Seed of the mask.

    Returns:
        A boolean tensor, True where an element is kept.
    """
    out = torch.empty(shape, dtype=torch.uint8, device=device)
    width = out.shape[-1]
    N = out.numel() // max(width, 1)
    grid = (_blocks(N, BLOCK_N), _blocks(width, BLOCK_W))
    _launch(kernels.mask, grid, (out,), (N, width, int(seed or 0)), DROP=_threshold(dropout), BLOCK_N=BLOCK_N)
    return out.view(torch.bool)


def _narrow(
    U: Tensor,
    V: Tensor,
    M: Tensor,
    M_strides: tuple[int, ...],
    k: int,
    width: int,
    rank: int,
    spacing: tuple[int, int],
    scale: float,
    dropout: float = 0.0,
    seed: Seed = None,
) -> None:
    """U_j = scale mask(V_j) M_jᵀ, with the strides of M in the order j, rank, width."""
    N = len(V)
    _launch(
        kernels.v_mt,
        (_blocks(N, BLOCK_N), k * _blocks(rank, _block_r(rank))),
        (U, V, *V.stride(), M, *M_strides),
        (N, width, *spacing, scale, int(seed or 0)),
        RANK=rank,
        DROP=_threshold(dropout),
        BLOCK_N=BLOCK_N,
        PRECISION=_precision(),
    )


def _widen(
    V: Tensor,
    U: Tensor,
    M: Tensor,
    M_strides: tuple[int, ...],
    k: int,
    width: int,
    rank: int,
    spacing: tuple[int, int],
    scale: float,
    dropout: float = 0.0,
    seed: Seed = None,
) -> None:
    """V_j += scale mask(U_j M_j), with the strides of M in the order j, rank, width."""
    N = len(V)
    _launch(
        kernels.v_plus_u_m,
        (_blocks(N, BLOCK_N), _blocks(width, BLOCK_W), k),
        (V, *V.stride(), U, *U.stride(), M, *M_strides),
        (N, width, *spacing, scale, int(seed or 0)),
        RANK=rank,
        DROP=_threshold(dropout),
        BLOCK_N=BLOCK_N,
        PRECISION=_precision(),
    )


def _contract(
    U: Tensor,
    V: Tensor,
    k: int,
    width: int,
    rank: int,
    spacing: tuple[int, int],
    scale: float,
    dropout: float = 0.0,
    seed: Seed = None,
) -> Tensor:
    """M_j = scale U_jᵀ mask(V_j), [k, rank, width] in float32: sums over shares of the rows, then their sum."""
    N = len(V)
    tiles = _blocks(width, BLOCK_W) * k * _blocks(rank, _block_r(rank))
    share = _blocks(_blocks(N, BLOCK_N), max(PROGRAMS // tiles, 1)) * BLOCK_N  # rows of one program
    shares = _blocks(N, share) if N else 0
    M = V.new_empty(shares, k, rank, width, dtype=torch.float32)
    _launch(
        kernels.ut_v,
        (tiles, shares),
        (M, U, *U.stride(), V, *V.stride()),
        (N, share, width, *spacing, scale, int(seed or 0), k),
        RANK=rank,
        DROP=_threshold(dropout),
        BLOCK_N=BLOCK_N,
        PRECISION=_precision(),
    )
    return M[0] if shares == 1 else M.sum(0)


def _launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Any, ...], scalars: tuple[Any, ...], **constants: Any
) -> None:
    """Runs a kernel on the device of its first tensor, unless there is nothing to do."""
    if not AVAILABLE:
        raise ImportError("vitlorafa's CUDA kernels need Triton: pip install triton")
    for t in tensors:
        if isinstance(t, Tensor) and t.dtype == torch.float64:
            raise AdapterError("Triton kernels sum in float32: take the eager ones for float64")
    if 0 in grid:
        return
    constants["BLOCK_W"] = BLOCK_W
    if "RANK" in constants:
        constants["BLOCK_R"] = _block_r(constants["RANK"])
        # The interpreter multiplies the bits of bf16 as if they were integers: widen what it loads.
        constants["WIDEN"] = kernels.is_interpreted(kernel)
    device = tensors[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*tensors, *scalars, **constants, num_warps=WARPS, num_stages=STAGES)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _block_r(rank: int) -> int:
    """The power of two from 16 to MAX_BLOCK_R that holds a rank, or a part of it."""
    return min(max(1 << (rank - 1).bit_length(), 16), MAX_BLOCK_R)


def _spacing(starts: tuple[int, ...], m: int) -> tuple[int, int]:
    """The first start and the distance between starts."""
    distances = {after - before for before, after in pairwise(starts)} or {m}
    if len(distances) > 1:
        raise AdapterError(f"Triton kernels want evenly spaced projections, not {starts}")
    return starts[0], distances.pop()


def _threshold(dropout: float) -> int:
    """The 32 random bits of an element at which it starts to be kept; 0 for no dropout."""
    return min(round(dropout * 2**32), 2**32 - 1)


def _precision() -> str:
    """How float32 products are taken: as torch takes its own on CUDA."""
    try:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    except RuntimeError:  # newer torch refuses the old name where a program has used the new one
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
