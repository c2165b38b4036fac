"""The layer with one of several B for each sample."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap

from vitlorafa import AdapterError, lora_linear
from vitlorafa.ops import reference
from vitlorafa.ops.quantised import QuantisedWeight

pytestmark = pytest.mark.numbers

SLICES = [(0,), (7,), (0, 14), (7, 14), (0, 7, 14)]  # of a fused qkv of width 7
ADAPTER = torch.tensor([2, 0, 2, -1])


def tensors(starts=(0, 14), shape=(4, 5), d_in=6, m=7, d_out=21, r=2, n=3, dtype=torch.float64):
    """x, weight, bias, A and the B of n adapters: x, A and B require a gradient."""
    k = len(starts)
    x = torch.randn(*shape, d_in, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(d_out, d_in, dtype=dtype), torch.randn(d_out, dtype=dtype)
    A = torch.randn(k, r, d_in, dtype=dtype, requires_grad=True)
    B = torch.randn(n, k, m, r, dtype=dtype, requires_grad=True)
    return [x, weight, bias, A, B]


def alone(x, weight, bias, A, B, scale, *, adapter, **kwargs):
    """Each sample by its own adapter, one after the other."""
    samples = zip(x.split(len(x) // len(adapter)), adapter, strict=True)
    return torch.cat([lora_linear(sample, weight, bias, A, B[i], scale, **kwargs) for sample, i in samples])


def run(function, args, g, **kwargs):
    """The output, and the gradients of all that require one, None for the others."""
    args = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in args]
    y = function(*args, 0.7, **kwargs)
    y.backward(g.to(y.dtype))
    return [y.detach()] + [None if t is None else t.grad for t in args]


@pytest.mark.parametrize("starts", SLICES)
def test_each_sample_gets_what_its_own_adapter_gives(starts):
    args, g = tensors(starts), torch.randn(4, 5, 21, dtype=torch.float64)
    kwargs = {"starts": starts, "adapter": ADAPTER}
    ours = run(lora_linear, args, g, **kwargs)
    torch.testing.assert_close(ours, run(alone, args, g, **kwargs))
    torch.testing.assert_close(ours, run(reference.lora_linear, args, g, **kwargs))
    with torch.no_grad():  # in place
        torch.testing.assert_close(lora_linear(*args, 0.7, **kwargs), ours[0])


@pytest.mark.parametrize("gelu", [False, True])
def test_dropout_and_gelu_are_those_of_the_definition(gelu):
    args, kwargs = tensors(), {"starts": (0, 14), "adapter": ADAPTER, "dropout": 0.3}
    y = reference.lora_linear(*args, 0.7, **kwargs, seed=torch.tensor(5))
    ours = lora_linear(*args, 0.7, **kwargs, seed=5, gelu=gelu)
    torch.testing.assert_close(ours, nn.functional.gelu(y) if gelu else y)
    assert not torch.equal(ours, lora_linear(*args, 0.7, **kwargs, seed=6, gelu=gelu))


def test_one_number_for_all_is_a_call_with_that_adapter():
    args = tensors()
    *others, B = args
    for adapter in (0, 2, -1):
        ours = lora_linear(*args, 0.7, starts=(0, 14), adapter=adapter)
        assert torch.equal(ours, lora_linear(*others, B[adapter], 0.7, starts=(0, 14)))


def test_parts_of_a_sample_have_its_adapter():
    x, *others = tensors(shape=(12, 2, 5))  # three windows for each sample
    ours = lora_linear(x, *others, 0.7, starts=(0, 14), adapter=ADAPTER)
    expected = lora_linear(x, *others, 0.7, starts=(0, 14), adapter=ADAPTER.repeat_interleave(3))
    torch.testing.assert_close(ours, expected)  # some processors round matmuls of other shapes otherwise


@pytest.mark.parametrize("starts", [(0,), (0, 6)])
def test_gradcheck(starts):
    args = [t.requires_grad_() for t in tensors(starts, shape=(4,), d_in=2, m=3, d_out=9, r=1)]

    def layer(*args):
        return lora_linear(*args, 0.7, starts=starts, adapter=ADAPTER)

    assert torch.autograd.gradcheck(layer, args) and torch.autograd.gradgradcheck(layer, args)


def test_per_sample_gradients():
    x, weight, bias, A, B = (t.detach() for t in tensors())

    def loss(B, x, i):
        return lora_linear(x, weight, bias, A, B, 0.7, starts=(0, 14), adapter=i).sin().sum()

    per_sample = vmap(grad(loss), (None, 0, 0))(B, x.unsqueeze(1), ADAPTER.unsqueeze(1))
    B.requires_grad_()
    loss(B, x, ADAPTER).backward()
    torch.testing.assert_close(per_sample.sum(0), B.grad)


shapes = st.lists(st.integers(0, 4), min_size=0, max_size=2)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(0, 5),
    windows=st.integers(1, 3),
    rest=shapes,
    d_in=st.integers(1, 9),
    m=st.integers(1, 9),
    k=st.integers(1, 4),
    head=st.integers(0, 2),
    tail=st.integers(0, 2),
    r=st.integers(1, 5),
    n=st.integers(1, 4),
    layout=st.sampled_from(["contiguous", "strided"]),
)
def test_any_shape(batch, windows, rest, d_in, m, k, head, tail, r, n, layout):
    starts = tuple((head + i) * m for i in range(k))
    x, *others = tensors(starts, (batch * windows, *rest), d_in, m, starts[-1] + (1 + tail) * m, r, n)
    x = torch.stack((x, x), -1)[..., 0] if layout == "strided" else x
    adapter = torch.randint(-n, n, (batch,))
    found = []
    for function in (lora_linear, reference.lora_linear):
        y = function(x, *others, 0.7, starts=starts, adapter=adapter)
        found.append((y, *torch.autograd.grad(y.sin().sum(), [x, *others[2:]])))
    assert found[0][0].shape == (batch * windows, *rest, len(others[0]))
    torch.testing.assert_close(*found)


def plain(x, weight, bias, A, B, scale, starts, adapter):
    """What plain modules do: two small matmuls for each sample, whose result is added to the slices."""
    samples = []
    for i, sample in zip(adapter, x, strict=True):
        y = nn.functional.linear(sample, weight, bias)
        for start, A_j, B_j in zip(starts, A, B[i], strict=True):
            update = scale * nn.functional.linear(nn.functional.linear(sample, A_j), B_j)
            y = torch.cat((y[..., :start], y[..., start : start + len(B_j)] + update, y[..., start + len(B_j) :]), -1)
        samples.append(y)
    return torch.stack(samples)


def error(actual, exact):
    return (actual.double() - exact.double()).square().mean().sqrt()


@pytest.mark.parametrize("way", ["tensors", "autocast", "inference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("starts", [(0,), (0, 64)])
def test_errs_at_most_twice_what_the_plain_way_errs(starts, dtype, way):
    args = tensors(starts, (4, 33), 48, 32, 96, 8, dtype=torch.float32)
    with torch.no_grad():
        for t in args:
            t /= t.shape[-1] ** 0.5
    if way != "autocast":
        args = [t.detach().to(dtype).requires_grad_(t.requires_grad and way == "tensors") for t in args]
    g, kwargs = torch.randn(4, 33, 96).to(dtype), {"starts": starts, "adapter": ADAPTER}
    exact_args = [t.detach().double().requires_grad_(t.requires_grad) for t in args]
    with torch.autocast("cpu", dtype, enabled=way == "autocast" and dtype != torch.float32):
        if way == "inference":
            found = [[f(*args, 0.7, **kwargs)] for f in (lora_linear, plain)]
        else:
            found = [run(f, args, g, **kwargs) for f in (lora_linear, plain)]
    if way == "inference":
        exact = [reference.lora_linear(*exact_args, 0.7, **kwargs)]
    else:
        exact = run(reference.lora_linear, exact_args, g.double(), **kwargs)
    for ours, naive, truth in zip(*found, exact, strict=True):
        if truth is not None:
            assert ours.dtype == naive.dtype
            assert error(ours, truth) <= 2 * error(naive, truth)


def test_a_quantised_weight_is_dequantised():
    x, weight, *others = tensors()
    stored = QuantisedWeight((weight,), tuple(weight.shape), weight.dtype, lambda tensors, shape, dtype: tensors[0])
    ours = lora_linear(x, stored, *others, 0.7, starts=(0, 14), adapter=ADAPTER)
    torch.testing.assert_close(ours, lora_linear(x, weight, *others, 0.7, starts=(0, 14), adapter=ADAPTER))


def test_keeps_no_activation_but_x_A_for_backward():
    x, weight, bias, A, B = tensors(shape=(4, 50), dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, weight, bias, A.detach(), B, 0.7, starts=(0, 14), adapter=ADAPTER)
    assert kept and not any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in kept)
    assert max(t.numel() for t in kept) <= 4 * 50 * 2 * 2


@pytest.mark.parametrize(
    ("change", "adapter", "message"),
    [
        ({"B": (2, 7, 2)}, ADAPTER, r"B must be \[n, k, m, r\]"),
        ({"B": (0, 2, 7, 2)}, ADAPTER, "n adapters"),
        ({"A": (2, 3, 6)}, ADAPTER, r"A must be \[k, r, d_in\]"),
        ({}, 3, "adapter is 3, but B has 3"),
        ({}, -4, "adapter is -4"),
        ({}, ADAPTER.float(), "whole numbers"),
        ({}, ADAPTER > 0, "whole numbers"),
        ({}, ADAPTER.view(2, 2), r"\[2, 2\]"),
        ({}, ADAPTER[:3], r"x \[4, 5, 6\] .* 3 indices"),
        ({}, ADAPTER[:0], "0 indices"),
        ({"x": (6,)}, ADAPTER[:1], r"x \[6\]"),
    ],
)
def test_refuses_shapes_and_indices(change, adapter, message):
    named = dict(zip(["x", "weight", "bias", "A", "B"], tensors(), strict=True))
    named |= {name: torch.randn(shape, dtype=torch.float64) for name, shape in change.items()}
    with pytest.raises(AdapterError, match=message):
        lora_linear(*named.values(), 0.7, starts=(0, 14), adapter=adapter)
