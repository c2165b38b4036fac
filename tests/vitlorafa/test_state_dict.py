"""State dicts of adapted models hold the pretrained weights, merged or not, and load into models of either kind."""

import copy
import io

import pytest
import torch
from adapted import adapted
from messages import naming
from small_models import build, images, perturb
from torch import nn

import vitlorafa
from vitlorafa import AdapterConfig, AdapterError, adapter_layers, inject, load_adapter, save_adapter

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def merged(model):
    return vitlorafa.merge(copy.deepcopy(model))


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("into", ["plain", "merged"])
@pytest.mark.parametrize("of", ["plain", "merged", "disabled"])
def test_both_ways(of, into, assign):
    model, fresh = adapted(), adapted(seed=9)
    x = images(model)
    y, original = model(x), build("vit_small_patch16_224", depth=1).train()(x)
    source = model if of == "plain" else merged(model)
    state = source.state_dict()
    if of == "disabled":
        with vitlorafa.disable_adapter(source):
            state = source.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    before = copy.deepcopy(state)
    target = fresh if into == "plain" else merged(fresh)
    assert target.load_state_dict(state, assign=assign) == ([], [])
    assert all(layer.merged == (into == "merged") for _, layer in adapter_layers(target))
    torch.testing.assert_close(target(x), y, **CLOSE)
    vitlorafa.unmerge(target)
    assert torch.equal(target(x), y)
    with vitlorafa.disable_adapter(target):
        torch.testing.assert_close(target(x), original, **CLOSE)
    assert all(torch.equal(value, before[name]) for name, value in state.items())  # the caller's stays


@torch.no_grad()
def test_merging_leaves_a_state_dict_that_was_taken_before():
    model = adapted()
    state, kept = model.state_dict(), copy.deepcopy(model.state_dict())
    vitlorafa.merge(model)
    assert all(torch.equal(value, kept[name]) for name, value in state.items())
    vitlorafa.unmerge(model)
    assert all(value.data_ptr() == state[name].data_ptr() for name, value in model.state_dict().items())


@torch.no_grad()
def test_factors_alone_into_a_merged_model():
    model, fresh = adapted(), merged(adapted(seed=9))
    factors = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    missing, unexpected = fresh.load_state_dict(factors, strict=False)
    assert not unexpected and len(missing) == len(model.state_dict()) - len(factors)
    torch.testing.assert_close(fresh(images(model)), model(images(model)), **CLOSE)
    vitlorafa.unmerge(fresh)
    assert torch.equal(fresh(images(model)), model(images(model)))


@torch.no_grad()
def test_a_state_dict_that_does_not_fit_leaves_the_model_merged():
    model = merged(adapted())
    x = images(model)
    y = model(x)
    state = model.state_dict()
    name = next(name for name in state if name.endswith("base.weight"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, name: torch.zeros(2, 2)})
    assert torch.equal(model(x), y)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_merged_models(dtype):
    model = merged(adapted())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other.to(dtype)
        expected = adapted().to(dtype)
        state = other.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())
        vitlorafa.unmerge(other)
        assert torch.equal(other(images(model).to(dtype)), expected(images(model).to(dtype)))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    adapted(seed=9).load_state_dict(torch.load(file, weights_only=True))


@torch.no_grad()
def test_one_layer_and_models_around_it():
    model = nn.Sequential(merged(adapted()))
    fresh = nn.Sequential(adapted(seed=9))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(images(model[0])), model(images(model[0])), **CLOSE)
    (_, layer), *_ = adapter_layers(model)
    (_, other), *_ = adapter_layers(adapted(seed=9))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.base.weight, layer.pretrained_weight) and not torch.equal(
        other.base.weight, layer.base.weight
    )


def test_nothing_is_merged_or_taken_out_while_disabled():
    """The weights would not be the model's own when the context ends."""
    model = vitlorafa.merge(adapted())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for function in (vitlorafa.merge, vitlorafa.unmerge, vitlorafa.remove, vitlorafa.merge_and_unload):
        with (
            vitlorafa.disable_adapter(model),
            pytest.raises(AdapterError, match=naming("disable_adapter(model)")),
        ):
            function(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_loading_while_disabled(tmp_path):
    model = inject(build("test_vit"), AdapterConfig(rank=2))
    perturb(model)
    save_adapter(model, tmp_path)
    other = vitlorafa.merge(inject(build("test_vit"), AdapterConfig(rank=2)))
    with vitlorafa.disable_adapter(other):
        load_adapter(other, tmp_path)
    vitlorafa.unmerge(other)
    assert torch.equal(other(images(model)), model(images(model)))


def test_casts_of_the_base_do_not_outlive_a_loaded_state_dict():
    model = inject(build("test_vit"), AdapterConfig(rank=2, compute="separate"))
    with torch.autocast("cpu", torch.bfloat16):
        model(images(model))
    layers = [layer for _, layer in adapter_layers(model)]
    assert all(layer._cast is not None for layer in layers)
    model.load_state_dict(model.state_dict())
    assert all(layer._cast is None for layer in layers)
