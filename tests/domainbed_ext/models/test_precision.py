import pytest
import torch
from torch import nn

from domainbed_ext.models import precision
from vitlorafa.layers import FastLinear

pytestmark = pytest.mark.numbers


def layers():
    whole, frozen, bias_frozen = nn.Linear(3, 2), nn.Conv2d(3, 2, 1), nn.Linear(3, 2)
    frozen.requires_grad_(False)
    bias_frozen.bias.requires_grad_(False)
    return nn.ModuleList([whole, frozen, bias_frozen])


def test_what_is_frozen_is_held_in_bf16_and_what_trains_stays_torchs_own():
    model = layers()
    precision.hold(model, "bf16")
    assert [type(layer) for layer in model] == [nn.Linear, precision.HeldConv2d, FastLinear]
    assert {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16} == {
        "1.weight",
        "1.bias",
        "2.bias",
    }


def test_float32_changes_nothing():
    model = layers()
    precision.hold(model, "float32")
    assert [type(layer) for layer in model] == [nn.Linear, nn.Conv2d, nn.Linear]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
