"""The whole layer with the Triton steps, under Triton's interpreter."""

import pytest
import torch
from adapted import COMPUTE_AND_DROPOUT, adapted, assert_same, step
from small_models import images

from vitlorafa import AdapterError, ops
from vitlorafa.ops import autograd, dispatch, reference


@pytest.fixture
def interpreted(monkeypatch):
    """The layer made of the kernels, under Triton's interpreter."""
    pytest.importorskip("triton")
    from test_triton import interpreted as kernels

    monkeypatch.setitem(autograd.BACKENDS, "interpreted", kernels)
    monkeypatch.setattr(dispatch, "_choose_backend", lambda x: "interpreted")
    return kernels


def norm_error(actual, exact):
    return (actual.double() - exact).norm()


@pytest.mark.parametrize(
    ("train", "dtype"),
    [*((train, torch.float32) for train in ("B", "A", "BA")), ("BA", torch.float16), ("B", torch.bfloat16)],
)
@pytest.mark.parametrize("starts", [(0,), (0, 48)])
@pytest.mark.parametrize(("fold", "dropout"), [(True, 0.0), (False, 0.0), (False, 0.3)])
def test_triton_layer_is_the_definition(interpreted, monkeypatch, fold, dropout, train, starts, dtype):
    monkeypatch.setattr(reference, "dropout_mask", interpreted.dropout_mask)
    k, m, r = len(starts), 72 if starts == (0,) else 24, 3
    x = torch.randn(2, 20, 40).to(dtype).requires_grad_()
    weight, bias = torch.randn(72, 40) / 6, torch.randn(72)
    A = (torch.randn(k, r, 40) / 6).requires_grad_("A" in train)
    B = torch.randn(k, m, r).requires_grad_("B" in train)
    g = torch.randn(2, 20, 72).to(dtype)
    seed = torch.tensor(2**40 + 5)

    def run(function, dtype, **kwargs):
        args = [t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) for t in (x, weight, bias, A, B)]
        y = function(*args, 0.7, starts=starts, dropout=dropout, **kwargs)
        y.backward(g.to(y.dtype))
        return [y.detach(), *(t.grad for t in args if t.requires_grad)]

    ours = run(ops.lora_linear, None, seed=int(seed), fold=fold)
    exact = run(reference.lora_linear, torch.float64, seed=seed)
    plain = run(reference.lora_linear, dtype, seed=seed)
    assert [t.dtype for t in ours] == [dtype, dtype, *[torch.float32] * len(train)]
    for one, truth, naive in zip(ours, exact, plain, strict=True):
        assert norm_error(one, truth) <= 2 * norm_error(naive, truth)


@COMPUTE_AND_DROPOUT
def test_triton_model_is_the_plain_one(interpreted, compute, dropout):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_choose_backend", lambda x: "eager")
        patch.setattr(reference, "dropout_mask", lambda *args: interpreted.dropout_mask(*args))
        patch.setattr("vitlorafa.ops.dropout.dropout_mask", lambda *args: interpreted.dropout_mask(*args))
        patch.setattr("vitlorafa.ops.dropout._draws_in_blocks", lambda x: False)
        expected = step(adapted(compute, dropout, train="BA"), images(adapted(compute)))
    ours = step(adapted(compute, dropout, train="BA"), images(adapted(compute)))
    assert_same(ours, expected)


def test_use_backend(monkeypatch):
    monkeypatch.setattr(dispatch, "_backend", "eager")
    with pytest.raises(AdapterError, match="unknown backend 'tritn': did you mean 'triton'"):
        ops.use_backend("tritn")
    assert dispatch._backend == "eager"
    pytest.importorskip("triton")
    ops.use_backend("triton")
    assert dispatch._backend == "triton"
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert dispatch._choose_backend(torch.empty(2, 3, dtype=dtype)) == "eager"

    class OnGPU:
        is_cuda = True

        def __init__(self, dtype):
            self.dtype = dtype

    monkeypatch.setitem(autograd.BACKENDS, "triton", None)
    assert [dispatch._choose_backend(OnGPU(dtype)) for dtype in (torch.bfloat16, torch.float64)] == ["triton", "eager"]
    ops.use_backend("eager")
    assert dispatch._choose_backend(OnGPU(torch.bfloat16)) == "eager"
