"""The layer's steps on CUDA: Triton kernels for steps that would otherwise need extra passes over memory.

cuBLAS computes the full-width matmuls (x Wᵀ, g W, g W'). All other steps are small in operations, but they read or
write whole activations, so their cost is the bytes they move. Four kernels of `vitlorafa.ops.kernels` compute them. V_j
[N, w] is the wide slice of an activation, U_j [N, r] its narrow counterpart and M_j [r, w] a factor, for j = 1..k in
one launch:

| kernel          | algebra                            | functions                                 |
|-----------------|------------------------------------|-------------------------------------------|
| `v_mt`          | U_j = c mask(V_j) M_jᵀ             | `project`; `backward_g` for g_xA alone    |
| `v_plus_u_m`    | V_j += c mask(U_j M_j)             | `add_update`, `add_masked`                |
| `ut_v`          | M_j = c U_jᵀ mask(V_j)             | `grad_A`; `backward_g` for gB alone       |
| `v_mt_and_ut_v` | both matmuls with V_j in one pass  | `backward_g`                              |

For A, M = A (stacked to k·r rows) and V is x or its gradient; for B, M_j = B_jᵀ and V_j is y_j or g_j. `fold` computes
W' = W + s B A. Shapes are those of `vitlorafa.ops`: x [N, d_in], y and g [N, d_out] with any strides, and evenly spaced
`starts`, like the slices of a fused qkv. Factors may have another dtype than activations, such as float32 factors with
bf16 activations; they are rounded in registers, without a cast copy. Sums are accumulated in float32, in an order that
depends on shapes only, so results are bit-identical from run to run on one device.

The dropout mask is never stored. It is drawn in registers by Philox, with the seed as key and (column // 4, row) as
counter, so each pass over x gets the same mask with any tiling. It is another mask than that of plain PyTorch.

Importing the module compiles nothing and uses no device. It can be imported without Triton; its functions then raise an
error.
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

# Initial values, NOT TUNED: they have not been benchmarked on a GPU.
BLOCK_N = 64  # rows of an activation in one tile
BLOCK_N_ONCE = 128  # the same in the single pass over g: more rows mean fewer partial sums
BLOCK_W = 64  # columns of a tile; a multiple of 4, because one draw of Philox gives 4 columns of the mask
MAX_BLOCK_R = 64  # columns of a narrow matrix; tl.dot needs at least 16, so smaller ranks are padded
PROGRAMS = 512  # largest number of programs that share a sum over N, about four per multiprocessor
WARPS = 4
STAGES = 2  # stages of prefetched loads; more need more shared memory than small GPUs have


def fold(
    weight: Tensor, A: Tensor, B: Tensor, scale: float, starts: tuple[int, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """W' = W + s B_j A_j on the rows of each projection j, W elsewhere, formed in float32 and rounded once.

    Memory traffic: one read of W and one write of W'. Plain PyTorch also moves W for a float32 copy, for k updates of
    its slices (read and write) and for the cast.

    Args:
        weight: Pretrained weight W, [d_out, d_in], in float32 or lower precision.
        A: Factors A, [k, r, d_in].
        B: Factors B, [k, m, r].
        scale: Scaling s.
        starts: First output of each projection.
        dtype: Dtype of the result; if None, that of W.

    Returns:
        The contiguous matrix W', [d_out, d_in].
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

    Memory traffic: one read of x. With dropout, plain PyTorch moves 3.5 times as much: it reads x, writes x̃ and the
    mask, and reads x̃. It also keeps both for backward.

    Args:
        x: Input, [N, d_in].
        A: Factors A, [k, r, d_in].
        dropout: Dropout probability p.
        seed: Seed of the mask, an integer or an integer tensor on the CPU.

    Returns:
        x̃ Aᵀ, [N, k·r], in the dtype of x.
    """
    N, d_in = x.shape
    M = A.flatten(0, 1)
    xA = x.new_empty(N, len(M))
    _narrow(xA, x, M, (0, *M.stride()), 1, d_in, len(M), (0, 0), 1 / (1 - dropout), dropout, seed)
    return xA


def add_update(y: Tensor, xA: Tensor, B: Tensor, scale: float, starts: tuple[int, ...]) -> Tensor:
    """y_j += s (x A)_j B_jᵀ in place, for all projections at once.

    Memory traffic: one read and one write of the adapted slices of y, like k calls of `addmm_`, but in one launch.

    Args:
        y: Output to update, [N, d_out].
        xA: Result of `project`, [N, k·r].
        B: Factors B, [k, m, r].
        scale: Scaling s.
        starts: First output of each projection.

    Returns:
        The same tensor y.
    """
    k, m, r = B.shape
    _widen(y, xA, B, (B.stride(0), B.stride(2), B.stride(1)), k, m, r, _spacing(starts, m), scale)
    return y


def backward_g(
    g: Tensor, xA: Tensor | None, B: Tensor, scale: float, starts: tuple[int, ...], need_g_xA: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """(s g_j B_j, s g_jᵀ (x A)_j): the gradients of x A and of B, from one pass over the adapted slices of g.

    Plain PyTorch reads each slice twice, in 2k launches. When both gradients are computed in one pass, each block of
    rows writes partial sums of gB, which are read again: N / 128 · m · r floats for each projection. At ranks where
    this costs more than a second read of g, two launches are used.

    Args:
        g: Gradient of y, [N, d_out].
        xA: Result of `project`, [N, k·r]; None if B needs no gradient.
        B: Factors B, [k, m, r].
        scale: Scaling s.
        starts: First output of each projection.
        need_g_xA: Whether to compute the gradient of x A.

    Returns:
        The gradient of x A, [N, k·r], in the dtype of g, and that of B, [k, m, r], in float32; None for a gradient that
        is not needed.
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

    Memory traffic: one read of x. With dropout, plain PyTorch needs as much, but has to keep x̃ since the forward pass.

    Args:
        g_xA: Gradient of x A, with s, [N, k·r].
        x: Input, [N, d_in].
        dropout: Dropout probability p.
        seed: Seed of the mask.

    Returns:
        The stacked gradients, [k·r, d_in], in float32.
    """
    kr, d_in = g_xA.shape[1], x.shape[1]
    return _contract(g_xA, x, 1, d_in, kr, (0, 0), 1 / (1 - dropout), dropout, seed)[0]


def add_masked(gx: Tensor, g_xA: Tensor, A: Tensor, dropout: float, seed: Seed) -> Tensor:
    """gx += mask · (g_xA A) / (1 − p) in place: the part of x's gradient that comes from the adapter.

    Memory traffic: one read and one write of gx. Plain PyTorch moves more than three times as much: it writes the
    matmul's result, reads and writes it to apply the mask, then reads both to write the sum.

    Args:
        gx: Gradient of x to update, [N, d_in].
        g_xA: Gradient of x A, with s, [N, k·r].
        A: Factors A, [k, r, d_in].
        dropout: Dropout probability p.
        seed: Seed of the mask.

    Returns:
        The same tensor gx.
    """
    M = A.flatten(0, 1)
    kr, d_in = M.shape
    _widen(gx, g_xA, M, (0, *M.stride()), 1, d_in, kr, (0, 0), 1 / (1 - dropout), dropout, seed)
    return gx


def grad_x(g: Tensor, weight: Tensor, g_xA: Tensor, A: Tensor, dropout: float, seed: Seed) -> Tensor:
    """The gradient of x with dropout: g W, then `add_masked`.

    Args:
        g: Gradient of y, [N, d_out].
        weight: Pretrained weight W, [d_out, d_in].
        g_xA: Gradient of x A, with s, [N, k·r].
        A: Factors A, [k, r, d_in].
        dropout: Dropout probability p.
        seed: Seed of the mask.

    Returns:
        The gradient of x, [N, d_in].
    """
    return add_masked(g @ weight.to(g.dtype), g_xA, A, dropout, seed)


def dropout_mask(shape: torch.Size, device: torch.device, dropout: float, seed: Seed) -> Tensor:
    """The mask that the other functions draw in registers, for comparison with the definition in tests.

    Args:
        shape: Shape of the adapter's input, [..., d_in].
        device: Device of the result; the mask is the same on all devices.
        dropout: Dropout probability p, exact to 2⁻³².
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
    """M_j = scale U_jᵀ mask(V_j), [k, rank, width] in float32: sums over shares of the rows, then their total."""
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
            raise AdapterError("Triton kernels accumulate in float32: use_backend('eager') for float64")
    if 0 in grid:
        return
    constants["BLOCK_W"] = BLOCK_W
    if "RANK" in constants:
        constants["BLOCK_R"] = _block_r(constants["RANK"])
        # The interpreter multiplies the bits of bf16 as integers, so loaded values are widened first.
        constants["WIDEN"] = kernels.is_interpreted(kernel)
    device = tensors[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*tensors, *scalars, **constants, num_warps=WARPS, num_stages=STAGES)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _block_r(rank: int) -> int:
    """The power of two from 16 to MAX_BLOCK_R that holds a rank or a part of it."""
    return min(max(1 << (rank - 1).bit_length(), 16), MAX_BLOCK_R)


def _spacing(starts: tuple[int, ...], m: int) -> tuple[int, int]:
    """The first start and the distance between starts."""
    distances = {after - before for before, after in pairwise(starts)} or {m}
    if len(distances) > 1:
        raise AdapterError(f"Triton kernels need evenly spaced projections, not {starts}: use_backend('eager')")
    return starts[0], distances.pop()


def _threshold(dropout: float) -> int:
    """The smallest 32-bit random number with which an element is kept; 0 without dropout."""
    return min(round(dropout * 2**32), 2**32 - 1)


def _precision() -> str:
    """The precision of float32 matmuls: the one that torch uses on CUDA."""
    try:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    except RuntimeError:  # newer versions of torch refuse the old name after the new one was used
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
