"""The layer's parts on CUDA: Triton kernels for what would otherwise be extra passes over memory.

Products of full width (x Wᵀ, g W, g W') are left to cuBLAS. All else is small next to them in operations, but reads
or writes whole activations, and costs their bytes. Four kernels cover it, for V_j [N, w] the wide slice of an
activation, U_j [N, r] its narrow counterpart and M_j [r, w] a factor, j = 1..k in one launch:

| kernel           | algebra                            | functions                                 |
|------------------|------------------------------------|-------------------------------------------|
| `_v_mt`          | U_j = c mask(V_j) M_jᵀ             | `project`; `backward_g` for g_xA alone    |
| `_v_plus_u_m`    | V_j += c mask(U_j M_j)             | `add_update`, `add_masked`                |
| `_ut_v`          | M_j = c U_jᵀ mask(V_j)             | `grad_A`; `backward_g` for gB alone       |
| `_v_mt_and_ut_v` | both products with V_j in one pass | `backward_g`                              |

with M = A and V = x or its gradient for A, k·r wide and stacked as one; M_j = B_jᵀ and V_j = y_j or g_j for B. `_fold`
makes W' = W + s B A. Shapes are those of `vitlorafa.ops`, with x [N, d_in], y and g [N, d_out] of any strides, and
`starts` evenly spaced, as slices of a fused qkv are. Factors may have another dtype than activations (float32 ones
beside bf16, say): they are rounded in registers, so that no cast copy is made. Sums are taken in float32, in an order
that shapes alone decide: results repeat bit for bit.

Dropout's mask is never stored. It is drawn in registers from Philox, keyed by the seed and counting by (column // 4,
row), so that every pass over x meets the same mask whatever its tiling.

Nothing is compiled and no device is touched on import, and the module imports without Triton, which its functions
then ask for.
"""

# mypy: disable-error-code="no-untyped-def"
# (Parameters of kernels take their types from the call.)

# Without this, the kernels' annotations would need Triton on import.
from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vitlorafa.errors import AdapterError

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU, or a platform without Triton
    triton = None

Seed = Tensor | int | None
AVAILABLE = triton is not None

# Starting points, UNTUNED: no GPU has measured them yet.
BLOCK_N = 64  # rows of an activation a program holds at a time
BLOCK_N_ONCE = 128  # the same in the one pass over g: the more, the fewer partial sums
BLOCK_W = 64  # its columns; a multiple of 4, for one draw of Philox makes 4 columns of the mask
MAX_BLOCK_R = 64  # columns of a narrow matrix; tl.dot wants at least 16, so smaller ranks are padded
PROGRAMS = 512  # into how many a sum over N is split at most, about four to a multiprocessor
WARPS = 4
STAGES = 2  # of loads ahead of use: more take more shared memory than a smaller GPU has

# Neither N (the last batch is smaller) nor a seed is worth a compilation of its own.
_jit = (lambda kernel: kernel) if triton is None else partial(triton.jit, do_not_specialize=("N", "seed"))


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
        _fold,
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
            _v_mt_and_ut_v,
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
    _launch(_mask, grid, (out,), (N, width, int(seed or 0)), DROP=_threshold(dropout), BLOCK_N=BLOCK_N)
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
        _v_mt,
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
        _v_plus_u_m,
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
        _ut_v,
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
    if triton is None:
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
        constants["WIDEN"] = not isinstance(kernel, triton.JITFunction)
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


@_jit
def _load(ptr, rows, cols, n_rows, n_cols, s_row, s_col, WIDEN: tl.constexpr):
    """The tile rows × cols of a matrix, zero outside of it. Offsets are 64-bit: activations pass 2³¹ elements."""
    at = ptr + rows[:, None].to(tl.int64) * s_row + cols[None, :].to(tl.int64) * s_col
    tile = tl.load(at, mask=(rows[:, None] < n_rows) & (cols[None, :] < n_cols), other=0.0)
    if WIDEN:
        tile = tile.to(tl.float32)
    return tile


@_jit
def _store(ptr, tile, rows, cols, n_rows, n_cols, s_row, s_col, WIDEN: tl.constexpr):
    """The reverse of `_load`."""
    if WIDEN and ptr.dtype.element_ty == tl.bfloat16:  # the interpreter's cast cuts off: round to nearest before it
        bits = tile.to(tl.uint32, bitcast=True)
        tile = (bits + 0x7FFF + ((bits >> 16) & 1) & 0xFFFF0000).to(tl.float32, bitcast=True)
    at = ptr + rows[:, None].to(tl.int64) * s_row + cols[None, :].to(tl.int64) * s_col
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=(rows[:, None] < n_rows) & (cols[None, :] < n_cols))


@_jit
def _keep(seed, rows, w0, DROP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """The mask of rows × (w0 .. w0 + BLOCK_W): Philox4x32-10 (Salmon et al. 2011) at counter (column // 4, row).

    Written out, for tl.philox is not to change under a saved seed, and is out of the interpreter's reach once
    anything else has imported Triton to compile.
    """
    group = w0 // 4 + tl.arange(0, BLOCK_W // 4)
    zeros = tl.full([BLOCK_N, BLOCK_W // 4], 0, tl.uint32)
    c0 = zeros + group[None, :].to(tl.uint32)
    c1 = zeros + rows[:, None].to(tl.uint32)
    c2 = zeros + (rows[:, None] >> 32).to(tl.uint32)
    c3 = zeros
    key = tl.full([1, 1], seed, tl.uint64)
    k0 = key & 0xFFFFFFFF
    k1 = key >> 32
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p2 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p2 >> 32).to(tl.uint32) ^ c1 ^ k0.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1.to(tl.uint32)
        c1 = p2.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    # Interleaved: column 4 i + l is the l-th word drawn for group i.
    bits = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return tl.reshape(bits >= DROP, [BLOCK_N, BLOCK_W])


@_jit
def _mask(out, N, width, seed, DROP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    w0 = tl.program_id(1) * BLOCK_W
    keep = _keep(seed, n, w0, DROP, BLOCK_N, BLOCK_W)
    _store(out, keep, n, w0 + tl.arange(0, BLOCK_W), N, width, width, 1, False)


@_jit
def _fold(
    out,
    W,
    sW_n,
    sW_w,
    A,
    sA_j,
    sA_r,
    sA_w,
    B,
    sB_j,
    sB_n,
    sB_r,
    d_out,
    d_in,
    m,
    k,
    start,
    step,
    scale,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """W' = W + scale B_j A_j: a tile of W with each of the projections (mostly one) that reach into it."""
    n0 = tl.program_id(0) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    update = tl.full([BLOCK_N, BLOCK_W], 0.0, tl.float32)
    first = tl.maximum(n0 - start, 0) // step
    end = tl.minimum(tl.maximum(n0 + BLOCK_N - 1 - start + step, 0) // step, k)
    for j in range(first, end):
        local = n - start - j * step
        local = tl.where(local < 0, m, local)  # outside of B_j, as is all from m on
        for r0 in range(0, RANK, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            b = _load(B + j * sB_j, local, r, m, RANK, sB_n, sB_r, WIDEN).to(tl.float32)
            a = _load(A + j * sA_j, r, w, RANK, d_in, sA_r, sA_w, WIDEN).to(tl.float32)
            update = tl.dot(b, a, update, input_precision="ieee")
    tile = _load(W, n, w, d_out, d_in, sW_n, sW_w, WIDEN).to(tl.float32)
    _store(out, tile + scale * update, n, w, d_out, d_in, d_in, 1, WIDEN)


@_jit
def _v_mt(
    U,
    V,
    sV_n,
    sV_w,
    M,
    sM_j,
    sM_r,
    sM_w,
    N,
    width,
    start,
    step,
    scale,
    seed,
    RANK: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """U_j = scale mask(V_j) M_jᵀ: a block of rows, all of V_j's width; U is contiguous, [N, k·RANK]."""
    blocks_r: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    j = (tl.program_id(1) // blocks_r).to(tl.int64)
    k = tl.num_programs(1) // blocks_r
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    V += (start + j * step) * sV_w
    u = tl.full([BLOCK_N, BLOCK_R], 0.0, tl.float32)
    for w0 in range(0, width, BLOCK_W):
        w = w0 + tl.arange(0, BLOCK_W)
        v = _load(V, n, w, N, width, sV_n, sV_w, WIDEN)
        if DROP > 0:
            v = tl.where(_keep(seed, n, w0, DROP, BLOCK_N, BLOCK_W), v, 0.0)
        mt = _load(M + j * sM_j, w, r, width, RANK, sM_w, sM_r, WIDEN)
        u = tl.dot(v, mt.to(v.dtype), u, input_precision=PRECISION)
    _store(U + j * RANK, scale * u, n, r, N, RANK, k * RANK, 1, WIDEN)


@_jit
def _v_plus_u_m(
    V,
    sV_n,
    sV_w,
    U,
    sU_n,
    sU_r,
    M,
    sM_j,
    sM_r,
    sM_w,
    N,
    width,
    start,
    step,
    scale,
    seed,
    RANK: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """V_j += scale mask(U_j M_j): a tile of V_j."""
    j = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    w0 = tl.program_id(1) * BLOCK_W
    w = w0 + tl.arange(0, BLOCK_W)
    update = tl.full([BLOCK_N, BLOCK_W], 0.0, tl.float32)
    for r0 in range(0, RANK, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        u = _load(U + j * RANK * sU_r, n, r, N, RANK, sU_n, sU_r, WIDEN)
        m = _load(M + j * sM_j, r, w, RANK, width, sM_r, sM_w, WIDEN)
        update = tl.dot(u, m.to(u.dtype), update, input_precision=PRECISION)
    if DROP > 0:
        update = tl.where(_keep(seed, n, w0, DROP, BLOCK_N, BLOCK_W), update, 0.0)
    V += (start + j * step) * sV_w
    v = _load(V, n, w, N, width, sV_n, sV_w, WIDEN).to(tl.float32)
    _store(V, v + scale * update, n, w, N, width, sV_n, sV_w, WIDEN)


@_jit
def _ut_v(
    M,
    U,
    sU_n,
    sU_r,
    V,
    sV_n,
    sV_w,
    N,
    share,
    width,
    start,
    step,
    scale,
    seed,
    k,
    RANK: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """M_j = scale U_jᵀ mask(V_j) over a share of the rows; M is contiguous, [shares, k, RANK, width]."""
    blocks_r: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    j = (tl.program_id(0) // blocks_r % k).to(tl.int64)
    r = tl.program_id(0) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    w0 = tl.program_id(0) // (blocks_r * k) * BLOCK_W
    w = w0 + tl.arange(0, BLOCK_W)
    first = tl.program_id(1).to(tl.int64) * share
    U += j * RANK * sU_r
    V += (start + j * step) * sV_w
    mt = tl.full([BLOCK_W, BLOCK_R], 0.0, tl.float32)  # transposed: tensor cores want the longer side first
    for n0 in range(0, share, BLOCK_N):
        n = first + n0 + tl.arange(0, BLOCK_N)
        v = _load(V, n, w, N, width, sV_n, sV_w, WIDEN)
        if DROP > 0:
            v = tl.where(_keep(seed, n, w0, DROP, BLOCK_N, BLOCK_W), v, 0.0)
        u = _load(U, n, r, N, RANK, sU_n, sU_r, WIDEN)
        mt = tl.dot(tl.trans(v), u.to(v.dtype), mt, input_precision=PRECISION)
    M += (tl.program_id(1).to(tl.int64) * k + j) * RANK * width
    _store(M, scale * mt, w, r, width, RANK, 1, width, WIDEN)


@_jit
def _v_mt_and_ut_v(
    G,
    U,
    sU_n,
    sU_r,
    V,
    sV_n,
    sV_w,
    M,
    sM_j,
    sM_r,
    sM_w,
    P,
    N,
    width,
    start,
    step,
    scale,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G_j = scale V_j M_jᵀ, [N, k·RANK], and P_j = scale V_jᵀ U_j of a block of rows, [blocks, k, width, RANK]."""
    blocks_r: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    j = (tl.program_id(1) // blocks_r).to(tl.int64)
    k = tl.num_programs(1) // blocks_r
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    V += (start + j * step) * sV_w
    P += (tl.program_id(0).to(tl.int64) * k + j) * width * RANK
    u = _load(U + j * RANK * sU_r, n, r, N, RANK, sU_n, sU_r, WIDEN)
    g = tl.full([BLOCK_N, BLOCK_R], 0.0, tl.float32)
    for w0 in range(0, width, BLOCK_W):
        w = w0 + tl.arange(0, BLOCK_W)
        v = _load(V, n, w, N, width, sV_n, sV_w, WIDEN)
        mt = _load(M + j * sM_j, w, r, width, RANK, sM_w, sM_r, WIDEN)
        g = tl.dot(v, mt.to(v.dtype), g, input_precision=PRECISION)
        p = tl.dot(tl.trans(v), u.to(v.dtype), input_precision=PRECISION)
        _store(P, scale * p, w, r, width, RANK, RANK, 1, WIDEN)
    _store(G + j * RANK, scale * g, n, r, N, RANK, k * RANK, 1, WIDEN)
