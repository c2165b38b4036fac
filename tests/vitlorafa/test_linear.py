import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vitlorafa import AdapterWarning, lora_linear, tuning, use_ways
from vitlorafa.kept_ways import machine_file
from vitlorafa.ops import linear

pytestmark = pytest.mark.numbers

ops = importlib.import_module("vitlorafa.ops.linear")
native = pytest.mark.skipif(not ops.can_fuse(torch.bfloat16), reason="torch's operation does not work on this CPU")
BIAS = pytest.mark.parametrize("bias", [True, False])
# rows, d_in, d_out
SHAPES = [
    ((1,), 1, 1),
    ((2, 3), 8, 5),
    ((4728,), 192, 576),
    ((3, 197), 193, 577),
    ((7,), 1, 33),
    ((), 5, 4),
    ((0,), 3, 2),
]


@pytest.fixture(autouse=True)
def _fused():
    if ops.can_fuse(torch.bfloat16):
        use_ways({"linear": "fused"})


def tensors(rows=(2, 3), d_in=8, d_out=5, bias=True, dtype=torch.bfloat16, trained=True):
    made = [torch.randn(*rows, d_in), torch.randn(d_out, d_in), torch.randn(d_out)]
    x, weight, b = (t.to(dtype).requires_grad_(trained) for t in made)
    return [x, weight, b if bias else None]


def run(function, inputs, **kwargs):
    """Output and gradients."""
    leaves = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs]
    y = function(*leaves, **kwargs)
    y.backward(torch.ones_like(y) if y.dim() < 2 else torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return [y.detach(), *(t.grad for t in leaves if t is not None)]


class Calls(TorchDispatchMode):
    """The names of torch's operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def calls(function, *args, **kwargs):
    with Calls() as called:
        function(*args, **kwargs)
    return set(called.names)


# What it computes


@BIAS
@pytest.mark.parametrize(("rows", "d_in", "d_out"), SHAPES)
def test_has_the_bits_of_torchs(rows, d_in, d_out, bias):
    inputs = tensors(rows, d_in, d_out, bias)
    for ours, expected in zip(run(linear, inputs), run(F.linear, inputs), strict=True):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)
    with torch.no_grad():
        assert torch.equal(linear(*inputs), F.linear(*inputs))


@pytest.mark.parametrize("trained", [(0, 2), (2,), (1,), (0, 1)])
def test_gradients_of_some_inputs_only(trained):
    """Such as a bias whose weight is frozen."""
    inputs = tensors((3, 197), 193, 577)
    for index, each in enumerate(inputs):
        each.requires_grad_(index in trained)
    ours, expected = run(linear, inputs), run(F.linear, inputs)
    assert [each is None for each in ours] == [each is None for each in expected]
    assert all(torch.equal(o, e) for o, e in zip(ours, expected, strict=True) if e is not None)


def test_strided_inputs_change_nothing():
    x, weight, bias = tensors((6,), 16, 5, trained=False)
    for ours in (x[::2, ::2], weight[:, ::2].repeat(3, 1)[::3]):
        assert not ours.is_contiguous()
        assert torch.equal(linear(ours, weight[:, :8], bias), F.linear(ours, weight[:, :8], bias))


@BIAS
@pytest.mark.parametrize(("rows", "d_in", "d_out"), SHAPES)
def test_has_the_results_of_torchs_in_float32(rows, d_in, d_out, bias):
    inputs = tensors(rows, d_in, d_out, bias, torch.float32)
    torch.testing.assert_close(run(linear, inputs), run(F.linear, inputs), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = F.gelu(F.linear(*inputs))
        torch.testing.assert_close(linear(*inputs, gelu=True), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_formats_are_torchs_own(dtype):
    inputs = tensors(dtype=dtype)
    assert all(map(torch.equal, run(linear, inputs), run(F.linear, inputs)))
    assert torch.equal(linear(*inputs, gelu=True), F.gelu(F.linear(*inputs)))


@native
@pytest.mark.parametrize("way", ["fused", "fused bias"])
@pytest.mark.parametrize(("rows", "d_in", "d_out"), SHAPES)
def test_gelu_is_as_near_to_float64_as_torchs(rows, d_in, d_out, way):
    use_ways({"linear": way})
    inputs = tensors(rows, d_in, d_out, trained=False)
    exact = F.gelu(F.linear(*(t.double() for t in inputs)))
    ours, plain = ((y.double() - exact).norm() for y in (linear(*inputs, gelu=True), F.gelu(F.linear(*inputs))))
    assert ours <= 1.1 * plain


def test_gelu_with_gradients_has_the_bits_of_torchs():
    inputs = tensors()
    expected = run(lambda *t: F.gelu(F.linear(*t)), inputs)
    assert all(map(torch.equal, run(linear, inputs, gelu=True), expected))


def test_derivatives_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(ops, "_matmul", F.linear)  # which knows float64
    for bias in (True, False):
        inputs = tensors(bias=bias, dtype=torch.float64)
        assert gradcheck(ops._Linear.apply, inputs) and gradgradcheck(ops._Linear.apply, inputs)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_makes_the_gradients_that_are_asked_for(trained):
    inputs = [t.requires_grad_(i in trained) for i, t in enumerate(tensors(trained=False))]
    for ours, expected in zip(run(linear, inputs), run(F.linear, inputs), strict=True):
        assert (ours is None) == (expected is None)
        assert ours is None or torch.equal(ours, expected)


def test_keeps_what_its_gradients_need():
    def kept(inputs):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t.numel()) or t, lambda t: t):
            linear(*inputs)
        return sum(found)

    x, weight, bias = tensors((50,), 8, 5, trained=False)
    assert kept([x.requires_grad_(), weight, bias]) == weight.numel()
    assert kept([x.detach(), weight.requires_grad_(), bias]) == x.numel()
    assert kept([x.detach(), weight.detach(), bias]) == 0


def test_computes_in_autocasts_format_or_the_inputs():
    x, weight, bias = tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = run(linear, [x, weight, bias]), run(F.linear, [x, weight, bias])
        assert linear(x.double(), weight, bias).dtype == torch.float64
    assert all(map(torch.equal, ours, expected)) and ours[0].dtype == torch.bfloat16
    held = weight.detach().bfloat16(), bias.detach().bfloat16()
    torch.testing.assert_close(linear(x, *held), F.linear(x, *(t.float() for t in held)))


@pytest.mark.parametrize("x", [torch.ones(2, 7), torch.ones(0, 7)])
def test_a_wrong_width_is_torchs_error(x):
    _, weight, bias = tensors(trained=False)
    with pytest.raises(RuntimeError, match=r"cannot be multiplied \(\dx7 and 8x5\)"):
        linear(x.bfloat16(), weight, bias)


def test_no_inputs_leave_the_bias():
    bias = torch.randn(3).bfloat16()
    assert torch.equal(linear(torch.ones(2, 0).bfloat16(), torch.ones(3, 0).bfloat16(), bias), bias.expand(2, 3))


# Which way


@native
def test_bias_and_gelu_come_with_the_product():
    inputs = tensors(trained=False)
    assert calls(linear, *inputs, gelu=True) == {"_linear_pointwise"}
    assert calls(linear, *tensors(), gelu=True) >= {"_linear_pointwise", "gelu"}  # backward will ask for what is before
    with torch.no_grad():
        assert calls(linear, *tensors(), gelu=True) == {"_linear_pointwise"}


@native
def test_gelu_may_come_after_the_product_and_the_bias():
    use_ways({"linear": "fused bias"})
    inputs = tensors(trained=False)
    assert calls(linear, *inputs, gelu=True) == {"_linear_pointwise", "gelu_"}
    assert torch.equal(linear(*inputs, gelu=True), F.gelu(F.linear(*inputs)))
    assert calls(linear, *inputs) == {"_linear_pointwise"}


@native
@pytest.mark.parametrize("fold", [True, False])
def test_so_they_do_in_adapted_layers(fold):
    x, weight, bias = tensors(trained=False)
    A, B = torch.randn(1, 2, 8), torch.randn(1, 5, 2, requires_grad=True)
    with torch.no_grad():
        named = calls(lora_linear, x, weight, bias, A, B, 0.5, fold=fold, gelu=True)
        ours = lora_linear(x, weight, bias, A, B, 0.5, fold=fold, gelu=True)
    assert ("gelu" in named) != fold and "_linear_pointwise" in named and not named & {"addmm", "linear"}
    assert {"_linear_pointwise", "gelu"} <= calls(lora_linear, x, weight, bias, A, B, 0.5, fold=fold, gelu=True)
    expected = F.gelu(lora_linear(x.double(), weight.double(), bias.double(), A.double(), B.double(), 0.5))
    torch.testing.assert_close(ours.double(), expected, rtol=0.02, atol=0.05)


@native
def test_times_all_ways_of_a_large_problem_once(clock):
    inputs = tensors((300,), 256, 512, trained=False)
    large = "linear: bfloat16, 256 x 256 to 512, 1 thread"
    for gelu, asked in ((False, [large]), (True, [large, f"{large.removesuffix(', 1 thread')}, GELU, 1 thread"])):
        assert torch.equal(linear(*inputs, gelu=gelu), F.gelu(F.linear(*inputs)) if gelu else F.linear(*inputs))
        assert tuning.answers() == dict.fromkeys(asked, "torch")  # all take the same time
    timed = {name: set(answer.seconds) for name, answer in machine_file().read().items()}
    assert timed == {asked[0]: {"torch", "fused"}, asked[1]: {"torch", "fused", "fused bias"}}
    linear(*tensors(trained=False))  # too small to matter
    linear(*tensors((300,), 256, 512, bias=False))  # nothing to fuse
    assert list(tuning.answers()) == asked


def test_torchs_is_the_default():
    use_ways({})
    assert "_linear_pointwise" not in calls(linear, *tensors(), gelu=True)
    assert linear(*(t.to("meta") for t in tensors())).device.type == "meta"


@native
def test_operations_are_counted_as_torchs_are():
    def count(function, inputs):
        with FlopCounterMode(display=False) as counter:
            run(function, inputs)
        return counter.get_total_flops()

    inputs = tensors((4, 6), 8, 5)
    assert count(linear, inputs) == count(F.linear, inputs) == 3 * 2 * 24 * 8 * 5


def test_compiles_into_torchs_operations():
    torch._dynamo.reset()
    graphs = []
    inputs = tensors()
    compiled = torch.compile(linear, fullgraph=True, backend=lambda gm, _: graphs.append(gm.code) or gm.forward)
    assert torch.equal(compiled(*inputs, gelu=True), linear(*inputs, gelu=True))
    assert "_linear_pointwise" not in graphs[0] and "linear" in graphs[0]
    torch._dynamo.reset()


def test_per_sample_gradients():
    x, weight, bias = tensors((4,), trained=False)

    def loss(weight, x):
        return linear(x, weight, bias).float().sin().sum()

    ours = vmap(grad(loss), (None, 0))(weight, x)
    for one, row in zip(ours, x, strict=True):
        leaf = weight.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, row), leaf)
        assert (one - expected).norm() < 0.02 * expected.norm()


# Where torch's private operation does not work


@pytest.fixture
def untried():
    for cached in (ops.can_fuse, ops._question):
        cached.cache_clear()
    yield
    for cached in (ops.can_fuse, ops._question):
        cached.cache_clear()


def refuses(*_):
    raise RuntimeError("could not create a primitive descriptor")


def means_something_else(x, weight, bias, gelu=False):
    return F.linear(x, weight)


@pytest.mark.parametrize("product", [refuses, means_something_else])
def test_torchs_own_stands_in_for_an_operation_that_does_not_work(untried, monkeypatch, product):
    tried = []
    monkeypatch.setattr(ops, "_matmul", lambda *args: tried.append(len(tried)) or product(*args))
    use_ways({"linear": "fused"})
    inputs = tensors()
    expected = run(lambda *t: F.gelu(F.linear(*t)), inputs)
    with pytest.warns(AdapterWarning, match="there is no way 'fused' here, only torch: torch is used"):
        assert all(map(torch.equal, run(linear, inputs, gelu=True), expected)) and tried
    tried.clear()
    assert all(map(torch.equal, run(linear, inputs, gelu=True), expected)) and not tried  # once a process


@native
def test_nobody_sees_the_trial(untried):
    """Neither a counter, nor autocast, nor inference mode of the first caller's."""
    inputs = tensors(trained=False)
    with torch.inference_mode(), torch.autocast("cpu", torch.float16), Calls() as called:
        assert ops.can_fuse(torch.bfloat16) and not called.names
    assert torch.is_inference_mode_enabled() is False and not torch.is_autocast_enabled("cpu")
    assert torch.equal(linear(*inputs), F.linear(*inputs))


ONE_LAYER = """
import torch
import torch.nn.functional as F
from vitlorafa.ops import linear

x, weight, bias = torch.randn(64, 192), torch.randn(96, 192, requires_grad=True), torch.randn(96)
with torch.autocast("cpu", torch.bfloat16):
    y = linear(x, weight, bias)
    assert torch.equal(y, F.linear(x, weight, bias))
    y.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias, gelu=True), F.gelu(y), rtol=0.02, atol=0.05)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE"])
def test_computes_with_a_onednn_of_fewer_instructions(limit):
    """Elsewhere than on x86 the limit is not heard, and nothing changes."""
    ways = json.dumps({"linear": "fused"})
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit, "VITLORAFA_WAYS": ways}
    command = [sys.executable, "-c", ONE_LAYER]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
