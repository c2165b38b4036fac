"""`vitlorafa.average`: the mean of saved adapters."""

import copy
import json
import math
import os
import warnings

import numpy as np
import pytest
import torch
from messages import naming
from safetensors.torch import load_file
from small_models import build, images
from torch import nn

import vitlorafa
from vitlorafa import (
    AdapterConfig,
    AdapterError,
    AdapterWarning,
    adapter_layers,
    average,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from vitlorafa.low_rank import approximate, product_norm


def trained(architecture="test_vit", seed=0, draw=0, **kwargs):
    """A model whose factors that train are random, as after a training."""
    config = {"rank": 3, "seed": seed, "targets": "all", **kwargs}
    model = inject(build(architecture), AdapterConfig(**config), train_head=True)
    generator = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def save_all(models, tmp_path, **kwargs):
    return [save_adapter(model, tmp_path / f"{i}", **{"head": True, **kwargs}) for i, model in enumerate(models)]


def updates(model):
    """The merged updates, in float64: what `merge` adds to each weight."""
    model = copy.deepcopy(model)
    before = {name: layer.base.weight.double() for name, layer in adapter_layers(model)}
    merge(model)
    return {name: layer.base.weight.double() - before[name] for name, layer in adapter_layers(model)}


def exact_updates(model):
    """The updates by their formula, in float64."""
    return {name: layer.double().delta_weight().detach() for name, layer in adapter_layers(copy.deepcopy(model))}


def mean(values, weights):
    return {name: sum(w * each[name] for w, each in zip(weights, values, strict=True)) for name in values[0]}


def relative(ours, expected):
    """The norm of the difference of all layers, relative to the norm of the expected update."""
    off = sum(float((ours[name] - each).norm() ** 2) for name, each in expected.items())
    return math.sqrt(off / sum(float(each.norm() ** 2) for each in expected.values()))


@pytest.mark.parametrize("train", ["B", "A"])
@torch.no_grad()
def test_mean_of_adapters_with_one_frozen_factor_is_the_mean_of_their_updates(architecture, tmp_path, train):
    models = [trained(architecture, draw=draw, train=train) for draw in range(3)]
    weights = [1, 2, 5]
    result = average(save_all(models, tmp_path), tmp_path / "mean", weights)
    model = load_adapter(build(architecture), result)
    expected = mean([updates(each) for each in models], [each / 8 for each in weights])
    for name, update in updates(model).items():
        torch.testing.assert_close(update, expected[name], rtol=0, atol=1e-6)
        assert update.abs().max() > 1e-2
    assert relative(exact_updates(model), mean([exact_updates(each) for each in models], result.weights)) < 1e-6
    assert result.weights == (0.125, 0.25, 0.625) and result.rank == 3
    assert result.residual == 0 and set(result.residuals.values()) == {0.0}
    for name, head in vitlorafa.head_parameters(model).items():
        torch.testing.assert_close(head, mean([vitlorafa.head_parameters(each) for each in models], result.weights)[name])
    frozen = {"B": "lora_A", "A": "lora_B"}[train]
    for (_, ours), (_, first) in zip(adapter_layers(model), adapter_layers(models[0]), strict=True):
        assert torch.equal(getattr(ours, frozen), getattr(first, frozen))
