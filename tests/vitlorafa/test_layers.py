import copy

import pytest
import torch
from messages import naming
from torch import nn

from vitlorafa import AdapterConfig, AdapterError, LoRALinear
from vitlorafa.layers import QKV

pytestmark = pytest.mark.numbers


def layer(projections=("q", "v"), dtype=torch.float32, moved=True, **kwargs):
    config = AdapterConfig(**{"rank": 4, "seed": 0, **kwargs})
    base = nn.Linear(24, 72, dtype=dtype).requires_grad_(False)
    adapted = LoRALinear(base, config, projections, QKV if projections != ("fc1",) else ())
    if moved:
        with torch.no_grad():
            for factor in (adapted.lora_A, adapted.lora_B):
                factor.add_(0.2 * torch.randn_like(factor))
    return adapted


@pytest.mark.parametrize("projections", [("q",), ("k",), ("q", "v"), ("q", "k", "v"), ("fc1",)])
def test_adapts_its_slices_only(projections):
    adapted = layer(projections)
    x = torch.randn(5, 24)
    change = (adapted(x) - adapted.base(x)).view(5, 3, 24).abs().amax((0, 2)) > 1e-3
    expected = [True] * 3 if projections == ("fc1",) else [name in projections for name in "qkv"]
    assert change.tolist() == expected


def test_starts_as_the_base_with_orthonormal_rows():
    adapted = layer(moved=False)
    x = torch.randn(2, 5, 24)
    assert torch.equal(adapted(x), adapted.base(x))
    torch.testing.assert_close(adapted.lora_A @ adapted.lora_A.mT, torch.eye(4).expand(2, 4, 4))
    assert not adapted.lora_B.any()
    assert not torch.equal(adapted.lora_A[0], adapted.lora_A[1])
    assert adapted.lora_B.requires_grad and not adapted.lora_A.requires_grad


def test_singular_start_takes_each_slice_apart():
    adapted = layer(("k", "v"), init_A="singular", moved=False)
    for A, weight in zip(adapted.lora_A, adapted.base.weight.split(24)[1:], strict=True):
        torch.testing.assert_close(A.abs(), torch.linalg.svd(weight).Vh[:4].abs())


def test_passes_for_a_linear_layer():
    adapted = layer()
    x = torch.randn(3, 24)
    assert (adapted.in_features, adapted.out_features) == (24, 72)
    assert adapted.bias is adapted.base.bias
    torch.testing.assert_close(nn.functional.linear(x, adapted.weight, adapted.bias), adapted(x))
    nn.functional.linear(x, adapted.weight).sum().backward()
    assert adapted.lora_B.grad is not None and adapted.lora_B.grad.any()
    assert "q, v, rank=4, trained=B" in repr(adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unmerge_is_exact(dtype):
    adapted = layer(dtype=dtype)
    x, before = torch.randn(3, 24, dtype=dtype), adapted.base.weight.clone()
    y = adapted(x)
    adapted.merge()
    merged = adapted.base.weight.clone()
    adapted.merge()
    assert torch.equal(adapted.base.weight, merged) and not torch.equal(merged, before)
    assert adapted.weight is adapted.base.weight
    tolerance = {torch.bfloat16: 0.05}.get(dtype, 1e-5)
    torch.testing.assert_close(adapted(x), y, atol=tolerance, rtol=tolerance)
    adapted.unmerge()
    adapted.unmerge()
    assert torch.equal(adapted.base.weight, before) and torch.equal(adapted(x), y)


def test_factors_stay_in_float32_beside_a_half_precision_weight():
    adapted = layer(dtype=torch.bfloat16)
    assert adapted.lora_A.dtype == adapted.lora_B.dtype == torch.float32
    y = adapted(torch.randn(3, 24, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and adapted.lora_B.grad.dtype == torch.float32


def test_merging_under_autocast_is_the_same():
    adapted = layer()
    adapted.merge()
    weight = adapted.base.weight.clone()
    adapted.unmerge()
    with torch.autocast("cpu", torch.bfloat16):
        adapted.merge()
    assert torch.equal(adapted.base.weight, weight)


class CountCasts(torch.overrides.TorchFunctionMode):
    def __init__(self, shape):
        super().__init__()
        self.shape, self.casts = shape, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and args[0].shape == self.shape and args[1:] != (args[0].dtype,):
            self.casts += 1
        return func(*args, **(kwargs or {}))


def test_frozen_weight_is_cast_once_under_autocast():
    adapted = layer(dropout=0.1)
    x = torch.randn(3, 24)
    step = torch.optim.SGD([adapted.lora_B], 0.1)
    with CountCasts(adapted.base.weight.shape) as count:
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                y = adapted(x)
            y.float().square().sum().backward()
            step.step()
    assert count.casts == 1


def test_cast_follows_the_weight():
    adapted = layer()
    x = torch.randn(3, 24)

    def output():
        with torch.autocast("cpu", torch.bfloat16):
            return adapted(x)

    with torch.inference_mode():
        before = output()
    output().sum().backward()  # the cast from inference mode can be trained with
    other = copy.deepcopy(adapted)
    with torch.no_grad():
        adapted.base.weight.mul_(2)
    assert not torch.equal(output(), before)
    adapted.base.weight.data = other.base.weight.data.clone()
    assert torch.equal(output(), before)
    adapted.base.bias.data.add_(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(other(x), before)
    adapted.load_state_dict(other.state_dict())
    assert torch.equal(output(), before)
    assert adapted.double()._cast is None
    assert set(adapted.state_dict()) == {"lora_A", "lora_B", "base.weight", "base.bias"}


@pytest.mark.parametrize("bf16", [False, True])
def test_evaluation_forms_the_weight_once_until_something_changes(bf16):
    adapted, x = layer(), torch.randn(2, 3, 24)

    def output():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return adapted(x)

    def kept():
        """The weight that evaluation keeps; its results are those of training, which forms it in each step."""
        expected = output().detach()
        assert adapted._folded is None  # training keeps no second weight
        with torch.no_grad():
            assert torch.equal(output(), expected)
            first = adapted._folded[1]
            assert torch.equal(output(), expected) and adapted._folded[1] is first
        with torch.inference_mode():
            assert torch.equal(output(), expected)
        return first

    @torch.no_grad()
    def is_formed_again(change):
        before, old = output(), adapted._folded[1]
        change()
        after = output()
        return adapted._folded[1] is not old and not torch.equal(after, before)

    kept()
    assert is_formed_again(lambda: adapted.lora_B.data.add_(1))  # optimizers that do so give B no new version
    assert is_formed_again(lambda: adapted.lora_A.data.add_(1))
    assert is_formed_again(lambda: setattr(adapted, "strength", 0.5))
    assert is_formed_again(lambda: adapted.base.weight.mul_(2))
    assert is_formed_again(lambda: setattr(adapted.base.weight, "data", adapted.base.weight.data.clone().neg()))
    assert is_formed_again(lambda: adapted.load_state_dict({k: v + 1 for k, v in adapted.state_dict().items()}))
    kept()
    assert copy.deepcopy(adapted)._folded is None and adapted.double()._folded is None


def test_dropout_only_in_training():
    adapted = layer(dropout=0.5)
    x = torch.randn(3, 24)
    assert not torch.equal(adapted(x), adapted(x))
    adapted.eval()
    assert torch.equal(adapted(x), adapted(x))


def test_rank_over_the_width():
    with pytest.raises(AdapterError, match=naming("rank 25", "24")):
        layer(rank=25)
