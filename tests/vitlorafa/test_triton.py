"""The CUDA kernels: under Triton's interpreter on a CPU, and the same tests on a GPU where there is one."""

import importlib.util
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from messages import naming

from vitlorafa import AdapterError, ops
from vitlorafa.ops import reference

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

import vitlorafa.ops.triton as compiled  # noqa: E402


def load_copy(name, **environment):
    """A second copy of the module and of its kernels, which `environment` is set for while they load.

    TRITON_INTERPRET is read when a kernel is decorated. A copy is interpreted whether or not something else has
    imported Triton before (torchvision does), and leaves nothing set behind.
    """
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        patch.setattr(ops, "kernels", _loaded(f"{name}_kernels", compiled.kernels.__file__))
        return _loaded(name, compiled.__file__)


def _loaded(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


interpreted = load_copy("vitlorafa.ops.triton_interpreted", TRITON_INTERPRET="1")


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request):
    """The module and the device to run it on."""
    return (interpreted, torch.device("cpu")) if request.param == "interpreter" else (compiled, torch.device("cuda"))


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STARTS = [(5,), (0, 42), (3, 24, 45)]  # slices of 21 outputs out of 70
SEED = 2**40 + 5


def strided(t, layout):
    """The same matrix, laid out otherwise in memory."""
    if layout == "every other":
        return torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0]
    if layout == "padded rows":
        return torch.cat((t, torch.full_like(t, torch.nan)), 1)[:, : t.shape[1]]
    if layout == "transposed":
        return t.T.contiguous().T
    return t


def error(actual, exact):
    return (actual.double() - exact).square().mean().sqrt()


def check(ours, naive, exact, dtype=None):
    """At most twice the error of plain torch in the same precision, or of rounding the exact result to it."""
    dtype = dtype or naive.dtype
    assert ours.shape == exact.shape and ours.dtype == dtype
    assert error(ours, exact) <= 2 * max(error(naive, exact), error(exact.to(naive.dtype), exact))


def tensors(device, dtype, starts=(3, 24, 45), N=70, d_in=75, m=21, d_out=70, r=3, layout="contiguous"):
    """x, W, A, B, g; the factors in float32, as under autocast."""
    k = len(starts)
    x, g = (torch.randn(N, width, device=device).to(dtype) for width in (d_in, d_out))
    weight = torch.randn(d_out, d_in, device=device) / d_in**0.5
    A = torch.randn(k, r, d_in, device=device) / d_in**0.5
    B = torch.randn(k, m, r, device=device) / r**0.5
    return strided(x, layout), weight, A, B, strided(g, layout)


def slices(t, starts, m=21):
    return [t[:, start : start + m] for start in starts]


LAYOUTS = ["contiguous", "every other", "padded rows", "transposed"]
CASES = [(torch.float32, STARTS[2], layout) for layout in LAYOUTS] + [
    (dtype, starts, "contiguous") for dtype in DTYPES[1:] for starts in STARTS
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", DTYPES[::2])
@pytest.mark.parametrize("starts", STARTS)
def test_fold(kernels, dtype, frozen, starts):
    ops, device = kernels
    _, weight, A, B, _ = tensors(device, dtype, starts)
    weight = weight.to(frozen)
    folded = ops.fold(weight, A, B, 0.7, starts, dtype)
    exact, naive = weight.double(), weight.to(dtype, copy=True)
    adapted = torch.zeros(len(weight), dtype=torch.bool, device=device)
    for start, A_j, B_j in zip(starts, A, B, strict=True):
        exact[start : start + 21] += 0.7 * B_j.double() @ A_j.double()
        naive[start : start + 21] += 0.7 * B_j.to(dtype) @ A_j.to(dtype)
        adapted[start : start + 21] = True
    check(folded, naive, exact)
    assert torch.equal(folded[~adapted], weight[~adapted].to(dtype))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "starts", "layout"), CASES)
def test_products_with_x(kernels, dtype, starts, layout, dropout):
    ops, device = kernels
    x, _, A, _, _ = tensors(device, dtype, starts, layout=layout)
    mask = ops.dropout_mask(x.shape, device, dropout, SEED)
    flat, kept = A.flatten(0, 1), x.double() * mask / (1 - dropout)
    xA = ops.project(x, A, dropout, SEED)
    check(xA, (x * mask / (1 - dropout)) @ flat.to(dtype).T, kept @ flat.double().T)

    gA = ops.grad_A(xA, x, dropout, SEED)
    check(gA, xA.T @ (x * mask / (1 - dropout)), xA.double().T @ kept, torch.float32)

    start = torch.randn_like(x)
    gx = strided(start.clone(), layout)
    assert ops.add_masked(gx, xA, A, dropout, SEED) is gx
    exact = start.double() + mask * (xA.double() @ flat.double()) / (1 - dropout)
    check(gx, start + mask * (xA @ flat.to(dtype)) / (1 - dropout), exact)


@pytest.mark.parametrize(("dtype", "starts", "layout"), CASES)
def test_products_with_y(kernels, dtype, starts, layout):
    ops, device = kernels
    _, _, _, B, g = tensors(device, dtype, starts, layout=layout)
    xA = torch.randn(len(g), len(starts) * 3, device=device).to(dtype)
    low = B.to(dtype)

    y, naive, exact = strided(g.clone(memory_format=torch.contiguous_format), layout), g.clone(), g.double()
    for j, start in enumerate(starts):
        naive[:, start : start + 21] += 0.7 * xA[:, 3 * j : 3 * j + 3] @ low[j].T
        exact[:, start : start + 21] += 0.7 * xA[:, 3 * j : 3 * j + 3].double() @ B[j].double().T
    assert ops.add_update(y, xA, B, 0.7, starts) is y
    check(y, naive, exact)
    untouched = (exact == g.double()).all(0)
    assert torch.equal(y[:, untouched], g[:, untouched]) and untouched.sum() == 70 - 21 * len(starts)

    parts = list(zip(slices(g, starts), xA.chunk(len(starts), 1), B, low, strict=True))
    naive_g_xA = torch.cat([0.7 * g_j @ low_j for g_j, _, _, low_j in parts], 1)
    exact_g_xA = torch.cat([0.7 * g_j.double() @ B_j.double() for g_j, _, B_j, _ in parts], 1)
    naive_gB = torch.stack([0.7 * g_j.T @ xA_j for g_j, xA_j, _, _ in parts])
    exact_gB = torch.stack([0.7 * g_j.double().T @ xA_j.double() for g_j, xA_j, _, _ in parts])
    for needs_g_xA, needs_gB in [(True, True), (True, False), (False, True), (False, False)]:
        g_xA, gB = ops.backward_g(g, xA if needs_gB else None, B, 0.7, starts, needs_g_xA)
        assert (g_xA is not None, gB is not None) == (needs_g_xA, needs_gB)
        if g_xA is not None:
            check(g_xA, naive_g_xA, exact_g_xA)
        if gB is not None:
            check(gB, naive_gB, exact_gB, torch.float32)


@pytest.mark.parametrize("dropout", [0.0, 0.375])  # which 16 bits represent
@pytest.mark.parametrize(
    ("N", "d_in", "m", "d_out", "r", "starts"),
    [
        (1, 1, 1, 1, 1, (0,)),
        (3, 5, 2, 7, 2, (0, 5)),
        (131, 66, 30, 95, 17, (0, 30, 60)),  # k·r is over a block of ranks
        (65, 33, 80, 80, 70, (0,)),  # r is
        (0, 75, 21, 70, 3, (0, 42)),
    ],
)
@pytest.mark.parametrize("way", ["separate", "folded"])
def test_parts_make_the_layer(kernels, way, N, d_in, m, d_out, r, starts, dropout, monkeypatch):
    """Forward and backward, put together from the functions, against the definition with the same mask."""
    if way == "folded" and dropout:
        pytest.skip("dropout cannot be folded")
    ops, device = kernels
    x, weight, A, B, g = tensors(device, torch.float32, starts, N, d_in, m, d_out, r)
    if way == "folded":
        effective = ops.fold(weight, A, B, 0.7, starts)
        y, gx = x @ effective.T, g @ effective
        xA = ops.project(x, A)
        g_xA, gB = ops.backward_g(g, xA, B, 0.7, starts)
    else:
        xA = ops.project(x, A, dropout, SEED)
        y = ops.add_update(x @ weight.T, xA, B, 0.7, starts)
        g_xA, gB = ops.backward_g(g, xA, B, 0.7, starts)
        gx = ops.grad_x(g, weight, g_xA, A, dropout, SEED)
    gA = ops.grad_A(g_xA, x, dropout, SEED).view(A.shape)

    monkeypatch.setattr(reference, "dropout_mask", ops.dropout_mask)
    leaves = [t.double().requires_grad_() for t in (x, A, B)]
    expected = reference.lora_linear(
        leaves[0], weight.double(), None, leaves[1], leaves[2], 0.7, starts=starts, dropout=dropout, seed=SEED
    )
    grads = torch.autograd.grad(expected, leaves, g.double())
    torch.testing.assert_close([t.double() for t in (y, gx, gA, gB)], [expected, *grads], rtol=1e-4, atol=1e-5)


def philox(seed, row, columns):
    """The first `columns` words of a row of the mask, from the definition of Philox4x32-10."""
    words = []
    for group in range(-(-columns // 4)):
        c = [group, row & 0xFFFFFFFF, row >> 32, 0]
        k = [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            (high0, low0), (high2, low2) = divmod(c[0] * 0xD2511F53, 2**32), divmod(c[2] * 0xCD9E8D57, 2**32)
            c = [high2 ^ c[1] ^ k[0], low2, high0 ^ c[3] ^ k[1], low0]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        words += c
    return np.array(words[:columns])


def test_philox_is_the_published_one():
    # The known answer to a counter and a key of zeros in the authors' test suite.
    assert list(philox(0, 0, 4)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [0, 1, 7, SEED, 2**63 - 1])
def test_mask_is_philox(kernels, seed):
    ops, device = kernels
    mask = ops.dropout_mask(torch.Size((2, 35, 70)), device, 0.3, seed).view(70, 70).cpu().numpy()
    for row in (0, 1, 33, 69):
        assert (mask[row] == (philox(seed, row, 70) >= round(0.3 * 2**32))).all()


def test_mask_does_not_depend_on_tiles(kernels, monkeypatch):
    ops, device = kernels
    whole = ops.dropout_mask(torch.Size((70, 75)), device, 0.5, 3)
    monkeypatch.setattr(ops, "BLOCK_N", 16)
    monkeypatch.setattr(ops, "BLOCK_W", 32)
    assert torch.equal(ops.dropout_mask(torch.Size((70, 75)), device, 0.5, 3), whole)


def test_mask_is_random(kernels):
    ops, device = kernels
    p, shape = 0.3, torch.Size((256, 256))
    mask = ops.dropout_mask(shape, device, p, 1).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 4 * sigma / 256
    for axis in (0, 1):
        assert ((mask.mean(axis) - (1 - p)).abs() < 5 * sigma / 16).all()
    centred = (mask - (1 - p)) / sigma
    others = [ops.dropout_mask(shape, device, p, seed).double() for seed in (0, 2, 2**32 + 1)]
    shifted = [mask.roll(by, axis) for axis in (0, 1) for by in (1, 4, 64)]
    for other in others + shifted:
        assert (centred * (other - (1 - p)) / sigma).mean().abs() < 4 / 256


def test_mask_of_extreme_probabilities(kernels):
    ops, device = kernels
    assert ops.dropout_mask(torch.Size((5, 6)), device, 0.0, 1).all()
    assert not ops.dropout_mask(torch.Size((5, 6)), device, 1.0, 1).any()
    assert ops.dropout_mask(torch.Size((0, 6)), device, 0.5, 1).shape == (0, 6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_repeat_bit_for_bit(kernels, dtype):
    ops, device = kernels
    starts = (0, 42)
    x, weight, A, B, g = tensors(device, dtype, starts, N=200)

    def everything():
        xA = ops.project(x, A, 0.2, 9)
        g_xA, gB = ops.backward_g(g, xA, B, 0.7, starts)
        return (
            *(xA, g_xA, gB, ops.grad_A(g_xA, x, 0.2, 9), ops.fold(weight, A, B, 0.7, starts, dtype)),
            *(ops.add_update(g.clone(), xA, B, 0.7, starts), ops.add_masked(x.clone(), g_xA, A, 0.2, 9)),
        )

    assert all(torch.equal(one, other) for one, other in zip(everything(), everything(), strict=True))


def far(out, ptr, mask, row0, n, stride, seed, BLOCK: tl.constexpr):
    """Reads and writes rows row0 .. row0 + n of matrices whose row 0 lies far before what is in memory."""
    rows = row0 + tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK)
    before = row0.to(tl.int64) * stride
    tile = interpreted.kernels.load(ptr - before, rows, cols, row0 + n, n, stride, 1, True)
    interpreted.kernels.store(out - before, tile, rows, cols, row0 + n, n, stride, 1, True)
    keep = interpreted.kernels.keep_mask(seed, rows.to(tl.int64) * 64, 0, 2**31, BLOCK, BLOCK)
    interpreted.kernels.store(mask - before, keep, rows, cols, row0 + n, n, stride, 1, False)


def test_offsets_pass_32_bits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        kernel = triton.jit(far)
    x = torch.randn(11, 40)
    out, mask = torch.zeros_like(x), torch.zeros(11, 40, dtype=torch.uint8)
    row0 = 2**29 + 3
    kernel[(1,)](out, x, mask, row0, 11, 40, 5, BLOCK=16)
    assert row0 * 40 > 2**33 and row0 * 64 > 2**34
    assert torch.equal(out[:, :11], x[:, :11]) and not out[:, 11:].any()
    for i in range(11):
        assert (mask[i, :11].numpy() == (philox(5, (row0 + i) * 64, 11) >= 2**31)).all()


def test_no_copy_of_the_factors_is_asked_for(kernels):
    """Factors in float32 give what their rounded copies give: exactly on a GPU, which rounds them in registers."""
    ops, device = kernels
    x, _, A, _, _ = tensors(device, torch.bfloat16)
    ours, rounded = (ops.project(x, factor).double() for factor in (A, A.bfloat16()))
    torch.testing.assert_close(ours, rounded, rtol=0.02, atol=0.02)


def test_refusals():
    x, weight, A, B, _ = tensors("cpu", torch.float32)
    with pytest.raises(AdapterError, match=naming("evenly spaced", "use_backend('eager')")):
        interpreted.fold(weight, A, B, 0.7, (0, 21, 45))
    with pytest.raises(AdapterError, match=naming("float64", "use_backend('eager')")):
        interpreted.project(x.double(), A.double())


def test_imports_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    without = load_copy("vitlorafa.ops.triton_missing")
    assert compiled.AVAILABLE and not without.AVAILABLE
    with pytest.raises(ImportError, match="need Triton: pip install triton"):
        without.project(torch.randn(3, 4), torch.randn(1, 2, 4))


def test_float32_products_follow_torch():
    before = torch.get_float32_matmul_precision()
    try:
        for asked, expected in [("highest", "ieee"), ("high", "tf32")]:
            torch.set_float32_matmul_precision(asked)
            assert interpreted._precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


COMPILE = """
    import torch, triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    import vitlorafa.ops.triton as ops

    class Device:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 80, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 0)

    def compile_only(kernel, *args, grid, warmup, **options):
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        assert binary.asm["cubin"] and binary.metadata.shared <= 48 * 1024, binary.metadata
        names.add(kernel.fn.__name__)

    driver.set_active(Device())
    run, triton.JITFunction.run, names = triton.JITFunction.run, compile_only, set()
    x, g, starts = torch.empty(64, 32).bfloat16(), torch.empty(64, 96).bfloat16(), (0, 64)
    weight, A, B = torch.empty(96, 32), torch.empty(2, 8, 32), torch.empty(2, 32, 8)
    ops.fold(weight, A, B, 0.5, starts, x.dtype)
    xA = ops.project(x, A, 0.1, 2**40)
    ops.add_update(g, xA, B, 0.5, starts)
    ops.backward_g(g, xA, B, 0.5, starts)
    ops.grad_A(xA, x, 0.1, 2**40)
    ops.add_masked(x, xA, A, 0.1, 2**40)
    ops.dropout_mask(x.shape, x.device, 0.1, 2**40)
    print(*sorted(names))
"""


@pytest.mark.slow
def test_compiles_for_a_gpu_without_one(tmp_path):
    """The interpreter takes more than the compiler does."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", textwrap.dedent(COMPILE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["fold", "mask", "ut_v", "v_mt", "v_mt_and_ut_v", "v_plus_u_m"]
