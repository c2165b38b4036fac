"""Triton kernels of the adapted layer; `vitlorafa.ops.triton` launches them.

V_j [N, w] is a wide slice of an activation, U_j [N, r] its narrow counterpart and M_j [r, w] a factor, for j = 1..k in
one launch. Sums are accumulated in float32, in an order that depends on shapes only. Without Triton, the kernels are
plain functions that nothing calls.
"""

# mypy: disable-error-code="no-untyped-def"
# (The types of a kernel's parameters come from the call.)

# Without this, the annotations of the kernels would need Triton on import.
from __future__ import annotations

from functools import partial
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU, or a platform without Triton
    triton = None

AVAILABLE = triton is not None

# N (smaller in the last batch) and the seed do not need compilations of their own.
_jit = partial(triton.jit, do_not_specialize=("N", "seed")) if AVAILABLE else (lambda kernel: kernel)


def is_interpreted(kernel: Any) -> bool:
    """Whether a kernel was defined under TRITON_INTERPRET."""
    return not isinstance(kernel, triton.JITFunction)


@_jit
def load(ptr, rows, cols, n_rows, n_cols, s_row, s_col, WIDEN: tl.constexpr):
    """The tile rows × cols of a matrix, zero outside of it. Offsets are 64-bit: activations pass 2³¹ elements."""
    at = ptr + rows[:, None].to(tl.int64) * s_row + cols[None, :].to(tl.int64) * s_col
    tile = tl.load(at, mask=(rows[:, None] < n_rows) & (cols[None, :] < n_cols), other=0.0)
    if WIDEN:
        tile = tile.to(tl.float32)
    return tile


@_jit
def store(ptr, tile, rows, cols, n_rows, n_cols, s_row, s_col, WIDEN: tl.constexpr):
    """The reverse of `load`."""
    if WIDEN and ptr.dtype.element_ty == tl.bfloat16:  # the interpreter's cast truncates, so round to nearest first
        bits = tile.to(tl.uint32, bitcast=True)
        tile = (bits + 0x7FFF + ((bits >> 16) & 1) & 0xFFFF0000).to(tl.float32, bitcast=True)
    at = ptr + rows[:, None].to(tl.int64) * s_row + cols[None, :].to(tl.int64) * s_col
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=(rows[:, None] < n_rows) & (cols[None, :] < n_cols))


@_jit
def keep_mask(seed, rows, w0, DROP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """The mask of rows × (w0 .. w0 + BLOCK_W): Philox4x32-10 (Salmon et al. 2011) at counter (column // 4, row).

    Written here instead of calling tl.philox, so that a saved seed always gives the same mask, and because the
    interpreter cannot run tl.philox after another module has imported Triton to compile.
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
def mask(out, N, width, seed, DROP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """Writes the mask of `keep_mask` to memory."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    w0 = tl.program_id(1) * BLOCK_W
    keep = keep_mask(seed, n, w0, DROP, BLOCK_N, BLOCK_W)
    store(out, keep, n, w0 + tl.arange(0, BLOCK_W), N, width, width, 1, False)


@_jit
def fold(
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
    """W' = W + scale B_j A_j: a tile of W with the projections (usually one) that overlap it."""
    n0 = tl.program_id(0) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    update = tl.full([BLOCK_N, BLOCK_W], 0.0, tl.float32)
    first = tl.maximum(n0 - start, 0) // step
    end = tl.minimum(tl.maximum(n0 + BLOCK_N - 1 - start + step, 0) // step, k)
    for j in range(first, end):
        local = n - start - j * step
        local = tl.where(local < 0, m, local)  # outside B_j, like all rows from m on
        for r0 in range(0, RANK, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            b = load(B + j * sB_j, local, r, m, RANK, sB_n, sB_r, WIDEN).to(tl.float32)
            a = load(A + j * sA_j, r, w, RANK, d_in, sA_r, sA_w, WIDEN).to(tl.float32)
            update = tl.dot(b, a, update, input_precision="ieee")
    tile = load(W, n, w, d_out, d_in, sW_n, sW_w, WIDEN).to(tl.float32)
    store(out, tile + scale * update, n, w, d_out, d_in, d_in, 1, WIDEN)


@_jit
def v_mt(
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
        v = load(V, n, w, N, width, sV_n, sV_w, WIDEN)
        if DROP > 0:
            v = tl.where(keep_mask(seed, n, w0, DROP, BLOCK_N, BLOCK_W), v, 0.0)
        mt = load(M + j * sM_j, w, r, width, RANK, sM_w, sM_r, WIDEN)
        u = tl.dot(v, mt.to(v.dtype), u, input_precision=PRECISION)
    store(U + j * RANK, scale * u, n, r, N, RANK, k * RANK, 1, WIDEN)


@_jit
def v_plus_u_m(
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
        u = load(U + j * RANK * sU_r, n, r, N, RANK, sU_n, sU_r, WIDEN)
        m = load(M + j * sM_j, r, w, RANK, width, sM_r, sM_w, WIDEN)
        update = tl.dot(u, m.to(u.dtype), update, input_precision=PRECISION)
    if DROP > 0:
        update = tl.where(keep_mask(seed, n, w0, DROP, BLOCK_N, BLOCK_W), update, 0.0)
    V += (start + j * step) * sV_w
    v = load(V, n, w, N, width, sV_n, sV_w, WIDEN).to(tl.float32)
    store(V, v + scale * update, n, w, N, width, sV_n, sV_w, WIDEN)


@_jit
def ut_v(
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
    mt = tl.full([BLOCK_W, BLOCK_R], 0.0, tl.float32)  # transposed, because tensor cores need the longer side first
    for n0 in range(0, share, BLOCK_N):
        n = first + n0 + tl.arange(0, BLOCK_N)
        v = load(V, n, w, N, width, sV_n, sV_w, WIDEN)
        if DROP > 0:
            v = tl.where(keep_mask(seed, n, w0, DROP, BLOCK_N, BLOCK_W), v, 0.0)
        u = load(U, n, r, N, RANK, sU_n, sU_r, WIDEN)
        mt = tl.dot(tl.trans(v), u.to(v.dtype), mt, input_precision=PRECISION)
    M += (tl.program_id(1).to(tl.int64) * k + j) * RANK * width
    store(M, scale * mt, w, r, width, RANK, 1, width, WIDEN)


@_jit
def v_mt_and_ut_v(
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
    u = load(U + j * RANK * sU_r, n, r, N, RANK, sU_n, sU_r, WIDEN)
    g = tl.full([BLOCK_N, BLOCK_R], 0.0, tl.float32)
    for w0 in range(0, width, BLOCK_W):
        w = w0 + tl.arange(0, BLOCK_W)
        v = load(V, n, w, N, width, sV_n, sV_w, WIDEN)
        mt = load(M + j * sM_j, w, r, width, RANK, sM_w, sM_r, WIDEN)
        g = tl.dot(v, mt.to(v.dtype), g, input_precision=PRECISION)
        p = tl.dot(tl.trans(v), u.to(v.dtype), input_precision=PRECISION)
        store(P, scale * p, w, r, width, RANK, RANK, 1, WIDEN)
    store(G + j * RANK, scale * g, n, r, N, RANK, k * RANK, 1, WIDEN)
