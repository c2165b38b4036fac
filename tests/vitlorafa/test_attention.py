import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from vitlorafa import AdapterError, tuning, use_ways
from vitlorafa.ops import private, processor
from vitlorafa.ops.attention import attention, attention_by_matmuls

pytestmark = pytest.mark.numbers

ops = importlib.import_module("vitlorafa.ops.attention")
RECOMPUTE = pytest.mark.parametrize("recompute", [False, True])
# B, H, M, N, D
SHAPES = pytest.mark.parametrize("shape", [(2, 3, 5, 5, 4), (1, 1, 1, 7, 3), (3, 2, 4, 9, 5), (2, 1, 3, 1, 1)])


def reference(q, k, v, scale=None):
    """The definition."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return torch.softmax(scale * q @ k.mT, -1) @ v


def naive(q, k, v):
    """As plain torch does it in low precision, and timm without fused attention."""
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v


def heads(B, H, M, N, D, dtype=torch.float64):
    return [torch.randn(B, H, n, D, dtype=dtype).requires_grad_() for n in (M, N, N)]


def from_qkv(B, H, N, D, dtype):
    """q, k and v as timm's attention has them: views of one product."""
    qkv = torch.randn(B, N, 3, H, D).to(dtype).permute(2, 0, 3, 1, 4)
    return [t.detach().requires_grad_() for t in qkv.unbind(0)]


def run(function, tensors, g=None, **kwargs):
    """Output and gradients."""
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
    y = function(*leaves, **kwargs)
    y.backward(torch.ones_like(y) if g is None else g.to(y.dtype))
    return [y.detach(), *(t.grad for t in leaves)]


class Count(TorchDispatchMode):
    """The shapes of what batched products make, and of memory that is asked for."""

    def __init__(self):
        super().__init__()
        self.products, self.asked = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("bmm", "baddbmm", "baddbmm_"):
            self.products.append(tuple(out.shape))
        if func.overloadpacket.__name__ == "new_empty":
            self.asked.append(tuple(out.shape))
        return out


FEW = 8 * 5 * 9 * 4  # bytes of scores: several parts, of which the last is smaller


@pytest.fixture
def by_matmuls():
    use_ways({"attention": "matmuls 1 MiB"})


# The definition


@RECOMPUTE
@SHAPES
def test_gradients_are_those_of_finite_differences(shape, recompute):
    assert gradcheck(lambda *t: attention_by_matmuls(*t, recompute=recompute, scores=FEW), heads(*shape))


@RECOMPUTE
@pytest.mark.parametrize("scale", [None, 0.3, -2.0])
@SHAPES
def test_is_the_definition(shape, scale, recompute):
    tensors = heads(*shape)
    g = torch.randn(tensors[0].shape).double()
    ours = run(attention_by_matmuls, tensors, g, scale=scale, recompute=recompute, scores=FEW)
    for one, expected in zip(ours, run(reference, tensors, g, scale=scale), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(attention(*tensors, scale), F.scaled_dot_product_attention(*tensors, scale=scale))


def test_parts_cover_all_heads_and_change_nothing():
    tensors = heads(3, 5, 4, 6, 3)
    whole = run(attention_by_matmuls, tensors)
    for scores, parts in ((1, 15), (4 * 24 * 8, 4), (7 * 24 * 8, 3)):
        with Count() as count:
            ours = run(attention_by_matmuls, tensors, scores=scores)
        assert len(count.products) == 6 * parts
        assert all(torch.equal(one, other) for one, other in zip(ours, whole, strict=True))


@pytest.mark.parametrize("N", [1, 17, 50, 197])
@pytest.mark.parametrize("D", [64, 15])
def test_bfloat16_is_as_near_to_float64_as_plain_torch(N, D):
    tensors = from_qkv(3, 3, N, D, torch.bfloat16)
    g = torch.randn(3, 3, N, D).bfloat16()
    ours = run(attention_by_matmuls, tensors, g)
    assert {t.dtype for t in ours} == {torch.bfloat16}
    exact = run(reference, [t.double() for t in tensors], g)
    others = [run(function, tensors, g) for function in (naive, F.scaled_dot_product_attention)]
    for one, truth, plain, fused in zip(ours, exact, *others, strict=True):
        off, plain, fused = ((t.double() - truth).norm() for t in (one, plain, fused))
        assert off <= 1.1 * plain and off <= 3 * fused  # which keeps its scores in float32
        assert off <= 0.01 * truth.norm()


def test_large_scores_do_not_overflow():
    q, k, v = (t.detach() for t in heads(2, 2, 5, 5, 4, torch.float32))
    q, k = 100 * q, 100 * k
    torch.testing.assert_close(attention_by_matmuls(q, k, v), reference(q, k, v))


@RECOMPUTE
def test_reads_nothing_that_it_has_not_written(recompute):
    tensors = heads(2, 3, 5, 6, 4, torch.float32)
    expected = run(attention_by_matmuls, tensors, recompute=recompute)
    torch.use_deterministic_algorithms(True)  # new memory is filled with nan
    try:
        assert torch.empty(3).isnan().all()
        ours = run(attention_by_matmuls, tensors, recompute=recompute)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


@pytest.mark.parametrize(("B", "M"), [(0, 5), (2, 0)])
def test_nothing_in_nothing_out(B, M):
    y, *gradients = run(attention_by_matmuls, heads(B, 3, M, 5, 4))
    assert y.shape == (B, 3, M, 4) and not any(g.any() for g in gradients)


# What it costs


def kept(function, tensors, **kwargs):
    """Elements kept for backward."""
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.update({t.untyped_storage().data_ptr(): t.numel()}) or t, lambda t: t
    ):
        y = function(*tensors, **kwargs)
    assert y.requires_grad == any(t.requires_grad for t in tensors)
    return sum(storages.values())


def test_keeps_what_it_says():
    B, H, M, N, D = 2, 3, 5, 7, 4
    tensors = heads(B, H, M, N, D, torch.float32)
    qkv = B * H * (M * D + 2 * N * D)
    assert kept(attention_by_matmuls, tensors) == qkv + B * H * M * N
    assert kept(attention_by_matmuls, tensors, recompute=True) == qkv < kept(F.scaled_dot_product_attention, tensors)
    assert kept(attention_by_matmuls, [t.detach() for t in tensors]) == 0
    with torch.no_grad():
        y = attention_by_matmuls(*tensors)
    assert y.grad_fn is None


@pytest.mark.parametrize(
    ("trained", "backward"), [("q", 2), ("k", 2), ("v", 1), ("qk", 3), ("qv", 3), ("kv", 3), ("qkv", 4)]
)
@RECOMPUTE
def test_makes_the_gradients_that_are_asked_for(trained, backward, recompute):
    tensors = [t.requires_grad_(name in trained) for name, t in zip("qkv", heads(2, 3, 5, 7, 4), strict=True)]
    with Count() as count:
        ours = run(attention_by_matmuls, tensors, recompute=recompute)
    assert len(count.products) == 2 + backward + recompute
    for one, expected in zip(ours, run(reference, tensors), strict=True):
        assert (one is None) == (expected is None)
        if one is not None:
            torch.testing.assert_close(one, expected)


def test_without_gradients_takes_two_products_and_a_part_of_the_weights():
    tensors = heads(2, 3, 5, 9, 4)
    with torch.inference_mode(), Count() as count:
        attention_by_matmuls(*tensors, scores=FEW)
    assert count.products == [(4, 5, 9), (4, 5, 4), (2, 5, 9), (2, 5, 4)]
    assert count.asked == [(4, 5, 9), (2, 5, 9)]


def test_recomputing_gives_the_same_bits():
    tensors = from_qkv(4, 3, 50, 16, torch.bfloat16)
    g = torch.randn(4, 3, 50, 16)
    ours, expected = (run(attention_by_matmuls, tensors, g, recompute=recompute) for recompute in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def test_what_is_kept_may_not_change_before_backward():
    q, k, v = heads(1, 1, 3, 3, 2)
    y = attention_by_matmuls(q, k, v).sum()
    with torch.no_grad():
        v.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_second_derivatives_are_refused_not_wrong():
    q, k, v = heads(1, 1, 3, 3, 2)
    (gq,) = torch.autograd.grad(attention_by_matmuls(q, k, v).sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gq.sum().backward()


# Which way


def ways(monkeypatch):
    """Records which way is taken."""
    taken = []
    for owner, name in ((ops, "attention_by_matmuls"), (F, "scaled_dot_product_attention")):
        function = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, _f=function, _n=name, **kwargs: taken.append(_n) or _f(*args, **kwargs)
        )
    return taken


def test_takes_matmuls_where_they_are_chosen(by_matmuls, monkeypatch):
    taken = ways(monkeypatch)
    tensors = [t.detach() for t in heads(2, 3, 5, 7, 4)]
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
        attention(*(t.to(dtype) for t in tensors))
    assert attention(*(t.bfloat16().to("meta") for t in tensors)).device.type == "meta"
    use_ways({"attention": "torch"})
    attention(*(t.bfloat16() for t in tensors))
    assert taken == [*["attention_by_matmuls"] * 2, *["scaled_dot_product_attention"] * 4]


@pytest.mark.parametrize(("way", "scores"), [("matmuls 1 MiB", 2**20), ("matmuls 2 MiB", 2**21)])
def test_a_way_says_how_many_scores_are_computed_at_a_time(monkeypatch, way, scores):
    asked, own = [], ops.attention_by_matmuls
    monkeypatch.setattr(
        ops, "attention_by_matmuls", lambda *args, scores, **kw: asked.append(scores) or own(*args, scores=scores, **kw)
    )
    use_ways({"attention": way})
    attention(*heads(2, 3, 5, 7, 4, torch.float32))
    assert asked == [scores]


@RECOMPUTE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_times_every_way_of_a_large_problem_once(clock, monkeypatch, recompute, dtype):
    """With samples that compute what they are named after."""
    calls = 8
    monkeypatch.setattr(tuning, "_MOST_CALLS", calls)
    taken = ways(monkeypatch)
    tensors = [t.detach().requires_grad_() for t in heads(8, 3, 65, 65, 64, dtype)]
    attention(*tensors, recompute=recompute)
    assert taken.count("attention_by_matmuls") == 2 * calls and taken.count("scaled_dot_product_attention") == calls + 1
    (question,) = tuning.answers()
    asked = f"forward and backward{', recomputed' * recompute}, 8 images, 3 heads of 64, 65 x 65 tokens, 1 thread"
    assert question == f"attention: {str(dtype).removeprefix('torch.')}, {asked}"
    attention(*tensors, recompute=recompute)
    attention(*(t[:1, :, :5] for t in tensors))  # too small to matter
    assert list(tuning.answers()) == [question] and len(taken) == 3 * calls + 3


@RECOMPUTE
def test_autocast(by_matmuls, recompute):
    tensors = heads(2, 3, 5, 7, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(attention, tensors, recompute=recompute)  # backward within autocast too
        assert attention(*(t.double() for t in tensors)).dtype == torch.float64
    expected = run(attention_by_matmuls, [t.bfloat16() for t in tensors])
    assert [t.dtype for t in ours] == [torch.bfloat16, *[torch.float32] * 3]
    assert all(torch.equal(one, other.to(one.dtype)) for one, other in zip(ours, expected, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients(by_matmuls):
    tensors = [t.detach().bfloat16() for t in heads(3, 2, 5, 5, 4)]

    def loss(*tensors):
        return attention(*(t[None] for t in tensors)).float().sin().sum()

    ours = vmap(grad(loss, (0, 1, 2)))(*tensors)
    for i in range(3):
        leaves = [t[i].clone().requires_grad_() for t in tensors]
        for one, expected in zip(ours, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(one[i], expected, rtol=0.03, atol=0.02)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(by_matmuls, dynamic):
    torch._dynamo.reset()
    tensors = from_qkv(2, 3, 17, 8, torch.bfloat16)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for one, expected in zip(run(compiled, tensors), run(attention, tensors), strict=True):
        torch.testing.assert_close(one, expected, rtol=0.03, atol=0.02)
    graphs = []
    torch.compile(attention, fullgraph=True, backend=lambda gm, _: graphs.append(gm.code) or gm.forward)(*tensors)
    assert "scaled_dot_product_attention" in graphs[0]  # no loop of ours to unroll
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 5, 4), (2, 7, 4), (2, 7, 4)),
        ((2, 3, 5, 4), (2, 3, 7, 5), (2, 3, 7, 5)),
        ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 6, 4)),
        ((2, 3, 5, 4), (1, 3, 7, 4), (1, 3, 7, 4)),
        ((2, 3, 5, 4), (2, 1, 7, 4), (2, 1, 7, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q, k, v):
    with pytest.raises(AdapterError, match=r"q must be \[B, H, M, D\]"):
        attention(*map(torch.randn, (q, k, v)))


# Where a torch has lost its private names


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_of_softmax_as_it_is_written_down(monkeypatch, dtype):
    weights, g = torch.randn(3, 5, 7, dtype=torch.float64).softmax(-1), torch.randn(3, 5, 7, dtype=torch.float64)
    expected = private.softmax_backward(g, weights)
    monkeypatch.setattr(private, "_softmax_backward", None)
    ours = private.softmax_backward(g.to(dtype), weights.to(dtype))
    assert ours.dtype == dtype
    off = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    assert (ours.double() - expected).norm() < off * expected.norm()


def test_without_words_for_torch_func_nothing_is_inside_of_it(monkeypatch):
    monkeypatch.setattr(private, "_is_wrapped", None)
    assert not private.belongs_to_torch_func(torch.ones(2))
    inside = []
    vmap(lambda x: inside.append(private.belongs_to_torch_func(x)) or x)(torch.ones(2))
    assert inside == [True]


def test_without_words_for_its_instructions_a_cpu_has_none(monkeypatch):
    """As in torch 2.6 on Arm."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not processor.cpu_has("avx512_bf16") and not processor.cpu_has("amx_tile")
