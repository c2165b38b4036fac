import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitlorafa import AdapterConfig, AdapterError, LoRALinear, lora_linear
from vitlorafa.layers import QKV
from vitlorafa.ops import reference

pytestmark = pytest.mark.numbers

SLICES = [(0,), (7,), (14,), (0, 7), (0, 14), (7, 14), (0, 7, 14)]  # of a fused qkv of width 7
TRAIN = ["B", "A", "BA"]


def tensors(starts=(0, 14), batch=(3, 5), d_in=6, m=7, d_out=21, r=2, train="BA", dtype=torch.float64):
    """x, weight, bias, A, B: x and the trained factors require a gradient."""
    k = len(starts)
    x = torch.randn(*batch, d_in, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(d_out, d_in, dtype=dtype), torch.randn(d_out, dtype=dtype)
    A = torch.randn(k, r, d_in, dtype=dtype, requires_grad="A" in train)
    B = torch.randn(k, m, r, dtype=dtype, requires_grad="B" in train)
    return [x, weight, bias, A, B]


def definition(*args, seed=0, **kwargs):
    return reference.lora_linear(*args, seed=torch.tensor(seed), **kwargs)


def run(function, args, g, **kwargs):
    """The output, and the gradients of all that require one, None for the others."""
    args = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in args]
    y = function(*args, 0.7, **kwargs)
    y.backward(g.to(y.dtype))
    return [y.detach()] + [None if t is None else t.grad for t in args]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("starts", SLICES)
@pytest.mark.parametrize("train", TRAIN)
def test_is_the_definition(train, starts, dropout):
    args = tensors(starts, train=train)
    g = torch.randn(3, 5, 21, dtype=torch.float64)
    kwargs = {"starts": starts, "dropout": dropout, "seed": 5}
    ours, expected = run(lora_linear, args, g, **kwargs), run(definition, args, g, **kwargs)
    torch.testing.assert_close(ours, expected)


def test_definition_is_the_effective_weight():
    x, weight, bias, A, B = tensors((0,), m=21)
    y = nn.functional.linear(x, weight + 0.7 * B[0] @ A[0], bias)
    torch.testing.assert_close(reference.lora_linear(x, weight, bias, A, B, 0.7), y)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("starts", SLICES)
@pytest.mark.parametrize("train", TRAIN)
def test_gradcheck(train, starts, dropout):
    x, weight, bias, A, B = tensors(starts, batch=(3,), train=train)
    assert torch.autograd.gradcheck(
        lambda *args: lora_linear(*args, 0.7, starts=starts, dropout=dropout, seed=5), (x, weight, bias, A, B)
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck_of_everything(dropout):
    args = [t.requires_grad_() for t in tensors(batch=(3,))]
    assert torch.autograd.gradcheck(
        lambda *args: lora_linear(*args, 0.7, starts=(0, 14), dropout=dropout, seed=5), args
    )


def test_without_bias_and_without_gradient_of_x():
    x, weight, _, A, B = tensors(train="B")
    g = torch.randn(3, 5, 21, dtype=torch.float64)
    args = [x.detach(), weight, None, A, B]
    ours = run(lora_linear, args, g, starts=(0, 14))
    torch.testing.assert_close(ours, run(reference.lora_linear, args, g, starts=(0, 14)))
    assert [t is not None for t in ours] == [True, False, False, False, False, True]


def test_cannot_be_differentiated_twice():
    x, weight, bias, A, B = tensors((0,), m=21)
    (gx,) = torch.autograd.grad(lora_linear(x, weight, bias, A, B, 0.7).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gx.sum().backward()


shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3)


@settings(deadline=None, max_examples=60)
@given(
    batch=shapes,
    d_in=st.integers(1, 9),
    m=st.integers(1, 9),
    k=st.integers(1, 4),
    head=st.integers(0, 2),
    step=st.integers(1, 3),
    tail=st.integers(0, 2),
    r=st.integers(1, 5),
    train=st.sampled_from(TRAIN),
    dropout=st.sampled_from([0.0, 0.5]),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
)
def test_any_shape(batch, d_in, m, k, head, step, tail, r, train, dropout, layout):
    starts = tuple((head + i * step) * m for i in range(k))
    d_out = starts[-1] + m + tail * m
    args = tensors(starts, batch, d_in, m, d_out, r, train)
    x = args[0].detach()
    if layout == "transposed":
        x = x.mT.contiguous().mT if x.dim() > 1 else x
    elif layout == "strided":
        x = torch.stack((x, x), -1)[..., 0]
    elif layout == "expanded":
        x = x[..., :1].expand(*batch, d_in)
    for function in (lora_linear, definition):
        leaf = x.detach().requires_grad_()
        y = function(leaf, args[1], args[2], args[3], args[4], 0.7, starts=starts, dropout=dropout, seed=1)
        grads = torch.autograd.grad(y.sin().sum(), [leaf, *(t for t in args[3:] if t.requires_grad)])
        if function is lora_linear:
            ours = (y, *grads)
    assert ours[0].shape == (*batch, d_out)
    torch.testing.assert_close(ours, (y, *grads))


def error(actual, exact):
    return (actual.double() - exact.double()).square().mean().sqrt()


def plain(x, weight, bias, A, B, scale, starts=(0,)):
    """What plain modules do: two small products whose result is added to the slices."""
    y = nn.functional.linear(x, weight, bias)
    for start, A_j, B_j in zip(starts, A, B, strict=True):
        update = scale * nn.functional.linear(nn.functional.linear(x, A_j), B_j)
        y = torch.cat((y[..., :start], y[..., start : start + len(B_j)] + update, y[..., start + len(B_j) :]), -1)
    return y


@pytest.mark.parametrize("way", ["tensors", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("starts", [(0,), (0, 64), (0, 32, 64)])
@pytest.mark.parametrize("train", TRAIN)
def test_low_precision_errs_at_most_twice_what_the_plain_way_errs(train, starts, dtype, way):
    args = tensors(starts, (4, 33), 48, 32, 96, 8, train, dtype=torch.float32)
    with torch.no_grad():
        for t in args:
            t /= t.shape[-1] ** 0.5
    if way == "tensors":
        args = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in args]
    g = torch.randn(4, 33, 96).to(dtype)
    exact_args = [t.detach().double().requires_grad_(t.requires_grad) for t in args]
    exact = run(reference.lora_linear, exact_args, g.double(), starts=starts)
    with torch.autocast("cpu", dtype, enabled=way == "autocast"):
        ours, naive = (run(function, args, g, starts=starts) for function in (lora_linear, plain))
    for one, other, truth, arg in zip(ours, naive, exact, [None, *args], strict=True):
        if truth is not None:
            assert one.dtype == (dtype if arg is None else arg.dtype)
            assert error(one, truth) <= 2 * error(other, truth)


def saved_bytes(layer, x, **autocast):
    """Bytes kept for backward, each storage once, without parameters and the cached cast of the weight."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if autocast:
            with torch.autocast("cpu", **autocast):
                y = layer(x)
        else:
            y = layer(x)
    for t in [*layer.parameters(), *(layer._cast or ((),))[1:]]:
        if t is not None:
            storages.pop(t.untyped_storage().data_ptr(), None)
    assert y.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("train", "keeps_xA", "keeps_x"), [("B", 1, 0), ("A", 0, 1), ("BA", 1, 1)])
@pytest.mark.parametrize("projections", [("q",), ("q", "v"), ("q", "k", "v")])
def test_keeps_for_backward_only_what_training_needs(projections, train, keeps_xA, keeps_x, dropout):
    N, d, r, k = 2 * 50, 48, 4, len(projections)
    config = AdapterConfig(rank=r, train=train, dropout=dropout, seed=0)
    linear = nn.Linear(d, 3 * d).requires_grad_(False)
    layer = LoRALinear(linear, config, projections, QKV)
    x = torch.randn(2, 50, d, requires_grad=True)
    seed = 8 if dropout else 0
    assert saved_bytes(layer, x) == 4 * N * (k * r * keeps_xA + d * keeps_x) + seed
    # Under autocast everything is half the size, and the folded weight stands for the cast that any layer keeps.
    half = 2 * N * (k * r * keeps_xA + d * keeps_x) + (seed or 2 * d * 3 * d)
    assert saved_bytes(layer, x, dtype=torch.bfloat16) == half


@pytest.mark.parametrize("train", TRAIN)
def test_first_layer_of_a_frozen_model_keeps_no_weight(train):
    layer = LoRALinear(nn.Linear(8, 8).requires_grad_(False), AdapterConfig(rank=2, train=train), ("proj",))
    x = torch.randn(5, 8)
    y = layer(x)
    kept = [t for t in y.grad_fn.next_functions[0][0].saved_tensors if t is not None]
    assert not any(t.shape == layer.base.weight.shape for t in kept)
    y.sum().backward()
    assert (layer.lora_B.grad is not None) == ("B" in train)
    assert (layer.lora_A.grad is not None) == ("A" in train)


def test_dropout_draws_from_the_global_generator_only_if_no_seed_is_given():
    args = [t.detach() for t in tensors()]
    torch.manual_seed(3)
    first, second = (lora_linear(*args, 0.7, starts=(0, 14), dropout=0.5) for _ in range(2))
    torch.manual_seed(3)
    again = lora_linear(*args, 0.7, starts=(0, 14), dropout=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)
    state = torch.get_rng_state()
    lora_linear(*args, 0.7, starts=(0, 14), dropout=0.5, seed=1)
    lora_linear(*args, 0.7, starts=(0, 14))
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_keeps_the_mean():
    mask = reference.dropout_mask([1000, 100], torch.device("cpu"), 0.3, torch.tensor(1))
    assert mask.double().mean().item() == pytest.approx(0.7, abs=0.01)


def test_autocast_leaves_float64_alone():
    args = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_linear(*args, 0.7, starts=(0, 14)).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "starts", "message"),
    [
        ({"A": (2, 3, 6)}, (0, 14), r"A must be \[k, r, d_in\]"),
        ({"A": (2, 6)}, (0, 14), r"not \[2, 6\] and \[2, 7, 2\]"),
        ({}, (0, 7, 14), "with 3 projections"),
        ({"A": (2, 2, 5)}, (0, 14), "input width 6"),
        ({"x": (3, 5)}, (0, 14), "input width 6"),
        ({}, (0, 15), "slices of 7"),
        ({}, (0, 6), "slices of 7"),
        ({}, (14, 0), "slices of 7"),
        ({}, (-7, 0), "slices of 7"),
        ({"A": (3, 2, 6), "B": (3, 3, 2)}, (0, 3, 9), "evenly spaced"),
        ({}, (1, 8), "equal parts"),
    ],
)
def test_refuses_shapes(change, starts, message):
    named = dict(zip(["x", "weight", "bias", "A", "B"], tensors(), strict=True))
    named |= {name: torch.randn(shape, dtype=torch.float64) for name, shape in change.items()}
    with pytest.raises(AdapterError, match=message):
        lora_linear(*named.values(), 0.7, starts=starts)
