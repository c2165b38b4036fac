"""`vitlorafa.set_strength`: the update scaled between the pretrained model and the trained one."""

import copy

import pytest
import torch
from adapted import AUTOCAST, COMPUTE_AND_DROPOUT, RANK, TARGETS, assert_same, autocast
from small_models import build, images, perturb

import vitlorafa
from vitlorafa import AdapterConfig, inject, set_strength

VIT = "vit_tiny_patch16_224"
STARTS = pytest.mark.parametrize("init", ["zero", "pissa"])


def trained(init="zero", architecture=VIT, fast=False, **kwargs):
    """A plain model, and the same with a trained adapter."""
    plain = build(architecture)
    if fast:
        vitlorafa.speed_up(plain)
    config = {"rank": RANK, "seed": 0, "train": "BA", "init_B": init, "targets": TARGETS, **kwargs}
    model = inject(copy.deepcopy(plain), AdapterConfig(**config))
    perturb(model)
    return plain, model


def between(plain, model, a):
    """The plain model with weights between its own and the trained ones."""
    model = vitlorafa.merge_and_unload(copy.deepcopy(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = plain.get_parameter(name)
            parameter.copy_(start + a * (parameter - start))
    return model


@pytest.mark.numbers
@STARTS
@COMPUTE_AND_DROPOUT
@AUTOCAST
@torch.no_grad()
def test_weights_lie_between_the_pretrained_and_the_trained_ones(init, compute, dropout, low):
    plain, model = trained(init, compute=compute, dropout=dropout)
    x = images(plain)
    with autocast(low):
        before, full = plain(x), model(x)
        for a in (0.25, 0.75):
            expected = between(plain, model, a)(x)
            merged = vitlorafa.merge(set_strength(copy.deepcopy(model), a))
            for each in (set_strength(model, a), merged):
                assert_same({"y": each(x)}, {"y": expected}, low)
            set_strength(model, 1)
        assert torch.equal(set_strength(model, 0)(x), before)
        assert torch.equal(set_strength(model, 1)(x), full) and not torch.equal(before, full)
